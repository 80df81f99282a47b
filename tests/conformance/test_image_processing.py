# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Transformers' own common tests over both image processors."""

import unittest
from typing import Any

from tests.test_image_processing_common import (
    ImageProcessingTester,
    ImageProcessingTestMixin,
    PostProcessSemanticSegmentationTestMixin,
)

import lemore_hf  # noqa: F401 (registers the processors for AutoImageProcessor)
from lemore_hf.image_processing_lemore import LeMoReImageProcessor
from lemore_hf.image_processing_pil_lemore import LeMoReImageProcessorPil

PROCESSORS = {"torchvision": LeMoReImageProcessor, "pil": LeMoReImageProcessorPil}


class LeMoReImageProcessingTester(ImageProcessingTester):
    """What the mixins ask of a tester, all of it: how much of it the base class knows differs between versions."""

    image_processing_classes = PROCESSORS

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        self.batch_size, self.num_channels, self.num_labels = 7, 3, 5
        self.min_resolution, self.max_resolution = 30, 400
        self.size = {"height": 20, "width": 30}
        self.settings = {"size": self.size, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}

    def prepare_image_processor_dict(self) -> dict[str, Any]:
        return self.settings


class LeMoReImageProcessingTest(ImageProcessingTestMixin, PostProcessSemanticSegmentationTestMixin, unittest.TestCase):
    # Transformers looks a model's classes up by the folder of its tests; ours lives outside.
    image_processing_classes = PROCESSORS
    test_cast_dtype = True

    def setUp(self) -> None:
        self.image_processor_tester = LeMoReImageProcessingTester(self)

    @property
    def image_processor_dict(self) -> dict[str, Any]:
        return self.image_processor_tester.prepare_image_processor_dict()

    def test_call_numpy_4_channels(self) -> None:
        # Transformers 5.17 does not say it in the call.
        self.image_processor_tester.settings["do_convert_rgb"] = False
        super().test_call_numpy_4_channels()
