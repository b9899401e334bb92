import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from export.test_load_run import SETTINGS
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

import odcheap.config.compose  # noqa: F401 - registers what the config computes
from odcheap import predict
from odcheap.export import verify
from odcheap.export.onnx import MAX_DIFFERENCE
from odcheap.export.runtimes import ONNX_RUNTIME
from odcheap.export.verify import Reference
from odcheap.layers.cheap_conv import DW
from odcheap.models.cifar import CifarResNet
from odcheap.utils.errors import Failure, OptionError
from odcheap.utils.parts import find_conf_dir, part_settings

LOGITS = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 1.0 + MAX_DIFFERENCE, 0.0]], np.float32)
REFERENCE = Reference([Path(f"{k}.png") for k in range(3)], np.array([0, 1, 0]), LOGITS)


def test_the_largest_difference_is_told():
    other = LOGITS + np.array([[0, 5e-5, 0]], np.float32)
    assert verify.check_logits("x", other, REFERENCE) == pytest.approx(5e-5, rel=0.1)


@pytest.mark.parametrize("value", [2e-4, np.nan, np.inf, -np.inf])
def test_a_difference_that_is_too_large_names_its_picture(value):
    other = LOGITS.copy()
    other[1, 2] += value
    with pytest.raises(Failure, match=r"student.onnx: a logit differs .* on 1.png"):
        verify.check_logits("student.onnx", other, REFERENCE)


def test_large_logits_may_differ_by_what_float32_rounds():
    many = REFERENCE._replace(logits=1e4 * LOGITS)
    assert (
        verify.check_logits("x", many.logits + np.array([[0.01, 0, 0]], np.float32) * (LOGITS > 0.9), many)
        > MAX_DIFFERENCE
    )


@pytest.mark.parametrize(
    ("precision", "summary", "fits"),
    [
        ("32-true", 2 / 3, True),
        ("32-true", 1.0, True),
        ("32-true", 0.0, False),
        ("bf16-mixed", 2 / 3 + 0.004, True),
        ("bf16-mixed", 0.1, False),
        ("32-true", None, True),
    ],
)
def test_the_accuracy_is_the_one_that_the_run_has_measured(precision, summary, fits):
    product = SimpleNamespace(test_top1=summary, config={"trainer": {"precision": precision, "accelerator": "cpu"}})
    if fits:
        verify.check_accuracy(product, REFERENCE)  # one of the three is as good as a tie
        return
    with pytest.raises(Failure, match=r"test accuracy is 66.67 % here, .* other images than the run's"):
        verify.check_accuracy(product, REFERENCE)


def test_a_file_that_its_runtime_cannot_load_is_named(tmp_path):
    (tmp_path / "student.onnx").write_bytes(b"?")
    with pytest.raises(Failure, match=r"student.onnx: ONNX Runtime cannot load the model"):
        verify.compute_logits(tmp_path / "student.onnx", ONNX_RUNTIME, {}, REFERENCE, None)
    (tmp_path / "student.safetensors").write_bytes(b"?")
    with pytest.raises(Failure, match=r"student.safetensors: a bare process cannot load or run it \(.*not a complete"):
        verify.run_in_bare_process(tmp_path / "student.safetensors", {}, REFERENCE)


def config(*overrides):
    """The config of a run as it is on disk."""
    with initialize_config_dir(str(find_conf_dir()), version_base="1.3"):
        found = OmegaConf.to_container(compose("config", ["job_dir=unused", *overrides]), resolve=True)
    name = next(o.partition("=")[2] for o in overrides if o.startswith("data="))
    return {"data": part_settings(found["data"], name)}


@pytest.mark.parametrize("data", ["digits", "cifar10", "cifar100", "imagefolder", "imagenet"])
def test_every_data_set_of_conf_can_be_read_back(data, tmp_path):
    if data == "digits":
        assert len(verify.load_data(config("data=digits"), None).labels["test"]) == 360
        return
    with pytest.raises(
        OptionError, match=f"data_dir={tmp_path}"
    ):  # it came as far as looking there, without a download
        verify.load_data(config(f"data={data}"), str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "hostile",
    [
        {"_target_": "os.system", "command": "touch owned"},
        {"part": "digits", "_target_": "os.system", "command": "touch owned"},
        {"part": "digits", "x": {"_target_": "os.system", "command": "touch owned"}},
        {"part": "../../tmp/x"},
        {"part": ["os.system"]},
        "touch owned",
        None,
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["data", "load", "mean"])
def test_a_config_names_our_data_or_nothing(hostile, where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = copy.deepcopy(config("data=digits"))
    if where == "data":
        given["data"] = hostile
    elif hostile is None and where == "load":
        return  # the data set's own loader
    else:
        given["data"][where] = hostile
    with pytest.raises(OptionError, match=r"^JOB_DIR=config.yaml: describes no data set|^data[.=]"):
        verify.load_data(given)
    assert not list(tmp_path.iterdir())


def test_small_images_are_written_as_they_are_and_evaluated_as_in_training(tmp_path):
    data = verify.load_data(config("data=digits"), None)
    network = CifarResNet(8, DW(), 10).eval()
    found = verify.compute_test_reference(data, network, tmp_path)
    assert np.array_equal(np.asarray(Image.open(found.files[7])), data.images.test[7].permute(1, 2, 0).numpy())
    assert np.array_equal(found.labels, data.images.test_target.numpy())
    with torch.no_grad():
        expected = network((data.images.test / 255 - 0.305) / 0.376).numpy()
    np.testing.assert_allclose(found.logits, expected, atol=1e-3, rtol=1e-4)


def test_a_tree_of_small_images_is_checked_from_its_own_files(tmp_path):
    for part, count in (("train", 6), ("test", 4)):
        for k in range(count):
            folder = tmp_path / "cifar10" / part / ("cat", "dog")[k % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((32, 32, 3), 20 * k, np.uint8)).save(folder / f"{k}.png")
    given = config("data=cifar10", "data.val_size=2", "data.load.train_images=6", "data.load.test_images=4")
    data = verify.load_data(given, str(tmp_path))
    found = list(verify.iterate_samples(data, "test"))
    assert [sample.path.name for sample in found] == ["0.png", "2.png", "1.png", "3.png"]
    for sample in found:
        assert np.array_equal(np.asarray(predict.decode_image(sample.path)), sample.image.permute(1, 2, 0).numpy())


def test_a_limit_takes_training_images_from_all_over():
    data = verify.load_data(config("data=digits", "data.batch_size=8"), None)
    found = [sample.label for sample in verify.iterate_samples(data, "train", limit=100)]
    assert 90 <= len(found) <= 100
    assert len(set(found)) == 10


def test_noise_is_prepared_like_any_picture(tmp_path):
    network = CifarResNet(8, DW(), 3).eval()
    found = verify.compute_noise_reference(SETTINGS, network, tmp_path)
    seen = predict.preprocess_image(found.files[5], {"size": [16, 16], "shorter_side": 18, "interpolation": "bilinear"})
    mean, std = (torch.tensor(SETTINGS[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = network(((torch.from_numpy(seen) - mean) / std)[None])
    np.testing.assert_allclose(found.logits[5], expected[0], atol=1e-3, rtol=1e-4)
    assert found.labels is None
