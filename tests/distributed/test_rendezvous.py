import os
import random
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ONE_THREAD, TINY, free_port
from process_server import popen

import train
from odcheap.distributed import rendezvous
from odcheap.distributed.rendezvous import agree_on_prefix, join_process_group
from odcheap.training.callbacks import Interruption
from odcheap.utils.errors import Failure


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)


def client(store):
    return dist.TCPStore("127.0.0.1", store.port, 1, is_master=False, timeout=timedelta(seconds=20))


def together(store, world, order):
    """The room that each process finds, when they come in this order."""
    found = {}

    def come(rank):
        found[rank] = agree_on_prefix(client(store), rank, world, 20)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in order]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert found.keys() == set(range(world))
    return set(found.values())


def test_all_meet_in_one_room_and_no_attempt_in_that_of_an_earlier_one(store):
    rooms = [together(store, 3, order) for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1))]
    assert [len(room) for room in rooms] == [1, 1, 1, 1]
    assert len(set.union(*rooms)) == 4


def test_whoever_died_while_waiting_is_not_waited_for(store):
    """A first attempt loses process 0, then one loses process 1 after its answer; the third finds together."""
    with pytest.raises(Failure, match="process 1 of 2 waited 0 s for process 0"):
        agree_on_prefix(store, 1, 2, 0.1)
    with pytest.raises(Failure, match="process 0 got no answer from process 1"):
        agree_on_prefix(store, 0, 2, 0.1)
    with pytest.raises(Failure):  # it answers the question of a process 0 that has gone
        agree_on_prefix(store, 1, 2, 0.3)
    assert len(together(store, 2, (1, 0))) == 1


def test_each_attempt_has_a_room_of_its_own_in_torchrun_s_store(store, monkeypatch):
    rooms = []
    monkeypatch.setattr(
        "odcheap.distributed.rendezvous.dist.init_process_group", lambda *_, store, **__: rooms.append(store)
    )
    agent = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in (agent | {"RANK": "0", "WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        join_process_group("gloo")
    rooms[0].set("address", "of one that has died")
    assert not rooms[1].check(["address"])


def agents(job_dir, port, restarts, epochs, cwd, count=2):
    """Agents of torchrun, as on so many machines, with two processes together."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={count}", f"--nproc-per-node={2 // count}"]
    command += ["--rdzv-id=test"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--max-restarts={restarts}"]
    command += [train.__file__, *TINY, "trainer=multinode", "trainer.accelerator=cpu", f"trainer.max_epochs={epochs}"]
    command += [f"job_dir={job_dir}", "resume=auto", "checkpoint_every=0"]
    with open(f"{job_dir}.log", "a") as log:
        return [popen(command, stdout=log, stderr=log, cwd=cwd, env=ONE_THREAD) for _ in range(count)]


def worker(agent):
    """The agent's own worker, once it is there; None where the agent has ended."""
    while agent.poll() is None:
        found = subprocess.run(["pgrep", "-P", str(agent.pid), "-f", "train.py"], capture_output=True, text=True)
        if found.stdout:
            return int(found.stdout.split()[0])
        time.sleep(0.05)
    return None


def until_in(log, words):
    end = time.monotonic() + 120
    while words not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def run_with_kills(tmp_path, name, kills, epochs, dice):
    """Trains with two agents and kills a worker so many times at a random moment; the student's weights.

    Without kills, one agent is enough.
    """
    running = agents(tmp_path / name, free_port(), 2 * kills, epochs, tmp_path, count=2 if kills else 1)
    try:
        for attempt in range(kills):
            if attempt == 0:  # one kill for certain within the training
                until_in(tmp_path / f"{name}.log", "epoch 3/")
            time.sleep(dice.uniform(0, 1) if attempt == 0 else dice.uniform(0, 18))
            victim = worker(dice.choice(running))
            assert victim, "the run ended before all kills"
            os.kill(victim, signal.SIGKILL)
        assert {agent.wait(timeout=240) for agent in running} == {0}, (tmp_path / f"{name}.log").read_text()
    finally:
        for agent in running:
            agent.kill()
            agent.wait()
    return (tmp_path / name / "student.safetensors").read_bytes()


@pytest.mark.parametrize(("kills", "epochs"), [(1, 12), pytest.param(10, 400, marks=pytest.mark.slow)])
def test_a_run_of_two_agents_survives_its_workers_death_bit_for_bit(tmp_path, kills, epochs):
    dice = random.Random(kills)
    undisturbed = run_with_kills(tmp_path, "straight", 0, epochs, dice)
    assert run_with_kills(tmp_path, "killed", kills, epochs, dice) == undisturbed
    assert "continuing from" in (tmp_path / "killed.log").read_text()


@pytest.mark.parametrize(("other", "apart"), [((3, 40), False), ((3, 41), True), ((2, 40), True)])
def test_processes_that_begin_at_different_places_are_refused_everywhere(monkeypatch, other, apart):
    def all_reduce(place, op, group):
        epoch, step = other
        place.copy_(torch.maximum(place, torch.tensor([epoch, -epoch, step, -step])))

    monkeypatch.setattr(rendezvous.dist, "all_reduce", all_reduce)
    if not apart:
        rendezvous.check_same_start(3, 40, None)
        return
    with pytest.raises(Failure, match="the processes have read different checkpoints"):
        rendezvous.check_same_start(3, 40, None)


def test_each_process_of_a_run_compares_its_place_with_the_others(monkeypatch):
    compared = []
    monkeypatch.setattr(dist, "new_group", lambda **_: "group")
    monkeypatch.setattr(rendezvous, "check_same_start", lambda *place: compared.append(place))
    listener = SimpleNamespace(install_handlers=lambda: None, defer=lambda: None)
    for world_size, expected in ((1, []), (2, [(3, 40, "group")])):
        trainer = SimpleNamespace(world_size=world_size, current_epoch=3, global_step=40)
        Interruption(listener, None, None).on_train_start(trainer, None)
        assert compared == expected
