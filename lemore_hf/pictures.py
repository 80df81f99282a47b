# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures as the image processor sees them, for all that finds, decodes or draws one itself."""

import os
from collections.abc import Set
from pathlib import Path

import numpy as np
from PIL import Image

from .image_processing_pil_lemore import read_image

PICTURE_SUFFIXES = frozenset(
    [".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tga", ".tif", ".tiff", ".webp"]
)


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode, upright and in RGB: 16-bit values and floats scaled to 8 bit, transparency laid over white.

    Raises:
        ValueError: for floats that lie neither in [0, 1] nor in [0, 255].
    """
    pixels, _ = read_image(in_levels(image), True, None)
    return Image.fromarray(pixels).convert("RGB")


def in_levels(image: Image.Image) -> Image.Image:
    """A picture whose floats, if it has such, are of 0…255: those of 0…1 are scaled.

    Raises:
        ValueError: for floats of another range.
    """
    if image.mode != "F":
        return image
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()  # NaN where a pixel is, which `getextrema` passes over
    if not 0 <= low <= high <= 255:
        raise ValueError(
            f"Floats of a picture must lie in [0, 1] or [0, 255], got [{low}, {high}]: scale them, and give what is not "
            "finite a value."
        )
    return image.point(lambda value: value * 255) if high <= 1 else image


def files_below(folder: Path, suffixes: Set[str] = PICTURE_SUFFIXES) -> list[Path]:
    """Files with one of the suffixes in a folder and those below it, sorted by path, without hidden ones (such as macOS's
    `._photo.jpg`, or what lies in `.thumbnails`). Linked folders count, which `Path.rglob` leaves out: each once, and by
    its own name where that is below the folder too."""
    entered: set[str] = set()
    found: list[Path] = []
    pending = [folder]
    for start in pending:  # which grows by the links that are met
        for parent, folders, names in os.walk(start):
            if os.path.realpath(parent) in entered:
                folders.clear()
                continue
            entered.add(os.path.realpath(parent))
            folders[:] = [name for name in folders if not name.startswith(".")]
            pending += (Path(parent, name) for name in sorted(folders) if os.path.islink(Path(parent, name)))
            found += (Path(parent, name) for name in names)
    wanted = (path for path in found if path.suffix.lower() in suffixes and not path.name.startswith("."))
    return sorted(path for path in wanted if path.is_file())
