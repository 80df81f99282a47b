# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""The README's own lines, and those of the pages that it sends its readers to: its Python runs, its options exist, links
lead somewhere, tables are what scripts print."""

import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import pipeline

from lemore_hf import LeMoReForSemanticSegmentation, LeMoReImageProcessor
from lemore_hf.benchmarking.report import best_layouts
from lemore_hf.data import scenes
from lemore_hf.data.recipes import load_recipe
from lemore_hf.export import export_model

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    *(ROOT / "model_cards" / f"{name}.md" for name in ("camvid_results", "complexity", "speed")),
]
TEXT = "\n\n".join(page.read_text(encoding="utf-8") for page in PAGES)
RELEASED = ROOT / "model_cards" / "lemore-camvid"


def blocks(language: str, section: str = "") -> list[str]:
    """The fenced blocks of a language below a heading, or in all of the README."""
    text = README.split(f"\n{section}\n", 1)[1].split("\n## ")[0] if section else README
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """The words behind `python` of each line that starts a script."""
    lines = (line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines())
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line[:1] == ["python"] and line[1].startswith("scripts/")]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with a photo and the models that the README names."""
    scenes.draw_scene(3, (90, 120), daylight=True)[0].save(tmp_path / "street.jpg")
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    (tmp_path / "outputs" / "quickstart").mkdir(parents=True)
    (tmp_path / "outputs" / "quickstart" / "model").symlink_to(RELEASED)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_first_lines_segment_a_picture(place):
    found = {}
    exec(blocks("python")[0], found)
    assert {segment["label"] for segment in found["segments"]} <= set(load_recipe("camvid").class_names)
    assert all(segment["mask"].size == (120, 90) for segment in found["segments"])


def test_the_lines_for_use_give_an_overlay_and_a_label_map(place):
    found = {}
    for block in blocks("python", "## Use"):
        exec(block, found)
    assert (place / "overlay.png").is_file()
    assert found["labels"].shape == (90, 120)
    assert 0 <= found["labels"].min() <= found["labels"].max() < 11
    (block,) = blocks("python", "### Speed")
    exec(block, found)
    assert found["fused"].config.is_fused


def test_the_lines_for_a_program_of_ones_own_give_a_label_map(place):
    block, *_ = blocks("python", "## Export")
    threads, found = torch.get_num_threads(), {}
    try:
        exec(block, found)
    finally:
        torch.set_num_threads(threads)
    assert found["labels"].shape == (90, 120)
    assert len(np.unique(found["labels"])) > 1


def test_the_lines_for_onnx_runtime_give_a_label_map(place):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra lemore-hf[onnx]")
    model = LeMoReForSemanticSegmentation.from_pretrained("model_cards/lemore-camvid")
    processor = LeMoReImageProcessor.from_pretrained("model_cards/lemore-camvid")
    export_model(model, processor, "EXPORT", "onnx", with_postprocessing=True)
    _, block, _ = blocks("python", "## Export")
    found = {}
    exec(block, found)
    assert found["labels"].shape == (1, 900, 1200)
    assert found["labels"].dtype == np.uint8
    assert len(np.unique(found["labels"])) > 1


def test_the_lines_for_litert_give_a_label_map(place):
    for package in ("litert_torch", "ai_edge_litert"):
        pytest.importorskip(package, reason="needs the extra lemore-hf[litert]")
    model = LeMoReForSemanticSegmentation.from_pretrained("model_cards/lemore-camvid")
    processor = LeMoReImageProcessor.from_pretrained("model_cards/lemore-camvid")
    export_model(model, processor, "EXPORT", "litert", with_postprocessing=True, image_size=(360, 480))
    assert f"{Path('EXPORT/model.tflite').stat().st_size / 1e6:.1f} MB with the CamVid weights" in README
    *_, block = blocks("python", "## Export")
    found = {"frame": np.asarray(Image.open("street.jpg").resize((480, 360)))}
    exec(block, found)
    assert found["labels"].shape == (360, 480)
    assert found["labels"].dtype == np.uint8
    assert len(np.unique(found["labels"])) > 1


def test_the_lines_for_fine_tuning_leave_a_model(place, monkeypatch):
    few = scenes.load_scenes(8, 2, 0, size=(64, 96))
    monkeypatch.setattr(scenes, "load_scenes", lambda: few)
    (block,) = blocks("python", "## Fine-tune")
    exec(block, {})
    segments = pipeline("image-segmentation", model=str(place / "outputs" / "tuned" / "final"))("street.jpg")
    assert {segment["label"] for segment in segments} <= set(scenes.CLASS_NAMES)


def test_the_lines_for_labels_in_json_draw_masks(place):
    (place / "DIR").mkdir()
    coco = {
        "images": [{"id": 4, "file_name": "images/a b.jpg", "width": 8, "height": 6}],
        "categories": [{"id": 3, "name": "road"}, {"id": 7, "name": "car"}],
        "annotations": [
            {"image_id": 4, "category_id": 3, "segmentation": [[0, 0, 3, 0, 3, 5, 0, 5]]},
            {"image_id": 4, "category_id": 7, "segmentation": [[0, 0, 1, 0, 1, 1, 0, 1], [6, 0, 7, 0, 7, 5, 6, 5]]},
        ],
    }
    (place / "DIR" / "annotations.json").write_text(json.dumps(coco))
    exec(blocks("python", "#### Labels in JSON")[0], {})
    mask = np.asarray(Image.open(place / "DIR" / "masks" / "a b.png"))
    expected = np.tile([1, 1, 1, 1, 0, 0, 2, 2], (6, 1))
    expected[:2, :2] = 2
    np.testing.assert_array_equal(mask, expected)
    assert load_recipe("folder", data_dir="DIR").class_names == ("background", "road", "car")


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_options_exist(words, monkeypatch):
    script = ROOT / words[0]
    monkeypatch.setattr(sys, "argv", words)
    parse = runpy.run_path(str(script))["parse_arguments"]
    assert parse(), "argparse ends the process where it does not know an option"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    own = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", own) if "://" not in link]
    assert len(links) > (5 if path.name == "README.md" else 0)
    assert not [link for link in links if not (path.parent / link.split("#")[0]).exists()]
    anchors = [link.split("#") for link in links if "#" in link]
    assert anchors or path.name != "README.md"
    for page, anchor in anchors:
        text = (path.parent / page).read_text(encoding="utf-8") if page else own
        titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}  # as GitHub makes them
        assert anchor in slugs


def test_the_scores_are_the_card_s():
    card = ModelCard.load(RELEASED / "README.md").text
    ious = [float(value) for value in re.findall(r"^\| (?:mean IoU|[a-z ]+) \| (\d+\.\d+) \|$", card, re.MULTILINE)]
    (row,) = re.findall(r"^\| mean IoU \| sky \| building \| pole .*\n\| -.*\n\| (.*) \|$", README, re.MULTILINE)
    (mean, *classes) = map(float, row.split(" | "))
    assert mean == pytest.approx(ious[0], abs=0.051)
    assert classes == pytest.approx(ious[-11:], abs=0.051)


def table_rows(text: str) -> dict[str, list[str]]:
    """The rows of Markdown tables by their first cell, which is plain text."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


@pytest.mark.parametrize(
    ("table", "seeds", "others", "columns"),
    [
        (
            "camvid_100_epochs.md",
            {
                "LeMoRe": "LeMoRe",
                "LeMoRe, by Muon": "LeMoRe, by Muon",
                "LeMoRe, by Muon at twice the rate": "LeMoRe, by Muon at twice the rate",
                "LeMoRe, then enlarged": "then enlarged",
                "LeMoRe, then enlarged, by Muon": "then enlarged, by Muon",
                "LeMoRe, then mixed": "then mixed",
                "LeMoRe, then mixed in two halves, by Muon": "then mixed again, by Muon",
                "LeMoRe, then larger": "then larger",
            },
            {
                "LeMoRe, transverse view alone, no attention": "transverse view alone, no attention",
                "LR-ASPP MobileNetV3-Large": "LR-ASPP MobileNetV3-Large",
            },
            [-1],
        ),
        (
            "camvid_ablation.md",
            {"LeMoRe": "T F L CA NA"},
            {
                "LeMoRe, transverse view alone, no attention": "T",
                "LR-ASPP MobileNetV3-Large": "LR-ASPP MobileNetV3-Large",
                "SegFormer-B0": "SegFormer-B0",
                "MobileViTV2-DeepLabV3": "MobileViTV2 DeepLabV3",
            },
            [-3, -2],
        ),
    ],
)
def test_the_results_of_one_recipe_are_their_table_s(table, seeds, others, columns):
    kept = (ROOT / "model_cards" / table).read_text(encoding="utf-8")
    shown = table_rows(TEXT.split(f"({table})", 1)[1].split("\n\n", 2)[1])
    known = table_rows(kept)
    assert shown.keys() == {"", "---", *seeds, *others}
    for name, variant in (seeds | others).items():
        parameters, operations, *scores = shown[name]
        assert parameters == f"{int(known[variant][1].replace(',', '')) / 1e6:.1f} M"
        assert float(operations.replace(" ", "")) == pytest.approx(float(known[variant][2].replace(",", "")), abs=0.51)
        if name in others:
            expected = [float(known[variant][column]) for column in columns]
            assert [float(score) for score in scores] == pytest.approx(expected, abs=0.051)
            continue
        (summary,) = re.findall(rf"^{variant}, mean and standard deviation: (.*)\.$", kept, re.MULTILINE)
        expected = re.findall(r"(\d+\.\d+) ± (\d+\.\d+) \(3 seeds\)", summary)
        for score, spread in zip(scores, expected, strict=True):
            assert list(map(float, score.split(" ± "))) == pytest.approx(list(map(float, spread)), abs=0.051)


def test_means_of_seeds_in_the_text_are_the_tables():
    results = (ROOT / "model_cards" / "camvid_results.md").read_text(encoding="utf-8")
    means = re.findall(r"\d+\.\d ± \d\.\d", " ".join(README.split()))
    assert len(means) > 3
    assert not [mean for mean in means if f"| {mean} |" not in results]


SPEED_MODELS = {
    "LeMoRe": "lemore",
    "LeMoRe itself, ms": "lemore",
    "LeMoRe, not fused": "lemore-not-fused",
    "SegFormer-B0": "segformer-b0",
    "MobileNetV2-DeepLabV3": "mobilenetv2-deeplabv3",
    "MobileViTV2-DeepLabV3": "mobilevitv2-deeplabv3",
    "LR-ASPP MobileNetV3-Large, full-size logits as in torchvision": "lraspp-mobilenet-v3-large-full",
    "LR-ASPP MobileNetV3-Large, logits at stride 8": "lraspp-mobilenet-v3-large",
}
SPEED_RUNTIMES = {"eager": "eager", "ONNX Runtime": "onnx", "OpenVINO": "openvino"}


def fastest(file: str) -> dict[tuple, float]:
    """A benchmark's seconds, in the better layout, by table, runtime, images at once, threads, height, width and model."""
    report = json.loads((ROOT / "model_cards" / file).read_text())
    seconds = {}
    for result in best_layouts(result for result in report["results"] if "median" in result):
        kind, runtime, *place = (
            result[name] for name in ("kind", "runtime", "batch_size", "threads", "height", "width")
        )
        runtime = "-".join(filter(None, (kind, runtime))) if kind == "training" else runtime
        seconds[(result["table"], runtime, *place, result["model"])] = result["median"]
    return seconds


def check_figures(header: str, expected: Callable[[str, int], float], first: int = 0) -> None:
    """The figures of the one table with a header that begins so, by row and column from `first` on, to the digits that it
    shows."""
    (text,) = TEXT.split(header)[1:]
    rows = table_rows(header + text.split("\n\n", 1)[0])
    cells = [(name, *cell) for name, row in list(rows.items())[2:] for cell in enumerate(row[first:]) if cell[1]]
    assert len(cells) > 7
    for name, column, cell in cells:
        digits = len(cell.partition(".")[2])
        assert float(cell.replace(" ", "")) == pytest.approx(expected(name, column), abs=0.51 * 0.1**digits), name


@pytest.mark.parametrize(
    ("header", "settings"),
    [
        (
            "| × LeMoRe | eager float32 |",
            [
                *((name, 1, 2) for name in ("eager", "bf16", "onnx", "openvino", "onnx-int8", "openvino-int8")),
                ("training", 8, 2),
                ("training-one-loss", 8, 2),
            ],
        ),
        (
            "| × LeMoRe | `torch.compile` |",
            [("compile", 1, 2), *((name, *place) for place in ((1, 1), (8, 2)) for name in SPEED_RUNTIMES.values())],
        ),
    ],
)
def test_times_beside_other_networks_are_the_benchmark_s(header, settings):
    seconds = fastest("benchmark.json")

    def expected(name: str, column: int) -> float:
        own, other = (seconds[(1, *settings[column], 512, 512, model)] for model in ("lemore", SPEED_MODELS[name]))
        return 1e3 * own if name.endswith("ms") else other / own

    check_figures(header, expected)


def test_times_by_size_are_the_benchmark_s():
    header = "| pixels | 256×256 |"
    (line,) = [line for line in TEXT.splitlines() if line.startswith(header)]
    sizes = [tuple(map(int, cell.split("×"))) for cell in line.strip("|").split("|")[1:]]
    seconds = fastest("benchmark.json")
    check_figures(
        header,
        lambda name, column: 1e3 * seconds[(3, SPEED_RUNTIMES[name], 1, 2, *sizes[column], "lemore")],
    )


def test_times_of_the_released_network_are_the_benchmark_s():
    seconds = fastest("benchmark_camvid.json")

    def expected(name: str, column: int) -> float:
        size = tuple(map(int, name.partition(",")[0].split("×")))
        return 1e3 * seconds[(3, list(SPEED_RUNTIMES.values())[column], 1, 2, *size, "lemore")]

    header = "| network input, rows × columns | M MACs | test mean IoU | eager, ms | ONNX Runtime | OpenVINO |"
    check_figures(header, expected, first=2)
    report = json.loads((ROOT / "model_cards" / "benchmark_camvid.json").read_text())
    assert report["settings"]["num_labels"] == 11


def test_speeds_on_a_gpu_are_the_benchmark_s():
    seconds = fastest("benchmark_gpu.json")
    check_figures(
        "| images/s | one at a time |",
        lambda name, column: (
            (1, 8)[column] / seconds[(1, "cuda-bfloat16", (1, 8)[column], 1, 512, 512, SPEED_MODELS[name])]
        ),
    )


def test_the_counts_are_what_the_script_prints():
    complexity = runpy.run_path(str(ROOT / "scripts" / "complexity.py"))
    for table in ("ablation_table", "input_size_table"):
        assert complexity["render"](complexity[table](), markdown=True) in TEXT, "run scripts/complexity.py --markdown"


def test_figures_of_litert_are_those_that_were_measured():
    results = json.loads((ROOT / "model_cards" / "benchmark_litert.json").read_text())["results"]
    seconds = {
        (result["model"], result["runtime"]): result["median"]
        for result in results
        if result["kind"] == "inference" and result["threads"] == 2
    }
    text = " ".join(TEXT.split("There, in LiteRT", 1)[1].split("(two rounds", 1)[0].split())
    said = {
        "segformer-b0": r"SegFormer-B0 took (\S+) times as long as LeMoRe's \S+ ms in float32 and (\S+) times",
        "lraspp-mobilenet-v3-large": r"LR-ASPP with logits at stride 8 (\S+) and (\S+) times",
        "mobilenetv2-deeplabv3": r"MobileNetV2-DeepLabV3 (\S+) and (\S+) times",
    }
    for model, pattern in said.items():
        ratios = [seconds[model, runtime] / seconds["lemore", runtime] for runtime in ("litert", "litert-int8")]
        assert list(map(float, re.search(pattern, text).groups())) == pytest.approx(ratios, abs=0.051)
    own = [1e3 * seconds["lemore", runtime] for runtime in ("litert", "litert-int8")]
    assert list(map(float, re.findall(r"(\S+) ms in", text))) == pytest.approx(own, abs=0.051)
