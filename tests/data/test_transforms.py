import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from odcheap.data.transforms import Augmentation, Normalization, stack_views


@pytest.mark.parametrize("flip", [True, False])
def test_crop_and_flip_equal_a_loop_over_images(flip):
    augment = Augmentation(flip, crop_padding=2)
    images = torch.randint(256, (20, 3, 6, 8), dtype=torch.uint8)
    drawn = augment.draw(20, seed=0, epoch=3)
    found = augment.apply(images, drawn)
    for n, (top, left, flipped) in enumerate(drawn.tolist()):
        padded = np.pad(images[n].numpy(), ((0, 0), (2, 2), (2, 2)))
        expected = padded[:, top : top + 6, left : left + 8]
        assert np.array_equal(found[n].numpy(), expected[:, :, ::-1] if flipped else expected)
    assert drawn[:, 2].any() == flip


def test_crops_and_flips_are_distributed_as_torchvision_s():
    """Every corner and flip equally often, independent of each other."""
    drawn = Augmentation(True, crop_padding=1).draw(90_000, seed=0, epoch=0)
    cells = drawn @ torch.tensor([6, 2, 1])
    counts = torch.bincount(cells, minlength=18).double()
    chi_square = ((counts - 5000) ** 2 / 5000).sum()
    assert chi_square < 45  # 17 degrees of freedom: p = 0.0002
    image = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4)
    theirs = v2.Compose([v2.RandomCrop(4, padding=1), v2.RandomHorizontalFlip()])
    possible = {tuple(theirs(image).flatten().tolist()) for _ in range(2000)}
    ours = Augmentation(True, 1).apply(image.expand(400, -1, -1, -1), drawn[:400])
    assert {tuple(picture.flatten().tolist()) for picture in ours} == possible


def test_what_is_drawn_depends_on_seed_epoch_and_sample_alone():
    augment = Augmentation(True, 4)
    assert torch.equal(augment.draw(50, 0, 1), augment.draw(50, 0, 1))
    assert not torch.equal(augment.draw(50, 0, 1), augment.draw(50, 0, 2))
    assert not torch.equal(augment.draw(50, 0, 1), augment.draw(50, 1, 1))


def test_views_differ_and_the_first_is_the_one_that_all_methods_see():
    augment = Augmentation(True, 4)
    views = [augment.draw(50, 0, 1, view) for view in range(3)]
    assert torch.equal(views[0], augment.draw(50, 0, 1))
    assert not torch.equal(views[1], views[0])
    assert not torch.equal(views[1], views[2])


def test_stack_views_views_keep_their_channels_last():
    views = [torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    found = stack_views(views)
    assert torch.equal(found, torch.stack(views))
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in found)
    assert stack_views(views[:1]) is views[0]


def test_normalisation_equals_torchvision_s():
    images = torch.randint(256, (4, 3, 5, 7), dtype=torch.uint8)
    mean, std = (0.49, 0.48, 0.45), (0.2, 0.21, 0.22)
    expected = v2.Normalize(mean, std)(v2.ToDtype(torch.float32, scale=True)(images))
    found = Normalization(mean, std).apply(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)
