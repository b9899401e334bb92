"""How the processes that torchrun starts find each other, also after some of them have died and were started anew."""

import os
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

from odcheap.utils.errors import Failure

POLL = 0.02  # seconds
LIMIT = timedelta(minutes=10)


def join(backend: str) -> None:
    """Makes the process group of torchrun's environment, in a room of the store that only this attempt's processes use.

    torchrun's store outlives an attempt, and the addresses of its dead processes stay in it; its own count of restarts
    differs from machine to machine. Raises `Failure` where the others do not come.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and rank == 0
    store = dist.TCPStore(address, port, world, is_master=hosts, wait_for_workers=False, multi_tenant=True)
    room = agree(store, rank, world, LIMIT.total_seconds())
    dist.init_process_group(backend, store=dist.PrefixStore(room, store), rank=rank, world_size=world)


def refuse_apart(epoch: int, step: int, group: dist.ProcessGroup | None) -> None:
    """`Failure` in every process where they do not all begin at the same place: each has looked for its checkpoint."""
    place = torch.tensor([epoch, -epoch, step, -step])
    dist.all_reduce(place, dist.ReduceOp.MAX, group)
    last, first, most, least = place.tolist()
    if (last, most) != (-first, -least):
        where = f"epochs {-first} to {last}, steps {-least} to {most}"
        allowed = "a file system that shows new files late? The same command again continues"
        raise Failure(f"resume: the processes have found different checkpoints ({where}); {allowed}")


def agree(store: dist.Store, rank: int, world: int, seconds: float) -> str:
    """A name that all living processes share and that no dead one has used.

    Rank 0 asks with a new word; each other answers it with a new word of its own, which a dead process cannot do; rank
    0 then shows whose answers it has, and who finds its own there is in.
    """
    mine, end = uuid.uuid4().hex, time.monotonic() + seconds
    if rank == 0:
        store.set("question", mine)
        answers = [wait_for(store, f"{mine}/answer/{other}", end) for other in range(1, world)]
        store.set(f"{mine}/answers", ",".join(answers))
        return mine
    question = ""
    while time.monotonic() < end:
        asked = store.get("question").decode() if store.check(["question"]) else ""
        if asked != question:
            question = asked
            store.set(f"{question}/answer/{rank}", mine)
        if question and store.check([f"{question}/answers"]) and mine in store.get(f"{question}/answers").decode():
            return question
        time.sleep(POLL)
    raise Failure(f"trainer: process {rank} of {world} waited {seconds:.0f} s in vain for process 0")


def wait_for(store: dist.Store, key: str, end: float) -> str:
    while not store.check([key]):
        if time.monotonic() > end:
            raise Failure(f"trainer: process 0 waited in vain for process {key.rpartition('/')[2]}")
        time.sleep(POLL)
    return store.get(key).decode()
