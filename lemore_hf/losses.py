# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Training criteria of semantic segmentation: weighted cross-entropy, hard example mining, Dice and Lovász."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .loss_lemore import check_label_values, upsampled_cross_entropy
from .operations_lemore import resize_bilinear, tent_filter


class SegmentationCriterion(nn.Module):
    """
    The loss of a training step: cross-entropy, with Dice and Lovász-softmax losses added where they have a weight.

    Args:
        class_weights (`Sequence[float]`, *optional*):
            Weight of each class in the cross-entropy, which is then a weighted mean.
        label_smoothing (`float`): Of the cross-entropy, in [0, 1).
        ohem_threshold (`float`, *optional*):
            Online hard example mining (Shrivastava et al., CVPR 2016): only pixels whose true class has a lower
            probability count.
        ohem_min_kept (`int`): The hardest pixels of a batch, which count whatever their probability.
        dice_weight (`float`): Weight of the soft Dice loss (Milletari et al., 3DV 2016), averaged over the classes present.
        lovasz_weight (`float`): Weight of the Lovász-softmax loss (Berman et al., CVPR 2018), over the classes present.
        lovasz_stride (`int`): It takes the pixels of every n-th row and column, since it sorts all pixels for each class
            (our choice).
        stride (`int`): All terms look at every n-th row and column, from an offset drawn for each batch: on a CPU the
            loss of every pixel takes a good part of a step (our choice). `lovasz_stride` counts what is left.
        ignore_index (`int`): The void label, which no term counts.

    Raises:
        `ValueError`: for label smoothing outside [0, 1) or a stride below 1.
    """

    def __init__(
        self,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        ohem_threshold: float | None = None,
        ohem_min_kept: int = 100_000,
        dice_weight: float = 0.0,
        lovasz_weight: float = 0.0,
        lovasz_stride: int = 1,
        stride: int = 1,
        ignore_index: int = 255,
    ):
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"`label_smoothing` must lie in [0, 1), got {label_smoothing}.")
        for name, value in {"lovasz_stride": lovasz_stride, "stride": stride}.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)
        self.label_smoothing = label_smoothing
        self.ohem_threshold = ohem_threshold
        self.ohem_min_kept = ohem_min_kept
        self.dice_weight = dice_weight
        self.lovasz_weight = lovasz_weight
        self.lovasz_stride = lovasz_stride
        self.stride = stride
        self.ignore_index = ignore_index

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """
        Args:
            logits (`torch.Tensor` of shape `(batch_size, num_labels, height, width)`):
                Scores at any stride. A single label is binary: labels 0 and 1, and two class weights.
            labels (`torch.Tensor` of shape `(batch_size, label_height, label_width)`): Ground truth, of any integer type.

        Returns:
            A scalar in single precision; 0, with gradients of 0, where all pixels are void.

        Raises:
            `ValueError`: for logits of another number of classes than `class_weights`, and for labels on the CPU that are
                neither void nor a class. On a GPU looking at them would stall every step: check them before, with
                `lemore_hf.loss_lemore.check_label_values`.
        """
        logits, labels = logits.float(), labels.long()
        if logits.shape[1] == 1:  # a single logit is the second class's, over 0 for the first
            logits = torch.cat([torch.zeros_like(logits), logits], 1)
        if self.class_weights is not None and len(self.class_weights) != logits.shape[1]:
            raise ValueError(
                f"There are {len(self.class_weights)} class weights for {logits.shape[1]} classes: give one a class."
            )
        if self.stride > 1:
            logits, labels = sample_pixels(logits, labels, self.stride, torch.randint(self.stride, (2,)).tolist())
        if labels.device.type == "cpu":
            check_label_values(labels, logits.shape[1], self.ignore_index)
        if self.ohem_threshold is not None or self.dice_weight or self.lovasz_weight:
            # Softmax works class by class: channels-last logits would be copied at full size, forth and back.
            logits = logits.contiguous()
            if logits.shape[-2:] != labels.shape[-2:]:
                logits = resize_bilinear(logits, labels.shape[-2:])
        counted = labels
        if self.ohem_threshold is not None:
            counted = labels.masked_fill(~self.hard_pixels(logits, labels), self.ignore_index)
        total = upsampled_cross_entropy(logits, counted, self.class_weights, self.ignore_index, self.label_smoothing)
        loss = total / self.total_weight(counted)
        if self.dice_weight:
            loss = loss + self.dice_weight * dice_loss(*self.labelled_pixels(logits, labels))
        if self.lovasz_weight:
            grid = ..., *[slice(self.lovasz_stride // 2, None, self.lovasz_stride)] * 2
            loss = loss + self.lovasz_weight * lovasz_softmax_loss(*self.labelled_pixels(logits[grid], labels[grid]))
        return loss

    def labelled_pixels(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities `(pixels, num_labels)` and classes `(pixels,)` of what is not void."""
        valid = (labels != self.ignore_index).flatten()
        return logits.softmax(1).movedim(1, -1).flatten(0, 2)[valid], labels.flatten()[valid]

    def total_weight(self, labels: torch.Tensor) -> torch.Tensor:
        """What the sum of all pixels' losses is divided by: the classes' weights, 1 each without, of what is not void."""
        valid = labels != self.ignore_index
        if self.class_weights is None:
            return valid.sum().clamp(min=1)
        return (self.class_weights[labels.masked_fill(~valid, 0)] * valid).sum().clamp(min=1e-6)

    @torch.no_grad()
    def hard_pixels(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Whether each pixel is hard: `(batch_size, label_height, label_width)`."""
        probability = (-F.cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction="none")).exp()
        probability = probability.masked_fill(labels == self.ignore_index, torch.inf)
        is_hard = probability < self.ohem_threshold
        if kept := min(self.ohem_min_kept, probability.numel()):
            is_hard |= probability <= probability.flatten().kthvalue(kept).values
        return is_hard


def sample_pixels(
    logits: torch.Tensor, labels: torch.Tensor, stride: int, offset: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every `stride`-th row and column, from `offset` on, of label maps and of the logits that are resized to them,
    without resizing them.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_labels, height, width)`): Scores at any stride.
        labels (`torch.LongTensor` of shape `(batch_size, label_height, label_width)`): Ground truth.
        stride (`int`): Rows and columns from one pixel to the next.
        offset (`Sequence[int]`): First row and column; the last ones of a smaller map.

    Returns:
        Logits in single precision `(batch_size, num_labels, rows, columns)` and labels `(batch_size, rows, columns)`.
    """
    sizes = labels.shape[-2:]
    here = [slice(min(start, size - 1), None, stride) for start, size in zip(offset, sizes, strict=True)]
    # Channels-last logits would stay so, which all terms are slower with.
    logits = logits.to(torch.float32, memory_format=torch.contiguous_format)
    if any(length > size for length, size in zip(logits.shape[-2:], sizes, strict=True)):
        # The tent filter would smooth what shrinks, which resizing logits does nowhere else.
        return resize_bilinear(logits, sizes)[(..., *here)], labels[(..., *here)]
    rows, columns = (
        tent_filter(length, size, logits)[kept]
        for length, size, kept in zip(logits.shape[-2:], sizes, here, strict=True)
    )
    with torch.autocast(logits.device.type, enabled=False):
        return rows @ logits @ columns.t(), labels[(..., *here)]


def dice_loss(probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Soft Dice loss `1 − 2 Σpt / (Σp + Σt)`, averaged over the classes among the targets. Milletari et al. square what is
    summed below the line (our choice).

    Args:
        probabilities (`torch.Tensor` of shape `(pixels, num_labels)`): After softmax.
        targets (`torch.LongTensor` of shape `(pixels,)`): Classes, without void.
    """
    one_hot = F.one_hot(targets, probabilities.shape[1]).to(probabilities.dtype)
    intersection = (probabilities * one_hot).sum(0)
    total = probabilities.sum(0) + one_hot.sum(0)
    present = one_hot.any(0)
    return ((1 - 2 * intersection / total.clamp(min=1e-6)) * present).sum() / present.sum().clamp(min=1)


def lovasz_softmax_loss(probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Lovász extension of the Jaccard loss (Berman et al., 2018, algorithm 1), over the classes among the targets.

    Args:
        probabilities (`torch.Tensor` of shape `(pixels, num_labels)`): After softmax.
        targets (`torch.LongTensor` of shape `(pixels,)`): Classes, without void.
    """
    # (classes, pixels): what is sorted and summed up lies together.
    truth = (
        F.one_hot(targets, probabilities.shape[1]).t().to(probabilities.dtype, memory_format=torch.contiguous_format)
    )
    errors = (truth - probabilities.t()).abs()
    order = _descending_order(errors.detach())
    truth = truth.gather(1, order)
    total = truth.sum(1, keepdim=True)
    intersection = total - truth.cumsum(1)
    union = total + (1 - truth).cumsum(1)
    jaccard = 1 - intersection / union
    gradient = torch.cat([jaccard[:, :1], jaccard.diff(dim=1)], 1)
    present = total[:, 0] > 0
    return ((errors.gather(1, order) * gradient).sum(1) * present).sum() / present.sum().clamp(min=1)


def _descending_order(errors: torch.Tensor) -> torch.Tensor:
    """`errors.argsort(1, descending=True)`. On a CPU NumPy sorts several times as fast as PyTorch."""
    if errors.device.type == "cpu":
        return torch.from_numpy((-errors).float().numpy().argsort(1))  # NumPy knows no bfloat16
    return errors.argsort(1, descending=True)


def count_for_median_frequency(
    label_maps: Iterable[torch.Tensor], num_labels: int, ignore_index: int = 255
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Pixels of each class in a training set, and labelled pixels of the images in which each class occurs.

    Args:
        label_maps (`Iterable[torch.Tensor]`): The set's label maps, integers of shape `(height, width)`.
        num_labels (`int`): Classes.
        ignore_index (`int`): The void label.

    Returns:
        Two `torch.LongTensor` of shape `(num_labels,)`, for `median_frequency_weights`.
    """
    pixel_counts = torch.zeros(num_labels, dtype=torch.long)
    pixels_where_present = torch.zeros(num_labels, dtype=torch.long)
    for labels in label_maps:
        counts = torch.bincount(labels[labels != ignore_index], minlength=num_labels)[:num_labels]
        pixel_counts += counts
        pixels_where_present += counts.sum() * (counts > 0)
    return pixel_counts, pixels_where_present


def median_frequency_weights(pixel_counts: torch.Tensor, pixels_where_present: torch.Tensor) -> list[float]:
    """
    Median frequency balancing (Eigen & Fergus, ICCV 2015): the median class frequency over each class's own. Of an even
    number of classes the median is the lower one of the two in the middle (our choice).

    Args:
        pixel_counts (`torch.Tensor` of shape `(num_labels,)`): Pixels of each class in the training set.
        pixels_where_present (`torch.Tensor` of shape `(num_labels,)`):
            Labelled pixels of the images in which each class occurs.

    Returns:
        A weight for each class; 0 for classes that never occur.
    """
    frequency = pixel_counts.double() / pixels_where_present.clamp(min=1)
    present = pixel_counts > 0
    weights = torch.where(present, frequency[present].median() / frequency.clamp(min=1e-12), 0.0)
    return weights.tolist()
