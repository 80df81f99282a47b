# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Overlays and their legends, the default palette, grids, curves and confusion matrices."""

import dataclasses
import itertools
import warnings
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageFilter
from transformers import SegformerConfig

from lemore_hf import LeMoReConfig, visualization
from lemore_hf.data.scenes import PALETTE
from lemore_hf.visualization import (
    class_colors,
    default_palette,
    draw_segmentation,
    image_grid,
    plot_confusion_matrix,
    plot_training_curve,
    segments_to_map,
)

NAMES = {0: "sky", 1: "road", 2: "tree", 3: "traffic sign"}


@pytest.fixture
def image() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture
def labels() -> np.ndarray:
    """Three of the four classes, and void."""
    classes = np.zeros((60, 80), dtype=np.uint8)
    classes[30:] = 1
    classes[20:40, 50:] = 3
    classes[:5] = 255
    return classes


def picture_and_legend(drawn: Image.Image, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.asarray(drawn)
    return pixels[: size[1], : size[0]], pixels[:, size[0] :]


def swatches(legend: np.ndarray) -> dict[tuple[int, int, int], tuple[int, int]]:
    """The colours (no greys: those are text) of areas of at least 25 pixels, with their first (column, row)."""
    colors, counts = np.unique(legend.reshape(-1, 3), axis=0, return_counts=True)
    found = {}
    for color, count in zip(colors, counts, strict=True):
        if count >= 25 and np.ptp(color.astype(int)) > 0:
            rows, columns = np.nonzero((legend == color).all(axis=-1))
            found[tuple(color.tolist())] = (int(columns.min()), int(rows.min()))
    return found


# --- the default palette -----------------------------------------------------------------------------------------

# How deuteranopes and protanopes see linear RGB, by Viénot, Brettel and Mollon (1999): not the model that chose the palette.
DICHROMACY = {
    "normal": np.eye(3),
    "protanopia": np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]),
    "deuteranopia": np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]),
}


def cielab(colors: list[tuple[int, int, int]], vision: np.ndarray) -> np.ndarray:
    srgb = np.array(colors) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4) @ vision.T
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.clip(linear, 0, 1) @ to_xyz.T / [0.9505, 1, 1.089]).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


@pytest.mark.parametrize("vision", DICHROMACY)
def test_the_first_sixteen_colors_are_distinct_to_every_eye(vision):
    seen = cielab(default_palette(16), DICHROMACY[vision])
    nearest = min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2))
    assert nearest > 15  # ΔE*ab; 2.3 is just noticeable


def test_default_palette_is_distinct_and_extends_itself():
    assert len(set(default_palette(256))) == 256
    assert len(set(default_palette(1024))) == 1024
    assert default_palette(1024)[:256] == default_palette(256)
    assert default_palette(256)[:12] == default_palette(12)
    assert default_palette(12)[:7] == [
        (0, 114, 178),
        (230, 159, 0),
        (0, 158, 115),
        (204, 121, 167),
        (86, 180, 233),
        (213, 94, 0),
        (240, 228, 66),
    ]
    assert all(0 <= level <= 255 for color in default_palette(256) for level in color)
    assert default_palette(0) == []


@pytest.mark.parametrize("number", [-1, 1025])
def test_default_palette_names_its_limit(number):
    with pytest.raises(ValueError, match=f"1024 colours, not {number}"):
        default_palette(number)


# --- overlays ----------------------------------------------------------------------------------------------------


def test_the_legend_holds_exactly_the_classes_present(image, labels):
    _, legend = picture_and_legend(draw_segmentation(image, labels, NAMES), image.size)
    palette = default_palette(4)
    found = swatches(legend)
    assert set(found) == {palette[0], palette[1], palette[3]}
    # Most frequent first: road 40 %, sky 38 %, traffic sign 13 %.
    assert sorted(found, key=lambda color: found[color][1]) == [palette[1], palette[0], palette[3]]


@pytest.mark.parametrize(
    ("share", "text"), [(0.0004, "< 0.1 %"), (0.001, "0.1 %"), (0.0994, "9.9 %"), (0.0996, "10 %"), (1.0, "100 %")]
)
def test_shares_in_the_legend(share, text):
    assert visualization._percent(share) == text


def test_void_is_in_the_legend_only_if_present(image, labels):
    full = draw_segmentation(image, labels, NAMES)
    labels[labels == 255] = 0
    without = draw_segmentation(image, labels, NAMES)
    entries = [np.unique(swatch_rows(drawn, image.size)).size for drawn in (full, without)]
    assert entries == [4, 3]


def swatch_rows(drawn: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """The rows where a swatch begins: the black runs of its upper edge."""
    _, legend = picture_and_legend(drawn, size)
    black = (legend == 0).all(axis=-1)
    long_runs = np.lib.stride_tricks.sliding_window_view(black, 11, axis=1).all(axis=-1).any(axis=1)
    edges = np.flatnonzero(long_runs)
    return edges[::2]


def test_alpha_zero_and_void_leave_the_pixels_as_they_are(image, labels):
    original = np.asarray(image)
    shown, _ = picture_and_legend(draw_segmentation(image, labels, NAMES, alpha=0), image.size)
    np.testing.assert_array_equal(shown, original)
    shown, _ = picture_and_legend(draw_segmentation(image, labels, NAMES, alpha=0.7), image.size)
    np.testing.assert_array_equal(shown[labels == 255], original[labels == 255])
    assert (shown[labels != 255] != original[labels != 255]).any(axis=-1).mean() > 0.95


def test_alpha_mixes_image_and_palette(image, labels):
    palette = [(10, 20, 30), (200, 100, 0), (0, 0, 0), (90, 91, 92)]
    drawn = np.asarray(draw_segmentation(image, labels, palette=palette, alpha=0.25, legend=False), dtype=float)
    assert drawn.shape == (60, 80, 3)
    inside = labels != 255
    expected = 0.75 * np.asarray(image)[inside] + 0.25 * np.array(palette)[labels[inside]]
    np.testing.assert_allclose(drawn[inside], expected, atol=1)


def test_all_kinds_of_input_agree(image, labels, tmp_path):
    image.save(tmp_path / "image.png")
    expected = draw_segmentation(image, labels, NAMES).tobytes()
    for same_image in (tmp_path / "image.png", str(tmp_path / "image.png"), np.asarray(image)):
        assert draw_segmentation(same_image, labels, NAMES).tobytes() == expected
    assert draw_segmentation(torch.from_numpy(np.array(image)).permute(2, 0, 1), labels, NAMES).tobytes() == expected
    for same_labels in (Image.fromarray(labels), torch.from_numpy(labels).long(), labels.astype(np.int32)):
        assert draw_segmentation(image, same_labels, NAMES).tobytes() == expected
    assert (
        draw_segmentation(image, labels, {str(number): name for number, name in NAMES.items()}).tobytes() == expected
    )


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_image_modes(image, labels, mode):
    converted = (
        image.convert("L").convert("I").point(lambda level: level * 257).convert("I;16")
        if mode == "I;16"
        else image.convert(mode)
    )
    shown, _ = picture_and_legend(draw_segmentation(converted, labels, NAMES, alpha=0), image.size)
    reference = image.convert("L") if mode == "I;16" else converted
    np.testing.assert_array_equal(shown, np.asarray(reference.convert("RGB")))


def test_exif_orientation_is_applied(image, labels):
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be turned clockwise for display
    shown, _ = picture_and_legend(draw_segmentation(turned, labels, NAMES, alpha=0), image.size)
    np.testing.assert_array_equal(shown, np.asarray(image))


def test_names_and_palette_come_from_the_config(image, labels):
    config = SegformerConfig(id2label=NAMES)
    assert (
        draw_segmentation(image, labels, config=config).tobytes() == draw_segmentation(image, labels, NAMES).tobytes()
    )
    config.palette = [[9, 0, 0], [0, 9, 0], [0, 0, 9], [9, 9, 0]]
    _, legend = picture_and_legend(draw_segmentation(image, labels, config=config), image.size)
    assert set(swatches(legend)) == {(9, 0, 0), (0, 9, 0), (9, 9, 0)}
    _, legend = picture_and_legend(draw_segmentation(image, labels, NAMES, [(1, 2, 3)] * 4, config=config), image.size)
    assert set(swatches(legend)) == {(1, 2, 3)}


def test_the_ignore_index_can_be_a_class_number_or_negative(image, labels):
    shown, legend = picture_and_legend(draw_segmentation(image, labels % 255, NAMES, ignore_index=0), image.size)
    np.testing.assert_array_equal(shown[labels % 255 == 0], np.asarray(image)[labels % 255 == 0])
    assert set(swatches(legend)) == {default_palette(4)[1], default_palette(4)[3]}
    signed = np.where(labels == 255, -1, labels.astype(int))
    shown, _ = picture_and_legend(draw_segmentation(image, signed, NAMES, ignore_index=-1), image.size)
    np.testing.assert_array_equal(shown[signed == -1], np.asarray(image)[signed == -1])


def test_an_image_all_void_is_shown_as_it_is(image):
    shown, legend = picture_and_legend(draw_segmentation(image, np.full((60, 80), 255), NAMES), image.size)
    np.testing.assert_array_equal(shown, np.asarray(image))
    assert not swatches(legend)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (3000, 4000)])
def test_legend_letters_suit_the_picture(height, width):
    classes = np.arange(height)[:, None] * 9 // height + np.zeros((1, width), dtype=np.int64)
    drawn = draw_segmentation(Image.new("RGB", (width, height)), classes, dict(enumerate("abcdefghi")))
    _, legend = picture_and_legend(drawn, (width, height))
    boxes = [(legend == color).all(axis=-1) for color in default_palette(9)]
    sides = [np.ptp(np.nonzero(box)[0]) + 1 for box in boxes]
    assert min(sides) >= max(9, height // 40)
    assert legend.shape[1] < max(3 * width, 400)
    # No entry is cut off: white all around the legend.
    assert (legend[[0, -1]] == 255).all()
    assert (legend[:, -1] == 255).all()


def test_a_legend_of_150_classes_stays_compact():
    classes = np.arange(150).repeat(600).reshape(300, 300)
    drawn = draw_segmentation(
        Image.new("RGB", (300, 300)), classes, {number: f"class name {number}" for number in range(150)}
    )
    assert max(drawn.size) < 1400
    _, legend = picture_and_legend(drawn, (300, 300))
    for color in default_palette(150):
        assert (legend == color).all(axis=-1).sum() >= 80


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"segmentation": np.zeros((80, 60), dtype=int)}, ValueError, r"80x60 .*60x80"),
        ({"segmentation": np.zeros((1, 60, 80), dtype=int)}, ValueError, r"\(1, 60, 80\)"),
        ({"segmentation": np.zeros((60, 80))}, TypeError, "float64"),
        ({"segmentation": np.full((60, 80), 7)}, ValueError, r"\[7\].*4 classes"),
        ({"segmentation": np.full((60, 80), -1)}, ValueError, r"\[-1\]"),
        ({"palette": [(1, 2, 3)]}, ValueError, "class 3.*1 colours"),
        ({"palette": [(1, 2, 300)] * 4}, ValueError, "300"),
        ({"alpha": 1.5}, ValueError, "0 to 1, not 1.5"),
        ({"alpha": float("nan")}, ValueError, "not nan"),
    ],
)
def test_bad_input_is_named(image, labels, change, error, message):
    with pytest.raises(error, match=message):
        draw_segmentation(**{"image": image, "segmentation": labels, "id2label": NAMES, **change})


def test_letters_beyond_ascii_are_no_boxes(image, labels):
    for names in ("Gebäude", "Gebüude"), ("дорога", "дерево"):
        legends = [draw_segmentation(image, labels, dict.fromkeys(range(4), name)).tobytes() for name in names]
        assert legends[0] != legends[1]
        titles = [image_grid([image], titles=[name], cell_size=(60, 200)).tobytes() for name in names]
        assert titles[0] != titles[1]


def test_letters_that_matplotlibs_font_lacks_come_from_one_of_the_system(image, labels, monkeypatch):
    regular = [font for font in fontManager.ttflist if font.style == "normal" and font.weight == 400]
    shipped = {font.name: font for font in regular if "mpl-data" in font.fname}
    plain, other = shipped["DejaVu Sans"], shipped["STIXGeneral"]
    known = [set(FT2Font(font.fname).get_charmap()) for font in (plain, other)]
    first, second = [chr(code) for code in sorted(known[1] - known[0]) if chr(code).isalpha() and code < 0xE000][:2]
    visualization._font_with.cache_clear()
    monkeypatch.setattr(fontManager, "ttflist", [other, plain])  # the other stands in for one of the system
    try:
        assert visualization._font_with(frozenset(f"ä{first}")).name == "STIXGeneral"
        assert visualization._font_with(frozenset("ä")).name == "DejaVu Sans"
        legends = [draw_segmentation(image, labels, dict.fromkeys(range(4), f"ä{c}")) for c in (first, second)]
        assert legends[0].tobytes() != legends[1].tobytes()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of glyphs that are missing
            plot_confusion_matrix(np.eye(2), ["ä", first], title=second)
    finally:
        visualization._font_with.cache_clear()


@pytest.fixture
def shipped(monkeypatch):
    """Fonts that come with matplotlib, by name; a test lists those that its system is to have."""
    regular = [font for font in fontManager.ttflist if font.style == "normal" and font.weight == 400]
    visualization._font_with.cache_clear()
    monkeypatch.setattr(fontManager, "ttflist", [])
    yield {font.name: font for font in regular if "mpl-data" in font.fname}
    visualization._font_with.cache_clear()


def test_a_figure_takes_of_another_font_what_its_own_lacks(shipped):
    """Fonts of one script often lack the Latin letters that figures are full of."""
    other = shipped["STIXSizeFourSym"]
    lacking = max(FT2Font(other.fname).get_charmap())
    fontManager.ttflist += [other, shipped["DejaVu Sans"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of glyphs that are missing
        plot_confusion_matrix(np.eye(2), ["road", chr(lacking)], title="Some Latin letters")


def test_fonts_that_cannot_be_opened_are_passed_over(shipped, tmp_path):
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    wanted, plain = shipped["STIXGeneral"], shipped["DejaVu Sans"]
    others = [dataclasses.replace(wanted, fname=str(tmp_path / name)) for name in ("damaged.ttf", "gone.ttf")]
    second = SimpleNamespace(**dataclasses.asdict(wanted) | {"name": "A collection's second font", "index": 1})
    fontManager.ttflist += [*others, second, wanted, plain]
    letter = min(set(FT2Font(wanted.fname).get_charmap()) - set(FT2Font(plain.fname).get_charmap()))
    assert visualization._font_with(frozenset(chr(letter))) is wanted


def test_the_font_of_last_resort_is_none(shipped):
    """It has a box for every letter."""
    (last,) = (font for name, font in shipped.items() if name.startswith("Last Resort"))
    fontManager.ttflist += [last, shipped["DejaVu Sans"]]
    assert visualization._font_with(frozenset("car \U0001f697")).name == "DejaVu Sans"


def test_a_grids_legend_has_letters_beyond_ascii(image):
    names = ("Gebäude", "Gebüude")
    grids = [image_grid([image], cell_size=(60, 200), legend={name: (0, 0, 200)}).tobytes() for name in names]
    assert grids[0] != grids[1]


def test_a_binary_networks_label_is_drawn_over_a_background(image):
    config = LeMoReConfig(num_labels=1, id2label={0: "road"}, label2id={"road": 0}, palette=[[200, 0, 0], [0, 0, 200]])
    segmentation = np.zeros((60, 80), np.uint8)
    segmentation[30:] = 1
    drawn = draw_segmentation(image, segmentation, config=config, alpha=1)
    expected = draw_segmentation(image, segmentation, {0: "background", 1: "road"}, config.palette, alpha=1)
    assert drawn.tobytes() == expected.tobytes()
    config.palette = [[200, 0, 0]]  # of the one label: the background has no colour then
    drawn = draw_segmentation(image, segmentation, config=config, alpha=1)
    assert drawn.tobytes() == draw_segmentation(image, segmentation, {0: "background", 1: "road"}, alpha=1).tobytes()


def test_a_palette_of_thousands_of_classes_ends_where_the_default_one_does(image, labels):
    drawn = draw_segmentation(image, labels, NAMES, config=SegformerConfig(num_labels=1100))
    assert drawn.tobytes() == draw_segmentation(image, labels, NAMES).tobytes()


@pytest.mark.parametrize(
    "convert",
    [
        lambda pixels: pixels.astype(np.int64),
        lambda pixels: pixels.astype(np.uint16) * 257,
        lambda pixels: pixels / 255,
        lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1),
        lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1).float() / 255,
        lambda pixels: pixels.transpose(2, 0, 1),
    ],
    ids=["int64", "uint16", "floats", "tensor", "tensor of floats", "channels first"],
)
def test_arrays_of_all_kinds_are_drawn_as_the_picture(convert, image, labels):
    expected = draw_segmentation(image, labels, NAMES)
    drawn = draw_segmentation(convert(np.array(image)), labels, NAMES)
    assert drawn.tobytes() == expected.tobytes()


def test_floats_that_are_no_colours_are_refused(image, labels):
    for pixels in (np.asarray(image).astype(np.float32), np.full((60, 80, 3), -0.5), np.full((60, 80, 3), np.nan)):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got .*: undo the normalization"):
            draw_segmentation(pixels, labels, NAMES)


@pytest.mark.parametrize("scale", [1, 255])
def test_a_picture_of_floats_is_drawn_as_one_of_bytes(scale, image, labels, tmp_path):
    grey = image.convert("L")
    Image.fromarray(np.asarray(grey, np.float32) * np.float32(scale / 255)).save(tmp_path / "floats.tiff")
    drawn = np.asarray(draw_segmentation(tmp_path / "floats.tiff", labels, NAMES), int)
    assert abs(drawn - np.asarray(draw_segmentation(grey, labels, NAMES), int)).max() <= 1
    Image.fromarray(np.asarray(grey, np.float32) * 2).save(tmp_path / "bright.tiff")
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\] or \[0, 255\], got"):
        draw_segmentation(tmp_path / "bright.tiff", labels, NAMES)


def test_a_picture_of_floats_below_zero_is_refused(image, labels):
    levels = np.asarray(image.convert("L"), np.float32)
    for floats in (levels - 255, levels / 255 - np.float32(0.9)):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\] or \[0, 255\], got \[-"):
            draw_segmentation(Image.fromarray(floats), labels, NAMES)


# --- the pipeline's segments -------------------------------------------------------------------------------------


def as_segments(labels: np.ndarray) -> list[dict]:
    present = [number for number in NAMES if (labels == number).any()]
    return [
        {"score": None, "label": NAMES[number], "mask": Image.fromarray((labels == number).astype(np.uint8) * 255)}
        for number in present
    ]


def test_segments_give_the_map_they_came_from(image, labels):
    segments = as_segments(labels)
    classes, names = segments_to_map(segments, (60, 80), NAMES)
    np.testing.assert_array_equal(classes, labels)
    assert names == NAMES
    assert draw_segmentation(image, segments, NAMES).tobytes() == draw_segmentation(image, labels, NAMES).tobytes()


def test_segments_without_names_are_numbered_as_they_come(image, labels):
    segments = as_segments(labels)
    classes, names = segments_to_map([*segments, segments[0]], (60, 80))
    assert names == {0: "sky", 1: "road", 2: "traffic sign"}
    np.testing.assert_array_equal(classes == 2, labels == 3)
    _, legend = picture_and_legend(draw_segmentation(image, segments), image.size)
    assert set(swatches(legend)) == set(default_palette(3))
    np.testing.assert_array_equal(segments_to_map([], (2, 3))[0], np.full((2, 3), 255))


def test_no_segment_is_numbered_as_void(labels):
    classes, names = segments_to_map(as_segments(labels), (60, 80), ignore_index=1)
    assert names == {0: "sky", 2: "road", 3: "traffic sign"}
    np.testing.assert_array_equal(classes == 1, labels == 255)


def test_bad_segments_are_named(labels):
    with pytest.raises(ValueError, match=r"'sky' is none of.*road"):
        segments_to_map(as_segments(labels), (60, 80), {1: "road"})
    with pytest.raises(ValueError, match=r"'sky' is 60x80.*its image 10x10"):
        segments_to_map(as_segments(labels), (10, 10), NAMES)


# --- grids and plots ---------------------------------------------------------------------------------------------


def test_grid_shows_every_image_whole_and_in_order():
    colors = default_palette(5)
    tiles = [Image.new("RGB", (20 + 3 * number, 30), color) for number, color in enumerate(colors)]
    pixels = np.asarray(image_grid(tiles, columns=3, titles=["a title that is far too long", *"bcde"]))
    boxes = []
    for tile, color in zip(tiles, colors, strict=True):
        rows, columns = np.nonzero((pixels == color).all(axis=-1))
        assert len(rows) == tile.width * tile.height
        boxes.append((rows.min() // 40, columns.min()))
    assert [row for row, _ in boxes] == [0, 0, 0, 1, 1]
    assert boxes[0][1] < boxes[1][1] < boxes[2][1]


def test_grid_shrinks_to_the_cell_in_proportion():
    color = (213, 94, 0)
    pixels = np.asarray(image_grid([Image.new("RGB", (200, 100), color)], cell_size=(40, 40)))
    rows, columns = np.nonzero((pixels == color).all(axis=-1))
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (20, 40)


@pytest.mark.parametrize("width", [80, 240, 2000])
def test_grid_has_one_legend_below_all_its_pictures(width):
    colors = dict(
        zip([*"abcdefgh", "a name that is longer than the picture is wide"], default_palette(9), strict=True)
    )
    pixels = np.asarray(image_grid([Image.new("RGB", (width, 60))] * 4, columns=2, legend=colors))
    bare = np.asarray(image_grid([Image.new("RGB", (width, 60))] * 4, columns=2))
    assert (pixels[: len(bare)] == bare).all()
    legend = pixels[len(bare) :]
    assert (legend[[0, -1]] == 255).all(), "nothing is cut"
    assert (legend[:, [0, -1]] == 255).all()
    found = swatches(legend)
    assert set(found) == set(colors.values())
    places = [found[color][::-1] for color in colors.values()]
    assert places == sorted(places), "line by line"
    assert len({row for row, _ in places}) == 1 if width == 2000 else len({row for row, _ in places}) > 1


def test_names_below_a_thumbnail_can_be_read():
    thumbnail = Image.new("RGB", (20, 20), "black")
    grids = [np.asarray(image_grid([thumbnail], legend={name: (0, 0, 200)})) for name in ("building", "builders")]
    assert (grids[0] != grids[1]).any()
    assert (grids[0][:, -1] == 255).all(), "nothing is cut"


def test_colours_of_classes_are_those_of_the_overlay(image, labels):
    config = LeMoReConfig(id2label=NAMES)
    drawn = draw_segmentation(image, labels, config=config, alpha=1, legend=False)
    colors = class_colors([3, 0, 1], config=config)
    assert list(colors) == ["sky", "road", "traffic sign"]
    for number, color in zip((0, 1, 3), colors.values(), strict=True):
        assert (np.asarray(drawn)[labels == number] == color).all()
    assert class_colors([1], palette=[(0, 0, 0), (1, 2, 3)]) == {"class 1": (1, 2, 3)}
    with pytest.raises(ValueError, match=r"holds \[4\]"):
        class_colors([4], NAMES)


def test_colours_of_the_generated_scenes_are_distinct_with_colour_blindness():
    seen = visualization._as_seen(np.array(PALETTE))
    for one, other in itertools.combinations(range(len(PALETTE)), 2):
        assert np.linalg.norm(seen[:, one] - seen[:, other], axis=-1).min() > 0.07, (one, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": []}, "at least one"),
        ({"titles": ["a", "b"]}, "2 titles for 1 images"),
        ({"columns": 0}, "columns .*not 0"),
        ({"cell_size": (0, 5)}, r"cell_size .*\(0, 5\)"),
    ],
)
def test_grid_names_bad_input(image, arguments, message):
    with pytest.raises(ValueError, match=message):
        image_grid(**{"images": [image], **arguments})


def ink(picture: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    return np.argwhere((np.abs(np.asarray(picture).astype(int) - color) < 12).all(axis=-1))


def test_curve_has_a_panel_for_each_kind_of_record():
    losses = [{"step": step, "loss": 2.0 - step / 100} for step in range(10, 110, 10)]
    rates = [{"step": step, "learning_rate": 1e-3} for step in (10, 20)]
    scores = [{"step": 50, "eval_mean_iou": 0.4, "epoch": 1}, {"step": 100, "mean_iou": 0.6}]
    one, two, three = (plot_training_curve(records) for records in (losses, losses + rates, losses + rates + scores))
    assert (two.width, three.width) == (2 * one.width, 3 * one.width)
    assert one.height == two.height == three.height
    falling = ink(one, (0, 114, 178))
    left, right = falling[falling[:, 1].argmin()], falling[falling[:, 1].argmax()]
    assert left[0] < right[0]  # a loss that falls is drawn falling


def test_curve_of_a_trainers_log_ends_with_its_last_loss():
    """Not with the mean of the run, which `Trainer` logs at the end."""
    records = [{"step": step, "loss": 2.0 - step / 100} for step in range(10, 110, 10)]
    curve = plot_training_curve([*records, {"step": 100, "train_loss": 1.45, "train_runtime": 3.0}])
    assert np.array_equal(np.asarray(curve), np.asarray(plot_training_curve(records)))


def test_curve_bears_gaps_repeats_and_long_runs():
    records = [{"step": step, "loss": float("nan") if step == 50 else 1.0} for step in range(2000)]
    records += [{"step": 3, "loss": 0.5}, {"step": 4, "mean_iou": float("nan")}, {"train_runtime": 3.0, "step": 9}]
    assert len(ink(plot_training_curve(records, title="a run"), (0, 114, 178))) > 100


def test_curve_is_the_same_in_whatever_order_the_records_come():
    records = [{"step": step, "loss": 2 - step / 50, "mean_iou": step / 100} for step in range(10, 90, 10)]
    expected = np.asarray(plot_training_curve(records))
    np.testing.assert_array_equal(plot_training_curve([*records[3:], *records[:3]]), expected)


def test_curve_marks_the_best_of_the_scores_that_are_numbers():
    records = [{"step": 10, "mean_iou": 0.2}, {"step": 20, "mean_iou": 0.6}, {"step": 30, "mean_iou": 0.4}]
    marks = [
        len(ink(plot_training_curve(scores), (213, 94, 0)))
        for scores in (records, [*records, {"step": 15, "mean_iou": float("nan")}])
    ]
    assert marks[1] == pytest.approx(marks[0], rel=0.2), "the mark itself, not the one in the legend alone"


def test_curves_show_the_values_that_were_logged(monkeypatch):
    monkeypatch.setattr(visualization, "_rendered", lambda figure: figure)
    records = [{"step": step, "loss": 7.0 * step, "mean_iou": step / 200} for step in range(100)]
    loss, score = plot_training_curve(records).axes
    values, running_mean = (line.get_xydata() for line in loss.lines)
    np.testing.assert_allclose(values[:, 1], 7 * values[:, 0])
    np.testing.assert_allclose(running_mean[:, 1], 7 * running_mean[:, 0])  # of a straight line, the line itself
    assert len(running_mean) == 96
    np.testing.assert_allclose(score.lines[0].get_xydata(), [(step, step / 2) for step in range(100)])


def test_steps_of_a_long_run_do_not_overlap(monkeypatch):
    figures, rendered = [], visualization._rendered
    monkeypatch.setattr(visualization, "_rendered", lambda figure: figures.append(figure) or rendered(figure))
    plot_training_curve([{"step": step, "loss": 1.0, "lr": 0.1, "mean_iou": 0.5} for step in range(0, 375001, 3000)])
    for axes in figures[0].axes:
        boxes = [text.get_window_extent() for text in axes.get_xticklabels()]
        assert len(boxes) > 2
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes)), axes.get_title()


def test_the_legend_of_the_score_does_not_cover_it(monkeypatch):
    figures, rendered = [], visualization._rendered
    monkeypatch.setattr(visualization, "_rendered", lambda figure: figures.append(figure) or rendered(figure))
    for sign in (1, -1):  # a run that gains, and one that loses
        plot_training_curve([{"step": step, "mean_iou": 0.5 + sign * step / 1000} for step in range(100)])
        (axes,) = figures.pop().axes
        points = axes.transData.transform(axes.lines[0].get_xydata())
        assert not axes.get_legend().get_window_extent().count_contains(points)


def test_curve_needs_something_to_plot():
    with pytest.raises(ValueError, match=r"None of the 1 records.*mean_iou"):
        plot_training_curve([{"step": 1, "epoch": 2}])


def test_plots_leave_matplotlib_alone():
    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)
    plot_training_curve([{"step": 1, "loss": 1.0}])
    plot_confusion_matrix([[1, 0], [0, 1]], ["a", "b"])
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend(auto_select=False) == backend


def test_confusion_matrix_is_normalised_by_row():
    scaled = [[np.array([[90, 10], [30, 70]]) * factor for factor in (1, 12345)], ["road", "tree"]]
    first, second = (plot_confusion_matrix(matrix, scaled[1]) for matrix in scaled[0])
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() == plot_confusion_matrix(torch.tensor([[90, 10], [30, 70]]), scaled[1]).tobytes()
    assert first.tobytes() != plot_confusion_matrix([[90, 30], [10, 70]], scaled[1]).tobytes()


def test_confusion_matrix_leaves_absent_classes_white():
    pictures = [plot_confusion_matrix([[0, first], [0, 5]], ["a", "b"]) for first in (0, 5)]
    full_blue = [len(ink(picture.filter(ImageFilter.MedianFilter(3)), (8, 48, 107))) for picture in pictures]
    assert full_blue[1] > 1.5 * full_blue[0]


def test_confusion_matrix_writes_percentages_into_their_own_cells():
    pixels = np.asarray(plot_confusion_matrix([[0, 0], [30, 70]], ["a", "b"]))
    color = np.array(matplotlib.colormaps["Blues"](0.7)[:3]) * 255
    cell = ink(Image.fromarray(pixels[:, : int(0.75 * pixels.shape[1])]), tuple(color.round().astype(int)))
    (top, left), (bottom, right) = cell.min(0) + 4, cell.max(0) - 4
    assert (pixels[top:bottom, left:right] == 255).all(-1).any(), "the number, in white"
    side = bottom - top + 8
    assert (pixels[top - side : bottom - side, left:right] == 255).all(), "no number above, where no pixel is"


@pytest.mark.parametrize(("share", "black"), [(60, True), (80, False)])
def test_numbers_of_a_confusion_matrix_stand_out_of_their_cells(share, black, monkeypatch):
    monkeypatch.setattr(visualization, "_rendered", lambda figure: figure)
    figure = plot_confusion_matrix([[share, 100 - share], [0, 1]], ["a", "b"])
    (number,) = (text for text in figure.axes[0].texts if text.get_text() == f"{share}.0")
    assert number.get_color() == ("black" if black else "white")


@pytest.mark.parametrize("number", [2, 9, 60])
def test_long_class_names_do_not_squeeze_a_confusion_matrix(number):
    sides = []
    for name in ("road", "road surface, other than asphalt or concrete, including gravel and unpaved tracks"):
        diagonal = ink(plot_confusion_matrix(np.eye(number), [name] * number), (8, 48, 107))
        sides.append(np.ptp(diagonal, axis=0).min())
    assert sides[1] > 0.85 * sides[0]


def test_wide_letters_do_not_squeeze_a_confusion_matrix():
    sides = [
        np.ptp(ink(plot_confusion_matrix(np.eye(2), [name] * 2), (8, 48, 107)), axis=0).min()
        for name in ("road", 40 * "W", 40 * "Щ")
    ]
    assert min(sides) > 0.85 * sides[0]


@pytest.mark.parametrize("number", [11, 150])
def test_confusion_matrix_gives_each_class_name_its_room(number):
    picture = plot_confusion_matrix(np.eye(number), [f"class name {index}" for index in range(number)])
    diagonal = ink(picture, (8, 48, 107))
    span = np.ptp(diagonal[diagonal[:, 1] < 0.85 * picture.width][:, 0]) + 1
    assert span / number >= 11  # pixels a row: enough for a letter of six points at 120 dpi
    assert max(picture.size) < 4000


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.ones((2, 3)), r"\(2, 3\)"),
        (np.ones((3, 3)), "2 class names .*3 classes"),
        ([[1, -1], [0, 1]], "negative"),
        ([[1, float("nan")], [0, 1]], "non-finite"),
    ],
)
def test_confusion_matrix_names_bad_input(matrix, message):
    with pytest.raises(ValueError, match=message):
        plot_confusion_matrix(matrix, ["a", "b"])


def test_names_with_dollar_signs_are_no_formulas():
    names = ["$\\unknown$", "$100 to $200"]
    drawn = plot_confusion_matrix(np.eye(2, dtype=int), names, title="$\\unknown$")
    assert drawn.size > (1, 1)
    assert plot_training_curve([{"step": 1, "loss": 1.0}], title="$\\unknown$").size > (1, 1)


def test_names_of_any_length_fit_a_picture(image, labels):
    name = "x" * 200_000
    assert image_grid([image], titles=[name]).width < 2 * image.width
    assert draw_segmentation(image, labels, {**NAMES, 0: name}).width < 2000
