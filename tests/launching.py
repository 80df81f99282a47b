# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Starting scripts as their users do: alone, or in several processes by `accelerate launch`; and killing them. Or in this
process, which spares the imports."""

import runpy
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest


def launch(processes: int, script: Path, *arguments: object) -> list[str]:
    """The command that runs a script in so many processes, on whatever port is free.

    `--multi_gpu` on a CPU too: with `--cpu` Accelerate starts a single process, whatever number it is asked for.
    """
    launcher = []
    if processes > 1:
        launcher = [
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            processes,
            "--num_machines",
            1,
        ]
        launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
    return [sys.executable, *map(str, [*launcher, script, *arguments])]


def run_here(monkeypatch: pytest.MonkeyPatch, script: Path, *arguments: object) -> None:
    """Run a script in this process; it ends with `SystemExit` where it ends with an error."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    runpy.run_path(str(script), run_name="__main__")


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to a process and all that it has started, as when a machine goes down."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.send_signal(signal.SIGKILL)
    psutil.wait_procs(family)
    process.wait()
