# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Loading: a recipe's samples from the Hub, a local folder, parquet files or a stream, ready for a `DataLoader`.

```python
recipe = load_recipe("camvid")
split = load_split(recipe, "train+validation", data_dir)  # a datasets.Dataset with image, label and name
dataset = RecipeDataset(split, recipe, training=True, seed=0, cache="memory")
sampler = EpochSampler(len(dataset), seed=0, start=step * recipe.batch_size, stop=recipe.max_steps * recipe.batch_size)
for batch in DataLoader(dataset, recipe.batch_size, sampler=sampler, collate_fn=collate, num_workers=4):
    pixel_values, labels = normalize(batch["pixel_values"], recipe, device), batch["labels"].to(device).long()
```
"""

import errno
import functools
import glob
import io
import itertools
import math
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, Literal, TypeVar, overload

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate.utils import gather_object
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from PIL import Image, ImageOps
from torch.utils.data import IterableDataset, Sampler, get_worker_info
from torchvision.transforms.v2 import functional as F
from tqdm.auto import tqdm

from ..image_processing_pil_lemore import open_picture
from ..modeling_lemore import MINIMUM_SIZE
from ..pictures import PICTURE_SUFFIXES, files_below, number_of_pages, to_rgb
from .augmentation import (
    ClassificationAugmentation,
    SegmentationAugmentation,
    resize_for_evaluation,
    resized_size,
    sample_generator,
)
from .recipes import IGNORE_INDEX, SPLITS, Recipe, listed, read_text, split_names

_SPLIT_ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}
_LARGEST_STORED_LABEL = 65535
_PICTURES = f"pictures end in {', '.join(sorted(PICTURE_SUFFIXES))}"
Samples = datasets.Dataset | datasets.IterableDataset
_Samples = TypeVar("_Samples", datasets.Dataset, datasets.IterableDataset)


class BadSampleError(ValueError):
    """A sample that cannot be trained or evaluated on. Its message names the sample, the reason and the way out.

    Attributes:
        sample: name of the sample, `None` once the error has crossed a process.
        reason: what is wrong with it, likewise.
    """

    def __init__(self, message: str, sample: str | None = None, reason: str | None = None):
        # A worker process of a DataLoader puts its traceback before the message.
        super().__init__(message.rpartition("BadSampleError: ")[-1].strip())
        self.sample, self.reason = sample, reason


def raise_together(error: BadSampleError | None) -> None:
    """Raise the error of any process on all of them, so that they stop at the same step.

    Collective: every process of Accelerate's calls it, with its own error or `None`.
    """
    messages = gather_object([None if error is None else str(error)])
    if error is not None:
        raise error
    if any(messages):
        raise BadSampleError("\n".join(message for message in messages if message))


# -------------------------------------------------------------------------------------------------------------------
# Splits
# -------------------------------------------------------------------------------------------------------------------


@overload
def load_split(
    recipe: Recipe, split: str, data_dir: str | Path | None = None, streaming: Literal[False] = False
) -> datasets.Dataset: ...


@overload
def load_split(
    recipe: Recipe, split: str, data_dir: str | Path | None = None, *, streaming: Literal[True]
) -> datasets.IterableDataset: ...


@overload
def load_split(recipe: Recipe, split: str, data_dir: str | Path | None = None, streaming: bool = False) -> Samples: ...


def load_split(recipe: Recipe, split: str, data_dir: str | Path | None = None, streaming: bool = False) -> Samples:
    """The samples of a split, with the columns `image`, `label` and, where samples have names, `name`.

    Args:
        recipe: says where the samples are.
        split: "train", "validation" or "test", or several joined by "+".
        data_dir: local folder with parquet files (`train.parquet`, `train-00000-of-00002.parquet`, `data/train-*`), or
            that `save_to_disk` of `datasets` has written, or with the recipe's folders of images and label maps, split by
            sub-folders (`train/images`, `images/train`), by lists of names (`split_file`) or not at all; then
            `validation_fraction` of it is held out. In classification one folder a class. Without it, the recipe's data
            set comes from the Hub.
        streaming: read while iterating, never the whole set at once.

    Raises:
        FileNotFoundError: if folder or split is missing; says what was looked for.
        ValueError: if a column is missing, the recipe has no such split, or images and label maps do not pair; lists
            the names.
    """
    parts = []
    for name in split_names(split):
        if name not in recipe.splits:
            raise ValueError(f"The recipe {recipe.name} has no {name} split; it has {', '.join(recipe.splits)}.")
        part = _load_one(recipe, name, data_dir, streaming)
        parts.append(_normalize_columns(part, recipe))
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _load_one(recipe: Recipe, split: str, data_dir: str | Path | None, streaming: bool) -> Samples:
    if data_dir is None:
        return _load_published(recipe, split, streaming)
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"The data folder {folder} does not exist.")
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _load_saved(recipe, split, folder, streaming)
    if next(folder.rglob("*.parquet"), None) is not None:
        return _load_parquet(recipe, split, folder, streaming)
    if recipe.task == "image-classification":
        return _load_class_folders(recipe, split, folder, streaming)
    return _load_folders(recipe, split, folder, streaming)


def _load_published(recipe: Recipe, split: str, streaming: bool) -> Samples:
    if recipe.dataset is None:
        raise ValueError(f"The recipe {recipe.name} needs a local folder (data_dir). {recipe.notes}")
    if recipe.dataset == "scenes":
        from .scenes import load_scenes

        others = {f"num_{other}": 0 for other in SPLITS if other != split}
        scenes = load_scenes(**others)[split]
        return scenes.to_iterable_dataset() if streaming else scenes
    name = recipe.splits[split]
    data_files = None if recipe.data_files is None else {name: recipe.data_files[split]}
    try:
        return _load_dataset(
            recipe.dataset,
            recipe.dataset_config,
            data_files=data_files,
            split=name,
            revision=recipe.revision,
            streaming=streaming,
        )
    except DatasetNotFoundError as error:
        raise DatasetNotFoundError(
            f"{error} Where it has terms, accept them at https://huggingface.co/datasets/{recipe.dataset} and log in with "
            "'hf auth login'; a folder that holds it is given as data_dir."
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        if str(error).startswith("Dataset scripts"):
            raise ValueError(
                f"{error}, a program: for many of them the Hub has the same as parquet (--revision refs/convert/parquet)."
            ) from error
        # Of given files `datasets` keeps what it made of them under a name that it only finds with the Hub's help.
        if not isinstance(error, ConnectionError) and not str(error).startswith("Couldn't find cache"):
            raise
        revision = "" if recipe.revision is None else f" --revision {recipe.revision}"
        patterns = "".join(f" --include '{pattern}'" for pattern in (recipe.data_files or {}).values())
        raise ConnectionError(
            f"{error}. Where there is no network, give its files as --data_dir DIR; they are downloaded elsewhere with: "
            f"hf download {recipe.dataset} --repo-type dataset{revision}{patterns} --local-dir DIR"
        ) from error


def _load_dataset(*names: str | None, **options: Any) -> Samples:
    """`datasets.load_dataset`, whose errors say where a disk is full, and what is wrong with files that do not fit."""
    try:
        return datasets.load_dataset(*names, **options)
    except (OSError, DatasetGenerationError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                cause.errno,
                f"{cause.strerror}: data sets are downloaded to and decoded into {datasets.config.HF_CACHE_HOME}. Set HF_HOME "
                "to a folder with more room, or read without keeping anything on disk: --streaming",
            ) from error
        if isinstance(error, OSError):
            raise
        raise ValueError(f"The data set {names[0]} cannot be read: {cause}") from error


def _load_parquet(recipe: Recipe, split: str, folder: Path, streaming: bool) -> Samples:
    files = _parquet_files(recipe, split, folder)
    if files:
        return _read_parquet(files, streaming)
    everything = sorted(folder.rglob("*.parquet"))
    if any(_parquet_files(recipe, other, folder) for other in _SPLIT_ALIASES):
        raise FileNotFoundError(
            f"{folder} has no parquet file of the {split} split: none of {listed([f.name for f in everything])} "
            f"begins with {' or '.join(_aliases(recipe, split))}. Rename it, or set data_files in the recipe."
            f"{_divided(split, 'files of a name without a split, such as data.parquet')}"
        )
    _refuse_unknown_splits(
        folder, everything, "set the recipe's data_files (such as train: 'a/train/*.parquet'), or rename them"
    )
    return _hold_out(_read_parquet(everything, streaming), recipe, split, folder)


def _read_parquet(files: list[Path], streaming: bool) -> Samples:
    if sum(_num_rows(file) for file in files) == 0:
        raise ValueError(f"There is no sample in {listed([str(file) for file in files])}.")
    return _load_dataset("parquet", data_files=[str(file) for file in files], split="train", streaming=streaming)


def _num_rows(file: Path) -> int:
    try:
        if not file.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        return pq.read_metadata(file).num_rows
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as parquet ({error}): copy or download it again.") from error


def _load_saved(recipe: Recipe, split: str, folder: Path, streaming: bool) -> Samples:
    """What `save_to_disk` of a `DatasetDict` or a `Dataset` has written."""
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.Dataset):
        samples = _hold_out(saved, recipe, split, folder)
    elif found := [alias for alias in _aliases(recipe, split) if alias in saved]:
        samples = saved[found[0]]
    else:
        raise FileNotFoundError(
            f"{folder} has no {split} split, only {listed(list(saved))}: expected {' or '.join(_aliases(recipe, split))}."
            f"{_divided(split, 'a Dataset that is saved without a DatasetDict around it')}"
        )
    return samples.to_iterable_dataset() if streaming else samples


def _parquet_files(recipe: Recipe, split: str, folder: Path) -> list[Path]:
    if split in (recipe.data_files or {}) and (files := sorted(folder.glob(recipe.data_files[split]))):
        return files
    for alias in _aliases(recipe, split):
        for pattern in (f"{alias}.parquet", f"{alias}[-_.]*.parquet", f"{alias}/*.parquet"):
            if files := sorted(folder.glob(pattern)) or sorted((folder / "data").glob(pattern)):
                return files
    return []


def _load_class_folders(recipe: Recipe, split: str, folder: Path, streaming: bool) -> Samples:
    for alias in _aliases(recipe, split):
        if (folder / alias).is_dir():
            samples = _read_class_folders(folder / alias, streaming)
            return _with_labels_of(recipe, samples, folder / alias, "folders")
    if any((folder / alias).is_dir() for aliases in _SPLIT_ALIASES.values() for alias in aliases):
        raise FileNotFoundError(f"{folder} has no sub-folder {' or '.join(_aliases(recipe, split))}.")
    _refuse_unknown_splits(folder, filter(Path.is_dir, folder.iterdir()), "rename them to train, val and test")
    whole = _with_labels_of(recipe, _read_class_folders(folder, streaming), folder, "folders")
    return _hold_out(whole, recipe, split, folder)


def _read_class_folders(folder: Path, streaming: bool) -> Samples:
    # All files by name: `datasets` would take words such as "val" or "train" in their names for splits.
    return datasets.load_dataset(
        "imagefolder",
        data_dir=str(folder),
        data_files={"train": "**"},
        split="train",
        streaming=streaming,
        drop_labels=False,
    )


def _with_labels_of(recipe: Recipe, samples: Samples, place: Path | str, kind: str) -> Samples:
    """The recipe's numbers for labels that have names of their own: folders are numbered in the order of their names, all
    that there are, and the classes of a file as it was written."""
    feature = (samples.features or {}).get("label")
    if recipe.num_classes is None or not isinstance(feature, datasets.ClassLabel):
        return samples
    names = feature.names
    if names == [str(number) for number in range(len(names))]:  # how `datasets` calls classes that have no names
        return samples
    # ImageNet's on the Hub are synonyms, "tench, Tinca tinca" for the class tench: where all of them are those of the class
    # of the same number, the numbers are the recipe's.
    if len(names) == recipe.num_classes and all(
        own in name.split(", ") for own, name in zip(recipe.id2label.values(), names, strict=True)
    ):
        return samples
    if not set(names) <= recipe.label2id.keys():
        # Such as WordNet's numbers, which stand in the order of the classes. One class by its name is reason to doubt.
        if len(names) == recipe.num_classes and recipe.label2id.keys().isdisjoint(names):
            return samples
        unknown = [name for name in names if name not in recipe.label2id]
        raise ValueError(
            f"{place} has {len(names)} {kind}, of which {listed(unknown)} are none of the {recipe.num_classes} classes of "
            f"the recipe {recipe.name}: rename them, or give the recipe's class_names."
        )
    classes = [recipe.label2id[name] for name in names]
    if classes == list(range(recipe.num_classes)):
        return samples
    features = datasets.Features(
        {**samples.features, "label": datasets.ClassLabel(names=list(recipe.id2label.values()))}
    )
    # No closure: where worker processes are not forked, a stream takes this with it to them.
    renumber = functools.partial(_renumbered, classes=classes)
    return samples.map(renumber, batched=True, input_columns="label", features=features)


def _renumbered(labels: list[int], classes: list[int]) -> dict[str, list[int]]:
    return {"label": [classes[label] for label in labels]}


def _label_ending(images: set[str], labels: set[str]) -> str:
    """A hint for label maps whose names are those of the images and an ending, such as `street_mask` for `street`."""
    shortest = min(images, key=len, default="")
    endings = {label[len(shortest) :] for label in labels if label.startswith(shortest) and len(label) > len(shortest)}
    fitting = [ending for ending in sorted(endings) if {image + ending for image in images} == labels]
    return f" They end in {fitting[0]!r}: give label_suffix={fitting[0]!r}." if fitting else ""


def _no_picture(folder: Path, name: str, suffix: str) -> str:
    """A hint at a file that has the name looked for, but another ending than pictures have."""
    path = folder / f"{name}{suffix}"
    others = sorted(path.parent.glob(f"{glob.escape(path.name)}.*"))
    return f" {others[0].name} is there, but {_PICTURES}." if others else ""


def _of_label_studio(names: list[str]) -> str:
    """A hint for masks that are not of a picture but of a label in it."""
    if not all(re.match(r"task-\d+-annotation-", name) for name in names):
        return ""
    return (
        " Label Studio writes a mask for each label, which does not name its picture: export COCO there, and draw the "
        "masks from it: see Labels in JSON in README.md."
    )


def _load_folders(recipe: Recipe, split: str, folder: Path, streaming: bool) -> Samples:
    image_folder, label_folder, alias = _find_folders(recipe, split, folder)
    if alias is None and recipe.split_file is None:
        lists = folder.glob("ImageSets/Segmentation/*.txt")
        _refuse_unknown_splits(
            folder, lists, "give split_file, ImageSets/Segmentation/{split}.txt, or remove the lists"
        )
    images = _files_by_name(image_folder, recipe.image_suffix)
    labels = _files_by_name(label_folder, recipe.label_suffix)
    if image_folder == label_folder:
        images, labels = _apart(images, labels, recipe, folder)
    if recipe.split_file is not None:
        wanted = _listed_names(recipe, split, folder)
        images, labels = ({k: v for k, v in files.items() if k in wanted} for files in (images, labels))
        if missing := sorted(wanted - set(images) - set(labels)):
            raise ValueError(f"{folder} lacks {len(missing)} samples of the {split} split: {listed(missing)}.")
    if without := sorted(set(labels) - set(images)):
        hint = _label_ending(set(images), set(labels))
        hint = hint or _no_picture(image_folder, without[0], recipe.image_suffix) or _of_label_studio(without)
        raise ValueError(f"{len(without)} label maps in {label_folder} have no image: {listed(without)}.{hint}")
    if without := sorted(set(images) - set(labels)):
        hint = _no_picture(label_folder, without[0], recipe.label_suffix)
        hint = hint or " Label them, or take them out of the folder."
        raise ValueError(f"{len(without)} images in {image_folder} have no label map: {listed(without)}.{hint}")
    if not images:
        raise FileNotFoundError(f"There are no images in {image_folder}: {_PICTURES}.")
    names = sorted(images)
    features = datasets.Features(
        {
            recipe.image_column: datasets.Image(),
            recipe.label_column: datasets.Image(),
            "name": datasets.Value("string"),
        }
    )
    columns = ([str(images[name]) for name in names], [str(labels[name]) for name in names], names)
    samples = datasets.Dataset.from_dict(dict(zip(features, columns, strict=True)), features=features)
    if alias is None:
        folders = {path.parent for path in images.values()}
        _refuse_unknown_splits(folder, folders, "rename them, or set the recipe's image_folder and label_folder")
        samples = _hold_out(samples, recipe, split, folder)
    return samples.to_iterable_dataset(num_shards=min(64, len(samples))) if streaming else samples


def _apart(
    images: dict[str, Path], labels: dict[str, Path], recipe: Recipe, folder: Path
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images and label maps that lie in one folder, where what has the longer ending is not of the other kind too."""
    if recipe.image_suffix == recipe.label_suffix:
        raise ValueError(
            f"Images and label maps of {folder} lie in one folder, {recipe.image_folder}: give label_suffix, what the names "
            "of the label maps have at their end, such as _mask."
        )
    are_images_the_rest = len(recipe.image_suffix) < len(recipe.label_suffix)
    named, rest = (labels, images) if are_images_the_rest else (images, labels)
    taken = set(named.values())
    rest = {name: path for name, path in rest.items() if path not in taken}
    return (rest, named) if are_images_the_rest else (named, rest)


def _find_folders(recipe: Recipe, split: str, folder: Path) -> tuple[Path, Path, str | None]:
    """Folders of images and label maps, and the split's name in them; `None` if they are not split."""
    pair = (recipe.image_folder, recipe.label_folder)
    if recipe.split_file is not None or any("{split}" in part for part in pair):
        templates = [pair]
    else:
        templates = [tuple(f"{part}/{{split}}" for part in pair), tuple(f"{{split}}/{part}" for part in pair)]
    tried = []
    for alias in _aliases(recipe, split):
        for template in templates:
            found = tuple(folder / part.format(split=alias) for part in template)
            if all(path.is_dir() for path in found):
                return *found, alias
            tried.append(" and ".join(str(path.relative_to(folder)) for path in found))
    plain = tuple(folder / part for part in pair)
    is_split = any(
        (folder / part.format(split=alias)).is_dir()
        for aliases in _SPLIT_ALIASES.values()
        for alias in aliases
        for template in templates
        for part in template
    )
    if all(path.is_dir() for path in plain) and not is_split:
        return *plain, None
    raise FileNotFoundError(
        f"{folder} does not have the {split} split: looked for parquet files and for the folders "
        f"{listed(tried)}{'' if is_split else f', or {pair[0]} and {pair[1]}'}. The recipe's fields image_folder and "
        f"label_folder name them.{_known_layout(folder)}"
        f"{_divided(split, 'folders that name no split') if is_split else ''}"
    )


def _divided(split: str, what: str) -> str:
    """The way to a validation split where there is none, to go on with after an error."""
    return f" Of {what}, a part is held out for it (validation_fraction)." if split == "validation" else ""


def _known_layout(folder: Path) -> str:
    """What to do with a folder as tools export it, to go on with after an error."""
    for labels in ("SegmentationClassPNG", "SegmentationClass"):  # beside the first the second holds arrays (LabelMe)
        if (folder / labels).is_dir():
            first = "" if (folder / "JPEGImages").is_dir() else "put the pictures into JPEGImages, then "
            return f" Here: {first}--image_folder JPEGImages --label_folder {labels}."
    if next(folder.glob("*/*_mask.png"), None):
        return " Here: --image_folder '{split}' --label_folder '{split}' --label_suffix _mask."
    if next(folder.glob("*_json/label.png"), None):
        return (
            " Here: labelme_json_to_dataset has numbered the classes of each picture anew: let LabelMe's labelme2voc.py "
            "make the masks."
        )
    if places := sorted({path.parent.relative_to(folder).as_posix() for path in files_below(folder)}):
        files = (path for pattern in ("*.json", "*/*.json") for path in folder.glob(pattern))
        has_json = any(path.name != "id2label.json" for path in files)
        advice = " Labels that are there as JSON alone have to be drawn as masks: see Labels in JSON in README.md."
        return f" Here, pictures lie in {listed([repr(place) for place in places])}.{advice if has_json else ''}"
    return ""


def _files_by_name(folder: Path, suffix: str) -> dict[str, Path]:
    """Image files below a folder whose stem ends with the suffix, by relative path without suffix and extension."""
    found: dict[str, Path] = {}
    for path in files_below(folder):
        if not path.stem.endswith(suffix):
            continue
        name = path.relative_to(folder).with_suffix("").as_posix().removesuffix(suffix)
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"The file name {str(path)!r} is not in UTF-8: rename it, as convmv does.") from error
        if name in found:
            raise ValueError(f"{found[name]} and {path} have the same name; keep one of them.")
        found[name] = path
    return found


def _listed_names(recipe: Recipe, split: str, folder: Path) -> set[str]:
    for alias in _aliases(recipe, split):
        paths = [folder / recipe.split_file.format(split=name) for name in (alias, alias.capitalize())]  # CVAT: Train
        for path in filter(Path.is_file, paths):
            return {line.strip() for line in read_text(path).splitlines() if line.strip()}
    raise FileNotFoundError(f"There is no list of the {split} split at {folder / recipe.split_file}.")


def _aliases(recipe: Recipe, split: str) -> list[str]:
    """The recipe's own name of the split, then the usual ones."""
    own = [recipe.splits[split]] if split in recipe.splits else []
    return list(dict.fromkeys([*own, *_SPLIT_ALIASES[split]]))


def _refuse_unknown_splits(folder: Path, paths: Iterable[Path], advice: str) -> None:
    """Samples without a known split are all trained on, unless their names suggest splits in a layout that is not known."""
    found: dict[str, Path] = {}
    for path in sorted(paths):
        words = set(re.split("[^a-z]+", path.relative_to(folder).as_posix().lower()))
        found |= {
            split: path for split, aliases in _SPLIT_ALIASES.items() if words & set(aliases) and split not in found
        }
    if len(found) > 1:
        names = ", ".join(f"{path.relative_to(folder)} of {split}" for split, path in found.items())
        raise FileNotFoundError(
            f"{folder} seems to be split ({names}?), but not as load_split knows it, and all of it would be trained on: "
            f"{advice}."
        )


def _hold_out(samples: Samples, recipe: Recipe, split: str, folder: Path) -> Samples:
    """Train or validation part of what is not split: a fraction, spread evenly over the order of names, is held out."""
    if split == "test":
        raise FileNotFoundError(
            f"{folder} is not split, so there is no test split: give it as sub-folders or files, or use the validation "
            "split, the part of it that is held out."
        )
    samples = without_decoding(samples)
    fraction = recipe.validation_fraction
    wanted = functools.partial(_is_part, fraction=fraction, held_out=split == "validation")
    if isinstance(samples, datasets.IterableDataset):
        if samples.num_shards > 1:  # which are shuffled and shared out, so that a sample's number is not its own
            raise ValueError(
                f"{folder} is a stream of {samples.num_shards} files without splits, of which no part can be held out: "
                "give the splits as sub-folders or files, or do not stream."
            )
        return samples.filter(wanted, with_indices=True)
    indices = [index for index in range(len(samples)) if wanted(None, index)]
    if not indices:
        raise ValueError(
            f"Of the {len(samples)} samples in {folder} none is left for {split} with validation_fraction {fraction}: "
            "add samples, change the fraction, give the splits as sub-folders, or train without validation (--eval_every 0)."
        )
    return samples.select(indices)


def _is_part(sample: Any, index: int, fraction: float, held_out: bool) -> bool:
    """Whether a sample is of the part that is held out, or of the other."""
    return held_out == (math.floor(index * fraction + 0.5) > math.floor((index - 1) * fraction + 0.5))


def _normalize_columns(samples: Samples, recipe: Recipe) -> Samples:
    # A stream would otherwise decode its pictures to rename their column, and encode them again.
    samples = without_decoding(samples)
    wanted = {recipe.image_column: "image", recipe.label_column: "label"}
    available = samples.column_names or list(next(iter(samples)))
    if recipe.name_column is not None:
        wanted[recipe.name_column] = "name"
    elif "name" in available:
        wanted["name"] = "name"
    if missing := [column for column in wanted if column not in available]:
        raise ValueError(
            f"The data has no column {listed(missing)}, only {listed(available)}: set image_column, label_column and "
            "name_column."
        )
    samples = samples.select_columns(list(wanted))
    samples = samples.rename_columns({old: new for old, new in wanted.items() if old != new})
    if recipe.task == "image-classification":
        samples = _with_labels_of(recipe, samples, "The label column", "class names")
    for column in ("image",) if recipe.task == "image-classification" else ("image", "label"):
        feature = (samples.features or {}).get(column)
        # Parquet files that other tools wrote hold the encoded pictures without saying so.
        is_encoded = isinstance(feature, dict) or getattr(feature, "dtype", None) in (
            "binary",
            "large_binary",
            "string",
        )
        if is_encoded or isinstance(feature, datasets.Image):
            samples = samples.cast_column(column, datasets.Image())
    return samples


def with_classes_of(recipe: Recipe, samples: Samples) -> Recipe:
    """The recipe, with the class names of an image-classification set's label column where it has none of its own.

    Raises:
        ValueError: if neither knows how many classes there are.
    """
    if recipe.num_classes is not None:
        return recipe
    feature = (samples.features or {}).get("label")
    if isinstance(feature, datasets.ClassLabel):
        return recipe.replace(class_names=feature.names)
    raise ValueError(
        f"The recipe {recipe.name} names no classes: put classes.txt (a name a line) or id2label.json into the data "
        "folder, or give --class_names NAME NAME ..."
    )


# -------------------------------------------------------------------------------------------------------------------
# Samples
# -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A decoded sample: image uint8 (3, H, W); labels uint8 (H, W) with 255 for void, or the class id; its name."""

    image: torch.Tensor
    labels: torch.Tensor | int
    name: str


class SampleDecoder:
    """Decodes and checks a sample of `load_split`.

    Args:
        recipe: gives classes and label mapping.
        center_crop: (height, width) of the middle that is kept of image and label map, as of a camera of another shape.

    Raises (when called):
        BadSampleError: unreadable image or label map, sizes that differ, labels that are no integers or no class, no
            labelled pixel at all; smaller than `center_crop`.
    """

    def __init__(self, recipe: Recipe, center_crop: tuple[int, int] | None = None):
        if recipe.num_classes is None:
            raise ValueError(f"The recipe {recipe.name} does not know its classes yet: see with_classes_of.")
        if center_crop is not None and min(center_crop) < 1:
            raise ValueError(f"center_crop must be a height and a width of at least 1, got {center_crop}.")
        self.recipe, self.center_crop = recipe, center_crop
        self._class_of, self._is_known = _label_table(recipe)
        self._colors, self._label_of_color = _color_table(recipe)

    def __call__(self, sample: dict[str, Any], index: int | None = None) -> Sample:
        name = sample_name(sample, index)
        try:
            image = _decode_image(sample["image"])
            if self.recipe.task == "image-classification":
                return Sample(image, self._class_id(sample["label"]), name)
            labels = self._decode_labels(sample["label"])
            if image.shape[1:] != labels.shape:
                turned = image.shape[:0:-1] == labels.shape
                raise ValueError(
                    f"the image has {image.shape[2]}×{image.shape[1]} pixels and the label map "
                    f"{labels.shape[1]}×{labels.shape[0]}"
                    + (" (both are turned as their EXIF orientation says: does only one have it?)" if turned else "")
                )
            if self.center_crop is not None:
                image, labels = self._middle(image), self._middle(labels)
            self._check_size(tuple(labels.shape))
            return Sample(image, labels, name)
        except Exception as error:  # whatever a decoder raises, the sample's name is what helps
            number = "" if index is None else f" {index}"
            raise BadSampleError(
                f"Sample{number} ({name!r}) cannot be used: {error}. scripts/check_dataset.py, with the same --recipe "
                "and --data_dir, lists every such sample.",
                name,
                str(error),
            ) from error

    def _middle(self, pixels: torch.Tensor) -> torch.Tensor:
        (height, width), (rows, columns) = pixels.shape[-2:], self.center_crop
        if rows > height or columns > width:
            raise ValueError(f"it has {width}×{height} pixels, of which center_crop cannot keep {columns}×{rows}")
        return F.center_crop(pixels, [rows, columns])

    def _check_size(self, stored: tuple[int, int]) -> None:
        """What evaluation gives the network must not be too small for it; training pads."""
        height, width = resized_size(stored, self.recipe)
        if min(height, width) < MINIMUM_SIZE:
            raise ValueError(
                f"the network is given {width}×{height} pixels of it, and needs at least {MINIMUM_SIZE} on each side: "
                "leave it out, or enlarge images by the recipe's resize"
            )

    def _decode_labels(self, value: Any) -> torch.Tensor:
        stored = read_label_map(value) if self._colors is None else self._labels_of_colors(_open_colors(value))
        lowest, highest = int(stored.min()), int(stored.max())
        if lowest < 0 or highest > _LARGEST_STORED_LABEL:
            raise ValueError(f"its labels span {lowest}…{highest}, outside 0…{_LARGEST_STORED_LABEL}")
        present = np.flatnonzero(np.bincount(stored.ravel()))
        if unknown := [int(label) for label in present if not self._is_known[label]]:
            raise ValueError(
                f"stored labels {listed(unknown)} are out of range: there are {self.recipe.num_classes} classes"
                f"{', reduced by one,' if self.recipe.reduce_labels else ''} and {IGNORE_INDEX} for void. "
                "reduce_labels is for labels that count from 1, and label_map gives any others a class"
            )
        if not self.recipe.allow_all_void and (self._class_of[present] == IGNORE_INDEX).all():
            raise ValueError("all its pixels are void (allow_all_void accepts that)")
        return torch.from_numpy(self._class_of[stored])

    def _labels_of_colors(self, pixels: np.ndarray) -> np.ndarray:
        """Stored labels (H, W) of colours (H, W, 3)."""
        colours = pixels.astype(np.int32) @ _COLOR_DIGITS
        nearest = np.searchsorted(self._colors, colours).clip(max=len(self._colors) - 1)
        if (strange := self._colors[nearest] != colours).any():
            found, counts = np.unique(pixels[strange], axis=0, return_counts=True)
            shown = [tuple(map(int, colour)) for colour in found[(-counts).argsort(kind="stable")]]
            blended = (
                " (as smooth resizing blends them: resize label maps by nearest neighbour)" if len(found) > 10 else ""
            )
            raise ValueError(
                f"{strange.sum()} of its pixels have colours that are none of label_colors or void_colors: "
                f"{listed(shown)}{blended}"
            )
        return self._label_of_color[nearest]

    def _class_id(self, value: Any) -> int:
        if isinstance(value, str):
            value = self.recipe.label2id.get(value, value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < self.recipe.num_classes:
            raise ValueError(f"its label {value!r} is none of the {self.recipe.num_classes} classes")
        return value


def sample_name(sample: dict[str, Any], index: int | None = None) -> str:
    """Name of a sample: its `name`, else the file name of its image, else its index."""
    if sample.get("name") is not None:
        return str(sample["name"])
    image = sample.get("image")
    path = image.get("path") if isinstance(image, dict) else None
    return Path(path).name if path else str(index)


def _label_table(recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """For each label that can be stored: the class that it means (255 for void), and whether the recipe knows it."""
    class_of = np.full(_LARGEST_STORED_LABEL + 1, IGNORE_INDEX, dtype=np.uint8)
    known = np.zeros(_LARGEST_STORED_LABEL + 1, dtype=bool)
    if recipe.task == "image-classification":
        return class_of, known
    if recipe.label_map is not None:
        for stored, label in recipe.label_map.items():
            class_of[stored] = label
        known[:] = True
        return class_of, known
    first = int(recipe.reduce_labels)
    class_of[first : first + recipe.num_classes] = np.arange(recipe.num_classes)
    known[: first + recipe.num_classes] = True
    known[IGNORE_INDEX] = True
    return class_of, known


_COLOR_DIGITS = np.array([256**2, 256, 1], dtype=np.int32)


def _color_table(recipe: Recipe) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The colours of label maps as numbers in ascending order, and the stored label of each; `None` if they hold labels."""
    if recipe.label_colors is None:
        return None, None
    colours = np.array(recipe.label_colors + recipe.void_colors, dtype=np.int32) @ _COLOR_DIGITS
    labels = np.array([*range(len(recipe.label_colors)), *[IGNORE_INDEX] * len(recipe.void_colors)], dtype=np.uint16)
    order = colours.argsort()
    return colours[order], labels[order]


def open_stored(value: Any) -> Image.Image:
    """A picture, not read yet, of what a data set stores: bytes or a path, a picture, or an array."""
    if isinstance(value, dict):
        source = io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value["path"]
        # A local file of a Dataset; of a stream, `xopen`-able addresses come with their bytes.
        return open_picture(source)
    return value if isinstance(value, Image.Image) else Image.fromarray(np.asarray(value))


def _open(value: Any, is_label_map: bool = False) -> Image.Image:
    value = open_stored(value)
    if is_label_map and (value.format in ("JPEG", "MPO") or value.info.get("compression") == "jpeg"):
        raise ValueError("its label map is a JPEG, which blends neighbouring labels into others: store it as PNG")
    if is_label_map and value.format == "JPEG2000":
        raise ValueError(
            "its label map is a JPEG 2000, which may blend neighbouring labels into others: store it as PNG"
        )
    if is_label_map and (pages := number_of_pages(value)) > 1:
        raise ValueError(
            f"its label map has {pages} pages, of which the first alone would be read: store the labels of all classes in "
            "one"
        )
    # Reading the tag first spares the copy that exif_transpose makes of every upright picture.
    return ImageOps.exif_transpose(value) if value.getexif().get(0x0112, 1) != 1 else value


def _decode_image(value: Any) -> torch.Tensor:
    """Any picture as uint8 RGB (3, H, W), with rows of interleaved pixels, which torchvision resizes fastest."""
    pixels = np.array(to_rgb(_open(value)))
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (H, W, 3) → (3, H, W)


def read_label_map(value: Any) -> np.ndarray:
    """A label map of any integer kind, encoded or not, as an array (H, W) of the labels that it stores.

    Raises:
        ValueError: for pictures in colours and for arrays that are not integers in (H, W).
    """
    stored = np.asarray(value) if isinstance(value, (list, np.ndarray)) else None
    if stored is None:
        image = _open(value, is_label_map=True)
        if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;"):
            raise ValueError(
                f"its label map has mode {image.mode}, not one integer class id a pixel: turn colours into class ids, or "
                "give each class its colour, in label_colors or in lines of classes.txt such as 'road 128 64 128'"
                f"{_colors_of(image)}"
            )
        stored = np.asarray(image)
    if stored.ndim != 2 or stored.dtype.kind not in "bui":
        raise ValueError(f"its label map has shape {stored.shape} and type {stored.dtype}, not integers in (H, W)")
    return stored.astype(np.uint8) if stored.dtype.kind == "b" else stored


def _colors_of(image: Image.Image) -> str:
    """A hint at the colours of a label map, the most frequent ones first; "" where they are too many to be classes."""
    colours = image.convert("RGB").getcolors(maxcolors=256) if image.mode in ("RGB", "RGBA") else None
    if not colours:
        return ""
    return f"; it has the colours {listed([colour for _, colour in sorted(colours, reverse=True)])}"


def _open_colors(value: Any) -> np.ndarray:
    """A label map in colours as an array (H, W, 3); grey ones and those with a table of colours are pictures too."""
    image = _open(np.asarray(value, dtype=np.uint8) if isinstance(value, list) else value, is_label_map=True)
    if image.mode not in ("1", "L", "P", "RGB", "RGBA", "LA", "PA"):
        raise ValueError(f"its label map has mode {image.mode}, not the 8-bit RGB colours that label_colors names")
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise ValueError("its label map is transparent in places: save it without transparency")
    return np.asarray(image.convert("RGB"))


# -------------------------------------------------------------------------------------------------------------------
# torch data sets
# -------------------------------------------------------------------------------------------------------------------


class _Transform:
    """Decoded sample → what the network is given, by task and purpose."""

    def __init__(self, recipe: Recipe, training: bool, seed: int):
        self.recipe, self.training, self.seed = recipe, training, seed
        is_classification = recipe.task == "image-classification"
        self.augment = (ClassificationAugmentation if is_classification else SegmentationAugmentation)(recipe)

    def __call__(self, sample: Sample, epoch: int, index: int) -> dict[str, Any]:
        image, labels = sample.image, sample.labels
        if not self.training:
            image = resize_for_evaluation(image, self.recipe)
        elif self.recipe.task == "image-classification":
            image = self.augment(image, sample_generator(self.seed, epoch, index))
        else:
            image, labels = self.augment(image, labels, sample_generator(self.seed, epoch, index))
        return {"pixel_values": image.contiguous(), "labels": labels, "index": index, "name": sample.name}


class RecipeDataset(torch.utils.data.Dataset):
    """Samples of a split as the network is given them.

    Args:
        samples: from `load_split`, not streamed.
        recipe: of the data set.
        training: augment, rather than resize as the recipe says for evaluation.
        seed: of the augmentation.
        cache: "memory" decodes everything once, when it is made (3 + 1 bytes a pixel), and worker processes share it;
            "device" keeps the images on a GPU instead, where they are augmented too (without worker processes); `None`
            decodes when asked.
        device: where "device" keeps the images.
        center_crop: (height, width) of the middle of each image that is looked at, or `None`.

    `dataset[index]`, or `dataset[epoch, index]` as `EpochSampler` asks, is a dictionary of `pixel_values` (uint8,
    (3, H, W); see `normalize`), `labels` (uint8, (H, W), 255 is void; or the class id), `index` and `name`. In
    evaluation the labels keep the stored size. It depends on nothing but seed, epoch and index; only the rounding of
    `pixel_values` may depend on the device that augments them.

    Raises:
        BadSampleError: when asked for a sample that cannot be used; with a cache, when the data set is made.
    """

    def __init__(
        self,
        samples: datasets.Dataset,
        recipe: Recipe,
        training: bool = False,
        seed: int = 0,
        cache: Literal["memory", "device"] | None = None,
        device: torch.device | str | None = None,
        center_crop: tuple[int, int] | None = None,
    ):
        if cache not in (None, "memory", "device"):
            raise ValueError(f'cache must be "memory", "device" or None, got {cache!r}.')
        self.samples = without_decoding(samples)
        self.decode = SampleDecoder(recipe, center_crop)
        self.transform = _Transform(recipe, training, seed)
        self._cached = None
        if cache is not None:
            positions = tqdm(range(len(samples)), desc="Decoding", unit="image", leave=False)
            self._cached = [self.decode(self.samples[index], index) for index in positions]
        if cache == "device":
            self._cached = [replace(sample, image=sample.image.contiguous().to(device)) for sample in self._cached]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return self.transform(self.decoded(index), epoch, index)

    def decoded(self, index: int) -> Sample:
        """The sample as it is stored."""
        return self._cached[index] if self._cached is not None else self.decode(self.samples[index], index)


class StreamedRecipeDataset(IterableDataset):
    """Streamed samples as the network is given them: like `RecipeDataset`, in the order in which they come.

    In training it goes round and round, shuffled within `recipe.shuffle_buffer_size` samples, anew each epoch, and
    `index` is a checksum of the image's bytes, or of its name where it is a file of its own, so that the augmentation
    depends on nothing but seed, epoch and image, wherever it lies.

    Args:
        samples: from `load_split(..., streaming=True)`.
        recipe: of the data set.
        training: augment and repeat, rather than pass once over the set.
        seed: of shuffling and augmentation.
        rank, world_size: of the process, which gets its own part of the stream.
        batch_size: of the `DataLoader`; needed with `start`.
        start: batches that an interrupted run of as many processes and workers has consumed in this process. They are
            read past without decoding: `collate` makes them `None`, which the loop skips.
        center_crop: (height, width) of the middle of each image that is looked at, or `None`.
    """

    def __init__(
        self,
        samples: datasets.IterableDataset,
        recipe: Recipe,
        training: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int = 1,
        start: int = 0,
        center_crop: tuple[int, int] | None = None,
    ):
        self.samples = split_dataset_by_node(without_decoding(samples), rank, world_size)
        self.decode = SampleDecoder(recipe, center_crop)
        self.transform = _Transform(recipe, training, seed)
        self.training, self.seed, self.batch_size, self.start = training, seed, batch_size, start
        self.shuffle_buffer_size = recipe.shuffle_buffer_size

    @property
    def max_workers(self) -> int:
        """More worker processes than this would find nothing to read."""
        return self.samples.num_shards

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        skip = self._samples_to_skip()
        for epoch in itertools.count() if self.training else (0,):
            is_empty = True
            for number, sample in enumerate(self._shuffled(epoch) if self.training else self.samples):
                is_empty = False
                if skip > 0:
                    skip -= 1
                    yield None
                    continue
                yield self.transform(self.decode(sample, number), epoch, _checksum(sample["image"]))
            if is_empty:
                return

    def _shuffled(self, epoch: int) -> datasets.IterableDataset:
        # Not `set_epoch`: worker processes share that number, and the first one to finish an epoch would change the
        # order of the others in the middle of theirs.
        seed = int(np.random.default_rng((self.seed, epoch)).integers(2**31))
        return self.samples.shuffle(seed=seed, buffer_size=self.shuffle_buffer_size)

    def _samples_to_skip(self) -> int:
        """The loader takes batches from its workers in turn, so this is the share of this worker in `start`."""
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        return self.batch_size * len(range(number, self.start, count))


class EpochSampler(Sampler[tuple[int, int]]):
    """Endless shuffled (epoch, index) pairs, each epoch a permutation of its own, from any position on.

    All processes walk one sequence, process `rank` taking every `world_size`-th position: which samples make up an
    optimizer step does not depend on the number of processes.

    Args:
        num_samples: length of the data set.
        seed: of the permutations.
        start: position to go on from: samples that all processes have consumed together.
        stop: position to end at, `None` for never.
        rank, world_size: of the process.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int = 0,
        start: int = 0,
        stop: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        if num_samples < 1:
            raise ValueError("The data set is empty: there is nothing to sample from.")
        self.num_samples, self.seed = num_samples, seed
        self.start, self.stop, self.rank, self.world_size = start, stop, rank, world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order, order_epoch = None, None
        for position in itertools.count(self.start + self.rank, self.world_size):
            if self.stop is not None and position >= self.stop:
                return
            epoch, offset = divmod(position, self.num_samples)
            if epoch != order_epoch:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
                order_epoch = epoch
            yield epoch, int(order[offset])


def inheriting_workers(num_workers: int) -> str | None:
    """`multiprocessing_context` of a `DataLoader`: on Linux its workers inherit the data set, with what it keeps in memory,
    also where Python (3.14) would send it to them, a file descriptor for each picture."""
    return "fork" if num_workers and sys.platform == "linux" else None


def collate(samples: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """A batch: `pixel_values` uint8 (B, 3, H, W), `labels` uint8 (B, H, W) or int64 (B,), `index` and `name` lists.
    `None` for a batch that a resumed stream reads past.

    Raises:
        BadSampleError: if the samples differ in size; names the first that does.
    """
    if samples[0] is None:
        return None
    batch: dict[str, Any] = {key: [sample[key] for sample in samples] for key in samples[0]}
    for key in ("pixel_values", "labels"):
        if isinstance(batch[key][0], int):
            batch[key] = torch.tensor(batch[key])
            continue
        if len({value.shape for value in batch[key]}) > 1:
            odd = next(index for index, value in enumerate(batch[key]) if value.shape != batch[key][0].shape)
            reason = f"the {key} of a batch differ in size ({listed([tuple(v.shape) for v in batch[key]])})"
            name = batch["name"][odd]
            raise BadSampleError(f"Sample {name!r}: {reason}. Evaluate them with --eval_batch_size 1.", name, reason)
        batch[key] = torch.stack(batch[key])
    return batch


def without_decoding(samples: _Samples) -> _Samples:
    """The samples with pictures as they are stored, bytes or path, so that a broken one fails under its own name."""
    for column, feature in (samples.features or {}).items():
        if isinstance(feature, datasets.Image):
            samples = samples.cast_column(column, datasets.Image(decode=False))
    return samples


def _checksum(image: Any) -> int:
    if isinstance(image, dict):
        content = image.get("bytes")
        return zlib.crc32(PurePath(image["path"]).name.encode() if content is None else content)
    return zlib.crc32(np.asarray(image).tobytes())
