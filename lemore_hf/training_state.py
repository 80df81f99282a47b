# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Everything a training run has to remember, and its way to and from a checkpoint, bit for bit."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer

from .checkpointing import CheckpointError, load_checkpoint, save_checkpoint
from .data.recipes import DESCRIPTIVE_FIELDS
from .optimization import ExponentialMovingAverage

# Fields that an earlier release compared.
_DECIDE_NOTHING = {f"recipe.{field}" for field in DESCRIPTIVE_FIELDS}


class TrainingState:
    """
    Weights, their average, optimizer moments, random states and progress of a run.

    Args:
        accelerator (`Accelerator`): Of the run.
        model (`nn.Module`): The bare model, not its distributed wrapper.
        optimizer (`Optimizer`): `torch.optim.AdamW` or `Muon` over its parameters.
        ema (`ExponentialMovingAverage`, *optional*): Its moving average.
        fingerprint (`dict[str, Any]`):
            Settings that must be the same when the run is resumed, as JSON holds them.
        defaults (`dict[str, Any]`):
            What settings were, for checkpoints of an earlier release that did not have them yet.

    Attributes:
        step (`int`): Optimizer steps done.
        best (`dict`, *optional*): Step and score of the best validation so far.
        scores (`dict`): All scores of the last validation; empty where there was none.
        scored_step (`int`): The step that they belong to.
        losses (`list[float]`):
            Those of the steps since the log's last entry: this process's, and of steps before a resumption the means of
            all processes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        ema: ExponentialMovingAverage | None,
        fingerprint: dict[str, Any],
        defaults: dict[str, Any],
    ):
        self.accelerator, self.model, self.optimizer, self.ema = accelerator, model, optimizer, ema
        self.fingerprint, self.defaults = fingerprint, defaults
        self.step = 0
        self.best: dict[str, float] | None = None
        self.scores: dict[str, float] = {}
        self.scored_step = 0
        self.losses: list[float] = []
        self._seconds_before, self._started = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall-clock time of the run, without the time between interruption and resumption."""
        return self._seconds_before + time.perf_counter() - self._started

    def save(self, folder: Path) -> None:
        """Write a checkpoint. All processes must call it; the main one writes.

        Raises:
            `CheckpointError`: if the disk is full or not writable. Earlier checkpoints are kept.
        """
        random_states = gather_object([_random_state(self.accelerator.device)])
        losses = gather_object([self.losses])
        if not self.accelerator.is_main_process:
            return
        tensors = _prefixed(self.model.state_dict(), "model")
        if self.ema is not None:
            tensors |= _prefixed(self.ema.module.state_dict(), "ema")
        for name, parameter in self.model.named_parameters():
            tensors |= _prefixed(self.optimizer.state.get(parameter, {}), f"optimizer.{name}")
        for rank, random_state in enumerate(random_states):
            tensors |= _prefixed(random_state, f"random.{rank}")
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "best": self.best,
            "scores": self.scores,
            "scored_step": self.scored_step,
            # All that the log needs, which takes the mean of the processes.
            "losses": [sum(values) / len(values) for values in zip(*losses, strict=True)],
            "seconds": self.seconds,
            "ema_updates": self.ema.num_updates if self.ema is not None else 0,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "fingerprint": self.fingerprint,
            "configuration": self.model.config.to_dict(),
        }
        save_checkpoint(folder, tensors, state)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            `CheckpointError`: if it is damaged, or belongs to a run with other settings, which are then listed.
        """
        tensors, state = load_checkpoint(folder)
        self._check_fingerprint(state["fingerprint"], folder)
        self.step, self.best, self._seconds_before = state["step"], state["best"], state["seconds"]
        self.scores, self.scored_step, self.losses = state["scores"], state["scored_step"], state["losses"]
        self.model.load_state_dict(_part(tensors, "model"))
        if self.ema is not None:
            self.ema.module.load_state_dict(_part(tensors, "ema"))
            self.ema.num_updates = state["ema_updates"]
        for name, parameter in self.model.named_parameters():
            if moments := _part(tensors, f"optimizer.{name}"):
                self.optimizer.state[parameter] = {
                    key: self._like_the_optimizers(tensor, parameter) for key, tensor in moments.items()
                }
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        _restore_random_state(_part(tensors, f"random.{self.accelerator.process_index}"), self.accelerator.device)

    def _like_the_optimizers(self, tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """The tensor where and as the optimizer keeps it: moments in the parameter's memory format, step counts on the
        CPU unless the optimizer is fused."""
        if tensor.shape == parameter.shape and tensor.ndim:
            return torch.empty_like(parameter, requires_grad=False).copy_(tensor)
        # Copied: what is read from a file stays mapped, and Windows and NFS do not let go of the file before.
        return tensor.to(parameter.device if self.optimizer.defaults["fused"] else "cpu", copy=True)

    def _check_fingerprint(self, saved: dict[str, Any], folder: Path) -> None:
        before = {"samples": self.fingerprint.get("samples")}  # which an earlier release did not keep
        saved = {name: value for name, value in self.defaults.items() if name in self.fingerprint} | before | saved
        differing = [
            f"{name} was {saved.get(name)!r}, is {self.fingerprint.get(name)!r}"
            for name in sorted((saved.keys() | self.fingerprint.keys()) - _DECIDE_NOTHING)
            if saved.get(name) != self.fingerprint.get(name)
        ]
        if differing:
            raise CheckpointError(
                f"{folder} belongs to a run with other settings ({'; '.join(differing)}): resume with the same, or "
                "train into another output folder."
            )


def _prefixed(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    # Copied, since safetensors refuses tensors that share memory.
    return {f"{prefix}.{name}": tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of the generators that dropout, stochastic depth and mixing draw from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def _restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:  # not where the run began on another kind of device
        torch.get_device_module(device).set_rng_state(state[device.type])
