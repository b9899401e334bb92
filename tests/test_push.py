"""An export goes to a stand-in of the Hugging Face Hub on this machine, and its student comes back."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
import yaml
from export.test_load_run import SETTINGS, write_run
from hub_server import run_hub

from odcheap import cli, load_student
from odcheap.export import command as export_command
from odcheap.export import model_card
from odcheap.layers.cheap_conv import DW
from odcheap.models.cifar import CifarResNet
from odcheap.training.summary import write_student
from odcheap.utils import hub as hub_access
from odcheap.utils.errors import Failure, OptionError

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
constants = pytest.importorskip("huggingface_hub.constants")

CARD = """# `DW, resnet8`

Test accuracy 81.25 % on 16 images.

```
python predict.py IMAGE_OR_FOLDER...
```

```python
student = load_student("student.safetensors")
```

"""


def use_address(monkeypatch, address):
    """Sets the address of the Hub, as HF_ENDPOINT does when the package is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, and a user who has a token for it."""
    with run_hub() as server:
        use_address(monkeypatch, server.address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own for large files
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 5)
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        yield server
        huggingface_hub.close_session()


def write_export(folder, card=CARD, data="cifar10"):
    """Writes an export whose student was never trained."""
    folder.mkdir()
    write_student(folder / "student.safetensors", CifarResNet(8, DW(), 3), SETTINGS)
    (folder / "student.onnx").write_bytes(b"large")
    (folder / "preprocess.json").write_text("{}")
    (folder / "labels.json").write_text('["a", "b", "c"]')
    results = {"network": "DW, resnet8", "data": data, "test": {"images": 16, "top1": 0.8125}}
    (folder / "results.json").write_text(json.dumps(results))
    lines = model_card.checksum_lines(folder)
    (folder / "README.md").write_text("\n".join([card, *lines, ""]))
    return folder


def push(capsys, *arguments):
    """Returns the exit status of the command, and what it has printed."""
    capsys.readouterr()
    status = cli.main(["push", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out if status == 0 else err


def read_metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_an_export_of_a_run_is_uploaded_and_its_student_comes_back(hub, light, tmp_path, capsys):
    job_dir = write_run(tmp_path / "run")
    assert export_command.main([str(job_dir), "--seconds", "0.005"]) == 0
    status, out = push(capsys, job_dir / "export", "me/net", "--license", "mit")
    assert (status, out.splitlines()[1:]) == (
        0,
        [f"uploaded: {hub.address}/me/net (private)", 'in Python: load_student("hf://me/net")'],
    )
    uploaded = hub.newest("me/net")
    own = {path.name: path.read_bytes() for path in (job_dir / "export").iterdir()}
    card, own_card = uploaded["README.md"].decode(), own["README.md"].decode()
    assert uploaded == own | {"README.md": uploaded["README.md"], ".gitattributes": b""}
    assert card.endswith(own_card.partition("## Accuracy by class")[2])
    assert 'load_student("hf://me/net")' in card
    assert "```\nhf download me/net --local-dir student && cd student\npython predict.py IMAGE" in card

    images = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        expected, loaded = (load_student(path)(images) for path in (job_dir / "student.safetensors", "hf://me/net"))
    assert torch.equal(loaded, expected)
    assert {request.rpartition("/")[2] for request in hub.received if "/resolve/" in request} == {"student.safetensors"}


def test_the_package_of_the_hub_reads_the_metadata(hub, tmp_path, capsys):
    folder = write_export(tmp_path / "export")
    assert push(capsys, folder, "me/one", "--license", "mit")[0] == 0
    data = huggingface_hub.ModelCard(hub.newest("me/one")["README.md"].decode()).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("odcheap", "image-classification", "mit")
    assert (data.datasets, data.metrics, data.model_name) == (["uoft-cs/cifar10"], ["accuracy"], "one")
    (result,) = data.eval_results
    assert (result.task_type, result.dataset_type, result.dataset_split) == (
        data.pipeline_tag,
        "uoft-cs/cifar10",
        "test",
    )
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.8125)
    assert (folder / "README.md").read_text().startswith("# ")  # the export itself is not changed
    assert push(capsys, folder, "me/one", "--dataset", "a/x", "--dataset", "a/y")[0] == 0
    metadata = read_metadata(hub.newest("me/one")["README.md"].decode())
    assert metadata["datasets"] == ["a/x", "a/y"]
    assert metadata["model-index"][0]["results"][0]["dataset"]["type"] == "a/x"


def test_metadata_that_the_user_has_written_are_kept(hub, tmp_path, capsys):
    folder = write_export(tmp_path / "export", card=f"---\nlicense: cc-by-4.0\ntags: [birds]\n---\n\n{CARD}")
    status, out = push(capsys, folder, "me/birds")
    assert status == 0
    assert "states no license" not in out
    metadata = read_metadata(hub.newest("me/birds")["README.md"].decode())
    assert (metadata["license"], metadata["tags"], metadata["library_name"]) == ("cc-by-4.0", ["birds"], "odcheap")
    assert push(capsys, folder, "me/birds", "--license", "mit")[0] == 0
    assert read_metadata(hub.newest("me/birds")["README.md"].decode())["license"] == "mit"
    broken = write_export(tmp_path / "broken", card=f"---\nlicense: [\n---\n{CARD}")
    line = f"error: EXPORT_DIR={broken}: README.md cannot be read (its metadata are not valid YAML)\n"
    assert push(capsys, broken, "me/birds") == (1, line)


def test_without_test_images_no_accuracy_is_stated(hub, tmp_path, capsys):
    folder = write_export(tmp_path / "export", data=None)
    (folder / "results.json").write_text('{"data": null, "test": null}')
    (folder / "README.md").write_text("\n".join([CARD, *model_card.checksum_lines(folder)[1:], ""]))
    assert push(capsys, folder, "me/net")[0] == 0
    metadata = read_metadata(hub.newest("me/net")["README.md"].decode())
    assert metadata == {"library_name": "odcheap", "pipeline_tag": "image-classification", "tags": ["odcheap", "onnx"]}


def test_a_repository_is_public_on_request_only(hub, tmp_path, capsys):
    folder = write_export(tmp_path / "export")
    assert "(private)" in push(capsys, folder, "me/mine")[1]
    assert "(public)" in push(capsys, folder, "me/all", "--public")[1]
    assert hub.private == {"me/mine"}
    assert "(private)" in push(capsys, folder, "me/mine", "--public")[1]  # it says what the repository is


def test_a_later_export_replaces_an_earlier_one_and_other_files_stay(hub, tmp_path, capsys):
    folder = write_export(tmp_path / "export")
    hub.add("me/net", {"preprocess.json": b"{}", "student-int8.onnx": b"old", "photo.png": b"mine", "README.md": b"#"})
    (folder / "engine.trt").write_text("compiled for hours")
    status, out = push(capsys, folder, "me/net")
    assert status == 0
    assert "left out, since README.md does not list them: engine.trt\n" in out
    newest = hub.newest("me/net")
    assert newest.keys() == {path.name for path in folder.iterdir()} - {"engine.trt"} | {"photo.png"}
    assert len(hub.repositories["me/net"]) == 2  # one commit


def test_a_repository_with_other_things_is_not_overwritten(hub, tmp_path, capsys):
    hub.add("me/thesis", {".gitattributes": b"", "README.md": b"#", "thesis.tex": b"precious"})
    line = "error: REPOSITORY=me/thesis: has other files than an export (thesis.tex): name another repository\n"
    assert push(capsys, write_export(tmp_path / "export"), "me/thesis") == (1, line)
    assert len(hub.repositories["me/thesis"]) == 1


@pytest.mark.parametrize(
    ("repository", "token", "line"),
    [
        ("me/net", None, "no valid token of the Hugging Face Hub: `hf auth login` stores one, or set HF_TOKEN"),
        ("me/net", "hf_wrong", "no valid token of the Hugging Face Hub: `hf auth login` stores one, or set HF_TOKEN"),
        ("you/net", "hf_mine", "your token does not have the permission for this (You don't have the rights to write"),
        ("net", "hf_mine", "REPOSITORY=net: must be user/name"),
        ("https://hub/me/net", "hf_mine", "REPOSITORY=https://hub/me/net: must be user/name"),
    ],
)
def test_an_upload_that_is_not_possible_is_one_line(hub, tmp_path, capsys, monkeypatch, repository, token, line):
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    status, err = push(capsys, write_export(tmp_path / "export"), repository)
    assert status == 1
    assert err.startswith("error: ")
    assert line in err
    assert err.count("\n") == 1
    assert hub.repositories == {}


def test_a_license_that_the_hub_does_not_know_is_one_line(hub, tmp_path, capsys):
    status, err = push(capsys, write_export(tmp_path / "export"), "me/net", "--license", "me@home")
    assert status == 1
    assert err == (
        'error: REPOSITORY=me/net: Invalid metadata in README.md. - "license" must be one of the known licenses\n'
    )


def test_what_is_no_export_or_was_changed_is_not_uploaded(hub, tmp_path, capsys):
    assert push(capsys, tmp_path, "me/net") == (
        1,
        f"error: EXPORT_DIR={tmp_path}: is not an export; odcheap export JOB_DIR writes one\n",
    )
    folder = write_export(tmp_path / "export")
    (folder / "student.onnx").write_bytes(b"other")
    line = f"error: {folder / 'student.onnx'}: was changed after the export (its sha256 differs from README.md)\n"
    assert push(capsys, folder, "me/net") == (1, line)
    older = write_export(tmp_path / "older")
    (older / "results.json").unlink()
    (older / "README.md").write_text("\n".join(model_card.checksum_lines(older)[1:]))
    line = "its results.json is missing or not valid: odcheap export JOB_DIR --overwrite writes it anew\n"
    assert push(capsys, older, "me/net")[1].endswith(line)
    assert hub.received == []


@pytest.mark.parametrize(("status", "answer"), [(500, "answers 500"), (429, "answers 429"), (403, "the permission")])
def test_what_the_hub_refuses_is_one_line(hub, tmp_path, capsys, status, answer):
    hub.failure = status
    ended, err = push(capsys, write_export(tmp_path / "export"), "me/net")
    assert ended == 1
    assert answer in err
    assert err.count("\n") == 1


def upload_student(hub, repository="you/net", **files):
    """Adds a student to a repository, and returns the commit."""
    return hub.add(repository, {"student.safetensors": files.get("student", b"not a student"), "README.md": b"#"})


def test_a_revision_is_a_commit_or_a_tag(hub, tmp_path):
    networks = [CifarResNet(8, DW(), 3).eval() for _ in range(2)]
    commits = []
    for network in networks:
        write_student(tmp_path / "student.safetensors", network, SETTINGS)
        commits.append(upload_student(hub, student=(tmp_path / "student.safetensors").read_bytes()))
    hub.tags["you/net", "v1.0"] = commits[0]
    cases = {"": 1, "@main": 1, "@v1.0": 0, f"@{commits[0]}": 0, f"@{commits[1]}": 1}
    for revision, which in cases.items():
        loaded = load_student(f"hf://you/net{revision}").network.state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in networks[which].state_dict().items())


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("hf://you/missing", "there is no such repository, or your token may not read it"),
        ("hf://you/secret", "there is no such repository, or your token may not read it"),
        ("hf://you/net@v9", "the repository has no such revision"),
        ("hf://you/empty", "the repository has no student.safetensors, so that no student can be loaded from it"),
        ("hf://you/net", "not a complete safetensors file"),
        ("hf://you", "must be hf://user/name, or hf://user/name@REVISION"),
        ("hf://you/net@", "must be hf://user/name, or hf://user/name@REVISION"),
        ("hf://you/../net", "must be hf://user/name, or hf://user/name@REVISION"),
    ],
)
@pytest.mark.parametrize("has_token", [True, False])
def test_a_student_that_cannot_be_loaded_is_one_line(hub, monkeypatch, address, line, has_token):
    if not has_token:
        monkeypatch.delenv("HF_TOKEN")
    upload_student(hub)
    upload_student(hub, "you/secret")
    hub.private.add("you/secret")
    hub.add("you/empty", {"README.md": b"#", "model.pkl": b"run me"})
    with pytest.raises(OptionError) as raised:
        load_student(address)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not any("model.pkl" in request for request in hub.received)


def test_a_token_that_is_not_valid_is_one_line(hub, monkeypatch):
    upload_student(hub)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(
        OptionError, match="^path=hf://you/net: no valid token of the Hugging Face Hub: `hf auth login`"
    ):
        load_student("hf://you/net")


def test_without_a_connection_there_is_one_line_and_what_was_downloaded_is_used(hub, tmp_path, monkeypatch, capsys):
    write_student(tmp_path / "student.safetensors", CifarResNet(8, DW(), 3), SETTINGS)
    upload_student(hub, student=(tmp_path / "student.safetensors").read_bytes())
    load_student("hf://you/net")
    hub.server_close()
    hub.socket.close()
    use_address(monkeypatch, "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # before another try
    huggingface_hub.close_session()
    load_student("hf://you/net")
    with pytest.raises(OptionError, match=r"^path=hf://you/other: the Hugging Face Hub cannot be reached \("):
        load_student("hf://you/other")
    status, err = push(capsys, write_export(tmp_path / "export"), "me/net")
    assert status == 1
    assert err.startswith("error: REPOSITORY=me/net: the Hugging Face Hub cannot be reached (")
    assert err.count("\n") == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    status, err = push(capsys, tmp_path / "export", "me/net")
    assert err == "error: REPOSITORY=me/net: the Hugging Face Hub is not asked, since HF_HUB_OFFLINE is set\n"


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(Failure, match=r"^huggingface_hub is not installed: pip install 'odcheap\[hub\]'$"):
        hub_access.download_student("hf://you/net")


def test_the_command_in_a_process_of_its_own(hub, tmp_path):
    """The settings of the Hub's package come from the environment there."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [sys.executable, "-m", "odcheap", "push", str(write_export(tmp_path / "export")), "me/net"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "student.safetensors" in hub.newest("me/net")
