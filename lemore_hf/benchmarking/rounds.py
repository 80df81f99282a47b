# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Runs cells, each in a process of its own, in interleaved rounds."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..hardware import usable_cores
from . import cell as cell_module
from .cell import GRAPH_RUNTIMES, Cell

_SLOWER_LAYOUT = 1.1
# Cells of a GPU at a time: one has it, the others import and build their models on the CPU meanwhile.
_GPU_PROCESSES = min(8, max(1, usable_cores() // 2))


def run_cell(cell: Cell, environment: Mapping[str, str] | None = None, timeout: float = 900) -> dict[str, Any]:
    """
    Measure a cell in a new process, with as many OpenMP threads as it asks for.

    Args:
        cell ([`Cell`]): What to measure.
        environment (`Mapping[str, str]`, *optional*): Variables to set besides those of this process.
        timeout (`float`): Seconds after which the process is killed.

    Returns:
        What [`measure`] returns; `{"error": reason}` where the process failed, whatever the way.
    """
    command = [sys.executable, "-W", "ignore", cell_module.__file__, cell.to_json()]
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    variables = {"OMP_NUM_THREADS": str(cell.threads), "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    if cell.folder:
        # Each round compiles the same: only the first is to take its time.
        variables["TORCHINDUCTOR_CACHE_DIR"] = str(Path(cell.folder, "inductor"))
    variables = {**os.environ, **variables, **(environment or {})}
    try:
        process = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout:.0f} seconds"}
    if process.returncode < 0:
        return {"error": f"ended by {signal.Signals(-process.returncode).name}"}
    if process.returncode > 0:
        lines = process.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"exit status {process.returncode}"}
    return json.loads(process.stdout.splitlines()[-1])


def prepare_models(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Prepare models side by side, one a core, since nothing is timed yet; what [`prepare`] returns by model."""
    with ThreadPoolExecutor(usable_cores()) as pool:
        results = tqdm(pool.map(run_cell, cells), total=len(cells), desc="Preparing", unit="model")
        return {cell.model: result for cell, result in zip(cells, results, strict=True)}


def run_rounds(
    cells: Sequence[Cell],
    rounds: int,
    environment: Mapping[str, str] | None = None,
    failed: Mapping[tuple[str, str], dict[str, str]] | None = None,
) -> Iterator[dict[Cell, list[dict[str, Any]]]]:
    """
    Measure all cells, then all of them again, so that what disturbs the machine for a while meets every cell alike.

    A CPU measures one cell at a time. Those of a GPU start side by side, and measure one after another.

    From the second round on a memory layout is left out that was slower than the other one by more than a tenth, and
    so is a cell that failed.

    Args:
        cells (`Sequence[Cell]`): What to measure, in this order.
        rounds (`int`): How often.
        environment (`Mapping[str, str]`, *optional*): See [`run_cell`].
        failed (`Mapping`, *optional*): By (model, runtime) why there is no graph to measure.

    Yields:
        After each round the results of each cell's rounds so far.
    """
    results: dict[Cell, list[dict[str, Any]]] = {cell: [] for cell in cells}
    with tqdm(total=rounds * len(cells), unit="cell") as bar:
        for _ in range(rounds):
            for on_gpu, group in groupby(cells, lambda cell: cell.on_gpu):
                due = []
                for cell in group:
                    if cell.runtime in GRAPH_RUNTIMES and (cell.model, cell.runtime) in (failed or {}):
                        results[cell] = [dict(failed[cell.model, cell.runtime])]
                    elif not (results[cell] and _is_settled(cell, results)):
                        due.append(cell)
                        continue
                    bar.update()
                with ThreadPoolExecutor(_GPU_PROCESSES if on_gpu else 1) as pool:
                    for cell, result in zip(due, pool.map(partial(_run, bar, environment), due), strict=True):
                        results[cell].append(result)
                        bar.update()
            yield results


def _run(bar: tqdm, environment: Mapping[str, str] | None, cell: Cell) -> dict[str, Any]:
    bar.set_description(f"{cell.model} {cell.runtime or cell.kind}".strip())
    return run_cell(cell, environment)


def _is_settled(cell: Cell, results: Mapping[Cell, Sequence[dict[str, Any]]]) -> bool:
    first = results[cell][0]
    if "median" not in first and "macs_per_second" not in first:
        return True
    others = [result[0] for other, result in results.items() if result and other != cell and _is_twin(other, cell)]
    medians = [other["median"] for other in others if "median" in other]
    return bool(medians) and first["median"] > _SLOWER_LAYOUT * min(medians)


def _is_twin(one: Cell, other: Cell) -> bool:
    return replace(one, layout=other.layout) == other
