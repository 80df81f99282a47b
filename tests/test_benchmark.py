# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""The benchmark: rounds and statistics, cells in processes of their own, tables, chart and command line."""

import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large
from transformers.pipelines import image_segmentation

from lemore_hf import loss_lemore, modeling_lemore, visualization
from lemore_hf.benchmarking import cell as cell_module
from lemore_hf.benchmarking import models, preparation, rounds
from lemore_hf.benchmarking.cell import Cell, measure, summary
from lemore_hf.benchmarking.report import (
    best_layouts,
    merge_rounds,
    model_table,
    picture_table,
    ratio,
    ratio_table,
    size_table,
)
from lemore_hf.visualization import plot_speed

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"
EAGER = Cell("inference", "lemore", "eager")


def result(cell: Cell, median: float, **figures) -> dict:
    return merge_rounds(cell, [{"median": median, "quartiles": [median * 0.9, median * 1.2], "runs": 5, **figures}])


# Statistics


def test_summary_is_the_median_and_the_quartiles():
    values = [5.0, 1.0, 2.0, 4.0, 3.0, 100.0]
    figures = summary(values)
    assert figures["median"] == np.median(values)
    assert figures["quartiles"] == list(np.quantile(values, [0.25, 0.75]))
    assert figures["runs"] == 6


def test_each_round_weighs_the_same():
    figures = [
        {"median": 3.0, "quartiles": [2.0, 4.0], "runs": 500, "peak_memory": 10},
        {"median": 1.0, "quartiles": [0.5, 9.0], "runs": 5, "peak_memory": None},
        {"median": 2.0, "quartiles": [1.0, 3.0], "runs": 5, "peak_memory": 30},
    ]
    merged = merge_rounds(EAGER, figures)
    assert (merged["median"], merged["quartiles"], merged["peak_memory"]) == (2.0, [1.0, 4.0], 20)
    assert merged["rounds"] == figures
    assert merged["model"] == "lemore"
    assert "folder" not in merged


def test_stages_are_merged_by_name():
    cell = Cell("picture", "lemore", "calls", table=2)
    stages = [{"decode": value, "rest": 1.0} for value in (1.0, 5.0, 2.0)]
    figures = [{"median": 4.0, "quartiles": [4.0, 4.0], "runs": 5, "stages": item} for item in stages]
    assert merge_rounds(cell, figures)["stages"] == {"decode": 2.0, "rest": 1.0}


def test_a_failure_in_any_round_is_the_result():
    good = {"median": 1.0, "quartiles": [1.0, 1.0], "runs": 5}
    merged = merge_rounds(EAGER, [good, {"error": "out of memory"}])
    assert merged["error"] == "out of memory"
    assert "median" not in merged


def test_the_faster_layout_is_shown_and_compared():
    other = replace(EAGER, model="segformer-b0")
    results = [
        result(EAGER, 2.0),
        result(replace(EAGER, layout="channels_last"), 1.0),
        result(other, 12.0),
        merge_rounds(replace(other, layout="channels_last"), [{"error": "no memory"}]),
        result(replace(other, threads=2), 5.0),  # nothing to compare it with
    ]
    best = best_layouts(results)
    assert [(item["model"], item["layout"], item["threads"]) for item in best] == [
        ("lemore", "channels_last", 1),
        ("segformer-b0", "contiguous", 1),
        ("segformer-b0", "contiguous", 2),
    ]
    assert [ratio(item, best) for item in best] == [1.0, 12.0, None]


# Rounds


def test_rounds_are_interleaved_and_drop_slow_layouts_and_failures(monkeypatch):
    slow = replace(EAGER, layout="channels_last")
    broken = replace(EAGER, model="segformer-b0")
    unexported = replace(EAGER, runtime="onnx")
    seconds = {EAGER: 1.0, slow: 1.2}
    started = []

    def fake_run_cell(cell, environment):
        started.append(cell)
        return {"error": "broken"} if cell == broken else {"median": seconds[cell]}

    monkeypatch.setattr(rounds, "run_cell", fake_run_cell)
    failed = {("lemore", "onnx"): {"not_installed": "onnxscript"}}
    *_, results = rounds.run_rounds([EAGER, slow, broken, unexported], 3, failed=failed)
    assert started == [EAGER, slow, broken, EAGER, EAGER]
    assert [len(results[cell]) for cell in (EAGER, slow, broken)] == [3, 1, 1]
    assert results[unexported] == [{"not_installed": "onnxscript"}]


def test_a_close_layout_stays(monkeypatch):
    close = replace(EAGER, layout="channels_last")
    monkeypatch.setattr(rounds, "run_cell", lambda cell, environment: {"median": 1.05 if cell == close else 1.0})
    *_, results = rounds.run_rounds([EAGER, close], 2)
    assert [len(results[cell]) for cell in (EAGER, close)] == [2, 2]


def test_cells_of_a_gpu_start_side_by_side_and_those_of_a_cpu_alone(monkeypatch):
    together, running, most = threading.Barrier(2, timeout=30), [], defaultdict(int)

    def fake_run_cell(cell, environment):
        running.append(cell)
        if cell.on_gpu:
            together.wait()  # fails unless two are there at a time
        else:
            time.sleep(0.01)
        most[cell.on_gpu] = max(most[cell.on_gpu], len(running))
        running.remove(cell)
        return {"median": cell.batch_size}

    monkeypatch.setattr(rounds, "run_cell", fake_run_cell)
    monkeypatch.setattr(rounds, "_GPU_PROCESSES", 2)
    cells = [replace(EAGER, runtime=name, batch_size=size) for name in ("eager", "cuda-bfloat16") for size in (1, 2)]
    *_, results = rounds.run_rounds(cells, 2)
    assert most[False] == 1
    assert {cell: found[-1] for cell, found in results.items()} == {
        cell: {"median": cell.batch_size} for cell in cells
    }


def test_one_cell_at_a_time_has_the_gpu(tmp_path):
    cell = replace(EAGER, runtime="cuda-bfloat16", folder=str(tmp_path))
    other = "from filelock import FileLock; import sys; FileLock(sys.argv[1] + '/gpu.lock').acquire(timeout=0)"
    command = [sys.executable, "-c", other, tmp_path]
    with cell_module._gpu_alone(cell):
        assert "Timeout" in subprocess.run(command, capture_output=True, text=True).stderr
    assert subprocess.run(command).returncode == 0


# Processes


def test_a_failing_process_is_reported(tmp_path):
    outcome = rounds.run_cell(Cell("inference", "lemore", "onnx", folder=str(tmp_path)))
    assert "model.onnx" in outcome["error"]


def test_a_missing_package_is_reported(tmp_path):
    (tmp_path / "onnxruntime.py").write_text("raise ModuleNotFoundError(name='onnxruntime')")
    cell = Cell("inference", "lemore", "onnx", folder=str(tmp_path))
    assert rounds.run_cell(cell, {"PYTHONPATH": str(tmp_path)}) == {"not_installed": "onnxruntime"}


@pytest.mark.parametrize(
    ("program", "timeout", "reason"),
    [("import os; os.abort()", 100, "SIGABRT"), ("import time; time.sleep(60)", 1, "1 seconds")],
)
def test_a_process_that_dies_or_hangs_is_reported(program, timeout, reason, tmp_path, monkeypatch):
    (tmp_path / "cell.py").write_text(program)
    monkeypatch.setattr(cell_module, "__file__", str(tmp_path / "cell.py"))
    assert reason in rounds.run_cell(EAGER, timeout=timeout)["error"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_what_a_run_needs_at_most():
    """In a fresh process: in this one the allocator may hold as much from before."""
    program = """
import numpy as np
from lemore_hf.benchmarking.cell import peak_memory

def run():
    for _ in range(2):  # the second array takes the place of the first
        np.ones(2**24, dtype=np.uint8)

print(peak_memory(run))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == pytest.approx(2**24, rel=0.1)


# Models


def test_traffic_is_that_of_convolutions_and_products():
    network = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Flatten(2), nn.Linear(12, 7, bias=False))
    numbers = (3 * 12 + 3 * 5 + 5 + 5 * 12) + (5 * 12 + 12 * 7 + 5 * 7)
    assert models.count_traffic(network, torch.ones(1, 3, 3, 4)) == 4 * numbers


def test_full_size_logits_are_torchvisions():
    reference = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=models.NUM_LABELS).eval()
    network = models.build_model("lraspp-mobilenet-v3-large-full")
    reference.load_state_dict({name.removeprefix("model."): value for name, value in network.state_dict().items()})
    pixel_values = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(network(pixel_values).logits, reference(pixel_values)["out"])


def test_half_a_graph_of_an_interrupted_preparation_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "count", lambda *arguments: {})
    cell = Cell("prepare", "lraspp-mobilenet-v3-large", "onnx", folder=str(tmp_path))

    def interrupted(model, cell, target, *arguments):
        (target / "model.onnx").write_text("half")
        raise KeyboardInterrupt

    def whole(model, cell, target, *arguments):
        (target / "model.onnx").write_text("whole")

    monkeypatch.setattr(preparation, "_export_peer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        preparation.prepare(cell)
    monkeypatch.setattr(preparation, "_export_peer", whole)
    preparation.prepare(cell)
    assert (tmp_path / cell.model / "onnx" / "model.onnx").read_text() == "whole"


def test_fitted_classifiers_draw_the_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "PICTURE_SIZE", (192, 256))
    preparation.draw_picture(tmp_path)
    model, processor = models.load_segmenter("lemore", tmp_path, "channels_last")
    with models.Image.open(tmp_path / "picture.jpg") as image, torch.inference_mode():
        outputs = model(**processor(image, return_tensors="pt"))
    (labels,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(192, 256)])
    with models.Image.open(tmp_path / "labels.png") as label_map:
        truth = torch.from_numpy(np.array(label_map.resize((256, 192), models.Image.Resampling.NEAREST)))
    assert (labels == truth)[truth != 255].float().mean() > 0.7
    assert labels.max() < 9  # no class that the picture does not have


def test_networks_have_the_classes_that_are_asked_for(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--num-labels", "11", "--size", "64", "96"])
    arguments = script.parse_arguments()
    arguments.runtimes = list(script.RUNTIMES)
    cells = [*script.plan_preparations(arguments, Path()), *script.plan_cells(arguments)]
    assert {cell.num_labels for cell in cells} == {11}
    for name in models.NAMES:
        network = models.build_model(name, 11).to("meta")
        with torch.inference_mode():
            assert network(torch.empty(1, 3, 64, 96, device="meta")).logits.shape[1] == 11
    few, many = (models.count("lemore", (64, 96), [1], number)["parameters"] for number in (11, 150))
    assert many - few == (150 - 11) * (modeling_lemore.LeMoReConfig().decoder_hidden_size + 1)


@pytest.mark.parametrize("runtime", ["calls", "pipeline"])
def test_stages_from_file_to_label_map(runtime, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "PICTURE_SIZE", (96, 128))
    monkeypatch.setattr(image_segmentation, "load_image", image_segmentation.load_image)  # to be put back
    preparation.draw_picture(tmp_path)
    cell = Cell("picture", "lemore", runtime, seconds=0.01, folder=str(tmp_path))
    figures = measure(replace(cell, threads=torch.get_num_threads()))
    assert set(figures["stages"]) == {"decode", "processor", "network", "post-processing", "rest"}
    assert all(figures["stages"][stage] > 0 for stage in ("decode", "processor", "network", "post-processing"))
    assert sum(figures["stages"].values()) == pytest.approx(figures["median"])


@pytest.mark.parametrize("loss", ["", "one-loss"])
def test_training_step(loss, monkeypatch):
    taken, segmentation_loss = [], loss_lemore.segmentation_loss

    def watched(logits, labels):
        taken.append(labels)
        return segmentation_loss(logits, labels)

    monkeypatch.setattr(loss_lemore, "segmentation_loss", watched)
    cell = Cell("training", "segformer-b0", loss, batch_size=2, height=64, width=64, seconds=0.01)
    assert measure(replace(cell, threads=torch.get_num_threads()))["median"] > 0
    assert bool(taken) is bool(loss), "SegFormer has a loss of its own"


# Tables


@pytest.fixture
def report() -> dict:
    segformer = replace(EAGER, model="segformer-b0", batch_size=1)
    peaks = {"macs_per_second": 100e9, "bytes_per_second": 10e9}
    picture = {"stages": {"decode": 0.01, "network": 0.02, "rest": 0.01}}
    large = replace(EAGER, table=3, height=1024, width=1024)
    return {
        "models": {
            "lemore": {"parameters": 1_591_374, "multiply_accumulates": 800_000_000, "traffic": {"1": 40_000_000}},
            "segformer-b0": {"parameters": 3_750_000, "multiply_accumulates": 8e9, "traffic": {"1": 4e8}},
        },
        "results": [
            merge_rounds(Cell("peaks"), [peaks]),
            result(EAGER, 0.016, peak_memory=50_000_000),
            result(segformer, 0.2),
            result(replace(EAGER, runtime="bf16"), 0.008),
            merge_rounds(replace(EAGER, runtime="onnx"), [{"not_installed": "onnxruntime"}]),
            merge_rounds(replace(segformer, runtime="onnx"), [{"error": "no such file"}]),
            result(Cell("picture", "lemore", "calls", table=2), 0.04, **picture),
            result(replace(EAGER, table=3), 0.016, peak_memory=50_000_000),
            result(large, 0.08, peak_memory=200_000_000),
        ],
    }


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_model_table(report):
    header, _, *rows = cells(model_table(report, models.NAMES))
    lemore, segformer, halved, missing, broken = (dict(zip(header, row, strict=True)) for row in rows)
    assert (lemore["parameters"], lemore["G MACs"], lemore["ms"], lemore["quartiles"]) == (
        "1.59 M",
        "0.80",
        "16",
        "14.4 to 19.2",
    )
    assert (halved["× LeMoRe"], halved["% of products"], halved["% of copying"]) == ("1.00", "–", "–")
    # 0.8 G in 16 ms are 50 G/s; 40 MB in 16 ms are 2.5 GB/s
    assert (lemore["% of products"], lemore["% of copying"], lemore["peak MB"]) == ("50", "25", "50")
    assert (lemore["× LeMoRe"], segformer["× LeMoRe"]) == ("1.00", "12.50")
    assert missing["ms"] == "onnxruntime is not installed"
    assert broken["ms"] == "failed: no such file"


def test_traffic_of_a_batch_between_two_that_were_counted(report):
    report["models"]["lemore"]["traffic"] = {"1": 40_000_000, "8": 250_000_000}  # 10 MB of weights, 30 MB an image
    report["results"] = [report["results"][0], result(replace(EAGER, batch_size=4), 0.052)]
    header, _, row = cells(model_table(report, models.NAMES))
    assert dict(zip(header, row, strict=True))["% of copying"] == "25"  # 130 MB in 52 ms are 2.5 GB/s


def test_other_tables(report):
    assert cells(ratio_table(report, models.NAMES))[2:] == [
        ["LeMoRe", "1.0", "1.0", "–"],
        ["SegFormer-B0", "12.5", "", "–"],
    ]
    header, _, row = cells(picture_table(report, models.NAMES))
    picture = dict(zip(header, row, strict=True))
    assert [picture[f"{stage}, %"] for stage in ("decode", "network", "rest")] == ["25", "50", "25"]
    header, _, *rows = cells(size_table(report, models.NAMES))
    native, large = (dict(zip(header, row, strict=True)) for row in rows)
    assert (native["against 512×512"], large["against 512×512"]) == ("1.00", "1.25")
    assert (native["MB/megapixel"], large["MB/megapixel"]) == ("191", "191")


def test_chart():
    small = {"name": "small", "seconds": 0.01, "parameters": 1.6e6, "multiply_accumulates": 0.8e9}
    large = {"name": "large", "seconds": 0.1, "parameters": 3.8e6, "multiply_accumulates": 8e9}
    chart = plot_speed({"one runtime": [small, large]}, "title")
    wider = plot_speed({"one runtime": [small, large], "another": [small]}, "title")
    assert chart.mode == "RGB"
    assert wider.width > chart.width
    lighter = plot_speed({"one runtime": [small, {**large, "multiply_accumulates": 1e9}]}, "title")
    assert (np.asarray(chart).min(axis=2) < 250).sum() > (np.asarray(lighter).min(axis=2) < 250).sum()  # bubbles
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_speed({})


def test_a_chart_of_one_runtime_has_room_for_its_title_and_names(script, monkeypatch):
    figures, rendered = [], visualization._rendered
    monkeypatch.setattr(visualization, "_rendered", lambda figure: figures.append(figure) or rendered(figure))
    report = json.loads((SCRIPT.parents[1] / "model_cards" / "benchmark.json").read_text(encoding="utf-8"))
    points = {"eager float32": script.speed_points(report)["eager float32"]}
    plot_speed(points, "512×512, single images, Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz")
    (figure,) = figures
    for part in (figure.legends[0], figure._suptitle):
        box = part.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1


def test_chart_shows_how_many_times_as_fast_the_first_is(monkeypatch):
    monkeypatch.setattr(visualization, "_rendered", lambda figure: figure)
    small = {"name": "small", "seconds": 0.01, "parameters": 1.6e6, "multiply_accumulates": 0.8e9}
    large = {"name": "large", "seconds": 0.04, "parameters": 3.8e6, "multiply_accumulates": 8e9}
    (axes,) = plot_speed({"one runtime": [small, large]}).axes
    assert [tuple(line.get_xydata()[0]) for line in axes.lines] == [(1.6, 1.0), (3.8, 0.25)]


# The command line


@pytest.fixture
def script():
    specification = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--update"], "--json FILE"),
        (["--tables", "--json", "absent.json"], "absent.json"),
        (["--prepare-only"], "--work-dir DIR"),
        (["--size", "16", "64"], "32 × 32"),
        (["--sizes", "64x64", "64x16"], "32 × 32"),
        (["--sizes", "64"], "must be HEIGHTxWIDTH, such as 360x480, got '64'"),
        (["--sizes", "64x64", "--tables", "1"], "which --tables leaves out"),
        (["--rounds", "0"], "at least 1, got 0"),
        (["--num-labels", "5"], "the second table's picture has 9 classes"),
        (["--runtimes", "abacus"], "abacus"),
        (["--json", "."], "--json . is a folder"),
        (["--chart", "speed"], "--chart must be the name of a .png file"),
        (["--chart", "speed.png", "--tables", "3"], "of which nothing would be measured"),
        (["--chart", "speed.png", "--runtimes", "bf16", "cuda-bfloat16"], "of which nothing would be measured"),
        (["--chart", "speed.png", "--batch-sizes", "8"], "of which nothing would be measured"),
        (["--runtimes", "onnx", "litert", "--batch-sizes", "8"], "LiteRT's graphs take one image at a time: add 1"),
    ],
)
def test_bad_options(arguments, message, script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(SystemExit):
        script.parse_arguments()
    assert message in capsys.readouterr().err


def test_sizes_of_ones_own(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--tables", "3", "--sizes", "64x96", "360×480"])
    arguments = script.parse_arguments()
    arguments.runtimes = list(script.RUNTIMES)
    planned = {(cell.runtime, cell.height, cell.width) for cell in script.plan_cells(arguments)}
    assert planned == {(runtime, *size) for runtime in script.SIZE_RUNTIMES for size in ((64, 96), (360, 480))}


def test_litert_is_measured_with_single_images(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--tables", "1", "--runtimes", "litert", "litert-int8", "onnx"])
    cells = list(script.plan_cells(script.parse_arguments()))
    measured = {(cell.runtime, cell.batch_size) for cell in cells if cell.kind == "inference"}
    assert measured == {("litert", 1), ("litert-int8", 1), ("onnx", 1), ("onnx", 8)}


def test_what_measures_nothing_leaves_the_file_as_it_was(script, monkeypatch, tmp_path):
    (tmp_path / "figures.json").write_text("{}")
    options = ["--tables", "3", "--runtimes", "bf16", "--json", str(tmp_path / "figures.json")]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *options])
    with pytest.raises(
        SystemExit, match="Nothing to measure for table 3, which has the runtimes eager, onnx, openvino"
    ):
        script.main()
    assert (tmp_path / "figures.json").read_text() == "{}"


def test_a_chart_has_the_runtimes_that_lemore_ran_in(script):
    report = json.loads((SCRIPT.parents[1] / "model_cards" / "benchmark.json").read_text())
    everywhere = script.speed_points(report)
    assert len(everywhere) == 3
    report["results"] = [
        result for result in report["results"] if (result["model"], result["runtime"]) != ("lemore", "onnx")
    ]
    without = script.speed_points(report)
    assert without == {name: models for name, models in everywhere.items() if name != script.RUNTIME_NAMES["onnx"]}


def test_figures_without_a_chart(script, monkeypatch, tmp_path, capsys):
    file, chart = SCRIPT.parents[1] / "model_cards" / "benchmark_gpu.json", tmp_path / "chart.png"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--tables", "--json", str(file), "--chart", str(chart)])
    script.main()
    assert "No chart" in capsys.readouterr().err
    assert not chart.exists()


def test_graphs_of_another_release_are_not_measured(script, monkeypatch, tmp_path):
    machine = {"versions": {"torch": "2.14"}}
    release = script.release_of(machine)
    assert release == script.release_of(machine)
    assert release != script.release_of({"versions": {"torch": "2.15"}})
    (tmp_path / "lemore_hf").mkdir()
    (tmp_path / "lemore_hf" / "__init__.py").write_text("changed = True")
    monkeypatch.setattr(script.lemore_hf, "__file__", str(tmp_path / "lemore_hf" / "__init__.py"))
    assert release != script.release_of(machine)


def test_command_line(script, tmp_path):
    file, chart = tmp_path / "results" / "benchmark.json", tmp_path / "chart.png"
    release = script.release_of(measure(Cell("machine")))
    broken = tmp_path / "work" / f"64x96-150-{release}" / "lemore" / "onnx"
    broken.mkdir(parents=True)
    (broken / "model.onnx").write_text("not a graph")
    options = ["--tables", "1", "--models", "lemore", "--runtimes", "eager", "onnx", "--batch-sizes", "1"]
    options += ["--threads", "1", "--rounds", "1", "--size", "64", "96", "--seconds", "0.01"]
    options += ["--json", str(file), "--chart", str(chart), "--work-dir", str(tmp_path / "work")]
    process = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)

    # The script goes on after what fails, and says so at its end.
    assert process.returncode == 1
    assert "Some measurements failed" in process.stderr
    assert "eager float32" in process.stdout
    assert "failed: " in process.stdout
    report = json.loads(file.read_text())
    assert report["settings"]["size"] == [64, 96]
    assert report["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert report["models"]["lemore"]["parameters"] == 1_591_374
    measured = [result for result in report["results"] if "median" in result]
    assert {result["layout"] for result in measured} == {"contiguous", "channels_last"}
    assert all(0 < result["quartiles"][0] <= result["median"] <= result["quartiles"][1] for result in measured)
    assert "error" in report["results"][-1]
    assert chart.stat().st_size > 0


def test_update_keeps_what_is_not_measured_anew(monkeypatch, tmp_path, script, capsys):
    seconds = {"eager": 0.02, "compile": 0.01}

    def fake_run_cell(cell, environment=None):
        if cell.kind == "machine":
            return {"versions": {}, "gpu": None, "processor": "any", "cores": 2, "cpu_capability": "any"}
        if cell.kind == "prepare":
            counts = {"parameters": 1, "multiply_accumulates": 1, "traffic": {str(cell.batch_size): 1}}
            return {**counts, "failed": {}}
        if cell.kind == "peaks":
            return {"macs_per_second": 1, "bytes_per_second": 1}
        return {"median": seconds[cell.runtime], "quartiles": [0.01, 0.02], "runs": 5, "peak_memory": 1}

    monkeypatch.setattr(script, "run_cell", fake_run_cell)
    monkeypatch.setattr(rounds, "run_cell", fake_run_cell)

    def measured(*options: str) -> dict[str, tuple[float, int]]:
        file = tmp_path / "benchmark.json"
        fixed = ["benchmark.py", "--quick", "--tables", "1", "--json", str(file), "--models", "lemore"]
        monkeypatch.setattr(sys, "argv", [*fixed, *options])
        script.main()
        results = [item for item in json.loads(file.read_text())["results"] if item["kind"] == "inference"]
        return {item["runtime"]: (item["median"], len(item["rounds"])) for item in results}

    assert measured("--runtimes", "eager", "compile") == {"eager": (0.02, 1), "compile": (0.01, 1)}
    seconds["eager"] = 0.5
    both = measured("--runtimes", "eager", "--update", "--rounds", "2")
    assert both == {"eager": (0.5, 2), "compile": (0.01, 1)}
    assert measured("--tables") == both  # nothing is measured, all is shown again
    assert capsys.readouterr().out.count("torch.compile float32") >= 3
    assert measured("--runtimes", "eager") == {"eager": (0.5, 1)}
    with pytest.raises(SystemExit, match="settings"):
        measured("--runtimes", "eager", "--update", "--size", "64", "64")
    with pytest.raises(SystemExit, match="settings"):
        measured("--runtimes", "eager", "--update", "--num-labels", "11")
