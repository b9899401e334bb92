import copy

import numpy as np
import pytest
import torch
from export.test_product import SETTINGS
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from odcheap import predict
from odcheap.export import evidence
from odcheap.layers.cheap_conv import DW
from odcheap.models.cifar import CifarResNet
from odcheap.utils.errors import OptionError
from odcheap.utils.parts import find_conf_dir


def config(*overrides):
    with initialize_config_dir(str(find_conf_dir()), version_base="1.3"):
        return OmegaConf.to_container(compose("config", ["job_dir=unused", *overrides]), resolve=True)


@pytest.mark.parametrize("data", ["digits", "cifar10", "cifar100", "imagefolder", "imagenet"])
def test_every_data_set_of_conf_can_be_read_back(data, tmp_path):
    if data == "digits":
        assert len(evidence.data_of(config("data=digits"), None).labels["test"]) == 360
        return
    with pytest.raises(
        OptionError, match=f"data_dir={tmp_path}"
    ):  # it came as far as looking there, without a download
        evidence.data_of(config(f"data={data}"), str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "hostile",
    [
        {"_target_": "os.system", "command": "touch owned"},
        {"_target_": "odcheap.data.folder_trees.unpack_imagenet", "root": "."},
        {"_target_": "odcheap.data.digits.load_digits", "x": {"_target_": "os.system", "command": "touch owned"}},
        {"_target_": "odcheap.data.cifar.torch.load", "f": "x"},
        {"_target_": ["os.system"]},
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
    else:
        given["data"][where] = hostile
    with pytest.raises(
        OptionError, match=r"JOB_DIR=config.yaml: describes no data of odcheap's|data.mean=.*three numbers"
    ):
        evidence.data_of(given, None)
    assert not list(tmp_path.iterdir())


def test_small_images_are_written_as_they_are_and_evaluated_as_in_training(tmp_path):
    data = evidence.data_of(config("data=digits"), None)
    network = CifarResNet(8, DW(), 10).eval()
    found = evidence.of_data(data, network, tmp_path)
    assert np.array_equal(np.asarray(Image.open(found.files[7])), data.images.test[7].permute(1, 2, 0).numpy())
    assert np.array_equal(found.target, data.images.test_target.numpy())
    with torch.no_grad():
        expected = network((data.images.test / 255 - 0.305) / 0.376).numpy()
    np.testing.assert_allclose(found.logits, expected, atol=1e-3, rtol=1e-4)
    assert found.top1(np.eye(10)[found.target]) == 1.0


def test_a_tree_of_small_images_is_checked_from_its_own_files(tmp_path):
    for part, count in (("train", 6), ("test", 4)):
        for k in range(count):
            folder = tmp_path / "cifar10" / part / ("cat", "dog")[k % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((32, 32, 3), 20 * k, np.uint8)).save(folder / f"{k}.png")
    given = config("data=cifar10", "data.val_size=2", "data.load.train_images=6", "data.load.test_images=4")
    data = evidence.data_of(given, str(tmp_path))
    found = list(evidence.samples(data, "test"))
    assert [sample.path.name for sample in found] == ["0.png", "2.png", "1.png", "3.png"]
    for sample in found:
        assert np.array_equal(np.asarray(predict.decode_image(sample.path)), sample.image.permute(1, 2, 0).numpy())


def test_a_limit_takes_training_images_from_all_over():
    data = evidence.data_of(config("data=digits", "data.batch_size=8"), None)
    found = [sample.label for sample in evidence.samples(data, "train", limit=100)]
    assert 90 <= len(found) <= 100
    assert len(set(found)) == 10


def test_noise_is_prepared_like_any_picture(tmp_path):
    network = CifarResNet(8, DW(), 3).eval()
    found = evidence.of_noise(SETTINGS, network, tmp_path)
    seen = predict.preprocess_image(found.files[5], {"size": [16, 16], "shorter_side": 18, "interpolation": "bilinear"})
    mean, std = (torch.tensor(SETTINGS[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = network(((torch.from_numpy(seen) - mean) / std)[None])
    np.testing.assert_allclose(found.logits[5], expected[0], atol=1e-3, rtol=1e-4)
    assert found.top1(found.logits) is None
