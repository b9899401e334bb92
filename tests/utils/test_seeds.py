import torch

from odcheap.utils.seeds import derive_seed, make_generator, temporary_seed


def test_streams_differ_in_every_part():
    seeds = [
        derive_seed(0, "student", 1),
        derive_seed(1, "student", 1),
        derive_seed(0, "student", 0),
        derive_seed(0, "order", 1),
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_same_stream_gives_the_same_numbers_and_leaves_the_outside_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with temporary_seed(0, "method"):
        inside = torch.rand(4)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(inside, torch.rand(4, generator=make_generator(0, "method")))
