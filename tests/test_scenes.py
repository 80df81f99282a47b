# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Generated street scenes: labels, determinism, variety, and that colour alone does not solve them."""

import hashlib
import subprocess
import sys

import datasets
import numpy as np
import PIL.Image
import pytest

from lemore_hf.data import scenes as scenes_module
from lemore_hf.data.scenes import CLASS_NAMES, ID2LABEL, PALETTE, VOID, draw_scene, load_scenes

SIZE = (64, 96)


@pytest.fixture(scope="module")
def scenes() -> datasets.DatasetDict:
    return load_scenes(num_train=48, num_validation=0, num_test=24, size=SIZE, seed=3)


def pixels(split: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([np.asarray(x) for x in split["image"]]), np.stack([np.asarray(x) for x in split["label"]])


def digest(pictures: tuple[PIL.Image.Image, PIL.Image.Image]) -> str:
    return hashlib.sha256(b"".join(picture.tobytes() for picture in pictures)).hexdigest()


def test_columns_splits_and_class_names(scenes):
    assert {name: len(split) for name, split in scenes.items()} == {"train": 48, "test": 24}
    features = scenes["train"].features
    assert isinstance(features["image"], datasets.Image)
    assert isinstance(features["label"], datasets.Image)
    assert tuple(features["classes"].feature.names) == CLASS_NAMES == tuple(ID2LABEL.values())
    assert len(set(CLASS_NAMES)) == len(set(PALETTE)) == len(PALETTE) >= 8
    for row in scenes["test"]:
        assert (row["image"].mode, row["label"].mode) == ("RGB", "L")
        assert row["image"].size == row["label"].size == SIZE[::-1]
        values = set(np.unique(row["label"]).tolist())
        assert values <= {*range(len(CLASS_NAMES)), VOID}
        assert row["classes"] == sorted(values - {VOID})


def test_class_names_survive_saving(scenes, tmp_path):
    scenes["test"].to_parquet(tmp_path / "test.parquet")
    loaded = datasets.load_dataset("parquet", data_files=str(tmp_path / "test.parquet"), cache_dir=tmp_path)["train"]
    assert tuple(loaded.features["classes"].feature.names) == CLASS_NAMES
    np.testing.assert_array_equal(loaded[0]["label"], scenes["test"][0]["label"])


def test_every_class_is_common_and_void_is_a_thin_band(scenes):
    _, labels = pixels(scenes["train"])
    for number, name in ID2LABEL.items():
        assert (labels == number).any(axis=(1, 2)).mean() > 0.25, name
        assert (labels == number).mean() > 0.005, name
    assert 0.02 < (labels == VOID).mean() < 0.2
    # Void lies between two classes that are at most two pixels away: nothing but contours (and slivers) is void.
    padded = np.pad(labels, ((0, 0), (2, 2), (2, 2)), constant_values=VOID)
    around = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(1, 2))[labels == VOID].reshape(-1, 25)
    lowest = np.where(around == VOID, VOID - 1, around).min(axis=1)
    highest = np.where(around == VOID, 0, around).max(axis=1)
    assert (lowest < highest).mean() > 0.9


def test_void_lies_between_any_two_classes(scenes):
    _, labels = pixels(scenes["train"])
    for axis in (1, 2):
        one, other = labels, np.roll(labels, -1, axis)
        touching = (one != other) & (one != VOID) & (other != VOID)
        assert not np.delete(touching, -1, axis).any()


def test_sky_is_above_the_ground_and_cars_stand_on_it(scenes):
    """The layout is that of a street, which is what context means here."""
    _, labels = pixels(scenes["train"])
    rows = np.broadcast_to(np.arange(SIZE[0])[:, None], labels.shape[1:])
    mean_row = {
        name: np.mean([rows[label == n].mean() for label in labels if (label == n).any()])
        for n, name in ID2LABEL.items()
    }
    assert mean_row["sky"] < mean_row["building"] < mean_row["car"] < mean_row["road"]


def test_the_same_seed_gives_the_same_bytes_in_another_process():
    code = f"""
import hashlib, runpy
pictures = runpy.run_path({scenes_module.__file__!r})["draw_scene"](11, {SIZE})
print(hashlib.sha256(b"".join(picture.tobytes() for picture in pictures)).hexdigest())
"""
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert other.stdout.strip() == digest(draw_scene(11, SIZE)), other.stderr


def test_a_smaller_data_set_is_the_beginning_of_a_larger_one(scenes):
    few = load_scenes(num_train=3, num_validation=0, num_test=2, size=SIZE, seed=3)
    for split in few:
        for small, large in zip(few[split], scenes[split], strict=False):
            np.testing.assert_array_equal(small["image"], large["image"])
            np.testing.assert_array_equal(small["label"], large["label"])


def test_no_picture_occurs_twice_in_any_split_or_seed():
    seen = []
    for seed in (0, 1, 2**32, 2**32 + 1):
        data = load_scenes(num_train=4, num_validation=4, num_test=4, size=(32, 32), seed=seed)
        seen += [picture.tobytes() for split in data.values() for picture in split["image"]]
    assert len(set(seen)) == len(seen) == 48


def test_a_generator_is_advanced():
    rng = np.random.default_rng(0)
    first, second = draw_scene(rng, SIZE)[0], draw_scene(rng, SIZE)[0]
    assert first.tobytes() != second.tobytes()
    assert first.tobytes() == draw_scene(0, SIZE)[0].tobytes()


@pytest.mark.parametrize("size", [(32, 32), (33, 257), (300, 40)])
def test_any_size(size):
    image, label = draw_scene(1, size)
    assert image.size == label.size == size[::-1]
    assert len(np.unique(label)) > 3


def mean_iou(predictions: np.ndarray, labels: np.ndarray) -> float:
    number, kept = len(CLASS_NAMES), labels != VOID
    counts = np.bincount(labels[kept].astype(int) * number + predictions[kept], minlength=number**2).reshape(
        number, number
    )
    hits = counts.diagonal()
    return float(np.mean(hits / (counts.sum(axis=0) + counts.sum(axis=1) - hits)))


@pytest.mark.parametrize("balanced", [False, True])
def test_colour_alone_does_not_tell_the_classes(scenes, balanced):
    """The best classifier of single pixels by their colour, on 512 colour cells, with or without class balance."""
    images, labels = pixels(scenes["train"])
    cells = lambda x: (x // 32).astype(int) @ [64, 8, 1]  # noqa: E731
    kept = labels != VOID
    histogram = np.zeros((512, len(CLASS_NAMES)))
    np.add.at(histogram, (cells(images)[kept], labels[kept]), 1)
    if balanced:
        histogram /= histogram.sum(axis=0)
    images, labels = pixels(scenes["test"])
    assert mean_iou(histogram.argmax(axis=1)[cells(images)], labels) < 0.25


def test_no_class_has_a_colour_of_its_own(scenes):
    """Within a scene the classes differ in colour; over all scenes their mean colours fall together."""
    images, labels = pixels(scenes["train"])
    within, means = [], []
    for number in range(len(CLASS_NAMES)):
        colours = [
            image[label == number].mean(axis=0)
            for image, label in zip(images, labels, strict=True)
            if (label == number).sum() > 20
        ]
        within.append(np.std(colours, axis=0).mean())
        means.append(np.mean(colours, axis=0))
    assert np.std(means, axis=0).mean() < 0.5 * np.mean(within)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train": -1}, "num_train .*-1"),
        ({"num_test": 1.5}, "num_test .*1.5"),
        ({"num_train": 0, "num_validation": 0, "num_test": 0}, "at least one"),
        ({"size": (31, 64)}, r"32 to 2048.*\(31, 64\)"),
        ({"size": (64, 4096)}, r"32 to 2048.*\(64, 4096\)"),
        ({"size": 128}, r"\(height, width\), not 128"),
        ({"size": (64.5, 64)}, r"two integers.*64.5"),
        ({"seed": -3}, "seed .*-3"),
        ({"seed": "a"}, "seed .*'a'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_scenes(**arguments)


def test_draw_scene_checks_its_arguments():
    with pytest.raises(ValueError, match=r"seed .*-1"):
        draw_scene(-1)
    with pytest.raises(ValueError, match=r"32 to 2048"):
        draw_scene(0, (8, 8))


def test_a_truth_value_is_no_number():
    """What a switch that came into the wrong place would be."""
    with pytest.raises(ValueError, match="seed must be a non-negative integer, not True"):
        draw_scene(True)
    with pytest.raises(ValueError, match=r"num_train .*not False"):
        load_scenes(num_train=False)


def test_by_day_things_have_their_own_colours():
    """What the picture of a network trained on photographs is drawn with."""
    scenes = [[np.asarray(layer) for layer in draw_scene(seed, (96, 128), daylight=True)] for seed in range(6)]
    pixels, labels = np.concatenate([scene[0] for scene in scenes]), np.concatenate([scene[1] for scene in scenes])
    colour = {name: pixels[labels == number].mean(0) for number, name in ID2LABEL.items()}
    assert colour["sky"].mean() > colour["road"].mean() + 30
    assert np.ptp(colour["road"]) < 25, "a road is nearly grey"
    assert colour["tree"].argmax() == 1, "trees are green"
