# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""scripts/predict.py: pictures and videos to masks and overlays."""

import copy
import functools
import io
import json
import os
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from launching import launch, run_here
from PIL import Image
from quick_fit import quick_fit
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from lemore_hf import LeMoReConfig, LeMoReForSemanticSegmentation, LeMoReModel
from lemore_hf import prediction as prediction_module
from lemore_hf.command_line import run_script
from lemore_hf.export import GRAPH_FILES, export_model
from lemore_hf.image_processing_lemore import LeMoReImageProcessor
from lemore_hf.inference import Segmenter
from lemore_hf.prediction import (
    _hash_of,
    claim_results,
    find_inputs,
    mask_image,
    overlay_image,
    predict_file,
    target_files,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def network() -> tuple[LeMoReForSemanticSegmentation, LeMoReImageProcessor]:
    torch.manual_seed(0)
    config = LeMoReConfig(
        num_labels=5,
        image_size=64,
        hidden_sizes=(8, 12, 16, 24),
        decoder_hidden_size=32,
        palette=[[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]],
    )
    images = [patches(seed) for seed in range(8)]
    # What there is to learn: which of the colours is strongest, and where all are dark.
    labels = [np.where(image.max(-1) < 128, 4, image.argmax(-1)) for image in map(np.asarray, images)]
    image_processor = LeMoReImageProcessor(size={"height": 64, "width": 64})
    batch = image_processor(images, segmentation_maps=labels, return_tensors="pt")
    return quick_fit(LeMoReForSemanticSegmentation(config), **batch), image_processor


def patches(seed: int) -> Image.Image:
    """Blurred patches of random colours, 80×60."""
    colours = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((80, 60), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def checkpoint(network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in network:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def segmenter(checkpoint: Path) -> Segmenter:
    return Segmenter(checkpoint)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with good pictures in it and below it, a damaged one, and a file that is none."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for seed, name in enumerate(("one.png", "two.png", "more/one.jpg")):
        patches(seed).save(folder / name)
    (folder / "damaged.jpg").write_bytes((folder / "more" / "one.jpg").read_bytes()[:300])
    (folder / "notes.txt").write_text("no picture")
    return folder


SCRIPT = ROOT / "scripts" / "predict.py"


@pytest.fixture
def predict(monkeypatch):
    """The script, in this process."""
    return functools.partial(run_here, monkeypatch, SCRIPT)


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


EXPECTED = {f"{kind}/{name}.png" for kind in ("masks", "overlays") for name in ("one", "two", "more/one")}
EXPECTED |= {"predictions.json"}


def test_folder_is_segmented_in_parallel_and_the_damaged_file_is_listed(checkpoint, segmenter, pictures, tmp_path):
    output = tmp_path / "out"
    words = ("--model", checkpoint, "--input", pictures, "--output", output, "--processes", 2)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(launch(1, SCRIPT, *words), capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert files_below(output) == EXPECTED
    assert "3 written" in result.stdout
    assert f"Skipped {pictures / 'damaged.jpg'}" in result.stderr
    assert "notes.txt" not in result.stderr
    for name in ("one.png", "more/one.jpg"):
        mask = np.asarray(Image.open((output / "masks" / name).with_suffix(".png")))
        np.testing.assert_array_equal(mask, segmenter(Image.open(pictures / name)))


def test_masks_hold_the_labels_and_overlays_the_picture(segmenter, pictures, tmp_path):
    targets = {kind: tmp_path / kind / "one.png" for kind in ("masks", "overlays")}
    predict_file(segmenter, pictures / "one.png", targets, alpha=0.25)
    picture = Image.open(pictures / "one.png")
    labels = segmenter(picture)
    assert labels.shape == (60, 80)
    assert len(np.unique(labels)) > 2
    mask = Image.open(targets["masks"])
    np.testing.assert_array_equal(np.asarray(mask), labels)
    palette = np.array(segmenter.config.palette)
    np.testing.assert_array_equal(np.asarray(mask.convert("RGB")), palette[labels])
    overlay = np.asarray(Image.open(targets["overlays"]))[:60, :80].astype(float)
    np.testing.assert_allclose(overlay, 0.75 * np.asarray(picture) + 0.25 * palette[labels], atol=1.5)


def test_second_run_writes_only_what_is_missing(checkpoint, pictures, tmp_path, predict, capsys):
    output = tmp_path / "out"
    (pictures / "damaged.jpg").unlink()
    predict("--model", checkpoint, "--input", pictures, "--output", output)
    assert "3 written" in capsys.readouterr().out
    kept, removed = [output / "masks" / "one.png", output / "overlays" / "two.png"], output / "masks" / "two.png"
    for file in kept:
        file.write_bytes(b"marked")
    removed.unlink()
    predict("--model", checkpoint, "--input", pictures, "--output", output)
    printed = capsys.readouterr().out
    assert "1 written" in printed
    assert "2 were there" in printed
    assert [file.read_bytes() for file in kept] == [b"marked"] * 2
    assert files_below(output) == EXPECTED


def test_results_of_something_else_are_not_taken_for_the_ones_asked_for(checkpoint, network, pictures, tmp_path):
    output = tmp_path / "out"
    targets = target_files({pictures / "one.png": Path("one.png")}, output, prediction_module.TARGETS)
    claim_results(output, checkpoint, targets, 0.5)
    for file in targets[pictures / "one.png"].values():
        file.parent.mkdir(parents=True)
        file.write_bytes(b"a result")
    claim_results(output, checkpoint, targets, 0.5)  # the same again

    another = {pictures / "more" / "one.jpg": targets[pictures / "one.png"]}
    with pytest.raises(
        ValueError, match=r"is the result of another input \(one\.png, .*, now one\.jpg, .*\): pass --overwrite"
    ):
        claim_results(output, checkpoint, another, 0.5)
    with pytest.raises(ValueError, match=r"overlays/one\.png is the result of another alpha \(0\.5, now 1\.0\)"):
        claim_results(output, checkpoint, targets, 1.0)
    model = copy.deepcopy(network[0])
    model.decode_head.classifier.bias.data += 1
    model.save_pretrained(tmp_path / "retrained")
    with pytest.raises(ValueError, match="is the result of another model"):
        claim_results(output, tmp_path / "retrained", targets, 0.5)
    (checkpoint / "metrics.json").write_text("{}")
    claim_results(output, checkpoint, targets, 0.5)  # scores beside a network make no other of it
    (checkpoint / "metrics.json").unlink()
    claim_results(output, tmp_path / "retrained", targets, 0.5, overwrite=True)
    # Gone before the record says that they are of the new model: a run that is interrupted now is made up for.
    assert not any(file.exists() for file in targets[pictures / "one.png"].values())
    for file in targets[pictures / "one.png"].values():
        file.write_bytes(b"a result")
    with pytest.raises(ValueError, match="is the result of another model"):
        claim_results(output, checkpoint, targets, 0.5)


@pytest.mark.parametrize("name", sorted(GRAPH_FILES))
def test_another_graph_in_an_export_is_another_model(name, tmp_path):
    (tmp_path / "lemore_export.json").write_text("{}")
    (tmp_path / name).write_bytes(b"some weights")
    before = _hash_of(tmp_path)
    (tmp_path / name).write_bytes(b"other weights")
    assert _hash_of(tmp_path) != before


def test_a_picture_that_was_replaced_is_segmented_anew(checkpoint, pictures, tmp_path):
    def claim(folder: Path, overwrite: bool = False) -> Path:
        targets = target_files({folder / "one.png": Path("one.png")}, tmp_path / "out", ["masks"])
        claim_results(tmp_path / "out", checkpoint, targets, 0.5, overwrite)
        return targets[folder / "one.png"]["masks"]

    mask = claim(pictures)
    mask.parent.mkdir()
    mask.write_bytes(b"a result")
    claim(pictures.rename(tmp_path / "moved"))  # the folder elsewhere: still the same picture
    patches(7).save(tmp_path / "moved" / "one.png")
    with pytest.raises(ValueError, match=r"another input \(one\.png, \d+ bytes of .*, now one\.png, \d+ bytes"):
        claim(tmp_path / "moved")
    claim(tmp_path / "moved", overwrite=True)
    assert not mask.exists()
    (tmp_path / "out" / "predictions.json").write_text("{")
    with pytest.raises(ValueError, match=r"predictions\.json is damaged .*: delete it"):
        claim(tmp_path / "moved")
    (tmp_path / "out" / "predictions.json").write_text("[]")
    with pytest.raises(ValueError, match=r"predictions\.json is not what this program has written"):
        claim(tmp_path / "moved")


def test_a_file_of_nobody_knows_whom_is_not_taken_for_a_result(checkpoint, pictures, tmp_path):
    """Such as masks made by hand, where the output is the folder of the data."""
    targets = target_files({pictures / "one.png": Path("one.png")}, tmp_path, ["masks"])
    mask = tmp_path / "masks" / "one.png"
    mask.parent.mkdir()
    mask.write_bytes(b"made by hand")
    with pytest.raises(
        ValueError, match=r"one\.png is there, and not from here .*: pass --overwrite to write it anew"
    ):
        claim_results(tmp_path, checkpoint, targets, 0.5)
    assert mask.read_bytes() == b"made by hand"


def test_an_input_is_never_replaced(pictures):
    (pictures / "masks").mkdir()
    labels = pictures / "masks" / "one.png"
    Image.new("L", (40, 40)).save(labels)
    inputs = find_inputs([str(labels)], pictures)
    with pytest.raises(ValueError, match=r"would replace the input .*masks/one\.png: use another output folder"):
        target_files(inputs, pictures, ["masks"])


def test_grey_networks_get_grey_pictures(tmp_path):
    config = LeMoReConfig(num_labels=2, num_channels=1, image_size=32, hidden_sizes=(8, 8, 8, 8), stem_sizes=(8,))
    LeMoReForSemanticSegmentation(config).save_pretrained(tmp_path / "grey")
    size = {"height": 32, "width": 32}
    LeMoReImageProcessor(size=size, do_convert_rgb=False, image_mean=[0.5], image_std=[0.5]).save_pretrained(
        tmp_path / "grey"
    )
    Image.new("L", (40, 30), 99).save(tmp_path / "picture.png")
    predict_file(Segmenter(tmp_path / "grey"), tmp_path / "picture.png", {"overlays": tmp_path / "overlay.png"})
    assert Image.open(tmp_path / "overlay.png").mode == "RGB"


def test_networks_of_other_families_are_drawn_too(pictures, tmp_path):
    config = SegformerConfig(
        depths=[1, 1], num_encoder_blocks=2, sr_ratios=[2, 1], hidden_sizes=[8, 8], num_attention_heads=[1, 1],
        patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[1, 1], decoder_hidden_size=8, num_labels=3,
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "segformer")
    LeMoReImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "segformer")
    segmenter = Segmenter(tmp_path / "segformer")
    targets = {kind: tmp_path / f"{kind}.png" for kind in prediction_module.TARGETS}
    predict_file(segmenter, pictures / "one.png", targets)
    np.testing.assert_array_equal(
        np.asarray(Image.open(targets["masks"])), segmenter(Image.open(pictures / "one.png"))
    )
    assert Image.open(targets["overlays"]).mode == "RGB"


def test_alpha_without_overlays_is_refused(checkpoint, pictures, tmp_path, predict, capsys):
    words = ("--model", checkpoint, "--input", pictures, "--output", tmp_path / "out")
    with pytest.raises(SystemExit, match="2"):
        predict(*words, "--write", "masks", "--alpha", 0.7)
    assert "--alpha is for overlays" in capsys.readouterr().err


def test_nothing_half_written_stays_behind(segmenter, pictures, tmp_path, monkeypatch):
    def fail_midway(image: Image.Image, path: Path, *arguments: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail_midway)
    with pytest.raises(OSError, match="disk full"):
        predict_file(segmenter, pictures / "one.png", {"masks": tmp_path / "out" / "one.png"})
    assert files_below(tmp_path / "out") == set()


@pytest.mark.skipif(os.name == "nt", reason="Windows ends processes without asking them")
def test_a_scheduler_s_signal_leaves_neither_half_films_nor_processes(checkpoint, tmp_path):
    av = pytest.importorskip("av", reason="needs the extra lemore-hf[video]")
    frame = av.VideoFrame.from_ndarray(np.asarray(patches(0)))
    for name in ("one.mkv", "two.mkv"):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("ffv1", rate=25)
            stream.height, stream.width, stream.pix_fmt = 60, 80, "bgr0"
            for number in range(4000):
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    output = tmp_path / "out"
    command = launch(1, SCRIPT, "--model", checkpoint, "--input", tmp_path, "--output", output, "--processes", 2)
    process = subprocess.Popen(command)
    try:
        while process.poll() is None and len(list(output.glob("masks/.*.mkv"))) < 2:
            time.sleep(0.1)
        workers = psutil.Process(process.pid).children()
        process.terminate()  # to this process alone
        assert process.wait(60) == 128 + signal.SIGTERM
        assert not psutil.wait_procs(workers, 60)[1]
        assert files_below(output) == {"predictions.json"}
    finally:
        process.kill()


def test_a_name_that_is_no_text_can_be_printed(checkpoint, pictures, tmp_path, predict, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stdout", terminal)
    output = tmp_path / "out\udcff"
    try:
        output.mkdir()
    except OSError:
        pytest.skip("the file system takes text alone")
    predict("--model", checkpoint, "--input", pictures, "--output", output)
    terminal.flush()
    assert "3 written to" in terminal.buffer.getvalue().decode()


def test_export_gives_the_masks_of_the_checkpoint(network, segmenter, pictures, tmp_path):
    export_model(*network, tmp_path / "export", "torch")
    predict_file(Segmenter(tmp_path / "export" / "model.pt2"), pictures / "one.png", {"masks": tmp_path / "mask.png"})
    labels = segmenter(Image.open(pictures / "one.png"))
    assert (np.asarray(Image.open(tmp_path / "mask.png")) == labels).mean() >= 0.999


def test_half_precision_checkpoint(network, segmenter, pictures, tmp_path):
    model, image_processor = network
    copy.deepcopy(model).half().save_pretrained(tmp_path / "half")
    image_processor.save_pretrained(tmp_path / "half")
    image = Image.open(pictures / "one.png")
    assert (Segmenter(tmp_path / "half")(image) == segmenter(image)).mean() > 0.99


def test_orientation_of_a_photo_is_applied(segmenter, pictures, tmp_path):
    upright = Image.open(pictures / "one.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, to be turned clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=exif)
    predict_file(segmenter, tmp_path / "photo.png", {"masks": tmp_path / "mask.png"})
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "mask.png")), segmenter(upright))


@pytest.mark.parametrize("name", ["pages.tif", "moving.gif", "moving.webp", "moving.png"])
def test_of_a_file_of_several_pictures_the_first_is_segmented_and_that_is_said(segmenter, tmp_path, caplog, name):
    frames = [patches(seed) for seed in range(3)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    predict_file(segmenter, tmp_path / name, {"masks": tmp_path / "mask.png"})
    assert f"{name}: the first of its 3 pictures is segmented, the others are not." in caplog.text


def test_the_second_view_in_a_photo_of_a_phone_goes_without_saying(segmenter, tmp_path, caplog):
    patches(0).save(tmp_path / "photo.jpg", "MPO", save_all=True, append_images=[patches(1)])
    predict_file(segmenter, tmp_path / "photo.jpg", {"masks": tmp_path / "photo.png"})
    assert not caplog.text


def test_smaller_copies_in_a_geotiff_go_without_saying(segmenter, tmp_path, caplog):
    copy = patches(1)
    copy.encoderinfo = {"tiffinfo": {254: 1}}
    patches(0).save(tmp_path / "aerial.tif", save_all=True, append_images=[copy])
    predict_file(segmenter, tmp_path / "aerial.tif", {"masks": tmp_path / "aerial.png"})
    assert not caplog.text


def test_video_gives_lossless_labels_and_an_overlay(segmenter, tmp_path, capsys):
    import av

    with av.open(str(tmp_path / "film.mp4"), "w") as film:
        stream = film.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for step in range(3):
            picture = np.fromfunction(
                lambda y, x, c, step=step: (y * 3 + x * 2 + 80 * c + 60 * step) % 256, (64, 96, 3)
            )
            film.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8))))
        film.mux(stream.encode())
    targets = {"masks": tmp_path / "masks.mkv", "overlays": tmp_path / "overlays.mp4"}
    predict_file(segmenter, tmp_path / "film.mp4", targets, progress=True)
    assert "film.mp4:   0%|          | 0/3 [" in capsys.readouterr().err
    predict_file(segmenter, tmp_path / "film.mp4", targets)
    assert not capsys.readouterr().err
    with av.open(str(tmp_path / "film.mp4")) as film, av.open(str(targets["masks"])) as masks:
        expected = [segmenter(frame.to_image()) for frame in film.decode(video=0)]
        labels = [frame.to_ndarray(format="gray") for frame in masks.decode(video=0)]
        assert masks.streams.video[0].average_rate == 10
    np.testing.assert_array_equal(labels, expected)
    assert len(expected) == 3
    with av.open(str(targets["overlays"])) as overlays:
        assert [frame.to_ndarray(format="rgb24").shape for frame in overlays.decode(video=0)] == [(64, 96, 3)] * 3


def test_video_keeps_the_time_of_each_frame(segmenter, tmp_path):
    import av

    times = [Fraction(0), Fraction(1, 10), Fraction(1, 5), Fraction(5), Fraction(51, 10)]
    with av.open(str(tmp_path / "film.mkv"), "w") as film:
        stream = film.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 40 * number, np.uint8))
            frame.pts, frame.time_base = int(time * 1000), Fraction(1, 1000)
            film.mux(stream.encode(frame))
        film.mux(stream.encode())
    targets = {"masks": tmp_path / "masks.mkv", "overlays": tmp_path / "overlays.mp4"}
    predict_file(segmenter, tmp_path / "film.mkv", targets)
    for target in targets.values():
        with av.open(str(target)) as result:
            assert [round(frame.time, 3) for frame in result.decode(video=0)] == [float(time) for time in times]


def write_film(
    path: Path,
    start: int = 0,
    count: int = 20,
    sample_aspect_ratio: Fraction = Fraction(1),
    rate: Fraction = Fraction(10),
) -> None:
    """Frames of one colour, which changes from frame to frame, `rate` a second from the second `start`."""
    import av

    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as film:
        stream = film.add_stream("libx264", rate=rate, options={"g": "1"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = sample_aspect_ratio
        stream.codec_context.time_base = 1 / rate
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 10 * number, np.uint8))
            frame.pts, frame.time_base = int(rate * start) + number, 1 / rate
            film.mux(stream.encode(frame))
        film.mux(stream.encode())


def test_a_film_of_a_phone_that_was_turned_is_upright(tmp_path):
    import av

    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        bright_above = np.zeros((64, 96, 3), np.uint8)
        bright_above[:32] = 255
        film.mux(stream.encode(av.VideoFrame.from_ndarray(bright_above)))
        film.mux(stream.encode())
    # The track's header has a matrix that players turn the picture by: here by a quarter, clockwise.
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    one = 1 << 16
    turns = {  # where it is bright, and dark, then
        (0, one, -one, 0): ("right", "left"),  # by a quarter, clockwise
        (-one, 0, 0, -one): ("below", "above"),  # by half
        (-one, 0, 0, one): ("above", "below"),  # mirrored
        (one, 0, 0, -one): ("below", "above"),
        (0, one, one, 0): ("left", "right"),  # by a quarter, and mirrored
    }
    for matrix, (bright, dark) in turns.items():
        a, b, c, d = matrix
        content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        path.write_bytes(content)
        image, _, _, aspect_ratio = next(prediction_module._frames(path))
        pixels = np.asarray(image)
        assert image.size == ((64, 96) if b else (96, 64)), matrix
        sides = {"above": pixels[:24], "below": pixels[-24:], "left": pixels[:, :24], "right": pixels[:, -24:]}
        assert sides[bright].min() > sides[dark].max(), matrix
        assert aspect_ratio == 1


@pytest.mark.parametrize("start", [0, 100])
def test_a_film_that_was_cut_off_is_refused(segmenter, tmp_path, start):
    write_film(tmp_path / "whole.mp4", start)
    content = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "film.mp4").write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(prediction_module.UnreadableInputError, match=r"ends after [01]\.\d of 2\.0 seconds"):
        predict_file(segmenter, tmp_path / "film.mp4", {"masks": tmp_path / "out" / "masks.mkv"})
    assert files_below(tmp_path / "out") == set()


def test_a_damaged_packet_costs_its_own_frames_alone(segmenter, tmp_path, caplog):
    import av

    with av.open(str(tmp_path / "film.avi"), "w") as film:
        stream = film.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        for index in range(20):
            for packet in stream.encode(av.VideoFrame.from_image(patches(index).resize((96, 64)))):
                film.mux(packet)
        for packet in stream.encode():
            film.mux(packet)
    content = bytearray((tmp_path / "film.avi").read_bytes())
    starts = [match.start() for match in re.finditer(b"\xff\xd8\xff", content)]
    content[starts[10] : starts[11] - 8] = bytes(starts[11] - 8 - starts[10])  # up to the next one's header
    (tmp_path / "film.avi").write_bytes(content)
    predict_file(segmenter, tmp_path / "film.avi", {"masks": tmp_path / "masks.mkv"})
    with av.open(str(tmp_path / "masks.mkv")) as result:
        assert len(list(result.decode(video=0))) == 19
    assert "1 damaged packets were left out" in caplog.text


def test_a_film_of_few_frames_is_whole(tmp_path):
    """Of one frame in ten seconds, whose start Matroska's reader guesses wrong."""
    write_film(tmp_path / "film.mkv", count=20, rate=Fraction(1, 10))
    assert len(list(prediction_module._frames(tmp_path / "film.mkv"))) == 20
    write_film(tmp_path / "film.avi")  # whose packets say when they are decoded, not when they are shown
    assert len(list(prediction_module._frames(tmp_path / "film.avi"))) == 20


@pytest.mark.parametrize(
    ("suffix", "container", "codec"),
    [
        (".3gp", "3gp", "mpeg4"),
        (".flv", "flv", "flv"),
        (".m2ts", "mpegts", "libx264"),
        (".mpg", "mpeg", "mpeg1video"),
        (".mts", "mpegts", "libx264"),
        (".ogv", "ogg", "libvpx"),
        (".ts", "mpegts", "mpeg2video"),
        (".webm", "webm", "libvpx"),
        (".wmv", "asf", "wmv2"),
    ],
)
def test_films_of_cameras_and_recorders_are_found_in_folders(tmp_path, suffix, container, codec):
    import av

    path = tmp_path / "films" / f"film{suffix}"
    path.parent.mkdir()
    with av.open(str(path), "w", format=container) as film:
        stream = film.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 176, 144, "yuv420p"
        for number in range(25):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((144, 176, 3), 10 * number, np.uint8))))
        film.mux(stream.encode())
    (found,) = prediction_module.find_inputs([str(path.parent)], tmp_path / "results")
    frames = list(prediction_module._frames(found))
    assert [frame[1] for frame in frames] == pytest.approx([number / 25 for number in range(25)], abs=2e-3)


def test_results_of_a_film_begin_with_it_and_keep_the_shape_of_its_pixels(segmenter, tmp_path):
    import av

    write_film(tmp_path / "film.mkv", start=100, count=3, sample_aspect_ratio=Fraction(4, 3))
    targets = {"masks": tmp_path / "masks.mkv", "overlays": tmp_path / "overlays.mp4"}
    predict_file(segmenter, tmp_path / "film.mkv", targets)
    for target in targets.values():
        with av.open(str(target)) as result:
            assert [round(frame.time, 3) for frame in result.decode(video=0)] == [0, 0.1, 0.2]
            if target.suffix == ".mp4":  # masks are for programs
                assert result.streams.video[0].sample_aspect_ratio == Fraction(4, 3)


def test_an_overlay_says_by_which_standard_its_colours_are_stored(segmenter, tmp_path, monkeypatch):
    import av

    colour = (0, 158, 115)
    monkeypatch.setattr(
        prediction_module, "overlay_image", lambda image, *_, **__: Image.new("RGB", image.size, colour)
    )
    write_film(tmp_path / "film.mp4", count=2)
    predict_file(segmenter, tmp_path / "film.mp4", {"overlays": tmp_path / "overlays.mp4"})
    with av.open(str(tmp_path / "overlays.mp4")) as result:
        frame = next(result.decode(video=0))
    luma, blue, red = (np.frombuffer(plane, np.uint8)[0].astype(float) for plane in frame.planes)
    assert (frame.colorspace, frame.color_range) == (1, 1), "BT.709 in the narrow range"
    y, b, r = (luma - 16) / 219, (blue - 128) / 224, (red - 128) / 224
    decoded = 255 * np.array([y + 1.5748 * r, y - 0.1873 * b - 0.4681 * r, y + 1.8556 * b])
    np.testing.assert_allclose(decoded, colour, atol=4)


def test_two_frames_at_one_time_are_both_kept(segmenter, tmp_path, monkeypatch):
    import av

    frames = [(patches(seed), Fraction(time), Fraction(25), Fraction(1)) for seed, time in enumerate((0, 1, 1, 2))]
    monkeypatch.setattr(prediction_module, "_frames", lambda source: iter(frames))
    predict_file(segmenter, tmp_path / "film.mkv", {"overlays": tmp_path / "overlays.mp4"})
    with av.open(str(tmp_path / "overlays.mp4")) as result:
        times = [frame.time for frame in result.decode(video=0)]
    assert len(times) == 4
    assert times == sorted(set(times))


def test_a_film_whose_frames_change_in_size_is_refused(segmenter, tmp_path, monkeypatch):
    frames = [
        (patches(0).resize(size), Fraction(time), Fraction(25), Fraction(1))
        for time, size in enumerate([(80, 60), (60, 80)])
    ]
    monkeypatch.setattr(prediction_module, "_frames", lambda source: iter(frames))
    with pytest.raises(prediction_module.UnreadableInputError, match="change from 60×80 to 80×60 pixels"):
        predict_file(segmenter, tmp_path / "film.mkv", {"masks": tmp_path / "out" / "masks.mkv"})
    assert files_below(tmp_path / "out") == set()


def test_links_are_read_by_their_own_names(pictures, tmp_path):
    (tmp_path / "blob").write_bytes(b"a film")
    (pictures / "film.mp4").symlink_to(tmp_path / "blob")
    (pictures / "again.png").symlink_to(pictures / "one.png")
    (pictures / "linked").symlink_to(pictures / "more", target_is_directory=True)
    inputs = find_inputs([str(pictures)], tmp_path / "out")
    assert inputs[pictures / "film.mp4"] == Path("film.mp4")
    resolved = [path.resolve() for path in inputs]
    assert len(set(resolved)) == len(resolved), "each picture once"
    (pictures / "a link").symlink_to(pictures / "more", target_is_directory=True)
    assert pictures / "more" / "one.jpg" in find_inputs([str(pictures)], tmp_path / "out"), "by its own name"
    with pytest.raises(FileNotFoundError, match="lies in the output folder"):
        find_inputs([str(pictures)], pictures)


def test_damaged_video_leaves_nothing(segmenter, tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"no film at all")
    with pytest.raises(prediction_module.UnreadableInputError):
        predict_file(segmenter, tmp_path / "film.mp4", {"masks": tmp_path / "out" / "masks.mkv"})
    assert files_below(tmp_path / "out") == set()


def test_video_without_the_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(prediction_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[video\]'"):
        prediction_module.require_video_package()


def test_inputs_from_files_folders_and_patterns(pictures, tmp_path):
    output = pictures / "results"
    output.mkdir()
    Image.new("RGB", (40, 40)).save(output / "earlier.png")
    (pictures / "._one.png").touch()  # as macOS leaves them on other systems' disks
    (pictures / ".thumbnails").mkdir()
    Image.new("RGB", (40, 40)).save(pictures / ".thumbnails" / "small.png")
    everything = find_inputs([str(pictures), str(pictures / "one.png")], output)
    assert {str(name) for name in everything.values()} == {"one.png", "two.png", "more/one.jpg", "damaged.jpg"}
    pattern = find_inputs([str(pictures / "**" / "one.*")], output)
    assert {path.relative_to(pictures).as_posix() for path in pattern} == {"one.png", "more/one.jpg"}
    for missing in (tmp_path / "absent.png", tmp_path / "*.jpg", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match="names no pictures or videos"):
            find_inputs([str(missing)], output)
    with pytest.raises(FileNotFoundError, match=r"absent\.heic' names .*, it does not exist"):
        find_inputs([str(tmp_path / "absent.heic")], output)


def test_links_to_nothing_are_passed_over(pictures, tmp_path):
    """As where a data set's disk is not there."""
    (pictures / "elsewhere.png").symlink_to(tmp_path / "disk" / "picture.png")
    found = find_inputs([str(pictures)], tmp_path / "results")
    assert {str(name) for name in found.values()} == {"one.png", "two.png", "more/one.jpg", "damaged.jpg"}


def test_films_that_cannot_be_written_are_left_out(tmp_path, predict, checkpoint, capsys):
    av = pytest.importorskip("av", reason="needs the extra lemore-hf[video]")
    with av.open(str(tmp_path / "thin.mkv"), "w") as film:
        stream = film.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 200, 1, "bgr0"
        film.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((1, 200, 3), np.uint8))))
        film.mux(stream.encode(None))
    with av.open(str(tmp_path / "sound.mkv"), "w") as film:
        stream = film.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.rate = 8000
        film.mux(stream.encode(sound))
        film.mux(stream.encode(None))
    (tmp_path / "empty.mp4").touch()
    Image.new("RGB", (64, 48)).save(tmp_path / "whole.png")
    predict("--model", checkpoint, "--input", tmp_path, "--output", tmp_path / "out")
    skipped = capsys.readouterr().err
    assert "sound.mkv: it has sound, but no pictures" in skipped
    assert "thin.mkv: overlays are films in H.264, which has no 1×200 pixels" in skipped
    assert "empty.mp4: Invalid data found when processing input" in skipped
    assert (tmp_path / "out" / "overlays" / "whole.png").is_file()


def test_results_of_two_inputs_never_share_a_file(pictures, tmp_path):
    Image.new("RGB", (40, 40)).save(pictures / "one.jpg")
    output = tmp_path / "out"
    targets = target_files(find_inputs([str(pictures)], output), output, ["masks"])
    names = {str(files["masks"].relative_to(output / "masks")) for files in targets.values()}
    assert names == {"one.png.png", "one.jpg.png", "two.png", "more/one.png", "damaged.png"}
    # Neither where upper and lower case name the same file.
    Image.new("RGB", (40, 40)).save(pictures / "TWO.jpg")
    targets = target_files(find_inputs([str(pictures)], output), output, ["masks"])
    assert len({str(files["masks"]).casefold() for files in targets.values()}) == 6
    same = find_inputs([str(pictures / "one.jpg"), str(pictures / "more" / "one.jpg")], output)
    with pytest.raises(ValueError, match="would both be written to"):
        target_files(same, output, ["masks"])


def test_masks_of_binary_and_of_many_labels():
    labels = np.array([[0, 1], [1, 0]])
    binary = LeMoReConfig(num_labels=1, id2label={0: "crack"}, image_size=32)
    np.testing.assert_array_equal(np.asarray(mask_image(labels, binary)), labels)
    overlay_image(Image.new("RGB", (2, 2)), labels, binary)
    many = LeMoReConfig(num_labels=400, image_size=32, semantic_loss_ignore_index=-100)
    np.testing.assert_array_equal(np.asarray(mask_image(labels * 399, many)), labels * 399)


def test_model_that_is_none_is_refused_before_anything_is_written(pictures, tmp_path, predict):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Segmenter(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="neither an export"):
        Segmenter(pictures)
    with pytest.raises(FileNotFoundError, match="not the graph of an export"):
        Segmenter(pictures / "notes.txt")
    with pytest.raises(SystemExit, match="neither an export"):
        predict("--model", pictures, "--input", pictures, "--output", tmp_path / "out", "--processes", 2)
    assert not (tmp_path / "out").exists()


def test_a_glob_pattern_passes_over_its_own_results(tmp_path):
    for name in ("a.png", "out/masks/a.png", "out/overlays/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    found = find_inputs([str(tmp_path / "**" / "*.png")], tmp_path / "out")
    assert list(found) == [(tmp_path / "a.png").resolve()]


def test_every_class_is_laid_over_the_picture():
    config = LeMoReConfig(num_labels=300, image_size=32, semantic_loss_ignore_index=-100)
    picture = Image.new("RGB", (4, 4), (1, 2, 3))
    drawn = overlay_image(picture, np.full((4, 4), 255), config, alpha=1.0, legend=False)
    assert (np.asarray(drawn) != (1, 2, 3)).any()


def test_weights_without_a_head_are_refused_in_one_message(pictures, tmp_path, predict):
    headless = LeMoReModel(LeMoReConfig(hidden_sizes=(8, 8, 8, 8), stem_sizes=(8,), image_size=32))
    headless.save_pretrained(tmp_path / "headless")
    LeMoReImageProcessor().save_pretrained(tmp_path / "headless")
    message = "CheckpointError: .* give a model that was trained for semantic-segmentation"
    with pytest.raises(SystemExit, match=message):
        predict("--model", tmp_path / "headless", "--input", pictures, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_films_overlays_have_the_opacity_asked_for_and_even_sides(segmenter, tmp_path, monkeypatch):
    import av

    frames = [(patches(0).resize((97, 65)), Fraction(0), Fraction(25), Fraction(1))]
    monkeypatch.setattr(prediction_module, "_frames", lambda source: iter(frames))
    alphas = []

    def draw(image, labels, config, alpha=0.5, legend=True):
        alphas.append(alpha)
        return overlay_image(image, labels, config, alpha, legend)

    monkeypatch.setattr(prediction_module, "overlay_image", draw)
    predict_file(segmenter, tmp_path / "film.mkv", {"overlays": tmp_path / "overlays.mp4"}, alpha=0.2)
    with av.open(str(tmp_path / "overlays.mp4")) as result:
        assert [(frame.width, frame.height) for frame in result.decode(video=0)] == [(96, 64)]
    assert alphas == [0.2]


def test_a_configuration_of_the_wrong_type_ends_in_one_line(checkpoint, pictures, tmp_path, monkeypatch):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"palette": "red"}))
    script = runpy.run_path(str(ROOT / "scripts" / "predict.py"))
    options = ["--model", str(broken), "--input", str(pictures), "--output", str(tmp_path / "output")]
    monkeypatch.setattr("sys.argv", ["predict.py", *options])
    with pytest.raises(SystemExit, match=r"(?s)StrictDataclass.*'palette'.*'red'"):
        run_script(script["main"])
