"""Policies against torchvision's, which augments an image at a time."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from odcheap.data.policies import (
    IS_SIGNED,
    KERNEL_NUMBERS,
    LEVELS,
    NAMES,
    Draws,
    Policy,
    RandAugment,
    TrivialAugment,
    compute_values,
    draw_boxes,
)

CPU = torch.device("cpu")
BLACK = torch.zeros((), dtype=torch.uint8)


def pictures(count, channels=3, side=32, seed=0):
    """Smooth ones, each with a range of its own, since noise has no shape that an operation could spoil."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 4, 4, generator=random)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    low, high = torch.rand(2, count, 1, 1, 1, generator=random) * torch.tensor([60.0, 195.0]).view(2, 1, 1, 1, 1)
    return (low + high * smooth).to(torch.uint8)


def expected(theirs, image, name, level, sign):
    magnitudes, is_signed = theirs._AUGMENTATION_SPACE[name]
    values = magnitudes(LEVELS, *image.shape[1:])
    magnitude = 0.0 if values is None else float(values[level]) * (sign if is_signed else 1)
    nearest = v2.InterpolationMode.NEAREST
    return theirs._apply_image_or_video_transform(image, name, magnitude, interpolation=nearest, fill={})


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("ours", "theirs"), [(TrivialAugment(), v2.TrivialAugmentWide()), (RandAugment(1), v2.RandAugment(1))]
)
def test_each_operation_equals_torchvision_s(ours, theirs, channels):
    levels = torch.tensor([1, 4, 9, 17, 30])
    operation = torch.arange(len(NAMES)).repeat_interleave(2 * len(levels))[:, None]
    level = levels.repeat(2 * len(NAMES))[:, None]
    sign = torch.tensor([1, -1]).repeat_interleave(len(levels)).repeat(len(NAMES))[:, None]
    strength = ours.strongest.tabulate((32, 32))[operation, level]
    strength = torch.where(IS_SIGNED[operation], sign * strength, strength)
    count = len(operation)
    draws = Draws(KERNEL_NUMBERS[operation], compute_values(operation, strength, (32, 32)), torch.zeros(count, 0))
    images = pictures(count, channels)
    found = ours.apply(images, draws.for_batches([torch.arange(count)], CPU)[0], BLACK)
    for k in range(count):
        one = expected(theirs, images[k], NAMES[operation[k]], int(level[k]), int(sign[k])).int()
        # Sums in whole numbers round differently from theirs in float32, by one at most.
        assert (found[k].int() - one).abs().max() <= 1, (NAMES[operation[k]], int(level[k]), int(sign[k]))


def test_operations_levels_and_signs_are_equally_frequent():
    random = torch.Generator().manual_seed(0)
    count = 86_800
    drawn = TrivialAugment().draw(count, (32, 32), random)
    kernels = torch.bincount(drawn.kernels[:, 0], minlength=10)
    shares = torch.tensor([1, 5, 1, 1, 1, 1, 1, 1, 1, 1]) / 14
    chi_square = ((kernels - count * shares) ** 2 / (count * shares)).sum()
    assert chi_square < 34  # 9 degrees of freedom: p = 0.0001
    factors = drawn.values[drawn.kernels[:, 0] == KERNEL_NUMBERS[NAMES.index("Contrast")], 0, 0]
    expected = (1 + torch.linspace(-0.99, 0.99, 61)).float()
    found = (factors[:, None] - expected).abs().argmin(1).bincount(minlength=61)
    weights = torch.ones(61).index_fill(0, torch.tensor(30), 2) / 62  # both signs of no change
    assert ((found - len(factors) * weights) ** 2 / (len(factors) * weights)).sum() < 110  # 60 degrees: p = 0.0001
    twice = RandAugment(num_ops=2, magnitude=30).draw(count, (32, 32), random)
    assert twice.kernels.shape == (count, 2)
    together = torch.bincount(twice.kernels @ torch.tensor([10, 1]), minlength=100).view(10, 10)
    pairs = count * shares[:, None] * shares
    assert ((together - pairs) ** 2 / pairs).sum() < 160  # 99 degrees: p = 0.0001
    solarized = twice.kernels == KERNEL_NUMBERS[NAMES.index("Solarize")]
    assert set(twice.values[solarized][:, 0].tolist()) == {0.0}  # all are of strength 30


def test_small_images_are_not_moved_out_of_their_frame_by_more_than_their_side():
    strengths = TrivialAugment().strongest.tabulate((8, 8))
    assert strengths[NAMES.index("TranslateX")].max() == 8
    assert TrivialAugment().strongest.tabulate((64, 64))[NAMES.index("TranslateX")].max() == 32


def test_erased_rectangles_are_distributed_as_torchvision_s():
    random = torch.Generator().manual_seed(0)
    boxes = draw_boxes(20_000, (32, 24), 0.4, random)
    height, width = (boxes[:, 2:] - boxes[:, :2]).T
    is_erased = height > 0
    assert abs(is_erased.float().mean() - 0.4) < 0.015
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= 32).all()
    assert (boxes[:, 3] <= 24).all()
    torch.manual_seed(0)
    theirs = v2.RandomErasing(1.0)
    params = [theirs.make_params([torch.empty(3, 32, 24, device="meta")]) for _ in range(4000)]
    for ours, name in zip((boxes[:, 0], boxes[:, 1], height, width), "ijhw", strict=True):
        values = np.array([float(p[name]) for p in params])
        mean, error = values.mean(), values.std() * (1 / 4000 + 1 / int(is_erased.sum())) ** 0.5
        assert abs(ours[is_erased].double().mean() - mean) < 4 * error, name


def test_erasing_fills_a_rectangle_with_the_color():
    images, color = pictures(50), torch.tensor([1, 2, 3], dtype=torch.uint8)
    policy = Policy(erasing=0.5)
    drawn = policy.draw(50, (32, 32), torch.Generator().manual_seed(0))
    found = policy.apply(images, drawn.for_batches([torch.arange(50)], CPU)[0], color)
    for n, (top, left, bottom, right) in enumerate(drawn.boxes.tolist()):
        one = images[n].clone()
        one[:, top:bottom, left:right] = color[:, None, None]
        assert torch.equal(found[n], one)


@pytest.mark.parametrize("policy", [TrivialAugment(erasing=0.3), RandAugment(3, 20)])
def test_an_image_s_augmentation_does_not_depend_on_its_batch(policy):
    images = pictures(60, side=16)
    drawn = policy.draw(60, (16, 16), torch.Generator().manual_seed(0))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    results = []
    for size in (60, 7, 1):
        batches = list(order.split(size))
        parts = zip(batches, drawn.for_batches(batches, CPU), strict=True)
        found = torch.empty_like(images)
        for index, part in parts:
            batch = images[index].contiguous(memory_format=torch.channels_last)
            done = policy.apply(batch, part, BLACK)
            assert done.is_contiguous(memory_format=torch.channels_last)
            found[index] = done
        results.append(found)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], images)


def test_no_policy_changes_nothing():
    assert Policy().is_empty
    assert not any(policy.is_empty for policy in (Policy(erasing=0.1), TrivialAugment(), RandAugment()))
