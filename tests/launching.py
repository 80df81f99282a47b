# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Starting scripts as their users do: alone, or in several processes by `accelerate launch`; and killing them. Or without
the imports, which take longer than most runs: in processes that are forked from one that has made them, or in this one."""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch

# What `scripts/train.py` and `scripts/evaluate.py` import.
PRELOADED = ["lemore_hf.distillation", "lemore_hf.hub", "lemore_hf.training_state", "lemore_hf.visualization"]


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


def start_forked(script: Path, *arguments: object, log: Path, **environment: str) -> BaseProcess:
    """A process of its own that runs a script, with one thread; what it prints goes to `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    words = [str(script), *map(str, arguments)]
    process = context.Process(
        target=_run_script, args=(words, log, os.environ | environment | {"OMP_NUM_THREADS": "1"})
    )
    process.start()
    return process


def _run_script(words: list[str], log: Path, environment: dict[str, str]) -> None:
    with log.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)  # as the variable says, which was read before
    multiprocessing.set_start_method(None, force=True)  # the platform's own again, not what started this process
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def run_forked(processes: int, script: Path, *arguments: object, timeout: float = 300) -> tuple[int, str]:
    """Runs a script in so many processes, which find each other as those of `accelerate launch` do. Returns the first
    status that is not 0, if any, and all that they print."""
    environments = [{}]
    if processes > 1:
        # As with the launcher, the store that they meet at is held here, on whatever port is free.
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        meeting |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        environments = [meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        started = [start_forked(script, *arguments, log=log, **variables) for variables in environments]
        try:
            for process in started:
                process.join(timeout)
                assert process.exitcode is not None, f"{script} did not end:\n{log.read_text()[-3000:]}"
        finally:
            for process in started:
                process.kill()
        return next((process.exitcode for process in started if process.exitcode), 0), log.read_text()


def run_here(monkeypatch: pytest.MonkeyPatch, script: Path, *arguments: object) -> None:
    """Run a script in this process; it ends with `SystemExit` where it ends with an error."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    runpy.run_path(str(script), run_name="__main__")


def kill(process: BaseProcess) -> None:
    """SIGKILL to a process and all that it has started, as when a machine goes down."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.send_signal(signal.SIGKILL)
    psutil.wait_procs(family)
    process.join()
