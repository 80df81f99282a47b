# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Transformers' own common tests over the models."""

import math
import unittest
from unittest import mock

import torch
from tests.test_backbone_common import BackboneTesterMixin
from tests.test_modeling_common import ModelTesterMixin, floats_tensor
from transformers.models.auto import modeling_auto

from lemore_hf import (
    LeMoReBackbone,
    LeMoReConfig,
    LeMoReForImageClassification,
    LeMoReForSemanticSegmentation,
    LeMoReModel,
)


class LeMoReModelTester:
    """A tiny network and its inputs, with the names that the mixins look for."""

    batch_size = 3
    num_channels = 3
    image_size = (64, 96)
    num_labels = 3
    is_training = True
    num_attention_heads = 2
    num_hidden_layers = 1  # that have an attention map
    seq_length = 6  # 2×3 tokens

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self) -> LeMoReConfig:
        return LeMoReConfig(
            image_size=self.image_size,
            stem_sizes=[8, 8],
            hidden_sizes=[8, 12, 16, 16],
            num_attention_heads=self.num_attention_heads,
            attention_key_dim=4,
            attention_value_dim=6,
            token_stride=32,
            decoder_hidden_size=16,
            axis_initialization="normal",
            num_labels=self.num_labels,
            out_features=["stem", "stage2", "stage4"],
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[LeMoReConfig, dict[str, torch.Tensor]]:
        return self.get_config(), {
            "pixel_values": floats_tensor([self.batch_size, self.num_channels, *self.image_size])
        }


class LeMoReModelTesterMixin(ModelTesterMixin):
    """What holds for all LeMoRe models."""

    test_resize_embeddings = False

    @classmethod
    def setUpClass(cls):
        # The mixins look up by class name which models take no labels; ours live outside of Transformers.
        for mapping, model_class in (
            (modeling_auto.MODEL_MAPPING_NAMES, LeMoReModel),
            (modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES, LeMoReBackbone),
        ):
            patch = mock.patch.dict(mapping, {LeMoReConfig.model_type: model_class.__name__})
            patch.start()
            cls.addClassCleanup(patch.stop)

    def setUp(self):
        self.model_tester = LeMoReModelTester(self)

    @unittest.skip("Images have no input embeddings")
    def test_inputs_embeds(self):
        pass

    @unittest.skip("Images have no input or output embeddings")
    def test_model_get_set_embeddings(self):
        pass

    @unittest.skip("Convolutions have no feed-forward chunking")
    def test_feed_forward_chunking(self):
        pass

    def test_reverse_loading_mapping(self):
        # Loading resamples weights; it renames none.
        super().test_reverse_loading_mapping(check_keys_were_modified=False)

    def test_hidden_states_output(self):
        """The mixin's test expects sequences; feature maps have strides."""
        for model_class in self.all_model_classes:
            for by_config in (False, True):
                config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
                config.output_hidden_states = by_config
                model = model_class(config).eval()
                with torch.no_grad():
                    hidden_states = model(
                        **inputs, **({} if by_config else {"output_hidden_states": True})
                    ).hidden_states
                expected = [
                    (
                        self.model_tester.batch_size,
                        channels,
                        *(math.ceil(side / stride) for side in config.native_size),
                    )
                    for channels, stride in zip((8, 8, 12, 16, 16), (2, 4, 8, 16, 32), strict=True)
                ]
                assert [tuple(state.shape) for state in hidden_states] == expected


class LeMoReModelTest(LeMoReModelTesterMixin, unittest.TestCase):
    all_model_classes = (LeMoReModel, LeMoReForSemanticSegmentation, LeMoReForImageClassification)


class LeMoReBackboneTest(BackboneTesterMixin, LeMoReModelTesterMixin, unittest.TestCase):
    all_model_classes = (LeMoReBackbone,)
    config_class = LeMoReConfig
    has_attentions = False

    def test_retain_grad_hidden_states_attentions(self):
        """The mixin's test expects a tensor where a backbone returns a tuple of them."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        outputs = LeMoReBackbone(config)(**inputs, output_hidden_states=True)
        for hidden_state in outputs.hidden_states:
            hidden_state.retain_grad()
        outputs.feature_maps[-1].sum().backward()
        assert all(hidden_state.grad is not None for hidden_state in outputs.hidden_states)
