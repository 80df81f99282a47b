# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""The name of the hardware that a figure was measured on."""

import os
import platform
from pathlib import Path

import torch


def hardware_name(device: torch.device | str) -> str:
    """The GPU's name, or the processor's with the number of its cores that this process may use."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor}, {cores} cores"
