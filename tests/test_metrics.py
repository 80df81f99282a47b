# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Metrics: the numbers against scikit-learn, the boundary against repeated erosion, streaming, processes and memory."""

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from launching import run_forked
from sklearn.metrics import confusion_matrix, jaccard_score
from transformers import EvalPrediction, Trainer, TrainingArguments

from lemore_hf import LeMoReConfig, LeMoReForSemanticSegmentation
from lemore_hf.metrics import (
    BoundaryIoU,
    ConfusionMatrix,
    boundary_region,
    scores_from_confusion_matrix,
    trainer_metrics,
)

REPOSITORY = Path(__file__).parents[1]


def random_maps(num_classes=7, shape=(4, 33, 47), void=0.1, seed=0):
    """Predictions that agree with the labels about half of the time; class 5 never occurs, class 6 only predicted."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes - 2, shape)
    predictions = np.where(generator.random(shape) < 0.5, labels, generator.integers(0, num_classes - 2, shape))
    predictions[..., :2] = num_classes - 1
    labels[generator.random(shape) < void] = 255
    return torch.from_numpy(predictions), torch.from_numpy(labels)


def run_python(code, *args, timeout=300):
    """Run a program in a fresh process, single-threaded, and return its standard output."""
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(REPOSITORY), CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


# The numbers


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.uint8, torch.int32])
def test_counts_and_scores_are_those_of_scikit_learn(label_dtype):
    predictions, labels = random_maps()
    matrix = ConfusionMatrix(7)
    for prediction, label in zip(predictions, labels, strict=True):
        matrix.update(prediction, label.to(label_dtype))
    scores = matrix.compute()

    valid = labels != 255
    expected = confusion_matrix(labels[valid], predictions[valid], labels=range(7))
    assert scores["confusion_matrix"] == expected.tolist()
    iou = jaccard_score(labels[valid], predictions[valid], labels=range(7), average=None, zero_division=0)
    iou[5] = np.nan  # In neither: scikit-learn can only say 0 or 1.
    np.testing.assert_allclose(scores["per_class_iou"], iou, rtol=1e-12)
    np.testing.assert_allclose(scores["mean_iou"], np.nanmean(iou), rtol=1e-12)
    assert scores["overall_accuracy"] == pytest.approx((labels == predictions)[valid].float().mean().item())
    recall = [
        (predictions[labels == c] == c).float().mean().item() if (labels == c).any() else math.nan for c in range(7)
    ]
    np.testing.assert_allclose(scores["per_class_accuracy"], recall, rtol=1e-6)
    np.testing.assert_allclose(scores["mean_accuracy"], np.nanmean(recall), rtol=1e-6)


def test_absent_class_is_left_out_and_wrongly_predicted_class_counts_as_zero():
    predictions, labels = random_maps()
    matrix = ConfusionMatrix(7)
    matrix.update(predictions, labels)
    scores = matrix.compute()
    assert math.isnan(scores["per_class_iou"][5])
    assert math.isnan(scores["per_class_accuracy"][5])
    assert scores["per_class_iou"][6] == 0.0
    assert math.isnan(scores["per_class_accuracy"][6])
    assert scores["mean_iou"] == pytest.approx(np.mean([x for c, x in enumerate(scores["per_class_iou"]) if c != 5]))


def test_without_a_counted_pixel_every_score_is_nan():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.full((1, 4, 4), -100), torch.full((1, 4, 4), 255))  # Predictions at void are not looked at.
    scores = matrix.compute()
    assert math.isnan(scores["mean_iou"])
    assert math.isnan(scores["overall_accuracy"])
    assert np.sum(scores["confusion_matrix"]) == 0


def test_counts_stay_exact_beyond_32_bits():
    matrix = ConfusionMatrix(2)
    matrix.load_state_dict({"counts": torch.tensor([[2**40, 1], [0, 2**40]])})
    matrix.update(torch.ones(1, 2, 2, dtype=torch.int64), torch.zeros(1, 2, 2, dtype=torch.int64))
    assert matrix.compute()["confusion_matrix"] == [[2**40, 5], [0, 2**40]]


def test_logits_are_upsampled_to_the_labels():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 9, 12), torch.randint(0, 5, (3, 65, 90))
    from_logits, from_maps = ConfusionMatrix(5), ConfusionMatrix(5)
    from_logits.update(logits, labels)
    from_maps.update(F.interpolate(logits, size=(65, 90), mode="bilinear").argmax(1), labels)
    assert from_logits.compute() == from_maps.compute()
    counts = from_logits.counts.clone()
    from_logits.update(logits[:0], labels[:0])  # a process may have no image of a batch
    assert torch.equal(from_logits.counts, counts)


def test_one_label_is_background_and_foreground():
    logits = torch.tensor([[[[-1.0, 2.0], [3.0, -4.0]]]])
    matrix = ConfusionMatrix(1)
    matrix.update(logits, torch.tensor([[[0, 1], [0, 255]]]))
    assert matrix.compute()["confusion_matrix"] == [[1, 1], [0, 1]]


def test_merge_reset_and_state_dict():
    first, second = random_maps(seed=1), random_maps(seed=2)
    whole, a, b = ConfusionMatrix(7), ConfusionMatrix(7), ConfusionMatrix(7)
    whole.update(torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]))
    a.update(*first)
    saved = a.state_dict()
    b.update(*second)
    a.merge(b)
    assert a.compute()["confusion_matrix"] == whole.compute()["confusion_matrix"]
    b.reset()
    assert np.sum(b.compute()["confusion_matrix"]) == 0
    a.load_state_dict(saved)
    a.update(*second)
    assert a.compute()["confusion_matrix"] == whole.compute()["confusion_matrix"]
    with pytest.raises(ValueError, match="num_labels=3"):
        ConfusionMatrix(3).load_state_dict(saved)


def test_only_counts_of_the_same_kind_are_merged():
    for other in (BoundaryIoU(2), ConfusionMatrix(3, ignore_index=0)):
        with pytest.raises(
            ValueError, match=f"counts of {type(other).__name__} .* do not add to those of ConfusionMatrix"
        ):
            ConfusionMatrix(3).merge(other)
    with pytest.raises(ValueError, match=r"'dilation_ratio': 0\.5"):
        BoundaryIoU(2).merge(BoundaryIoU(2, dilation_ratio=0.5))


# Bad input


@pytest.mark.parametrize("kind", [ConfusionMatrix, BoundaryIoU])
def test_values_out_of_range_are_named_and_nothing_is_counted(kind):
    metric = kind(7)
    predictions, labels = random_maps()
    wrong = labels.clone()
    wrong[3, 5, 5], wrong[3, 0, 0] = 12, -3
    with pytest.raises(ValueError, match=r"labels hold values outside \[0, 7\).*255: -3, 12 \(2 pixels\)"):
        metric.update(predictions, wrong)
    with pytest.raises(ValueError, match=r"predictions hold values outside \[0, 7\): 9 "):
        metric.update(torch.where(predictions == 6, 9, predictions), labels)
    assert metric.counts.sum() == 0


@pytest.mark.parametrize(
    ("predictions", "labels", "error", "message"),
    [
        (torch.zeros(1, 8, 8), torch.zeros(1, 8, 8).long(), TypeError, "label maps must be integers"),
        (torch.zeros(1, 8, 8).long(), torch.zeros(1, 8, 8), TypeError, "labels must be integer"),
        (torch.zeros(1, 8, 9).long(), torch.zeros(1, 8, 8).long(), ValueError, "bring both to one size"),
        (torch.zeros(1, 5, 8, 8), torch.zeros(1, 8, 8).long(), ValueError, "num_labels=7"),
        (torch.zeros(2, 7, 8, 8), torch.zeros(1, 8, 8).long(), ValueError, "do not fit"),
        (torch.full((1, 7, 8, 8), math.nan), torch.zeros(1, 8, 8).long(), ValueError, "not finite"),
        (torch.zeros(8).long(), torch.zeros(8).long(), ValueError, r"\(B, H, W\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(predictions, labels, error, message):
    with pytest.raises(error, match=message):
        ConfusionMatrix(7).update(predictions, labels)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="num_labels"):
        ConfusionMatrix(0)
    with pytest.raises(ValueError, match="dilation_ratio"):
        BoundaryIoU(3, dilation_ratio=0)
    with pytest.raises(ValueError, match="-100"):
        trainer_metrics(3, ignore_index=-100)
    with pytest.raises(ValueError, match="names 2 classes"):
        trainer_metrics(3, {0: "a", 1: "b"})
    with pytest.raises(ValueError, match=r"must number the classes from 0 to 1, got \[1, 2\]"):
        trainer_metrics(2, {1: "a", 2: "b"})
    with pytest.raises(ValueError, match="several classes of the name a:"):
        trainer_metrics(3, {0: "a", 1: "b", 2: "a"})
    trainer_metrics(2, {"0": "a", "1": "b"})  # as JSON has it


# Boundary IoU


def eroded(mask, distance):
    """The paper's erosion, step by step: a 3×3 square, `distance` times, zeros outside of the image."""
    for _ in range(distance):
        padded = np.pad(mask, 1)
        shifts = [padded[i : i + mask.shape[0], j : j + mask.shape[1]] for i in range(3) for j in range(3)]
        mask = np.logical_and.reduce(shifts)
    return mask


def boundary_iou_by_erosion(predictions, labels, num_classes, distance):
    scores = []
    for c in range(num_classes):
        intersection = union = 0
        for prediction, label in zip(predictions.numpy(), labels.numpy(), strict=True):
            void = label == 255
            regions = [((x == c) | void) & ~eroded((x == c) | void, distance) & ~void for x in (prediction, label)]
            intersection += (regions[0] & regions[1]).sum()
            union += (regions[0] | regions[1]).sum()
        scores.append(intersection / union if union else math.nan)
    return scores


def blobs(num_classes, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(shape[0], num_classes, 5, 7, generator=generator)
    return F.interpolate(coarse, size=shape[1:], mode="bilinear").argmax(1)


@pytest.mark.parametrize("void", [False, True])
def test_boundary_iou_is_that_of_repeated_erosion(void):
    shape = (2, 90, 120)  # The diagonal is 150: 3 pixels.
    predictions, labels = blobs(4, shape, seed=0), blobs(4, shape, seed=1)
    predictions[0] = torch.roll(labels[0], shifts=(1, 2), dims=(0, 1))
    if void:
        labels[:, 30:44, 50:70] = 255
    metric = BoundaryIoU(5)  # The fifth class never occurs.
    metric.update(predictions, labels)
    scores = metric.compute()
    expected = boundary_iou_by_erosion(predictions, labels, 5, distance=3)
    np.testing.assert_allclose(scores["per_class_boundary_iou"], expected, rtol=1e-12)
    assert math.isnan(expected[4])
    assert scores["boundary_iou"] == pytest.approx(np.nanmean(expected))


def test_boundary_iou_of_a_perfect_prediction_is_one_and_void_borders_cost_nothing():
    labels = blobs(4, (1, 64, 64), seed=3)
    prediction = labels.clone()
    labels[:, 20:40, 20:40] = 255
    metric = BoundaryIoU(4)
    metric.update(prediction, labels)
    assert metric.compute()["boundary_iou"] == 1.0


def test_boundary_iou_tells_shifts_apart_that_mean_iou_hardly_sees():
    labels = torch.zeros(1, 200, 200, dtype=torch.long)
    labels[:, 50:150, 50:150] = 1
    shifted = torch.roll(labels, 4, dims=2)
    mask, boundary = ConfusionMatrix(2), BoundaryIoU(2)
    mask.update(shifted, labels)
    boundary.update(shifted, labels)
    assert mask.compute()["per_class_iou"][1] > 0.9
    assert boundary.compute()["per_class_boundary_iou"][1] < 0.75


# Trainer


def test_trainer_functions_stream_over_batches_of_different_sizes_and_padding():
    torch.manual_seed(0)
    compute_metrics, preprocess = trainer_metrics(3, {0: "sky", 1: "road", 2: "car"})
    reference = ConfusionMatrix(3)
    results = []
    for step, (height, width) in enumerate([(32, 48), (40, 24)]):
        logits, labels = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, height, width))
        reference.update(logits, labels)
        padded = F.pad(labels, (0, 0, 0, 6), value=-100)  # As Trainer pads across processes.
        predictions = preprocess((logits, "hidden states"), padded)
        assert predictions.shape == padded.shape
        assert (predictions[:, height:] == -100).all()
        results.append(compute_metrics(EvalPrediction(predictions, padded), compute_result=step == 1))
    assert results[0] == {}
    expected = reference.compute()
    assert results[1]["mean_iou"] == expected["mean_iou"]
    assert results[1]["iou_road"] == expected["per_class_iou"][1]
    assert results[1]["accuracy_car"] == expected["per_class_accuracy"][2]
    # The state starts anew, and NumPy arrays (without batch_eval_metrics) and lists of them are taken, too.
    again = compute_metrics(EvalPrediction([predictions.numpy()], [padded.numpy()]))
    once = ConfusionMatrix(3)
    once.update(logits, labels)
    assert again["mean_iou"] == once.compute()["mean_iou"]


def test_class_156_of_labels_in_bytes_counts():
    """There it has the value of Trainer's padding, -100."""
    compute_metrics, preprocess = trainer_metrics(160)
    labels = torch.full((1, 6, 8), 156, dtype=torch.uint8)
    labels[:, :3] = 3
    logits = F.one_hot(labels.long(), 160).permute(0, 3, 1, 2).float()
    scores = compute_metrics(EvalPrediction(preprocess(logits, labels), labels), compute_result=True)
    assert scores["iou_156"] == scores["iou_3"] == 1
    boundary = BoundaryIoU(160, ignore_index=-100)
    boundary.update(labels[0], labels[0])
    assert boundary.compute()["per_class_boundary_iou"][156] == 1


def test_trainer_predicts_without_labels(tmp_path):
    model = LeMoReForSemanticSegmentation(LeMoReConfig(num_labels=3, image_size=64))
    images = [{"pixel_values": torch.randn(3, 64, 96)} for _ in range(3)]
    arguments = TrainingArguments(tmp_path, per_device_eval_batch_size=2, report_to="none", use_cpu=True)
    trainer = Trainer(model, arguments, **trainer_metrics(3)._asdict())
    predictions = trainer.predict(images).predictions
    assert predictions.shape == (3, 8, 12)
    with torch.no_grad():
        logits = model.eval()(torch.stack([image["pixel_values"] for image in images])).logits
    assert (predictions == logits.argmax(1).numpy()).all()


TRAINER_PROGRAM = """
    import json, resource, sys, tempfile
    sys.modules["evaluate"] = None  # An optional dependency: nothing here may import it.
    import torch
    from torch import nn
    from transformers import Trainer, TrainingArguments
    from transformers.modeling_outputs import SemanticSegmenterOutput
    from lemore_hf.metrics import ConfusionMatrix, trainer_metrics

    size, num_labels, lengths = int(sys.argv[1]), int(sys.argv[2]), [int(x) for x in sys.argv[3].split(",")]

    class Images(torch.utils.data.Dataset):
        def __init__(self, length):
            self.length = length
        def __len__(self):
            return self.length
        def __getitem__(self, index):
            generator = torch.Generator().manual_seed(index)
            coarse = torch.randn(1, 3, size // 16, size // 16, generator=generator)
            image = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")[0]
            labels = (image[0] * 20).long().remainder(num_labels)
            labels[:, : index % 7] = 255
            return {"pixel_values": image, "labels": labels}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = nn.Conv2d(3, num_labels, 8, stride=8)
        def forward(self, pixel_values, labels=None):
            return SemanticSegmenterOutput(loss=pixel_values.new_zeros(()), logits=self.classifier(pixel_values))

    torch.manual_seed(0)
    model = Model()
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(), batch_eval_metrics=True, per_device_eval_batch_size=4, use_cpu=True,
        report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
    )
    trainer = Trainer(model, args, **trainer_metrics(num_labels)._asdict())
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    # What the model and the loading of its batches take, without metrics.
    args.prediction_loss_only = True
    trainer.evaluate(Images(lengths[0]))
    args.prediction_loss_only = False
    results, peaks = [], [peak()]
    for length in lengths:
        results.append(trainer.evaluate(Images(length))["eval_mean_iou"])
        peaks.append(peak())
    # The same in a loop: the last set divided among the processes.
    images, matrix = Images(lengths[-1]), ConfusionMatrix(num_labels)
    with torch.no_grad():
        for index in range(args.process_index, len(images), args.world_size):
            sample = images[index]
            matrix.update(model(sample["pixel_values"][None]).logits, sample["labels"][None])
    sums = [matrix.reduce(x).counts.tolist() for x in (trainer.accelerator, None)]
    if trainer.is_world_process_zero():
        print(json.dumps({"results": results, "peaks": peaks, "counts": sums}))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # A process that leaves early would abort the other.
        torch.distributed.destroy_process_group()
"""


def test_two_processes_count_what_one_counts_in_trainer_and_in_a_loop(tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(TRAINER_PROGRAM))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def count(processes):
        # Eleven images: no batch divides them, and Trainer repeats samples to fill the last one.
        status, printed = run_forked(processes, program, 32, 5, "9,11")
        assert status == 0, printed[-4000:]
        (line,) = [line for line in printed.splitlines() if line.startswith('{"results"')]
        return json.loads(line)

    one, two = count(1), count(2)
    assert two["counts"] == [one["counts"][0]] * 2
    assert two["results"] == one["results"]
    assert one["results"][-1] == scores_from_confusion_matrix(torch.tensor(one["counts"][0]))["mean_iou"]


def test_trainer_evaluate_keeps_its_memory_whatever_the_number_of_images():
    output = json.loads(run_python(TRAINER_PROGRAM, 512, 150, "12,60").splitlines()[-1])
    before, few, many = output["peaks"]
    assert many - before < 100, f"{many - before:.0f} MB"
    # Keeping the predictions and labels of 48 more images, at 1 and 2 MB, would show.
    assert many - few < 60, f"five times the images took {many - few:.0f} MB more"


# evaluate


def test_evaluate_metric_streams_and_has_the_keys_of_mean_iou(tmp_path):
    import evaluate

    from lemore_hf.mean_iou import MeanIoU

    predictions, labels = random_maps()
    reference = ConfusionMatrix(7)
    reference.update(predictions, labels)
    expected = reference.compute()
    by_path = evaluate.load(str(REPOSITORY / "lemore_hf" / "mean_iou.py"), num_labels=7, cache_dir=str(tmp_path))
    for metric in (MeanIoU(num_labels=7, cache_dir=str(tmp_path)), by_path):
        metric.add_batch(predictions=predictions[:2], references=labels[:2])
        metric.add(prediction=predictions[2].tolist(), reference=labels[2].tolist())
        scores = metric.compute(predictions=[predictions[3].numpy()], references=[labels[3].numpy()])
        assert scores["mean_iou"] == expected["mean_iou"]
        np.testing.assert_array_equal(scores["per_category_iou"], expected["per_class_iou"])
        np.testing.assert_array_equal(scores["per_category_accuracy"], expected["per_class_accuracy"])
        assert math.isnan(metric.compute()["mean_iou"])  # Started anew.
        with pytest.raises(ValueError, match="2 predictions and 1 references"):
            metric.add_batch(predictions=predictions[:2], references=labels[:1])
        same = {"num_labels": 7, "ignore_index": 255, "reduce_labels": False}
        whole = {"predictions": predictions, "references": labels}
        assert metric.compute(**whole, **same)["mean_iou"] == expected["mean_iou"]
        with pytest.raises(TypeError, match=r"ignore_index=0, reduce_labels=True cannot be set here"):
            metric.compute(**whole, num_labels=7, ignore_index=0, reduce_labels=True)
        assert math.isnan(metric.compute()["mean_iou"])  # Nothing was counted.
    alone = MeanIoU(num_labels=7, num_process=2, process_id=1, experiment_id="two", cache_dir=str(tmp_path))
    with pytest.raises(RuntimeError, match=r"num_process is 2, but torch\.distributed is not initialized"):
        alone.add_batch(predictions=predictions[:2], references=labels[:2])


def test_a_metric_of_one_process_asks_no_other(monkeypatch):
    """As where the main process alone computes what all have gathered: waiting for the others would hang."""
    monkeypatch.setattr(ConfusionMatrix, "reduce", lambda self: pytest.fail("asked the other processes"))
    from lemore_hf.mean_iou import MeanIoU

    metric = MeanIoU(num_labels=2)
    metric.add_batch(predictions=[np.array([[0, 1]])], references=[np.array([[0, 1]])])
    assert metric.compute()["mean_iou"] == 1


@pytest.mark.parametrize(("size", "distance"), [((66, 112), 3), ((4, 5), 1)])
def test_a_boundary_is_two_hundredths_of_the_diagonal_rounded_and_never_none(size, distance):
    labels = torch.zeros(1, *size, dtype=torch.long)
    labels[..., size[1] // 2 :] = 1
    metric = BoundaryIoU(2)
    metric.update(labels, labels)
    expected = boundary_region(labels[0], torch.zeros(size, dtype=torch.bool), distance)
    assert metric.counts[:2].sum() == expected.sum()


@pytest.mark.parametrize("metric_class", [ConfusionMatrix, BoundaryIoU])
def test_any_class_or_none_may_be_ignored(metric_class):
    labels = torch.zeros(1, 60, 80, dtype=torch.long)
    labels[..., 40:] = 255
    every = metric_class(256, ignore_index=None)
    every.update(labels, labels)
    assert every.counts[255, 255] > 0
    matrix = ConfusionMatrix(2, ignore_index=0)
    matrix.update(torch.tensor([[1, 1]]), torch.tensor([[0, 1]]))
    assert matrix.counts.tolist() == [[0, 0], [0, 1]]


def test_a_binary_networks_scores_have_the_names_of_its_two_classes():
    compute, preprocess = trainer_metrics(1, {0: "crack"})
    labels = torch.tensor([[[0, 0], [0, 1]]])
    scores = compute(EvalPrediction(preprocess(torch.full((1, 1, 2, 2), 1.0), labels), labels))
    assert (scores["iou_background"], scores["iou_crack"]) == (0, 0.25)
