# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Muon, parameter groups and weight averaging."""

import copy

import pytest
import torch
from torch import nn

from lemore_hf import LeMoReConfig, LeMoReForSemanticSegmentation
from lemore_hf.optimization import (
    ExponentialMovingAverage,
    Muon,
    average_models,
    freeze_batch_norm_statistics,
    orthogonalize,
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


def take_steps(module: nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """How far three steps move each parameter; the gradients are the same for all modules of the same shapes."""
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for parameter in module.parameters():
            parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))
        for optimizer in optimizers:
            optimizer.step()
    return {name: parameter.detach() - start[name] for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("shape", [(3, 6, 6), (2, 5, 40), (2, 40, 5), (1, 1, 7)])
def test_what_is_orthogonalized_moves_all_directions_alike(shape, scale):
    torch.manual_seed(0)
    matrices = scale * torch.randn(shape, dtype=torch.float64)
    result = orthogonalize(matrices)
    assert result.shape == shape
    assert result.dtype == torch.float32
    singular_values = torch.linalg.svdvals(result)
    assert singular_values.min() > 0.4, "a smallest one of the square ones is near zero at first"
    assert singular_values.max() < 1.25
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    alignment = torch.einsum("nij,nij->n", result.double(), left @ right) / min(shape[1:])
    assert (alignment > 0.6).all(), "it turns nothing into another direction"


def test_gradients_of_zeros_move_nothing():
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


OPTIONS = {"lr": 0.02, "weight_decay": 0.1}


def test_muon_takes_the_steps_of_torchs_own_and_of_adamw():
    ours = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24, bias=False), nn.BatchNorm1d(24), nn.Linear(24, 3))
    theirs = copy.deepcopy(ours)
    matrices = [parameter for parameter in theirs.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in theirs.parameters() if parameter.ndim == 1]
    muon = torch.optim.Muon(matrices, **OPTIONS, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    expected = take_steps(theirs, muon, torch.optim.AdamW(vectors, **OPTIONS))
    for name, moved in take_steps(ours, Muon(ours.parameters(), **OPTIONS)).items():
        if moved.ndim == 1:
            assert torch.equal(moved, expected[name])
        else:  # torch's iterates in bfloat16
            assert (moved - expected[name]).norm() < 0.02 * expected[name].norm(), name


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_convolution_is_the_matrix_of_its_output_channels(memory_format):
    convolution = nn.Conv2d(6, 10, 3, bias=False).to(memory_format=memory_format)
    linear = nn.Linear(54, 10, bias=False)
    linear.weight.data.copy_(convolution.weight.data.flatten(1))
    start = convolution.weight.detach().clone()
    optimizers = [Muon(module.parameters(), **OPTIONS) for module in (convolution, linear)]
    for seed in range(3):
        gradient = torch.randn(10, 6, 3, 3, generator=torch.Generator().manual_seed(seed))
        convolution.weight.grad = torch.empty_like(start).copy_(gradient)
        linear.weight.grad = gradient.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(convolution.weight.flatten(1), linear.weight)
    assert (convolution.weight - start).norm() > 0.1 * start.norm()
    assert convolution.weight.is_contiguous(memory_format=memory_format)


def test_filters_of_separate_channels_are_adamws():
    ours = nn.Conv2d(8, 8, 3, groups=8)
    theirs = copy.deepcopy(ours)
    expected = take_steps(theirs, torch.optim.AdamW(theirs.parameters(), **OPTIONS))
    for name, moved in take_steps(ours, Muon(ours.parameters(), **OPTIONS)).items():
        assert torch.equal(moved, expected[name])


def test_muon_keeps_to_the_rates_and_decays_of_the_groups(model):
    groups = parameter_groups(model, 0.1, weight_decay=0.01, head_lr_multiplier=10, head_prefixes=("decode_head.",))
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    optimizer = Muon(groups)
    kept = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert kept == settings
    # All at a rate of zero but the head, which decays too where its gradients are none.
    for group in optimizer.param_groups:
        group["lr"] *= group["lr"] == 1.0
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        decays = name.startswith("decode_head.") and parameter.ndim > 1
        torch.testing.assert_close(parameter.detach(), before[name] * (0.99 if decays else 1.0))


def test_muon_goes_on_from_a_saved_state(tmp_path, model):
    restored = copy.deepcopy(model)
    optimizer = Muon(model.parameters(), **OPTIONS)
    for group in optimizer.param_groups:
        if group["orthogonal"]:
            group["momentum"] = 0.5  # comes back with the state, as the rate does
    take_steps(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    expected = take_steps(model, optimizer)
    state = torch.load(tmp_path / "state.pt")
    restored.load_state_dict(state["model"])
    optimizer = Muon(restored.parameters(), lr=1.0)
    optimizer.load_state_dict(state["optimizer"])
    for name, moved in take_steps(restored, optimizer).items():
        assert torch.equal(moved, expected[name]), name


def test_options_that_muon_does_not_have_are_refused(model):
    for momentum in (-0.1, 1, 7.0):
        with pytest.raises(ValueError, match=rf"`momentum` must be in \[0, 1\), got {momentum}"):
            Muon(model.parameters(), momentum=momentum)
    with pytest.raises(TypeError, match="`Muon` has no fused kernel"):
        Muon(model.parameters(), fused=True)


def test_the_momentum_of_a_group_is_checked_too(model):
    with pytest.raises(ValueError, match=r"`momentum` must be in \[0, 1\), got 5"):
        Muon([{"params": list(model.parameters()), "momentum": 5}])


def test_what_has_no_gradient_stays(model):
    optimizer = Muon(model.parameters(), **OPTIONS)
    before = copy.deepcopy(model.state_dict())
    model.decode_head.classifier.weight.grad = torch.ones_like(model.decode_head.classifier.weight)
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"decode_head.classifier.weight"}


@pytest.mark.parametrize("shape", [(3, 5), (5,)], ids=["matrix", "vector"])
def test_muon_goes_up_where_it_is_to_maximize(shape):
    up, down = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for parameter, maximize in ((up, True), (down, False)):
        parameter.grad = gradient.clone()
        Muon([parameter], lr=0.1, maximize=maximize).step()
    assert torch.equal(up, -down)
    assert (up * gradient).sum() > 0


def test_muon_takes_names_with_the_parameters(model):
    named, plain = Muon(model.named_parameters()), Muon(model.parameters())
    groups = [
        [[id(parameter) for parameter in group["params"]] for group in muon.param_groups] for muon in (named, plain)
    ]
    assert groups[0] == groups[1]
    assert sorted(name for group in named.param_groups for name in group["param_names"]) == sorted(
        name for name, _ in model.named_parameters()
    )


def test_hooks_of_muon_run_once_a_step():
    """Also after there has been an AdamW, whose class PyTorch hooks then."""
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,))]
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])
    optimizer, calls = Muon(parameters), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert calls == ["before", "after"]


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
