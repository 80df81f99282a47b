# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Train LeMoRe, or a network it is compared with, by a recipe: segmentation, or classification for pretraining.

    python scripts/train.py --recipe camvid --data_dir DIR --output_dir OUT
    accelerate launch --multi_gpu --num_processes 2 scripts/train.py --recipe camvid --data_dir DIR --output_dir OUT

Every field of the recipe is an option too (`--max_steps 1000 --learning_rate 5e-4`). A run can be killed at any
moment; the same command with `--resume` goes on from its last checkpoint, at a constant rate (`--poly_power 0`) also
beyond its end, with more `--max_steps`. The trained model lands in `OUT/final`, the one that validated best in
`OUT/best`.
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import sys
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast, get_int_from_env, is_tensorboard_available, set_seed
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_polynomial_decay_schedule_with_warmup

from lemore_hf import LeMoReConfig, LeMoReForImageClassification, LeMoReForSemanticSegmentation
from lemore_hf.checkpointing import (
    RUN_NAME,
    CheckpointError,
    DamagedCheckpointError,
    atomic_file,
    atomic_folder,
    checkpoint_folder,
    claimed_folder,
    clear_unfinished,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    read_run,
    recover_folders,
    require_safetensors,
)
from lemore_hf.command_line import at_least, positive, run_script
from lemore_hf.data.augmentation import mix_images, normalize
from lemore_hf.data.loading import (
    BadSampleError,
    EpochSampler,
    RecipeDataset,
    StreamedRecipeDataset,
    collate,
    inheriting_workers,
    load_split,
    raise_together,
    with_classes_of,
)
from lemore_hf.data.recipes import (
    DESCRIPTIVE_FIELDS,
    IGNORE_INDEX,
    SINGLE_CLASS,
    Recipe,
    add_data_arguments,
    add_recipe_arguments,
    load_recipe,
    recipe_overrides,
)
from lemore_hf.distillation import DistillationLoss, load_teacher
from lemore_hf.evaluation import evaluate
from lemore_hf.hardware import hardware_name, mixed_precision, shares_cpu
from lemore_hf.hub import PublishingError, push_folder, signed_in_user
from lemore_hf.image_processing_lemore import LeMoReImageProcessor
from lemore_hf.interruption import Interrupted, InterruptionRequest, shield_worker
from lemore_hf.losses import SegmentationCriterion, count_for_median_frequency, median_frequency_weights
from lemore_hf.optimization import (
    ExponentialMovingAverage,
    Muon,
    average_models,
    freeze_batch_norm_statistics,
    parameter_groups,
)
from lemore_hf.peers import PEERS, build_peer, head_prefixes
from lemore_hf.training_state import TrainingState
from lemore_hf.visualization import plot_training_curve


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of checkpoints, logs and final model")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order, augmentation and dropout (default: 0)")
    parser.add_argument(
        "--init_from",
        nargs="+",
        metavar="CHECKPOINT",
        help="folder or Hub id of a checkpoint whose weights training starts from; of several, their mean, which "
        "`--max_steps 0` saves as it is",
    )
    parser.add_argument(
        "--teacher",
        nargs="+",
        metavar="CHECKPOINT",
        help="folder or Hub id of a trained segmentation network of the same classes, LeMoRe or another of Transformers, "
        "whose probabilities are learned beside the labels; of several, their mean",
    )
    parser.add_argument(
        "--teacher_weight", type=positive, help="of the divergence from the teacher, beside the loss (default: 1)"
    )
    parser.add_argument("--peer", choices=sorted(PEERS), help="train this network instead of LeMoRe")
    parser.add_argument("--streaming", action="store_true", help="read the data while training, never all of it")
    parser.add_argument(
        "--cache", choices=["memory", "device"], help="keep the decoded images in memory or on the GPU"
    )
    parser.add_argument("--num_workers", type=at_least(0), default=2, help="loaders of each process (default: 2)")
    parser.add_argument(
        "--mixed_precision",
        choices=["no", "bf16", "fp16"],
        help="autocast; fp16 on a GPU only (default: what `accelerate launch` is told, else no)",
    )
    parser.add_argument(
        "--gradient_accumulation_steps",
        type=at_least(1),
        help="batches that a process adds up to a step; batch_size counts them all together (default: what `accelerate "
        "launch` is told, else 1)",
    )
    parser.add_argument("--channels_last", action="store_true", help="use the channels-last memory format")
    parser.add_argument("--compile", action="store_true", help="compile the network with torch.compile")
    parser.add_argument(
        "--cuda_graph",
        action="store_true",
        help="record the network's forward and backward pass once and replay it: on one GPU, whose time would else go "
        "into starting hundreds of small kernels one by one",
    )
    parser.add_argument(
        "--eval_every",
        type=at_least(0),
        help="steps between validations; 0: none (default: a tenth of the run, from 100 to 1000)",
    )
    parser.add_argument(
        "--save_every",
        type=at_least(0),
        help="steps between checkpoints; 0: none (default: a tenth of the run, from 100 to 1000)",
    )
    parser.add_argument(
        "--keep_checkpoints", type=at_least(1), default=2, help="how many of the last to keep (default: 2)"
    )
    parser.add_argument("--log_every", type=at_least(1), default=50, help="steps between log entries (default: 50)")
    parser.add_argument("--push_to_hub", metavar="REPO_ID", help="publish the final model as this Hub repository")
    add_recipe_arguments(parser)
    return parser


def parse_arguments() -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args()
    try:
        args.mixed_precision = mixed_precision(args.mixed_precision)
        if args.gradient_accumulation_steps is None:
            args.gradient_accumulation_steps = get_int_from_env(["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"], 1)
    except ValueError as error:
        parser.error(str(error))
    if args.cache == "device" and args.num_workers:
        parser.error("--cache device augments where the images are, on the GPU: it needs --num_workers 0.")
    if args.cuda_graph and not torch.cuda.is_available():
        parser.error("--cuda_graph needs a GPU.")
    if args.cuda_graph and (args.compile or args.gradient_accumulation_steps > 1):
        parser.error("--cuda_graph excludes --compile and --gradient_accumulation_steps: raise batch_size instead.")
    if args.teacher_weight is not None and not args.teacher:
        parser.error("--teacher_weight needs a --teacher.")
    if args.teacher_weight is None:
        args.teacher_weight = 1.0
    if args.streaming and args.cache:
        parser.error("--streaming and --cache exclude each other: a stream is not kept.")
    for option in ("init_from", "model_config", "push_to_hub"):
        if args.peer and getattr(args, option, None):
            parser.error(f"--{option} is for LeMoRe: it excludes --peer.")
    return args


def main() -> None:
    args = parse_arguments()
    transformers.utils.logging.disable_progress_bar()  # of loading and saving, over within a second
    accelerator = Accelerator(
        cpu=shares_cpu(),
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with="tensorboard" if is_tensorboard_available() else None,
        project_dir=args.output_dir,
    )
    refuse_sharding(accelerator)
    # For Accelerate its environment variable goes before what it is given; here the option does.
    accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
    with contextlib.ExitStack() as claim:
        if accelerator.is_main_process:
            args.output_dir.mkdir(parents=True, exist_ok=True)
            claim.enter_context(claimed_folder(args.output_dir))
        train(args, accelerator)


def train(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """A run from its beginning, or its last checkpoint, to its model."""
    prepare_output_folder(args, accelerator)
    recipe = load_recipe(args.recipe, recipe_overrides(args), args.data_dir)
    for option in ("eval_every", "save_every"):
        if getattr(args, option) is None:
            setattr(args, option, min(max(recipe.max_steps // 10, 100), 1000))
    check_options(args, recipe)
    if args.push_to_hub and accelerator.is_main_process:
        signed_in_user()  # Rather now than after the training.
    set_seed(args.seed)

    training = Training(args, load_data(args, recipe, accelerator), accelerator)
    training.run()
    if accelerator.is_main_process:
        training.publish()
    training.close()


def refuse_sharding(accelerator: Accelerator) -> None:
    """Each process holds the whole network, as its average, checkpoints and exported models need it. An `accelerate config`
    of other trainings may say otherwise, and the first average or checkpoint would fail."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"Accelerate is set to {kind.value}, which divides the network among the processes: this one is small enough "
            "for each to hold it whole. Start it with `accelerate launch --multi_gpu`."
        )


def check_options(args: argparse.Namespace, recipe: Recipe) -> None:
    """Refuse what makes no sense with this recipe."""
    if recipe.max_steps == 0 and not args.init_from:
        raise ValueError(
            "max_steps=0 saves the weights of --init_from, or their mean, untrained: name them, or train."
        )
    if args.teacher and recipe.max_steps == 0:
        raise ValueError("max_steps=0 learns nothing from a --teacher: leave it out, or train.")
    if args.teacher and recipe.task != "semantic-segmentation":
        raise ValueError(f"--teacher is for segmentation, the recipe {recipe.name} is for {recipe.task}.")


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run trains on and validates with."""

    recipe: Recipe
    """With the classes of the data set."""
    samples: Any
    """Of the training split, as `load_split` has them."""
    training: RecipeDataset | None
    """Of them; `None` for a stream."""
    validation: RecipeDataset | StreamedRecipeDataset | None
    """`None` without validations."""
    micro_batch_size: int
    """Samples that a process takes at once."""


def load_data(args: argparse.Namespace, recipe: Recipe, accelerator: Accelerator) -> Data:
    samples = load_split(recipe, recipe.train_on, args.data_dir, args.streaming)
    recipe = with_classes_of(recipe, samples)
    micro_batch_size = divide_batch(recipe.batch_size, accelerator.num_processes, args.gradient_accumulation_steps)
    for option in ("cutmix_alpha", "mixup_alpha", "classmix"):
        if getattr(recipe, option) > 0 and micro_batch_size == 1:
            raise ValueError(f"{option} has no effect on one image at a time: raise batch_size, or switch it off.")
    cache_device = accelerator.device if args.cache == "device" else None
    training = None if args.streaming else RecipeDataset(samples, recipe, True, args.seed, args.cache, cache_device)
    validation = None
    if args.eval_every:
        validation_samples = load_split(recipe, recipe.validate_on, args.data_dir, args.streaming)
        if args.streaming:
            place = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
            validation = StreamedRecipeDataset(validation_samples, recipe, **place)
        else:
            validation = RecipeDataset(validation_samples, recipe, cache="memory" if args.cache else None)
    if training is not None and recipe.task == "semantic-segmentation" and accelerator.is_main_process:
        warn_of_one_class(training)
        if recipe.resize is None:
            warn_of_scale(training, recipe)
    return Data(recipe, samples, training, validation, micro_batch_size)


class Training:
    """A run: the network, all that trains it, and how far it is.

    Args:
        args: the options.
        data: of the run.
        accelerator: of the run.
    """

    def __init__(self, args: argparse.Namespace, data: Data, accelerator: Accelerator):
        self.args, self.data, self.recipe, self.accelerator = args, data, data.recipe, accelerator
        recipe = data.recipe
        model = build_model(args, recipe)
        set_seed(args.seed, device_specific=True)  # dropout, mixing and sampling are each process's own
        if args.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model.to(accelerator.device)
        self.ema = ExponentialMovingAverage(model, recipe.ema_decay) if recipe.ema_decay else None
        self.averaged_model = model if self.ema is None else self.ema.module
        optimizer = build_optimizer(model, recipe)
        settings = fingerprint(args, recipe, accelerator, data.samples)
        self.state = TrainingState(accelerator, model, optimizer, self.ema, settings, defaults_of_fields())
        self.criterion = build_criterion(recipe, data.training).to(accelerator.device)
        self.distillation = build_distillation(args, recipe, accelerator) if args.teacher else None
        self.mix = mix_images(recipe)
        if args.resume:
            resume(self.state, args.output_dir)
        self.is_finished = (
            self.state.step >= recipe.max_steps and (read_run(args.output_dir) or {}).get("steps") == self.state.step
        )
        self.scheduler = build_scheduler(optimizer, recipe, self.state.step)
        if args.compile:
            model.compile()
        self.prepared_model, self.prepared_optimizer = accelerator.prepare(model, optimizer)
        set_training_mode(self.prepared_model, recipe)
        if args.cuda_graph:
            record_cuda_graph(self.prepared_model, args, recipe, data.micro_batch_size, accelerator)
        self.log = RunLog(args.output_dir, accelerator, self.state)
        self.progress = tqdm(
            total=recipe.max_steps,
            initial=self.state.step,
            desc="Training",
            unit="step",
            disable=not accelerator.is_main_process,
        )
        self.unread_losses: list[tuple[int, list[str], torch.Tensor]] = []  # step, names of the samples, loss

    def run(self) -> None:
        """The steps that are left, and after each what is due.

        Raises:
            BadSampleError, Interrupted: between two steps, on all processes, with the state saved.
            FloatingPointError: where a loss is not finite.
        """
        data = self.data
        batches = training_batches(
            self.args,
            self.recipe,
            self.accelerator,
            data.samples,
            data.training,
            data.micro_batch_size,
            self.state.step,
        )
        steps = batches_of_steps(batches, self.args.gradient_accumulation_steps, self.accelerator)
        try:
            if self.is_due(self.args.eval_every) and self.state.scored_step != self.state.step:
                self.validate()  # What interrupted the run has come between this step and its scores.
            while self.state.step < self.recipe.max_steps:
                self.take_step(next(steps))
                self.do_what_is_due()
        except (BadSampleError, Interrupted):
            if self.unread_losses:
                self.read_losses()
            if self.state.step:  # else there is nothing to keep, and the folder stays free for other settings
                self.save()
            raise
        finally:
            self.progress.close()
        steps.close()  # From here on Ctrl-C ends the program at once again.

    def take_step(self, batches: list[dict[str, Any]]) -> None:
        """One step of the optimizer."""
        for batch in batches:
            with self.accelerator.accumulate(self.prepared_model):
                loss = self.loss_of(batch)
                self.accelerator.backward(loss)
                if self.recipe.max_grad_norm is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
                self.prepared_optimizer.step()
                self.prepared_optimizer.zero_grad()
            self.unread_losses.append((self.state.step, batch["name"], loss.detach()))
        self.state.step += 1
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update(self.model)
        self.progress.update()

    def loss_of(self, batch: dict[str, Any]) -> torch.Tensor:
        pixel_values = normalize(batch["pixel_values"], self.recipe, self.accelerator.device)
        labels = batch["labels"].to(self.accelerator.device, non_blocking=True).long()
        if self.args.channels_last:
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        if self.mix is not None and self.state.step < self.recipe.mix_until * self.recipe.max_steps:
            pixel_values, labels = self.mix(pixel_values, labels)
        logits = self.prepared_model(pixel_values).logits
        loss = self.criterion(logits, labels)
        if self.distillation is not None:
            with self.accelerator.autocast():
                loss = loss + self.args.teacher_weight * self.distillation(logits, pixel_values)
        return loss

    def is_due(self, every: int) -> bool:
        """Whether what is done every so many steps, and at the end, is due after this one; 0 is never."""
        step = self.state.step
        return bool(every and step) and (step % every == 0 or step == self.recipe.max_steps)

    def do_what_is_due(self) -> None:
        """Log, checkpoint and validation, each after as many steps as it was asked for."""
        logs, saves, validates = map(self.is_due, (self.args.log_every, self.args.save_every, self.args.eval_every))
        # Reading a loss waits for a GPU, so there it is done for many steps at once.
        if logs or saves or validates or self.accelerator.device.type == "cpu":
            self.read_losses()
        if logs:
            self.log_losses()
        if saves:
            self.save()  # Before validating: what fails there costs no step.
        if validates:
            self.validate()
        if saves and validates:
            self.save()

    def read_losses(self) -> None:
        self.state.losses += check_losses(self.unread_losses)
        self.unread_losses.clear()

    def log_losses(self) -> None:
        """An entry of the log: the mean loss of all processes since the last one, rate and speed."""
        loss = mean_of_processes(sum(self.state.losses) / len(self.state.losses), self.accelerator)
        self.state.losses.clear()
        learning_rate = self.scheduler.get_last_lr()[0]
        speed = (self.progress.format_dict["rate"] or 0.0) * self.recipe.batch_size
        self.log.write(step=self.state.step, loss=loss, lr=learning_rate, images_per_second=speed)
        self.progress.set_postfix_str(f"loss {loss:.3f}, lr {learning_rate:.1e}, {speed:.0f} images/s")

    def save(self) -> None:
        self.state.save(checkpoint_folder(self.args.output_dir, self.state.step))
        if self.accelerator.is_main_process:
            prune_checkpoints(self.args.output_dir, self.args.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def validate(self) -> None:
        """Score the weights as they are; a model that scores better than all before is kept in `OUT/best`."""
        # Batch-norm statistics differ between processes; those of the main one are saved.
        broadcast(list(self.averaged_model.buffers()))
        num_workers = 0 if self.args.cache else self.args.num_workers
        scores = evaluate(
            self.averaged_model, self.data.validation, self.recipe, self.accelerator, num_workers=num_workers
        )
        set_training_mode(self.prepared_model, self.recipe)
        state = self.state
        state.scores, state.scored_step = scores, state.step
        self.log.write(step=state.step, **scores)
        name, score = next(iter(scores.items()))
        if state.best is None or score > state.best["score"]:
            state.best = {"step": state.step, "score": score}
            if self.accelerator.is_main_process:
                export_model(self.averaged_model, self.recipe, self.args.output_dir / "best")
        if self.accelerator.is_main_process:
            best = f"best {state.best['score']:.4f} at step {state.best['step']}"
            name = {"mean_iou": "mean IoU"}.get(name, name)
            with contextlib.suppress(OSError):  # of a terminal that is gone: what is to be saved comes after this
                self.progress.write(f"Step {state.step}: {name} {score:.4f} ({best})", file=sys.stderr)

    def publish(self) -> None:
        """The trained model in `OUT/final`, its curves and `run.json`; on the Hub too where that was asked for."""
        folder, state = self.args.output_dir, self.state
        if not self.is_finished:  # else only what was left to do: a card may stand beside the model by now
            export_model(self.averaged_model, self.recipe, folder / "final")
            self.log.plot()
            write_summary(self.args, self.data, self.accelerator, state)
        best = f"; the one that validated best: {folder / 'best'}" if state.best else ""
        print(f"The model: {folder / 'final'}{best}")
        if self.args.push_to_hub:
            # What a validation of these weights has found; without one the card says that there is no evaluation.
            is_scored = state.scores and state.scored_step == state.step
            results = (
                {**state.scores, "split": self.recipe.validate_on, "run": read_run(folder)} if is_scored else None
            )
            push_folder(folder / "final", self.args.push_to_hub, results=results, recipe=self.recipe)

    def close(self) -> None:
        # The wrapper must go before the process group: as its last holder it would join the group's threads while
        # holding Python's lock, which one of them may still need (a hang at the end, one run in fifty).
        self.prepared_model, self.prepared_optimizer = self.accelerator.free_memory(
            self.prepared_model, self.prepared_optimizer
        )
        self.accelerator.end_training()


def prepare_output_folder(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Bring back what a kill has left half replaced; refuse to overwrite a run, or to resume none."""
    if accelerator.is_main_process:
        recover_folders(args.output_dir)
    accelerator.wait_for_everyone()
    if args.resume and not list_checkpoints(args.output_dir):
        accelerator.print(f"There is no checkpoint in {args.output_dir} yet: starting from the beginning.")
        args.resume = False
    if not args.resume and list_checkpoints(args.output_dir):
        raise CheckpointError(
            f"{args.output_dir} already holds a run: add --resume to go on with it, or choose another --output_dir."
        )
    if not list_checkpoints(args.output_dir) and read_run(args.output_dir) is not None:
        raise CheckpointError(
            f"{args.output_dir} already holds a finished run without checkpoints: choose another --output_dir."
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        clear_unfinished(args.output_dir)  # not before: a run that is refused must not disturb the one that is there


def divide_batch(batch_size: int, num_processes: int, accumulation_steps: int) -> int:
    """Samples that a process takes at once."""
    micro_batch_size, rest = divmod(batch_size, num_processes * accumulation_steps)
    if rest or micro_batch_size < 1:
        raise ValueError(
            f"batch_size={batch_size} cannot be divided by {num_processes} processes and {accumulation_steps} "
            f"accumulation steps: choose a multiple of {num_processes * accumulation_steps}."
        )
    return micro_batch_size


def warn_of_one_class(dataset: RecipeDataset) -> None:
    """Say so where label maps hold one class, which any network has learned after a few steps. Most often the first tells."""
    found: set[int] = set()
    with contextlib.suppress(BadSampleError):  # which training stops at, if it gets there
        for index in tqdm(range(len(dataset)), "Classes", leave=False, delay=2):
            found |= set(dataset.decoded(index).labels.unique().tolist()) - {IGNORE_INDEX}
            if len(found) > 1:
                return
        print(f"Warning: the label maps to train on {SINGLE_CLASS}", file=sys.stderr)


def warn_of_scale(dataset: RecipeDataset, recipe: Recipe) -> None:
    """Say so where the network learns from images as they are, which its image processor will bring to the native size."""
    with contextlib.suppress(BadSampleError):  # which training stops at, if it gets there
        height, width = dataset.decoded(0).labels.shape
        if (height, width) != recipe.image_size:
            rows, columns = recipe.image_size
            print(
                f"Warning: images are trained and validated on as they are, the first at {width}×{height} pixels, but the "
                f"image processor that is saved brings every picture to {columns}×{rows}. To predict at the scale of the "
                "training, set do_resize to false in the model's preprocessor_config.json, or train with --resize.",
                file=sys.stderr,
            )


def build_model(args: argparse.Namespace, recipe: Recipe) -> PreTrainedModel:
    """The network with random weights, or with those of `--init_from`, their mean, wherever they fit."""
    is_classification = recipe.task == "image-classification"
    if args.peer:
        if is_classification:
            raise ValueError(f"The peers are segmentation networks: --peer cannot train the recipe {recipe.name}.")
        if recipe.model_config:
            raise ValueError(f"model_config ({recipe.model_config}) is of LeMoRe: it excludes --peer.")
        return build_peer(args.peer, recipe.num_classes, recipe.id2label)
    model_class = LeMoReForImageClassification if is_classification else LeMoReForSemanticSegmentation
    fields = recipe.network_settings
    if not args.init_from:
        return model_class(LeMoReConfig(**fields))
    if args.resume and (configuration := configuration_of_run(args.output_dir)) is not None:
        return model_class(LeMoReConfig.from_dict(configuration))  # whose weights are the run's own: INIT may be gone
    whole = len(args.init_from) > 1 or recipe.max_steps == 0
    return average_models([load_initial(checkpoint, model_class, fields, whole) for checkpoint in args.init_from])


def configuration_of_run(output_dir: Path) -> dict[str, Any] | None:
    """The network of the newest checkpoint that can be read; `None` where no checkpoint holds it."""
    for folder in reversed(list_checkpoints(output_dir)):
        with contextlib.suppress(DamagedCheckpointError):
            return load_checkpoint(folder)[1].get("configuration")
    return None


def load_initial(
    checkpoint: str, model_class: type[PreTrainedModel], fields: dict[str, Any], whole: bool
) -> PreTrainedModel:
    """The model of a checkpoint, with the recipe's fields in its configuration; `whole` where none of its weights may be
    drawn anew, as a mean of them or an untrained model would not be worth anything."""
    if Path(checkpoint).is_dir():
        require_safetensors(Path(checkpoint))
    try:
        found, _ = LeMoReConfig.get_config_dict(checkpoint)
        if found.get("model_type") != LeMoReConfig.model_type or found.get("is_fused"):
            kind = "a fused model, for inference alone" if found.get("is_fused") else f"of {found.get('model_type')!r}"
            raise ValueError(
                f"--init_from {checkpoint} is {kind}: give a LeMoRe checkpoint as training writes it, such as OUT/final."
            )
        model, found = model_class.from_pretrained(
            checkpoint,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            output_loading_info=True,
            **fields,
        )
        drawn = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
        if whole and drawn:
            raise ValueError(
                f"--init_from {checkpoint} does not hold all weights of this network, such as {drawn[0]}, which would be "
                "random: with several checkpoints, or without a step, they must be of its own classes and shape."
            )
        # Into memory of its own, which is aligned. In the mapped file it is as it happens, and some processors' matrix
        # products round by it: a resumed run would end with other last bits.
        return copy.deepcopy(model)
    except SafetensorError as error:
        raise CheckpointError(
            f"The weights in {checkpoint} are truncated or damaged ({error}): download or copy them again."
        ) from error
    except OSError as error:
        raise OSError(f"--init_from {checkpoint} is no folder here, or cannot be read: {error}") from error


def build_optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.Optimizer:
    """Of the model where it is, on its device."""
    groups = parameter_groups(
        model, recipe.learning_rate, recipe.weight_decay, recipe.head_lr_multiplier, head_prefixes(model)
    )
    if recipe.optimizer == "muon":
        return Muon(groups, lr=recipe.learning_rate)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=model.device.type == "cuda")


def build_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm-up and polynomial decay, gone on with after `step` steps."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    # A run at a constant rate may end inside its warm-up, to be gone on with.
    end = max(recipe.max_steps, recipe.warmup_steps + 1)
    return get_polynomial_decay_schedule_with_warmup(
        optimizer, recipe.warmup_steps, end, 0.0, recipe.poly_power, last_epoch=step - 1
    )


def set_training_mode(model: nn.Module, recipe: Recipe) -> None:
    model.train()
    if recipe.freeze_batch_norm:
        freeze_batch_norm_statistics(model)


def record_cuda_graph(
    model: nn.Module, args: argparse.Namespace, recipe: Recipe, batch_size: int, accelerator: Accelerator
) -> None:
    """From here on the model replays its forward and backward pass on batches of this size, while in training mode."""
    if accelerator.num_processes > 1:
        raise ValueError("--cuda_graph is for one process: leave it out with several.")
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    sample = torch.zeros(batch_size, 3, *recipe.crop_size, device=accelerator.device).to(memory_format=layout)
    # What recording leaves behind in autograd belongs to its own stream, as it should; PyTorch would warn of it.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    # It runs the network a few times, which changes batch-norm statistics and draws random numbers.
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    random_state = torch.cuda.get_rng_state(accelerator.device)
    torch.cuda.make_graphed_callables(model, (sample,))
    for buffer, value in buffers:
        buffer.copy_(value)
    torch.cuda.set_rng_state(random_state, accelerator.device)


def build_criterion(recipe: Recipe, dataset: RecipeDataset | None) -> nn.Module:
    if recipe.task == "image-classification":
        return nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    class_weights = recipe.class_weights
    if isinstance(class_weights, str):
        if dataset is None:
            raise ValueError(
                f"class_weights={class_weights!r} needs the whole set: give a list of weights to a stream."
            )
        labels = (dataset.decoded(index).labels for index in tqdm(range(len(dataset)), "Class weights", leave=False))
        class_weights = median_frequency_weights(*count_for_median_frequency(labels, recipe.num_classes))
    if class_weights is not None:
        class_weights = [weight**recipe.class_weight_power for weight in class_weights]
    return SegmentationCriterion(
        class_weights,
        recipe.label_smoothing,
        recipe.ohem_threshold,
        recipe.ohem_min_kept,
        recipe.dice_weight,
        recipe.lovasz_weight,
        recipe.lovasz_stride,
        recipe.loss_stride,
    )


def build_distillation(args: argparse.Namespace, recipe: Recipe, accelerator: Accelerator) -> DistillationLoss:
    """The loss that the networks of `--teacher` give."""
    teachers = []
    for checkpoint in args.teacher:
        try:
            teachers.append(load_teacher(checkpoint, recipe))
        except (CheckpointError, OSError, ValueError) as error:
            kind = next(kind for kind in (CheckpointError, OSError, ValueError) if isinstance(error, kind))
            raise kind(f"--teacher {checkpoint} cannot teach: {error}") from error
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    return DistillationLoss(teachers).to(accelerator.device, memory_format=layout)


def training_batches(
    args: argparse.Namespace,
    recipe: Recipe,
    accelerator: Accelerator,
    samples: Any,
    dataset: RecipeDataset | None,
    micro_batch_size: int,
    step: int,
) -> Iterator[dict[str, Any]]:
    """Batches of this process, from optimizer step `step` on."""
    place = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    if dataset is None:
        start = step * args.gradient_accumulation_steps
        dataset = StreamedRecipeDataset(
            samples, recipe, True, args.seed, **place, batch_size=micro_batch_size, start=start
        )
        sampler, num_workers = None, min(args.num_workers, dataset.max_workers)
    else:
        sampler = EpochSampler(len(dataset), args.seed, start=step * recipe.batch_size, **place)
        num_workers = args.num_workers
    loader = DataLoader(
        dataset,
        micro_batch_size,
        sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        # Enough for a whole step, whose batches are asked for at once.
        prefetch_factor=max(2, args.gradient_accumulation_steps) if num_workers else None,
        pin_memory=accelerator.device.type == "cuda" and args.cache != "device",
        worker_init_fn=shield_worker,
        multiprocessing_context=inheriting_workers(num_workers),
        # A generator of its own, so that making the loader leaves the one of dropout alone.
        generator=torch.Generator(),
    )
    return (batch for batch in loader if batch is not None)


def batches_of_steps(
    batches: Iterator[dict[str, Any]], number: int, accelerator: Accelerator
) -> Iterator[list[dict[str, Any]]]:
    """The `number` batches of each optimizer step in this process, which heeds requests to stop between two of them.

    Raises:
        BadSampleError, Interrupted: on all processes, where one of them meets a bad sample or is asked to stop; nothing
            of the step has been computed then, so that they can save the same state.
    """
    # A group of its own on the CPU, so that asking the others never waits for a GPU.
    group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
    with InterruptionRequest() as request:
        while True:
            error, step = None, []
            try:
                step = list(islice(batches, number))
            except BadSampleError as bad_sample:
                error = bad_sample
            stop = torch.tensor([int(error is not None), request.number])
            if group is not None:
                torch.distributed.all_reduce(stop, torch.distributed.ReduceOp.MAX, group=group)
            is_bad, signal_number = stop.tolist()
            if is_bad:
                raise_together(error)
            if signal_number:
                raise Interrupted(signal_number)
            if len(step) < number:
                advice = "has no sample for one of the processes: start fewer of them"
                raise ValueError(f"The stream {advice if accelerator.num_processes > 1 else 'has no samples'}.")
            yield step


def fingerprint(args: argparse.Namespace, recipe: Recipe, accelerator: Accelerator, samples: Any) -> dict[str, Any]:
    """Settings that decide what a run computes, and the samples, of which another one changes the order of all."""
    data = {f"recipe.{name}": value for name, value in recipe.to_dict().items() if name not in DESCRIPTIVE_FIELDS}
    if recipe.poly_power == 0 and recipe.mix_until == 1:  # nothing before the end depends on where it is
        del data["recipe.max_steps"]
    options = ["seed", "init_from", "peer", "streaming", "mixed_precision", "gradient_accumulation_steps"]
    if args.streaming:
        options.append("num_workers")  # each reads a part of its own
    run = {name: getattr(args, name) for name in options}
    if args.init_from and len(args.init_from) == 1:  # as before it took several
        (run["init_from"],) = args.init_from
    if args.teacher:
        run |= {"teacher": args.teacher, "teacher_weight": args.teacher_weight}
    if not args.streaming:
        names = "\n".join(map(str, samples["name"])) if "name" in samples.column_names else ""
        run["samples"] = f"{len(samples)}, names {zlib.crc32(names.encode()):08x}"
    return json.loads(json.dumps({**data, **run, "num_processes": accelerator.num_processes}))


def defaults_of_fields() -> dict[str, Any]:
    """What the recipe's fields are where nobody sets them, under their names in the fingerprint."""
    fields = (field for field in dataclasses.fields(Recipe) if field.default is not dataclasses.MISSING)
    return json.loads(json.dumps({f"recipe.{field.name}": field.default for field in fields}))


def resume(state: TrainingState, output_dir: Path) -> None:
    """Go on from the newest checkpoint; where it is damaged, say so and take the one before."""
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            return state.load(folder)
        except DamagedCheckpointError as error:
            print(f"Skipping a checkpoint: {error}")
    raise CheckpointError(f"None of the checkpoints in {output_dir} can be read: start again without --resume.")


def mean_of_processes(value: float, accelerator: Accelerator) -> float:
    """Collective: every process calls it, and each gets the mean of all values."""
    if accelerator.num_processes == 1:
        return value
    return accelerator.reduce(torch.tensor(value, device=accelerator.device), "mean").item()


def check_losses(losses: list[tuple[int, list[str], torch.Tensor]]) -> list[float]:
    """The losses since the last check; an error that names the samples if one is not finite."""
    values = torch.stack([loss for _, _, loss in losses]).float().tolist()
    for (step, names, _), value in zip(losses, values, strict=True):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"The loss of step {step + 1} is {value}, for the samples {', '.join(names)}. Look at them with "
                "scripts/check_dataset.py; where they are right, train into another --output_dir with a lower "
                "learning_rate, or with max_grad_norm."
            )
    return values


class RunLog:
    """`log.jsonl`, TensorBoard where it is installed, and a picture of the curves at the end."""

    def __init__(self, output_dir: Path, accelerator: Accelerator, state: TrainingState):
        self.path = output_dir / "log.jsonl"
        self.accelerator = accelerator
        if accelerator.is_main_process:
            # A resumed run writes again what came after its checkpoint, scores of its step included.
            kept = [
                record
                for record in self.records()
                if record["step"] <= (state.step if "loss" in record else state.scored_step)
            ]
            with atomic_file(self.path) as part:
                part.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        accelerator.init_trackers("tensorboard")

    def records(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    def write(self, step: int, **values: Any) -> None:
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def plot(self) -> None:
        if records := self.records():  # none without a step
            plot_training_curve(records).save(self.path.with_name("curves.png"))


def export_model(model: PreTrainedModel, recipe: Recipe, folder: Path) -> None:
    """Model and image processor as a folder that `from_pretrained` and `pipeline` load."""
    processor = LeMoReImageProcessor(**recipe.processor_settings)
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)


def write_summary(args: argparse.Namespace, data: Data, accelerator: Accelerator, state: TrainingState) -> None:
    """`run.json`: what was run, for how long and on what; `scripts/evaluate.py` adds the test score to it."""
    recipe, dataset = data.recipe, data.training
    settings = json.dumps(state.fingerprint, sort_keys=True)
    summary = {
        "recipe": recipe.name,
        "network": args.peer or "lemore",
        "configuration_hash": hashlib.sha256(settings.encode()).hexdigest()[:12],
        "seed": args.seed,
        "steps": state.step,
        "images": state.step * recipe.batch_size,
        "epochs": None if dataset is None else round(state.step * recipe.batch_size / len(dataset), 1),
        "train_on": recipe.train_on,
        "best_validation": state.best,
        "hours": round(state.seconds / 3600, 3),
        "hardware": hardware_name(accelerator.device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "settings": state.fingerprint,
    }
    with atomic_file(args.output_dir / RUN_NAME) as part:
        part.write_text(json.dumps(summary, indent=2), encoding="utf-8")


if __name__ == "__main__":
    run_script(
        main,
        CheckpointError,
        FloatingPointError,
        PublishingError,
        StrictDataclassError,
        interrupted="Interrupted: the same command with --resume goes on from the last checkpoint.",
    )
