import numpy as np
import pytest
import torch

from odcheap.data.base import Batch
from odcheap.data.mixing import Mixing, build_mixing, draw_rectangle, to_labels
from odcheap.data.policies import Policy

KINDS = {"mixup": (0.4, 0.0), "cutmix": (0.0, 1.0), "both": (0.4, 1.0)}


def batch(views=1, count=6):
    random = torch.Generator().manual_seed(0)
    images = torch.randn(views, count, 8, 10, 3, generator=random).movedim(-1, -3)
    return Batch(images if views > 1 else images[0], torch.arange(count) % 4, 0.75)


def mixed_by_hand(images, labels):
    """The weight is read from the labels, and whether it was cutmix from the pixels."""
    weight = float(labels[0, 0])  # image 0 has label 0, and its partner, the last one, label 1
    partners = torch.stack([images[n - 1] for n in range(len(images))])
    return weight, partners


@pytest.mark.parametrize("kind", KINDS)
def test_images_and_labels_are_mixed_by_the_formulas(kind):
    given = batch()
    kinds = set()
    for position in range(40):
        found = Mixing(*KINDS[kind], classes=5, seed=0)(given, 2, position)
        weight, partners = mixed_by_hand(given.images, found.target)
        for n in range(6):
            expected = torch.zeros(5)
            expected[given.target[n]] += weight
            expected[given.target[n - 1]] += 1 - weight
            torch.testing.assert_close(found.target[n], expected)
        is_own, is_partner = found.images == given.images, found.images == partners
        if bool((is_own | is_partner).all()):  # cutmix: one rectangle, whose area is the partner's weight
            kinds.add("cutmix")
            rectangle = (~is_own).any(0).any(0)
            assert rectangle.sum() / 80 == pytest.approx(1 - weight, abs=1e-6)
            rows, columns = rectangle.any(1).nonzero().flatten(), rectangle.any(0).nonzero().flatten()
            assert not len(rows) or rectangle[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        else:
            kinds.add("mixup")
            torch.testing.assert_close(found.images, weight * given.images + (1 - weight) * partners)
        assert found.images.is_contiguous(memory_format=torch.channels_last)
        assert (found.target.dtype, found.share) == (torch.float32, given.share)
    assert kinds == ({"mixup", "cutmix"} if kind == "both" else {kind})


@pytest.mark.parametrize("kind", KINDS)
def test_draws_depend_on_seed_epoch_and_position_alone_and_views_share_them(kind):
    given, several = batch(), batch(views=3)
    assert torch.equal(given.images, several.images[0])
    mixing = Mixing(*KINDS[kind], classes=5, seed=1)
    one = [mixing(given, 0, position) for position in range(8)]
    again = [mixing(several, 0, position) for position in reversed(range(8))][::-1]
    for k, (a, b) in enumerate(zip(one, again, strict=True)):
        assert torch.equal(a.images, b.images[0])
        assert torch.equal(a.target, b.target)
        alone = mixing(Batch(several.images[2], several.target), 0, k)
        assert torch.equal(alone.images, b.images[2])
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in b.images)

    def targets(mixing, epoch, first):
        return torch.stack([mixing(given, epoch, first + position).target for position in range(8)])

    others = [targets(mixing, 1, 0), targets(mixing, 0, 1), targets(Mixing(*KINDS[kind], 5, seed=2), 0, 0)]
    assert not any(torch.equal(other, targets(mixing, 0, 0)) for other in others)


def test_a_half_of_a_global_batch_is_mixed_with_the_same_weight():
    mixing = Mixing(0.4, 0.0, classes=5, seed=0)
    whole = batch()
    weights = [
        float(mixing(Batch(whole.images[rank::2], torch.tensor([0, 1, 2])), 0, 3).target[0, 0]) for rank in (0, 1)
    ]
    assert weights == [float(mixing(whole, 0, 3).target[0, 0])] * 2


def test_rectangles_have_the_areas_of_the_paper():
    """With alpha = 1 the share of the area is uniform, but for what lies outside of the image."""
    random = np.random.default_rng(0)
    boxes = np.array([draw_rectangle(random, 1.0, 200, 100) for _ in range(20_000)])
    whole = (boxes[:, 0] > 0) & (boxes[:, 1] > 0) & (boxes[:, 2] < 200) & (boxes[:, 3] < 100)
    shape = (boxes[:, 2] - boxes[:, 0])[whole] / np.maximum(1, boxes[:, 3] - boxes[:, 1])[whole]
    assert np.median(shape) == pytest.approx(2, abs=0.05)
    centers = (boxes[:, 0] + boxes[:, 2]) / 2
    assert abs(centers.mean() - 100) < 2
    # The mean of the visible share: over a uniform side r^2 = 1 - w it is the integral of (r - r^2 / 4)^2 over r^2.
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 20_000
    r = np.sqrt(np.linspace(0, 1, 100_001))
    assert area.mean() == pytest.approx(((r - r**2 / 4) ** 2).mean(), abs=0.01)


def test_the_heavier_label_counts_and_no_option_is_no_mixing():
    assert to_labels(torch.tensor([[0.3, 0.7], [0.9, 0.1]])).tolist() == [1, 0]
    assert to_labels(torch.tensor([1, 0])).tolist() == [1, 0]
    assert build_mixing(Policy(erasing=0.5), 5, 0) is None
    assert build_mixing(Policy(cutmix=1.0), 5, 3) == Mixing(0.0, 1.0, 5, 3)
