# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""The networks that LeMoRe is compared with, from torchvision and Transformers, ready to be trained from scratch.

Importing this module registers LR-ASPP with the Auto classes; the others are Transformers' own.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large
from transformers import (
    AutoConfig,
    AutoModelForSemanticSegmentation,
    MobileNetV2Config,
    MobileNetV2ForSemanticSegmentation,
    MobileViTV2Config,
    MobileViTV2ForSemanticSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput

from .loss_lemore import segmentation_loss


class LRASPPMobileNetV3Config(PreTrainedConfig):
    """Configuration of [`LRASPPMobileNetV3ForSemanticSegmentation`]; torchvision fixes all but the labels."""

    model_type = "lraspp-mobilenet-v3"

    semantic_loss_ignore_index: int = 255
    initializer_range: float = 0.02


class LRASPPMobileNetV3ForSemanticSegmentation(PreTrainedModel):
    """LR-ASPP on MobileNetV3-Large (Howard et al., "Searching for MobileNetV3", ICCV 2019): torchvision's network, its
    parameters under torchvision's names, with the interface of Transformers.

    The logits have stride 8, that of the head: torchvision's upsampling to the size of the image is left out, as in
    every model of Transformers.
    """

    config_class = LRASPPMobileNetV3Config
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    # The loss is a mean over pixels: `Trainer` is to average it over accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: LRASPPMobileNetV3Config):
        super().__init__(config)
        network = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=config.num_labels)
        self.backbone = network.backbone
        self.classifier = network.classifier
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        classifiers = (self.classifier.low_classifier, self.classifier.high_classifier)
        if isinstance(module, nn.Conv2d) and module not in classifiers:
            _init_convolution(module)

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.LongTensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> SemanticSegmenterOutput | tuple[torch.Tensor, ...]:
        """
        Args:
            pixel_values: normalized images (B, 3, H, W).
            labels: classes or `config.semantic_loss_ignore_index`, (B, label height, label width).
            return_dict: `False` for a tuple.

        Returns:
            `logits` (B, num_labels, H / 8, W / 8), rounded up; with labels the mean cross-entropy as `loss`.
        """
        logits = self.classifier(self.backbone(pixel_values))
        loss = None if labels is None else segmentation_loss(logits, labels, self.config.semantic_loss_ignore_index)
        output = SemanticSegmenterOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output


AutoConfig.register(LRASPPMobileNetV3Config.model_type, LRASPPMobileNetV3Config)
AutoModelForSemanticSegmentation.register(LRASPPMobileNetV3Config, LRASPPMobileNetV3ForSemanticSegmentation)


def _lraspp_mobilenet_v3_large(**labels) -> PreTrainedModel:
    return LRASPPMobileNetV3ForSemanticSegmentation(LRASPPMobileNetV3Config(**labels))


def _segformer_b0(**labels) -> PreTrainedModel:
    return _initialized(SegformerForSemanticSegmentation(SegformerConfig(**labels)))  # The defaults are B0.


def _mobilevitv2_deeplabv3(**labels) -> PreTrainedModel:
    return _initialized(MobileViTV2ForSemanticSegmentation(MobileViTV2Config(**labels)))


def _mobilenetv2_deeplabv3(**labels) -> PreTrainedModel:
    # Stride 16 and 10 % dropout, as DeepLab and the other peers have them; the configuration's defaults are 32 and 80 %.
    model = MobileNetV2ForSemanticSegmentation(
        MobileNetV2Config(output_stride=16, classifier_dropout_prob=0.1, **labels)
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # TensorFlow's 0.997 is the share that is kept. In torch it is the share that is replaced: the running
            # statistics would be those of the last batch alone.
            module.momentum = 1 - 0.997
    # The segmentation head does not use it, and distributed training refuses parameters without a gradient.
    model.mobilenet_v2.conv_1x1.requires_grad_(False)
    return _initialized(model)


PEERS: dict[str, Callable[..., PreTrainedModel]] = {
    "lraspp-mobilenet-v3-large": _lraspp_mobilenet_v3_large,
    "segformer-b0": _segformer_b0,
    "mobilevitv2-deeplabv3": _mobilevitv2_deeplabv3,
    "mobilenetv2-deeplabv3": _mobilenetv2_deeplabv3,
}


def build_peer(name: str, num_labels: int, id2label: Mapping[int, str] | None = None) -> PreTrainedModel:
    """A peer with random weights.

    All start as their authors train them: convolutions from a normal distribution with variance 2 / fan-out, norms as
    the identity, linear layers and classifiers with a standard deviation of 0.02. What Transformers gives the three
    that it has is meant for weights that are loaded afterwards (convolutions with 0.02 throughout; in MobileViTV2 also
    the scales of the batch norms, which then pass almost nothing on). LeMoRe's own start is 0.02 throughout, as
    `LeMoReConfig.initializer_range` says.

    Args:
        name: one of `PEERS`.
        num_labels: classes, at least 2.
        id2label: their names.

    Returns:
        A model whose `forward(pixel_values).logits` are scores at its own stride; in training mode.

    Raises:
        ValueError: for an unknown name, or if labels and names disagree.
    """
    if name not in PEERS:
        raise ValueError(f"There is no peer {name!r}; the peers are {', '.join(PEERS)}.")
    if num_labels < 2:
        raise ValueError(f"num_labels must be at least 2, got {num_labels}.")
    labels = {"num_labels": num_labels}
    if id2label is not None:
        if sorted(id2label) != list(range(num_labels)):
            raise ValueError(f"id2label must name the labels 0 to {num_labels - 1}, got {sorted(id2label)}.")
        labels = {"id2label": dict(id2label), "label2id": {label: index for index, label in id2label.items()}}
    return PEERS[name](**labels).train()


def head_prefixes(model: PreTrainedModel) -> tuple[str, ...]:
    """What the names of the head's parameters begin with: all but the base model, in LeMoRe and its peers alike."""
    return tuple(
        f"{name}."
        for name, child in model.named_children()
        if name != model.base_model_prefix and next(child.parameters(), None) is not None
    )


@torch.no_grad()
def _initialized(model: PreTrainedModel) -> PreTrainedModel:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            # The linear layers and the classifier keep what Transformers gives them.
            if ".classifier" not in name:
                _init_convolution(module)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    return model


def _init_convolution(convolution: nn.Conv2d) -> None:
    """Kaiming initialization by fan-out, with the fan of one group; the bias stays as it is."""
    fan_out = convolution.out_channels // convolution.groups * math.prod(convolution.kernel_size)
    init.normal_(convolution.weight, std=math.sqrt(2 / fan_out))
