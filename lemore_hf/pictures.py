# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures as the image processor sees them, for all that finds, decodes or draws one itself."""

import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from .image_processing_pil_lemore import read_image


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode, upright and in RGB: 16-bit values scaled to 8 bit, transparency laid over white."""
    pixels, _ = read_image(image, True, None)
    return Image.fromarray(pixels).convert("RGB")


def files_below(folder: Path) -> Iterator[Path]:
    """Files in a folder and those below it, sorted by path; linked folders count, each once (`Path.rglob` leaves them
    out)."""
    entered: set[str] = set()
    found: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        entered.add(os.path.realpath(parent))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(parent, name)) not in entered]
        found += (Path(parent, name) for name in names)
    yield from sorted(path for path in found if path.is_file())
