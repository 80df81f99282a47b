# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Transformers' own common tests over both image processors."""

import unittest

from tests.test_image_processing_common import (
    ImageProcessingTester,
    ImageProcessingTestMixin,
    PostProcessSemanticSegmentationTestMixin,
)

import lemore_hf  # noqa: F401 (registers the processors for AutoImageProcessor)
from lemore_hf.image_processing_lemore import LeMoReImageProcessor
from lemore_hf.image_processing_pil_lemore import LeMoReImageProcessorPil


class LeMoReImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent: unittest.TestCase, **kwargs):
        kwargs.setdefault("size", {"height": 20, "width": 30})
        kwargs.setdefault("image_mean", [0.5, 0.5, 0.5])
        kwargs.setdefault("image_std", [0.5, 0.5, 0.5])
        kwargs.setdefault("num_labels", 5)
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self) -> dict[str, type]:
        # Transformers looks a model's classes up by its own folders; ours lives outside.
        return {"torchvision": LeMoReImageProcessor, "pil": LeMoReImageProcessorPil}


class LeMoReImageProcessingTest(ImageProcessingTestMixin, PostProcessSemanticSegmentationTestMixin, unittest.TestCase):
    image_processor_tester_class = LeMoReImageProcessingTester
    test_cast_dtype = True
