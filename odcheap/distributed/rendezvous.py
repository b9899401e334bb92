"""Forms the process group of processes that torchrun has started, also after torchrun has restarted them."""

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

    torchrun keeps its store when it restarts the processes, with the addresses of the dead ones in it. The new
    processes therefore agree on a new prefix for their keys. (The count of restarts differs between machines.)

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
    """Raises `Failure` in every process unless all have read a checkpoint of the same epoch and step."""
    extremes = torch.tensor([epoch, -epoch, step, -step])  # the maximum of a negative number gives the minimum
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
    last_epoch, first_epoch, last_step, first_step = (int(value) for value in extremes)
    if (last_epoch, last_step) != (-first_epoch, -first_step):
        places = f"epochs {-first_epoch} to {last_epoch}, steps {-first_step} to {last_step}"
        cause = "the file system may show new files late; the same command continues"
        raise Failure(f"resume: the processes have read different checkpoints ({places}); {cause}")


def agree_on_prefix(store: dist.Store, rank: int, world_size: int, seconds: float) -> str:
    """Returns a prefix that all living processes share and that no dead process has used.

    Process 0 writes a new random word, the question. Each other process answers with a random word of its own, which a
    dead process cannot do. Process 0 then writes the answers that it has received. A process that finds its own answer
    among them uses the question as the prefix.

    Args:
        store: The store of all processes, including dead ones.
        rank: This process's rank.
        world_size: Number of processes.
        seconds: The time to wait for the other processes.

    Raises:
        Failure: The others did not answer in time.
    """
    own_word, end = uuid.uuid4().hex, time.monotonic() + seconds
    if rank == 0:
        store.set("question", own_word)
        answers = [wait_for_key(store, f"{own_word}/answer/{other}", end) for other in range(1, world_size)]
        store.set(f"{own_word}/answers", ",".join(answers))
        return own_word

    # The question may be one of a dead process 0 and change, so it is read again until the answers contain our own.
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
    """Returns the key's value as soon as it is set. Raises `Failure` if that is not before the time `end`."""
    while not store.check([key]):
        if time.monotonic() > end:
            raise Failure(f"trainer: process 0 got no answer from process {key.rpartition('/')[2]}")
        time.sleep(POLL_SECONDS)
    return store.get(key).decode()
