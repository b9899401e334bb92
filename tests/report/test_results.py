"""The results in the documentation are those of the runs whose summaries lie in `results/`, and nothing else."""

import io
import runpy
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.testing.compare import compare_images
from PIL import Image

from odcheap import load_student
from odcheap.report import command, report_files

ROOT = Path(__file__).parents[2]
STUDENTS = ROOT / "results" / "students"
CORRECT = {
    "DW-resnet20": 456,
    "DW-resnet56": 459,
    "Shift-resnet20": 432,
    "Shift-resnet56": 452,
}  # of the 500 test images
TEST_IMAGES = ROOT.parent / "shared" / "data" / "cifar10-test.zip"
build = runpy.run_path(str(ROOT / "results" / "build.py"))


def table_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize(
    ("folder", "heading"),
    [
        ("cifar10_short", "<!-- the report's table of 15 epochs -->"),
        ("cifar10_short_cpu", "<!-- the report's table on CPU cores -->"),
        ("cifar10_recipes", "<!-- the report's table of recipes -->"),
        ("cifar10_resnet56_160_epochs", "<!-- the report's table of 160 epochs -->"),
    ],
)
def test_the_tables_of_results_are_the_reports_of_the_kept_runs(folder, heading, tmp_path, monkeypatch):
    """In the documentation a row may have two columns more: times that only one machine can measure."""
    monkeypatch.setattr(report_files, "draw_figures", lambda *_: {})  # the tables are read here
    assert command.main([str(ROOT / "results" / folder), "--no-latency", "--out", str(tmp_path)]) == 0
    rows = table_lines((tmp_path / "report.md").read_text().partition("Gain of the mean student by seed")[0])
    page = (ROOT / "docs" / "results.md").read_text()
    shown = table_lines(page.partition(heading)[2].partition("\n\n")[0])
    assert len(shown) == len(rows) > 2
    for k, (row, line) in enumerate(zip(rows, shown, strict=True)):
        assert line.startswith(row), k


@pytest.mark.parametrize(
    ("table", "heading"),
    [
        ("format_best", "<!-- the table of the best recipe -->"),
        ("format_recipes", "<!-- the held-out table of recipes -->"),
    ],
)
def test_the_tables_that_are_built_here_are_those_of_the_page(table, heading):
    page = (ROOT / "docs" / "results.md").read_text()
    assert table_lines(page.partition(heading)[2].partition("\n\n")[0]) == build[table]()


def test_the_tables_of_the_readme_are_those_of_the_kept_runs(tmp_path):
    readme = (ROOT / "README.md").read_text()
    assert "\n".join(build["format_best"]()) in readme
    # The second table has cells of the report's: its mean students and their gain.
    page = (ROOT / "docs" / "results.md").read_text().partition("<!-- the report's table of 15 epochs -->")[2]
    rows = table_lines(page.partition("\n\n")[0])
    cells = {tuple(row.split(" | ")[:2]): row.split(" | ")[3:5] for row in rows}
    shown = [line for line in table_lines(readme) if line.startswith(("| `DW` | 40,522", "| `Shift` | 34,906"))]
    assert len(shown) == 2
    for line in shown:
        block_type = line.split("`")[1]
        (alone, _), (od, gain) = (cells[f"| {block_type}", method] for method in ("alone", "od"))
        assert line.endswith(f" | {alone} | {od} | {gain} |")


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    build["main"](folder)
    return folder


@pytest.mark.parametrize("name", list(build["FIGURES"]))
def test_the_figures_of_results_are_those_of_the_kept_runs(name, figures):
    assert compare_images(ROOT / "docs" / "assets" / name, figures / name, tol=2) is None


@pytest.mark.skipif(not TEST_IMAGES.exists(), reason="needs CIFAR-10's test images")
@pytest.mark.parametrize("name", CORRECT)
def test_the_kept_students_are_as_accurate_as_the_page_says(name):
    """On 500 of the test images, with the numbers of right answers that were counted when the students were kept."""
    with zipfile.ZipFile(TEST_IMAGES) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".webp"))[::20]
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names])
    classes = sorted({Path(name).parent.name for name in names})
    target = torch.tensor([classes.index(Path(name).parent.name) for name in names])
    student = load_student(STUDENTS / name / "student.safetensors").eval()
    with torch.inference_mode():
        hits = student(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).argmax(1) == target
    assert abs(int(hits.sum()) - CORRECT[name]) <= 1  # another CPU may decide a close one differently
