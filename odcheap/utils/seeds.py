"""Random streams: random numbers that depend only on the seed of the run and on the purpose for which they are drawn.

A purpose is named by strings and integers, such as ("student", 3) for the initial weights of student 3.
"""

import hashlib
from collections.abc import Generator
from contextlib import contextmanager

import torch


def derive_seed(seed: int, *stream: str | int) -> int:
    """Returns a seed (63 bits) that depends on the seed of the run and on the purpose of the random numbers.

    Each purpose has its own seed. So the initial weights of a student, for example, stay the same if other parts of the
    run draw more or fewer random numbers.

    Args:
        seed: The seed of the run.
        *stream: The purpose, as strings and numbers, such as "student", 3 for the initial weights of student 3.

    Example:
        >>> derive_seed(0, "student", 0) == derive_seed(0, "student", 0)
        True
        >>> derive_seed(0, "student", 0) == derive_seed(0, "student", 1)
        False
    """
    digest = hashlib.blake2b(repr((seed, *stream)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def make_generator(seed: int, *stream: str | int) -> torch.Generator:
    """Returns a new random generator on the CPU for one purpose.

    Args:
        seed: The seed of the run.
        *stream: The purpose of the random numbers, as strings and numbers, such as "student", 3; see `derive_seed`.
    """
    return torch.Generator().manual_seed(derive_seed(seed, *stream))


@contextmanager
def temporary_seed(seed: int, *stream: str | int) -> Generator[None]:
    """A context manager that seeds PyTorch's CPU generator for one purpose, and restores its state afterwards.

    Args:
        seed: The seed of the run.
        *stream: The purpose of the random numbers, as strings and numbers, such as "student", 3; see `derive_seed`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, *stream))
        yield


def seed_generators(seed: int, device: torch.device) -> None:
    """Seeds PyTorch's default generators of the CPU and of a device.

    Args:
        seed: A seed of 63 bits, as `derive_seed` returns it.
        device: The device that a run uses.
    """
    # `torch.manual_seed` also leaves a seed for every kind of device that is not in use yet, with the text of the whole
    # call stack, which takes a millisecond.
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
