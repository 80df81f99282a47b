# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures as the image processor sees them, for all that decodes or draws one itself."""

from PIL import Image

from .image_processing_pil_lemore import read_image


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode, upright and in RGB: 16-bit values scaled to 8 bit, transparency laid over white."""
    pixels, _ = read_image(image, True, None)
    return Image.fromarray(pixels).convert("RGB")
