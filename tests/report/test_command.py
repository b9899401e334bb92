import csv
import json
import re

import pandas as pd
import pytest

from odcheap.report import report_files
from odcheap.report.command import main
from odcheap.report.report_files import collect_latencies
from odcheap.report.statistics import Latencies, Latency


def plant(folder, method="od", seed=0, value=0.5, data="cifar10", **more):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"job_dir: {folder}\nseed: {seed}\nmethod: {{part: {method}}}\n")
    student = {"test_top1": value, "val_top1": value + 0.02}
    summary = {"finished": True, "data": data, "epochs": 5, "selected": student}
    summary["cost"] = {"params": 1000, "macs": 2_000_000, "training_macs_with_teacher": 3e15}
    summary["train_seconds"] = 7200
    if method == "kd":
        summary["cost"]["teacher"] = {"train_seconds": 1800}
    summary["last"] = {"students": [student, student], "ensemble": student, "teacher": None} | more
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.csv").write_text("epoch,val/student_0/top1\n0,0.1\n1,0.2\n")
    return folder


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    measured = {"alone": Latencies(Latency(0.5, 0.4, 0.7), Latency(1.5, 1.4, 1.75))}
    monkeypatch.setattr(report_files, "measure_latencies", lambda runs, config_dirs, show_step: measured)
    folder = tmp_path / "sweep"
    for seed, value in enumerate((0.50, 0.52, 0.51)):
        plant(folder / f"alone-{seed}", "alone", seed, value)
        plant(folder / f"od-{seed}", "od", seed, value + 0.1, teacher={"kind": "head", "test_top1": 0.9})
        plant(folder / f"dml-{seed}", "dml", seed, value + 0.01 * (seed - 1))
    return folder


def test_the_report(sweep, capsys):
    assert main([str(sweep)]) == 0
    assert "9 finished runs of 9" in capsys.readouterr().out.replace("\n", " ")
    out = sweep / "report"
    names = {path.name for path in out.iterdir()}
    drawn = ("accuracy_macs", "accuracy_latency", "gains", "curves")
    figures = {f"{name}.{kind}" for name in drawn for kind in ("png", "svg", "pdf")}
    assert names == figures | {"report.md", "report.csv"}
    assert all(path.stat().st_size > 5000 for path in out.glob("*.png"))
    assert all(path.read_text().startswith("<?xml") for path in out.glob("*.svg"))
    assert all(path.read_bytes().startswith(b"%PDF") for path in out.glob("*.pdf"))
    text = (out / "report.md").read_text()
    assert "| od | 3 | 61.00 ± 1.00 | +10.00 [+10.00, +10.00] | 61.00 ± 1.00 |" in text
    assert "| dml | 3 | 51.00 ± 1.73 | +0.00 [-2.48, +2.48] (not resolved) |" in text
    assert "| dml | -1.00 | +0.00 | +1.00 |" in text
    assert "| 1,000 | 2.00 M | 5 | 3.00 P | 2.0 h |" in text
    assert "teacher (head)" in text
    assert "teacher (gated)" not in text
    assert "smoke test" not in text
    with open(out / "report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["alone", "dml", "od"]
    parts = dict.fromkeys(("mean student", "selected", "ensemble", "teacher (head)"), ("n", "mean", "deviation"))
    parts |= dict.fromkeys(("gain", "selected gain"), ("n", "mean", "deviation", "low", "high"))
    spreads = {f"{name} {part}" for name, own in parts.items() for part in own}
    assert {name for name in rows[0] if name.endswith((" n", " mean", " deviation", " low", " high"))} == spreads
    assert float(rows[2]["gain mean"]) == pytest.approx(0.1)
    assert float(rows[1]["gain low"]) == pytest.approx(-0.02484, abs=1e-5)  # t(0.975, 2) = 4.3027, of 0.01 / sqrt(3)
    assert [rows[0][name] for name in ("gain mean", "latency ms", "standard ms")] == ["", "0.5", "1.5"]
    assert [rows[0][f"latency ms {quartile}"] for quartile in ("p25", "p75")] == ["0.4", "0.7"]
    assert [rows[0][name] for name in ("training macs", "training seconds")] == ["3000000000000000", "7200.0"]
    assert rows[2]["latency ms"] == rows[2]["standard ms"] == ""


def test_to_decide_there_are_the_held_out_images(sweep):
    assert main([str(sweep), "--val", "--no-latency"]) == 0
    text = (sweep / "report" / "report.md").read_text()
    assert "| od | 3 | 63.00 ± 1.00 | +10.00 [+10.00, +10.00] | 63.00 ± 1.00 |" in text
    assert "61.00" not in text
    assert "Held-out images. Top-1" in text


def test_a_run_without_held_out_images_is_a_gap_in_their_report(tmp_path):
    folder = plant(tmp_path / "sweep" / "last", "alone")
    (folder / "summary.json").write_text(
        (folder / "summary.json").read_text().replace('"val_top1": 0.52', '"val_top1": null')
    )
    assert main([str(tmp_path / "sweep"), "--val", "--no-latency"]) == 0
    assert "| alone | 1 | 1,000 |" in (tmp_path / "sweep" / "report" / "report.md").read_text()


def test_gains_may_be_over_another_row(sweep, capsys):
    assert main([str(sweep), "--against", "od", "--no-latency"]) == 0
    text = (sweep / "report" / "report.md").read_text()
    assert "| alone | 3 | 51.00 ± 1.00 | -10.00 [-10.00, -10.00] |" in text
    assert "Gains over `od` are paired by seed" in text
    assert main([str(sweep), "--against", "kd", "--no-latency"]) == 1
    assert capsys.readouterr().err == "error: --against=kd: must be a method or a row, one of alone; dml; od\n"


def test_a_teacher_s_own_training_is_counted(tmp_path):
    plant(tmp_path / "kd", "kd")
    assert main([str(tmp_path), "--no-latency"]) == 0
    assert "| 3.00 P | 2.5 h |" in (tmp_path / "report" / "report.md").read_text()


def test_a_run_that_is_there_twice_counts_once(sweep, tmp_path):
    plant(tmp_path / "copy", "od", 0, 0.9)
    assert main([str(sweep), str(tmp_path / "copy"), "--no-latency"]) == 0
    text = (sweep / "report" / "report.md").read_text()
    assert "| od | 3 | 61.00 ± 1.00 |" in text
    assert "1 finished run has the options and the seed of another one and is left out." in text


def test_a_report_goes_where_it_is_told_and_again(sweep, tmp_path):
    for _ in range(2):
        assert main([str(sweep), "--out", str(tmp_path / "here"), "--no-latency"]) == 0
    assert not (sweep / "report").exists()
    assert not (tmp_path / "here" / "accuracy_latency.png").exists()


def test_the_files_of_an_older_report_are_replaced_and_not_written_through_links(sweep, tmp_path):
    for folder in (sweep / "report", tmp_path / "outside"):
        folder.mkdir()
    (sweep / "report" / "report.md").write_text("# Report\n\n3 finished runs on cifar10\n")
    for k, name in enumerate(("curves.png", "gains.svg", "report.csv")):
        path, precious = sweep / "report" / name, tmp_path / "outside" / name
        precious.write_text("precious")
        path.symlink_to(precious) if k % 2 == 0 else path.hardlink_to(precious)
    assert main([str(sweep), "--no-latency"]) == 0
    assert {path.read_text() for path in (tmp_path / "outside").iterdir()} == {"precious"}
    assert not (sweep / "report" / "curves.png").is_symlink()
    (sweep / "report").rename(tmp_path / "elsewhere")
    (sweep / "report").symlink_to(tmp_path / "elsewhere")
    assert main([str(sweep), "--no-latency"]) == 1


def test_digits_are_called_a_smoke_test_and_gaps_are_no_crash(tmp_path, sweep):
    plant(tmp_path / "old", "alone", 0, data="digits")
    (tmp_path / "old" / "summary.json").write_text('{"finished": true, "data": "digits"}')
    (tmp_path / "old" / "metrics.csv").unlink()
    assert main([str(tmp_path / "old"), "--no-latency"]) == 0
    text = (tmp_path / "old" / "report" / "report.md").read_text()
    assert "digits is a smoke test" in text
    assert "| alone | 1 |" in text
    assert main([str(tmp_path / "old"), str(sweep), "--out", str(tmp_path / "both")]) == 0


def test_what_is_not_finished_is_named(sweep, capsys):
    (sweep / "failed").mkdir()
    (sweep / "failed" / "status.json").write_text('{"state": "failed", "reason": "num_stu=0: must be 1"}')
    (sweep / "od-0" / "summary.json").unlink()
    assert main([str(sweep), "--status"]) == 1
    said = capsys.readouterr().out
    assert "num_stu=0: must be 1" in said
    assert "8 finished" in said.replace("\n", " ")
    assert main([str(sweep), "--no-latency"]) == 0
    text = (sweep / "report" / "report.md").read_text()
    assert "- `failed`: failed; `num_stu=0: must be 1`" in text
    assert "- `od-0`: stopped" in text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [(["none"], "DIR=none: no such folder"), (["."], "DIR=.: holds no run of odcheap")],
)
def test_bad_folders_are_one_line(arguments, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    assert capsys.readouterr().err == f"error: {line}\n"


def test_nothing_finished_is_one_line(tmp_path, capsys):
    (plant(tmp_path / "run") / "summary.json").unlink()
    assert main([str(tmp_path)]) == 1
    assert "no finished run among 1; --status says more" in capsys.readouterr().err


def test_texts_of_other_people_are_plain_text_in_every_file_of_a_report(sweep, capsys):
    """The names come from the runs' configurations and summaries."""
    text = "'=HYPERLINK(1)<img src=x>|[a](b) $x^{$'"
    plant(sweep / "<b>gone", "od", data="<i>digits</i>")
    plant(sweep / "strange", text, data="<i>digits</i>")
    (sweep / "<b>gone" / "summary.json").write_text("{}")
    (sweep / "<b>gone" / "status.json").write_text(json.dumps({"state": "failed", "reason": "<u>why</u> `x` |"}))
    assert main([str(sweep), "--no-latency"]) == 0
    report = (sweep / "report" / "report.md").read_text()
    table = report.partition("Not in the table")[0]
    assert "HYPERLINK" in table
    assert re.findall(r"(?<!\\)[<>\[$]", table.partition("Top-1 is")[0].replace("[+", "").replace("[-", "")) == []
    assert "`<b>gone`" in report
    assert "- `<b>gone`: failed; `<u>why" in report
    with open(sweep / "report" / "report.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert [cell for row in rows for cell in row if "HYPERLINK" in cell and cell[0] != "'"] == []
    assert any("HYPERLINK" in cell for row in rows for cell in row)


def test_the_table_is_printed_and_fits_eighty_columns(sweep, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main([str(sweep)]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith(("│", "┃"))]
    assert table[0].split("┃")[1].split() == ["method"]
    assert any("61.00 ± 1.00" in line and "+10.00 [+10.00, +10.00]" in line for line in table)
    assert any("(not resolved)" in line for line in table)
    assert max(map(len, table)) <= 80
    assert "left out for lack of width: " in " ".join(lines)
    assert "drawing gains" in lines[: lines.index(next(line for line in lines if line.startswith("┏")))]


def test_a_wider_console_has_all_columns(sweep, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    assert main([str(sweep)]) == 0
    out = capsys.readouterr().out
    assert "left out" not in out
    for heading in ("training time", "standard ms", "teacher (head)"):
        assert heading in out


def test_the_standard_network_of_all_students_is_one_point():
    rows = pd.DataFrame({"name": ["a", "b"], "block type": "DW", "standard macs": [5, 5]}, index=[3, 4])
    pairs = {name: Latencies(Latency(k, k, k), Latency(9 + k, 9, 9)) for k, name in enumerate("ab", 1)}
    cost, standard = collect_latencies(rows, pairs)
    assert cost == [pairs["a"].student, pairs["b"].student]
    assert standard == [pairs["a"].standard]
    assert collect_latencies(rows.assign(**{"block type": "Standard"}), pairs)[1] == []


def test_machines_are_named_by_the_status_only(sweep, capsys):
    for name, status in {
        "running": {"state": "running", "host": "secret-host", "pid": 5},
        "failed": {"state": "failed", "host": "secret-host", "reason": "tcp://secret-host:29400 is closed"},
    }.items():
        (sweep / name).mkdir()
        (sweep / name / "status.json").write_text(json.dumps(status))
    assert main([str(sweep), "--status"]) == 1
    assert "process 5 on secret-host" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert main([str(sweep), "--no-latency"]) == 0
    text = (sweep / "report" / "report.md").read_text()
    assert "secret-host" not in text
    assert "- `running`: running; `no epoch done`" in text
    assert "HOST:29400 is closed" in text


def test_rows_that_cannot_be_compared_are_named(sweep):
    for seed in range(3):
        plant(sweep / f"one-{seed}", "one", 7 + seed, 0.6)
    assert main([str(sweep), "--no-latency"]) == 0
    text = (sweep / "report" / "report.md").read_text()
    assert "Without a gain, because no run of the baseline has their setting and one of their seeds: `one`." in text


def test_a_method_as_the_baseline_is_compared_in_each_setting(tmp_path):
    for width in (16, 32):
        for seed in range(2):
            for method, value in (("alone", 0.5), ("od", 0.55 + width / 1000)):
                folder = plant(tmp_path / f"{method}-{width}-{seed}", method, seed, value)
                with open(folder / "config.yaml", "a") as file:
                    file.write(f"width: {width}\n")
    assert main([str(tmp_path), "--against", "od", "--no-latency"]) == 0
    rows = [line for line in (tmp_path / "report" / "report.md").read_text().splitlines() if line.startswith("| width")]
    assert [row.split(" | ")[:2] + row.split(" | ")[4:5] for row in rows] == [
        ["| width=16", "od", ""],
        ["| width=16", "alone", "-6.60 [-6.60, -6.60]"],
        ["| width=32", "od", ""],
        ["| width=32", "alone", "-8.20 [-8.20, -8.20]"],
    ]


def test_one_run_of_one_epoch_is_in_the_singular_and_replaced_again(tmp_path, capsys):
    plant(tmp_path / "od", "od")
    path = tmp_path / "od" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"epochs": 1}))
    for _ in range(2):  # the second report replaces the first
        assert main([str(tmp_path), "--no-latency"]) == 0
    assert "1 finished run of 1;" in capsys.readouterr().out.replace("\n", " ")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "1 finished run on " in text
    assert ", 1 epoch (" in text or ", 1 epoch." in text
