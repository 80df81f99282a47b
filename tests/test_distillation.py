# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""The loss that teachers give, against the formula, and which networks may teach."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation
from transformers.modeling_outputs import SemanticSegmenterOutput

from lemore_hf import LeMoReConfig, LeMoReForSemanticSegmentation, LeMoReImageProcessor
from lemore_hf.checkpointing import CheckpointError
from lemore_hf.data.recipes import load_recipe
from lemore_hf.distillation import DistillationLoss, load_teacher

SCENES = load_recipe("scenes")
LABELS = {"id2label": SCENES.id2label, "label2id": {name: index for index, name in SCENES.id2label.items()}}
TINY = {"stem_sizes": [8], "hidden_sizes": [8, 8, 8, 16], "num_attention_heads": 1, "decoder_hidden_size": 8}


class Teacher(nn.Module):
    """Logits that do not depend on the image."""

    def __init__(self, *logits: float, size: tuple[int, int] = (4, 6)):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits)[None, :, None, None].expand(1, -1, *size).clone())

    def forward(self, pixel_values: torch.Tensor) -> SemanticSegmenterOutput:
        return SemanticSegmenterOutput(logits=self.logits.expand(len(pixel_values), -1, -1, -1))


def lemore(**fields) -> LeMoReForSemanticSegmentation:
    return LeMoReForSemanticSegmentation(LeMoReConfig(**LABELS, **TINY, image_size=[64, 64], **fields)).eval()


def test_the_loss_is_the_divergence_from_the_mean_of_the_teachers():
    teachers = [Teacher(1.0, 0.0, -2.0), Teacher(-1.0, 3.0, 0.5, size=(8, 12))]
    logits = torch.tensor([0.2, -0.4, 1.3])[None, :, None, None].repeat(2, 1, 5, 7).requires_grad_()
    loss = DistillationLoss(teachers)(logits, torch.zeros(2, 3, 32, 48))

    probabilities = sum(teacher.logits[0, :, 0, 0].double().softmax(0) for teacher in teachers) / 2
    own = torch.tensor([0.2, -0.4, 1.3], dtype=torch.float64).softmax(0)
    assert loss.item() == pytest.approx((probabilities * (probabilities / own).log()).sum().item(), rel=1e-5)
    loss.backward()
    # Of a mean over 2 · 5 · 7 pixels; the softmax's own gradient.
    expected = (own - probabilities) / 70
    torch.testing.assert_close(logits.grad[1, :, 3, 2].double(), expected.detach(), rtol=1e-4, atol=1e-8)
    assert all(teacher.logits.grad is None for teacher in teachers)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_compared_in_single(half):
    """As under autocast. Rounded logarithms would make equal distributions differ, or the divergence negative."""
    teacher = Teacher(4.0, 0.5, -2.0)
    logits, images = teacher.logits.detach().to(half), torch.zeros(1, 3, 32, 48)
    for divergence in (DistillationLoss([teacher]), DistillationLoss([Teacher(4.0, 0.5, -2.0).to(half)])):
        found = divergence(logits, images)
        assert found.dtype == divergence.probabilities(images, (4, 6)).dtype == torch.float32
        assert found.item() == pytest.approx(0, abs=1e-6)


def test_probabilities_are_compared_where_they_are():
    """Left is one class and right another, at the teacher's stride and at the network's."""
    torch.manual_seed(0)
    sides = torch.tensor([[4.0, -4.0], [-4.0, 4.0]])
    teacher = Teacher(0.0, 0.0, size=(4, 8))
    with torch.no_grad():
        teacher.logits.copy_(sides.repeat_interleave(4, 1)[None, :, None].expand(1, 2, 4, 8))
    divergence = DistillationLoss([teacher])
    same = sides.repeat_interleave(8, 1)[None, :, None].expand(1, 2, 8, 16)
    images = torch.zeros(1, 3, 64, 128)
    assert divergence(same, images) < 0.2, "the border between the two is blurred, and nothing else"
    assert divergence(same.flip(-1), images) > 5
    assert divergence(teacher.logits.detach(), images).item() == pytest.approx(0, abs=1e-6)


def test_a_network_agrees_with_itself_fused_or_not():
    torch.manual_seed(0)
    model, images = lemore(), torch.rand(2, 3, 64, 64)
    divergence = DistillationLoss([model])
    assert not model.config.is_fused, "the teacher itself is left as it is"
    with torch.no_grad():
        logits = model(images).logits
        assert divergence(logits, images) < 1e-6
        assert divergence(logits + torch.randn_like(logits), images) > 0.1
    assert not any(parameter.requires_grad for parameter in divergence.parameters())
    assert not any(module.training for module in divergence.modules())


def test_without_a_teacher_there_is_nothing_to_learn():
    with pytest.raises(ValueError, match="at least one teacher"):
        DistillationLoss([])


def test_teachers_stay_as_they_are_in_a_module_that_trains():
    torch.manual_seed(0)
    teacher = SegformerForSemanticSegmentation(
        SegformerConfig(
            hidden_sizes=[8] * 4, depths=[1] * 4, decoder_hidden_size=8, num_attention_heads=[1] * 4, **LABELS
        )
    )
    task = nn.ModuleDict({"student": lemore(), "loss": DistillationLoss([teacher])}).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    images = torch.rand(2, 3, 64, 96)
    first, second = (task["loss"].probabilities(images, (16, 24)) for _ in range(2))
    assert torch.equal(first, second), "no dropout"
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert task["student"].training


def test_teachers_and_network_must_have_the_same_classes():
    def of_labels(number: int) -> LeMoReForSemanticSegmentation:
        return LeMoReForSemanticSegmentation(LeMoReConfig(num_labels=number, **TINY))

    images, single, three = torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 16, 16), torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"the same classes, got some with \[3, 4\] of them"):
        DistillationLoss([of_labels(4), of_labels(3)])(three, images)
    with pytest.raises(ValueError, match="single logit"):
        DistillationLoss([of_labels(1)])(single, images)
    with pytest.raises(ValueError, match="have 4 classes, the network 1"):
        DistillationLoss([of_labels(4)])(single, images)


@pytest.mark.parametrize("kind", ["lemore", "fused", "segformer"])
def test_networks_of_several_kinds_teach(tmp_path, kind):
    torch.manual_seed(0)
    if kind == "segformer":
        sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1] * 4, "decoder_hidden_size": 8}
        model = SegformerForSemanticSegmentation(
            SegformerConfig(num_attention_heads=[1] * 4, **sizes, **LABELS)
        ).eval()
    else:
        model = lemore().fuse() if kind == "fused" else lemore()
    model.save_pretrained(tmp_path)
    LeMoReImageProcessor().save_pretrained(tmp_path)
    images = torch.rand(1, 3, 64, 96)
    found = DistillationLoss([load_teacher(tmp_path, SCENES)]).probabilities(images, (16, 24))
    with torch.no_grad():
        expected = nn.functional.interpolate(model(images).logits, (16, 24), mode="bilinear").softmax(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def processor_of(folder: Path, **fields) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean is .*0.5, 0.5, 0.5.* in the recipe scenes"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order is True"),
        ({"do_rescale": False}, "do_rescale is False"),
        ({"do_normalize": None}, "do_normalize is None"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.0078.*rescaled to"),
        ({"image_mean": 0.5}, "image_mean is .*0.5, 0.5, 0.5.* in the recipe scenes"),
    ],
)
def test_a_teacher_must_have_seen_images_as_the_recipe_gives_them(tmp_path, fields, message):
    lemore().save_pretrained(tmp_path)
    LeMoReImageProcessor().save_pretrained(tmp_path)
    load_teacher(tmp_path, SCENES)
    processor_of(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        load_teacher(tmp_path, SCENES)


def test_a_teacher_must_know_the_classes(tmp_path):
    names = list(SCENES.class_names)
    for name, labels, message in (
        ("fewer", names[:-1], "has 8 labels, the recipe scenes has 9 classes"),
        ("moved", names[1:] + names[:1], "in another order"),
        ("binary", ["obstacle"], "single logit"),
    ):
        id2label = dict(enumerate(labels))
        config = LeMoReConfig(id2label=id2label, label2id={label: index for index, label in id2label.items()}, **TINY)
        LeMoReForSemanticSegmentation(config).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=message):
            load_teacher(tmp_path / name, SCENES)


def test_a_teacher_must_be_there_whole(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        load_teacher(tmp_path / "nowhere", SCENES)
    lemore().base_model.save_pretrained(tmp_path / "headless")
    with pytest.raises(CheckpointError, match="does not hold all weights"):
        load_teacher(tmp_path / "headless", SCENES)
