# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""What is written before anything is measured: the graphs of the runtimes other than PyTorch, and the picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..checkpointing import atomic_folder
from ..data.scenes import draw_scene
from ..export import FILES, export_model, litert_graph, quantize_litert, quantize_onnx, quantize_openvino, quietly
from ..image_processing_lemore import LeMoReImageProcessor
from .cell import Cell
from .models import count, random_model

if TYPE_CHECKING:
    import onnx_ir

PICTURE_SIZE = (1080, 1920)
NUM_CALIBRATION_IMAGES = 8


def prepare(cell: Cell) -> dict[str, Any]:
    """
    Write what the other cells read, below `cell.folder`: the picture, and the graphs that `cell.runtime` names
    (separated by commas), unless they are there.

    Returns:
        What `count` counts, and under `failed` by runtime why its graph could not be made.
    """
    folder = Path(cell.folder)
    failed: dict[str, dict[str, str]] = {}
    for runtime in filter(None, cell.runtime.split(",")):
        target = folder / cell.model / runtime
        if target.is_dir() and any(target.iterdir()):
            continue
        try:
            _export(cell, runtime, target)
        except ModuleNotFoundError as error:
            failed[runtime] = {"not_installed": error.name or str(error)}
        except Exception as error:
            failed[runtime] = {"error": f"{type(error).__name__}: {error}"}
    return {**count(cell.model, cell.size, [1, cell.batch_size], cell.num_labels), "failed": failed}


def draw_picture(folder: Path) -> None:
    """Write the picture of the second table, `picture.jpg`: a street scene of 1920×1080 pixels with the grain of a
    photograph; and its label map, `labels.png`."""
    height, width = PICTURE_SIZE
    image, label_map = draw_scene(0, (height // 2, width // 2))
    grain = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)) + grain
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "picture.jpg", quality=90)
    label_map.save(folder / "labels.png")


def _export(cell: Cell, runtime: str, target: Path) -> None:
    export_format, _, precision = runtime.partition("-")
    images = _calibration_images(cell) if precision == "int8" else []
    model = random_model(cell.model, cell.num_labels).eval()
    if cell.model == "lemore":
        size = {"height": cell.height, "width": cell.width}
        export_model(
            model,
            LeMoReImageProcessor(size=size),
            target,
            export_format,
            precision=precision or "float32",
            calibration_images=images,
        )
        return
    with atomic_folder(target) as folder, quietly():  # half a graph would be taken for one the next time
        _export_peer(model, cell, folder, export_format, images)


def _export_peer(model: nn.Module, cell: Cell, target: Path, export_format: str, images: list[Image.Image]) -> None:
    """As LeMoRe's own export goes, with the same quantizers. Only the batch size is left free, but in LiteRT."""
    processor = LeMoReImageProcessor(size={"height": cell.height, "width": cell.width})
    feeds = [{"pixel_values": processor(image, return_tensors="np")["pixel_values"]} for image in images]
    file = target / FILES[export_format]
    if export_format == "litert":
        graph = litert_graph(model, {"pixel_values": torch.zeros(1, 3, *cell.size)})
        file.write_bytes(quantize_litert(graph, "int8", feeds) if feeds else graph)
        return
    import onnx_ir

    graph = _onnx_graph(model, cell.size)
    if export_format == "onnx":
        onnx_ir.save(quantize_onnx(graph, feeds) if feeds else graph, file)
        return
    import openvino

    onnx_ir.save(graph, target / "model.onnx")
    network = openvino.convert_model(target / "model.onnx")
    (target / "model.onnx").unlink()
    network = quantize_openvino(network, feeds) if feeds else network
    openvino.save_model(network, file, compress_to_fp16=False)


def _onnx_graph(model: nn.Module, size: tuple[int, int]) -> "onnx_ir.Model":
    program = torch.onnx.export(
        model,
        kwargs={"pixel_values": torch.zeros(2, 3, *size)},
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        dynamo=True,
        verbose=False,
    )
    return program.model


def _calibration_images(cell: Cell) -> list[Image.Image]:
    return [draw_scene(seed, cell.size)[0] for seed in range(NUM_CALIBRATION_IMAGES)]
