import json

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from odcheap import sweeps
from odcheap.sweeps import Gather, Outcome, short_names, show


def test_rows_show_what_differs():
    names = ["a=1,seed=0,x=y", "a=1,seed=1,x=y", "a=2,seed=1,x=y"]
    assert short_names(names) == ["a=1,seed=0", "a=1,seed=1", "a=2,seed=1"]
    assert short_names(["a=1"]) == ["a=1"]


def test_words_of_other_processes_are_gathered_in_order_and_cleared_away(tmp_path, monkeypatch):
    config, gather = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path / "sweep")}}}), Gather()
    monkeypatch.setenv(sweeps.WORDS, "")
    gather.on_multirun_start(config)
    for number in (1, 0):
        job = OmegaConf.create({"job": {"num": number}})
        monkeypatch.setattr("odcheap.sweeps.HydraConfig.get", lambda job=job: job)
        sweeps.leave_word(Outcome(f"run-{number}", "failed: why", None))
    gather.on_multirun_end(config)
    assert sweeps.ended == [Outcome("run-0", "failed: why", None), Outcome("run-1", "failed: why", None)]
    assert not list((tmp_path / "sweep").iterdir())
    sweeps.ended.clear()


def run(folder, method, seed, value):
    folder.mkdir()
    config = {"job_dir": str(folder), "seed": seed, "method": {"_target_": f"odcheap.methods.{method}.Class"}}
    (folder / "config.yaml").write_text(json.dumps(config))
    student = {"val_top1": value, "test_top1": value}
    summary = {"teacher": None, "selected": student, "last": {"students": [student]}}
    return Outcome(str(folder), "finished", summary)


@pytest.mark.parametrize(("methods", "compared"), [(("alone", "od"), True), (("od",), False)])
def test_several_methods_are_compared(tmp_path, capsys, methods, compared):
    outcomes = [run(tmp_path / f"{method}", method, 0, 0.5 + 0.1 * k) for k, method in enumerate(methods)]
    show(Console(width=160), [*outcomes, Outcome(str(tmp_path / "bad"), "failed: num_stu=0", None)])
    said = capsys.readouterr().out
    assert "failed: num_stu=0" in said
    assert ("gain over alone" in said) == compared
    assert ("+0.1000" in said) == compared
