# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""The streaming confusion matrix as a metric of Hugging Face `evaluate` (an optional dependency, the extra `metrics`).

Use it as `MeanIoU(num_labels=...)` or, by this file's path, with `evaluate.load`; nothing is fetched from the Hub.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from lemore_hf.metrics import ConfusionMatrix

_INPUTS = """
Args:
    predictions: list or array of integer label maps (H, W), which may differ in size from image to image.
    references: the ground truth, of the same sizes; pixels of `ignore_index` do not count.

Returns:
    `mean_iou`, `mean_accuracy`, `overall_accuracy` (floats), `per_category_iou` and `per_category_accuracy` (arrays,
    nan for classes that do not occur), the keys of the `mean_iou` metric of the Hub.
"""


class MeanIoU(evaluate.Metric):
    """Mean IoU that counts every batch when it is added, where other metrics of `evaluate` store the images.

    Args:
        num_labels: number of classes.
        ignore_index: label of void pixels.
        kwargs: of `evaluate.Metric`. Over several processes `compute` sums up through `torch.distributed`.
    """

    def __init__(self, *args: Any, num_labels: int, ignore_index: int | None = 255, **kwargs: Any) -> None:
        self.matrix = ConfusionMatrix(num_labels, ignore_index)
        # Options of the Hub's metric that are met as they are.
        self._met = {"num_labels": num_labels, "ignore_index": ignore_index, "reduce_labels": False}
        self._met |= {"label_map": None, "nan_to_num": None}
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        label_map = datasets.Sequence(datasets.Sequence(datasets.Value("uint16")))
        return evaluate.MetricInfo(
            description="Mean intersection over union of semantic segmentation, from one confusion matrix.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": label_map, "references": label_map}),
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Count one image.

        Raises:
            RuntimeError: where there are to be several processes, but none of them knows of the others.
        """
        self._refuse_others(kwargs)
        if self.num_process > 1 and not torch.distributed.is_initialized():
            raise RuntimeError(
                f"num_process is {self.num_process}, but torch.distributed is not initialized, through which they are "
                "summed up: call torch.distributed.init_process_group first, or make an Accelerator."
            )
        self.matrix.update(_as_label_map(prediction), _as_label_map(reference))

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Count a batch of images."""
        self._refuse_others(kwargs)
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions and {len(references)} references: one each is needed")
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Scores of all that was added, and of the images given here; the metric starts anew afterwards.

        Raises:
            TypeError: for options of the Hub's metric that differ from this one's.
        """
        self._refuse_others(kwargs)
        if (predictions is None) != (references is None):
            raise ValueError("predictions and references belong together: one of them is missing")
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        # Of this process alone, it may be computed in this one alone.
        scores = (self.matrix.reduce() if self.num_process > 1 else self.matrix).compute()
        self.matrix.reset()
        return {
            "mean_iou": scores["mean_iou"],
            "mean_accuracy": scores["mean_accuracy"],
            "overall_accuracy": scores["overall_accuracy"],
            "per_category_iou": np.array(scores["per_class_iou"]),
            "per_category_accuracy": np.array(scores["per_class_accuracy"]),
        }

    def _refuse_others(self, options: dict[str, Any]) -> None:
        """What was counted cannot be changed by options that come later."""
        if other := {
            name: value for name, value in options.items() if name not in self._met or self._met[name] != value
        }:
            raise TypeError(
                f"{', '.join(f'{name}={value!r}' for name, value in other.items())} cannot be set here: give num_labels "
                "and ignore_index to MeanIoU(...), and labels as they are to be counted."
            )


def _as_label_map(image: Any) -> Any:
    """Lists and PIL images as arrays; arrays and tensors stay where they are."""
    return image if hasattr(image, "dtype") else np.array(image)
