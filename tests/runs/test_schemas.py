"""Files of a run with any content: a valid object, or one line that names the file and the field."""

import csv
import io
import json
import os
import re

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from odcheap.report.load_runs import load_run, read_history
from odcheap.runs import schemas
from odcheap.runs.folder import is_run_folder, read_config, read_options, read_summary
from odcheap.runs.status import is_alive, read_status
from odcheap.runs.sweep import read_plans, read_study
from odcheap.runs.training_images import SavedDigests, read_digests
from odcheap.utils.errors import OptionError
from odcheap.utils.files import MAX_BYTES, read_json

SCHEMAS = [schemas.Status, schemas.Summary, schemas.Test, schemas.Config, schemas.Checkpoint, schemas.SavedWeights]
SCHEMAS += [schemas.SweepPlan, schemas.Study, SavedDigests]
FIELDS = sorted(
    {name for schema in vars(schemas).values() if hasattr(schema, "model_fields") for name in schema.model_fields}
)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["running", "val"])
)
CONTENT = st.recursive(
    SCALARS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), below),
    max_leaves=20,
)
ANY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
DEEP = 200_000


def one_line(call):
    """Calls it; a refusal must be one line."""
    try:
        return call()
    except OptionError as error:
        line = str(error)
    assert "\n" not in line
    assert len(line) < 1000
    return None


@pytest.mark.parametrize("schema", SCHEMAS)
@given(content=CONTENT)
@ANY
def test_any_content_fits_a_schema_or_is_one_line(schema, content):
    one_line(lambda: schemas.validate(schema, content, "file.json", "job_dir"))


@given(content=CONTENT)
@example({"finished": True, "selected": {"student": -1}})
@example({"finished": True, "last": {"students": [{"test_top1": 7}]}})
@example({"state": "running", "host": os.uname().nodename, "pid": 10**20})
@example({"state": "failed", "reason": 3})
@ANY
def test_any_json_in_a_run_s_files_is_read_or_is_one_line(tmp_path, content):
    for name, read in (("summary.json", read_summary), ("status.json", read_status)):
        (tmp_path / name).write_text(json.dumps(content))
        found = one_line(lambda read=read: read(tmp_path))
        if name == "status.json" and found and found["state"] == "running":
            is_alive(found)
    load_run(tmp_path)


@given(content=CONTENT)
@example({"count": 1, "others": [{"count": -1}]})
@example({"searches": [{"overrides": [], "trials": [{"state": "LOST"}]}]})
@ANY
def test_any_json_in_the_files_of_a_sweep_and_of_training_images_is_read_or_is_one_line(tmp_path, content):
    readers = {"sweep.json": read_plans, "study.json": read_study}
    for name, read in (readers | {"training_images.json": lambda folder: read_digests(folder, "RUN")}).items():
        (tmp_path / name).write_text(json.dumps(content))
        one_line(lambda read=read: read(tmp_path))


@pytest.mark.parametrize(
    "wrong",
    [
        {"distributions": {"seed": "{"}},
        {"distributions": {"seed": '{"name": "os.system", "attributes": {}}'}},
        {"distributions": {"seed": "[]"}},
        {"params": {"seed": 1}},
        {"value": None},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*declarative_base.*")  # Optuna 2 imports it from SQLAlchemy's old place
def test_a_trial_that_optuna_cannot_take_is_one_line_that_names_the_file(tmp_path, wrong):
    from optuna.study import StudyDirection

    from odcheap.runs.study_storage import StudyStorage

    trial = {"state": "COMPLETE", "value": 0.5, "params": {}, "distributions": {}} | wrong
    (tmp_path / "study.json").write_text(json.dumps({"searches": [{"overrides": [], "trials": [trial]}]}))
    storage = StudyStorage(str(tmp_path), [])
    with pytest.raises(OptionError, match=r"study.json: has a trial that Optuna does not take") as refused:
        storage.set_study_directions(storage.create_new_study("name"), [StudyDirection.MAXIMIZE])
    assert "\n" not in str(refused.value)


@given(content=CONTENT)
@ANY
def test_any_yaml_in_a_config_is_read_or_is_one_line(tmp_path, content):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    one_line(lambda: read_config(tmp_path / "config.yaml", "JOB_DIR"))
    one_line(lambda: read_options(tmp_path / "config.yaml"))


@given(rows=st.lists(st.lists(st.text(max_size=6) | st.floats() | st.integers(), max_size=4), max_size=4))
@ANY
def test_any_table_in_metrics_is_read_or_is_one_line(tmp_path, rows):
    text = io.StringIO()
    csv.writer(text).writerows([["epoch", "val/student_0/top1"], *rows])
    (tmp_path / "metrics.csv").write_bytes(text.getvalue().encode(errors="replace"))
    one_line(lambda: read_history(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        "[" * DEEP,
        '{"a":' * DEEP,
        "[" * 100 + "]" * 100,
        "1e999",
        "NaN",
        "-Infinity",
        "1" * 5000,
        "1" * 30,
        "\x00",
        "",
        "[1",
        '{"a": 1e999}',
    ],
    ids=lambda content: f"{content[:12]}-{len(content)}",
)
def test_json_that_would_harm_is_one_line(tmp_path, content):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(OptionError, match=r"file.json: cannot be read") as refused:
        read_json(tmp_path / "file.json", "job_dir")
    assert "\n" not in str(refused.value)


SOME = {"finished": True, "selected": {}}
WRONG = [
    ("summary.json", SOME | {"selected": {"test_top1": "0.5"}}, "selected.test_top1"),
    ("summary.json", SOME | {"epochs": 1.5}, "epochs"),
    ("summary.json", SOME | {"seed": True}, "seed"),
    ("summary.json", SOME | {"students": {}}, "students"),
    ("summary.json", SOME | {"last": {"students": [{}, {"test_top1": 1.01}]}}, "last.students.1.test_top1"),
    ("status.json", {"state": "running", "pid": "7"}, "pid"),
    ("status.json", {"state": "running", "pid": 10**12}, "pid"),
    ("status.json", {"state": "running", "more": 1}, "more"),
    ("status.json", {"pid": 7}, "state"),
    ("config.yaml", {"job_dir": 3}, "job_dir"),
    ("config.yaml", {"job_dir": "x", "data": [1]}, "data"),
]


@pytest.mark.parametrize(("name", "content", "field"), WRONG, ids=str)
def test_a_wrong_type_is_refused_by_the_file_and_the_field(tmp_path, name, content, field):
    """Nothing is converted, and a report skips the run."""
    (tmp_path / "summary.json").write_text(json.dumps(SOME))
    (tmp_path / "config.yaml").write_text("job_dir: x\n")
    assert load_run(tmp_path).state == "finished"
    if name == "status.json":
        (tmp_path / "summary.json").unlink()
    (tmp_path / name).write_text(json.dumps(content))
    found = load_run(tmp_path)
    assert found.state == "unreadable"
    assert re.search(rf"{name}.*\b{field}: ", found.reason)


@pytest.mark.parametrize("row", ["0,1e300", "0,-1e300", "0,inf", "0,x", "0,1,2", "1e400,1"])
def test_a_table_of_metrics_has_numbers_that_can_be_drawn(tmp_path, row):
    (tmp_path / "metrics.csv").write_text(f"epoch,val/student_0/top1\n0,0.5\n{row}\n")
    with pytest.raises(OptionError, match=r"metrics.csv: row 3, column (epoch|val/student_0/top1): must be a number"):
        read_history(tmp_path)


def test_a_quarter_of_a_million_classes_are_read(tmp_path):
    content = {"finished": True, "selected": {"recall": {f"class number {k}": 0.5 for k in range(250_000)}}}
    (tmp_path / "summary.json").write_text(json.dumps(content))
    assert read_summary(tmp_path) == content


def test_a_test_of_another_program_is_no_mark_of_a_run(tmp_path):
    tested = {"selected": {"test_top1": 0.5}, "split": "abc", "versions": {"torch": "2"}}
    for content, expected in ((tested, True), (tested | {"split": 3}, False), (tested | {"selected": "x"}, False)):
        (tmp_path / "test.json").write_text(json.dumps(content))
        assert is_run_folder(tmp_path) == expected


ANCHORS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    "content",
    [
        ANCHORS,
        "[" * DEEP,
        "- " * 2000,
        "a: !!python/name:os.system",
        "1: 2",
        "data: {a: {1: 2}}",
        "a: .inf",
        "a: 2020-01-01",
        "a: !!int x",
        "!!binary x",
        "? [a]\n: b",
        "a: &x [*x]",
        "job_dir: 3",
        "data: 3",
        "x" * (2 << 20),
    ],
    ids=lambda content: content[:12],
)
def test_yaml_that_would_harm_is_one_line(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    if content != "a: 2020-01-01":  # a text, as OmegaConf reads it
        with pytest.raises(OptionError, match=r"config.yaml: (cannot be read|is )") as refused:
            read_config(tmp_path / "config.yaml", "JOB_DIR")
        assert "\n" not in str(refused.value)


def test_what_is_too_large_or_no_file_is_one_line(tmp_path, soon):
    with open(tmp_path / "summary.json", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(OptionError, match="is larger than|cannot be read"):
        read_summary(tmp_path)
    (tmp_path / "small.json").write_text("[1]" + 98 * " ")
    with pytest.raises(OptionError, match=r"small.json: is larger than 100 bytes"):
        read_json(tmp_path / "small.json", "job_dir", max_bytes=100)
    assert read_json(tmp_path / "small.json", "job_dir", max_bytes=101) == [1]
    for make in (os.mkfifo, os.mkdir):
        os.unlink(tmp_path / "summary.json")
        make(tmp_path / "summary.json")
        assert load_run(tmp_path).state == "unreadable"
        with pytest.raises(OptionError, match="not a regular file|it is a folder"):
            read_summary(tmp_path)
