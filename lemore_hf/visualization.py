# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of results: masks over their images, grids, training curves, confusion matrices and speed, all as PIL images."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image, ImageDraw, ImageFont, ImageOps
from transformers import PreTrainedConfig

from .image_processing_pil_lemore import channels_first, read_image
from .pictures import to_rgb

ImageInput = str | os.PathLike | Image.Image | np.ndarray | torch.Tensor
SegmentationInput = Image.Image | np.ndarray | torch.Tensor | Sequence[Mapping[str, Any]]

# Okabe and Ito's colours without black, which dark images would hide.
_OKABE_ITO = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (213, 94, 0),
    (240, 228, 66),
)

# How linear RGB looks with full protanopia, deuteranopia and tritanopia (Machado, Oliveira and Fernandes 2009).
_COLOUR_BLINDNESS = np.array(
    [
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
)
_MAX_PALETTE = 1024


def default_palette(num_colors: int) -> list[tuple[int, int, int]]:
    """A fixed palette that stays distinct with colour-blindness; a shorter one is the beginning of a longer one.

    It begins with the seven colours of Okabe and Ito. Each further one is the colour that lies farthest from all before
    it, where the distance of two colours is the smallest that normal, protanope, deuteranope or tritanope eyes see, in
    OKLab (our choice).

    Args:
        num_colors: How many, up to 1024. The first 16 are well apart for everyone, and no two are equal.

    Returns:
        RGB triples, 0 to 255.

    Raises:
        ValueError: `num_colors` is negative or above 1024.
    """
    if not 0 <= num_colors <= _MAX_PALETTE:
        raise ValueError(f"The default palette has 0 to {_MAX_PALETTE} colours, not {num_colors}: pass `palette`.")
    return list(_extended_palette(256 if num_colors <= 256 else _MAX_PALETTE)[:num_colors])


@cache
def _extended_palette(size: int) -> tuple[tuple[int, int, int], ...]:
    levels = np.linspace(0, 255, 16).round()
    candidates = np.concatenate([_OKABE_ITO, np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)])
    seen = _as_seen(candidates)
    lightness = seen[0, :, 0]
    distances = np.where((lightness > 0.3) & (lightness < 0.95), np.inf, -1.0)
    chosen: list[int] = []
    while len(chosen) < size:
        # Rounded, so that the last bits of a platform's arithmetic cannot change the order.
        chosen.append(len(chosen) if len(chosen) < len(_OKABE_ITO) else int(distances.round(6).argmax()))
        nearest = np.linalg.norm(seen - seen[:, chosen[-1:]], axis=-1).min(axis=0)
        distances = np.minimum(distances, nearest)
        distances[chosen[-1]] = -1.0
    return tuple(tuple(int(level) for level in candidates[index]) for index in chosen)


def _as_seen(colors: np.ndarray) -> np.ndarray:
    """sRGB `(n, 3)`, 0 to 255, to OKLab `(4, n, 3)` as four kinds of eyes see it (Ottosson 2020)."""
    srgb = colors / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.stack([linear, *(np.clip(linear @ matrix.T, 0, 1) for matrix in _COLOUR_BLINDNESS)])
    to_cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(seen @ to_cones.T) @ to_lab.T


def draw_segmentation(
    image: ImageInput,
    segmentation: SegmentationInput,
    id2label: Mapping[int, str] | Mapping[str, str] | None = None,
    palette: Sequence[Sequence[int]] | None = None,
    *,
    config: PreTrainedConfig | None = None,
    alpha: float = 0.5,
    ignore_index: int = 255,
    legend: bool = True,
) -> Image.Image:
    """Draws a segmentation over its image, with a legend of the classes present beside it.

    Args:
        image: A path, a PIL image (its EXIF orientation is applied), an array `(H, W[, C])` or a tensor `(C, H, W)`, of
            integers as the image processor reads them, or of floats in [0, 1].
        segmentation: Class numbers `(H, W)` as an integer tensor, array or PIL image; or the list that
            `pipeline("image-segmentation")` returns, whose uncovered pixels count as void.
        id2label: Class names by number. Default: the config's (see `class_names`); without one, "class 0" and so on.
        palette: RGB triples, 0 to 255, by class number. Default: `config.palette` where there is one, else
            `default_palette`.
        config: A model's configuration, for what the two arguments above leave out.
        alpha: Opacity of the mask, from 0 (the image alone) to 1 (the mask alone).
        ignore_index: The void value; its pixels show the untouched image.
        legend: Whether to add the legend, with each class's share of the pixels, most frequent first.

    Returns:
        An RGB image: the picture in its own size at the top left; with a legend, the canvas is widened to the right, and
        made taller only where the legend needs it.

    Raises:
        ValueError: The sizes differ; floats of the image lie outside of [0, 1]; the segmentation is not two-dimensional
            or holds numbers without a name or a colour; a colour is no RGB triple of 0 to 255; `alpha` is outside [0, 1]; a
            segment has a label that `id2label` lacks.
        TypeError: The segmentation is not of integers.
        OSError: The path is not that of a picture that can be read.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is an opacity from 0 to 1, not {alpha}.")
    picture = _as_rgb(image)
    names, palette = _names_and_palette(id2label, palette, config)
    if isinstance(segmentation, Sequence):
        classes, names = segments_to_map(segmentation, picture.size[::-1], names, ignore_index)
    else:
        classes = _as_class_numbers(segmentation)
    if classes.shape != (picture.height, picture.width):
        raise ValueError(
            f"The segmentation is {classes.shape[0]}x{classes.shape[1]} (height x width), its image "
            f"{picture.height}x{picture.width}: resize one, for instance with `target_sizes` in post-processing."
        )

    values, counts = np.unique(classes, return_counts=True)
    shares = {int(value): count / classes.size for value, count in zip(values, counts, strict=True)}
    void_share = shares.pop(ignore_index, 0.0)
    colors = _colors_of(shares, names, palette)

    if shares:
        void = classes == ignore_index
        table = np.zeros((max(shares) + 1, 3), dtype=np.uint8)
        for number, color in colors.items():
            table[number] = color
        layer = Image.fromarray(table[np.where(void, max(shares), classes)])
        drawn = Image.blend(picture, layer, alpha)
        drawn.paste(picture, mask=Image.fromarray(void))
    else:
        drawn = picture
    if not legend:
        return drawn
    present = sorted(shares, key=lambda number: -shares[number])
    entries = [(names[number] if names else f"class {number}", colors[number], shares[number]) for number in present]
    if void_share:
        entries.append(("void", None, void_share))
    # Of all the names, so that every picture of a model is written in the same letters.
    letters = "".join(map(str, names.values())) if names else ""
    return _beside(drawn, _legend(entries, drawn.height, letters))


def class_names(config: PreTrainedConfig) -> dict[int, str]:
    """Names by the numbers of label maps: a binary network's one label is its class 1, over a background."""
    return config.id2label if config.num_labels > 1 else {0: "background", 1: config.id2label[0]}


def palette_of(config: PreTrainedConfig) -> Sequence[Sequence[int]]:
    """Colours by the numbers of label maps: the configuration's own, or the default ones, at most 1024, where it has too
    few."""
    palette, number = getattr(config, "palette", None) or (), len(class_names(config))  # other families have none
    return palette if len(palette) >= number else default_palette(min(number, _MAX_PALETTE))


def class_colors(
    numbers: Iterable[int],
    id2label: Mapping[int, str] | Mapping[str, str] | None = None,
    palette: Sequence[Sequence[int]] | None = None,
    config: PreTrainedConfig | None = None,
) -> dict[str, tuple[int, int, int]]:
    """The colours of classes by name, in the order of their numbers: the legend of pictures that `draw_segmentation` makes
    of the same arguments, for `image_grid`.

    Raises:
        ValueError: a class has no name or no colour.
    """
    names, palette = _names_and_palette(id2label, palette, config)
    colors = _colors_of(dict.fromkeys(sorted(map(int, numbers)), 0.0), names, palette)
    return {names[number] if names else f"class {number}": color for number, color in colors.items()}


def _names_and_palette(
    id2label: Mapping[int, str] | Mapping[str, str] | None,
    palette: Sequence[Sequence[int]] | None,
    config: PreTrainedConfig | None,
) -> tuple[dict[int, str] | None, Sequence[Sequence[int]] | None]:
    """Names by number, and the palette, both from a configuration where they are left out."""
    if id2label is None and config is not None:
        id2label = class_names(config)
    if palette is None and config is not None:
        palette = palette_of(config)
    return None if id2label is None else {int(number): name for number, name in id2label.items()}, palette


def segments_to_map(
    segments: Sequence[Mapping[str, Any]],
    size: tuple[int, int],
    id2label: Mapping[int, str] | Mapping[str, str] | None = None,
    ignore_index: int = 255,
) -> tuple[np.ndarray, dict[int, str]]:
    """The list of `pipeline("image-segmentation")` as one map of class numbers.

    Args:
        segments: Mappings with `label` (the class name) and `mask` (PIL, non-zero inside). Later ones cover earlier ones.
        size: `(height, width)` of the image, which every mask must have.
        id2label: Class names by number. Default: the labels in order of their first appearance, from 0.
        ignore_index: For pixels in no mask.

    Returns:
        Class numbers `(height, width)`, int64, and the class names by number.

    Raises:
        ValueError: A label is not in `id2label`, or a mask has another size.
    """
    names = {int(number): name for number, name in id2label.items()} if id2label else {}
    if not names:
        numbers = (number for number in range(len(segments) + 1) if number != ignore_index)
        names = dict(zip(numbers, dict.fromkeys(segment["label"] for segment in segments), strict=False))
    numbers_by_name = {name: number for number, name in names.items()}
    classes = np.full(size, ignore_index, dtype=np.int64)
    for segment in segments:
        mask = np.asarray(segment["mask"]) != 0
        if mask.shape != tuple(size):
            raise ValueError(
                f"The mask of {segment['label']!r} is {'x'.join(map(str, mask.shape))} (height x width), "
                f"its image {size[0]}x{size[1]}."
            )
        if segment["label"] not in numbers_by_name:
            raise ValueError(f"Segment label {segment['label']!r} is none of id2label's: {sorted(numbers_by_name)}.")
        classes[mask] = numbers_by_name[segment["label"]]
    return classes, names


def _as_rgb(image: ImageInput) -> Image.Image:
    if isinstance(image, str | os.PathLike):
        image = Image.open(image)
    elif not isinstance(image, Image.Image):
        pixels, layout = read_image(image, True, None)
        pixels = channels_first(pixels, layout).transpose(1, 2, 0)
        if pixels.dtype != np.uint8:
            if not (pixels.min() >= 0 and pixels.max() <= 1):
                raise ValueError(
                    f"Floats of an image must lie in [0, 1], got [{pixels.min()}, {pixels.max()}]: undo the normalization, "
                    "or give the picture itself."
                )
            pixels = (255 * pixels).round().astype(np.uint8)
        image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    return to_rgb(image)


def _as_class_numbers(segmentation: Image.Image | np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(segmentation, torch.Tensor):
        segmentation = segmentation.detach().cpu().numpy()
    classes = np.asarray(segmentation)
    if classes.dtype.kind not in "iub":
        raise TypeError(f"A segmentation holds integer class numbers, not {classes.dtype}.")
    if classes.ndim != 2:
        raise ValueError(f"A segmentation has two dimensions, (height, width), not the shape {classes.shape}.")
    return classes.astype(np.int64)


def _colors_of(
    numbers: Mapping[int, float], names: Mapping[int, str] | None, palette: Sequence[Sequence[int]] | None
) -> dict[int, tuple[int, int, int]]:
    """The colour of each class present; raises where one has no name or no colour."""
    nameless = sorted(number for number in numbers if number < 0 or (names is not None and number not in names))
    if nameless:
        known = "0 and above" if names is None else f"in id2label ({len(names)} classes)"
        raise ValueError(f"The segmentation holds {nameless[:10]}, but class numbers are {known}, or ignore_index.")
    highest = max(numbers, default=-1)
    if palette is None:
        palette = default_palette(highest + 1)
    if highest >= len(palette):
        raise ValueError(f"The segmentation holds class {highest}, but the palette has {len(palette)} colours only.")
    colors = {number: tuple(int(level) for level in palette[number]) for number in numbers}
    for number, color in colors.items():
        if len(color) != 3 or not all(0 <= level <= 255 for level in color):
            raise ValueError(f"The palette's colour {number} is {color}: expected three levels from 0 to 255.")
    return colors


def _legend(
    entries: Sequence[tuple[str, tuple[int, int, int] | None, float]], height: int, letters: str
) -> Image.Image:
    """Swatches, names and shares in columns, in a letter size that suits a picture of this height and a font that has
    these letters."""
    letter = min(max(height // 28, 11), 96)
    font = _font(letter, letters)
    margin, row = letter, round(letter * 1.6)
    rows = max((height - 2 * margin) // row, math.ceil(3 * math.sqrt(len(entries))), 1)
    columns = [entries[start : start + rows] for start in range(0, len(entries), rows)]
    texts = [
        [f"{_shortened(str(name), font, 50 * letter)}  {_percent(share)}" for name, _, share in column]
        for column in columns
    ]
    widths = [math.ceil(max(map(font.getlength, column))) + row + margin for column in texts]
    panel_height = max(height, min(rows, len(entries)) * row + 2 * margin)
    panel = Image.new("RGB", (margin + sum(widths), panel_height), "white")
    draw = ImageDraw.Draw(panel)
    x = margin
    for column, lines, width in zip(columns, texts, widths, strict=True):
        for line, ((_, color, _), text) in enumerate(zip(column, lines, strict=True)):
            y = margin + line * row
            _swatch(draw, (x, y, x + letter, y + letter), color)
            draw.text((x + row, y + letter / 2), text, fill="black", font=font, anchor="lm")
        x += width
    return panel


def _legend_in_lines(colors: Mapping[str, Sequence[int]], width: int) -> Image.Image:
    """Swatches and names, one after another, in letters that can be read at the width of a page."""
    letter = max(width // 56, 11)
    font, row = _font(letter, "".join(colors)), round(letter * 1.6)
    places, x, y = [], 0, row // 4
    for name, color in colors.items():
        text = _shortened(name, font, width - 2 * row)
        length = row + math.ceil(font.getlength(text))
        if x + length > width - letter:
            x, y = 0, y + row
        places.append((letter + x, y, text, tuple(color)))
        x += length + letter
    panel = Image.new("RGB", (width, y + row + letter // 2), "white")
    draw = ImageDraw.Draw(panel)
    for x, y, text, color in places:
        _swatch(draw, (x, y, x + letter, y + letter), color)
        draw.text((x + row, y + letter / 2), text, fill="black", font=font, anchor="lm")
    return panel


def _font(size: int, letters: str) -> ImageFont.FreeTypeFont:
    """Pillow's own font, which has ASCII alone, or else one that has these letters."""
    if letters.isascii():
        return ImageFont.load_default(size=size)
    return ImageFont.truetype(_font_with(frozenset(letters)).fname, size)


@cache
def _font_with(letters: frozenset[str]) -> FontEntry:
    """DejaVu Sans, which comes with matplotlib, or where it lacks some of these letters the font of this system that has
    the most of them."""

    def rank(font: FontEntry) -> tuple[bool, bool, str]:
        is_regular = (font.style, font.weight, font.stretch) == ("normal", 400, "normal")
        return font.name != "DejaVu Sans", not is_regular, font.name

    best, most = None, -1
    for font in sorted(fontManager.ttflist, key=rank):
        # The font of last resort has a box for every letter. Of a collection, the first font is what is opened here.
        if "lastresort" in font.name.lower().replace(" ", "") or getattr(font, "index", 0) != 0:
            continue
        try:
            face = FT2Font(font.fname)
        except (OSError, RuntimeError):  # matplotlib may remember fonts that are gone, and systems hold damaged ones
            continue
        found = sum(face.get_char_index(ord(letter)) > 0 for letter in letters)
        if found > most:
            best, most = font, found
        if found == len(letters):
            break
    return best


def _percent(share: float) -> str:
    return "< 0.1 %" if share < 0.001 else f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def _swatch(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], color: tuple[int, int, int] | None) -> None:
    """A filled square; hatched where there is no colour."""
    draw.rectangle(box, fill=color or "white", outline="black")
    if color is None:
        left, top, right, bottom = box
        side = right - left
        for offset in range(0, side, max(side // 4, 2)):
            draw.line((left + offset, bottom, right, top + offset), fill="black")
            draw.line((left, bottom - offset, right - offset, top), fill="black")


def _beside(picture: Image.Image, panel: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", (picture.width + panel.width, max(picture.height, panel.height)), "white")
    canvas.paste(picture, (0, 0))
    canvas.paste(panel, (picture.width, 0))
    return canvas


def _above(picture: Image.Image, panel: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", (max(picture.width, panel.width), picture.height + panel.height), "white")
    canvas.paste(picture, (0, 0))
    canvas.paste(panel, (0, picture.height))
    return canvas


def image_grid(
    images: Sequence[ImageInput],
    columns: int | None = None,
    titles: Sequence[str] | None = None,
    cell_size: tuple[int, int] | None = None,
    legend: Mapping[str, Sequence[int]] | None = None,
) -> Image.Image:
    """Lays images out in rows on white.

    Args:
        images: One or more, of any sizes.
        columns: Images in a row. Default: as many as make the grid about square.
        titles: One a picture, written above it and shortened where it does not fit.
        cell_size: `(height, width)` into which larger images are shrunk, keeping their proportions. Default: the largest
            height and width among them, so that none is shrunk.
        legend: RGB triples by class name, written below, for pictures that have no legend of their own.

    Returns:
        The grid, RGB.

    Raises:
        ValueError: There are no images, fewer or more titles than images, or a number is not positive.
    """
    pictures = [_as_rgb(image) for image in images]
    if not pictures:
        raise ValueError("images is empty: a grid needs at least one.")
    if titles is not None and len(titles) != len(pictures):
        raise ValueError(f"There are {len(titles)} titles for {len(pictures)} images: give one each.")
    if columns is None:
        columns = math.ceil(math.sqrt(len(pictures)))
    if columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}.")
    if cell_size is None:
        cell_size = max(picture.height for picture in pictures), max(picture.width for picture in pictures)
    height, width = cell_size
    if min(height, width) < 1:
        raise ValueError(f"cell_size is (height, width), each at least 1 pixel, not {cell_size}.")

    columns = min(columns, len(pictures))
    gap, letter = max(width // 64, 2), min(max(height // 14, 11), 64)
    font, heading = _font(letter, "".join(titles or ())), round(letter * 1.6) if titles else 0
    rows = math.ceil(len(pictures) / columns)
    pitch_x, pitch_y = width + gap, height + heading + gap
    canvas = Image.new("RGB", (columns * pitch_x + gap, rows * pitch_y + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for index, picture in enumerate(pictures):
        x, y = gap + index % columns * pitch_x, gap + index // columns * pitch_y
        if picture.width > width or picture.height > height:
            picture = ImageOps.contain(picture, (width, height), Image.Resampling.LANCZOS)
        canvas.paste(picture, (x + (width - picture.width) // 2, y + heading + (height - picture.height) // 2))
        if titles:
            draw.text(
                (x, y + heading / 2), _shortened(titles[index], font, width), fill="black", font=font, anchor="lm"
            )
    # Wider than thumbnails, below which no name would fit.
    return _above(canvas, _legend_in_lines(legend, max(canvas.width, 160))) if legend else canvas


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    # A letter takes a pixel: what cannot fit is not measured, letter by letter.
    if len(text) <= width and font.getlength(text) <= width:
        return text
    text = text[:width]
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


# What a panel shows: its title, and the keys of the records it draws, with the names that `Trainer` logs them under.
_CURVES = (
    ("Loss", {"training": ("loss",), "evaluation": ("eval_loss",)}),
    ("Learning rate", {"": ("lr", "learning_rate")}),
    ("mIoU, %", {"": ("mean_iou", "eval_mean_iou")}),
)


def plot_training_curve(records: Sequence[Mapping[str, Any]], title: str | None = None) -> Image.Image:
    """Loss, learning rate and mIoU over the steps of a run; a panel for each that the records hold.

    Args:
        records: Log records, each with `step` and any of `loss`, `eval_loss`, `lr` (or
            `learning_rate`) and `mean_iou` (or `eval_mean_iou`, in [0, 1]); `trainer.state.log_history` will do. Other keys
            are passed over. A resumed run may log a step again: its last record counts.
        title: Written above.

    Returns:
        The picture, RGB.

    Raises:
        ValueError: No record has a step and one of these values.
    """
    panels = []
    for name, curves in _CURVES:
        series = {label: _series(records, keys) for label, keys in curves.items()}
        if any(series.values()):
            panels.append((name, {label: points for label, points in series.items() if points}))
    if not panels:
        keys = sorted({key for _, curves in _CURVES for aliases in curves.values() for key in aliases})
        raise ValueError(f"None of the {len(records)} records has a `step` and one of {keys}: nothing to plot.")

    figure = Figure(figsize=(5 * len(panels), 3.6), dpi=120, layout="constrained")
    for axes, (name, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for color, (label, points) in zip(("#0072B2", "#D55E00"), series.items(), strict=False):
            steps, values = np.array(sorted(points.items())).T
            if name.startswith("mIoU"):
                _plot_score(axes, steps, 100 * values, color)
            else:
                _plot_smoothed(axes, steps, values, color, label, smooth=name == "Loss")
        if len(series) > 1:
            axes.legend()
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.locator_params(axis="x", nbins=6)  # more of 160 000 steps would overlap
        axes.grid(alpha=0.3)
    if title:
        figure.suptitle(title)
    return _rendered(figure)


def _series(records: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[float, float]:
    return {
        record["step"]: float(record[key])
        for record in records
        for key in keys
        if "step" in record and isinstance(record.get(key), int | float)
    }


def _plot_smoothed(axes: Any, steps: np.ndarray, values: np.ndarray, color: str, label: str, smooth: bool) -> None:
    """The values; many of them pale, under their running mean over a twentieth of the run."""
    window = len(values) // 20
    if not smooth or window < 2:
        axes.plot(steps, values, color=color, label=label, marker="." if len(values) < 30 else None)
        return
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    mean = np.convolve(values, np.full(window, 1 / window), mode="valid")
    axes.plot(steps[window // 2 :][: len(mean)], mean, color=color, label=label)


def _plot_score(axes: Any, steps: np.ndarray, values: np.ndarray, color: str) -> None:
    axes.plot(steps, values, color=color, marker="." if len(values) < 60 else None)
    if np.isfinite(values).any():
        best = int(np.nanargmax(values))
        axes.plot(
            steps[best], values[best], "o", color="#D55E00", label=f"best {values[best]:.1f} at {steps[best]:.0f}"
        )
        axes.legend()


def plot_confusion_matrix(
    matrix: np.ndarray | torch.Tensor | Sequence[Sequence[int]], class_names: Sequence[str], title: str | None = None
) -> Image.Image:
    """A confusion matrix in percent of each true class.

    Args:
        matrix: Counts `(n, n)`, true classes in rows, predicted ones in columns.
        class_names: One a row, shortened to 40 letters. Up to 30 classes the percentages are written into the cells.
        title: Written above.

    Returns:
        The picture, RGB. The row of a class that never occurs is left white.

    Raises:
        ValueError: The matrix is not square, holds negative or non-finite counts, or does not fit the names.
    """
    counts = np.asarray(matrix.detach().cpu() if isinstance(matrix, torch.Tensor) else matrix, dtype=np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size:
        raise ValueError(f"A confusion matrix is square, not of the shape {counts.shape}.")
    if len(class_names) != len(counts):
        raise ValueError(f"There are {len(class_names)} class names for a matrix of {len(counts)} classes.")
    if not np.isfinite(counts).all() or counts.min() < 0:
        raise ValueError("A confusion matrix holds counts: negative or non-finite values were found.")

    totals = counts.sum(axis=1, keepdims=True)
    percent = np.divide(100 * counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    number = len(counts)
    cell = 0.55 if number <= 30 else 0.16  # inches; a six-point letter needs 0.1
    letter = 9 if number <= 30 else 6
    names = [name if len(name) <= 40 else f"{name[:37]}..." for name in map(str, class_names)]
    # A little wider than what is written.
    font = ImageFont.truetype(_font_with(frozenset("".join(names))).fname, letter + 1)
    side = number * cell + max(2.5, 1.6 + max(map(font.getlength, names)) / 72)
    figure = Figure(figsize=(side + 0.8, side), dpi=120, layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(percent, vmin=0, vmax=100, cmap="Blues")
    axes.set_xticks(range(number), names, rotation=90, fontsize=letter)
    axes.set_yticks(range(number), names, fontsize=letter)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    figure.colorbar(shown, ax=axes, label="% of the true class", shrink=0.8)
    if number <= 30:
        for row, column in zip(*np.nonzero(~np.isnan(percent)), strict=True):
            value = percent[row, column]
            color = "white" if value > 69 else "black"  # about as far from this blue, and 4.2:1 or more
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=letter - 1, color=color)
    if title:
        axes.set_title(title)
    return _rendered(figure)


def _rendered(figure: Figure) -> Image.Image:
    texts = figure.findobj(Text)
    letters = frozenset("".join(text.get_text() for text in texts))
    own = FT2Font(_font_with(frozenset()).fname)  # DejaVu Sans; of another font come only the letters that it lacks
    other = _font_with(frozenset(letter for letter in letters if own.get_char_index(ord(letter)) == 0))
    for text in texts:
        text.set_parse_math(False)  # a name with two dollar signs is no formula
        text.set_fontfamily(["DejaVu Sans", other.name])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def plot_speed(points: Mapping[str, Sequence[Mapping[str, Any]]], title: str | None = None) -> Image.Image:
    """Speed against parameters, a panel for each runtime; the area of a bubble is its multiply-accumulates.

    Args:
        points: By the runtime's name, models as `name`, `seconds` (for an image), `parameters` and
            `multiply_accumulates`. The first model of a runtime is the one whose speed is 1.
        title: Written above.

    Returns:
        The picture, RGB.

    Raises:
        ValueError: There are no points.
    """
    panels = {name: models for name, models in points.items() if models}
    if not panels:
        raise ValueError("There is nothing to plot: no model was measured.")
    colors = {}
    for model in (model for models in panels.values() for model in models):
        colors.setdefault(model["name"], len(colors))
    palette = [tuple(level / 255 for level in color) for color in default_palette(len(colors))]
    figure = Figure(figsize=(max(1 + 3.6 * len(panels), 8), 4.2), dpi=120, layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (runtime, models) in zip(grid, panels.items(), strict=True):
        for model in models:
            color = palette[colors[model["name"]]]
            area = 90 * model["multiply_accumulates"] / 1e9
            speed = models[0]["seconds"] / model["seconds"]
            axes.scatter(model["parameters"] / 1e6, speed, s=area, color=color, alpha=0.7, linewidths=0)
            axes.plot(model["parameters"] / 1e6, speed, "+", color="black", markersize=4)
        axes.set_title(runtime, fontsize="medium")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.margins(0.2)
        axes.set_xlim(left=0)
        axes.set_xlabel("parameters, M")
        axes.grid(alpha=0.3)
    figure.supylabel(f"speed ({next(iter(panels.values()))[0]['name']} = 1)", fontsize="medium")
    handles = [
        Line2D([], [], marker="o", linestyle="", color=palette[index], label=name) for name, index in colors.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    heading = "area: multiply-accumulates" if title is None else f"{title}; area: multiply-accumulates"
    figure.suptitle(heading, fontsize="medium")
    return _rendered(figure)
