import traceback

import pytest
import torch

from odcheap.utils.seeds import derive_seed, make_generator, seed_generators, temporary_seed


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


def test_a_cpu_is_seeded_without_the_text_of_the_call_stack(monkeypatch):
    """PyTorch makes it for each kind of device that is not in use, and a run does this several times in each step."""
    torch.manual_seed(3)
    expected = torch.rand(2)
    monkeypatch.setattr(traceback, "format_stack", pytest.fail)
    seed_generators(3, torch.device("cpu"))
    assert torch.equal(torch.rand(2), expected)


def test_another_device_is_seeded_with_all_generators(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    seed_generators(3, torch.device("cuda"))
    assert seeds == [3]
