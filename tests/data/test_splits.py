import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odcheap.data.splits import divide_proportionally, hash_pixels, limit_parts, split_stratified
from odcheap.utils.errors import OptionError


def some_images(count=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 4, 4), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count) % 3


def split(images, target, val_size, split_seed=0):
    return split_stratified(hash_pixels(images, split_seed), target.numpy(), val_size)


@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=6), share=st.floats(0.05, 0.9))
def test_every_class_is_held_out_by_its_share(counts, share):
    target = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    images, _ = some_images(len(target))
    total = int(share * len(target))
    made = split(images, target, total)
    held_out = np.bincount(target[made.val], minlength=len(counts))
    assert held_out.sum() == total
    exact, spare = np.array(counts) * total / len(target), np.array(counts) - 1
    if total <= spare.sum():
        assert np.all(held_out <= spare)  # each class keeps an image to train on
    if np.all(np.ceil(exact) <= spare):
        assert np.all(np.abs(held_out - exact) < 1)
    assert sorted([*made.train, *made.val]) == list(range(len(target)))


def test_it_depends_on_the_images_not_on_their_order():
    images, target = some_images()
    shuffled = torch.randperm(60)
    one, two = split(images, target, 12), split(images[shuffled], target[shuffled], 12)
    assert torch.equal(images[one.val], images[shuffled][two.val])
    assert torch.equal(images[one.train], images[shuffled][two.train])
    assert one.fingerprint == two.fingerprint


def test_fingerprint_tells_other_data_sizes_and_split_seeds_apart():
    images, target = some_images()
    changed = images.clone()
    changed[7, 0, 0, 0] ^= 1
    prints = [split(images, target, 12), split(images, target, 13), split(images, target, 12, split_seed=1)]
    prints += [split(changed, target, 12), split(images, (target + 1) % 3, 12)]
    assert len({p.fingerprint for p in prints}) == len(prints)


def test_a_fraction_and_its_count_are_the_same():
    images, target = some_images()
    assert np.array_equal(split(images, target, 0.2).val, split(images, target, 12).val)
    assert len(split(images, target, 0).val) == 0


@pytest.mark.parametrize("val_size", [60, 61, 1000, -1, 0.999, 2.5])
def test_impossible_sizes_are_refused(val_size):
    images, target = some_images()
    with pytest.raises(OptionError, match=f"data.val_size={val_size}: must"):
        split(images, target, val_size)


def test_each_class_keeps_an_image_as_far_as_that_is_possible():
    assert divide_proportionally(np.array([1, 1, 1, 1, 6]), 5).tolist() == [0, 0, 0, 0, 5]
    assert divide_proportionally(np.array([1, 1, 1, 1, 6]), 6).sum() == 6
    assert divide_proportionally(np.array([0, 3, 3]), 2).tolist() == [0, 1, 1]


def limited(images, target, limit, split_seed=0):
    """What is kept of a training part, and of a test part with every third of its images."""
    parts = {"train": (images, target), "test": (images[::3], target[::3])}
    labels = {part: some.numpy() for part, (_, some) in parts.items()}
    return limit_parts(labels, lambda part: hash_pixels(parts[part][0], split_seed), limit)


def test_a_limit_reduces_every_part_by_the_same_share_and_every_class_too():
    images, _ = some_images(600)
    target = torch.repeat_interleave(torch.arange(3), torch.tensor([400, 197, 3]))[torch.randperm(600)]
    kept = limited(images, target, 60)
    assert {part: len(index) for part, index in kept.items()} == {"train": 60, "test": 20}
    assert np.bincount(target[kept["train"]]).tolist() == [40, 19, 1]
    assert limited(images, target, 60)["train"].tolist() == kept["train"].tolist()
    assert set(limited(images, target, 30)["train"]) < set(kept["train"])
    assert set(limited(images, target, 60, split_seed=1)["train"]) != set(kept["train"])
    shuffled = torch.randperm(600)
    again = limited(images[shuffled], target[shuffled], 60)["train"]
    assert sorted(shuffled[again].tolist()) == kept["train"].tolist()


@pytest.mark.parametrize("limit", [None, 60, 1000])
def test_without_a_limit_or_with_a_high_one_every_image_is_used_and_none_is_hashed(limit):
    labels = {"train": np.zeros(60, int), "val": np.zeros(0, int), "test": np.zeros(5, int)}
    kept = limit_parts(labels, lambda part: pytest.fail(f"{part} was hashed"), limit)
    assert {part: index.tolist() for part, index in kept.items()} == {
        part: [*range(len(labels[part]))] for part in labels
    }
