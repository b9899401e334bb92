"""Pictures from files as batches, and whole runs on small trees of every layout."""

import csv
import itertools
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import torchvision
from conftest import Begun
from PIL import Image
from safetensors import safe_open

from odcheap import cli
from odcheap.data.base import Process
from odcheap.data.folder_trees import list_class_folders
from odcheap.data.image_folder import BrokenImages, ImageFolderData
from odcheap.data.policies import TrivialAugment
from odcheap.data.transforms import Normalization
from odcheap.utils.errors import OptionError
from odcheap.utils.seeds import make_generator

SMALL = ["data=imagefolder", "data.image_size=16", "data.min_scale=0.5", "data.workers=0", "data.batch_size=16"]
SMALL += ["backbone=resnet20", "backbone.depth=8", "num_stu=2", "trainer=cpu", "trainer.max_epochs=2", "logger=csv"]
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
UNEVEN = {"red": 30, "green": 12, "blue": 6}


def picture(colour, number):
    """Odd sizes; every seventh one is grey."""
    random = np.random.default_rng(number)
    size = (20 + number % 9, 17 + number % 5)
    pixels = np.clip(np.array(COLOURS[colour]) + random.integers(-60, 60, (*size, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert("L" if number % 7 == 3 else "RGB")


def plant(base, parts):
    """{part: {class: count}}; the part "" is the base itself."""
    number = 0
    for part, counts in parts.items():
        for colour, count in counts.items():
            folder = base / part / colour
            folder.mkdir(parents=True)
            for k in range(count):
                picture(colour, number := number + 1).save(folder / f"{k}.png")
    return base


ALONE = Process()
LAYOUTS = {
    "flat": {"": UNEVEN},
    "train and val": {"train": UNEVEN, "val": UNEVEN},
    "train and test": {"train": UNEVEN, "test": UNEVEN},
    "all three": {"train": UNEVEN, "val": UNEVEN, "test": UNEVEN},
}


def made(base, **changed):
    options = {"seed": 0, "select": "val", "select_by": "top1", "batch_size": 10, "eval_batch_size": 7}
    options |= {"val_size": 0.25, "split_seed": 0, "image_size": 8, "crop_ratio": 0.875, "min_scale": 0.5, "flip": True}
    options |= {"mean": (0.0,) * 3, "std": (1.0,) * 3, "workers": 0, "max_broken": 5} | changed
    data = ImageFolderData(load=lambda: list_class_folders(str(base), 0.25, 0), name="imagefolder", **options)
    data.read()
    return data


@pytest.fixture
def flat(tmp_path):
    return plant(tmp_path / "flat", LAYOUTS["flat"])


def equal(ones, others):
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.target, b.target) and a.share == b.share
        for a, b in zip(ones, others, strict=True)
    )


@pytest.mark.parametrize("layout", ["flat", "all three"])
def test_a_limited_data_set_has_some_files_of_each_part(tmp_path, layout):
    base = plant(tmp_path / layout, LAYOUTS[layout])
    whole, some = made(base), made(base, limit=4)
    rows = set(some.rows())
    assert rows < set(whole.rows())
    share = 4 / len(whole.labels["train"])
    expected = {part: max(1, round(share * len(target))) for part, target in whole.labels.items() if len(target)}
    assert {part: len(target) for part, target in some.labels.items() if len(target)} == expected
    assert some.fingerprint == whole.fingerprint
    assert set(made(base, limit=4).rows()) == rows


def test_workers_change_nothing(flat):
    one, two = made(flat).train_loader(ALONE), made(flat, workers=2).train_loader(ALONE)
    for epoch in (0, 1):
        one.sampler.set_epoch(epoch)
        two.sampler.set_epoch(epoch)
        batches = list(one)
        assert equal(batches, list(two))
    assert [len(batch.target) for batch in batches] == [10, 10, 7]
    assert batches[0].images.shape == (10, 3, 8, 8)
    assert batches[0].images.max() <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_each_student_may_get_a_view_of_its_own(flat, workers):
    (flat / "red" / "0.png").write_bytes(b"?")
    data = made(flat, workers=workers)
    plain = list(data.train_loader(ALONE))
    for one, several in zip(plain, data.train_loader(ALONE, views=2), strict=True):
        assert several.images.shape == (2, *one.images.shape)
        assert torch.equal(several.images[0], one.images)
        assert torch.equal(several.target, one.target)
        assert not torch.equal(several.images[1], one.images)
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in several.images)
    assert all(batch.images.ndim == 4 for batch in data.val_loader(ALONE))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_policy_s_operations_follow_crop_and_flip(flat, workers):
    """Those of the image's own draws; the first view is that of a single one."""
    policy = TrivialAugment(erasing=0.5)
    plain = made(flat).train_loader(ALONE, views=2)
    loader = made(flat, workers=workers, policy=policy, mean=(0.2, 0.4, 0.6)).train_loader(ALONE, views=2)
    norm = Normalization((0.2, 0.4, 0.6), (1.0,) * 3)
    order = [index.tolist() for index, _ in loader.sampler.batches()]
    for one, other, numbers in zip(plain, loader, order, strict=True):
        for view, k in itertools.product((0, 1), range(len(numbers))):
            pixels = (255 * one.images[view, k]).round().to(torch.uint8)[None]
            random = make_generator(0, "policy", 0, numbers[k], *[1] * view)
            drawn = policy.draw(1, (8, 8), random).for_batches([torch.arange(1)], torch.device("cpu"))[0]
            expected = norm.apply(policy.apply(pixels, drawn, torch.tensor([51, 102, 153], dtype=torch.uint8)))
            torch.testing.assert_close(other.images[view, k], expected[0])
    single = made(flat, policy=policy, mean=(0.2, 0.4, 0.6)).train_loader(ALONE)
    assert all(torch.equal(a.images, b.images[0]) for a, b in zip(single, loader, strict=True))


def test_gray_images_are_those_that_pillow_makes(flat):
    (flat / "red" / "0.png").write_bytes(b"?")
    gray, rgb = made(flat, channels=1, mean=(0.0,), std=(1.0,), policy=TrivialAugment(erasing=0.5)), made(flat)
    assert gray.image_size == (1, 8, 8)
    for one, other in zip(gray.iterate_images("test", range(5)), rgb.iterate_images("test", range(5)), strict=True):
        expected = rgb.eval_transform(Image.open(other.path).convert("RGB").convert("L"))
        assert torch.equal(one.image, expected)
    assert all(batch.images.shape[1:] == (1, 8, 8) for batch in gray.train_loader(ALONE))
    assert all(batch.images.shape[2:] == (1, 8, 8) for batch in gray.train_loader(ALONE, views=2))
    with pytest.raises(OptionError, match=r"data.mean=\[0.0\]: must be 3 numbers: the images have 3 channels"):
        made(flat, mean=(0.0,), std=(1.0,))


def test_a_resumed_loader_goes_on_where_it_was(flat):
    whole = list(made(flat).train_loader(ALONE))
    loader = made(flat).train_loader(ALONE)
    next(iter(loader))
    again = made(flat).train_loader(ALONE)
    again.load_state_dict(loader.state_dict())
    assert equal(list(again), whole[1:])
    assert len(list(again)) == 3  # the next epoch is whole
    finished = made(flat).train_loader(ALONE)
    finished.load_state_dict(again.state_dict())
    assert len(list(finished)) == 3


def test_the_processes_together_see_the_pictures_of_one(flat):
    ranks = [list(made(flat).train_loader(Process(rank=rank, world_size=2))) for rank in (0, 1)]
    for k, batch in enumerate(made(flat).train_loader(ALONE)):
        together = torch.cat([rank[k].images for rank in ranks])
        assert {image.numpy().tobytes() for image in together} == {image.numpy().tobytes() for image in batch.images}
    tests = [
        t
        for rank in (0, 1)
        for b in made(flat).test_loader(Process(rank=rank, world_size=2))
        for t in b.target.tolist()
    ]
    assert sorted(tests) == sorted(made(flat).labels["test"].tolist())


def test_the_parts_are_stratified_and_the_split_ignores_seed_and_names(flat):
    data = made(flat)
    counts = {part: np.bincount(labels).tolist() for part, labels in data.labels.items()}  # blue, green, red
    assert counts == {"train": [3, 7, 17], "val": [1, 2, 6], "test": [2, 3, 7]}
    other = made(flat, seed=5, batch_size=4)
    assert (other.fingerprint, list(other.rows())) == (data.fingerprint, list(data.rows()))
    assert made(flat, split_seed=1).fingerprint != data.fingerprint
    (flat / "red").rename(flat / "crimson")
    assert {row[0] for row in made(flat).rows()} != {row[0] for row in data.rows()}


def test_broken_pictures_are_left_out_of_evaluation_and_replaced_in_training(flat, capsys):
    for colour in ("red", "green"):
        (flat / colour / "0.png").write_bytes(b"?")
    data = made(flat)
    seen = dict.fromkeys(("train", "val", "test"), 0)
    for part, loader in (
        ("train", data.train_loader(ALONE)),
        ("val", data.val_loader(ALONE)),
        ("test", data.test_loader(ALONE)),
    ):
        for batch in loader:
            seen[part] += len(batch.target)
            assert (batch.target >= 0).all()
    broken_in = [part for name, _, part in data.rows() if name.endswith("/0.png") and "blue" not in name]
    assert len(broken_in) == 2
    for part, count in seen.items():
        assert count == len(data.labels[part]) - (broken_in.count(part) if part != "train" else 0)
    out = capsys.readouterr().out
    assert out.count("warning: ") == 2
    assert "red/0.png cannot be read as an image" in out
    assert "1 of data.max_broken=5" in out


def test_too_many_broken_pictures_are_the_end():
    broken = BrokenImages(1)
    broken.report([("a.jpg", "a.jpg cannot be read")] * 3)
    with pytest.raises(OptionError, match=r"data.max_broken=1: more images cannot be read, the last one is b.jpg"):
        broken.report([("b.jpg", "b.jpg cannot be read")])


@pytest.mark.parametrize(
    ("option", "value"),
    [("crop_ratio", 0), ("crop_ratio", 1.5), ("min_scale", 0), ("image_size", 0), ("select_by", "f1")],
)
def test_impossible_options_are_refused(flat, option, value):
    with pytest.raises(OptionError, match=f"data.{option}={value}: must be"):
        made(flat, **{option: value})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_imbalanced_too(command, tmp_path, layout):
    base, job_dir = plant(tmp_path / "mine", LAYOUTS[layout]), tmp_path / "run"
    result = command(*SMALL, f"data_dir={base}", f"job_dir={job_dir}")
    assert result.status == 0, result.err
    summary = json.loads((job_dir / "summary.json").read_text())
    with open(job_dir / "split.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["file"] for row in rows) == sorted(str(f.relative_to(base)) for f in base.rglob("*.png"))
    assert list(summary["classes"]) == ["blue", "green", "red"]
    for part, count in summary["images"].items():
        assert sum(row["part"] == part for row in rows) == count > 0
        for name, counts in summary["classes"].items():
            assert sum(row["part"] == part and row["class"] == name for row in rows) == counts[part]
            assert all(f"/{name}/" in f"/{row['file']}" for row in rows if row["class"] == name)
    chosen = summary["selected"]
    recalls = [value for value in chosen["recall"].values() if value is not None]
    assert chosen["balanced_accuracy"] == pytest.approx(sum(recalls) / len(recalls))
    hits = sum(
        value * summary["classes"][name]["test"] for name, value in chosen["recall"].items() if value is not None
    )
    assert chosen["test_top1"] == pytest.approx(hits / summary["images"]["test"])
    content = torch.load(job_dir / "checkpoints" / "epoch-0001.ckpt", weights_only=True)
    assert content["odcheap"]["classes"] == ["blue", "green", "red"]


def test_sixteen_bits_are_asked_for_and_then_read_and_exported(command, tmp_path):
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for k in range(12):
            pixels = random.integers(0, 1000 + 100 * k, (20, 20)).astype(np.uint16)
            pixels[0, 0] = 3000 if k == 5 else 500  # the largest of all files
            Image.fromarray(pixels).save(tmp_path / "mine" / name / f"{k}.png")
    options = [*SMALL, f"data_dir={tmp_path / 'mine'}", f"job_dir={tmp_path / 'run'}", "data.batch_size=8"]
    result = command(*options)
    assert result.status == 1
    assert "data.bit_depth=null: must say how many bits are used" in result.err
    assert "the largest value is 3000, which 12 bits can hold" in result.err
    assert command(*options, "data.bit_depth=12").status == 0
    with safe_open(tmp_path / "run" / "student.safetensors", "pt") as file:
        assert json.loads(file.metadata()["odcheap"])["bit_depth"] == 12


def test_junk_and_duplicates_are_said(command, tmp_path):
    base = plant(tmp_path / "mine", {"train": {"red": 20, "blue": 20}, "test": {"red": 5, "blue": 5}})
    shutil.copytree(base / "train" / "red", base / "train" / "red" / "@eaDir")
    shutil.copyfile(base / "train" / "red" / "3.png", base / "test" / "red" / "again.png")
    result = command(*SMALL, f"data_dir={base}", f"job_dir={tmp_path / 'run'}", "trainer.max_epochs=1")
    assert "skipped 1 folders of thumbnails, copies, or images without labels, such as train/red/@eaDir/" in result.out
    assert "warning: 1 test images are also training images, byte for byte, such as test/red/again.png" in result.out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["images"]["test"] == 11


def test_odd_paths_are_taken_and_the_same_command_finds_its_run(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    base = plant(tmp_path / "josé's #1 [x] & {y}", {"": {"red": 20, "blue": 20}})
    shared = [*SMALL[:-1], "logger=csv", f"data_dir={base}", "job_dir=~/Zoë's [r] #2 & {z}", "resume=auto"]
    for epochs in (1, 2):
        result = command(*shared, f"trainer.max_epochs={epochs}")
        assert result.status == 0, result.err
    assert "continuing from" in result.out
    job_dir = tmp_path / "Zoë's [r] #2 & {z}"
    assert json.loads((job_dir / "summary.json").read_text())["epochs"] == 2
    assert command("test_only=true", f"resume={job_dir}").status == 0
    assert (job_dir / "test.json").is_file()


def test_weights_know_their_classes(command, tmp_path):
    base = plant(tmp_path / "mine", {"": {"red": 20, "blue": 20}})
    assert command(*SMALL, f"data_dir={base}", f"job_dir={tmp_path / 'run'}", "trainer.max_epochs=1").status == 0
    (base / "red").rename(base / "apple")
    (base / "blue").rename(base / "sky")
    both = "has 2 classes (apple, sky), the checkpoint 2 classes (blue, red)"
    tested = ["test_only=true", f"job_dir={tmp_path / 'test'}", f"data_dir={base}"]
    assert both in command(*tested, f"resume={tmp_path / 'run'}").err
    for name in ("student.safetensors", "checkpoints/epoch-0000.ckpt"):
        refused = command(*SMALL, *tested, f"weights={tmp_path / 'run' / name}")
        assert "has 2 classes (blue, red), the data 2 classes (apple, sky); weights_head=new" in refused.err
        assert refused.status == 1


def test_other_images_are_not_divided_anew_by_a_test(command, tmp_path, capsys):
    base = plant(tmp_path / "mine", {"": {"red": 20, "blue": 20}})
    assert command(*SMALL, f"data_dir={base}", f"job_dir={tmp_path / 'run'}", "trainer.max_epochs=1").status == 0
    other = plant(tmp_path / "other", {"": {"red": 9, "blue": 8}})
    result = command("test_only=true", f"resume={tmp_path / 'run'}", f"data_dir={other}")
    assert result.status == 1
    assert f"data_dir={other}: has other images than the run; odcheap evaluate {tmp_path / 'run'} FOLDER" in result.err
    assert not (tmp_path / "run" / "test.json").exists()

    # What the line names evaluates all of them, and knows the images that the run was trained on. The first nine red
    # images are the same in both folders.
    chosen = json.loads((tmp_path / "run" / "summary.json").read_text())["selected"]
    with open(tmp_path / "run" / "split.csv", newline="") as file:
        parts = {row["file"]: row["part"] for row in csv.DictReader(file)}
    for folder, common in ((other, [f"red/{k}.png" for k in range(9)]), (base, list(parts))):
        assert cli.main(["evaluate", str(tmp_path / "run"), str(folder)]) == 0
        found = json.loads((tmp_path / "run" / "evaluation" / folder.name / "evaluation.json").read_text())
        assert found["images"] == {"other": 17, "mine": 40}[folder.name]
        assert found["student"].startswith(f"student {chosen['student']} of epoch 1")
        assert set(found["trained_on"]) == {name for name in common if parts[name] == "train"}
        assert set(found["selected_on"]) == {name for name in common if parts[name] == "val"}
    assert found["unused"]["top1"] == chosen["test_top1"]


def test_selection_by_balanced_accuracy(command, tmp_path):
    base = plant(tmp_path / "mine", LAYOUTS["all three"])
    chosen = {}
    for by in ("top1", "balanced"):
        job_dir = tmp_path / by
        options = [f"data.select_by={by}", "trainer.max_epochs=4", "checkpoint_keep=9", f"job_dir={job_dir}"]
        assert command(*SMALL, f"data_dir={base}", *options).status == 0
        chosen[by] = json.loads((job_dir / "summary.json").read_text())["selected"]
        figure = {"top1": "top1", "balanced": "balanced_accuracy"}[by]
        with open(job_dir / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        best = max(float(row[f"val/student_{k}/{figure}"]) for row in rows for k in (0, 1))
        assert chosen[by]["selected_by"] == figure
        assert chosen[by][f"val_{figure}"] == best
    assert chosen["balanced"]["val_balanced_accuracy"] >= chosen["top1"]["val_balanced_accuracy"]


def test_a_streamed_run_resumed_in_an_epoch_s_middle_equals_the_straight_run(command, tmp_path):
    base, straight = plant(tmp_path / "mine", {"": {"red": 250, "blue": 250}}), tmp_path / "straight"
    often = ["checkpoint_every=0", "checkpoint_keep=100", f"job_dir={straight}"]
    assert command(*SMALL, f"data_dir={base}", *often).status == 0
    places = sorted((straight / "checkpoints").glob("*step*"))
    assert len(places) == 4
    again = tmp_path / "again"
    result = command(f"resume={places[1]}", f"job_dir={again}", "data=imagefolder", "data.workers=1")
    assert result.status == 0, result.err
    assert (straight / "student.safetensors").read_bytes() == (again / "student.safetensors").read_bytes()


def test_a_run_and_its_loader_s_processes_end(tmp_path):
    """After a failure and its work, and by a signal to the whole group, which reaches the loader's too."""
    base = plant(tmp_path / "mine", {"": {"red": 100, "blue": 100}})
    given = [*SMALL, f"data_dir={base}", "data.workers=2", "num_stu=1"]
    sweep = ["hydra.mode=MULTIRUN", "optimizer.lr=1e30,0.1", f"hydra.sweep.dir={tmp_path}/sweep"]
    failed_and_done = Begun(*sweep, cwd=tmp_path, given=given)
    told = Begun("trainer.max_epochs=500", f"job_dir={tmp_path}/told", cwd=tmp_path, given=given)
    told.until("epoch 2/500")
    os.killpg(told.process.pid, signal.SIGTERM)
    runs = (failed_and_done, told)
    assert [run.end(within=60) for run in runs] == [1, 143], [run.said[-3:] for run in runs]
    assert "is not finite" in "".join(failed_and_done.said)
    assert len(list((tmp_path / "sweep").glob("*/summary.json"))) == 1
    assert told.said[-1] == f"SIGTERM: saved; resume={tmp_path}/told logger=csv continues\n"
    assert json.loads((tmp_path / "told" / "status.json").read_text())["state"] == "stopped"


def test_imagenet_s_layout_trains_with_a_converted_network(command, tmp_path):
    """The official val is the test; selection is on a held-out part of train."""
    base = plant(tmp_path / "imagenet", {"train": {"red": 20, "blue": 20}, "val": {"red": 5, "blue": 5}})
    options = ["data=imagenet", "backbone=resnet18", "data.image_size=32", "data.batch_size=16", "data.workers=0"]
    options += ["data.val_size=0.25", "num_stu=2", "trainer=cpu", "trainer.max_epochs=2", "logger=csv"]
    result = command(*options, f"data_dir={base}", f"job_dir={tmp_path}/run")
    assert result.status == 0, result.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["images"] == {"train": 30, "val": 10, "test": 10}
    assert summary["cost"]["params"] < summary["cost"]["standard"]["params"] / 5
    assert summary["cost"]["standard"]["note"] is None


def test_networks_and_pictures_that_do_not_go_together_are_refused_by_name(command, tmp_path):
    base = plant(tmp_path / "mine", {"": {"red": 20, "blue": 20}})
    result = command("data=imagefolder", f"data_dir={base}", "trainer=cpu", f"job_dir={tmp_path}/run")
    assert (result.status, result.err.count("\n")) == (1, 1)
    assert "backbone=resnet56: is made for 32 x 32 pictures, and these have 224 x 224" in result.err
    result = command(*SMALL, f"data_dir={base}", "backbone=vgg16", "~backbone.depth", f"job_dir={tmp_path}/run")
    assert result.status == 1
    result = command("data=digits", "backbone=vgg16", "trainer=cpu", f"job_dir={tmp_path}/run")
    assert "backbone=vgg16: pictures of 8 x 8 are too small: its stride is 32" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["backbone=torchvision", "backbone.name=resnet81"], "backbone.name=resnet81: no classification network"),
        (["backbone=torchvision", "backbone.name=mobilenet_v2"], "nothing to replace"),
        (["backbone=torchvision", "backbone.name=vit_b_16"], "vit_b_16: has no 4-D last feature map"),
        (["backbone=torchvision"], "backbone.name=???: must be given"),
        (["backbone=resnet18", "backbone.keep=[layer9]"], "backbone.keep=layer9: no K x K convolution has this name"),
        (["backbone=resnet18", "backbone.pretrained=none.pth"], "backbone.pretrained=none.pth: no such file"),
        (["backbone=resnet18", "block_type=Standard", "backbone.keep=[layer9]"], "backbone.keep=layer9: no K x K"),
        (["backbone=resnet18", "backbone.init=svd"], "backbone.init=svd: must be one of auto, fit, kaiming"),
        (["backbone=densenet40", "backbone.network.depth=41"], "backbone.network.depth=41: must be 3n + 4"),
        (["backbone=densenet40", "backbone.network.growth=10000"], "backbone.network.growth=10000: must be a whole"),
        (
            ["backbone=wrn16_4", "backbone.network.width=0"],
            "backbone.network.width=0: must be a whole number, 1 or more",
        ),
    ],
)
def test_bad_networks_are_one_line(command, tmp_path, options, message):
    result = command("data=digits", "trainer=cpu", *options, f"job_dir={tmp_path}/run")
    assert (result.status, result.err.count("\n")) == (1, 1), result.err
    assert message in result.err
    assert not (tmp_path / "run").exists()


def tiny(command, base, job_dir, *options):
    return command(*SMALL, f"data_dir={base}", f"job_dir={job_dir}", "trainer.max_epochs=1", *options)


def test_names_that_are_not_utf8_lose_nothing(command, tmp_path):
    base = plant(tmp_path / "mine", {"": {"red": 20, "blue": 20}})
    (base / "red" / "0.png").rename(base / "red" / os.fsdecode(b"\xe9t\xe9.png"))
    (base / "blue").rename(base / os.fsdecode(b"bl\xe9"))
    result = tiny(command, base, tmp_path / "run")
    assert result.status == 0, result.err
    assert b"red/\xe9t\xe9.png,red," in (tmp_path / "run" / "split.csv").read_bytes()
    assert os.fsdecode(b"bl\xe9") in json.loads((tmp_path / "run" / "summary.json").read_text())["classes"]


@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_picture_is_one_line(command, tmp_path, workers):
    base = plant(tmp_path / "mine", {"train": {"red": 20, "blue": 20}, "test": {"red": 3, "blue": 3}})
    for file in (base / "train").rglob("*.png"):
        file.write_text("version https://git-lfs.github.com/spec/v1")
    result = tiny(command, base, tmp_path / "run", f"data.workers={workers}")
    assert (result.status, result.err.count("\n")) == (1, 1), result.err
    assert "no image of 20 can be read" in result.err


def test_a_test_that_cannot_be_read_is_no_result(command, tmp_path):
    base = plant(tmp_path / "mine", {"train": {"red": 20, "blue": 20}, "test": {"red": 3, "blue": 3}})
    for file in (base / "test").rglob("*.png"):
        file.write_bytes(b"?")
    result = tiny(command, base, tmp_path / "run")
    assert (result.status, result.err.count("\n")) == (1, 1), result.err
    assert "none of 6 images to evaluate can be read" in result.err
    assert not (tmp_path / "run" / "summary.json").exists()


def test_the_summary_names_what_could_not_be_read(command, tmp_path):
    base = plant(tmp_path / "mine", LAYOUTS["train and test"])
    for part in ("train", "test"):
        (base / part / "red" / "3.png").write_bytes(b"?")
    assert tiny(command, base, tmp_path / "run", "trainer.max_epochs=3").status == 0
    unreadable = json.loads((tmp_path / "run" / "summary.json").read_text())["unreadable"]
    assert str(base / "test/red/3.png") in unreadable


def test_too_few_pictures_for_the_processes_are_refused_before_they_start(command, tmp_path):
    base = plant(tmp_path / "mine", {"": {"red": 5, "blue": 5}})
    distributed = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    result = tiny(command, base, tmp_path / "run", *distributed)
    assert (result.status, result.err.count("\n")) == (1, 1), result.err
    assert "trainer.devices=2: each process needs an image to evaluate; there are 1 (val)" in result.err
    assert not (tmp_path / "run").exists()


def test_a_run_from_pretrained_weights_goes_on_without_their_file(command, tmp_path):
    base, file = plant(tmp_path / "mine", {"": {"red": 20, "blue": 20}}), tmp_path / "resnet (18).pth"
    torch.save(torchvision.models.resnet18().state_dict(), file)
    options = ["backbone=resnet18", "data=imagefolder", "data.image_size=32", "data.workers=0"]
    options += ["data.batch_size=8", "num_stu=2", "trainer=cpu", "trainer.max_epochs=1", "logger=csv"]
    result = command(*options, f"data_dir={base}", f"job_dir={tmp_path}/run", f"backbone.pretrained={file}")
    assert result.status == 0, result.err
    before = json.loads((tmp_path / "run" / "summary.json").read_text())
    file.unlink()
    result = command("test_only=true", f"resume={tmp_path}/run")
    assert result.status == 0, result.err
    assert json.loads((tmp_path / "run" / "test.json").read_text())["selected"] == before["selected"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("data.workers=-1", "data.workers=-1: must be a whole number, 0 or more and at most 1024"),
        ("data.load.test_size=null", "data.load.test_size=null: must be a number"),
        ("data.mean=[0.5,0.5]", "data.mean=[0.5, 0.5]: must be one number for each channel; data.std has 3"),
        ("data.std=[1,1,0]", "data.std=[1, 1, 0]: must be one number above 0 for each channel"),
        ("data.max_broken=many", "data.max_broken=many: must be a whole number"),
    ],
)
def test_bad_numbers_are_one_line(command, tmp_path, option, message):
    result = tiny(command, plant(tmp_path / "mine", LAYOUTS["flat"]), tmp_path / "run", option)
    assert (result.status, result.err.count("\n")) == (1, 1), result.err
    assert message in result.err
    assert not (tmp_path / "run").exists()
