import hydra
import pytest
import torch

from odcheap.bench.memory import in_use
from odcheap.bench.race import Turn, bare, race, random_images
from odcheap.methods import parallel
from odcheap.report.costs import CONF
from odcheap.utils.errors import Failure

SMALL = ["backbone=resnet20", "backbone.depth=8", "num_stu=2", "data.batch_size=8", "select=last", "data.val_size=0"]
CPU = torch.device("cpu")


@pytest.fixture
def composed():
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *more: hydra.compose("config", [*SMALL, "job_dir=unused", "trainer=cpu", *more])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_all_three_run_their_rounds_in_turn(composed, precision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = []
    turns = race(composed(f"trainer.precision={precision}"), CPU, steps=2, rounds=3, tell=told.append)
    assert set(turns) == {"a", "b", "c"}
    assert all(len(turn.seconds) == 3 and min(turn.seconds) > 0 for turn in turns.values())
    assert told == ["round 1 of 3", "round 2 of 3", "round 3 of 3"]
    assert in_use() is None or all(turn.peak > 1 << 20 for turn in turns.values())
    assert not list(tmp_path.iterdir())


def test_a_baseline_that_is_known_does_not_run_again(composed, monkeypatch):
    monkeypatch.setattr("odcheap.bench.race.before", None)
    known = Turn([1.0], None)
    assert race(composed(), CPU, steps=1, rounds=1, tell=print, a=known)["a"] is known


def test_the_bare_loop_trains(composed):
    cfg = composed("+trainer.unused=0")
    kept = []
    step = bare(cfg, random_images(cfg, 40), CPU, run=parallel.sequential, prepare=kept.append)
    before = [p.detach().clone() for p in kept[0].parameters()]
    for _ in range(6):  # more than an epoch
        step()
    assert all(not torch.equal(a, b) for a, b in zip(before, kept[0].parameters(), strict=True))


def test_other_precisions_are_refused(composed):
    cfg = composed("trainer.precision=16-mixed")
    with pytest.raises(Failure, match=r"trainer.precision=16-mixed: the benchmark knows 32-true and bf16-mixed"):
        bare(cfg, random_images(cfg, 16), CPU)()
