# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""How much of the machine a process may use."""

import os
import platform
from pathlib import Path

import pytest
import torch

from lemore_hf import hardware


@pytest.mark.parametrize(
    ("limit", "cores"), [("150000 100000", 1), ("300000 100000", 3), ("50000 100000", 1), ("max 100000", 8), (None, 8)]
)
def test_cores_are_those_that_affinity_and_a_container_leave(limit, cores, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(hardware, "CPU_LIMIT", tmp_path / "cpu.max")
    if limit is not None:
        hardware.CPU_LIMIT.write_text(f"{limit}\n")
    assert hardware.usable_cores() == cores
    assert hardware.hardware_name("cpu").endswith(f", {cores} core{'s' if cores > 1 else ''}")


def test_precision_is_the_option_s_or_else_the_launcher_s(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert hardware.mixed_precision(None) == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert (hardware.mixed_precision(None), hardware.mixed_precision("no")) == ("bf16", "no")
    for precision, message in (("fp16", "fp16 needs a GPU"), ("fp8", "no, bf16 or fp16, Accelerate is set to fp8")):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        with pytest.raises(ValueError, match=message):
            hardware.mixed_precision(None)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_processes_of_torchrun_and_mpirun_know_of_each_other(variable, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert not hardware.shares_cpu()
    monkeypatch.setenv(variable, "2")
    assert hardware.shares_cpu()


@pytest.mark.parametrize(("kind", "shared"), [("cuda", False), ("xpu", False), ("mps", True)])
def test_processes_with_a_gpu_each_share_no_cpu(kind, shared, monkeypatch):
    """Or a training on several GPUs would be one on the CPU. Apple's GPU is one for all."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert hardware.shares_cpu() == shared


def test_the_processor_has_the_name_that_the_system_gives_it(monkeypatch):
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    if "model name" in text:
        assert f": {hardware.processor_name()}\n" in text
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "processor: 0\n")  # an Arm's, without names
    assert hardware.processor_name() == (platform.processor() or platform.machine()) != ""
    assert hardware.hardware_name("cpu").startswith(f"{hardware.processor_name()}, ")
