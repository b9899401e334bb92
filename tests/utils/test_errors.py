import errno
import pickle

import pytest
import torch

from odcheap.utils.errors import Failure, OptionError, describe_external_failure

NUMBERS = [errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EBUSY, errno.ETIMEDOUT, errno.EPERM, errno.EFBIG, errno.EISDIR]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: not enough memory: you tried to allocate"
        ),
    ],
)
def test_out_of_memory_says_what_to_lower(error):
    assert describe_external_failure(error).startswith("out of memory on ")
    assert "lower data.batch_size or num_stu" in describe_external_failure(error)


def test_pytorch_itself_is_understood():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert describe_external_failure(caught.value).startswith("out of memory on this machine")


@pytest.mark.parametrize(
    "number",
    NUMBERS,
)
def test_a_disk_that_fails_is_named(number):
    line = describe_external_failure(OSError(number, "words", "/some/file"))
    assert line.startswith("/some/file: words: cannot be written")


def test_a_lost_process_is_one_only_where_there_are_several(monkeypatch):
    error = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3443")
    assert describe_external_failure(error) is None
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert "another process of this run has ended" in describe_external_failure(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("x"), FileNotFoundError(2, "no", "x")])
def test_a_mistake_keeps_its_traceback(error):
    assert describe_external_failure(error) is None


def test_an_option_error_is_one_line_and_survives_pickling():
    error = pickle.loads(pickle.dumps(OptionError("num_stu", 0, "must be 1 or more")))
    assert str(error) == "num_stu=0: must be 1 or more"
    assert isinstance(error, (Failure, ValueError))
