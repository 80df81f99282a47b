# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""The loss of LeMoRe's segmentation model, and the check of its labels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .operations_lemore import STRIP_BYTES, is_transformed, resize_bilinear, tent_filter


def is_invalid_label(labels: torch.Tensor, num_labels: int, ignore_index: int) -> torch.Tensor:
    """Where labels are neither void nor a class; one label tells two apart."""
    classes = labels.long()  # an ignore index of -100 or 255 is beyond some integer types
    invalid = (classes != ignore_index) & ((classes < 0) | (classes >= max(num_labels, 2)))
    return invalid | (labels != classes) if labels.is_floating_point() else invalid


def check_label_values(labels: torch.Tensor, num_labels: int, ignore_index: int = 255) -> None:
    """
    Refuse labels that name no class. Synchronizes with the device that holds them.

    Args:
        labels (`torch.Tensor` of any shape and type): Ground truth, in whole numbers.
        num_labels (`int`): Classes; 1 stands for a binary task with labels 0 and 1.
        ignore_index (`int`): The void label.

    Raises:
        `ValueError`: naming the values outside of `[0, num_labels)` that are not `ignore_index`.
    """
    raise_for_invalid_labels(
        labels,
        num_labels,
        ignore_index,
        "for void. If the data set counts its classes from 1, set `do_reduce_labels=True` in the image processor; else set "
        "`num_labels` or `semantic_loss_ignore_index` of the configuration to what the data has.",
    )


def raise_for_invalid_labels(labels: torch.Tensor, num_labels: int, ignore_index: int, advice: str) -> None:
    """Raise `ValueError` for labels that are no class; its message ends with `advice`."""
    invalid = is_invalid_label(labels, num_labels, ignore_index)
    if not invalid.any():
        return
    values = labels[invalid].unique().tolist()
    shown = ", ".join(map(str, values[:10])) + (", ..." if len(values) > 10 else "")
    raise ValueError(
        f"`labels` holds values that are no class: {shown}. Expected 0 to {max(num_labels, 2) - 1} "
        f"(`config.num_labels`={num_labels}) or {ignore_index} {advice}"
    )


def segmentation_loss(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = 255) -> torch.Tensor:
    """
    Cross-entropy of the upsampled logits, averaged over the pixels that are not void; 0 where all are.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_labels, height, width)`):
            Scores at any stride. A single label is trained with binary cross-entropy.
        labels (`torch.Tensor` of shape `(batch_size, label_height, label_width)`):
            Ground truth. Values that are no class make the loss and its gradients NaN, never a device-side assertion.
        ignore_index (`int`): The void label.

    Returns:
        A scalar tensor in single precision (double for double logits).
    """
    num_labels = logits.shape[1]
    labels = labels.to(logits.device)  # a `device_map` may leave them elsewhere
    invalid = is_invalid_label(labels, num_labels, ignore_index)
    labels = labels.long()
    valid = labels != ignore_index
    labels = labels.masked_fill(~valid | invalid, ignore_index)
    # Multiplied, not filled: filling would cut the gradients, and the batch would pass unnoticed.
    poison = torch.where(invalid.any(), torch.nan, 1.0)
    logits = logits * poison
    if num_labels == 1:
        logits = resize_bilinear(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.shape[-2:])
        targets = labels.masked_fill(labels == ignore_index, 0).to(logits.dtype)
        losses = F.binary_cross_entropy_with_logits(logits.squeeze(1), targets, reduction="none")
        total = (losses * valid).sum()
    else:
        total = upsampled_cross_entropy(logits, labels, ignore_index=ignore_index)
    return total / valid.sum().clamp(min=1) * poison


def upsampled_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = 255,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """
    `F.cross_entropy(..., reduction="sum")` of logits that are first resized bilinearly to the labels.

    With many classes the resized logits are by far the largest tensor of a training step: 150 classes at 512×512 take
    157 MB an image, several times over. On a CPU they are made a few rows at a time, with their gradient (our choice).

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_labels, height, width)`):
            Scores at any stride, of at least two classes.
        labels (`torch.LongTensor` of shape `(batch_size, label_height, label_width)`):
            Ground truth: classes, or `ignore_index` for void.
        weight (`torch.Tensor` of shape `(num_labels,)`, *optional*): Weight of each class.
        ignore_index (`int`): The void label.
        label_smoothing (`float`): Share of the target that all classes get evenly, in [0, 1).

    Returns:
        A scalar tensor in single precision (double for double logits).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    sizes = list(zip(logits.shape[-2:], labels.shape[-2:], strict=True))
    grows = all(of <= to for of, to in sizes) and any(of < to for of, to in sizes)
    # With fewer classes the whole takes less time than its parts.
    by_rows = logits.device.type == "cpu" and logits.shape[1] >= 32 and grows
    if by_rows and not torch.compiler.is_compiling() and not is_transformed():
        return _CrossEntropyByRows.apply(logits, labels, weight, ignore_index, label_smoothing)
    return _cross_entropy_at_once(logits, labels, weight, ignore_index, label_smoothing)


def _cross_entropy_at_once(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> torch.Tensor:
    # Cross-entropy works class by class: channels-last logits would be copied at full size, forth and back.
    logits = logits.contiguous()
    if logits.shape[-2:] != labels.shape[-2:]:
        logits = resize_bilinear(logits, labels.shape[-2:])
    return F.cross_entropy(
        logits, labels, weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum"
    )


class _CrossEntropyByRows(torch.autograd.Function):
    """`upsampled_cross_entropy` in strips. The gradient is made along with the loss, so that each strip is needed once."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        weight: torch.Tensor | None,
        ignore_index: int,
        label_smoothing: float,
    ) -> torch.Tensor:
        batch_size, num_labels, height, width = logits.shape
        label_height, label_width = labels.shape[-2:]
        num_rows = max(1, STRIP_BYTES // (num_labels * label_width * logits.element_size()))
        weight = logits.new_ones(num_labels) if weight is None else weight.to(logits)
        # Bilinear resizing, separably: rows by a matrix product, columns by `F.interpolate`, which is fast for classes
        # that lie together.
        tent = tent_filter(height, label_height, logits)
        volume = logits.detach().permute(0, 2, 3, 1).reshape(batch_size, height, width * num_labels)
        total, gradient = logits.new_zeros(()), torch.zeros_like(volume) if ctx.needs_input_grad[0] else None
        with torch.autocast("cpu", enabled=False):
            for image, image_labels in enumerate(labels):
                for rows, row_labels in zip(tent.split(num_rows), image_labels.split(num_rows), strict=True):
                    size = (len(rows), label_width)
                    strip = (rows @ volume[image]).view(1, len(rows), width, num_labels).permute(0, 3, 1, 2)
                    scores = resize_bilinear(strip, size).permute(0, 2, 3, 1).reshape(-1, num_labels)
                    loss, difference = _cross_entropy_of_pixels(
                        scores, row_labels.reshape(-1, 1), weight, ignore_index, label_smoothing
                    )
                    total += loss
                    if gradient is not None:
                        difference = difference.view(1, *size, num_labels).permute(0, 3, 1, 2)
                        difference = torch.ops.aten.upsample_bilinear2d_backward(difference, size, strip.shape, False)
                        gradient[image].addmm_(rows.t(), difference.permute(0, 2, 3, 1).reshape(len(rows), -1))
        if gradient is not None:
            gradient = gradient.view(batch_size, height, width, num_labels).permute(0, 3, 1, 2)
            ctx.save_for_backward(gradient, logits, labels, weight)
            ctx.options = ignore_index, label_smoothing
        return total

    @staticmethod
    def backward(ctx: Any, gradient_of_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, logits, labels, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # `create_graph=True`: the gradient is to be differentiated again
            total = _cross_entropy_at_once(logits, labels, weight, *ctx.options)
            (gradient,) = torch.autograd.grad(total, logits, create_graph=True)
        return gradient * gradient_of_total, None, None, None, None


def _cross_entropy_of_pixels(
    scores: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, ignore_index: int, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy of scores `(pixels, num_labels)` against labels `(pixels, 1)`, and its gradient.

    The target q is (1 - ε) w of the true class and ε / C of every class's w: the loss is -Σ q log p, its gradient
    p Σ q - q.
    """
    valid = labels != ignore_index
    labels = labels.masked_fill(~valid, 0)
    certain = (1 - label_smoothing) * weight[labels] * valid
    spread = label_smoothing / len(weight) * weight
    scores = scores.log_softmax(1)
    loss = -(certain * scores.gather(1, labels)).sum()
    if label_smoothing:
        loss -= (scores @ spread)[valid[:, 0]].sum()
    gradient = scores.exp_().mul_(certain + spread.sum() * valid).scatter_add_(1, labels, -certain)
    if label_smoothing:
        gradient.addcmul_(valid.to(spread), spread, value=-1)
    return loss, gradient
