# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""LeMoReConfig: defaults, what it refuses, and its way through files."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from lemore_hf import LeMoReConfig


def test_defaults_are_the_papers_network():
    config = LeMoReConfig()
    assert config.native_size == (512, 512)
    assert config.native_grids == [(128, 128), (64, 64), (32, 32), (16, 16)]
    assert config.hidden_sizes == [16, 48, 128, 176]
    assert config.hidden_size == 368
    assert config.views == ["transverse", "frontal", "lateral"]


def test_native_grids_are_rounded_up():
    assert LeMoReConfig(image_size=(360, 480)).native_grids == [(90, 120), (45, 60), (23, 30), (12, 15)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_sizes", [16, 48, 128]),
        ("hidden_sizes", []),
        ("hidden_sizes", [16, 48, 0, 176]),
        ("stem_sizes", []),
        ("stem_sizes", [16, 0]),
        ("image_size", 31),
        ("image_size", (512, 16)),
        ("image_size", 10**9),
        ("image_size", (512, 512, 3)),
        ("views", []),
        ("views", ["transverse", "sagittal"]),
        ("views", ["frontal", "frontal"]),
        ("num_channels", 0),
        ("dilation", 0),
        ("channel_attention_reduction", 0),
        ("channel_attention_reduction", 17),
        ("num_nested_projections", 0),
        ("num_attention_heads", 0),
        ("attention_key_dim", -1),
        ("attention_value_dim", 0),
        ("decoder_hidden_size", 0),
        ("mlp_ratio", 0),
        ("mlp_ratio", float("nan")),
        ("mlp_ratio", float("inf")),
        ("output_stride", 2),
        ("output_stride", 12),
        ("token_stride", 16),
        ("token_stride", 48),
        ("nested_attention_softmax", "mean"),
        ("axis_initialization", "ones"),
        ("hidden_act", "relu7"),
        ("drop_path_rate", 1.0),
        ("drop_path_rate", -0.1),
        ("drop_view_rate", 1),
        ("classifier_dropout_prob", 2),
        ("batch_norm_momentum", 0.0),
        ("batch_norm_eps", 0.0),
        ("batch_norm_eps", float("inf")),
        ("initializer_range", -0.02),
        ("num_labels", 0),
        ("palette", [[0, 0]]),
        ("initializer_range", float("inf")),
        ("id2label", {1: "a", 2: "b"}),
        ("id2label", {0: "a", 2: "b"}),
        ("palette", [[0, 0, 256]]),
        ("out_features", ["stage5"]),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        LeMoReConfig(**{field: value})


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"axis_initialization": "zeros", "views": ["frontal"]}, "axis_initialization"),
        ({"drop_path_rate": 0.1, "use_residual": False, "use_nested_attention": False}, "drop_path_rate"),
        ({"drop_view_rate": 0.1, "views": ["transverse"]}, "drop_view_rate"),
        ({"out_features": ["stage1"], "out_indices": [2]}, "out_features"),
    ],
)
def test_contradictions_are_refused_by_name(values, field):
    with pytest.raises(ValueError, match=field):
        LeMoReConfig(**values)


@pytest.mark.parametrize(
    ("field", "value"), [("image_size", "512"), ("hidden_sizes", 64), ("use_residual", "yes"), ("dilation", 1.5)]
)
def test_wrong_types_are_refused_by_name(field, value):
    with pytest.raises(StrictDataclassError, match=field):
        LeMoReConfig(**{field: value})


def test_a_configuration_that_was_changed_to_a_contradiction_is_not_saved(tmp_path):
    config = LeMoReConfig()
    config.output_stride = 12
    with pytest.raises(StrictDataclassError, match="output_stride"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_round_trip_through_a_file(tmp_path):
    config = LeMoReConfig(
        image_size=(360, 480),
        views=("transverse", "lateral"),
        out_features=["stage2", "stage4"],
        palette=[[1, 2, 3], [4, 5, 6]],
        id2label={0: "road", 1: "sky"},
        label2id={"road": 0, "sky": 1},
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, LeMoReConfig)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert loaded.native_size == (360, 480)
    assert loaded.out_indices == [2, 4]
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "lemore"


def test_configurations_do_not_share_their_lists():
    LeMoReConfig().hidden_sizes[0] = 8
    assert LeMoReConfig().hidden_sizes[0] == 16


def test_many_classes_are_no_contradiction_for_classification():
    assert LeMoReConfig(num_labels=1000).num_labels == 1000
