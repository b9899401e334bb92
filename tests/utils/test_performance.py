"""Page faults are counted in processes of their own, which do not import PyTorch."""

import os
import platform
import subprocess
import sys

import pytest

from odcheap.utils.performance import SHORT_WAIT, describe_load, shorten_waiting

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.fixture
def unset(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


def test_waiting_threads_sleep_soon(unset):
    shorten_waiting()
    assert {name: os.environ[name] for name in SHORT_WAIT} == SHORT_WAIT


@pytest.mark.parametrize("name", NAMES)
def test_a_value_of_the_user_stays(unset, monkeypatch, name):
    monkeypatch.setenv(name, "7")
    shorten_waiting()
    assert {own: os.environ.get(own) for own in NAMES} == dict.fromkeys(NAMES) | {name: "7"}


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("odcheap.cli", ["train", "num_stu=1", "data=digits", "data.batch_size=0"]),
        ("odcheap.bench", ["num_stu=1"]),
        ("odcheap.export", ["."]),
    ],
)
def test_it_is_set_before_torch_is_imported(unset, module, arguments):
    """The library reads it when it is loaded. `odcheap report` needs no PyTorch."""
    code = f"""
import os, runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            assert os.environ.get("GOMP_SPINCOUNT") == "1000"
            sys.exit("torch")
sys.meta_path.insert(0, Finder())
sys.argv = ["x", *{arguments!r}]
if {module!r} == "odcheap.cli":
    import odcheap.cli
    odcheap.cli.main()
else:
    runpy.run_module({module!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stderr == "torch\n"


def test_a_busy_machine_is_named(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (7.25, 1.0, 1.0))
    expected = "the 2 cores of this machine are busy (load 7.2), so the run takes longer; "
    assert describe_load(2) == f"{expected}OMP_NUM_THREADS=1 is often faster then"
    assert describe_load(1) == f"{expected}fewer runs at a time help"
    monkeypatch.setattr(os, "getloadavg", lambda: (2.5, 9.0, 9.0))
    assert describe_load(2) is None


SCRIPT = """
import resource, sys
from odcheap.utils.performance import keep_freed_memory
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_that_was_freed_is_used_again_without_page_faults():
    assert count_faults()[1] > 4000
    changed, faults = count_faults("keep")
    assert changed == "True"
    assert faults < 100


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_the_users_own_settings_stay():
    changed, faults = count_faults("keep", MALLOC_TRIM_THRESHOLD_="100000", MALLOC_MMAP_THRESHOLD_="100000")
    assert changed == "False"
    assert faults > 4000
