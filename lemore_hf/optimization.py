# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Optimizer, its parameter groups, and averages of weights."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    head_lr_multiplier: float,
    head_prefixes: tuple[str, ...],
) -> list[dict[str, Any]]:
    """
    Parameter groups for AdamW or `Muon`: no decay on norms and biases, another rate for the head (TopFormer's settings).

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


class Muon(torch.optim.AdamW):
    """
    Muon for the weights that are matrices, AdamW for all others.

    The step of a matrix is the momentum of its gradients made orthogonal, in which every direction moves as far as any
    other (Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024). It is scaled to the size of
    AdamW's steps, and so takes the same rates and decay (Liu et al., Muon is scalable for LLM training, 2025).

    `torch.optim.Muon` takes matrices alone. Here the kernel of a convolution is a matrix too, of a row for each output
    channel. Norms, biases and depthwise convolutions, whose rows are filters of separate channels, are AdamW's.

    Args:
        params: Parameters, groups of them, or pairs of a name and a parameter.
        lr (`float`): Rate of both.
        momentum (`float`): Of the matrices' gradients, by Nesterov's rule; groups may have one of their own.
        **adamw: Options of `torch.optim.AdamW`, but `fused`; `weight_decay` is also that of the matrices.

    Raises:
        `ValueError`: for a momentum outside [0, 1), a group's own too.
        `TypeError`: for `fused`.
    """

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.95, **adamw: Any):
        if "fused" in adamw:
            raise TypeError("`Muon` has no fused kernel: leave `fused` out.")
        self._momentum = momentum
        # A fused kernel unscales its gradients itself, which would leave those of the matrices scaled.
        super().__init__(params, lr=lr, fused=False, **adamw)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        momentum = param_group.get("momentum", self._momentum)
        if not 0 <= momentum < 1:
            raise ValueError(f"`momentum` must be in [0, 1), got {momentum}.")
        parameters = param_group["params"]
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        for orthogonal in (True, False):
            if part := [parameter for parameter in parameters if _is_matrix(parameter) == orthogonal]:
                own = {"momentum": momentum} if orthogonal else {}
                super().add_param_group({**own, **param_group, "params": part, "orthogonal": orthogonal})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            loss = _adamw_step(self, closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["orthogonal"]:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        of_shape = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                of_shape[parameter.flatten(1).shape].append(parameter)
        for shape, parameters in of_shape.items():
            ahead = []
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    # AdamW looks for a count of steps in every state that it loads.
                    state |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(parameter)}
                state["step"] += 1
                gradient = -parameter.grad if group["maximize"] else parameter.grad
                state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
                ahead.append(gradient.lerp(state["momentum_buffer"], group["momentum"]).flatten(1))
            size = 0.2 * max(shape) ** 0.5  # 0.2 is the root mean square of AdamW's steps (Liu et al.)
            for parameter, update in zip(parameters, orthogonalize(torch.stack(ahead)), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * size)


# PyTorch wraps a class's `step` in hooks at its first instance: with AdamW's unwrapped, Muon's run once.
_adamw_step = inspect.unwrap(torch.optim.AdamW.step, stop=lambda step: not hasattr(step, "hooked"))


def _is_matrix(parameter: torch.Tensor | tuple[str, torch.Tensor]) -> bool:
    parameter = parameter[1] if isinstance(parameter, tuple) else parameter
    is_depthwise = parameter.ndim == 4 and parameter.size(1) == 1
    return parameter.ndim > 1 and not is_depthwise


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """
    The nearest semi-orthogonal matrices, roughly: singular values come to between 0.7 and 1.2, tiny ones not as far.

    By the quintic Newton-Schulz iteration of Jordan et al. (2024), whose coefficients give small singular values the
    steepest rise and do without convergence.

    Args:
        matrices (`torch.Tensor` of shape `(number, rows, columns)`): Any; those of zeros stay zero.
        steps (`int`): Iterations.

    Returns:
        `torch.Tensor`: of that shape, of 32-bit floats.
    """
    is_tall = matrices.size(1) > matrices.size(2)
    x = matrices.float().mT if is_tall else matrices.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if is_tall else x


def freeze_batch_norm_statistics(model: nn.Module) -> None:
    """Put the batch norms into evaluation mode, so that training uses and keeps their running statistics.

    To be called after each `model.train()`.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


class ExponentialMovingAverage(Generic[Network]):
    """
    Exponential moving average of a model's weights and batch-norm statistics.

    The decay grows with the number of updates, `min(decay, (1 + n) / (10 + n))`, so that short runs do not average
    over their random start.

    Args:
        model (`nn.Module`): The model to follow; it is copied.
        decay (`float`): The decay in the long run, in [0, 1).
    """

    def __init__(self, model: Network, decay: float):
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
def average_models(models: Sequence[Network]) -> Network:
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
