import contextlib
import json
import os
import pickle
import socket
import stat
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from odcheap.utils.errors import OptionError, WriteError, describe_external_failure
from odcheap.utils.files import MAX_TENSOR_BYTES, read_safetensors, read_torch, verify_checksum, write_atomic


def header_of(header):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, zipped):
    file, mark = tmp_path / "bomb.pt", tmp_path / "ran"
    torch.save({"state_dict": Bomb(mark)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(OptionError, match=r"weights=.*bomb.pt: not a complete checkpoint of plain tensors"):
        read_torch(file, "weights")
    file.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(OptionError, match="not a complete checkpoint of plain tensors"):
        read_torch(file, "weights")
    assert not mark.exists()


def test_truncated_files_at_every_tenth_are_refused(tmp_path):
    file = tmp_path / "whole.pt"
    torch.save({"state_dict": {"a": torch.randn(100)}}, file)
    whole = file.read_bytes()
    for tenth in range(10):
        file.write_bytes(whole[: len(whole) * tenth // 10])
        with pytest.raises(OptionError, match="not a"):
            read_torch(file)
    file.write_bytes(whole)
    assert read_torch(file)["state_dict"]["a"].shape == (100,)


def test_missing_foreign_and_other_content_is_refused(tmp_path):
    with pytest.raises(OptionError, match=r"resume=.*nothing.ckpt: no such file"):
        read_torch(tmp_path / "nothing.ckpt", "resume")
    (tmp_path / "text").write_text("hello, this is no checkpoint at all")
    with pytest.raises(OptionError, match="not a complete checkpoint of plain tensors"):
        read_torch(tmp_path / "text")
    torch.save([1, 2], tmp_path / "list")
    with pytest.raises(OptionError, match="it holds a list, not a dict"):
        read_torch(tmp_path / "list")


def test_damaged_safetensors_are_refused(tmp_path):
    file = tmp_path / "student.safetensors"
    save_file({"a": torch.ones(3)}, file, metadata={"odcheap": "{}"})
    assert read_safetensors(file)[1] == {"odcheap": "{}"}
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(OptionError, match="not a complete safetensors file"):
        read_safetensors(file)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "kept"
    file.write_bytes(b"old")

    def fail(out):
        out.write(b"half of the n")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomic(file, fail)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]
    write_atomic(file, lambda out: out.write(b"new"))
    assert file.read_bytes() == b"new"


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_bytes_are_refused_or_read_and_nothing_else(tmp_path, kind, data):
    path = tmp_path / f"x.{kind}"
    tensors = {"state_dict": {"a": torch.ones(5), "b": torch.zeros(2, 3)}}
    if kind == "safetensors":
        save_file(tensors["state_dict"], path, metadata={"odcheap": "{}"})
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    with contextlib.suppress(OptionError):
        (read_safetensors if kind == "safetensors" else read_torch)(path)


def test_a_folder_that_is_gone_is_no_bug(tmp_path):
    with pytest.raises(WriteError) as failure:
        write_atomic(tmp_path / "gone" / "file", lambda out: out.write(b"new"))
    assert describe_external_failure(failure.value).startswith(f"{tmp_path}/gone/file: No such file or directory")


def test_links_are_replaced_and_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    os.link(tmp_path / "precious", tmp_path / "hard")
    for name in ("link", "hard"):
        write_atomic(tmp_path / name, lambda out: out.write(b"new"))
        assert (tmp_path / name).read_text() == "new"
    assert (tmp_path / "precious").read_text() == "mine"


def test_only_regular_files_are_read(tmp_path, soon):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))
    for path in (tmp_path / "pipe", tmp_path / "folder", tmp_path / "socket", "/dev/zero", "a\0b"):
        for read in (read_torch, read_safetensors, verify_checksum):
            with pytest.raises(OptionError, match="no such file|not a regular file"):
                read(path, "path")


@pytest.mark.parametrize("read", [read_torch, read_safetensors, verify_checksum])
def test_a_file_of_tensors_has_a_largest_size(tmp_path, read):
    file = tmp_path / "large"
    file.touch()
    os.truncate(file, MAX_TENSOR_BYTES + 1)  # without using the disk
    with pytest.raises(OptionError, match=r"weights=.*large: has 34,359,738,369 bytes, more than 34,359,738,368$"):
        read(file, "weights")


def test_an_archive_that_unpacks_to_more_than_it_has_is_not_unpacked(tmp_path):
    file, packed = tmp_path / "plain.pt", tmp_path / "packed.pt"
    torch.save({"a": torch.zeros(1 << 20)}, file)
    assert read_torch(file)["a"].shape == (1 << 20,)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(OptionError, match=r"weights=.*: it has [\d,]+ bytes and unpacks to 4,19\d,\d+$"):
        read_torch(packed, "weights")


@pytest.mark.parametrize(
    "content",
    [
        (1 << 60).to_bytes(8, "little"),  # a header of so many bytes
        (90 << 20).to_bytes(8, "little") + b"{}",
        header_of({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
        header_of({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}) + bytes(4),
        header_of({"a": {"dtype": "F32", "shape": [1 << 63, 1 << 63], "data_offsets": [0, 4]}}) + bytes(4),
        header_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [1 << 50, 4]}}) + bytes(4),
    ],
)
def test_a_safetensors_header_that_claims_more_than_the_file_is_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(OptionError, match=r"^weights=.*x.safetensors: not a complete safetensors file \([^\n]*\)$"):
        read_safetensors(tmp_path / "x.safetensors", "weights")


def test_whoever_reads_the_old_file_meanwhile_reads_all_of_it(tmp_path):
    file = tmp_path / "kept"
    file.write_bytes(b"old")
    with open(file, "rb") as reader:
        write_atomic(file, lambda out: out.write(b"new"))
        assert reader.read() == b"old"


def test_content_is_on_the_disk_before_its_name_is_and_the_name_before_the_call_returns(tmp_path, monkeypatch):
    done = []

    def told(name, call):
        def telling(*given):
            isfile = name == "fsync" and stat.S_ISREG(os.fstat(given[0]).st_mode)
            done.append("content" if isfile else name)
            return call(*given)

        return telling

    for name in ("fsync", "replace"):
        monkeypatch.setattr(f"odcheap.utils.files.os.{name}", told(name, getattr(os, name)))
    write_atomic(tmp_path / "file", lambda out: out.write(b"new"))
    assert done == ["content", "replace", "fsync"]
