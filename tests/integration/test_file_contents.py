"""Files that commands read, with any content: each is read, or refused in one line; see also `tests/runs`."""

import hashlib
import json

import pytest
import torch
from export.test_load_run import SETTINGS
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from odcheap import load_student, predict
from odcheap.data.folder_trees import KAGGLE_LABELS, TINY_LABELS, read_labels
from odcheap.evaluate.command import read_inputs
from odcheap.export.command import list_exported
from odcheap.methods.teacher import read_training_costs
from odcheap.report.report_files import is_report
from odcheap.runs.folder import is_run_folder
from odcheap.utils.errors import Failure
from tests.runs.test_schemas import ANY, CONTENT

PREPROCESS = {"shorter_side": 18, "size": [16, 16], "interpolation": "bilinear", "bit_depth": None}
BYTES = st.binary(max_size=60) | st.text(max_size=30).map(str.encode)


def changed(content):
    """A right content in which some entries have any value."""
    return st.dictionaries(st.sampled_from(sorted(content)), CONTENT, max_size=2).map(lambda odd: content | odd)


def is_read(call):
    """Calls it; returns whether it was not refused. A refusal must be one line."""
    try:
        call()
        return True
    except (Failure, predict.PredictError) as error:
        line = str(error)
    assert "\n" not in line
    assert len(line) < 1000
    return False


@given(content=CONTENT)
@example({"cost": {"training_macs": "1"}})
@example({"selected": {}, "split": "a", "versions": {"torch": 1}})
@ANY
def test_json_beside_a_run(tmp_path, content):
    for name in ("summary.json", "test.json", "evaluation.json"):
        (tmp_path / name).write_text(json.dumps(content))
    is_read(lambda: read_training_costs(tmp_path / "student.safetensors"))
    is_run_folder(tmp_path)
    read_inputs(tmp_path / "evaluation.json")


@given(preprocess=CONTENT | changed(PREPROCESS), labels=CONTENT | st.lists(st.text(max_size=3) | CONTENT, max_size=3))
@example(PREPROCESS, ["a", "b"])
@example(PREPROCESS | {"interpolation": []}, ["a", "b"])
@example(PREPROCESS, ["a", 1])
@ANY
def test_json_of_an_export(tmp_path, preprocess, labels):
    files = {predict.PREPROCESS_FILE: json.dumps(preprocess), predict.LABELS_FILE: json.dumps(labels)}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    checksums = [f"{hashlib.sha256(text.encode()).hexdigest()}  {name}" for name, text in files.items()]
    (tmp_path / predict.CARD_FILE).write_text("\n".join(checksums))
    if is_read(lambda: predict.read_export(tmp_path)):
        assert all(isinstance(label, str) for label in labels)
        assert preprocess["interpolation"] in predict.INTERPOLATIONS


@given(content=CONTENT | changed(SETTINGS))
@example(SETTINGS | {"mean": [10**400, 1, 1]})
@example(SETTINGS | {"backbone": {"part": "resnet20", "depth": 10**9}})
@ANY
def test_metadata_of_a_student(tmp_path, content):
    save_file({"fc.weight": torch.ones(3, 64)}, tmp_path / "s.safetensors", metadata={"odcheap": json.dumps(content)})
    assert not is_read(lambda: load_student(tmp_path / "s.safetensors"))  # other weights are missing in any case


@given(content=BYTES)
@example(b"\xff")
@example(b"a\t\nb\t \n\t\t")
@ANY
def test_lists_of_labels_and_texts_of_a_report_or_an_export(tmp_path, content):
    (tmp_path / "val").mkdir(exist_ok=True)
    for name in (f"val/{TINY_LABELS}", KAGGLE_LABELS):
        (tmp_path / name).write_bytes(content)
        is_read(lambda: read_labels(tmp_path, "val"))
        (tmp_path / name).unlink()
    (tmp_path / "README.md").write_bytes(content)
    list_exported(tmp_path)
    assert not is_report(tmp_path / "README.md")
    with pytest.raises(predict.PredictError):
        predict.read_export(tmp_path)
