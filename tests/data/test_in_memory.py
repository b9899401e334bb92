import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from odcheap.data.base import BatchOrder, Process
from odcheap.data.in_memory import EvalBatches, Images, InMemoryData, TrainBatches, convert_channels, load_digits
from odcheap.data.policies import RandAugment, TrivialAugment
from odcheap.data.transforms import Augmentation, Normalization
from odcheap.utils.errors import OptionError
from odcheap.utils.seeds import make_generator

ALONE = Process()
PLAIN = Normalization((0.0,) * 3, (1.0,) * 3)


@given(count=st.integers(8, 200), batch_size=st.integers(8, 64), world=st.integers(1, 4))
def test_the_processes_together_see_the_batches_of_one(count, batch_size, world):
    one = BatchOrder(count, batch_size, seed=0).batches()
    ranks = [BatchOrder(count, batch_size, 0, rank, world).batches() for rank in range(world)]
    assert {len(rank) for rank in ranks} == {len(BatchOrder(count, batch_size, 0, 0, world))}
    for k in range(len(ranks[0])):
        together = torch.cat([rank[k][0] for rank in ranks])
        assert sorted(together.tolist()) == sorted(one[k][0].tolist())
        assert sum(rank[k][1] for rank in ranks) == pytest.approx(world)
        for index, share in (rank[k] for rank in ranks):
            assert share == pytest.approx(len(index) * world / len(one[k][0]))
            assert len(index) >= 2
    seen = sum(len(batch) for batch, _ in one)
    assert count - seen < 2
    assert len({i for batch, _ in one for i in batch.tolist()}) == seen


def test_order_depends_on_seed_and_epoch():
    def first(seed, epoch):
        order = BatchOrder(100, 10, seed)
        order.set_epoch(epoch)
        return order.batches()[0][0].tolist()

    assert first(0, 1) == first(0, 1)
    assert first(0, 1) != first(0, 2)
    assert first(0, 1) != first(1, 1)


def batches(order=None, policy=None, views=1):
    images = torch.randint(256, (50, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    order = order or BatchOrder(50, 8, seed=0)
    return TrainBatches(images, torch.arange(50), order, Augmentation(True, 1), PLAIN, views, policy)


@pytest.mark.parametrize("policy", [None, TrivialAugment(erasing=0.3)])
def test_a_resumed_loader_goes_on_where_it_was(policy):
    whole = list(batches(policy=policy))
    interrupted = iter(loader := batches(policy=policy))
    for _ in range(3):
        next(interrupted)
    again = batches(policy=policy)
    again.load_state_dict(loader.state_dict())
    rest = list(again)
    assert len(rest) == len(whole) - 3
    assert all(torch.equal(a.images, b.images) for a, b in zip(rest, whole[3:], strict=True))
    assert len(list(again)) == len(whole)  # and the next epoch is whole


def test_a_loader_saved_at_the_epoch_s_end_starts_the_next_one_at_its_beginning():
    loader = batches()
    list(loader)
    again = batches()
    again.load_state_dict(loader.state_dict())
    assert len(list(again)) == len(loader)


@pytest.mark.parametrize("policy", [None, RandAugment(erasing=0.3)])
def test_augmentation_belongs_to_the_sample_whatever_the_batch(policy):
    small, large = (batches(BatchOrder(50, size, seed=0), policy) for size in (5, 25))
    by_sample = [
        {int(t): image for batch in loader for t, image in zip(batch.target, batch.images, strict=True)}
        for loader in (small, large)
    ]
    assert all(torch.equal(by_sample[0][k], by_sample[1][k]) for k in range(50))


def test_operations_follow_crop_and_flip_and_are_drawn_for_each_view():
    policy, orders = RandAugment(erasing=0.3), BatchOrder(50, 8, seed=0)
    for epoch in (0, 1):
        orders.set_epoch(epoch)
        plain, several = list(batches(orders, views=2)), list(batches(orders, policy, views=2))
        for view in (0, 1):
            drawn = policy.draw(50, (4, 4), make_generator(0, "policy", epoch, *[1] * view))
            index = [batch for batch, _ in orders.batches()]
            for one, other, part in zip(plain, several, drawn.for_batches(index, torch.device("cpu")), strict=True):
                pixels = (255 * one.images[view]).round().to(torch.uint8)
                expected = PLAIN.apply(policy.apply(pixels, part, torch.zeros(3, dtype=torch.uint8)))
                assert torch.equal(other.images[view], expected)
        single = list(batches(orders, policy))
        assert all(torch.equal(a.images, b.images[0]) for a, b in zip(single, several, strict=True))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_image_once(world):
    target = torch.arange(25)
    images = torch.zeros(25, 3, 2, 2, dtype=torch.uint8)
    loaders = [EvalBatches(images, target, 4, PLAIN, Process(rank=rank, world_size=world)) for rank in range(world)]
    seen = [t for loader in loaders for batch in loader for t in batch.target.tolist()]
    assert sorted(seen) == list(range(25))
    assert all(len(list(loader)) == len(loader) for loader in loaders)


@pytest.mark.parametrize(("batch_size", "world"), [(1, 1), (3, 2), (0, 1), ("8", 1)])
def test_too_small_a_global_batch_is_refused(batch_size, world):
    with pytest.raises(OptionError, match=f"data.batch_size={batch_size}: must be a whole number"):
        BatchOrder(100, batch_size, 0, 0, world)


def digits_data(**changed):
    options = {
        "seed": 0,
        "select": "val",
        "select_by": "top1",
        "batch_size": 64,
        "eval_batch_size": 100,
        "val_size": 237,
        "split_seed": 0,
    }
    options |= {"flip": False, "crop_padding": 1, "mean": (0.3,) * 3, "std": (0.4,) * 3} | changed
    data = InMemoryData(**{"load": load_digits, "name": "digits"} | options)
    data.read()
    return data


def test_channels_are_converted_as_pillow_does_and_the_split_stays():
    images = torch.randint(256, (1001, 3, 7, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    gray = convert_channels(images, 1)
    for rgb, found in zip(images[::50], gray[::50], strict=True):
        assert np.array_equal(found[0], Image.fromarray(rgb.permute(1, 2, 0).numpy()).convert("L"))
    assert torch.equal(convert_channels(gray, 3), gray.expand(-1, 3, -1, -1))
    assert convert_channels(images, None) is images
    with pytest.raises(OptionError, match=r"data.channels=1: must be 2, the channels of the images"):
        convert_channels(images[:, :2], 1)
    rgb, one = digits_data(), digits_data(channels=1, mean=(0.3,), std=(0.4,))
    assert one.image_size == (1, 8, 8)
    assert one.fingerprint == rgb.fingerprint
    assert torch.equal(one.select_part("test")[0], rgb.select_part("test")[0][:, :1])  # digits are gray as they are
    batch = next(iter(one.train_loader(ALONE)))
    torch.testing.assert_close(batch.images, next(iter(rgb.train_loader(ALONE))).images[:, :1])
    with pytest.raises(
        OptionError, match=r"data.mean=\[0.3, 0.3, 0.3\]: must be one number: the images have 1 channel "
    ):
        digits_data(channels=1)


def test_the_split_ignores_the_seed_and_the_batch_size_is_global():
    one, two = digits_data(seed=0), digits_data(seed=1, batch_size=32)
    assert one.fingerprint == two.fingerprint
    assert len(two.train_loader(ALONE)) == two.steps_per_epoch() == 38  # 1,200 / 32, rounded up
    loader = two.train_loader(Process(world_size=2))
    assert len(loader) == two.steps_per_epoch(2) == 38
    assert len(next(iter(loader)).target) == 16


def test_a_limited_data_set_has_some_images_of_each_part_and_the_same_split():
    whole, some = digits_data(), digits_data(limit=120)
    assert {part: len(target) for part, target in some.labels.items()} == {"train": 120, "val": 24, "test": 36}
    assert all(len(set(target)) == 10 for target in some.labels.values())
    assert some.fingerprint == whole.fingerprint
    for part in ("train", "val", "test"):
        every = {bytes(image.image.numpy()) for image in whole.iterate_images(part, range(len(whole.labels[part])))}
        kept = list(some.iterate_images(part, range(len(some.labels[part]))))
        assert all(bytes(image.image.numpy()) in every for image in kept)
        assert [image.label for image in kept] == some.labels[part].tolist()
    assert sum(len(batch.target) for batch in some.train_loader(ALONE)) == 120
    assert sum(len(batch.target) for batch in some.test_loader(ALONE)) == 36
    with pytest.raises(OptionError, match="data.limit=3: must leave 4 images or more"):
        digits_data(limit=3).check(world_size=2)


def test_an_epoch_may_have_fewer_batches_and_is_resumed_after_the_last_of_them():
    loader = digits_data().train_loader(ALONE)
    every = [batch.target for batch in loader]
    loader.sampler.limit = 3
    assert len(loader) == 3
    assert all(torch.equal(batch.target, one) for batch, one in zip(loader, every[:3], strict=True))
    again = digits_data().train_loader(ALONE)
    again.sampler.limit = 3
    again.load_state_dict(loader.state_dict())
    assert len(list(again)) == 3


def test_each_student_may_get_a_view_of_its_own():
    data = digits_data()
    plain = next(iter(data.train_loader(ALONE)))
    several = next(iter(data.train_loader(ALONE, views=3)))
    assert several.images.shape == (3, *plain.images.shape)
    assert torch.equal(several.images[0], plain.images)
    assert torch.equal(several.target, plain.target)
    assert not torch.equal(several.images[1], several.images[0])
    assert not torch.equal(several.images[1], several.images[2])
    assert next(iter(data.val_loader(ALONE))).images.ndim == 4


def test_selection_on_test_watches_the_test_images_and_none_without_held_out_ones():
    assert len(digits_data(select="test", val_size=0).val_loader(ALONE).target) == 360
    assert len(digits_data(select="last", val_size=0).labels["val"]) == 0
    assert len(digits_data().val_loader(ALONE).target) == 237
    with pytest.raises(OptionError, match="data.val_size=0: select=val needs held-out images"):
        digits_data(val_size=0)


@pytest.mark.parametrize("world", [2, 3])
def test_gradients_averaged_over_processes_are_those_of_one(world):
    """Without batch norm a distributed step is exactly the global one, the uneven last batch too."""
    random = torch.Generator().manual_seed(0)
    inputs, target = torch.randn(29, 5, dtype=torch.double, generator=random), torch.arange(29) % 4
    weight = torch.zeros(5, 4, dtype=torch.double, requires_grad=True)

    def gradient(index, share):
        loss = torch.nn.functional.cross_entropy(inputs[index] @ weight, target[index]) * share
        return torch.autograd.grad(loss, weight)[0]

    ranks = [BatchOrder(29, 8, 0, rank, world).batches() for rank in range(world)]
    for k, (index, _) in enumerate(BatchOrder(29, 8, 0).batches()[: len(ranks[0])]):
        mean = sum(gradient(*rank[k]) for rank in ranks) / world
        torch.testing.assert_close(mean, gradient(index, 1.0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("files", [None, ["a.png", "b.png", "c.png"]])
def test_test_images_that_are_training_images_too_are_counted_and_said(capsys, files):
    images = torch.arange(24, dtype=torch.uint8).view(24, 1, 1, 1).expand(24, 3, 4, 4).contiguous()
    train, test = images[:20], torch.stack([images[20], images[3], images[3]])
    target = torch.arange(20) % 2
    made_in = Images(train, target, test, torch.zeros(3, dtype=torch.long), ["cat", "dog"], files)
    digits_data(load=lambda: made_in, batch_size=4, val_size=4)
    which = "b.png" if files else "number 1 (from 0)"
    expected = f"warning: 2 test images are also training images, pixel for pixel, such as {which}\n"
    assert expected in capsys.readouterr().out
    digits_data()
    assert "warning" not in capsys.readouterr().out
