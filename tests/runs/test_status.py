import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from odcheap.runs import status


def test_a_word_names_the_process(tmp_path):
    status.write_status(tmp_path, "failed", "no such data")
    word = json.loads((tmp_path / status.FILE_NAME).read_text())
    assert word == {"state": "failed", "reason": "no such data", "host": socket.gethostname(), "pid": os.getpid()}


def test_the_dead_are_told_from_the_living():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    here = socket.gethostname()
    assert status.is_alive({"host": here, "pid": os.getpid()})
    assert not status.is_alive({"host": here, "pid": done.pid})
    assert status.is_alive({"host": "elsewhere", "pid": done.pid})


def test_the_lock_is_released_although_a_forked_process_has_inherited_it(tmp_path):
    with status.lock_folder(tmp_path):
        found = Path("/proc/self/fd").iterdir()
        own = next(int(fd.name) for fd in found if fd.exists() and fd.readlink() == tmp_path / status.LOCK)
        inherited = os.dup(own)  # what a fork does
    try:
        with status.lock_folder(tmp_path):
            pass
    finally:
        os.close(inherited)
