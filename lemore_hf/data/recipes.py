# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Recipes: what a data set is and how to train on it, as plain data read from a YAML file.

A recipe is found by name among the package's own (`lemore_hf/recipes/*.yaml`) or by path, and every field can be
overridden, in Python or on the command line:

```python
recipe = load_recipe("camvid", {"max_steps": 100, "crop_size": (360, 480)})

parser = argparse.ArgumentParser()
add_recipe_arguments(parser)  # --max_steps 100 --crop_size 360 480 --label_map "{7: 0, 8: 1}"
args = parser.parse_args()
recipe = load_recipe("camvid", recipe_overrides(args))
```
"""

import argparse
import ast
import contextlib
import csv
import dataclasses
import difflib
import inspect
import itertools
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import PreTrainedConfig

from ..configuration_lemore import LeMoReConfig

IGNORE_INDEX = 255
SINGLE_CLASS = (
    f"hold a single class beside void ({IGNORE_INDEX}), so that there is nothing to tell apart. Store two classes as 0 and "
    f"1, not as 0 and {IGNORE_INDEX}, or name the stored values in the recipe's label_map, as {{0: 0, {IGNORE_INDEX}: 1}}."
)
"""What is said of label maps that teach nothing."""
SPLITS = ("train", "validation", "test")
_MOST_VALUES = 1_000_000  # of a YAML file; the longest `label_map` has an eighth
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a thousand names take the other long


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A data set, its classes, its augmentation and its schedule. Sizes are (height, width) in pixels.

    Schedule and augmentation defaults are those that networks of this size are trained with (TopFormer's); where a
    field is our own choice, it says so. A `None` switches the part off.

    Raises:
        ValueError: if a value is out of its range or two fields contradict each other; the message names the field.
        TypeError: if a value has the wrong type.
    """

    # What it is
    name: str
    """Name of the recipe."""
    task: Literal["semantic-segmentation", "image-classification"] = "semantic-segmentation"
    """What the labels are: a map of class ids (semantic-segmentation), or one class id an image (image-classification)."""
    title: str = ""
    """Name of the data set as people write it."""
    status: str = "not run"
    """"not run", or what was run with this recipe and where it is reported."""
    paper_mean_iou: float | None = None
    """Mean IoU in percent that the LeMoRe paper reports: the paper's figure, not this project's."""
    license: str = ""
    """Licence or terms of the data."""
    citation: str = ""
    """Whom to cite for the data."""
    notes: str = ""
    """Where the data comes from and how its folder has to look."""

    # Where the samples are
    dataset: str | None = None
    """Hub id, used where no local folder is given; "scenes" is the package's own generated set."""
    dataset_config: str | None = None
    """Configuration of the Hub data set."""
    revision: str | None = None
    """Revision of the Hub data set."""
    image_column: str = "image"
    """Column of the images."""
    label_column: str = "label"
    """Column of the label maps, or of the class ids."""
    name_column: str | None = None
    """Column that names a sample."""
    splits: dict[str, str] = dataclasses.field(default_factory=lambda: {split: split for split in SPLITS})
    """The data set's own name of train, validation and test, as far as it has them."""
    train_on: str = "train"
    """Splits to train on, joined by "+": `train+validation`."""
    validate_on: str = "validation"
    """Splits to choose the best model on."""
    data_files: dict[str, str] | None = None
    """Glob pattern of each split's parquet files in the Hub data set or below the local folder, where their names do
    not begin with the split's."""
    image_folder: str = "images"
    """Folder of the images below the local folder; may hold "{split}"."""
    label_folder: str = "masks"
    """Folder of the label maps below the local folder; may hold "{split}"."""
    image_suffix: str = ""
    """What an image's file name has between the shared name and the extension."""
    label_suffix: str = ""
    """The same of a label map's file name."""
    split_file: str | None = None
    """Text file below the local folder with a name a line; must hold "{split}"."""
    validation_fraction: float = 0.1
    """Share held out evenly for validation from a local folder that is not split (our choice)."""

    # Classes
    num_classes: int | None = None
    """Number of classes; must agree with `class_names`. In classification from the data where neither is given."""
    class_names: tuple[str, ...] = ()
    """Class names in the order of the labels that the network learns."""
    palette: tuple[tuple[int, int, int], ...] | None = None
    """RGB colour of each class."""
    reduce_labels: bool = False
    """Stored label 0 is void, and label i is class i - 1."""
    label_map: dict[int, int] | None = None
    """Class of each stored label, such as {7: 0, 8: 1}; every other one becomes void."""
    label_colors: tuple[tuple[int, int, int], ...] | None = None
    """Label maps are pictures in which stored label i has the i-th of these RGB colours; drawings take them too, where
    there is no `palette`."""
    void_colors: tuple[tuple[int, int, int], ...] = ()
    """RGB colours that mean void in such label maps."""
    allow_all_void: bool = False
    """Accept samples without a single labelled pixel, which are refused otherwise."""

    # Sizes
    image_size: tuple[int, int] = (512, 512)
    """Native grid of the network (`LeMoReConfig.image_size`)."""
    crop_size: tuple[int, int] = (512, 512)
    """Size of a training sample."""
    resize: int | tuple[int, int] | None = None
    """Images are brought to this size first, in training before the random scale: shortest edge, or (height, width),
    or `None` for as they are. In evaluation the labels keep their size."""
    max_longest_edge: int | None = None
    """Limit of the longest edge where `resize` is a shortest edge."""
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the channels, of values in 0…1."""
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of the channels."""

    # Augmentation
    scale_range: tuple[float, float] = (0.5, 2.0)
    """Random scale; in classification the range of the share of the area that is kept."""
    max_class_share: float = 0.75
    """A crop is drawn anew, of ten at most, while one class has more than this share of its labelled pixels."""
    flip_prob: float = 0.5
    """Probability of a horizontal flip."""
    photometric_prob: float = 0.5
    """Probability of each of the six distortions below."""
    brightness: float = 0.125
    """Factor drawn from 1 ± this."""
    contrast: float = 0.5
    """Factor drawn from 1 ± this."""
    saturation: float = 0.5
    """Factor drawn from 1 ± this."""
    hue: float = 0.05
    """Turn drawn from ± this, in whole turns."""
    blur: float = 0.0
    """Standard deviation of a Gaussian blur, drawn from 0 to this, in pixels; by `photometric_prob`."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise, drawn from 0 to this, of values in 0…1; by `photometric_prob`."""
    mixup_alpha: float = 0.0
    """Parameter of MixUp's beta distribution (classification); 0 is off."""
    cutmix_alpha: float = 0.0
    """Parameter of CutMix's beta distribution; 0 is off."""
    classmix: bool = False
    """Mix by ClassMix (segmentation), or where CutMix is on too by one of them, drawn for each batch."""
    mix_prob: float = 1.0
    """Probability that a batch is mixed, where one of these is on."""
    mix_until: float = 1.0
    """Share of `max_steps` after which batches are mixed no more, so that the end sees whole images (our choice, after
    YOLOX, which ends its mosaics so)."""
    shuffle_buffer_size: int = 1000
    """Samples in the shuffle buffer of a streamed set."""

    # Optimisation
    max_steps: int = 80_000
    """Optimizer steps; with 0 the model is saved as it starts, such as the mean of several checkpoints."""
    warmup_steps: int = 1_500
    """Steps of linear warm-up; a tenth of `max_steps` where the rate would fall before its end."""
    batch_size: int = 16
    """Samples of an optimizer step, over all processes and accumulated batches together."""
    eval_batch_size: int = 1
    """Samples of an evaluation batch a process; above 1 only where all images have one size."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for weights that are matrices and AdamW for the others, at one rate
    (`lemore_hf.optimization.Muon`)."""
    learning_rate: float = 3e-4
    """Peak rate."""
    weight_decay: float = 0.01
    """Of all weights but norms and biases."""
    head_lr_multiplier: float = 10.0
    """Times the rate for the head: all behind the encoder and the global features, in classification the classifier."""
    poly_power: float = 1.0
    """Power of the polynomial decay of the rate to zero; 0 keeps it constant."""
    max_grad_norm: float | None = None
    """Limit of the gradient's norm."""
    ema_decay: float | None = None
    """Decay of the exponential moving average of the weights; after n steps at most (1 + n) / (10 + n)."""
    freeze_batch_norm: bool = False
    """Keep batch-norm statistics as they are, for small batches."""
    model_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further fields of `LeMoReConfig`."""

    # Loss
    class_weights: Literal["median_frequency"] | tuple[float, ...] | None = None
    """Weights of the classes in the cross entropy: "median_frequency", balanced over the training split, or a list."""
    class_weight_power: float = 1.0
    """Power that these are raised to: 0.5 takes their square roots, milder to rare classes (our choice)."""
    label_smoothing: float = 0.0
    """Of the cross entropy."""
    ohem_threshold: float | None = None
    """Online hard example mining: only pixels whose true class has a lower probability than this count."""
    ohem_min_kept: int = 100_000
    """The hardest pixels of a batch that always count under `ohem_threshold`."""
    dice_weight: float = 0.0
    """Weight of a Dice loss in addition."""
    lovasz_weight: float = 0.0
    """Weight of a Lovász-softmax loss in addition."""
    lovasz_stride: int = 1
    """It takes the pixels of every n-th row and column."""
    loss_stride: int = 1
    """All losses look at every n-th row and column, from an offset drawn for each batch; `lovasz_stride` counts
    these. On a CPU the loss of every pixel takes a good part of a step (our choice)."""

    def __post_init__(self):
        for field, annotation in _field_types().items():
            object.__setattr__(self, field, _convert(field, annotation, getattr(self, field)))
        self._validate_classes()
        self._validate_source()
        self._validate_ranges()
        self._validate_model_config()

    def _validate_classes(self):
        names, count = self.class_names, self.num_classes
        if names and count is not None and count != len(names):
            raise ValueError(
                f"num_classes is {count}, but class_names lists {len(names)} names: correct one of them, or override "
                "both."
            )
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"class_names must differ from each other, but {twice} stand there more than once.")
        count = len(names) if names else count
        object.__setattr__(self, "num_classes", count)
        if count is not None and count < 1:
            raise ValueError(f"num_classes must be at least 1, got {count}.")
        if self.task == "semantic-segmentation" and count == 1:
            raise ValueError(
                "num_classes is 1, and what may only be one class cannot be learned: name the background as a class too."
            )
        if self.task == "semantic-segmentation" and count is not None and count > IGNORE_INDEX:
            raise ValueError(
                f"num_classes must be at most {IGNORE_INDEX} for segmentation, since {IGNORE_INDEX} is void; "
                f"got {count}."
            )
        if self.palette is not None and len(self.palette) != (count or 0):
            raise ValueError(f"palette has {len(self.palette)} colours for {count or 0} classes.")
        for field in ("palette", "label_colors", "void_colors"):
            if any(not 0 <= value <= 255 for colour in getattr(self, field) or () for value in colour):
                raise ValueError(f"{field} must hold RGB values in 0…255.")
        if self.reduce_labels and self.label_map is not None:
            raise ValueError("reduce_labels and label_map exclude each other: write the reduction into label_map.")
        for raw, train in (self.label_map or {}).items():
            if not 0 <= raw <= 65535:
                raise ValueError(f"label_map: stored label {raw} is outside 0…65535.")
            if train != IGNORE_INDEX and not 0 <= train < (count or 0):
                raise ValueError(f"label_map sends {raw} to {train}, which is none of the {count or 0} classes.")
        self._validate_colors()
        if isinstance(self.class_weights, tuple):
            if len(self.class_weights) != (count or 0):
                raise ValueError(f"class_weights has {len(self.class_weights)} weights for {count or 0} classes.")
            if min(self.class_weights) < 0 or max(self.class_weights) == 0:
                raise ValueError("class_weights must not be negative, and not all zero.")

    def _validate_colors(self):
        colours, count = self.label_colors, self.num_classes or 0
        if colours is None:
            if self.void_colors:
                raise ValueError(
                    "void_colors has no effect without label_colors: give the colours of the classes too."
                )
            return
        twice = {colour for colour in colours if (colours + self.void_colors).count(colour) > 1}
        if twice:
            raise ValueError(
                f"label_colors and void_colors must differ from each other, but {sorted(twice)} occur twice."
            )
        expected = count + int(self.reduce_labels)
        if self.label_map is None and len(colours) != expected:
            raise ValueError(
                f"label_colors has {len(colours)} colours for {count} classes"
                f"{' and void, which reduce_labels puts first' if self.reduce_labels else ''}."
            )
        if unknown := sorted(label for label in self.label_map or {} if label >= len(colours)):
            raise ValueError(
                f"label_map has the stored labels {unknown}, label_colors {len(colours)} colours, from 0 on."
            )
        if self.palette is None and self.label_map is None:
            object.__setattr__(self, "palette", colours[int(self.reduce_labels) :])

    def _validate_source(self):
        for field in ("splits", "data_files"):
            if unknown := set(getattr(self, field) or {}) - set(SPLITS):
                raise ValueError(f"{field} has the unknown splits {sorted(unknown)}; the known ones are {SPLITS}.")
        if "train" not in self.splits:
            raise ValueError("splits must name at least the train split.")
        if self.data_files is not None and set(self.data_files) != set(self.splits):
            raise ValueError(f"data_files must have the splits {sorted(self.splits)}, got {sorted(self.data_files)}.")
        for field in ("train_on", "validate_on"):
            split_names(getattr(self, field), field)
        if self.split_file is not None and "{split}" not in self.split_file:
            raise ValueError(f'split_file must hold "{{split}}", got {self.split_file!r}.')

    def _validate_model_config(self):
        own = {field.name for field in dataclasses.fields(LeMoReConfig)}
        own -= {field.name for field in dataclasses.fields(PreTrainedConfig)}
        # What the recipe's own fields decide, and what is no network to train.
        own -= {"num_channels", "image_size", "palette", "is_fused"}
        for field in self.model_config:
            if field not in own:
                raise ValueError(
                    f"model_config has the field {field!r}{nearest(str(field), sorted(own))}, which is none of those "
                    f"that it can set: {', '.join(sorted(own))}."
                )

    def _validate_ranges(self):
        for field in ("image_size", "crop_size", "resize"):
            value = getattr(self, field)
            if value is not None and min(value if isinstance(value, tuple) else (value,)) < 32:
                raise ValueError(f"{field} must be at least 32 pixels in height and width, got {value}.")
        if self.max_longest_edge is not None:
            if not isinstance(self.resize, int):
                raise ValueError("max_longest_edge needs resize to be the length of the shortest edge.")
            if self.max_longest_edge < self.resize:
                raise ValueError(f"max_longest_edge is {self.max_longest_edge}, shorter than resize ({self.resize}).")
        for field in _FIELDS_OF_THE_OTHER_TASK[self.task]:
            if getattr(self, field) != type(self).__dataclass_fields__[field].default:
                raise ValueError(f"{field} has no effect in {self.task}: leave it out.")
        for field in ("mix_prob", "mix_until"):
            if getattr(self, field) != 1 and not (self.mixup_alpha or self.cutmix_alpha or self.classmix):
                raise ValueError(
                    f"{field} is {getattr(self, field)}, but nothing is mixed: set cutmix_alpha, mixup_alpha or classmix, "
                    "or leave it out."
                )
        for field in ("blur", "noise"):
            if getattr(self, field) > 0 and self.photometric_prob == 0:
                raise ValueError(
                    f"{field} is {getattr(self, field)}, but is part of the photometric distortion, and photometric_prob is "
                    "0: set that to the share of images to distort, such as 0.5."
                )
        low, high = self.scale_range
        if not 0 < low <= high:
            raise ValueError(f"scale_range must be (low, high) with 0 < low <= high, got {self.scale_range}.")
        if self.task == "image-classification" and high > 1:
            raise ValueError(f"scale_range is a share of the area in classification, at most 1; got {high}.")
        for fields, smallest, largest in _RANGES:
            for field in fields:
                value = getattr(self, field)
                if value is not None and not smallest <= value <= largest:
                    limit = f"at least {smallest}" if largest == math.inf else f"in {smallest}…{largest}"
                    raise ValueError(f"{field} must be {limit}, got {value}.")
        if self.warmup_steps >= self.max_steps and self.poly_power > 0:
            # A short trial run (--max_steps 20) should not need a second option.
            object.__setattr__(self, "warmup_steps", self.max_steps // 10)
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}: max_steps 0 trains nothing.")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm must be positive, or none for no limit; got {self.max_grad_norm}.")
        if not all(0 <= value <= 1 for value in self.image_mean) or not all(
            0 < value <= 1 for value in self.image_std
        ):
            raise ValueError(
                f"image_mean and image_std are of values in 0…1, got {self.image_mean} and {self.image_std}: divide what "
                "is of 0…255 by 255."
            )

    @property
    def id2label(self) -> dict[int, str]:
        """Class names by id, as a Transformers configuration has them."""
        names = self.class_names or tuple(f"class {index}" for index in range(self.num_classes or 0))
        return dict(enumerate(names))

    @property
    def label2id(self) -> dict[str, int]:
        """Class ids by name."""
        return {name: index for index, name in self.id2label.items()}

    @property
    def processor_size(self) -> dict[str, int]:
        """`size` of the image processor that goes with the recipe: as `resize` says, or the native size."""
        if isinstance(self.resize, int):
            longest = {} if self.max_longest_edge is None else {"longest_edge": self.max_longest_edge}
            return {"shortest_edge": self.resize, **longest}
        return dict(zip(("height", "width"), self.resize or self.image_size, strict=True))

    @property
    def processor_settings(self) -> dict[str, Any]:
        """Arguments of the `LeMoReImageProcessor` that a model trained with the recipe goes with."""
        settings = {
            "size": self.processor_size,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "do_reduce_labels": self.reduce_labels,
        }
        if self.task == "image-classification":
            settings |= {
                "do_center_crop": True,
                "crop_size": dict(zip(("height", "width"), self.crop_size, strict=True)),
            }
        return settings

    @property
    def network_settings(self) -> dict[str, Any]:
        """Fields of `LeMoReConfig` that the recipe decides."""
        return {
            "id2label": self.id2label,
            "label2id": self.label2id,
            "image_size": list(self.image_size),
            "palette": [list(colour) for colour in self.palette] if self.palette else None,
            **self.model_config,
        }

    def replace(self, **changes: Any) -> "Recipe":
        """The recipe with some fields changed, validated anew."""
        return _build({**self.to_dict(), **_with_dependents(changes)}, f"recipe {self.name}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what `json.dumps` and `yaml.safe_dump` take, and `Recipe(**...)` reads back."""
        return {field: _plain(getattr(self, field)) for field in _field_types()}


_ORDER = [field.name for field in dataclasses.fields(Recipe)]
ALL_FIELDS = frozenset(_ORDER)
TRAINING_FIELDS = frozenset(_ORDER[_ORDER.index("scale_range") :]) - {"eval_batch_size"}
"""Augmentation, optimisation and loss: what evaluation does not look at."""
DESCRIPTIVE_FIELDS = frozenset(
    (
        "title",
        "status",
        "paper_mean_iou",
        "license",
        "citation",
        "notes",
        "palette",
        "eval_batch_size",
        "allow_all_void",
    )
)
"""What changes nothing about what a training computes, as far as it gets."""
EVALUATION_FIELDS = ALL_FIELDS - TRAINING_FIELDS - {"train_on", "validate_on"}
"""What an evaluation looks at, which is asked for a split."""

_FIELDS_OF_THE_OTHER_TASK = {
    "semantic-segmentation": ("mixup_alpha",),
    "image-classification": (
        *("class_weights", "class_weight_power", "ohem_threshold", "ohem_min_kept", "max_class_share"),
        *("dice_weight", "lovasz_weight", "lovasz_stride", "loss_stride"),
        *("classmix", "label_map", "reduce_labels", "allow_all_void", "label_colors", "void_colors"),
    ),
}
# (fields, smallest, largest) of the plain numbers.
_RANGES = (
    (("validation_fraction",), 0.01, 0.5),
    (("flip_prob", "photometric_prob", "max_class_share", "brightness", "contrast", "saturation"), 0.0, 1.0),
    (("mix_prob", "mix_until", "ohem_threshold", "ema_decay"), 0.0, 1.0),
    (("hue", "noise"), 0.0, 0.5),
    (("blur",), 0.0, 10.0),
    (("label_smoothing",), 0.0, 0.99),
    (("mixup_alpha", "cutmix_alpha", "weight_decay", "poly_power", "head_lr_multiplier"), 0.0, math.inf),
    (("warmup_steps", "class_weight_power", "dice_weight", "lovasz_weight"), 0.0, math.inf),
    (("max_steps",), 0, math.inf),
    (
        (
            *("batch_size", "eval_batch_size", "shuffle_buffer_size"),
            *("ohem_min_kept", "lovasz_stride", "loss_stride"),
        ),
        1,
        math.inf,
    ),
)


def recipe_names() -> list[str]:
    """Names of the recipes that the package brings."""
    folder = resources.files("lemore_hf") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


# The field without which another has no effect.
_SWITCH_OF = {
    "class_weight_power": "class_weights",
    "ohem_min_kept": "ohem_threshold",
    "lovasz_stride": "lovasz_weight",
    **dict.fromkeys(("brightness", "contrast", "saturation", "hue"), "photometric_prob"),
}


def load_recipe(
    name_or_path: str | Path,
    overrides: Mapping[str, Any] | Iterable[str] | None = None,
    data_dir: str | Path | None = None,
) -> Recipe:
    """Reads a recipe.

    Args:
        name_or_path: name of one of the package's recipes (`recipe_names()`), or path of a YAML file.
        overrides: fields to change: a mapping, whose values may be text as on a command line, or "field=value" strings.
        data_dir: local folder of the data. Where neither recipe nor overrides name classes, they come from its
            `classes.txt` (a name a line, or a name and its colour in the label maps: `road 128 64 128` or `road #804080`,
            and of `void` too), `id2label.json`, the `labelmap.txt` of CVAT, the `class_names.txt` of LabelMe or the
            `_classes.csv` of Roboflow.

    Raises:
        FileNotFoundError: if there is no such recipe; names the nearest ones.
        ValueError: for unknown fields, values out of range, a class count that disagrees with the list, or an override of
            a part that is switched off.
        TypeError: for values of the wrong type.
    """
    text, origin = _recipe_text(name_or_path)
    try:
        refuse_repeated_keys(text)
        values = yaml.load(text, _YAML_LOADER)
    except yaml.YAMLError as error:
        raise ValueError(f"{origin} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{origin} must be a mapping of field names to values.")
    changes = _as_mapping(overrides)
    values = {"name": Path(str(name_or_path)).stem, **values, **_with_dependents(changes)}
    if data_dir is not None and not values.get("class_names"):
        found = _classes_of_folder(Path(data_dir).expanduser())
        values |= {field: value for field, value in found.items() if not values.get(field)}
    recipe = _build(values, origin)
    # A recipe may keep the setting of a part that an override switches off, but to ask for both is a mistake.
    for field in changes:
        switch, value = _SWITCH_OF.get(field), getattr(recipe, field)
        if switch and not getattr(recipe, switch) and value not in (0, Recipe.__dataclass_fields__[field].default):
            raise ValueError(
                f"{field} has no effect while {switch} is {getattr(recipe, switch)}: set {switch} too, or leave it out."
            )
    return recipe


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--recipe` and `--data_dir`, the data set and where it lies."""
    parser.add_argument("--recipe", required=True, help=f"{', '.join(recipe_names())}, or the path of a YAML file")
    parser.add_argument("--data_dir", type=Path, help="local folder of the data set; without it, from the Hub")


def add_recipe_arguments(parser: argparse.ArgumentParser, fields: Iterable[str] | None = None) -> None:
    """Adds an option for every field of a recipe that changes what is done. Only those given on the command line appear
    in the parsed namespace; `recipe_overrides` collects them.

    Args:
        parser: that gets the options.
        fields: to have options; by default all.
    """
    group = parser.add_argument_group("recipe", "override a field of the recipe; none switches a part off")
    documentation = _field_documentation()
    for field, annotation in _field_types().items():
        if field in ("name", "status", "notes", "paper_mean_iou") or (fields is not None and field not in fields):
            continue
        group.add_argument(
            f"--{field}",
            default=argparse.SUPPRESS,
            nargs="+" if "tuple" in str(annotation) else ("?" if annotation is bool else None),
            **({"const": "true"} if annotation is bool else {}),
            metavar="BOOL" if annotation is bool else "VALUE",
            help=documentation[field].replace("%", "%%"),
        )


def recipe_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe's fields that were given on the command line, for `load_recipe`."""
    return {field: getattr(args, field) for field in _field_types() if field != "name" and hasattr(args, field)}


def refuse_repeated_keys(text: str) -> None:
    """Refuse YAML that has a key twice in one mapping, of which readers keep the last; and aliases of aliases that stand
    for so many values that to write or compare them would fill the memory.

    Raises:
        yaml.YAMLError: naming the key and its line; for what is no YAML, too.
    """
    nodes, number = [yaml.compose(text, _YAML_LOADER)], 0
    while nodes:
        node = nodes.pop()
        number += 1
        if number > _MOST_VALUES:
            raise yaml.YAMLError(f"its aliases stand for more than {_MOST_VALUES} values: write out what is meant")
        if isinstance(node, yaml.ScalarNode | None):
            continue
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
            continue
        keys = set()
        for key, value in node.value:
            if (name := (key.tag, str(key.value))) in keys:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands there twice", problem_mark=key.start_mark)
            keys.add(name)
            nodes.append(value)


def split_names(splits: str, field: str = "split") -> list[str]:
    """`"train+validation"` → `["train", "validation"]`; "val" and "valid" stand for validation."""
    names = [{"val": "validation", "valid": "validation"}.get(name, name) for name in splits.split("+")]
    unknown = [name for name in names if name not in SPLITS]
    if unknown or len(set(names)) != len(names):
        raise ValueError(f"{field} must be {', '.join(SPLITS)}, or several joined by '+', each once; got {splits!r}.")
    return names


def read_text(path: Path) -> str:
    """A text file, with or without a byte-order mark.

    Raises:
        ValueError: naming the file, where it is not in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}): save it in this encoding.") from error


def _recipe_text(name_or_path: str | Path) -> tuple[str, str]:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise FileNotFoundError(f"There is no recipe file {path}.")
        return read_text(path), str(path)
    if str(name_or_path) not in recipe_names():
        raise FileNotFoundError(
            f"There is no recipe {str(name_or_path)!r}{nearest(str(name_or_path), recipe_names())}: the recipes are "
            f"{', '.join(recipe_names())}; your own is given by the path of its YAML file."
        )
    text = (resources.files("lemore_hf") / "recipes" / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    return text, f"recipe {name_or_path}"


def _as_mapping(overrides: Mapping[str, Any] | Iterable[str] | None) -> dict[str, Any]:
    if overrides is None or isinstance(overrides, Mapping):
        return dict(overrides or {})
    result = {}
    for item in overrides:
        field, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f'An override must read "field=value", got {item!r}.')
        result[field.strip()] = value
    return result


def _with_dependents(changes: dict[str, Any]) -> dict[str, Any]:
    """The changes, with the fields reset that only made sense with the old values: a new class list brings its own
    count and leaves colours and mapping behind, new colours of the labels the palette that was made of the old ones, a
    new size its limit, classification torchvision's range of scales."""
    result = dict(changes)
    if "label_colors" in changes:
        result = {"palette": None, **result}
    if "class_names" in changes:
        others = {"palette": None, "label_map": None, "label_colors": None, "void_colors": ()}
        result = {"num_classes": None, "reduce_labels": False, **others, **result}
    if changes.get("task") == "image-classification":
        result = {"scale_range": (0.08, 1.0), **result}  # there it is a share of the area
    if "resize" in changes:
        result = {"max_longest_edge": None, **result}
    return result


def _classes_of_folder(folder: Path) -> dict[str, Any]:
    """The fields that the file of a folder's classes gives; none where there is no such file."""
    found = [path for path in (folder / "classes.txt", folder / "class_names.txt") if path.is_file()]
    if found:
        path = found[0]
        lines = [line for line in _lines(path) if line != "__ignore__"]  # LabelMe's void, which is number -1
        if not any(_COLORED_CLASS.fullmatch(line) for line in lines):
            return {"class_names": lines}
        form, example = _COLORED_CLASS, "road 128 64 128"
    elif (path := folder / "id2label.json").is_file():
        return {"class_names": _names_by_number(path)}
    elif (path := folder / "labelmap.txt").is_file():
        lines = [line for line in _lines(path) if not line.startswith("#")]
        form, example = _CVAT_CLASS, "road:128,64,128::"
    elif found := [path for path in (folder / "_classes.csv", folder / "train" / "_classes.csv") if path.is_file()]:
        return _classes_of_csv(found[0])
    else:
        return {}
    matches = [form.fullmatch(line) for line in lines]
    if None in matches:
        raise ValueError(
            f"{path}: the line {lines[matches.index(None)]!r} has no colour, where others have one: write all as {example!r}."
        )
    found = [(match[1], _rgb([part for part in match.groups()[1:] if part])) for match in matches]
    return {
        "class_names": [name for name, _ in found if name.lower() != "void"],
        "label_colors": [colour for name, colour in found if name.lower() != "void"],
        "void_colors": [colour for name, colour in found if name.lower() == "void"],
    }


_COLORED_CLASS = re.compile(r"(.*\S)\s+(?:(\d{1,3})\s+(\d{1,3})\s+(\d{1,3})|#([0-9a-fA-F]{6}))")
_CVAT_CLASS = re.compile(r"([^:]+):(\d{1,3}),(\d{1,3}),(\d{1,3})(?::.*)?")  # label:color_rgb:parts:actions


def _rgb(parts: list[str]) -> list[int]:
    """A colour of three numbers, or of six hexadecimal digits."""
    return list(bytes.fromhex(parts[0])) if len(parts) == 1 else [int(part) for part in parts]


def _classes_of_csv(path: Path) -> dict[str, Any]:
    """Names and stored labels as Roboflow lists them, under a line of titles: `Pixel Value, Class`."""
    rows = list(csv.reader(_lines(path), skipinitialspace=True))[1:]
    if not rows or any(len(row) != 2 or not row[0].strip().isdecimal() for row in rows):
        raise ValueError(f"{path} must have the lines 'Pixel Value, Class', '0, background', '1, road' and so on.")
    stored = [int(number) for number, _ in rows]
    label_map = (
        {} if stored == list(range(len(rows))) else {"label_map": dict(zip(stored, range(len(rows)), strict=True))}
    )
    return {"class_names": [name.strip() for _, name in rows], **label_map}


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def _names_by_number(path: Path) -> list[str]:
    """The class names of an `id2label.json`."""
    expected = f'{path} must be a mapping that numbers the classes from 0 without gaps, as {{"0": "sky", "1": "road"}}'
    try:
        id2label = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{expected}: {error}.") from error
    if not isinstance(id2label, dict) or set(id2label) != {str(index) for index in range(len(id2label))}:
        shown = list(id2label)[:8] if isinstance(id2label, dict) else id2label
        raise ValueError(f"{expected}; its keys are {shown}.")
    return [str(id2label[str(index)]) for index in range(len(id2label))]


def _build(values: Mapping[str, Any], origin: str) -> Recipe:
    known = _field_types()
    for key in values:
        if key not in known:
            raise ValueError(f"{origin} has the unknown field {key!r}{nearest(str(key), list(known))}.")
    try:
        return Recipe(**values)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{origin}: {error}") from error


def nearest(name: str, known: list[str]) -> str:
    """A hint at the known name that an unknown one may be meant for, to go on with after it; "" where none is like it."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def listed(names: Sequence[Any], most: int = 10) -> str:
    """The first names, for an error's text, and how many there are besides."""
    shown = ", ".join(str(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _field_documentation() -> dict[str, str]:
    """What stands below each field in the class, for `--help`."""
    body = ast.parse(inspect.getsource(Recipe)).body[0].body
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
    }


def _field_types() -> dict[str, Any]:
    return typing.get_type_hints(Recipe)


def _convert(field: str, annotation: Any, value: Any) -> Any:
    """`value` as the annotated type. Text, as a command line gives it, is read as YAML unless text is wanted."""
    wrong = TypeError(f"{field} must be {_describe(annotation)}, got {value!r}.")
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        is_one_word = isinstance(value, list) and len(value) == 1 and isinstance(value[0], str)
        word = value[0] if is_one_word else value  # of an option that takes several
        if any(word in typing.get_args(alternative) for alternative in arguments if word is not value):
            return word
        if word is None or (isinstance(word, str) and word.lower() in ("none", "null")):
            if types.NoneType in arguments:
                return None
            raise wrong
        for alternative in arguments:
            with contextlib.suppress(TypeError, ValueError):
                return _convert(field, alternative, value)
        raise wrong
    if annotation is Any:
        return value
    if origin is Literal:
        if value not in arguments:
            raise ValueError(str(wrong))
        return value
    if origin is tuple:
        return _convert_tuple(field, arguments, value, wrong)
    if isinstance(value, str) and annotation is not str:
        value = _read_text(value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise wrong
        key_type, value_type = arguments
        return {_convert(field, key_type, k): _convert(field, value_type, v) for k, v in value.items()}
    if annotation is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"{field} must be finite, got {value}.")
        return float(value)
    if annotation is int and isinstance(value, list) and len(value) == 1:
        value = _read_text(value[0])  # one word of an option that takes several
    if isinstance(value, annotation) and not (annotation is int and isinstance(value, bool)):
        return value
    raise wrong


def _convert_tuple(field: str, arguments: tuple, value: Any, wrong: TypeError) -> tuple:
    if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], str):
        read = _read_text(value[0])
        value = read if isinstance(read, list) else value
    elif isinstance(value, str):
        value = _read_text(value)
    if not isinstance(value, (list, tuple)):
        raise wrong
    if arguments[-1] is Ellipsis:
        return tuple(_convert(field, arguments[0], item) for item in value)
    if len(value) != len(arguments):
        raise wrong
    return tuple(_convert(field, argument, item) for argument, item in zip(arguments, value, strict=True))


def _read_text(text: Any) -> Any:
    """Text as YAML; numbers with an exponent but no dot ("3e-4") too, which YAML 1.1 takes for text."""
    if not isinstance(text, str):
        return text
    for read in (float, yaml.safe_load) if "e" in text.lower() else (yaml.safe_load,):
        with contextlib.suppress(ValueError, yaml.YAMLError):
            return read(text)
    return text


def _describe(annotation: Any) -> str:
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(alternative) for alternative in arguments)
    if origin is Literal:
        return " or ".join(repr(word) for word in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list of {_describe(arguments[0])}"
        return f"{len(arguments)} values of {_describe(arguments[0])}"
    if origin is dict:
        return f"a mapping of {_describe(arguments[0])} to {_describe(arguments[1])}"
    return {types.NoneType: "none", Any: "anything"}.get(annotation) or annotation.__name__


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
