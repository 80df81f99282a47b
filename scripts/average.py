# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Average the weights of several trainings that went on from each other, or from the same weights.

    python scripts/average.py --models A/final B/final C/final --recipe camvid --data_dir DIR --output_dir OUT

The ends of a cyclical schedule, averaged, lie in a flatter place than any of them and generalize better (SWA: Izmailov
et al., UAI 2018); so do several fine-tunings of the same weights (model soups: Wortsman et al., ICML 2022). Trainings
from different random weights cannot be averaged: the result is as good as random.

The batch norms' statistics are measured anew, on the images that the models were trained on, augmented as the recipe
says. OUT/final holds the model and its image processor, OUT/run.json what was averaged, for `scripts/evaluate.py`. Every
field of the recipe is an option too (`--train_on`).
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch
import transformers
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoImageProcessor

import lemore_hf  # noqa: F401 (registers LeMoRe with the Auto classes)
from lemore_hf.checkpointing import CheckpointError, atomic_folder
from lemore_hf.data.augmentation import normalize
from lemore_hf.data.loading import RecipeDataset, collate, load_split, with_classes_of
from lemore_hf.data.recipes import Recipe, add_recipe_arguments, load_recipe, recipe_overrides
from lemore_hf.evaluation import load_trained_model
from lemore_hf.hardware import hardware_name
from lemore_hf.optimization import average_models


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, type=Path, help="folders of two or more trained models")
    parser.add_argument("--recipe", required=True, help="name of a recipe, or path of its YAML file")
    parser.add_argument("--data_dir", type=Path, help="local folder of the data set; without it, from the Hub")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write; a model in it is replaced")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that load data")
    parser.add_argument("--seed", type=int, default=0, help="of the augmentation")
    add_recipe_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    recipe = load_recipe(args.recipe, recipe_overrides(args), args.data_dir)
    transformers.utils.logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = average_models([load_trained_model(folder, recipe.task) for folder in args.models]).to(device)
    processor = AutoImageProcessor.from_pretrained(args.models[0])
    samples = load_split(recipe, recipe.train_on, args.data_dir)
    recipe = with_classes_of(recipe, samples)

    torch.manual_seed(args.seed)
    loader = DataLoader(
        RecipeDataset(samples, recipe, training=True, seed=args.seed),
        recipe.batch_size,
        shuffle=True,
        collate_fn=collate,
        num_workers=args.num_workers,
    )
    batches = tqdm(loader, desc="Batch-norm statistics", unit="batch")
    update_bn((normalize(batch["pixel_values"], recipe, device) for batch in batches), model)

    with atomic_folder(args.output_dir / "final") as folder:
        model.eval().save_pretrained(folder)
        processor.save_pretrained(folder)
    summary = describe(args, recipe, hardware_name(device))
    (args.output_dir / "run.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")


def describe(args: argparse.Namespace, recipe: Recipe, hardware: str) -> dict:
    """`run.json`: whose weights were averaged; `scripts/evaluate.py` adds the score to it."""
    runs = []
    for folder in args.models:
        path = folder.parent / "run.json"
        run = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        kept = {key: run[key] for key in ("configuration_hash", "seed", "steps", "epochs", "hours") if key in run}
        runs.append({"name": folder.resolve().parent.name, **kept})
    settings = {"average_of": runs, "seed": args.seed, "train_on": recipe.train_on}
    return {
        "recipe": recipe.name,
        "configuration_hash": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12],
        **settings,
        "hardware": hardware,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, OSError, TypeError, ValueError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
