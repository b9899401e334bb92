"""Forms the process group of the processes that torchrun has started, even if torchrun has restarted them."""

import os
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

from odcheap.utils.errors import Failure

POLL_SECONDS = 0.02
TIMEOUT = timedelta(minutes=10)


def join_process_group(backend: str) -> None:
    """Forms the process group that torchrun's environment variables describe.

    The processes find each other by a key-value store. When torchrun restarts the processes, it keeps this store, which
    then contains the addresses of dead processes. Therefore the new processes agree on a new prefix for their keys.

    Args:
        backend: "gloo" or "nccl".

    Raises:
        Failure: The other processes do not answer in time.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_master = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and rank == 0
    store = dist.TCPStore(address, port, world_size, is_master=is_master, wait_for_workers=False, multi_tenant=True)
    prefix = agree_on_prefix(store, rank, world_size, TIMEOUT.total_seconds())
    dist.init_process_group(backend, store=dist.PrefixStore(prefix, store), rank=rank, world_size=world_size)


def check_same_start(epoch: int, step: int, group: "dist.ProcessGroup | None") -> None:
    """Raises `Failure` if the processes continue from different checkpoints; every process must call this.

    Args:
        epoch: The epoch of the checkpoint that this process has read.
        step: The optimizer step of this checkpoint.
        group: The process group in which the processes compare both numbers; None for the default group.
    """
    extremes = torch.tensor([epoch, -epoch, step, -step])  # the maximum of a negative number gives the minimum
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
    last_epoch, first_epoch, last_step, first_step = (int(value) for value in extremes)
    if (last_epoch, last_step) != (-first_epoch, -first_step):
        # On the screen epochs are counted from 1.
        places = f"epochs {1 - first_epoch} to {last_epoch + 1}, steps {-first_step} to {last_step}"
        cause = "the file system may show new files late; the same command continues"
        raise Failure(f"resume: the processes have read different checkpoints ({places}); {cause}")


def agree_on_prefix(store: dist.Store, rank: int, world_size: int, seconds: float) -> str:
    """Agrees with the other living processes on a new prefix for keys in the store, and returns it.

    Process 0 writes a new random word, the question, into the store. Each other process answers with a random word of
    its own. Process 0 then writes the list of all answers that it has received. A process that finds its own answer in
    the list knows that the question is not from a dead process 0, and uses the question as the prefix.

    Args:
        store: The key-value store of all processes; dead processes may have written into it, too.
        rank: The number of this process, from 0.
        world_size: The number of processes.
        seconds: The longest time to wait for the other processes, in seconds.

    Raises:
        Failure: Another process did not answer in time.
    """
    own_word, end = uuid.uuid4().hex, time.monotonic() + seconds
    if rank == 0:
        store.set("question", own_word)
        answers = [wait_for_key(store, f"{own_word}/answer/{other}", end) for other in range(1, world_size)]
        store.set(f"{own_word}/answers", ",".join(answers))
        return own_word

    # The question may be from a dead process 0, and then change: it is read again until the answers contain our own.
    question = ""
    while time.monotonic() < end:
        asked = store.get("question").decode() if store.check(["question"]) else ""
        if asked != question:
            question = asked
            store.set(f"{question}/answer/{rank}", own_word)
        if question and store.check([f"{question}/answers"]) and own_word in store.get(f"{question}/answers").decode():
            return question
        time.sleep(POLL_SECONDS)
    raise Failure(f"trainer: process {rank} of {world_size} waited {seconds:.0f} s for process 0, without an answer")


def wait_for_key(store: dist.Store, key: str, end: float) -> str:
    """Waits until a key of the store is set, and returns its value.

    Args:
        store: The key-value store of all processes.
        key: The key, which ends with the number of the process that sets it, such as "WORD/answer/3".
        end: The time at which the wait ends, as a value of `time.monotonic()`.

    Raises:
        Failure: The key was not set in time.
    """
    while not store.check([key]):
        if time.monotonic() > end:
            raise Failure(f"trainer: process 0 got no answer from process {key.rpartition('/')[2]}")
        time.sleep(POLL_SECONDS)
    return store.get(key).decode()
