# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Publish a trained model on the Hugging Face Hub, with a card rendered from an evaluation's JSON.

    python scripts/push_to_hub.py --model runs/camvid/final --repo_id you/lemore-camvid --results metrics.json

Uploads what others need to load the model, in one commit, and nothing else that lies in the folder. With `--output` it
writes exactly these files to a local folder instead.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

import lemore_hf
from lemore_hf.checkpointing import atomic_folder
from lemore_hf.data.recipes import listed, load_recipe
from lemore_hf.hub import CARD, PICTURE_SUFFIXES, PublishingError, ensure_card, push_folder, read_json, validate_folder


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model, as training writes it")
    parser.add_argument("--repo_id", required=True, help="repository, NAME or NAMESPACE/NAME")
    parser.add_argument("--results", type=Path, help="JSON of scripts/evaluate.py: renders the card anew from it")
    parser.add_argument("--recipe", help="recipe of the training, for the card (default: the one the results name)")
    parser.add_argument("--license", help="Hub licence identifier of the weights (default: after the data's terms)")
    parser.add_argument(
        "--training_notes",
        type=Path,
        help="Markdown file on how the weights came about, for the card (default: the run)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what the repository or --output holds")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--refresh_code", action="store_true", help="first bring its code files up to this package's")
    parser.add_argument(
        "--figures", type=Path, nargs="+", default=[], help="pictures for the card, copied to figures/"
    )
    parser.add_argument("--output", type=Path, help="write the files to this folder, upload nothing")
    parser.add_argument("--dry_run", action="store_true", help="render and check, list the files, upload nothing")
    args = parser.parse_args(argv)
    try:
        validate_repo_id(args.repo_id)
    except HFValidationError as error:
        parser.error(f"--repo_id: {error}")
    if args.output and args.private:
        parser.error("--private is of a repository on the Hub, --output writes a folder: leave one of them out")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        results = read_json(args.results) if args.results else None
        name = args.recipe or (results or {}).get("recipe")
        card = {"results": results, "recipe": load_recipe(name) if name else None, "license": args.license}
        card["training_notes"] = args.training_notes.read_text(encoding="utf-8") if args.training_notes else None
        if args.figures and results is None and (args.model / CARD).is_file():
            raise PublishingError(
                f"--figures: {args.model} has a card already; give --results, so that it shows them."
            )
        if args.refresh_code:
            refresh_code(args.model)
        add_figures(args.model, args.figures)
        if args.dry_run or args.output:
            ensure_card(args.model, args.repo_id, **card)
            files = validate_folder(args.model)
            print(f"{args.repo_id} would hold: {', '.join(map(str, files))}")
            if args.output:
                copy_files(args.model, files, args.output, args.overwrite)
        else:
            address = push_folder(args.model, args.repo_id, **card, overwrite=args.overwrite, private=args.private)
            print(f"Published: {address}")
    except (PublishingError, OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")


def refresh_code(folder: Path) -> None:
    """A model that an older release saved keeps that release's code; here it gets this one's."""
    for path in Path(lemore_hf.__file__).parent.glob("*_lemore.py"):
        shutil.copyfile(path, folder / path.name)


def add_figures(folder: Path, figures: Sequence[Path]) -> None:
    if other := [str(path) for path in figures if path.suffix.lower() not in PICTURE_SUFFIXES]:
        raise PublishingError(f"--figures {', '.join(other)}: a card shows {', '.join(PICTURE_SUFFIXES)} only.")
    if len({path.name for path in figures}) < len(figures):
        raise PublishingError(f"--figures {', '.join(map(str, figures))}: two have one name, rename one of them.")
    for path in figures:
        (folder / "figures").mkdir(exist_ok=True)
        if path.resolve() != (folder / "figures" / path.name).resolve():
            shutil.copyfile(path, folder / "figures" / path.name)


def copy_files(folder: Path, files: Sequence[Path], output: Path, overwrite: bool) -> None:
    """Exactly `files` of a folder, in an output folder that may hold an older edition of them, or be overwritten."""
    if folder.resolve().is_relative_to(output.resolve()):
        raise PublishingError(f"--output {output} holds the model's own folder: give another, or --dry_run alone.")
    there = {path.relative_to(output) for path in output.rglob("*") if path.is_file()}
    if (lost := sorted(map(str, there.difference(files)))) and not overwrite:
        raise PublishingError(
            f"--output {output} holds what would be lost: {listed(lost, 8)}. Give another folder, or --overwrite."
        )
    with atomic_folder(output) as temporary:
        for path in files:
            (temporary / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / path, temporary / path)


if __name__ == "__main__":
    main()
