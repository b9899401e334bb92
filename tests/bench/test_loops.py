import hydra
import pytest
import torch

from odcheap.bench.loops import LOOPS, build_method, compare_loops, create_bare_loop, random_images
from odcheap.bench.memory import count_allocated_bytes
from odcheap.utils.errors import Failure
from odcheap.utils.parts import find_conf_dir

SMALL = ["backbone=resnet20", "backbone.depth=8", "num_stu=2", "data.batch_size=8", "select=last", "data.val_size=0"]
CPU = torch.device("cpu")


@pytest.fixture
def compose():
    with hydra.initialize_config_dir(str(find_conf_dir()), version_base="1.3"):
        yield lambda *more: hydra.compose("config", [*SMALL, "job_dir=unused", "trainer=cpu", *more])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_all_three_loops_run_their_rounds(compose, precision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = []
    timings = compare_loops(compose(f"trainer.precision={precision}"), CPU, steps=2, rounds=3, report=lines.append)
    assert timings.keys() == LOOPS.keys()
    assert all(len(timing.seconds) == 3 and min(timing.seconds) > 0 for timing in timings.values())
    assert lines == ["round 1 of 3", "round 2 of 3", "round 3 of 3"]
    assert count_allocated_bytes() is None or all(timing.peak_bytes > 1 << 20 for timing in timings.values())
    assert not list(tmp_path.iterdir())


def test_the_bare_loop_trains(compose):
    cfg = compose()
    method = build_method(cfg)
    step = create_bare_loop(cfg, method, random_images(cfg, 40), CPU)
    before = [p.detach().clone() for p in method.parameters()]
    for _ in range(6):  # more than an epoch
        step()
    assert all(not torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))


def test_other_precisions_are_refused(compose):
    with pytest.raises(Failure, match=r"trainer.precision=16-mixed: must be 32-true or bf16-mixed here"):
        compare_loops(compose("trainer.precision=16-mixed"), CPU, steps=1, rounds=1, report=print)
