"""What befalls a run from outside, told in one line: no memory left, a disk that fails, another process that died."""

import errno
import re

import torch

from odcheap.utils.errors import first_line

LOWER = "lower data.batch_size or num_stu, or try trainer.precision=bf16-mixed"
GOES_ON = "what was saved before is whole, and resume=auto continues it"
NO_MEMORY = re.compile(r"not enough memory|can't allocate memory|out of memory", re.IGNORECASE)
LOST = re.compile(r"connection (closed|reset)|broken pipe|socket closed|timed out|remote process exited", re.IGNORECASE)


def line_of(error: BaseException) -> str | None:
    """None where the error is something else, such as a mistake in the code."""
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(text)):
        where = "on the GPU" if isinstance(error, torch.OutOfMemoryError) else "on this machine"
        return f"out of memory {where}: {LOWER}; {GOES_ON}"
    if isinstance(error, RuntimeError) and torch.distributed.is_initialized() and LOST.search(text):
        return f"another process of this run is gone, its own line says why ({first_line(error)}); {GOES_ON}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}: cannot be written or read; {GOES_ON}"
    return None
