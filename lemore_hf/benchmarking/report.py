# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""From the rounds of every cell to figures, and from those to Markdown tables."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from ..command_line import markdown_table
from .cell import GRAPH_RUNTIMES, Cell

Result = dict[str, Any]
"""A cell's fields, and its figures over all rounds; see `merge_rounds`."""

RUNTIME_NAMES = {
    "eager": "eager float32",
    "compile": "torch.compile float32",
    "bf16": "eager bfloat16",
    "onnx": "ONNX Runtime float32",
    "openvino": "OpenVINO float32",
    "onnx-int8": "ONNX Runtime int8",
    "openvino-int8": "OpenVINO int8",
    "litert": "LiteRT float32",
    "litert-int8": "LiteRT int8",
    "cuda-float32": "CUDA graph float32 (TF32)",
    "cuda-bfloat16": "CUDA graph bfloat16",
    "training": "training step float32",
    "training-one-loss": "training step float32, the same loss in all",
    "pipeline": "pipeline",
    "calls": "plain calls",
}
_REFERENCE = "lemore"


def merge_rounds(cell: Cell, rounds: Sequence[dict[str, Any]]) -> Result:
    """
    A cell's figures over its rounds.

    Medians, quartiles, memory and stages are the medians of the rounds' own, so that each round weighs the same however
    often it repeated. A cell that failed in any round has its reason instead, under `error` or `not_installed`.
    """
    fields = {name: value for name, value in asdict(cell).items() if name != "folder"}
    for result in rounds:
        for reason in ("not_installed", "error"):
            if reason in result:
                return {**fields, reason: result[reason]}
    merged = {**fields, "rounds": [dict(result) for result in rounds]}
    if "median" in rounds[0]:
        merged["median"] = statistics.median(result["median"] for result in rounds)
        merged["quartiles"] = [statistics.median(result["quartiles"][side] for result in rounds) for side in (0, 1)]
    for name in ("peak_memory", "macs_per_second", "bytes_per_second"):
        values = [result[name] for result in rounds if result.get(name) is not None]
        if values:
            merged[name] = statistics.median(values)
    if "stages" in rounds[0]:
        merged["stages"] = {
            stage: statistics.median(result["stages"][stage] for result in rounds) for stage in rounds[0]["stages"]
        }
    return merged


def best_layouts(results: Iterable[Result]) -> list[Result]:
    """One result for each model in each setting: that of its faster memory layout, or of a layout that works at all."""
    best: dict[tuple, Result] = {}
    for result in results:
        key = (*_setting(result), result["model"])
        if key not in best or result.get("median", float("inf")) < best[key].get("median", float("inf")):
            best[key] = result
    return list(best.values())


def _setting(result: Result) -> tuple:
    return tuple(result[name] for name in ("table", "kind", "runtime", "batch_size", "threads", "height", "width"))


def ratio(result: Result, results: Iterable[Result]) -> float | None:
    """How many times as long as LeMoRe's a result's latency is, in the same setting; `None` where either has none."""
    reference = next((r for r in results if _setting(r) == _setting(result) and r["model"] == _REFERENCE), None)
    if reference is None or "median" not in reference or "median" not in result:
        return None
    return result["median"] / reference["median"]


# Tables


def model_table(report: dict[str, Any], names: dict[str, str]) -> str:
    """Every model in every runtime, the settings one below the other."""
    results = best_layouts(result for result in report["results"] if result["table"] == 1 and _is_timed(result))
    on_gpu = any(result["runtime"].startswith("cuda") for result in results)
    header = ["runtime", "batch", "threads", "model", "layout", "parameters", "G MACs", "ms", "quartiles", "× LeMoRe"]
    header += ["peak MB", "% of products", "% of copying"] + (["images/s"] if on_gpu else [])
    rows = []
    for result in sorted(results, key=lambda result: _order(result, list(names))):
        counts = report["models"].get(result["model"].removesuffix("-not-fused"), {})
        row = [
            RUNTIME_NAMES[_runtime(result)],
            str(result["batch_size"]),
            "–" if result["runtime"].startswith("cuda") else str(result["threads"]),
            names[result["model"]],
            result["layout"].replace("_", " ") if _has_layout(result) else "–",
            _number(counts.get("parameters"), 1e6, 2, " M"),
            _number(counts.get("multiply_accumulates"), 1e9, 2),
        ]
        rows.append(row + _figures(result, results, counts, report) + ([_images_per_second(result)] if on_gpu else []))
    return markdown_table([header, *rows], len(header))


def _figures(result: Result, results: list[Result], counts: dict[str, Any], report: dict[str, Any]) -> list[str]:
    if "median" not in result:
        return [reason(result)] + [""] * 5
    peaks = _peaks_of(result, report)
    products, copying = None, None
    if peaks and counts and result["kind"] == "inference":
        runtime = _runtime(result)
        is_float32 = runtime in ("eager", "compile", "onnx", "openvino", "litert", "cuda-float32")
        if is_float32 or runtime.startswith("cuda"):  # on a CPU the peak is of single precision
            macs = counts["multiply_accumulates"] * result["batch_size"]
            products = macs / result["median"] / peaks["macs_per_second"]
        traffic = _traffic(counts, result["batch_size"])
        if traffic and is_float32:
            copying = traffic / result["median"] / peaks["bytes_per_second"]
    lower, upper = result["quartiles"]
    return [
        _milliseconds(result["median"]),
        f"{_milliseconds(lower)} to {_milliseconds(upper)}",
        _number(ratio(result, results), 1, 2),
        _number(result.get("peak_memory"), 1e6, 0),
        _number(products, 0.01, 0),
        _number(copying, 0.01, 0),
    ]


def _traffic(counts: dict[str, Any], batch_size: int) -> float | None:
    """Bytes that a batch moves, which was counted for the smallest and the largest: so much for the weights, so much for
    each image."""
    known = {int(size): traffic for size, traffic in counts["traffic"].items()}
    if batch_size in known or len(known) < 2:
        return known.get(batch_size)
    few, many = min(known), max(known)
    return known[few] + (batch_size - few) * (known[many] - known[few]) / (many - few)


def ratio_table(report: dict[str, Any], names: dict[str, str]) -> str:
    """How many times LeMoRe's latency each model takes: a row for each model, a column for each setting."""
    results = best_layouts(result for result in report["results"] if result["table"] == 1 and _is_timed(result))
    settings = sorted(
        {_setting(result) for result in results}, key=lambda key: _setting_order(key[1], key[2], *key[3:5])
    )
    header = ["model"]
    for _, kind, runtime, batch_size, threads, *_ in settings:
        header.append(f"{RUNTIME_NAMES[_runtime_name(kind, runtime)]}, {batch_size} × {threads}")
    rows = []
    for model, name in names.items():
        cells = []
        for setting in settings:
            match = [result for result in results if _setting(result) == setting and result["model"] == model]
            cells.append(_number(ratio(match[0], results), 1, 1) if match else "")
        if any(cells):
            rows.append([name, *cells])
    return markdown_table([header, *rows], len(header))


def picture_table(report: dict[str, Any], names: dict[str, str]) -> str:
    """From a picture's file to its label map, with each stage's share."""
    results = best_layouts(result for result in report["results"] if result["table"] == 2)
    stages = ("decode", "processor", "network", "post-processing", "rest")
    header = ["through", "model", "layout", "ms", "quartiles", "× LeMoRe", *(f"{stage}, %" for stage in stages)]
    header.append("peak MB")
    rows = []
    for result in sorted(results, key=lambda result: _order(result, list(names))):
        row = [RUNTIME_NAMES[result["runtime"]], names[result["model"]], result["layout"].replace("_", " ")]
        if "median" not in result:
            rows.append([*row, reason(result)] + [""] * (len(header) - len(row) - 1))
            continue
        lower, upper = result["quartiles"]
        row += [_milliseconds(result["median"]), f"{_milliseconds(lower)} to {_milliseconds(upper)}"]
        row.append(_number(ratio(result, results), 1, 2))
        row += [f"{100 * result['stages'].get(stage, 0) / result['median']:.0f}" for stage in stages]
        rows.append([*row, _number(result.get("peak_memory"), 1e6, 0)])
    return markdown_table([header, *rows], len(header))


def size_table(report: dict[str, Any], names: dict[str, str]) -> str:
    """LeMoRe's time and memory for a megapixel, by the size of the image."""
    results = best_layouts(result for result in report["results"] if result["table"] == 3)
    header = [
        "runtime",
        "threads",
        "size",
        "layout",
        "ms",
        "ms/megapixel",
        "against 512×512",
        "peak MB",
        "MB/megapixel",
    ]
    rows = []
    for result in sorted(results, key=lambda r: (_order(r, list(names)), r["height"] * r["width"])):
        row = [RUNTIME_NAMES[result["runtime"]], str(result["threads"]), f"{result['height']}×{result['width']}"]
        row.append(result["layout"].replace("_", " ") if _has_layout(result) else "–")
        if "median" not in result:
            rows.append([*row, reason(result)] + [""] * (len(header) - len(row) - 1))
            continue
        pixels, memory = result["height"] * result["width"] / 1e6, result.get("peak_memory")
        rows.append(
            [
                *row,
                _milliseconds(result["median"]),
                _milliseconds(result["median"] / pixels),
                _number(_against_native(result, results), 1, 2),
                _number(memory, 1e6, 0),
                _number(memory and memory / pixels, 1e6, 0),
            ]
        )
    return markdown_table([header, *rows], len(header))


def _against_native(result: Result, results: list[Result]) -> float | None:
    """Time for a pixel as a multiple of that at 512×512."""
    names = ("runtime", "threads", "batch_size")
    for other in results:
        same = all(other[name] == result[name] for name in names)
        if same and (other["height"], other["width"]) == (512, 512) and "median" in other:
            scale = result["height"] * result["width"] / 512**2
            return result["median"] / other["median"] / scale
    return None


def reason(result: Result) -> str:
    """Why a result has no figures."""
    return f"{result['not_installed']} is not installed" if "not_installed" in result else f"failed: {result['error']}"


def _is_timed(result: Result) -> bool:
    return result["kind"] in ("inference", "training")


def _has_layout(result: Result) -> bool:
    return result["runtime"] not in GRAPH_RUNTIMES


def _runtime(result: Result) -> str:
    return _runtime_name(result["kind"], result["runtime"])


def _runtime_name(kind: str, runtime: str) -> str:
    """A key of `RUNTIME_NAMES`."""
    return "-".join(filter(None, (kind, runtime))) if kind == "training" else runtime


def _order(result: Result, names: list[str]) -> tuple:
    setting = _setting_order(result["kind"], result["runtime"], result["batch_size"], result["threads"])
    return (*setting, names.index(result["model"]))


def _setting_order(kind: str, runtime: str, batch_size: int, threads: int) -> tuple:
    return batch_size, -threads, list(RUNTIME_NAMES).index(_runtime_name(kind, runtime))


def _peaks_of(result: Result, report: dict[str, Any]) -> Result | None:
    runtime = result["runtime"] if result["runtime"].startswith("cuda") else ""
    for peaks in report["results"]:
        same = (peaks["threads"], peaks["runtime"]) == (result["threads"], runtime)
        if peaks["kind"] == "peaks" and same and "macs_per_second" in peaks:
            return peaks
    return None


def _images_per_second(result: Result) -> str:
    return _number(result["batch_size"] / result["median"] if "median" in result else None, 1, 0)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def _number(value: float | None, unit: float, digits: int, suffix: str = "") -> str:
    return "–" if value is None else f"{value / unit:.{digits}f}{suffix}"
