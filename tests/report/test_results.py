"""The results in the documentation are those of the runs whose summaries lie in `results/`, and nothing else."""

from pathlib import Path

from odcheap.report import command

ROOT = Path(__file__).parents[2]


def table_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def test_the_table_of_results_is_the_report_of_the_kept_runs(tmp_path):
    """In the documentation each row has two columns more: times that only one machine can tell."""
    results = ROOT / "results" / "cifar10_short"
    assert command.main([str(results), "--no-latency", "--out", str(tmp_path)]) == 0
    rows = table_lines((tmp_path / "report.md").read_text().partition("Gain of the mean student by seed")[0])
    page = (ROOT / "docs" / "results.md").read_text()
    shown = table_lines(page.partition("<!-- the report's table -->")[2].partition("\n\n")[0])
    assert len(shown) == len(rows)
    for k, (row, line) in enumerate(zip(rows, shown, strict=True)):
        assert line.startswith(row), k
