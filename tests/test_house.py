"""The rules of the house that a machine can check."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = sorted((ROOT / "odcheap").rglob("*.py"))
SHELL = {"module", "metrics", "data", "streamed", "callbacks", "checkpoint", "folder", "run", "cli", "options"}
SHELL |= {"launch", "summary", "report", "guard", "bench", "race", "probes", "costs", "study", "latency", "sweeps"}
SHELL |= {"signals", "agent", "slurm", "card", "evidence", "export", "product", "proof", "trust"}
CORE = [path for path in ROOMS if path.stem not in SHELL]
UNTESTED_ALONE = {"__init__": "no code", "run": "test_train.py", "summary": "test_train.py"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_core_never_imports_the_shell(path):
    forbidden = {f"odcheap.{room}" for room in SHELL}
    outside = {"pytorch_lightning", "lightning_fabric", "hydra", "omegaconf"}
    assert not {name for name in imports(path) if name in forbidden or name.split(".")[0] in outside}


@pytest.mark.parametrize("path", [*ROOMS, ROOT / "train.py"], ids=lambda path: path.stem)
def test_rooms_are_read_in_one_sitting(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 250
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
            assert node.args.kwarg is None, f"{node.name} takes **{node.args.kwarg and node.args.kwarg.arg}"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None)
        assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("eval", "exec"))


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
def test_every_room_has_its_tests(path):
    folder = ROOT / "tests" / path.parent.relative_to(ROOT / "odcheap")
    assert path.stem in UNTESTED_ALONE or (folder / f"test_{path.stem}.py").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "method").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_method_has_one_name_in_four_places(path):
    assert (ROOT / "odcheap" / "methods" / path.name).with_suffix(".py").is_file()
    assert (ROOT / "tests" / "methods" / f"test_{path.stem}.py").is_file()
    assert f"`{path.stem}`" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("group", ["block_type", "backbone", "data", "together", "trainer", "logger", "experiment"])
def test_every_option_has_its_readme_row(group):
    readme = (ROOT / "README.md").read_text()
    missing = [p.stem for p in (ROOT / "conf" / group).glob("*.yaml") if f"`{p.stem}`" not in readme]
    assert not missing
