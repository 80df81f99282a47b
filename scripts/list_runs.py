# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Tabulate trainings that `scripts/evaluate.py --runs` has kept: which weights each began with, how long, what it scores.

python scripts/list_runs.py --runs model_cards/runs.jsonl --names "lemore-camvid*" --table model_cards/camvid_stages.md
"""

import argparse
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lemore_hf.command_line import markdown_table, run_script

HEADER = ["run", "begins with", "steps", "batch", "rate", "input", "mixes", "head's stride", "hours", "test mIoU"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="file that evaluate.py keeps a line for each run in")
    parser.add_argument("--names", default="*", metavar="PATTERN", help="of the runs to list (default: all)")
    parser.add_argument("--table", type=Path, help="Markdown file; without it the table is printed")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    runs = [json.loads(line) for line in args.runs.read_text(encoding="utf-8").splitlines()]
    chosen = [run for run in runs if fnmatchcase(run["name"], args.names)]
    if not chosen:
        raise ValueError(f"--names {args.names}: none of the {len(runs)} runs in {args.runs} has such a name.")
    table = tabulate(chosen)
    if args.table is None:
        print(table)
    else:
        args.table.parent.mkdir(parents=True, exist_ok=True)
        origin = f'Printed by `scripts/list_runs.py --runs {args.runs.as_posix()} --names "{args.names}"`.'
        args.table.write_text(f"# Runs {args.names}\n\n{table}\n\n{origin}\n", encoding="utf-8")


def tabulate(runs: list[dict[str, Any]]) -> str:
    """A row for each run, and what they took together."""
    table = markdown_table([HEADER, *map(row, runs)], num_texts=2, padded=False)
    return f"{table}\n\n{len(runs)} runs, {sum(run['hours'] for run in runs):.1f} hours."


def row(run: dict[str, Any]) -> list[str]:
    settings = run["settings"]
    recipe = {name.removeprefix("recipe."): value for name, value in settings.items() if name.startswith("recipe.")}
    mixing = {
        "CutMix": recipe.get("cutmix_alpha"),
        "ClassMix": recipe.get("classmix"),
        "MixUp": recipe.get("mixup_alpha"),
    }
    test = run.get("evaluation", {}).get("test", {})
    return [
        run["name"],
        begins_with(settings.get("init_from")) + taught_by(settings.get("teacher")),
        str(run["steps"]),
        str(recipe["batch_size"]),
        f"{recipe['learning_rate']:g}" + (", Muon" if recipe.get("optimizer") == "muon" else ""),
        "×".join(map(str, recipe["image_size"])),
        ", ".join(name for name, is_on in mixing.items() if is_on) or "–",
        str((recipe.get("model_config") or {}).get("output_stride", 8)),
        f"{run['hours']:.2f}",
        f"{100 * test['mean_iou']:.2f}" if "mean_iou" in test else "–",
    ]


def begins_with(init_from: str | list[str] | None) -> str:
    """The run whose weights these are, or of several the mean; by the names of their folders."""
    if not init_from:
        return "random weights"
    names = run_names([init_from] if isinstance(init_from, str) else init_from)
    return names[0] if len(names) == 1 else f"mean of {', '.join(names)}"


def taught_by(teacher: list[str] | None) -> str:
    """The runs whose probabilities were learned too."""
    return f"; taught by {', '.join(run_names(teacher))}" if teacher else ""


def run_names(folders: list[str]) -> list[str]:
    """What the runs are called whose models these folders hold; the folder itself where it is no run's."""
    paths = [Path(folder) for folder in folders]
    return [path.parent.name if path.name in ("final", "best") else path.as_posix() for path in paths]


if __name__ == "__main__":
    run_script(main)
