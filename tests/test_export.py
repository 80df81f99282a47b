# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Exports, each run in its own runtime and held against PyTorch on real frames."""

import io
import json
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from launching import launch, run_here
from PIL import Image
from quick_fit import quick_fit
from torch import nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation
from transformers.exporters.utils import apply_patches

from lemore_hf import LeMoReConfig, LeMoReForImageClassification, LeMoReForSemanticSegmentation
from lemore_hf import export as export_module
from lemore_hf.checkpointing import CheckpointError
from lemore_hf.data.scenes import draw_scene
from lemore_hf.evaluation import load_trained_model
from lemore_hf.export import ExportManifest, SegmentationGraph, export_model, network_input, quietly
from lemore_hf.image_processing_lemore import LeMoReImageProcessor
from lemore_hf.inference import (
    ExportedNetwork,
    Segmenter,
    comparison_sizes,
    find_model,
    label_agreement,
    read_picture,
    read_pictures,
)
from lemore_hf.transformers_js import export_for_transformers_js

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "export.py"
PACKAGES = {
    "onnx": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino", "onnx", "onnxscript"),
    "executorch": ("executorch",),
    "torch": (),
    "litert": ("litert_torch", "ai_edge_litert"),
}
QUANTIZERS = {"openvino": ("nncf",), "litert": ("ai_edge_quantizer",)}
CLASSES = {number: f"class {number}" for number in range(11)}


Samples = list[tuple[Image.Image, Image.Image]]


@pytest.fixture(scope="module")
def samples(camvid_dir_if_there: Path | None) -> Samples:
    """Six frames with their label maps: CamVid's, or drawn ones where CamVid is not there."""
    import pyarrow.parquet

    if camvid_dir_if_there is None:
        return [draw_scene(number, (360, 480), daylight=True) for number in range(6)]
    rows = pyarrow.parquet.read_table(camvid_dir_if_there / "test.parquet", columns=["image", "label"]).to_pylist()
    return [
        tuple(Image.open(io.BytesIO(row[column]["bytes"])) for column in ("image", "label"))
        for row in rows[:: len(rows) // 6][:6]
    ]


@pytest.fixture(scope="module")
def frames(samples: Samples) -> list[Image.Image]:
    return [image for image, _ in samples]


@pytest.fixture(scope="module")
def image_processor() -> LeMoReImageProcessor:
    return LeMoReImageProcessor(size={"height": 96, "width": 128})


@pytest.fixture(scope="module")
def model(samples: Samples, image_processor: LeMoReImageProcessor) -> LeMoReForSemanticSegmentation:
    torch.manual_seed(0)
    config = LeMoReConfig(
        num_labels=11,
        id2label=CLASSES,
        image_size=(96, 128),
        hidden_sizes=(8, 12, 16, 24),
        decoder_hidden_size=32,
        axis_initialization="normal",
        palette=[[20 * number, 255 - 20 * number, number] for number in range(11)],
    )
    images, labels = zip(*samples, strict=True)
    batch = image_processor(list(images), segmentation_maps=list(labels), return_tensors="pt")
    return quick_fit(LeMoReForSemanticSegmentation(config), **batch, steps=80)


@pytest.fixture(scope="module")
def checkpoint(model, image_processor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def from_command_line(checkpoint, frames, tmp_path_factory) -> tuple[Path, str]:
    """An ONNX export with post-processing, made by the script, and what it printed."""
    for package in PACKAGES["onnx"]:
        pytest.importorskip(package, reason="needs the extra lemore-hf[onnx]")
    pictures, output = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("exports") / "onnx"
    for number, frame in enumerate(frames[:3]):
        frame.save(pictures / f"{number}.png")
    words = ("--model", checkpoint, "--format", "onnx", "--output", output)
    command = launch(1, SCRIPT, *words, "--with-postprocessing", "--compare", pictures)
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return output, result.stdout


@pytest.fixture(scope="module")
def exported(model, image_processor, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Exports made once, by their options."""
    folders: dict[tuple, Path] = {}

    def export(export_format: str, with_postprocessing: bool = False) -> Path:
        for package in PACKAGES[export_format]:
            pytest.importorskip(package, reason=f"{export_format} needs the extra lemore-hf[{export_format}]")
        key = (export_format, with_postprocessing)
        if key == ("onnx", True):
            return request.getfixturevalue("from_command_line")[0]
        if key not in folders:
            # Limits where the runtime needs them, and once where it does not.
            limited = export_format == "executorch" or key == ("torch", False)
            limits = {"max_size": 640, "max_batch_size": 3} if limited else {}
            folders[key] = tmp_path_factory.mktemp("exports") / export_format
            export_model(
                model, image_processor, folders[key], export_format, with_postprocessing=with_postprocessing, **limits
            )
        return folders[key]

    return export


# OpenVINO converts the ONNX graph: one of its two forms is enough.
@pytest.mark.parametrize(
    ("export_format", "with_postprocessing"),
    [("torch", False), ("torch", True), ("onnx", False), ("onnx", True), ("openvino", True), ("executorch", True)],
)
def test_labels_are_pytorchs(export_format, with_postprocessing, exported, checkpoint, frames):
    network, reference = Segmenter(exported(export_format, with_postprocessing)), Segmenter(checkpoint)
    sizes = comparison_sizes(reference.config, network.manifest)
    assert len(set(sizes)) == 3
    assert len(np.unique(reference.segment_at(frames[:1], sizes[0]))) > 3
    # Beside the three: the smallest, an elongated one, and one that PyTorch mixes along the axes from right to left.
    for size in [*sizes, (32, 33), (64, 190), (300, 577)]:
        for batch_size in (1, 3):
            assert label_agreement(network, reference, frames, size, batch_size) >= 0.999, (size, batch_size)


@pytest.mark.parametrize("export_format", ["onnx", "torch"])
@pytest.mark.parametrize("size", [(96, 128), (33, 47), (300, 577)])
def test_logits_are_pytorchs(export_format, size, exported, model):
    pixel_values = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = model(pixel_values).logits
    logits = torch.from_numpy(Segmenter(exported(export_format)).run(pixel_values.numpy()))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("with_postprocessing", [False, True])
def test_litert_gives_pytorchs_labels_at_its_one_size(with_postprocessing, exported, checkpoint, frames):
    network, reference = Segmenter(exported("litert", with_postprocessing)), Segmenter(checkpoint)
    assert comparison_sizes(reference.config, network.manifest) == [(96, 128)]
    assert label_agreement(network, reference, frames, (96, 128), 1) >= 0.999
    assert len(np.unique(network(frames[0]))) > 3
    with pytest.raises(ValueError, match=r"for one image of 96×128 pixels, got 1 of 128×96: .*`--image-size`"):
        network.segment_at(frames[:1], (128, 96))
    with pytest.raises(ValueError, match="got 2 of 96×128"):
        network.segment_at(frames[:2], (96, 128))


def test_litert_takes_the_size_that_it_is_asked_for(model, image_processor, checkpoint, frames, tmp_path):
    for package in PACKAGES["litert"]:
        pytest.importorskip(package, reason="needs the extra lemore-hf[litert]")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"with_postprocessing": True, "image_size": (64, 160)}
    export_model(model, image_processor, tmp_path / "export", "litert", **options)
    network, reference = Segmenter(tmp_path / "export"), Segmenter(checkpoint)
    assert label_agreement(network, reference, frames, (64, 160), 1) >= 0.999
    # Pictures of any size are brought to it, by a processor of the export's own.
    assert network(frames[0]).shape == frames[0].size[::-1]
    assert dict(network.image_processor.size) == {"height": 64, "width": 160}
    assert dict(image_processor.size) == {"height": 96, "width": 128}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("export_format", "with_postprocessing"), [("onnx", True), ("openvino", False)])
def test_a_graph_of_one_size_has_neither_branches_nor_free_axes(
    export_format, with_postprocessing, model, image_processor, checkpoint, frames, tmp_path
):
    for package in PACKAGES[export_format]:
        pytest.importorskip(package, reason=f"{export_format} needs the extra lemore-hf[{export_format}]")
    size = (300, 577)  # which PyTorch mixes along the axes from right to left
    options = {"with_postprocessing": with_postprocessing, "image_size": size}
    manifest = export_model(model, image_processor, tmp_path / "export", export_format, **options)
    if export_format == "onnx":
        import onnx_ir

        graph = onnx_ir.load(tmp_path / "export" / manifest.file).graph
        kinds = [node.op_type for node in graph]
        lengths = [length for value in (*graph.inputs, *graph.outputs) for length in value.shape]
    else:
        import openvino

        graph = openvino.Core().read_model(tmp_path / "export" / manifest.file)
        kinds = [operation.get_type_name() for operation in graph.get_ops()]
        lengths = [length.get_length() for port in (*graph.inputs, *graph.outputs) for length in port.partial_shape]
    assert "If" not in kinds
    assert all(isinstance(length, int) for length in lengths), lengths
    network, reference = Segmenter(tmp_path / "export"), Segmenter(checkpoint)
    for _ in range(2):  # the second time a runtime compiles it for its size
        assert label_agreement(network, reference, frames, size, 1) >= 0.999
    assert len(np.unique(network(frames[0]))) > 3
    assert network(frames[0]).shape == frames[0].size[::-1]
    with pytest.raises(ValueError, match=r"one image of 300×577 pixels, got 2 of 300×577: .*`--image-size`"):
        network.segment_at(frames[:2], size)


def test_a_litert_file_alone_says_what_it_takes_and_gives(exported):
    path = exported("litert", with_postprocessing=True) / "model.tflite"
    from ai_edge_litert.interpreter import Interpreter

    segment = Interpreter(path).get_signature_runner()
    ((name, image),), ((result, labels),) = segment.get_input_details().items(), segment.get_output_details().items()
    assert (name, image["dtype"], image["shape"].tolist()) == ("image", np.uint8, [1, 96, 128, 3])
    assert (result, labels["dtype"], labels["shape"].tolist()) == ("labels", np.uint8, [1, 96, 128])
    with zipfile.ZipFile(path) as notes:
        assert json.loads(notes.read("id2label.json"))["7"] == "class 7"
        assert json.loads(notes.read("graph.json"))["image_size"] == [96, 128]
        assert json.loads(notes.read("image_processor.json"))["size"] == {"height": 96, "width": 128}


def test_a_graph_of_one_size_says_which(tmp_path):
    ExportManifest("litert", "model.tflite", max_batch_size=1, image_size=(96, 128)).save(tmp_path)
    manifest = ExportManifest.load(tmp_path)
    manifest.check_shape(1, 96, 128)
    for batch_size, height, width in [(1, 128, 96), (1, 97, 128), (2, 96, 128)]:
        with pytest.raises(ValueError, match=f"one image of 96×128 pixels, got {batch_size} of {height}×{width}"):
            manifest.check_shape(batch_size, height, width)
    assert comparison_sizes(LeMoReConfig(image_size=(360, 480)), manifest) == [(96, 128)]


def test_openvino_gives_the_same_when_a_size_comes_again(exported, model):
    """From the second time on a network compiled for the size answers, until another one comes."""
    segmenter = Segmenter(exported("openvino"))
    for size in [(96, 128), (96, 128), (96, 128), (33, 47), (96, 128), (96, 128), (33, 47), (33, 47)]:
        pixel_values = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = model(pixel_values).logits
        logits = torch.from_numpy(segmenter.run(pixel_values.numpy()))
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's count of pages")
def test_openvino_s_memory_does_not_grow_with_the_sizes_that_it_has_seen(exported):
    segmenter = Segmenter(exported("openvino"), num_threads=1)
    sizes = np.random.default_rng(0).integers(32, 160, (91, 2))

    def bytes_after(new: np.ndarray) -> int:
        for height, width in new:
            segmenter.run(np.zeros((1, 3, height, width), np.float32))
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    at_first, after_some, after_many = map(bytes_after, (sizes[:1], sizes[1:31], sizes[31:]))
    assert after_many - after_some < after_some - at_first


def test_whole_picture_gets_the_same_labels_from_checkpoint_and_export(exported, checkpoint, frames):
    network, reference = Segmenter(exported("onnx")), Segmenter(checkpoint)
    labels = network(frames[0])
    assert labels.shape == frames[0].size[::-1]
    assert (labels == reference(frames[0])).mean() >= 0.999
    inside = Segmenter(exported("onnx", with_postprocessing=True))(frames[0])
    assert inside.shape == labels.shape
    assert (inside == labels).mean() > 0.9  # upsampled by the nearest label, not from the scores


def test_pictures_as_programs_have_them(checkpoint, frames, tmp_path):
    segmenter = Segmenter(checkpoint)
    expected = segmenter(frames[0])
    frames[0].save(tmp_path / "frame.png")
    for picture in (np.asarray(frames[0]), tmp_path / "frame.png", str(tmp_path / "frame.png")):
        np.testing.assert_array_equal(segmenter(picture), expected)
    grey = frames[0].convert("L")
    np.testing.assert_array_equal(segmenter(np.asarray(grey)[..., None]), segmenter(grey))
    # As depth and thermal cameras have them: the README sends pictures of 16 bits here.
    np.testing.assert_array_equal(segmenter(np.asarray(grey).astype(np.uint16) * 257), segmenter(grey))
    for picture, message in (
        (np.asarray(frames[0]) / 255, r"8-bit values \(uint8\).*got float64"),
        (np.asarray(frames[0]).transpose(2, 0, 1), r"in \(height, width, 3\), got uint8 in \(3, "),
        (torch.zeros(3, 96, 128), "the path of a file, got Tensor"),
        (frames[:2], "Expected one picture, .* got list"),
    ):
        with pytest.raises(TypeError, match=message):
            segmenter(picture)
    with pytest.raises(ValueError, match=r"`num_threads` must be at least 1.* got 0"):
        Segmenter(checkpoint, num_threads=0)


def test_arrays_of_four_channels_for_a_network_that_takes_them(tmp_path):
    """Such as red, green, blue and near infrared: none of them is an opacity."""
    torch.manual_seed(1)  # of half of all seeds the network sees one class everywhere
    config = LeMoReConfig(num_channels=4, num_labels=3, image_size=(96, 128), axis_initialization="normal")
    LeMoReForSemanticSegmentation(config).save_pretrained(tmp_path)
    LeMoReImageProcessor(
        size={"height": 96, "width": 128}, do_convert_rgb=False, image_mean=[0.5] * 4, image_std=[0.25] * 4
    ).save_pretrained(tmp_path)
    bands = np.random.default_rng(0).integers(0, 256, (96, 128, 4), dtype=np.uint8)
    segmenter = Segmenter(tmp_path)
    pixel_values = (bands.transpose(2, 0, 1)[None] / np.float32(255) - np.float32(0.5)) / np.float32(0.25)
    logits = torch.from_numpy(segmenter.run(pixel_values.astype(np.float32)))
    expected = torch.nn.functional.interpolate(logits, (96, 128), mode="bilinear").argmax(1)[0].numpy()
    labels = segmenter(bands)
    assert len(np.unique(labels)) > 1
    assert (labels == expected).mean() > 0.999
    with pytest.raises(TypeError, match=r"leave the last channel out"):
        segmenter(bands[..., :2])


def test_a_photo_that_is_open_is_turned_upright(checkpoint, frames):
    lying = frames[0].transpose(Image.Transpose.ROTATE_90)
    lying.getexif()[0x0112] = 6  # to be turned clockwise for display
    segmenter = Segmenter(checkpoint)
    np.testing.assert_array_equal(segmenter(lying), segmenter(frames[0]))


def test_pytorch_has_as_many_threads_as_are_asked_for(checkpoint):
    before = torch.get_num_threads()
    try:
        for number in (3, 1):
            Segmenter(checkpoint, num_threads=number)
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)


def test_a_network_named_from_another_folder_is_found_where_it_lies(checkpoint, frames, tmp_path, monkeypatch):
    """A process that is spawned need not run where this one did."""
    monkeypatch.chdir(checkpoint.parent)
    sent = pickle.dumps(Segmenter(checkpoint.name))
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(pickle.loads(sent)(frames[0]), Segmenter(checkpoint)(frames[0]))


def test_an_export_takes_images_of_half_precision(exported):
    network, images = ExportedNetwork(exported("torch")), torch.randn(2, 3, 96, 128).half()
    torch.testing.assert_close(network(images).logits, network(images.float()).logits)


def test_only_the_graph_stands_for_its_folder(exported):
    folder = exported("torch")
    assert find_model(folder / "model.pt2") == folder
    for other in ("config.json", "preprocessor_config.json"):
        with pytest.raises(FileNotFoundError, match=rf"{other} is not the graph of an export"):
            find_model(folder / other)


@pytest.mark.parametrize("native", [(360, 480), (32, 32), (720, 960)])
@pytest.mark.parametrize("max_size", [None, 640])
def test_an_export_is_compared_at_sizes_that_it_takes(native, max_size):
    manifest = ExportManifest("onnx", "model.onnx", max_size=max_size)
    sizes = comparison_sizes(LeMoReConfig(image_size=native), manifest)
    assert len(sizes) == 3
    for size in sizes:
        manifest.check_shape(1, *size)
    if native == (360, 480) and max_size is None:
        assert sizes == [native, (271, 361), (451, 601)], "odd ones, where rounding up shows"


def test_padding_and_cropping_are_left_out(checkpoint, frames, tmp_path):
    """They are for training; whole pictures are segmented."""
    padding = Path(shutil.copytree(checkpoint, tmp_path / "padding"))
    processor = LeMoReImageProcessor.from_pretrained(checkpoint, do_pad=True, pad_size={"height": 256, "width": 256})
    processor.save_pretrained(padding)
    np.testing.assert_array_equal(Segmenter(padding)(frames[0]), Segmenter(checkpoint)(frames[0]))


# What travels with the files


def test_onnx_file_alone_says_what_it_takes_and_gives(exported, image_processor):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra lemore-hf[onnx]")
    folder = exported("onnx", with_postprocessing=True)
    assert sorted(file.name for file in folder.glob("model.*")) == ["model.onnx"]  # no weights beside it
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    notes = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    assert {int(number): name for number, name in notes["id2label"].items()} == CLASSES
    assert notes["palette"][3] == [60, 195, 3]
    assert notes["image_processor"]["image_mean"] == list(image_processor.image_mean)
    assert notes["graph"]["with_postprocessing"] is True
    ((image,), (labels,)) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(uint8)", ["batch", "height", "width", 3])
    assert (labels.name, labels.type, labels.shape) == ("labels", "tensor(uint8)", ["batch", "height", "width"])
    assert str(ROOT).encode() not in (folder / "model.onnx").read_bytes()


def test_onnx_graph_gives_old_runtimes_nothing_to_merge_wrongly(exported):
    """ONNX Runtime 1.23 takes a border of zeros for the pooling's own, and divides by less then."""
    import onnx

    graph = onnx.load(exported("onnx") / "model.onnx").graph
    makers = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    pads = [makers[node.input[0]] for node in graph.node if node.op_type == "AveragePool"]
    assert [pad.op_type for pad in pads] == ["Pad"] * 4
    assert all(0 < constants[pad.input[2]] < 1e-20 for pad in pads)


def test_openvino_and_torch_files_hold_the_class_names(exported):
    notes = {"id2label": ""}
    torch.export.load(exported("torch") / "model.pt2", extra_files=notes)
    assert json.loads(notes["id2label"])["7"] == "class 7"
    openvino = pytest.importorskip("openvino", reason="needs the extra lemore-hf[openvino]")
    network = openvino.Core().read_model(exported("openvino", with_postprocessing=True) / "openvino_model.xml")
    assert json.loads(network.get_rt_info(["lemore", "id2label"]).astype(str))["7"] == "class 7"


# int8 and float16


@pytest.mark.parametrize("export_format", ["onnx", "openvino", "litert"])
def test_int8_is_close(export_format, model, image_processor, checkpoint, frames, tmp_path):
    for package in (*PACKAGES[export_format], *QUANTIZERS.get(export_format, ())):
        pytest.importorskip(package, reason=f"{export_format} needs the extra lemore-hf[{export_format}]")
    folder = tmp_path / export_format
    export_model(model, image_processor, folder, export_format, precision="int8", calibration_images=frames)
    assert label_agreement(Segmenter(folder), Segmenter(checkpoint), frames, (96, 128), 1) > 0.9
    if export_format == "onnx":
        check_static_per_channel(folder / "model.onnx")
    if export_format == "litert":
        check_litert_static_per_channel(folder / "model.tflite")


def check_static_per_channel(path: Path) -> None:
    import onnx

    graph = onnx.load(path).graph
    makers = {output: node for node in graph.node for output in node.output}
    constants = {constant.name: onnx.numpy_helper.to_array(constant) for constant in graph.initializer}
    first, *convolutions, last = [node for node in graph.node if node.op_type == "Conv"]
    assert first.input[0] == graph.input[0].name
    assert constants[first.input[1]].dtype == constants[last.input[1]].dtype == np.float32
    assert constants[last.input[1]].shape[0] == 11
    lines = [
        node for node in convolutions if constants.get(node.input[1], np.empty(0)).shape[1:] in ((1, 3, 1), (1, 1, 3))
    ]
    assert len(lines) == 16, "two pairs of depthwise rows and columns in each of four blocks, which stay in float32"
    assert {constants[node.input[1]].dtype for node in lines} == {np.dtype(np.float32)}
    quantized = [node for node in convolutions if node not in lines]
    assert {makers[name].op_type for node in quantized for name in node.input[:2]} == {"DequantizeLinear"}
    for weight, scale in (makers[node.input[1]].input[:2] for node in quantized):
        assert constants[weight].dtype == np.int8
        assert constants[scale].size == constants[weight].shape[0]


def check_litert_static_per_channel(path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    network = Interpreter(path)
    tensors = {tensor["index"]: tensor for tensor in network.get_tensor_details()}
    convolutions = [op["inputs"] for op in network._get_ops_details() if op["op_name"].endswith("CONV_2D")]
    images, weights = ([tensors[inputs[place]] for inputs in convolutions] for place in (0, 1))
    assert [image["dtype"] for image in images] == [weight["dtype"] for weight in weights]
    first, *others, last = weights
    assert first["dtype"] == last["dtype"] == np.float32
    assert (first["shape"][3], last["shape"][0]) == (3, 11)
    quantized = [weight for weight in others if weight["dtype"] == np.int8]
    assert len(quantized) >= len(others) - 2, (
        "a channel attention whose squeezed channels are all zero is left as it is"
    )
    for weight in quantized:
        scales, axis = (weight["quantization_parameters"][name] for name in ("scales", "quantized_dimension"))
        assert len(scales) == weight["shape"][axis] > 1


@pytest.mark.parametrize(("export_format", "file"), [("onnx", "model.onnx"), ("litert", "model.tflite")])
def test_float16_weights_for_the_web(export_format, file, image_processor, frames, tmp_path):
    for package in (*PACKAGES[export_format], *QUANTIZERS.get(export_format, ())):
        pytest.importorskip(package, reason=f"needs the extra lemore-hf[{export_format}]")
    torch.manual_seed(0)
    config = LeMoReConfig(num_labels=150, axis_initialization="normal")  # the released size
    model = LeMoReForSemanticSegmentation(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_model(model, image_processor, tmp_path / "half", export_format, precision="float16")
    assert (tmp_path / "half" / file).stat().st_size < 4e6
    # The model is left as it was.
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    pixel_values = image_processor(frames[:1], return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model.eval()(pixel_values).logits
    logits = torch.from_numpy(Segmenter(tmp_path / "half").run(pixel_values.numpy()))
    assert (logits - expected).abs().max() < 0.01 * expected.abs().max()


@pytest.mark.parametrize(
    ("export_format", "with_postprocessing"), [("onnx", True), ("onnx", False), ("openvino", True), ("litert", True)]
)
def test_threads_get_their_own_pictures_labels(export_format, with_postprocessing, exported, frames):
    segmenter = Segmenter(exported(export_format, with_postprocessing), num_threads=1)
    expected = [segmenter(frame) for frame in frames[:4]]
    assert not np.array_equal(expected[0], expected[1])
    with ThreadPoolExecutor(4) as threads:
        for actual, labels in zip(threads.map(segmenter, frames[:4] * 10), expected * 10, strict=True):
            assert (actual == labels).mean() > 0.999  # compiled for the size some rounding differs


@pytest.mark.parametrize("with_postprocessing", [False, True])
def test_a_frame_of_numbers_is_a_picture(with_postprocessing, exported, frames):
    segmenter = Segmenter(exported("onnx", with_postprocessing))
    labels = segmenter(np.asarray(frames[0]))
    np.testing.assert_array_equal(labels, segmenter(frames[0]))
    assert labels.dtype == np.int64
    labels[labels == 0] = 1  # they are the caller's


@pytest.mark.parametrize("with_postprocessing", [False, True])
@pytest.mark.parametrize("scale", [1, 255])
def test_pictures_of_floats_are_as_those_of_bytes(scale, with_postprocessing, exported, frames, tmp_path):
    segmenter, grey = Segmenter(exported("onnx", with_postprocessing)), frames[0].convert("L")
    Image.fromarray(np.asarray(grey, np.float32) * np.float32(scale / 255)).save(tmp_path / "grey.tiff")
    labels = segmenter(read_picture(tmp_path / "grey.tiff"))
    assert (labels == segmenter(grey)).mean() > 0.99
    with Image.open(tmp_path / "grey.tiff") as opened:
        for same in (tmp_path / "grey.tiff", opened, np.asarray(opened)):
            np.testing.assert_array_equal(segmenter(same), labels)


@pytest.mark.parametrize(
    ("frame", "error", "message"),
    [
        (np.zeros((96, 128, 4), np.uint8), TypeError, r"\(96, 128, 4\): .*`frame\[\.\.\., :3\]`"),
        (np.zeros((96, 128, 2), np.uint8), TypeError, r"`frame\[\.\.\., :1\]`"),
        (np.zeros((0, 128, 3), np.uint8), ValueError, r"\(0, 128, 3\) has no pixels"),
        (np.full((96, 128), 300.0, np.float32), ValueError, r"\[0, 255\]"),
        (np.zeros((20, 40, 3), np.uint8), ValueError, "The network takes images of at least 32×32"),
    ],
)
def test_a_frame_that_is_no_picture_is_refused(frame, error, message, model, tmp_path):
    model.save_pretrained(tmp_path)
    LeMoReImageProcessor(do_resize=False).save_pretrained(tmp_path)
    with pytest.raises(error, match=message):
        Segmenter(tmp_path)(frame)


@pytest.mark.parametrize("values", [np.zeros(96 * 128 * 3, np.uint8), np.zeros((), np.uint8)])
def test_what_is_no_rectangle_of_pixels_is_refused(values, checkpoint):
    """Such as the bytes of a file, or a camera's buffer whose shape was left out."""
    with pytest.raises(TypeError, match=r"\(height, width, 3\) or \(height, width\), got \("):
        Segmenter(checkpoint)(values)


def test_a_frame_with_a_pixel_that_is_no_number_is_refused(exported):
    frame = np.full((96, 128), 7.0, np.float32)
    frame[50, 60] = np.nan
    with pytest.raises(ValueError, match=r"\[0, 255\].* not finite"):
        Segmenter(exported("torch", True))(frame)


def test_the_network_is_run_on_any_layout_of_an_array(checkpoint):
    segmenter, images = Segmenter(checkpoint), np.random.default_rng(0).normal(size=(1, 3, 96, 128)).astype(np.float32)
    flipped = images[..., ::-1]
    logits = segmenter.run(np.ascontiguousarray(flipped))
    np.testing.assert_array_equal(segmenter.run(flipped), logits)
    images.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(segmenter.run(images[..., ::-1]), logits)
        segmenter.run(images)


@pytest.mark.parametrize("with_postprocessing", [False, True])
def test_a_batch_of_another_shape_or_dtype_is_named(with_postprocessing, exported):
    segmenter = Segmenter(exported("torch", with_postprocessing))
    dtype = np.uint8 if with_postprocessing else np.float32
    with pytest.raises(ValueError, match=r"must have four dimensions, .*got \(3, 96, 128\)"):
        segmenter.run(np.zeros((3, 96, 128), dtype))
    with pytest.raises(TypeError, match=f"must be of {np.dtype(dtype)}, got float64: .*astype"):
        segmenter.run(np.zeros((1, 3, 96, 128), np.float64))


def test_autocast_around_a_segmenter(checkpoint, frames):
    segmenter = Segmenter(checkpoint)
    labels = segmenter(frames[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert (segmenter(frames[0]) == labels).mean() > 0.9


@pytest.mark.parametrize("format_of_model", ["onnx", "pytorch"])
def test_other_processes_open_their_own(format_of_model, exported, checkpoint, frames):
    """Threads of a runtime do not survive a fork, so that a network from before it would wait for them forever."""
    segmenter = Segmenter(exported("onnx") if format_of_model == "onnx" else checkpoint, num_threads=2)
    labels = segmenter(frames[0])
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        np.testing.assert_array_equal(pool.submit(segmenter, frames[0]).result(), labels)
    process = os.fork() if hasattr(os, "fork") else None
    if process == 0:
        signal.alarm(60)
        try:
            segmenter(frames[0])
        except RuntimeError as error:
            os._exit(3 if "make one in each process" in str(error) else 4)
        os._exit(5)
    if process:
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 3


def test_what_exporters_print_needs_no_encoding():
    """PyTorch's marks its steps with signs that the encodings of Windows lack, of which ASCII is a part."""
    code = "from lemore_hf.export import quietly\nwith quietly(): print('\\u2705')"
    ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | ascii_only)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


# Command line and bad input


def test_command_line_exports_and_compares(from_command_line):
    folder, printed = from_command_line
    assert (folder / "model.onnx").is_file()
    assert json.loads((folder / "config.json").read_text())["is_fused"]
    for batch_size in (1, 3):
        assert printed.count(f"batch {batch_size}: ") == 3  # sizes


def test_command_line_names_a_checkpoint_that_is_not_there(tmp_path, monkeypatch):
    words = ("--model", tmp_path / "absent", "--format", "onnx", "--output", tmp_path / "out")
    with pytest.raises(SystemExit, match="absent is no folder here, and no model of the Hub"):
        run_here(monkeypatch, SCRIPT, *words)


def test_command_line_names_what_is_wrong(checkpoint, tmp_path, monkeypatch):
    message = r"^ValueError: .*must be one of \['onnx', 'openvino', 'executorch', 'torch', 'litert'\], got 'tflite'\.$"
    with pytest.raises(SystemExit, match=message):
        run_here(monkeypatch, SCRIPT, "--model", checkpoint, "--format", "tflite", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"export_format": "tflite"}, r"onnx.*openvino.*executorch.*torch.*'tflite'"),
        ({"export_format": "torch", "precision": "int8"}, "int8 is for the formats 'onnx', 'openvino' and 'litert'"),
        ({"export_format": "onnx", "precision": "int4"}, "'int4'"),
        ({"export_format": "onnx", "precision": "int8"}, "calibration_images"),
        ({"export_format": "onnx", "calibration_images": [Image.new("RGB", (40, 40))]}, "`precision` is 'float32'"),
        ({"export_format": "torch", "output_dir": "."}, "'.' has no name"),
        ({"export_format": "torch", "max_size": 31}, "at least 32.*31"),
        ({"export_format": "onnx", "max_size": 127}, "`max_size` is 127, .* brings pictures to 128 pixels on a side"),
        ({"export_format": "torch", "max_batch_size": 0}, "at least 1.*0"),
        (
            {"export_format": "torch", "image_size": (96, 128)},
            "for the formats .* 'litert', .* 'torch' takes every size",
        ),
        ({"export_format": "onnx", "image_size": (96, 128), "max_batch_size": 2}, "With `image_size` .* one image"),
        ({"export_format": "onnx", "image_size": (96, 31)}, "at least 32×32, got 96×31"),
        ({"export_format": "litert", "image_size": (31, 128)}, "at least 32×32, got 31×128"),
        ({"export_format": "litert", "max_size": 128}, "one image of one size: give it `image_size`"),
        ({"export_format": "litert", "max_batch_size": 2}, "leave out `max_size` and `max_batch_size`"),
        ({"export_format": "executorch", "precision": "float16"}, "float16 is for the formats .*'executorch'"),
    ],
)
def test_options_that_cannot_be_met(options, message, model, image_processor, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_model(model, image_processor, **{"output_dir": tmp_path / "out"} | options)
    assert not (tmp_path / "out").exists()


# Transformers.js, which tests/test_webassembly.py runs


def test_folder_for_transformers_js_holds_an_export_like_any_other(checkpoint, frames, tmp_path, monkeypatch, capsys):
    for package in PACKAGES["onnx"]:
        pytest.importorskip(package, reason="needs the extra lemore-hf[onnx]")
    folder, pictures = tmp_path / "js", tmp_path / "pictures"
    for kept in (folder, pictures):
        kept.mkdir()
    (folder / "README.md").write_text("a card", encoding="utf-8")
    frames[0].save(pictures / "frame.png")
    words = ["--model", checkpoint, "--format", "onnx", "--transformers-js", "--image-size", 96, 128]
    for _ in range(2):  # the second in place of the first
        run_here(monkeypatch, SCRIPT, *words, "--output", folder, "--compare", pictures)
    printed = capsys.readouterr().out
    assert printed.count(f"{folder / 'onnx' / 'model.onnx'}: float32") == 2
    assert printed.count("96×128, batch 1: ") == 2

    assert (folder / "README.md").read_text() == "a card"
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "segformer"
    assert config["id2label"] == {str(number): name for number, name in CLASSES.items()}
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert (settings["size"], settings["do_resize"]) == ({"height": 96, "width": 128}, True)
    assert LeMoReConfig.from_pretrained(folder / "onnx").model_type == "lemore"


@pytest.mark.parametrize(
    ("fields", "settings", "options", "message"),
    [
        ({"num_labels": 1}, {}, {}, "the model has a single label"),
        ({"num_channels": 4}, {}, {}, "RGB images, the model takes 4 channels"),
        ({}, {"size": {"max_height": 96, "max_width": 128}}, {}, "no `size` such as .*'max_height': 96"),
        ({}, {}, {"with_postprocessing": True}, "leave `with_postprocessing` out"),
        ({}, {}, {"precision": "int4"}, "'int4'"),
    ],
)
def test_what_transformers_js_would_take_for_something_else(fields, settings, options, message, tmp_path):
    small = LeMoReForSemanticSegmentation(LeMoReConfig(hidden_sizes=(8, 12, 16, 24), **fields))
    with pytest.raises(ValueError, match=message):
        export_for_transformers_js(small, LeMoReImageProcessor(**settings), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_not_replaced_by_what_transformers_js_takes(checkpoint, model, image_processor):
    files = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    with pytest.raises(ValueError, match=r"config\.json is another model's"):
        export_for_transformers_js(model, image_processor, checkpoint)
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == files


@pytest.mark.parametrize("content", ["{oops", "5", "null"])
def test_what_is_no_configuration_is_not_replaced_either(content, model, image_processor, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json is another model's"):
        export_for_transformers_js(model, image_processor, tmp_path)


def test_of_a_folder_for_transformers_js_the_export_in_it_is_named(tmp_path):
    (tmp_path / "onnx").mkdir()
    for name in ("config.json", "onnx/lemore_export.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"name the export in it, {re.escape(str(tmp_path / 'onnx'))}"):
        load_trained_model(tmp_path)


@pytest.mark.parametrize("options", [["--format", "torch"], ["--format", "onnx", "--with-postprocessing"]])
def test_command_line_says_what_transformers_js_is_for(options, checkpoint, tmp_path, monkeypatch, capsys):
    words = ("--model", checkpoint, "--output", tmp_path / "out", "--transformers-js", *options)
    with pytest.raises(SystemExit):
        run_here(monkeypatch, SCRIPT, *words)
    assert "--format onnx without --with-postprocessing" in capsys.readouterr().err


def test_a_damaged_export_is_told_from_a_missing_one(exported, tmp_path):
    folder = Path(shutil.copytree(exported("torch"), tmp_path / "export"))
    graph = folder / "model.pt2"
    graph.write_bytes(graph.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"model\.pt2 is damaged.*export the model again"):
        Segmenter(folder)
    (folder / "lemore_export.json").write_text('{"format": "onnx", "fi')
    with pytest.raises(CheckpointError, match=r"lemore_export\.json is damaged"):
        Segmenter(folder)


def test_only_a_segmentation_network_is_exported(checkpoint, image_processor, tmp_path, monkeypatch):
    peer = SegformerForSemanticSegmentation(SegformerConfig())
    with pytest.raises(TypeError, match="got a SegformerForSemanticSegmentation"):
        export_model(peer, image_processor, tmp_path / "out", "torch")
    copied = type("LeMoReForSemanticSegmentation", (SegformerForSemanticSegmentation,), {"__module__": "remote.code"})
    with pytest.raises(TypeError, match=r"got a LeMoReForSemanticSegmentation of remote\.code, another copy"):
        export_model(copied(SegformerConfig()), image_processor, tmp_path / "out", "torch")

    classifier = tmp_path / "classifier"
    LeMoReForImageClassification(LeMoReConfig.from_pretrained(checkpoint)).save_pretrained(classifier)
    image_processor.save_pretrained(classifier)
    with pytest.raises(CheckpointError, match="does not hold all weights of LeMoReForSemanticSegmentation"):
        Segmenter(classifier)
    with pytest.raises(SystemExit, match=r"^CheckpointError: .* does not hold all weights"):
        run_here(monkeypatch, SCRIPT, "--model", classifier, "--format", "torch", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_of_other_files_is_not_replaced(checkpoint, model, image_processor):
    files = sorted(checkpoint.iterdir())
    with pytest.raises(ValueError, match="no export of a model"):
        export_model(model, image_processor, checkpoint, "torch")
    assert sorted(checkpoint.iterdir()) == files


def test_an_export_is_replaced_and_what_lies_beside_it_is_not(model, image_processor, tmp_path):
    for _ in range(2):
        export_model(model, image_processor, tmp_path, "torch")
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match=r"would be lost: metrics\.json\. Move it elsewhere"):
        export_model(model, image_processor, tmp_path, "torch")
    assert (tmp_path / "metrics.json").is_file()


def test_more_labels_than_a_byte_holds(image_processor, tmp_path):
    config = LeMoReConfig(num_labels=300, image_size=64, semantic_loss_ignore_index=-100)
    with pytest.raises(ValueError, match=r"255 labels.*300"):
        export_model(
            LeMoReForSemanticSegmentation(config), image_processor, tmp_path / "out", "torch", with_postprocessing=True
        )


@pytest.mark.parametrize("export_format", ["onnx", "openvino", "executorch", "litert"])
def test_missing_package_names_the_extra(export_format, model, image_processor, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install -e '\.\[{export_format}\]'"):
        export_model(model, image_processor, tmp_path / "out", export_format)


def test_a_runtime_that_cannot_be_imported_is_not_the_graphs_fault(checkpoint, tmp_path, monkeypatch):
    """As OpenVINO's where a container's user has neither a name nor HOME."""
    folder = shutil.copytree(checkpoint, tmp_path / "export")
    ExportManifest("openvino", "openvino_model.xml").save(folder)
    (tmp_path / "openvino.py").write_text('raise RuntimeError("Could not determine home directory.")')
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"openvino is installed, but cannot be imported: Could not determine home"):
        Segmenter(folder)


def test_calibration_folder_with_nothing_usable(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures"):
        read_pictures(tmp_path, 8)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="none of its 1 pictures can be read"):
        read_pictures(tmp_path, 8)
    with pytest.raises(ValueError, match="not a folder"):
        read_pictures(tmp_path / "absent", 8)
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    assert len(read_pictures(tmp_path, 8)) == 1


def test_pictures_are_looked_for_beyond_those_that_cannot_be_read(tmp_path):
    for number in range(9):
        (tmp_path / f"{number}.png").write_bytes(b"\x89PNG nothing")
    Image.new("RGB", (40, 40)).save(tmp_path / "5.png")
    assert len(read_pictures(tmp_path, 2)) == 1


def test_pictures_are_known_by_their_ending_in_whatever_letters(tmp_path):
    for name in ("DSC_0001.JPG", "scan.Tiff", "notes.TXT"):
        Image.new("RGB", (40, 40)).save(tmp_path / name, format="PNG")
    assert [path.name for path in read_pictures(tmp_path, 8).paths] == ["DSC_0001.JPG", "scan.Tiff"]


def test_calibration_pictures_are_spread_over_the_folder(tmp_path):
    for number in range(9):
        Image.new("RGB", (40 + number, 40)).save(tmp_path / f"{number}.png")
    pictures = read_pictures(tmp_path, 3)
    assert [image.width - 40 for image in pictures] == [0, 4, 8]
    assert pictures[0] is not pictures[0]  # read anew each time, so that none is kept
    assert [image.width - 40 for image in pictures[1:]] == [4, 8]


def test_pictures_are_compared_as_they_are_read(checkpoint, tmp_path):
    for number in range(3):
        Image.new("RGB", (48, 40), (90 * number, 0, 0)).save(tmp_path / f"{number}.png")
    network, pictures = Segmenter(checkpoint), read_pictures(tmp_path, 3)
    assert label_agreement(network, network, pictures, (64, 96), 2) == 1
    assert (network.segment_at(pictures, (64, 96)) == network.segment_at(list(pictures), (64, 96))).all()


@pytest.mark.parametrize("steps", [{"do_normalize": False}, {"do_rescale": False, "image_mean": [100.0] * 3}])
@pytest.mark.parametrize("num_labels", [1, 3])
def test_a_graph_with_postprocessing_does_as_the_processor(num_labels, steps):
    torch.manual_seed(0)
    config = LeMoReConfig(num_labels=num_labels, hidden_sizes=(8, 8, 8, 8), stem_sizes=(8,), image_size=64)
    model = LeMoReForSemanticSegmentation(config).eval()
    processor = LeMoReImageProcessor(do_resize=False, **steps)
    image = torch.randint(0, 256, (1, 64, 96, 3), dtype=torch.uint8)
    with torch.no_grad():
        inputs = processor(image[0].permute(2, 0, 1), return_tensors="pt")
        model.decode_head.classifier.bias -= model(**inputs).logits.mean((0, 2, 3))  # all classes occur
        (expected,) = processor.post_process_semantic_segmentation(model(**inputs), [(64, 96)])
        (labels,) = SegmentationGraph(model, processor)(image)["labels"]
    assert len(expected.unique()) > 1
    assert (labels == expected).float().mean() > 0.999


@pytest.fixture(scope="module")
def labels_of_many(tmp_path_factory):
    """The end of an ONNX graph with post-processing, alone: logits of forty classes → labels at a stride of about 8."""
    onnxruntime, *_ = (
        pytest.importorskip(package, reason="needs the extra lemore-hf[onnx]") for package in PACKAGES["onnx"]
    )

    class Labels(nn.Module):
        def forward(self, logits):
            size = [8 * side - 3 for side in logits.shape[2:]]
            return SegmentationGraph.labels(self, logits, size).to(torch.uint8)

    path = tmp_path_factory.mktemp("labels") / "model.onnx"
    axes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    with apply_patches("lemore.onnxruntime"), quietly():
        torch.onnx.export(Labels().eval(), (torch.zeros(2, 40, 12, 16),), path, dynamic_shapes=(axes,), verbose=False)
    session = onnxruntime.InferenceSession(path)
    return lambda logits: torch.from_numpy(session.run(None, {"logits": logits.numpy()})[0])


@pytest.mark.parametrize("shape", [(2, 12, 16), (1, 3, 33), (1, 1, 40)])
def test_labels_of_many_classes_come_from_the_likeliest(shape, labels_of_many):
    torch.manual_seed(0)
    batch, height, width = shape
    logits = F.avg_pool2d(3 * torch.randn(batch, 40, height + 3, width + 3), 4, 1)  # smooth, as a network's are
    size = (8 * height - 3, 8 * width - 3)
    expected = F.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(1)
    labels = labels_of_many(logits)
    assert labels.shape == expected.shape
    assert len(expected.unique()) > 10
    assert (labels == expected).float().mean() > 0.9995
    # All classes of a position may be likelier than those of its neighbour.
    raised = labels_of_many(logits + 50 * torch.randn(batch, 1, height, width))
    assert (raised == expected).float().mean() > 0.999


def test_of_many_classes_the_lower_number_wins_a_tie(labels_of_many):
    assert (labels_of_many(torch.zeros(1, 40, 12, 16)) == 0).all()
    torch.manual_seed(0)
    logits = F.avg_pool2d(3 * torch.randn(2, 40, 15, 19), 4, 1)
    logits = (2 * logits).round() / 2  # few values, as of int8
    expected = F.interpolate(logits, size=(93, 125), mode="bilinear", align_corners=False).argmax(1)
    assert (labels_of_many(logits) == expected).float().mean() > 0.999


@pytest.mark.parametrize(
    ("options", "precision", "images"),
    [([], "float32", 0), (["--fp16"], "float16", 0), (["--int8", "pictures", "--calibration-images", "2"], "int8", 2)],
)
def test_options_of_the_command_line_reach_the_export(options, precision, images, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 40)).save(tmp_path / "pictures" / f"{number}.png")
    script = runpy.run_path(str(SCRIPT))
    taken = {}

    def export_model(model, processor, output, export_format, **settings):
        taken.update(settings)
        raise InterruptedError("seen enough")

    monkeypatch.setitem(script["main"].__globals__, "export_model", export_model)
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(checkpoint), "--format", "onnx", "--output", "out", "--with-postprocessing", *options]
    monkeypatch.setattr("sys.argv", ["export.py", *words])
    with pytest.raises(InterruptedError):
        script["main"]()
    assert (taken["precision"], len(taken["calibration_images"])) == (precision, images)
    assert taken["with_postprocessing"] is True


def test_size_that_the_graph_was_not_exported_for(exported):
    network = Segmenter(exported("torch"))
    assert network.run(np.zeros((3, 3, 640, 32), np.float32)).shape == (3, 11, 80, 4)
    for shape, message in [
        ((1, 3, 641, 64), r"at most 640×640, got 641×64.*--max-size"),
        ((1, 3, 64, 31), r"at least 32×32 pixels.*got 64×31"),
        ((4, 3, 64, 64), r"at most 3 images at once, got 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            network.run(np.zeros(shape, np.float32))


def test_manifest_survives_its_file(tmp_path):
    manifest = ExportManifest("onnx", "model.onnx", True, "int8", max_size=640, max_batch_size=4)
    manifest.save(tmp_path)
    assert ExportManifest.load(tmp_path) == manifest


def test_labels_of_a_graph_are_never_blended(exported, frames):
    graph = Segmenter(exported("onnx", with_postprocessing=True))
    (raw,) = graph.run(network_input(frames[0], graph.image_processor, True))
    expected = Image.fromarray(raw).resize(frames[0].size, Image.Resampling.NEAREST)
    np.testing.assert_array_equal(graph(frames[0]), np.asarray(expected))


@pytest.mark.parametrize(
    ("field", "value"), [("format", "pickle"), ("format", ["onnx"]), ("format", "pytorch"), ("file", "../model.onnx")]
)
def test_manifest_names_a_graph_of_its_own_folder(tmp_path, field, value):
    ExportManifest("onnx", "model.onnx").save(tmp_path)
    assert ExportManifest.load(tmp_path).file == "model.onnx"
    path = tmp_path / "lemore_export.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=r"lemore_export\.json is damaged, or of another release"):
        ExportManifest.load(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"lemore_export\.json is damaged"):
        ExportManifest.load(tmp_path)
