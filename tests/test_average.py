# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""`scripts/average.py`: two trainings become one checkpoint, which `evaluate.py` scores and records like any other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from lemore_hf import LeMoReConfig, LeMoReForSemanticSegmentation, LeMoReImageProcessor
from lemore_hf.data.augmentation import normalize
from lemore_hf.data.loading import RecipeDataset, load_split
from lemore_hf.data.recipes import load_recipe
from lemore_hf.data.scenes import load_scenes

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
NAMES = ["sky", "building", "road", "pavement", "tree", "car", "person", "traffic sign", "fence"]
RECIPE = {"class_names": NAMES, "num_classes": 9, "image_size": [64, 64], "crop_size": [64, 64], "batch_size": 10}


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, TQDM_DISABLE="1"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Ten training images, a recipe, and two "trainings" whose weights lie near each other."""
    place = tmp_path_factory.mktemp("average")
    for split, samples in load_scenes(10, 2, 2, size=(64, 96)).items():
        samples.to_parquet(place / f"{split}.parquet")
    (place / "recipe.yaml").write_text(json.dumps(RECIPE))  # JSON is YAML.
    torch.manual_seed(0)
    id2label = dict(enumerate(NAMES))
    model = LeMoReForSemanticSegmentation(
        LeMoReConfig(
            hidden_sizes=(8, 8, 8, 16), stem_sizes=(8,), decoder_hidden_size=8, image_size=64, id2label=id2label
        )
    )
    for seed, name in enumerate(("first", "second")):
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(place / name / "final")
        LeMoReImageProcessor(size={"height": 64, "width": 64}).save_pretrained(place / name / "final")
        run_json = {"configuration_hash": f"hash-{name}", "seed": seed, "steps": 7}
        (place / name / "run.json").write_text(json.dumps(run_json))
    return place


def average(place, *folders, output="averaged"):
    models = [place / folder / "final" for folder in folders]
    options = ["--recipe", place / "recipe.yaml", "--data_dir", place, "--output_dir", place / output]
    return run("average.py", "--models", *models, *options)


def test_average_of_two_trainings(place):
    done = average(place, "first", "second")
    assert done.returncode == 0, done.stderr
    models = [AutoModelForSemanticSegmentation.from_pretrained(place / name / "final") for name in ("first", "second")]
    averaged = AutoModelForSemanticSegmentation.from_pretrained(place / "averaged" / "final")
    parameters = dict(averaged.named_parameters())
    for (name, first), second in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(parameters[name], (first + second) / 2)
    assert averaged.config.id2label == dict(enumerate(NAMES))
    processor = AutoImageProcessor.from_pretrained(place / "averaged" / "final")
    assert dict(processor.size) == {"height": 64, "width": 64}

    # The first norm sees what the first convolution makes of the augmented images, here in a single batch.
    recipe = load_recipe(place / "recipe.yaml")
    dataset = RecipeDataset(load_split(recipe, "train", place), recipe, training=True, seed=0)
    pixel_values = normalize(torch.stack([sample["pixel_values"] for sample in dataset]), recipe)
    convolution = next(module for module in averaged.modules() if isinstance(module, nn.Conv2d))
    norm = next(module for module in averaged.modules() if isinstance(module, nn.BatchNorm2d))
    with torch.no_grad():
        seen = convolution(pixel_values)
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(norm.running_var, seen.var((0, 2, 3)), atol=1e-5, rtol=1e-4)


def test_the_score_of_an_average_is_recorded_with_what_it_was_made_of(place):
    assert average(place, "first", "second", output="recorded").returncode == 0
    done = run(
        "evaluate.py",
        *("--model", place / "recorded" / "final", "--recipe", place / "recipe.yaml", "--data_dir", place),
        *("--split", "test", "--output", place / "metrics.json", "--runs", place / "runs.jsonl"),
    )
    assert done.returncode == 0, done.stderr
    (line,) = map(json.loads, (place / "runs.jsonl").read_text().splitlines())
    assert line["name"] == "recorded"
    assert line["average_of"] == [
        {"name": "first", "configuration_hash": "hash-first", "seed": 0, "steps": 7},
        {"name": "second", "configuration_hash": "hash-second", "seed": 1, "steps": 7},
    ]
    assert line["evaluation"]["test"]["mean_iou"] == json.loads((place / "metrics.json").read_text())["mean_iou"]


def test_a_single_model_is_refused_before_any_work(place):
    done = average(place, "first", output="single")
    assert done.returncode == 1
    assert "ValueError: There is nothing to average in 1 model: give two or more." in done.stderr
    assert "Traceback" not in done.stderr
    assert not (place / "single").exists()
