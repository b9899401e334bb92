import os
import subprocess
import sys

import pytest

from odcheap.utils.threads import SHORT_WAIT, describe_load, shorten_waiting

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
