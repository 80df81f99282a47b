# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""The hardware that a process runs on: its name, its cores, whether several processes share a CPU, and in what precision
it is to compute."""

import contextlib
import os
import platform
from pathlib import Path

import torch
from accelerate.utils import get_int_from_env, parse_choice_from_env

CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # microseconds of processor time in a period of so many


def hardware_name(device: torch.device | str) -> str:
    """The GPU's name, or the processor's with the number of its cores that this process may use."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    cores = usable_cores()
    return f"{processor_name()}, {cores} core{'s' if cores != 1 else ''}"


def usable_cores() -> int:
    """The processor cores that this process may use, which taskset or a scheduler may limit by name, and a container
    (`docker --cpus 2`) by time: as many whole ones as that makes, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # not Linux's second control groups, or no limit: "max 100000"
        quota, period = map(int, CPU_LIMIT.read_text(encoding="ascii").split())
        cores = min(cores, max(1, quota // period))
    return cores


def processor_name() -> str:
    """The processor's name as the system has it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def shares_cpu() -> bool:
    """Whether a launcher has started several processes on a machine without a GPU: what `Accelerator(cpu=...)` must be
    told, or each process takes itself for the only one and they overwrite each other's files."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    # Apple's GPU is one for all processes.
    sizes = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]  # torchrun's, and mpirun's
    return get_int_from_env(sizes, 1) > 1 and (accelerator is None or accelerator.type == "mps")


def mixed_precision(option: str | None) -> str:
    """The precision of autocast: what a script's `--mixed_precision` says, else what `accelerate launch` or `accelerate
    config` does, else `"no"`.

    Raises:
        ValueError: for one that this machine or these scripts do not have.
    """
    precision = option or parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16", "fp16"):
        raise ValueError(f"--mixed_precision must be no, bf16 or fp16, Accelerate is set to {precision}.")
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("--mixed_precision fp16 needs a GPU; on the CPU use bf16 or no.")
    return precision
