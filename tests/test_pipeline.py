# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""A saved folder in use: through pipelines, the Auto classes, and as remote code where `lemore_hf` is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoBackbone,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    pipeline,
)

from lemore_hf import (
    LeMoReBackbone,
    LeMoReConfig,
    LeMoReForImageClassification,
    LeMoReForSemanticSegmentation,
    LeMoReImageProcessor,
    LeMoReImageProcessorPil,
    LeMoReModel,
)

LABELS = ("road", "sky", "tree", "car")
AUTO_CLASSES = {
    AutoModel: LeMoReModel,
    AutoBackbone: LeMoReBackbone,
    AutoModelForSemanticSegmentation: LeMoReForSemanticSegmentation,
    AutoModelForImageClassification: LeMoReForImageClassification,
}


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (10, 13, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((130, 100)).save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory, picture) -> Path:
    """A saved segmentation model that tells several classes apart, with its image processor."""
    torch.manual_seed(0)
    config = LeMoReConfig(
        image_size=(64, 96),
        stem_sizes=(8, 8),
        hidden_sizes=(8, 12, 16, 16),
        decoder_hidden_size=16,
        initializer_range=1.0,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    processor = LeMoReImageProcessor(size={"height": 64, "width": 96})
    model = LeMoReForSemanticSegmentation(config).eval()
    with torch.no_grad():  # no class wins everywhere
        logits = model(**processor(Image.open(picture), return_tensors="pt")).logits
        model.decode_head.classifier.bias -= logits.mean((0, 2, 3))
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def label_map(segments: list[dict]) -> np.ndarray:
    """The labels of a pipeline's masks, which are 255 where their label is."""
    labels = np.full(segments[0]["mask"].size[::-1], -1)
    for segment in segments:
        labels[np.asarray(segment["mask"]) == 255] = LABELS.index(segment["label"])
    return labels


def test_pipeline_takes_paths_images_and_lists(folder, picture, capfd):
    segmenter = pipeline("image-segmentation", model=str(folder))
    image = Image.open(picture)
    expected_model = LeMoReForSemanticSegmentation.from_pretrained(folder)
    processor = LeMoReImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        outputs = expected_model(**processor(image, return_tensors="pt"))
    (expected,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(100, 130)])
    assert len(expected.unique()) > 1  # the model tells classes apart

    for result in (segmenter(image), segmenter(str(picture)), *segmenter([image, str(picture)])):
        np.testing.assert_array_equal(label_map(result), expected)
    assert "not supported" not in capfd.readouterr().err


def test_names_read_from_json_name_the_classes(folder, picture):
    """Their keys are words: masks and classes have to be found by numbers all the same."""
    names = json.loads(json.dumps(dict(enumerate(["a", "b", "c", "d"]))))
    model = AutoModelForSemanticSegmentation.from_pretrained(folder, id2label=names)
    segmenter = pipeline(
        "image-segmentation", model=model, image_processor=LeMoReImageProcessor.from_pretrained(folder)
    )
    assert {segment["label"] for segment in segmenter(str(picture))} <= set("abcd")


def test_classification_pipeline(folder, picture, capfd):
    classifier = pipeline(
        "image-classification",
        model=LeMoReForImageClassification.from_pretrained(folder).eval(),
        image_processor=AutoImageProcessor.from_pretrained(folder),
    )
    assert {result["label"] for result in classifier(str(picture))} == set(LABELS)
    assert "not supported" not in capfd.readouterr().err


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_auto_classes(auto_class, folder):
    # AutoBackbone asks the Hub whether it has the folder.
    with mock.patch("transformers.models.auto.auto_factory.hf_api"):
        assert type(auto_class.from_pretrained(folder)) is AUTO_CLASSES[auto_class]


def test_auto_image_processor(folder):
    assert type(AutoImageProcessor.from_pretrained(folder)) is LeMoReImageProcessor
    assert type(AutoImageProcessor.from_pretrained(folder, backend="pil")) is LeMoReImageProcessorPil


REMOTE_PROGRAM = """
import sys
sys.modules["lemore_hf"] = None  # importing it fails
from unittest import mock

import torch
from PIL import Image
from transformers import (
    AutoBackbone,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    pipeline,
)

folder, picture, results = sys.argv[1:]
image = Image.open(picture)
trust = {"trust_remote_code": True}
outputs = {}
# AutoBackbone asks the Hub whether it has the folder.
with torch.no_grad(), mock.patch("transformers.models.auto.auto_factory.hf_api"):
    for backend in ("torchvision", "pil"):
        processor = AutoImageProcessor.from_pretrained(folder, backend=backend, **trust)
        outputs[backend] = processor(image, return_tensors="pt").pixel_values
    pixel_values = outputs["torchvision"]
    for auto_class in (AutoModel, AutoBackbone, AutoModelForSemanticSegmentation, AutoModelForImageClassification):
        for image_size in ((64, 96), (96, 64)):
            torch.manual_seed(0)  # for the classification head, which is new
            model = auto_class.from_pretrained(folder, image_size=image_size, **trust).eval()
            assert "transformers_modules" in type(model).__module__, type(model)
            output = model(pixel_values)
            output = output.feature_maps[-1] if auto_class is AutoBackbone else output[0]
            outputs[f"{auto_class.__name__} {image_size}"] = output
segments = pipeline("image-segmentation", model=folder, **trust)(picture)
outputs["pipeline"] = {segment["label"]: torch.tensor(list(segment["mask"].getdata())) for segment in segments}
torch.save(outputs, results)
"""


def test_remote_code_gives_identical_results(folder, picture, tmp_path):
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REMOTE_PROGRAM, str(folder), str(picture), str(tmp_path / "results.pt")]
    # Not in the checkout, where the package could be imported from.
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    remote = torch.load(tmp_path / "results.pt")

    image = Image.open(picture)
    pixel_values = LeMoReImageProcessor.from_pretrained(folder)(image, return_tensors="pt").pixel_values
    assert torch.equal(remote.pop("torchvision"), pixel_values)
    pil = LeMoReImageProcessorPil.from_pretrained(folder)(image, return_tensors="pt").pixel_values
    assert torch.equal(remote.pop("pil"), pil)
    segments = pipeline("image-segmentation", model=str(folder))(image)
    masks = remote.pop("pipeline")
    assert masks.keys() == {segment["label"] for segment in segments}
    for segment in segments:
        np.testing.assert_array_equal(masks[segment["label"]].reshape(100, 130), segment["mask"])

    for auto_class, model_class in AUTO_CLASSES.items():
        for image_size in ((64, 96), (96, 64)):
            torch.manual_seed(0)
            model = model_class.from_pretrained(folder, image_size=image_size).eval()
            with torch.no_grad():
                output = model(pixel_values)
            output = output.feature_maps[-1] if model_class is LeMoReBackbone else output[0]
            assert torch.equal(remote.pop(f"{auto_class.__name__} {image_size}"), output), (auto_class, image_size)
    assert not remote
