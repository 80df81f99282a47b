# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Parameter groups and weight averaging."""

import copy

import pytest
import torch
from torch import nn

from lemore_hf import LeMoReConfig, LeMoReForSemanticSegmentation
from lemore_hf.optimization import (
    ExponentialMovingAverage,
    average_models,
    freeze_batch_norm_statistics,
    parameter_groups,
)


@pytest.fixture
def model():
    return LeMoReForSemanticSegmentation(LeMoReConfig(hidden_sizes=(8, 8, 8, 8), stem_sizes=(8,), image_size=64))


def test_norms_and_biases_do_not_decay_and_the_head_has_its_own_rate(model):
    groups = parameter_groups(model, 0.1, weight_decay=0.01, head_lr_multiplier=10, head_prefixes=("decode_head.",))
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(settings) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        rate = 1.0 if name.startswith("decode_head.") else 0.1
        decay = 0.0 if name.endswith("bias") or "normalization" in name else 0.01
        assert settings[id(parameter)] == (pytest.approx(rate), decay), name


def test_frozen_parameters_are_left_out(model):
    model.lemore.requires_grad_(False)
    grouped = sum(len(group["params"]) for group in parameter_groups(model, 0.1, 0.01, 1, ("decode_head.",)))
    assert grouped == len(list(model.decode_head.parameters()))


def test_average_follows_its_formula():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    model[0].weight.data.fill_(0.0)
    ema = ExponentialMovingAverage(model, decay=0.5)
    expected = 0.0
    for update, value in enumerate([1.0, 2.0, -1.0, 4.0, 3.0, 3.0, 3.0, 3.0]):
        model[0].weight.data.fill_(value)
        model[1].num_batches_tracked.fill_(update)
        ema.update(model)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value
        assert ema.module[0].weight.item() == pytest.approx(expected, rel=1e-5)
        assert ema.module[1].num_batches_tracked.item() == update
    assert not ema.module.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())


def test_frozen_batch_norm_statistics_stay(model):
    before = copy.deepcopy(model.state_dict())
    model.train()
    freeze_batch_norm_statistics(model)
    model(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.train()
    model(torch.randn(2, 3, 64, 64))
    assert not torch.equal(
        model.state_dict()["decode_head.fusions.0.local.normalization.running_mean"],
        before["decode_head.fusions.0.local.normalization.running_mean"],
    )


def test_mean_of_models_is_that_of_each_weight_and_statistic(model):
    others = [copy.deepcopy(model) for _ in range(2)]
    for value in (value for other in others for value in other.state_dict().values()):
        value.copy_(torch.rand_like(value) if value.is_floating_point() else value + 5)
    states = [copy.deepcopy(one.state_dict()) for one in (model, *others)]
    assert average_models([model, *others]) is model
    for name, value in model.state_dict().items():
        expected = [state[name] for state in states]
        torch.testing.assert_close(value, sum(expected) / 3 if value.is_floating_point() else expected[0])


@pytest.mark.parametrize(
    "options", [{"hidden_sizes": (8, 8, 8, 16)}, {"use_channel_attention": False}], ids=["shapes", "names"]
)
def test_models_of_different_architectures_have_no_mean(model, options):
    config = LeMoReConfig(**{"hidden_sizes": (8, 8, 8, 8), "stem_sizes": (8,), "image_size": 64, **options})
    with pytest.raises(ValueError, match=r"Model 3 differs from the first in \d+ weights, such as"):
        average_models([model, copy.deepcopy(model), LeMoReForSemanticSegmentation(config)])
