# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""LeMoRe for Transformers. Importing the package registers the family with the Auto classes."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
)

from .configuration_lemore import LeMoReConfig
from .image_processing_lemore import LeMoReImageProcessor
from .image_processing_pil_lemore import LeMoReImageProcessorPil
from .modeling_lemore import (
    LeMoReBackbone,
    LeMoReForImageClassification,
    LeMoReForSemanticSegmentation,
    LeMoReModel,
    LeMoRePreTrainedModel,
)

__version__ = "0.1.0"

AutoConfig.register(LeMoReConfig.model_type, LeMoReConfig)
LeMoReConfig.register_for_auto_class()
for _auto_class, _model_class in (
    (AutoModel, LeMoReModel),
    (AutoModelForSemanticSegmentation, LeMoReForSemanticSegmentation),
    (AutoModelForImageClassification, LeMoReForImageClassification),
    (AutoBackbone, LeMoReBackbone),
):
    _auto_class.register(LeMoReConfig, _model_class)
    # `save_pretrained` then writes the code too, for environments without this package.
    _model_class.register_for_auto_class(_auto_class.__name__)

AutoImageProcessor.register(
    LeMoReConfig, image_processor_classes={"torchvision": LeMoReImageProcessor, "pil": LeMoReImageProcessorPil}
)

# Pipelines look here, not at what is registered, before they say that a model is not supported.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[LeMoReConfig.model_type] = LeMoReForSemanticSegmentation.__name__
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[LeMoReConfig.model_type] = LeMoReForImageClassification.__name__

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
