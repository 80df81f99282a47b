# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""ONNX exports in WebAssembly: onnxruntime-web labels pictures as ONNX Runtime does here, in Node.js by the README's lines,
and in Chromium by the page that the export writes and by Transformers.js."""

import base64
import contextlib
import functools
import http.server
import json
import platform
import re
import runpy
import shutil
import socket
import struct
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.image_utils import SizeDict

from lemore_hf.browser import PAGE, page_server, write_page
from lemore_hf.configuration_lemore import LeMoReConfig
from lemore_hf.data.scenes import draw_scene
from lemore_hf.evaluation import load_trained_model
from lemore_hf.export import ExportManifest, export_model
from lemore_hf.image_processing_lemore import LeMoReImageProcessor
from lemore_hf.image_processing_pil_lemore import target_size
from lemore_hf.inference import Segmenter
from lemore_hf.transformers_js import export_for_transformers_js

ROOT = Path(__file__).parents[1]
RELEASED = ROOT / "model_cards" / "lemore-camvid"
RUNTIME = "onnxruntime-web@1.30.0"  # no other, so that a new release breaks nothing here
CHROMIUM = ("@sparticuz/chromium@147.0.0", "puppeteer-core@24.43.1")
TRANSFORMERS_JS = "@huggingface/transformers@4.3.2"
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


# What a reader does with the page, and what it then shows, as JSON.
READER = """
import { writeFileSync } from "node:fs";
import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

const [address, photo, text, film, output] = process.argv.slice(2);
const browser = await puppeteer.launch({
  executablePath: await chromium.executablePath(),
  headless: "shell",
  args: ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"],
});
const page = await browser.newPage();
page.setDefaultTimeout(90000);
const says = (place, pattern) => page.waitForFunction(
  (place, pattern) => document.querySelector(place).textContent.match(pattern)?.input, {}, place, pattern,
).then(found => found.jsonValue());
const legend = () => page.$$eval("#legend li", entries => entries.map(entry => entry.textContent));
await page.goto(address);
const seen = { ready: await says("#status", "Choose") };
const file = await page.$("#file");
await page.select("#scale", "0.4");
await page.evaluate(() => {
  const status = document.querySelector("#status");
  window.said = [];
  new MutationObserver(() => said.push(status.textContent)).observe(status, { childList: true });
});
await file.uploadFile(photo);
seen.photo = await says("#status", " ms,");
seen.said = await page.evaluate(() => said);
seen.isolated = await page.evaluate(() => crossOriginIsolated);
seen.picture = await page.$eval("#picture", canvas => [canvas.width, canvas.height]);
seen.overlay = await page.$eval("#overlay", canvas => [canvas.width, canvas.height]);
seen.colours = await page.$eval("#overlay", canvas => btoa(Array.from(
  canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data, byte => String.fromCharCode(byte),
).join("")));
seen.legend = await legend();
const box = await (await page.$("#stage")).boundingBox();
await page.mouse.move(box.x + box.width / 2, box.y + box.height - 2);
seen.under_pointer = await page.$eval("#stage", stage => stage.title);
const described = (await page.accessibility.snapshot()).children.filter(({ role }) => role === "image");
seen.described = described.map(({ description }) => description);
await file.uploadFile(text);
seen.no_picture = await says("#problem", "is no picture");
for (const value of ["light", "dark"]) {
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value }]);
  seen[value] = await page.$eval("#problem", problem => getComputedStyle(problem).color);
}
await page.setViewport({ width: 320, height: 568 });
seen.width_on_a_small_phone = await page.evaluate(() => document.documentElement.scrollWidth);
seen.letters = await page.$$eval("form *", parts => parts.map(part => getComputedStyle(part).fontSize));
await page.setViewport({ width: 1280, height: 800 });
await page.select("#scale", "0.6");
seen.larger = await says("#status", "^720");
const plays = async width => {
  await page.waitForFunction(width => document.querySelector("#picture").width === width, {}, width);
  const first = await page.$eval("#picture", canvas => canvas.toDataURL());
  await page.waitForFunction(first => document.querySelector("#picture").toDataURL() !== first, {}, first);
  return legend();
};
await file.uploadFile(film);
seen.film = await plays(192);
await file.uploadFile(text);
await says("#problem", "is no picture");
await page.select("#scale", "0.4");
seen.film_at_another_size = await says("#status", "^480");
await page.click("#camera");
seen.camera = await plays(1280);
seen.end_of_the_legend = await page.$eval("#legend", legend => legend.getBoundingClientRect().bottom);
seen.button_of_the_camera = await page.$eval("#camera", button => button.textContent);
seen.videos = [await page.$$eval("video", videos => videos.length)];
await page.click("#camera");
seen.videos.push(await page.$$eval("video", videos => videos.length));
seen.dropped = await page.evaluate(async () => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 50, height: 40 });
  canvas.getContext("2d");
  const picture = await new Promise(resolve => canvas.toBlob(resolve));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([picture], "dropped.png", { type: "image/png" }));
  // Beside the page's content, which is narrower than the window.
  const dropped = new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true });
  document.documentElement.dispatchEvent(dropped);
  return dropped.defaultPrevented;
});
await page.waitForFunction(() => document.querySelector("#picture").width === 50);
writeFileSync(output, JSON.stringify(seen));
browser.process().kill("SIGKILL");
process.exit(0);
"""


# What a reader does who has a GPU, which a program stands in for.
READER_WITH_GPU = """
import { writeFileSync } from "node:fs";
import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

const [address, photo, output] = process.argv.slice(2);
const browser = await puppeteer.launch({
  executablePath: await chromium.executablePath(),
  headless: "shell",
  protocolTimeout: 300000,
  args: ["--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"],
});
const page = await browser.newPage();
page.setDefaultTimeout(300000);
const says = (place, pattern) => page.waitForFunction(
  (place, pattern) => document.querySelector(place).textContent.match(pattern)?.input, {}, place, pattern,
).then(found => found.jsonValue());
const options = name => page.$$eval(`${name} option`, options => options.map(option => option.textContent));
await page.goto(address);
await says("#status", "Choose");
await (await page.$("#file")).uploadFile(photo);
const seen = { devices: await options("#device"), scales: await options("#scale") };
for (const [device, place] of [["wasm", "thread"], ["webgpu", "WebGPU"], ["wasm", "thread"]]) {
  await page.select("#device", device);
  const status = await says("#status", `ms, .*${place}`);
  const pixels = await page.$eval("#overlay", canvas => btoa(Array.from(
    canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data, byte => String.fromCharCode(byte),
  ).join("")));
  seen[device] = { status, pixels };
}
seen.problem = await page.$eval("#problem", problem => problem.textContent);
writeFileSync(output, JSON.stringify(seen));
browser.process().kill("SIGKILL");
process.exit(0);
"""


# A page of the reader's own. Without a bundler it says itself what the names of packages stand for.
PAGE_WITH_TRANSFORMERS_JS = """<!doctype html>
<script type="importmap">{"imports": {
  "@huggingface/transformers": "/package/dist/transformers.web.min.js",
  "onnxruntime-web/webgpu": "/node_modules/onnxruntime-web/dist/ort.webgpu.min.mjs",
  "onnxruntime-common": "/node_modules/onnxruntime-common/dist/esm/index.js"
}}</script>
<script type="module">
import { env } from "@huggingface/transformers";
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "/";
env.backends.onnx.wasm.wasmPaths = "/node_modules/onnxruntime-web/dist/";
README
window.seen = segments.map(({ label, mask }) => [
  label, mask.height, mask.width, btoa(Array.from(mask.data, byte => String.fromCharCode(byte)).join("")),
]);
</script>
"""
READER_OF_THAT_PAGE = """
import { writeFileSync } from "node:fs";
import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

const [address, output] = process.argv.slice(2);
const browser = await puppeteer.launch({
  executablePath: await chromium.executablePath(), headless: "shell", args: ["--no-sandbox"],
});
const page = await browser.newPage();
page.on("pageerror", error => { console.error(error); process.exit(1); });
await page.goto(address);
const seen = await page.waitForFunction("window.seen", { timeout: 300000 });
writeFileSync(output, JSON.stringify(await seen.jsonValue()));
browser.process().kill("SIGKILL");
process.exit(0);
"""


def npm_install(folder: Path, *packages: str) -> None:
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", *packages]
    installed = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The released weights as the README has them for a browser."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra lemore-hf[onnx]")
    folder = tmp_path_factory.mktemp("exported") / "export"
    export_model(
        load_trained_model(RELEASED),
        LeMoReImageProcessor.from_pretrained(RELEASED),
        folder,
        "onnx",
        with_postprocessing=True,
        precision="float16",
        browser_page=True,
    )
    return folder


@pytest.fixture(scope="module")
def browser_runtime(tmp_path_factory) -> Path:
    """The README's lines beside onnxruntime-web."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("WebAssembly outside of a browser needs Node.js with npm")
    folder = tmp_path_factory.mktemp("browser")
    npm_install(folder, RUNTIME)
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```js\n(.*?)```", readme, flags=re.DOTALL)
    for there, here in (("[1200, 900]", f"[{WIDTH}, {HEIGHT}]"), ('"model.onnx"', "readFileSync(graph)")):
        assert there in lines
        lines = lines.replace(there, here)
    (folder / "segment.mjs").write_text(f"{BROWSER}{lines}writeFileSync(output, labels.data);\n", encoding="utf-8")
    return folder


def test_labels_in_webassembly_are_those_of_onnx_runtime(browser_runtime, exported, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra lemore-hf[onnx]")
    picture = draw_scene(1, (HEIGHT, WIDTH), daylight=True)[0]
    graph = exported / "model.onnx"
    assert graph.stat().st_size < 3.3e6, "as the README says"
    (tmp_path / "canvas").write_bytes(picture.convert("RGBA").tobytes())
    command = ["node", "segment.mjs", graph, tmp_path / "canvas", tmp_path / "labels"]
    done = subprocess.run(command, cwd=browser_runtime, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    (expected,) = onnxruntime.InferenceSession(graph).run(None, {"image": np.asarray(picture)[None]})
    labels = np.frombuffer((tmp_path / "labels").read_bytes(), np.uint8).reshape(expected.shape)
    assert len(np.unique(expected)) > 3
    assert (labels == expected).mean() > 0.999


class _OtherServer(http.server.SimpleHTTPRequestHandler):
    """Sends files as jsDelivr does: to pages of any address."""

    def end_headers(self):
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("Cross-Origin-Resource-Policy", "cross-origin")
        super().end_headers()

    def log_message(self, *arguments):
        """Nothing."""


@pytest.fixture
def other_server(browser_runtime):
    """Address of a server of onnxruntime-web, since no test asks that of the page."""
    handler = functools.partial(_OtherServer, directory=browser_runtime / "node_modules" / "onnxruntime-web")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def chromium(browser_runtime):
    """Runs a script of Node.js that has Chromium to read pages with."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("npm has this build of Chromium for Linux on x86-64 alone")
    npm_install(browser_runtime, *CHROMIUM)

    def run(script: str, *arguments: str | Path) -> None:
        (browser_runtime / "reader.mjs").write_text(script, encoding="utf-8")
        command = ["node", "reader.mjs", *arguments]
        done = subprocess.run(command, cwd=browser_runtime, capture_output=True, text=True, timeout=400)
        if "error while loading shared libraries" in done.stderr:
            pytest.skip(f"Chromium needs a library of the system: {done.stderr.strip().splitlines()[0]}")
        assert done.returncode == 0, done.stderr

    return run


def save_film(path: Path) -> None:
    av = pytest.importorskip("av", reason="needs the extra lemore-hf[video]")
    with av.open(path, "w") as container:
        stream = container.add_stream("libvpx", rate=5)
        stream.width, stream.height, stream.pix_fmt = 192, 128, "yuv420p"
        for number in range(10):
            picture = draw_scene(number, (128, 192), daylight=True)[0]
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode(None))


@contextlib.contextmanager
def served(folder: Path, runtime: str) -> Iterator[str]:
    """Address of an export's page that `scripts/serve_page.py` serves, with onnxruntime-web from elsewhere."""
    page = (folder / PAGE).read_text(encoding="utf-8")
    public = f"https://cdn.jsdelivr.net/npm/{RUNTIME}/"
    assert page.count(public) == 1
    (folder / PAGE).write_text(page.replace(public, runtime), encoding="utf-8")
    command = [sys.executable, ROOT / "scripts" / "serve_page.py", folder, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server.stdout.readline().split()[0]
        finally:
            server.terminate()


def contrast(color: str, background: tuple[int, int, int]) -> float:
    """By WCAG 2; text wants 4.5."""
    lightness = []
    for levels in (map(int, re.findall(r"\d+", color)), background):
        linear = [((level / 255 + 0.055) / 1.055) ** 2.4 if level > 10 else level / 255 / 12.92 for level in levels]
        lightness.append(float(np.dot(linear, [0.2126, 0.7152, 0.0722])) + 0.05)
    return max(lightness) / min(lightness)


def test_page_labels_a_photo_a_film_and_the_camera_in_chromium(chromium, exported, other_server, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra lemore-hf[onnx]")
    folder = shutil.copytree(exported, tmp_path / "export")
    # As a phone held upright writes them: the pixels lie on their side, and a tag says so.
    picture = draw_scene(1, (360, 480), daylight=True)[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.jpg", exif=exif, quality=100, subsampling=0)
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    save_film(tmp_path / "film.webm")

    with served(folder, other_server) as address:
        chromium(READER, address, *(tmp_path / name for name in ("photo.jpg", "text.png", "film.webm", "seen")))
    seen = json.loads((tmp_path / "seen").read_text(encoding="utf-8"))

    assert "Choose a picture" in seen["ready"]
    assert seen["isolated"], "or there is one thread, whatever the processor"
    assert re.fullmatch(r"480×360 pixels in \d+ ms, \d threads?", seen["photo"])
    assert seen["said"][0].startswith("Labelling"), "that it is at work"
    assert (seen["picture"], seen["overlay"]) == ([480, 360], [480, 360]), "upright"
    colours = np.frombuffer(base64.b64decode(seen["colours"]), np.uint8).reshape(360, 480, 4)[..., :3]
    config = LeMoReConfig.from_pretrained(RELEASED)
    distances = np.abs(colours[:, :, None].astype(int) - np.array(config.palette)).sum(-1)
    assert (distances.min(-1) == 0).all(), "no colour but the classes'"
    labels = distances.argmin(-1)
    with Image.open(tmp_path / "photo.jpg") as photo:
        upright = np.asarray(ImageOps.exif_transpose(photo))
    (expected,) = onnxruntime.InferenceSession(folder / "model.onnx").run(None, {"image": upright[None]})
    assert len(np.unique(expected)) > 3
    assert (labels == expected[0]).mean() > 0.995
    numbers, counts = np.unique(labels, return_counts=True)
    entries = [f"{config.id2label[numbers[n]]} {100 * counts[n] / labels.size:.1f} %" for n in np.argsort(-counts)]
    assert sorted(seen["legend"]) == sorted(entries)
    assert seen["legend"][0] == entries[0], "the most frequent class first"
    assert seen["under_pointer"] == config.id2label[labels[-2, 240]]
    assert len(seen["described"]) == 1
    assert entries[0] in seen["described"][0], "the picture's classes, for those who hear the page"
    assert "text.png" in seen["no_picture"]
    assert contrast(seen["light"], (255, 255, 255)) > 4.5
    assert contrast(seen["dark"], (18, 18, 18)) > 4.5, "on the grey that Chromium has"
    assert seen["width_on_a_small_phone"] <= 320
    assert set(seen["letters"]) == {"16px"}, "or iPhones enlarge the page at every choice"
    assert seen["larger"].startswith("720×540")
    assert seen["film"], "the classes in its frames"
    assert seen["film_at_another_size"].startswith("480×360")
    assert seen["end_of_the_legend"] <= 800, "in a laptop's window without scrolling"
    assert seen["camera"], "the classes in what the camera shows"
    assert seen["button_of_the_camera"] == "Stop the camera"
    assert seen["videos"] == [1, 0], "of the camera alone, and none once it is stopped"
    assert seen["dropped"], "or the browser would leave the page for the picture"


def test_page_runs_the_network_on_a_gpu_if_asked_to(chromium, other_server, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra lemore-hf[onnx]")
    height, width = size = (96, 128)
    model, processor = load_trained_model(RELEASED), LeMoReImageProcessor.from_pretrained(RELEASED)
    options = {"with_postprocessing": True, "image_size": size, "browser_page": True}
    export_model(model, processor, tmp_path / "export", "onnx", **options)
    picture = draw_scene(1, size, daylight=True)[0]
    picture.save(tmp_path / "photo.png")
    with served(tmp_path / "export", other_server) as address:
        chromium(READER_WITH_GPU, address, tmp_path / "photo.png", tmp_path / "seen")
    seen = json.loads((tmp_path / "seen").read_text(encoding="utf-8"))

    assert seen["devices"] == ["the processor", "the GPU (WebGPU)"]
    assert seen["scales"] == ["100 %"], "the one size of this graph"
    assert seen["problem"] == ""
    assert re.fullmatch(r"128×96 pixels in \d+ ms, WebGPU", seen["webgpu"]["status"])
    palette = np.array(model.config.palette)
    expected = palette[Segmenter(tmp_path / "export")(picture)]
    assert len(np.unique(expected.reshape(-1, 3), axis=0)) > 3
    for device in ("wasm", "webgpu"):
        pixels = np.frombuffer(base64.b64decode(seen[device]["pixels"]), np.uint8).reshape(height, width, 4)
        assert (pixels[..., :3] == expected).all(-1).mean() > 0.995, device


def test_transformers_js_labels_a_picture_by_its_pipeline(chromium, browser_runtime, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra lemore-hf[onnx]")
    model, processor = load_trained_model(RELEASED), LeMoReImageProcessor.from_pretrained(RELEASED)
    options = {"precision": "float16", "image_size": (HEIGHT, WIDTH)}  # sooner made than a graph of any size
    export_for_transformers_js(model, processor, browser_runtime / "EXPORT", **options)
    picture = draw_scene(1, (HEIGHT, WIDTH), daylight=True)[0]
    picture.save(browser_runtime / "street.png")
    packed = subprocess.run(
        ["npm", "pack", "--silent", TRANSFORMERS_JS], cwd=browser_runtime, capture_output=True, text=True
    )
    assert packed.returncode == 0, packed.stderr
    shutil.unpack_archive(browser_runtime / packed.stdout.strip(), browser_runtime)
    (lines,) = re.findall(
        r"```javascript\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    for there, here in (('"NAME"', '"EXPORT"'), ('"street.jpg"', '"/street.png"')):
        assert there in lines
        lines = lines.replace(there, here)
    page = PAGE_WITH_TRANSFORMERS_JS.replace("README", lines)
    (browser_runtime / "own.html").write_text(page, encoding="utf-8")

    handler = functools.partial(_OtherServer, directory=browser_runtime)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        chromium(READER_OF_THAT_PAGE, f"http://127.0.0.1:{server.server_port}/own.html", tmp_path / "seen")
        server.shutdown()
    segments = json.loads((tmp_path / "seen").read_text(encoding="utf-8"))

    segmenter = Segmenter(browser_runtime / "EXPORT" / "onnx")
    expected = segmenter(picture)
    labels = np.full_like(expected, -1)
    for name, height, width, mask in segments:
        inside = np.frombuffer(base64.b64decode(mask), np.uint8).reshape(height, width) > 0
        labels[inside] = segmenter.config.label2id[name]
    assert {name for name, *_ in segments} == {segmenter.config.id2label[label] for label in np.unique(expected)}
    assert len(segments) > 3
    assert (labels == expected).mean() > 0.999


def notes_of(page: str) -> dict:
    """What the page knows of its graph."""
    (notes,) = re.findall(r'<script id="export" type="application/json">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(notes)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_page_holds_names_and_colours_whatever_they_are(tmp_path, num_labels):
    hostile = "</script><b>\"'&amp; \u2028 ж"
    config = LeMoReConfig(num_labels=num_labels, id2label=dict(enumerate([hostile, "b", "c"][:num_labels])))
    write_page(
        tmp_path, config, LeMoReImageProcessor(size={"shortest_edge": 64}), ExportManifest("onnx", "model.onnx")
    )
    notes = notes_of((tmp_path / PAGE).read_text(encoding="utf-8"))
    assert notes["names"] == (["background", hostile] if num_labels == 1 else [hostile, "b", "c"])
    assert len({tuple(colour) for colour in notes["palette"]}) == len(notes["names"])
    assert notes["processor"]["size"] == {"shortest_edge": 64}
    assert notes["graph"]["file"] == "model.onnx"


def test_page_has_the_colours_of_the_configuration(tmp_path):
    config = LeMoReConfig.from_pretrained(RELEASED)
    write_page(tmp_path, config, LeMoReImageProcessor(), ExportManifest("onnx", "model.onnx"))
    assert notes_of((tmp_path / PAGE).read_text(encoding="utf-8"))["palette"] == [list(c) for c in config.palette]


@pytest.mark.parametrize(
    "size",
    [
        {"height": 90, "width": 120},
        {"shortest_edge": 90},
        {"shortest_edge": 90, "longest_edge": 120},
        {"max_height": 90, "max_width": 120},
    ],
    ids=str,
)
def test_page_brings_pictures_to_the_size_that_the_processor_does(size, browser_runtime):
    page = (ROOT / "lemore_hf" / "browser_page.html").read_text(encoding="utf-8")
    (function,) = re.findall(r"^function inputSize\(.*?^}\n", page, flags=re.DOTALL | re.MULTILINE)
    heights_and_widths = [(90, 120), (120, 90), (1080, 1920), (1920, 1080), (333, 500), (61, 97), (400, 401)]
    notes = {"processor": {"do_resize": True, "size": size}, "graph": {"min_size": 32}, "scale": {"value": 1}}
    names = f"const {{ processor, graph, scale }} = {json.dumps(notes)};"
    answer = f"{json.dumps(heights_and_widths)}.map(([height, width]) => inputSize(width, height).reverse())"
    command = ["node", "-e", f"{names}\n{function}\nconsole.log(JSON.stringify({answer}))"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [target_size(pair, SizeDict(**size)) for pair in heights_and_widths]
    assert json.loads(done.stdout) == [[pair.height, pair.width] for pair in expected]


@pytest.mark.parametrize(("export_format", "with_postprocessing"), [("onnx", False), ("openvino", True)])
def test_page_is_for_graphs_that_it_can_run(tmp_path, export_format, with_postprocessing):
    with pytest.raises(ValueError, match="'onnx' with post-processing"):
        export_model(
            load_trained_model(RELEASED),
            LeMoReImageProcessor.from_pretrained(RELEASED),
            tmp_path / "export",
            export_format,
            with_postprocessing=with_postprocessing,
            browser_page=True,
        )
    assert not (tmp_path / "export").exists()


def test_server_says_what_it_lacks(tmp_path):
    with pytest.raises(FileNotFoundError, match="--browser-page"):
        page_server(tmp_path)
    (tmp_path / PAGE).write_text("page", encoding="utf-8")
    with page_server(tmp_path, port=0) as server, pytest.raises(OSError, match=f"localhost:{server.server_port}"):
        page_server(tmp_path, port=server.server_port)
    with pytest.raises(OSError, match="from 1 to 65535"):
        page_server(tmp_path, port=70000)


SERVE = [sys.executable, str(ROOT / "scripts" / "serve_page.py")]


@pytest.mark.parametrize("host", [None, "0.0.0.0"])
def test_server_sends_one_folder_to_those_who_may_come(host, tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / PAGE).write_text("page", encoding="utf-8")
    options = ["--port", "0"] + (["--host", host] if host else [])
    with subprocess.Popen([*SERVE, folder, *options], stdout=subprocess.PIPE, text=True, cwd=tmp_path) as server:
        try:
            address = urllib.parse.urlsplit(server.stdout.readline().split()[0])
            assert address.hostname == (socket.gethostname().lower() if host else "localhost"), "which others can open"
            with urllib.request.urlopen(f"http://127.0.0.1:{address.port}/") as answer:
                assert answer.read() == b"page"
            isolated = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
            assert isolated.items() <= dict(answer.headers).items(), "or browsers run one thread"
            assert answer.headers["Cache-Control"] == "no-cache", "or a new export goes unseen"
            if (
                sys.platform == "linux"
            ):  # where this machine has other addresses, one of which stands for its network's
                reached = (
                    contextlib.nullcontext() if host else pytest.raises(OSError, match=r"refused|timed out|route")
                )
                with reached, socket.create_connection(("127.0.0.2", address.port), timeout=5):
                    pass
        finally:
            server.terminate()


def test_server_s_command_line_says_in_one_line_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [*SERVE[1:], str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^FileNotFoundError: .* has no index\.html: export .*--browser-page`\.$"):
        runpy.run_path(SERVE[1], run_name="__main__")


def test_server_says_nothing_of_downloads_that_are_broken_off(tmp_path, capfd):
    """As when a page is loaded anew."""
    (tmp_path / PAGE).write_text("page", encoding="utf-8")
    (tmp_path / "model.onnx").write_bytes(bytes(2**25))  # more than the system sends ahead
    with page_server(tmp_path, port=0) as server:
        assert server.server_address[0] == "127.0.0.1", "for this machine alone, unless another host is asked for"
        server.daemon_threads = False  # so that its end waits for theirs
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with socket.create_connection(server.server_address) as browser:
            browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            browser.sendall(b"GET /model.onnx HTTP/1.0\r\n\r\n")
            browser.recv(100)
        server.shutdown()
    assert capfd.readouterr().err == ""
