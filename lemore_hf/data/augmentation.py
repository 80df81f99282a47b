# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Augmentation and evaluation transforms, on uint8 tensors, as a recipe describes them.

Every random choice comes from a generator made of (seed, epoch, index), so that a sample looks the same whatever the
number of workers and wherever a run was resumed. Pixels stay uint8 until `normalize`, which belongs on the device: a
worker then hands over a fifth of the bytes.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from .recipes import IGNORE_INDEX, Recipe

# Rec. 601 luma, as in torchvision's grey images.
_LUMA = np.array([0.299, 0.587, 0.114])
_RGB_TO_YIQ = np.array([_LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ)
_CROP_TRIES = 10


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of all random choices about one sample in one epoch."""
    return np.random.default_rng((seed, epoch, index))


def normalize(
    pixel_values: torch.Tensor,
    recipe: Recipe,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """uint8 pixels (B, 3, H, W) as the network wants them: moved to `device`, scaled to 0…1, less the recipe's mean,
    over its standard deviation."""
    pixel_values = pixel_values.to(device, non_blocking=True)
    return F.normalize(F.to_dtype(pixel_values, dtype, scale=True), recipe.image_mean, recipe.image_std)


class SegmentationAugmentation:
    """Random scale and crop, photometric distortion, flip and padding of an image and its label map together.

    The crop is chosen first and only its region is resampled: what resizing the whole image and cropping then gives,
    with the region's edges rounded to whole pixels. Label maps take the nearest label, never a mixture; pixel
    centres are aligned with the image's (torch's "nearest-exact").

    Args:
        recipe: gives `crop_size`, `resize`, `scale_range`, `max_class_share`, `flip_prob` and the distortions.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def __call__(
        self, image: torch.Tensor, labels: torch.Tensor, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            image: uint8, (3, H, W).
            labels: uint8, (H, W), classes and 255 for void.
            rng: from `sample_generator`.

        Returns:
            uint8 image (3, *crop_size) and uint8 labels (*crop_size).
        """
        region, size = self._choose_region(labels, rng)
        image = F.resized_crop(image, *region, size, InterpolationMode.BILINEAR, antialias=True)
        labels = F.resized_crop(labels[None], *region, size, InterpolationMode.NEAREST_EXACT)[0]
        image = distort_photometrically(image, self.recipe, rng)
        if rng.random() < self.recipe.flip_prob:
            image, labels = F.horizontal_flip(image), F.horizontal_flip(labels)
        return self._pad(image, labels, rng)

    def _choose_region(
        self, labels: torch.Tensor, rng: np.random.Generator
    ) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
        """Region (top, left, height, width) of the stored image, and the (height, width) that it is resized to."""
        stored = tuple(labels.shape)
        scale = rng.uniform(*self.recipe.scale_range)
        scaled = [max(1, round(scale * length)) for length in resized_size(stored, self.recipe)]
        size = tuple(min(length, crop) for length, crop in zip(scaled, self.recipe.crop_size, strict=True))
        height, width = (
            min(length, max(1, round(length * part / whole)))
            for length, part, whole in zip(stored, size, scaled, strict=True)
        )
        for _ in range(_CROP_TRIES):
            top = int(rng.integers(stored[0] - height + 1))
            left = int(rng.integers(stored[1] - width + 1))
            share = largest_class_share(labels[top : top + height, left : left + width])
            if share <= self.recipe.max_class_share or (height, width) == stored:
                break
        return (top, left, height, width), size

    def _pad(
        self, image: torch.Tensor, labels: torch.Tensor, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Places what is smaller than the crop anywhere in it, since the network knows positions (our choice)."""
        missing = [crop - length for crop, length in zip(self.recipe.crop_size, labels.shape, strict=True)]
        if not any(missing):
            return image, labels
        top, left = (int(rng.integers(rows + 1)) for rows in missing)
        padding = [left, top, missing[1] - left, missing[0] - top]
        mean = [round(255 * value) for value in self.recipe.image_mean]
        return F.pad(image, padding, fill=mean), F.pad(labels[None], padding, fill=IGNORE_INDEX)[0]


class ClassificationAugmentation:
    """Random resized crop (aspect 3/4…4/3), photometric distortion and flip.

    Args:
        recipe: gives `crop_size`, `scale_range` (share of the area), `flip_prob` and the distortions.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def __call__(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """uint8 (3, H, W) → uint8 (3, *crop_size)."""
        region = self._choose_region(tuple(image.shape[-2:]), rng)
        image = F.resized_crop(image, *region, self.recipe.crop_size, InterpolationMode.BILINEAR, antialias=True)
        image = distort_photometrically(image, self.recipe, rng)
        return F.horizontal_flip(image) if rng.random() < self.recipe.flip_prob else image

    def _choose_region(self, stored: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
        for _ in range(_CROP_TRIES):
            area = rng.uniform(*self.recipe.scale_range) * stored[0] * stored[1]
            aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < height <= stored[0] and 0 < width <= stored[1]:
                return (
                    int(rng.integers(stored[0] - height + 1)),
                    int(rng.integers(stored[1] - width + 1)),
                    height,
                    width,
                )
        side = min(stored)
        return (stored[0] - side) // 2, (stored[1] - side) // 2, side, side


def resize_for_evaluation(image: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """The recipe's `resize` of an image (3, H, W); in classification the middle `crop_size` of that."""
    size = resized_size(tuple(image.shape[-2:]), recipe)
    image = F.resize(image, list(size), InterpolationMode.BILINEAR, antialias=True)
    return F.center_crop(image, list(recipe.crop_size)) if recipe.task == "image-classification" else image


def resized_size(stored: tuple[int, int], recipe: Recipe) -> tuple[int, int]:
    """(height, width) of an image of the (height, width) `stored` after the recipe's `resize`."""
    if recipe.resize is None:
        return stored
    if isinstance(recipe.resize, tuple):
        return recipe.resize
    factor = recipe.resize / min(stored)
    if recipe.max_longest_edge is not None:
        factor = min(factor, recipe.max_longest_edge / max(stored))
    return max(1, round(factor * stored[0])), max(1, round(factor * stored[1]))


def largest_class_share(labels: torch.Tensor) -> float:
    """Share of the commonest class among the labelled pixels of a uint8 map; 1 where nothing is labelled."""
    counts = np.bincount(labels.numpy().ravel(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
    return counts.max() / counts.sum() if counts.any() else 1.0


def distort_photometrically(image: torch.Tensor, recipe: Recipe, rng: np.random.Generator) -> torch.Tensor:
    """Random colours, blur and noise of a uint8 image (3, H, W), each with the recipe's probability."""
    image = _change_colours(image, recipe, rng)
    if recipe.blur > 0 and rng.random() < recipe.photometric_prob:
        sigma = recipe.blur * (1 - rng.random())  # never 0
        radius = min(math.ceil(2 * sigma), min(image.shape[-2:]) - 1)  # torchvision mirrors the image at its border
        image = F.gaussian_blur(image, [2 * radius + 1] * 2, [sigma] * 2)
    if recipe.noise > 0 and rng.random() < recipe.photometric_prob:
        # torchvision's noise would come from torch's global generator.
        scale = 255 * rng.uniform(0, recipe.noise)
        noise = torch.from_numpy(rng.standard_normal(image.shape, np.float32)).to(image.device)
        image = noise.mul_(scale).add_(image).add_(0.5).clamp_(0, 255).to(torch.uint8)
    return image


def _change_colours(image: torch.Tensor, recipe: Recipe, rng: np.random.Generator) -> torch.Tensor:
    """Brightness, contrast, saturation and hue.

    The four become one affine map of RGB, applied and clipped once (our choice: torchvision's four steps, hue by way
    of HSV, take some twenty times as long). Hue is a rotation in YIQ; contrast turns about the mean grey of the image,
    saturation about each pixel's grey, as in torchvision.
    """
    apply = rng.random(4) < recipe.photometric_prob
    spread = np.array([recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue])
    brightness, contrast, saturation, turn = [1, 1, 1, 0] + apply * spread * rng.uniform(-1, 1, 4)
    if not (apply & (spread > 0)).any():
        return image
    colour_map, luma = (
        torch.from_numpy(array).to(image.device, torch.float32)
        for array in (_colour_map(brightness, contrast, saturation, turn), _LUMA)
    )
    # A sixteenth of the pixels is enough for the mean.
    mean_grey = luma @ image[:, ::4, ::4].float().mean(dim=(1, 2))
    # Grey stays grey under saturation and hue, so the contrast's offset is the same for all channels. The half rounds
    # to nearest where uint8 would cut off.
    offset = (1 - contrast) * brightness * mean_grey + 0.5
    distorted = torch.addmm(offset.expand(3, 1), colour_map, image.float().reshape(3, -1))
    return distorted.clamp_(0, 255).to(torch.uint8).view(image.shape)


def _colour_map(brightness: float, contrast: float, saturation: float, turn: float) -> np.ndarray:
    """The (3, 3) matrix that does all four to RGB, but for the contrast's offset."""
    angle = 2 * math.pi * turn
    rotation = np.eye(3)
    rotation[1:, 1:] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    hue = _YIQ_TO_RGB @ rotation @ _RGB_TO_YIQ
    saturate = saturation * np.eye(3) + (1 - saturation) * np.outer(np.ones(3), _LUMA)
    return brightness * contrast * hue @ saturate


def mix_images(recipe: Recipe) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None:
    """What the recipe mixes the images of a batch (B, 3, H, W) by, with their int64 labels: MixUp and CutMix with labels
    (B,), in segmentation CutMix and ClassMix with labels (B, H, W). One of those that are on for each batch, with
    probability `mix_prob`; `None` where none is on. They draw from torch's global generator, which a resumed run has to
    restore."""
    mixes = []
    if recipe.task == "semantic-segmentation":
        if recipe.cutmix_alpha > 0:
            mixes.append(CutMixMaps(recipe.cutmix_alpha))
        if recipe.classmix:
            mixes.append(ClassMixMaps(recipe.num_classes))
    else:
        for kind, alpha in ((v2.MixUp, recipe.mixup_alpha), (v2.CutMix, recipe.cutmix_alpha)):
            if alpha > 0:
                mixes.append(kind(alpha=alpha, num_classes=recipe.num_classes))
    return v2.RandomApply([v2.RandomChoice(mixes)], recipe.mix_prob) if mixes else None


class CutMixMaps:
    """CutMix (Yun et al., ICCV 2019) of images and label maps: a rectangle of each image is that of the batch's image
    before it, labels included. torchvision's mixes labels of whole images alone.

    Args:
        alpha: parameter of the beta distribution of the share of the area that stays, as in torchvision.
    """

    def __init__(self, alpha: float):
        self.cutmix = v2.CutMix(alpha=alpha)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) and labels (B, H, W) → new tensors of the same kind."""
        left, top, right, bottom = self.cutmix.make_params([images])["box"]
        mixed = []
        for batch in (images, labels):
            batch = batch.clone(memory_format=torch.preserve_format)
            batch[..., top:bottom, left:right] = batch.roll(1, 0)[..., top:bottom, left:right]
            mixed.append(batch)
        return tuple(mixed)


class ClassMixMaps:
    """ClassMix (Olsson et al., WACV 2021): classes of the batch's image before it are laid over each image, labels
    included. A coin is tossed for each class, where the paper takes half of those present (our choice).

    Args:
        num_classes: labels from there on are void, which is never laid over.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) and labels (B, H, W) → new tensors of the same kind."""
        others = labels.roll(1, 0)
        is_laid = torch.rand(len(labels), self.num_classes + 1) < 0.5
        is_laid[:, -1] = False  # void
        classes = others.clamp(max=self.num_classes).flatten(1)
        mask = is_laid.to(labels.device).gather(1, classes).view_as(labels)
        return torch.where(mask[:, None], images.roll(1, 0), images), torch.where(mask, others, labels)
