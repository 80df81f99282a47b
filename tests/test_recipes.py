# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Recipes: complete and consistent ones are shipped, wrong ones are refused by name, every field can be overridden."""

import argparse
import json
import re
import shlex

import pytest
import yaml

from lemore_hf.data import scenes
from lemore_hf.data.recipes import (
    ALL_FIELDS,
    EVALUATION_FIELDS,
    IGNORE_INDEX,
    TRAINING_FIELDS,
    Recipe,
    add_recipe_arguments,
    load_recipe,
    recipe_names,
    recipe_overrides,
    split_names,
)

# Name, number of classes, and some classes by index in the benchmark's own order.
BENCHMARKS = {
    "ade20k": (150, {0: "wall", 12: "person", 20: "car", 130: "screen", 149: "flag"}),
    "camvid": (11, {0: "sky", 3: "road", 10: "bicyclist"}),
    "cityscapes": (19, {0: "road", 11: "person", 13: "car", 18: "bicycle"}),
    "coco_stuff_10k": (171, {0: "person", 11: "stop sign", 79: "toothbrush", 80: "banner", 170: "wood"}),
    "coco_stuff_164k": (171, {0: "person", 11: "stop sign", 79: "toothbrush", 80: "banner", 170: "wood"}),
    "imagenet1k": (1000, {0: "tench", 207: "golden retriever", 281: "tabby", 817: "sports car", 999: "toilet tissue"}),
    "pascal_context_59": (59, {0: "aeroplane", 36: "person", 58: "wood"}),
    "pascal_context_60": (60, {0: "background", 1: "aeroplane", 37: "person", 59: "wood"}),
}
PAPER = {
    "ade20k": (33.5, 3e-4, 160_000),
    "cityscapes": (65.0, 3e-4, 80_000),
    "coco_stuff_10k": (27.19, 1.2e-4, 80_000),
    "pascal_context_59": (35.76, 1.2e-4, 80_000),
    "pascal_context_60": (31.48, 1.2e-4, 80_000),
}
# Category ids of 1…182 that COCO-Stuff leaves out.
COCO_ABSENT = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}


def test_every_shipped_recipe_is_covered():
    assert set(recipe_names()) == {*BENCHMARKS, "folder", "scenes"}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_class_lists_are_complete_and_in_the_benchmarks_order(name):
    recipe = load_recipe(name)
    count, classes = BENCHMARKS[name]
    assert recipe.num_classes == len(recipe.class_names) == len(set(recipe.class_names)) == count
    assert {index: recipe.class_names[index] for index in classes} == classes
    assert recipe.id2label[count - 1] == recipe.class_names[-1]
    assert recipe.label2id[recipe.class_names[-1]] == count - 1
    if recipe.task == "semantic-segmentation":
        assert len(recipe.palette) == count


@pytest.mark.parametrize("name", PAPER)
def test_schedules_and_the_papers_figures(name):
    recipe = load_recipe(name)
    assert (recipe.paper_mean_iou, recipe.learning_rate, recipe.max_steps) == PAPER[name]
    assert (recipe.batch_size, recipe.warmup_steps, recipe.weight_decay, recipe.head_lr_multiplier) == (
        16,
        1500,
        0.01,
        10,
    )
    assert recipe.scale_range == (0.5, 2.0)
    assert recipe.max_class_share == 0.75
    assert recipe.status == "not run"


@pytest.mark.parametrize(("name", "shift"), [("coco_stuff_10k", 0), ("coco_stuff_164k", 1)])
def test_coco_stuff_maps_every_category_that_occurs(name, shift):
    label_map = load_recipe(name).label_map
    assert set(label_map) == {category - shift for category in set(range(1, 183)) - COCO_ABSENT}
    # Ids ascend, and so do the classes: the list has the order of the ids.
    assert [label_map[stored] for stored in sorted(label_map)] == list(range(171))


def test_cityscapes_maps_the_19_evaluated_ids():
    recipe = load_recipe("cityscapes")
    assert sorted(recipe.label_map.values()) == list(range(19))
    raw = {"road": 7, "pole": 17, "person": 24, "train": 31, "bicycle": 33}
    assert {name: {v: k for k, v in recipe.label_map.items()}[recipe.label2id[name]] for name in raw} == raw


def test_scenes_recipe_agrees_with_the_generator():
    recipe = load_recipe("scenes")
    assert recipe.class_names == tuple(scenes.CLASS_NAMES)
    assert recipe.palette == tuple(scenes.PALETTE)


@pytest.mark.parametrize("name", ["camvid", "coco_stuff_164k", "imagenet1k", "folder"])
def test_round_trip_through_plain_values(name):
    recipe = load_recipe(name)
    assert Recipe(**yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe
    # JSON turns the keys of label_map into text.
    assert Recipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.replace(max_steps=7).max_steps == 7


def test_overrides_from_the_command_line():
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe")
    add_recipe_arguments(parser)
    line = """--max_steps 100 --learning_rate 1e-3 --crop_size 360 480 --resize 512 --flip_prob 0 --freeze_batch_norm
        --class_names road "traffic sign" --label_map "{7: 0, 8: 1}" --class_weights 1 2.5 --ema_decay none
        --model_config "{views: [transverse], dilation: 3}" --train_on train+validation --scale_range 0.75 1.25"""
    recipe = load_recipe("camvid", recipe_overrides(parser.parse_args(shlex.split(line))))
    assert (recipe.max_steps, recipe.learning_rate, recipe.flip_prob) == (100, 1e-3, 0.0)
    assert (recipe.crop_size, recipe.resize, recipe.scale_range) == ((360, 480), 512, (0.75, 1.25))
    assert recipe.freeze_batch_norm is True
    assert recipe.ema_decay is None
    assert (recipe.class_names, recipe.num_classes, recipe.palette) == (("road", "traffic sign"), 2, None)
    assert recipe.label_map == {7: 0, 8: 1}
    assert recipe.class_weights == (1.0, 2.5)
    assert recipe.model_config == {"views": ["transverse"], "dilation": 3}
    assert recipe.train_on == "train+validation"


def test_a_command_line_without_overrides_changes_nothing():
    parser = argparse.ArgumentParser()
    add_recipe_arguments(parser)
    assert recipe_overrides(parser.parse_args([])) == {}


@pytest.mark.parametrize("fields", [None, EVALUATION_FIELDS])
def test_every_field_that_has_an_effect_has_an_option_with_its_documentation(fields):
    parser = argparse.ArgumentParser()
    add_recipe_arguments(parser, fields)
    text = parser.format_help()
    missing = {field for field in load_recipe("camvid").to_dict() if f"--{field} " not in text}
    descriptive = {"name", "status", "notes", "paper_mean_iou"}
    assert missing == (descriptive if fields is None else descriptive | (ALL_FIELDS - EVALUATION_FIELDS))
    assert all(action.help for action in parser._actions)


def test_what_evaluation_looks_at_is_not_of_training_alone():
    assert {
        "scale_range",
        "cutmix_alpha",
        "max_steps",
        "learning_rate",
        "lovasz_weight",
        "loss_stride",
    } <= TRAINING_FIELDS
    kept = {
        "resize",
        "image_size",
        "crop_size",
        "image_mean",
        "eval_batch_size",
        "label_map",
        "class_names",
        "data_files",
    }
    assert not kept & TRAINING_FIELDS
    assert kept <= EVALUATION_FIELDS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("loss_stride", 2), ("lovasz_stride", 4), ("max_class_share", 0.5)),
        *(("class_weight_power", 0.5), ("ohem_min_kept", 5)),
    ],
)
def test_numbers_of_segmentation_are_refused_in_classification(field, value):
    with pytest.raises(ValueError, match=f"{field} has no effect in image-classification"):
        load_recipe("imagenet1k", {"class_names": ["a", "b"], field: value})


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"max_step": 5}, ValueError, r"unknown field 'max_step' \(did you mean 'max_steps'\?\)"),
        ({"num_classes": 12}, ValueError, "num_classes is 12, but class_names lists 11"),
        ({"class_names": ["crack"], "palette": None}, ValueError, "num_classes is 1, .* name the background"),
        ({"class_names": ["a", "b", "a"]}, ValueError, r"class_names must differ.*\['a'\]"),
        ({"palette": [[0, 0, 0]]}, ValueError, "palette has 1 colours for 11 classes"),
        ({"label_colors": [[0, 0, 0]]}, ValueError, "label_colors has 1 colours for 11 classes"),
        ({"void_colors": [[0, 0, 0]]}, ValueError, "void_colors has no effect without label_colors"),
        (
            {"class_names": ["a", "b"], "label_colors": [[0, 0, 0], [9, 0, 0]], "void_colors": [[9, 0, 0]]},
            ValueError,
            r"must differ from each other, but \[\(9, 0, 0\)\] occur twice",
        ),
        (
            {"class_names": ["a", "b"], "label_colors": [[0, 0, 0], [9, 0, 0]], "reduce_labels": True},
            ValueError,
            "label_colors has 2 colours for 2 classes and void, which reduce_labels puts first",
        ),
        (
            {"class_names": ["a", "b"], "label_colors": [[0, 0, 0], [9, 0, 0]], "label_map": {1: 0, 2: 1}},
            ValueError,
            r"label_map has the stored labels \[2\], label_colors 2 colours",
        ),
        (
            {"class_names": ["a", "b"], "label_colors": [[0, 0, 0], [9, 0, 256]]},
            ValueError,
            "label_colors must hold RGB",
        ),
        ({"crop_size": [360, 480, 3]}, TypeError, "crop_size must be 2 values of int"),
        ({"crop_size": [16, 480]}, ValueError, "crop_size must be at least 32"),
        ({"max_steps": "many"}, TypeError, "max_steps must be int, got 'many'"),
        ({"max_steps": 1.5}, TypeError, "max_steps must be int"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"max_steps": -1}, ValueError, "max_steps must be at least 0"),
        ({"learning_rate": -1}, ValueError, "learning_rate must be positive, got -1"),
        ({"learning_rate": 0}, ValueError, "learning_rate must be positive, got 0"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate must be finite"),
        ({"optimizer": "sgd"}, ValueError, "optimizer must be 'adamw' or 'muon', got 'sgd'"),
        ({"max_grad_norm": 0}, ValueError, "max_grad_norm must be positive, or none"),
        ({"image_mean": [123.675, 116.28, 103.53]}, ValueError, "image_mean and image_std are of values in 0…1"),
        ({"image_std": [0.2, 0.2, 0.0]}, ValueError, "image_mean and image_std are of values in 0…1"),
        ({"flip_prob": 1.5}, ValueError, "flip_prob must be in 0.0…1.0"),
        ({"scale_range": [2.0, 0.5]}, ValueError, "scale_range must be"),
        ({"task": "detection"}, ValueError, "task must be 'semantic-segmentation' or"),
        ({"label_map": {7: 11}}, ValueError, "label_map sends 7 to 11"),
        ({"label_map": {1: 0}, "reduce_labels": True}, ValueError, "reduce_labels and label_map exclude"),
        ({"class_weights": [1.0, 2.0]}, ValueError, "class_weights has 2 weights for 11 classes"),
        ({"class_weights": "inverse"}, TypeError, "class_weights must be 'median_frequency' or"),
        ({"splits": {"validation": "val"}}, ValueError, "at least the train split"),
        ({"splits": {"train": "train", "dev": "dev"}}, ValueError, r"unknown splits \['dev'\]"),
        ({"train_on": "train+train"}, ValueError, "train_on must be"),
        ({"max_longest_edge": 2048}, ValueError, "max_longest_edge needs resize"),
        ({"mix_prob": 0.5}, ValueError, "nothing is mixed"),
        ({"mix_until": 0.9}, ValueError, r"mix_until is 0\.9, but nothing is mixed"),
        ({"classmix": True, "mix_until": 600}, ValueError, "mix_until must be in 0.0…1.0, got 600"),
        ({"noise": 0.04, "photometric_prob": 0}, ValueError, r"noise is 0\.04, .* photometric_prob is 0"),
        ({"cutmix_alpha": 1, "mix_prob": 1.5}, ValueError, r"mix_prob must be in 0.0…1.0, got 1.5"),
        ({"split_file": "train.txt"}, ValueError, "split_file must hold"),
        ({"class_names": [f"class {i}" for i in range(256)]}, ValueError, "at most 255"),
        ({"mixup_alpha": 0.2}, ValueError, "mixup_alpha has no effect in semantic-segmentation"),
        (
            {"model_config": {"drop_view_rat": 0.3}},
            ValueError,
            r"field 'drop_view_rat' \(did you mean 'drop_view_rate'\?\)",
        ),
        ({"model_config": {"num_labels": 5}}, ValueError, "model_config has the field 'num_labels'"),
        ({"model_config": {"image_size": 64}}, ValueError, "model_config has the field 'image_size'"),
        (
            {"task": "image-classification", "scale_range": [0.1, 1.0]},
            ValueError,
            "class_weights has no effect in image-classification",
        ),
        (
            {"class_weights": None, "class_weight_power": "0.5"},
            ValueError,
            "class_weight_power has no effect while class_w",
        ),
        ({"ohem_min_kept": 5000}, ValueError, "ohem_min_kept has no effect while ohem_threshold is None"),
        (["lovasz_weight=0", "lovasz_stride=2"], ValueError, "lovasz_stride has no effect while lovasz_weight is 0"),
        ({"photometric_prob": 0, "hue": 0.1}, ValueError, "hue has no effect while photometric_prob is 0"),
        (["max_steps"], ValueError, '"field=value"'),
    ],
)
def test_wrong_values_are_refused_by_name(overrides, error, message):
    with pytest.raises(error, match=message):
        load_recipe("camvid", overrides)


def test_a_part_is_switched_off_with_the_settings_that_a_recipe_has_for_it():
    recipe = load_recipe("camvid", {"class_weights": "none", "lovasz_weight": 0, "photometric_prob": 0, "hue": 0})
    assert (recipe.class_weights, recipe.class_weight_power, recipe.lovasz_stride) == (None, 0.25, 4)
    assert load_recipe("camvid", {"lovasz_weight": 0, "lovasz_stride": 1}).lovasz_stride == 1


def test_unknown_recipes_name_the_nearest(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'cityscape' \(did you mean 'cityscapes'\?\)"):
        load_recipe("cityscape")
    with pytest.raises(FileNotFoundError, match="no recipe file"):
        load_recipe(tmp_path / "mine.yaml")


def test_recipe_by_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("class_names: [floor, wall]\nlearning_rate: 3e-4\nlabel_map: {10: 0, 20: 1, 30: 255}\n")
    recipe = load_recipe(path, ["max_steps=12"])
    assert (recipe.name, recipe.num_classes, recipe.learning_rate, recipe.max_steps) == ("mine", 2, 3e-4, 12)
    assert recipe.label_map == {10: 0, 20: 1, 30: IGNORE_INDEX}


@pytest.mark.parametrize("text", ["- a list", "a: [unclosed", ""])
def test_files_that_are_no_recipe(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml"):
        load_recipe(path)


def test_classes_of_a_local_folder(tmp_path):
    assert load_recipe("folder", data_dir=tmp_path).num_classes is None
    (tmp_path / "id2label.json").write_text('{"1": "wall", "0": "floor"}')
    assert load_recipe("folder", data_dir=tmp_path).class_names == ("floor", "wall")
    (tmp_path / "classes.txt").write_text("sky\nroad\n\ncar\n")
    assert load_recipe("folder", data_dir=tmp_path).class_names == ("sky", "road", "car")
    assert load_recipe("folder", {"class_names": ["x", "y"]}, data_dir=tmp_path).class_names == ("x", "y")
    assert load_recipe("camvid", data_dir=tmp_path).num_classes == 11
    (tmp_path / "classes.txt").unlink()
    for text in ('{"1": "wall", "2": "floor"}', '["wall", "floor"]', '{"wall": 0}', '{"00": "wall"}', "{"):
        (tmp_path / "id2label.json").write_text(text)
        with pytest.raises(ValueError, match=r"id2label\.json must be .* from 0 without gaps"):
            load_recipe("folder", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("classes.txt", "void 0 0 0\nsky 128 128 128\n\nlane 2\t0 128 255\n"),
        ("classes.txt", "sky #808080\nlane 2 #0080ff\nvoid #000000\n"),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nsky:128,128,128::\nlane 2:0,128,255::\nVoid:0,0,0::\n"),
    ],
)
def test_classes_of_a_local_folder_with_colours(tmp_path, file, text):
    (tmp_path / file).write_text(text)
    recipe = load_recipe("folder", data_dir=tmp_path)
    assert recipe.class_names == ("sky", "lane 2")
    assert recipe.label_colors == recipe.palette == ((128, 128, 128), (0, 128, 255))
    assert recipe.void_colors == ((0, 0, 0),)
    assert load_recipe("folder", {"palette": [[1, 1, 1], [2, 2, 2]]}, tmp_path).palette == ((1, 1, 1), (2, 2, 2))
    assert load_recipe("folder", {"class_names": ["x", "y", "z"]}, tmp_path).label_colors is None
    assert recipe.replace(class_names=["x", "y", "z"]).label_colors is None
    assert recipe.replace(void_colors=[[9, 9, 9]]).label_colors == recipe.label_colors
    assert recipe.replace(label_colors=[[1, 1, 1], [2, 2, 2]]).palette == ((1, 1, 1), (2, 2, 2))


def test_classes_of_a_table_with_their_numbers(tmp_path):
    (tmp_path / "train").mkdir()
    table = tmp_path / "train" / "_classes.csv"
    table.write_text("Pixel Value, Class\n1, cone\n5, box\n")
    recipe = load_recipe("folder", data_dir=tmp_path)
    assert (recipe.class_names, recipe.label_map) == (("cone", "box"), {1: 0, 5: 1})
    for content in ("Pixel Value, Class\ncone, 1\n", "Pixel Value, Class\n", ""):
        table.write_text(content)
        with pytest.raises(
            ValueError, match=r"_classes\.csv must have the lines 'Pixel Value, Class', '0, background'"
        ):
            load_recipe("folder", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [("classes.txt", "sky 1 2 3\nroad\n", "'road'"), ("labelmap.txt", "sky:1,2,3::\nroad\n", "'road'")],
)
def test_a_class_without_its_colour_is_named(tmp_path, file, text, line):
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=rf"{file}: the line {line} has no colour, where others have one"):
        load_recipe("folder", data_dir=tmp_path)


def test_numbers_in_class_names_are_no_colours(tmp_path):
    (tmp_path / "classes.txt").write_text("lane 1\nlane  2\n")
    recipe = load_recipe("folder", data_dir=tmp_path)
    assert (recipe.class_names, recipe.label_colors) == (("lane 1", "lane  2"), None)


def test_the_void_of_labelme_has_no_number(tmp_path):
    (tmp_path / "classes.txt").write_text("__ignore__\n_background_\nroad\n")
    assert load_recipe("folder", data_dir=tmp_path).class_names == ("_background_", "road")


def test_ones_own_class_names_come_before_those_of_labelme(tmp_path):
    (tmp_path / "class_names.txt").write_bytes(b"\xef\xbb\xbf__ignore__\r\n_background_\r\nroad\r\n")
    assert load_recipe("folder", data_dir=tmp_path).class_names == ("_background_", "road")
    (tmp_path / "classes.txt").write_text("floor\nwall\n")
    assert load_recipe("folder", data_dir=tmp_path).class_names == ("floor", "wall")


def test_class_names_as_windows_saves_them_and_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "classes.txt").write_text("sky\r\nroad\r\n", encoding="utf-8-sig")
    assert load_recipe("folder", data_dir="~/data").class_names == ("sky", "road")


def test_short_runs_shorten_the_warm_up():
    assert load_recipe("camvid", {"max_steps": 20}).warmup_steps < 20
    assert load_recipe("camvid", {"max_steps": 20, "warmup_steps": 5}).warmup_steps == 5
    # A run at a constant rate may be gone on with, as one that was longer from the start.
    assert load_recipe("camvid", {"max_steps": 20, "poly_power": 0}).warmup_steps == 300


def test_a_new_size_leaves_the_old_ones_limit_behind():
    assert load_recipe("ade20k").max_longest_edge == 2048
    assert load_recipe("ade20k", {"resize": (256, 256)}).max_longest_edge is None
    assert load_recipe("ade20k", {"resize": 256, "max_longest_edge": 300}).max_longest_edge == 300


def test_split_names():
    assert split_names("train+val") == ["train", "validation"]
    with pytest.raises(ValueError, match="'holdout'"):
        split_names("holdout")


def test_a_key_that_stands_twice_is_refused(tmp_path):
    """YAML readers keep the last, so that the first line would have no effect."""
    file = tmp_path / "own.yaml"
    file.write_text("dataset: folder\nclass_names: [a, b]\nlabel_map: {1: 0, 2: 1, 1: 255}\n")
    with pytest.raises(ValueError, match=r"own\.yaml is not valid YAML: 1 stands there twice(?s:.)* line 3"):
        load_recipe(file)


@pytest.mark.parametrize("name", ["classes.txt", "id2label.json", "_classes.csv", "own.yaml"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_in_another_encoding_is_named(tmp_path, name, encoding):
    (tmp_path / name).write_text('{"0": "Straße", "1": "Gehweg"}', encoding=encoding)
    recipe = tmp_path / name if name == "own.yaml" else "folder"
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is not in UTF-8 .*save it in this encoding"):
        load_recipe(recipe, data_dir=tmp_path)


def test_deeply_nested_class_names_are_refused(tmp_path):
    (tmp_path / "id2label.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"id2label\.json must be a mapping"):
        load_recipe("folder", data_dir=tmp_path)


def test_aliases_that_would_fill_the_memory_are_refused(tmp_path):
    value = "&a0 [x, x, x, x, x, x, x, x, x]"
    for level in range(1, 9):
        value = f"&a{level} [{value}{f', *a{level - 1}' * 8}]"
    path = tmp_path / "own.yaml"
    path.write_text(f"model_config: {{hidden_sizes: {value}}}\n")
    with pytest.raises(
        ValueError, match=r"own\.yaml is not valid YAML: its aliases stand for more than 1000000 values"
    ):
        load_recipe(path)
    path.write_text("class_names: &names [*names, road]\n")
    with pytest.raises(ValueError, match="its aliases stand for more than"):
        load_recipe(path)
    path.write_text("scale_range: &range [0.2, 0.4]\nimage_std: [0.2, 0.2, 0.2]\nclass_names: &names [a, b]\n")
    assert load_recipe(path).class_names == ("a", "b")
