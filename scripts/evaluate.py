# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Evaluate a trained model, LeMoRe or a peer, or an export of it on a split of a recipe's data set.

    python scripts/evaluate.py --model OUT/final --recipe camvid --data_dir DIR --split test --output metrics.json
    accelerate launch --multi_gpu --num_processes 2 scripts/evaluate.py ...

Prints a table of the classes and writes the scores as JSON; beside that a picture of the confusion matrix and a grid of
the worst images (image, labels, prediction). On the CPU each process computes on one thread, so that the counts are
the same to the last pixel whatever the number of processes: start as many as there are cores. The fields of the recipe
that say what is evaluated are options too (`--eval_batch_size`).
"""

import argparse
import copy
import importlib
import json
import math
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torchvision
import transformers
from accelerate import Accelerator
from filelock import FileLock
from PIL import Image
from torchvision.transforms.v2 import functional as F
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

import lemore_hf
from lemore_hf.checkpointing import CheckpointError, atomic_file, read_run, sha256_of
from lemore_hf.command_line import at_least, run_script
from lemore_hf.complexity import count_multiply_accumulates
from lemore_hf.data.loading import RecipeDataset, StreamedRecipeDataset, load_split, with_classes_of
from lemore_hf.data.recipes import (
    EVALUATION_FIELDS,
    IGNORE_INDEX,
    Recipe,
    add_data_arguments,
    add_recipe_arguments,
    load_recipe,
    recipe_overrides,
)
from lemore_hf.evaluation import (
    EvaluatedImage,
    SegmentationEvaluation,
    check_normalization,
    evaluate_classification,
    evaluate_segmentation,
    load_trained_model,
)
from lemore_hf.hardware import hardware_name, mixed_precision, shares_cpu
from lemore_hf.inference import RUNTIME_PACKAGES, ExportedNetwork, is_export
from lemore_hf.visualization import class_colors, draw_segmentation, image_grid, plot_confusion_matrix


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder that training or export.py has written, or Hub id")
    add_data_arguments(parser)
    parser.add_argument(
        "--split", default="test", help="train, validation or test, or several joined by '+' (default: test)"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the scores")
    parser.add_argument("--streaming", action="store_true", help="read the data while evaluating, never all of it")
    parser.add_argument(
        "--num_workers", type=at_least(0), default=0, help="loaders of each process (default: 0, itself)"
    )
    parser.add_argument(
        "--mixed_precision",
        choices=["no", "bf16", "fp16"],
        help="autocast; fp16 on a GPU only (default: what `accelerate launch` is told, else no)",
    )
    parser.add_argument("--runs", type=Path, help="keep the scores, with the run's run.json, as a line of this file")
    views = parser.add_argument_group("segmentation")
    views.add_argument("--scales", type=float, nargs="+", default=[1.0], help="average over the image at these scales")
    views.add_argument("--flip", action="store_true", help="average over the image and its mirror image")
    views.add_argument("--window", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="slide a window of this size")
    views.add_argument("--window_stride", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="default: two thirds")
    views.add_argument(
        "--center_crop",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="score the middle of this size of each image alone, before it is resized: another camera's shape",
    )
    views.add_argument(
        "--worst_images", type=at_least(0), help="images in the grid of the worst (default: 8); 0 for no grid"
    )
    add_recipe_arguments(parser, EVALUATION_FIELDS)
    args = parser.parse_args()
    if args.mixed_precision is None and is_export(args.model):
        args.mixed_precision = "no"  # what a launcher is told is not for exports
    try:
        args.mixed_precision = mixed_precision(args.mixed_precision)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = parse_arguments()
    recipe = load_recipe(args.recipe, recipe_overrides(args), args.data_dir)
    check_options(args, recipe)
    if is_export(args.model):
        check_export_options(args, recipe)
    accelerator = Accelerator(cpu=shares_cpu(), mixed_precision=args.mixed_precision)
    if accelerator.device.type == "cpu":
        # The order of additions, and with it the last bits of a score, depends on the number of threads.
        torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if accelerator.is_main_process:
        check_output(args.output)
    model = load_network(args.model, recipe)
    native = getattr(model.config, "native_size", None)
    if hasattr(args, "image_size") and native is not None and recipe.image_size != tuple(native):
        raise ValueError(
            f"--image_size {recipe.image_size} has no effect on {args.model}, whose own is {tuple(native)}: --resize changes "
            "the size of the images."
        )
    check_processor(args.model, recipe, accelerator)
    with accelerator.main_process_first():  # which fills the cache of the data set
        samples = load_split(recipe, args.split, args.data_dir, args.streaming)
    recipe = with_classes_of(recipe, samples)
    if args.streaming:
        dataset = StreamedRecipeDataset(
            samples,
            recipe,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            center_crop=args.center_crop,
        )
    else:
        dataset = RecipeDataset(samples, recipe, center_crop=args.center_crop)
    description = describe(model, recipe, accelerator, args)

    scores, result = evaluate_model(model, dataset, recipe, accelerator, args)
    if accelerator.is_main_process:
        report = scores | description
        args.output.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        if result is not None:
            draw(result, recipe, args.output)
        if args.runs is not None:
            record_run(report, args)
    accelerator.end_training()


def check_output(output: Path) -> None:
    """Find out before the work whether its result can be written."""
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: give the name of a JSON file.")
    output.parent.mkdir(parents=True, exist_ok=True)
    is_new = not output.exists()
    with output.open("a"):
        pass
    if is_new:
        output.unlink()


def check_options(args: argparse.Namespace, recipe: Recipe) -> None:
    """Refuse, before the work, what would have no effect or could not be written."""
    views = [name for name in ("flip", "window", "window_stride", "center_crop") if getattr(args, name)]
    views += ["scales"] if args.scales != [1.0] else []
    views += ["worst_images"] if args.worst_images is not None else []
    if views and recipe.task != "semantic-segmentation":
        raise ValueError(f"--{views[0]} is for segmentation, the recipe {recipe.name} is for {recipe.task}.")
    if hasattr(args, "crop_size") and recipe.task == "semantic-segmentation":
        raise ValueError("--crop_size has no effect on scores in segmentation, where whole images are looked at.")
    if args.worst_images is None:
        args.worst_images = 8
    if args.runs is not None and Path(args.model).resolve().name == "best":
        raise ValueError(
            f"--runs keeps lines of whole trainings, --model {args.model} is of one's middle: give its final."
        )
    if args.runs is not None and run_of(args.model) is None:
        raise ValueError(
            f"--runs keeps lines of trainings, of which --model {args.model} has no run.json beside it: give the final of a "
            "run, or leave --runs out."
        )
    if args.runs is not None and args.runs.is_dir():
        raise ValueError(f"--runs {args.runs} is a folder: give the name of a file.")


def check_export_options(args: argparse.Namespace, recipe: Recipe) -> None:
    """Refuse what makes no difference to an export, or no sense."""
    if args.runs is not None:
        raise ValueError(f"--runs keeps lines of trainings, --model {args.model} is an export: leave --runs out.")
    if args.mixed_precision != "no":
        raise ValueError(f"--mixed_precision: {args.model} is an export, whose precision was chosen with `export.py`.")
    if recipe.task != "semantic-segmentation":
        raise ValueError(
            f"--model {args.model} is an export for segmentation, the recipe {recipe.name} for {recipe.task}."
        )


def check_processor(name_or_path: str, recipe: Recipe, accelerator: Accelerator) -> None:
    """Refuse to feed a model other pixel values than its image processor would; say so where the size is another."""
    processor = check_normalization(name_or_path, recipe)
    size = processor.get("size", recipe.processor_size)
    own = f"resizes images to {recipe.processor_size}" if recipe.resize is not None else "leaves images at their size"
    if recipe.resize is None or size != recipe.processor_size:
        edges = [str(size[edge]) for edge in ("height", "width", "shortest_edge") if edge in size]
        longest = f" --max_longest_edge {size['longest_edge']}" if "longest_edge" in size else ""
        advice = f" As the processor does it: --resize {' '.join(edges)}{longest}." if edges else ""
        accelerator.print(
            f"The recipe {recipe.name} {own}, the image processor in {name_or_path} brings them to {size}: "
            f"the scores are those at the recipe's size, which --resize changes.{advice}"
        )


def load_network(name_or_path: str, recipe: Recipe) -> PreTrainedModel | ExportedNetwork:
    """A checkpoint, or an export in its own runtime."""
    if not is_export(name_or_path):
        return load_trained_model(name_or_path, recipe.task)
    return ExportedNetwork(name_or_path, num_threads=1)


def evaluate_model(
    model: PreTrainedModel | ExportedNetwork,
    dataset: Any,
    recipe: Recipe,
    accelerator: Accelerator,
    args: argparse.Namespace,
) -> tuple[dict[str, Any], SegmentationEvaluation | None]:
    """The scores, which the main process also prints, and in segmentation what there is to draw."""
    if recipe.task == "image-classification":
        result = evaluate_classification(model, dataset, recipe, accelerator, num_workers=args.num_workers)
        scores = result.scores()
        if accelerator.is_main_process:
            print(f"Accuracy {percent(scores['accuracy'])}, among five {percent(scores['top5_accuracy'])}")
        return without_nan(scores) | {"num_images": result.num_images}, None
    limit = model.manifest.max_batch_size if isinstance(model, ExportedNetwork) else None
    views = {name: getattr(args, name) for name in ("scales", "flip", "window", "window_stride")}
    result = evaluate_segmentation(
        model,
        dataset,
        recipe,
        accelerator,
        batch_size=min(recipe.eval_batch_size, limit or recipe.eval_batch_size),
        num_workers=args.num_workers,
        boundary=True,
        num_worst=args.worst_images,
        **views,
    )
    scores = result.scores()
    names = list(recipe.id2label.values())
    for key, values in scores.items():
        if key.startswith("per_class"):
            scores[key] = dict(zip(names, values, strict=True))
    if accelerator.is_main_process:
        print(class_table(scores, names))
    sizes = {"resize": recipe.resize, "max_longest_edge": recipe.max_longest_edge, "center_crop": args.center_crop}
    return without_nan(scores) | {"num_images": result.num_images, "inference": views | sizes}, result


def class_table(scores: dict[str, Any], names: list[str]) -> str:
    columns = {"IoU": "iou", "accuracy": "accuracy", "boundary IoU": "boundary_iou"}
    width = max(len(name) for name in [*names, "class"])
    lines = [f"{'class':{width}}" + "".join(f"{column:>14}" for column in columns)]
    for name in names:
        values = (scores[f"per_class_{key}"][name] for key in columns.values())
        lines.append(f"{name:{width}}" + "".join(f"{percent(value):>14}" for value in values))
    means = (scores[f"{key}"] for key in ("mean_iou", "mean_accuracy", "boundary_iou"))
    lines.append(f"{'mean':{width}}" + "".join(f"{percent(value):>14}" for value in means))
    return "\n".join([*lines, f"Pixel accuracy {percent(scores['overall_accuracy'])}"])


def percent(score: float) -> str:
    return "-" if math.isnan(score) else f"{100 * score:.2f} %"


def without_nan(value: Any) -> Any:
    """JSON has no nan: a score that does not exist becomes null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def draw(result: SegmentationEvaluation, recipe: Recipe, output: Path) -> None:
    names = list(recipe.id2label.values())
    title = f"{recipe.title or recipe.name}, {result.num_images} images"
    matrix = plot_confusion_matrix(result.confusion_matrix.counts, names, title)
    matrix.save(output.with_name(f"{output.stem}_confusion_matrix.png"))
    if result.worst_images:
        rows = [picture for image in result.worst_images for picture in draw_image(image, recipe, names)]
        titles = [
            text
            for image in result.worst_images
            for text in (image.name, "labels", f"prediction, mIoU {percent(image.mean_iou)}")
        ]
        maps = (classes for image in result.worst_images for classes in (image.labels, image.prediction))
        shown = set().union(*(classes.unique().tolist() for classes in maps)) - {IGNORE_INDEX}
        legend = class_colors(shown, dict(enumerate(names)), recipe.palette)
        grid = image_grid(rows, 3, titles, cell_size=(360, 480), legend=legend)
        grid.save(output.with_name(f"{output.stem}_worst_images.png"))


def draw_image(image: EvaluatedImage, recipe: Recipe, names: list[str]) -> tuple[Image.Image, ...]:
    """An image, its labels and its prediction."""
    pixels = F.resize(image.image, list(image.labels.shape), antialias=True)
    drawn = (
        draw_segmentation(pixels, classes, dict(enumerate(names)), recipe.palette, legend=False)
        for classes in (image.labels, image.prediction)
    )
    return F.to_pil_image(pixels), *drawn


def describe(
    model: PreTrainedModel | ExportedNetwork, recipe: Recipe, accelerator: Accelerator, args: argparse.Namespace
) -> dict[str, Any]:
    """What was evaluated, on what."""
    return {
        "model": args.model,
        **(describe_export(model) if isinstance(model, ExportedNetwork) else describe_checkpoint(model, recipe, args)),
        "model_type": model.config.model_type,
        "image_size": list(network_size(model, recipe)),
        "dataset": recipe.title or recipe.name,
        "recipe": recipe.name,
        "split": args.split,
        "mixed_precision": args.mixed_precision,
        "num_processes": accelerator.num_processes,
        "hardware": hardware_name(accelerator.device),
        "versions": {
            "lemore_hf": lemore_hf.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def describe_export(network: ExportedNetwork) -> dict[str, Any]:
    # By the modules: the GPU's runtimes are installed under other names.
    modules = map(importlib.import_module, RUNTIME_PACKAGES[network.manifest.format])
    versions = {module.__name__: getattr(module, "__version__", "unknown") for module in modules}
    return {"export": asdict(network.manifest), "runtime": versions}


def describe_checkpoint(model: PreTrainedModel, recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    on_meta = copy.deepcopy(model).to("meta")
    pixel_values = torch.empty(1, 3, *network_size(model, recipe), device="meta")
    weights = cached_file(args.model, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    return {
        "run": {"name": Path(args.model).resolve().parent.name, **(run_of(args.model) or {})},
        "weights_sha256": sha256_of(Path(weights)) if weights else None,  # several files have none
        "parameters": model.num_parameters(),
        "multiply_accumulates": count_multiply_accumulates(on_meta, pixel_values),
    }


def network_size(model: PreTrainedModel | ExportedNetwork, recipe: Recipe) -> tuple[int, int]:
    """(height, width) that operations are counted at: that of all images where `resize` gives one, else the native."""
    if isinstance(recipe.resize, tuple):
        return recipe.resize
    return tuple(getattr(model.config, "native_size", recipe.image_size))  # other families have none


def run_of(model: str) -> dict[str, Any] | None:
    """The finished run that a model comes from, which training describes beside the model's folder."""
    return read_run(Path(model).resolve().parent)


def record_run(report: dict[str, Any], args: argparse.Namespace) -> None:
    """
    Put the scores into the line of the run that the model comes from: a line holds the run's `run.json` and, under
    `evaluation`, what was measured on each split. A run is known by its name, configuration hash, seed and length; the
    scores of an earlier training of the same are not kept.
    """
    with FileLock(args.runs.with_name(f".{args.runs.name}.lock")):  # other runs may be scored at the same time
        lines = args.runs.read_text(encoding="utf-8").splitlines() if args.runs.is_file() else []
        runs = [json.loads(line) for line in lines]
        identity = ("name", "configuration_hash", "seed", "steps")
        known = next((run for run in runs if all(run.get(key) == report["run"].get(key) for key in identity)), None)
        if known is None:
            runs.append(known := dict(report["run"]))
        elif any(known.get(key) != value for key, value in report["run"].items()):
            known.clear()
            known.update(report["run"])
        keys = ("mean_iou", "mean_accuracy", "overall_accuracy", "boundary_iou", "accuracy", "inference")
        known |= {key: report[key] for key in ("parameters", "multiply_accumulates")}
        known.setdefault("evaluation", {})[args.split] = {key: report[key] for key in keys if key in report}
        with atomic_file(args.runs) as part:
            part.write_text("".join(json.dumps(run) + "\n" for run in runs), encoding="utf-8")


if __name__ == "__main__":
    run_script(main, CheckpointError)
