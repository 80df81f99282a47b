# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""The released checkpoint: the folder is whole, its users' first lines work, and it scores what its card says."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation, pipeline

from lemore_hf.data.loading import RecipeDataset, load_split
from lemore_hf.data.recipes import load_recipe
from lemore_hf.data.scenes import draw_scene
from lemore_hf.evaluation import evaluate_segmentation
from lemore_hf.hub import validate_folder

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "model_cards" / "lemore-camvid"
RECIPE = load_recipe("camvid")


@pytest.fixture(scope="module")
def card() -> ModelCard:
    return ModelCard.load(FOLDER / "README.md")


def test_the_folder_is_what_the_publishing_script_uploads():
    files = {path.relative_to(FOLDER) for path in FOLDER.rglob("*") if path.is_file()}
    assert files == set(validate_folder(FOLDER))
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    assert {tensor.dtype for tensor in load_file(FOLDER / "model.safetensors").values()} <= {
        torch.float32,
        torch.int64,
    }


@pytest.mark.parametrize("code", sorted(path.name for path in FOLDER.glob("*.py")))
def test_the_code_in_the_folder_is_the_package_s(code):
    assert (FOLDER / code).read_bytes() == (ROOT / "lemore_hf" / code).read_bytes(), (
        f"{code} has changed since the release: run scripts/push_to_hub.py --refresh_code --dry_run on the folder"
    )


def test_the_card_states_scores_and_limits(card):
    (result,) = [result for result in card.data.eval_results if result.metric_type == "mean_iou"]
    assert (result.dataset_type, result.dataset_split) == ("camvid", "test")
    assert f"| mean IoU | {100 * result.metric_value:.2f} |" in card.text
    assert all(f"| {name} |" in card.text for name in RECIPE.class_names)
    assert RECIPE.license in card.text
    assert card.data.pipeline_tag == "image-segmentation"


def test_classes_and_colours_are_camvid_s():
    config = AutoModelForSemanticSegmentation.from_pretrained(FOLDER).config
    assert tuple(config.id2label.values()) == RECIPE.class_names
    assert [tuple(colour) for colour in config.palette] == list(RECIPE.palette)


def test_a_street_is_segmented_from_the_checkout():
    street, truth = draw_scene(10, (360, 480), daylight=True)
    segments = pipeline("image-segmentation", model=str(FOLDER))(street)
    masks = {segment["label"]: np.asarray(segment["mask"]) > 0 for segment in segments}
    assert sum(mask.sum() for mask in masks.values()) == 360 * 480, "every pixel has one class"
    for name, number in {"road": 2, "building": 1}.items():  # numbers of the drawn scenes' own classes
        there = np.asarray(truth) == number
        assert (masks[name] & there).sum() > 0.6 * there.sum(), f"most of the {name} is found"


def test_the_folder_needs_no_package(tmp_path):
    """In a process that cannot import the package, its own code is enough."""
    draw_scene(10, (90, 120), daylight=True)[0].save(tmp_path / "street.png")
    program = (
        "import sys; sys.modules['lemore_hf'] = None\n"
        "from transformers import pipeline\n"
        f"segmenter = pipeline('image-segmentation', model={str(FOLDER)!r}, trust_remote_code=True)\n"
        "for segment in segmenter('street.png'): segment['mask'].save(segment['label'] + '.png')\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "is not supported" not in done.stderr, "pipelines say so of models that they do not know"
    segments = pipeline("image-segmentation", model=str(FOLDER))(str(tmp_path / "street.png"))
    assert len(segments) > 2
    for segment in segments:
        np.testing.assert_array_equal(Image.open(tmp_path / f"{segment['label']}.png"), segment["mask"])


def test_the_test_score_is_the_card_s(card, camvid_dir):
    (result,) = [result for result in card.data.eval_results if result.metric_type == "mean_iou"]
    model = AutoModelForSemanticSegmentation.from_pretrained(FOLDER).fuse()
    dataset = RecipeDataset(load_split(RECIPE, "test", camvid_dir), RECIPE)
    # Fused and one at a time, which takes half as long: larger batches get memory anew from the system every time.
    scores = evaluate_segmentation(model, dataset, RECIPE, batch_size=1, progress=False).scores()
    assert 100 * scores["mean_iou"] == pytest.approx(100 * result.metric_value, abs=0.05)
