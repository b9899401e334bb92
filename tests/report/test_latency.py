from odcheap.layers.cheap_conv import DW, Standard
from odcheap.models.cifar import CifarResNet
from odcheap.models.flops import count_params
from odcheap.report import latency
from odcheap.report.load_runs import FinishedRun
from odcheap.report.statistics import tabulate_runs
from odcheap.training.summary import write_student

SETTINGS = {
    "backbone": {"part": "resnet20", "depth": 8},
    "block_type": {"part": "DW"},
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
    return FinishedRun({"method.part": method, "seed": 0, "backbone.depth": 8}, {}, folder=folder)


def test_each_kind_of_network_is_timed_once(tmp_path, monkeypatch):
    calls = []

    def time_networks(networks, size, batches, seconds):
        calls.append((size, {name: count_params(network) for name, network in networks.items()}))
        return {("student", 1): 2.0, ("standard", 1): 3.0}

    monkeypatch.setattr(latency, "time_networks", time_networks)
    runs = tabulate_runs(run(tmp_path / name, name) for name in ("alone", "od"))
    assert latency.measure_latencies(runs) == dict.fromkeys(("alone", "od"), (2.0, 3.0))
    expected = {"student": CifarResNet(8, DW(), 2), "standard": CifarResNet(8, Standard(), 2)}
    assert calls == [((3, 8, 8), {name: count_params(network) for name, network in expected.items()})]


def test_a_student_and_its_standard_network_are_timed(tmp_path):
    student, standard = latency.time_student(run(tmp_path / "run", "od"), seconds=0.02)
    assert 0 < student < 1000
    assert 0 < standard < 1000


def test_a_student_that_cannot_be_rebuilt_is_a_gap(tmp_path):
    runs = tabulate_runs([run(tmp_path / "alone", "alone", {"classes": ["a", "b"]})])
    assert latency.measure_latencies(runs) == {}
