"""Handles signals that stop a run, such as SIGTERM.

In the training, `training.callbacks.Interruption` then lets all processes finish the current step and save.
"""

import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from odcheap.distributed import cluster
from odcheap.runs import status
from odcheap.runs.folder import is_run_folder, list_checkpoints
from odcheap.utils.console import process_rank
from odcheap.utils.errors import Failure, OptionError, describe_external_failure, first_line
from odcheap.utils.signals import STOP_SIGNALS

# submitit sends this signal before the time of a job ends. Its own handler then requeues the job.
SUBMITIT_SIGNAL = signal.SIGUSR2
REPEAT_SECONDS = 1.0  # the same signal within this time counts once
WAIT_SECONDS = 20.0  # after a signal, the longest time without a batch; Slurm kills a job 30 s after SIGTERM
POLL_SECONDS = 0.5


class Stopped(SystemExit):
    """The exception that ends the process after a signal, with an exit status of 128 + the number of the signal.

    Args:
        signum: The number of the signal.
    """

    # In a process of joblib a run returns this exception: if the run raised it, joblib would end the other processes at
    # once, and they could not save. The sweeper of Optuna converts the value of a run to a float. This raises the
    # exception in the process that has started the others, so that the run does not count as a failed trial.

    def __init__(self, signum: int):
        super().__init__(signum)  # sets `args`, from which pickle builds the exception again in another process
        self.code, self.signum, self.name = 128 + signum, signum, signal.Signals(signum).name

    def __float__(self) -> float:
        raise self


class SignalListener:
    """A context manager that handles SIGTERM, SIGINT, SIGUSR1 and SIGHUP.

    The first signal raises `Stopped`, except in two cases. During a training (after `defer`) the signal is only stored
    in `received`, and the callback `Interruption` raises `Stopped` after the training step. In the context of
    `forward_to`, where another process does the work, the signal is forwarded to that process.

    A second signal ends the process at once. If the same signal arrives twice within a second, it counts once, since a
    process may get it both from its parent and as a member of its process group. If SIGHUP was ignored before, as by
    `nohup`, it stays ignored.

    A training step cannot end if the data loader yields no batch. Therefore `Stopped` is raised at once if no batch
    comes within `WAIT_SECONDS` after a signal.

    Attributes:
        received: The number of the signal that has arrived; 0 if there is none.
        is_deferred: Whether a signal is only stored until the training step ends.
        waiting_since: The value of `time.monotonic()` since which the training has been waiting for a batch; None while
            it computes.
        has_given_up: Whether the run was stopped because no batch came.
    """

    def __init__(self) -> None:
        self.received, self.is_deferred, self.received_at = 0, False, 0.0
        self.waiting_since: float | None = None
        self.has_given_up = False
        self.worker: subprocess.Popen | None = None
        self.had_worker = False
        self.owner_pid = os.getpid()
        self.submitit_requeues = False
        self.previous_handlers: dict[int, Any] = {s: signal.getsignal(s) for s in (*STOP_SIGNALS, SUBMITIT_SIGNAL)}

    def __enter__(self) -> "SignalListener":
        self.install_handlers()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if not self.received:  # otherwise the handlers stay, for a second signal
            set_handlers(self.previous_handlers)
        elif kind is None:  # the signal arrived after the last step
            raise Stopped(self.received)

    def install_handlers(self) -> None:
        """Installs the signal handlers. Call it again when Lightning has replaced the handlers."""
        is_nohup = self.previous_handlers[signal.SIGHUP] is signal.SIG_IGN
        set_handlers({s: self.handle for s in STOP_SIGNALS if not (s == signal.SIGHUP and is_nohup)})
        if callable(self.previous_handlers[SUBMITIT_SIGNAL]):
            set_handlers({SUBMITIT_SIGNAL: self.handle_submitit})

    def defer(self) -> None:
        """Lets later signals stop the run only at the end of a training step; call it when the training starts."""
        self.is_deferred = True
        threading.Thread(target=self.watch_waiting, daemon=True).start()

    def watch_waiting(self) -> None:
        """Interrupts the training if no batch comes within `WAIT_SECONDS` after a signal; it runs in a thread."""
        # The main thread may be blocked in the data loader: the same signal, sent to it once more, interrupts it.
        while self.is_deferred:
            since = self.waiting_since
            if self.received and since is not None:
                has_given_up = time.monotonic() - max(since, self.received_at) > WAIT_SECONDS
                if has_given_up and not self.has_given_up:
                    self.has_given_up = True
                    signal.pthread_kill(threading.main_thread().ident or 0, self.received)
            time.sleep(POLL_SECONDS)

    def handle(self, signum: int, _: FrameType | None) -> None:
        if os.getpid() != self.owner_pid:  # a worker of the data loader, which its owner will stop
            return
        if self.has_given_up and self.is_deferred:
            self.is_deferred = False
            raise Stopped(self.received)
        if signum == self.received and time.monotonic() < self.received_at + REPEAT_SECONDS:
            return
        if self.worker is not None:
            # torchrun forwards these two on every system; the processes name the signal that they get.
            self.worker.send_signal(signum if signum == signal.SIGINT else signal.SIGTERM)
        elif self.received:
            os._exit(128 + signum)
        self.received, self.received_at = signum, time.monotonic()
        if not self.is_deferred and self.worker is None:
            raise Stopped(signum)

    def handle_submitit(self, signum: int, _: FrameType | None) -> None:
        """Handles the signal that submitit sends before the time of a Slurm job ends.

        The run is stopped as by other signals, and `report_stop` then calls submitit's own handler, which requeues the
        job. Slurm may have sent SIGTERM before for the same reason, so here a second signal does not end the process.
        """
        if os.getpid() != self.owner_pid:
            return
        self.submitit_requeues = True
        self.received = self.received or signum
        if self.worker is not None:
            self.worker.send_signal(signal.SIGTERM)
        elif not self.is_deferred:
            raise Stopped(self.received)

    @contextmanager
    def forward_to(self, worker: subprocess.Popen) -> Generator[None]:
        """A context manager that forwards signals to the process `worker`.

        If a signal has arrived, `Stopped` is raised at the end of the context.
        """
        self.worker, self.had_worker = worker, True
        try:
            yield
        finally:
            self.worker = None
        if self.received:
            raise Stopped(self.received)


def set_handlers(handlers: Mapping[int, Any]) -> None:
    """Sets the handler of each signal, by its number. In threads other than the main thread nothing happens."""
    # Python allows it in the main thread only.
    if threading.current_thread() is threading.main_thread():
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


@contextmanager
def report_stop(
    job_dir: Path, listener: SignalListener, may_requeue: bool, repeated: Sequence[str] = ()
) -> Generator[None]:
    """A context manager for a training, which tells the user how to continue if a signal stops the training.

    After `Stopped`, it writes the status "stopped", prints how to continue the run, and may requeue the Slurm job.
    After another exception, it changes the status "running" to "failed". In both cases the exception is raised again.

    Args:
        job_dir: The run's folder.
        listener: The listener that receives signals.
        may_requeue: True to requeue the Slurm job, which starts the same command again. Pass False if the command would
            not continue the run but start it anew, as with `overwrite=true`.
        repeated: Overrides that are printed as a part of the command to continue, since checkpoints do not restore
            them, such as those of loggers.
    """
    try:
        yield
    except Stopped as stop:
        if process_rank() == 0:
            _report_stop(stop, job_dir, listener, may_requeue, repeated)
        raise
    except Exception as error:
        if process_rank() == 0:
            _report_failure(error, job_dir)
        raise


def _report_failure(error: Exception, job_dir: Path) -> None:
    """Changes the status "running" of a run to "failed", unless another living process is running it."""
    with suppress(OSError, LookupError, TypeError, ValueError):  # the cause may be that the folder cannot be written
        last = status.read_status(job_dir)
        if last.get("state") == "running" and (last.get("pid") == os.getpid() or not status.is_alive(last)):
            line = str(error) if isinstance(error, Failure) else describe_external_failure(error)
            status.write_status(job_dir, "failed", line or f"{type(error).__name__}: {first_line(error)}")


def _report_stop(
    stop: Stopped, job_dir: Path, listener: SignalListener, may_requeue: bool, repeated: Sequence[str]
) -> None:
    """Writes the status "stopped", prints how to continue the run, and may requeue the Slurm job; see `report_stop`."""
    # The run may have been stopped before its folder was made, and processes that this one started may have reported.
    is_run = is_run_folder(job_dir)
    is_reported = is_run and listener.had_worker and status.read_status(job_dir).get("state") == "stopped"
    if not is_reported:
        if is_run:
            with suppress(OptionError), status.lock_folder(job_dir):  # another process may train there
                status.write_status(job_dir, "stopped", stop.name)
        again = " ".join([f"resume={job_dir}", *map(shlex.quote, repeated)])
        text = f"saved; {again} continues" if list_checkpoints(job_dir) else "nothing was saved yet"
        requeues = may_requeue and stop.signum != signal.SIGINT and not listener.submitit_requeues
        hint = " (no batch of images came; see data.workers and /dev/shm)" if listener.has_given_up else ""
        print(f"{stop.name}{hint}: {text}{cluster.requeue_job() if requeues else ''}", flush=True)
    if listener.submitit_requeues:  # submitit's own handler requeues the job; in the job's first process it also exits
        listener.previous_handlers[SUBMITIT_SIGNAL](SUBMITIT_SIGNAL, None)
