# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Serve the page of an export, which labels pictures, films and the camera in a browser.

    python scripts/export.py --model CHECKPOINT --format onnx --with-postprocessing --fp16 --browser-page --output DIR
    python scripts/serve_page.py DIR

The network runs in the browser, on as many threads as it gives; nothing is sent back. The page itself loads onnxruntime-web
from jsDelivr. Any web server will do; browsers run one thread where it does not send the headers that isolate a page, or
sends them to another machine without https.
"""

import argparse
import contextlib
import socket
from pathlib import Path

from lemore_hf.browser import page_server
from lemore_hf.command_line import run_script


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an export made with --browser-page")
    parser.add_argument(
        "--host",
        default="localhost",
        help="0.0.0.0 lets other machines in; browsers give the camera and several threads to localhost alone",
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    with page_server(arguments.folder, arguments.host, arguments.port) as server:
        host = socket.gethostname() if arguments.host == "0.0.0.0" else arguments.host
        print(f"http://{host}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # the way to end it
            server.serve_forever()


if __name__ == "__main__":
    run_script(main)
