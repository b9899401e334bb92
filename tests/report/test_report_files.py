from odcheap.layers.cheap_conv import DW, Standard
from odcheap.models.cifar import CifarResNet
from odcheap.models.flops import count_params
from odcheap.predict import Timing
from odcheap.report import report_files
from odcheap.report.load_runs import FinishedRun
from odcheap.report.statistics import Latencies, Latency, tabulate_runs
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

    def measure_timings(networks, size, batches, seconds):
        calls.append((size, {name: count_params(network) for name, network in networks.items()}))
        return {("student", 1): Timing(0.002, 0.009, 0.001, 0.004), ("standard", 1): Timing(0.003, 0.009, 0.002, 0.005)}

    monkeypatch.setattr(report_files, "measure_timings", measure_timings)
    runs = tabulate_runs(run(tmp_path / name, name) for name in ("alone", "od"))
    steps = []
    expected = Latencies(Latency(2, 1, 4), Latency(3, 2, 5))
    assert report_files.measure_latencies(runs, show_step=steps.append) == dict.fromkeys(("alone", "od"), expected)
    assert steps == ["timing network 1 of 1 in ONNX Runtime (alone)"]
    expected = {"student": CifarResNet(8, DW(), 2), "standard": CifarResNet(8, Standard(), 2)}
    assert calls == [((3, 8, 8), {name: count_params(network) for name, network in expected.items()})]


def test_a_student_and_its_standard_network_are_timed(tmp_path):
    student, standard = report_files.time_student(run(tmp_path / "run", "od"), seconds=0.02)
    assert 0 < student.low <= student.median <= student.high < 1000
    assert 0 < standard.low <= standard.median <= standard.high < 1000


def test_a_student_that_cannot_be_rebuilt_is_a_gap_and_a_line_says_why(tmp_path, capsys):
    own = SETTINGS | {"block_type": {"part": "MyBlock"}}
    runs = tabulate_runs([run(tmp_path / "alone", "alone", own), run(tmp_path / "od", "od", own)])
    assert report_files.measure_latencies(runs) == {}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"no latency of alone; od: student={tmp_path}/alone/student.safetensors: ")
    assert "block_type=MyBlock: unknown" in line
    assert "--config-dir DIR" in line
    runs = tabulate_runs([run(tmp_path / "old", "alone", {"classes": ["a", "b"]})])
    assert report_files.measure_latencies(runs) == {}
    assert "it has no valid settings of a network" in capsys.readouterr().out
