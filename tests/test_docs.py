"""The documentation is right: its code runs, its commands compose, its links and names exist."""

import ast
import re
import shlex
from itertools import product, takewhile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from odcheap import OnlineDistillation, Students, cli, predict
from odcheap.layers.cheap_conv import DW
from odcheap.models.cifar import CifarResNet

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r'^```(\w+)(?: title="(.+?)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
STUDENT = Path("runs/cifar10/block_type=DW/student.safetensors")


class Block(NamedTuple):
    language: str
    title: str  # the file that it shows, or ""
    text: str


def code_blocks(page: Path) -> list[Block]:
    return [Block(*groups) for groups in FENCE.findall(page.read_text())]


def without_code(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def table_rows(page: Path) -> list[str]:
    return [line for line in page.read_text().splitlines() if line.startswith("|")]


by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def write_reference(path: Path) -> None:
    """Writes a checkpoint as the 2019 code did."""
    method = OnlineDistillation(Students(lambda: CifarResNet(8, DW(), 10), num_stu=2, seed=0))
    state = {name: tensor for name, tensor in method.state_dict().items() if not name.startswith("students.")}
    for k, student in enumerate(method.students.members, start=1):
        for name, tensor in student.state_dict().items():
            name = re.sub(r"\.conv([12])\.pointwise\.", r".conv\1.", name)
            state[f"resnet_m{k}." + re.sub(r"\.conv([12])\.spatial\.", r".dw\1.", name)] = tensor
    torch.save({"state_dict": state}, path)


def write_files(page: Path, folder: Path) -> None:
    """Writes the files that a page shows: the code blocks with a title."""
    for block in code_blocks(page):
        if block.title:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.text)


def write_photos(folder: Path) -> None:
    """Writes the folders of images that a page reads: bright and dark ones."""
    for part, name, number in product(("train", "test"), ("bright", "dark"), range(6)):
        path = folder / "photos" / part / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (90, 80 + number), (20 * number, 90, 200) if name == "bright" else (number, 9, 0)).save(path)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.stem
)
def test_python_blocks_run(page, tmp_path, monkeypatch, command, request):
    code = [block.text for block in code_blocks(page) if block.language == "python"]
    if any("load_student(" in text and "results/students" not in text for text in code):
        tiny = [
            "data=digits",
            "backbone=resnet20",
            "num_stu=2",
            "backbone.depth=8",
            "trainer=cpu",
            "trainer.max_epochs=1",
            "logger=csv",
        ]
        assert command(*tiny, f"job_dir={STUDENT.parent}").status == 0
        (STUDENT.parent / "export").mkdir()
        (STUDENT.parent / "export" / STUDENT.name).write_bytes(STUDENT.read_bytes())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").symlink_to(ROOT / "results")
    monkeypatch.syspath_prepend(tmp_path)
    write_files(page, tmp_path)
    write_reference(tmp_path / "reference.pt")
    write_photos(tmp_path)
    if any("export_student(" in text for text in code):
        request.getfixturevalue("light")
    monkeypatch.setattr(predict, "TIMING_ROUNDS", 1)  # a page says how to measure, and the tests do not need the times
    namespace: dict = {"__name__": page.stem}
    for text in code:
        exec(compile(text, str(page), "exec"), namespace)


def shell_commands(page: Path) -> list[list[str]]:
    """The commands of a page's bash blocks, as words; those with shell variables are left out."""
    found = []
    for block in code_blocks(page):
        if block.language != "bash":
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                one = list(takewhile(lambda word: word not in ("&&", ";", "|"), words))
                words = words[len(one) + 1 :]
                found.append(one)
    return found


def train_arguments(words: list[str]) -> list[str] | None:
    """What follows `train.py` or `odcheap train`; None for another command."""
    for k, word in enumerate(words):
        if word == "train.py" or words[k - 1 : k + 1] == ["odcheap", "train"]:
            return words[k + 1 :]
    return None


COMMANDS = [(page, words) for page in PAGES for words in shell_commands(page)]
TRAINED = [(page, given) for page, words in COMMANDS if (given := train_arguments(words)) is not None]


def variants(arguments: list[str]) -> list[list[str]]:
    """The overrides of single runs that together have every value of a sweep."""
    given = [re.sub(r"^(resume|weights|job_dir)=(.+=.+)$", r'\1="\2"', word) for word in arguments if "=" in word]
    parsed = OverridesParser.create().parse_overrides(given)  # paths are quoted by the command line
    values = []
    for override in parsed:
        if override.is_choice_sweep():
            values.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        elif override.is_interval_sweep():
            values.append([f"{override.get_key_element()}={override.value().start}"])
        else:
            values.append([override.input_line])
        assert len(values[-1]) == 1 or "-m" in arguments, f"{override.input_line} needs -m"
    count = max(map(len, values), default=1)
    return [[choices[k % len(choices)] for choices in values] for k in range(count)]


@pytest.mark.parametrize(
    ("page", "arguments"), TRAINED, ids=lambda value: " ".join(value) if isinstance(value, list) else value.stem
)
def test_train_commands_compose(page, arguments, tmp_path):
    if "--help" in arguments or any("$" in word for word in arguments):  # a loop: tests/report/test_ablation.py
        return
    given = []
    if "--config-dir" in arguments:
        write_files(page, tmp_path)
        place = arguments.index("--config-dir")
        given = [f"hydra.searchpath=[file://{tmp_path / arguments[place + 1]}]"]
        arguments = arguments[:place] + arguments[place + 2 :]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for overrides in variants(arguments):
            ours = [f"{o}_sweep" if (CONF / f"{o.replace('=', '/')}_sweep.yaml").is_file() else o for o in overrides]
            assert compose("config", [*ours, *given])


@pytest.mark.parametrize("name", ["evaluate", "export", "report", "bench", "predict", "demo", "push"])
def test_other_commands_have_the_flags_that_pages_name(name, capsys):
    ours = (["odcheap", name], ["-m", f"odcheap.{name}"], ["python", f"{name}.py"])
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    used = {
        word
        for _, words in COMMANDS
        if any(words[k : k + 2] == start for start in ours for k in range(len(words)))
        for word in words
        if word.startswith("--")
    }
    assert not {flag for flag in used if flag not in text}


def slugs(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@by_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in slugs(target), link


@by_page
def test_files_and_tests_that_pages_name_exist(page):
    for name in re.findall(r"`((?:odcheap|conf|docs|results|tests|train\.py)(?:/[\w./:]+)?)`", without_code(page)):
        path, _, function = name.partition("::")
        assert (ROOT / path).exists(), name
        if function:
            tree = ast.parse((ROOT / path).read_text())
            assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, name


def test_every_promise_has_its_test():
    rows = table_rows(ROOT / "docs" / "reproducibility-and-faults.md")[2:]
    assert len(rows) >= 18
    assert all("`tests/" in row for row in rows)


GROUPS = sorted({path.parent.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")} - {"."})


@pytest.mark.parametrize("group", GROUPS)
def test_every_choice_has_its_row(group):
    rows = "\n".join(row for page in PAGES if page.parent.name == "docs" for row in table_rows(page))
    names = [path.stem.removesuffix("_sweep") for path in (CONF / group).glob("*.yaml")]
    missing = [name for name in names if f"`{name}`" not in rows and f"`{group}={name}`" not in rows]
    assert not missing


def test_every_option_of_a_run_has_its_row():
    names = set(yaml.safe_load((CONF / "config.yaml").read_text())) - {"defaults", "hydra"}
    rows = "\n".join(table_rows(ROOT / "docs" / "training.md"))
    assert not {name for name in names if not re.search(rf"`{name}[`=]", rows)}


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "method").glob("*.yaml")))
def test_a_method_has_one_name_in_four_places(name):
    assert (ROOT / "odcheap" / "methods" / f"{name}.py").is_file()
    assert (ROOT / "tests" / "methods" / f"test_{name}.py").is_file()
    assert any(row.startswith(f"| `{name}`") for row in table_rows(ROOT / "docs" / "methods.md"))


def test_the_readme_is_a_short_front_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
