"""Random streams: a random number depends only on the seed of the run and on the purpose for which it is drawn.

A stream is named by strings and integers, such as ("student", 3) for the initial weights of student 3.
"""

import hashlib
from collections.abc import Generator
from contextlib import contextmanager

import torch


def derive_seed(seed: int, *stream: str | int) -> int:
    """Returns a seed for one purpose, a 63-bit number that depends on all arguments.

    With a seed for each purpose, random numbers do not depend on what else draws random numbers in the run.

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
    """Returns a new CPU generator, whose seed depends on all arguments.

    Args:
        seed: The seed of the run.
        *stream: The purpose of the random numbers, as strings and numbers; see `derive_seed`.
    """
    return torch.Generator().manual_seed(derive_seed(seed, *stream))


@contextmanager
def temporary_seed(seed: int, *stream: str | int) -> Generator[None]:
    """A context manager that seeds PyTorch's CPU generator, and restores the state of the generator afterwards.

    Args:
        seed: The seed of the run.
        *stream: The purpose of the random numbers, as strings and numbers; see `derive_seed`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, *stream))
        yield


def seed_generators(seed: int, device: torch.device) -> None:
    """Seeds the random numbers that PyTorch draws on a device, and those of the CPU.

    Args:
        seed: A seed of 63 bits, see `derive_seed`.
        device: The device that a run uses.
    """
    # `torch.manual_seed` also leaves a seed for every kind of device that is not in use yet, with the text of the whole
    # call stack, which takes a millisecond.
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
