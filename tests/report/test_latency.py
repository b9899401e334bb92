from types import SimpleNamespace

from odcheap.layers.cheap_conv import DW, Standard
from odcheap.models.cifar import CifarResNet
from odcheap.report import latency
from odcheap.report.load_runs import Found
from odcheap.report.statistics import Finished
from odcheap.training.summary import write_student

SETTINGS = {
    "backbone": {"_target_": "odcheap.models.cifar.CifarResNet", "_partial_": True, "depth": 8},
    "block_type": {"_target_": "odcheap.layers.cheap_conv.DW"},
    "classes": ["a", "b"],
    "image_size": [3, 8, 8],
    "shorter_side": 8,
    "split": "abc",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2],
}


def run(folder, method, settings=SETTINGS):
    folder.mkdir()
    write_student(folder / "student.safetensors", CifarResNet(8, DW(), 2), settings)
    options = {"method._target_": f"odcheap.methods.{method}.C", "seed": 0, "backbone.depth": 8}
    return Found(folder, "finished", "", Finished(options, {}))


def test_each_kind_of_network_is_timed_once(tmp_path, monkeypatch):
    calls = []
    fast = SimpleNamespace(
        fastest_onnx=lambda network, _: sum(p.numel() for p in network.parameters()),
        latency=lambda size, *_: calls.append(size) or size,
    )
    monkeypatch.setattr(latency, "deploy", fast)
    found = [run(tmp_path / name, name) for name in ("alone", "od")]
    student, standard = (sum(p.numel() for p in CifarResNet(8, conv, 2).parameters()) for conv in (DW(), Standard()))
    assert latency.measured(found) == dict.fromkeys(("alone", "od"), (1000 * student, 1000 * standard))
    assert calls == [student, standard]


def test_a_student_that_cannot_be_rebuilt_is_a_gap(tmp_path):
    found = [run(tmp_path / "alone", "alone", {"classes": ["a", "b"]})]
    assert latency.measured(found) == {}
