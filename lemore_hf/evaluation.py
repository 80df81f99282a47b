# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Evaluation on a recipe's data, of LeMoRe and of every other model that returns `logits`, over any number of processes.

```python
result = evaluate_segmentation(model, RecipeDataset(load_split(recipe, "test", data_dir), recipe), recipe)
print(result.scores()["mean_iou"])
```

Batches are the same whatever the number of processes, which take them in turn: every sample is counted once.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification, AutoModelForSemanticSegmentation, PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file

from . import peers  # noqa: F401  Registers them, so that their folders load as any other.
from .checkpointing import CheckpointError, require_safetensors
from .data.augmentation import normalize
from .data.loading import BadSampleError, RecipeDataset, StreamedRecipeDataset, collate, raise_together
from .data.recipes import IGNORE_INDEX, Recipe, listed
from .interruption import shield_worker
from .metrics import BoundaryIoU, ConfusionMatrix, label_maps

Size = tuple[int, int]


@dataclass(frozen=True)
class EvaluatedImage:
    """An image, what was predicted for it and how well. Tensors are uint8 on the CPU."""

    mean_iou: float
    """Mean IoU over the classes of this image's labels and predictions, in 0…1."""
    name: str
    image: Tensor
    """(3, H, W), as the network was given it."""
    labels: Tensor
    """(label height, label width), 255 is void."""
    prediction: Tensor
    """(label height, label width)."""


@dataclass(frozen=True)
class SegmentationEvaluation:
    """What `evaluate_segmentation` has counted, over all processes."""

    confusion_matrix: ConfusionMatrix
    boundary_iou: BoundaryIoU | None
    num_images: int
    worst_images: tuple[EvaluatedImage, ...]
    """The worst first."""

    def scores(self) -> dict[str, Any]:
        """The scores of `ConfusionMatrix.compute`, and those of `BoundaryIoU.compute` where it was asked for."""
        return self.confusion_matrix.compute() | (self.boundary_iou.compute() if self.boundary_iou else {})


@dataclass(frozen=True)
class ClassificationEvaluation:
    """What `evaluate_classification` has counted, over all processes."""

    num_images: int
    top1_correct: int
    top5_correct: int

    def scores(self) -> dict[str, float]:
        """`accuracy` and `top5_accuracy` in 0…1."""
        return {
            "accuracy": self.top1_correct / self.num_images,
            "top5_accuracy": self.top5_correct / self.num_images,
        }


def evaluate(
    model: nn.Module,
    dataset: RecipeDataset | StreamedRecipeDataset,
    recipe: Recipe,
    accelerator: Accelerator | None = None,
    **options: Any,
) -> dict[str, float]:
    """The scores to follow a training by, whatever its task; the first is the one to choose checkpoints by.

    Arguments and errors are those of `evaluate_segmentation` or `evaluate_classification`.

    Returns:
        `mean_iou`, `mean_accuracy` and `overall_accuracy`, or `accuracy` and `top5_accuracy`, on every process.
    """
    if recipe.task == "image-classification":
        return evaluate_classification(model, dataset, recipe, accelerator, **options).scores()
    scores = evaluate_segmentation(model, dataset, recipe, accelerator, **options).scores()
    return {name: scores[name] for name in ("mean_iou", "mean_accuracy", "overall_accuracy")}


@torch.no_grad()
def evaluate_segmentation(
    model: nn.Module,
    dataset: RecipeDataset | StreamedRecipeDataset,
    recipe: Recipe,
    accelerator: Accelerator | None = None,
    *,
    batch_size: int | None = None,
    num_workers: int = 0,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window: Size | None = None,
    window_stride: Size | None = None,
    boundary: bool = False,
    num_worst: int = 0,
    progress: bool = True,
) -> SegmentationEvaluation:
    """Predict every image of a data set and count its pixels, at the size of its labels.

    With an accelerator it is collective: every process calls it, has its share, and gets the counts of all. A streamed
    data set must have been divided among the processes (`StreamedRecipeDataset(rank=..., world_size=...)`).

    Args:
        model: its output has `logits` (B, num_labels, h, w). It is moved to the accelerator's device, evaluated in
            evaluation mode, and left in the mode that it was in.
        dataset: samples of the recipe, not augmented.
        recipe: gives the normalization and the classes.
        accelerator: gives the processes, the device and the precision; by default this process alone on the model's
            device, in the model's precision.
        batch_size: images of a batch; by default the recipe's `eval_batch_size`.
        num_workers: processes that load data.
        scales, flip, window, window_stride: see `predict_labels`.
        boundary: count the Boundary IoU too.
        num_worst: how many of the images with the lowest mean IoU to keep.
        progress: show a progress bar, on the main process.

    Raises:
        ValueError: for options out of range, a model with other classes than the recipe (`check_classes`), images that a
            scale or the window makes too small for the network, logits that are not finite, or no images at all.
        BadSampleError: for a sample that cannot be used, or images of different sizes in a batch; names it, on every
            process.
    """
    _check_options(scales, window, window_stride, num_worst)
    check_classes(model, recipe)
    model, device = _placed(model, accelerator)
    num_labels = model.config.num_labels
    matrix = ConfusionMatrix(num_labels, IGNORE_INDEX, device)
    boundary_iou = BoundaryIoU(num_labels, IGNORE_INDEX, device) if boundary else None
    num_images, worst = 0, []
    with _evaluating(model, accelerator):
        for batch in _batches(dataset, recipe, accelerator, batch_size, num_workers, progress):
            labels = batch["labels"].to(device)
            pixel_values = normalize(batch["pixel_values"], recipe, device)
            predictions = predict_labels(model, pixel_values, labels.shape[-2:], scales, flip, window, window_stride)
            num_images += len(labels)
            matrix.update(predictions, labels)
            if boundary_iou is not None:
                boundary_iou.update(predictions, labels)
            if num_worst:
                worst = _worst([*worst, *_evaluated_images(batch, predictions, num_labels)], num_worst)
    if accelerator is not None:
        matrix = matrix.reduce(accelerator)
        boundary_iou = boundary_iou.reduce(accelerator) if boundary_iou else None
        num_images = int(accelerator.reduce(torch.tensor(num_images, device=device)))
        worst = _worst(gather_object(worst), num_worst)
    _refuse_none(num_images)
    return SegmentationEvaluation(matrix, boundary_iou, num_images, tuple(worst))


@torch.no_grad()
def evaluate_classification(
    model: nn.Module,
    dataset: RecipeDataset | StreamedRecipeDataset,
    recipe: Recipe,
    accelerator: Accelerator | None = None,
    *,
    batch_size: int | None = None,
    num_workers: int = 0,
    progress: bool = True,
) -> ClassificationEvaluation:
    """Count how often the right class is the first, and among the first five.

    Arguments and errors are those of `evaluate_segmentation`; the model's `logits` are (B, num_labels).
    """
    check_classes(model, recipe)
    model, device = _placed(model, accelerator)
    counts = torch.zeros(3, dtype=torch.int64, device=device)  # images, right at first, right among five
    with _evaluating(model, accelerator):
        for batch in _batches(dataset, recipe, accelerator, batch_size, num_workers, progress):
            labels = batch["labels"].to(device)
            logits = model(normalize(batch["pixel_values"], recipe, device)).logits.float()
            if logits.isnan().any():
                raise ValueError("The logits hold NaN: no class can be predicted; look at the weights.")
            is_right = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            counts += torch.stack([is_right.new_ones(len(labels)).sum(), is_right[:, 0].sum(), is_right.sum()])
    if accelerator is not None:
        counts = accelerator.reduce(counts)
    _refuse_none(int(counts[0]))
    return ClassificationEvaluation(*counts.tolist())


def _refuse_none(num_images: int) -> None:
    if num_images == 0:
        raise ValueError("The split that is evaluated has no images: there is nothing to score.")


def predict_labels(
    model: nn.Module,
    pixel_values: Tensor,
    size: Size,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window: Size | None = None,
    window_stride: Size | None = None,
) -> Tensor:
    """Label maps of a batch of images.

    Args:
        model: its output has `logits` (B, num_labels, h, w).
        pixel_values: normalized images (B, 3, H, W).
        size: (height, width) of the label maps, to which the logits are upsampled bilinearly.
        scales: factors that the images are resized by. Where there are several views of an image (scales, flip), their
            class probabilities are averaged at `size`.
        flip: also look at the mirrored image.
        window: (height, width) of a sliding window, for images larger than what the network was trained on; logits are
            averaged where windows overlap. Along a side on which the image is smaller, the window is the image.
        window_stride: (rows, columns) between windows, at most the window; by default two thirds of it (our choice).

    Returns:
        int64 (B, *size).
    """
    views = [
        _view_logits(model, pixel_values, scale, mirrored, window, window_stride)
        for scale in scales
        for mirrored in ((False, True) if flip else (False,))
    ]
    if len(views) == 1:
        return label_maps(views[0], size)
    # An image at a time: the probabilities of all classes at full size are the largest thing in memory.
    images = ([view[index : index + 1] for view in views] for index in range(len(pixel_values)))
    return torch.cat([label_maps(mean_scores(image, size), size) for image in images])


def load_trained_model(name_or_path: str | Path, task: str = "semantic-segmentation") -> PreTrainedModel:
    """A trained LeMoRe or peer, in float32 and evaluation mode.

    Args:
        name_or_path: folder that `save_pretrained` wrote, or Hub id.
        task: a recipe's task.

    Raises:
        CheckpointError: for weights that are missing, pickled, damaged, or not those of the whole network.
        OSError: if there is no such model, or its config.json cannot be read.
        ValueError: for a model that has nothing to do with the task, or a configuration out of range.
        StrictDataclassError: for a configuration with a value of the wrong type.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        require_safetensors(folder)
    is_classification = task == "image-classification"
    auto_class = AutoModelForImageClassification if is_classification else AutoModelForSemanticSegmentation
    try:
        model, report = auto_class.from_pretrained(
            name_or_path, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except SafetensorError as error:
        raise CheckpointError(
            f"The weights of {name_or_path} are truncated or damaged ({error}): copy or train them anew."
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise CheckpointError(
            f"{name_or_path} does not hold the weights of the network that its config.json describes ({error}): bring "
            "back the one that was saved with them."
        ) from error
    except OSError as error:
        if folder.exists():
            raise
        raise OSError(
            f"{name_or_path} is no folder here, and no model of the Hub could be loaded by that name: {error}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{name_or_path} does not hold all weights of {type(model).__name__}, {len(missing)} are missing "
            f"({listed(missing, 5)}): give a model that was trained for {task}."
        )
    return model.eval()


def check_classes(model: nn.Module, recipe: Recipe) -> None:
    """Refuse a model with another number of classes than a recipe, or with some of the same in other places.

    Raises:
        ValueError: which names both.
    """
    config = getattr(model, "module", model).config
    # A single logit tells two classes apart.
    is_binary = config.num_labels == 1 and recipe.task == "semantic-segmentation"
    if recipe.num_classes != (2 if is_binary else config.num_labels):
        raise ValueError(
            f"The model has {config.num_labels} labels, the recipe {recipe.name} has {recipe.num_classes} classes: give "
            "the recipe that the model was trained with."
        )
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    places = {name: index for index, name in enumerate(recipe.class_names)}
    moved = [name for index, name in enumerate(names) if places.get(name, index) != index]
    if moved and not is_binary:
        raise ValueError(
            f"The model has classes of the recipe {recipe.name} in another order ({listed(moved, 5)}): override "
            "class_names or label_map."
        )


def check_normalization(name_or_path: str | Path, recipe: Recipe) -> dict[str, Any]:
    """Refuse to feed a model other pixel values than its own image processor would.

    Returns:
        The processor's settings; none where the model has no processor.

    Raises:
        ValueError: which names both; for settings that are damaged, too.
        OSError: where there is no such model.
    """
    path = cached_file(str(name_or_path), IMAGE_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False)
    try:
        processor = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
        if not isinstance(processor, dict):
            raise ValueError("it holds no settings")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): bring back the one that was saved with the model.") from error
    for field in ("image_mean", "image_std"):
        values = processor.get(field)
        values = [values] * 3 if isinstance(values, (int, float)) else values  # one for all channels
        if values is not None and list(values) != list(getattr(recipe, field)):
            raise ValueError(
                f"{field} is {values} in {path} and {list(getattr(recipe, field))} in the recipe {recipe.name}: if the "
                f"model was trained with the former, add --{field} {' '.join(map(str, values))}."
            )
    expected = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_flip_channel_order": False}
    for field, value in expected.items():
        if not math.isclose(processor.get(field, value) or 0, value):  # null is off
            raise ValueError(
                f"{field} is {processor[field]} in {path}: a recipe's images are rescaled to [0, 1] and normalized, and "
                "their channels stay red, green, blue. Give a model that was trained so."
            )
    return processor


def _check_options(scales: Sequence[float], window: Size | None, window_stride: Size | None, num_worst: int) -> None:
    if not scales or not all(0 < scale < math.inf for scale in scales):
        raise ValueError(f"scales must be one or more positive factors, got {list(scales)}.")
    if window is None and window_stride is not None:
        raise ValueError(f"window_stride {tuple(window_stride)} has no effect without a window: give both.")
    for name, value in (("window", window), ("window_stride", window_stride)):
        if value is not None and (len(value) != 2 or min(value) < 1):
            raise ValueError(f"{name} must be (height, width) of at least 1 pixel each, got {tuple(value)}.")
    if window_stride is not None and (window_stride[0] > window[0] or window_stride[1] > window[1]):
        raise ValueError(
            f"window_stride {tuple(window_stride)} is larger than the window {tuple(window)}: pixels between two "
            "windows would never be looked at."
        )
    if num_worst < 0:
        raise ValueError(f"num_worst must be at least 0, got {num_worst}.")


def _placed(model: nn.Module, accelerator: Accelerator | None) -> tuple[nn.Module, torch.device]:
    if accelerator is None:
        return model, next(model.parameters(), torch.empty(0)).device
    # Without its wrapper the processes need not make the same number of forward passes.
    return accelerator.unwrap_model(model).to(accelerator.device), accelerator.device


@contextlib.contextmanager
def _evaluating(model: nn.Module, accelerator: Accelerator | None) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with accelerator.autocast() if accelerator is not None else contextlib.nullcontext():
            yield
    finally:
        model.train(was_training)


def _batches(
    dataset: RecipeDataset | StreamedRecipeDataset,
    recipe: Recipe,
    accelerator: Accelerator | None,
    batch_size: int | None,
    num_workers: int,
    progress: bool,
) -> Iterator[dict[str, Any]]:
    batch_size = recipe.eval_batch_size if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, or None for the recipe's, got {batch_size}.")
    rank, world_size = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    if isinstance(dataset, IterableDataset):
        shares = {"batch_size": batch_size}
        num_workers = min(num_workers, dataset.max_workers)
    else:
        starts = range(rank * batch_size, len(dataset), world_size * batch_size)
        shares = {"batch_sampler": [range(start, min(start + batch_size, len(dataset))) for start in starts]}
    loader = DataLoader(
        dataset,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=accelerator is not None and accelerator.device.type == "cuda",
        worker_init_fn=shield_worker,
        # A generator of its own, so that evaluating in the middle of a training leaves the one of dropout alone.
        generator=torch.Generator(),
        **shares,
    )
    total = None if isinstance(dataset, IterableDataset) else len(loader)
    error = None
    try:
        yield from tqdm(loader, "Evaluating", total, unit="batch", leave=False, disable=not progress or rank != 0)
    except BadSampleError as bad_sample:
        if accelerator is None:
            raise
        error = bad_sample
    if accelerator is not None:
        raise_together(error)


def _view_logits(
    model: nn.Module,
    pixel_values: Tensor,
    scale: float,
    mirrored: bool,
    window: Size | None,
    window_stride: Size | None,
) -> Tensor:
    """Logits (B, num_labels, h, w) of one view, in float32 and the right way round."""
    if scale != 1:
        size = [max(1, round(scale * side)) for side in pixel_values.shape[-2:]]
        pixel_values = F.interpolate(pixel_values, size=size, mode="bilinear", antialias=True)
    if mirrored:
        pixel_values = pixel_values.flip(-1)
    height, width = pixel_values.shape[-2:]
    if window is None or (window[0] >= height and window[1] >= width):
        logits = model(pixel_values).logits.float()
    else:
        logits = _window_logits(model, pixel_values, window, window_stride)
    return logits.flip(-1) if mirrored else logits


def _window_logits(model: nn.Module, pixel_values: Tensor, window: Size, stride: Size | None) -> Tensor:
    """Logits (B, num_labels, H, W), the mean of all windows that cover a pixel."""
    size = pixel_values.shape[-2:]
    window = tuple(min(sides) for sides in zip(window, size, strict=True))
    stride = stride or tuple(math.ceil(2 * side / 3) for side in window)
    tops, lefts = (_window_starts(*sides) for sides in zip(size, window, stride, strict=True))
    total, count = 0, pixel_values.new_zeros(1, 1, *size)
    for top in tops:
        for left in lefts:
            rows, columns = slice(top, top + window[0]), slice(left, left + window[1])
            logits = model(pixel_values[..., rows, columns]).logits.float()
            if isinstance(total, int):
                total = logits.new_zeros(*logits.shape[:2], *size)
            total[..., rows, columns] += F.interpolate(logits, size=window, mode="bilinear", align_corners=False)
            count[..., rows, columns] += 1
    return total / count


def _window_starts(length: int, window: int, stride: int) -> list[int]:
    """Every `stride` pixels as far as windows fit, and once at the end."""
    return sorted({*range(0, length - window, stride), length - window})


def mean_scores(views: list[Tensor], size: Size) -> Tensor:
    """Mean class probabilities (B, num_labels, *size) of logits (B, num_labels, ·, ·); of one label, less a half."""
    mean = 0
    for logits in views:
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        # A single score means class 1 where it is above 0.
        mean = mean + (logits.softmax(1) if logits.shape[1] > 1 else logits.sigmoid() - 0.5) / len(views)
    return mean


def _evaluated_images(batch: dict[str, Any], predictions: Tensor, num_labels: int) -> Iterator[EvaluatedImage]:
    """The images of a batch, without those that are all void."""
    for image, labels, prediction, name in zip(
        batch["pixel_values"], batch["labels"], predictions.cpu(), batch["name"], strict=True
    ):
        matrix = ConfusionMatrix(num_labels, IGNORE_INDEX)
        matrix.update(prediction, labels)
        mean_iou = matrix.compute()["mean_iou"]
        if not math.isnan(mean_iou):
            # Copied: a slice would keep its whole batch in memory.
            yield EvaluatedImage(mean_iou, name, image.clone(), labels.clone(), prediction.to(torch.uint8))


def _worst(images: list[EvaluatedImage], number: int) -> list[EvaluatedImage]:
    return sorted(images, key=lambda image: (image.mean_iou, image.name))[:number]
