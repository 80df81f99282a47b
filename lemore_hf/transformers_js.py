# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""An ONNX export that `pipeline("image-segmentation", ...)` of Transformers.js takes, in browsers and in Node.js.

Transformers.js looks for graphs in `onnx/` and chooses by `config.json` what to do with them. It knows no LeMoRe, but
SegFormer, which takes and gives the same: `pixel_values` and `logits`. So this is what the two files beside the graph
call it.
"""

import json
import os
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

from .checkpointing import atomic_file
from .export import ExportManifest, export_model
from .modeling_lemore import LeMoReForSemanticSegmentation

GRAPH_FOLDER = "onnx"
"""Where Transformers.js looks for graphs."""

_NOTES = "transformers.js_config"  # in its configurations alone


def export_for_transformers_js(
    model: LeMoReForSemanticSegmentation, image_processor: Any, output_dir: str | os.PathLike, **options: Any
) -> ExportManifest:
    """
    Export a model into a folder for Transformers.js.

    Its subfolder `onnx` is an export like any other, which the rest of this package runs.

    Args:
        model ([`LeMoReForSemanticSegmentation`]): The model, of two labels or more; it is not changed.
        image_processor: The image processor it was trained with.
        output_dir (`str` or `os.PathLike`): The folder. What else is in it stays.
        options: What [`~lemore_hf.export.export_model`] takes, such as `precision`.

    Returns:
        [`ExportManifest`] of the graph.

    Raises:
        `ValueError`: for a single label, other channels than RGB's, post-processing, a `size` that Transformers.js does
            not know, a folder with the configuration of another model, and as `export_model` does.
        `ImportError`: naming the extra to install where ONNX's packages are missing.
    """
    output_dir = Path(output_dir)
    if model.config.num_labels == 1:
        raise ValueError(
            "Transformers.js takes the best of several scores for each pixel, the model has a single label: train it with "
            "two, or export it with post-processing, for ONNX Runtime alone."
        )
    if model.config.num_channels != 3:
        raise ValueError(f"Transformers.js gives RGB images, the model takes {model.config.num_channels} channels.")
    if options.get("with_postprocessing"):
        raise ValueError("Transformers.js does the post-processing itself: leave `with_postprocessing` out.")
    size = dict(image_processor.size or {})
    resizes = image_processor.do_resize and options.get("image_size") is None
    if resizes and not ("shortest_edge" in size or size.keys() >= {"height", "width"}):
        raise ValueError(
            f"Transformers.js knows no `size` such as {size}: give the model a processor with `height` and `width` or "
            "with `shortest_edge`, or name an `image_size`."
        )
    _check_configuration(output_dir / CONFIG_NAME)
    manifest = export_model(model, image_processor, output_dir / GRAPH_FOLDER, "onnx", **options)
    _write(output_dir / CONFIG_NAME, _configuration(model.config))
    _write(output_dir / IMAGE_PROCESSOR_NAME, _processor_settings(output_dir / GRAPH_FOLDER / IMAGE_PROCESSOR_NAME))
    return manifest


def _check_configuration(path: Path) -> None:
    """Refuse to replace a configuration that is not one for Transformers.js, such as a checkpoint's."""
    try:
        is_ours = not path.exists() or _NOTES in json.loads(path.read_text(encoding="utf-8"))
    except (TypeError, ValueError):  # no JSON, or a number
        is_ours = False
    if not is_ours:
        raise ValueError(f"{path} is another model's and would be lost: name a new folder.")


def _configuration(config: Any) -> dict[str, Any]:
    return {
        "model_type": "segformer",
        "architectures": ["SegformerForSemanticSegmentation"],
        "id2label": config.id2label,
        "label2id": config.label2id,
        # The file without a suffix. Whatever its weights' precision, it takes and gives float32.
        _NOTES: {"dtype": "fp32"},
    }


def _processor_settings(path: Path) -> dict[str, Any]:
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("auto_map", None)
    # Cropping and padding are for training.
    return settings | {"image_processor_type": "SegformerImageProcessor", "do_center_crop": False, "do_pad": False}


def _write(path: Path, content: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
