"""Resume from an epoch's middle, bit for bit: a few combinations stand with their rooms, here are all.

python -m pytest tests/test_exact.py -m slow -n 0 -s
"""

import itertools
import json
import random

import pytest
import torch
from conftest import TINY, Begun

from odcheap.utils.parts import find_conf_dir

METHODS = sorted(path.stem for path in (find_conf_dir() / "method").glob("*.yaml"))
BLOCKS = sorted(path.stem for path in (find_conf_dir() / "block_type").glob("*.yaml"))
PRECISIONS = ["32-true", "bf16-mixed", "64-true", "bf16-true"]
AUGMENTED = [["data.flip=true", "data.crop_padding=0"], ["data.flip=true", "augment=trivial"], ["data.crop_padding=2"]]
AUGMENTED += [["augment=randaugment", "augment.erasing=0.3"]]
OFTEN = ["data.val_size=237", "checkpoint_every=0", "checkpoint_keep=100"]  # of 19 steps: saved after the tenth, last
TIMED = {"seconds", "images_per_second"}
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


def combinations(name):
    """Each block type with each precision; the kinds of augmentation take turns. With averages of
    weights where a method offers them, except in bf16-true: od and alone without them, pcl not at all.
    """
    others = itertools.islice(itertools.cycle(AUGMENTED), METHODS.index(name), None)
    for block, precision in itertools.product(BLOCKS, PRECISIONS):
        augmented = next(others)
        if name == "pcl" and precision == "bf16-true":
            continue  # its averages need weights in 32 bits, and it says so
        if name not in ("kdcl", "lmcl"):  # these need one label for each image
            augmented = [*augmented, "augment.mixup=0.2", "augment.cutmix=1.0"]
        averaged = ["method.average_decay=0.9"] * (name in ("alone", "od") and precision != "bf16-true")
        yield [f"block_type={block}", f"trainer.precision={precision}", *augmented, *averaged]


def ends_equal(one, two):
    """The last checkpoints' and the products' bits, and every figure but the times."""
    contents = [torch.load(job / "checkpoints" / "epoch-0001.ckpt", weights_only=True) for job in (one, two)]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert equal(contents[0][part], contents[1][part]), part
    assert equal(*(content["callbacks"]["Record"] for content in contents))
    assert (one / "student.safetensors").read_bytes() == (two / "student.safetensors").read_bytes()
    found = [json.loads((job / "summary.json").read_text()) for job in (one, two)]
    assert found[0]["selected"] == found[1]["selected"]
    assert found[0]["students"] == found[1]["students"]


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one.keys() - TIMED)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def a_place(job_dir, seed):
    """One of the checkpoints in an epoch's middle."""
    return random.Random(seed).choice(sorted((job_dir / "checkpoints").glob("*step*")))


@pytest.fixture
def taught(command, tmp_path):
    """A method's options: kd needs a teacher."""

    def options(name):
        if name == "kd":
            teacher = ["method=alone", "num_stu=1", "block_type=Standard", f"job_dir={tmp_path}/teacher"]
            assert command(*TINY, OFTEN[0], *teacher).status == 0
        return [f"method={name}", *([f"method.teacher_weights={tmp_path}/teacher"] if name == "kd" else [])]

    return options


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_block_type_and_precision_resumes_exactly(command, taught, tmp_path, capsys, name):
    given = [*TINY, *OFTEN, *taught(name)]
    for k, options in enumerate(combinations(name)):
        straight, again = tmp_path / f"{k}-straight", tmp_path / f"{k}-again"
        result = command(*given, *options, f"job_dir={straight}")
        assert result.status == 0, (options, result.err)
        place = a_place(straight, k)
        result = command(f"resume={place}", f"job_dir={again}")
        assert result.status == 0, (options, result.err)
        ends_equal(straight, again)
        with capsys.disabled():
            print(name, *options, place.stem, "equal", flush=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_resume_exactly(command, taught, tmp_path, capsys, name):
    k = METHODS.index(name)
    options = [
        *TWO,
        *OFTEN,
        *taught(name),
        f"block_type={BLOCKS[k % len(BLOCKS)]}",
        f"trainer.precision={PRECISIONS[k % 2]}",
    ]
    straight, again = tmp_path / "straight", tmp_path / "again"
    run = Begun(*options, f"job_dir={straight}", cwd=tmp_path)
    assert run.end() == 0, run.said
    place = a_place(straight, k)
    run = Begun(*options, f"resume={place}", f"job_dir={again}", cwd=tmp_path)
    assert run.end() == 0, run.said
    ends_equal(straight, again)
    with capsys.disabled():
        print(*options, place.stem, "equal", flush=True)
