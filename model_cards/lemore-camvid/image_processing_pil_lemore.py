# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""LeMoRe's image processor on PIL and NumPy, and what both backends share: reading inputs, label maps, post-processing.

The torchvision backend imports the shared half from here, so that this file works where torchvision is absent.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import numpy as np
from PIL import ExifTags, Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
    load_image,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType, is_torch_available, is_torch_tensor, requires_backends

if is_torch_available():
    import torch
    import torch.nn.functional as F

if TYPE_CHECKING:
    # Never runs. Saving and loading remote code follow relative imports: this one makes the two backends travel together.
    from .image_processing_lemore import LeMoReImageProcessor  # noqa: F401


IGNORE_INDEX = 255
"""Label of pixels that no class is given for, and of padding."""

# One channel, read as it is: Pillow clips or refuses most of these when asked for RGB.
_GREY_MODES = ("1", "L", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_LABEL_MODES = ("1", "L", "P", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")

# Elements that the working arrays of the post-processing hold at once: large enough to hide the cost of a call, small
# enough to stay in the processor's cache.
_BLOCK_ELEMENTS = 1 << 20


class LeMoReImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    do_reduce_labels (`bool`, *optional*, defaults to `self.do_reduce_labels`):
        Whether to subtract one from every label of the segmentation maps, for data sets whose label 0 is "no class"
        (ADE20K, COCO-Stuff): 0 becomes 255, the ignore index, and 255 stays 255.
    """

    do_reduce_labels: bool


class LeMoReImageProcessorMixin:
    """What the two backends share; a backend adds `process_image`, `resize` and `_preprocess`."""

    valid_kwargs = LeMoReImageProcessorKwargs
    # Makes `save_pretrained` copy these source files beside the configuration, for `trust_remote_code=True`.
    _auto_class = "AutoImageProcessor"

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 512, "width": 512}
    default_to_square = True
    crop_size = None
    pad_size = None
    do_convert_rgb = True
    do_resize = True
    do_center_crop = False
    do_pad = False
    do_rescale = True
    do_normalize = True
    do_reduce_labels = False
    rescale_factor = 1 / 255

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[LeMoReImageProcessorKwargs],
    ) -> BatchFeature:
        """Prepares images, and label maps with them, for the model.

        Args:
            images: one image or a (nested) list of them: PIL images of any mode, paths, URLs, and NumPy arrays or torch
                tensors of shape `(height, width)`, `(channels, height, width)`, `(height, width, channels)` or a batch of
                the latter two (grey images in one array need their channel: `(batch, 1, height, width)`). Unsigned 16-bit values are scaled from [0, 65535] to [0, 255]; floats are taken as they are, so
                that values in [0, 1] want `do_rescale=False`. The EXIF orientation of PIL images and files is applied.
                Transparency is laid over white.
            segmentation_maps: for each image a map of its (upright) size with one integer label a pixel: PIL images of
                mode 1, L, P (the indices), I or I;16, paths to such files, and arrays or tensors `(height, width)` or
                `(batch, height, width)` of any dtype whose values are whole. Resized to the nearest label; padding
                gets 255, the ignore index.
            kwargs: override the processor's own settings for this call.

        Returns:
            `pixel_values`, `(batch, channels, height, width)` in float32 when normalised or rescaled, and with
            `segmentation_maps` also `labels`, `(batch, height, width)` in int64. Without `return_tensors`, lists.

        Raises:
            TypeError: for an input that is no image.
            ValueError: for no images at all; for maps of another number or size than the images, or whose values are
                not whole; for a shape that is no image's; for settings that contradict each other; or with
                `return_tensors` when the results have different sizes.
        """
        return super().preprocess(images, segmentation_maps, **kwargs)

    def _standardize_kwargs(self, **kwargs) -> dict[str, Any]:
        kwargs = super()._standardize_kwargs(**kwargs)
        _check_size(
            "size", kwargs.get("size"), ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"})
        )
        _check_size("crop_size", kwargs.get("crop_size"), ({"height", "width"},))
        _check_size("pad_size", kwargs.get("pad_size"), ({"height", "width"},))
        if kwargs.get("data_format") not in (None, ChannelDimension.FIRST):
            raise ValueError(
                f"data_format={kwargs['data_format']!r} is not supported: pixel values are always 'channels_first', the "
                "layout that the model takes."
            )
        return kwargs

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> list:
        """A flat list of single images: of `expected_ndims` dimensions, or of two where that is three (grey)."""
        flat = list(_flatten(images, expected_ndims))
        if not flat:
            raise ValueError("Got an empty list of images: at least one is needed.")
        return flat

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        *,
        do_convert_rgb: bool | None,
        input_data_format: str | ChannelDimension | None,
        return_tensors: str | TensorType | None,
        do_reduce_labels: bool | None,
        device: Union[str, "torch.device", None] = None,
        **kwargs,
    ) -> BatchFeature:
        images = self._prepare_image_like_inputs(
            images, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, device=device
        )
        if kwargs["do_normalize"]:
            _check_statistics(images, kwargs["image_mean"], kwargs["image_std"])
        maps = None
        if segmentation_maps is not None:
            maps = [_read_label_map(item) for item in _flatten(segmentation_maps, 2)]
            _check_pairs(images, maps)

        data = {"pixel_values": self._preprocess(images, return_tensors=None, **kwargs).pixel_values}
        if maps is not None:
            data["labels"] = [
                self._preprocess_label_map(label_map, pixels, do_reduce_labels=do_reduce_labels, **kwargs)
                for label_map, pixels in zip(maps, data["pixel_values"], strict=True)
            ]
        if return_tensors is not None:
            _check_stackable(data["pixel_values"])
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _preprocess_label_map(
        self,
        label_map: np.ndarray,
        pixel_values: Union[np.ndarray, "torch.Tensor"],
        *,
        do_reduce_labels: bool | None,
        do_resize: bool | None,
        size: SizeDict,
        do_center_crop: bool | None,
        crop_size: SizeDict,
        **kwargs,
    ) -> np.ndarray:
        """Takes one `(H, W)` map where its image went, the `pixel_values` of shape `(C, H', W')`; int64 `(H', W')`."""
        if do_resize:
            target = target_size(label_map.shape, size)
            label_map = _resize_nearest(label_map, target.height, target.width)
        label_map = label_map.astype(np.int64)
        if do_reduce_labels:
            void = (label_map == 0) | (label_map == IGNORE_INDEX)
            label_map = np.where(void, IGNORE_INDEX, label_map - 1)
        if do_center_crop:
            label_map = _center_crop(label_map, crop_size.height, crop_size.width, fill=IGNORE_INDEX)
        bottom, right = np.subtract(pixel_values.shape[-2:], label_map.shape)
        return np.pad(label_map, ((0, bottom), (0, right)), constant_values=IGNORE_INDEX)

    def convert_to_rgb(
        self, image: Union[np.ndarray, "torch.Tensor"], input_data_format: str | ChannelDimension | None = None
    ) -> Union[np.ndarray, "torch.Tensor"]:
        """Brings a grey, RGB or RGBA array (uint8 or float32) to RGB `(3, H, W)`; transparency is laid over white."""
        image = channels_first(image, input_data_format)
        if len(image) == 3:
            return image
        if len(image) == 1:
            return image[[0, 0, 0]]
        if len(image) != 4:
            raise ValueError(f"Cannot convert {len(image)} channels to RGB. Pass do_convert_rgb=False to keep them.")
        white = 255 if "uint8" in str(image.dtype) else 1
        if white == 1 and (image.min() < 0 or image.max() > 1):
            raise ValueError(
                f"RGBA floats must lie in [0, 1], got [{float(image.min())}, {float(image.max())}]. Pass uint8 values or "
                "do_convert_rgb=False."
            )
        rgb, alpha = image[[0, 1, 2]], image[3:] / white
        composite = rgb * alpha + white * (1 - alpha)
        rgb[:] = composite.round() if white == 255 else composite  # assigned, to keep the dtype in both libraries
        return rgb

    def to_dict(self) -> dict[str, Any]:
        # Transformers would name only the class that is saved; both are named, so that either backend can be loaded.
        auto_map = {
            "torchvision": "image_processing_lemore.LeMoReImageProcessor",
            "pil": "image_processing_pil_lemore.LeMoReImageProcessorPil",
        }
        return {**super().to_dict(), "auto_map": {"AutoImageProcessor": auto_map}}

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Union[list[tuple[int, int]], "torch.Tensor", None] = None,
        return_segmentation_scores: bool = False,
    ) -> list["torch.Tensor"] | list[SemanticSegmentationPostProcessorOutput]:
        """Turns the output of [`LeMoReForSemanticSegmentation`] into label maps.

        The labels are those of upsampling the logits bilinearly (`align_corners=False`, in float32) and taking the
        best class of each pixel, up to float rounding between the two best; but the scores of the full size are never
        held in memory, nor computed for the classes that cannot win (our choice, see `_upsampled_argmax`). With a
        single label (binary segmentation) a pixel is 1 where the sigmoid of its score exceeds 0.5 and 0 elsewhere.

        Args:
            outputs: has `logits` of shape `(batch, num_labels, height, width)`, on any device.
            target_sizes: a `(height, width)` for each item, of the upright image; by default the size of the logits.
            return_segmentation_scores: also return the raw scores at the target size, which takes
                `num_labels * height * width * 4` bytes an item.

        Returns:
            For each item an int64 map `(height, width)`; with `return_segmentation_scores` a
            [`SemanticSegmentationPostProcessorOutput`] of `segmentation` and `segmentation_scores`
            `(num_labels, height, width)`.

        Raises:
            ValueError: for logits that are not four-dimensional or not finite, and for target sizes that are not one
                pair of positive integers an item.
        """
        requires_backends(self, ["torch"])
        logits = torch.as_tensor(outputs.logits).detach()
        if logits.ndim != 4 or 0 in logits.shape[1:]:
            raise ValueError(
                f"Expected logits of shape (batch, num_labels, height, width), got {tuple(logits.shape)}."
            )
        sizes = _check_target_sizes(target_sizes, len(logits), tuple(logits.shape[-2:]))
        _check_finite(logits)

        label_maps = [_segment(item, size) for item, size in zip(logits, sizes, strict=True)]
        if not return_segmentation_scores:
            return label_maps
        return [
            SemanticSegmentationPostProcessorOutput(
                data={"segmentation": label_map, "segmentation_scores": _resize_scores(item, size)}
            )
            for label_map, item, size in zip(label_maps, logits, sizes, strict=True)
        ]


class LeMoReImageProcessorPil(LeMoReImageProcessorMixin, PilBackend):
    """LeMoRe's image processor on PIL and NumPy: portable, processor only. Same settings as `LeMoReImageProcessor`."""

    def process_image(
        self,
        image: Union[Image.Image, np.ndarray, "torch.Tensor"],
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs,
    ) -> np.ndarray:
        """Brings one image to a uint8 or float32 array `(C, H, W)`."""
        image, input_data_format = read_image(image, do_convert_rgb, input_data_format)
        image = channels_first(image, input_data_format)
        return self.convert_to_rgb(image, ChannelDimension.FIRST) if do_convert_rgb else image

    def resize(
        self, image: np.ndarray, size: SizeDict, resample: PILImageResampling | None = None, **kwargs
    ) -> np.ndarray:
        """Resizes `(C, H, W)` with PIL, antialiased."""
        size = target_size(image.shape[-2:], size)
        if image.dtype == np.uint8 and len(image) == 3:
            return super().resize(image, size, resample, **kwargs)
        # PIL has no image of other depths, and would weigh the colours of four channels by the last.
        channels = [Image.fromarray(channel).resize((size.width, size.height), resample) for channel in image]
        return np.stack([np.array(channel) for channel in channels])

    def center_crop(self, image: np.ndarray, size: SizeDict, **kwargs) -> np.ndarray:
        """Cuts the middle out of `(C, H, W)`, padding with zeros where the image is smaller."""
        return _center_crop(image, size.height, size.width, fill=0)

    def _preprocess(
        self,
        images: list[np.ndarray],
        *,
        do_resize: bool | None,
        size: SizeDict,
        resample: PILImageResampling | None,
        do_center_crop: bool | None,
        crop_size: SizeDict,
        do_rescale: bool | None,
        rescale_factor: float,
        do_normalize: bool | None,
        image_mean: float | tuple[float, ...],
        image_std: float | tuple[float, ...],
        do_pad: bool | None,
        pad_size: SizeDict | None,
        return_tensors: str | TensorType | None,
        **kwargs,
    ) -> BatchFeature:
        processed = []
        for image in images:
            if do_resize:
                image = self.resize(image, size, resample)
            if do_center_crop:
                image = self.center_crop(image, crop_size)
            factor = rescale_factor if do_rescale else 1.0
            if do_normalize:
                # Rescaling and normalising in one: (x · factor - mean) / std
                mean, std = (np.reshape(value, (-1, 1, 1)) / factor for value in (image_mean, image_std))
                image = (image - mean.astype(np.float32)) / std.astype(np.float32)
            elif do_rescale:
                image = image * np.float32(factor)
            processed.append(image)
        if do_pad:
            processed = self.pad(processed, pad_size=pad_size)
        return BatchFeature(data={"pixel_values": processed}, tensor_type=return_tensors)


# Reading images and label maps


def _flatten(images: Any, ndims: int) -> Iterator[Union[Image.Image, np.ndarray, "torch.Tensor"]]:
    """Single images out of nested lists, batches, paths and URLs; a single array has `ndims` dimensions (or is grey)."""
    if isinstance(images, (list, tuple)):
        for item in images:
            yield from _flatten(item, ndims)
    elif isinstance(images, (str, os.PathLike)):
        yield _open(images)
    elif isinstance(images, Image.Image):
        yield images
    elif isinstance(images, np.ndarray) or is_torch_tensor(images):
        if images.ndim == ndims + 1:
            yield from images
        elif images.ndim in {ndims, 2}:
            yield images
        else:
            kind = "a segmentation map" if ndims == 2 else "an image"
            raise ValueError(
                f"The shape {tuple(images.shape)} is not that of {kind}: expected {ndims} dimensions, or {ndims + 1} for "
                "a batch."
            )
    else:
        raise TypeError(
            f"Expected PIL images, NumPy arrays, torch tensors, paths or URLs, got {type(images).__name__}."
        )


def _open(source: str | os.PathLike) -> Image.Image:
    """A file in the mode it has (Transformers' own loader makes RGB of it, which loses labels and 16-bit values)."""
    if not os.path.isfile(source):
        return load_image(os.fspath(source))
    with Image.open(source) as image:
        image.load()
    return image


def _upright(image: Image.Image) -> Image.Image:
    if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        return image  # `exif_transpose` would copy it
    return ImageOps.exif_transpose(image)


def read_image(
    image: Union[Image.Image, np.ndarray, "torch.Tensor"],
    do_convert_rgb: bool | None,
    input_data_format: str | ChannelDimension | None,
) -> tuple[np.ndarray, str | ChannelDimension | None]:
    """The values of an image as uint8 or float32, and their layout where it is known."""
    if isinstance(image, Image.Image):
        image = _upright(image)
        if do_convert_rgb and image.mode not in _GREY_MODES:
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if image.mode != "RGB":  # or it would be copied
                image = image.convert("RGB")
        image, input_data_format = np.array(image), ChannelDimension.LAST
    return _eight_bit(_to_numpy(image)), input_data_format


def _to_numpy(array: Union[np.ndarray, "torch.Tensor"]) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array
    array = array.detach().cpu()
    return (array.float() if array.is_floating_point() else array).numpy()  # NumPy has no bfloat16


def _eight_bit(image: np.ndarray) -> np.ndarray:
    """Integer values of any width as uint8, floats as float32.

    Unsigned 16-bit values are scaled from [0, 65535] to [0, 255]. Signed and wider integers say nothing about their range:
    they are taken for 8 bit if they fit and for 16 bit otherwise (our choice; Pillow reads some 16-bit files as mode I).
    """
    if image.dtype == np.uint8:
        return image
    if image.dtype == bool:
        return image.astype(np.uint8) * 255
    if np.issubdtype(image.dtype, np.floating):
        return image.astype(np.float32, copy=False)
    if not np.issubdtype(image.dtype, np.integer):
        raise TypeError(f"Expected an image of numbers, got the dtype {image.dtype}.")
    low, high = int(image.min()), int(image.max())
    if low < 0 or high > 65535:
        raise ValueError(f"Integer pixel values must lie in [0, 255] or [0, 65535], got [{low}, {high}].")
    is_unsigned_16_bit = image.dtype.kind == "u" and image.dtype.itemsize == 2
    if high <= 255 and not is_unsigned_16_bit:
        return image.astype(np.uint8)
    return ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)


def channels_first(
    image: Union[np.ndarray, "torch.Tensor"], input_data_format: str | ChannelDimension | None
) -> Union[np.ndarray, "torch.Tensor"]:
    """`(C, H, W)` of a grey `(H, W)`, a `(C, H, W)` or an `(H, W, C)` array."""
    if image.ndim == 2:
        return image[None]
    if input_data_format is None:
        try:
            input_data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
        except ValueError as error:
            raise ValueError(
                f"Cannot tell which dimension of an image of shape {tuple(image.shape)} holds the channels (1, 3 or 4 of "
                "them). Pass input_data_format='channels_first' or 'channels_last', and do_convert_rgb=False for other "
                "numbers of channels."
            ) from error
    if input_data_format == ChannelDimension.FIRST:
        return image
    return image.swapaxes(0, 2).swapaxes(1, 2)  # (H, W, C) → (C, H, W)


def _read_label_map(label_map: Union[Image.Image, np.ndarray, "torch.Tensor"]) -> np.ndarray:
    """`(H, W)` labels of an integer or boolean dtype."""
    if isinstance(label_map, Image.Image):
        if label_map.mode not in _LABEL_MODES:
            raise ValueError(
                f"A segmentation map needs one label a pixel, but this PIL image has mode {label_map.mode!r}: expected 1, "
                "L, P, I or I;16. Map colours to labels first."
            )
        label_map = np.array(_upright(label_map))
    labels = _to_numpy(label_map)
    if labels.dtype.kind not in "buif":
        raise TypeError(f"Segmentation maps must hold numbers, got the dtype {labels.dtype}.")
    if labels.dtype.kind != "f":
        return labels
    whole = np.isfinite(labels) & (labels == np.rint(labels))
    if not whole.all():
        raise ValueError(f"Segmentation maps must hold whole labels, got the value {labels[~whole][0]}.")
    return labels.astype(np.int64)


# Sizes


def _check_size(name: str, size: SizeDict | None, allowed: tuple[set[str], ...]) -> None:
    if size is None:
        return
    values = dict(size)
    if set(values) not in allowed:
        forms = " or ".join(str(sorted(keys)) for keys in allowed)
        raise ValueError(f"`{name}` must have the keys {forms}, got {values}.")
    if any(not isinstance(value, (int, np.integer)) or value < 1 for value in values.values()):
        raise ValueError(f"`{name}` must hold positive integers, got {values}.")


def _check_pairs(images: list, maps: list[np.ndarray]) -> None:
    if len(images) != len(maps):
        raise ValueError(f"Got {len(images)} images and {len(maps)} segmentation maps: each image needs one map.")
    for index, (image, label_map) in enumerate(zip(images, maps, strict=True)):
        if tuple(image.shape[-2:]) != label_map.shape:
            raise ValueError(
                f"Image {index} has (height, width) {tuple(image.shape[-2:])} but its segmentation map {label_map.shape}. "
                "Both must have one size, after the EXIF orientation of each is applied."
            )


def _check_statistics(images: list, image_mean: Any, image_std: Any) -> None:
    for name, values in (("image_mean", image_mean), ("image_std", image_std)):
        for image in images:
            if np.size(values) not in (1, len(image)):
                raise ValueError(
                    f"`{name}` has {np.size(values)} values but the image has {len(image)} channels: {values}. Pass one "
                    "value a channel; with do_convert_rgb=True every image has three."
                )


def _check_stackable(images: list) -> None:
    sizes = sorted({tuple(image.shape[-2:]) for image in images})
    if len(sizes) > 1:
        raise ValueError(
            f"The processed images have different sizes (height, width) and cannot form one tensor: {sizes}. Pass "
            "do_pad=True, a size with height and width, do_center_crop=True, or no return_tensors."
        )


def target_size(current: tuple[int, int], size: SizeDict) -> SizeDict:
    """The height and width that `size` asks of an image of the `current` height and width."""
    if size.shortest_edge is None:
        return size
    height, width = get_size_with_aspect_ratio(tuple(current), size.shortest_edge, size.longest_edge)
    return SizeDict(height=max(height, 1), width=max(width, 1))


def _resize_nearest(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixel that each new pixel's centre falls in: exact for every dtype, where PIL and torch round differently."""
    rows = (2 * np.arange(height) + 1) * image.shape[0] // (2 * height)
    columns = (2 * np.arange(width) + 1) * image.shape[1] // (2 * width)
    return image[rows[:, None], columns]


def _center_crop(image: np.ndarray, height: int, width: int, fill: int) -> np.ndarray:
    """The middle `(…, height, width)`, with `fill` around it where the image is smaller; as torchvision places it."""
    result = np.full((*image.shape[:-2], height, width), fill, dtype=image.dtype)
    source, target = [...], [...]
    for length, wanted in zip(image.shape[-2:], (height, width), strict=True):
        kept, margin = min(length, wanted), abs(length - wanted) // 2
        source.append(slice(margin, margin + kept) if length > wanted else slice(0, kept))
        target.append(slice(0, kept) if length > wanted else slice(margin, margin + kept))
    result[tuple(target)] = image[tuple(source)]
    return result


# Post-processing


def _check_target_sizes(target_sizes: Any, batch_size: int, default: tuple[int, int]) -> list[tuple[int, int]]:
    if target_sizes is None:
        return [default] * batch_size
    sizes = target_sizes.tolist() if hasattr(target_sizes, "tolist") else list(target_sizes)
    if len(sizes) != batch_size:
        raise ValueError(
            f"Got {len(sizes)} target sizes for a batch of {batch_size}: pass one (height, width) for each item."
        )
    for size in sizes:
        if np.ndim(size) != 1 or len(size) != 2 or any(int(value) != value or value < 1 for value in size):
            raise ValueError(f"A target size must be a (height, width) of positive integers, got {size}.")
    return [(int(height), int(width)) for height, width in sizes]


def _check_finite(logits: "torch.Tensor") -> None:
    # Minimum and maximum show what is not finite without an array of the logits' size.
    finite = [torch.stack(torch.aminmax(item)).isfinite().all() for item in logits]
    for index, is_finite in enumerate(torch.stack(finite).tolist() if finite else []):
        if not is_finite:
            raise ValueError(
                f"The logits of batch item {index} are not finite (NaN or infinity), so that no class is the best: look "
                "at the pixel values, or at training that diverged or overflowed float16."
            )


def _resize_scores(scores: "torch.Tensor", size: tuple[int, int]) -> "torch.Tensor":
    """`(C, h, w)` → float32 `(C, H, W)`, bilinear."""
    scores = scores.float()
    if tuple(scores.shape[-2:]) == size:
        return scores
    return F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0]


def _segment(scores: "torch.Tensor", size: tuple[int, int]) -> "torch.Tensor":
    """The int64 label map `(H, W)` of the scores `(C, h, w)` of one item."""
    if len(scores) == 1:
        # sigmoid(x) > 0.5 exactly where x > 0: the second of the two classes 0 and x wins.
        scores = torch.cat([torch.zeros_like(scores), scores])
    if len(scores) * size[0] * size[1] <= max(scores.numel(), _BLOCK_ELEMENTS):
        return _resize_scores(scores, size).argmax(dim=0)  # no larger than the logits, or than a block would be
    return _upsampled_argmax(scores, size)


def _upsampled_argmax(scores: "torch.Tensor", size: tuple[int, int]) -> "torch.Tensor":
    """The best class of each pixel of the bilinearly upsampled scores, without upsampling them all (our own method).

    The pixels between four neighbouring scores form a cell, in which a class lies between the least and the greatest of
    its four corners. A class whose greatest corner is below another's least one cannot win there, which leaves one
    class in most cells: theirs, for all their pixels. In the others, at borders, the few that can win are interpolated.

    Args:
        scores: finite, `(C, h, w)`.
        size: `(H, W)`.

    Returns:
        int64 labels, `(H, W)`.
    """
    rows, columns = (
        _Axis.of(length, target, scores.device) for length, target in zip(scores.shape[1:], size, strict=True)
    )
    # (C, h, w) → (h + 2, w + 2, C): the classes of a place side by side, the border repeated around
    scores = scores.permute(1, 2, 0).float()
    scores = scores[rows.corners][:, columns.corners].contiguous()
    labels = torch.empty(size, dtype=torch.int64, device=scores.device)
    row_elements = max(scores[0].numel(), columns.weights.numel() * rows.weights.shape[1])
    step = max(1, _BLOCK_ELEMENTS // row_elements)
    for start in range(0, len(rows.weights), step):
        _label_cell_rows(scores, rows, columns, range(start, min(start + step, len(rows.weights))), labels)
    return labels


@dataclass(frozen=True)
class _Axis:
    """Where each of `target` pixels lies along one axis of `length` scores.

    A cell spans two neighbouring scores; the first and the last of the `length + 1` cells repeat the border. Positions
    and rounding are those of `torch.nn.functional.interpolate`.

    Args:
        corners: the scores that the cells lie between, with the border repeated, `(length + 2,)`.
        cells: the cell of each pixel, rising, `(target,)`.
        has_pixels: whether a cell has any, which not every one does when shrinking, `(length + 1,)`.
        ends: for each cell, how many pixels it and those before it have.
        pixels: the pixels in each cell, `(length + 1, most pixels in a cell)`; the last one again where a cell has
            fewer, and meaningless where it has none.
        weights: of the second corner at each of these pixels, of the same shape.
    """

    corners: "torch.Tensor"
    cells: "torch.Tensor"
    has_pixels: "torch.Tensor"
    ends: list[int]
    pixels: "torch.Tensor"
    weights: "torch.Tensor"

    @classmethod
    def of(cls, length: int, target: int, device: "torch.device") -> "_Axis":
        scale = torch.tensor(length, dtype=torch.float32) / target
        position = (torch.arange(target, dtype=torch.float32) + 0.5) * scale - 0.5
        below = position.floor()
        cells = below.long() + 1
        counts = torch.bincount(cells, minlength=length + 1)
        ends = counts.cumsum(0)
        pixels = (ends - counts)[:, None] + torch.arange(int(counts.max()))
        pixels = pixels.minimum(ends[:, None] - 1).clamp(min=0)
        corners = torch.arange(-1, length + 1).clamp(0, length - 1)
        weights = (position - below)[pixels]
        return cls(
            corners.to(device),
            cells.to(device),
            (counts > 0).to(device),
            ends.tolist(),
            pixels.to(device),
            weights.to(device),
        )


def _label_cell_rows(
    scores: "torch.Tensor", rows: _Axis, columns: _Axis, block: range, labels: "torch.Tensor"
) -> None:
    """Writes the labels of a block of cell rows into `labels` `(H, W)`, from the scores `(h + 2, w + 2, C)`."""
    first, last = rows.ends[block.start - 1] if block.start else 0, rows.ends[block.stop - 1]
    if first == last:
        return
    corners = scores[block.start : block.stop + 1]
    lowest = torch.minimum(corners[:-1], corners[1:])
    lowest = torch.minimum(lowest[:, :-1], lowest[:, 1:])
    highest = torch.maximum(corners[:-1], corners[1:])
    highest = torch.maximum(highest[:, :-1], highest[:, 1:])
    bound, winner = lowest.max(dim=2)  # (cell rows, cell columns)
    can_win = highest >= bound[..., None]

    row_index = rows.cells[first:last] - block.start
    torch.index_select(winner[:, columns.cells], 0, row_index, out=labels[first:last])
    contested = (can_win.sum(dim=2) > 1) & rows.has_pixels[block.start : block.stop, None] & columns.has_pixels
    _label_contested(scores, rows, columns, contested, can_win[contested], block.start, labels)


def _label_contested(
    scores: "torch.Tensor",
    rows: _Axis,
    columns: _Axis,
    contested: "torch.Tensor",
    can_win: "torch.Tensor",
    first_row: int,
    labels: "torch.Tensor",
) -> None:
    """Writes the labels of the cells where several classes can win.

    Args:
        contested: which cells these are, `(cell rows, cell columns)`, the first of row `first_row`.
        can_win: which classes can win there, `(cells, C)`.
    """
    counts = can_win.sum(dim=1)
    # Cells with the most candidates first, so that those with a k-th candidate are a prefix.
    counts, order = counts.sort(descending=True)
    classes = can_win[order].nonzero()[:, 1]  # the candidates of each cell in rising order, one cell after another
    starts = counts.cumsum(0) - counts
    cell_rows, cell_columns = (index[order] for index in contested.nonzero(as_tuple=True))
    cell_rows = cell_rows + first_row
    num_columns, num_classes = scores.shape[1:]
    flat, top_left = scores.flatten(), (cell_rows * num_columns + cell_columns) * num_classes
    down, right = rows.weights[cell_rows][:, :, None], columns.weights[cell_columns]

    def interpolate(chosen: "torch.Tensor") -> "torch.Tensor":
        """The scores `(cells, R, Q)` of one class a cell, of the first cells."""
        index, n = top_left[: len(chosen)] + chosen, len(chosen)
        upper = torch.lerp(flat[index][:, None], flat[index + num_classes][:, None], right[:n])
        index = index + num_columns * num_classes
        lower = torch.lerp(flat[index][:, None], flat[index + num_classes][:, None], right[:n])
        return torch.lerp(upper[:, None], lower[:, None], down[:n])

    chosen = classes[starts]
    best, winner = interpolate(chosen), chosen[:, None, None].expand(-1, down.shape[1], right.shape[1]).contiguous()
    fewer = torch.bincount(counts, minlength=num_classes + 1).cumsum(0).tolist()
    for k in range(1, num_classes):
        remaining = len(counts) - fewer[k]
        if remaining == 0:
            break
        chosen = classes[starts[:remaining] + k]
        score = interpolate(chosen)
        better = score > best[:remaining]
        winner[:remaining] = torch.where(better, chosen[:, None, None], winner[:remaining])
        torch.maximum(best[:remaining], score, out=best[:remaining])
    # Where a cell has fewer pixels its last one is written again, with the same label.
    labels[rows.pixels[cell_rows][:, :, None], columns.pixels[cell_columns][:, None]] = winner


__all__ = ["LeMoReImageProcessorPil"]
