import subprocess
import sys
import textwrap
import time

import pytest
from process_server import ONE_THREAD, popen


def agent(tmp_path, worker):
    """Two processes of this worker under the agent; what stands before its first line is known to it."""
    command = command_of_agent(tmp_path, worker)
    return popen(command, env=ONE_THREAD, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def command_of_agent(tmp_path, worker):
    script = tmp_path / "worker.py"
    script.write_text("import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + textwrap.dedent(worker))
    return [sys.executable, "-m", "odcheap.distributed.torchrun", "--standalone", "--nproc-per-node=2", str(script)]


@pytest.mark.parametrize(
    ("worker", "status", "line"),
    [
        ("", 0, ""),
        ("sys.exit(3 * rank)", 1, "error: process 1 ended with status 3; the others were stopped\n"),
        ("rank or os.kill(os.getpid(), signal.SIGKILL)", 1, "error: process 0 was killed by SIGKILL (out of memory?)"),
        ("sys.exit(143)", 143, ""),
    ],
)
def test_how_the_processes_ended_is_said_in_one_line(tmp_path, worker, status, line):
    with agent(tmp_path, worker) as running:
        said = running.stderr.read()
        assert running.wait(timeout=60) == status
    assert said.startswith(line)
    assert said.count("\n") == bool(line)


def test_the_processes_end_in_order_when_their_starter_is_gone(tmp_path):
    waits = f"""
        def left(*_):
            open(r"{tmp_path}/left" + str(rank), "w").close()
            sys.exit(143)
        signal.signal(signal.SIGTERM, left)
        open(r"{tmp_path}/here" + str(rank), "w").close()
        time.sleep(60)
    """
    script = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    command = [sys.executable, "-c", script, *command_of_agent(tmp_path, waits)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as starter:
        while len(list(tmp_path.glob("here*"))) < 2:
            time.sleep(0.1)
        starter.kill()
        starter.stderr.read()  # the agent and its processes hold the pipe, so they have ended
    assert len(list(tmp_path.glob("left*"))) == 2
