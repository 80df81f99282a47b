# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Knowledge distillation: what a segmentation network learns from the probabilities of trained ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .data.recipes import Recipe
from .evaluation import check_classes, check_normalization, load_trained_model, mean_scores
from .modeling_lemore import LeMoRePreTrainedModel


class DistillationLoss(nn.Module):
    """
    Divergence of a network's probabilities from those of its teachers (Hinton, Vinyals & Dean, "Distilling the Knowledge
    in a Neural Network", 2015), pixel by pixel and at temperature 1.

    Several teachers are an ensemble: what is learned is the mean of their probabilities. They look at the very batch
    that the network looks at, augmented and mixed alike (Beyer et al., "Knowledge distillation: A good teacher is patient
    and consistent", CVPR 2022), and teach void pixels too.

    Args:
        teachers (`Sequence[PreTrainedModel]`): Segmentation networks of the same classes, at least one. They are not
            trained, whatever the mode of the module that holds the loss; a LeMoRe among them is fused.

    Raises:
        `ValueError`: without a teacher.
    """

    def __init__(self, teachers: Sequence[PreTrainedModel]):
        super().__init__()
        if not teachers:
            raise ValueError("There must be at least one teacher.")
        self.teachers = nn.ModuleList(
            teacher.fuse() if isinstance(teacher, LeMoRePreTrainedModel) else teacher for teacher in teachers
        )
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> DistillationLoss:
        """Teachers stay in evaluation mode."""
        return super().train(False)

    def forward(self, logits: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Args:
            logits (`torch.Tensor` of shape `(batch_size, num_labels, height, width)`):
                The network's own, at any stride; the teachers' logits are resized to it.
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, image_height, image_width)`):
                The normalized images that the network has seen.

        Returns:
            The mean Kullback-Leibler divergence in nats, a scalar in single precision; at least 0, up to rounding.

        Raises:
            `ValueError`: for a single logit, or where the network and its teachers differ in the number of classes.
        """
        targets = self.probabilities(pixel_values, logits.shape[-2:])
        if targets.shape[1] != logits.shape[1]:
            raise ValueError(
                f"The teachers have {targets.shape[1]} classes, the network {logits.shape[1]}: both must agree."
            )
        # `batchmean` divides by the first dimension alone, which is to be that of all pixels.
        log_probabilities = logits.float().log_softmax(1).movedim(1, -1).flatten(0, 2)
        return F.kl_div(log_probabilities, targets.movedim(1, -1).flatten(0, 2), reduction="batchmean")

    @torch.no_grad()
    def probabilities(self, pixel_values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """The mean of the teachers' probabilities, in single precision, `(batch_size, num_labels, *size)`."""
        logits = [teacher(pixel_values).logits.float() for teacher in self.teachers]
        numbers = sorted({scores.shape[1] for scores in logits})
        if len(numbers) > 1:
            raise ValueError(f"Teachers must have the same classes, got some with {numbers} of them.")
        _refuse_single_logit(*numbers)
        return mean_scores(logits, size)


def load_teacher(name_or_path: str | Path, recipe: Recipe) -> PreTrainedModel:
    """A trained segmentation network, LeMoRe or another one of Transformers, that can teach by a recipe.

    Args:
        name_or_path: folder that `save_pretrained` wrote, or Hub id.
        recipe: what it has to agree with: classes in their order, and the normalization of images.

    Raises:
        CheckpointError: for weights that are missing, pickled, damaged, or not those of the whole network.
        OSError: if there is no such model.
        ValueError: for other classes, or images normalized in another way.
    """
    model = load_trained_model(name_or_path, recipe.task)
    _refuse_single_logit(model.config.num_labels)
    check_classes(model, recipe)
    check_normalization(name_or_path, recipe)
    return model


def _refuse_single_logit(num_labels: int) -> None:
    if num_labels == 1:
        raise ValueError("A single logit is no distribution over classes: give a network with an output for each.")
