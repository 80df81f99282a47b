# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Fused models: the outputs of the original, on every way to and from them."""

import copy
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_modeling_lemore import MODEL_CLASSES, main_output, random_images, random_labels, tiny
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.utils import prune
from transformers import AutoModel, AutoModelForSemanticSegmentation

from lemore_hf import LeMoReBackbone, LeMoReConfig, LeMoReForSemanticSegmentation, LeMoReImageProcessor
from lemore_hf.modeling_lemore import LeMoReAxisView

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
    {"drop_view_rate": 0.5},
    {"stem_sizes": (8,)},
    {"num_channels": 4},
]


def trained(model_class=LeMoReForSemanticSegmentation, **overrides):
    """A tiny model with weights and statistics that make every mistake in fusing it visible."""
    model = tiny(model_class, **overrides)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # they start too small to show beside the residuals
            nn.init.kaiming_normal_(module.weight)
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


@pytest.mark.parametrize("size", [(90, 120), (90, 300)])
def test_autocast_leaves_nothing_behind(size):
    model, images = trained().fuse(), random_images(1, *size)
    expected = main_output(copy.deepcopy(model), images)
    with torch.autocast("cpu", torch.bfloat16):
        main_output(model, images)
    assert torch.equal(main_output(model, images), expected)


# Ways to a fused model and from it


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_survives_saving_and_loading(model_class, tmp_path):
    fused = trained(model_class).fuse()
    fused.save_pretrained(tmp_path)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.is_fused
    weights = fused.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    # The outputs not to the last bit: files hold no strides, by which kernels are chosen.
    assert relative_error(main_output(loaded, random_images()), main_output(fused, random_images())) < 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_an_empty_batch_has_no_logits(size):
    model, images = tiny(), torch.zeros(0, 3, *size)
    assert model(images).logits.shape == model.fuse()(images).logits.shape == (0, 5, *(-(-side // 8) for side in size))


def test_wrapped_and_offloaded_weights_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="meta device"):
        tiny().to("meta").fuse()
    layer = model.decode_head.classifier
    model.decode_head.classifier = nn.Module()  # as peft wraps it
    model.decode_head.classifier.base_layer = layer
    with pytest.raises(ValueError, match="merge_and_unload"):
        model.fuse()


def test_masks_of_pruning_are_refused():
    model = trained()
    prune.l1_unstructured(model.decode_head.classifier, "weight", 0.5)
    with pytest.raises(ValueError, match=r"decode_head\.classifier\.weight_mask.*prune\.remove"):
        model.fuse()
    prune.remove(model.decode_head.classifier, "weight")
    images = random_images()
    torch.testing.assert_close(model.fuse()(images).logits, model(images).logits, rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("auto_class", [AutoModelForSemanticSegmentation, AutoModel])
def test_a_checkpoint_is_loaded_as_what_it_is(auto_class, tmp_path):
    model = trained()
    model.save_pretrained(tmp_path / "plain")
    model.fuse().save_pretrained(tmp_path / "fused")
    with pytest.raises(ValueError, match=r"plain is not fused.*is_fused=True.*call `fuse\(\)`"):
        auto_class.from_pretrained(tmp_path / "plain", is_fused=True)
    with pytest.raises(ValueError, match=r"fused is fused.*is_fused=False.*for training"):
        auto_class.from_pretrained(tmp_path / "fused", is_fused=False)
    assert auto_class.from_pretrained(tmp_path / "fused", is_fused=True).config.is_fused
    assert not auto_class.from_pretrained(tmp_path / "plain", is_fused=False).config.is_fused
    (tmp_path / "plain" / "config.json").unlink()  # Then the configuration comes along.
    assert not auto_class.from_pretrained(tmp_path / "plain", config=model.config).config.is_fused


def test_the_model_s_own_class_loads_a_checkpoint_as_what_it_is_too(tmp_path):
    """Or what the names of a fused network lack would be random."""
    model = trained()
    model.save_pretrained(tmp_path / "plain")
    model.fuse().save_pretrained(tmp_path / "fused")
    for name, wanted in (("plain", True), ("fused", False)):
        for options in (
            {"is_fused": wanted},
            {"config": LeMoReConfig(**model.config.to_dict() | {"is_fused": wanted})},
        ):
            with pytest.raises(ValueError, match=f"cannot be loaded with `is_fused={wanted}`"):
                LeMoReForSemanticSegmentation.from_pretrained(tmp_path / name, **options)


REMOTE_PROGRAM = """
import sys
sys.modules["lemore_hf"] = None  # importing it fails
import torch
from transformers import AutoModelForSemanticSegmentation, pipeline

folder, pixel_values, results = sys.argv[1:]
model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True)
assert "transformers_modules" in type(model).__module__ and model.config.is_fused
with torch.no_grad():
    logits = model(torch.load(pixel_values)).logits
segmenter = pipeline("image-segmentation", model=folder, trust_remote_code=True)
assert segmenter.model.config.is_fused
torch.save([logits, model.fuse()(torch.load(pixel_values)).logits.detach()], results)
"""


def test_serves_as_remote_code_and_in_pipelines(tmp_path):
    fused = trained().fuse()
    fused.save_pretrained(tmp_path / "model")
    LeMoReImageProcessor(size={"height": 64, "width": 96}).save_pretrained(tmp_path / "model")
    torch.save(random_images(), tmp_path / "images.pt")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    paths = [str(tmp_path / name) for name in ("model", "images.pt", "results.pt")]
    command = [sys.executable, "-c", REMOTE_PROGRAM, *paths]
    # Not in the checkout, where the package could be imported from.
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for logits in torch.load(tmp_path / "results.pt"):
        torch.testing.assert_close(logits, main_output(fused, random_images()))


def test_compiles_to_one_graph():
    torch._dynamo.reset()
    fused = trained().fuse()
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    images = random_images(2, 64, 130)  # native in one axis
    torch.testing.assert_close(main_output(compiled, images), main_output(fused, images))


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


# Axis weights remembered by size


def factors_of(model: nn.Module) -> list[dict]:
    return [module._factors for module in model.modules() if isinstance(module, LeMoReAxisView)]


def test_resampled_axis_weights_are_made_once_for_a_size():
    fused = trained().fuse()
    first = main_output(fused, random_images(1, 90, 300))
    kept = [dict(factors) for factors in factors_of(fused)]
    assert all(len(factors) == 1 for factors in kept)
    assert torch.equal(main_output(fused, random_images(1, 90, 300)), first)
    for before, factors in zip(kept, factors_of(fused), strict=True):
        assert all(factors[size][-1] is made for size, (*_, made) in before.items())


def test_only_some_sizes_are_remembered_and_none_is_saved():
    fused = trained().fuse()
    names = fused.state_dict().keys()
    for width in range(100, 400, 32):
        main_output(fused, random_images(1, 40, width))
    assert max(map(len, factors_of(fused))) == LeMoReAxisView.MAX_SIZES
    assert fused.state_dict().keys() == names


def test_threads_share_what_is_remembered():
    """More sizes than are remembered, so that threads take from each other what they are about to read."""
    view = next(
        module for module in trained().fuse().requires_grad_(False).modules() if isinstance(module, LeMoReAxisView)
    )
    expected = {size: view._make_factors(size) for size in range(20, 32)}

    def read(start: int) -> bool:
        sizes = [20 + (start + step) % 12 for step in range(300)]
        return all(torch.equal(view.factors(size)[0], expected[size][0]) for size in sizes)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(read, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert len(view._factors) <= LeMoReAxisView.MAX_SIZES + 8


def test_axis_weights_are_made_again_for_new_weights_types_and_layouts():
    fused, other, images = trained().fuse(), trained(), random_images(1, 90, 120)
    main_output(fused, images)
    for name, parameter in other.named_parameters():
        if "views" in name:
            nn.init.normal_(parameter, std=0.2)
    expected = main_output(other, images)
    fused.load_state_dict(other.fuse().state_dict())
    assert relative_error(main_output(fused, images), expected) < 2e-5
    assert relative_error(main_output(fused.double(), images.double()), expected) < 2e-5
    assert relative_error(main_output(copy.deepcopy(fused).float(), images), expected) < 2e-5


def test_axis_weights_of_one_network_are_not_taken_for_those_of_another_in_its_place():
    """Weights that are swapped and dropped, as an ensemble does it, come to lie where the ones before did."""
    fused, images = trained().fuse().requires_grad_(False), random_images(1, 90, 120)
    for _ in range(8):
        state = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
        for name in state:
            if "views" in name:
                nn.init.normal_(state[name], std=0.2)
        expected = main_output(load_into(copy.deepcopy(fused), state), images)
        assert torch.equal(functional_call(fused, state, (images,)).logits, expected)
        assert torch.equal(main_output(load_into(fused, state), images), expected)
        del state


def load_into(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    model.load_state_dict(state, assign=True)
    return model


def test_a_fused_network_is_mapped_over_images():
    fused, images = trained().fuse().requires_grad_(False), random_images(3, 64, 96)
    mapped = vmap(lambda image: fused(image[None]).logits[0])(images)
    assert relative_error(mapped, fused(images).logits) < 2e-5


def test_what_inference_mode_remembers_serves_outside_of_it():
    fused = trained().fuse().requires_grad_(False)
    pixel_values = random_images(1, 90, 120)
    with torch.inference_mode():
        expected = fused(pixel_values).logits.clone()
    logits = fused(pixel_values.clone().requires_grad_()).logits
    logits.sum().backward()
    torch.testing.assert_close(logits.detach(), expected.clone())


def test_what_is_made_in_inference_mode_serves_there():
    """Its weights keep no count of their changes, by which what is remembered of others is known to hold."""
    model, images = trained(), random_images(1, 90, 120)
    expected = main_output(model, images)
    with torch.inference_mode():
        fused = model.fuse()
        assert all(parameter.is_inference() for parameter in fused.parameters())
        for _ in range(2):
            assert relative_error(fused(images).logits, expected) < 2e-5


def test_axis_weights_have_their_gradients_also_where_they_are_remembered():
    axes = ("frontal.weight", "lateral.weight")
    model, images, gradients = trained().double(), random_images(1, 90, 120, dtype=torch.float64), []
    for network in (model, model.fuse()):
        main_output(network, images)
        network(images).logits.square().sum().backward()
        gradients.append([weight.grad for name, weight in network.named_parameters() if name.endswith(axes)])
    assert len(gradients[0]) == 8
    torch.testing.assert_close(*gradients)


# Memory

COUNT_PAGE_FAULTS = """
import resource
import statistics
import sys
import torch
from lemore_hf import LeMoReConfig, LeMoReForSemanticSegmentation

model = LeMoReForSemanticSegmentation(LeMoReConfig(num_labels=150)).fuse()
pixel_values = torch.randn(*map(int, sys.argv[1:]))


def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


with torch.inference_mode():
    counts = []
    for _ in range(12):
        before = page_faults()
        model(pixel_values)
        counts.append(page_faults() - before)
# The heap settles within a few passes, and now and then, as blocks happen to lie, it grows once more.
print(statistics.median_high(counts[3:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
@pytest.mark.parametrize("shape", ["1 3 512 512", "1 3 900 1200", "4 3 512 512"])
def test_a_fresh_process_reuses_its_buffers(shape):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    result = subprocess.run(
        [sys.executable, "-c", COUNT_PAGE_FAULTS, *shape.split()],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert int(result.stdout) < 500  # of 4 KiB; several thousand where each buffer is new


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_settings_of_the_environment_are_kept():
    """Here those of a small machine, which gives all that is freed back to the system."""
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", COUNT_PAGE_FAULTS, "1", "3", "256", "256"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert int(result.stdout) > 1000
