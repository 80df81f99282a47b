# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""A page that runs an ONNX export in a browser, on pictures, films and the camera, and a server to open it from."""

import json
import sys
from dataclasses import asdict
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .export import ExportManifest

PAGE = "index.html"
"""The page's file name, which servers send for a folder."""

_TEMPLATE = Path(__file__).with_name("browser_page.html")
_PLACE = '<script id="export" type="application/json">{}</script>'


def write_page(folder: Path, config: "PreTrainedConfig", image_processor: Any, manifest: "ExportManifest") -> None:
    """Write the page beside a graph with post-processing, for the names, colours and sizes of its model."""
    from .visualization import class_names, palette_of

    names = class_names(config)
    notes = {
        "graph": asdict(manifest),
        "processor": json.loads(image_processor.to_json_string()),
        "names": [names[number] for number in range(len(names))],
        "palette": [list(colour) for colour in palette_of(config)],
    }
    # In HTML a "<" within a name could end the script.
    filled = _PLACE.replace("{}", json.dumps(notes).replace("<", "\\u003c"))
    page = _TEMPLATE.read_text(encoding="utf-8")
    if page.count(_PLACE) != 1:
        raise RuntimeError(f"{_TEMPLATE} has no place for what the graph is: install the package again.")
    (folder / PAGE).write_text(page.replace(_PLACE, filled), encoding="utf-8")


class _Handler(SimpleHTTPRequestHandler):
    """Files of one folder, sent so that browsers give the page more than one thread.

    They share memory between threads on pages alone that are isolated from all others:
    https://developer.mozilla.org/en-US/docs/Web/API/Window/crossOriginIsolated
    """

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")  # a new export under the same name is seen at once
        super().end_headers()

    def log_message(self, *arguments: Any) -> None:
        """Nothing: a line for each file of a page helps nobody."""


class _Server(ThreadingHTTPServer):
    # On Windows a second server would take the same port unnoticed.
    allow_reuse_address = sys.platform != "win32"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing for downloads that a browser breaks off, as when a page is loaded anew."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def page_server(folder: Path, host: str = "localhost", port: int = 8000) -> ThreadingHTTPServer:
    """
    A server of an export's page, to be started with `serve_forever()`.

    Args:
        folder (`Path`): An export that was made with `browser_page=True`.
        host (`str`): Who may come: `"localhost"` this machine alone, `"0.0.0.0"` others of the network.
        port (`int`): 1 to 65535, or 0 for any that is free.

    Raises:
        `FileNotFoundError`: where the folder has no page.
        `OSError`: where the address cannot be had, naming it.
    """
    if not (folder / PAGE).is_file():
        raise FileNotFoundError(
            f"{folder} has no {PAGE}: export the model with `--format onnx --with-postprocessing --browser-page`."
        )
    try:
        return _Server((host, port), partial(_Handler, directory=folder))
    except (OSError, OverflowError) as error:
        raise OSError(f"Cannot listen at {host}:{port} ({error}): name another port, from 1 to 65535.") from error
