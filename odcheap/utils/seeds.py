"""Random streams, so that a random number of a run depends only on the seed and on what it is used for."""

import hashlib
from collections.abc import Generator
from contextlib import contextmanager

import torch


def derive_seed(seed: int, *stream: str | int) -> int:
    """Returns a 63-bit seed that belongs to (seed, *stream), such as `derive_seed(0, "student", 3)`.

    Example:
        >>> derive_seed(0, "student", 0) == derive_seed(0, "student", 0)
        True
        >>> derive_seed(0, "student", 0) == derive_seed(0, "student", 1)
        False
    """
    digest = hashlib.blake2b(repr((seed, *stream)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def make_generator(seed: int, *stream: str | int) -> torch.Generator:
    """Returns a CPU generator that is seeded for the stream."""
    return torch.Generator().manual_seed(derive_seed(seed, *stream))


@contextmanager
def temporary_seed(seed: int, *stream: str | int) -> Generator[None]:
    """Seeds PyTorch's CPU generator for the stream inside the block, and restores its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, *stream))
        yield
