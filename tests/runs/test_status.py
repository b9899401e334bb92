import json
import os
import socket
import subprocess
import sys

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
