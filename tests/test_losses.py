# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Training criteria against their definitions, void and absent classes included."""

import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lemore_hf import loss_lemore
from lemore_hf.loss_lemore import segmentation_loss, upsampled_cross_entropy
from lemore_hf.losses import (
    SegmentationCriterion,
    count_for_median_frequency,
    dice_loss,
    lovasz_softmax_loss,
    median_frequency_weights,
    sample_pixels,
)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 6, 8, generator=generator, requires_grad=True)
    labels = torch.randint(0, 4, (2, 6, 8), generator=generator)
    labels[0, :2] = 255
    return logits, labels


@pytest.mark.parametrize(("weights", "label_smoothing"), [(None, 0.0), (None, 0.1), ([1.0, 2.0, 0.5, 3.0], 0.0)])
def test_cross_entropy_is_torchs(batch, weights, label_smoothing):
    logits, labels = batch
    expected = F.cross_entropy(
        logits,
        labels,
        weight=None if weights is None else torch.tensor(weights),
        ignore_index=255,
        label_smoothing=label_smoothing,
    )
    loss = SegmentationCriterion(weights, label_smoothing)(logits, labels)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("options", [{}, {"class_weights": [1.0, 2.0, 0.5, 3.0]}, {"dice_weight": 1.0}])
def test_the_loss_is_of_single_precision_whatever_the_logits_are(batch, options):
    logits, labels = batch
    expected = SegmentationCriterion(**options)(logits, labels)
    loss = SegmentationCriterion(**options)(logits.double(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def test_logits_are_upsampled_to_the_labels(batch):
    logits, _ = batch
    labels = torch.randint(0, 4, (2, 48, 64))
    upsampled = F.interpolate(logits, size=(48, 64), mode="bilinear")
    torch.testing.assert_close(SegmentationCriterion()(logits, labels), F.cross_entropy(upsampled, labels))


@pytest.mark.parametrize("strip_bytes", [1, 40_000, 2**24], ids=["a row", "some rows", "whole images"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("label_size", [(48, 72), (51, 77), (6, 10)])
def test_cross_entropy_by_rows_is_that_of_resized_logits(
    monkeypatch, strip_bytes, weighted, label_smoothing, label_size
):
    monkeypatch.setattr(loss_lemore, "STRIP_BYTES", strip_bytes)
    logits = (3 * torch.randn(2, 40, 6, 9, dtype=torch.double)).requires_grad_()
    labels = torch.randint(0, 40, (2, *label_size))
    labels[0, :2] = labels[:, :, -1] = 255
    weight = torch.rand(40, dtype=torch.double) + 0.1 if weighted else None
    resized = F.interpolate(logits, size=label_size, mode="bilinear")
    expected = F.cross_entropy(
        resized, labels, weight, ignore_index=255, label_smoothing=label_smoothing, reduction="sum"
    )
    total = upsampled_cross_entropy(logits, labels, weight, 255, label_smoothing)
    assert type(total.grad_fn).__name__ == "_CrossEntropyByRowsBackward"
    torch.testing.assert_close(total, expected)
    # The factor stands for what a mean or a gradient scaler does to the loss.
    gradients = [torch.autograd.grad(loss * 0.37, logits)[0] for loss in (total, expected)]
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        torch.testing.assert_close(upsampled_cross_entropy(logits, labels, weight, 255, label_smoothing), expected)


def test_cross_entropy_by_rows_can_be_differentiated_twice():
    torch.manual_seed(0)
    logits = torch.randn(2, 40, 4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(40, (2, 16, 20)).masked_fill(torch.rand(2, 16, 20) < 0.2, 255)
    weight = torch.rand(40, dtype=torch.float64)
    resized = functools.partial(F.interpolate, size=(16, 20), mode="bilinear")
    second = []
    for total in (
        upsampled_cross_entropy(logits, labels, weight, label_smoothing=0.1),
        F.cross_entropy(resized(logits), labels, weight, ignore_index=255, label_smoothing=0.1, reduction="sum"),
    ):
        (gradient,) = torch.autograd.grad(total, logits, create_graph=True)
        second.append(torch.autograd.grad(gradient.square().sum(), logits)[0])
    torch.testing.assert_close(*second)


@pytest.mark.parametrize("label_size", [(6, 9), (5, 12)])
def test_cross_entropy_of_logits_that_do_not_grow_has_nothing_to_do_by_rows(label_size):
    """Rows of what is there already would be made by a product of its height for every pixel."""
    logits, labels = torch.randn(2, 40, 6, 9, requires_grad=True), torch.randint(0, 40, (2, *label_size))
    total = upsampled_cross_entropy(logits, labels)
    assert "ByRows" not in type(total.grad_fn).__name__
    resized = F.interpolate(logits, size=label_size, mode="bilinear")
    torch.testing.assert_close(total, F.cross_entropy(resized, labels, reduction="sum"))


def test_cross_entropy_by_rows_under_autocast_keeps_single_precision():
    logits, labels = torch.randn(1, 40, 6, 9, requires_grad=True), torch.randint(0, 40, (1, 48, 72))
    expected = F.cross_entropy(F.interpolate(logits, size=(48, 72), mode="bilinear"), labels, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        total = upsampled_cross_entropy(logits, labels)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (total, expected)))


@pytest.mark.parametrize(
    "options",
    [{}, {"class_weights": [1.0] * 4}, {"ohem_threshold": 0.7}, {"dice_weight": 1.0}, {"lovasz_weight": 1.0}],
)
def test_a_batch_of_void_alone_gives_zero(batch, options):
    logits, labels = batch
    loss = SegmentationCriterion(**options)(logits, torch.full_like(labels, 255))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_weights": [1.0, 2.0, 3.0, 4.0]},
        {"ohem_threshold": 0.3, "ohem_min_kept": 5},
        {"dice_weight": 1.0},
        {"lovasz_weight": 1.0},
        {"lovasz_weight": 1.0, "lovasz_stride": 2},
    ],
)
def test_void_pixels_do_not_count(batch, options):
    logits, labels = batch
    changed = logits.detach().clone()
    changed[0, :, :2] = torch.randn(4, 2, 8)
    criterion = SegmentationCriterion(**options)
    torch.testing.assert_close(criterion(logits, labels), criterion(changed, labels))


def test_hard_example_mining_takes_the_hardest(batch):
    logits, labels = batch
    losses = F.cross_entropy(logits, labels, ignore_index=255, reduction="none")[labels != 255]
    hardest = losses.sort(descending=True).values
    # No probability is below zero, so that the number of hard pixels decides alone.
    torch.testing.assert_close(
        SegmentationCriterion(ohem_threshold=0.0, ohem_min_kept=7)(logits, labels), hardest[:7].mean()
    )
    # The threshold adds all that are harder than it.
    expected = hardest[hardest > -np.log(0.4)].mean()
    torch.testing.assert_close(SegmentationCriterion(ohem_threshold=0.4, ohem_min_kept=1)(logits, labels), expected)


def test_lovasz_of_certain_predictions_is_one_minus_the_mean_jaccard_index():
    # The Lovász extension equals the set function at the corners of the cube.
    for wrong in itertools.product([False, True], repeat=4):
        targets = torch.tensor([0, 0, 1, 1])
        predictions = torch.where(torch.tensor(wrong), 1 - targets, targets)
        jaccard = [
            ((predictions == c) & (targets == c)).sum() / ((predictions == c) | (targets == c)).sum() for c in (0, 1)
        ]
        loss = lovasz_softmax_loss(F.one_hot(predictions, 2).float(), targets)
        torch.testing.assert_close(loss, 1 - torch.stack(jaccard).mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_lovasz_in_other_precisions(dtype):
    torch.manual_seed(0)
    probabilities, targets = torch.rand(40, 3).softmax(1).to(dtype), torch.randint(0, 3, (40,))
    expected = lovasz_softmax_loss(probabilities.float(), targets)
    loss = lovasz_softmax_loss(probabilities, targets)
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.float(), expected, rtol=0.02, atol=0.02)


def test_lovasz_takes_every_second_pixel_where_told_to(batch):
    logits, labels = batch
    added = SegmentationCriterion(lovasz_weight=0.5, lovasz_stride=2)(logits, labels) - SegmentationCriterion()(
        logits, labels
    )
    rows, columns = [1, 3, 5], [1, 3, 5, 7]
    some = SegmentationCriterion(lovasz_weight=1.0)
    probabilities, targets = some.labelled_pixels(logits[:, :, rows][..., columns], labels[:, rows][..., columns])
    assert len(targets) < 2 * 3 * 4  # one of the rows is void in the first image
    torch.testing.assert_close(added, 0.5 * lovasz_softmax_loss(probabilities, targets))


@pytest.mark.parametrize("label_size", [(6, 8), (45, 61), (5, 7)])
@pytest.mark.parametrize(("stride", "offset"), [(1, (0, 0)), (2, (1, 0)), (4, (2, 3))])
def test_sampled_pixels_are_those_of_resized_logits(batch, label_size, stride, offset):
    logits = batch[0].contiguous(memory_format=torch.channels_last)
    labels = torch.arange(2 * label_size[0] * label_size[1]).view(2, *label_size)
    sampled, sampled_labels = sample_pixels(logits, labels, stride, offset)
    here = ..., slice(offset[0], None, stride), slice(offset[1], None, stride)
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = sample_pixels(logits, labels, stride, offset)
    resized = F.interpolate(logits, size=label_size, mode="bilinear")
    torch.testing.assert_close(sampled, resized[here])
    assert torch.equal(again, sampled)
    assert torch.equal(sampled_labels, labels[here])


def test_sampling_finds_a_pixel_in_maps_smaller_than_its_offset(batch):
    logits, labels = batch[0], torch.tensor([[[0, 1]], [[2, 3]]])
    sampled, sampled_labels = sample_pixels(logits, labels, 8, (7, 5))
    resized = F.interpolate(logits, size=(1, 2), mode="bilinear")
    torch.testing.assert_close(sampled, resized[..., 1:])
    assert sampled_labels.tolist() == [[[1]], [[3]]]


@pytest.mark.parametrize("options", [{}, {"dice_weight": 1.0}, {"lovasz_weight": 1.0}, {"ohem_threshold": 0.5}])
def test_a_stride_takes_each_pixel_in_its_turn(batch, options, monkeypatch):
    logits, labels = batch[0], torch.randint(0, 4, (2, 24, 32))
    resized = F.interpolate(logits, size=(24, 32), mode="bilinear")
    losses = []
    for offset in itertools.product(range(2), repeat=2):
        monkeypatch.setattr(torch, "randint", lambda *args, offset=offset: torch.tensor(offset))
        losses.append(SegmentationCriterion(stride=2, **options)(logits, labels))
        here = ..., slice(offset[0], None, 2), slice(offset[1], None, 2)
        torch.testing.assert_close(losses[-1], SegmentationCriterion(**options)(resized[here], labels[here]))
    if not options:
        torch.testing.assert_close(sum(losses) / 4, SegmentationCriterion()(logits, labels))


def test_a_stride_begins_anywhere(batch):
    logits, labels = batch
    torch.manual_seed(0)
    assert len({SegmentationCriterion(stride=2)(logits, labels).item() for _ in range(40)}) == 4


def test_dice_of_certain_predictions():
    targets = torch.tensor([0, 0, 1, 1])
    one_hot = F.one_hot(targets, 3).float()
    assert dice_loss(one_hot, targets).item() == pytest.approx(0, abs=1e-6)
    predictions = torch.tensor([0, 1, 1, 1])
    expected = 1 - np.mean([2 * 1 / (1 + 2), 2 * 2 / (3 + 2)])
    assert dice_loss(F.one_hot(predictions, 3).float(), targets).item() == pytest.approx(expected)


def test_losses_fall_along_their_gradient(batch):
    logits, labels = batch
    criterion = SegmentationCriterion(
        [1.0, 2.0, 1.0, 1.0], ohem_threshold=0.9, ohem_min_kept=4, dice_weight=0.5, lovasz_weight=0.5
    )
    before = criterion(logits, labels)
    before.backward()
    with torch.no_grad():
        after = criterion(logits - 0.1 * logits.grad, labels)
    assert after < before


@pytest.mark.parametrize("options", [{}, {"dice_weight": 1.0}, {"lovasz_weight": 1.0}, {"stride": 2}], ids=str)
def test_labels_of_every_integer_type(batch, options):
    logits, labels = batch
    losses = []
    for dtype in (torch.int64, torch.int32, torch.uint8):
        torch.manual_seed(0)
        losses.append(SegmentationCriterion(**options)(logits, labels.to(dtype)))
    assert losses[0] == losses[1] == losses[2]
    with pytest.raises(ValueError, match=r"values that are no class: 4\. Expected 0 to 3"):
        SegmentationCriterion(**options)(logits, torch.full_like(labels, 4))


def test_class_weights_must_fit(batch):
    with pytest.raises(ValueError, match="3 class weights for 4 classes"):
        SegmentationCriterion([1.0, 1.0, 1.0])(*batch)


def test_median_frequency_weights():
    maps = [torch.tensor([[0, 0, 0, 1]]), torch.tensor([[0, 0, 255, 255]]), torch.tensor([[2, 2, 1, 1]])]
    counts, where_present = count_for_median_frequency(maps, 4)
    assert counts.tolist() == [5, 3, 2, 0]
    assert where_present.tolist() == [6, 8, 4, 0]
    # Frequencies 5/6, 3/8, 1/2: the median is 1/2. The last class never occurs.
    assert median_frequency_weights(counts, where_present) == pytest.approx([0.6, 4 / 3, 1.0, 0.0])


@pytest.mark.parametrize("void", [-100, -1, 255])
def test_void_of_any_number_is_not_counted(void):
    maps = [torch.tensor([[0, 1, 2, void]]), torch.tensor([[2, void, void, void]])]
    counts, where_present = count_for_median_frequency(maps, 3, void)
    assert counts.tolist() == [1, 1, 2]
    assert where_present.tolist() == [3, 3, 4]


def test_hard_example_mining_by_its_threshold_alone(batch):
    logits, labels = batch
    losses = F.cross_entropy(logits, labels, ignore_index=255, reduction="none")[labels != 255]
    expected = losses[losses > -np.log(0.4)].mean()
    criterion = SegmentationCriterion(ohem_threshold=0.4, ohem_min_kept=0)
    torch.testing.assert_close(criterion(logits, labels), expected)


@pytest.mark.parametrize("options", [{}, {"dice_weight": 1.0}, {"lovasz_weight": 1.0}, {"class_weights": [0.5, 2.0]}])
def test_a_single_label_is_the_second_of_two(options):
    logits, labels = torch.randn(2, 1, 4, 6), torch.randint(0, 2, (2, 8, 12))
    criterion = SegmentationCriterion(**options)
    both = torch.cat([torch.zeros_like(logits), logits], 1)
    torch.testing.assert_close(criterion(logits, labels), criterion(both, labels))
    if not options:
        torch.testing.assert_close(criterion(logits, labels), segmentation_loss(logits, labels))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"label_smoothing": 1.5}, r"`label_smoothing` must lie in \[0, 1\), got 1.5"),
        ({"stride": 0}, "`stride` must be at least 1, got 0"),
        ({"lovasz_stride": 0}, "`lovasz_stride` must be at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        SegmentationCriterion(**option)


@pytest.mark.parametrize(
    "options",
    [{}, {"class_weights": [1.0, 2.0, 3.0]}, {"dice_weight": 1.0}, {"lovasz_weight": 1.0}, {"ohem_threshold": 0.7}],
    ids=str,
)
def test_void_may_have_another_number(options):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 6, 8), torch.randint(0, 3, (2, 6, 8))
    labels[0, :2] = 255
    expected = SegmentationCriterion(**options)(logits, labels)
    other = SegmentationCriterion(**options, ignore_index=-100)
    torch.testing.assert_close(other(logits, labels.masked_fill(labels == 255, -100)), expected)
