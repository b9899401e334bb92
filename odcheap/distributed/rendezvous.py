"""How the processes that torchrun starts find each other, also after some have died and all were started again."""

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
    """Makes the process group of torchrun's environment.

    torchrun's store outlives a restart, and the addresses of dead processes stay in it. The processes therefore use
    keys with a prefix of their own. (The count of restarts is no such prefix: it differs between machines.)

    Args:
        backend: "gloo" or "nccl".

    Raises:
        Failure: The other processes do not arrive in time.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_master = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and rank == 0
    store = dist.TCPStore(address, port, world_size, is_master=is_master, wait_for_workers=False, multi_tenant=True)
    prefix = agree_on_prefix(store, rank, world_size, TIMEOUT.total_seconds())
    dist.init_process_group(backend, store=dist.PrefixStore(prefix, store), rank=rank, world_size=world_size)


def check_same_start(epoch: int, step: int, group: "dist.ProcessGroup | None") -> None:
    """Raises `Failure` in every process unless all begin at the same epoch and step: each has read its checkpoint."""
    place = torch.tensor([epoch, -epoch, step, -step])
    dist.all_reduce(place, dist.ReduceOp.MAX, group)
    last_epoch, first_epoch, last_step, first_step = (int(value) for value in place)
    if (last_epoch, last_step) != (-first_epoch, -first_step):
        found = f"epochs {-first_epoch} to {last_epoch}, steps {-first_step} to {last_step}"
        cause = "a file system that shows new files late? The same command again continues"
        raise Failure(f"resume: the processes have found different checkpoints ({found}); {cause}")


def agree_on_prefix(store: dist.Store, rank: int, world_size: int, seconds: float) -> str:
    """Returns a text that all living processes share and that no dead process has used.

    Process 0 asks with a new word; each other process answers with a new word of its own, which a dead process cannot
    do. Process 0 then shows whose answers it has, and a process that finds its own there takes part.

    Args:
        store: The store of all processes, dead ones included.
        rank: This process's rank.
        world_size: Number of processes.
        seconds: How long to wait.

    Raises:
        Failure: The others did not answer in time.
    """
    own_word, end = uuid.uuid4().hex, time.monotonic() + seconds
    if rank == 0:
        store.set("question", own_word)
        answers = [wait_for_key(store, f"{own_word}/answer/{other}", end) for other in range(1, world_size)]
        store.set(f"{own_word}/answers", ",".join(answers))
        return own_word
    question = ""
    while time.monotonic() < end:
        asked = store.get("question").decode() if store.check(["question"]) else ""
        if asked != question:
            question = asked
            store.set(f"{question}/answer/{rank}", own_word)
        if question and store.check([f"{question}/answers"]) and own_word in store.get(f"{question}/answers").decode():
            return question
        time.sleep(POLL_SECONDS)
    raise Failure(f"trainer: process {rank} of {world_size} waited {seconds:.0f} s in vain for process 0")


def wait_for_key(store: dist.Store, key: str, end: float) -> str:
    """Returns the key's value as soon as it is set. Raises `Failure` at the time `end`."""
    while not store.check([key]):
        if time.monotonic() > end:
            raise Failure(f"trainer: process 0 waited in vain for process {key.rpartition('/')[2]}")
        time.sleep(POLL_SECONDS)
    return store.get(key).decode()
