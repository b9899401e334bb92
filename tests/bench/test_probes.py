import hydra
import pytest
import torch

from odcheap.bench import probes
from odcheap.report.costs import CONF

CPU = torch.device("cpu")
SMALL = ["backbone=resnet20", "backbone.depth=8", "num_stu=2", "data.batch_size=8", "job_dir=unused"]
SMALL += ["select=last", "data.val_size=0"]


def test_pairs_and_shifts_are_timed_for_each_type_width_and_precision(monkeypatch):
    monkeypatch.setattr(probes, "WIDTHS", ((16, 4), (20, 2)))
    pairs, shifts = probes.pairs(CPU, repeats=1), probes.shifts(CPU, repeats=1)
    assert [row["block_type"] for row in pairs] == ["DW"] * 4 + ["Shift"] * 4 + ["Group"] * 4
    assert len(shifts) == 4
    assert all(value > 0 for row in pairs + shifts for name, value in row.items() if name.endswith("_ms"))


def test_ways_are_timed(monkeypatch):
    monkeypatch.setattr(probes.alternatives, "compile_blocks", lambda method: None)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        found = probes.ways(hydra.compose("config", [*SMALL, "trainer=cpu"]), CPU, steps=1)
    assert list(found) == ["sequential", "vmap", "sequential, compiled blocks"]
    assert min(found.values()) > 0


def test_a_way_that_fails_leaves_the_others_measured(monkeypatch):
    def no_compiler(method):
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(probes.alternatives, "compile_blocks", no_compiler)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        found = probes.ways(hydra.compose("config", [*SMALL, "trainer=cpu"]), CPU, steps=1)
    assert found["vmap"] > 0
    assert found["sequential, compiled blocks"] == "not measured: No working C++ compiler found"


def test_the_recipe_is_its_training_and_its_evaluations(monkeypatch):
    monkeypatch.setattr(probes, "HELD_OUT", 20)
    monkeypatch.setattr(probes, "median_seconds", lambda work, *_: work() or 2.0)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", [*SMALL, "trainer=cpu", "data.eval_batch_size=8"])
    assert probes.recipe(cfg, CPU, images_per_second=900.0) == pytest.approx(300 * (50 + 2))


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("print('the first step', flush=True); import time; time.sleep(60)", float),
        ("raise SystemExit(1)", str),
    ],
)
def test_the_start_is_timed_until_the_run_begins(monkeypatch, tmp_path, script, expected):
    (tmp_path / "train.py").write_text(script)
    (tmp_path / "cifar10").mkdir()
    (tmp_path / ".cifar10.safetensors").touch()
    monkeypatch.setattr(probes, "TRAIN", tmp_path / "train.py")
    found = probes.start(str(tmp_path))
    assert isinstance(found, expected)
    assert found == "not measured: the run ended before its first step" if expected is str else 0 < found < 30


def test_without_images_the_start_is_not_measured(tmp_path):
    assert probes.start(str(tmp_path)) == f"not measured: no CIFAR-10 in data_dir={tmp_path}"


def test_forms_are_timed_side_by_side_and_held_against_the_standard_network(monkeypatch):
    monkeypatch.setattr(probes, "WIDTHS", ((10, 2),))
    rows = probes.export_forms(seconds=0.01)
    assert [row["block_type"] for row in rows] == ["one-hot", "slices", "dense", "Standard"]
    for row in rows:
        assert row["times_64"] == pytest.approx(rows[3]["ms_64"] / row["ms_64"])
