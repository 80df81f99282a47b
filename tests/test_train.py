# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""`scripts/train.py` as people run it: in processes that are killed, resumed, launched twice over, and fed bad data."""

import argparse
import functools
import json
import os
import random
import runpy
import select
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from launching import kill, launch, run_forked, start_forked
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from lemore_hf import LeMoReConfig, LeMoReForImageClassification, LeMoReForSemanticSegmentation, evaluation
from lemore_hf.checkpointing import list_checkpoints, load_checkpoint, save_checkpoint
from lemore_hf.data.augmentation import normalize, resize_for_evaluation
from lemore_hf.data.loading import EpochSampler, RecipeDataset, StreamedRecipeDataset, load_split
from lemore_hf.data.recipes import load_recipe
from lemore_hf.data.scenes import load_scenes
from lemore_hf.distillation import DistillationLoss
from lemore_hf.evaluation import evaluate, load_trained_model
from lemore_hf.interruption import InterruptionRequest, shield_worker
from lemore_hf.peers import build_peer

ROOT = Path(__file__).resolve().parents[1]
TINY_MODEL = {
    "stem_sizes": [8],
    "hidden_sizes": [8, 8, 8, 16],
    "num_attention_heads": 1,
    "attention_key_dim": 4,
    "attention_value_dim": 4,
    "decoder_hidden_size": 8,
    "drop_path_rate": 0.1,
}
RECIPE = {
    "num_classes": 9,
    "image_size": [64, 64],
    "crop_size": [64, 64],
    "max_steps": 24,
    "warmup_steps": 2,
    "batch_size": 4,
    "eval_batch_size": 4,
    "learning_rate": 2e-3,
    "ema_decay": 0.9,
    "cutmix_alpha": 1.0,
    "classmix": True,
    "loss_stride": 2,
    "class_weights": "median_frequency",
    "model_config": TINY_MODEL,
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    for split, samples in load_scenes(10, 3, 2, size=(64, 96)).items():
        samples.to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(json.dumps(RECIPE))  # JSON is YAML.
    return path


def script_and_options(
    recipe: Path, data_dir: Path, output_dir: Path, *options: str, cached: bool = True
) -> list[str]:
    places = ["--recipe", str(recipe), "--data_dir", str(data_dir), "--output_dir", str(output_dir)]
    every = ["--save_every", "3", "--eval_every", "8", "--log_every", "2", "--num_workers", "1"]
    cache = ["--cache", "memory"] if cached else []
    return [str(ROOT / "scripts" / "train.py"), *places, *every, *cache, *options]


def run(*args, processes: int = 1, expect: str | None = None, cached: bool = True) -> str:
    """Runs the script in processes of their own."""
    status, printed = run_forked(processes, *script_and_options(*args, cached=cached))
    assert (status != 0) == (expect is not None), printed[-3000:]
    return printed


@pytest.fixture
def run_here(monkeypatch):
    """Runs the script in this process, which spares the imports; `expect` matches the line that it ends with."""

    def run_here(*places: Path | str, expect: str | None = None, cached: bool = True) -> str:
        words = script_and_options(*places[:3], "--num_workers", "0", *places[3:], cached=cached)
        monkeypatch.setattr(sys, "argv", words)
        if expect is None:
            runpy.run_path(words[0], run_name="__main__")
            return ""
        with pytest.raises(SystemExit, match=expect) as ended:
            runpy.run_path(words[0], run_name="__main__")
        return str(ended.value)

    return run_here


@pytest.fixture
def train() -> dict:
    """The script's functions by name."""
    return runpy.run_path(str(ROOT / "scripts" / "train.py"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, recipe, data_dir) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(recipe, data_dir, folder)
    return folder


def test_a_run_leaves_what_its_user_needs(uninterrupted):
    model = AutoModelForSemanticSegmentation.from_pretrained(uninterrupted / "final")
    assert isinstance(model, LeMoReForSemanticSegmentation)
    assert model.config.num_labels == 9
    records = [json.loads(line) for line in (uninterrupted / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == list(range(2, 25, 2))
    assert [record["step"] for record in records if "mean_iou" in record] == [8, 16, 24]
    rates = [record["lr"] for record in records if "lr" in record]
    assert rates == pytest.approx([2e-3 * (24 - step) / 22 for step in range(2, 25, 2)]), "after the warm-up, to 0"
    with Image.open(uninterrupted / "curves.png") as curves:
        assert len(np.unique(np.asarray(curves))) > 10
    assert list((uninterrupted / "tensorboard").rglob("events*"))
    assert json.loads((uninterrupted / "run.json").read_text())["steps"] == 24
    steps = [load_checkpoint(folder)[1]["step"] for folder in list_checkpoints(uninterrupted)]
    assert steps == [21, 24], "the last two"


def test_a_run_tells_how_it_goes_and_where_the_model_is(tmp_path, recipe, data_dir, run_here, capsys):
    run_here(recipe, data_dir, tmp_path, "--max_steps", "4", "--eval_every", "2")
    scores = {record["step"]: record["mean_iou"] for record in log_of(tmp_path) if "mean_iou" in record}
    printed = capsys.readouterr()
    best = {2: 2, 4: max(scores, key=scores.get)}
    for step, score in scores.items():
        line = f"Step {step}: mean IoU {score:.4f} (best {scores[best[step]]:.4f} at step {best[step]})"
        assert line in printed.err
    assert printed.out.splitlines()[-1] == (
        f"The model: {tmp_path / 'final'}; the one that validated best: {tmp_path / 'best'}"
    )
    assert "Writing model shards" not in printed.err


@pytest.mark.parametrize(("max_steps", "every"), [(20, 100), (3000, 300), (80_000, 1000)])
def test_long_runs_are_saved_and_validated_more_seldom(tmp_path, recipe, data_dir, monkeypatch, max_steps, every):
    script = str(ROOT / "scripts" / "train.py")
    places = ["--recipe", str(recipe), "--data_dir", str(data_dir), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [script, *places, "--max_steps", str(max_steps), "--num_workers", "0"])
    found = {}

    def stop(args, *others):
        found.update(vars(args))
        raise ValueError("far enough")

    functions = runpy.run_path(script)
    monkeypatch.setitem(functions["main"].__globals__, "build_model", stop)
    with pytest.raises(ValueError, match="far enough"):
        functions["main"]()
    assert (found["eval_every"], found["save_every"]) == (every, every)


def test_label_maps_of_one_class_are_told_before_they_are_trained_on(tmp_path, recipe, data_dir, run_here, capsys):
    """As a foreground of 255, which is void, leaves them."""
    for split in ("train", "validation"):
        for index in range(4):
            for part, mode in (("images", "RGB"), ("masks", "L")):
                (tmp_path / split / part).mkdir(parents=True, exist_ok=True)
                image = Image.new(mode, (64, 64))
                image.paste("white", (0, 0, 20, 30))
                image.save(tmp_path / split / part / f"{index}.png")
    options = ["--max_steps", "1", "--eval_every", "0", "--class_weights", "none"]
    for folder, told in ((tmp_path, True), (data_dir, False)):
        run_here(recipe, folder, tmp_path / f"out {told}", *options)
        assert ("a single class beside void (255)" in capsys.readouterr().err) is told


@pytest.mark.parametrize(("size", "told"), [((64, 96), False), ((64, 64), True)])
def test_images_at_another_scale_than_the_processor_makes_of_them_are_told_of(
    size, told, recipe, data_dir, tmp_path, run_here, capsys
):
    options = ["--max_steps", "1", "--eval_every", "0", "--class_weights", "none"]
    run_here(recipe, data_dir, tmp_path / "out", *options, "--image_size", *map(str, size))
    assert ("Warning: images are trained and validated on as they are" in capsys.readouterr().err) is told


def test_the_model_that_validated_best_is_kept(uninterrupted, recipe, data_dir):
    scores = {record["step"]: record["mean_iou"] for record in log_of(uninterrupted) if "mean_iou" in record}
    best = json.loads((uninterrupted / "run.json").read_text())["best_validation"]
    assert best == {"step": max(scores, key=scores.get), "score": max(scores.values())}
    settings = load_recipe(recipe)
    validation = RecipeDataset(load_split(settings, "validation", data_dir), settings)
    found = evaluate(load_trained_model(uninterrupted / "best"), validation, settings, progress=False)
    assert found["mean_iou"] == pytest.approx(best["score"], abs=1e-4)
    assert AutoImageProcessor.from_pretrained(uninterrupted / "best").size == {"height": 64, "width": 64}


def test_the_average_is_what_is_validated_saved_and_chosen_from(tmp_path, recipe, data_dir, run_here, monkeypatch):
    scores = iter([0.5, 0.7, 0.6])
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: {"mean_iou": next(scores)})
    options = ["--max_steps", "3", "--eval_every", "1", "--save_every", "1", "--keep_checkpoints", "3"]
    run_here(recipe, data_dir, tmp_path, *options, "--log_every", "1", "--max_grad_norm", "0.01")
    _, second, third = (load_checkpoint(folder)[0] for folder in list_checkpoints(tmp_path))
    for folder, tensors in (("best", second), ("final", third)):
        for name, value in load_file(tmp_path / folder / "model.safetensors").items():
            assert torch.equal(value, tensors[f"ema.{name}"]), name
    weight = "decode_head.classifier.weight"  # the first step has no rate, so that the later two differ
    states = {
        tensors[f"{kind}.{weight}"].numpy().tobytes() for tensors in (second, third) for kind in ("ema", "model")
    }
    assert len(states) == 4
    assert [record["lr"] for record in log_of(tmp_path) if "lr" in record] == pytest.approx([1e-3, 2e-3, 0])
    moments = [value for name, value in third.items() if name.startswith("optimizer.") and name.endswith(".exp_avg")]
    norm = sum(moment.square().sum() for moment in moments).sqrt()
    assert norm <= 0.01 * 0.1 * (1 + 0.9 + 0.81) * 1.001, "of three clipped gradients"


def test_validating_changes_nothing_of_the_training(tmp_path, recipe, data_dir, run_here):
    options = ["--max_steps", "6", "--eval_every"]
    run_here(recipe, data_dir, tmp_path / "never", *options, "0")
    run_here(recipe, data_dir, tmp_path / "often", *options, "1")
    assert weights_of(tmp_path / "never") == weights_of(tmp_path / "often")


def test_a_validation_that_fails_costs_no_step_and_is_made_up(tmp_path, recipe, data_dir, run_here, monkeypatch):
    options = ["--max_steps", "4", "--save_every", "2", "--eval_every", "2", "--log_every", "2", "--num_workers", "0"]
    run_here(recipe, data_dir, tmp_path / "whole", *options)

    def out_of_memory(*arguments, **options):
        raise torch.OutOfMemoryError("the frame is too large")

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            run_here(recipe, data_dir, tmp_path / "failed", *options)
    state = load_checkpoint(list_checkpoints(tmp_path / "failed")[-1])[1]
    assert (state["step"], state["scored_step"], state["scores"]) == (2, 0, {})
    run_here(recipe, data_dir, tmp_path / "failed", *options, "--resume")
    assert log_of(tmp_path / "failed") == log_of(tmp_path / "whole")
    assert weights_of(tmp_path / "failed") == weights_of(tmp_path / "whole")


def test_scores_that_no_checkpoint_knows_of_are_logged_once(tmp_path, recipe, data_dir, run_here, monkeypatch):
    options = ["--max_steps", "2", "--save_every", "2", "--eval_every", "2", "--log_every", "2", "--num_workers", "0"]

    def disk_full(*arguments, **options):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(LeMoReForSemanticSegmentation, "save_pretrained", disk_full)  # of the best model
        run_here(recipe, data_dir, tmp_path, *options, expect="no space left")
    run_here(recipe, data_dir, tmp_path, *options, "--resume")
    assert [record["step"] for record in log_of(tmp_path) if "mean_iou" in record] == [2]


def test_killed_at_random_moments_and_resumed_it_ends_with_the_same_weights(tmp_path, recipe, data_dir, uninterrupted):
    kills, chance = 0, random.Random(0)
    arguments = script_and_options(recipe, data_dir, tmp_path, "--resume")
    for attempt in range(3):
        leftover = bool(list(tmp_path.glob(".checkpoint-*")))  # of the kill before, until the run clears it away
        seen = set(tmp_path.glob("checkpoint-*"))
        process = start_forked(*arguments, log=tmp_path / f"log{attempt}.txt")
        # In turn: while a checkpoint is being written (or at the latest after the second), and some time after one.
        while process.is_alive():
            written = len(set(tmp_path.glob("checkpoint-*")) - seen)
            writing = bool(list(tmp_path.glob(".checkpoint-*")))
            leftover = leftover and writing
            if attempt % 2 == 0 and (written >= 2 or (writing and not leftover)):
                break
            if attempt % 2 and written:
                time.sleep(chance.uniform(0, 0.1))
                break
            time.sleep(0.002)  # who never sleeps is made to wait while the run goes on
        if process.is_alive():
            kill(process)
            kills += 1
        for folder in list_checkpoints(tmp_path):
            load_checkpoint(folder)
    assert kills == 3, "the run ended before it could be killed"
    run(recipe, data_dir, tmp_path, "--resume")
    assert weights_of(tmp_path) == weights_of(uninterrupted)
    losses = [log_of(folder) for folder in (tmp_path, uninterrupted)]
    assert losses[0] == losses[1]


def interrupt(arguments: list[str], output_dir: Path, number: signal.Signals) -> tuple[int, str]:
    """Send a signal to a run that has made its first steps: its status, and what it wrote to standard error."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = output_dir / "log.jsonl"
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment) as process:
        while process.poll() is None and not (log.is_file() and log.read_text()):
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=200)
    return process.returncode, errors


def test_an_interrupted_run_loses_no_step(tmp_path, recipe, data_dir, uninterrupted):
    arguments = launch(1, *script_and_options(recipe, data_dir, tmp_path, "--resume", "--save_every", "0"))
    status, errors = interrupt(arguments, tmp_path, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM, errors
    assert "Interrupted: the same command with --resume goes on" in errors
    assert "Traceback" not in errors
    (checkpoint,) = list_checkpoints(tmp_path)
    assert 2 <= load_checkpoint(checkpoint)[1]["step"] < 24
    run(recipe, data_dir, tmp_path, "--resume")
    assert weights_of(tmp_path) == weights_of(uninterrupted)
    assert log_of(tmp_path) == log_of(uninterrupted)


def test_a_terminal_that_goes_away_costs_no_step(tmp_path, recipe, data_dir):
    """As when a connection breaks: a signal comes, and nothing can be written any more."""
    pty, fcntl, termios = (
        pytest.importorskip(name, reason="needs a Unix terminal") for name in ("pty", "fcntl", "termios")
    )
    terminal, its_end = pty.openpty()

    def take_the_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which the tests may ignore, started by nohup
        fcntl.ioctl(its_end, termios.TIOCSCTTY, 0)

    log = tmp_path / "log.jsonl"
    # Each validation writes to the terminal.
    options = ("--save_every", "0", "--max_steps", "2000", "--eval_every", "1")
    words = script_and_options(recipe, data_dir, tmp_path, *options)
    with subprocess.Popen(
        launch(1, *words),
        **dict.fromkeys(("stdin", "stdout", "stderr"), its_end),
        start_new_session=True,
        preexec_fn=take_the_terminal,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        os.close(its_end)
        while process.poll() is None and not (log.is_file() and log.read_text()):
            if select.select([terminal], [], [], 0.01)[0]:
                os.read(terminal, 4096)
        os.close(terminal)
        assert process.wait(timeout=200) == 128 + signal.SIGHUP
    (checkpoint,) = list_checkpoints(tmp_path)
    assert 1 <= load_checkpoint(checkpoint)[1]["step"] < 2000


def test_a_folder_is_trained_into_by_one_run_at_a_time(tmp_path, recipe, data_dir, run_here):
    claim = "import sys; from pathlib import Path; from lemore_hf.checkpointing import claimed_folder"
    code = f"{claim}\nwith claimed_folder(Path({str(tmp_path)!r})): print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        for option in ((), ("--resume",)):
            message = "CheckpointError: Another process is training into"
            run_here(recipe, data_dir, tmp_path, "--max_steps", "1", *option, expect=message)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"], "and nothing was touched"
        other.stdin.close()
    run_here(recipe, data_dir, tmp_path, "--max_steps", "1", "--eval_every", "0")
    run_here(recipe, data_dir, tmp_path, "--max_steps", "1", "--eval_every", "0", expect="already holds a")
    assert not list(tmp_path.glob(".*")), "neither a finished run nor a refused one leaves a claim"


def test_two_processes_that_are_interrupted_save_the_same_step(tmp_path, recipe, data_dir):
    """The launcher passes the signal on to its processes, which are in the midst of different things by then."""
    options = ("--save_every", "0", "--eval_every", "0", "--max_steps", "2000")
    arguments = launch(2, *script_and_options(recipe, data_dir, tmp_path, *options))
    status, errors = interrupt(arguments, tmp_path, signal.SIGTERM)
    assert status != 0
    assert errors.count("Interrupted: the same command with --resume") == 2, errors[-3000:]
    tensors, state = load_checkpoint(list_checkpoints(tmp_path)[-1])
    assert 2 <= state["step"] < 2000
    assert not torch.equal(tensors["random.0.cpu"], tensors["random.1.cpu"]), "the states of both"


@pytest.fixture
def sigint() -> Iterator[None]:
    """As in the foreground, where Ctrl-C is heeded, which the tests may not be started in."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_is_ignored_stays_ignored(sigint):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with InterruptionRequest() as request:
        signal.raise_signal(signal.SIGINT)
        assert not request.number
        signal.raise_signal(signal.SIGTERM)
        assert request.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_loaders_are_shielded_where_there_are_no_process_groups(sigint, monkeypatch):
    """As on Windows: a loader that ends on Ctrl-C would end the run before it has saved its step."""
    monkeypatch.delattr(os, "setpgrp")
    shield_worker()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_a_second_interruption_does_not_wait_for_a_step(sigint, monkeypatch):
    with InterruptionRequest() as request:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # as a launcher passes on what the terminal has sent already
        assert request.number == signal.SIGINT
        later = time.monotonic() + 2
        monkeypatch.setattr(time, "monotonic", lambda: later)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def weights_of(output_dir: Path) -> bytes:
    return (output_dir / "final" / "model.safetensors").read_bytes()


def log_of(output_dir: Path) -> list[dict]:
    records = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "images_per_second"} for record in records]


def test_two_processes_train_and_resume_to_the_same_weights(tmp_path, recipe, data_dir):
    # With single images to validate, both processes have some; and their batch-norm statistics are those of their last
    # own batch, so that scores tell whose are used.
    options = ("--max_steps", "12", "--save_every", "6", "--eval_every", "6", "--eval_batch_size", "1")
    options += ("--learning_rate", "0.02", "--model_config", json.dumps({**TINY_MODEL, "batch_norm_momentum": 1.0}))
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(recipe, data_dir, whole, *options, processes=2)
    assert [record["step"] for record in log_of(whole) if "mean_iou" in record] == [6, 12]
    assert json.loads((whole / "run.json").read_text())["settings"]["num_processes"] == 2
    # What an interruption after step 6 leaves.
    shutil.copytree(whole, halves)
    shutil.rmtree(halves / "final")
    shutil.rmtree(halves / "checkpoint-0000012")
    run(recipe, data_dir, halves, *options, "--resume", processes=2)
    assert weights_of(halves) == weights_of(whole)
    assert log_of(halves) == log_of(whole)
    # Dropout and mixing of one process are not those of the other.
    tensors, _ = load_checkpoint(list_checkpoints(whole)[-1])
    assert not torch.equal(tensors["random.0.cpu"], tensors["random.1.cpu"])
    # What both measured together is what the saved model scores.
    settings = load_recipe(recipe)
    validation = RecipeDataset(load_split(settings, "validation", data_dir), settings)
    scores = evaluate(load_trained_model(whole / "final"), validation, settings, batch_size=1, progress=False)
    assert log_of(whole)[-1]["mean_iou"] == pytest.approx(scores["mean_iou"], abs=1e-4)


def test_the_loss_that_two_processes_log_is_that_of_both_after_a_resumption_too(tmp_path, recipe, data_dir):
    """Also where the checkpoint lies between two entries of the log."""
    options = ("--max_steps", "4", "--log_every", "4", "--eval_every", "0")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(recipe, data_dir, whole, *options, processes=2)
    shutil.copytree(whole / "checkpoint-0000003", resumed / "checkpoint-0000003")
    run(recipe, data_dir, resumed, *options, "--resume", processes=2)
    (expected,), (found,) = log_of(whole), log_of(resumed)
    assert found == expected | {"loss": pytest.approx(expected["loss"], abs=1e-6)}


NOTHING_WRAPPED_AT_THE_END = """
import gc, runpy, sys
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

def end_training(self, end=Accelerator.end_training):
    wrapped = [found for found in gc.get_objects() if isinstance(found, DistributedDataParallel)]
    assert self.num_processes == 2 and not wrapped, f"{len(wrapped)} would outlive the process group"
    end(self)

Accelerator.end_training = end_training
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_processes_do_not_wait_for_each_other_forever_at_the_end(tmp_path, recipe, data_dir):
    # A wrapper that outlived the process group could hang, which one run in fifty did; so none may be left by then.
    (tmp_path / "watched.py").write_text(NOTHING_WRAPPED_AT_THE_END)
    words = script_and_options(recipe, data_dir, tmp_path / "out", "--max_steps", "2", "--eval_every", "0")
    status, printed = run_forked(2, tmp_path / "watched.py", *words)
    assert status == 0, printed[-3000:]


def test_a_checkpoint_that_was_being_replaced_is_brought_back(tmp_path, recipe, data_dir, uninterrupted, run_here):
    """Killed between two renames, while the checkpoint of a step was saved again with the step's scores."""
    folder = shutil.copytree(uninterrupted, tmp_path / "killed")
    *_, last = checkpoints = list_checkpoints(folder)
    for checkpoint in checkpoints[:-1]:
        shutil.rmtree(checkpoint)
    shutil.copytree(last, folder / f".{last.name}.writing")
    last.rename(folder / f".{last.name}.replaced")
    # A second start by mistake is refused and deletes nothing that the run may be writing.
    run_here(recipe, data_dir, folder, expect="already holds a run")
    assert (folder / f".{last.name}.writing").is_dir()
    run_here(recipe, data_dir, folder, "--resume")
    assert list_checkpoints(folder) == [last]
    assert not list(folder.glob(".*"))


def test_the_log_has_the_mean_loss_since_the_last_entry(tmp_path, recipe, data_dir, run_here):
    options = ("--max_steps", "6", "--eval_every", "0", "--cache", "memory", "--num_workers", "0")
    for every in (1, 3):
        run_here(recipe, data_dir, tmp_path / str(every), *options, "--log_every", str(every))
    each, some = ([record["loss"] for record in log_of(tmp_path / str(every))] for every in (1, 3))
    assert some == pytest.approx([np.mean(each[:3]), np.mean(each[3:])])


def test_resuming_with_other_samples_is_refused(tmp_path, recipe, run_here):
    """One more picture changes which are held out, so that the best model would be chosen from what was trained on."""
    for index in range(11):
        for part, mode in (("images", "RGB"), ("masks", "L")):
            (tmp_path / part).mkdir(exist_ok=True)
            Image.linear_gradient("L").resize((64, 64)).point(lambda level: level // 32).convert(mode).save(
                tmp_path / part / f"{index:02}.png"
            )
    settings = json.dumps({**RECIPE, "class_weights": None, "validation_fraction": 0.2})
    (tmp_path / "folder.yaml").write_text(settings)
    places = (tmp_path / "folder.yaml", tmp_path, tmp_path / "out")
    run_here(*places, "--max_steps", "3", "--eval_every", "0", "--poly_power", "0")
    for part in ("images", "masks"):
        shutil.copy(tmp_path / part / "00.png", tmp_path / part / "a new one.png")
    more = ["--max_steps", "6", "--eval_every", "0", "--poly_power", "0", "--resume"]
    run_here(*places, *more, expect="samples was '9, names [0-9a-f]{8}', is '10, names [0-9a-f]{8}'")
    for part in ("images", "masks"):
        (tmp_path / part / "a new one.png").unlink()
    run_here(*places, *more)


def test_resuming_with_other_settings_is_refused(recipe, data_dir, uninterrupted, run_here):
    changed = ["--resume", "--learning_rate", "1e-4"]
    run_here(recipe, data_dir, uninterrupted, *changed, expect=r"recipe\.learning_rate was 0\.002, is 0\.0001")
    run_here(recipe, data_dir, uninterrupted, expect="already holds a run")


def test_a_checkpoint_of_before_a_setting_came_is_resumed_where_the_setting_is_off(
    tmp_path, run_here, recipe, data_dir, uninterrupted
):
    folder = shutil.copytree(uninterrupted, tmp_path / "older")
    for checkpoint in list_checkpoints(folder):
        tensors, state = load_checkpoint(checkpoint)
        del state["fingerprint"]["recipe.blur"]
        state["fingerprint"]["recipe.allow_all_void"] = False  # which was compared then
        shutil.rmtree(checkpoint)
        save_checkpoint(checkpoint, tensors, state)
    run_here(recipe, data_dir, folder, "--resume", "--blur", "0.5", expect=r"recipe\.blur was 0\.0, is 0\.5")
    run_here(recipe, data_dir, folder, "--resume")


def test_a_checkpoint_with_a_setting_that_is_not_known_here_is_refused(
    tmp_path, run_here, recipe, data_dir, uninterrupted
):
    folder = shutil.copytree(uninterrupted, tmp_path / "newer")
    for checkpoint in list_checkpoints(folder):
        tensors, state = load_checkpoint(checkpoint)
        state["fingerprint"]["recipe.stretch"] = 1.5
        shutil.rmtree(checkpoint)
        save_checkpoint(checkpoint, tensors, state)
    run_here(recipe, data_dir, folder, "--resume", expect=r"recipe\.stretch was 1\.5, is None")


def test_a_run_of_constant_rate_goes_on_beyond_its_end(tmp_path, recipe, data_dir, run_here):
    # The shorter run ends with its warm-up.
    options = ("--poly_power", "0", "--warmup_steps", "4", "--eval_every", "4", "--max_steps")
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    run_here(recipe, data_dir, whole, *options, "8")
    run_here(recipe, data_dir, longer, *options, "4")
    run_here(recipe, data_dir, longer, *options, "8", "--resume")
    assert weights_of(longer) == weights_of(whole)
    assert log_of(longer) == log_of(whole)
    assert json.loads((longer / "run.json").read_text())["steps"] == 8
    # Killed while the longer run's model was written: the shorter one's is there, and is not taken for it.
    shutil.rmtree(longer / "final")
    (longer / "final").mkdir()
    summary = json.loads((longer / "run.json").read_text())
    (longer / "run.json").write_text(json.dumps(summary | {"steps": 4}))
    run_here(recipe, data_dir, longer, *options, "8", "--resume")
    assert weights_of(longer) == weights_of(whole)
    # It cannot be made shorter.
    (longer / "final" / "README.md").write_text("A card that was written since.")
    run_here(recipe, data_dir, longer, *options, "4", "--resume")
    assert (longer / "final" / "README.md").is_file()
    assert weights_of(longer) == weights_of(whole)


def test_batches_are_mixed_until_a_share_of_the_steps(tmp_path, recipe, data_dir, run_here):
    options = ("--max_steps", "8", "--eval_every", "0", "--log_every", "1")
    variants = {
        "always": (),
        "half": ("--mix_until", "0.5"),
        "never": ("--mix_until", "0"),
        "off": ("--cutmix_alpha", "0", "--classmix", "false"),
    }
    for name, words in variants.items():
        run_here(recipe, data_dir, tmp_path / name, *options, *words)
    losses = {name: [record["loss"] for record in log_of(tmp_path / name)] for name in variants}
    assert losses["half"][:4] == losses["always"][:4]
    assert losses["half"][4] != losses["always"][4], "the fifth of eight steps is no more mixed"
    assert losses["never"] == losses["off"] != losses["always"]
    assert weights_of(tmp_path / "never") == weights_of(tmp_path / "off")


def test_where_mixing_ends_a_run_of_constant_rate_is_not_made_longer(tmp_path, recipe, data_dir, run_here):
    options = ("--poly_power", "0", "--eval_every", "0", "--mix_until", "0.5", "--max_steps")
    run_here(recipe, data_dir, tmp_path, *options, "4")
    run_here(recipe, data_dir, tmp_path, *options, "8", "--resume", expect=r"recipe\.max_steps was 4, is 8")


def test_recording_a_cuda_graph_leaves_model_and_random_numbers_alone(monkeypatch, recipe):
    # There is no GPU here: recording runs the network, and that is what is done in its place.
    seen = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda model, inputs: seen.append(model(*inputs)))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: torch.set_rng_state(state))
    record = runpy.run_path(str(ROOT / "scripts" / "train.py"))["record_cuda_graph"]
    model = LeMoReForSemanticSegmentation(LeMoReConfig(num_labels=9, image_size=[64, 64], **TINY_MODEL)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    args = argparse.Namespace(channels_last=True)
    place = types.SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    record(model, args, load_recipe(recipe), 4, place)
    assert seen[0].logits.shape[:2] == (4, 9)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    with pytest.raises(ValueError, match="--cuda_graph is for one process"):
        record(model, args, load_recipe(recipe), 4, types.SimpleNamespace(num_processes=2))


def test_resuming_a_finished_run_leaves_its_results_alone(tmp_path, recipe, data_dir, uninterrupted, run_here):
    folder = tmp_path / "finished"
    shutil.copytree(uninterrupted, folder)
    (folder / "final" / "README.md").write_text("A card that was written since.")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    # What describes a recipe, or how it is evaluated, is no other run.
    described = ["--title", "Streets", "--citation", "A book", "--eval_batch_size", "1"]
    run_here(recipe, data_dir, folder, "--resume", *described)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path: after.get(path) for path in before} == before
    scores = load_checkpoint(list_checkpoints(folder)[-1])[1]["scores"]
    assert scores["mean_iou"] == log_of(folder)[-1]["mean_iou"], "what a card is published with"
    # Without its checkpoints it is still a run that nothing may overwrite.
    for checkpoint in list_checkpoints(folder):
        shutil.rmtree(checkpoint)
    for options in ([], ["--resume"]):
        run_here(recipe, data_dir, folder, *options, expect="holds a finished run without checkpoints")


def test_images_of_another_size_in_validation_lose_no_step(tmp_path, recipe, run_here):
    for split, sizes in (("train", [(64, 64)] * 4), ("validation", [(64, 64), (64, 64), (70, 64)])):
        for kind, mode in (("images", "RGB"), ("masks", "L")):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
            for index, size in enumerate(sizes):
                Image.new(mode, size, 1).save(tmp_path / "data" / split / kind / f"{index}.png")
    options = ["--class_weights", "none", "--max_steps", "3", "--save_every", "100", "--eval_every", "2"]
    output = run_here(recipe, tmp_path / "data", tmp_path / "out", *options, expect="Sample '2'")
    assert "--eval_batch_size 1" in output
    assert load_checkpoint(list_checkpoints(tmp_path / "out")[-1])[1]["step"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_steps", "many"], r"TypeError: .*max_steps must be int"),
        (["--init_from", "nowhere"], "--init_from nowhere is no folder here"),
        (["--output_dir", __file__], "exists"),
    ],
)
def test_mistakes_end_in_a_line(options, message, tmp_path, recipe, data_dir, run_here):
    run_here(recipe, data_dir, tmp_path, *options, expect=message)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, recipe, data_dir, run_here):
    options = ["--learning_rate", "1e18", "--save_every", "1"]
    output = run_here(recipe, data_dir, tmp_path, *options, expect="The loss of step")
    assert "for the samples" in output
    assert "train into another --output_dir" in output, "since --resume refuses other settings"
    tensors, _ = load_checkpoint(list_checkpoints(tmp_path)[-1])
    assert tensors
    assert not (tmp_path / "final").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_sample_is_named_and_nothing_is_lost(tmp_path, recipe, processes, run_here):
    data = tmp_path / "data"

    def write_mask(split: str, index: int, label: int) -> None:
        Image.new("L", (64, 64), label).save(data / split / f"masks/street{index:02}.png")

    for split, count in (("train", 12), ("validation", 4)):
        for kind in ("images", "masks"):
            (data / split / kind).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (64, 64), (index * 20, 0, 99)).save(data / split / f"images/street{index:02}.png")
            write_mask(split, index, index % 3)
    options = ["--class_weights", "none", "--max_steps", "4", "--save_every", "100", "--eval_every", "2"]
    if processes == 1:
        options += ["--gradient_accumulation_steps", "2", "--num_workers", "1"]
    else:  # as the README advises on a CPU
        options += ["--mixed_precision", "bf16", "--channels_last"]
    train = functools.partial(run_here if processes == 1 else functools.partial(run, processes=2), cached=False)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(recipe, data, whole, *options)

    # In the middle of the third step, in the last batch or process; and in the validation before it.
    third_step = [index for _, index in islice(EpochSampler(12, seed=0), 8, 12)]
    bad = [("validation", 3)] * (processes > 1) + [("train", third_step[3])]
    for split, index in bad:
        write_mask(split, index, 77)
    for split, index in bad:
        output = train(recipe, data, stopped, *options, "--resume", expect="BadSampleError")
        assert f"BadSampleError: Sample {index} ('street{index:02}') cannot be used" in output
        assert "77" in output
        assert "check_dataset.py" in output
        assert load_checkpoint(list_checkpoints(stopped)[-1])[1]["step"] == 2
        write_mask(split, index, index % 3)
    train(recipe, data, stopped, *options, "--resume")
    assert weights_of(stopped) == weights_of(whole)


def test_what_a_bad_sample_s_message_advises_can_be_done(tmp_path, recipe, run_here):
    data = tmp_path / "data"
    for kind, mode in (("images", "RGB"), ("masks", "L")):
        (data / "train" / kind).mkdir(parents=True)
        for index in range(4):
            Image.new(mode, (64, 64), 1).save(data / "train" / kind / f"{index}.png")

    options = ["--class_weights", "none", "--max_steps", "3", "--batch_size", "2", "--eval_every", "0"]
    train = functools.partial(run_here, recipe, data, tmp_path / "out", *options, cached=False)
    mask = data / "train" / "masks" / f"{[index for _, index in islice(EpochSampler(4, seed=0), 4)][3]}.png"
    Image.new("L", (64, 64), 77).save(mask)
    first = tmp_path / "first"
    # In the first step nothing is lost, so nothing is kept: the folder is free for other settings.
    run_here(recipe, data, first, *options, "--batch_size", "4", cached=False, expect="labels 77 are out of range")
    assert list_checkpoints(first) == []
    run_here(recipe, data, first, *options, "--batch_size", "4", "--label_map", "{1: 1, 77: 2}", cached=False)

    Image.new("L", (64, 64), 255).save(mask)
    assert "allow_all_void accepts that" in train(expect="all its pixels are void")
    assert load_checkpoint(list_checkpoints(tmp_path / "out")[-1])[1]["step"] == 1
    train("--resume", "--allow_all_void")


def test_a_resumed_run_needs_neither_its_first_weights_nor_the_checkpoint_again(
    tmp_path, recipe, data_dir, uninterrupted, run_here
):
    initial = Path(shutil.copytree(uninterrupted / "final", tmp_path / "initial"))
    options = ["--init_from", str(initial), "--poly_power", "0", "--eval_every", "0", "--save_every", "2"]
    run_here(recipe, data_dir, tmp_path / "out", *options, "--max_steps", "2")
    run_here(recipe, data_dir, tmp_path / "whole", *options, "--max_steps", "4")
    shutil.rmtree(initial)
    run_here(recipe, data_dir, tmp_path / "out", *options, "--max_steps", "4", "--resume")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


def test_muon_trains_and_resumes_to_the_same_weights(tmp_path, recipe, data_dir, run_here):
    options = ["--max_steps", "6", "--channels_last", "--eval_every", "0"]
    whole, halves, adamw = (tmp_path / name for name in ("whole", "halves", "adamw"))
    run_here(recipe, data_dir, whole, *options, "--optimizer", "muon")
    run_here(recipe, data_dir, adamw, *options)
    assert weights_of(whole) != weights_of(adamw)
    shutil.copytree(whole, halves)
    shutil.rmtree(halves / "final")
    shutil.rmtree(halves / "checkpoint-0000006")
    run_here(recipe, data_dir, halves, *options, "--resume", expect="recipe.optimizer was 'muon', is 'adamw'")
    run_here(recipe, data_dir, halves, *options, "--optimizer", "muon", "--resume")
    assert weights_of(halves) == weights_of(whole)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """A folder of a network whose probabilities tell the classes apart, though nobody trained it."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("teacher")
    model = LeMoReForSemanticSegmentation(LeMoReConfig(num_labels=9, image_size=[64, 64], **TINY_MODEL)).eval()
    with torch.no_grad():
        model.decode_head.classifier.bias.copy_(torch.linspace(-3, 3, 9))
    model.save_pretrained(folder)
    return str(folder)


def divergence_from(teacher: str, output_dir: Path, recipe: Path, data_dir: Path) -> float:
    """What is left between a run's model and its teacher, on images that none has seen."""
    settings = load_recipe(recipe)
    validation = RecipeDataset(load_split(settings, "validation", data_dir), settings)
    images = torch.stack(
        [normalize(validation[index]["pixel_values"][None], settings, "cpu")[0] for index in range(2)]
    )
    with torch.no_grad():
        logits = load_trained_model(output_dir / "final")(images).logits
        return DistillationLoss([load_trained_model(teacher)])(logits, images).item()


def test_a_network_learns_from_its_teacher(tmp_path, recipe, data_dir, teacher, run_here):
    every = ["--eval_every", "0", "--save_every", "8", "--log_every", "16"]
    options = [*every, "--ema_decay", "none", "--max_steps", "16"]
    alone, taught, resumed = tmp_path / "alone", tmp_path / "taught", tmp_path / "resumed"
    run_here(recipe, data_dir, alone, *options)
    taught_by = ["--teacher", teacher, "--teacher_weight", "10"]
    run_here(recipe, data_dir, taught, *options, *taught_by)
    before, after = (divergence_from(teacher, folder, recipe, data_dir) for folder in (alone, taught))
    assert after < 0.5 * before
    assert log_of(taught)[-1]["loss"] > log_of(alone)[-1]["loss"], "the teacher's part is in the loss that is logged"
    settings = json.loads((taught / "run.json").read_text())["settings"]
    assert (settings["teacher"], settings["teacher_weight"]) == ([teacher], 10)
    assert "teacher" not in json.loads((alone / "run.json").read_text())["settings"]

    shutil.copytree(taught, resumed)
    shutil.rmtree(resumed / "final")
    shutil.rmtree(resumed / "checkpoint-0000016")
    run_here(recipe, data_dir, resumed, *options, "--resume", expect="teacher was .* is None")
    run_here(recipe, data_dir, resumed, *options, *taught_by, "--resume")
    assert weights_of(resumed) == weights_of(taught)


def test_two_processes_learn_from_two_teachers(tmp_path, recipe, data_dir, teacher, uninterrupted):
    options = ["--mixed_precision", "bf16", "--channels_last", "--max_steps", "2", "--eval_every", "0"]
    teachers = ["--teacher", teacher, str(uninterrupted / "final"), "--teacher_weight", "100"]
    run(recipe, data_dir, tmp_path, *options, *teachers, processes=2)
    (record,) = [record for record in log_of(tmp_path) if record["step"] == 2]
    assert 20 < record["loss"] < 300, "the divergence a hundred times, beside which the labels' loss is small"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--teacher", "nowhere"], "OSError: --teacher nowhere cannot teach: "),
        (["--num_classes", "10", "--class_weights", "none"], "ValueError: --teacher .* cannot teach: .*has 9 labels"),
        (["--max_steps", "0", "--init_from", "x"], "max_steps=0 learns nothing from a --teacher"),
        (
            ["--recipe", "imagenet1k"],
            "--teacher is for segmentation, the recipe imagenet1k is for image-classification",
        ),
    ],
)
def test_who_cannot_teach_is_named_before_the_work(options, message, tmp_path, recipe, data_dir, teacher, run_here):
    run_here(recipe, data_dir, tmp_path, "--teacher", teacher, *options, expect=message)
    assert not list_checkpoints(tmp_path)


def test_a_stream_is_trained_on_and_resumed_to_the_same_weights(tmp_path, recipe, data_dir, run_here, monkeypatch):
    # At the end of each epoch `datasets` waits for its threads.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    options = ("--streaming", "--class_weights", "none", "--max_steps", "6", "--eval_every", "3", "--num_workers", "1")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run_here(recipe, data_dir, whole, *options, cached=False)
    shutil.copytree(whole, halves)
    shutil.rmtree(halves / "final")
    shutil.rmtree(halves / "checkpoint-0000006")
    run_here(recipe, data_dir, halves, *options, "--resume", cached=False)
    assert weights_of(halves) == weights_of(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep_checkpoints", "0"], "--keep_checkpoints: must be at least 1, got 0"),
        (["--save_every", "-1"], "--save_every: must be at least 0"),
        (["--cache", "device"], "--num_workers 0"),
        (["--streaming", "--cache", "memory"], "exclude each other"),
        (["--peer", "segformer-b0", "--init_from", "x"], "--init_from is for LeMoRe"),
        (["--peer", "segformer-b0", "--push_to_hub", "x"], "--push_to_hub is for LeMoRe"),
        (["--teacher_weight", "2"], "--teacher_weight needs a --teacher"),
        (["--teacher", "x", "--teacher_weight", "0"], "--teacher_weight: must be above 0 and finite, got 0"),
        (["--teacher", "x", "--teacher_weight", "nan"], "must be above 0 and finite, got nan"),
    ],
)
def test_options_without_effect_are_refused(options, message, monkeypatch, capsys):
    script = str(ROOT / "scripts" / "train.py")
    monkeypatch.setattr(sys, "argv", [script, "--recipe", "camvid", "--output_dir", "out", *options])
    with pytest.raises(SystemExit):
        runpy.run_path(script)["parse_arguments"]()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_networks_in_shards_are_refused(kind, tmp_path, recipe, data_dir, run_here, monkeypatch):
    """As where `accelerate config` was asked for another training; a CPU does not heed it."""
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    message = f"ValueError: Accelerate is set to {kind.value}, .* `accelerate launch --multi_gpu`"
    run_here(recipe, data_dir, tmp_path / "run", expect=message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_what_accelerate_is_told_of_the_precision_counts(script, monkeypatch, capsys):
    path = str(ROOT / "scripts" / script)
    words = {"train.py": ["--output_dir", "out"], "evaluate.py": ["--model", "model", "--output", "scores.json"]}[
        script
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [path, "--recipe", "camvid", *words])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert runpy.run_path(path)["parse_arguments"]().mixed_precision == "bf16"
    monkeypatch.setattr(sys, "argv", [path, "--recipe", "camvid", *words, "--mixed_precision", "fp16"])
    with pytest.raises(SystemExit):
        runpy.run_path(path)["parse_arguments"]()
    assert "--mixed_precision fp16 needs a GPU" in capsys.readouterr().err


def test_what_accelerate_is_told_of_the_precision_is_not_for_exports(tmp_path, monkeypatch):
    (tmp_path / "lemore_export.json").write_text("{}")
    path = str(ROOT / "scripts" / "evaluate.py")
    words = ["--recipe", "camvid", "--model", str(tmp_path), "--output", "scores.json"]
    monkeypatch.setattr(sys, "argv", [path, *words])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert runpy.run_path(path)["parse_arguments"]().mixed_precision == "no"


def test_an_interrupted_run_says_how_it_goes_on(monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    script = str(ROOT / "scripts" / "train.py")
    monkeypatch.setattr("lemore_hf.data.recipes.load_recipe", interrupt)
    monkeypatch.setattr(sys, "argv", [script, "--recipe", "camvid", "--output_dir", "out"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 130
    assert "the same command with --resume goes on from the last checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("has_gpu", "options", "message"),
    [
        (False, [], "--cuda_graph needs a GPU"),
        (True, ["--compile"], "--cuda_graph excludes --compile"),
        (True, ["--gradient_accumulation_steps", "2"], "--cuda_graph excludes --compile and --gradient_acc"),
    ],
)
def test_cuda_graphs_are_for_a_gpu_and_whole_batches(has_gpu, options, message, monkeypatch, capsys):
    script = str(ROOT / "scripts" / "train.py")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(sys, "argv", [script, "--recipe", "camvid", "--output_dir", "out", "--cuda_graph", *options])
    with pytest.raises(SystemExit):
        runpy.run_path(script)["parse_arguments"]()
    assert message in capsys.readouterr().err


def test_cutmix_needs_two_images_at_a_time(tmp_path, recipe, data_dir, run_here):
    message = "cutmix_alpha has no effect on one image at a time"
    run_here(recipe, data_dir, tmp_path / "out", "--batch_size", "1", expect=message)


def test_mixup_needs_two_images_at_a_time(tmp_path, run_here):
    for color in ("red", "blue"):
        (tmp_path / "data" / "train" / color).mkdir(parents=True)
        Image.new("RGB", (40, 40), color).save(tmp_path / "data" / "train" / color / "one.png")
    options = {"task": "image-classification", "class_names": ["red", "blue"], "scale_range": [0.1, 1]}
    options |= {"image_size": [64, 64], "crop_size": [64, 64], "mixup_alpha": 0.2, "batch_size": 1}
    (tmp_path / "recipe.yaml").write_text(json.dumps(options))
    message = "mixup_alpha has no effect on one image at a time"
    run_here(tmp_path / "recipe.yaml", tmp_path / "data", tmp_path / "out", expect=message)


def test_weights_that_are_damaged_are_refused(tmp_path, recipe, data_dir, uninterrupted, run_here):
    damaged = Path(shutil.copytree(uninterrupted / "final", tmp_path / "damaged"))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    run_here(recipe, data_dir, tmp_path / "out", "--init_from", str(damaged), expect="truncated or damaged")
    weights.rename(damaged / "pytorch_model.bin")
    run_here(recipe, data_dir, tmp_path / "out", "--init_from", str(damaged), expect=r"pytorch_model\.bin")


def test_training_starts_from_the_mean_of_several_checkpoints(tmp_path, recipe, data_dir, uninterrupted, run_here):
    folders = [str(uninterrupted / "final"), str(tmp_path / "other")]
    other = load_trained_model(folders[0])
    for parameter in other.parameters():
        parameter.data.mul_(2)
    other.save_pretrained(folders[1])
    Path(folders[1], "training_args.bin").touch()  # which `Trainer` leaves beside the weights, and nothing reads
    run_here(recipe, data_dir, tmp_path / "out", "--max_steps", "0", "--init_from", *folders)
    mean = load_trained_model(tmp_path / "out" / "final")
    for (name, one), found in zip(load_trained_model(folders[0]).named_parameters(), mean.parameters(), strict=True):
        torch.testing.assert_close(found, 1.5 * one, msg=name)
    for (name, one), found in zip(load_trained_model(folders[0]).named_buffers(), mean.buffers(), strict=True):
        torch.testing.assert_close(found, one, msg=f"{name}, equal in both")
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (run["steps"], run["settings"]["init_from"]) == (0, folders)
    run_here(
        recipe, data_dir, tmp_path / "new", "--max_steps", "0", expect="max_steps=0 saves the weights of --init_from"
    )


def test_a_mean_of_random_heads_is_refused(tmp_path, recipe, data_dir, uninterrupted, run_here):
    other = LeMoReForSemanticSegmentation(
        LeMoReConfig(**{**load_trained_model(uninterrupted / "final").config.to_diff_dict(), "num_labels": 4})
    )
    other.save_pretrained(tmp_path / "other")
    message = r"other does not hold all weights of this network, such as decode_head\.classifier"
    run_here(
        recipe, data_dir, tmp_path / "out", "--init_from", str(tmp_path / "other"), "--max_steps", "0", expect=message
    )
    both = ["--init_from", str(uninterrupted / "final"), str(tmp_path / "other")]
    run_here(recipe, data_dir, tmp_path / "out", *both, "--max_steps", "2", expect=message)
    assert not (tmp_path / "out" / "final").exists()


def test_what_is_no_checkpoint_of_lemore_is_refused(tmp_path, recipe, data_dir, uninterrupted, run_here):
    build_peer("lraspp-mobilenet-v3-large", 9).save_pretrained(tmp_path / "peer")
    message = "is of 'lraspp-mobilenet-v3': give a LeMoRe checkpoint"
    run_here(recipe, data_dir, tmp_path / "out", "--init_from", str(tmp_path / "peer"), expect=message)
    load_trained_model(uninterrupted / "final").fuse().save_pretrained(tmp_path / "fused")
    run_here(recipe, data_dir, tmp_path / "out", "--init_from", str(tmp_path / "fused"), expect="is a fused model")


def test_class_weights_are_counted_in_the_training_set(recipe, data_dir):
    build_criterion = runpy.run_path(str(ROOT / "scripts" / "train.py"))["build_criterion"]

    def weights(**options):
        loaded = load_recipe(recipe, options, data_dir)
        dataset = RecipeDataset(load_split(loaded, "train", data_dir), loaded)
        return build_criterion(loaded, dataset).class_weights

    counted = weights(class_weights="median_frequency")
    labels = np.stack([np.asarray(sample["label"]) for sample in load_scenes(10, 0, 0, size=(64, 96))["train"]])
    counts = np.bincount(labels.ravel(), minlength=256)[:9]
    assert counted.argmax() == counts.argmin()
    torch.testing.assert_close(weights(class_weights="median_frequency", class_weight_power=0.25) ** 4, counted)
    torch.testing.assert_close(
        weights(class_weights=list(range(9)), class_weight_power=2), torch.arange(9, dtype=torch.float32) ** 2
    )
    raised = load_recipe(recipe, {"class_weights": "median_frequency", "class_weight_power": 2}, data_dir)
    assert build_criterion(replace(raised, class_weights=None), None).class_weights is None
    with pytest.raises(ValueError, match="class_weight_power has no effect while class_weights is None"):
        weights(class_weights=None, class_weight_power=2)
    with pytest.raises(ValueError, match="'median_frequency' needs the whole set"):
        build_criterion(load_recipe(recipe, {}, data_dir), None)


def test_the_criterion_is_the_recipes(recipe):
    build_criterion = runpy.run_path(str(ROOT / "scripts" / "train.py"))["build_criterion"]
    options = {"label_smoothing": 0.1, "ohem_threshold": 0.7, "ohem_min_kept": 50, "dice_weight": 0.2}
    options |= {"lovasz_weight": 0.3, "lovasz_stride": 4}
    criterion = build_criterion(load_recipe(recipe, {**options, "loss_stride": 3, "class_weights": None}), None)
    assert {name: getattr(criterion, name) for name in options} == options
    assert criterion.stride == 3


def test_an_exported_classifier_sees_what_it_was_evaluated_on(tmp_path):
    recipe = load_recipe("imagenet1k", {"class_names": ["a", "b"], "crop_size": [32, 32], "resize": 40})
    export = runpy.run_path(str(ROOT / "scripts" / "train.py"))["export_model"]
    small = {"hidden_sizes": (8, 8, 8, 8), "stem_sizes": (8,), "image_size": 32}
    export(LeMoReForImageClassification(LeMoReConfig(**small)), recipe, tmp_path / "final")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "final")
    wide, tall = (torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((50, 90), (120, 60)))
    processed = processor([wide, tall], return_tensors="pt").pixel_values
    evaluated = torch.stack([resize_for_evaluation(image, recipe) for image in (wide, tall)])
    torch.testing.assert_close(processed, normalize(evaluated, recipe), atol=0.02, rtol=0)


def test_an_exported_processor_is_the_recipes(train, tmp_path, recipe):
    changes = {
        "image_size": [64, 96],
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.1, 0.2, 0.3],
        "reduce_labels": True,
    }
    model = LeMoReForSemanticSegmentation(LeMoReConfig(num_labels=9, image_size=[64, 96], **TINY_MODEL))
    train["export_model"](model, load_recipe(recipe, changes), tmp_path / "final")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "final")
    assert processor.size == {"height": 64, "width": 96}
    assert (list(processor.image_mean), list(processor.image_std)) == (changes["image_mean"], changes["image_std"])
    assert processor.do_reduce_labels
    by_edge = load_recipe(recipe, {"resize": 64, "max_longest_edge": 128})
    assert by_edge.processor_size == {"shortest_edge": 64, "longest_edge": 128}


def test_what_was_best_before_an_interruption_stays_it(tmp_path, recipe, data_dir, run_here, monkeypatch):
    scores = iter([0.7, 0.6])
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: {"mean_iou": next(scores)})
    options = ["--poly_power", "0", "--eval_every", "2", "--save_every", "2", "--max_steps"]
    run_here(recipe, data_dir, tmp_path, *options, "2")
    best = (tmp_path / "best" / "model.safetensors").read_bytes()
    (checkpoint,) = list_checkpoints(tmp_path)
    tensors, state = load_checkpoint(checkpoint)
    shutil.rmtree(checkpoint)
    save_checkpoint(checkpoint, tensors, state | {"seconds": 7200})
    run_here(recipe, data_dir, tmp_path, *options, "4", "--resume")
    assert (tmp_path / "best" / "model.safetensors").read_bytes() == best
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["best_validation"] == {"step": 2, "score": 0.7}
    assert 2 <= run["hours"] < 2.1


def test_the_seed_draws_weights_order_and_augmentation(train, tmp_path, recipe, data_dir, monkeypatch):
    seen = {}

    def note(name):
        original = train[name]

        def make(*args, **kwargs):
            seen[name] = original(*args, **kwargs)
            return seen[name]

        return make

    for name in ("RecipeDataset", "EpochSampler", "build_model"):
        monkeypatch.setitem(train["main"].__globals__, name, note(name))
    classifiers = []
    for seed in (5, 6):
        options = ["--seed", str(seed), "--max_steps", "1", "--eval_every", "0", "--num_workers", "0"]
        options += ["--learning_rate", "1e-12"]
        monkeypatch.setattr(sys, "argv", script_and_options(recipe, data_dir, tmp_path / str(seed), *options))
        train["main"]()
        assert (seen["RecipeDataset"].transform.seed, seen["EpochSampler"].seed) == (seed, seed)
        classifiers.append(seen["build_model"].decode_head.classifier.weight)
    assert not torch.allclose(*classifiers, atol=1e-4)
    assert len({tuple(EpochSampler(20, seed=seed, stop=20)) for seed in range(3)}) == 3


def test_the_optimizer_has_the_recipes_decay_and_rates(train, tmp_path, recipe, data_dir, monkeypatch):
    seen = []

    class Optimizer(torch.optim.AdamW):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.extend((group["lr"], group["weight_decay"]) for group in self.param_groups)

    monkeypatch.setattr(torch.optim, "AdamW", Optimizer)
    options = ["--weight_decay", "0.07", "--head_lr_multiplier", "3", "--max_steps", "1", "--eval_every", "0"]
    monkeypatch.setattr(sys, "argv", script_and_options(recipe, data_dir, tmp_path, *options, "--num_workers", "0"))
    train["main"]()
    assert set(seen) == {(2e-3, 0.07), (2e-3, 0.0), (6e-3, 0.07), (6e-3, 0.0)}


def test_frozen_statistics_stay_after_a_validation(tmp_path, recipe, data_dir, run_here):
    options = ["--freeze_batch_norm", "--ema_decay", "none", "--max_steps", "2", "--eval_every", "1"]
    run_here(recipe, data_dir, tmp_path, *options)
    weights = load_file(tmp_path / "final" / "model.safetensors")
    counts = {int(value) for name, value in weights.items() if name.endswith("num_batches_tracked")}
    assert counts == {0}


def test_a_stream_goes_on_behind_all_batches_of_the_steps_before(train, recipe, monkeypatch):
    seen = {}

    class Stream(torch.utils.data.IterableDataset):
        max_workers = 1

        def __init__(self, *args, **kwargs):
            seen.update(kwargs, args=args)

        def __iter__(self):
            return iter([])

    monkeypatch.setitem(train["training_batches"].__globals__, "StreamedRecipeDataset", Stream)
    options = argparse.Namespace(gradient_accumulation_steps=3, seed=4, num_workers=0, cache=None)
    place = types.SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    train["training_batches"](options, load_recipe(recipe), place, None, None, 2, 5)
    assert (seen["start"], seen["batch_size"], seen["args"][-1]) == (15, 2, 4)


def test_a_new_network_has_the_recipes_names_and_colours(train, recipe):
    settings = load_recipe(recipe, {"palette": [[index, 0, 9] for index in range(9)]})
    model = train["build_model"](argparse.Namespace(peer=None, init_from=None, resume=False), settings)
    assert model.config.palette[3] == [3, 0, 9]
    assert model.config.id2label == settings.id2label


def test_a_classifiers_labels_are_smoothed(train):
    criterion = train["build_criterion"](load_recipe("imagenet1k", {"label_smoothing": 0.2}), None)
    assert criterion.label_smoothing == 0.2


def test_a_batch_that_cannot_be_divided_is_refused(train):
    assert train["divide_batch"](12, 3, 2) == 2
    with pytest.raises(ValueError, match="10"):
        train["divide_batch"](10, 3, 1)


@pytest.mark.parametrize(("options", "expected"), [([], 2), (["--gradient_accumulation_steps", "1"], 1)])
def test_what_accelerate_is_told_of_accumulation_counts(
    tmp_path, recipe, data_dir, run_here, monkeypatch, options, expected
):
    """Each step is one, whoever says of how many batches; the option goes first."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    run_here(recipe, data_dir, tmp_path, "--max_steps", "3", "--eval_every", "0", "--save_every", "1", *options)
    (*_, last) = list_checkpoints(tmp_path)
    tensors, state = load_checkpoint(last)
    assert state["fingerprint"]["gradient_accumulation_steps"] == expected
    assert {int(value) for name, value in tensors.items() if name.endswith(".step")} == {3}


def test_a_validation_without_images_stops_the_run(tmp_path, recipe, data_dir, run_here):
    stream = load_split(load_recipe(recipe), "validation", data_dir, streaming=True)
    with pytest.raises(ValueError, match="has no images"):
        evaluate(
            LeMoReForSemanticSegmentation(LeMoReConfig(num_labels=9, **TINY_MODEL)),
            StreamedRecipeDataset(stream.take(0), load_recipe(recipe)),
            load_recipe(recipe),
            progress=False,
        )
