import sys

import pytest

from odcheap.utils.console import console, name_command, prefix_lines, print_error, process_rank, say


def test_only_rank_zero_speaks(monkeypatch, capsys):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    say("one\nline")
    assert print_error("bad") == 1
    assert capsys.readouterr() == ("one\\nline\n", "error: bad\n")
    monkeypatch.setenv("RANK", "1")
    say("one")
    print_error("bad")
    print_error("bad", every_rank=True)
    assert capsys.readouterr() == ("", "error: bad\n")


@pytest.mark.parametrize(("name", "value", "rank"), [("RANK", "3", 3), ("SLURM_PROCID", "2", 2), ("RANK", "x", 0)])
def test_the_rank_is_known_before_the_processes_have_met(monkeypatch, name, value, rank):
    for other in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    assert process_rank() == rank


def test_text_is_no_markup(capsys):
    console().print("[red]text[/red]")
    assert capsys.readouterr().out == "[red]text[/red]\n"


def test_each_line_of_a_process_may_have_a_prefix(capfd):
    with prefix_lines("[seed=1] "):
        print("one")
        print("two\nthree", file=sys.stderr)
        print("end", end="")
        assert not sys.stdout.isatty()
    print("after")
    out, err = capfd.readouterr()
    assert out == "[seed=1] one\n[seed=1] end\nafter\n"
    assert err == "[seed=1] two\n[seed=1] three\n"


def test_commands_are_named_as_they_work_here(tmp_path, monkeypatch):
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)
    for name in ("odcheap", "python"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert name_command("report") == "odcheap report"
    (tmp_path / "odcheap").unlink()  # a clone whose environment is not activated
    monkeypatch.setattr(sys, "executable", "/somewhere/a b/.venv/bin/python")
    monkeypatch.chdir("/")
    assert name_command("report") == "'somewhere/a b/.venv/bin/python' -m odcheap report"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert name_command("report") == "python -m odcheap report"
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    assert name_command("report") == "uv run odcheap report"
