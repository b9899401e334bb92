"""Files from strangers, in every place where a file is read: none runs code, writes outside or ends in a traceback."""

import functools
import hashlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
import struct
import tarfile
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from odcheap import predict
from odcheap.data import cifar, folder_trees
from odcheap.export import command as export_command
from odcheap.layers.cheap_conv import Standard
from odcheap.models.cifar import CifarResNet
from odcheap.report import command as report_command
from odcheap.runs.reference import load_reference
from odcheap.training.callbacks import Record
from odcheap.training.summary import write_student
from odcheap.utils.errors import Failure, OptionError
from odcheap.utils.files import checksum_comment
from odcheap.utils.parts import find_conf_dir
from tests.methods.test_teacher import SETTINGS as STUDENT


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def payloads(mark):
    """Files that would run code if anybody unpickled them: bare, in PyTorch's formats, sealed like our own."""
    bomb = Bomb(mark)
    yield pickle.dumps(bomb)
    yield pickle.dumps({"state_dict": bomb}, protocol=0)
    for content in (bomb, {"state_dict": {"a": bomb}}, {"odcheap": bomb, "loops": {}, "state_dict": {}}):
        for zipped in (True, False):
            made = io.BytesIO()
            torch.save(content, made, _use_new_zipfile_serialization=zipped)
            yield made.getvalue()
    sealed = made.getvalue()
    yield sealed[:-2] + checksum_comment(hashlib.sha256(sealed))
    yield b"\x08\x00\x00\x00\x00\x00\x00\x00" + pickle.dumps(bomb)
    yield b"!!python/object/apply:os.mkdir [" + str(mark).encode() + b"]"
    yield b'{"__reduce__": "os.system"}'
    yield b""


@pytest.fixture
def finished(trained):
    return trained("trainer.max_epochs=1")


def places(job_dir):
    """(file to replace, how it is then read): train.py's options, or a command of ours."""
    newest, student = job_dir / "checkpoints" / "epoch-0000.ckpt", job_dir / "student.safetensors"
    other = job_dir.parent / "other"
    yield newest, [f"resume={job_dir}", "trainer.max_epochs=2"]
    yield newest, [f"resume={newest}", f"job_dir={other}"]
    yield newest, ["test_only=true", f"resume={job_dir}"]
    for name in ("w.ckpt", "w.safetensors", "w.pt", "w.pth"):
        file = job_dir.parent / name
        yield file, [*TINY, f"weights={file}", f"job_dir={other}"]
        yield file, [*TINY, "method=kd", f"method.teacher_weights={file}", f"job_dir={other}"]
        published = ["backbone=resnet18", "method=kd", "method.teacher_network=torchvision/resnet18"]
        yield file, [*TINY[:2], *published, f"method.teacher_weights={file}", "trainer=cpu", f"job_dir={other}"]
        yield file, [*TINY[:2], "backbone=resnet18", f"backbone.pretrained={file}", "trainer=cpu", f"job_dir={other}"]
    yield student, [*TINY, "method=kd", f"method.teacher_weights={job_dir}", f"job_dir={other}"]
    yield student, (export_command, "--seconds=0.01")
    yield newest, (export_command, "--student=0")
    for name in ("summary.json", "config.yaml", "status.json", "metrics.csv"):
        yield job_dir / name, (report_command, "--no-latency")
    for name in ("summary.json", "config.yaml"):
        yield job_dir / name, (export_command, "--seconds=0.01")


def is_harmless(command, capsys, job_dir, how):
    if isinstance(how, list):
        result = command(*how)
        status, out, err = result
    else:
        room, option = how
        status = room.main([str(job_dir), option])
        out, err = capsys.readouterr()
    assert status in (0, 1), (how, err)
    assert "Traceback" not in out + err, (how, err)
    assert not err or (err.startswith("error: ") and err.count("\n") == 1), (how, err)
    return status


def none_runs(finished, command, capsys, every):
    """Puts every so manieth payload into each place; the number of files tried."""
    tmp_path, tried = finished.parent, 0
    mark = tmp_path / "owned"
    for k, (file, how) in enumerate(places(finished)):
        kept = file.read_bytes() if file.is_file() else None
        for content in list(payloads(mark))[k % every :: every]:
            file.write_bytes(content)
            status = is_harmless(command, capsys, finished, how)
            reading_pickles = isinstance(how, list) or file.suffix in (".ckpt", ".safetensors")
            assert status == 1 or not reading_pickles, (file, how, content)
            assert not mark.exists(), (file, how)
            tried += 1
        file.unlink() if kept is None else file.write_bytes(kept)
    assert not (tmp_path / "other").exists()
    return tried


def test_no_pickle_runs_wherever_it_lies(finished, command, capsys):
    assert none_runs(finished, command, capsys, every=12) > 25


@pytest.mark.slow
def test_no_pickle_of_any_kind_runs_wherever_it_lies(finished, command, capsys):
    tried = none_runs(finished, command, capsys, every=1)
    print(f"\n{tried} hostile files tried")
    assert tried > 300


def test_load_checkpoint_and_the_image_caches_run_nothing(tmp_path, capsys):
    mark = tmp_path / "owned"
    for part, count in (("train", 4), ("test", 2)):
        for k in range(count):
            folder = tmp_path / "data" / "cifar10" / part / ("cat", "dog")[k % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((32, 32, 3), 20 * k, np.uint8)).save(folder / f"{k}.png")
    official = tmp_path / "official" / "cifar-10-batches-py"
    official.mkdir(parents=True)
    for content in payloads(mark):
        (tmp_path / "reference.pt").write_bytes(content)
        with pytest.raises(OptionError):
            load_reference(tmp_path / "reference.pt")
        (tmp_path / "data" / ".cifar10.safetensors").write_bytes(content)
        found = cifar.load_cifar("cifar10", str(tmp_path / "data"), 4, 2, download=False)
        assert found.train.shape == (4, 3, 32, 32)
        for name in ("batches.meta", "test_batch", *(f"data_batch_{k}" for k in range(1, 6))):
            (official / name).write_bytes(content)
        with pytest.raises(OptionError, match="incomplete or damaged"):
            cifar.load_cifar("cifar10", str(tmp_path / "official"), 4, 2, download=True)
        assert not mark.exists()
    capsys.readouterr()


def hostile_tar(path, names):
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 2
            archive.addfile(info, io.BytesIO(b"hi"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(link)


@pytest.mark.parametrize(
    "which", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"]
)
def test_an_archive_that_is_not_the_official_one_is_not_opened(tmp_path, which):
    root = tmp_path / "data"
    root.mkdir()
    for name in {"ILSVRC2012_img_train.tar", which}:
        hostile_tar(root / name, ["../outside", "/tmp/odcheap-owned", "train/../../outside"])
    before = set(tmp_path.rglob("*"))
    with pytest.raises(OptionError, match="an archive is missing or damaged"):
        folder_trees.list_imagenet(str(root))
    assert set(tmp_path.rglob("*")) == before
    assert not Path("/tmp/odcheap-owned").exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_download_that_is_not_the_official_archive_is_not_opened(tmp_path, monkeypatch, name):
    hostile_tar(tmp_path / "sent.tar.gz", ["../outside", "/tmp/odcheap-owned", "cifar-10-batches-py/batches.meta"])
    content, root = (tmp_path / "sent.tar.gz").read_bytes(), tmp_path / "data" / "here"

    def sent(*_, **__):
        answer = io.BytesIO(content)
        answer.length, answer.url = len(content), None
        return answer

    monkeypatch.setattr(urllib.request, "urlopen", sent)
    for _ in range(2):  # the second time it lies there already
        with pytest.raises(OptionError, match="the downloaded files cannot be used"):
            cifar.load_cifar(name, str(root), 4, 2, download=True)
    assert [path.suffixes for path in root.iterdir()] == [[".tar", ".gz"]]
    assert not (tmp_path / "data" / "outside").exists()
    assert not Path("/tmp/odcheap-owned").exists()


def png_of(width, height, bits=8, kind=2, rows=bytes(100)):
    """A PNG that claims to be so large, in a few bytes; `rows` are its pixels, each row after a zero."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pictures_of_strangers():
    yield "bomb.png", png_of(60_000, 60_000)
    yield "whole_bomb.png", png_of(14_000, 14_000, bits=1, kind=0, rows=bytes(14_000 * 1_751))
    yield "wide.png", png_of(2**31 - 1, 1)
    yield "none.png", png_of(0, 0)
    yield (
        "bomb.gif",
        b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0," + struct.pack("<HHHH", 0, 0, 65535, 65535),
    )
    yield "bomb.bmp", b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 90_000, 90_000, 1, 24, 0, 0, 1, 1, 0, 0)
    yield "script.svg", b"<svg onload='alert(1)'/>"
    yield "code.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(owned) (w) file\nshowpage\n"
    yield "pickle.jpg", pickle.dumps(Bomb("owned"))
    yield "empty.webp", b""
    yield "zeros.tif", b"\0" * 1000


@pytest.mark.parametrize(("name", "content"), list(pictures_of_strangers()), ids=lambda value: str(value)[:12])
def test_a_hostile_picture_is_refused_in_one_line(tmp_path, monkeypatch, name, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(predict.ImageError) as refused:
        predict.decode_image(name)
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


EVIL = "a\x1b[31m|`$x^$<b>[m](j)\n# b"


def test_names_of_strangers_print_harmlessly(command, light, tmp_path, capsys):
    """As labels, file names, a folder and an option, in run, table, report, card and prediction."""
    for k in range(24):
        folder = tmp_path / "data" / (EVIL, "other\x07")[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 20, 3), 10 * k, np.uint8)).save(folder / f"{k}\x1b[2J.png")
    (tmp_path / "data" / EVIL / "broken\x1b]0;x\x07.png").write_bytes(b"?")
    (tmp_path / "data" / EVIL / "text\x1b[2J.txt").write_text("?")
    options = ["data=imagefolder", f"data_dir={tmp_path / 'data'}", "data.image_size=16", "data.val_size=4"]
    options += ["data.load.test_size=6", "data.workers=0", "num_stu=1", "method=alone", "backbone=resnet20"]
    options += ["backbone.depth=8", "trainer=cpu", "trainer.max_epochs=1", "logger=csv", "data.batch_size=8"]
    result = command(*options, f"job_dir={tmp_path}/run")
    assert result.status == 0, result.err
    said = result.out + result.err
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(config + "seed_name: " + json.dumps(EVIL) + "\n")
    other = tmp_path / f"run{EVIL.replace('/', '')}"
    other.mkdir()
    for name in ("config.yaml", "summary.json", "metrics.csv"):
        text = (tmp_path / "run" / name).read_text().replace("seed_name: ", "seed_name: 1 # ")
        (other / name).write_text(text)
    (tmp_path / f"failed{EVIL.replace('/', '')}").mkdir()
    word = {"state": "failed", "reason": EVIL}
    (tmp_path / f"failed{EVIL.replace('/', '')}" / "status.json").write_text(json.dumps(word))
    assert report_command.main([str(tmp_path), "--status"]) == 1
    assert report_command.main([str(tmp_path), "--no-latency", "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    outside_of_code = re.sub(r"`[^`]*`", "", text.replace("\\`", ""))
    assert not re.search(r"(?<!\\)<b>", outside_of_code)
    assert export_command.main([str(tmp_path / "run"), "--seconds", "0.01"]) == 0
    folder = tmp_path / "run" / "export"
    assert predict.main([str(folder), str(tmp_path / "data")]) == 1
    said += "".join(capsys.readouterr()) + text + (folder / "README.md").read_text()
    assert not {sign for sign in said if ord(sign) < 32} - {"\n"}
    assert "\n# b" not in said
    assert json.loads((folder / "labels.json").read_text()) == [EVIL, "other\x07"]


VALUES = ["null", "true", "-1", "0", "1e308", "x", "[]", "{}", "''", "nan", "-inf", "1" + 30 * "0", "[1,[2]]", "{a: 1}"]
VALUES += ['"\x1b[31m"', "../../x", "[[a,b],{c: d}]"]


def options(node, prefix=""):
    """Every option and every part of a run's config."""
    for key in node.keys() - {"hydra"}:
        yield prefix + key
        if not OmegaConf.is_missing(node, key) and OmegaConf.is_dict(node[key]):
            yield from options(node[key], f"{prefix}{key}.")


ON_DIGITS = [option for option in TINY if not option.startswith("backbone")]
PICTURES = ["data=imagefolder", "data_dir=PICTURES", "data.image_size=32", "data.val_size=4", "data.load.test_size=6"]
PICTURES += ["data.workers=0", "data.batch_size=8", "num_stu=1", "method=alone", "trainer=cpu", "logger=csv"]
SETTINGS = [TINY, [*TINY, "method=kd", "method.teacher_weights=TEACHER"]]
SETTINGS += [[*TINY, f"method={name}"] for name in ("alone", "dml", "ffl", "kdcl", "lmcl", "okddip", "one", "pcl")]
SETTINGS += [[*TINY, "scheduler=one_cycle"], [*TINY, "block_type=Group", "logger=tensorboard"]]
SETTINGS += [[*ON_DIGITS, "backbone=resnet56_converted", "backbone.network.depth=8"]]
SETTINGS += [[*ON_DIGITS, "backbone=wrn16_4", "backbone.network.depth=10", "backbone.network.width=1"]]
SETTINGS += [
    [*ON_DIGITS, "backbone=densenet40", "backbone.network.depth=7"],
    [*PICTURES, "backbone=torchvision", "backbone.name=resnet18"],
]
SMALL_TREE = ["data.load.train_images=24", "data.load.test_images=24", "data.load.download=false", "data.val_size=4"]
SETTINGS += [[*TINY[2:], "data=cifar10", "data_dir=TREE", "data.batch_size=8", *SMALL_TREE]]


@functools.cache
def list_options():
    """(setting, option) for all options of conf/, each in the first setting that has it, and as a part's entry too."""
    seen, found = {"test_only"}, []
    with initialize_config_dir(str(find_conf_dir()), version_base="1.3"):
        for k, setting in enumerate(SETTINGS):
            for name in sorted({*options(compose("config", [*setting, "job_dir=unused"]))} - seen):
                seen.add(name)
                found.append((k, f"{name}={{}}"))
                if name.count(".") > 1:
                    part, _, last = name.rpartition(".")
                    found.append((k, f"{part}={{{{{last}: {{}}}}}}"))
    return found


@pytest.fixture(scope="session")
def files_given(tmp_path_factory):
    """What the settings need of files."""
    where = tmp_path_factory.mktemp("given")
    for part in ("pictures", "tree/cifar10/train", "tree/cifar10/test"):
        for k in range(24):
            path = where / part / "ab"[k % 2] / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((32, 32, 3), 10 * k, np.uint8)).save(path)
    classes = [str(digit) for digit in range(10)]
    teacher = CifarResNet(8, Standard(), len(classes))
    write_student(where / "student.safetensors", teacher, STUDENT | {"classes": classes})
    return {"TEACHER": str(where), "PICTURES": f"{where}/pictures", "TREE": f"{where}/tree"}


@pytest.fixture
def one_step(command, tmp_path, monkeypatch, files_given):
    """Runs with an option so given: refused with nothing written, or taken until the first step's end."""

    def reached(*_):
        raise Failure("the first step has ended")

    monkeypatch.setattr(Record, "on_train_batch_end", reached)

    def run(place, text):
        setting, option = SETTINGS[place[0]], place[1].format(text)
        for word, path in files_given.items():
            setting = [one.replace(word, path) for one in setting]
        not_to_write_anywhere = ["test_only=true", "weights=nothing.pt"] if option.startswith("job_dir") else []
        result = command(*setting, f"job_dir={tmp_path}/run", *not_to_write_anywhere, option)
        name = (place[0], option)
        err = result.err
        assert result.status == 1, name
        assert err.startswith("error: "), (name, err)
        assert err.count("\n") == 1, (name, err)
        assert "\x1b" not in result.out + err
        taken = err == "error: the first step has ended\n"
        assert taken or not list(tmp_path.iterdir()), (name, err)
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
        return taken

    return run


@given(
    place=st.deferred(lambda: st.sampled_from(list_options())),
    value=st.recursive(st.none() | st.booleans() | st.integers(-5, 70) | st.text(max_size=8), st.lists, max_leaves=4),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_of_any_option_is_taken_or_refused_in_one_line(one_step, place, value):
    one_step(place, json.dumps(value, ensure_ascii=False))


@pytest.mark.slow
def test_every_option_with_every_strange_value_is_taken_or_refused_in_one_line(one_step, capsys):
    taken, wrong = 0, []
    for k in range(len(SETTINGS)):
        assert one_step((k, "seed={}"), "3"), SETTINGS[k]  # or all of its values would be refused for its own sake
    for place, text in itertools.product(list_options(), VALUES):
        try:
            taken += one_step(place, text)
        except Exception as error:  # a traceback to the user
            wrong.append(error)
            with capsys.disabled():
                print(f"{place} {text}: {error}", flush=True)
    places = len(list_options())
    told = f"{places * len(VALUES)} strange values in {places} places of {len(SETTINGS)} settings"
    with capsys.disabled():
        print(f"\n{told} tried, {taken} taken")
    assert not wrong
    assert taken > len(list_options()) / 2
