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
    [
        ".avif",
        ".bmp",
        ".gif",
        ".j2k",
        ".jfif",
        ".jp2",
        ".jpeg",
        ".jpg",
        ".png",
        ".ppm",
        ".pgm",
        ".tga",
        ".tif",
        ".tiff",
        ".webp",
    ]
)

_PAGE_KIND = 254  # TIFF's tag NewSubfileType: bit 0 is set for a smaller copy, bit 2 for a mask


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
        ValueError: for floats of another range, and such as resampling makes of 0…1, somewhat above 1.
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
    if 1 < high < 2:  # taken for one of 0…255 it would be black, beside others of 0…1 that are not
        raise ValueError(
            f"Floats of a picture reach {high}, which is above 1 and next to black in [0, 255]: clip those of [0, 1], as "
            "`numpy.clip(picture, 0, 1)` does."
        )
    return image.point(lambda value: value * 255) if high <= 1 else image


def number_of_pages(image: Image.Image) -> int:
    """How many pictures a file holds. A phone's second view of a photo is not counted, nor a GeoTIFF's smaller copies and
    its mask."""
    pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if pages == 1 or image.format != "TIFF":
        return pages
    kinds = []
    for page in range(pages):
        image.seek(page)
        kinds.append(image.tag_v2.get(_PAGE_KIND, 0))
    image.seek(0)
    return sum(kind & 0b101 == 0 for kind in kinds)


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
