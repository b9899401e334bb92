"""Random streams: a random number depends only on the seed of the run and on the purpose for which it is drawn.

A stream is named by strings and integers, such as ("student", 3) for the initial weights of student 3.
"""

import hashlib
from collections.abc import Generator
from contextlib import contextmanager

import torch


def derive_seed(seed: int, *stream: str | int) -> int:
    """Returns the seed of a random stream, a 63-bit number that depends on all arguments.

    Args:
        seed: The seed of the run.
        *stream: The name of the stream.

    Example:
        >>> derive_seed(0, "student", 0) == derive_seed(0, "student", 0)
        True
        >>> derive_seed(0, "student", 0) == derive_seed(0, "student", 1)
        False
    """
    digest = hashlib.blake2b(repr((seed, *stream)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def make_generator(seed: int, *stream: str | int) -> torch.Generator:
    """Returns a CPU generator of the random numbers of a stream; see `derive_seed` for the arguments."""
    return torch.Generator().manual_seed(derive_seed(seed, *stream))


@contextmanager
def temporary_seed(seed: int, *stream: str | int) -> Generator[None]:
    """A context manager in which PyTorch's CPU generator draws the random numbers of a stream.

    The state of the generator is restored afterwards. See `derive_seed` for the arguments.
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
