# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Loading: every recipe reads its data set's true layout, bad data is named, and order and content are reproducible."""

import functools
import io
import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lemore_hf import LeMoReImageProcessor
from lemore_hf.data import scenes
from lemore_hf.data.loading import (
    BadSampleError,
    EpochSampler,
    RecipeDataset,
    SampleDecoder,
    StreamedRecipeDataset,
    collate,
    load_split,
    sample_name,
    with_classes_of,
)
from lemore_hf.data.recipes import load_recipe
from lemore_hf.inference import read_picture
from lemore_hf.pictures import to_rgb

SIZE = (40, 48)
VOID = 255


ENCODED = datasets.Image(decode=False)


@pytest.fixture(autouse=True, scope="module")
def _settings(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        # Of 5 seconds at the end of each epoch of a shuffled stream, for threads that read from the network.
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
        yield


def picture(index: int, size=SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8))


def label_map(*values: int, mode: str = "L") -> Image.Image:
    """A map with stripes of the stored labels given."""
    stripes = np.resize(np.array(values), SIZE[1])
    return Image.fromarray(
        np.broadcast_to(stripes, SIZE).astype({"L": np.uint8, "I": np.int32, "I;16": np.uint16}[mode])
    )


def encoded(image: Image.Image, kind: str = "PNG", **options) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def write(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write_parquet(path: Path, columns: dict[str, list], features: datasets.Features | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


def image_columns(maps: list[Image.Image], label: str = "label", **extra) -> tuple[dict, datasets.Features]:
    columns = {
        "image": [encoded(picture(index), "JPEG") for index in range(len(maps))],
        label: [encoded(map_) for map_ in maps],
    }
    features = {"image": datasets.Image(), label: datasets.Image()}
    for name, (values, feature) in extra.items():
        columns[name], features[name] = values, feature
    return columns, datasets.Features(features)


def write_pairs(folder: Path, names: list[str], images: str = "images", masks: str = "masks") -> None:
    for index, name in enumerate(names):
        write(folder / images / f"{name}.jpg", picture(index))
        write(folder / masks / f"{name}.png", label_map(0, 1, VOID))


def folder_recipe(**overrides):
    return load_recipe("folder", {"class_names": ["a", "b"], "crop_size": (32, 32), "resize": None} | overrides)


# -------------------------------------------------------------------------------------------------------------------
# Each data set in its own schema
# -------------------------------------------------------------------------------------------------------------------


def build_ade20k(folder: Path) -> None:
    for split in ("training", "validation"):
        write(folder / f"images/{split}/ADE_1.jpg", picture(0))
        write(folder / f"annotations/{split}/ADE_1.png", label_map(0, 1, 150))


def build_camvid(folder: Path) -> None:
    columns, features = image_columns([label_map(0, 10, VOID)], name=(["0001TP_1"], datasets.Value("string")))
    for split in ("train", "val", "test"):
        write_parquet(folder / f"{split}.parquet", columns, features)


def build_cityscapes(folder: Path) -> None:
    for split in ("train", "val"):
        stem = f"{split}/aachen/aachen_000000_000019"
        write(folder / f"leftImg8bit/{stem}_leftImg8bit.png", picture(0))
        write(folder / f"gtFine/{stem}_gtFine_labelIds.png", label_map(0, 7, 33))
        # The release has more files of the same frame, which are not for us.
        write(folder / f"gtFine/{stem}_gtFine_color.png", picture(1))
        write(folder / f"gtFine/{stem}_gtFine_instanceIds.png", label_map(7, 26001, mode="I;16"))


def build_pascal_context(folder: Path) -> None:
    for name in ("2008_1", "2008_2", "2008_3"):
        write(folder / f"JPEGImages/{name}.jpg", picture(0))
        if name != "2008_3":  # the release has more images than label maps
            write(folder / f"SegmentationClassContext/{name}.png", label_map(0, 1, 59))
    (folder / "ImageSets/SegmentationContext").mkdir(parents=True)
    (folder / "ImageSets/SegmentationContext/train.txt").write_text("2008_1\n")
    (folder / "ImageSets/SegmentationContext/val.txt").write_text("2008_2\n")


def build_coco_stuff_10k(folder: Path) -> None:
    for name in ("COCO_train2014_1", "COCO_train2014_2"):
        write(folder / f"images/{name}.jpg", picture(0))
        write(folder / f"annotations/{name}.png", label_map(0, 1, 13, 182))
    (folder / "imageLists").mkdir()
    (folder / "imageLists/train.txt").write_text("COCO_train2014_1\n")
    (folder / "imageLists/test.txt").write_text("COCO_train2014_2\n")


def build_coco_stuff_164k(folder: Path) -> None:
    for split in ("train", "val"):
        write(folder / f"images/{split}2017/000000000009.jpg", picture(0))
        write(folder / f"annotations/{split}2017/000000000009.png", label_map(VOID, 0, 12, 181))


def build_folder(folder: Path) -> None:
    (folder / "classes.txt").write_text("a\nb\n")
    for split in ("train", "val", "test"):
        write_pairs(folder, ["x"], f"images/{split}", f"masks/{split}")


# Recipe, builder, classes that the stored labels must become (in the order of the stripes).
SCHEMAS = [
    ("ade20k", build_ade20k, [VOID, 0, 149]),
    ("camvid", build_camvid, [0, 10, VOID]),
    ("cityscapes", build_cityscapes, [VOID, 0, 18]),
    ("coco_stuff_10k", build_coco_stuff_10k, [VOID, 0, 11, 170]),
    ("coco_stuff_164k", build_coco_stuff_164k, [VOID, 0, 11, 170]),
    ("folder", build_folder, [0, 1, VOID]),
    ("pascal_context_59", build_pascal_context, [VOID, 0, 58]),
    ("pascal_context_60", build_pascal_context, [0, 1, 59]),
]


@pytest.mark.parametrize(("name", "build", "classes"), SCHEMAS, ids=[schema[0] for schema in SCHEMAS])
def test_every_recipe_reads_its_schema(name, build, classes, tmp_path):
    build(tmp_path)
    recipe = load_recipe(name, data_dir=tmp_path)
    for split in recipe.splits:
        for streaming in (False, True):
            samples = load_split(recipe, split, tmp_path, streaming)
            assert set(samples.column_names) <= {"image", "label", "name"}
            (stored,) = list(samples)
            sample = SampleDecoder(recipe)(stored)
            assert sample.image.shape == (3, *SIZE)
            torch.testing.assert_close(sample.labels[0, : len(classes)], torch.tensor(classes, dtype=torch.uint8))
    training = RecipeDataset(load_split(recipe, recipe.train_on, tmp_path), recipe, training=True)
    assert training[0]["pixel_values"].shape == (3, *recipe.crop_size)


def test_ade20k_in_the_hubs_schema(tmp_path):
    columns, features = image_columns(
        [label_map(0, 150)], "annotation", scene_category=([3], datasets.ClassLabel(num_classes=5))
    )
    for split in ("train", "validation"):
        write_parquet(tmp_path / f"scene_parsing/{split}/0000.parquet", columns, features)
    # A repository is read like a folder of the same files.
    recipe = load_recipe("ade20k", {"dataset": str(tmp_path), "revision": None})
    for streaming in (False, True):
        (stored,) = list(load_split(recipe, "validation", streaming=streaming))
        assert SampleDecoder(recipe)(stored).labels[0, :2].tolist() == [VOID, 149]
    assert len(load_split(recipe, "train", tmp_path)) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_imagenet_in_its_schemas(tmp_path, streaming):
    recipe = load_recipe("imagenet1k", {"crop_size": (32, 32), "resize": 40})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=1000)})
    columns = {"image": [encoded(picture(0), "JPEG")], "label": [999]}
    write_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet", columns, features)
    for wnid in ("n01440764", "n01443537"):
        write(tmp_path / "local" / "train" / wnid / f"{wnid}_1.JPEG", picture(1))
    (stored,) = list(load_split(recipe, "train", tmp_path / "hub", streaming))
    assert SampleDecoder(recipe)(stored).labels == 999
    with pytest.raises(ValueError, match="has 2 folders, of which n01440764, n01443537 are none of the 1000 classes"):
        load_split(recipe, "train", tmp_path / "local", streaming)
    recipe = load_recipe("imagenet1k", {"crop_size": (32, 32), "resize": 40, "class_names": ["tench", "goldfish"]})
    samples = load_split(recipe, "train", tmp_path / "local", streaming)
    assert sorted(SampleDecoder(recipe)(stored).labels for stored in samples) == [0, 1]
    if not streaming:
        batch = collate([RecipeDataset(samples, recipe, training=True)[index] for index in range(2)])
        assert batch["pixel_values"].shape == (2, 3, 32, 32)
        assert batch["labels"].tolist() == [0, 1]


@pytest.mark.parametrize("streaming", [False, True])
def test_imagenets_classes_on_the_hub_are_those_of_the_recipe(tmp_path, streaming):
    """There they are synonyms, two are called crane, and half of them have a single name."""
    recipe = load_recipe("imagenet1k", {"crop_size": (32, 32), "resize": 40})
    names = [name if number % 2 else f"{name}, synonym of {name}" for number, name in recipe.id2label.items()]
    names[0], names[638:640] = "tench, Tinca tinca", ["maillot", "maillot, tank suit"]
    names[134], names[517] = "crane", "crane2"
    labels = [0, 134, 517, 638, 639, 999]
    columns = {"image": [encoded(picture(0), "JPEG")] * len(labels), "label": labels}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    write_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet", columns, datasets.Features(features))
    samples = load_split(recipe, "train", tmp_path / "hub", streaming)
    assert [SampleDecoder(recipe)(stored).labels for stored in samples] == labels
    # In another order their numbers are others.
    features["label"] = datasets.ClassLabel(names=[names[1], names[0], *names[2:]])
    write_parquet(tmp_path / "other" / "data" / "train-00000-of-00001.parquet", columns, datasets.Features(features))
    with pytest.raises(
        ValueError, match=r"has 1000 class names, of which tench, Tinca tinca, .* are none of the 1000"
    ):
        load_split(recipe, "train", tmp_path / "other", streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_class_folders_have_the_numbers_of_the_recipes_classes(tmp_path, streaming):
    """Whatever their alphabetical order, and whichever of them a split lacks."""
    for folder in ("train/cat", "train/dog", "train/fox", "val/dog", "val/fox"):
        write(tmp_path / folder / "1.png", picture(0))
    recipe = load_recipe("imagenet1k", {"crop_size": (32, 32), "resize": 40, "class_names": ["fox", "dog", "cat"]})
    for split, expected in (("train", {"fox": 0, "dog": 1, "cat": 2}), ("validation", {"fox": 0, "dog": 1})):
        samples = load_split(recipe, split, tmp_path, streaming)
        decoded = [SampleDecoder(recipe)(stored) for stored in samples]
        assert sorted(sample.labels for sample in decoded) == sorted(expected.values())
        if not streaming:
            folders = [Path(row["image"]["path"]).parent.name for row in samples.cast_column("image", ENCODED)]
            assert [sample.labels for sample in decoded] == [expected[name] for name in folders]


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_of_a_column_with_names_have_the_numbers_of_the_recipes_classes(tmp_path, streaming):
    """Which a split may lack some of, and each file numbers in an order of its own."""
    recipe = load_recipe("imagenet1k", {"crop_size": (32, 32), "resize": 40, "class_names": ["fox", "dog", "cat"]})
    for split, names in (("train", ["cat", "dog", "fox"]), ("validation", ["dog", "fox"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        columns = {"image": [encoded(picture(0), "JPEG")] * len(names), "label": list(range(len(names)))}
        write_parquet(tmp_path / f"{split}.parquet", columns, features)
        samples = load_split(recipe, split, tmp_path, streaming)
        labels = [SampleDecoder(recipe)(stored).labels for stored in samples]
        assert labels == [recipe.label2id[name] for name in names]
    other = load_recipe("imagenet1k", {"crop_size": (32, 32), "resize": 40, "class_names": ["dog", "wolf", "cat"]})
    with pytest.raises(ValueError, match="has 3 class names, of which fox are none of the 3 classes"):
        load_split(other, "train", tmp_path, streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_that_were_saved_to_disk(tmp_path, set_of_ten, streaming):
    recipe = folder_recipe()
    samples = load_split(recipe, "train", set_of_ten)
    splits = {"train": samples.select(range(7)), "val": samples.select(range(7, 10))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    splits["train"].save_to_disk(tmp_path / "whole")
    for split, key in (("train", "train"), ("validation", "val")):
        found = load_split(recipe, split, tmp_path / "splits", streaming)
        assert [sample["name"] for sample in found] == splits[key]["name"]
    parts = [load_split(recipe, split, tmp_path / "whole", streaming) for split in ("train", "validation")]
    assert sorted(sample["name"] for part in parts for sample in part) == sorted(splits["train"]["name"])
    assert all(list(part) for part in parts)
    with pytest.raises(FileNotFoundError, match="no test split, only train, val: expected test or testing"):
        load_split(recipe, "test", tmp_path / "splits", streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_files_without_samples_are_named(tmp_path, streaming):
    columns, features = {"image": [], "label": []}, datasets.Features({"image": ENCODED, "label": ENCODED})
    write_parquet(tmp_path / "validation.parquet", columns, features)
    with pytest.raises(ValueError, match=r"no sample in .*validation\.parquet"):
        load_split(folder_recipe(), "validation", tmp_path, streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_class_folders_hold_words_for_splits(tmp_path, streaming):
    """As ImageNet's files and a class of trains do; `datasets` would look no further than these."""
    for name in ("train/bus/1.png", "train/train/2.png", "train/car/red_test_3.png"):
        write(tmp_path / name, picture(0))
    write(tmp_path / "val" / "bus" / "ILSVRC2012_val_00000293.png", picture(1))
    recipe = load_recipe("imagenet1k", {"crop_size": (32, 32), "class_names": ["bus", "train", "car"]})
    for split, labels in (("train", [0, 1, 2]), ("validation", [0])):
        samples = load_split(recipe, split, tmp_path, streaming)
        assert sorted(SampleDecoder(recipe)(stored).labels for stored in samples) == labels


def test_class_folders_of_other_names_are_not_guessed_where_one_is_known(tmp_path):
    for folder in ("train/Dog", "train/cat", "train/bird"):
        write(tmp_path / folder / "1.png", picture(0))
    recipe = load_recipe("imagenet1k", {"crop_size": (32, 32), "class_names": ["dog", "cat", "bird"]})
    with pytest.raises(ValueError, match="3 folders, of which Dog are none of the 3 classes"):
        load_split(recipe, "train", tmp_path)
    # Such as WordNet's numbers: all of them unknown, in the order of the classes.
    for number, folder in enumerate(("n01/dog", "n02/cat", "n03/bird")):
        write(tmp_path / "numbers" / "train" / folder.split("/")[0] / "1.png", picture(number))
    samples = load_split(recipe, "train", tmp_path / "numbers")
    assert [SampleDecoder(recipe)(stored).labels for stored in samples] == [0, 1, 2]


@pytest.mark.parametrize("layout", ["classes", "parquet"])
def test_streams_go_to_workers_that_are_not_forked(layout, tmp_path):
    if layout == "classes":
        for folder in ("train/cat", "train/dog"):
            write(tmp_path / folder / "1.png", picture(0))
        options = {"class_names": ["dog", "cat"]}
    else:
        rows = {"image": [picture(index) for index in range(4)], "label": [0, 1, 0, 1]}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "samples.parquet")
        options = {"class_names": ["dog", "cat"], "validation_fraction": 0.5}
    recipe = load_recipe("imagenet1k", {"crop_size": (32, 32), **options})
    samples = load_split(recipe, "train", tmp_path, streaming=True)
    stream = StreamedRecipeDataset(samples, recipe, training=False)
    assert len(list(pickle.loads(pickle.dumps(stream)))) == 2


def test_class_names_of_an_image_classification_folder(tmp_path):
    for name in ("cat", "dog"):
        write(tmp_path / name / "1.png", picture(0))
        write(tmp_path / name / "2.png", picture(1))
    recipe = load_recipe(
        "folder", {"task": "image-classification", "scale_range": [0.1, 1], "validation_fraction": 0.5}
    )
    samples = load_split(recipe, "train", tmp_path)
    assert with_classes_of(recipe, samples).class_names == ("cat", "dog")
    with pytest.raises(ValueError, match="does not know its classes"):
        SampleDecoder(recipe)
    assert with_classes_of(load_recipe("camvid"), samples).num_classes == 11


def test_classes_have_to_be_named(tmp_path):
    write_pairs(tmp_path, ["x", "y"])
    recipe = load_recipe("folder", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"classes\.txt.*--class_names"):
        with_classes_of(recipe, load_split(recipe, "train", tmp_path))


def test_scenes(monkeypatch):
    monkeypatch.setattr(scenes, "load_scenes", functools.partial(scenes.load_scenes, num_test=2))
    recipe = load_recipe("scenes")
    samples = load_split(recipe, "test")
    assert len(samples) == len(list(load_split(recipe, "test", streaming=True))) == 2
    sample = RecipeDataset(samples, recipe)[1]
    assert sample["pixel_values"].shape == (3, *recipe.image_size)
    assert sample["labels"].shape == recipe.image_size


def test_camvid_itself(camvid_dir):
    recipe = load_recipe("camvid")
    assert [len(load_split(recipe, split, camvid_dir)) for split in ("train+validation", "test")] == [468, 233]
    sample = RecipeDataset(load_split(recipe, "test", camvid_dir), recipe)[0]
    assert sample["pixel_values"].shape == (3, 900, 1200)
    assert sample["labels"].shape == (360, 480)
    assert set(sample["labels"].unique().tolist()) <= {*range(11), VOID}


# -------------------------------------------------------------------------------------------------------------------
# Folders and files
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [("images/{}", "masks/{}"), ("{}/images", "{}/masks")])
def test_split_folders(tmp_path, layout):
    for split, names in {"training": ["a", "sub/b"], "val": ["c"]}.items():
        write_pairs(tmp_path, names, *(part.format(split) for part in layout))
    recipe = folder_recipe()
    assert load_split(recipe, "train", tmp_path)["name"] == ["a", "sub/b"]
    assert load_split(recipe, "train+validation", tmp_path)["name"] == ["a", "sub/b", "c"]
    with pytest.raises(FileNotFoundError, match="test split"):
        load_split(recipe, "test", tmp_path)


@pytest.mark.parametrize("kind", ["folder", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_not_split_is_held_out_evenly(tmp_path, kind, streaming):
    names = [f"{index:02}" for index in range(20)]
    if kind == "folder":
        write_pairs(tmp_path, names)
    else:
        columns, features = image_columns([label_map(0, 1)] * 20, name=(names, datasets.Value("string")))
        write_parquet(tmp_path / "everything.parquet", columns, features)
    recipe = folder_recipe()
    train, validation = (
        [row["name"] for row in load_split(recipe, split, tmp_path, streaming)] for split in ("train", "validation")
    )
    assert validation == ["05", "15"]
    assert sorted(train + validation) == names
    with pytest.raises(FileNotFoundError, match="not split"):
        load_split(recipe, "test", tmp_path)


def test_nothing_is_held_out_from_a_stream_of_several_files(tmp_path):
    """They are shuffled and shared out among workers, so that training would see samples of the validation part."""
    columns, features = image_columns([label_map(0, 1)] * 5, name=(list("abcde"), datasets.Value("string")))
    for number in range(2):
        write_parquet(tmp_path / f"part-{number}.parquet", columns, features)
    assert len(load_split(folder_recipe(), "train", tmp_path)) == 9
    with pytest.raises(ValueError, match=r"stream of 2 files .* give the splits as sub-folders or files, or do not"):
        load_split(folder_recipe(), "train", tmp_path, streaming=True)


def test_files_that_the_recipes_patterns_do_not_name(tmp_path):
    columns, features = image_columns([label_map(0, 1)] * 10)
    write_parquet(tmp_path / "everything.parquet", columns, features)
    patterns = {"train": "my-train-*.parquet", "validation": "my-val-*.parquet"}
    recipe = folder_recipe(splits={"train": "train", "validation": "val"}, data_files=patterns)
    assert len(load_split(recipe, "train", tmp_path)) == 9


@pytest.mark.parametrize(
    ("kind", "places"),
    [
        ("parquet", ["default/train", "default/test"]),
        ("parquet", ["camvid_train", "camvid_val"]),
        ("folder", ["Train", "Test"]),
        ("classes", ["Train", "Test"]),
    ],
)
def test_splits_that_are_not_recognised_are_not_trained_on_together(tmp_path, kind, places):
    for place in places:
        if kind == "parquet":
            columns, features = image_columns([label_map(0, 1)] * 10)
            (tmp_path / place).parent.mkdir(exist_ok=True)
            write_parquet(tmp_path / f"{place}{'/0000' * ('/' in place)}.parquet", columns, features)
        else:
            folders = ["images", "masks"] if kind == "folder" else [place]
            for folder in folders:
                below = tmp_path / folder / (place if kind == "folder" else "cat")
                below.mkdir(parents=True)
                for index in range(10):
                    Image.new("L" if folder == "masks" else "RGB", (40, 40)).save(below / f"{index}.png")
    recipe = load_recipe("imagenet1k", {"num_classes": None}) if kind == "classes" else folder_recipe()
    with pytest.raises(FileNotFoundError, match=r"seems to be split \(.*[Tt]rain.* of train"):
        load_split(recipe, "train", tmp_path)


def test_any_fraction_is_held_out(tmp_path):
    write_pairs(tmp_path, [f"{index:02}" for index in range(10)])
    for fraction, expected in ((0.4, 4), (0.3, 3), (0.2, 2), (0.5, 5)):
        recipe = folder_recipe(validation_fraction=fraction)
        train, validation = (load_split(recipe, split, tmp_path)["name"] for split in ("train", "validation"))
        assert len(validation) == expected
        assert len({*train, *validation}) == 10


def test_too_few_samples_to_hold_one_out(tmp_path):
    write_pairs(tmp_path, ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"3 samples .* none is left for validation with validation_fraction 0\.1"):
        load_split(folder_recipe(), "validation", tmp_path)


def test_label_maps_with_an_ending_of_their_own_get_a_hint(tmp_path):
    write_pairs(tmp_path, ["a", "b", "ab"])
    for path in (tmp_path / "masks").iterdir():
        path.rename(path.with_stem(f"{path.stem}_mask"))
    with pytest.raises(ValueError, match=r"3 label maps in .* They end in '_mask': give label_suffix='_mask'\.$"):
        load_split(folder_recipe(), "train", tmp_path)
    assert len(load_split(folder_recipe(label_suffix="_mask", validation_fraction=0.4), "train", tmp_path)) == 2


def test_label_maps_without_image_and_the_reverse_are_listed(tmp_path):
    write_pairs(tmp_path, ["a", "b", "c"])
    (tmp_path / "images" / "b.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 label maps in .*masks have no image: b\."):
        load_split(folder_recipe(), "train", tmp_path)
    (tmp_path / "masks" / "b.png").unlink()
    (tmp_path / "masks" / "c.png").unlink()
    with pytest.raises(ValueError, match=r"1 images in .*images have no label map: c\."):
        load_split(folder_recipe(), "train", tmp_path)


def test_pictures_that_nobody_has_labelled_say_the_way_out(tmp_path):
    write_pairs(tmp_path, ["a", "b"])
    (tmp_path / "masks" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"no label map: b\. Label them, or take them out of the folder\.$"):
        load_split(folder_recipe(), "train", tmp_path)


def test_files_that_are_no_pictures_are_named(tmp_path):
    write_pairs(tmp_path, ["a", "b"])
    for path in (tmp_path / "images").iterdir():
        path.rename(path.with_suffix(".npy"))
    with pytest.raises(ValueError, match=r"no image: a, b\. a\.npy is there, but pictures end in \.avif, "):
        load_split(folder_recipe(), "train", tmp_path)
    for folder, suffix in (("images", ".npy"), ("masks", ".png")):
        for path in (tmp_path / folder).glob(f"*{suffix}"):
            path.rename(path.with_suffix(".png" if suffix == ".npy" else ".npy"))
    with pytest.raises(ValueError, match=r"no label map: a, b\. a\.npy is there, but pictures end in \.avif, "):
        load_split(folder_recipe(), "train", tmp_path)
    for path in (tmp_path / "images").iterdir():
        path.rename(path.with_suffix(".dcm"))
    with pytest.raises(FileNotFoundError, match=r"no images in .*images: pictures end in \.avif, "):
        load_split(folder_recipe(), "train", tmp_path)


def test_pictures_in_jpeg_2000_are_found(tmp_path):
    write_pairs(tmp_path, ["a", "b"])
    for path in (tmp_path / "images").iterdir():
        picture(0).save(path.with_suffix(".jp2"))
        path.unlink()
    samples = load_split(folder_recipe(), "train", tmp_path)
    assert torch.equal(
        SampleDecoder(folder_recipe())(samples[0]).image, torch.from_numpy(np.array(picture(0))).permute(2, 0, 1)
    )


def test_long_lists_of_names_are_shortened(tmp_path):
    write_pairs(tmp_path, [f"{index:02}" for index in range(30)])
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"30 label maps .*00, 01.*09 and 20 more"):
        load_split(folder_recipe(), "train", tmp_path)


def test_two_files_of_one_name(tmp_path):
    write_pairs(tmp_path, ["a"])
    write(tmp_path / "images" / "a.png", picture(0))
    with pytest.raises(ValueError, match="the same name"):
        load_split(folder_recipe(), "train", tmp_path)


def test_listed_samples_that_are_missing(tmp_path):
    build_pascal_context(tmp_path)
    (tmp_path / "ImageSets/SegmentationContext/val.txt").write_text("2008_2\n2008_9\n")
    with pytest.raises(ValueError, match=r"lacks 1 samples of the validation split: 2008_9"):
        load_split(load_recipe("pascal_context_59"), "validation", tmp_path)


def test_missing_folders_splits_and_columns(tmp_path):
    recipe = load_recipe("camvid")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_split(recipe, "train", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="needs a local folder"):
        load_split(recipe, "train")
    with pytest.raises(FileNotFoundError, match=r"looked for parquet files and for the folders images/train"):
        load_split(recipe, "train", tmp_path)
    columns, features = image_columns([label_map(0)], "annotation")
    write_parquet(tmp_path / "train.parquet", columns, features)
    with pytest.raises(FileNotFoundError, match="no parquet file of the test split"):
        load_split(recipe, "test", tmp_path)
    with pytest.raises(ValueError, match="no column label, name, only image, annotation"):
        load_split(recipe, "train", tmp_path)
    with pytest.raises(ValueError, match="ade20k has no test split"):
        load_split(load_recipe("ade20k"), "test", tmp_path)


def test_parquet_written_by_other_tools(tmp_path):
    table = pa.table({"image": [encoded(picture(0))], "label": [encoded(label_map(1))["bytes"]]})
    pq.write_table(table, tmp_path / "train.parquet")
    recipe = folder_recipe()
    for streaming in (False, True):
        (stored,) = list(load_split(recipe, "train", tmp_path, streaming))
        assert SampleDecoder(recipe)(stored).labels.unique().tolist() == [1]


# -------------------------------------------------------------------------------------------------------------------
# Decoding
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "P", "I", "I;16"])
def test_label_maps_of_every_integer_mode(mode):
    values = np.zeros(SIZE, dtype=np.uint8)
    values[:, 10:] = 1
    image = Image.fromarray(values.astype(bool) if mode == "1" else values)
    if mode == "P":
        image.putpalette([9, 9, 9, 200, 0, 0])
    elif mode in ("I", "I;16"):
        image = Image.fromarray(values.astype({"I": np.int32, "I;16": np.uint16}[mode]))
    assert image.mode == mode
    kind = "TIFF" if mode == "I" else "PNG"
    sample = SampleDecoder(folder_recipe())({"image": encoded(picture(0)), "label": encoded(image, kind)})
    np.testing.assert_array_equal(sample.labels.numpy(), values)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_images_of_every_mode(mode):
    grey = np.full(SIZE, 200, dtype=np.uint8)
    image = (
        Image.fromarray(grey.astype(np.uint16) * 256)
        if mode == "I;16"
        else Image.fromarray(grey).convert("RGB" if mode == "CMYK" else "L").convert(mode)
    )
    stored = {"image": encoded(image, "TIFF" if mode == "CMYK" else "PNG"), "label": label_map(0)}
    sample = SampleDecoder(folder_recipe())(stored)
    assert sample.image.shape == (3, *SIZE)
    if mode != "1":
        assert (sample.image.int() - 200).abs().max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "I", "I;16", "I;16 in mode I"])
def test_training_sees_what_the_image_processor_sees(mode, tmp_path):
    ramp = np.tile(np.linspace(0, 255, SIZE[1], dtype=np.uint8), (SIZE[0], 1))
    if mode.startswith("I"):
        values = ramp.astype(np.uint16) * 257 if mode == "I;16" else ramp.astype(np.int32)
        image = Image.fromarray(values * 257 if "in mode I" in mode else values)
    else:
        image = Image.fromarray(ramp).convert(mode)
        if "A" in mode:
            image.putalpha(Image.fromarray(255 - ramp))
    stored = encoded(image, "TIFF" if image.mode == "I" else "PNG")
    (tmp_path / "picture").write_bytes(stored["bytes"])
    processor = LeMoReImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)
    with Image.open(tmp_path / "picture") as file:
        (expected,) = processor(file, return_tensors="np")["pixel_values"]
    sample = SampleDecoder(folder_recipe())({"image": stored, "label": label_map(0)})
    np.testing.assert_array_equal(sample.image.numpy(), expected)
    np.testing.assert_array_equal(np.asarray(to_rgb(read_picture(tmp_path / "picture"))).transpose(2, 0, 1), expected)


def test_exif_orientation_is_applied():
    upright = picture(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned left: to be turned right
    buffer = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=exif)
    stored = {"image": {"bytes": buffer.getvalue(), "path": None}, "label": encoded(label_map(0))}
    sample = SampleDecoder(folder_recipe())(stored)
    np.testing.assert_array_equal(sample.image.permute(1, 2, 0).numpy(), np.asarray(upright))


FLOATS = Image.fromarray(np.full(SIZE, 0.5, dtype=np.float32))
BAD = {
    "unreadable image": ({"bytes": b"no picture", "path": None}, label_map(0), "cannot identify image"),
    "truncated image": (
        {"bytes": encoded(picture(0), "JPEG")["bytes"][:900], "path": None},
        label_map(0),
        "truncated",
    ),
    "missing file": ({"bytes": None, "path": "/nowhere/a.png"}, label_map(0), "No such file"),
    "other size": (picture(0, (40, 49)), label_map(0), "49×40 pixels and the label map 48×40"),
    "out of range": (picture(0), label_map(0, 2, 7), "stored labels 2, 7 are out of range: there are 2 classes"),
    "negative": (picture(0), label_map(-1, 0, mode="I"), r"span -1…0, outside 0…65535"),
    "all void": (picture(0), label_map(VOID), "all its pixels are void"),
    "colours": (picture(0), picture(1), "mode RGB, not one integer class id"),
    "few colours": (
        picture(0),
        Image.merge("RGB", [label_map(0, 0, 9)] * 3),
        r"'road 128 64 128'; it has the colours \(0, 0, 0\), \(9, 9, 9\)",
    ),
    "JPEG": (picture(0), encoded(label_map(0, 1), "JPEG"), "a JPEG, which blends neighbouring labels into others"),
    "JPEG 2000": (picture(0), encoded(label_map(0, 1), "JPEG2000"), "a JPEG 2000, which may blend"),
    "JPEG in TIFF": (
        picture(0),
        encoded(label_map(0, 1), "TIFF", compression="jpeg"),
        "a JPEG, which blends neighbouring labels",
    ),
    "a page for each class": (
        picture(0),
        encoded(label_map(0, 1), "TIFF", save_all=True, append_images=[label_map(1, 0)]),
        "its label map has 2 pages, of which the first alone would be read",
    ),
    "floats just above 1": (
        Image.fromarray(np.full(SIZE, 1.04, dtype=np.float32)),
        label_map(0),
        "Floats of a picture reach 1.0399.*: clip those of .0, 1.",
    ),
    "no integers": (picture(0), FLOATS, "mode F, not one integer class id"),
    "float array": (picture(0), np.full(SIZE, 0.5), "float64, not integers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_samples_are_named(case):
    image, labels, reason = BAD[case]
    with pytest.raises(BadSampleError, match=reason) as caught:
        SampleDecoder(folder_recipe())({"image": image, "label": labels, "name": "frame-7"}, 3)
    assert "Sample 3 ('frame-7')" in str(caught.value)
    assert "check_dataset.py" in str(caught.value)
    assert caught.value.sample == "frame-7"


COLORS = {"a": (128, 0, 0), "b": (0, 128, 255)}
BLACK = (0, 0, 0)


def color_map(*colours: tuple[int, int, int]) -> Image.Image:
    """A map with stripes of the colours given."""
    stripes = np.array(colours, dtype=np.uint8)[np.arange(SIZE[1]) % len(colours)]
    return Image.fromarray(np.broadcast_to(stripes, (*SIZE, 3)).copy())


def color_recipe(**overrides):
    return folder_recipe(**{"label_colors": list(COLORS.values()), "void_colors": [BLACK]} | overrides)


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "P", "parquet", "array"])
def test_label_maps_in_colours(kind, tmp_path):
    """The same labels, however a picture of these colours is stored: the numbers in a table of colours mean nothing."""
    coloured = color_map(COLORS["b"], COLORS["a"], BLACK)
    if kind == "array":
        coloured = np.asarray(coloured)
    elif kind == "parquet":
        write_parquet(tmp_path / "train.parquet", *image_columns([coloured]))
        coloured = load_split(color_recipe(splits={"train": "train"}), "train", tmp_path)[0]["label"]
    elif kind == "P":
        coloured = coloured.quantize(3)
    else:
        coloured = coloured.convert(kind)
    sample = SampleDecoder(color_recipe())({"image": picture(0), "label": coloured})
    np.testing.assert_array_equal(sample.labels.numpy(), np.asarray(label_map(1, 0, VOID)))


def test_grey_label_maps_have_colours_too():
    """Two classes as black and white, which tools store as a mask of 0 and 255."""
    recipe = folder_recipe(label_colors=[BLACK, (255, 255, 255)])
    for mode in ("L", "1"):
        sample = SampleDecoder(recipe)({"image": picture(0), "label": label_map(255, 0).convert(mode)})
        np.testing.assert_array_equal(sample.labels.numpy(), np.asarray(label_map(1, 0)))


def test_colours_are_stored_labels_for_the_other_mappings():
    colours = [BLACK, COLORS["a"], COLORS["b"]]
    coloured = {"image": picture(0), "label": color_map(*colours)}
    reduced = SampleDecoder(folder_recipe(label_colors=colours, reduce_labels=True))(coloured)
    np.testing.assert_array_equal(reduced.labels.numpy(), np.asarray(label_map(VOID, 0, 1)))
    mapped = SampleDecoder(folder_recipe(label_colors=colours, label_map={0: 1, 1: 1}))(coloured)
    np.testing.assert_array_equal(mapped.labels.numpy(), np.asarray(label_map(1, 1, VOID)))


def jpeg_of_colours() -> dict:
    return encoded(color_map(*[COLORS["a"]] * 7, *[COLORS["b"]] * 6), "JPEG")


def smooth_colours() -> Image.Image:
    return color_map(*[COLORS["a"]] * 5, *[COLORS["b"]] * 7).resize((31, 33)).resize(SIZE[::-1])


BAD_COLORS = {
    "unknown": (
        color_map(COLORS["a"], (1, 2, 3)),
        {},
        r"960 of its pixels have colours that are none .*: \(1, 2, 3\)",
    ),
    "void not named": (color_map(COLORS["a"], BLACK), {"void_colors": ()}, r"none of label_colors .*: \(0, 0, 0\)"),
    "JPEG": (jpeg_of_colours(), {}, "a JPEG, which blends neighbouring labels into others: store it as PNG"),
    "blended": (smooth_colours(), {}, "as smooth resizing blends them: resize label maps by nearest neighbour"),
    "numbers": (label_map(0, 1), {"void_colors": ()}, r"\(0, 0, 0\), \(1, 1, 1\)"),
    "transparent": (color_map(COLORS["a"]).convert("RGBA"), {}, "transparent in places"),
    "depth": (label_map(0, 1, mode="I;16"), {}, "mode I;16, not the 8-bit RGB colours that label_colors names"),
    "all void": (color_map(BLACK), {}, "all its pixels are void"),
}


@pytest.mark.parametrize("case", BAD_COLORS)
def test_bad_label_maps_in_colours_are_named(case):
    labels, overrides, reason = BAD_COLORS[case]
    if case == "transparent":
        labels = labels.copy()
        labels.putpixel((3, 4), (*COLORS["a"], 0))
    with pytest.raises(BadSampleError, match=reason):
        SampleDecoder(color_recipe(**overrides))({"image": picture(0), "label": labels})


def test_a_folder_as_roboflow_exports_it(tmp_path):
    """Pictures and masks side by side, the classes of the masks' numbers in a table."""
    for split in ("train", "valid"):
        for index in range(3):
            write(tmp_path / split / f"{index}.jpg", picture(index))
            write(tmp_path / split / f"{index}_mask.png", label_map(0, 2, 1))
        (tmp_path / split / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, cone\n2, box\n")
    with pytest.raises(
        FileNotFoundError, match=r"Here: --image_folder '\{split\}' --label_folder '\{split\}' --label_suffix"
    ):
        load_split(load_recipe("folder", data_dir=tmp_path), "train", tmp_path)
    options = {"image_folder": "{split}", "label_folder": "{split}"}
    recipe = load_recipe("folder", options, tmp_path)
    assert (recipe.class_names, recipe.label_map) == (("background", "cone", "box"), None)
    with pytest.raises(ValueError, match=r"lie in one folder.* give label_suffix"):
        load_split(recipe, "train", tmp_path)
    recipe = recipe.replace(label_suffix="_mask")
    for split in ("train", "validation"):
        dataset = RecipeDataset(load_split(recipe, split, tmp_path), recipe)
        assert len(dataset) == 3
        np.testing.assert_array_equal(dataset[0]["labels"].numpy(), np.asarray(label_map(0, 2, 1)))


def test_a_folder_as_cvat_exports_it(tmp_path):
    """`labelmap.txt` gives names and colours; the folders are those of PASCAL VOC."""
    for index in range(4):
        write(tmp_path / f"JPEGImages/{index}.jpg", picture(index))
        write(tmp_path / f"SegmentationClass/{index}.png", color_map(BLACK, COLORS["b"]))
    (tmp_path / "labelmap.txt").write_text("# label:color_rgb:parts:actions\nbackground:0,0,0::\nb:0,128,255::\n")
    with pytest.raises(FileNotFoundError, match="Here: --image_folder JPEGImages --label_folder SegmentationClass"):
        load_split(load_recipe("folder", data_dir=tmp_path), "train", tmp_path)
    overrides = {"image_folder": "JPEGImages", "label_folder": "SegmentationClass", "validation_fraction": 0.25}
    recipe = load_recipe("folder", overrides, tmp_path)
    dataset = RecipeDataset(load_split(recipe, "train", tmp_path), recipe)
    assert len(dataset) == 3
    np.testing.assert_array_equal(dataset[0]["labels"].numpy(), np.asarray(label_map(0, 1)))


def test_an_export_of_cvat_without_its_pictures(tmp_path):
    write(tmp_path / "SegmentationClass/0.png", color_map(BLACK, COLORS["b"]))
    with pytest.raises(
        FileNotFoundError, match="Here: put the pictures into JPEGImages, then --image_folder JPEGImages"
    ):
        load_split(folder_recipe(), "train", tmp_path)


def test_subsets_of_cvat_are_not_ignored(tmp_path):
    """Its own lists say which pictures are held out, such as whole films."""
    write_pairs(tmp_path, ["a 1", "a 2", "b 1"], "JPEGImages", "SegmentationClass")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "default.txt").write_text("a 1\na 2\nb 1\n")
    folders = {"image_folder": "JPEGImages", "label_folder": "SegmentationClass", "validation_fraction": 0.4}
    assert len(load_split(folder_recipe(**folders), "validation", tmp_path)) == 1
    (lists / "Train.txt").write_text("a 1\na 2\n")
    (lists / "Validation.txt").write_text("b 1\n")
    with pytest.raises(
        FileNotFoundError, match=r"Train\.txt of train.*: give split_file, ImageSets/Segm.*/\{split\}\.txt"
    ):
        load_split(folder_recipe(**folders), "train", tmp_path)
    recipe = folder_recipe(**folders, split_file="ImageSets/Segmentation/{split}.txt")
    assert load_split(recipe, "train", tmp_path)["name"] == ["a 1", "a 2"]
    assert load_split(recipe, "validation", tmp_path)["name"] == ["b 1"]


def test_lists_beside_folders_of_splits_are_not_asked_for(tmp_path):
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split in ("train", "val"):
        write_pairs(tmp_path / split, [f"{split} 1"])
        (lists / f"{split}.txt").write_text(f"{split} 1\n")
    assert load_split(folder_recipe(), "validation", tmp_path)["name"] == ["val 1"]


@pytest.mark.parametrize(
    ("masks", "other"), [("SegmentationClassPNG", "SegmentationClass"), ("SegmentationClass", "Npy")]
)
def test_a_folder_as_labelme_writes_it(tmp_path, masks, other):
    """The masks' folder by the tool's version; beside it the same labels as arrays."""
    for name in ("a", "b"):
        write(tmp_path / "JPEGImages" / f"{name}.jpg", picture(0))
        write(tmp_path / masks / f"{name}.png", label_map(0, 1, VOID))
    (tmp_path / other).mkdir()
    np.save(tmp_path / other / "a.npy", np.asarray(label_map(0, 1)))
    (tmp_path / "class_names.txt").write_text("_background_\nb")
    recipe = load_recipe("folder", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=f"Here: --image_folder JPEGImages --label_folder {masks}\\."):
        load_split(recipe, "train", tmp_path)
    recipe = recipe.replace(image_folder="JPEGImages", label_folder=masks, validation_fraction=0.5)
    assert recipe.class_names == ("_background_", "b")
    assert len(load_split(recipe, "train", tmp_path)) == 1


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        (
            ["a_json/img.png", "a_json/label.png"],
            "has numbered the classes of each picture anew: let .* labelme2voc.py",
        ),
        (["ds0/img/a.png", "ds0/masks_machine/a.png"], r"Here, pictures lie in 'ds0/img', 'ds0/masks_machine'\.$"),
        (["a.png", "id2label.json"], r"Here, pictures lie in '\.'\.$"),
        (
            ["train/a.png", "train/_annotations.coco.json"],
            r"lie in 'train'\. Labels .* JSON alone have to be drawn as masks",
        ),
    ],
)
def test_folders_of_other_layouts_get_a_hint(tmp_path, files, advice):
    for file in files:
        write(tmp_path / file, picture(0)) if file.endswith(".png") else (tmp_path / file).write_text("{}")
    with pytest.raises(FileNotFoundError, match=advice):
        load_split(folder_recipe(), "train", tmp_path)


def test_masks_of_label_studio_get_a_hint(tmp_path):
    write_pairs(tmp_path, ["a"])
    (tmp_path / "masks" / "a.png").rename(tmp_path / "masks" / "task-1-annotation-7-by-1-tag-road-0.png")
    with pytest.raises(ValueError, match=r"1 label maps .* Label Studio writes a mask for each label.*: export COCO"):
        load_split(folder_recipe(), "train", tmp_path)


@pytest.mark.parametrize("kind", ["folders", "parquet", "saved"])
def test_a_train_split_alone_says_how_it_can_be_divided(tmp_path, kind):
    columns, features = image_columns([label_map(0, 1)] * 2)
    if kind == "folders":
        write_pairs(tmp_path / "train", ["a", "b"])
    elif kind == "parquet":
        write_parquet(tmp_path / "train-00000-of-00001.parquet", columns, features)
    else:
        datasets.DatasetDict(train=datasets.Dataset.from_dict(columns, features)).save_to_disk(tmp_path)
    assert len(load_split(folder_recipe(), "train", tmp_path)) == 2
    with pytest.raises(FileNotFoundError, match=r"Of .* a part is held out for it \(validation_fraction\)\.$"):
        load_split(folder_recipe(), "validation", tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        load_split(folder_recipe(), "test", tmp_path)
    assert "held out" not in str(error.value), "for a test there is no such way"


def test_reduced_labels_have_their_own_range():
    decode = SampleDecoder(load_recipe("ade20k"))
    with pytest.raises(BadSampleError, match="151 are out of range: there are 150 classes, reduced by one"):
        decode({"image": picture(0), "label": label_map(150, 151)})
    with pytest.raises(BadSampleError, match="void"):
        decode({"image": picture(0), "label": label_map(0)})


def test_all_void_can_be_allowed():
    sample = SampleDecoder(folder_recipe(allow_all_void=True))({"image": picture(0), "label": label_map(VOID)})
    assert (sample.labels == VOID).all()


@pytest.mark.parametrize("label", [2, -1, 1.0, True, None, "c"])
def test_bad_class_ids(label):
    recipe = folder_recipe(task="image-classification", scale_range=[0.1, 1])
    assert SampleDecoder(recipe)({"image": picture(0), "label": "b"}).labels == 1
    with pytest.raises(BadSampleError, match="none of the 2 classes"):
        SampleDecoder(recipe)({"image": picture(0), "label": label})


def test_bad_sample_keeps_its_name_across_worker_processes():
    samples = datasets.Dataset.from_dict(
        {"image": [encoded(picture(0))], "label": [encoded(label_map(5))], "name": ["frame-7"]}
    )
    samples = samples.cast_column("image", datasets.Image()).cast_column("label", datasets.Image())
    loader = DataLoader(RecipeDataset(samples, folder_recipe()), num_workers=1, collate_fn=collate)
    with pytest.raises(BadSampleError, match=r"Sample 0 \('frame-7'\).*stored labels 5"):
        next(iter(loader))


def test_sample_names():
    assert sample_name({"name": "a", "image": {"path": "/x/b.png"}}, 3) == "a"
    assert sample_name({"image": {"path": "/x/b.png"}}, 3) == "b.png"
    assert sample_name({"image": {"path": None}}, 3) == "3"


# -------------------------------------------------------------------------------------------------------------------
# Order, determinism, resuming
# -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def set_of_ten(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ten")
    names = [f"frame-{index}" for index in range(10)]
    columns, features = image_columns([label_map(0, 1)] * 10, name=(names, datasets.Value("string")))
    for shard in range(5):
        part = {name: values[2 * shard : 2 * shard + 2] for name, values in columns.items()}
        write_parquet(folder / f"train-{shard:05}-of-00005.parquet", part, features)
    return folder


def batches(loader) -> list[tuple]:
    return [
        (batch["name"], batch["pixel_values"].numpy().tobytes(), batch["labels"].numpy().tobytes()) for batch in loader
    ]


def test_same_batches_whatever_the_workers_the_cache_and_the_start(set_of_ten):
    recipe = folder_recipe()
    samples = load_split(recipe, "train", set_of_ten)

    def run(num_workers: int = 0, cache: str | None = None, start: int = 0, seed: int = 0) -> list[tuple]:
        dataset = RecipeDataset(samples, recipe, training=True, seed=seed, cache=cache)
        sampler = EpochSampler(len(dataset), seed=seed, start=start, stop=24)
        return batches(
            DataLoader(
                dataset,
                4,
                sampler=sampler,
                collate_fn=collate,
                num_workers=num_workers,
                persistent_workers=num_workers > 0,
            )
        )

    reference = run()
    assert len(reference) == 6
    assert run(num_workers=2) == reference
    assert run(cache="memory") == reference
    assert run(num_workers=2, cache="memory", start=12) == reference[3:]
    assert run(seed=1) != reference


def test_samples_cached_on_a_device_are_those_that_are_not(set_of_ten):
    recipe = folder_recipe()
    samples = load_split(recipe, "train", set_of_ten)
    plain = RecipeDataset(samples, recipe, training=True, seed=5)
    cached = RecipeDataset(samples, recipe, training=True, seed=5, cache="device", device=torch.device("cpu"))
    looks = set()
    for epoch, index in itertools.product(range(3), range(10)):
        expected, sample = plain[epoch, index], cached[epoch, index]
        assert torch.equal(sample["labels"], expected["labels"])
        assert (sample["index"], sample["name"]) == (expected["index"], expected["name"])
        # Resizing may round otherwise, since the cache has another memory layout.
        difference = (sample["pixel_values"].int() - expected["pixel_values"].int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 0.01
        looks.add(sample["pixel_values"].numpy().tobytes())
    assert len(looks) == 30


def test_sampler_visits_everything_once_an_epoch_anew():
    pairs = list(EpochSampler(7, seed=3, stop=21))
    for epoch in range(3):
        part = pairs[7 * epoch : 7 * epoch + 7]
        assert [number for number, _ in part] == [epoch] * 7
        assert sorted(index for _, index in part) == list(range(7))
    assert len({tuple(index for _, index in pairs[start : start + 7]) for start in (0, 7, 14)}) == 3
    assert list(EpochSampler(7, seed=3, start=10, stop=21)) == pairs[10:]
    ranks = [list(EpochSampler(7, seed=3, start=4, stop=21, rank=rank, world_size=2)) for rank in (0, 1)]
    assert ranks == [pairs[4::2], pairs[5::2]]
    with pytest.raises(ValueError, match="empty"):
        EpochSampler(0)


def test_evaluation_keeps_the_labels_size(set_of_ten):
    recipe = folder_recipe(resize=(64, 64))
    sample = RecipeDataset(load_split(recipe, "train", set_of_ten), recipe)[3]
    assert sample["pixel_values"].shape == (3, 64, 64)
    assert sample["labels"].shape == SIZE
    assert sample["name"] == "frame-3"


def test_batches_of_different_sizes_are_refused():
    sample = {"pixel_values": torch.zeros(3, 4, 4), "labels": torch.zeros(4, 4), "index": 0, "name": "a"}
    other = {**sample, "pixel_values": torch.zeros(3, 4, 5)}
    with pytest.raises(ValueError, match=r"differ in size.*eval_batch_size 1"):
        collate([sample, other])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streams_are_shared_out_among_processes_and_workers(set_of_ten, num_workers):
    recipe = folder_recipe()
    seen = []
    for rank in (0, 1):
        stream = StreamedRecipeDataset(
            load_split(recipe, "train", set_of_ten, streaming=True), recipe, rank=rank, world_size=2
        )
        loader = DataLoader(stream, 2, collate_fn=collate, num_workers=min(num_workers, stream.max_workers))
        seen += [name for batch in loader for name in batch["name"]]
    assert sorted(seen) == sorted(f"frame-{index}" for index in range(10))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streamed_training_repeats_reproducibly_and_resumes(set_of_ten, num_workers):
    recipe = folder_recipe(shuffle_buffer_size=4)

    def run(start: int = 0, batch_size: int = 4) -> list[tuple]:
        samples = load_split(recipe, "train", set_of_ten, streaming=True)
        stream = StreamedRecipeDataset(samples, recipe, training=True, batch_size=batch_size, start=start)
        loader = DataLoader(stream, batch_size, collate_fn=collate, num_workers=num_workers)
        taken = [batch for _, batch in zip(range(8), loader, strict=False)]
        assert [batch is None for batch in taken] == [index < start for index in range(8)]
        return batches(taken[start:])

    reference = run()
    assert len(reference) == 8  # 32 samples of a set of 10: several epochs
    assert run() == reference
    assert run(start=5) == reference[5:]


def test_a_streamed_training_is_shuffled_and_augmented_anew_each_epoch(set_of_ten):
    recipe = folder_recipe(shuffle_buffer_size=4)
    stream = load_split(recipe, "train", set_of_ten, streaming=True)
    seen = list(itertools.islice(StreamedRecipeDataset(stream, recipe, training=True), 30))
    stored = [f"frame-{index}" for index in range(10)]
    epochs = [[sample["name"] for sample in seen[start : start + 10]] for start in (0, 10, 20)]
    assert all(sorted(epoch) == stored for epoch in epochs)
    assert len({*map(tuple, epochs), tuple(stored)}) == 4
    assert len({sample["pixel_values"].numpy().tobytes() for sample in seen}) == 30


def test_streamed_augmentation_depends_on_image_and_epoch_alone(set_of_ten):
    recipe = folder_recipe()
    stream = load_split(recipe, "train", set_of_ten, streaming=True)

    def first_epoch(**process) -> dict[str, bytes]:
        dataset = StreamedRecipeDataset(stream, recipe, training=True, **process)
        share = 10 // process.get("world_size", 1)
        return {s["name"]: s["pixel_values"].numpy().tobytes() for _, s in zip(range(share), dataset, strict=False)}

    alone = first_epoch()
    half = first_epoch(rank=1, world_size=2)
    assert len(alone) == 10
    assert half
    assert all(alone[name] == pixels for name, pixels in half.items())


def test_streamed_augmentation_is_that_of_a_folder_wherever_it_lies(tmp_path):
    seen = []
    for place in ("here", "there"):
        for split in ("train", "validation"):
            write_pairs(tmp_path / place / split, [f"frame-{number}" for number in range(4)])
        recipe = folder_recipe()
        stream = load_split(recipe, "train", tmp_path / place, streaming=True)
        dataset = StreamedRecipeDataset(stream, recipe, training=True)
        seen.append(torch.stack([sample["pixel_values"] for sample in itertools.islice(dataset, 8)]))
    assert torch.equal(*seen)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are sent the data set")
def test_workers_inherit_what_is_kept_in_memory(tmp_path):
    """Where Python would send it (its default from 3.14 on), each picture would take file descriptors."""
    code = """
import multiprocessing, resource, torch
from torch.utils.data import DataLoader
from lemore_hf.data.loading import inheriting_workers

class Cached(torch.utils.data.Dataset):
    pictures = None
    def __init__(self): self.pictures = [torch.full((2,), index) for index in range(200)]
    def __len__(self): return len(self.pictures)
    def __getitem__(self, index): return self.pictures[index]

multiprocessing.set_start_method("forkserver")
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
loader = DataLoader(Cached(), 50, num_workers=1, multiprocessing_context=inheriting_workers(1))
print(sum(int(batch.sum()) for batch in loader))
"""
    script = tmp_path / "load.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.stdout.strip() == str(2 * sum(range(200))), done.stderr


def test_a_hub_data_set_is_read_at_the_recipes_revision(monkeypatch):
    asked = {}

    def load(*names, **kwargs):
        asked.update(kwargs, names=names)
        raise OSError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load)
    recipe = load_recipe("ade20k", {"dataset_config": "full", "revision": "abc"})
    with pytest.raises(OSError, match="offline"):
        load_split(recipe, "validation")
    assert (asked["names"], asked["revision"]) == ((recipe.dataset, "full"), "abc")


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("'x/y' is a gated dataset on the Hub."),
            FileNotFoundError,
            "accept them at https://huggingface.co/datasets/x/y and log in with 'hf auth login'",
        ),
        (
            ConnectionError("Couldn't reach 'x/y' on the Hub"),
            ConnectionError,
            "hf download x/y --repo-type dataset --revision abc --include 'scene_parsing/train/\\*.parquet' --include",
        ),
        (
            ValueError("Couldn't find cache for x/y for config 'default-1'"),
            ConnectionError,
            "--data_dir DIR; .* download",
        ),
        (RuntimeError("Dataset scripts are no longer supported, but found y.py"), ValueError, "refs/convert/parquet"),
        (OSError(28, "No space left on device"), OSError, "No space left on device: .* HF_HOME"),
        (ValueError("Unknown split"), ValueError, "^Unknown split$"),
        (OSError("something else"), OSError, "^something else$"),
    ],
    ids=["gated", "no_network", "not_in_the_cache", "program", "full_disk", "other_value", "other_system"],
)
def test_what_the_hub_does_not_give_has_a_way_out(monkeypatch, error, kind, says):
    def load(*names, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    recipe = load_recipe("ade20k", {"dataset": "x/y", "revision": "abc"})
    with pytest.raises(kind, match=says):
        load_split(recipe, "train")


def test_a_disk_that_fills_while_files_are_decoded_is_named(tmp_path, monkeypatch):
    """`datasets` says no more of it than that a data set could not be generated."""

    def load(*names, **kwargs):
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from OSError(28, "No space left")

    columns, features = image_columns([label_map(0, 1)])
    write_parquet(tmp_path / "train.parquet", columns, features)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(OSError, match=r"No space left: .* --streaming"):
        load_split(folder_recipe(), "train", tmp_path)


def test_files_with_other_columns_than_their_neighbours_are_told_why(tmp_path):
    columns, features = image_columns([label_map(0, 1)])
    write_parquet(tmp_path / "train" / "0.parquet", columns, features)
    write_parquet(tmp_path / "train" / "1.parquet", {"image": columns["image"], "other": [1]})
    with pytest.raises(ValueError, match=r"(?s)cannot be read: .*column names don't match"):
        load_split(folder_recipe(), "train", tmp_path)


@pytest.mark.parametrize("kind", ["damaged", "folder", "pipe"])
def test_parquet_that_cannot_be_read_is_named(tmp_path, kind):
    path = tmp_path / "train.parquet"
    if kind == "damaged":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif kind == "folder":
        path.mkdir()
    elif hasattr(os, "mkfifo"):
        os.mkfifo(path)
    with pytest.raises(ValueError, match=r"train\.parquet cannot be read as parquet"):
        load_split(load_recipe("camvid"), "train", tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_file_name_that_is_no_text_is_named(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        with open(os.fsencode(tmp_path / folder) + b"/stra\xdfe.png", "wb") as file:
            picture(0).save(file, "PNG")
    with pytest.raises(ValueError, match=r"file name '.*stra\\udcdfe\.png' is not in UTF-8: rename it"):
        load_split(load_recipe("folder", {"class_names": ["a", "b"]}), "train", tmp_path)
