# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""scripts/check_dataset.py: counts what is there, names what a training would stop at, and says so in its exit status."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "check_dataset.py"
SIZE = (40, 48)


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Runs the script in this process, which spares the imports: its exit status and what it printed."""

    def run(data_dir: Path, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--data_dir", str(data_dir), *arguments])
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as exited:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return exited.value.code, capsys.readouterr().out

    return run


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four samples a split: the left quarter is void, the rest class 0, and in half of the samples a band of class 1."""
    folder = tmp_path / "data"
    for split in ("train", "validation"):
        for part in ("images", "masks"):
            (folder / split / part).mkdir(parents=True)
        for index in range(4):
            pixels = np.random.default_rng(index).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
            labels = np.zeros(SIZE, dtype=np.uint8)
            labels[:, :12] = 255
            if index % 2:
                labels[:10, 12:] = 1
            Image.fromarray(pixels).save(folder / split / "images" / f"{index}.png")
            Image.fromarray(labels).save(folder / split / "masks" / f"{index}.png")
    (folder / "classes.txt").write_text("floor\nwall\nwindow\n")
    return folder


def test_a_good_set(folder, tmp_path):
    options = ["--recipe", "folder", "--picture", "grid.png", "--num_pictures", "3"]
    command = [sys.executable, str(SCRIPT), "--data_dir", str(folder), *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "train: 4 samples, 4 usable" in result.stdout
    assert "test: not there" in result.stdout
    assert "48×40 (4)" in result.stdout
    # Of 36 · 40 labelled pixels, two of four samples have 36 · 10 of class 1.
    assert re.search(r"0\s+floor\s+87\.500%\s+4", result.stdout)
    assert re.search(r"1\s+wall\s+12\.500%\s+2", result.stdout)
    assert re.search(r"2\s+window\s+0\.000%\s+0\s+never occurs", result.stdout)
    assert re.search(r"void\s+25\.000% of all pixels", result.stdout)
    assert "Checking train: 100%" in result.stderr
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.width > 3 * SIZE[1]
        assert picture.height > 2 * SIZE[0]


def test_problems_are_told_before_anything_else_can_fail(check, folder):
    Image.new("L", (48, 40), 9).save(folder / "train" / "masks" / "0.png")
    Image.new("RGB", (48, 20)).save(folder / "train" / "images" / "1.png")
    Image.new("L", (48, 20)).save(folder / "train" / "masks" / "1.png")
    (folder / "a file").touch()
    code, output = check(
        folder, "--recipe", "folder", "--resize", "none", "--picture", str(folder / "a file" / "x.png")
    )
    assert "stored labels 9 are out of range" in output
    assert "48×20 pixels of it, and needs at least 32" in output
    assert "a file" in code, "not a traceback"
    assert check(folder, "--recipe", "fodler")[0].startswith("FileNotFoundError: There is no recipe 'fodler'")
    code, output = check(folder / "nowhere", "--recipe", "folder")
    assert code.startswith("FileNotFoundError: The data folder")
    assert not output


def test_linked_folders_belong_to_the_set(check, folder):
    for part in ("images", "masks"):
        (folder / "train" / part).rename(folder / f"elsewhere {part}")
        (folder / "train" / part).mkdir()
        (folder / "train" / part / "more").symlink_to(folder / f"elsewhere {part}", target_is_directory=True)
        (folder / "train" / part / "the same").symlink_to(folder / f"elsewhere {part}", target_is_directory=True)
        (folder / "train" / part / "round").symlink_to(folder / "train" / part, target_is_directory=True)
    code, output = check(folder, "--recipe", "folder", "--num_pictures", "0")
    assert code == 0
    assert "train: 4 samples, 4 usable" in output


@pytest.mark.parametrize("streaming", [False, True])
def test_every_sample_that_would_fail_is_named_with_its_reason(check, folder, tmp_path, streaming):
    train = folder / "train"
    (train / "images" / "0.png").write_bytes(b"no picture")
    Image.fromarray(np.zeros((40, 50), dtype=np.uint8)).save(train / "masks" / "1.png")
    Image.fromarray(np.full(SIZE, 7, dtype=np.uint8)).save(train / "masks" / "2.png")
    Image.fromarray(np.full(SIZE, 255, dtype=np.uint8)).save(train / "masks" / "3.png")
    (folder / "validation" / "masks" / "2.png").unlink()
    Image.fromarray(np.zeros((*SIZE, 3), dtype=np.uint8)).save(folder / "validation" / "masks" / "2.png")
    options = ["--streaming"] if streaming else ["--num_workers", "0"]
    status, printed = check(folder, "--recipe", "folder", "--num_pictures", "0", *options)
    assert status == 1
    assert "train: 4 samples, 0 usable" in printed
    assert "A training or an evaluation would fail (5)" in printed
    for line in (
        r"train: 0: cannot identify image file",
        r"train: 1: the image has 48×40 pixels and the label map 50×40",
        r"train: 2: stored labels 7 are out of range",
        r"train: 3: all its pixels are void",
        r"validation: 2: its label map has mode RGB",
    ):
        assert re.search(line, printed), line
    assert not (tmp_path / "dataset_check.png").exists()


def test_many_samples_of_one_reason_are_counted(check, folder):
    for index in range(12):
        for part, mode in (("images", "RGB"), ("masks", "L")):
            Image.new(mode, (48, 40), 3).save(folder / "train" / part / f"more {index:02}.png")
    options = ["--recipe", "folder", "--num_pictures", "0", "--split", "train"]
    _, printed = check(folder, *options)
    reason = "stored labels 3 are out of range: there are 3 classes and 255 for void. reduce_labels is for labels that count"
    assert "A training or an evaluation would fail (12)" in printed
    assert printed.count(f": {reason}") == 11
    assert f"... and 2 more (--all lists them): {reason}" in printed
    _, printed = check(folder, *options, "--all")
    assert printed.count(f"train: more 11: {reason}") == 1
    assert "more (--all" not in printed


def test_sizes_that_cannot_be_validated_together_are_told(check, folder):
    for part, mode in (("images", "RGB"), ("masks", "L")):
        Image.new(mode, (64, 40)).save(folder / "validation" / part / "0.png")
    status, output = check(folder, "--recipe", "folder", "--num_workers", "0", "--eval_batch_size", "2")
    assert status == 1
    assert "validation: images of 2 sizes cannot be validated 2 at a time: give --eval_batch_size 1" in output
    assert check(folder, "--recipe", "folder", "--num_workers", "0")[0] == 0, "where each is validated alone"


def test_masks_of_0_and_255_are_no_two_classes(check, folder):
    for path in folder.glob("*/masks/*.png"):
        Image.fromarray(np.array([[0, 255]], dtype=np.uint8).repeat(32, 0).repeat(32, 1)).resize(
            Image.open(path).size, Image.Resampling.NEAREST
        ).save(path)
    status, output = check(folder, "--recipe", "folder", "--num_workers", "0")
    assert status == 1
    assert "train: its masks hold a single class beside void (255)" in output
    assert "Store two classes as 0 and 1, not as 0 and 255" in output


@pytest.mark.parametrize(("levels", "says"), [(4095, True), (65535, False)])
def test_12_bits_in_files_of_16_are_told_of(check, folder, levels, says):
    for path in folder.glob("*/images/*.png"):
        grey = np.asarray(Image.open(path).convert("L"), dtype=np.uint32)
        Image.fromarray((grey * levels // 255).astype(np.uint16)).save(path)
    status, output = check(folder, "--recipe", "folder", "--split", "train", "--num_workers", "0")
    assert status == 0
    assert says == (re.search(r"All images are dark, their highest value is 1[56] of 255\.", output) is not None)


def test_pages_that_are_not_looked_at_are_told_of(check, folder):
    def replace(name: str, *pages: tuple[tuple[int, int], int]) -> None:
        (folder / f"train/images/{name}.png").unlink()
        path = folder / f"train/images/{name}.tif"
        pictures = []
        for size, kind in pages:
            pictures.append(Image.new("L", size[::-1], 200))
            pictures[-1].encoderinfo = {"tiffinfo": {254: kind}}
        pictures[0].save(path, save_all=True, append_images=pictures[1:], tiffinfo={254: pages[0][1]})

    replace("0", (SIZE, 0), (SIZE, 0))
    replace("1", (SIZE, 0), ((20, 24), 1), (SIZE, 4))  # a GeoTIFF: a smaller copy, and a mask
    status, output = check(folder, "--recipe", "folder", "--split", "train", "--num_workers", "0")
    assert status == 0
    assert "Of 1 files only the first page is used: 0." in output


def test_a_label_map_without_image(check, folder):
    (folder / "train" / "images" / "2.png").unlink()
    status, printed = check(folder, "--recipe", "folder", "--split", "train")
    assert status == 1
    assert re.search(r"train: 1 label maps in .* have no image: 2\.", printed)


def test_a_split_that_is_too_small_to_hold_anything_out(check, folder):
    (folder / "classes.txt").rename(folder / "train" / "classes.txt")
    status, output = check(folder / "train", "--recipe", "folder")
    assert status == 1
    assert "train: 4 samples, 4 usable" in output
    assert "none is left for validation" in output


def test_what_training_needs_has_to_be_there(check, folder):
    shutil.rmtree(folder / "validation")
    status, printed = check(folder, "--recipe", "folder")
    assert status == 1
    assert "A training or an evaluation would fail (1):\n  validation: " in printed
    assert "Or train without validation: --eval_every 0." in printed
    assert "test: not there" in printed


def test_a_set_that_the_hub_does_not_give_is_told_once(monkeypatch, capsys):
    """And not split by split, with the advice to do without validation."""

    def load(*names, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("It is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--recipe", "imagenet1k"])
    with pytest.raises(SystemExit, match=r"^DatasetNotFoundError: It is a gated .* 'hf auth login'"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "eval_every" not in capsys.readouterr().out


def test_a_stream_without_samples(check, folder):
    for part in ("images", "masks"):
        (folder / "train" / part / "1.png").rename(folder / f"{part}.png")
    for path in folder.glob("train/*/*.png"):
        path.unlink()
    status, output = check(folder, "--recipe", "folder", "--streaming")
    assert status == 1
    assert "train" in output.split("A training or an evaluation would fail")[1]


def test_classification_counts_images(check, tmp_path):
    for name, count in {"cat": 3, "dog": 1}.items():
        for index in range(count):
            for split in ("train", "validation"):
                path = tmp_path / "data" / split / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.zeros((*SIZE, 3), dtype=np.uint8)).save(path)
    options = ["--recipe", "folder", "--task", "image-classification"]
    status, printed = check(tmp_path / "data", *options)
    assert status == 0
    assert re.search(r"0\s+cat\s+75\.000%\s+3", printed)
    assert (tmp_path / "dataset_check.png").is_file()
