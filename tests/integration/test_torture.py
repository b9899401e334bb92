"""A run that is killed again and again, at any moment, always continued by the same command.

The long form: ODCHEAP_KILLS=100 python -m pytest tests/test_torture.py -m slow -n 0 -s
"""

import os
import random
import time
from collections import Counter

import pytest
import torch
from conftest import TINY, Begun
from safetensors.torch import load_file

EPOCHS_A_KILL = 6
OFTEN = ["data.val_size=237", "checkpoint_every=0", "checkpoint_keep=3"]  # of 19 steps: saved after the tenth and last


def life(job_dir, epochs, seconds, after):
    """One start of the run, killed so many seconds after it has said these words, and what it was doing then."""
    run = Begun(f"trainer.max_epochs={epochs}", *OFTEN, "resume=auto", f"job_dir={job_dir}", cwd=job_dir)
    if after:
        run.until(after)
    time.sleep(seconds)
    alive = run.process.poll() is None
    run.process.kill()
    run.end()
    said = "".join(run.said)
    assert "Traceback" not in said, said
    saving = any(job_dir.rglob("*.part"))
    started = after or "students;" in said
    newest = max((job_dir / "checkpoints").glob("*.ckpt"), default=None, key=lambda path: path.name)
    middle = newest is not None and "step" in newest.name
    doing = "saving" if saving else "training" if started else "start-up"
    return f"{doing}, to go on {'within' if middle else 'after'} an epoch" if alive else "ended"


def tortured(command, job_dir, epochs, kills, seed):
    job_dir.mkdir()
    rng, found = random.Random(seed), Counter()
    for k in range(kills):
        # Every third kill comes anywhere, starting up included; the others once it trains.
        after = None if k % 3 == 2 else "students;"
        found[life(job_dir, epochs, rng.uniform(0, 8 if after is None else 3), after)] += 1
    last = command(*TINY, f"trainer.max_epochs={epochs}", *OFTEN, "resume=auto", f"job_dir={job_dir}")
    assert last.status == 0, last
    return found


def is_survived(command, tmp_path, kills, seed):
    epochs = EPOCHS_A_KILL * kills
    straight = tmp_path / "straight"
    began = time.perf_counter()
    done = command(*TINY, f"trainer.max_epochs={epochs}", *OFTEN, f"job_dir={straight}")
    assert done.status == 0, done
    undisturbed = time.perf_counter() - began
    found = tortured(command, tmp_path / "run", epochs, kills, seed)
    print(f"\n{kills} kills in {epochs} epochs: {dict(found)}; undisturbed it took {undisturbed:.0f} s", flush=True)
    assert sum(n for what, n in found.items() if what.startswith(("training", "saving"))) >= kills // 2
    assert (tmp_path / "run" / "student.safetensors").read_bytes() == (straight / "student.safetensors").read_bytes()
    ends = [sorted((folder / "checkpoints").glob("*.ckpt"))[-1] for folder in (straight, tmp_path / "run")]
    contents = [torch.load(end, weights_only=True) for end in ends]
    same(contents[0]["state_dict"], contents[1]["state_dict"])
    same(contents[0]["optimizer_states"], contents[1]["optimizer_states"])
    records = [content["callbacks"]["Record"] for content in contents]
    assert records[0]["selected"] == records[1]["selected"]
    timed = ("seconds", "images_per_second")
    for one, other in zip(*(record["history"] for record in records), strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    assert not list((tmp_path / "run").rglob("*.part"))
    assert load_file(straight / "student.safetensors")


def same(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            same(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def test_a_few_kills_change_not_one_bit(command, tmp_path):
    is_survived(command, tmp_path, kills=2, seed=0)


@pytest.mark.slow
def test_many_kills_change_not_one_bit(command, tmp_path):
    is_survived(command, tmp_path, kills=int(os.environ.get("ODCHEAP_KILLS", "20")), seed=1)
