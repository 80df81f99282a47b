# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""One measurement in a process of its own: `python cell.py CELL`, both the cell and what is printed as JSON.

This file is run by its path, and imports PyTorch only where the cell needs it: a process that measures another runtime
holds that runtime alone, without other thread pools, and starts in a second.
"""

import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

TORCH_RUNTIMES = ("eager", "compile", "bf16", "cuda-float32", "cuda-bfloat16")
GRAPH_RUNTIMES = ("onnx", "onnx-int8", "openvino", "openvino-int8", "litert", "litert-int8")
LAYOUTS = ("contiguous", "channels_last")
NUM_LABELS = 150  # as ADE20K

_PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "onnxruntime",
    "openvino",
    "nncf",
    "ai-edge-litert",
    "numpy",
    "pillow",
)
_MIN_RUNS, _MAX_RUNS, _WARM_UP_RUNS = 3, 500, 3


@dataclass(frozen=True)
class Cell:
    """
    What to measure, and how.

    Args:
        kind (`str`): A key of `_MEASUREMENTS`.
        model (`str`): A key of `lemore_hf.benchmarking.models.NAMES`.
        runtime (`str`): What runs it: one of `TORCH_RUNTIMES` or `GRAPH_RUNTIMES`, `"pipeline"` or `"calls"` for a
            picture, `"one-loss"` for a training whose loss is not the model's own but the same in all.
        layout (`str`): Memory layout of PyTorch's tensors, one of `LAYOUTS`.
        batch_size, threads, height, width (`int`): Images at once, threads, and the size of the network's input.
        num_labels (`int`): Classes of the network.
        seconds (`float`): How long to repeat, once warm; at least three times.
        table (`int`): The table that the figure belongs to.
        folder (`str`): Where prepared graphs and pictures lie.
    """

    kind: str
    model: str = ""
    runtime: str = ""
    layout: str = "contiguous"
    batch_size: int = 1
    threads: int = 1
    height: int = 512
    width: int = 512
    num_labels: int = NUM_LABELS
    seconds: float = 1.0
    table: int = 1
    folder: str = ""

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def on_gpu(self) -> bool:
        return self.runtime.startswith("cuda")

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def measure(cell: Cell) -> dict[str, Any]:
    """
    Measure a cell in this process.

    Returns:
        Latencies in seconds as `median`, `quartiles` and `runs`, and what else the kind of cell has; or
        `{"not_installed": package}`.
    """
    try:
        return _MEASUREMENTS[cell.kind](cell)
    except ModuleNotFoundError as error:
        return {"not_installed": error.name}


# Time and memory


def timed(run: Callable[[], Any], seconds: float) -> dict[str, Any]:
    """Repeat `run` for a time, once it is warm; the median and the quartiles of its latencies in seconds."""
    start = time.perf_counter()
    for _ in range(_WARM_UP_RUNS - 1):  # at most: where memory was measured, that was the first
        if time.perf_counter() - start < seconds:
            run()
    return summary(_latencies(run, seconds))


def _latencies(run: Callable[[], Any], seconds: float) -> list[float]:
    latencies: list[float] = []
    while len(latencies) < _MIN_RUNS or (sum(latencies) < seconds and len(latencies) < _MAX_RUNS):
        start = time.perf_counter()
        run()
        latencies.append(time.perf_counter() - start)
    return latencies


def summary(values: list[float]) -> dict[str, Any]:
    """Median, lower and upper quartile, and how many values there are."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "quartiles": [lower, upper], "runs": len(values)}


def peak_memory(run: Callable[[], Any]) -> int | None:
    """
    Bytes by which the resident memory of this process grows at most while `run` runs; weights and inputs are there
    before. `None` where the system does not tell (other than Linux).
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        before = _resident("VmRSS")
    except OSError:
        run()
        return None
    run()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


# Networks


def _measure_inference(cell: Cell) -> dict[str, Any]:
    if cell.on_gpu:
        return _measure_cuda_graph(cell)
    open_network = _open_torch if cell.runtime in TORCH_RUNTIMES else _OPEN[cell.runtime.split("-")[0]]
    run = open_network(cell)
    if cell.runtime == "compile":
        run()  # the compiler's memory is not the network's
    memory = peak_memory(run)
    return {**timed(run, cell.seconds), "peak_memory": memory}


def _open_torch(cell: Cell) -> Callable[[], Any]:
    import torch

    from lemore_hf.benchmarking.models import build_model

    torch.set_num_threads(cell.threads)
    dtype = torch.bfloat16 if cell.runtime == "bf16" else torch.float32
    layout = memory_format(cell.layout)
    model = build_model(cell.model, cell.num_labels).to(dtype=dtype, memory_format=layout)
    shape = (cell.batch_size, 3, *cell.size)
    pixel_values = torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)
    network = torch.compile(model, dynamic=False) if cell.runtime == "compile" else model

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return network(pixel_values).logits

    return run


def memory_format(layout: str) -> Any:
    """PyTorch's name for one of `LAYOUTS`."""
    import torch

    return {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[layout]


def _measure_cuda_graph(cell: Cell) -> dict[str, Any]:
    """A captured CUDA graph of the forward pass, replayed: no time goes into launching kernels one by one."""
    import torch

    from lemore_hf.benchmarking.models import build_model

    _use_tensor_cores()
    dtype = torch.bfloat16 if cell.runtime == "cuda-bfloat16" else torch.float32
    layout = memory_format(cell.layout)
    model = build_model(cell.model, cell.num_labels).to(dtype, memory_format=layout)
    pixel_values = torch.randn(cell.batch_size, 3, *cell.size, dtype=dtype).contiguous(memory_format=layout)

    with _gpu_alone(cell):
        return _time_replays(model.to("cuda"), pixel_values.to("cuda"), cell.seconds)


def _time_replays(model: Any, pixel_values: Any, seconds: float) -> dict[str, Any]:
    import torch

    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):  # cuDNN and cuBLAS choose and allocate, which a capture must not
                model(pixel_values)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            model(pixel_values)
            memory = torch.cuda.max_memory_allocated() - before
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(pixel_values)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return {**timed(replay, seconds), "peak_memory": memory}


@contextmanager
def _gpu_alone(cell: Cell) -> Iterator[None]:
    """Waits until no other cell of the same benchmark has the GPU."""
    from filelock import FileLock

    with FileLock(Path(cell.folder, "gpu.lock")):
        yield


def _use_tensor_cores() -> None:
    """TF32 for products of single precision too, as for convolutions, and the fastest algorithm for each size."""
    import torch

    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True


def _random_input(cell: Cell) -> Any:
    import numpy as np

    return np.random.default_rng(0).standard_normal((cell.batch_size, 3, *cell.size), dtype=np.float32)


def _open_onnx(cell: Cell) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cell.threads
    options.log_severity_level = 3
    # The graph is made for every size; told the one that it will see, the runtime folds what depends on it.
    for axis, length in (("batch", cell.batch_size), ("height", cell.height), ("width", cell.width)):
        options.add_free_dimension_override_by_name(axis, length)
    path = Path(cell.folder, cell.model, cell.runtime, "model.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {session.get_inputs()[0].name: _random_input(cell)})


def _open_openvino(cell: Cell) -> Callable[[], Any]:
    import openvino

    core = openvino.Core()
    model = core.read_model(Path(cell.folder, cell.model, cell.runtime, "openvino_model.xml"))
    model.reshape([cell.batch_size, 3, *cell.size])  # as above
    # OpenVINO takes bfloat16 where the processor has it, unless told not to.
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": cell.threads,
    }
    network = core.compile_model(model, "CPU", settings)
    return partial(network, _random_input(cell))


def _open_litert(cell: Cell) -> Callable[[], Any]:
    from ai_edge_litert.interpreter import Interpreter

    path = Path(cell.folder, cell.model, cell.runtime, "model.tflite")
    network = Interpreter(path, num_threads=cell.threads).get_signature_runner()
    return partial(network, pixel_values=_random_input(cell))


_OPEN = {"onnx": _open_onnx, "openvino": _open_openvino, "litert": _open_litert}


def _measure_training(cell: Cell) -> dict[str, Any]:
    """One step: forward pass, loss at the size of the labels, backward pass, AdamW.

    What `labels=` gives is each model's own: Transformers' models upsample all logits of the batch at once, LeMoRe and
    LR-ASPP here some rows at a time, which takes a fraction of the time and the memory. With `"one-loss"` all take the
    latter, as `scripts/train.py` trains them.
    """
    import torch

    from lemore_hf.benchmarking.models import build_model
    from lemore_hf.loss_lemore import segmentation_loss

    torch.set_num_threads(cell.threads)
    layout = memory_format(cell.layout)
    model = build_model(cell.model, cell.num_labels, for_training=True).to(memory_format=layout)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    pixel_values = torch.randn(cell.batch_size, 3, *cell.size).contiguous(memory_format=layout)
    labels = torch.randint(cell.num_labels, (cell.batch_size, *cell.size))

    def step() -> None:
        optimizer.zero_grad()
        if cell.runtime == "one-loss":
            loss = segmentation_loss(model(pixel_values).logits, labels)
        else:
            loss = model(pixel_values, labels=labels).loss
        loss.backward()
        optimizer.step()

    memory = peak_memory(step)
    return {**timed(step, cell.seconds), "peak_memory": memory}


# From a picture's file to its label map


def _measure_picture(cell: Cell) -> dict[str, Any]:
    import torch
    import transformers

    from lemore_hf.benchmarking.models import load_segmenter

    torch.set_num_threads(cell.threads)
    transformers.logging.set_verbosity_error()
    picture = Path(cell.folder, "picture.jpg")
    model, image_processor = load_segmenter(cell.model, Path(cell.folder), cell.layout, cell.num_labels)
    watch = _Stopwatch()
    make = {"pipeline": _pipeline_run, "calls": _calls_run}[cell.runtime]
    run = make(model, image_processor, picture, watch)

    memory = peak_memory(run)
    watch.laps.clear()
    result = timed(run, cell.seconds)
    # The warm-up's laps come first.
    stages = {stage: statistics.median(laps[-result["runs"] :]) for stage, laps in watch.laps.items()}
    stages["rest"] = result["median"] - sum(stages.values())
    return {**result, "peak_memory": memory, "stages": stages}


class _Stopwatch:
    """Times the calls of functions, by stage."""

    def __init__(self) -> None:
        self.laps: dict[str, list[float]] = defaultdict(list)

    def __call__(self, stage: str, function: Callable) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.laps[stage].append(time.perf_counter() - start)
            return result

        return wrapped


def _calls_run(model: Any, image_processor: Any, picture: Path, watch: _Stopwatch) -> Callable[[], Any]:
    import torch
    from PIL import Image

    def decode(path: Path) -> Image.Image:
        with Image.open(path) as image:
            return image.convert("RGB")

    decode = watch("decode", decode)
    process = watch("processor", partial(image_processor, return_tensors="pt"))
    network = watch("network", model)
    post_process = watch("post-processing", image_processor.post_process_semantic_segmentation)

    def run() -> torch.Tensor:
        with torch.inference_mode():
            image = decode(picture)
            outputs = network(**process(image))
            return post_process(outputs, target_sizes=[image.size[::-1]])[0]

    return run


def _pipeline_run(model: Any, image_processor: Any, picture: Path, watch: _Stopwatch) -> Callable[[], Any]:
    """`transformers.pipeline`, its own steps timed in place; "rest" is the masks that it draws, one for each class."""
    from transformers import pipeline
    from transformers.pipelines import image_segmentation

    segmenter = pipeline("image-segmentation", model=model, image_processor=image_processor, device="cpu")
    image_segmentation.load_image = watch("decode", image_segmentation.load_image)
    segmenter._forward = watch("network", segmenter._forward)
    image_processor.preprocess = watch("processor", image_processor.preprocess)
    image_processor.post_process_semantic_segmentation = watch(
        "post-processing", image_processor.post_process_semantic_segmentation
    )
    return partial(segmenter, str(picture))


# The machine, and what the other cells need


def _measure_peaks(cell: Cell) -> dict[str, Any]:
    """What the machine does at most: multiply-accumulates of a large matrix product, and bytes read and written by a
    large copy, per second."""
    import torch

    device = "cuda" if cell.on_gpu else "cpu"
    dtype = torch.bfloat16 if cell.runtime == "cuda-bfloat16" else torch.float32
    torch.set_num_threads(cell.threads)
    if cell.on_gpu:
        _use_tensor_cores()
    synchronize = torch.cuda.synchronize if cell.on_gpu else (lambda: None)
    with _gpu_alone(cell) if cell.on_gpu else nullcontext():
        side = 8192 if cell.on_gpu else 2048
        left, right = torch.randn(2, side, side, device=device).to(dtype)
        source = torch.ones(2**28, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)

        def multiply() -> None:
            torch.mm(left, right)
            synchronize()

        def copy() -> None:
            target.copy_(source)
            synchronize()

        product, copied = timed(multiply, cell.seconds), timed(copy, cell.seconds)
    return {
        "macs_per_second": side**3 / product["median"],
        "bytes_per_second": 2 * source.numel() / copied["median"],
    }


def _describe_machine(cell: Cell) -> dict[str, Any]:
    import platform
    from importlib import metadata

    import torch

    from lemore_hf.hardware import processor_name, usable_cores

    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "cores": usable_cores(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }


def _prepare(cell: Cell) -> dict[str, Any]:
    from lemore_hf.benchmarking.preparation import prepare

    return prepare(cell)


_MEASUREMENTS = {
    "machine": _describe_machine,
    "prepare": _prepare,
    "peaks": _measure_peaks,
    "inference": _measure_inference,
    "training": _measure_training,
    "picture": _measure_picture,
}


if __name__ == "__main__":
    print(json.dumps(measure(Cell(**json.loads(sys.argv[1])))))
