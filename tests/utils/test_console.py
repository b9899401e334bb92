import pytest

from odcheap.utils.console import console, print_error, process_rank, say


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
