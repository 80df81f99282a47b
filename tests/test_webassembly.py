# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""ONNX exports in WebAssembly: onnxruntime-web, as browsers run it, labels pictures as ONNX Runtime does here."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from lemore_hf.data.scenes import draw_scene
from lemore_hf.evaluation import load_trained_model
from lemore_hf.export import export_model
from lemore_hf.image_processing_lemore import LeMoReImageProcessor

RELEASED = Path(__file__).parents[1] / "model_cards" / "lemore-camvid"
# README's lines for a browser, with files in place of a canvas.
SCRIPT = """
import * as ort from "onnxruntime-web";
import { readFileSync, writeFileSync } from "node:fs";

const [model, pictures, shape, output] = process.argv.slice(2);
const session = await ort.InferenceSession.create(readFileSync(model));
const image = new ort.Tensor("uint8", new Uint8Array(readFileSync(pictures)), shape.split(",").map(Number));
const { labels } = await session.run({ image });
writeFileSync(output, labels.data);
"""


@pytest.fixture(scope="module")
def browser_runtime(tmp_path_factory) -> Path:
    """The script beside onnxruntime-web."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("WebAssembly outside of a browser needs Node.js with npm")
    folder = tmp_path_factory.mktemp("browser")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "onnxruntime-web@1"]
    installed = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr
    (folder / "segment.mjs").write_text(SCRIPT, encoding="utf-8")
    return folder


def test_labels_in_webassembly_are_those_of_onnx_runtime(browser_runtime, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="needs the extra lemore-hf[onnx]")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra lemore-hf[onnx]")
    pictures = [draw_scene(seed, (190, 251), daylight=True)[0] for seed in (1, 2)]
    export_model(
        load_trained_model(RELEASED),
        LeMoReImageProcessor.from_pretrained(RELEASED),
        tmp_path / "export",
        "onnx",
        with_postprocessing=True,
        precision="float16",
    )
    graph = tmp_path / "export" / "model.onnx"
    images = np.stack([np.asarray(picture) for picture in pictures])
    (tmp_path / "pictures").write_bytes(images.tobytes())
    shape = ",".join(map(str, images.shape))
    command = ["node", "segment.mjs", graph, tmp_path / "pictures", shape, tmp_path / "labels"]
    done = subprocess.run(command, cwd=browser_runtime, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    (expected,) = onnxruntime.InferenceSession(graph).run(None, {"image": images})
    labels = np.frombuffer((tmp_path / "labels").read_bytes(), np.uint8).reshape(expected.shape)
    assert len(np.unique(expected)) > 3
    assert (labels == expected).mean() > 0.999
