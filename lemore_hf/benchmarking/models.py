# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""The models that are benchmarked: LeMoRe and its peers with random weights, and their sizes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel, SegformerImageProcessor
from transformers.modeling_outputs import SemanticSegmenterOutput

from ..complexity import count_multiply_accumulates
from ..configuration_lemore import LeMoReConfig
from ..image_processing_lemore import LeMoReImageProcessor
from ..modeling_lemore import LeMoReForSemanticSegmentation, keep_freed_memory
from ..peers import build_peer
from .cell import NUM_LABELS, memory_format

NAMES = {
    "lemore": "LeMoRe",
    "lemore-not-fused": "LeMoRe, not fused",
    "segformer-b0": "SegFormer-B0",
    "mobilenetv2-deeplabv3": "MobileNetV2-DeepLabV3",
    "mobilevitv2-deeplabv3": "MobileViTV2-DeepLabV3",
    "lraspp-mobilenet-v3-large": "LR-ASPP MobileNetV3-Large",
    "lraspp-mobilenet-v3-large-full": "the same, full-size logits",
}

_IMAGE_PROCESSORS = {"lemore": LeMoReImageProcessor, "segformer-b0": SegformerImageProcessor}


def build_model(name: str, num_labels: int = NUM_LABELS, for_training: bool = False) -> nn.Module:
    """A model of `NAMES` with the same random weights in every process; `"lemore"` fused, unless it is to be trained."""
    model = random_model(name, num_labels)
    if for_training:
        return model.train()
    keep_freed_memory()  # as fusing does: no model is to be faster for its process's memory alone
    return model.fuse() if name == "lemore" else model.eval()


def random_model(name: str, num_labels: int = NUM_LABELS) -> nn.Module:
    """A model of `NAMES` as it is made."""
    torch.manual_seed(0)
    if name.startswith("lemore"):
        return LeMoReForSemanticSegmentation(LeMoReConfig(num_labels=num_labels))
    if name.endswith("-full"):
        return FullSizeLogits(build_peer(name.removesuffix("-full"), num_labels))
    return build_peer(name, num_labels)


class FullSizeLogits(nn.Module):
    """A model whose logits have the size of the image, as torchvision's LR-ASPP gives them; all others here leave it at
    the stride of their head."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> SemanticSegmenterOutput:
        """Logits `(B, num_labels, H, W)`."""
        outputs = self.model(pixel_values, **kwargs)
        logits = F.interpolate(outputs.logits, size=pixel_values.shape[2:], mode="bilinear", align_corners=False)
        return SemanticSegmenterOutput(loss=outputs.loss, logits=logits)


# Sizes


def count(name: str, size: tuple[int, int], batch_sizes: list[int], num_labels: int = NUM_LABELS) -> dict[str, Any]:
    """Parameters, multiply-accumulates of an image, and the traffic of a batch by its size (see `count_traffic`)."""
    model = random_model(name, num_labels).eval().to("meta")
    images = {batch_size: torch.empty(batch_size, 3, *size, device="meta") for batch_size in {1, *batch_sizes}}
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "multiply_accumulates": count_multiply_accumulates(model, images[1]),
        "traffic": {str(batch_size): count_traffic(model, images[batch_size]) for batch_size in batch_sizes},
    }


def count_traffic(model: nn.Module, pixel_values: torch.Tensor) -> int:
    """
    Bytes that the convolutions and matrix products of a forward pass read and write, in the precision of the weights.

    Each reads its inputs and weights once and writes its output once. What lies between them is taken as fused into
    them, so that this is about the least that a runtime can move.
    """
    with torch.no_grad(), _TrafficCounter() as counter:
        model(pixel_values)
    return counter.num_bytes


class _TrafficCounter(TorchDispatchMode):
    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.num_bytes += sum(leaf.nbytes for leaf in tree_leaves((args, result)) if torch.is_tensor(leaf))
        return result


# From picture to label map


def load_segmenter(name: str, folder: Path, layout: str, num_labels: int = NUM_LABELS) -> tuple[PreTrainedModel, Any]:
    """
    A model and its image processor, with a classifier fitted to the picture in `folder`.

    Random weights would give label maps of noise with dozens of classes, which no picture has and on which later steps
    take longer than on any real one.
    """
    image_processor = _IMAGE_PROCESSORS[name]()
    model = random_model(name, num_labels).eval()
    with Image.open(folder / "picture.jpg") as image:
        fit_classifier(model, image_processor(image, return_tensors="pt")["pixel_values"], folder / "labels.png")
    keep_freed_memory()
    model = model.fuse() if name == "lemore" else model
    return model.to(memory_format=memory_format(layout)), image_processor


@torch.no_grad()
def fit_classifier(model: PreTrainedModel, pixel_values: torch.Tensor, label_file: Path) -> None:
    """Fit `model.decode_head.classifier` to a label map by least squares; classes that it does not have score -1."""
    inputs: list[torch.Tensor] = []
    classifier = model.decode_head.classifier
    hook = classifier.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    model(pixel_values)
    hook.remove()
    features = inputs[0][0].flatten(1).t().double()  # (positions, channels)
    features = torch.cat([features, torch.ones(len(features), 1)], dim=1)

    height, width = inputs[0].shape[-2:]
    with Image.open(label_file) as label_map:
        label_map = label_map.resize((width, height), Image.Resampling.NEAREST)
    labels = torch.from_numpy(np.array(label_map)).flatten().long()
    known = labels != 255
    targets = torch.full((len(labels), classifier.out_channels), -1.0, dtype=torch.double)
    targets[known, labels[known]] = 1
    solution = torch.linalg.lstsq(features[known], targets[known], driver="gelsd").solution
    classifier.weight.copy_(solution[:-1].t()[:, :, None, None])
    classifier.bias.copy_(solution[-1])
