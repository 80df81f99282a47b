# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Benchmark LeMoRe beside the models that one would use instead, with random weights and in the same runtime for all.

    python scripts/benchmark.py --quick                          # some minutes on two cores
    python scripts/benchmark.py --json benchmark.json --chart benchmark.png
    python scripts/benchmark.py --json benchmark.json --update --tables 1 --runtimes onnx openvino --work-dir DIR
    python scripts/benchmark.py --tables 3 --num-labels 11 --sizes 360x480 900x1200       # LeMoRe, for data of one's own

Three tables: the network in every runtime; from a picture's file to its label map; time and memory by the image's size.
LeMoRe is fused (`model.fuse()`), the others are as their libraries give them; graph runtimes fold the norms of all.
Every figure comes from processes of its own, in interleaved rounds. `--update` keeps what the JSON file has from the
same machine and replaces only what is measured now, so that a long benchmark can be run in pieces.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lemore_hf
from lemore_hf.benchmarking.cell import GRAPH_RUNTIMES, LAYOUTS, NUM_LABELS, Cell
from lemore_hf.benchmarking.models import NAMES
from lemore_hf.benchmarking.preparation import draw_picture
from lemore_hf.benchmarking.report import (
    RUNTIME_NAMES,
    best_layouts,
    merge_rounds,
    model_table,
    picture_table,
    ratio_table,
    reason,
    size_table,
)
from lemore_hf.benchmarking.rounds import prepare_models, run_cell, run_rounds
from lemore_hf.checkpointing import atomic_file
from lemore_hf.command_line import at_least, positive, run_script
from lemore_hf.data.scenes import CLASS_NAMES
from lemore_hf.hardware import usable_cores
from lemore_hf.visualization import plot_speed

# Each model with its own loss, as under `Trainer`; and with the same, as `scripts/train.py` trains all.
TRAINING_RUNTIMES = ("training", "training-one-loss")
RUNTIMES = ("eager", "compile", "bf16", *GRAPH_RUNTIMES, *TRAINING_RUNTIMES)
CUDA_RUNTIMES = ("cuda-float32", "cuda-bfloat16")
CHART_RUNTIMES = ("eager", "onnx", "openvino", "cuda-float32")
SIZES = ((256, 256), (384, 384), (512, 512), (768, 768), (1024, 1024), (1024, 2048), (1536, 1536), (2048, 2048))
SIZE_RUNTIMES = ("eager", "onnx", "openvino")
PICTURE_MODELS = ("lemore", "segformer-b0")
TRAINING_BATCH_SIZE = 8
# What glibc gives back to the system it must ask for again, page by page; so it keeps everything.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}

TITLES = {
    1: "The network",
    2: "From a 1920×1080 JPEG file to its label map, through a network at 512×512",
    3: "LeMoRe by the size of the image",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer models, runtimes, sizes and rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for all figures and settings")
    parser.add_argument("--update", action="store_true", help="keep what FILE has and replace what is measured now")
    parser.add_argument("--chart", type=Path, metavar="PNG", help="picture of speed against parameters")
    parser.add_argument(
        "--tables",
        type=int,
        nargs="*",
        choices=TITLES,
        default=list(TITLES),
        help="what to measure; with none, show again what the JSON file has",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=NAMES,
        help=f"LeMoRe is always one of them; the second table is of {' and '.join(PICTURE_MODELS)}, the third of LeMoRe",
    )
    parser.add_argument(
        "--runtimes",
        nargs="+",
        choices=(*RUNTIMES, *CUDA_RUNTIMES),
        help=f"of the first table; the third has {', '.join(SIZE_RUNTIMES)}",
    )
    parser.add_argument(
        "--batch-sizes", type=at_least(1), nargs="+", help="of the first table (default: 1 8; quick: 1)"
    )
    parser.add_argument(
        "--threads", type=at_least(1), nargs="+", help="of each process (default: 1, and 2 where there are; quick: 2)"
    )
    parser.add_argument(
        "--size",
        type=at_least(1),
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        default=(512, 512),
        help="of the first table's images (default: 512 512); the second's networks are given 512×512 pixels",
    )
    parser.add_argument(
        "--sizes",
        type=_size,
        nargs="+",
        metavar="HEIGHTxWIDTH",
        help="of the third table's images (default: 256x256 to 2048x2048)",
    )
    parser.add_argument(
        "--num-labels",
        type=at_least(1),
        default=NUM_LABELS,
        metavar="N",
        help="classes of all networks (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=at_least(1), help="how often each process is started (default: 3; quick: 1)")
    parser.add_argument(
        "--seconds",
        type=positive,
        default=1.0,
        help="how long each process repeats, at least three times (default: 1)",
    )
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="let glibc keep freed memory, in every process: " + " ".join(map("=".join, KEEP_MEMORY.items())),
    )
    parser.add_argument("--work-dir", type=Path, help="folder that keeps exported graphs for the next time")
    parser.add_argument("--prepare-only", action="store_true", help="export the graphs to the work dir, and stop")
    arguments = parser.parse_args()
    if arguments.prepare_only and not arguments.work_dir:
        parser.error("--prepare-only needs --work-dir DIR, which keeps what is prepared")
    for size in (arguments.size, *(arguments.sizes or ())):
        if min(size) < 32:
            parser.error(f"--size and --sizes must be at least 32 × 32, the smallest image of LeMoRe, got {size}")
    if arguments.sizes and 3 not in arguments.tables:
        parser.error("--sizes are of the third table, which --tables leaves out")
    if 2 in arguments.tables and arguments.num_labels < len(CLASS_NAMES):
        parser.error(
            f"--num-labels {arguments.num_labels}: the second table's picture has {len(CLASS_NAMES)} classes; leave it "
            "out with --tables 1 3"
        )
    if not arguments.tables and not (arguments.json and arguments.json.is_file()):
        parser.error(f"--tables without a number shows what --json FILE has, got the file {arguments.json}")
    if arguments.update and not arguments.json:
        parser.error("--update needs --json FILE, the file to update")
    if arguments.json and arguments.json.is_dir():
        parser.error(f"--json {arguments.json} is a folder: give the name of a file")
    if arguments.chart and arguments.chart.suffix.lower() != ".png":
        parser.error(f"--chart must be the name of a .png file, got {arguments.chart}")
    for file in filter(None, (arguments.json, arguments.chart)):
        file.parent.mkdir(parents=True, exist_ok=True)
    arguments = _with_defaults(arguments)
    if 1 not in arguments.batch_sizes and any(runtime.startswith("litert") for runtime in arguments.runtimes or ()):
        parser.error("LiteRT's graphs take one image at a time: add 1 to --batch-sizes, or leave these runtimes out")
    if arguments.chart and arguments.tables and not arguments.update and not shows_points(arguments):
        parser.error(
            f"--chart shows single images of the first table in the runtimes {', '.join(CHART_RUNTIMES)}, of which "
            "nothing would be measured: leave it out, or measure some of them"
        )
    return arguments


def shows_points(arguments: argparse.Namespace) -> bool:
    """Whether anything that is measured has a place in the chart."""
    runtimes = CHART_RUNTIMES if arguments.runtimes is None else set(CHART_RUNTIMES).intersection(arguments.runtimes)
    return 1 in arguments.tables and 1 in arguments.batch_sizes and bool(runtimes)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().replace("×", "x").partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH, such as 360x480, got {text!r}")
    return int(height), int(width)


def _with_defaults(arguments: argparse.Namespace) -> argparse.Namespace:
    two = min(2, usable_cores())
    quick_models = ["lemore", "segformer-b0", "mobilenetv2-deeplabv3", "lraspp-mobilenet-v3-large"]
    defaults = {
        "models": (list(NAMES), quick_models),
        "runtimes": (None, ["eager", "onnx", "openvino"]),
        "batch_sizes": ([1, 8], [1]),
        "threads": (sorted({1, two}), [two]),
        "rounds": (3, 1),
        "sizes": (SIZES, ((256, 256), (512, 512), (1024, 1024))),
    }
    for name, values in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, values[arguments.quick])
    arguments.models = [name for name in NAMES if name in {"lemore", *arguments.models}]
    return arguments


def main() -> None:
    arguments = parse_arguments()
    report = measured_report(arguments) if arguments.tables else json.loads(arguments.json.read_text(encoding="utf-8"))
    print_report(report)
    if arguments.chart:
        points = speed_points(report)
        if points:
            plot_speed(points, chart_title(report)).save(arguments.chart)
        else:
            print(
                f"No chart: no single images of LeMoRe were measured in {', '.join(CHART_RUNTIMES)}.", file=sys.stderr
            )
    failures = {reason(result) for result in report["results"] if "error" in result}
    if failures:
        sys.exit(f"Some measurements failed: {'; '.join(sorted(failures))}")


# What is measured


def measured_report(arguments: argparse.Namespace) -> dict[str, Any]:
    machine = run_cell(Cell("machine"))
    if "versions" not in machine:
        sys.exit(f"The machine cannot be described: {reason(machine)}")
    if arguments.runtimes is None:
        arguments.runtimes = [*RUNTIMES, *(CUDA_RUNTIMES if machine["gpu"] else ())]
    if empty := sorted(set(arguments.tables) - {cell.table for cell in plan_cells(arguments)}):
        sys.exit(f"Nothing to measure for table {empty[0]}, which has the runtimes {', '.join(SIZE_RUNTIMES)}.")
    report = new_report(arguments, machine)

    with TemporaryDirectory() as scratch:
        # A peer's graph takes one size alone, and another release writes other graphs.
        height, width = arguments.size
        name = f"{height}x{width}-{arguments.num_labels}-{release_of(machine)}"
        folder = (arguments.work_dir or Path(scratch)).absolute() / name
        folder.mkdir(parents=True, exist_ok=True)
        failed = prepare_all(report, arguments, folder)
        if arguments.prepare_only:
            sys.exit("\n".join(f"{model} {graph}: {reason(why)}" for (model, graph), why in failed.items()) or None)
        measure_all(report, arguments, folder, failed)
    return report


def release_of(machine: dict[str, Any]) -> str:
    """Eight digits for this package's code and the versions of the others."""
    digest = hashlib.sha256(json.dumps(machine["versions"], sort_keys=True).encode())
    for path in sorted(Path(lemore_hf.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def new_report(arguments: argparse.Namespace, machine: dict[str, Any]) -> dict[str, Any]:
    settings = {
        "num_labels": arguments.num_labels,
        "size": list(arguments.size),
        "environment": KEEP_MEMORY if arguments.keep_memory else {},
    }
    report = {"machine": machine, "settings": settings, "models": {}, "results": []}
    if not (arguments.update and arguments.json.is_file()):
        return report
    old = json.loads(arguments.json.read_text(encoding="utf-8"))
    if (old["machine"], old["settings"]) != (machine, settings):
        sys.exit(f"{arguments.json} is of another machine, other versions or settings: leave out --update.")
    return {**report, "models": old["models"], "results": old["results"]}


def prepare_all(
    report: dict[str, Any], arguments: argparse.Namespace, folder: Path
) -> dict[tuple[str, str], dict[str, str]]:
    """Write graphs and the picture to the folder, and count the models; by (model, runtime) why there is no graph."""
    if 2 in arguments.tables and not (folder / "labels.png").is_file():
        draw_picture(folder)
    preparations = list(plan_preparations(arguments, folder))
    failed = {}
    for model, result in prepare_models(preparations).items():
        # A process that failed altogether has made no graph at all.
        reasons = result.pop("failed", dict.fromkeys(arguments.runtimes, result))
        failed |= {(model, runtime): why for runtime, why in reasons.items()}
        if "parameters" in result:
            traffic = report["models"].get(model, {}).get("traffic", {}) | result["traffic"]
            report["models"][model] = {**result, "traffic": traffic}
    return failed


def measure_all(
    report: dict[str, Any], arguments: argparse.Namespace, folder: Path, failed: dict[tuple[str, str], dict[str, str]]
) -> None:
    """Fill the report, and write it after every round."""
    cells = [replace(cell, folder=str(folder)) for cell in plan_cells(arguments)]
    before = report["results"]
    for results in run_rounds(cells, arguments.rounds, report["settings"]["environment"], failed):
        measured = [merge_rounds(cell, rounds) for cell, rounds in results.items()]
        keys = {identity(result) for result in measured}
        report["results"] = [result for result in before if identity(result) not in keys] + measured
        report["created"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        if arguments.json:
            with atomic_file(arguments.json) as part:  # what is killed in the middle leaves the rounds before
                part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def identity(result: dict[str, Any]) -> tuple:
    names = ("table", "kind", "model", "runtime", "layout", "batch_size", "threads", "height", "width")
    return tuple(result[name] for name in names)


def plan_preparations(arguments: argparse.Namespace, folder: Path) -> Iterator[Cell]:
    models, graphs = [], []
    if 1 in arguments.tables:
        models = [model for model in arguments.models if model != "lemore-not-fused"]
        graphs = [runtime for runtime in arguments.runtimes if runtime in GRAPH_RUNTIMES]
    elif 3 in arguments.tables:
        models, graphs = ["lemore"], [runtime for runtime in SIZE_RUNTIMES[1:] if runtime in arguments.runtimes]
    height, width = arguments.size
    for model in models:
        batch_size = max(arguments.batch_sizes)
        yield Cell(
            "prepare",
            model,
            ",".join(graphs),
            batch_size=batch_size,
            height=height,
            width=width,
            num_labels=arguments.num_labels,
            folder=str(folder),
        )


def plan_cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    planned = {1: plan_models, 2: plan_pictures, 3: plan_sizes}
    for table in arguments.tables:
        for cell in planned[table](arguments):
            yield replace(cell, table=table, seconds=arguments.seconds, num_labels=arguments.num_labels)


def plan_models(arguments: argparse.Namespace) -> Iterator[Cell]:
    height, width = arguments.size
    for threads in arguments.threads:
        yield Cell("peaks", threads=threads)
    for runtime in CUDA_RUNTIMES:
        if runtime in arguments.runtimes:
            yield Cell("peaks", runtime=runtime)
    for runtime in arguments.runtimes:
        on_gpu = runtime in CUDA_RUNTIMES
        for threads in [1] if on_gpu else arguments.threads:
            for batch_size in [TRAINING_BATCH_SIZE] if runtime in TRAINING_RUNTIMES else arguments.batch_sizes:
                if runtime.startswith("litert") and batch_size > 1:
                    continue  # its graphs take one image
                for model in arguments.models:
                    if model == "lemore-not-fused" and runtime in (*GRAPH_RUNTIMES, *TRAINING_RUNTIMES):
                        continue  # graphs are fused when they are exported, and training runs what is not fused
                    if model.endswith("-full") and runtime in TRAINING_RUNTIMES:
                        continue  # the loss upsamples anyway
                    for layout in layouts(runtime):
                        kind, name = "inference", runtime
                        if runtime in TRAINING_RUNTIMES:
                            kind, _, name = runtime.partition("-")
                        yield Cell(kind, model, name, layout, batch_size, threads, height, width)


def plan_pictures(arguments: argparse.Namespace) -> Iterator[Cell]:
    for runtime in ("pipeline", "calls"):
        for model in PICTURE_MODELS:
            if model in arguments.models:
                for layout in LAYOUTS[: 1 if arguments.quick else 2]:
                    yield Cell("picture", model, runtime, layout, threads=max(arguments.threads))


def plan_sizes(arguments: argparse.Namespace) -> Iterator[Cell]:
    for runtime in SIZE_RUNTIMES:
        if runtime in arguments.runtimes:
            for height, width in arguments.sizes:
                for layout in layouts(runtime)[: 1 if arguments.quick else 2]:
                    threads = max(arguments.threads)
                    yield Cell("inference", "lemore", runtime, layout, 1, threads, height, width)


def layouts(runtime: str) -> tuple[str, ...]:
    """PyTorch is measured in both; the others lay memory out as they like."""
    return LAYOUTS[:1] if runtime in GRAPH_RUNTIMES else LAYOUTS


# What is shown


def print_report(report: dict[str, Any]) -> None:
    machine = report["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    parts = [machine["processor"], f"{machine['cores']} cores", machine["cpu_capability"], machine["gpu"]]
    print(f"{', '.join(filter(None, parts))}; {versions}")
    print(f"{report['settings']['num_labels']} classes")
    for peaks in report["results"]:
        if peaks["kind"] == "peaks" and "macs_per_second" in peaks:
            what = peaks["runtime"] or f"{peaks['threads']} threads"
            print(
                f"{what}: {peaks['macs_per_second'] / 1e9:.0f} G multiply-accumulates/s in a matrix product, "
                f"{peaks['bytes_per_second'] / 1e9:.1f} GB/s read and written in a copy"
            )
    tables = {result["table"] for result in report["results"]}
    shown = {1: (ratio_table, model_table), 2: (picture_table,), 3: (size_table,)}
    for table in sorted(tables):
        print(f"\n{TITLES[table]}")
        for draw in shown[table]:
            print(f"\n{draw(report, NAMES)}")


def speed_points(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What the chart shows: single images on the most threads, in the runtimes that keep single precision and have LeMoRe,
    whose speed is the measure of the others'."""
    results = [result for result in report["results"] if result["table"] == 1 and result["runtime"] in CHART_RUNTIMES]
    results = [result for result in results if result["kind"] == "inference"]
    threads = max((result["threads"] for result in results), default=1)
    points: dict[str, list[dict[str, Any]]] = {}
    for result in sorted(best_layouts(results), key=lambda result: list(NAMES).index(result["model"])):
        counts = report["models"].get(result["model"])
        on_all_threads = result["threads"] == threads or result["runtime"].startswith("cuda")
        if counts and "median" in result and result["batch_size"] == 1 and on_all_threads:
            point = {"name": NAMES[result["model"]], "seconds": result["median"], **counts}
            points.setdefault(RUNTIME_NAMES[result["runtime"]], []).append(point)
    return {runtime: models for runtime, models in points.items() if models[0]["name"] == NAMES["lemore"]}


def chart_title(report: dict[str, Any]) -> str:
    height, width = report["settings"]["size"]
    return f"{height}×{width}, single images, {report['machine']['processor']}"


if __name__ == "__main__":
    run_script(main)
