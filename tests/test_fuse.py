# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Fused models: the outputs of the original, on every way to and from them."""

import copy

import pytest
import torch
from test_modeling_lemore import MODEL_CLASSES, main_output, random_images, random_labels, tiny
from torch import nn

from lemore_hf import LeMoReBackbone, LeMoReConfig, LeMoReForSemanticSegmentation

SIZES = [(64, 96), (33, 47), (90, 300)]  # native, odd, and beyond 2.5 times the native width
OPTIONS = [
    {},
    {"views": ("transverse",)},
    {"views": ("frontal",)},
    {"views": ("lateral", "transverse")},
    {"dilation": 1},
    {"dilation": 3},
    {"use_residual": False},
    {"use_channel_attention": False},
    {"use_residual": False, "use_channel_attention": False},
    {"use_nested_attention": False},
    {"num_nested_projections": 1},
    {"nested_attention_softmax": "sum"},
    {"token_stride": 32},
    {"output_stride": 4},
    {"output_stride": 16},
    {"output_stride": 32},
    {"hidden_act": "gelu"},
    {"hidden_act": "relu"},
    {"drop_path_rate": 0.5},
    {"stem_sizes": (8,)},
    {"num_channels": 4},
]


def trained(model_class=LeMoReForSemanticSegmentation, **overrides):
    """A tiny model with weights and statistics that make every mistake in fusing it visible."""
    model = tiny(model_class, **overrides)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.2, 3)
    return model


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_outputs_are_the_originals(options):
    model = trained(**options)
    fused = model.fuse()
    for height, width in SIZES:
        for batch_size in (1, 3):
            pixel_values = random_images(batch_size, height, width)
            pixel_values = pixel_values[:, [0, 1, 2, 0][: model.config.num_channels]]
            expected = main_output(model, pixel_values)
            for memory_format in (torch.contiguous_format, torch.channels_last):
                fused = fused.to(memory_format=memory_format)
                actual = main_output(fused, pixel_values.to(memory_format=memory_format))
                assert relative_error(actual, expected) < 2e-5, (height, width, batch_size, memory_format)


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_every_class_of_the_family_can_be_fused(model_class):
    model = trained(model_class)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = model.fuse()
    assert type(fused) is model_class
    assert relative_error(main_output(fused, random_images()), main_output(model, random_images())) < 2e-5
    # No norm is left, and the model is as it was.
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert not model.config.is_fused
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    # They share no memory.
    for parameter in fused.parameters():
        parameter.data.fill_(torch.nan)
    assert main_output(model, random_images()).isfinite().all()


def test_hidden_states_attentions_and_loss_are_the_originals():
    model, arguments = trained(), {"output_hidden_states": True, "output_attentions": True}
    expected = model(random_images(), labels=random_labels(), **arguments)
    actual = model.fuse()(random_images(), labels=random_labels(), **arguments)
    for name in ("hidden_states", "attentions"):
        assert len(actual[name]) == len(expected[name])
        assert all(map(lambda *pair: relative_error(*pair) < 2e-5, actual[name], expected[name]))
    torch.testing.assert_close(actual.loss, expected.loss)


def test_features_of_a_backbone_are_the_originals():
    backbone = trained(LeMoReBackbone, out_features=["stem", "stage1", "stage4"])
    expected, actual = (network(random_images()).feature_maps for network in (backbone, backbone.fuse()))
    assert all(map(lambda *pair: relative_error(*pair) < 2e-5, actual, expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = trained()
    expected = main_output(model, random_images())
    for fused in (model.fuse().to(dtype), copy.deepcopy(model).to(dtype).fuse()):
        actual = main_output(fused, random_images(dtype=dtype))
        assert actual.dtype == dtype
        assert relative_error(actual, expected) < 16 * torch.finfo(dtype).eps


def test_autocast():
    model = trained()
    with torch.autocast("cpu", torch.bfloat16):
        actual = main_output(model.fuse(), random_images())
    assert relative_error(actual, main_output(model, random_images())) < 16 * torch.finfo(torch.bfloat16).eps


# Ways to a fused model and from it


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_survives_saving_and_loading(model_class, tmp_path):
    fused = trained(model_class).fuse()
    fused.save_pretrained(tmp_path)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.is_fused
    assert torch.equal(main_output(loaded, random_images()), main_output(fused, random_images()))


def test_fusing_again_gives_an_equal_copy():
    fused = trained().fuse()
    again = fused.fuse()
    assert again is not fused
    assert torch.equal(main_output(again, random_images()), main_output(fused, random_images()))


def test_loading_at_another_native_size(tmp_path):
    model = trained()
    for name, network in (("plain", model), ("fused", model.fuse())):
        network.save_pretrained(tmp_path / name)
    plain, fused = (
        LeMoReForSemanticSegmentation.from_pretrained(tmp_path / name, image_size=(96, 160))
        for name in ("plain", "fused")
    )
    images = random_images(1, 96, 160)
    assert relative_error(main_output(fused, images), main_output(plain, images)) < 2e-5


def test_a_configuration_builds_a_fused_model():
    model = LeMoReForSemanticSegmentation(LeMoReConfig(image_size=64, is_fused=True))
    assert not model.training
    assert model(random_images()).logits.isfinite().all()
    assert (
        model.state_dict().keys()
        == LeMoReForSemanticSegmentation(LeMoReConfig(image_size=64)).fuse().state_dict().keys()
    )


def test_compiles_to_one_graph():
    torch._dynamo.reset()
    fused = trained().fuse()
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    torch.testing.assert_close(main_output(compiled, random_images()), main_output(fused, random_images()))


# Inference only


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_training_is_refused(model_class):
    fused = trained(model_class).fuse()
    with pytest.raises(RuntimeError, match=r"fused, for inference only.*eval\(\).*fuse\(\)"):
        fused.train()(random_images())
    assert main_output(fused.eval(), random_images()).isfinite().all()


def test_gradients_of_the_images_are_the_originals():
    model, gradients = trained().double(), []
    for network in (model, model.fuse()):
        pixel_values = random_images(1, 40, 50, dtype=torch.float64).requires_grad_()
        network(pixel_values).logits.square().sum().backward()
        gradients.append(pixel_values.grad)
    torch.testing.assert_close(*gradients)
