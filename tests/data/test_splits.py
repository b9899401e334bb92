import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odcheap.data.splits import divide_proportionally, hash_pixels, split_stratified
from odcheap.utils.errors import OptionError


def some_images(count=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 4, 4), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count) % 3


def split(images, target, val_size, split_seed=0):
    return split_stratified(hash_pixels(images, split_seed), target, val_size)


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
