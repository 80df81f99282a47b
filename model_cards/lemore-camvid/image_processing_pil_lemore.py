# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""LeMoRe's image processor on PIL and NumPy, and what both backends share: reading inputs and label maps.

The torchvision backend imports the shared half from here, so that this file works where torchvision is absent.
"""

import base64
import contextlib
import os
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal, Union, overload
from urllib.request import Request, urlopen

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
    PILImageResampling,
    SizeDict,
    get_image_size_for_max_height_width,
    infer_channel_dimension_format,
    torch_pil_interpolation_mapping,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType, is_torch_available, is_torch_tensor, requires_backends

if is_torch_available():
    import torch

    from .post_processing_lemore import resize_scores, segment_logits

if TYPE_CHECKING:
    # Never runs. Saving and loading remote code follow relative imports: this one makes the two backends travel together.
    from .image_processing_lemore import LeMoReImageProcessor  # noqa: F401


IGNORE_INDEX = 255
"""Label of pixels that no class is given for, and of padding."""

ImageInput = Union[Image.Image, np.ndarray, "torch.Tensor", str, os.PathLike, list[Any], tuple[Any, ...]]
"""One image, or a (nested) list of them; Transformers' type of this name leaves out paths and lists of several kinds."""

_SECONDS_TO_WAIT = 60  # for a server, each time

# One channel, read as it is: Pillow clips or refuses most of these when asked for RGB.
_GREY_MODES = ("1", "L", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_LABEL_MODES = ("1", "L", "P", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")


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

    def __init__(self, **kwargs: Unpack[LeMoReImageProcessorKwargs]):
        super().__init__(**kwargs)

    def __call__(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[LeMoReImageProcessorKwargs],
    ) -> BatchFeature:
        """The same as `preprocess`."""
        return self.preprocess(images, segmentation_maps, **kwargs)

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
                the latter two (grey images in one array need their channel: `(batch, 1, height, width)`). Unsigned
                16-bit values are scaled from [0, 65535] to [0, 255]; floats are taken as they are, so that values in
                [0, 1] want `do_rescale=False`. The EXIF orientation of PIL images and files is applied. Transparency is
                laid over white.
            segmentation_maps: for each image a map of its (upright) size with one integer label a pixel: PIL images of
                mode 1, L, P (the indices), I or I;16, paths to such files, and arrays or tensors `(height, width)` or
                `(batch, height, width)` of any dtype whose values are whole. Resized to the nearest label; padding
                gets 255, the ignore index.
            kwargs: override the processor's own settings for this call. Padding and cropping are better settings of the
                processor, `from_pretrained(..., do_pad=True)`: post-processing knows of no others, and undoes those.

        Returns:
            `pixel_values`, `(batch, channels, height, width)` in float32 when normalised or rescaled, and with
            `segmentation_maps` also `labels`, `(batch, height, width)` in int64. Without `return_tensors`, lists.

        Raises:
            TypeError: for an input that is no image, or does not hold numbers.
            OSError: for a file, a PIL image or an address that cannot be read as a picture.
            ValueError: for no images at all, and text that is no path of a file; for integers outside of the two ranges;
                for maps of another number or size than the images, or whose values are not whole; for a shape that is
                no image's; for settings that contradict each other; or with `return_tensors` when the results have
                different sizes.
        """
        return super().preprocess(images, segmentation_maps, **kwargs)

    def _standardize_kwargs(self, **kwargs) -> dict[str, Any]:
        kwargs = super()._standardize_kwargs(**kwargs)
        _check_size("size", kwargs.get("size"), _SIZES)
        _check_size("crop_size", kwargs.get("crop_size"), ({"height", "width"},))
        _check_size("pad_size", kwargs.get("pad_size"), ({"height", "width"},))
        image_std = kwargs.get("image_std")
        if image_std is not None and not np.greater(image_std, 0).all():
            raise ValueError(f"`image_std` must be above 0, since pixels are divided by it, got {image_std}.")
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
            _check_void_is_free(label_map)
            void = (label_map == 0) | (label_map == IGNORE_INDEX)
            label_map = np.where(void, IGNORE_INDEX, label_map - 1)
        is_filled = do_center_crop and np.less(label_map.shape, (crop_size.height, crop_size.width)).any()
        if do_center_crop:
            label_map = _center_crop(label_map, crop_size.height, crop_size.width, fill=IGNORE_INDEX)
        bottom, right = np.subtract(pixel_values.shape[-2:], label_map.shape)
        if is_filled or bottom or right:
            _check_void_is_free(label_map)
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

    @overload
    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Union[Sequence[Sequence[int]], "torch.Tensor", None] = None,
        return_segmentation_scores: Literal[False] = False,
    ) -> list["torch.Tensor"]: ...

    @overload
    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Union[Sequence[Sequence[int]], "torch.Tensor", None] = None,
        *,
        return_segmentation_scores: Literal[True],
    ) -> list[SemanticSegmentationPostProcessorOutput]: ...

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Union[Sequence[Sequence[int]], "torch.Tensor", None] = None,
        return_segmentation_scores: bool = False,
    ) -> list["torch.Tensor"] | list[SemanticSegmentationPostProcessorOutput]:
        """Turns the output of [`LeMoReForSemanticSegmentation`] into label maps.

        The labels are those of upsampling the logits bilinearly (`align_corners=False`, in float32) and taking the
        best class of each pixel, up to float rounding between the two best; but the scores of the full size are never
        held in memory, nor computed for the classes that cannot win (our choice, see `segment_logits`). With a
        single label (binary segmentation) a pixel is 1 where the sigmoid of its score exceeds 0.5 and 0 elsewhere.

        Args:
            outputs: has `logits` of shape `(batch, num_labels, height, width)`, on any device.
            target_sizes: a `(height, width)` for each item, of the upright image; by default the size of the logits.
                What the processor pads (`do_pad`) is cut off again, which needs the sizes of the whole batch. What was
                asked of one call alone (`do_pad=True`) is not known here.
            return_segmentation_scores: also return the raw scores at the target size, which takes
                `num_labels * height * width * 4` bytes an item.

        Returns:
            For each item an int64 map `(height, width)`; with `return_segmentation_scores` a
            [`SemanticSegmentationPostProcessorOutput`] of `segmentation` and `segmentation_scores`
            `(num_labels, height, width)`.

        Raises:
            ValueError: for logits that are not four-dimensional or not finite, for target sizes that are not one
                pair of positive integers an item, and for those of pictures that the processor has cropped
                (`do_center_crop`): most of what lies around the middle was never seen.
        """
        requires_backends(self, ["torch"])
        # A tensor would be moved to where `torch.set_default_device` says.
        logits = outputs.logits.detach() if is_torch_tensor(outputs.logits) else torch.as_tensor(outputs.logits)
        if logits.ndim != 4 or 0 in logits.shape[1:]:
            raise ValueError(
                f"Expected logits of shape (batch, num_labels, height, width), got {tuple(logits.shape)}."
            )
        sizes = _check_target_sizes(target_sizes, len(logits), tuple(logits.shape[-2:]))
        padded = sizes if target_sizes is None else self._with_padding(sizes)
        label_maps = [
            label_map[:height, :width]
            for label_map, (height, width) in zip(segment_logits(logits, padded), sizes, strict=True)
        ]
        if not return_segmentation_scores:
            return label_maps
        return [
            SemanticSegmentationPostProcessorOutput(
                data={"segmentation": label_map, "segmentation_scores": resize_scores(item, size)[:, :height, :width]}
            )
            for label_map, item, size, (height, width) in zip(label_maps, logits, padded, sizes, strict=True)
        ]

    def _with_padding(self, sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """For pictures of these sizes, the sizes of what the network has seen of them, at their own scale."""
        seen = [
            target_size(size, self.size) if self.do_resize else SizeDict(height=size[0], width=size[1])
            for size in sizes
        ]
        seen = [(size.height, size.width) for size in seen]
        if self.do_center_crop:
            crop = (self.crop_size.height, self.crop_size.width)
            for size, before in zip(sizes, seen, strict=True):
                if crop not in (size, before):
                    raise ValueError(
                        f"A label map of (height, width) {size} is asked for, but do_center_crop has left {crop} of "
                        f"{before}, which does not lie over the whole picture. Set do_center_crop=False, or give the "
                        "size of what is left as target size."
                    )
            seen = [crop] * len(sizes)
        if not self.do_pad:
            return sizes
        if self.pad_size is not None:
            padded = (self.pad_size.height, self.pad_size.width)
        else:
            padded = tuple(max(lengths) for lengths in zip(*seen, strict=True))
        return [
            tuple(round(length * whole / part) for length, whole, part in zip(size, padded, before, strict=True))
            for size, before in zip(sizes, seen, strict=True)
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
        resample = torch_pil_interpolation_mapping.get(resample, resample)
        # PIL has no image of other depths, and would weigh the colours of four channels by the last.
        channels = [Image.fromarray(channel).resize((size.width, size.height), resample) for channel in image]
        return np.stack([np.array(channel) for channel in channels])

    def center_crop(self, image: np.ndarray, size: SizeDict, **kwargs) -> np.ndarray:
        """Cuts the middle out of `(C, H, W)`, padding with zeros where the image is smaller."""
        return _center_crop(image, size.height, size.width, fill=0)


# Reading images and label maps


def _flatten(images: Any, ndims: int) -> Iterator[Union[Image.Image, np.ndarray, "torch.Tensor"]]:
    """Single images out of nested lists, batches, paths and URLs; a single array has `ndims` dimensions (or is grey)."""
    if isinstance(images, (list, tuple)):
        for item in images:
            yield from _flatten(item, ndims)
    elif isinstance(images, (str, os.PathLike)):
        yield _open(images)
    elif 0 in getattr(images, "shape", getattr(images, "size", ())):
        raise ValueError(
            f"A picture of shape {tuple(getattr(images, 'shape', images.size))} has no pixels: leave it out."
        )
    elif isinstance(images, Image.Image):
        yield decode(images)
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
    """A picture in the mode it has (Transformers' own loader makes RGB of it, which loses labels and 16-bit values)."""
    file = os.fspath(source)
    if not os.path.isfile(file):
        is_url = file.startswith(("http://", "https://"))
        file = BytesIO(_download(file) if is_url else _from_base64(file))
    return read_file(file)


def read_file(source: str | os.PathLike | BytesIO) -> Image.Image:
    """The upright picture of a file, in the mode it has, read to its end.

    Raises:
        OSError: for what cannot be read as a picture.
        ValueError: for PostScript.
    """
    with open_picture(source) as image:
        return decode(image)


def decode(image: Image.Image) -> Image.Image:
    """A picture read to its end, and upright. `PIL.Image.open` leaves it to the first use to find damage.

    Raises:
        OSError: for what cannot be read as a picture.
    """
    with _decoding(getattr(image, "filename", None)):
        image.load()
        return _upright(image)


@contextlib.contextmanager
def _decoding(source: Any) -> Iterator[None]:
    """Pillow's decoders raise errors of every kind on damaged data and for too many pixels: makes `OSError` of them all."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        name = source if source and isinstance(source, (str, os.PathLike)) else "The picture"
        raise OSError(f"{name} cannot be read as a picture: {error}") from error


def open_picture(source: str | os.PathLike | BytesIO) -> Image.Image:
    """A picture that is not read yet.

    Raises:
        OSError: for what cannot be read as a picture.
        ValueError: for PostScript, whatever its name: Pillow would have Ghostscript run it, for it is a program.
    """
    with _decoding(source):
        image = Image.open(source)
    if image.format == "EPS":
        image.close()
        raise ValueError("PostScript is a program and no picture: save it as PNG.")
    return image


def _download(url: str) -> bytes:
    # Many servers refuse the name that Python gives itself, and some never answer.
    with urlopen(Request(url, headers={"User-Agent": "lemore-hf"}), timeout=_SECONDS_TO_WAIT) as response:
        return response.read()


def _from_base64(text: str) -> bytes:
    data = text.partition(",")[2] if text.startswith("data:image/") else text
    try:
        content = base64.b64decode("".join(data.split()), validate=True)
        open_picture(BytesIO(content)).close()
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{text[:200]!r} is no picture: expected the path of a file, a URL of http:// or https://, or base64 ({error})."
        ) from error
    return content


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
    if ChannelDimension(input_data_format) == ChannelDimension.FIRST:
        return image
    return image.swapaxes(0, 2).swapaxes(1, 2)  # (H, W, C) → (C, H, W)


def _check_void_is_free(label_map: np.ndarray) -> None:
    if (highest := label_map.max()) > IGNORE_INDEX:
        raise ValueError(
            f"A segmentation map has the label {highest}, and {IGNORE_INDEX} would have to stand for void beside being a "
            "class: leave out do_reduce_labels and padding, or give maps of at most 255 classes."
        )


def _read_label_map(label_map: Union[Image.Image, np.ndarray, "torch.Tensor"]) -> np.ndarray:
    """`(H, W)` labels of an integer or boolean dtype."""
    if isinstance(label_map, Image.Image):
        if label_map.mode not in _LABEL_MODES:
            raise ValueError(
                f"A segmentation map needs one label a pixel, but this PIL image has mode {label_map.mode!r}: expected 1, "
                "L, P, I or I;16. Map colours to labels first."
            )
        label_map = np.array(label_map)
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

_SIZES = (
    {"height", "width"},
    {"shortest_edge"},
    {"shortest_edge", "longest_edge"},
    {"max_height", "max_width"},
)


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
        # An array of (height, width, 1) is read as so many maps of one column.
        columns = maps[0].shape[1] if maps else 0
        hint = " A map has the shape (height, width): leave a last dimension of 1 out." if columns == 1 else ""
        if columns in (3, 4):
            hint = " A map has one label a pixel, of shape (height, width): map colours to labels first."
        raise ValueError(
            f"Got {len(images)} images and {len(maps)} segmentation maps: each image needs one map.{hint}"
        )
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
    if size.max_height is not None:
        height, width = get_image_size_for_max_height_width(tuple(current), size.max_height, size.max_width)
    elif size.shortest_edge is not None:
        height, width = get_size_with_aspect_ratio(tuple(current), size.shortest_edge, size.longest_edge)
    else:
        return size
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


__all__ = ["LeMoReImageProcessorPil"]
