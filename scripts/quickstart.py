# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""From nothing to a picture: segment one with the released weights, then train, score and use a model of your own.

    bash scripts/quickstart.sh                        on generated street scenes, a few minutes on two cores
    bash scripts/quickstart.sh --dataset PATH         on your own pictures: a folder with images/ and masks/, or
                                                      parquet files with the columns image and label
    bash scripts/quickstart.sh --dataset PATH --recipe camvid       on a data set that has a recipe

First a drawn street is segmented with the CamVid weights in `model_cards/lemore-camvid` (`first_look.png`). Then LeMoRe is
trained from random weights with `Trainer`, scored, loaded back and used. The checkpoint, the scores and the pictures land
in `outputs/quickstart`; a second run finds and reuses them.
"""

import argparse
import functools
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForSemanticSegmentation, Trainer, TrainingArguments, pipeline, set_seed

from lemore_hf import LeMoReConfig, LeMoReForSemanticSegmentation, LeMoReImageProcessor
from lemore_hf.checkpointing import atomic_folder
from lemore_hf.command_line import run_script
from lemore_hf.data.augmentation import normalize
from lemore_hf.data.loading import RecipeDataset, collate, inheriting_workers, load_split, read_label_map
from lemore_hf.data.recipes import IGNORE_INDEX, Recipe, add_recipe_arguments, listed, load_recipe
from lemore_hf.data.scenes import draw_scene
from lemore_hf.hardware import usable_cores
from lemore_hf.metrics import trainer_metrics
from lemore_hf.visualization import class_colors, draw_segmentation, image_grid

RELEASED = Path(__file__).resolve().parents[1] / "model_cards" / "lemore-camvid"
STREET = 103  # the drawn street that the first look shows
NUM_SHOWN = 4
FEW_STEPS = 200
LARGEST_SIDE = 480
# Of a recipe, what the errors of a data set of another layout advise.
LAYOUT_FIELDS = {
    "image_folder",
    "label_folder",
    "image_suffix",
    "label_suffix",
    "split_file",
    "image_column",
    "label_column",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="folder of your own data; without it, generated street scenes")
    parser.add_argument("--recipe", help="recipe that names the data set's classes; by default scenes, or folder")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs/quickstart"),
        help="folder of checkpoint, scores and pictures (default: %(default)s)",
    )
    parser.add_argument("--epochs", type=int, default=18, help="passes over the training data (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures of a step (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=4e-3, help="peak rate (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights, order and augmentation (default: %(default)s)"
    )
    add_recipe_arguments(parser, LAYOUT_FIELDS)
    args = parser.parse_args()
    for option in ("epochs", "batch_size"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} must be at least 1, got {getattr(args, option)}")
    return args


def main() -> None:
    args = parse_arguments()
    # The layers are small: threads that have to share the cores with anything else wait more than they work.
    torch.set_num_threads(max(1, usable_cores() // 2))
    if args.dataset is not None:
        load_split(named_recipe(args), "train", args.dataset)  # what is not there is said at once
    first_look(args.output_dir)
    recipe = describe_data(args)
    train = RecipeDataset(load_split(recipe, "train", args.dataset), recipe, True, args.seed, cache="memory")
    held_out_split = "test" if recipe.dataset == "scenes" and args.dataset is None else recipe.validate_on
    held_out = RecipeDataset(load_split(recipe, held_out_split, args.dataset), recipe, cache="memory")

    started = time.perf_counter()
    folder, settings_file = args.output_dir / "model", args.output_dir / "trained_with.json"
    settings = {name: str(value) for name, value in vars(args).items() if name != "output_dir"}
    if (folder / "model.safetensors").is_file():
        check_reuse(settings, settings_file, folder)
        print(f"Reusing the checkpoint in {folder}; delete it to train again.")
    else:
        settings_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        steps = args.epochs * max(1, len(train) // args.batch_size)
        if steps < FEW_STEPS:
            print(
                f"{steps} steps from random weights teach little: raise --epochs, or start from trained weights "
                "(scripts/train.py --init_from)."
            )
        fine_tune(recipe, train, held_out, folder, args)

    # From here on, only what a user of the checkpoint has.
    model = AutoModelForSemanticSegmentation.from_pretrained(folder)
    scores = score(model, recipe, held_out, args)
    report(scores, recipe, args.output_dir / "scores.json")
    draw_held_out(held_out, recipe, folder, args.output_dir)
    print(
        f"{time.perf_counter() - started:.0f} s. Pictures: {args.output_dir}/overlay.png, {args.output_dir}/grid.png"
    )


def first_look(output_dir: Path) -> None:
    """A picture in, a picture out, with the released weights."""
    output_dir.mkdir(parents=True, exist_ok=True)
    street, _ = draw_scene(STREET, (360, 480), daylight=True)
    street.save(output_dir / "street.png")
    segmenter = pipeline("image-segmentation", model=str(RELEASED))
    segments = segmenter(str(output_dir / "street.png"))
    config = segmenter.model.config
    overlay = draw_segmentation(street, segments, config=config, legend=False)
    legend = class_colors({config.label2id[segment["label"]] for segment in segments}, config=config)
    image_grid([street, overlay], columns=2, legend=legend).save(output_dir / "first_look.png")
    print(f"A drawn street, segmented with the released CamVid weights: {output_dir}/first_look.png")


def check_reuse(settings: dict[str, str], settings_file: Path, folder: Path) -> None:
    """A checkpoint of other data or settings is not what was asked for."""
    before = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    if changed := [name for name in {**before, **settings} if before.get(name) != settings.get(name)]:
        raise SystemExit(
            f"{folder} holds a checkpoint that was trained with another {' and '.join(changed)}: "
            "give another --output_dir, or delete it to train again."
        )


def named_recipe(args: argparse.Namespace) -> Recipe:
    name = args.recipe or ("folder" if args.dataset else "scenes")
    return load_recipe(
        name, {field: value for field, value in vars(args).items() if field in LAYOUT_FIELDS}, args.dataset
    )


def describe_data(args: argparse.Namespace) -> Recipe:
    """The recipe, with the classes and the size of the pictures found in the data where it does not know them."""
    recipe = named_recipe(args)
    if recipe.num_classes is None:
        found = set()
        for split in ("train", recipe.validate_on):
            for sample in tqdm(load_split(recipe, split, args.dataset), f"Counting classes in {split}"):
                found.update(np.unique(read_label_map(sample["label"])).tolist())
        classes = sorted(found - {IGNORE_INDEX})
        if len(classes) < 2:
            raise ValueError(
                f"the masks in {args.dataset} hold {sorted(found)}, where {IGNORE_INDEX} is void: there are no two classes "
                "to tell apart. Store them as the numbers 0, 1, ..., such as 0 and 1 for background and foreground."
            )
        if len(classes) < max(classes) / 2:
            raise ValueError(
                f"the masks in {args.dataset} hold the numbers {listed(classes, 8)}, with more gaps than classes: store them "
                f"as 0, 1, 2, ..., or name the classes in {args.dataset}/classes.txt, one a line."
            )
        recipe = recipe.replace(num_classes=max(classes) + 1)
    if args.recipe is None and args.dataset is not None:
        width, height = load_split(recipe, "train", args.dataset)[0]["image"].size
        scale = min(1.0, LARGEST_SIDE / max(width, height))
        size = tuple(max(32, round(side * scale)) for side in (height, width))
        recipe = recipe.replace(image_size=size, crop_size=size, resize=size)
    return recipe


class FreshlyAugmented(Dataset):
    """A data set for `Trainer`, which counts samples but not epochs: augmented anew whenever a sample is asked for."""

    def __init__(self, dataset: RecipeDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return self.dataset[int(torch.randint(2**31, ())), index]


def collate_normalized(samples: list[dict], recipe: Recipe) -> dict[str, torch.Tensor]:
    batch = collate(samples)
    return {"pixel_values": normalize(batch["pixel_values"], recipe), "labels": batch["labels"].long()}


def has_fast_bfloat16() -> bool:
    """Elsewhere it takes several times as long as float32: convolutions leave oneDNN for PyTorch's own slow ones."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available():  # what the processor has says nothing of Apple's GPU, which trains there
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def make_trainer(
    model: torch.nn.Module, recipe: Recipe, args: argparse.Namespace, train: RecipeDataset | None = None
) -> Trainer:
    """A `Trainer` that trains on `train`, or without it one that evaluates."""
    steps = args.epochs * (max(1, len(train) // args.batch_size) if train is not None else 1)
    metrics = trainer_metrics(recipe.num_classes, recipe.id2label)
    torch.multiprocessing.set_start_method(inheriting_workers(1), force=True)  # `Trainer` has no option for it
    training_arguments = TrainingArguments(
        output_dir=str(args.output_dir / "trainer"),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=recipe.eval_batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="polynomial",
        warmup_steps=steps // 27,  # 50 of the generated scenes' 1 350
        # The last batch of an epoch may be one small image, which the network's norms cannot train on.
        dataloader_drop_last=train is not None and len(train) >= args.batch_size,
        weight_decay=0.01,
        bf16=has_fast_bfloat16(),
        use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        seed=args.seed,
        dataloader_num_workers=1,
        remove_unused_columns=False,
        batch_eval_metrics=True,
        save_strategy="no",
        logging_strategy="epoch",
        report_to="none",
    )
    training_arguments._n_gpu = 1  # several would take batches apart, and evaluate more than `eval_batch_size` at once
    return Trainer(
        model,
        training_arguments,
        data_collator=functools.partial(collate_normalized, recipe=recipe),
        compute_metrics=metrics.compute_metrics,
        preprocess_logits_for_metrics=metrics.preprocess_logits_for_metrics,
        train_dataset=FreshlyAugmented(train) if train is not None else None,
    )


def fine_tune(recipe: Recipe, train: RecipeDataset, held_out: RecipeDataset, folder: Path, args) -> None:
    set_seed(args.seed)  # Before the weights are drawn; `Trainer` does it too late for them.
    model = LeMoReForSemanticSegmentation(LeMoReConfig(**recipe.network_settings))
    model = model.to(memory_format=torch.channels_last)
    make_trainer(model, recipe, args, train).train()
    with atomic_folder(folder) as temporary:
        model.to(memory_format=torch.contiguous_format).save_pretrained(temporary)
        LeMoReImageProcessor(**recipe.processor_settings).save_pretrained(temporary)


def score(model, recipe: Recipe, held_out: RecipeDataset, args: argparse.Namespace) -> dict[str, float]:
    """Mean IoU and IoU of each class over all held-out pixels, from one confusion matrix; void pixels left out."""
    return make_trainer(model, recipe, args).evaluate(held_out, metric_key_prefix="test")


def report(scores: dict[str, float], recipe: Recipe, path: Path) -> None:
    per_class = {name: scores[f"test_iou_{name}"] for name in recipe.id2label.values()}
    for name, iou in per_class.items():
        print(f"{name:>24} {iou:6.3f}")
    print(f"{'mean IoU, held out':>24} {scores['test_mean_iou']:6.3f}")
    path.write_text(json.dumps({"mean_iou": scores["test_mean_iou"], "per_class_iou": per_class}, indent=2))


def draw_held_out(held_out: RecipeDataset, recipe: Recipe, folder: Path, output_dir: Path) -> None:
    """Pictures of held-out images as the pipeline segments them: one with a legend, some beside the truth."""
    segmenter = pipeline("image-segmentation", model=str(folder))
    config = segmenter.model.config
    rows, shown, step = [], set(), max(1, len(held_out) // NUM_SHOWN)
    for index in range(0, len(held_out), step)[:NUM_SHOWN]:
        sample = held_out.decoded(index)
        picture = Image.fromarray(sample.image.permute(1, 2, 0).numpy())
        path = output_dir / f"held_out_{index}.png"
        picture.save(path)
        segments = segmenter(str(path))
        if not rows:
            draw_segmentation(picture, segments, config=config).save(output_dir / "overlay.png")
        shown.update(sample.labels.unique().tolist(), (config.label2id[segment["label"]] for segment in segments))
        rows += [
            picture,
            draw_segmentation(picture, sample.labels, config=config, legend=False),
            draw_segmentation(picture, segments, config=config, legend=False),
        ]
    titles = ["image", "ground truth", "LeMoRe"] * (len(rows) // 3)
    legend = class_colors(shown - {IGNORE_INDEX}, config=config)
    image_grid(rows, columns=3, titles=titles, legend=legend).save(output_dir / "grid.png")


if __name__ == "__main__":
    run_script(main)
