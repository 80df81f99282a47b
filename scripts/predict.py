# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Segment pictures and videos with a checkpoint or any export of it.

    python scripts/predict.py --model CHECKPOINT_OR_EXPORT --input PICTURES 'more/**/*.jpg' film.mp4 --output DIR

A picture gives `DIR/masks/NAME.png` (labels, with the palette's colours) and `DIR/overlays/NAME.png` (with a legend); a
video `DIR/masks/NAME.mkv` (lossless, labels as grey levels) and `DIR/overlays/NAME.mp4`. Files that are there are kept:
run the same command again to go on after an interruption. `DIR/predictions.json` notes which input and which model each
result is of, so that those of others are not taken for this run's. Inputs that cannot be segmented are skipped, and
listed at the end.
"""

import argparse
import errno
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path

import transformers
from tqdm.auto import tqdm

import lemore_hf  # noqa: F401 (registers LeMoRe with the Auto classes)
from lemore_hf.checkpointing import CheckpointError
from lemore_hf.command_line import at_least, run_script
from lemore_hf.hardware import usable_cores
from lemore_hf.inference import Segmenter
from lemore_hf.interruption import interrupt_by_signals
from lemore_hf.pictures import files_below
from lemore_hf.prediction import (
    TARGETS,
    UnreadableInputError,
    claim_results,
    find_inputs,
    is_video,
    predict_file,
    require_video_package,
    target_files,
)

DEFAULT_ALPHA = 0.5

Job = tuple[Path, dict[str, Path], float]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="folder of a checkpoint or of an export")
    parser.add_argument("--input", required=True, nargs="+", help="pictures, videos, folders and glob patterns")
    parser.add_argument("--output", required=True, type=Path, help="folder to write to")
    parser.add_argument("--write", choices=(*TARGETS, "both"), default="both", help="what to write (default: both)")
    parser.add_argument("--alpha", type=float, help=f"opacity of the overlays, 0 to 1 (default: {DEFAULT_ALPHA})")
    parser.add_argument(
        "--processes", type=at_least(1), default=1, help="how many inputs to work on at once (default: 1)"
    )
    parser.add_argument("--overwrite", action="store_true", help="write again what is there")
    arguments = parser.parse_args()
    if arguments.alpha is None:
        arguments.alpha = DEFAULT_ALPHA
    elif arguments.write == "masks":
        parser.error("--alpha is for overlays, --write masks writes none: leave one of them out")
    if not 0 <= arguments.alpha <= 1:
        parser.error(f"--alpha must lie in [0, 1], got {arguments.alpha}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    kinds = TARGETS if arguments.write == "both" else (arguments.write,)
    targets = target_files(find_inputs(arguments.input, arguments.output), arguments.output, kinds)
    unread = [
        file for path in map(Path, arguments.input) if path.is_dir() for file in files_below(path, {".heic", ".heif"})
    ]
    if unread:
        print(f"{len(unread)} HEIC pictures are left out, such as {unread[0]}: make JPEGs of them.", file=sys.stderr)
    jobs = []
    for source, files in targets.items():
        if missing := {kind: file for kind, file in files.items() if arguments.overwrite or not file.is_file()}:
            jobs.append((source, missing, arguments.alpha))
    if any(is_video(source) for source, *_ in jobs):
        require_video_package()

    processes = max(1, min(arguments.processes, len(jobs)))
    # A process that is alone leaves it to its runtime, which knows the cores, and to the environment.
    threads = max(1, usable_cores() // processes) if processes > 1 else None
    if jobs:
        start_worker(arguments.model, threads)  # here too, so that a bad model is refused before anything is written
    claim_results(arguments.output, arguments.model, targets, arguments.alpha, arguments.overwrite)

    outcomes: dict[Path, str | None] = {}
    try:
        for source, problem in tqdm(run(jobs, arguments.model, processes, threads), total=len(jobs), unit="file"):
            outcomes[source] = problem
    finally:
        failures = {source: problem for source, problem in outcomes.items() if problem}
        written = len(outcomes) - len(failures)
        print(f"{written} written to {arguments.output}, {len(targets) - len(jobs)} were there.")
        for source in sorted(failures):
            print(f"Skipped {source}: {failures[source]}", file=sys.stderr)
    if failures and len(failures) == len(targets):
        sys.exit("Not one of the inputs could be segmented.")


def run(jobs: list[Job], model: Path, processes: int, threads: int | None) -> Iterator[tuple[Path, str | None]]:
    """Each input with what is wrong with it, as they are finished; in this process, or in several others."""
    if processes == 1:
        yield from map(work, jobs)
        return
    # Spawned, since the runtimes' thread pools do not survive a fork.
    with ProcessPoolExecutor(processes, get_context("spawn"), start_worker, (model, threads)) as pool:
        try:
            for future in as_completed([pool.submit(work, job) for job in jobs]):
                yield future.result()
        except BrokenProcessPool as error:
            raise OSError(
                "A process was ended from outside, most often because memory ran out: run the same command with fewer "
                f"--processes than {processes}, and it goes on."
            ) from error
        except BaseException:
            for process in active_children():  # films may take hours, and a signal may have come to this process alone
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def start_worker(model: Path, num_threads: int | None) -> None:
    global segmenter
    interrupt_by_signals()
    tqdm.set_lock(threading.RLock())  # instead of a semaphore, which a process that is interrupted would leave behind
    transformers.utils.logging.disable_progress_bar()  # of loading, over within a second
    segmenter = Segmenter(model, num_threads)


def work(job: Job) -> tuple[Path, str | None]:
    source, targets, alpha = job
    try:
        predict_file(segmenter, source, targets, alpha, progress=parent_process() is None)
    except UnreadableInputError as error:
        return source, str(error)
    except SystemExit as error:
        os._exit(error.code)  # a pool's process would go on with its next input
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # the fault of this input alone
            raise
        return source, str(error)
    return source, None


if __name__ == "__main__":
    run_script(main, CheckpointError, interrupted="Interrupted: the same command goes on, a film begins anew.")
