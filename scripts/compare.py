# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Train and evaluate the variants of a plan under one recipe, and tabulate what they score.

    python scripts/compare.py --plan scripts/plans/camvid_ablation.yaml --data_dir DIR --output_dir OUT \\
        --runs model_cards/runs.jsonl --table model_cards/camvid_ablation.md

A plan is a YAML file: options of `scripts/train.py` that all variants share, those in which each differs, and the splits
to evaluate on. A variant's `init_from` and `teacher` may name variants before it, with whose weights it begins or whose
probabilities it learns. Started again, it goes on where it was stopped; `--table_only` tabulates the runs there are.
"""

import argparse
import json
import re
import runpy
import shlex
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from lemore_hf.checkpointing import list_checkpoints, read_run
from lemore_hf.command_line import markdown_table, run_script
from lemore_hf.data.loading import load_split
from lemore_hf.data.recipes import (
    DESCRIPTIVE_FIELDS,
    EVALUATION_FIELDS,
    Recipe,
    load_recipe,
    nearest,
    read_text,
    refuse_repeated_keys,
    split_names,
)

SCRIPTS = Path(__file__).parent
RECIPE_FIELDS = {field.name for field in fields(Recipe)}
CHECKPOINT_OPTIONS = ("init_from", "teacher")  # name variants before, or folders: one or several
PLAN_KEYS = {"title", "notes", "recipe", "splits", "options", "variants"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, required=True, help="YAML file of the variants")
    parser.add_argument("--data_dir", type=Path, help="local folder of the data set; without it, from the Hub")
    parser.add_argument("--output_dir", type=Path, required=True, help="a folder for each variant is made in it")
    parser.add_argument("--runs", type=Path, required=True, help="file that keeps a line for each run")
    parser.add_argument("--table", type=Path, required=True, help="Markdown file of the comparison")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--only", nargs="+", metavar="VARIANT", help="run these variants alone")
    choice.add_argument("--table_only", action="store_true", help="train nothing, tabulate the runs there are")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    plan = load_plan(args.plan, args.data_dir)
    args.table.parent.mkdir(parents=True, exist_ok=True)
    wanted = args.only or ([] if args.table_only else list(plan["variants"]))
    if unknown := [name for name in wanted if name not in plan["variants"]]:
        raise ValueError(f"--only {' '.join(unknown)}: the variants of {args.plan} are {', '.join(plan['variants'])}.")
    names = [name for name in plan["variants"] if name in wanted]  # in their order: later ones may begin with earlier
    for name in names:
        for option, first in variants_needed(plan, name):
            if first not in names and read_run(args.output_dir / run_name(args.plan, first)) is None:
                needs = "begins with" if option == "init_from" else "learns from"
                raise ValueError(f"{name!r} {needs} {first!r}, which has not been run: name it after --only too.")
    for name in names:
        if read_run(args.output_dir / run_name(args.plan, name)) is None:
            for split in plan["splits"]:  # which are not to be missed after hours of training
                load_split(variant_recipe(plan, name, args.data_dir), split, args.data_dir)
            break
    for name in names:
        folder = args.output_dir / run_name(args.plan, name)
        train(plan, name, folder, args)
        for split in plan["splits"]:
            evaluate(plan, name, folder, split, args)
        args.table.write_text(tabulate(plan, args), encoding="utf-8")  # which a later variant may fail to reach
    text = tabulate(plan, args)
    args.table.write_text(text, encoding="utf-8")
    print(text)


def load_plan(path: Path, data_dir: Path | None) -> dict[str, Any]:
    """The plan, whose every variant is known to be a valid recipe."""
    text = read_text(path)
    refuse_repeated_keys(text)
    plan = yaml.safe_load(text)
    if not isinstance(plan, dict) or not {"title", "recipe", "variants"} <= plan.keys() <= PLAN_KEYS:
        raise ValueError(
            f"{path} must be a mapping with title, recipe and variants, and may have {sorted(PLAN_KEYS)}."
        )
    plan = {"notes": "", "splits": ["validation"], **plan, "options": plan.get("options") or {}}
    variants, splits = plan["variants"], plan["splits"]
    is_mapping = isinstance(variants, dict) and all(isinstance(options, dict | None) for options in variants.values())
    if not is_mapping or not variants:
        raise ValueError(f"The variants of {path} must map a name to options for each, got {variants!r}.")
    plan["variants"] = variants = {str(name): options for name, options in variants.items()}  # YAML has numbers too
    if not isinstance(plan["options"], dict):
        raise ValueError(f"The options of {path} must map names to values, got {plan['options']!r}.")
    if not isinstance(splits, list) or not splits:
        raise ValueError(f"The splits of {path} must be a list, such as [validation, test], got {splits!r}.")
    for split in splits:
        split_names(split, f"In {path}, each of the splits")
    if (recipe := load_recipe(plan["recipe"])).task != "semantic-segmentation":
        raise ValueError(f"The table of a plan is of mean IoU: {path} has the recipe {recipe.name} for {recipe.task}.")
    options_of_train = known_options("train.py")
    for number, name in enumerate(variants):
        for option, first in variants_needed(plan, name):
            if first in list(variants)[number:]:
                raise ValueError(
                    f"{path}, variant {name!r}: {option} names {first!r}, which must be a variant before it."
                )
        for option in plan["options"] | settings(plan, name):
            if option not in options_of_train:
                raise ValueError(
                    f"{path}, variant {name!r}: scripts/train.py has no option --{option}"
                    f"{nearest(str(option), options_of_train)}."
                )
        try:
            variant_recipe(plan, name, data_dir)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}, variant {name!r}: {error}") from error
    return plan


def known_options(script: str) -> list[str]:
    """The names of a script's options."""
    parser = runpy.run_path(str(SCRIPTS / script))["build_parser"]()
    return re.findall(r"--(\w+)", parser.format_usage())


def variant_recipe(plan: dict[str, Any], name: str, data_dir: Path | None) -> Recipe:
    changes = {key: value for key, value in training_options(plan, name).items() if key in RECIPE_FIELDS}
    return load_recipe(plan["recipe"], changes, data_dir)


def run_name(plan: Path, variant: str) -> str:
    return f"{plan.stem}-{variant.replace(' ', '_')}"


def option_words(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line; `true` is a switch."""
    words: list[str] = []
    for name, value in options.items():
        words.append(f"--{name}")
        if isinstance(value, dict):
            words.append(json.dumps(value))
        elif isinstance(value, list):
            words += [str(item) for item in value]
        elif value is not True:
            words.append(str(value))
    return words


def train(plan: dict[str, Any], name: str, folder: Path, args: argparse.Namespace) -> None:
    options, planned = training_options(plan, name), folder / "plan.json"
    is_begun = read_run(folder) is not None or list_checkpoints(folder)
    if is_begun and planned.is_file():
        changed = changes_since(json.loads(planned.read_text(encoding="utf-8")), as_kept(plan, options))
        if changed:
            raise ValueError(
                f"{folder} was trained with other settings of {', '.join(changed)} than {name!r} has in the plan today: "
                "name the variant anew, or delete the folder to train again."
            )
    if read_run(folder) is not None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    planned.write_text(json.dumps(as_kept(plan, options), indent=2) + "\n", encoding="utf-8")
    data = ["--data_dir", str(args.data_dir)] if args.data_dir else []
    for option in options.keys() & CHECKPOINT_OPTIONS:
        options[option] = [
            str(args.output_dir / run_name(args.plan, first) / "final") if first in plan["variants"] else first
            for first in checkpoints(options, option)
        ]
    run("train.py", "--recipe", plan["recipe"], *data, "--output_dir", str(folder), "--resume", *option_words(options))


def as_kept(plan: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """What `plan.json` keeps: the options, and what the recipe was that they change."""
    fields = load_recipe(plan["recipe"]).to_dict().items()
    recipe = {field: value for field, value in fields if field not in DESCRIPTIVE_FIELDS}
    return json.loads(json.dumps({**options, "recipe": recipe}))  # whose keys are words, those of a label map too


def changes_since(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Options and recipe's fields of another value; a field that was not there yet is none of them."""
    options = (before.keys() | now.keys()) - {"recipe"}
    changed = sorted(key for key in options if before.get(key) != now.get(key))
    fields = before.get("recipe", {}).items()
    return changed + [key for key, value in fields if key not in options and value != now["recipe"].get(key)]


def settings(plan: dict[str, Any], name: str) -> dict[str, Any]:
    """The options of a variant, without the column that the plan shows beside it."""
    return {key: value for key, value in (plan["variants"][name] or {}).items() if key != "paper"}


def training_options(plan: dict[str, Any], name: str) -> dict[str, Any]:
    """Without the switches that are off. A field of the recipe may be on there, so that its `false` counts."""
    options = plan["options"] | settings(plan, name)
    return {key: value for key, value in options.items() if value is not False or key in RECIPE_FIELDS}


def checkpoints(options: dict[str, Any], option: str) -> list[str]:
    """What `init_from` or `teacher` names, one or several: variants of the plan, or folders."""
    value = options.get(option, [])
    return [str(item) for item in (value if isinstance(value, list) else [value])]


def variants_needed(plan: dict[str, Any], name: str) -> list[tuple[str, str]]:
    """The variants that a variant begins with or learns from, each after the option that names it."""
    options = training_options(plan, name)
    named = [(option, first) for option in CHECKPOINT_OPTIONS for first in checkpoints(options, option)]
    return [(option, first) for option, first in named if first in plan["variants"]]


def evaluate(plan: dict[str, Any], name: str, folder: Path, split: str, args: argparse.Namespace) -> None:
    if split in (known_run(folder, args.runs) or {}).get("evaluation", {}):
        return
    data = ["--data_dir", str(args.data_dir)] if args.data_dir else []
    output = folder / f"{split}.json"
    words = ["--model", str(folder / "final"), "--split", split, "--output", str(output), "--runs", str(args.runs)]
    # A network is scored on images as it was trained on: resized and normalized alike.
    fields = EVALUATION_FIELDS - {"crop_size"}  # in segmentation, whole images are scored
    recipe = {key: value for key, value in training_options(plan, name).items() if key in fields}
    run("evaluate.py", "--recipe", plan["recipe"], *data, *words, *option_words(recipe))


def run(script: str, *words: str) -> None:
    command = [sys.executable, str(SCRIPTS / script), *words]
    with subprocess.Popen(command) as process:
        # It is to save its work: Ctrl-C reaches it through the terminal, SIGTERM must be passed on.
        before = {
            signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
            signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
        }
        try:
            status = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if status:
        raise SystemExit(f"{script} ended with status {status}: {shlex.join(command)}")


def known_run(folder: Path, runs: Path) -> dict[str, Any] | None:
    """The line of the training in a folder; where there is none, the last line of its name."""
    lines = runs.read_text(encoding="utf-8").splitlines() if runs.is_file() else []
    known = [run for run in map(json.loads, lines) if run["name"] == folder.name]
    if (trained := read_run(folder)) is not None:
        known = [run for run in known if all(run.get(key) == value for key, value in trained.items())]
    return known[-1] if known else None


def tabulate(plan: dict[str, Any], args: argparse.Namespace) -> str:
    """A row for each variant that has been run."""
    has_paper = any("paper" in (options or {}) for options in plan["variants"].values())
    header = ["variant", "options", "parameters", "M MACs", "epochs"]
    header += [f"{split} mIoU" for split in plan["splits"]] + (["paper's mIoU"] if has_paper else [])
    entries = {name: known_run(args.output_dir / run_name(args.plan, name), args.runs) for name in plan["variants"]}
    rows, found = [], []
    for name, options in plan["variants"].items():
        entry = entries[name]
        if entry is None:
            continue
        found.append(entry)
        row = [name, f"`{shlex.join(option_words(settings(plan, name)))}`" if settings(plan, name) else "–"]
        row += [f"{entry['parameters']:,}", f"{entry['multiply_accumulates'] / 1e6:,.2f}", str(entry["epochs"])]
        for split in plan["splits"]:
            scores = entry["evaluation"].get(split)
            row.append(f"{100 * scores['mean_iou']:.2f}" if scores else "–")
        rows.append(row + ([str((options or {}).get("paper", "–"))] if has_paper else []))
    lines = [f"# {plan['title']}", ""]
    lines += [plan["notes"].strip(), ""] if plan["notes"] else []
    lines.append(markdown_table([header, *rows], num_texts=2, padded=False))
    lines += seed_spreads(plan, entries)
    if plan["options"]:
        lines += ["", f"All: recipe `{plan['recipe']}`, `{shlex.join(option_words(plan['options']))}`."]
    if found:
        hardware = ", ".join(sorted({entry["hardware"] for entry in found}))
        versions = ", ".join(sorted({f"PyTorch {entry['versions']['torch']}" for entry in found}))
        hours = sum(entry["hours"] for entry in found)
        lines += [
            "",
            f"Printed by `scripts/compare.py --plan {args.plan.as_posix()}`. {hardware}, {versions}, {hours:.1f} hours.",
        ]
    return "\n".join(lines) + "\n"


def seed_spreads(plan: dict[str, Any], entries: dict[str, dict[str, Any] | None]) -> list[str]:
    """Mean and sample standard deviation of variants that differ in nothing but their seed, and in that of those before."""
    groups: dict[str, list[str]] = {}
    for name, entry in entries.items():
        if entry is not None:
            groups.setdefault(json.dumps(without_seeds(plan, name), sort_keys=True), []).append(name)
    lines = []
    for names in groups.values():
        spreads = []
        for split in plan["splits"]:
            evaluations = [entries[name]["evaluation"].get(split) for name in names]
            scores = [100 * evaluation["mean_iou"] for evaluation in evaluations if evaluation]
            if len(scores) > 1:
                spreads.append(f"{split} mIoU {mean(scores):.2f} ± {stdev(scores):.2f} ({len(scores)} seeds)")
        if spreads:
            lines += ["", f"{names[0]}, mean and standard deviation: {', '.join(spreads)}."]
    return lines


def without_seeds(plan: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings of a variant, and in place of the variants that it begins with or learns from, theirs."""
    options = {key: value for key, value in settings(plan, name).items() if key != "seed"}
    for option in options.keys() & CHECKPOINT_OPTIONS:
        options[option] = [
            without_seeds(plan, first) if first in plan["variants"] else first
            for first in checkpoints(options, option)
        ]
    return options


if __name__ == "__main__":
    run_script(main, yaml.YAMLError)
