# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Evaluation: counts against scikit-learn, test-time views, several processes, the command line and bad input."""

import hashlib
import importlib.util
import json
import math
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from launching import run_forked
from loopback_hub import run_client, running_hub
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch import nn
from transformers.modeling_outputs import SemanticSegmenterOutput

from lemore_hf import LeMoReConfig, LeMoReForImageClassification, LeMoReForSemanticSegmentation
from lemore_hf.checkpointing import CheckpointError
from lemore_hf.data.augmentation import normalize
from lemore_hf.data.loading import BadSampleError, RecipeDataset, StreamedRecipeDataset, collate, load_split
from lemore_hf.data.recipes import load_recipe
from lemore_hf.evaluation import (
    EvaluatedImage,
    check_normalization,
    evaluate,
    evaluate_classification,
    evaluate_segmentation,
    load_trained_model,
    predict_labels,
)
from lemore_hf.export import export_model
from lemore_hf.image_processing_lemore import LeMoReImageProcessor
from lemore_hf.peers import build_peer

SCRIPT = Path(__file__).parents[1] / "scripts" / "evaluate.py"
NAMES = ("road", "sky", "tree")
SIZE = (48, 64)
NUM_IMAGES = 7  # divided by neither the batch of 2 nor by 2 processes


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """What the script computes on; maps as small as these gain nothing from more."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Images whose red tells the class, with some noise in the other colours, and a stripe of void."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind / "test").mkdir(parents=True)
    for index in range(NUM_IMAGES):
        blocks = rng.integers(0, len(NAMES), (SIZE[0] // 8, SIZE[1] // 8)).astype(np.uint8)
        labels = np.kron(blocks, np.ones((8, 8), np.uint8))
        pixels = np.dstack([labels * 100, *rng.integers(0, 256, (2, *SIZE)).astype(np.uint8)])
        labels[:3] = 255
        Image.fromarray(pixels).save(folder / "images" / "test" / f"scene{index}.png")
        Image.fromarray(labels).save(folder / "masks" / "test" / f"scene{index}.png")
    (folder / "classes.txt").write_text("\n".join(NAMES))
    return folder


@pytest.fixture(scope="module")
def recipe(data_dir):
    return load_recipe("folder", {"resize": None, "max_longest_edge": None, "eval_batch_size": 2}, data_dir)


@pytest.fixture(scope="module")
def dataset(recipe, data_dir):
    return RecipeDataset(load_split(recipe, "test", data_dir), recipe)


@pytest.fixture(scope="module")
def tiny_lemore(dataset, recipe):
    """Random weights, but batch-norm statistics of the data, so that its predictions differ from pixel to pixel."""
    torch.manual_seed(0)
    config = LeMoReConfig(
        image_size=SIZE,
        stem_sizes=(8,),
        hidden_sizes=(8, 8, 16, 16),
        decoder_hidden_size=16,
        id2label=dict(enumerate(NAMES)),
        label2id={name: index for index, name in enumerate(NAMES)},
        batch_norm_momentum=0.5,
        classifier_dropout_prob=0.0,
    )
    model = LeMoReForSemanticSegmentation(config)
    pixel_values = normalize(collate([dataset[index] for index in range(4)])["pixel_values"], recipe)
    with torch.no_grad():
        for _ in range(10):
            model(pixel_values)
        # Every class should win somewhere.
        model.eval()
        logits = model(pixel_values).logits
        spread = logits.std((0, 2, 3))
        classifier = model.decode_head.classifier
        classifier.weight.div_(spread.view(-1, 1, 1, 1))
        classifier.bias.copy_(-logits.mean((0, 2, 3)) / spread)
    assert len(predict_labels(model, pixel_values, SIZE).unique()) == len(NAMES)
    return model


class RedModel(nn.Module):
    """Tells the class of a pixel by its red, as the data are made; `offset` is added to the class."""

    def __init__(self, recipe, offset=0):
        super().__init__()
        self.config = SimpleNamespace(num_labels=len(NAMES), id2label=dict(enumerate(NAMES)))
        reds = (torch.arange(len(NAMES)) * 100 / 255 - recipe.image_mean[0]) / recipe.image_std[0]
        self.reds = nn.Parameter(reds.roll(offset)[:, None, None])

    def forward(self, pixel_values):
        return SemanticSegmenterOutput(logits=-((pixel_values[:, :1] - self.reds) ** 2))


class ConstantModel(nn.Module):
    """The same scores at every pixel, at stride 8."""

    def __init__(self, scores):
        super().__init__()
        self.config = SimpleNamespace(num_labels=len(scores), id2label=dict(enumerate(NAMES)))
        self.scores = nn.Parameter(torch.tensor(scores))

    def forward(self, pixel_values):
        size = [math.ceil(side / 8) for side in pixel_values.shape[-2:]]
        return SemanticSegmenterOutput(logits=self.scores.view(1, -1, 1, 1).expand(len(pixel_values), -1, *size))


def counts(model, dataset, recipe, **options):
    return evaluate_segmentation(model, dataset, recipe, progress=False, **options).scores()["confusion_matrix"]


def test_counts_and_scores_equal_scikit_learns(tiny_lemore, dataset, recipe):
    labels, predictions = [], []
    for sample in (dataset[index] for index in range(NUM_IMAGES)):
        with torch.no_grad():
            logits = tiny_lemore(normalize(sample["pixel_values"][None], recipe)).logits
        logits = F.interpolate(logits, size=SIZE, mode="bilinear", align_corners=False)
        is_labelled = sample["labels"] != 255
        predictions.append(logits.argmax(1)[0][is_labelled])
        labels.append(sample["labels"][is_labelled])
    expected = confusion_matrix(torch.cat(labels), torch.cat(predictions), labels=range(len(NAMES)))

    result = evaluate_segmentation(tiny_lemore, dataset, recipe, batch_size=1, progress=False)
    scores = result.scores()
    assert scores["confusion_matrix"] == expected.tolist()
    right = np.diag(expected)
    iou = right / (expected.sum(0) + expected.sum(1) - right)
    assert scores["per_class_iou"] == pytest.approx(iou.tolist())
    assert scores["mean_iou"] == pytest.approx(iou.mean())
    assert scores["mean_accuracy"] == pytest.approx((right / expected.sum(1)).mean())
    assert scores["overall_accuracy"] == pytest.approx(right.sum() / expected.sum())
    assert result.num_images == NUM_IMAGES
    assert 0 < scores["mean_iou"] < 1


def test_a_right_model_scores_one_also_at_boundaries(dataset, recipe):
    result = evaluate_segmentation(RedModel(recipe), dataset, recipe, boundary=True, progress=False)
    scores = result.scores()
    assert scores["mean_iou"] == scores["boundary_iou"] == 1
    assert sum(map(sum, scores["confusion_matrix"])) == NUM_IMAGES * (SIZE[0] - 3) * SIZE[1]
    assert evaluate(RedModel(recipe, 1), dataset, recipe, progress=False) == {
        "mean_iou": 0,
        "mean_accuracy": 0,
        "overall_accuracy": 0,
    }


def test_a_model_is_left_in_the_mode_it_was_in(tiny_lemore, dataset, recipe):
    before = {name: tensor.clone() for name, tensor in tiny_lemore.state_dict().items()}
    expected = counts(tiny_lemore, dataset, recipe)
    tiny_lemore.train()
    assert counts(tiny_lemore, dataset, recipe, num_workers=1) == expected
    assert tiny_lemore.training
    tiny_lemore.eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_lemore.state_dict().items())


def test_a_stream_gives_the_same_counts(tiny_lemore, dataset, recipe, data_dir):
    samples = load_split(recipe, "test", data_dir, streaming=True)
    parts = [
        evaluate_segmentation(
            tiny_lemore, StreamedRecipeDataset(samples, recipe, rank=rank, world_size=2), recipe, progress=False
        )
        for rank in range(2)
    ]
    assert sum(part.num_images for part in parts) == NUM_IMAGES
    whole = evaluate_segmentation(tiny_lemore, dataset, recipe, batch_size=1, progress=False)
    total = sum(part.confusion_matrix.counts for part in parts)
    assert abs(total - whole.confusion_matrix.counts).sum() <= 2, "other batches may round otherwise"


def test_the_middle_of_an_image_scores_as_a_picture_of_its_own(tiny_lemore, dataset, recipe, data_dir):
    samples, middle = load_split(recipe, "test", data_dir), (32, 50)
    cropped = RecipeDataset(samples, recipe, center_crop=middle)
    top, left = (SIZE[0] - middle[0]) // 2, (SIZE[1] - middle[1]) // 2
    part = (..., slice(top, top + middle[0]), slice(left, left + middle[1]))
    for small, whole in zip(cropped, dataset, strict=True):
        assert torch.equal(small["pixel_values"], whole["pixel_values"][part])
        assert torch.equal(small["labels"], whole["labels"][part])
    streamed = load_split(recipe, "test", data_dir, streaming=True)
    stream = StreamedRecipeDataset(streamed, recipe, center_crop=middle)
    assert counts(tiny_lemore, stream, recipe) == counts(tiny_lemore, cropped, recipe)
    # It is resized after that, as another camera's picture is.
    enlarged = RecipeDataset(samples, replace(recipe, resize=(64, 100)), center_crop=middle)
    assert enlarged[0]["pixel_values"].shape == (3, 64, 100)
    assert enlarged[0]["labels"].shape == middle
    with pytest.raises(BadSampleError, match="it has 64×48 pixels, of which center_crop cannot keep 64×49"):
        RecipeDataset(samples, recipe, center_crop=(49, 64))[0]
    with pytest.raises(ValueError, match=r"center_crop must be a height and a width of at least 1, got \(0, 64\)"):
        RecipeDataset(samples, recipe, center_crop=(0, 64))


def test_worst_images_come_first(recipe, data_dir, tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind / "test").mkdir(parents=True)
        for path in (data_dir / kind / "test").iterdir():
            (tmp_path / kind / "test" / path.name).write_bytes(path.read_bytes())
    labels = np.asarray(Image.open(tmp_path / "masks" / "test" / "scene3.png"))
    shifted = np.where(labels == 255, 255, (labels + 1) % len(NAMES)).astype(np.uint8)
    Image.fromarray(shifted).save(tmp_path / "masks" / "test" / "scene3.png")
    dataset = RecipeDataset(load_split(recipe, "test", tmp_path), recipe)
    worst = evaluate_segmentation(RedModel(recipe), dataset, recipe, num_worst=2, progress=False).worst_images
    assert [(image.name, image.mean_iou) for image in worst] == [("scene3", 0.0), ("scene0", 1.0)]
    assert torch.equal(worst[0].image, dataset[3]["pixel_values"])
    assert torch.equal(worst[0].labels, torch.from_numpy(shifted))
    assert torch.equal(worst[1].prediction[3:], worst[1].labels[3:])


@pytest.mark.parametrize(
    "options",
    [
        {"flip": True},
        {"scales": [0.75, 1.0, 1.5], "flip": True},
        {"window": (32, 40)},
        {"window": (20, 64), "window_stride": (7, 64), "scales": [1.0, 1.5]},
    ],
)
def test_views_change_nothing_for_a_constant_model(options, dataset, recipe):
    model = ConstantModel([0.1, 0.3, 0.2])
    result = counts(model, dataset, recipe, **options)
    assert result == counts(model, dataset, recipe)
    assert np.array(result)[:, 1].sum() == np.sum(result), "class 1 has the highest score"


@pytest.mark.parametrize("options", [{"flip": True}, {"window": (17, 23)}, {"window": (17, 23), "flip": True}])
def test_windows_and_mirror_images_put_every_pixel_back_in_its_place(options, dataset, recipe):
    # Flipped or moved by a pixel, the noiseless labels would no longer agree.
    assert evaluate(RedModel(recipe), dataset, recipe, progress=False, **options)["mean_iou"] == 1


def test_a_window_that_covers_the_image_is_the_plain_evaluation(tiny_lemore, dataset, recipe):
    assert counts(tiny_lemore, dataset, recipe, window=(48, 100)) == counts(tiny_lemore, dataset, recipe)


def test_a_sliding_window_shows_the_network_windows_only(tiny_lemore, dataset, recipe):
    pixel_values = normalize(dataset[0]["pixel_values"][None], recipe)
    with torch.no_grad():
        halves = [tiny_lemore(half).logits for half in pixel_values.split(32, dim=3)]
        expected = torch.cat([F.interpolate(half, size=(48, 32), mode="bilinear") for half in halves], 3).argmax(1)
        labels = predict_labels(tiny_lemore, pixel_values, SIZE, window=(48, 32), window_stride=(48, 32))
        assert torch.equal(labels, expected)
        assert not torch.equal(labels, predict_labels(tiny_lemore, pixel_values, SIZE))


def test_where_windows_overlap_their_scores_are_averaged(tiny_lemore, dataset, recipe):
    pixel_values = normalize(dataset[0]["pixel_values"][None], recipe)
    total, count = torch.zeros(1, len(NAMES), *SIZE), torch.zeros(SIZE[1])
    with torch.no_grad():
        for left in (0, 24, 28):  # by two thirds of 36 pixels, and the last at the end
            logits = tiny_lemore(pixel_values[..., left : left + 36]).logits
            total[..., left : left + 36] += F.interpolate(logits, size=(48, 36), mode="bilinear")
            count[left : left + 36] += 1
        labels = predict_labels(tiny_lemore, pixel_values, SIZE, window=(48, 36))
    assert torch.equal(labels, (total / count).argmax(1))


def test_flip_makes_predictions_equivariant(tiny_lemore, dataset, recipe):
    pixel_values = normalize(dataset[0]["pixel_values"][None], recipe)
    with torch.no_grad():
        plain = predict_labels(tiny_lemore, pixel_values, SIZE)
        labels = predict_labels(tiny_lemore, pixel_values, SIZE, flip=True)
        mirrored = predict_labels(tiny_lemore, pixel_values.flip(-1), SIZE, flip=True).flip(-1)
    assert (labels != mirrored).float().mean() < 1e-3
    assert not torch.equal(labels, plain)


def test_several_scales_average_probabilities(tiny_lemore, dataset, recipe):
    pixel_values = normalize(dataset[0]["pixel_values"][None], recipe)
    with torch.no_grad():
        larger = F.interpolate(pixel_values, size=(72, 96), mode="bilinear", antialias=True)
        probabilities = [
            F.interpolate(tiny_lemore(view).logits, size=SIZE, mode="bilinear").softmax(1)
            for view in (pixel_values, larger)
        ]
        labels = predict_labels(tiny_lemore, pixel_values, SIZE, scales=[1.0, 1.5])
    assert (labels != sum(probabilities).argmax(1)).float().mean() < 1e-3


def test_a_single_label_is_background_and_foreground(data_dir, dataset):
    recipe = load_recipe("folder", {"class_names": ["off", "on"], "label_map": {0: 0, 1: 1, 2: 1}, "resize": None})
    dataset = RecipeDataset(load_split(recipe, "test", data_dir), recipe)
    for score, column in ((-0.2, 0), (0.2, 1)):
        model = ConstantModel([score])
        for options in ({}, {"flip": True}):
            matrix = np.array(counts(model, dataset, recipe, **options))
            assert matrix.shape == (2, 2)
            assert matrix[:, column].sum() == matrix.sum() > 0


def test_camvid_is_counted_at_its_own_size(camvid_dir):
    recipe = load_recipe("camvid")
    samples = load_split(recipe, "test", camvid_dir).select(range(2))
    dataset = RecipeDataset(samples, recipe)
    model = ConstantModel([0.0] * 10 + [1.0])
    model.config.id2label = recipe.id2label
    matrix = torch.tensor(counts(model, dataset, recipe))
    labels = torch.stack([torch.from_numpy(np.array(sample["label"])) for sample in samples])
    assert labels.shape == (2, 360, 480)
    assert matrix[:, 10].tolist() == [(labels == index).sum().item() for index in range(11)]
    assert matrix.sum() == (labels != 255).sum()


def test_classification_counts_first_and_first_five(tmp_path):
    names = [f"c{index}" for index in range(7)]
    rng = np.random.default_rng(0)
    for name in names:
        (tmp_path / "validation" / name).mkdir(parents=True)
        for index in range(3):
            pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "validation" / name / f"{index}.png")
    changes = {"class_names": names, "resize": 64, "crop_size": (64, 64), "image_size": (64, 64)}
    recipe = load_recipe("imagenet1k", {**changes, "eval_batch_size": 4})
    dataset = RecipeDataset(load_split(recipe, "validation", tmp_path), recipe)

    config = LeMoReConfig(image_size=64, hidden_sizes=(8, 8, 16, 16), id2label=dict(enumerate(names)))
    model = LeMoReForImageClassification(config).eval()
    nn.init.normal_(model.classifier.weight)
    batch = collate([dataset[index] for index in range(len(dataset))])
    with torch.no_grad():
        ranking = model(normalize(batch["pixel_values"], recipe)).logits.argsort(descending=True)
    hits = ranking == batch["labels"][:, None]
    result = evaluate_classification(model, dataset, recipe, progress=False)
    assert (result.num_images, result.top1_correct, result.top5_correct) == (
        21,
        hits[:, 0].sum(),
        hits[:, :5].sum(),
    )
    assert evaluate(model, dataset, recipe, progress=False) == {
        "accuracy": result.top1_correct / 21,
        "top5_accuracy": result.top5_correct / 21,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": []}, "scales must be one or more"),
        ({"scales": [1.0, -0.5]}, r"positive factors, got \[1.0, -0.5\]"),
        ({"window": (0, 32)}, r"window must be .* got \(0, 32\)"),
        ({"window": (32, 32), "window_stride": (16, 40)}, r"\(16, 40\) is larger than the window"),
        ({"window_stride": (16, 16)}, "no effect without a window"),
        ({"num_worst": -1}, "num_worst must be at least 0"),
    ],
)
def test_bad_options_are_refused_before_any_work(options, message, dataset, recipe):
    class Untouched(ConstantModel):
        def forward(self, pixel_values):
            raise AssertionError("the model was asked")

    with pytest.raises(ValueError, match=message):
        evaluate_segmentation(Untouched([0.0, 0.0, 0.0]), dataset, recipe, progress=False, **options)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batches_of_no_image_are_refused(batch_size, dataset, recipe):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, or None for the recipe's, got {batch_size}"):
        evaluate_segmentation(ConstantModel([0.0, 0.0, 0.0]), dataset, recipe, batch_size=batch_size, progress=False)


def test_models_of_other_classes_are_refused(dataset, recipe):
    with pytest.raises(ValueError, match="model has 2 labels, the recipe folder has 3 classes"):
        counts(ConstantModel([0.0, 1.0]), dataset, recipe)
    model = ConstantModel([0.0, 1.0, 2.0])
    model.config.id2label = {0: "sky", 1: "road", 2: "tree"}
    with pytest.raises(ValueError, match="in another order"):
        counts(model, dataset, recipe)
    first, second, _ = recipe.class_names
    model.config.id2label = {0: second, 1: first, 2: "a class of its own"}
    with pytest.raises(ValueError, match=rf"in another order \({second}, {first}\)"):
        counts(model, dataset, recipe)


def test_nan_logits_are_refused(dataset, recipe):
    for options in ({}, {"flip": True}):
        with pytest.raises(ValueError, match="NaN"):
            counts(ConstantModel([0.0, math.nan, 1.0]), dataset, recipe, **options)


def test_only_whole_and_unpickled_models_are_loaded(tiny_lemore, tmp_path):
    folder = tmp_path / "model"
    tiny_lemore.save_pretrained(folder)
    assert torch.equal(
        load_trained_model(folder).decode_head.classifier.weight, tiny_lemore.decode_head.classifier.weight
    )
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps(json.loads(config) | {"decoder_hidden_size": 10**9}))
    with pytest.raises(
        CheckpointError, match=r"does not hold the weights of the network that its config\.json describes"
    ):
        load_trained_model(folder)
    (folder / "config.json").write_text(config)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_trained_model(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        load_trained_model(folder)
    torch.save(tiny_lemore.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled weights \(pytorch_model\.bin\)"):
        load_trained_model(folder)

    LeMoReForImageClassification(tiny_lemore.config).save_pretrained(tmp_path / "classifier")
    with pytest.raises(CheckpointError, match=r"are missing .*decode_head"):
        load_trained_model(tmp_path / "classifier")


# The command line


@pytest.fixture(scope="module")
def model_dir(tiny_lemore, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "final"
    tiny_lemore.save_pretrained(folder)
    (folder.parent / "run.json").write_text(json.dumps({"seed": 7, "hours": 1.5}))
    return folder


def arguments(model_dir, data_dir, output, *more):
    return [
        *("--model", str(model_dir), "--recipe", "folder", "--data_dir", str(data_dir), "--split", "test"),
        *("--resize", "none", "--max_longest_edge", "none", "--eval_batch_size", "2"),
        *("--output", str(output), *more),
    ]


@pytest.fixture
def run_script(monkeypatch):
    """Runs the script's `main` in this process."""
    spec = importlib.util.spec_from_file_location("evaluate_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*words):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
        script.main()

    run.module = script
    yield run
    AcceleratorState._reset_state(reset_partial_state=True)  # Other tests choose another precision.


def test_two_processes_give_exactly_the_counts_of_one(model_dir, data_dir, tmp_path):
    reports = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}.json"
        words = arguments(model_dir, data_dir, output, "--scales", "1", "1.5")
        status, printed = run_forked(processes, SCRIPT, *words)
        assert status == 0, printed
        assert printed.count("Pixel accuracy") == 1, "one process should report"
        assert Image.open(tmp_path / f"{processes}_worst_images.png").size[0] > 0
        reports.append(json.loads(output.read_text()))
        assert reports[-1].pop("num_processes") == processes
    assert reports[0] == reports[1]
    assert reports[0]["num_images"] == NUM_IMAGES
    assert sum(map(sum, reports[0]["confusion_matrix"])) == NUM_IMAGES * (SIZE[0] - 3) * SIZE[1]


def test_the_report_says_what_was_measured(run_script, tiny_lemore, model_dir, data_dir, tmp_path, capsys):
    output, runs = tmp_path / "new" / "metrics.json", tmp_path / "runs.jsonl"
    run_script(*arguments(model_dir, data_dir, output, "--flip", "--runs", str(runs)))
    report = json.loads(output.read_text())
    recipe = load_recipe("folder", {"resize": None, "max_longest_edge": None, "eval_batch_size": 2}, data_dir)
    dataset = RecipeDataset(load_split(recipe, "test", data_dir), recipe)
    scores = evaluate_segmentation(tiny_lemore, dataset, recipe, flip=True, boundary=True, progress=False).scores()
    assert report["mean_iou"] == pytest.approx(scores["mean_iou"], abs=1e-3)
    assert list(report["per_class_iou"]) == list(NAMES)
    assert list(report["per_class_iou"].values()) == pytest.approx(scores["per_class_iou"], abs=1e-3)
    assert report["boundary_iou"] == pytest.approx(scores["boundary_iou"], abs=1e-3)
    assert report["parameters"] == tiny_lemore.num_parameters()
    assert report["multiply_accumulates"] > report["parameters"]
    assert report["inference"]["flip"] is True
    assert (report["dataset"], report["recipe"], report["split"]) == ("Local folder", "folder", "test")
    table = capsys.readouterr().out
    assert all(f"{100 * iou:.2f} %" in table for iou in report["per_class_iou"].values())
    for name in ("confusion_matrix", "worst_images"):
        assert Image.open(output.with_name(f"metrics_{name}.png")).mode == "RGB"
    # Measured again, on this split or another, the run keeps its one line.
    run_script(*arguments(model_dir, data_dir, output, "--runs", str(runs)))
    (run,) = map(json.loads, runs.read_text().splitlines())
    assert (run["name"], run["seed"]) == (model_dir.parent.name, 7)
    assert run["evaluation"]["test"]["mean_iou"] == json.loads(output.read_text())["mean_iou"]
    # An earlier training with the same settings leaves nothing in the line.
    old = {**run, "hours": 99, "evaluation": {"validation": {"mean_iou": 0.9}, **run["evaluation"]}}
    runs.write_text(json.dumps(old) + "\n")
    run_script(*arguments(model_dir, data_dir, output, "--runs", str(runs)))
    assert list(map(json.loads, runs.read_text().splitlines())) == [run]
    run_script(*arguments(model_dir, data_dir, output, "--center_crop", "32", "50"))
    report = json.loads(output.read_text())
    assert report["inference"]["center_crop"] == [32, 50]
    assert sum(map(sum, report["confusion_matrix"])) == NUM_IMAGES * 32 * 50


def test_the_run_is_found_from_within_the_model_too(run_script, model_dir, data_dir, tmp_path, monkeypatch):
    output, runs = tmp_path / "metrics.json", tmp_path / "runs.jsonl"
    monkeypatch.chdir(model_dir)
    run_script(*arguments(".", data_dir, output, "--runs", str(runs)))
    assert json.loads(output.read_text())["run"] == {"name": model_dir.parent.name, "seed": 7, "hours": 1.5}
    assert json.loads(runs.read_text())["seed"] == 7


def test_scores_are_written_before_they_are_drawn(run_script, model_dir, data_dir, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no font")

    monkeypatch.setattr(run_script.module, "plot_confusion_matrix", fail)
    with pytest.raises(RuntimeError, match="no font"):
        run_script(*arguments(model_dir, data_dir, tmp_path / "metrics.json"))
    assert json.loads((tmp_path / "metrics.json").read_text())["num_images"] == NUM_IMAGES


@pytest.fixture(scope="module")
def onnx_dir(tiny_lemore, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "export"
    export_model(tiny_lemore, LeMoReImageProcessor(size={"height": SIZE[0], "width": SIZE[1]}), folder, "onnx")
    return folder


def test_an_export_scores_what_its_checkpoint_scores(run_script, onnx_dir, model_dir, data_dir, tmp_path):
    reports = {}
    for folder in (model_dir, onnx_dir):
        run_script(*arguments(folder, data_dir, tmp_path / "metrics.json", "--scales", "1", "1.5"))
        reports[folder] = json.loads((tmp_path / "metrics.json").read_text())
    matrix, expected = (np.array(reports[folder]["confusion_matrix"]) for folder in (onnx_dir, model_dir))
    assert np.abs(matrix - expected).sum() <= 0.001 * expected.sum()
    assert reports[onnx_dir]["export"]["format"] == "onnx"
    assert reports[onnx_dir]["runtime"]["onnxruntime"]


def test_an_export_for_single_images_is_given_them_one_by_one(run_script, tiny_lemore, model_dir, data_dir, tmp_path):
    processor = LeMoReImageProcessor(size={"height": SIZE[0], "width": SIZE[1]})
    export_model(tiny_lemore, processor, tmp_path / "export", "torch", max_batch_size=1)
    matrices = []
    for folder in (model_dir, tmp_path / "export"):
        run_script(*arguments(folder, data_dir, tmp_path / "metrics.json", "--eval_batch_size", "2"))
        matrices.append(np.array(json.loads((tmp_path / "metrics.json").read_text())["confusion_matrix"]))
    assert np.abs(matrices[0] - matrices[1]).sum() <= 0.001 * matrices[0].sum()


def test_what_an_export_cannot_be_evaluated_with_is_refused(run_script, tiny_lemore, onnx_dir, data_dir, tmp_path):
    output = tmp_path / "metrics.json"
    with pytest.raises(ValueError, match="--runs"):
        run_script(*arguments(onnx_dir, data_dir, output, "--runs", str(tmp_path / "runs.jsonl")))
    with pytest.raises(ValueError, match="--mixed_precision"):
        run_script(*arguments(onnx_dir, data_dir, output, "--mixed_precision", "bf16"))
    export_model(tiny_lemore, LeMoReImageProcessor(), tmp_path / "labels", "torch", with_postprocessing=True)
    with pytest.raises(ValueError, match="--with-postprocessing"):
        run_script(*arguments(tmp_path / "labels", data_dir, output))
    with pytest.raises(ValueError, match="for segmentation"):
        run_script(*arguments(onnx_dir, data_dir, output, "--recipe", "imagenet1k"))
    assert not output.exists()


def test_a_class_that_never_occurs_has_no_iou(run_script, data_dir, tmp_path):
    names = [*NAMES, "unicorn"]
    build_peer("lraspp-mobilenet-v3-large", 4, dict(enumerate(names))).save_pretrained(tmp_path / "peer")
    output = tmp_path / "metrics.json"
    more = ("--class_names", *names, "--worst_images", "0")
    run_script(*arguments(tmp_path / "peer", data_dir, output, *more))
    report = json.loads(output.read_text())
    assert report["model_type"] == "lraspp-mobilenet-v3"
    assert report["per_class_accuracy"]["unicorn"] is None
    assert not (tmp_path / "metrics_worst_images.png").exists()


def test_another_size_than_the_processor_s_is_said(run_script, model_dir, data_dir, tmp_path, capsys):
    LeMoReImageProcessor(size={"height": 32, "width": 64}).save_pretrained(model_dir)
    output = tmp_path / "metrics.json"
    try:
        for size, said in ((("48", "64"), True), (("32", "64"), False)):
            run_script(*arguments(model_dir, data_dir, output, "--resize", *size))
            printed = capsys.readouterr().out
            assert ("the scores are those at the recipe's size" in printed) is said
            assert ("As the processor does it: --resize 32 64." in printed) is said
            report = json.loads(output.read_text())
            assert report["inference"]["resize"] == report["image_size"] == list(map(int, size))
        run_script(*arguments(model_dir, data_dir, output, "--resize", "48", "--max_longest_edge", "64"))
        inference = json.loads(output.read_text())["inference"]
        assert (inference["resize"], inference["max_longest_edge"]) == (48, 64)
        run_script(*arguments(model_dir, data_dir, output, "--resize", "none"))
        assert "leaves images at their size, the image processor in" in capsys.readouterr().out
        native = json.loads((model_dir / "config.json").read_text())["image_size"]
        assert json.loads(output.read_text())["image_size"] == ([native] * 2 if isinstance(native, int) else native)
    finally:
        (model_dir / "preprocessor_config.json").unlink()


def test_the_processor_of_a_model_on_the_hub_is_looked_at_too(model_dir, data_dir, tmp_path):
    LeMoReImageProcessor(image_mean=[0.5, 0.5, 0.5]).save_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for folder in (model_dir, tmp_path) for path in folder.glob("*.*")}
    with running_hub() as hub:
        hub.commit("someone/net", files)
        words = arguments("someone/net", data_dir, tmp_path / "metrics.json")
        refused = run_client([str(SCRIPT)], hub, tmp_path, *words)
    assert refused.returncode == 1
    assert "--image_mean 0.5 0.5 0.5" in refused.stderr
    assert not (tmp_path / "metrics.json").exists()


def test_bad_input_is_refused_before_the_work(run_script, model_dir, data_dir, tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        run_script(*arguments(model_dir, data_dir, tmp_path))
    output = tmp_path / "metrics.json"
    untrained = shutil.copytree(model_dir, tmp_path / "elsewhere" / "net")
    with pytest.raises(
        ValueError, match=r"--runs keeps lines of trainings, of which .*net has no run\.json beside it"
    ):
        run_script(*arguments(untrained, data_dir, output, "--runs", str(tmp_path / "runs.jsonl")))
    with pytest.raises(ValueError, match=r"--runs .* is a folder"):
        run_script(*arguments(model_dir, data_dir, output, "--runs", str(tmp_path)))
    with pytest.raises(ValueError, match=r"--model .*best is of one's middle"):
        run_script(*arguments(model_dir.parent / "best", data_dir, output, "--runs", str(tmp_path / "runs.jsonl")))
    for view in (
        ["--flip"],
        ["--window", "32", "32"],
        ["--scales", "1", "2"],
        ["--worst_images", "3"],
        ["--center_crop", "9", "9"],
    ):
        with pytest.raises(ValueError, match=rf"{view[0]} is for segmentation, the recipe imagenet1k is for image"):
            run_script("--model", str(model_dir), "--recipe", "imagenet1k", "--output", str(output), *view)
    with pytest.raises(ValueError, match="--crop_size has no effect on scores in segmentation"):
        run_script(*arguments(model_dir, data_dir, output, "--crop_size", "32", "32"))
    with pytest.raises(ValueError, match=r"--image_size \(32, 32\) has no effect on .*: --resize changes"):
        run_script(*arguments(model_dir, data_dir, output, "--image_size", "32", "32"))
    with pytest.raises(SystemExit):
        run_script(*arguments(model_dir, data_dir, output, "--train_on", "train"))
    with pytest.raises(FileNotFoundError, match="validation split"):
        run_script(*arguments(model_dir, data_dir, output, "--split", "validation"))
    LeMoReImageProcessor(image_mean=[0.5, 0.5, 0.5]).save_pretrained(model_dir)
    try:
        with pytest.raises(ValueError, match=r"--image_mean 0\.5 0\.5 0\.5"):
            run_script(*arguments(model_dir, data_dir, output))
    finally:
        (model_dir / "preprocessor_config.json").unlink()
    assert not output.exists()


def test_the_scores_are_computed_in_the_precision_asked_for(run_script, model_dir, data_dir, tmp_path, monkeypatch):
    seen = set()

    def predict(*args, original=predict_labels):
        seen.add(torch.is_autocast_enabled("cpu"))
        return original(*args)

    monkeypatch.setattr("lemore_hf.evaluation.predict_labels", predict)
    run_script(*arguments(model_dir, data_dir, tmp_path / "metrics.json", "--mixed_precision", "bf16"))
    assert seen == {True}


def test_windows_reach_the_evaluation(run_script, model_dir, data_dir, tmp_path, monkeypatch):
    seen = []

    def score(*args, **kwargs):
        seen.append(kwargs)
        return evaluate_segmentation(*args, **kwargs)

    monkeypatch.setattr(run_script.module, "evaluate_segmentation", score)
    views = ("--window", "32", "40", "--window_stride", "8", "32", "--num_workers", "0")
    run_script(*arguments(model_dir, data_dir, tmp_path / "metrics.json", *views))
    assert (seen[0]["window"], seen[0]["window_stride"], seen[0]["batch_size"]) == ([32, 40], [8, 32], 2)


def test_smaller_views_are_antialiased(tiny_lemore, dataset, recipe):
    pixel_values = normalize(dataset[0]["pixel_values"][None], recipe)
    seen = []
    hook = tiny_lemore.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        predict_labels(tiny_lemore, pixel_values, SIZE, scales=[0.69])
    hook.remove()
    smaller = F.interpolate(pixel_values, size=seen[0].shape[-2:], mode="bilinear", antialias=True)
    torch.testing.assert_close(seen[0], smaller)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_std": [0.5] * 3}, "--image_std 0.5"),
        ({"image_mean": 0.5}, "--image_mean 0.5 0.5 0.5"),
        ({"do_normalize": False}, "do_normalize is False"),
    ],
)
def test_each_setting_of_the_pixel_values_counts(tmp_path, recipe, settings, message):
    LeMoReImageProcessor(**settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        check_normalization(tmp_path, recipe)


@pytest.mark.parametrize("content", ["{", "[]", "5"])
def test_damaged_settings_of_a_processor_are_named(tmp_path, recipe, content):
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is damaged \(.*\): bring back"):
        check_normalization(tmp_path, recipe)


class ConstantClassifier(ConstantModel):
    def forward(self, pixel_values):
        return SemanticSegmenterOutput(logits=self.scores.expand(len(pixel_values), -1))


def test_classifiers_of_few_classes_and_those_of_nan():
    names = {"class_names": ["a", "b"]}
    small = load_recipe("imagenet1k", {**names, "crop_size": (32, 32), "resize": 32, "image_size": (32, 32)})
    pixels = torch.zeros(3, 32, 32, dtype=torch.uint8)
    samples = [{"pixel_values": pixels, "labels": n % 2, "index": n, "name": str(n)} for n in range(3)]
    model = ConstantClassifier([0.0, 1.0])
    model.config.id2label = small.id2label
    result = evaluate_classification(model, samples, small, progress=False)
    assert (result.num_images, result.top1_correct, result.top5_correct) == (3, 1, 3)
    model = ConstantClassifier([0.0, math.nan])
    model.config.id2label = small.id2label
    with pytest.raises(ValueError, match="NaN"):
        evaluate_classification(model, samples, small, progress=False)


def test_pictures_show_the_truth_before_the_prediction(run_script, recipe):
    labels, prediction = torch.zeros(SIZE, dtype=torch.uint8), torch.ones(SIZE, dtype=torch.uint8)
    image = EvaluatedImage(0.0, "a", torch.zeros(3, *SIZE, dtype=torch.uint8), labels, prediction)
    coloured = replace(recipe, palette=((200, 0, 0), (0, 200, 0), (0, 0, 200)))
    drawn = run_script.module.draw_image(image, coloured, list(NAMES))
    _, truth, predicted = (np.asarray(picture).reshape(-1, 3).mean(0) for picture in drawn)
    assert (truth.argmax(), predicted.argmax()) == (0, 1)


def test_results_name_the_weights_that_they_are_of(run_script, model_dir, data_dir, tmp_path):
    run_script(*arguments(model_dir, data_dir, tmp_path / "metrics.json"))
    weights = hashlib.sha256((model_dir / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads((tmp_path / "metrics.json").read_text())["weights_sha256"] == weights


def test_runs_of_several_seeds_are_lines_of_their_own(run_script, tmp_path):
    options = SimpleNamespace(runs=tmp_path / "runs.jsonl", split="test")
    report = {"parameters": 1, "multiply_accumulates": 1, "inference": {"flip": True}}
    for seed in (0, 1):
        run = {"name": "net", "configuration_hash": "x", "seed": seed, "steps": 3}
        run_script.module.record_run({**report, "run": run, "mean_iou": seed / 2}, options)
    lines = [json.loads(line) for line in options.runs.read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1]
    assert lines[1]["evaluation"]["test"] == {"mean_iou": 0.5, "inference": {"flip": True}}


def test_runs_that_are_scored_at_the_same_time_are_all_kept(run_script, tmp_path):
    options = SimpleNamespace(runs=tmp_path / "new" / "runs.jsonl", split="test")

    def record(seed: int) -> None:
        run = {"name": "net", "configuration_hash": "x", "seed": seed, "steps": 3}
        run_script.module.record_run({"parameters": 1, "multiply_accumulates": 1, "run": run}, options)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(record, range(32)))
    kept = [json.loads(line)["seed"] for line in options.runs.read_text().splitlines()]
    assert sorted(kept) == list(range(32))
