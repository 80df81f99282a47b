# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Augmentation: image and labels stay together, labels are never mixed, and all of it follows from seed, epoch, index."""

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from torchvision.transforms.v2 import functional as F

from lemore_hf.data.augmentation import (
    ClassificationAugmentation,
    SegmentationAugmentation,
    distort_photometrically,
    largest_class_share,
    mix_images,
    normalize,
    resize_for_evaluation,
    sample_generator,
)
from lemore_hf.data.recipes import load_recipe

PLAIN = {"photometric_prob": 0.0, "flip_prob": 0.0, "max_class_share": 1.0}
VOID = 255


def recipe_with(**overrides):
    return load_recipe("camvid", {"resize": None, "crop_size": (96, 128), **overrides})


def smooth_image(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (1, 3, 6, 8), generator=generator).float()
    return nnf.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 255).to(torch.uint8)


def blocks(height: int, width: int) -> torch.Tensor:
    """A label map of 16×16 blocks of classes 0…10."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randint(0, 11, (height // 16 + 1, width // 16 + 1), generator=generator, dtype=torch.uint8)
    return coarse.repeat_interleave(16, 0).repeat_interleave(16, 1)[:height, :width].contiguous()


def test_crop_first_equals_resizing_everything_and_cropping_then():
    image, labels = smooth_image(120, 160), blocks(120, 160)
    augment = SegmentationAugmentation(recipe_with(**PLAIN, scale_range=(2.0, 2.0)))
    whole = F.resize(image, [240, 320], antialias=True)
    whole_labels = labels.repeat_interleave(2, 0).repeat_interleave(2, 1)
    for index in range(5):
        (top, left, height, width), size = augment._choose_region(labels, sample_generator(0, 0, index))
        assert (height, width, size) == (48, 64, (96, 128))
        pixels, found = augment(image, labels, sample_generator(0, 0, index))
        rows, columns = slice(2 * top, 2 * top + 96), slice(2 * left, 2 * left + 128)
        torch.testing.assert_close(found, whole_labels[rows, columns])
        difference = (pixels.int() - whole[:, rows, columns].int()).abs()
        # Only the outermost row and column lack their neighbours.
        assert difference[:, 1:-1, 1:-1].max() <= 1


def test_image_and_labels_stay_aligned_and_labels_are_never_mixed():
    labels = blocks(200, 260)
    image = (labels * 20)[None].repeat(3, 1, 1)  # the picture shows the class
    augment = SegmentationAugmentation(recipe_with(photometric_prob=0.0))
    checked = 0
    for index in range(40):
        pixels, found = augment(image, labels, sample_generator(3, 1, index))
        assert pixels.shape == (3, 96, 128)
        assert found.shape == (96, 128)
        assert set(found.unique().tolist()) <= {*range(11), VOID}
        # Away from edges between classes (five pixels of one class around), the picture must show that class.
        window = found[None, None].float()
        same = nnf.max_pool2d(window, 5, 1, 2) == -nnf.max_pool2d(-window, 5, 1, 2)
        inside = same[0, 0] & (found != VOID)
        torch.testing.assert_close(pixels[0][inside], found[inside] * 20)
        checked += int(inside.sum())
    assert checked > 100_000


def test_padding_is_mean_colour_and_void():
    recipe = recipe_with(**PLAIN, scale_range=(0.5, 0.5), crop_size=(96, 128))
    image, labels = torch.full((3, 100, 120), 7, dtype=torch.uint8), torch.zeros(100, 120, dtype=torch.uint8)
    positions = set()
    for index in range(20):
        pixels, found = SegmentationAugmentation(recipe)(image, labels, sample_generator(0, 0, index))
        content = found != VOID
        assert content.sum() == 50 * 60
        rows, columns = torch.nonzero(content.any(1)).flatten(), torch.nonzero(content.any(0)).flatten()
        positions.add((int(rows[0]), int(columns[0])))
        assert (pixels[:, content] == 7).all()
        mean = torch.tensor([round(255 * value) for value in recipe.image_mean], dtype=torch.uint8)
        assert (pixels[:, ~content] == mean[:, None]).all()
    assert len(positions) > 10


def test_no_class_has_more_than_its_share():
    labels = torch.zeros(120, 160, dtype=torch.uint8)
    labels[:, 120:] = 1  # three quarters of the whole are class 0, most crops hold more
    image = smooth_image(120, 160)

    def crops_above(limit: float) -> int:
        augment = SegmentationAugmentation(
            recipe_with(**{**PLAIN, "max_class_share": limit}, scale_range=(2.0, 2.0), crop_size=(64, 64))
        )
        crops = [augment(image, labels, sample_generator(0, 0, index))[1] for index in range(100)]
        return sum(largest_class_share(crop) > 0.75 for crop in crops)

    assert crops_above(1.0) > 60
    assert crops_above(0.75) < 30


def test_share_leaves_void_out():
    labels = torch.tensor([[0, 0, 0, 1], [VOID, VOID, VOID, VOID]], dtype=torch.uint8)
    assert largest_class_share(labels) == 0.75
    assert largest_class_share(torch.full((4, 4), VOID, dtype=torch.uint8)) == 1.0


def test_flips_half_of_the_time_both_together():
    image = torch.arange(128, dtype=torch.uint8).expand(3, 96, 128)
    labels = (torch.arange(128) // 16).to(torch.uint8).expand(96, 128).contiguous()
    augment = SegmentationAugmentation(recipe_with(photometric_prob=0.0, scale_range=(1.0, 1.0)))
    flipped = 0
    for index in range(200):
        pixels, found = augment(image, labels, sample_generator(0, 0, index))
        torch.testing.assert_close(pixels[0] // 16, found)
        flipped += int(found[0, 0] > found[0, -1])
    assert 70 < flipped < 130


def test_same_seed_epoch_and_index_give_the_same_and_others_do_not():
    image, labels = smooth_image(120, 160), blocks(120, 160)
    augment = SegmentationAugmentation(recipe_with())

    def result(*key):
        torch.rand(3)  # the global generators must not matter
        np.random.rand(3)
        return augment(image, labels, sample_generator(*key))[0]

    first = result(0, 1, 2)
    torch.testing.assert_close(result(0, 1, 2), first)
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 2, 1)):
        assert not torch.equal(result(*other), first)


def only(distortion: str, spread: float):
    """A recipe that always applies this distortion alone."""
    others = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
    return recipe_with(photometric_prob=1.0, **{**others, distortion: spread})


@pytest.mark.parametrize("distortion", ["brightness", "contrast", "saturation"])
def test_distortions_agree_with_torchvision(distortion):
    image = (
        smooth_image(64, 80).float().mul(0.5).add(60).to(torch.uint8)
    )  # far enough from black and white not to clip
    position = ("brightness", "contrast", "saturation").index(distortion)
    for index in range(5):
        rng = sample_generator(0, 0, index)
        rng.random(4)
        factor = 1 + 0.3 * rng.uniform(-1, 1, 4)[position]
        expected = getattr(F, f"adjust_{distortion}")(image, factor)
        found = distort_photometrically(image, only(distortion, 0.3), sample_generator(0, 0, index))
        assert (found.int() - expected.int()).abs().max() <= 2
        assert not torch.equal(found, image)


def test_hue_turns_colours_and_keeps_greys_and_luma():
    grey = torch.arange(0, 240, 4, dtype=torch.uint8).expand(3, 8, 60)
    colours = smooth_image(64, 80).float().mul(0.2).add(100).to(torch.uint8)
    luma = torch.tensor([0.299, 0.587, 0.114])
    for index in range(5):
        turned = distort_photometrically(grey, only("hue", 0.5), sample_generator(0, 0, index))
        assert (turned.int() - grey.int()).abs().max() <= 1
        turned = distort_photometrically(colours, only("hue", 0.5), sample_generator(0, 0, index))
        assert (turned.int() - colours.int()).abs().max() > 3
        before, after = (torch.einsum("c,chw->hw", luma, pixels.float()) for pixels in (colours, turned))
        torch.testing.assert_close(after, before, atol=1.0, rtol=0)


def test_blur_is_gaussian_of_at_most_its_standard_deviation():
    image = torch.zeros(3, 41, 41, dtype=torch.uint8)
    image[:, 18:23, 18:23] = 250
    away = (torch.arange(41) - 20.0) ** 2
    own_variance = (away[18:23]).mean()
    deviations = []
    for index in range(20):
        blurred = distort_photometrically(image, only("blur", 2.0), sample_generator(0, 0, index)).float()
        profile = blurred.sum((0, 1))  # the variance of a convolution is the sum of the variances
        deviations.append(float((profile @ away / profile.sum() - own_variance).clamp(min=0).sqrt()))
        assert float(blurred.sum()) == pytest.approx(float(image.sum()), rel=0.03)
    assert 1.2 < max(deviations) < 2.05
    assert min(deviations) < 0.6


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (2, 2)])
def test_the_smallest_images_can_be_blurred(size):
    image = torch.full((3, *size), 77, dtype=torch.uint8)
    torch.testing.assert_close(distort_photometrically(image, only("blur", 9.0), sample_generator(0, 0, 0)), image)


def test_noise_is_gaussian_of_at_most_its_standard_deviation():
    image = torch.full((3, 60, 80), 120, dtype=torch.uint8)
    differences = [
        distort_photometrically(image, only("noise", 0.08), sample_generator(0, 0, index)).float() - 120
        for index in range(20)
    ]
    deviations = torch.stack([difference.std() for difference in differences]) / 255
    assert 0.06 < deviations.max() < 0.082
    assert deviations.min() < 0.03
    loudest = differences[int(deviations.argmax())]
    assert abs(loudest.mean()) < 1
    assert float((loudest.abs() < loudest.std()).float().mean()) == pytest.approx(0.683, abs=0.03)
    channels = torch.corrcoef(loudest.flatten(1)) - torch.eye(3)
    assert channels.abs().max() < 0.05, "each channel has its own"
    dark = distort_photometrically(image * 0, only("noise", 0.08), sample_generator(0, 0, 1))
    assert dark.max() < 100, "values are clipped, and do not wrap round"


def test_photometric_distortion_can_be_switched_off_and_varies():
    image = smooth_image(60, 80)
    off = recipe_with(photometric_prob=0.0)
    none = recipe_with(photometric_prob=1.0, brightness=0, contrast=0, saturation=0, hue=0)
    for recipe in (off, none):
        torch.testing.assert_close(distort_photometrically(image, recipe, sample_generator(0, 0, 0)), image)
    distorted = [distort_photometrically(image, recipe_with(), sample_generator(0, 0, index)) for index in range(8)]
    assert len({pixels.numpy().tobytes() for pixels in distorted}) >= 6
    assert all(pixels.dtype == torch.uint8 and pixels.shape == image.shape for pixels in distorted)


def test_normalize_agrees_with_the_image_processor():
    from lemore_hf.image_processing_lemore import LeMoReImageProcessor

    recipe = recipe_with()
    image = smooth_image(64, 96)
    processor = LeMoReImageProcessor(do_resize=False, image_mean=recipe.image_mean, image_std=recipe.image_std)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(normalize(image[None], recipe), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("resize", "longest", "expected"),
    [(None, None, (60, 90)), (40, None, (40, 60)), (40, 48, (32, 48)), ((64, 64), None, (64, 64))],
)
def test_evaluation_size(resize, longest, expected):
    recipe = recipe_with(resize=resize, max_longest_edge=longest)
    assert resize_for_evaluation(smooth_image(60, 90), recipe).shape == (3, *expected)


def test_training_scale_starts_from_the_resized_image():
    labels = torch.zeros(200, 300, dtype=torch.uint8)
    recipe = recipe_with(**PLAIN, resize=100, scale_range=(0.5, 0.5))
    _, found = SegmentationAugmentation(recipe)(smooth_image(200, 300), labels, sample_generator(0, 0, 0))
    assert (found == 0).sum() == 50 * 75


def test_classification_augmentation_and_evaluation():
    recipe = load_recipe("imagenet1k", {"crop_size": (64, 64), "resize": 80})
    augment = ClassificationAugmentation(recipe)
    image = smooth_image(100, 140)
    crops = [augment(image, sample_generator(0, 0, index)) for index in range(6)]
    assert all(crop.shape == (3, 64, 64) and crop.dtype == torch.uint8 for crop in crops)
    assert len({crop.numpy().tobytes() for crop in crops}) == 6
    torch.testing.assert_close(augment(image, sample_generator(0, 0, 3)), crops[3])
    assert augment(smooth_image(32, 400), sample_generator(0, 0, 0)).shape == (3, 64, 64)
    middle = resize_for_evaluation(image, recipe)
    torch.testing.assert_close(middle, F.resize(image, [80, 112], antialias=True)[:, 8:72, 24:88])


def test_mix_images():
    assert mix_images(load_recipe("imagenet1k", {"mixup_alpha": 0, "cutmix_alpha": 0})) is None
    mix = mix_images(load_recipe("imagenet1k"))
    pixels, labels = mix(torch.rand(4, 3, 32, 32), torch.tensor([1, 2, 3, 999]))
    assert pixels.shape == (4, 3, 32, 32)
    assert labels.shape == (4, 1000)
    torch.testing.assert_close(labels.sum(1), torch.ones(4))


def test_cutmix_of_label_maps_pastes_a_rectangle_of_the_image_before():
    assert mix_images(load_recipe("camvid", {"cutmix_alpha": 0})) is None
    mix = mix_images(load_recipe("camvid", {"cutmix_alpha": 1}))
    # Each pixel and each label tells the image and the place that it comes from.
    origin = torch.arange(3 * 20 * 30).view(3, 20, 30)
    pixels = origin[:, None].expand(-1, 3, -1, -1).float().contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    shares = []
    for _ in range(200):
        mixed_pixels, mixed_labels = mix(pixels, origin)
        assert mixed_pixels.is_contiguous(memory_format=torch.channels_last)
        assert (mixed_pixels == mixed_labels[:, None]).all()
        pasted = mixed_labels != origin
        assert (mixed_labels == torch.where(pasted, origin.roll(1, 0), origin)).all()
        assert (pasted == pasted[0]).all()
        rows, columns = pasted[0].any(1).sum(), pasted[0].any(0).sum()
        assert pasted[0].sum() == rows * columns
        shares.append(pasted.float().mean().item())
    assert (origin == torch.arange(3 * 20 * 30).view(3, 20, 30)).all()
    # The area is even between nothing and all, before the image's edge cuts some of it off.
    assert min(shares) < 0.02
    assert max(shares) > 0.7
    assert 0.2 < sum(shares) / len(shares) < 0.5


def test_classmix_lays_whole_classes_of_the_image_before_over_each_image():
    mix = mix_images(load_recipe("camvid", {"classmix": True}))
    labels = torch.randint(0, 12, (4, 30, 40))
    labels[labels == 11] = VOID
    # Each pixel tells the image and the place that it comes from.
    origin = torch.arange(labels.numel()).view(labels.shape)
    pixels = origin[:, None].expand(-1, 3, -1, -1).float().contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    times = torch.zeros(4, 11)
    for _ in range(100):
        mixed_pixels, mixed_labels = mix(pixels, labels)
        assert mixed_pixels.is_contiguous(memory_format=torch.channels_last)
        laid = mixed_pixels[:, 0] != origin
        assert torch.equal(
            mixed_pixels, torch.where(laid, origin.roll(1, 0), origin)[:, None].float().expand(-1, 3, -1, -1)
        )
        assert torch.equal(mixed_labels, torch.where(laid, labels.roll(1, 0), labels))
        for image, (is_laid, others) in enumerate(zip(laid, labels.roll(1, 0), strict=True)):
            assert not is_laid[others == VOID].any()
            for label in range(11):
                share = is_laid[others == label].float().mean()
                assert share in (0, 1)
                times[image, label] += share
    assert ((times > 25) & (times < 75)).all()


def test_segmentation_mixes_by_either_kind():
    mix = mix_images(load_recipe("camvid", {"classmix": True, "cutmix_alpha": 1}))
    labels = torch.arange(4).view(4, 1, 1) * torch.ones(1, 30, 40, dtype=torch.long)
    torch.manual_seed(0)
    kinds = set()
    for _ in range(60):
        # A class fills its image: ClassMix exchanges all of one or nothing, CutMix the same rectangle in each.
        changed = (mix(torch.zeros(4, 3, 30, 40), labels)[1] != labels).float().mean((1, 2))
        kinds.add("classes" if set(changed.tolist()) == {0.0, 1.0} else "rectangle" if 0 < changed[0] < 1 else None)
    assert {"classes", "rectangle"} <= kinds


@pytest.mark.parametrize(
    ("name", "mixes", "shape"),
    [("camvid", {"cutmix_alpha": 1}, (4, 30, 40)), ("imagenet1k", {"cutmix_alpha": 1, "mixup_alpha": 1}, (4,))],
)
@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_batches_are_mixed_with_a_probability(name, mixes, shape, probability):
    mix = mix_images(load_recipe(name, {**mixes, "mix_prob": probability}))
    pixels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 30, 40)
    torch.manual_seed(0)
    # A rectangle or a share of nothing at all is rare; labels of what is not mixed stay numbers of classes.
    times = 0
    for _ in range(200):
        mixed, labels = mix(pixels, torch.ones(shape, dtype=torch.long))
        times += not torch.equal(mixed, pixels)
        assert torch.equal(mixed, pixels) or labels.shape == (shape if len(shape) > 1 else (4, 1000))
    assert abs(times / 200 - probability) < 0.1


def test_a_classifiers_crops_have_the_recipes_share_of_the_area_and_torchvisions_shapes():
    for low, high in ((0.2, 0.3), (0.9, 1.0)):
        augment = ClassificationAugmentation(load_recipe("imagenet1k", {"scale_range": (low, high)}))
        sizes = [augment._choose_region((300, 300), sample_generator(0, 0, index))[2:] for index in range(200)]
        shares = [height * width / 300**2 for height, width in sizes]
        assert low - 0.01 < min(shares)
        assert max(shares) < high + 0.01
        if high < 0.5:  # larger crops leave no choice
            aspects = [width / height for height, width in sizes]
            assert 0.74 < min(aspects) < 0.78
            assert 1.28 < max(aspects) < 1.35


def test_a_classifiers_images_are_flipped_and_distorted():
    ramp = torch.arange(128, dtype=torch.uint8).expand(3, 128, 128)
    augment = ClassificationAugmentation(load_recipe("imagenet1k", {"crop_size": (64, 64), "photometric_prob": 0.0}))
    crops = [augment(ramp, sample_generator(0, 0, index)) for index in range(200)]
    assert 70 < sum(int(crop[0, 0, 0] > crop[0, 0, -1]) for crop in crops) < 130
    distorting = load_recipe("imagenet1k", {"crop_size": (64, 64), "photometric_prob": 1.0, "brightness": 0.5})
    grey = torch.full((3, 128, 128), 100, dtype=torch.uint8)
    augment = ClassificationAugmentation(distorting)
    assert any((augment(grey, sample_generator(0, 0, index)) != 100).any() for index in range(5))


@pytest.mark.parametrize(("distortion", "strength"), [("blur", 3.0), ("noise", 0.4), ("brightness", 0.4)])
def test_each_distortion_comes_with_its_probability(distortion, strength):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator)
    others = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
    recipe = recipe_with(**{**others, "photometric_prob": 0.3, distortion: strength})
    changed = sum(
        not torch.equal(distort_photometrically(image, recipe, sample_generator(0, 0, index)), image)
        for index in range(200)
    )
    assert 35 < changed < 85


def test_what_shrinks_is_antialiased():
    """Stripes of four pixels, of which one is white, become a grey of 64; without, black or white."""
    stripes = ((torch.arange(256) % 4 == 0) * 255).to(torch.uint8).expand(3, 256, 256)
    quarter = recipe_with(**PLAIN, crop_size=(64, 64), scale_range=(0.25, 0.25))
    labels = torch.zeros(256, 256, dtype=torch.uint8)
    classes = {"crop_size": (32, 32), "photometric_prob": 0.0, "scale_range": (0.9, 1.0)}
    shrunk = [
        SegmentationAugmentation(quarter)(stripes, labels, sample_generator(0, 0, 0))[0],
        ClassificationAugmentation(load_recipe("imagenet1k", classes))(stripes, sample_generator(0, 0, 0)),
        resize_for_evaluation(stripes, recipe_with(resize=(64, 64))),
    ]
    for pixels in shrunk:
        assert (pixels[:, :, 2:-2].int() - 64).abs().max() < 40
