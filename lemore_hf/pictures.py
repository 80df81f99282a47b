# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures as the image processor sees them, for all that finds, decodes or draws one itself."""

import os
from collections.abc import Set
from pathlib import Path

from PIL import Image

from .image_processing_pil_lemore import read_image

PICTURE_SUFFIXES = frozenset(
    [".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tga", ".tif", ".tiff", ".webp"]
)


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode, upright and in RGB: 16-bit values scaled to 8 bit, transparency laid over white."""
    pixels, _ = read_image(image, True, None)
    return Image.fromarray(pixels).convert("RGB")


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
