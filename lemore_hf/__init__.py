# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""LeMoRe for Transformers. Importing the package registers the family with the Auto classes."""

import transformers
from transformers import AutoConfig, AutoImageProcessor

from .configuration_lemore import LeMoReConfig
from .image_processing_lemore import LeMoReImageProcessor
from .image_processing_pil_lemore import LeMoReImageProcessorPil
from .modeling_lemore import (
    AUTO_CLASSES,
    LeMoReBackbone,
    LeMoReForImageClassification,
    LeMoReForSemanticSegmentation,
    LeMoReModel,
    LeMoRePreTrainedModel,
)

__version__ = "0.1.0"

AutoConfig.register(LeMoReConfig.model_type, LeMoReConfig)
LeMoReConfig.register_for_auto_class()
for _auto_class, _model_class in AUTO_CLASSES.items():
    getattr(transformers, _auto_class).register(LeMoReConfig, _model_class)
    # `save_pretrained` then writes the code too, for environments without this package.
    _model_class.register_for_auto_class(_auto_class)

AutoImageProcessor.register(
    LeMoReConfig, image_processor_classes={"torchvision": LeMoReImageProcessor, "pil": LeMoReImageProcessorPil}
)

__all__ = [
    "LeMoReBackbone",
    "LeMoReConfig",
    "LeMoReForImageClassification",
    "LeMoReForSemanticSegmentation",
    "LeMoReImageProcessor",
    "LeMoReImageProcessorPil",
    "LeMoReModel",
    "LeMoRePreTrainedModel",
]
