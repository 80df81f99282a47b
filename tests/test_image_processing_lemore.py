# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Both image processors: inputs of every kind, label maps, errors, remote code, and post-processing."""

import base64
import http.server
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import zlib
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode

from lemore_hf import (
    LeMoReConfig,
    LeMoReForSemanticSegmentation,
    image_processing_pil_lemore,
    post_processing_lemore,
)
from lemore_hf.image_processing_lemore import LeMoReImageProcessor
from lemore_hf.image_processing_pil_lemore import LeMoReImageProcessorPil
from lemore_hf.inference import _picture_of, read_picture

ROOT = Path(__file__).parents[1]
PROCESSORS = [LeMoReImageProcessor, LeMoReImageProcessorPil]
TRANSPOSED, ROTATED = 5, 6  # EXIF orientations that swap height and width

both = pytest.mark.parametrize("processor_class", PROCESSORS, ids=["torchvision", "pil"])


@pytest.fixture
def rgb() -> np.ndarray:
    rows, columns = np.mgrid[:40, :60]
    smooth = np.stack([rows * 6, columns * 4, (rows + columns) * 2], axis=-1)
    return (smooth + np.random.default_rng(0).integers(0, 15, smooth.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture
def labels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 150, (40, 60), dtype=np.uint8)


def with_orientation(image: Image.Image, path: Path, orientation: int) -> Image.Image:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    return Image.open(path)


def as_it_is(processor_class: type) -> LeMoReImageProcessor | LeMoReImageProcessorPil:
    """A processor that only reads: what comes out are the 8-bit values."""
    return processor_class(do_resize=False, do_rescale=False, do_normalize=False)


# Images


def image_variants(rgb: np.ndarray) -> dict[str, object]:
    image = Image.fromarray(rgb)
    deep = rgb.astype(np.uint16) * 257
    return {
        "RGB": image,
        "list of PIL": [image],
        "channels last": rgb,
        "channels first": rgb.transpose(2, 0, 1),
        "flipped twice (negative strides)": rgb[::-1].copy()[::-1],
        "batch": rgb[None],
        "tensor": torch.from_numpy(rgb),
        "int64": rgb.astype(np.int64),
        "int16": rgb.astype(np.int16),
        "uint16": deep,
        "uint16 tensor": torch.from_numpy(deep),
        "float64": rgb.astype(np.float64),
        "bfloat16 tensor": torch.from_numpy(rgb).to(torch.bfloat16),
        "opaque RGBA": image.convert("RGBA"),
        "opaque RGBA array": np.dstack([rgb, np.full((40, 60, 1), 255, np.uint8)]),
    }


@both
@pytest.mark.parametrize("name", image_variants(np.zeros((40, 60, 3), np.uint8)))
def test_every_form_of_an_rgb_image_gives_its_values(processor_class, name, rgb):
    pixels = as_it_is(processor_class)(image_variants(rgb)[name], return_tensors="np")["pixel_values"]
    # bfloat16 has 8 bits of significand, so that 255 rounds to 256
    tolerance = 1 if name == "bfloat16 tensor" else 0
    np.testing.assert_allclose(pixels[0].astype(np.float64), rgb.transpose(2, 0, 1), atol=tolerance)


@both
@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "CMYK", "I", "F", "I;16"])
def test_pil_modes(processor_class, mode, rgb):
    image = Image.fromarray(rgb)
    grey = np.array(image.convert("L"))
    if mode == "I;16":
        image, expected = Image.fromarray(grey.astype(np.uint16) * 257), np.dstack([grey] * 3)
        assert image.mode == mode
    elif mode == "1":
        image = image.convert("1")
        expected = np.dstack([np.array(image).astype(np.uint8) * 255] * 3)
    elif mode == "F":
        image = image.convert("F")
        expected = np.dstack([np.array(image)] * 3)
    else:
        image = image.convert(mode)
        expected = np.array(image.convert("RGB"))  # Pillow's own conversion
    pixels = as_it_is(processor_class)(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(pixels, expected.transpose(2, 0, 1))


@both
def test_sixteen_bits_span_the_whole_range(processor_class):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    expected = np.arange(256).reshape(16, 16)
    for image in (ramp, Image.fromarray(ramp), Image.fromarray(ramp.astype(np.int32))):  # the last of mode I
        pixels = as_it_is(processor_class)(image, return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(pixels[0, 0], expected)


@both
def test_sixteen_bit_file_by_path(processor_class, tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    for path in (tmp_path / "deep.png", str(tmp_path / "deep.png")):
        pixels = as_it_is(processor_class)(path, return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(pixels[0, 0], np.arange(256).reshape(16, 16))


@both
@pytest.mark.parametrize("source", ["path", "url", "base64", "data URL"])
def test_pictures_and_maps_of_every_source_are_read_alike(processor_class, source, tmp_path):
    """Not through RGB, as Transformers' loader: deep grey, transparency and labels would be lost."""
    files = {"deep": Image.fromarray(np.full((4, 4), 20000, np.uint16)), "labels": Image.new("L", (4, 4), 7)}
    files["clear"] = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    for name, image in files.items():
        image.save(tmp_path / f"{name}.png")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def named(name: str) -> str:
            path = tmp_path / f"{name}.png"
            text = base64.encodebytes(path.read_bytes()).decode()
            url = f"http://127.0.0.1:{server.server_port}/{name}.png"
            return {"path": str(path), "url": url, "base64": text, "data URL": f"data:image/png;base64,{text}"}[source]

        outputs = as_it_is(processor_class)(
            [named("deep"), named("clear")], [named("labels")] * 2, return_tensors="np"
        )
        server.shutdown()
    assert (outputs["pixel_values"][0] == 78).all(), "20000 / 257"
    assert (outputs["pixel_values"][1] == 255).all(), "white"
    assert (np.stack(outputs["labels"]) == 7).all()


def test_postscript_is_not_run_whatever_its_name(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/was_run\n")  # in the place of Ghostscript
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "photo.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    for read in (LeMoReImageProcessorPil(), read_picture):
        with pytest.raises(ValueError, match="PostScript is a program"):
            read(tmp_path / "photo.png")
    assert not (tmp_path / "was_run").exists()


def png_without_pixels(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT"
    )


@pytest.mark.parametrize("kind", ["no number", "too many pixels", "exif"])
def test_damaged_pictures_are_told_by_one_error(kind, rgb, tmp_path):
    """As uploads to a service, which has to tell them from its own failures: Pillow raises errors of every kind."""
    path = tmp_path / "picture"
    if kind == "exif":  # found when the pixels are read already: `PIL.Image.open` takes the file
        Image.fromarray(rgb).save(path, "PNG", exif=b"Exif\0\0damaged")
    else:
        path.write_bytes(b"P6 4x 4 255\n" if kind == "no number" else png_without_pixels(60_000, 60_000))
    for read in (LeMoReImageProcessor(), LeMoReImageProcessorPil(), read_picture):
        with pytest.raises(OSError, match=re.escape(f"{path} cannot be read as a picture: ")):
            read(path)
    if kind == "exif":
        for read in (LeMoReImageProcessor(), LeMoReImageProcessorPil(), partial(_picture_of, num_channels=3)):
            with pytest.raises(OSError, match=r"^The picture cannot be read as a picture: "):
                read(Image.open(BytesIO(path.read_bytes())))
    encoded = base64.b64encode(path.read_bytes()).decode()
    with pytest.raises((OSError, ValueError), match=r"is no picture: |cannot be read as a picture: "):
        LeMoReImageProcessor()(encoded)


def test_a_server_that_never_answers_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(image_processing_pil_lemore, "_SECONDS_TO_WAIT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(TimeoutError):
        LeMoReImageProcessorPil()(f"http://127.0.0.1:{server.getsockname()[1]}/picture.png")


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Refuses Python's own name, as Wikimedia's servers do."""

    def do_GET(self) -> None:
        if self.headers["User-Agent"].startswith("Python-urllib"):
            self.send_error(403)
        else:
            super().do_GET()

    def log_message(self, *arguments: object) -> None:
        pass


@both
def test_of_more_than_255_classes_none_is_void(processor_class):
    label_map = np.array([[0, 1, 254], [255, 256, 300]])
    image = np.zeros((2, 3, 3), np.uint8)
    as_they_are = processor_class(do_resize=False)(image, label_map, return_tensors="np")["labels"][0]
    np.testing.assert_array_equal(as_they_are, label_map)
    for steps in (
        {"do_reduce_labels": True},
        {"do_pad": True, "pad_size": {"height": 4, "width": 4}},
        {"do_center_crop": True, "crop_size": {"height": 2, "width": 4}},
    ):
        with pytest.raises(ValueError, match="has the label 300, and 255 would have to stand for void"):
            processor_class(do_resize=False, **steps)(image, label_map, return_tensors="np")
    inside = {"do_center_crop": True, "crop_size": {"height": 2, "width": 1}}
    found = processor_class(do_resize=False, **inside)(image, label_map, return_tensors="np")["labels"][0]
    np.testing.assert_array_equal(found, [[1], [256]])


@both
def test_transparency_is_laid_over_white(processor_class):
    rgba = np.zeros((2, 3, 4), np.uint8)  # black, and transparent in the first row
    rgba[1, :, 3] = 255
    for image in (rgba, Image.fromarray(rgba), torch.from_numpy(rgba).permute(2, 0, 1)):
        pixels = as_it_is(processor_class)(image, return_tensors="np")["pixel_values"][0]
        assert (pixels[:, 0] == 255).all()
        assert (pixels[:, 1] == 0).all()


@both
def test_exif_orientation_of_image_and_map(processor_class, rgb, labels, tmp_path):
    image = with_orientation(Image.fromarray(rgb), tmp_path / "image.png", ROTATED)
    upright = np.rot90(rgb, -1)
    processor = as_it_is(processor_class)
    tagged_map = with_orientation(Image.fromarray(labels), tmp_path / "map.png", ROTATED)
    for source, label_map in (
        (image, tagged_map),
        (tmp_path / "image.png", tmp_path / "map.png"),
        (image, np.rot90(labels, -1)),  # drawn over the upright picture, without a tag of its own
    ):
        outputs = processor(source, label_map, return_tensors="np")
        np.testing.assert_array_equal(outputs["pixel_values"][0], upright.transpose(2, 0, 1))
        np.testing.assert_array_equal(outputs["labels"][0], np.rot90(labels, -1))
    with pytest.raises(ValueError, match=r"\(60, 40\).*\(40, 60\).*EXIF"):
        processor(image, labels)


@both
def test_defaults_are_imagenet_at_512(processor_class, rgb):
    outputs = processor_class()(rgb, return_tensors="pt")
    assert outputs.keys() == {"pixel_values"}
    pixels = outputs["pixel_values"]
    assert pixels.shape == (1, 3, 512, 512)
    assert pixels.dtype == torch.float32
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    resized = torch.from_numpy(np.array(Image.fromarray(rgb).resize((512, 512), Image.Resampling.BILINEAR)))
    expected = (resized / 255 - mean) / std
    # One 8-bit level, which is where two ways of resizing round apart
    torch.testing.assert_close(pixels[0], expected.permute(2, 0, 1), atol=1.01 / 255 / 0.224, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": {"height": 24, "width": 33}},
        {"size": {"shortest_edge": 21}},
        {"size": {"shortest_edge": 30, "longest_edge": 35}},
        {"size": {"max_height": 30, "max_width": 24}},
        {"do_center_crop": True, "size": {"shortest_edge": 40}, "crop_size": {"height": 31, "width": 77}},
        {"do_pad": True, "size": {"shortest_edge": 20}, "pad_size": {"height": 45, "width": 50}},
        {"do_normalize": False},
        {"do_rescale": False},
        {"resample": Image.Resampling.BICUBIC, "size": {"height": 24, "width": 33}},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["uint8", "float32", "grey"])
def test_backends_agree(settings, kind, rgb, labels):
    image = {"uint8": rgb, "float32": rgb.astype(np.float32), "grey": rgb[..., 0]}[kind]
    torchvision, pil = (cls(**settings)(image, labels, return_tensors="pt") for cls in PROCESSORS)
    assert torch.equal(torchvision["labels"], pil["labels"])
    assert torchvision["pixel_values"].dtype == pil["pixel_values"].dtype
    # The tolerance of Transformers' own test, in units of normalised values
    scale = 60 if settings.get("do_rescale") is False else 1
    difference = (torchvision["pixel_values"].float() - pil["pixel_values"].float()).abs()
    assert difference.max() <= 0.1 * scale
    assert difference.mean() <= 5e-3 * scale


@both
def test_sizes_by_edge(processor_class, rgb):
    def size(**settings) -> tuple[int, ...]:
        return tuple(processor_class(**settings)(rgb, return_tensors="pt")["pixel_values"].shape[-2:])

    assert size(size={"shortest_edge": 20}) == (20, 30)
    assert size(size={"shortest_edge": 20, "longest_edge": 24}) == (16, 24)
    assert size(size={"max_height": 20, "max_width": 24}) == (16, 24)
    assert size(size={"max_height": 80, "max_width": 240}) == (80, 120)
    assert size(size={"max_height": 20, "max_width": 1}) == (1, 1)
    assert size(size=16) == (16, 16)
    assert size(size=(16, 20)) == (16, 20)


@both
def test_batch_of_different_sizes(processor_class, rgb, labels):
    images, maps = [rgb, rgb[:, :40]], [labels, labels[:, :40]]
    processor = processor_class(size={"shortest_edge": 20})
    with pytest.raises(ValueError, match=r"\(20, 20\), \(20, 30\).*do_pad=True"):
        processor(images, maps, return_tensors="pt")
    unstacked = processor(images, maps)
    assert [tuple(pixels.shape) for pixels in unstacked["pixel_values"]] == [(3, 20, 30), (3, 20, 20)]
    padded = processor(images, maps, do_pad=True, return_tensors="pt")
    assert padded["pixel_values"].shape == (2, 3, 20, 30)
    assert (padded["pixel_values"][1, :, :, 20:] == 0).all()
    assert (padded["labels"][1, :, 20:] == 255).all()
    assert (padded["labels"][1, :, :20] != 255).all()


@both
def test_single_channel_models(processor_class, rgb):
    processor = processor_class(do_convert_rgb=False, image_mean=[0.5], image_std=[0.25], do_resize=False)
    pixels = processor(Image.fromarray(rgb).convert("L"), return_tensors="np")["pixel_values"]
    expected = (np.array(Image.fromarray(rgb).convert("L")) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(pixels[0, 0], expected, atol=1e-5)
    assert pixels.shape == (1, 1, 40, 60)


@both
def test_many_channels(processor_class):
    image = np.random.default_rng(0).integers(0, 255, (6, 30, 40), dtype=np.uint8)
    processor = processor_class(do_convert_rgb=False, image_mean=0.5, image_std=0.5, size=(20, 20))
    pixels = processor(image, input_data_format="channels_first", return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 6, 20, 20)
    with pytest.raises(ValueError, match="6 channels"):
        processor(image, input_data_format="channels_first", do_convert_rgb=True)


# Label maps


def map_variants(labels: np.ndarray) -> dict[str, object]:
    indexed = Image.fromarray(labels).convert("P")
    indexed.putpalette([255 - index for index in range(256) for _ in "rgb"])  # colours that are not the labels
    integers = {str(dtype): labels.astype(dtype) for dtype in ("uint8", "uint16", "int16", "int32", "int64", "uint32")}
    tensors = {f"{dtype}": torch.from_numpy(labels).to(dtype) for dtype in (torch.uint8, torch.uint16, torch.int64)}
    return {
        **integers,
        **tensors,
        "whole floats": labels.astype(np.float32),
        "batch": labels[None],
        "list": [labels],
        "mode L": Image.fromarray(labels),
        "mode P": indexed,
        "mode I": Image.fromarray(labels.astype(np.int32)),
        "mode I;16": Image.fromarray(labels.astype(np.uint16)),
    }


@both
@pytest.mark.parametrize("name", map_variants(np.zeros((40, 60), np.uint8)))
def test_every_form_of_a_label_map_gives_its_labels(processor_class, name, rgb, labels):
    outputs = processor_class(do_resize=False)(rgb, map_variants(labels)[name], return_tensors="pt")
    assert outputs["labels"].dtype == torch.int64
    assert torch.equal(outputs["labels"][0], torch.from_numpy(labels).long())


@both
def test_binary_maps(processor_class, rgb, labels):
    mask = labels > 75
    for label_map in (mask, torch.from_numpy(mask), Image.fromarray(mask)):
        outputs = processor_class(do_resize=False)(rgb, label_map, return_tensors="np")
        np.testing.assert_array_equal(outputs["labels"][0], mask)


@both
def test_label_map_files_keep_palette_indices(processor_class, rgb, labels, tmp_path):
    map_variants(labels)["mode P"].save(tmp_path / "map.png")
    outputs = processor_class(do_resize=False)(rgb, tmp_path / "map.png", return_tensors="np")
    np.testing.assert_array_equal(outputs["labels"][0], labels)


@both
@pytest.mark.parametrize("values", [np.full((40, 60), 1.0, object), np.full((40, 60), 2 + 5j), np.full((40, 60), "3")])
def test_maps_of_what_is_no_number_are_refused(processor_class, rgb, values):
    with pytest.raises(TypeError, match="Segmentation maps must hold numbers, got the dtype"):
        processor_class(do_resize=False)(rgb, values)


@both
def test_large_labels_survive_resizing(processor_class):
    label_map = np.array([[70_000_001, 5], [7, 70_000_002]])
    image = np.zeros((2, 2, 3), np.uint8)
    resized = processor_class(size=(4, 4))(image, label_map, return_tensors="np")["labels"][0]
    np.testing.assert_array_equal(resized, label_map.repeat(2, axis=0).repeat(2, axis=1))


@both
@pytest.mark.parametrize("size", [(24, 33), (71, 50), (40, 7), (512, 512)])
def test_maps_take_the_nearest_label(processor_class, size, rgb, labels):
    resized = processor_class(size=size)(rgb, labels, return_tensors="pt")["labels"][0]
    # In float64, where the centres of pixels are exact enough
    expected = F.interpolate(torch.from_numpy(labels)[None, None].double(), size=size, mode="nearest-exact")[0, 0]
    assert torch.equal(resized, expected.long())


@both
def test_reduce_labels(processor_class):
    label_map = np.array([[0, 1, 150], [254, 255, 2]])
    image = np.zeros((2, 3, 3), np.uint8)
    processor = processor_class(do_reduce_labels=True, do_resize=False)
    for dtype in (np.uint8, np.int64):
        outputs = processor(image, label_map.astype(dtype), return_tensors="np")
        np.testing.assert_array_equal(outputs["labels"][0], [[255, 0, 149], [253, 255, 1]])
    np.testing.assert_array_equal(processor(image, label_map, do_reduce_labels=False)["labels"][0], label_map)


@both
def test_map_and_image_stay_aligned(processor_class, labels):
    # The label is painted as the colour, so that each step of the pipeline must move both alike.
    picture = np.dstack([labels] * 3)
    for crop in ({"height": 21, "width": 30}, {"height": 55, "width": 81}, {"height": 20, "width": 75}):
        processor = processor_class(
            do_resize=False,
            do_rescale=False,
            do_normalize=False,
            do_center_crop=True,
            crop_size=crop,
            do_pad=True,
            pad_size={"height": 70, "width": 90},
        )
        outputs = processor(picture, labels, return_tensors="np")
        label_map, pixels = outputs["labels"][0], outputs["pixel_values"][0, 0]
        assert label_map.shape == (70, 90)
        known = label_map != 255
        assert known.sum() == min(40, crop["height"]) * min(60, crop["width"])
        np.testing.assert_array_equal(label_map[known], pixels[known])
        assert (pixels[~known] == 0).all()


@both
def test_inputs_are_left_alone(processor_class, rgb, labels):
    image, label_map = rgb.astype(np.float32), labels.copy()
    processor_class(do_resize=False, do_reduce_labels=True)(image, label_map, return_tensors="pt")
    np.testing.assert_array_equal(image, rgb)
    np.testing.assert_array_equal(label_map, labels)


# Bad input


@both
@pytest.mark.parametrize(
    ("images", "maps", "error", "message"),
    [
        ([], None, ValueError, "empty list"),
        ([[]], None, ValueError, "empty list"),
        (None, None, TypeError, "NoneType"),
        ([object()], None, TypeError, "object"),
        (np.zeros((2, 2, 3, 4, 5), np.uint8), None, ValueError, r"\(2, 2, 3, 4, 5\).*an image"),
        (np.zeros((5, 6, 7), np.uint8), None, ValueError, r"\(5, 6, 7\).*input_data_format"),
        (np.full((9, 6, 3), -1), None, ValueError, r"\[-1, -1\]"),
        (np.full((9, 6, 3), 70000), None, ValueError, "70000"),
        (np.zeros((0, 6, 3), np.uint8), None, ValueError, r"\(0, 6, 3\) has no pixels"),
        (torch.zeros(3, 9, 0), None, ValueError, r"\(3, 9, 0\) has no pixels"),
        (np.full((9, 6, 4), 200.0), None, ValueError, r"RGBA floats.*200"),
        (np.zeros((9, 6, 3), np.uint8), np.zeros((6, 9), int), ValueError, r"Image 0.*\(9, 6\).*\(6, 9\)"),
        (np.zeros((9, 6, 3), np.uint8), np.zeros((2, 9, 6), int), ValueError, "1 images and 2 segmentation maps"),
        ([np.zeros((9, 6, 3), np.uint8)] * 2, [np.zeros((9, 6), int)], ValueError, "2 images and 1 segmentation maps"),
        (np.zeros((9, 6, 3), np.uint8), [], ValueError, "1 images and 0 segmentation maps"),
        (np.zeros((9, 6, 3), np.uint8), np.zeros((9, 6, 1), int), ValueError, "leave a last dimension of 1 out"),
        (np.zeros((9, 6, 3), np.uint8), np.zeros((9, 6, 3), int), ValueError, "map colours to labels first"),
        (np.zeros((9, 6, 3), np.uint8), np.full((9, 6), 1.5), ValueError, "1.5"),
        (np.zeros((9, 6, 3), np.uint8), np.full((9, 6), np.nan), ValueError, "nan"),
        (np.zeros((9, 6, 3), np.uint8), np.zeros((1, 1, 9, 6), int), ValueError, "a segmentation map"),
        (np.zeros((9, 6, 3), np.uint8), Image.new("RGB", (6, 9)), ValueError, "'RGB'"),
        (np.zeros((9, 6, 3), np.uint8), "no/such/file.png", ValueError, "no/such/file.png"),
        ("nosuchfile12", None, ValueError, "'nosuchfile12' is no picture: expected the path of a file"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_inputs(processor_class, images, maps, error, message):
    with pytest.raises(error, match=message):
        processor_class()(images, maps, return_tensors="pt")


@both
def test_a_misspelt_layout_is_refused(processor_class):
    with pytest.raises(ValueError, match=r"channel_first is not .*'channels_first', 'channels_last'"):
        processor_class()(np.zeros((3, 9, 3), np.uint8), input_data_format="channel_first")


@both
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"longest_edge": 512}}, "`size` must have the keys"),
        ({"size": {"height": 0, "width": 512}}, "positive"),
        ({"crop_size": {"shortest_edge": 512}}, "`crop_size` must have the keys"),
        ({"data_format": "channels_last"}, "channels_first"),
        ({"image_std": 0.0}, "`image_std` must be above 0"),
        ({"image_std": [0.2, 0.0, float("nan")]}, "`image_std` must be above 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_settings(processor_class, settings, message, rgb):
    with pytest.raises(ValueError, match=message):
        processor_class(**settings)
    with pytest.raises(ValueError, match=message):
        processor_class()(rgb, **settings)


@both
def test_statistics_must_fit_the_channels(processor_class, rgb):
    grey = Image.fromarray(rgb).convert("L")
    with pytest.raises(ValueError, match=r"`image_mean` has 3 values but the image has 1 channels"):
        processor_class(do_convert_rgb=False)(grey)


@both
@pytest.mark.parametrize("kind", ["uint8", "float", "grey", "four channels"])
def test_torchvision_s_names_of_filters_are_understood(processor_class, kind, rgb):
    picture = {"float": rgb / 255.0, "grey": rgb[..., :1], "four channels": np.dstack([rgb, rgb[..., 0]])}.get(
        kind, rgb
    )
    settings = {
        "do_convert_rgb": False,
        "do_normalize": False,
        "return_tensors": "pt",
        "size": {"height": 9, "width": 7},
    }
    filters = (InterpolationMode.BICUBIC, Image.Resampling.BICUBIC)
    one, other = (processor_class()(picture, resample=name, **settings).pixel_values for name in filters)
    assert torch.equal(one, other)


@both
def test_unknown_arguments_are_refused(processor_class, rgb):
    with pytest.raises(TypeError, match="do_reduce_label"):
        processor_class()(rgb, do_reduce_label=True)


# Remote code

LOAD_WITHOUT_PACKAGE = """
import json, sys
import numpy as np
import torch
for name in sys.argv[1].split(","):
    sys.modules[name] = None  # as if it were not installed
# Under this name Transformers 5.17 has it without torchvision too.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
image = np.arange(30 * 40 * 3, dtype=np.uint8).reshape(30, 40, 3)
for case in sys.argv[2:]:
    folder, backend = case.split("=")
    if backend == "network":
        from transformers import AutoModelForSemanticSegmentation
        model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True).train()
        print("network of", type(model).__module__, *model(torch.ones(2, 3, 64, 64)).logits.shape)
        continue
    keywords = {"backend": backend} if backend else {}
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True, **keywords)
    outputs = processor(image, image[..., 0], return_tensors="pt")
    processor.save_pretrained(folder + "-again")
    sums = [outputs["pixel_values"].double().sum().item(), outputs["labels"].sum().item()]
    print(json.dumps([type(processor).__name__, type(processor).__module__, sums]))
"""


@pytest.mark.parametrize(
    ("missing", "cases"),
    [
        (
            "lemore_hf",
            [
                (LeMoReImageProcessor, "", LeMoReImageProcessor),
                (LeMoReImageProcessorPil, "torchvision", LeMoReImageProcessor),
                (LeMoReImageProcessorPil, "pil", LeMoReImageProcessorPil),
            ],
        ),
        ("lemore_hf,torchvision", [(LeMoReImageProcessor, "", LeMoReImageProcessorPil)]),
    ],
    ids=["no package", "no package nor torchvision"],
)
def test_remote_code_without_the_package(missing, cases, tmp_path):
    settings = {"size": {"height": 24, "width": 33}, "do_reduce_labels": True}
    arguments = []
    for index, (saved, backend, _) in enumerate(cases):
        saved(**settings).save_pretrained(tmp_path / f"model{index}")
        arguments.append(f"{tmp_path / f'model{index}'}={backend}")
    config = LeMoReConfig(num_labels=2, hidden_sizes=(8, 8, 8, 8), stem_sizes=(8,), drop_path_rate=0.2)
    LeMoReForSemanticSegmentation(config).save_pretrained(tmp_path / "net")
    arguments.append(f"{tmp_path / 'net'}=network")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", LOAD_WITHOUT_PACKAGE, missing, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^network of transformers_modules\..* 2 2 8 8$", result.stdout, re.M)

    image = np.arange(30 * 40 * 3, dtype=np.uint8).reshape(30, 40, 3)
    lines = [line for line in result.stdout.splitlines() if line.startswith("[")]
    for index, ((_, _, expected), line) in enumerate(zip(cases, lines, strict=True)):
        name, module, sums = json.loads(line)
        assert name == expected.__name__
        assert module.startswith("transformers_modules.")
        here = expected(**settings)(image, image[..., 0], return_tensors="pt")
        assert sums == [here["pixel_values"].double().sum().item(), here["labels"].sum().item()]
        # What was loaded as remote code can be saved again, for either backend.
        files, again = (
            {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
            for folder in (f"model{index}", f"model{index}-again")
        )
        assert files == again


# Post-processing


def plain_scores(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


def label_maps(logits: torch.Tensor, sizes: list[tuple[int, int]] | None = None, **kwargs) -> list:
    outputs = SimpleNamespace(logits=logits)
    return LeMoReImageProcessorPil().post_process_semantic_segmentation(outputs, sizes, **kwargs)


def assert_best_classes(labels: torch.Tensor, scores: torch.Tensor) -> None:
    """Each label's score is the greatest, but for float rounding."""
    assert labels.dtype == torch.int64
    assert labels.shape == scores.shape[1:]
    loss = scores.amax(dim=0) - scores.gather(0, labels[None])[0]
    assert loss.max() <= 1e-6 * scores.abs().max()


@pytest.mark.parametrize("block", [1 << 8, 1 << 12, 1 << 20])
@pytest.mark.parametrize("blur", [1, 4])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((7, 13, 17), (101, 133)),
        ((7, 13, 17), (5, 333)),
        ((7, 13, 17), (130, 3)),
        ((7, 13, 17), (13, 17)),
        ((7, 13, 17), (6, 9)),
        ((7, 13, 17), (14, 18)),
        ((2, 8, 8), (64, 64)),
        ((40, 1, 1), (30, 50)),
        ((5, 2, 1), (30, 50)),
        ((3, 4, 5), (1, 1)),
    ],
    ids=str,
)
def test_labels_are_those_of_the_plain_way(shape, size, blur, block, monkeypatch):
    monkeypatch.setattr(post_processing_lemore, "_BLOCK_ELEMENTS", block)
    generator = torch.Generator().manual_seed(sum(shape) + blur)
    coarse = [max(1, length // blur) for length in shape[1:]]
    logits = F.interpolate(torch.randn(1, shape[0], *coarse, generator=generator) * 5, size=shape[1:], mode="bicubic")
    (labels,) = label_maps(logits, [size])
    assert_best_classes(labels, plain_scores(logits, size)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtypes_and_layouts(dtype, channels_last):
    logits = torch.randn(2, 20, 16, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    if channels_last:
        logits = logits.to(memory_format=torch.channels_last)
    sizes = [(250, 301), (256, 384)]
    for item, size, labels in zip(logits, sizes, label_maps(logits, sizes), strict=True):
        assert_best_classes(labels, plain_scores(item[None], size)[0])


def test_scores_of_very_different_magnitude():
    # A class far above the others at one corner must not wash out what decides elsewhere in the cell.
    logits = torch.randn(1, 30, 6, 6, generator=torch.Generator().manual_seed(0))
    logits[0, 3, 2, 2] = 1e4
    (labels,) = label_maps(logits, [(400, 400)])
    scores = plain_scores(logits, (400, 400))[0]
    loss = scores.amax(dim=0) - scores.gather(0, labels[None])[0]
    assert (loss <= 1e-5 * scores.abs().amax(dim=0).clamp_min(1)).all()


def test_equal_scores_give_the_first_class(monkeypatch):
    monkeypatch.setattr(post_processing_lemore, "_BLOCK_ELEMENTS", 64)
    (labels,) = label_maps(torch.ones(1, 6, 4, 4), [(40, 40)])
    assert (labels == 0).all()


def test_without_target_sizes_the_labels_have_the_logits_size():
    logits = torch.randn(3, 5, 8, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.stack(label_maps(logits)), logits.argmax(dim=1))


def test_target_sizes_as_a_tensor():
    logits = torch.randn(2, 5, 8, 9, generator=torch.Generator().manual_seed(0))
    maps = label_maps(logits, torch.tensor([[30, 40], [50, 60]]))
    assert [tuple(labels.shape) for labels in maps] == [(30, 40), (50, 60)]


def test_another_default_device_changes_no_labels():
    logits = torch.randn(1, 20, 16, 24, generator=torch.Generator().manual_seed(0))
    (expected,) = label_maps(logits, [(250, 301)])
    with torch.device("meta"):
        (labels,) = label_maps(logits, [(250, 301)])
    assert torch.equal(labels, expected)


def test_binary_labels_are_where_the_sigmoid_exceeds_half(monkeypatch):
    logits = torch.randn(2, 1, 12, 10, generator=torch.Generator().manual_seed(0))
    sizes = [(100, 90), (12, 10)]
    for block in (64, 1 << 20):
        monkeypatch.setattr(post_processing_lemore, "_BLOCK_ELEMENTS", block)
        for item, size, labels in zip(logits, sizes, label_maps(logits, sizes), strict=True):
            scores = plain_scores(item[None], size)[0, 0]
            clear = scores.abs() > 1e-6
            assert torch.equal(labels[clear], (scores.sigmoid() > 0.5).long()[clear])


def test_scores_on_request():
    logits = torch.randn(2, 5, 8, 9, generator=torch.Generator().manual_seed(0)).half()
    sizes = [(300, 700), (8, 9)]
    outputs = label_maps(logits, sizes, return_segmentation_scores=True)
    for item, size, labels, output in zip(logits, sizes, label_maps(logits, sizes), outputs, strict=True):
        torch.testing.assert_close(output.segmentation_scores, plain_scores(item[None], size)[0])
        assert torch.equal(output.segmentation, labels)
    binary = label_maps(logits[:, :1], sizes, return_segmentation_scores=True)
    assert binary[0].segmentation_scores.shape == (1, 300, 700)


def brightness_logits(pixel_values: torch.Tensor) -> SimpleNamespace:
    """As of a network with the classes dark and bright, at a stride of 4."""
    brightness = F.avg_pool2d(pixel_values.mean(1, keepdim=True), 4, ceil_mode=True)
    return SimpleNamespace(logits=torch.cat([0.5 - brightness, brightness - 0.5], dim=1))


@both
@pytest.mark.parametrize("pad_size", [None, {"height": 144, "width": 160}])
@pytest.mark.parametrize("do_resize", [True, False])
def test_padding_is_cut_off_the_labels(processor_class, pad_size, do_resize):
    """A landscape and a portrait, in one batch that neither fills."""
    landscape = np.zeros((96, 128, 3), np.uint8)
    landscape[32:, 64:] = 255
    pictures = [landscape, np.rot90(landscape).copy()]
    sizes = [picture.shape[:2] for picture in pictures]
    processor = processor_class(
        do_normalize=False, size={"shortest_edge": 72}, do_resize=do_resize, do_pad=True, pad_size=pad_size
    )
    outputs = brightness_logits(processor(pictures, return_tensors="pt")["pixel_values"])
    found = processor.post_process_semantic_segmentation(outputs, sizes, return_segmentation_scores=True)
    for labels, one, picture in zip(
        processor.post_process_semantic_segmentation(outputs, sizes), found, pictures, strict=True
    ):
        assert labels.shape == one.segmentation.shape == one.segmentation_scores.shape[1:] == picture.shape[:2]
        assert torch.equal(labels, one.segmentation)
        assert ((labels.numpy() == 1) == (picture[..., 0] == 255)).mean() > 0.97
    whole = processor.post_process_semantic_segmentation(outputs)
    assert whole[0].shape == outputs.logits.shape[2:]


@both
def test_labels_of_what_was_cropped_do_not_lie_over_the_picture(processor_class):
    picture = np.zeros((96, 128, 3), np.uint8)
    processor = processor_class(
        do_normalize=False, size={"shortest_edge": 72}, do_center_crop=True, crop_size={"height": 64, "width": 64}
    )
    outputs = brightness_logits(processor(picture, return_tensors="pt")["pixel_values"])
    message = r"\(96, 128\) is asked for, but do_center_crop has left \(64, 64\) of \(72, 96\)"
    with pytest.raises(ValueError, match=message):
        processor.post_process_semantic_segmentation(outputs, [(96, 128)])
    assert processor.post_process_semantic_segmentation(outputs, [(64, 64)])[0].shape == (64, 64)
    square = processor_class(
        size={"height": 64, "width": 64}, do_center_crop=True, crop_size={"height": 64, "width": 64}
    )
    assert square.post_process_semantic_segmentation(outputs, [(96, 128)])[0].shape == (96, 128)


@both
def test_another_rescale_factor(processor_class):
    picture = np.full((6, 5, 3), 100, np.uint8)
    for settings, expected in (({"do_normalize": False}, 50), ({"image_mean": 0.5, "image_std": 0.25}, 198)):
        processor = processor_class(do_resize=False, rescale_factor=0.5, **settings)
        pixels = processor(picture, return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(pixels, expected, rtol=1e-5)


@both
def test_dark_pictures_of_16_bits_stay_dark(processor_class):
    dark = np.full((4, 4), 255, np.uint16)
    for image in (dark, Image.fromarray(dark), torch.from_numpy(dark)):
        assert (as_it_is(processor_class)(image, return_tensors="np")["pixel_values"] == 1).all()


@both
def test_16_bits_of_the_other_byte_order(processor_class):
    deep = (np.arange(16).reshape(4, 4) * 4096).astype(">u2")
    image = Image.frombytes("I;16B", (4, 4), deep.tobytes())
    pixels = as_it_is(processor_class)(image, return_tensors="np")["pixel_values"][0, 0]
    np.testing.assert_array_equal(pixels, np.rint(deep.astype(float) / 257))


@both
def test_alpha_is_kept_where_rgb_is_not_asked_for(processor_class):
    rgba = np.random.default_rng(0).integers(0, 256, (4, 5, 4), dtype=np.uint8)
    processor = processor_class(do_convert_rgb=False, do_resize=False, do_rescale=False, do_normalize=False)
    pixels = processor(Image.fromarray(rgba), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(pixels, rgba.transpose(2, 0, 1))


def test_post_processing_errors():
    logits = torch.randn(3, 5, 8, 9)
    with pytest.raises(ValueError, match="2 target sizes for a batch of 3"):
        label_maps(logits, [(8, 9)] * 2)
    with pytest.raises(ValueError, match=r"\(height, width\).*\(0, 9\)"):
        label_maps(logits, [(8, 9), (8, 9), (0, 9)])
    with pytest.raises(ValueError, match=r"\(8.5, 9\)"):
        label_maps(logits, [(8, 9), (8, 9), (8.5, 9)])
    with pytest.raises(ValueError, match=r"\(height, width\) of positive integers, got 480"):
        label_maps(logits[:2], (480, 640))
    with pytest.raises(ValueError, match=r"\(batch, num_labels, height, width\), got \(5, 8, 9\)"):
        label_maps(logits[0])
    for value in (float("nan"), float("inf"), float("-inf")):
        broken = logits.clone()
        broken[1, 2, 3, 4] = value
        with pytest.raises(ValueError, match="batch item 1"):
            label_maps(broken, [(30, 30)] * 3)


MEASURE_PEAK = """
from types import SimpleNamespace
import torch
from lemore_hf.image_processing_pil_lemore import LeMoReImageProcessorPil

def segment(classes, size):
    logits = torch.randn(1, classes, 64, 64, generator=torch.Generator().manual_seed(0))
    LeMoReImageProcessorPil().post_process_semantic_segmentation(SimpleNamespace(logits=logits), [size])

def kilobytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

segment(2, (1024, 1024))
before = kilobytes("VmRSS")
segment(150, (4000, 3000))
print((kilobytes("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_of_a_large_target():
    result = subprocess.run([sys.executable, "-c", MEASURE_PEAK], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    # 96 MB of it are the labels; the scores would take 7.2 GB. Random logits leave the most classes in each cell.
    assert 50e6 < int(result.stdout) < 300e6
