import hydra
import pytest
import torch

from odcheap.bench.loops import (
    LOOPS,
    PillowImages,
    build_method,
    compare_loops,
    create_bare_loop,
    random_images,
    train_steps,
)
from odcheap.bench.measurement import count_allocated_bytes
from odcheap.layers.cheap_conv import DW
from odcheap.methods.od import OnlineDistillation
from odcheap.methods.students import Students
from odcheap.models.cifar import CifarResNet
from odcheap.utils.errors import Failure
from odcheap.utils.parts import find_conf_dir

SMALL = ["backbone=resnet20", "backbone.depth=8", "num_stu=2", "data.batch_size=8", "select=last", "data.val_size=0"]
CPU = torch.device("cpu")


@pytest.fixture
def compose():
    with hydra.initialize_config_dir(str(find_conf_dir()), version_base="1.3"):
        yield lambda *more: hydra.compose("config", [*SMALL, "job_dir=unused", "trainer=cpu", *more])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_all_three_loops_run_their_rounds(compose, precision, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    timings = compare_loops(compose(f"trainer.precision={precision}"), CPU, steps=2, rounds=3)
    assert timings.keys() == LOOPS.keys()
    assert all(len(timing.seconds) == 3 and min(timing.seconds) > 0 for timing in timings.values())
    lines = [line.rpartition(" s  ")[2] for line in capsys.readouterr().err.splitlines() if "round " in line]
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
        compare_loops(compose("trainer.precision=16-mixed"), CPU, steps=1, rounds=1)


def make_dataset(count=12):
    images = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return images, PillowImages(images, torch.arange(count) % 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def test_images_are_windows_of_the_padded_image():
    images, dataset = make_dataset()
    x, target = dataset[4]
    assert (x.shape, target) == ((3, 8, 8), 1)
    padded = torch.nn.functional.pad(images[4], (4, 4, 4, 4)) / 255
    windows = [padded[:, r : r + 8, c : c + 8] for r in range(9) for c in range(9)]
    expected = [(w - 0.5) / 0.25 for window in windows for w in (window, window.flip(2))]
    assert any(torch.allclose(x, e, atol=1e-6) for e in expected)


def test_each_call_takes_a_step_and_the_epochs_never_end():
    _, dataset = make_dataset()
    method = OnlineDistillation(Students(lambda: CifarResNet(8, DW(), 3), 2, seed=0))
    steps = train_steps(method, dataset, batch_size=4, lr=0.1, device=torch.device("cpu"), workers=0)
    before = [p.clone() for p in method.parameters()]
    losses = [next(steps) for _ in range(7)]
    assert all(loss > 0 for loss in losses)
    assert all(not torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))
    assert method.norm.num_batches_tracked == 7
