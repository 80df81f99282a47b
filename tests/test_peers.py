# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""The peers: their published sizes, a start that can be trained, and the way through files."""

import math

import pytest
import torch
from torchvision.models.segmentation import lraspp_mobilenet_v3_large
from transformers import AutoModelForSemanticSegmentation

from lemore_hf import LeMoReConfig, LeMoReForImageClassification, LeMoReForSemanticSegmentation
from lemore_hf.complexity import count_multiply_accumulates
from lemore_hf.peers import PEERS, build_peer, head_prefixes

# Parameters, G multiply-accumulates at 512×512 with 150 labels, and stride of the logits.
SIZES = {
    "lraspp-mobilenet-v3-large": (3_243_468, 2.06, 8),
    "segformer-b0": (3_752_694, 8.39, 4),
    "mobilevitv2-deeplabv3": (13_384_831, 9.48, 32),
    "mobilenetv2-deeplabv3": (2_558_870, 3.06, 16),
}


@pytest.mark.parametrize("name", PEERS)
def test_parameters_and_multiply_accumulates_are_the_known_ones(name):
    parameters, giga_macs, stride = SIZES[name]
    model = build_peer(name, 150).eval().to("meta")
    pixel_values = torch.empty(1, 3, 512, 512, device="meta")
    assert model.num_parameters() == parameters
    assert count_multiply_accumulates(model, pixel_values) / 1e9 == pytest.approx(giga_macs, abs=0.005)
    assert model(pixel_values).logits.shape == (1, 150, 512 // stride, 512 // stride)


@pytest.mark.parametrize("name", PEERS)
def test_signals_and_gradients_reach_both_ends_of_a_random_network(name):
    torch.manual_seed(0)
    model = build_peer(name, 5)
    assert model.training
    pixel_values = torch.randn(4, 3, 96, 128)
    labels = torch.randint(0, 5, (4, 96, 128))
    labels[:, :10] = 255
    output = model(pixel_values, labels=labels)
    assert output.loss.item() == pytest.approx(math.log(5), rel=0.1), "the start should favour no class"
    assert output.logits.std() > 0.05, "the image should reach the logits"
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    first = next(iter(gradients.values()))
    assert first.abs().max() > 1e-6, "the gradient should reach the first convolution"


@pytest.mark.parametrize("name", PEERS)
def test_norms_start_as_the_identity_and_average_over_batches(name):
    for module in build_peer(name, 5).modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
            assert module.momentum <= 0.1


@pytest.mark.parametrize("name", PEERS)
def test_convolutions_start_by_the_fan_out_of_a_group(name):
    """A depthwise one has a fan of nine, however many channels there are."""
    torch.manual_seed(0)
    for module_name, module in build_peer(name, 5).named_modules():
        # The classifiers are those that give a score to each of the five classes.
        if isinstance(module, torch.nn.Conv2d) and module.out_channels != 5:
            fan_out = module.weight[:, 0].numel() / module.groups
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.2), module_name


def test_mobilenetv2_is_trained_as_deeplab_is():
    """By Transformers' defaults 80 % of the features are dropped, and norms know the last batch alone."""
    torch.manual_seed(0)
    model, seen = build_peer("mobilenetv2-deeplabv3", 5), []
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    for module in (norm, model.segmentation_head.classifier):
        module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    model(torch.randn(4, 3, 96, 128))
    in_norm, in_classifier = seen
    torch.testing.assert_close(norm.running_mean, 0.003 * in_norm.mean((0, 2, 3)))
    dropped = (in_classifier == 0).flatten(2).all(2).float().mean()
    assert dropped.item() == pytest.approx(0.1, abs=0.05)


@pytest.mark.parametrize("name", PEERS)
def test_a_saved_peer_loads_with_the_auto_class(name, tmp_path):
    id2label = {0: "road", 1: "sky", 2: "tree"}
    model = build_peer(name, 3, id2label).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert loaded.config.id2label == id2label
    assert loaded.config.label2id == {label: index for index, label in id2label.items()}
    assert all(map(torch.equal, model.state_dict().values(), loaded.state_dict().values()))
    pixel_values = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded(pixel_values).logits, model(pixel_values).logits)


def test_lraspp_is_torchvisions_network_before_its_last_upsampling():
    model = build_peer("lraspp-mobilenet-v3-large", 4).eval()
    reference = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4).eval()
    reference.load_state_dict(model.state_dict())
    pixel_values = torch.randn(1, 3, 90, 130)
    logits = model(pixel_values).logits
    assert logits.shape == (1, 4, 12, 17)
    upsampled = torch.nn.functional.interpolate(logits, size=(90, 130), mode="bilinear", align_corners=False)
    torch.testing.assert_close(upsampled, reference(pixel_values)["out"])


def test_lraspp_has_the_loss_and_the_outputs_of_transformers_models():
    model = build_peer("lraspp-mobilenet-v3-large", 4).eval()
    pixel_values, labels = torch.randn(1, 3, 64, 64), torch.randint(4, (1, 64, 64))
    labels[:, :20] = 255
    expected = model(pixel_values, labels=labels)
    model.config.semantic_loss_ignore_index = -100
    loss, logits = model(pixel_values, labels=labels.masked_fill(labels == 255, -100), return_dict=False)
    torch.testing.assert_close((loss, logits), (expected.loss, expected.logits))


def test_lraspp_with_another_number_of_labels_takes_over_the_rest(tmp_path):
    build_peer("lraspp-mobilenet-v3-large", 4).save_pretrained(tmp_path)
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    for classifier in (model.classifier.low_classifier, model.classifier.high_classifier):
        assert classifier.out_channels == 7
        assert classifier.weight.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("name", PEERS)
def test_head_prefixes_divide_a_peer_into_head_and_pretrained_part(name):
    model = build_peer(name, 5)
    in_head = [n for n, _ in model.named_parameters() if n.startswith(head_prefixes(model))]
    in_base = [n for n, _ in model.named_parameters() if n.startswith(f"{model.base_model_prefix}.")]
    assert in_head
    assert len(in_head) + len(in_base) == len(list(model.named_parameters()))
    assert any(model.get_parameter(n).shape[0] == 5 for n in in_head), "the classifier belongs to the head"


def test_head_prefixes_of_lemore():
    assert head_prefixes(LeMoReForSemanticSegmentation(LeMoReConfig())) == ("decode_head.",)
    assert head_prefixes(LeMoReForImageClassification(LeMoReConfig())) == ("classifier.",)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"'unet'; the peers are .*segformer-b0"):
        build_peer("unet", 3)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        build_peer("segformer-b0", 1)
    with pytest.raises(ValueError, match=r"0 to 2, got \[0, 1\]"):
        build_peer("segformer-b0", 3, {0: "a", 1: "b"})
