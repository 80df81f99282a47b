# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Segmentation metrics counted while the data streams by: memory does not grow with the number of images.

`ConfusionMatrix` and `BoundaryIoU` are updated batch by batch, live on the device of the predictions, count in 64 bits
and meet the other processes once, at the end. `trainer_metrics` makes the same counts available to `Trainer`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .post_processing_lemore import segment_logits

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import EvalPrediction
    from typing_extensions import Self  # in `typing` from Python 3.11 on

# What `Trainer` fills labels and predictions up with where the batches of two processes differ in height.
_TRAINER_PADDING = -100


def count_pairs(predictions: Tensor, labels: Tensor, num_classes: int, ignore_index: int | None = 255) -> Tensor:
    """Count the pixels of every (label, prediction) pair.

    Args:
        predictions: integer classes in `[0, num_classes)`, any shape; not looked at where the label is ignored.
        labels: integer classes of the same shape, or `ignore_index` where a pixel is void.
        num_classes: the number of classes K.
        ignore_index: label of the pixels that do not count; `None` counts every pixel.

    Returns:
        int64 tensor of shape (K, K), rows labels and columns predictions, on the device of the predictions.

    Raises:
        ValueError: where a counted label or prediction is outside `[0, num_classes)`. The check reads two counts after
            `bincount`, which waits for a GPU in any case.
    """
    labels, predictions = labels.long().flatten(), predictions.long().flatten()
    label_out = (labels < 0) | (labels >= num_classes)
    prediction_out = (predictions < 0) | (predictions >= num_classes)
    # Void, bad labels and bad predictions get a bin each after the K·K bins of the matrix.
    num_pairs = num_classes * num_classes
    pairs = torch.where(prediction_out, num_pairs + 2, labels * num_classes + predictions)
    pairs = torch.where(label_out, num_pairs + 1, pairs)
    if ignore_index is not None:
        pairs = torch.where(labels == ignore_index, num_pairs, pairs)
    counts = torch.bincount(pairs, minlength=num_pairs + 3)
    bad_labels, bad_predictions = counts[num_pairs + 1 :].tolist()
    if bad_labels:
        _raise_out_of_range("labels", labels[pairs == num_pairs + 1], num_classes, ignore_index)
    if bad_predictions:
        _raise_out_of_range("predictions", predictions[pairs == num_pairs + 2], num_classes, None)
    return counts[:num_pairs].reshape(num_classes, num_classes)


def _raise_out_of_range(what: str, values: Tensor, num_classes: int, ignore_index: int | None) -> None:
    found = values.unique().tolist()
    shown = ", ".join(map(str, found[:10])) + (", ..." if len(found) > 10 else "")
    allowed = f"[0, {num_classes})" + ("" if ignore_index is None else f" and not the ignore index {ignore_index}")
    raise ValueError(
        f"{what} hold values outside {allowed}: {shown} ({values.numel()} pixels). Set `num_labels` to the number of "
        "classes, or map the values (`do_reduce_labels`, the recipe's label mapping) before counting."
    )


def scores_from_confusion_matrix(matrix: Tensor) -> dict[str, Any]:
    """Scores of a confusion matrix.

    Args:
        matrix: (K, K) counts, rows labels and columns predictions.

    Returns:
        Python floats and lists. `per_class_iou` is TP / (TP + FP + FN) and `per_class_accuracy` (recall) TP / (TP + FN);
        each is nan where its denominator is 0: a class in neither labels nor predictions has no IoU, one not in the
        labels no accuracy. `mean_iou` and `mean_accuracy` are means over the classes that have one, as in the
        `mean_iou` of Hugging Face `evaluate`; `overall_accuracy` is the fraction of right pixels. `confusion_matrix`
        holds the counts themselves. With no counted pixel every score is nan.
    """
    counts = matrix.cpu().double()  # Exact up to 2^53 pixels.
    true_positives, label_pixels, predicted_pixels = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou = true_positives / (label_pixels + predicted_pixels - true_positives)
    accuracy = true_positives / label_pixels
    return {
        "mean_iou": iou.nanmean().item(),
        "per_class_iou": iou.tolist(),
        "mean_accuracy": accuracy.nanmean().item(),
        "per_class_accuracy": accuracy.tolist(),
        "overall_accuracy": (true_positives.sum() / counts.sum()).item(),
        "confusion_matrix": matrix.tolist(),
    }


def label_maps(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Predictions as the image processor makes them, without the upsampled scores in memory.

    Args:
        logits: (B, num_labels, h, w), in any precision.
        size: (height, width) of the label maps.

    Returns:
        int64 (B, *size).

    Raises:
        ValueError: if the logits are not finite.
    """
    if not len(logits):
        return torch.empty((0, *size), dtype=torch.int64, device=logits.device)
    return torch.stack(segment_logits(logits.detach(), [tuple(size)] * len(logits)))


class _StreamingCounts(ABC):
    """What both metrics share: a matrix of int64 counts, its inputs checked, and its way between processes."""

    def __init__(self, num_labels: int, ignore_index: int | None, device: torch.device | str | None, extra: int = 0):
        if num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {num_labels}")
        self.num_labels = num_labels
        self.num_classes = max(num_labels, 2)  # One label is binary segmentation: background and foreground.
        self.ignore_index = ignore_index
        self.device = None if device is None else torch.device(device)
        size = self.num_classes + extra
        self.counts = torch.zeros(size, size, dtype=torch.int64, device=device)

    def update(self, predictions: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> None:
        """Count a batch.

        Args:
            predictions: integer label maps of the labels' shape, or logits (B, num_labels, h, w), which are upsampled
                bilinearly to the labels' size; their largest score is the prediction (with one channel, its sign).
            labels: integer label maps (B, H, W), or (H, W) of one image.

        Raises:
            TypeError: floating-point predictions that are not 4-dimensional logits, or floating-point labels.
            ValueError: shapes that do not fit, logits that are not finite, labels or predictions out of range.
                Nothing of the batch has been counted then.
        """
        predictions, labels = torch.as_tensor(predictions), torch.as_tensor(labels)
        self._check(predictions, labels)
        device = self.device or predictions.device
        labels = labels.to(predictions.device)
        if predictions.is_floating_point():
            predictions = label_maps(predictions, tuple(labels.shape[1:]))
        elif labels.ndim == 2:
            predictions, labels = predictions[None], labels[None]
        # An image at a time: the 64-bit temporaries of a whole batch would outweigh the batch.
        batch = sum(self._count(*pair) for pair in zip(predictions, labels, strict=True))
        self.counts = self.counts.to(device) + torch.as_tensor(batch, device=device)

    def _check(self, predictions: Tensor, labels: Tensor) -> None:
        if labels.is_floating_point():
            raise TypeError(f"labels must be integer classes, got {labels.dtype}")
        if labels.ndim not in (2, 3):
            raise ValueError(f"labels must be (B, H, W) or (H, W), got shape {tuple(labels.shape)}")
        if predictions.is_floating_point():
            if predictions.ndim != 4:
                raise TypeError(
                    f"floating-point predictions must be logits (B, num_labels, h, w), got shape "
                    f"{tuple(predictions.shape)}; label maps must be integers"
                )
            if labels.ndim != 3 or len(predictions) != len(labels) or predictions.shape[1] != self.num_labels:
                raise ValueError(
                    f"logits of shape {tuple(predictions.shape)} do not fit labels of shape {tuple(labels.shape)} and "
                    f"num_labels={self.num_labels}: expected logits (B, {self.num_labels}, h, w), labels (B, H, W)"
                )
        elif predictions.shape != labels.shape:
            raise ValueError(
                f"predictions of shape {tuple(predictions.shape)} and labels of shape {tuple(labels.shape)} differ; "
                "bring both to one size, or pass logits"
            )

    @abstractmethod
    def _count(self, prediction: Tensor, label: Tensor) -> Tensor:
        """Counts of one image; both maps (H, W)."""

    def merge(self, *others: _StreamingCounts) -> None:
        """Add the counts of other metrics to this one's; `ValueError` where one is of another kind or configuration."""
        for other in others:
            counts = self._checked(other.counts)
            if type(other) is not type(self) or other._configuration() != self._configuration():
                raise ValueError(
                    f"counts of {type(other).__name__} with {other._configuration()} do not add to those of "
                    f"{type(self).__name__} with {self._configuration()}"
                )
            self.counts = self.counts + counts.to(self.counts.device)

    def reduce(self, accelerator: Accelerator | None = None) -> Self:
        """A new metric with the sum over all processes, on every process; this one keeps its own counts.

        Collective: every process must call it, once, when all have counted. Without an `accelerator` the default group
        of `torch.distributed` is used; where there is none, the sum is this process's counts.

        Samples that a data loader repeated to fill the last batch are counted as often as they were passed: drop them
        before `update` (`accelerator.gather_for_metrics`), or prepare the loader with `even_batches=False`.
        """
        total = self.counts.clone()
        if accelerator is not None:
            total = accelerator.reduce(total.to(accelerator.device), reduction="sum")
        elif torch.distributed.is_available() and torch.distributed.is_initialized():
            if torch.distributed.get_backend() == "nccl":  # which takes nothing from the CPU
                total = total.cuda()
            torch.distributed.all_reduce(total)
            total = total.to(self.counts.device)
        summed = type(self).__new__(type(self))
        summed.__dict__.update(self.__dict__)
        summed.counts = total
        return summed

    def reset(self) -> None:
        """Forget everything counted."""
        self.counts = torch.zeros_like(self.counts)

    def to(self, device: torch.device | str) -> Self:
        """Move the counts, and keep them on `device` from now on."""
        self.device = torch.device(device)
        self.counts = self.counts.to(device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """The counts, for a checkpoint (as `accelerator.register_for_checkpointing` wants them)."""
        return {"counts": self.counts.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over counts saved by `state_dict`; `ValueError` where they are of another number of classes."""
        self.counts = self._checked(state["counts"]).to(self.counts.device, torch.int64)

    def _configuration(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("counts", "device")}

    def _checked(self, counts: Tensor) -> Tensor:
        if counts.shape != self.counts.shape:
            raise ValueError(
                f"counts of shape {tuple(counts.shape)} do not fit this metric, whose counts are "
                f"{tuple(self.counts.shape)}: it was made with num_labels={self.num_labels}"
            )
        return counts


class ConfusionMatrix(_StreamingCounts):
    """Streaming confusion matrix of semantic segmentation.

    Args:
        num_labels: the model's number of classes. With 1 (binary, one logit) the two classes background (0) and
            foreground (1) are counted.
        ignore_index: label of void pixels, which do not count; `None` counts every pixel.
        device: where the counts live. Default: the device of the predictions.

    Example:

    ```python
    matrix = ConfusionMatrix(num_labels=model.config.num_labels)
    for batch in loader:
        with torch.no_grad():
            logits = model(batch["pixel_values"]).logits
        matrix.update(logits, batch["labels"])
    print(matrix.reduce(accelerator).compute()["mean_iou"])
    ```
    """

    def __init__(
        self, num_labels: int, ignore_index: int | None = 255, device: torch.device | str | None = None
    ) -> None:
        super().__init__(num_labels, ignore_index, device)

    def _count(self, prediction: Tensor, label: Tensor) -> Tensor:
        return count_pairs(prediction, label, self.num_classes, self.ignore_index)

    def compute(self) -> dict[str, Any]:
        """Scores so far, of this process alone (see `reduce`): the dictionary of `scores_from_confusion_matrix`."""
        return scores_from_confusion_matrix(self.counts)


class BoundaryIoU(_StreamingCounts):
    """Streaming Boundary IoU (Cheng et al., "Boundary IoU", CVPR 2021), summed over all images per class.

    A class's boundary region in a map is those of its pixels from which the class's contour is at most
    `d = dilation_ratio · image diagonal` (rounded, at least 1) away, in the label map and in the prediction each;
    the score is the IoU of the two regions. The image's edge is a contour, as in the authors' code.

    Void pixels (our choice; the paper has none in its binary masks): they do not count, and a border with void is no
    contour in either map, since nobody knows where the object ends there.

    Args:
        num_labels, ignore_index, device: as in `ConfusionMatrix`.
        dilation_ratio: d as a fraction of the image's diagonal, in (0, 1); the paper's is 0.02.
    """

    def __init__(
        self,
        num_labels: int,
        ignore_index: int | None = 255,
        device: torch.device | str | None = None,
        dilation_ratio: float = 0.02,
    ) -> None:
        if not 0 < dilation_ratio < 1:
            raise ValueError(f"dilation_ratio must be between 0 and 1, got {dilation_ratio}")
        super().__init__(num_labels, ignore_index, device, extra=1)  # One more class: off the boundary.
        self.dilation_ratio = dilation_ratio

    def _count(self, prediction: Tensor, label: Tensor) -> Tensor:
        label = label.long()  # where an `ignore_index` of -100 is no class, as it is in bytes
        # Refuses values out of range before the boundaries are looked for.
        count_pairs(prediction, label, self.num_classes, self.ignore_index)
        void = torch.zeros_like(label, dtype=torch.bool) if self.ignore_index is None else label == self.ignore_index
        distance = max(1, round(self.dilation_ratio * math.hypot(*label.shape)))
        on_boundary = [
            torch.where(boundary_region(classes, void, distance), classes.long(), self.num_classes)
            for classes in (prediction, label)
        ]
        return count_pairs(on_boundary[0], on_boundary[1].masked_fill(void, -1), self.num_classes + 1, ignore_index=-1)

    def compute(self) -> dict[str, Any]:
        """`boundary_iou` (mean over the classes with a boundary in labels or predictions) and
        `per_class_boundary_iou` (nan for the others), of this process alone (see `reduce`)."""
        per_class = scores_from_confusion_matrix(self.counts)["per_class_iou"][: self.num_classes]
        return {
            "boundary_iou": torch.tensor(per_class, dtype=torch.float64).nanmean().item(),
            "per_class_boundary_iou": per_class,
        }


def boundary_region(classes: Tensor, void: Tensor, distance: int) -> Tensor:
    """Pixels with another class, or the outside of the image, within `distance` pixels in rows and columns.

    Eroding each class's mask `distance` times by a 3×3 square leaves the pixels whose window of 2·distance+1 holds
    that class alone: whose largest and smallest class are equal, which finds the boundaries of all classes at once.

    Args:
        classes: integer classes (H, W), at least 0 where not void.
        void: bool (H, W); these pixels belong to every class.
        distance: in pixels, at least 1.

    Returns:
        bool (H, W); its values at void pixels mean nothing.
    """
    outside = 2**24 - 1  # Larger than any class, and exact in float32.
    values = classes.float()

    def window_max(x: Tensor) -> Tensor:
        padded = F.pad(x, (distance,) * 4, value=outside)[None, None]
        rows = F.max_pool2d(padded, (2 * distance + 1, 1), stride=1)
        return F.max_pool2d(rows, (1, 2 * distance + 1), stride=1)[0, 0]

    largest = window_max(values.masked_fill(void, -outside))
    smallest = -window_max((-values).masked_fill(void, -outside))
    return (largest != values) | (smallest != values)


class TrainerMetrics(NamedTuple):
    """The two functions that `Trainer` takes: `Trainer(..., **trainer_metrics(num_labels)._asdict())`."""

    compute_metrics: Callable[..., dict[str, float]]
    preprocess_logits_for_metrics: Callable[[Any, Tensor], Tensor]


def trainer_metrics(
    num_labels: int,
    id2label: Mapping[int, str] | Mapping[str, str] | Sequence[str] | None = None,
    ignore_index: int = 255,
) -> TrainerMetrics:
    """Streaming mean IoU for `Trainer`; set `TrainingArguments(batch_eval_metrics=True)` so that nothing accumulates.

    `preprocess_logits_for_metrics` turns logits into label maps (int32, the smallest type that all backends of
    `torch.distributed` gather) of the labels' size, or of their own where `Trainer.predict` has no labels;
    `compute_metrics` counts them and, at the last batch, returns `mean_iou`, `mean_accuracy`, `overall_accuracy`, and
    `iou_<class>` and `accuracy_<class>` of every class (nan as in `ConfusionMatrix`), and starts anew. Batches may differ
    in size. With several processes their images must agree in width, since `Trainer` itself pads labels in height only;
    it also drops repeated samples, and gives every process the whole counts.
    While it trains, each process scores its images with batch-norm statistics of its own, where only those of the main
    process are saved: score what was saved, by one `Trainer.evaluate` of the loaded model, for figures to report.
    An evaluation that was interrupted leaves its counts behind: take a new pair, and a new `Trainer`, after that.

    Args:
        num_labels: the model's number of classes.
        id2label: class names by index (`model.config.id2label`); default: the indices themselves.
        ignore_index: label of void pixels, 255 as in the model's loss; -100 is refused, since `Trainer`'s padding
            could not be told from it.

    Raises:
        ValueError: for that, and for names that are not one for each class, all different, counted from 0.
    """
    if ignore_index == _TRAINER_PADDING:
        raise ValueError(f"ignore_index={ignore_index} is what Trainer pads labels with; use another, such as 255")
    matrix = ConfusionMatrix(num_labels, ignore_index)
    names = _class_names(matrix.num_classes, num_labels, id2label)

    def preprocess_logits_for_metrics(logits: Tensor | tuple[Tensor, ...], labels: Tensor | None) -> Tensor:
        logits = logits[0] if isinstance(logits, (tuple, list)) else logits
        if labels is None:
            return label_maps(logits, logits.shape[-2:]).to(torch.int32)
        labels = labels.long()  # in bytes -100 is class 156
        # The logits belong to the image above the padding.
        height = int((labels != _TRAINER_PADDING).any(-1).any(0).sum())
        size = (height or labels.shape[-2], labels.shape[-1])
        maps = label_maps(logits, size).to(torch.int32)
        return F.pad(maps, (0, 0, 0, labels.shape[-2] - size[0]), value=_TRAINER_PADDING)

    def compute_metrics(evaluation: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        predictions, labels = evaluation.predictions, evaluation.label_ids
        # Trainer hands over lists with eval_do_concat_batches=False.
        batched = isinstance(predictions, list)
        for prediction, label in zip(predictions, labels, strict=True) if batched else [(predictions, labels)]:
            label = torch.as_tensor(label).long()
            matrix.update(prediction, label.masked_fill(label == _TRAINER_PADDING, ignore_index))
        if not compute_result:
            return {}
        scores = matrix.compute()
        matrix.reset()
        result = {name: scores[name] for name in ("mean_iou", "mean_accuracy", "overall_accuracy")}
        for score in ("iou", "accuracy"):
            result |= {f"{score}_{name}": x for name, x in zip(names, scores[f"per_class_{score}"], strict=True)}
        return result

    return TrainerMetrics(compute_metrics, preprocess_logits_for_metrics)


def _class_names(
    num_classes: int, num_labels: int, id2label: Mapping[int, str] | Mapping[str, str] | Sequence[str] | None
) -> list[str]:
    if id2label is None:
        return [str(index) for index in range(num_classes)]
    if len(id2label) != num_labels:
        raise ValueError(f"id2label names {len(id2label)} classes, num_labels is {num_labels}")
    if isinstance(id2label, Mapping):
        id2label = {int(index): name for index, name in id2label.items()}  # JSON has words for keys
        if set(id2label) != set(range(num_labels)):
            raise ValueError(
                f"id2label must number the classes from 0 to {num_labels - 1}, got {sorted(id2label)[:8]}: count from 0"
            )
    names = [str(id2label[index]) for index in range(num_labels)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"id2label has several classes of the name {', '.join(twice)}: scores are told apart by names."
        )
    return names if num_labels == num_classes else ["background", *names]
