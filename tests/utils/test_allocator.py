"""Page faults are counted in processes of their own, which do not import PyTorch."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
SCRIPT = """
import resource, sys
from odcheap.utils.allocator import keep_freed_memory
changed = keep_freed_memory() if "keep" in sys.argv else None
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytes([1]) * 2**23 for _ in range(4)]
    del blocks
print(changed, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_faults(*arguments, **environment):
    """Returns what `keep_freed_memory` returned, and the page faults of 32 MiB that are taken for the third time."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | environment
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], env=own, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    changed, faults = done.stdout.split()
    return changed, int(faults)


def test_memory_that_was_freed_is_used_again_without_page_faults():
    assert count_faults()[1] > 4000
    changed, faults = count_faults("keep")
    assert changed == "True"
    assert faults < 100


def test_the_users_own_settings_stay():
    changed, faults = count_faults("keep", MALLOC_TRIM_THRESHOLD_="100000", MALLOC_MMAP_THRESHOLD_="100000")
    assert changed == "False"
    assert faults > 4000
