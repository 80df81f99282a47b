# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Read a data set once and tell whether a training would get through it.

    python scripts/check_dataset.py --recipe camvid --data_dir DIR

Prints class frequencies, sizes and every sample that would fail with the reason, draws a few samples as a grid, and
exits with status 1 if anything would fail. The fields of the recipe that describe the data are options too
(`--reduce_labels`).
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetNotFoundError
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lemore_hf.command_line import at_least, run_script
from lemore_hf.data.loading import (
    BadSampleError,
    Sample,
    SampleDecoder,
    load_split,
    open_stored,
    with_classes_of,
    without_decoding,
)
from lemore_hf.data.recipes import (
    ALL_FIELDS,
    IGNORE_INDEX,
    SINGLE_CLASS,
    TRAINING_FIELDS,
    Recipe,
    add_data_arguments,
    add_recipe_arguments,
    listed,
    load_recipe,
    recipe_overrides,
    split_names,
)
from lemore_hf.hardware import usable_cores
from lemore_hf.pictures import number_of_pages
from lemore_hf.visualization import draw_segmentation, image_grid

SHOWN = 10  # samples that fail for one reason
DARK = 64  # what 14 bits in files of 16 reach


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--split", help="only these splits, joined by '+'; by default all that are there")
    parser.add_argument("--streaming", action="store_true", help="read without keeping anything on disk")
    parser.add_argument(
        "--num_workers",
        type=at_least(0),
        help="processes that decode (default: 2, or 1 on one core); not with --streaming",
    )
    parser.add_argument(
        "--picture",
        type=Path,
        default=Path("dataset_check.png"),
        help="where the grid is written (default: %(default)s)",
    )
    parser.add_argument(
        "--num_pictures",
        type=at_least(0),
        default=4,
        help="samples of each split in the grid (default: 4); 0 for none",
    )
    parser.add_argument("--all", action="store_true", help=f"list all samples of a reason, not the first {SHOWN}")
    add_recipe_arguments(parser, ALL_FIELDS - TRAINING_FIELDS)
    args = parser.parse_args()
    if args.streaming and args.num_workers is not None:
        parser.error("--streaming reads in one process: leave --num_workers out.")
    if args.num_pictures and args.picture.suffix.lower() not in Image.registered_extensions():
        parser.error(f"--picture must be the name of a picture, such as dataset_check.png, got {args.picture}")
    args.num_workers = min(2, usable_cores()) if args.num_workers is None else args.num_workers
    return args


@dataclass(frozen=True)
class Inspection:
    """What was found in a sample."""

    name: str
    reason: str | None = None
    """Why it would fail, `None` if it would not."""
    size: tuple[int, int] = (0, 0)
    """(height, width)."""
    counts: dict[int, int] = field(default_factory=dict)
    """Pixels (segmentation) or images (classification) of each class and of void."""
    brightest: int = 0
    """Highest value of the image, of 0…255."""
    pages: int = 1
    """Pictures in the image's file."""
    sample: Sample | None = None
    """The sample, where a picture of it is wanted."""


@dataclass
class Report:
    """What was found in a split."""

    num_samples: int = 0
    counts: Counter = field(default_factory=Counter)
    occurrences: Counter = field(default_factory=Counter)
    """Images in which each class occurs."""
    sizes: Counter = field(default_factory=Counter)
    brightest: int = 0
    """Highest value of all images, of 0…255."""
    with_pages: list[str] = field(default_factory=list)
    """Names of the samples whose images have several pages."""
    failures: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason of each sample that would fail."""
    pictures: list[Sample] = field(default_factory=list)

    def add(self, inspection: Inspection) -> None:
        self.num_samples += 1
        if inspection.reason is not None:
            self.failures.append((inspection.name, inspection.reason))
            return
        self.counts.update(inspection.counts)
        self.occurrences.update(inspection.counts.keys())
        self.sizes[inspection.size] += 1
        self.brightest = max(self.brightest, inspection.brightest)
        if inspection.pages > 1:
            self.with_pages.append(inspection.name)
        if inspection.sample is not None:
            self.pictures.append(inspection.sample)


class InspectedSamples(torch.utils.data.Dataset):
    """The inspections of a split's samples, for worker processes.

    Args:
        samples: from `load_split`, with pictures not decoded.
        recipe: of the data set.
        num_pictures: samples to keep for the picture, evenly spaced.
    """

    def __init__(self, samples: Dataset, recipe: Recipe, num_pictures: int):
        self.samples, self.decode = samples, SampleDecoder(recipe)
        self.shown = {index * len(samples) // num_pictures for index in range(num_pictures)}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Inspection:
        return inspect_sample(self.samples[index], self.decode, index, index in self.shown)


def inspect_sample(stored: dict[str, Any], decode: SampleDecoder, index: int, keep: bool) -> Inspection:
    try:
        sample = decode(stored, index)
    except BadSampleError as error:
        return Inspection(error.sample, error.reason)
    labels = sample.labels
    values, counts = ([labels], [1]) if isinstance(labels, int) else np.unique(labels.numpy(), return_counts=True)
    found = {int(value): int(count) for value, count in zip(values, counts, strict=True)}
    return Inspection(
        sample.name,
        size=tuple(sample.image.shape[1:]),
        counts=found,
        brightest=int(sample.image.max()),
        pages=number_of_pages(open_stored(stored["image"])),
        sample=sample if keep else None,
    )


def main() -> int:
    args = parse_arguments()
    recipe = load_recipe(args.recipe, recipe_overrides(args), args.data_dir)
    if args.data_dir is None and recipe.dataset is None:
        raise ValueError(f"The recipe {recipe.name} needs a local folder: --data_dir. {recipe.notes}")
    if args.data_dir is not None and not args.data_dir.expanduser().is_dir():
        raise FileNotFoundError(f"The data folder {args.data_dir} does not exist.")
    print(f"{recipe.title or recipe.name}: {args.data_dir or recipe.dataset}")
    pictures, problems = [], []
    for split in split_names(args.split) if args.split else recipe.splits:
        try:
            samples = load_split(recipe, split, args.data_dir, args.streaming)
        except DatasetNotFoundError:  # of no use to look for the other splits
            raise
        except (FileNotFoundError, ValueError) as error:
            if args.split or not isinstance(error, FileNotFoundError) or split in split_names(recipe.train_on):
                problems.append((split, str(error)))
            elif split in split_names(recipe.validate_on):
                problems.append((split, f"{error} Or train without validation: --eval_every 0."))
            else:
                print(f"\n{split}: not there")
            continue
        recipe = with_classes_of(recipe, samples)
        report = check_split(samples, recipe, split, args)
        print_report(report, recipe, split)
        problems += [(f"{split}: {name}", reason) for name, reason in report.failures]
        problems += [(split, reason) for reason in problems_of_all(report, recipe, split)]
        pictures += [(f"{split}: {sample.name}", sample) for sample in report.pictures]
    if problems:
        print(f"\nA training or an evaluation would fail ({len(problems)}):")
        print("\n".join(f"  {line}" for line in problem_lines(problems, None if args.all else SHOWN)))
    else:
        print("\nEvery sample can be trained on.")
    if pictures:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        draw_samples(pictures, recipe, args.num_pictures).save(args.picture)
        print(f"\n{len(pictures)} samples are drawn in {args.picture}.")
    return 1 if problems else 0


def problems_of_all(report: Report, recipe: Recipe, split: str) -> Iterator[str]:
    """What is wrong with the samples of a split together, though each could be used."""
    if recipe.task != "semantic-segmentation":
        return
    if split == "train" and len(report.counts.keys() - {IGNORE_INDEX}) == 1:
        yield f"its masks {SINGLE_CLASS}"
    if split in split_names(recipe.validate_on) and min(len(report.sizes), recipe.eval_batch_size) > 1:
        yield (
            f"images of {len(report.sizes)} sizes cannot be validated {recipe.eval_batch_size} at a time: give "
            "--eval_batch_size 1."
        )


def problem_lines(problems: list[tuple[str, str]], shown: int | None) -> Iterator[str]:
    """A line for each problem, of one kind no more than `shown`: a hundred thousand samples may have the same."""
    kinds: Counter = Counter()
    for place, reason in problems:
        kinds[reason] += 1
        if shown is None or kinds[reason] <= shown:
            yield f"{place}: {reason}"
    for reason, number in kinds.items():
        if shown is not None and number > shown:
            yield f"... and {number - shown} more (--all lists them): {reason}"


def check_split(samples: Dataset | IterableDataset, recipe: Recipe, split: str, args: argparse.Namespace) -> Report:
    """Decodes every sample of a split once."""
    report = Report()
    samples = without_decoding(samples)
    if isinstance(samples, Dataset):
        inspected = InspectedSamples(samples, recipe, args.num_pictures)
        inspections = DataLoader(inspected, batch_size=None, num_workers=args.num_workers)
    else:
        decode = SampleDecoder(recipe)
        inspections = (inspect_sample(s, decode, index, index < args.num_pictures) for index, s in enumerate(samples))
    total = len(samples) if isinstance(samples, Dataset) else None
    for inspection in tqdm(inspections, total=total, desc=f"Checking {split}", unit="image"):
        report.add(inspection)
    if report.num_samples == 0:
        report.failures.append(("the set", "there are no samples"))
    return report


def print_report(report: Report, recipe: Recipe, split: str) -> None:
    usable = report.sizes.total()
    print(f"\n{split}: {report.num_samples} samples, {usable} usable")
    if usable == 0:
        return
    heights, widths = zip(*report.sizes, strict=True)
    common = ", ".join(f"{w}×{h} ({count})" for (h, w), count in report.sizes.most_common(3))
    print(
        f"sizes (width×height): {len(report.sizes)} different, widths {min(widths)}…{max(widths)}, heights "
        f"{min(heights)}…{max(heights)}; most common {common}"
    )
    void = report.counts.get(IGNORE_INDEX, 0) if recipe.task == "semantic-segmentation" else 0
    labelled = report.counts.total() - void
    unit = "pixels" if recipe.task == "semantic-segmentation" else "images"
    names = recipe.id2label
    width = max(len("class"), *(len(name) for name in names.values()))
    print(f"  id  {'class':{width}}  {unit:>8}  in images")
    for index, name in names.items():
        share = 100 * report.counts[index] / max(labelled, 1)
        never = "  never occurs" if report.counts[index] == 0 else ""
        print(f"{index:4}  {name:{width}}  {share:7.3f}%  {report.occurrences[index]:9}{never}")
    if void:
        print(f"      {'void':{width}}  {100 * void / report.counts.total():7.3f}% of all pixels")
    if report.with_pages:
        print(f"Of {len(report.with_pages)} files only the first page is used: {listed(report.with_pages)}.")
    if report.brightest <= DARK:
        print(
            f"All images are dark, their highest value is {report.brightest} of 255. Files of 16 bits are taken as 0…65535: if "
            "these hold fewer bits, stretch them to that range, also those that you predict (12 bits: times 16)."
        )


def draw_samples(pictures: list[tuple[str, Sample]], recipe: Recipe, columns: int) -> Image.Image:
    """The samples as a grid, label maps drawn over the images."""
    drawn, titles = [], []
    for title, sample in pictures:
        if isinstance(sample.labels, int):
            drawn.append(sample.image)
            titles.append(f"{title}: {recipe.id2label[sample.labels]}")
        else:
            drawn.append(draw_segmentation(sample.image, sample.labels, recipe.id2label, recipe.palette))
            titles.append(title)
    return image_grid(drawn, columns=columns, titles=titles, cell_size=(360, 640))


if __name__ == "__main__":
    run_script(main)
