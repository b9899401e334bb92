"""Random streams: every random number of a run is a function of the seed and of what it is for."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, *stream: str | int) -> int:
    """A 63-bit seed of its own for each (seed, *stream), such as `derive(0, "student", 3)`."""
    digest = hashlib.blake2b(repr((seed, *stream)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *stream: str | int) -> torch.Generator:
    """A CPU generator at the start of the stream."""
    return torch.Generator().manual_seed(derive(seed, *stream))


@contextmanager
def seeded(seed: int, *stream: str | int) -> Iterator[None]:
    """Inside, PyTorch's CPU generator follows the stream; outside, its state is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, *stream))
        yield
