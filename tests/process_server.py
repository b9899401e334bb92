"""Processes for tests that are forked from one that has imported PyTorch, Lightning and Hydra.

A start of `train.py` takes five seconds of processor time, nearly all of it for these imports; a run of two processes
has four such starts. A forked process has the rest of what a started one has: parent, process id, session, signals,
locks, output, exit status, and it imports odcheap itself. Tests of a start (imports, an installation) start Python.

A server forks them. It has one thread and has computed nothing, so that it can be forked. Each of its processes has a
server of its own, forked before anything else happens, for the processes that it starts: torchrun, ranks.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path
from unittest import mock

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "20"}
# scikit-learn imports Arrow, which would start a thread. The packages below start none if OMP_NUM_THREADS is 1.
SERVER_ENVIRONMENT = ONE_THREAD | {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
PACKAGES = (
    "pytorch_lightning",
    "hydra",
    "pydantic.type_adapter",
    "sklearn.datasets",
    "rich.table",
    "safetensors.torch",
)
READ_AT_START = ("OMP_NUM_", "MKL_", "PYTHON", "LD_", "MALLOC_", "GLIBC_")  # environment variables, but PYTHONPATH
ROOM = 2**14  # bytes of a process's command line, which `ps` and `pgrep` read
SET_CHILD_SUBREAPER = 36  # from Linux' prctl.h
start_python = subprocess._fork_exec


def popen(command, **given):
    """`subprocess.Popen` for a command of Python."""
    if sys.platform != "linux":
        return subprocess.Popen(command, **given)
    with mock.patch.object(subprocess, "_fork_exec", Starter(start_server())):
        return subprocess.Popen(command, **given)


@cache
def start_server():
    """Starts the server of this test process, and returns the socket of its requests. Its end is the server's."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        command = [sys.executable, __file__, str(its.fileno()), "x" * ROOM]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "start_new_session": True}
        server = subprocess.Popen(command, env=SERVER_ENVIRONMENT, pass_fds=[its.fileno()], **quiet)
    server.returncode = 0  # nobody waits for it
    return ours


class Starter:
    """Called by `subprocess.Popen` to start a process, in place of the function of C that it has for this."""

    def __init__(self, server):
        self.server = server
        # The new process is the server's grandchild: its parent ends, and then it is a child of this process.
        ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def __call__(self, arguments, *given):
        environment = os.environb if given[4] is None else dict(entry.split(b"=", 1) for entry in given[4])
        environment = {os.fsdecode(name): os.fsdecode(value) for name, value in environment.items()}
        command = [os.fsdecode(argument) for argument in arguments]
        read_at_start = {
            name
            for name in environment | SERVER_ENVIRONMENT
            if name.startswith(READ_AT_START) and environment.get(name) != SERVER_ENVIRONMENT.get(name)
            if name != "PYTHONPATH"
        }
        program = command[2] if command[1] == "-u" else command[1]
        is_ours = command[0] == sys.executable and (program == "-m" or program.endswith("/train.py"))
        if not is_ours or read_at_start:
            return start_python(arguments, *given)
        request = {"command": command[1:], "environment": environment, "parent": os.getpid()}
        request |= {"cwd": os.fsdecode(given[3] or os.getcwd()), "has_session": given[14]}
        files = [given[k] if given[k] != -1 else target for target, k in enumerate((5, 8, 10))]
        answer, its_answer = os.pipe()
        socket.send_fds(self.server, [json.dumps(request).encode()], [*files, its_answer])
        os.close(its_answer)
        with open(answer) as file:
            return int(file.read())


def serve(requests):
    """Returns a request in a new process, once for each request; the server ends when there are no more."""
    while (received := socket.recv_fds(requests, 2**20, 4))[0]:
        tasks = os.listdir("/proc/self/task")
        assert len(tasks) == 1, f"a process of {len(tasks)} threads cannot be forked"
        files = received[1]
        if (between := os.fork()) == 0:
            if os.fork() != 0:
                os._exit(0)
            begin(request := json.loads(received[0]), *files)
            return request
        os.waitpid(between, 0)
        for file in files:
            os.close(file)
    os._exit(0)


def begin(request, *files):
    """Gives this process the parent, session, streams, environment and working directory of the request."""
    while os.getppid() != request["parent"]:
        time.sleep(0.001)
    if request["has_session"]:
        os.setsid()
    *streams, answer = files
    for target, file in enumerate(streams):
        os.dup2(file, target)
    os.write(answer, str(os.getpid()).encode())
    for file in files:
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    given = [path for path in sys.path[1:] if path not in list_paths(SERVER_ENVIRONMENT)]
    sys.path[1:] = [*list_paths(os.environ), *given]
    rank = [f"RANK={os.environ['RANK']}"] if "RANK" in os.environ else []  # for tests, which cannot read it elsewhere
    set_command_line([*rank, sys.executable, *request["command"]])


def list_paths(environment):
    """Returns the folders of PYTHONPATH, in which a process finds the packages that its server has not imported."""
    return [os.path.abspath(path) for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]


def set_command_line(words):
    """Writes them over the words with which the server was started."""
    start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    line = b"".join(os.fsencode(word) + b"\0" for word in words)
    ctypes.memmove(start, line[: end - start - 1].ljust(end - start, b"\0"), end - start)


def main():
    """The server, and then each of its processes."""
    for name in PACKAGES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the memory of what is imported then stays common to all processes
    its = socket.socket(fileno=int(sys.argv[1]))
    while True:
        with its:
            request = serve(its)
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() != 0:
            break
        # The server of this process, in which the loop goes on.
        ours.close()
        os.setsid()
        set_command_line(["process_server"])
        nothing = os.open(os.devnull, os.O_RDWR)
        for target in range(3):
            os.dup2(nothing, target)
        os.close(nothing)
    its.close()
    subprocess._fork_exec = Starter(ours)
    exit_status = 1
    try:
        run(request["command"])
        exit_status = 0
    except SystemExit as stop:
        exit_status = stop.code or 0
        if not isinstance(exit_status, int):
            exit_status = print(exit_status, file=sys.stderr) or 1
    except BaseException:
        traceback.print_exc()
    # As Python ends, but without freeing what is imported, which takes long.
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(exit_status)


def run(command):
    if command[0] == "-u":
        sys.stdout.reconfigure(line_buffering=True)
        command = command[1:]
    if command[0] == "-m":
        sys.argv, sys.path[0] = command[1:], os.getcwd()
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = command, str(Path(command[0]).parent)
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main()
