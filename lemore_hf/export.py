# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Export to ONNX, OpenVINO, ExecuTorch and `torch.export`, one graph for every batch size, height and width, and to
LiteRT (TensorFlow Lite), one graph for one size.

The graphs come from `transformers.exporters` and `litert_torch`. This file adds what is LeMoRe's own: forms of three
parts that do not depend on the size they are traced at, post-processing inside the graph, int8 and fp16, and the class
names and image processor settings that travel with the files. `lemore_hf.inference` runs the results.
"""

import contextlib
import copy
import importlib.util
import itertools
import json
import logging
import math
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import nn
from transformers.exporters.utils import apply_patches, register_patch
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

from .browser import PAGE, write_page
from .checkpointing import CheckpointError, atomic_folder
from .hardware import usable_cores
from .modeling_lemore import (
    MINIMUM_SIZE,
    LeMoReAxisView,
    LeMoReCartesianEncoder,
    LeMoReDecodeHead,
    LeMoReForSemanticSegmentation,
    LeMoReTokenPyramid,
)
from .operations_lemore import resize_bilinear, tent_filter

if TYPE_CHECKING:
    import onnx_ir
    import openvino

MANIFEST = "lemore_export.json"
"""What an export folder holds, written beside the graph; see [`ExportManifest`]."""

FILES = {
    "onnx": "model.onnx",
    "openvino": "openvino_model.xml",
    "executorch": "model.pte",
    "torch": "model.pt2",
    "litert": "model.tflite",
}
"""The graph's file name by format."""

GRAPH_FILES = frozenset([*FILES.values(), "model.onnx.data", "openvino_model.bin"])
"""Names of all files that graphs consist of."""

_REQUIREMENTS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "executorch": ("executorch",),
    "torch": (),
    "litert": ("litert_torch",),
}
_QUANTIZERS = {
    ("openvino", "int8"): ("nncf",),
    ("litert", "int8"): ("ai_edge_quantizer", "ai_edge_litert"),
    ("litert", "float16"): ("ai_edge_quantizer",),
}
_OF_ONE_SIZE = ("onnx", "openvino", "litert")  # formats that have graphs of one size
_ANY_LENGTH = 2**31  # of a constant
_CANDIDATES = 16  # classes of a cell that may be its pixels' label, in an ONNX graph for more than twice as many
_SAMPLE_SHAPE = (2, 328, 456)  # batch, height and width to trace with: no stride divides them, so none is special


@dataclass(frozen=True)
class ExportManifest:
    """
    What a graph takes and gives.

    Args:
        format (`str`): One of `FILES`; `"pytorch"` where a checkpoint takes the place of a graph.
        file (`str`): The graph's file name.
        with_postprocessing (`bool`): Whether the graph takes `image`, uint8 `(batch, height, width, 3)` in RGB, and
            gives `labels`, uint8 `(batch, height, width)`; otherwise it takes `pixel_values`, normalised float32
            `(batch, channels, height, width)`, and gives `logits`, `(batch, num_labels, height / stride, width / stride)`.
        precision (`str`): `"float32"`, `"float16"` (the weights alone) or `"int8"`.
        min_size, max_size (`int`): Limits of height and width in pixels; no upper one where `max_size` is `None`.
        max_batch_size (`int`, *optional*): The most images at once; any number where it is `None`.
        image_size (`tuple[int, int]`, *optional*): Height and width, where the graph takes these alone.
    """

    format: str
    file: str
    with_postprocessing: bool = False
    precision: str = "float32"
    min_size: int = MINIMUM_SIZE
    max_size: int | None = None
    max_batch_size: int | None = None
    image_size: tuple[int, int] | None = None

    def __post_init__(self):
        if self.image_size is not None:  # a list in JSON
            object.__setattr__(self, "image_size", tuple(self.image_size))

    @property
    def input_name(self) -> str:
        """Name of the graph's one input."""
        return "image" if self.with_postprocessing else "pixel_values"

    def check_shape(self, batch_size: int, height: int, width: int) -> None:
        """Refuse a batch that the graph was not exported for.

        Raises:
            `ValueError`: naming the size, the limit and the way out.
        """
        if self.image_size is not None:
            if (batch_size, height, width) != (1, *self.image_size):
                of_this_size = "{}×{}".format(*self.image_size)
                raise ValueError(
                    f"The graph was exported for one image of {of_this_size} pixels, got {batch_size} of "
                    f"{height}×{width}: bring them to that size one by one, or export it anew with `--image-size`."
                )
            return
        too_large = self.max_size is not None and max(height, width) > self.max_size
        if min(height, width) < self.min_size or too_large:
            upper = f" and at most {self.max_size}×{self.max_size}" if self.max_size is not None else ""
            takes = "The network takes" if self.format == "pytorch" else "The graph was exported for"
            raise ValueError(
                f"{takes} images of at least {self.min_size}×{self.min_size} pixels{upper}, got {height}×{width}: resize "
                "them" + (", or export it anew with `--max-size`." if too_large else ".")
            )
        if self.max_batch_size is not None and batch_size > self.max_batch_size:
            raise ValueError(
                f"The graph was exported for at most {self.max_batch_size} images at once, got {batch_size}: split the "
                "batch, or export it anew with `--max-batch-size`."
            )

    def save(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "ExportManifest":
        """
        What an export folder says of its graph.

        Raises:
            `CheckpointError`: for a manifest that is damaged or that another release has written.
        """
        try:
            manifest = cls(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
            if manifest.file != FILES.get(manifest.format):  # which may also be one that lies elsewhere
                raise ValueError(f"the format {manifest.format!r} has no file {manifest.file!r}")
            return manifest
        except (RecursionError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder / MANIFEST} is damaged, or of another release ({error}): export the model again."
            ) from error


def export_model(
    model: LeMoReForSemanticSegmentation,
    image_processor: Any,
    output_dir: str | os.PathLike,
    export_format: str,
    *,
    with_postprocessing: bool = False,
    precision: str = "float32",
    calibration_images: Sequence[Image.Image] = (),
    max_size: int | None = None,
    max_batch_size: int | None = None,
    image_size: tuple[int, int] | None = None,
    browser_page: bool = False,
) -> ExportManifest:
    """
    Export a model into a folder that its runtime needs nothing else beside.

    Besides the graph the folder holds the configuration (class names, palette) and the processor settings as JSON;
    ONNX, OpenVINO, LiteRT and `torch.export` files carry the same inside.

    Args:
        model ([`LeMoReForSemanticSegmentation`]): The model; it is not changed.
        image_processor: The image processor it was trained with.
        output_dir (`str` or `os.PathLike`): The folder, replaced if it holds an export.
        export_format (`str`): One of `FILES`.
        with_postprocessing (`bool`): Whether normalisation, upsampling and argmax belong to the graph; see
            [`ExportManifest`]. In ONNX, with more than 32 classes, a pixel's is one of the sixteen likeliest around it.
        precision (`str`): `"float32"`; for ONNX, OpenVINO and LiteRT also `"float16"` (the weights are stored in half
            the space and computed with in float32) and `"int8"` (static, per channel).
        calibration_images (`Sequence[PIL.Image.Image]`): Pictures that the ranges of int8 are taken from.
        max_size, max_batch_size (`int`, *optional*): Upper limits of the graph. ExecuTorch plans its memory for them,
            and has 1024 pixels (or the native or the processor's size, if larger) and 4 images where they are not given.
        image_size (`tuple[int, int]`, *optional*): Height and width of a graph that takes one image of this size alone,
            for ONNX, OpenVINO and LiteRT: without branches and free axes, as compilers for other hardware want it. The
            processor in the folder resizes to it. LiteRT has no other graphs; by default theirs is the height and width
            that the processor brings pictures to, or else the native size.
        browser_page (`bool`): Whether to write a page beside an ONNX graph with post-processing, which runs it in a
            browser; see `lemore_hf.browser`.

    Returns:
        [`ExportManifest`].

    Raises:
        `TypeError`: for a model that is not [`LeMoReForSemanticSegmentation`].
        `ValueError`: for an unknown format or precision, one that the format does not have, int8 without calibration
            images, limits below the smallest size or the processor's, limits, a size or a page where they mean nothing,
            more than 255 labels in a uint8 label map, post-processing for other channels than RGB's, or an output folder
            that holds anything but an export.
        `CheckpointError`: if the disk is full or not writable; an export that was there is kept.
        `ImportError`: naming the extra to install where the format's packages are missing.
    """
    _check_options(model, export_format, with_postprocessing, precision, calibration_images, max_size, max_batch_size)
    _check_image_size(export_format, image_size, max_size, max_batch_size)
    if browser_page and (export_format != "onnx" or not with_postprocessing):
        raise ValueError(
            "`browser_page` is for the format 'onnx' with post-processing, which a browser can run: ask for both, or "
            "leave it out."
        )
    needed = largest_side(image_processor)
    if max_size is not None and max_size < needed:
        raise ValueError(
            f"`max_size` is {max_size}, but the image processor brings pictures to {needed} pixels on a side: raise it, "
            "or give the model a processor of a smaller `size`."
        )
    quantizer = _QUANTIZERS.get((export_format, precision), ())
    require_packages(export_format, (*_REQUIREMENTS[export_format], *quantizer))
    output_dir = Path(output_dir)
    _check_output(output_dir)
    if export_format == "executorch":
        max_size = max_size or max(1024, needed, *model.config.native_size)
        max_batch_size = max_batch_size or 4
    elif export_format == "litert":
        image_size = image_size or _fixed_size(image_processor) or model.config.native_size
    if image_size is not None:
        resizing = {"do_resize": True, "size": dict(zip(("height", "width"), image_size, strict=True))}
        image_processor = type(image_processor).from_dict(image_processor.to_dict() | resizing)
        max_batch_size = 1
        with quietly():
            model = _made_for(image_size, model)
    manifest = ExportManifest(
        export_format,
        FILES[export_format],
        with_postprocessing,
        precision,
        max_size=max_size,
        max_batch_size=max_batch_size,
        image_size=image_size,
    )
    feeds = (
        {manifest.input_name: network_input(image, image_processor, with_postprocessing)}
        for image in calibration_images
    )
    metadata = describe(model.config, image_processor, manifest)
    fused = model.fuse().to("cpu", torch.float32)
    module = SegmentationGraph(fused, image_processor).eval() if with_postprocessing else fused
    with atomic_folder(output_dir) as folder, quietly():
        _EXPORTERS[export_format](module, folder / manifest.file, manifest, feeds, metadata)
        fused.config.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        manifest.save(folder)
        if browser_page:
            write_page(folder, fused.config, image_processor, manifest)
    return manifest


def largest_side(image_processor: Any) -> int:
    """The most pixels on a side, as far as an image processor's `size` says; 0 where it does not resize."""
    sides = dict(image_processor.size or {}).values()
    return max(sides, default=0) if image_processor.do_resize else 0


def _fixed_size(image_processor: Any) -> tuple[int, int] | None:
    """The height and width that an image processor brings all pictures to, if it does."""
    size = image_processor.size or {}
    sides = (size.get("height"), size.get("width"))
    return sides if image_processor.do_resize and all(sides) else None


def _made_for(image_size: tuple[int, int], model: LeMoReForSemanticSegmentation) -> LeMoReForSemanticSegmentation:
    """The model with axis weights of this size, so that the graph need not resample them."""
    config = copy.deepcopy(model.config)
    config.image_size = image_size
    return type(model).from_pretrained(None, config=config, state_dict=model.state_dict())


def require_packages(export_format: str, names: Sequence[str]) -> None:
    """Refuse to go on without the packages of a format.

    Raises:
        `ModuleNotFoundError`: naming the extra that installs them.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"The format {export_format!r} needs {', '.join(missing)}: install the package with the extra, in its "
            f"checkout pip install -e '.[{export_format}]'",
            name=", ".join(missing),
        )


def describe(config: Any, image_processor: Any, manifest: ExportManifest) -> dict[str, str]:
    """What a file tells about itself: JSON texts by name, the same in every format that holds such notes."""
    notes = {
        "id2label": config.id2label,
        "palette": config.palette,
        "image_processor": json.loads(image_processor.to_json_string()),
        "graph": asdict(manifest),
    }
    return {name: json.dumps(note) for name, note in notes.items()}


def _check_options(
    model: LeMoReForSemanticSegmentation,
    export_format: str,
    with_postprocessing: bool,
    precision: str,
    calibration_images: Sequence[Image.Image],
    max_size: int | None,
    max_batch_size: int | None,
) -> None:
    if not isinstance(model, LeMoReForSemanticSegmentation):
        kind = type(model)
        advice = ""
        if kind.__name__ == LeMoReForSemanticSegmentation.__name__:  # remote code's, or from before a reload
            advice = f" of {kind.__module__}, another copy of the code: load the model again with `lemore_hf`'s class"
        raise TypeError(f"Only a LeMoReForSemanticSegmentation can be exported, got a {kind.__name__}{advice}.")
    if export_format not in FILES:
        raise ValueError(f"`export_format` must be one of {list(FILES)}, got {export_format!r}.")
    if precision not in ("float32", "float16", "int8"):
        raise ValueError(f"`precision` must be 'float32', 'float16' or 'int8', got {precision!r}.")
    if precision != "float32" and export_format not in ("onnx", "openvino", "litert"):
        raise ValueError(f"{precision} is for the formats 'onnx', 'openvino' and 'litert', not for {export_format!r}.")
    if precision != "int8" and calibration_images:
        raise ValueError(f"`calibration_images` are for int8, `precision` is {precision!r}: leave one of them out.")
    if precision == "int8" and not calibration_images:
        raise ValueError("int8 needs `calibration_images`: a few dozen pictures like those that the model will see.")
    if max_size is not None and max_size < MINIMUM_SIZE:
        raise ValueError(f"`max_size` must be at least {MINIMUM_SIZE}, the smallest image, got {max_size}.")
    if max_batch_size is not None and max_batch_size < 1:
        raise ValueError(f"`max_batch_size` must be at least 1, got {max_batch_size}.")
    if with_postprocessing and model.config.num_labels > 255:
        raise ValueError(
            f"A uint8 label map holds 255 labels beside void, the model has {model.config.num_labels}: export it "
            "without post-processing."
        )
    if with_postprocessing and model.config.num_channels != 3:
        raise ValueError(
            f"Post-processing in the graph is for RGB images, the model takes {model.config.num_channels} channels: "
            "export it without."
        )


def _check_image_size(
    export_format: str, image_size: tuple[int, int] | None, max_size: int | None, max_batch_size: int | None
) -> None:
    if (export_format == "litert" or image_size is not None) and (max_size or max_batch_size):
        graph = "A LiteRT graph" if export_format == "litert" else "With `image_size` a graph"
        raise ValueError(
            f"{graph} takes one image of one size: give it `image_size`, and leave out `max_size` and `max_batch_size`."
        )
    if image_size is not None and export_format not in _OF_ONE_SIZE:
        raise ValueError(
            f"`image_size` is for the formats {', '.join(map(repr, _OF_ONE_SIZE))}, a graph of {export_format!r} takes "
            "every size: leave it out."
        )
    if image_size is not None and min(image_size) < MINIMUM_SIZE:
        size = "×".join(map(str, image_size))
        raise ValueError(f"`image_size` must be at least {MINIMUM_SIZE}×{MINIMUM_SIZE}, got {size}.")


def _check_output(output_dir: Path) -> None:
    if not output_dir.name:
        raise ValueError(f"{str(output_dir)!r} has no name to replace it by: name a folder, such as ./export.")
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"{output_dir} is a file: name a folder for the export.")
    files = sorted(output_dir.iterdir()) if output_dir.exists() else []
    is_replaced = (output_dir / MANIFEST).is_file()
    if others := [path.name for path in files if not is_replaced or not _is_of_export(path)]:
        raise ValueError(
            f"{output_dir} holds what is no export of a model and would be lost: {', '.join(others[:8])}. Move it "
            "elsewhere, or name an empty or a new folder."
        )


def _is_of_export(path: Path) -> bool:
    """Whether a file has the name of one that an export consists of."""
    own = {MANIFEST, CONFIG_NAME, IMAGE_PROCESSOR_NAME, PAGE} | GRAPH_FILES
    return path.is_file() and (path.name in own or path.name.endswith("_lemore.py"))


# The graph


def network_input(
    images: Image.Image | Sequence[Image.Image],
    image_processor: Any,
    with_postprocessing: bool = False,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """
    What a network takes of pictures, as a batch; see [`ExportManifest`].

    Whole pictures are resized as the processor says, or to `size` as `(height, width)`; cropping and padding, which are
    for training, are left out.
    """
    steps: dict[str, Any] = {"do_center_crop": False, "do_pad": False}
    if with_postprocessing:
        steps |= {"do_rescale": False, "do_normalize": False}
    if size is not None:
        steps |= {"do_resize": True, "size": {"height": size[0], "width": size[1]}}
    # The processor takes lists alone for several pictures.
    images = images if isinstance(images, Image.Image) else list(images)
    if not with_postprocessing:
        return image_processor(images, return_tensors="np", **steps).pixel_values
    # One by one: stacked they would be moved to channels first and back.
    pixel_values = image_processor(images, **steps).pixel_values
    pixel_values = np.stack([np.asarray(image).transpose(1, 2, 0) for image in pixel_values])
    if pixel_values.dtype != np.uint8:  # of floats of 0…255, as 32-bit pictures have them
        pixel_values = pixel_values.round().clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixel_values)


class SegmentationGraph(nn.Module):
    """
    A model with its processing: uint8 image in, uint8 label map of the same size out.

    The image is taken at its size: resizing it to the size that the model was trained for is up to the caller.
    """

    def __init__(self, model: LeMoReForSemanticSegmentation, image_processor: Any):
        super().__init__()
        self.model = model
        scale, offset = _normalization(image_processor)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("offset", offset, persistent=False)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """`(batch, height, width, 3)` in RGB → `labels` of shape `(batch, height, width)`, both uint8."""
        # Contiguous, or tracing asks of every size whether the channels lie last.
        pixel_values = image.permute(0, 3, 1, 2).contiguous().float() * self.scale + self.offset
        logits = self.model(pixel_values=pixel_values).logits
        return {"labels": self.labels(logits, pixel_values.shape[2:]).to(torch.uint8)}

    def labels(self, logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """The classes of logits `(batch, num_labels, h, w)` that are enlarged to `size`: `(batch, height, width)`."""
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(1)


def _normalization(image_processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset, `(3, 1, 1)` each, that take uint8 values to what the model expects."""
    scale, offset = torch.ones(3), torch.zeros(3)
    if image_processor.do_rescale:
        scale = scale * image_processor.rescale_factor
    if image_processor.do_normalize:
        mean, std = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
        scale, offset = scale / std, -mean / std
    return scale.expand(3)[:, None, None].clone(), offset.expand(3)[:, None, None].clone()


def _sample(
    module: nn.Module, manifest: ExportManifest, batch: int, height: int, width: int
) -> dict[str, torch.Tensor]:
    """Inputs by name."""
    if manifest.with_postprocessing:
        return {manifest.input_name: torch.zeros(batch, height, width, 3, dtype=torch.uint8)}
    return {manifest.input_name: torch.zeros(batch, module.config.num_channels, height, width)}


def _trace_arguments(
    module: nn.Module, manifest: ExportManifest
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Sample inputs by name, and which of their axes are free within what limits."""
    if manifest.image_size is not None:
        return _sample(module, manifest, 1, *manifest.image_size), None
    if manifest.format == "executorch":
        # Its memory plan does not go much beyond the sizes that it has seen.
        batch, height, width = manifest.max_batch_size, manifest.max_size, manifest.max_size
    else:
        batch, height, width = _SAMPLE_SHAPE
        height, width = (min(side, manifest.max_size or side) for side in (height, width))
        batch = min(batch, manifest.max_batch_size or batch)
    rows = 1 if manifest.with_postprocessing else 2
    side = {"min": manifest.min_size, "max": manifest.max_size}
    dimension = torch.export.Dim.AUTO
    axes = {0: dimension(min=1, max=manifest.max_batch_size), rows: dimension(**side), rows + 1: dimension(**side)}
    return _sample(module, manifest, batch, height, width), {manifest.input_name: axes}


def _trace(exporter: Any, config_class: type, module: nn.Module, manifest: ExportManifest) -> Any:
    """The backend's program, from one of Transformers' exporters."""
    inputs, dynamic_shapes = _trace_arguments(module, manifest)
    # Without it axes of one (a single image, a single token) would be left out of the free ones.
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        exported = exporter.export(module, inputs, config_class(dynamic_shapes=dynamic_shapes))
    # Transformers wraps the program since 5.23.
    return exported.program if hasattr(exported, "components") else exported


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Exporters report every step, on standard output (with signs that Windows' own encodings lack), as warnings and as log
    records; errors still come through."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            open(os.devnull, "w", encoding="utf-8") as sink,
            contextlib.redirect_stdout(sink),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        transformers.logging.set_verbosity(verbosity)


# Forms of the network's parts for other runtimes. Transformers puts them in place while it traces.


@register_patch("dynamo", "lemore_hf.modeling_lemore.LeMoReTokenPyramid.forward")
def _free_token_pyramid(original: Any) -> Any:
    """Pooling without `ceil_mode`: OpenVINO refuses windows larger than the map. The windows that reach beyond the
    border are divided by what they hold."""

    # As good as zero: ONNX Runtime 1.23 merges a border of zeros into the pooling, and then leaves it out of the
    # divisor (https://github.com/microsoft/onnxruntime/issues/26708).
    nearly_zero = 1e-30

    def pool(feature: torch.Tensor, side: int) -> torch.Tensor:
        sums = F.avg_pool2d(F.pad(feature, (0, side - 1, 0, side - 1), value=nearly_zero), side) * side**2
        rows, columns = (
            torch.arange(length, 0, -side, device=feature.device, dtype=feature.dtype).clamp(max=side)
            for length in feature.shape[2:]
        )
        return sums / (rows[:, None] * columns)

    def forward(self: LeMoReTokenPyramid, local_features: tuple[torch.Tensor, ...]) -> torch.Tensor:
        pooled = [pool(feature, side) for feature, side in zip(local_features, self.kernel_sizes, strict=True)]
        return torch.cat(pooled, dim=1)

    return forward


@register_patch("lemore.onnxruntime", "lemore_hf.modeling_lemore.LeMoReCartesianEncoder.sum_of_axis_views")
def _axis_views_of_any_size(original: Any) -> Any:
    """The choice that a view makes by the length of its axis, as a branch of the graph."""

    def product(view: LeMoReAxisView, weight: torch.Tensor, hidden_state: torch.Tensor) -> torch.Tensor:
        return weight @ hidden_state if view.axis == 2 else hidden_state @ weight.t()

    def forward(self: LeMoReCartesianEncoder, hidden_state: torch.Tensor) -> torch.Tensor:
        if isinstance(hidden_state.shape[2], int):  # a graph of one size
            return original(self, hidden_state)
        return sum(_branch(self.axis_views, hidden_state.shape, product, hidden_state))

    return forward


@register_patch("lemore.openvino", "lemore_hf.modeling_lemore.LeMoReCartesianEncoder.sum_of_axis_views")
def _axis_views_in_channels_last(original: Any) -> Any:
    """The same on the volume with its channels last, as OpenVINO's convolutions leave it and take it. The permutations
    stand outside of the branch, where some cost nothing."""

    def product(view: LeMoReAxisView, weight: torch.Tensor, volume: torch.Tensor) -> torch.Tensor:
        if view.axis == 3:
            return weight @ volume
        return (weight @ volume.flatten(2)).unflatten(2, volume.shape[2:])  # (B, H, W·C)

    def forward(self: LeMoReCartesianEncoder, hidden_state: torch.Tensor) -> torch.Tensor:
        if isinstance(hidden_state.shape[2], int):
            return original(self, hidden_state)
        volume = hidden_state.permute(0, 2, 3, 1)
        return sum(_branch(self.axis_views, hidden_state.shape, product, volume)).permute(0, 3, 1, 2)

    return forward


def _branch(
    views: list[LeMoReAxisView], shape: torch.Size, product: Callable[..., torch.Tensor], volume: torch.Tensor
) -> list[torch.Tensor]:
    """
    One branch for all views of a volume: OpenVINO copies what goes into a branch and what comes out of it.

    Their sum stays outside: NNCF would quantize it, and cannot where the calibration never takes one of the ways.
    """
    sizes = [shape[view.axis] for view in views]
    factors = [view.native_factors(size) for view, size in zip(views, sizes, strict=True)]
    mixes, tents = map(list, zip(*factors, strict=True))

    def one_by_one(volume: torch.Tensor, mixes: list, tents: list) -> list[torch.Tensor]:
        weights = zip(views, mixes, tents, strict=True)
        return [product(view, tent, product(view, mix, volume)) for view, mix, tent in weights]

    def at_once(volume: torch.Tensor, mixes: list, tents: list) -> list[torch.Tensor]:
        weights = zip(views, mixes, tents, strict=True)
        return [product(view, tent @ mix, volume) for view, mix, tent in weights]

    # The mean of size / native size over the views, in whole numbers.
    natives = [view.weight.shape[0] for view in views]
    grid = math.prod(natives)
    resampled = sum(size * (grid // native) for size, native in zip(sizes, natives, strict=True))
    limit = LeMoReAxisView.MAX_RESAMPLED * grid * len(views)
    return torch.cond(resampled > limit, one_by_one, at_once, (volume, mixes, tents))


@register_patch("lemore.onnxruntime", "lemore_hf.modeling_lemore.LeMoReDecodeHead.forward")
def _head_of_products(original: Any) -> Any:
    """The fused head, upsampling along one axis after the other by matrix products: ONNX Runtime's `Resize` takes
    several times as long, unless the graph knows its scales and they are whole numbers."""

    def columns(hidden_state: torch.Tensor, width: int) -> torch.Tensor:
        return hidden_state @ tent_filter(hidden_state.shape[3], width, hidden_state).t()

    def row_filter(hidden_state: torch.Tensor, height: int) -> torch.Tensor:
        return tent_filter(hidden_state.shape[2], height, hidden_state)

    def upsample(hidden_state: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        return row_filter(hidden_state, size[0]) @ columns(hidden_state, size[1])

    def forward(
        self: LeMoReDecodeHead, local_features: tuple[torch.Tensor, ...], global_features: torch.Tensor
    ) -> torch.Tensor:
        height, width = local_features[self.output_stage].shape[2:]
        gates, values = self.gates_and_values(global_features)
        at_output, coarser = [], [values[self.output_stage]]
        for index, (fusion, local_feature) in enumerate(zip(self.fusions, local_features, strict=True)):
            if index < self.output_stage:
                local_feature = resize_bilinear(local_feature, (height, width))
            fused = fusion.local(local_feature) * upsample(gates[index], local_feature.shape[2:])
            if index > self.output_stage:
                coarser.append(fused + upsample(values[index], local_feature.shape[2:]))
            else:
                at_output.append(fused)
        # One product upsamples the rows of all coarser maps and adds them up.
        filters = torch.cat([row_filter(hidden_state, height) for hidden_state in coarser], dim=1)
        upsampled = filters @ torch.cat([columns(hidden_state, width) for hidden_state in coarser], dim=2)
        return self.classifier(self.activation(sum(at_output) + upsampled))

    return forward


@register_patch("lemore.onnxruntime", "lemore_hf.export.SegmentationGraph.labels")
def _labels_of_candidates(original: Any) -> Any:
    """
    Of many classes, only the likeliest in each cell between four positions of the logits are enlarged: all 150 of ADE20K
    would take ONNX Runtime several times as long as the network, and more memory than everything else.

    A pixel's class is missed only where `_CANDIDATES` others come as near to the best at some corner of the cell.
    """

    def following(index: torch.Tensor) -> torch.Tensor:
        return (index + 1).clamp(max=index.shape[0] - 1)

    def forward(self: SegmentationGraph, logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        if logits.shape[1] <= 2 * _CANDIDATES:
            return original(self, logits, size)
        # The cell of row i and column j lies between them and the next ones; at the border these are the same.
        next_row, next_column = (following(torch.arange(length)) for length in logits.shape[2:])
        to_best = logits - logits.amax(1, keepdim=True)
        to_best = torch.maximum(to_best, to_best.index_select(2, next_row))
        to_best = torch.maximum(to_best, to_best.index_select(3, next_column))
        # Sorted, which lets the lower number win a tie, as in all of the classes.
        candidates = to_best.permute(0, 2, 3, 1).topk(_CANDIDATES).indices  # (B, h, w, candidates)
        top = logits.permute(0, 2, 3, 1)
        bottom = top.index_select(1, next_row)
        top, bottom, top_right, bottom_right = (
            corners.gather(3, candidates)
            for corners in (top, bottom, top.index_select(2, next_column), bottom.index_select(2, next_column))
        )
        (rows, down), (columns, right) = (
            _cells(native, length) for native, length in zip(logits.shape[2:], size, strict=True)
        )

        def between(upper: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
            upper, lower = upper.index_select(1, rows), lower.index_select(1, rows)
            return (upper + (lower - upper) * down[:, None, None]).index_select(2, columns)

        values = between(top, bottom) + between(top_right - top, bottom_right - bottom) * right[:, None]
        candidates = candidates.to(torch.int32).index_select(1, rows).index_select(2, columns)
        return candidates.gather(3, values.argmax(3, keepdim=True)).squeeze(3)

    return forward


def _cells(native: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where `F.interpolate` with `align_corners=False` finds each of `size` positions among `native` ones: the position
    before it, and how far it lies beyond that."""
    position = ((torch.arange(size, dtype=torch.float32) + 0.5) * (native / size) - 0.5).clamp(min=0)
    before = position.floor()
    return before.long(), position - before


# Formats


def _export_onnx(
    module: nn.Module, path: Path, manifest: ExportManifest, feeds: Iterable[dict], metadata: dict[str, str]
) -> None:
    import onnx_ir

    with apply_patches("lemore.onnxruntime"):
        model = _onnx_model(module, manifest)
    if manifest.precision == "float16":
        _store_weights_in_half(model)
    elif manifest.precision == "int8":
        model = quantize_onnx(model, feeds)
    model.metadata_props.update(metadata)
    onnx_ir.save(model, path)


def _onnx_model(module: nn.Module, manifest: ExportManifest) -> "onnx_ir.Model":
    from transformers.exporters import OnnxConfig, OnnxExporter

    program = _trace(OnnxExporter(), OnnxConfig, module, manifest)
    model = getattr(program, "model", program)  # an `ONNXProgram` before Transformers 5.23
    _tidy_onnx(model, manifest)
    return model


def _tidy_onnx(model: "onnx_ir.Model", manifest: ExportManifest) -> None:
    """Name the free axes, and drop the notes on where each node came from: a megabyte, with paths of this machine."""
    import onnx_ir
    from onnxscript.optimizer import fold_constants

    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    model.graph.metadata_props.clear()
    if manifest.image_size is not None:
        # What depends on the sizes alone: large filters too, which the exporter leaves for the runtime to compute.
        fold_constants(model, input_size_limit=_ANY_LENGTH, output_size_limit=_ANY_LENGTH)
        return
    (image,), (result,) = model.graph.inputs, model.graph.outputs
    if manifest.with_postprocessing:
        image.shape = onnx_ir.Shape(["batch", "height", "width", 3])
        result.shape = onnx_ir.Shape(["batch", "height", "width"])
    else:
        image.shape = onnx_ir.Shape(["batch", image.shape[1], "height", "width"])
        result.shape = onnx_ir.Shape(["batch", result.shape[1], "logits_height", "logits_width"])


def _store_weights_in_half(model: "onnx_ir.Model") -> None:
    """Keep large weights as float16 constants that a `Cast` opens: the runtime folds it once, when it loads."""
    import onnx_ir

    graph = model.graph
    for name, value in list(graph.initializers.items()):
        weight = value.const_value.numpy()
        if weight.dtype != np.float32 or weight.size < 64 or np.abs(weight).max() > np.finfo(np.float16).max:
            continue
        half = onnx_ir.Value(name=f"{name}.half", const_value=onnx_ir.tensor(weight.astype(np.float16)))
        half.shape, half.dtype = value.shape, onnx_ir.DataType.FLOAT16
        cast = onnx_ir.node("Cast", [half], attributes={"to": onnx_ir.DataType.FLOAT})
        cast.outputs[0].shape, cast.outputs[0].dtype = value.shape, onnx_ir.DataType.FLOAT
        value.replace_all_uses_with(cast.outputs[0])
        del graph.initializers[name]
        cast.outputs[0].name = name
        graph.register_initializer(half)
        graph.insert_before(graph[0], cast)


def quantize_onnx(model: "onnx_ir.Model", feeds: Iterable[dict]) -> "onnx_ir.Model":
    import onnx_ir
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter(feeds)

        def get_next(self) -> dict | None:
            return next(self.feeds, None)

    with TemporaryDirectory() as scratch:
        source, prepared, quantized = (f"{scratch}/{name}.onnx" for name in ("source", "prepared", "quantized"))
        onnx_ir.save(model, source)
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        convolutions = [node for node in onnx_ir.load(prepared).graph if node.op_type == "Conv"]
        lines = [node for node in convolutions if _is_depthwise_line(node)]
        quantize_static(
            prepared,
            quantized,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # The axis weights and the attention maps are made in the graph and stay exact. So do what sees the pixels
            # and what gives the scores: the two lose the most and take next to no time. For depthwise kernels of one row
            # or column ONNX Runtime has no int8 code that is faster than float32's.
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=[node.name for node in (convolutions[0], convolutions[-1], *lines)],
        )
        result = onnx_ir.load(quantized)
        onnx_ir.external_data.load_to_model(result)
        return result


def _is_depthwise_line(convolution: "onnx_ir.Node") -> bool:
    _, channels, *kernel = convolution.inputs[1].shape
    return convolution.attributes.get_int("group", 1) > 1 and channels == 1 and 1 in kernel


def _export_openvino(
    module: nn.Module, path: Path, manifest: ExportManifest, feeds: Iterable[dict], metadata: dict[str, str]
) -> None:
    import onnx_ir
    import openvino

    # Through ONNX: OpenVINO's own way from PyTorch computes sizes in floating point, which its default precision
    # rounds to bfloat16 on processors that have it.
    with TemporaryDirectory() as scratch, apply_patches("lemore.openvino"):
        onnx_ir.save(_onnx_model(module, manifest), f"{scratch}/model.onnx")
        model = openvino.convert_model(f"{scratch}/model.onnx")
        if manifest.precision == "int8":
            model = quantize_openvino(model, feeds)
        for name, note in metadata.items():
            model.set_rt_info(note, ["lemore", name])
        openvino.save_model(model, path, compress_to_fp16=manifest.precision == "float16")


def quantize_openvino(model: "openvino.Model", feeds: Iterable[dict]) -> "openvino.Model":
    import nncf

    feeds = list(feeds)
    convolutions = [op.get_friendly_name() for op in model.get_ordered_ops() if op.get_type_name() == "Convolution"]
    return nncf.quantize(
        model,
        nncf.Dataset(feeds),
        subset_size=len(feeds),
        # As in ONNX. Sums and products between convolutions are quantized: to leave them costs a sixth of the time.
        ignored_scope=nncf.IgnoredScope(names=[convolutions[0], convolutions[-1]], types=["MatMul"], validate=False),
    )


def _export_executorch(
    module: nn.Module, path: Path, manifest: ExportManifest, feeds: Iterable[dict], metadata: dict[str, str]
) -> None:
    from transformers.exporters import ExecutorchConfig, ExecutorchExporter

    program = _trace(ExecutorchExporter(), ExecutorchConfig, module, manifest)
    with path.open("wb") as file:
        program.write_to_file(file)


def _export_torch(
    module: nn.Module, path: Path, manifest: ExportManifest, feeds: Iterable[dict], metadata: dict[str, str]
) -> None:
    from transformers.exporters import DynamoConfig, DynamoExporter

    program = _trace(DynamoExporter(), DynamoConfig, module, manifest)
    # What is left beside the limits of the sizes excludes maps of one row or one token, where the sample has more. It
    # is about strides: the graph is right for them.
    program._guards_code = [guard for guard in program._guards_code if "//" not in guard]
    torch.export.save(program, path, extra_files=metadata)


def _export_litert(
    module: nn.Module, path: Path, manifest: ExportManifest, feeds: Iterable[dict], metadata: dict[str, str]
) -> None:
    graph = litert_graph(module, _sample(module, manifest, 1, *manifest.image_size))
    if manifest.precision != "float32":
        graph = quantize_litert(graph, manifest.precision, feeds)
    path.write_bytes(graph)
    # Files that belong to a graph are zipped onto its end, where the runtime does not look (TensorFlow Lite's metadata).
    with zipfile.ZipFile(path, "a") as file:
        for name, note in metadata.items():
            file.writestr(f"{name}.json", note)


def litert_graph(module: nn.Module, inputs: dict[str, torch.Tensor]) -> bytes:
    """The file of a network that takes inputs of these names and shapes."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # the converter reports on standard error otherwise
    import litert_torch

    with TemporaryDirectory() as scratch:
        path = Path(scratch, "model.tflite")
        litert_torch.convert(module, sample_kwargs=inputs).export(path)
        return path.read_bytes()


def quantize_litert(graph: bytes, precision: str, feeds: Iterable[dict]) -> bytes:
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.qtyping import TFLOperationName
    from ai_edge_quantizer.quantizer import Quantizer

    quantizer = Quantizer(graph)
    convolutions = (TFLOperationName.CONV_2D, TFLOperationName.DEPTHWISE_CONV_2D)
    with open(os.devnull, "w", encoding="utf-8") as sink, contextlib.redirect_stderr(sink):  # its progress bars
        if precision == "float16":
            for operation in (*convolutions, TFLOperationName.FULLY_CONNECTED):  # the last are the axis weights
                quantizer.add_weight_only_config(".*", operation, 16, algorithm_key=AlgorithmName.FLOAT_CASTING)
            return bytes(quantizer.quantize(enable_progress_report=False).quantized_model)

        for operation in convolutions:
            quantizer.add_static_config(".*", operation, activation_num_bits=8, weight_num_bits=8)
        ranges = quantizer.calibrate({"serving_default": list(feeds)}, num_threads=usable_cores())
        ends = _litert_convolutions(graph)
        # The first and the last as in ONNX. And where nothing but a constant comes in or goes out: XNNPACK, which runs
        # the graph, refuses scales that are as good as zero, such as those of a channel attention without an effect.
        exact = [ends[0], ends[-1]] + [pair for pair in ends if any(_is_constant(ranges[name]) for name in pair)]
        for (_, result), operation in itertools.product(exact, convolutions):
            name = f"^{re.escape(result)}"
            quantizer.update_quantization_recipe(name, operation, algorithm_key=AlgorithmName.NO_QUANTIZE)
        return bytes(quantizer.quantize(ranges, enable_progress_report=False).quantized_model)


def _is_constant(value_range: dict[str, np.ndarray]) -> bool:
    return bool((value_range["max"] - value_range["min"]).max() < 1e-4)


def _litert_convolutions(graph: bytes) -> list[tuple[str, str]]:
    """The names of what goes into each convolution of a LiteRT graph and of what it gives, from the first to the last."""
    from ai_edge_litert.schema_py_generated import BuiltinOperator, ModelT

    model = ModelT.InitFromPackedBuf(graph, 0)
    (network,) = model.subgraphs
    kinds = [code.builtinCode for code in model.operatorCodes]
    names = [tensor.name.decode() for tensor in network.tensors]
    return [
        (names[operator.inputs[0]], names[operator.outputs[0]])
        for operator in network.operators
        if kinds[operator.opcodeIndex] in (BuiltinOperator.CONV_2D, BuiltinOperator.DEPTHWISE_CONV_2D)
    ]


_EXPORTERS = {
    "onnx": _export_onnx,
    "openvino": _export_openvino,
    "executorch": _export_executorch,
    "torch": _export_torch,
    "litert": _export_litert,
}
