# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""LeMoRe's image processor on torchvision, for the processor and accelerators; the default backend."""

from typing import Union

import numpy as np
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict
from transformers.utils import is_torch_available

from .image_processing_pil_lemore import (
    LeMoReImageProcessorKwargs,  # noqa: F401 (Transformers looks a processor's keyword arguments up beside it)
    LeMoReImageProcessorMixin,
    channels_first,
    read_image,
    target_size,
)

if is_torch_available():
    import torch


class LeMoReImageProcessor(LeMoReImageProcessorMixin, TorchvisionBackend):
    """LeMoRe's image processor on torchvision.

    By default images of any mode become RGB, are resized to 512×512 (bilinear, antialiased, in uint8), and are rescaled
    to [0, 1] and normalised with ImageNet's mean and standard deviation in one step. See `preprocess` for the inputs and
    `post_process_semantic_segmentation` for the way back to label maps.

    Args:
        size: `{"height", "width"}`; or, to keep the aspect ratio, `{"max_height", "max_width"}` (as large as fits) or
            `{"shortest_edge"}` with or without `"longest_edge"`.
        resample: filter for the images; label maps always take the nearest label.
        do_center_crop, crop_size: cut the middle out after resizing, padding smaller images with black and label 255.
        do_pad, pad_size: pad below and to the right, to `pad_size` or the largest of the batch, with 0 after
            normalising and label 255.
        do_reduce_labels: subtract one from every label; 0 becomes 255.
        do_convert_rgb, do_resize, do_rescale, rescale_factor, do_normalize, image_mean, image_std: as in every image
            processor of Transformers.
    """

    def process_image(
        self,
        image: Union[Image.Image, np.ndarray, "torch.Tensor"],
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: Union[str, "torch.device", None] = None,
        **kwargs,
    ) -> "torch.Tensor":
        """Brings one image to a uint8 or float32 tensor `(C, H, W)`."""
        if isinstance(image, torch.Tensor) and (image.dtype == torch.uint8 or image.is_floating_point()):
            tensor = image if image.dtype == torch.uint8 else image.float()
        else:
            device = device or getattr(image, "device", None)
            image, input_data_format = read_image(image, do_convert_rgb, input_data_format)
            tensor = torch.from_numpy(np.require(image, requirements=["C", "W"]))
        tensor = channels_first(tensor.to(device), input_data_format)
        return self.convert_to_rgb(tensor, ChannelDimension.FIRST) if do_convert_rgb else tensor

    def resize(
        self,
        image: "torch.Tensor",
        size: SizeDict,
        resample: PILImageResampling | None = None,
        antialias: bool = True,
        **kwargs,
    ) -> "torch.Tensor":
        """Resizes `(…, H, W)` with torchvision."""
        return super().resize(image, target_size(image.shape[-2:], size), resample, antialias, **kwargs)

    def rescale_and_normalize(self, images: "torch.Tensor", *args, **kwargs) -> "torch.Tensor":
        """As Transformers does it, on contiguous images: in channels-last, as resizing leaves them, it takes longer."""
        return super().rescale_and_normalize(images.contiguous(), *args, **kwargs)

    def _preprocess_label_map(self, label_map: np.ndarray, pixel_values: "torch.Tensor", **kwargs) -> "torch.Tensor":
        label_map = super()._preprocess_label_map(label_map, pixel_values, **kwargs)
        return torch.from_numpy(label_map).to(pixel_values.device)


__all__ = ["LeMoReImageProcessor"]
