# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""ONNX exports in WebAssembly: onnxruntime-web, as browsers run it, labels pictures as ONNX Runtime does here."""

import re
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
RUNTIME = "onnxruntime-web@1.30.0"  # no other, so that a new release breaks nothing here
HEIGHT, WIDTH = 190, 251
# Stands in for what a browser has: a canvas of the picture's own size, and files.
BROWSER = """
import { readFileSync, writeFileSync } from "node:fs";

const [graph, picture, output] = process.argv.slice(2);
globalThis.OffscreenCanvas = class {
  getContext() {
    return { drawImage() {}, getImageData: () => ({ data: new Uint8ClampedArray(readFileSync(picture)) }) };
  }
};
"""


@pytest.fixture(scope="module")
def browser_runtime(tmp_path_factory) -> Path:
    """The README's lines beside onnxruntime-web."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("WebAssembly outside of a browser needs Node.js with npm")
    folder = tmp_path_factory.mktemp("browser")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", RUNTIME]
    installed = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```js\n(.*?)```", readme, flags=re.DOTALL)
    for there, here in (("[1200, 900]", f"[{WIDTH}, {HEIGHT}]"), ('"model.onnx"', "readFileSync(graph)")):
        assert there in lines
        lines = lines.replace(there, here)
    (folder / "segment.mjs").write_text(f"{BROWSER}{lines}writeFileSync(output, labels.data);\n", encoding="utf-8")
    return folder


def test_labels_in_webassembly_are_those_of_onnx_runtime(browser_runtime, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="needs the extra lemore-hf[onnx]")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra lemore-hf[onnx]")
    picture = draw_scene(1, (HEIGHT, WIDTH), daylight=True)[0]
    export_model(
        load_trained_model(RELEASED),
        LeMoReImageProcessor.from_pretrained(RELEASED),
        tmp_path / "export",
        "onnx",
        with_postprocessing=True,
        precision="float16",
    )
    graph = tmp_path / "export" / "model.onnx"
    assert graph.stat().st_size < 3.3e6, "as the README says"
    (tmp_path / "canvas").write_bytes(picture.convert("RGBA").tobytes())
    command = ["node", "segment.mjs", graph, tmp_path / "canvas", tmp_path / "labels"]
    done = subprocess.run(command, cwd=browser_runtime, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    (expected,) = onnxruntime.InferenceSession(graph).run(None, {"image": np.asarray(picture)[None]})
    labels = np.frombuffer((tmp_path / "labels").read_bytes(), np.uint8).reshape(expected.shape)
    assert len(np.unique(expected)) > 3
    assert (labels == expected).mean() > 0.999
