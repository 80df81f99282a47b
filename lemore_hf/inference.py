# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures to label maps, with one interface over PyTorch and every exported format."""

import importlib
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, PreTrainedConfig
from transformers.modeling_outputs import SemanticSegmenterOutput

from .checkpointing import CheckpointError
from .export import MANIFEST, ExportManifest, network_input, require_packages
from .hardware import usable_cores
from .image_processing_pil_lemore import decode, read_file
from .pictures import files_below, in_levels
from .post_processing_lemore import segment_logits

Run = Callable[[np.ndarray], np.ndarray]
"""A network in its runtime: what [`ExportManifest`] says that it takes → what it says that it gives."""


class Segmenter:
    """
    A trained network in one of its runtimes, from picture to label map. A checkpoint runs on the GPU where there is one.

    The threads of the runtimes do not survive a fork: make one in each process. What is pickled is where the network lies,
    so that one sent to a process that was spawned opens it there.

    PyTorch unpickles exports of the format `torch`: only open those of people whose code you would run. Nothing is run of what
    other exports and checkpoints hold.

    Args:
        path (`str` or `os.PathLike`): A checkpoint folder, an export folder, or the graph inside an export folder.
        num_threads (`int`, *optional*): Threads that the runtime may use, and PyTorch in the whole process, which resizes
            pictures and logits; by default what they choose themselves.

    Raises:
        `FileNotFoundError`: where there is neither a checkpoint nor an export.
        `CheckpointError`: for weights or graphs that are damaged, weights that are pickled or not those of a whole
            segmentation network.
        `OSError`: where the settings of the network or of its image processor are missing or cannot be read.
        `ImportError`: naming the extra to install where the runtime is missing, or why it cannot be imported.
        `ValueError`: for less than one thread, a model that is not for segmentation, or a configuration out of range
            (`huggingface_hub.errors.StrictDataclassError` for a value of the wrong type).
    """

    def __init__(self, path: str | os.PathLike, num_threads: int | None = None):
        self._arguments, self._process = (os.path.abspath(path), num_threads), os.getpid()
        folder = find_model(Path(path))
        exported = is_export(folder)
        self.manifest = ExportManifest.load(folder) if exported else ExportManifest("pytorch", "model.safetensors")
        self.config: PreTrainedConfig = AutoConfig.from_pretrained(folder)
        self.image_processor = AutoImageProcessor.from_pretrained(folder)
        if exported:
            _import_runtime(self.manifest.format)
        if num_threads is not None:
            if num_threads < 1:
                raise ValueError(
                    f"`num_threads` must be at least 1, or `None` for as many as the runtime likes, got {num_threads}."
                )
            torch.set_num_threads(num_threads)
        graph = folder / self.manifest.file
        try:
            self._run = _RUNTIMES[self.manifest.format](graph, num_threads)
        except Exception as error:  # of the runtimes' own kinds
            if not exported or isinstance(error, (ImportError, MemoryError)):
                raise
            raise CheckpointError(
                f"{graph} is damaged, or not for this version of its runtime ({error}): export the model again."
            ) from error

    def __reduce__(self) -> tuple[type["Segmenter"], tuple[str, int | None]]:
        return type(self), self._arguments

    def run(self, network_input: np.ndarray) -> np.ndarray:
        """
        Run the network alone.

        Args:
            network_input (`np.ndarray`): `pixel_values`, or `image` for a graph with post-processing; see
                [`ExportManifest`].

        Returns:
            `np.ndarray`: `logits` or `labels`.

        Raises:
            `ValueError`: for a size that the network, or this export of it, does not take, or other than four dimensions.
            `TypeError`: for another dtype than the network takes.
            `RuntimeError`: in a process that was forked from the one where the network was opened.
        """
        self._check_process()
        name, dtype = self.manifest.input_name, np.uint8 if self.manifest.with_postprocessing else np.float32
        if network_input.ndim != 4:
            raise ValueError(
                f"`{name}` must have four dimensions, the first of them the batch, got {network_input.shape}."
            )
        if network_input.dtype != dtype:
            raise TypeError(
                f"`{name}` must be of {np.dtype(dtype)}, got {network_input.dtype}: convert it with `astype`."
            )
        rows = 1 if self.manifest.with_postprocessing else 2
        self.manifest.check_shape(len(network_input), *network_input.shape[rows : rows + 2])
        return self._run(network_input)

    def _check_process(self) -> None:
        """Refuse to wait forever for threads that are not there, those of PyTorch's image processing among them."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "This Segmenter was made before the process was forked, which its runtime's threads do not survive: make "
                "one in each process."
            )

    def __call__(self, image: Image.Image | np.ndarray | str | os.PathLike) -> np.ndarray:
        """
        Segment a picture. Several threads may do so at once.

        Args:
            image (`PIL.Image.Image`, `np.ndarray` or `str` or `os.PathLike`): A picture of any mode and size, whose EXIF
                orientation is applied; 8-bit values of shape `(height, width, 3)` in RGB, or `(height, width)` or
                `(height, width, 1)` of a grey one, which may have 16 bits or be of floats; `(height, width, 4)` for a network
                of four channels; or the path of a file.

        Returns:
            `np.ndarray` of int64 and shape `(height, width)`: the label of each pixel of the upright picture.

        Raises:
            `TypeError`: for what is no picture, such as a list of them, or an array of another shape or type.
            `ValueError`: for a size that the network, or this export of it, does not take, an array without a pixel, and
                floats of another range than 0…1 or 0…255.
            `OSError`: for a file that is missing, and what cannot be read as a picture: damage that `PIL.Image.open` has
                left undiscovered is found here.
            `RuntimeError`: in a process that was forked from the one where the network was opened.
        """
        self._check_process()
        image = _picture_of(image, getattr(self.config, "num_channels", 3))
        result = self.run(network_input(image, self.image_processor, self.manifest.with_postprocessing))
        if self.manifest.with_postprocessing:
            return np.array(Image.fromarray(result[0]).resize(image.size, Image.Resampling.NEAREST), dtype=np.int64)
        return self._upsampled_labels(result, image.size[::-1])[0]

    def segment_at(self, images: Sequence[Image.Image], size: tuple[int, int]) -> np.ndarray:
        """
        Segment a batch of pictures at a size, given as `(height, width)`, whatever the image processor says.

        Returns:
            `np.ndarray` of int64, or of uint8 from a graph with post-processing, and shape `(batch, height, width)`: the
            labels.

        Raises:
            `ValueError`: for a size that the network, or this export of it, does not take.
            `RuntimeError`: in a process that was forked from the one where the network was opened.
        """
        self._check_process()
        result = self.run(network_input(images, self.image_processor, self.manifest.with_postprocessing, size))
        return result if self.manifest.with_postprocessing else np.stack(self._upsampled_labels(result, size))

    def _upsampled_labels(self, logits: np.ndarray, size: tuple[int, int]) -> list[np.ndarray]:
        return [label_map.numpy() for label_map in segment_logits(torch.from_numpy(logits), [size] * len(logits))]


class ExportedNetwork(torch.nn.Module):
    """
    An export as a network of PyTorch's, for `lemore_hf.evaluation`: `logits` from normalized images.

    Args:
        path (`str` or `os.PathLike`): An export folder.
        num_threads (`int`, *optional*): Threads that the runtime may use; by default what it chooses itself.

    Raises:
        `ValueError`: for an export with post-processing, which gives labels and no logits; and what [`Segmenter`] raises.
    """

    def __init__(self, path: str | os.PathLike, num_threads: int | None = None):
        super().__init__()
        segmenter = Segmenter(path, num_threads)
        if segmenter.manifest.with_postprocessing:
            raise ValueError(
                f"{path} was exported with post-processing: it takes pictures and gives labels, where normalized images "
                "and logits are needed. Export the model without `--with-postprocessing`."
            )
        self.config, self.manifest = segmenter.config, segmenter.manifest
        self._run = segmenter.run

    def forward(self, pixel_values: torch.Tensor) -> SemanticSegmenterOutput:
        """`(batch, channels, height, width)` → `logits`, on the device of the images."""
        logits = self._run(pixel_values.float().cpu().numpy())
        return SemanticSegmenterOutput(logits=torch.from_numpy(logits).to(pixel_values.device))


def is_export(path: str | os.PathLike) -> bool:
    """Whether a folder holds an export."""
    return Path(path, MANIFEST).is_file()


def label_agreement(
    exported: Segmenter, reference: Segmenter, images: Sequence[Image.Image], size: tuple[int, int], batch_size: int
) -> float:
    """The share of pixels, from 0 to 1, to which two networks give the same label at a size `(height, width)`."""
    equal = [
        exported.segment_at(batch, size) == reference.segment_at(batch, size)
        for batch in (images[start : start + batch_size] for start in range(0, len(images), batch_size))
    ]
    return float(np.mean([item for batch in equal for item in batch]))


def comparison_sizes(config: Any, manifest: ExportManifest) -> list[tuple[int, int]]:
    """Three sizes to compare an export at: the native one, a smaller and a larger one, of odd sides, as far as its limits
    let them; or the only one."""
    if manifest.image_size is not None:
        return [manifest.image_size]
    native = np.array(config.native_size)
    sizes = [native, native * 3 // 4 | 1, native * 5 // 4 | 1]
    upper = manifest.max_size or max(map(max, sizes))
    return [tuple(int(side) for side in size.clip(manifest.min_size, upper)) for size in sizes]


class PictureFiles(Sequence[Image.Image]):
    """The pictures of files, each read when it is asked for: those of a camera would fill the memory together."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...

    @overload
    def __getitem__(self, index: slice) -> "PictureFiles": ...

    def __getitem__(self, index: int | slice) -> "Image.Image | PictureFiles":
        if isinstance(index, slice):
            return PictureFiles(self.paths[index])
        return read_picture(self.paths[index])


def read_pictures(folder: str | os.PathLike, limit: int) -> PictureFiles:
    """
    Up to `limit` pictures, spread evenly over the names in a folder and those below it, of those that can be read.

    Raises:
        `ValueError`: where not one of its files can be read as a picture.
    """
    paths = files_below(Path(folder)) if Path(folder).is_dir() else []
    spread = np.linspace(0, len(paths) - 1, min(limit, len(paths))).round().astype(int).tolist()
    readable = [paths[index] for index in spread if _can_be_read(paths[index])]
    if not readable:  # then any that can
        readable = list(itertools.islice(filter(_can_be_read, paths), limit))
    if not readable:
        state = f"none of its {len(paths)} pictures can be read" if paths else "it holds no pictures"
        state = state if Path(folder).is_dir() else "it is not a folder"
        raise ValueError(f"{folder} has nothing to work with: {state}. Name a folder of PNG, JPEG or WebP files.")
    return PictureFiles(readable)


def _can_be_read(path: Path) -> bool:
    try:
        read_picture(path)
    except Exception:  # decoders raise errors of every kind on damaged data
        return False
    return True


def _picture_of(image: Any, num_channels: int) -> Image.Image:
    """An upright picture of what `Segmenter` takes, for a network of so many channels."""
    if isinstance(image, (str, os.PathLike)):
        return read_picture(Path(image))
    if isinstance(image, np.ndarray):
        pixels = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
        if pixels.ndim not in (2, 3):  # Pillow takes a row of numbers, such as a file's bytes, for a column of pixels
            raise TypeError(
                f"Expected a picture of shape (height, width, 3) or (height, width), got {image.shape}: give one picture, "
                "and of an encoded file its path or what `PIL.Image.open` makes of it."
            )
        if pixels.ndim == 3 and pixels.shape[2] in {2, 4} - {num_channels}:
            # A camera's fourth channel is often 0, and would hide the picture as an opacity.
            raise TypeError(
                f"Expected a picture of shape (height, width, 3), got {image.shape}: leave the last channel out, as in "
                f"`frame[..., :{pixels.shape[2] - 1}]`."
            )
        if 0 in pixels.shape:
            raise ValueError(f"A picture of shape {image.shape} has no pixels.")
        try:
            return in_levels(Image.fromarray(pixels))
        except TypeError as error:
            raise TypeError(
                f"Expected a picture of 8-bit values (uint8) in (height, width, 3), got {image.dtype} in {image.shape}."
            ) from error
    if not isinstance(image, Image.Image):
        raise TypeError(f"Expected one picture, an array or the path of a file, got {type(image).__name__}.")
    return in_levels(decode(image))


def read_picture(path: Path) -> Image.Image:
    """The upright picture of a file, in its own mode, read to its end. Floats of 0…1 become such of 0…255.

    Raises:
        `OSError`: for a file that is missing or cannot be read as a picture.
        `ValueError`: for PostScript, and floats of another range.
    """
    return in_levels(read_file(path))


def find_model(path: Path) -> Path:
    """
    The folder of a checkpoint or of an export, given as such or by the graph in it.

    Raises:
        `FileNotFoundError`: where there is neither.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: name the folder of a checkpoint or of an export.")
    if path.is_file():
        folder = path.parent
        if not is_export(folder) or ExportManifest.load(folder).file != path.name:
            raise FileNotFoundError(
                f"{path} is not the graph of an export: beside it there must be the {MANIFEST} that names it."
            )
        return folder
    if not is_export(path) and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} holds neither an export ({MANIFEST}) nor a checkpoint (config.json): its files are "
            f"{sorted(file.name for file in path.iterdir())[:8]}."
        )
    return path


def _import_runtime(export_format: str) -> None:
    """Before the graph is opened, which is not to be blamed for what is wrong with its runtime."""
    require_packages(export_format, RUNTIME_PACKAGES[export_format])
    for name in RUNTIME_PACKAGES[export_format]:
        try:
            importlib.import_module(name)
        except Exception as error:  # OpenVINO raises others too, as for a container's user without a home
            message = f"The package {name} is installed, but cannot be imported: {error}"
            raise ImportError(message, name=name) from error


def _open_pytorch(path: Path, num_threads: int | None) -> Run:
    from .evaluation import load_trained_model  # with all that training needs, which no export does

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_trained_model(path.parent).to(device)
    model = model.fuse() if hasattr(model, "fuse") else model  # other families have no faster form
    return _torch_run(lambda pixel_values: model(pixel_values=pixel_values.to(device)).logits)


def _open_torch(path: Path, num_threads: int | None) -> Run:
    program = torch.export.load(path).module()
    name = ExportManifest.load(path.parent).input_name
    return _torch_run(lambda network_input: next(iter(program(**{name: network_input}).values())))


def _torch_run(network: Callable[[torch.Tensor], torch.Tensor]) -> Run:
    def run(network_input: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            # PyTorch takes no flipped arrays and warns of read-only ones; NumPy has no bfloat16, which autocast makes.
            result = network(torch.from_numpy(np.require(network_input, requirements=["C", "W"]))).cpu()
            return (result.float() if result.is_floating_point() else result).numpy()

    return run


def _open_onnx(path: Path, num_threads: int | None) -> Run:
    import onnxruntime

    def compile_for(shape: tuple[int, ...] | None) -> Run:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or 0
        options.log_severity_level = 3
        if shape is not None:
            height, width = shape[1:3] if manifest.with_postprocessing else shape[2:]
            for axis, length in (("batch", shape[0]), ("height", height), ("width", width)):
                options.add_free_dimension_override_by_name(axis, length)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda network_input: session.run(None, {manifest.input_name: network_input})[0]

    manifest = ExportManifest.load(path.parent)
    return _SameShapeAgain(compile_for)


def _open_openvino(path: Path, num_threads: int | None) -> Run:
    import openvino

    # OpenVINO takes bfloat16 where the processor has it; the labels are to be PyTorch's. And it binds its threads to cores,
    # where another busy process then makes it wait while others are free.
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    settings["ENABLE_CPU_PINNING"] = False
    # It remembers what it prepared for 5000 pairs of operation and size: gigabytes where sizes always change.
    settings["CPU_RUNTIME_CACHE_CAPACITY"] = 512
    if num_threads is not None:
        settings["INFERENCE_NUM_THREADS"] = num_threads

    core = openvino.Core()

    def compile_for(shape: tuple[int, ...] | None) -> Run:
        graph = core.read_model(path)
        if shape is not None:
            graph.reshape(shape)
        network = core.compile_model(graph, "CPU", settings)
        return lambda network_input: network(network_input)[0]

    return _SameShapeAgain(compile_for)


class _SameShapeAgain:
    """
    Compiles a network for the shape of its input when that comes a second time in a row, as from a video or a folder.

    With the sizes known a runtime computes all that depends on them beforehand, but compiling costs more than an image.
    One call at a time: OpenVINO's networks would give a thread what another one asked for.
    """

    def __init__(self, compile_for: Callable[[tuple[int, ...] | None], Run]):
        self._compile_for = compile_for
        self._any_shape = compile_for(None)
        self._shape: tuple[int, ...] | None = None
        self._network: Run | None = None
        self._lock = threading.Lock()

    def __call__(self, network_input: np.ndarray) -> np.ndarray:
        with self._lock:
            if network_input.shape != self._shape:
                self._shape, self._network = network_input.shape, None
                return self._any_shape(network_input)
            if self._network is None:
                self._network = self._compile_for(self._shape)
            return self._network(network_input)


def _open_executorch(path: Path, num_threads: int | None) -> Run:
    from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count, _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    # Nothing runs in the pool yet, or nothing that another number would disturb.
    if num_threads is not None and num_threads != _threadpool_get_thread_count():
        _unsafe_reset_threadpool(num_threads)
    method = Runtime.get().load_program(path).load_method("forward")
    return lambda network_input: method.execute([torch.from_numpy(network_input)])[0].numpy()


def _open_litert(path: Path, num_threads: int | None) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    # Left to itself it takes one thread.
    network = Interpreter(path, num_threads=num_threads or usable_cores()).get_signature_runner()
    name, lock = ExportManifest.load(path.parent).input_name, threading.Lock()

    def run(network_input: np.ndarray) -> np.ndarray:
        with lock:  # one picture at a time: its memory is the network's
            (result,) = network(**{name: network_input}).values()
        return result

    return run


RUNTIME_PACKAGES = {
    "onnx": ["onnxruntime"],
    "openvino": ["openvino"],
    "executorch": ["executorch"],
    "torch": [],
    "litert": ["ai_edge_litert"],
}
_RUNTIMES = {
    "pytorch": _open_pytorch,
    "onnx": _open_onnx,
    "openvino": _open_openvino,
    "executorch": _open_executorch,
    "torch": _open_torch,
    "litert": _open_litert,
}
