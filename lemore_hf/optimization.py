# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Optimizer parameter groups and averages of weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    head_lr_multiplier: float,
    head_prefixes: tuple[str, ...],
) -> list[dict]:
    """
    Parameter groups for AdamW: no decay on norms and biases, another rate for the head (TopFormer's settings).

    Args:
        model (`nn.Module`): Its trainable parameters are grouped.
        learning_rate (`float`): Rate of all but the head.
        weight_decay (`float`): Decay of the weights of convolutions and linear layers.
        head_lr_multiplier (`float`): The head's rate over `learning_rate`.
        head_prefixes (`tuple[str, ...]`): What the names of the head's parameters begin with; see
            `lemore_hf.peers.head_prefixes`.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith(head_prefixes), parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * (head_lr_multiplier if is_head else 1.0),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (is_head, decays), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]


def freeze_batch_norm_statistics(model: nn.Module) -> None:
    """Put the batch norms into evaluation mode, so that training uses and keeps their running statistics.

    To be called after each `model.train()`.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


class ExponentialMovingAverage:
    """
    Exponential moving average of a model's weights and batch-norm statistics.

    The decay grows with the number of updates, `min(decay, (1 + n) / (10 + n))`, so that short runs do not average
    over their random start.

    Args:
        model (`nn.Module`): The model to follow; it is copied.
        decay (`float`): The decay in the long run, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.num_updates = 0
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        states = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        averaged, current = zip(*(pair for pair in states if pair[0].is_floating_point()), strict=True)
        torch._foreach_lerp_(averaged, current, 1 - decay)
        if counters := [pair for pair in states if not pair[0].is_floating_point()]:
            torch._foreach_copy_(*zip(*counters, strict=True))


@torch.no_grad()
def average_models(models: Sequence[nn.Module]) -> nn.Module:
    """
    The mean of models' weights and batch-norm statistics (model soups, Wortsman et al., ICML 2022), in the first of them.

    For runs that branched off the same weights: between them the loss stays low. Of runs from different random weights
    the mean is worth nothing.

    Args:
        models (`Sequence[nn.Module]`): One or more, of one architecture.

    Returns:
        `models[0]`, changed in place. Counters are its own.

    Raises:
        `ValueError`: where names or shapes of weights differ.
    """
    states = [model.state_dict() for model in models]
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    for number, other in enumerate(shapes[1:], 2):
        differing = sorted(dict(shapes[0].items() ^ other.items()))
        if differing:
            raise ValueError(
                f"Model {number} differs from the first in {len(differing)} weights, such as {differing[0]!r}: only "
                "models of one architecture have a mean."
            )
    for name, value in states[0].items():
        if value.is_floating_point():
            value.copy_(torch.stack([state[name] for state in states]).mean(0))
    return models[0]
