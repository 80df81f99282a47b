# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""The LeMoRe network: fidelity to the paper, behaviour at any size, losses, bad input."""

import copy
import doctest
import functools
import importlib.util
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import infer_auto_device_map
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import UperNetConfig, UperNetForSemanticSegmentation
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging
from transformers.utils.import_utils import is_torch_greater_or_equal

from lemore_hf import (
    LeMoReBackbone,
    LeMoReConfig,
    LeMoReForImageClassification,
    LeMoReForSemanticSegmentation,
    LeMoReModel,
    configuration_lemore,
    modeling_lemore,
    operations_lemore,
)
from lemore_hf.loss_lemore import check_label_values, segmentation_loss
from lemore_hf.modeling_lemore import (
    LeMoReAxisView,
    LeMoReCartesianEncoder,
    LeMoReConvLayer,
    LeMoReDepthwiseConv2d,
    LeMoReNestedAttention,
    resample_axis_weight,
)
from lemore_hf.operations_lemore import DepthwiseByShifts, _EnlargeBilinear, tent_filter
from lemore_hf.visualization import default_palette

TINY = {
    "image_size": (64, 96),
    "stem_sizes": (8, 8),
    "hidden_sizes": (8, 12, 16, 16),
    "num_attention_heads": 2,
    "attention_key_dim": 4,
    "attention_value_dim": 6,
    "decoder_hidden_size": 16,
    "num_labels": 5,
    "classifier_dropout_prob": 0.0,
    "axis_initialization": "normal",  # as training leaves them: no view is idle
}
MODEL_CLASSES = (LeMoReModel, LeMoReBackbone, LeMoReForSemanticSegmentation, LeMoReForImageClassification)


def as_if_trained(model: nn.Module) -> nn.Module:
    """Gives the batch norms statistics, weights and biases such as training leaves."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, mean=1, std=0.1)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def tiny(model_class=LeMoReForSemanticSegmentation, **overrides):
    torch.manual_seed(0)
    return as_if_trained(model_class(LeMoReConfig(**TINY | overrides))).eval()


def random_images(batch_size: int = 2, height: int = 64, width: int = 96, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 10_000 + width)
    return torch.randn(batch_size, 3, height, width, generator=generator, dtype=torch.float64).to(dtype)


def random_labels(batch_size: int = 2, height: int = 64, width: int = 96, num_labels: int = 5) -> torch.Tensor:
    labels = torch.randint(num_labels, (batch_size, height, width), generator=torch.Generator().manual_seed(1))
    labels[:, : height // 4] = 255
    return labels


@torch.no_grad()
def main_output(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    outputs = model(pixel_values)
    if "feature_maps" in outputs:
        return outputs.feature_maps[-1]
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


# Fidelity


def load_script(name: str):
    path = Path(__file__).parents[1] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    return module


complexity = load_script("complexity")


@pytest.mark.parametrize("row", complexity.ABLATION)
def test_parameters_and_multiply_accumulates_are_the_paper_s(row):
    parameters, multiply_accumulates = complexity.count(row.config)
    assert parameters / 1e6 == pytest.approx(float(row.parameters.split()[0]), rel=0.015)
    assert multiply_accumulates / 1e9 == pytest.approx(float(row.multiply_accumulates.split()[0]), rel=0.015)


@pytest.mark.parametrize("row", complexity.ABLATION)
def test_every_parameter_of_every_ablation_row_is_trained(row):
    switches = {name: getattr(row.config, name) for name in ("views", "use_channel_attention", "use_nested_attention")}
    model = tiny(**switches).train()
    model(random_images(height=128, width=160), labels=random_labels()).loss.backward()
    untrained = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    constant = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert (untrained, constant) == ([], [])


# The Cartesian encoder


AXES = {"transverse": 1, "frontal": 2, "lateral": 3}


@pytest.mark.parametrize("view_name", AXES)
def test_views_act_along_their_axes(view_name):
    encoder = LeMoReCartesianEncoder(LeMoReConfig(**TINY), stage_index=0).double()
    view = encoder.views[view_name]
    nn.init.normal_(view.weight)
    for axis in AXES.values():
        # All that varies in the input varies along one axis of (1, 8, 16, 24).
        profile = torch.randn((8, 16, 24)[axis - 1], dtype=torch.float64)
        volume = torch.ones(1, 8, 16, 24, dtype=torch.float64).movedim(axis, -1) * profile
        mixed = view(volume.movedim(-1, axis)).movedim(axis, -1)
        if axis == AXES[view_name]:
            torch.testing.assert_close(mixed, (view.weight.squeeze() @ profile).expand_as(mixed))
        else:  # the profile goes through, scaled by the sums of the view's weights
            torch.testing.assert_close(mixed, mixed[..., :1] / profile[0] * profile)


def test_the_views_are_summed():
    encoder = tiny(LeMoReBackbone).encoder.stages[1].cartesian_encoder
    volume = torch.randn(2, 12, 8, 12)
    transverse, frontal, lateral = (encoder.views[name].weight for name in AXES)
    expected = (
        torch.einsum("dc,bchw->bdhw", transverse[:, :, 0, 0], volume)
        + torch.einsum("ij,bcjw->bciw", frontal, volume)
        + torch.einsum("ij,bchj->bchi", lateral, volume)
    )
    summed = []
    encoder.normalization.register_forward_pre_hook(lambda module, inputs: summed.append(inputs[0]))
    encoder(volume)
    torch.testing.assert_close(summed[0], expected)


@pytest.mark.parametrize("initialization", ["identity", "zeros"])
def test_axis_initialization(initialization):
    stage = tiny(LeMoReModel, axis_initialization=initialization).encoder.stages[0]
    weight = stage.cartesian_encoder.views["lateral"].weight
    assert torch.equal(weight, torch.eye(24) if initialization == "identity" else torch.zeros(24, 24))


def test_normal_axis_weights_keep_the_variance_of_what_they_mix():
    for size in (32, 128):
        stage = tiny(LeMoReModel, axis_initialization="normal", image_size=4 * size).encoder.stages[0]
        for view in stage.cartesian_encoder.axis_views:
            assert view.weight.std().item() == pytest.approx(size**-0.5, rel=0.1)


def test_axis_weights_that_start_at_zero_are_learned():
    model = LeMoReForSemanticSegmentation(LeMoReConfig(**TINY | {"axis_initialization": "zeros"})).train()
    views = [view for name, view in model.named_modules() if name.endswith(("frontal", "lateral"))]
    assert len(views) == 8
    assert not any(view.weight.any() for view in views)
    model(random_images(), labels=random_labels()).loss.backward()
    assert all(view.weight.grad.any() for view in views)


def test_a_cartesian_encoder_is_views_then_depthwise_convolutions_then_channel_attention():
    encoder = tiny(LeMoReModel).encoder.stages[1].cartesian_encoder
    volume = torch.randn(2, 12, 8, 12)
    state = F.relu6(encoder.normalization(sum(view(volume) for view in encoder.views.values())))
    for number, layer in enumerate(encoder.depthwise):
        state = layer.normalization(layer.convolution(state))
        state = F.relu6(state) if number % 2 else state  # after each pair
    attention = encoder.channel_attention
    for layer in (attention.squeeze, attention.excite):  # they start too small to show
        nn.init.normal_(layer.weight)
    squeezed = state.mean((2, 3)) @ attention.squeeze.weight.flatten(1).t() + attention.squeeze.bias
    excited = F.relu(squeezed) @ attention.excite.weight.flatten(1).t() + attention.excite.bias
    torch.testing.assert_close(encoder(volume), volume + state * excited.sigmoid()[..., None, None])


# Axis weights at other sizes


@pytest.mark.parametrize("size", [7, 15, 16, 17, 24, 40, 41, 100])
def test_resampled_axis_weights_are_antialiased_bilinear_interpolation(size):
    weight = torch.randn(16, 16, dtype=torch.float64)
    expected = F.interpolate(weight[None, None], size=(size, size), mode="bilinear", antialias=True)[0, 0] * 16 / size
    torch.testing.assert_close(resample_axis_weight(weight, size), expected)


@pytest.mark.parametrize(("native", "size"), [(12, 12), (12, 40), (90, 23), (64, 129), (128, 127), (16, 1)])
def test_tent_filter_is_bilinear_resizing(native, size):
    signal = torch.randn(1, 5, 1, native, dtype=torch.float64)
    expected = F.interpolate(signal, size=(1, size), mode="bilinear", align_corners=False, antialias=size < native)
    torch.testing.assert_close(signal @ tent_filter(native, size, signal).t(), expected)
    if size == native:
        assert torch.equal(tent_filter(native, size, signal), torch.eye(native, dtype=torch.float64))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_tent_filters_of_half_precision_are_those_of_single(half):
    """Half precision cannot count the positions of a large image."""
    for size in (40, 129, 500):
        expected = tent_filter(128, size, torch.zeros(()))
        assert torch.equal(tent_filter(128, size, torch.zeros((), dtype=half)), expected)


def test_axis_weights_are_exact_at_the_native_size():
    weight = torch.randn(37, 37)
    assert torch.equal(resample_axis_weight(weight, 37), weight)


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("size", [9, 16, 23, 64, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_axis_weights_agree_in_whichever_order_they_are_applied(axis, size, dtype, tolerance):
    view = LeMoReAxisView(16, axis).to(dtype)
    nn.init.normal_(view.weight, std=0.25)
    volume = torch.randn(2, 3, 5, size, dtype=dtype).movedim(3, axis)
    resampled = resample_axis_weight(view.weight, size)

    def applied(factors):
        return functools.reduce(lambda state, factor: view._along_axis(factor, state), factors, volume)

    expected = torch.einsum("ij,...j->...i", resampled, volume.movedim(axis, -1)).movedim(-1, axis)
    torch.testing.assert_close(applied(view.native_factors(size)), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(view(volume), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [96, 128, 200, 512])
def test_axis_weights_at_larger_sizes_stay_close_to_upsampling_the_native_result(size):
    view = LeMoReAxisView(64, axis=3).double()
    nn.init.normal_(view.weight, std=1 / 8)
    angles = torch.linspace(0, 3 * math.pi, 64, dtype=torch.float64)
    smooth = torch.stack([angles.cos(), (angles / 2).sin(), angles / angles.max()])[None, None]

    def upsampled(volume):
        return F.interpolate(volume, size=(3, size), mode="bilinear")

    expected = upsampled(view(smooth))
    error = (view(upsampled(smooth)) - expected).norm() / expected.norm()
    assert error < 0.02


# Nested attention


def make_attention(**overrides) -> LeMoReNestedAttention:
    torch.manual_seed(0)
    return as_if_trained(LeMoReNestedAttention(LeMoReConfig(**TINY | overrides))).double().eval()


def tokens_of(attention: LeMoReNestedAttention) -> torch.Tensor:
    return torch.randn(2, attention.query.convolution.in_channels, 3, 4, dtype=torch.float64)


def test_the_nine_maps_each_sum_to_one_and_are_averaged():
    attention = make_attention()
    tokens = tokens_of(attention)
    # (B, 3·heads·key_dim, H, W) → a list of three (B, heads, H·W, key_dim)
    queries, keys = (
        layer(tokens).reshape(2, 3, 2, 4, 12).transpose(-1, -2).unbind(1) for layer in (attention.query, attention.key)
    )
    maps = [(query @ key.transpose(-1, -2) / 2).softmax(-1) for query in queries for key in keys]
    assert len(maps) == 9
    actual = attention.nested_maps(torch.stack(queries, 2) / 2, torch.stack(keys, 2))  # (B, heads, i·H·W, j, H·W)
    torch.testing.assert_close(actual.sum(-1), torch.ones(2, 2, 36, 3, dtype=torch.float64))
    actual = actual.unflatten(2, (3, 12)).permute(2, 4, 0, 1, 3, 5).flatten(0, 1)
    torch.testing.assert_close(actual, torch.stack(maps))
    torch.testing.assert_close(attention.combined_map(tokens), sum(maps) / 9)


def test_maps_of_many_tokens_are_made_some_queries_at_a_time(monkeypatch):
    """So that no tensor is larger than the combined map, where all nine would be nine times that."""
    attention = make_attention()
    tokens = tokens_of(attention).requires_grad_()

    def map_and_gradient():
        combined = attention.combined_map(tokens)
        (gradient,) = torch.autograd.grad((combined * torch.arange(12.0)).sum(), tokens)
        return combined, gradient

    whole = map_and_gradient()
    monkeypatch.setattr(modeling_lemore, "STRIP_BYTES", 5 * 2 * 2 * 9 * 12 * 8)  # five queries of the twelve
    shapes = []
    nested_maps = attention.nested_maps
    monkeypatch.setattr(
        attention, "nested_maps", lambda *given: shapes.append(given[0].shape[3]) or nested_maps(*given)
    )
    torch.testing.assert_close(map_and_gradient(), whole)
    assert shapes == [5, 5, 2]
    monkeypatch.setattr(modeling_lemore, "STRIP_BYTES", 1)
    torch.testing.assert_close(map_and_gradient(), whole)


def test_softmax_of_the_sum_is_one_ordinary_attention():
    attention = make_attention(nested_attention_softmax="sum")
    tokens = tokens_of(attention)
    query, key, value = (
        layer(tokens).reshape(2, 3, 2, -1, 12).sum(1).transpose(-1, -2)
        for layer in (attention.query, attention.key, attention.value)
    )
    context = F.scaled_dot_product_attention(query, key, value).transpose(-1, -2).reshape(2, -1, 3, 4)
    torch.testing.assert_close(attention(tokens)[0], attention.projection(attention.activation(context)))


def test_folding_the_three_value_projections_into_one_changes_nothing():
    attention = make_attention()
    tokens = tokens_of(attention)
    convolution, norm = attention.value.convolution, attention.value.normalization
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    weight = (convolution.weight * scale[:, None, None, None]).unflatten(0, (3, 12)).sum(0)
    bias = (norm.bias - norm.running_mean * scale).unflatten(0, (3, 12)).sum(0)
    value = F.conv2d(tokens, weight, bias).reshape(2, 2, 6, 12).transpose(-1, -2)
    context = (attention.combined_map(tokens) @ value).transpose(-1, -2).reshape(2, 12, 3, 4)
    torch.testing.assert_close(attention(tokens)[0], attention.projection(attention.activation(context)))


def test_the_combined_map_multiplies_each_value():
    attention = make_attention()
    tokens = tokens_of(attention)
    values = attention.value(tokens).reshape(2, 3, 2, 6, 12).transpose(-1, -2).unbind(1)
    combined = attention.combined_map(tokens)
    context = sum(combined @ value for value in values).transpose(-1, -2).reshape(2, 12, 3, 4)
    torch.testing.assert_close(attention(tokens)[0], attention.projection(attention.activation(context)))


def test_the_feed_forward_network_is_active_between_its_convolutions():
    block = tiny(LeMoReModel).global_block
    tokens = torch.randn(2, 52, 3, 4)
    attended = tokens + block.attention(tokens)[0]
    network = block.feed_forward
    hidden_state = F.relu6(network.depthwise(network.expansion(attended)))
    torch.testing.assert_close(block(tokens), attended + network.projection(hidden_state))


# The whole network


@pytest.mark.parametrize("output_stride", [4, 8, 32])
def test_the_head_classifies_the_active_sum_of_the_gated_scales(output_stride):
    model, images = tiny(output_stride=output_stride), random_images(2, 128, 160)
    features = model.lemore(images)
    size = (128 // output_stride, 160 // output_stride)

    def resized(state, size):
        return F.interpolate(state, size=size, mode="bilinear", align_corners=False)

    total = 0
    for fusion, local in zip(model.decode_head.fusions, features.local_features, strict=True):
        gate, value = fusion.gate(features.last_hidden_state).sigmoid(), fusion.value(features.last_hidden_state)
        local = fusion.local(resized(local, size) if local.shape[2] > size[0] else local)
        total += resized(local * resized(gate, local.shape[2:]) + resized(value, local.shape[2:]), size)
    expected = model.decode_head.classifier(F.relu6(total))
    torch.testing.assert_close(model(images).logits, expected)


@pytest.mark.parametrize(
    ("height", "width"), [(32, 32), (33, 47), (64, 96), (65, 97), (127, 32), (96, 64), (130, 201), (200, 300)]
)
def test_any_input_size(height, width):
    pixel_values = random_images(1, height, width)
    with torch.no_grad():
        outputs = tiny()(pixel_values, output_hidden_states=True)
        features = tiny(LeMoReModel)(pixel_values)

    def grid(stride):
        return math.ceil(height / stride), math.ceil(width / stride)

    assert outputs.logits.shape == (1, 5, *grid(8))
    assert outputs.logits.isfinite().all()
    assert [tuple(state.shape[2:]) for state in outputs.hidden_states] == [
        grid(2),
        grid(4),
        grid(8),
        grid(16),
        grid(32),
    ]
    assert [tuple(feature.shape[1:]) for feature in features.local_features] == [
        (channels, *grid(stride)) for channels, stride in zip((8, 12, 16, 16), (4, 8, 16, 32), strict=True)
    ]
    assert features.last_hidden_state.shape == (1, 52, *grid(64))


def test_each_token_averages_its_own_pixels():
    pyramid = tiny(LeMoReModel).token_pyramid
    features = tuple(torch.randn(1, 2, math.ceil(90 / stride), math.ceil(130 / stride)) for stride in (4, 8, 16, 32))
    tokens = pyramid(features)
    assert tokens.shape == (1, 8, 2, 3)
    for index, (feature, side) in enumerate(zip(features, (16, 8, 4, 2), strict=True)):
        for row in range(2):
            for column in range(3):
                cell = feature[..., row * side : (row + 1) * side, column * side : (column + 1) * side]
                token = tokens[:, 2 * index : 2 * index + 2, row, column]
                torch.testing.assert_close(token, cell.mean((2, 3)))


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_batch_items_do_not_influence_each_other(model_class):
    model = tiny(model_class)
    pixel_values = random_images(3)
    together = main_output(model, pixel_values)
    for index in range(3):
        alone = main_output(model, pixel_values[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(64, 32), (90, 45)])
def test_gradients(height, width):
    config = LeMoReConfig(
        **TINY | {"image_size": (64, 32), "stem_sizes": (2,), "hidden_sizes": (2, 2, 2, 3), "token_stride": 32},
        views=("transverse", "frontal", "lateral"),
        hidden_act="silu",
    )
    torch.manual_seed(0)
    model = as_if_trained(LeMoReForSemanticSegmentation(config)).double().eval()
    names, parameters = zip(*model.named_parameters(), strict=True)

    def logits(pixel_values, *parameters):
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), pixel_values).logits

    pixel_values = random_images(1, height, width, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(logits, (pixel_values, *parameters), fast_mode=True)


def test_gradients_of_single_images_are_mapped_over_a_batch():
    """As differentially private training needs them."""
    model, images, labels = tiny(), random_images(3), random_labels(3)
    parameters = dict(model.named_parameters())

    def loss(parameters, image, label_map):
        return torch.func.functional_call(model, parameters, (image[None],), {"labels": label_map[None]}).loss

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    for index in range(3):
        expected = torch.autograd.grad(loss(parameters, images[index], labels[index]), parameters.values())
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(each[name][index], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "option",
    [
        {"num_channels": 4},
        {"image_size": 128},
        {"stem_sizes": (8,)},
        {"hidden_sizes": (8, 12, 16, 20)},
        {"views": ("frontal",)},
        {"dilation": 1},
        {"use_residual": False},
        {"use_channel_attention": False},
        {"channel_attention_reduction": 4},
        {"use_nested_attention": False},
        {"num_nested_projections": 2},
        {"nested_attention_softmax": "sum"},
        {"num_attention_heads": 3},
        {"attention_key_dim": 8},
        {"attention_value_dim": 4},
        {"mlp_ratio": 1},
        {"token_stride": 32},
        {"decoder_hidden_size": 8},
        {"output_stride": 4},
        {"output_stride": 16},
        {"output_stride": 32},
        {"hidden_act": "gelu"},
        {"drop_path_rate": 0.9},
        {"drop_view_rate": 0.9},
        {"classifier_dropout_prob": 0.5},
        {"batch_norm_eps": 0.1},
        {"batch_norm_momentum": 0.9},
        {"initializer_range": 0.5},
        {"axis_initialization": "identity"},
        {"axis_initialization": "zeros"},
        {"num_labels": 6},
    ],
    ids=str,
)
def test_every_option_has_its_effect(option):
    def state_after_a_training_step(model):
        pixel_values = random_images(4, 128, 128)
        if option == {"num_channels": 4}:
            pixel_values = pixel_values[:, [0, 1, 2, 2]] if model.config.num_channels == 4 else pixel_values
        torch.manual_seed(0)
        logits = model.train()(pixel_values).logits.detach()
        return [logits, *model.state_dict().values()]

    usual, changed = state_after_a_training_step(tiny()), state_after_a_training_step(tiny(**option))
    assert len(usual) != len(changed) or not all(map(torch.equal, usual, changed))


def test_output_stride_is_the_stride_of_the_logits():
    for stride in (4, 8, 16, 32):
        logits = main_output(tiny(output_stride=stride), random_images(1, 100, 130))
        assert logits.shape[2:] == (math.ceil(100 / stride), math.ceil(130 / stride))


def test_drop_path_drops_whole_residual_branches_of_single_images():
    encoder = tiny(LeMoReModel, drop_path_rate=0.9).encoder.stages[3].cartesian_encoder.train()
    volume = torch.randn(64, 16, 2, 3)
    dropped = (encoder(volume) == volume).flatten(1).all(1)
    assert 0.4 < dropped.float().mean() < 0.95  # the fourth of five branches: 0.675
    assert not (encoder.eval()(volume) == volume).flatten(1).all(1).any()


def test_drop_path_grows_linearly_with_depth():
    model = LeMoReModel(LeMoReConfig(**TINY, drop_path_rate=0.2))
    blocks = [*(stage.cartesian_encoder for stage in model.encoder.stages), model.global_block]
    rates = [getattr(block.drop_path, "rate", 0.0) for block in blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    model = LeMoReModel(LeMoReConfig(**TINY, drop_path_rate=0.3, use_nested_attention=False))
    rates = [getattr(stage.cartesian_encoder.drop_path, "rate", 0.0) for stage in model.encoder.stages]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3]), "the last one of those that there are"


@pytest.mark.parametrize("name", ["frontal", "lateral"])
def test_drop_view_hides_a_view_from_single_images(name):
    view = tiny(LeMoReModel, drop_view_rate=0.25).encoder.stages[1].cartesian_encoder.views[name]
    volume = torch.randn(400, 4, 8, 8)
    seen, expected = view.train()(volume), view.eval()(volume)
    hidden = (seen == 0).flatten(1).all(1)
    assert 0.15 < hidden.float().mean() < 0.35
    torch.testing.assert_close(seen[~hidden], expected[~hidden] / 0.75)
    assert not (expected == 0).flatten(1).all(1).any()


# Outputs


def test_attentions_and_hidden_states():
    outputs = tiny()(random_images(2, 128, 200), output_attentions=True, output_hidden_states=True)
    (attention,) = outputs.attentions
    assert attention.shape == (2, 2, 8, 8)  # 2×4 tokens
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 2, 8))
    assert [state.shape[1] for state in outputs.hidden_states] == [8, 8, 12, 16, 16]
    plain = tiny()(random_images(2, 128, 200))
    assert plain.attentions is None
    assert plain.hidden_states is None


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_tuples_on_request(model_class):
    model, pixel_values = tiny(model_class), random_images()
    named, plain = model(pixel_values), model(pixel_values, return_dict=False)
    assert isinstance(plain, tuple)
    first = named.to_tuple()[0]
    torch.testing.assert_close(plain[0], first)


def test_backbone_gives_the_features_that_are_asked_for():
    backbone = tiny(LeMoReBackbone, out_features=["stem", "stage2", "stage4"])
    outputs = backbone(random_images())
    assert backbone.channels == [8, 12, 16]
    assert [tuple(feature.shape[1:]) for feature in outputs.feature_maps] == [(8, 32, 48), (12, 8, 12), (16, 2, 3)]
    model = tiny(LeMoReModel)
    model.encoder.load_state_dict(backbone.encoder.state_dict())
    assert torch.equal(model(random_images()).local_features[1], outputs.feature_maps[1])


@pytest.mark.parametrize(
    ("num_labels", "problem_type", "labels"),
    [
        (5, None, torch.tensor([1, 4])),
        (1, "regression", torch.tensor([0.5, -1.0])),
        (5, "multi_label_classification", torch.tensor([[0.0, 1, 1, 0, 0], [1.0, 0, 0, 0, 1]])),
    ],
)
def test_classification_losses(num_labels, problem_type, labels):
    model = tiny(LeMoReForImageClassification, num_labels=num_labels, problem_type=problem_type)
    outputs = model(random_images(), labels=labels)
    assert outputs.logits.shape == (2, num_labels)
    expected = {
        None: F.cross_entropy,
        "regression": lambda logits, labels: F.mse_loss(logits[:, 0], labels),
        "multi_label_classification": F.binary_cross_entropy_with_logits,
    }[problem_type](outputs.logits, labels)
    torch.testing.assert_close(outputs.loss, expected)


def test_a_classifier_sees_the_average_of_the_global_features():
    model, images = tiny(LeMoReForImageClassification), random_images(2, 128, 200)
    average = model.lemore(images).last_hidden_state.flatten(2).mean(2)
    torch.testing.assert_close(model(images).logits, model.classifier(average))


@pytest.mark.parametrize(
    ("num_labels", "labels"),
    [(5, torch.full((2, 5), 0.3)), (1, torch.tensor([[7.5], [-2.0]])), (1, torch.tensor([[7], [-2]]))],
)
def test_labels_that_are_no_classes_may_have_any_value(num_labels, labels):
    """Shares of several labels at once, as mixing makes them, and numbers to be met."""
    model = tiny(LeMoReForImageClassification, num_labels=num_labels)
    assert model(random_images(), labels=labels).loss.isfinite()


def test_classes_that_are_not_there_are_named():
    model, images = tiny(LeMoReForImageClassification, num_labels=5), random_images()
    for _ in range(2):  # also after labels that were fine
        assert model(images, labels=torch.tensor([4, -100])).loss.isfinite()
        for wrong in (5, -1):
            with pytest.raises(ValueError, match=f"no class: {wrong}. Expected 0 to 4 .*-100 for none"):
                model(images, labels=torch.tensor([0, wrong]))


# Numbers and layouts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (100, 300)])
def test_half_precision(dtype, height, width):
    pixel_values, labels = random_images(2, height, width), random_labels()
    expected = tiny()(pixel_values, labels=labels)
    actual = tiny().to(dtype)(pixel_values.to(dtype), labels=labels)
    assert actual.logits.dtype == dtype
    assert actual.loss.dtype == torch.float32
    scale = expected.logits.abs().max()
    assert (actual.logits.float() - expected.logits).abs().max() < 16 * torch.finfo(dtype).eps * scale
    torch.testing.assert_close(actual.loss, expected.loss, rtol=0.05, atol=0)


def test_autocast_trains():
    model = tiny().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(random_images(), labels=random_labels()).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_channels_last_gives_the_same_result(model_class):
    model, pixel_values = tiny(model_class), random_images(2, 100, 130)
    expected = main_output(model, pixel_values)
    model = model.to(memory_format=torch.channels_last)
    actual = main_output(model, pixel_values.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients_and_statistics(use_reentrant):
    results = []
    for checkpointing in (False, True):
        model = tiny().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        pixel_values = random_images().requires_grad_()
        model(pixel_values, labels=random_labels()).loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append([pixel_values.grad, *gradients, *model.buffers()])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_goes_with_synchronized_norms():
    results = []
    for checkpointing in (False, True):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(tiny()).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(random_images(), labels=random_labels()).loss.backward()
        results.append([*(parameter.grad for parameter in model.parameters()), *model.buffers()])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_with_gradient_checkpointing_counts_for_itself(copied):
    original = tiny().train()
    original.gradient_checkpointing_enable()
    expected, copies = copy.deepcopy(original.state_dict()), []
    for model in (copied(original), tiny().train()):
        model(random_images(), labels=random_labels()).loss.backward()
        copies.append(list(model.buffers()))
    for actual, once in zip(*copies, strict=True):
        torch.testing.assert_close(actual, once)
    for name, value in original.state_dict().items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("size", [24, 90])
def test_axis_weights_are_resampled_in_full_precision_under_autocast(size):
    """As the fused network has them, which makes them beforehand."""
    view = LeMoReAxisView(32, axis=2)
    nn.init.normal_(view.weight)
    expected = view.factors(size)
    with torch.autocast("cpu", torch.bfloat16):
        for actual, factor in zip(view.factors(size), expected, strict=True):
            assert torch.equal(actual, factor)


# Frozen parts


def test_what_is_frozen_gives_the_same_features_after_training():
    model = tiny()
    before = main_output(model.lemore, random_images())
    model.lemore.requires_grad_(False)
    head = copy.deepcopy(model.decode_head.state_dict())
    optimizer = torch.optim.SGD(model.decode_head.parameters(), lr=0.1)
    for _ in range(3):
        model.train()
        model(random_images(), labels=random_labels()).loss.backward()
        optimizer.step()
    assert torch.equal(main_output(model.eval().lemore, random_images()), before)
    changed = [name for name, value in model.decode_head.state_dict().items() if not torch.equal(value, head[name])]
    assert any("running_mean" in name for name in changed), "the head's own norms are trained"


def test_batch_norms_with_weights_to_train_are_trained():
    model = tiny().train()
    assert all(module.training for module in model.modules())


def test_one_token_is_too_little_to_train_on():
    model = tiny().train()
    with pytest.raises(ValueError, match=r"more than 64 pixels .* got shape \(1, 3, 64, 40\)"):
        model(random_images(1, 64, 40))
    model(random_images(2, 64, 40))
    model(random_images(1, 64, 65))
    model.requires_grad_(False).train()(random_images(1, 64, 40))
    # Without a block over the tokens only the head's norms see them.
    tiny(LeMoReForImageClassification, use_nested_attention=False).train()(random_images(1, 64, 40))
    with pytest.raises(ValueError, match="more than 64 pixels"):
        tiny(use_nested_attention=False).train()(random_images(1, 64, 40))
    with pytest.raises(ValueError, match="more than 32 pixels"):
        tiny(LeMoReBackbone).train()(random_images(1, 32, 32))
    tiny(LeMoReBackbone).train()(random_images(1, 32, 40))


def test_a_palette_for_fewer_classes_is_left_out():
    config = LeMoReConfig(**TINY, palette=[[level, 0, 0] for level in range(5)])
    assert LeMoReForSemanticSegmentation(config).config.palette == config.palette is not None
    config.num_labels = 6
    with CaptureLogger(logging.get_logger("transformers.models.lemore")) as captured:
        assert LeMoReForSemanticSegmentation(config).config.palette is None
    assert "`palette` has 5 colours for 6 classes" in captured.out


def test_a_palette_for_more_classes_is_left_out():
    """As of a checkpoint for eleven classes that is fine-tuned for two: its first colours mean others."""
    config = LeMoReConfig(**TINY, palette=default_palette(5))
    assert LeMoReForSemanticSegmentation(config).config.palette is not None
    config.num_labels = 2
    with CaptureLogger(logging.get_logger("transformers.models.lemore")) as captured:
        assert LeMoReForSemanticSegmentation(config).config.palette is None
    assert "`palette` has 5 colours for 2 classes" in captured.out
    config.num_labels, config.palette = 1, default_palette(2)
    assert LeMoReForSemanticSegmentation(config).config.palette is not None, "for background and foreground"


def test_a_palette_of_a_single_label_may_be_its_one_colour():
    config = LeMoReConfig(**TINY | {"num_labels": 1}, palette=[[200, 0, 0]])
    assert LeMoReForSemanticSegmentation(config).config.palette == [[200, 0, 0]]


def test_functional_transforms():
    """Ensembles by `vmap` and gradients by `torch.func.grad`, of a fused model and of many classes too."""
    models = [tiny(), tiny()]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for fused in (False, True):
        members = [model.fuse() if fused else model for model in models]
        states = torch.func.stack_module_state(members)
        for size in ((64, 96), (33, 47)):
            images = random_images(1, *size)

            def ensemble(parameters, buffers, model=members[0], images=images):
                return torch.func.functional_call(model, (parameters, buffers), (images,)).logits

            with torch.no_grad():
                actual = torch.vmap(ensemble)(*states)
                expected = torch.stack([model(images).logits for model in members])
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    model = tiny(num_labels=40)
    parameters, labels = dict(model.named_parameters()), random_labels()
    actual = torch.func.grad(
        lambda values: torch.func.functional_call(model, values, (random_images(),), {"labels": labels}).loss
    )(parameters)
    model(random_images(), labels=labels).loss.backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(actual[name], parameter.grad, rtol=1e-4, atol=1e-6)


# Compilation and export


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_compiles_to_one_graph(model_class):
    model, pixel_values = tiny(model_class), random_images(2, 64, 130)
    # PyTorch 2.11 breaks the graph at the context variable with which Transformers captures a backbone's hidden states.
    is_one = model_class is not LeMoReBackbone or is_torch_greater_or_equal("2.12")
    compiled = torch.compile(model, fullgraph=is_one, backend="eager")
    torch.testing.assert_close(main_output(compiled, pixel_values), main_output(model, pixel_values))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_training_step_compiles_to_one_graph():
    gradients = []
    for compiled in (False, True):
        model = tiny().train()
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        loss = forward(random_images(), labels=random_labels()).loss
        loss.backward()
        gradients.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def test_exports_with_dynamic_batch_height_and_width():
    model = tiny(image_size=(96, 128))
    dynamic = torch.export.Dim.DYNAMIC
    exported = torch.export.export(
        model, (random_images(2, 128, 160),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
    )
    # The attention's strips are for eager mode; PyTorch 2.11 cannot write them as ONNX.
    assert not [node for node in exported.graph.nodes if "split" in str(node.target)]
    # PyTorch 2.11 guards the remainders of pooling windows, which the graph itself does not depend on.
    program = exported.module(check_guards=is_torch_greater_or_equal("2.12"))
    # Smaller and odd, native in one axis, native, and where eager mode mixes at the native size.
    for batch_size, height, width in ((3, 67, 101), (1, 96, 200), (1, 96, 128), (1, 300, 400)):
        pixel_values = random_images(batch_size, height, width)
        torch.testing.assert_close(
            main_output(program, pixel_values), main_output(model, pixel_values), rtol=1e-4, atol=1e-5
        )


# Saving and loading


@pytest.fixture
def captured_log():
    logger = logging.get_logger("transformers.models.lemore")
    level = logger.level
    logger.setLevel(logging.INFO)
    with CaptureLogger(logger) as captured:
        yield captured
    logger.setLevel(level)


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_saves_safetensors_only_and_loads_the_same_model(model_class, tmp_path):
    model = tiny(model_class)
    model.save_pretrained(tmp_path)
    weights = [path.name for path in tmp_path.iterdir() if path.suffix not in (".json", ".py")]
    assert weights == ["model.safetensors"]
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(main_output(loaded, random_images()), main_output(model, random_images()))


def test_loading_into_another_image_size_resamples_and_says_so_once(tmp_path, captured_log):
    model = tiny()
    model.save_pretrained(tmp_path)
    for _ in range(2):  # each load says so
        loaded, info = LeMoReForSemanticSegmentation.from_pretrained(
            tmp_path, image_size=(96, 160), output_loading_info=True
        )
        captured_log.io.flush()
    assert not any(info.values())
    assert loaded.config.native_size == (96, 160)
    for name, parameter in loaded.named_parameters():
        original = model.get_parameter(name)
        if "frontal" in name or "lateral" in name:
            original = resample_axis_weight(original, parameter.shape[0])
        torch.testing.assert_close(parameter, original)
    messages = [line for line in captured_log.io.getvalue().splitlines() if line]
    assert len(messages) == 2
    assert all("resampled" in message for message in messages)


def test_a_backbone_inside_another_model_is_loaded_at_another_image_size(tmp_path):
    backbone = LeMoReConfig(**TINY | {"image_size": 64}, out_features=["stage1", "stage2", "stage3", "stage4"])
    config = UperNetConfig(backbone_config=backbone, hidden_size=16, pool_scales=[1], use_auxiliary_head=False)
    torch.manual_seed(0)
    model = UperNetForSemanticSegmentation(config)
    model.save_pretrained(tmp_path)
    config = UperNetConfig.from_pretrained(tmp_path)
    config.backbone_config.image_size = 96
    loaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path, config=config)
    name = "backbone.encoder.stages.0.cartesian_encoder.views.frontal.weight"
    torch.testing.assert_close(loaded.get_parameter(name), resample_axis_weight(model.get_parameter(name), 24))


def test_loading_at_the_same_size_says_nothing(tmp_path, captured_log):
    tiny().save_pretrained(tmp_path)
    LeMoReForSemanticSegmentation.from_pretrained(tmp_path)
    assert captured_log.io.getvalue() == ""


def test_a_classifiers_encoder_serves_segmentation_at_another_size(tmp_path):
    classifier = tiny(LeMoReForImageClassification, num_labels=9)
    classifier.save_pretrained(tmp_path)
    model, info = LeMoReForSemanticSegmentation.from_pretrained(
        tmp_path, image_size=(96, 64), num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"decode_head"}
    view = model.lemore.encoder.stages[0].cartesian_encoder.views["frontal"]
    original = classifier.lemore.encoder.stages[0].cartesian_encoder.views["frontal"]
    torch.testing.assert_close(view.weight, resample_axis_weight(original.weight, 24))
    pixel_values = random_images()
    torch.testing.assert_close(
        model.lemore.global_block.attention.query.convolution.weight,
        classifier.lemore.global_block.attention.query.convolution.weight,
    )
    assert main_output(model.eval(), pixel_values).isfinite().all()


def test_a_segmentation_models_encoder_serves_as_backbone(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    backbone, info = LeMoReBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    features = model.lemore(random_images()).local_features
    assert torch.equal(main_output(backbone, random_images()), features[-1])


def test_a_new_head_needs_ignore_mismatched_sizes(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LeMoReForSemanticSegmentation.from_pretrained(tmp_path, num_labels=7)
    loaded, info = LeMoReForSemanticSegmentation.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key[0] for key in info["mismatched_keys"]} == {
        "decode_head.classifier.weight",
        "decode_head.classifier.bias",
    }
    assert main_output(loaded, random_images()).shape[1] == 7
    assert torch.equal(loaded.lemore(random_images())[0], model.lemore(random_images())[0])


# Losses


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_the_loss_is_cross_entropy_of_the_upsampled_logits_without_void(dtype):
    outputs = tiny()(random_images(), labels=random_labels().to(dtype))
    logits = F.interpolate(outputs.logits, size=(64, 96), mode="bilinear")
    torch.testing.assert_close(outputs.loss, F.cross_entropy(logits, random_labels(), ignore_index=255))


def test_labels_of_another_size_than_the_image():
    outputs = tiny()(random_images(), labels=random_labels(height=50, width=31))
    logits = F.interpolate(outputs.logits, size=(50, 31), mode="bilinear")
    expected = F.cross_entropy(logits, random_labels(height=50, width=31), ignore_index=255)
    torch.testing.assert_close(outputs.loss, expected)


def test_one_label_is_binary_cross_entropy():
    labels = random_labels(num_labels=2)
    outputs = tiny(num_labels=1)(random_images(), labels=labels)
    assert outputs.logits.shape[1] == 1
    logits = F.interpolate(outputs.logits, size=(64, 96), mode="bilinear")[:, 0]
    valid = labels != 255
    expected = F.binary_cross_entropy_with_logits(logits[valid], labels[valid].float())
    torch.testing.assert_close(outputs.loss, expected)


@pytest.mark.parametrize("num_labels", [1, 2, 5])
def test_a_batch_of_void_has_no_loss_and_no_gradient(num_labels):
    model = tiny(num_labels=num_labels).train()
    loss = model(random_images(), labels=torch.full((2, 64, 96), 255)).loss
    loss.backward()
    assert loss.item() == 0
    assert not any(parameter.grad.any() for parameter in model.parameters())  # NaN would be true


def test_another_ignore_index():
    labels = random_labels().masked_fill(random_labels() == 255, -100)
    actual = tiny(semantic_loss_ignore_index=-100)(random_images(), labels=labels).loss
    torch.testing.assert_close(actual, tiny()(random_images(), labels=random_labels()).loss)


def test_the_ignore_index_may_be_no_label():
    with pytest.raises(ValueError, match="semantic_loss_ignore_index"):
        tiny(semantic_loss_ignore_index=3)
    with pytest.raises(ValueError, match="semantic_loss_ignore_index"):
        tiny(num_labels=1, semantic_loss_ignore_index=1)


# Bad input


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@pytest.mark.parametrize(
    ("shape", "message"),
    [((3, 64, 96), "batch"), ((2, 4, 64, 96), "num_channels"), ((1, 3, 31, 96), "32×32"), ((1, 3, 64, 8), "64×8")],
)
def test_bad_pixel_values(model_class, shape, message):
    with pytest.raises(ValueError, match=message):
        tiny(model_class)(torch.zeros(shape))


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@pytest.mark.parametrize("training", [False, True])
def test_pixel_values_that_are_no_tensor_of_floats(model_class, training):
    model = tiny(model_class).train(training)
    with pytest.raises(TypeError, match=r"got list: .* `return_tensors=\"pt\"`"):
        model([torch.zeros(3, 64, 96)] * 2)
    with pytest.raises(TypeError, match=r"uint8: .*rescale and normalise"):
        model(torch.zeros(2, 3, 64, 96, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.zeros(1, 64, 96, dtype=torch.long), ValueError, r"batch size of `pixel_values` \(2\)"),
        (torch.zeros(2, 1, 64, 96, dtype=torch.long), ValueError, "shape"),
        (torch.zeros(2, 64, 96), TypeError, "float32"),
        (torch.zeros(2, 64, 96, dtype=torch.bool), TypeError, "bool"),
    ],
)
def test_bad_labels(labels, error, message):
    with pytest.raises(error, match=message):
        tiny()(random_images(), labels=labels)


@pytest.mark.parametrize("training", [False, True])
def test_labels_that_are_no_class_are_named(training):
    model, labels = tiny().train(training), random_labels()
    for _ in range(2):  # also after labels that were fine
        model(random_images(), labels=random_labels())
        labels[0, 40, :3] = torch.tensor([5, 17, -1])
        with pytest.raises(ValueError, match=r"-1, 5, 17.*Expected 0 to 4.*255"):
            model(random_images(), labels=labels)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.bfloat16])
def test_masks_of_a_single_label_may_have_any_dtype(dtype):
    model, labels = tiny(num_labels=1), random_labels() % 2
    expected = model(random_images(), labels=labels).loss
    assert torch.equal(model(random_images(), labels=labels.to(dtype)).loss, expected)


@pytest.mark.parametrize("value", [0.5, math.nan, math.inf])
def test_masks_of_a_single_label_are_of_whole_numbers(value):
    labels = random_labels() % 2.0
    labels[0, 3, 4] = value
    with pytest.raises(ValueError, match=f"no class: {value}. Expected 0 to 1"):
        tiny(num_labels=1)(random_images(), labels=labels)
    assert segmentation_loss(torch.zeros(2, 1, 8, 12), labels).isnan(), "where nobody looks at the values"


def test_binary_labels_are_zero_and_one():
    check_label_values(torch.tensor([0, 1, 255]), num_labels=1)
    with pytest.raises(ValueError, match="2"):
        check_label_values(torch.tensor([0, 2]), num_labels=1)


def test_many_wrong_labels_are_not_all_named():
    with pytest.raises(ValueError, match=r"no class: 2, 3, .*11, \.\.\.\. Expected"):
        check_label_values(torch.arange(200), num_labels=2)


class LabelsElsewhere(torch.Tensor):
    """Labels that claim to be on a GPU."""

    device = torch.device("cuda")


def test_on_other_devices_only_some_training_steps_and_evaluation_look_at_labels(monkeypatch):
    def elsewhere(labels):
        return labels.as_subclass(LabelsElsewhere)

    model, wrong = tiny().train(), random_labels()
    wrong[0, 40, 0] = 77
    with pytest.raises(ValueError, match="77"):
        model(random_images(), labels=elsewhere(wrong))
    assert model(random_images(), labels=elsewhere(random_labels())).loss.isfinite()
    loss = model(random_images(), labels=elsewhere(wrong)).loss
    loss.backward()
    assert loss.isnan()
    assert all(parameter.grad.isnan().all() for parameter in model.decode_head.classifier.parameters())
    with pytest.raises(ValueError, match="77"):
        model.eval()(random_images(), labels=elsewhere(wrong))
    model.train()
    monkeypatch.setattr(modeling_lemore, "LABEL_CHECK_STEPS", 3)
    model(random_images(), labels=elsewhere(random_labels()))
    with pytest.raises(ValueError, match=r"`labels` of the last 3 steps held .* Expected 0 to 4 or 255 for void"):
        model(random_images(), labels=elsewhere(random_labels()))
    for _ in range(7):
        model(random_images(), labels=elsewhere(random_labels()))


def test_labels_without_values_give_a_loss_without_one():
    """On the meta device, where shapes and memory are worked out."""
    for model_class, labels in (
        (LeMoReForSemanticSegmentation, random_labels()),
        (LeMoReForImageClassification, torch.tensor([1, 4])),
    ):
        loss = tiny(model_class).to("meta")(random_images().to("meta"), labels=labels.to("meta")).loss
        assert loss.shape == ()


def test_training_steps_of_fake_tensors():
    """By which memory is planned: they have shapes and a device, but no values."""
    with FakeTensorMode():
        for model_class, size in ((LeMoReForSemanticSegmentation, (2, 64, 96)), (LeMoReForImageClassification, (2,))):
            loss = tiny(model_class).train()(torch.randn(2, 3, 64, 96), labels=torch.zeros(size).long()).loss
            loss.backward()
            assert isinstance(loss, FakeTensor)
            assert loss.shape == ()


def test_labels_that_are_no_tensor_are_refused():
    with pytest.raises(TypeError, match=r"must be a tensor, got ndarray: .* `return_tensors=\"pt\"`"):
        tiny()(random_images(), labels=random_labels().numpy())
    with pytest.raises(TypeError, match=r"must be a tensor, got list: pass `torch.tensor\(labels\)`"):
        tiny(LeMoReForImageClassification)(random_images(), labels=[0, 1])


def test_wrong_labels_never_index_out_of_bounds():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    for value in (3, 254, -1, -300):
        loss = segmentation_loss(logits, torch.full((1, 4, 4), value))
        assert loss.isnan()
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.isnan().all(), "zeros would let the batch go by unseen"


# Documentation


class MarkdownParser(doctest.DocTestParser):
    """Reads examples in fenced blocks."""

    def parse(self, string, name="<string>"):
        return super().parse(string.replace("```", ""), name)


@pytest.mark.parametrize("module", [configuration_lemore, modeling_lemore])
def test_examples_of_the_docstrings(module):
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder(parser=MarkdownParser()).find(module):
        runner.run(example)
    assert runner.tries
    assert not runner.failures


def test_saved_models_give_the_same_to_the_last_bit(tmp_path):
    """A file's weights begin at any byte, by which matrix products of some processors round."""
    model = tiny()
    model.save_pretrained(tmp_path)
    for options in ({}, {"output_loading_info": True}):
        loaded = LeMoReForSemanticSegmentation.from_pretrained(tmp_path, **options)
        loaded = (loaded[0] if options else loaded).eval()
        assert not any(parameter.data_ptr() % 64 for parameter in loaded.parameters())
        for size in [(64, 96), (33, 47), (100, 75)]:
            images = torch.randn(1, 3, *size)
            assert torch.equal(loaded(images).logits, model(images).logits)


def test_models_can_be_copied():
    model = tiny()
    assert torch.equal(main_output(copy.deepcopy(model), random_images()), main_output(model, random_images()))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_dilated_depthwise_convolutions_are_right_in_bfloat16(memory_format):
    """oneDNN 3.12 gets them wrong in channels-last: training then follows noise, and sometimes ends in NaN."""
    layer = LeMoReConvLayer(LeMoReConfig(), 48, 48, (1, 3), dilation=2, groups=48, activation=False)
    hidden_state, gradient = torch.randn(2, 4, 48, 45, 60, generator=torch.Generator().manual_seed(0))

    def weight_gradient(memory_format, enabled):
        layer.zero_grad()
        layer.to(memory_format=memory_format)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = layer(hidden_state.contiguous(memory_format=memory_format))
        output.backward(gradient)
        return layer.convolution.weight.grad.clone()

    expected = weight_gradient(torch.contiguous_format, enabled=False)
    error = (weight_gradient(memory_format, enabled=True) - expected).norm() / expected.norm()
    assert error < 0.02


@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("kernel_size", [(3, 1), (1, 3)])
def test_a_depthwise_convolution_by_shifts_is_the_convolution(kernel_size, dilation):
    generator = torch.Generator().manual_seed(0)
    hidden_state, weight, gradient = (
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((2, 5, 7, 9), (5, 1, *kernel_size), (2, 5, 7, 9))
    )
    padding = tuple(dilation * (side // 2) for side in kernel_size)
    expected = F.conv2d(hidden_state, weight, padding=padding, dilation=dilation, groups=5)
    found = DepthwiseByShifts.apply(hidden_state, weight, 2 if kernel_size == (3, 1) else 3, dilation)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(output, (hidden_state, weight), gradient) for output in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("size", [(3, 4), (7, 9), (12, 4), (90, 121)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_what_is_enlarged_is_interpolate_s(size, memory_format):
    generator = torch.Generator().manual_seed(0)
    hidden_state = torch.randn(2, 5, 3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    gradient = torch.randn(2, 5, *size, dtype=torch.float64, generator=generator).to(memory_format=memory_format)
    expected = F.interpolate(hidden_state, size=size, mode="bilinear")
    found = _EnlargeBilinear.apply(hidden_state, size)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(output, hidden_state, gradient) for output in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_what_is_trained_on_a_gpu_is_the_same_network(monkeypatch):
    model = tiny().double().train().to(memory_format=torch.channels_last)
    pixel_values = random_images(2, 100, 130, torch.float64).to(memory_format=torch.channels_last)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(pixel_values, labels=random_labels(2, 100, 130)).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    expected = gradients()
    used = {DepthwiseByShifts: 0, _EnlargeBilinear: 0}

    def count(function, apply, *inputs):
        used[function] += 1
        return apply(*inputs)

    for function in used:
        monkeypatch.setattr(function, "apply", functools.partial(count, function, function.apply))
    # Here there is no GPU, and single precision would not tell the two apart.
    monkeypatch.setattr(LeMoReDepthwiseConv2d, "_trains_in_half_precision", staticmethod(lambda hidden_state: True))
    for module in (modeling_lemore, operations_lemore):
        monkeypatch.setattr(module, "trains_on_gpu", lambda hidden_state: True)
    torch.testing.assert_close(gradients(), expected)
    assert used[DepthwiseByShifts] == 16, "four in each of four stages"
    assert used[_EnlargeBilinear] >= 8, "gates and values"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"image_size": 16}, "`image_size` must be at least 32"),
        ({"token_stride": 48}, "`token_stride` must be a multiple of 32"),
        ({"output_stride": 7}, "`output_stride` must be one of"),
        ({"hidden_act": "foo"}, "`hidden_act` must be one of"),
        ({"drop_path_rate": 0.1, "use_residual": False, "use_nested_attention": False}, "no residual branch to drop"),
    ],
)
def test_fields_given_to_from_pretrained_are_checked(override, message, tmp_path):
    """Before any weight is loaded, rather than when a trained model is to be saved."""
    LeMoReModel(LeMoReConfig(hidden_sizes=(8, 8, 8, 8), stem_sizes=(8,), image_size=64)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        LeMoReModel.from_pretrained(tmp_path, **override)


@pytest.mark.parametrize(("dtype", "autocast"), [("float32", False), ("float32", True), ("bfloat16", False)])
def test_whatever_hooks_a_convolution_is_called_in_training_too(dtype, autocast):
    """Pruning, adapters and probes hook or wrap modules: none may be passed by."""
    dtype = getattr(torch, dtype)
    model = LeMoReModel(LeMoReConfig(hidden_sizes=(8, 8, 8, 8), stem_sizes=(8,), image_size=64)).to(dtype).train()
    convolutions = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)}
    called = set()
    for name in convolutions:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(torch.randn(2, 3, 64, 64, dtype=dtype))
    assert called == convolutions


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_every_convolution_starts_with_the_initializer_range(model_class, tmp_path):
    config = LeMoReConfig(initializer_range=0.03)
    encoder = LeMoReModel(config)
    encoder.save_pretrained(tmp_path)
    for model in (model_class(config), model_class.from_pretrained(tmp_path)):
        weights = {name: weight for name, weight in model.named_parameters() if weight.ndim > 1}
        for name, weight in weights.items():
            if "axis" in name or name.split(".")[-2] in ("frontal", "lateral"):
                assert not weight.any(), name
            else:
                assert weight.std().item() == pytest.approx(0.03, rel=0.35), name
        assert len(weights) > 40


def test_a_configuration_without_dictionaries_gives_tuples(tmp_path):
    pixel_values = random_images()
    for model_class in MODEL_CLASSES:
        model = tiny(model_class)
        model.save_pretrained(tmp_path)
        plain = model_class.from_pretrained(tmp_path, return_dict=False).eval()(pixel_values)
        assert isinstance(plain, tuple)
        torch.testing.assert_close(plain[0], model(pixel_values).to_tuple()[0])


def test_a_path_is_no_configuration():
    with pytest.raises((TypeError, ValueError), match="from_pretrained"):
        LeMoReForSemanticSegmentation("some/folder")


def test_parts_that_add_up_maps_stay_on_one_device():
    model = tiny()
    sizes = {0: 0, 1: 10**9}
    for limit in range(20_000, 400_000, 20_000):  # bytes of the first device, so that the cut falls everywhere
        places = infer_auto_device_map(model, sizes | {0: limit}, no_split_module_classes=model._no_split_modules)
        assert not [name for name in places if name.startswith("decode_head.")]


def test_a_classifier_drops_features_in_training():
    model = LeMoReForImageClassification(
        LeMoReConfig(**TINY | {"num_labels": 5, "classifier_dropout_prob": 0.5})
    ).train()
    seen = []
    model.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(torch.randn(4, 3, 64, 64))
    assert 0.3 < (seen[0] == 0).float().mean() < 0.7


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_no_layer_is_an_embedding(model_class):
    """Transformers asks before it quantizes a layer with torchao, and takes no error for an answer."""
    model = model_class(LeMoReConfig(hidden_sizes=(8, 8, 8, 8), stem_sizes=(8,), image_size=64))
    assert model.get_input_embeddings() is None
    assert model.get_output_embeddings() is None
