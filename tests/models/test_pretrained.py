import argparse

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from odcheap.layers.cheap_conv import DW, Standard
from odcheap.methods.students import Students
from odcheap.models.convert import cheapen
from odcheap.models.wrappers import TimmBackbone, TorchvisionBackbone, load_pretrained
from odcheap.utils.errors import OptionError
from odcheap.utils.seeds import temporary_seed


def trained(name="resnet18", classes=7):
    network = torchvision.models.get_model(name, weights=None, num_classes=classes)
    network(torch.randn(4, 3, 64, 64))  # moves batch norm
    return network.eval()


@pytest.fixture
def file(tmp_path):
    network = trained()
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    return network, str(tmp_path / "resnet18.pth")


def test_pretrained_weights_are_fitted_into_the_pairs(file):
    network, path = file
    made = TorchvisionBackbone("resnet18", DW(), 7, pretrained=path, noise=0.0).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(made(x), cheapen(network, "DW", init="fit")(x))
    anew = TorchvisionBackbone("resnet18", DW(), 7, pretrained=path, init="kaiming").eval()
    assert not torch.allclose(anew(x), made(x))
    assert torch.equal(anew.network.bn1.running_mean, network.bn1.running_mean)


def test_a_classifier_for_other_classes_stays_new(file):
    network, path = file
    made = TorchvisionBackbone("resnet18", Standard(), 3, pretrained=path, noise=0.0)
    assert made.network.fc.weight.shape == (3, 512)
    assert torch.equal(made.network.layer4[1].conv2.weight, network.layer4[1].conv2.weight)


@pytest.mark.filterwarnings("ignore:the students start with equal weights")
@pytest.mark.parametrize("block_type", [DW(), Standard()])
def test_noise_makes_students_from_one_file_differ_and_no_noise_does_not(file, block_type):
    _, path = file

    def students(noise):
        return Students(lambda: TorchvisionBackbone("resnet18", block_type, 7, path, noise=noise), 2, seed=0).members

    a, b = students(0.0)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    a, b = students(0.1)
    exact = students(0.0)[0]
    differing = 0
    for p, q, e in zip(a.parameters(), b.parameters(), exact.parameters(), strict=True):
        if not torch.equal(p, q):
            differing += 1
            assert (p - e).std().item() == pytest.approx(0.1 * e.std().item(), rel=0.2)
    assert differing == (2 * 16 if block_type == DW() else 17)


def test_safetensors_wrappers_and_old_names_are_understood(file, tmp_path):
    network, _ = file
    state = network.state_dict()
    old = {f"module.{k}": v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save({"epoch": 3, "state_dict": old}, tmp_path / "wrapped.pth")
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "plain.safetensors")
    for name in ("wrapped.pth", "plain.safetensors"):
        fresh = torchvision.models.resnet18(num_classes=7)
        load_pretrained(fresh, str(tmp_path / name), 7)
        assert torch.equal(fresh.layer2[0].conv1.weight, network.layer2[0].conv1.weight)
    densenet = torchvision.models.densenet121(num_classes=7)
    names = {k: k.replace(".norm1", ".norm.1").replace(".conv2", ".conv.2") for k in densenet.state_dict()}
    torch.save({names[k]: v for k, v in densenet.state_dict().items()}, tmp_path / "dense.pth")
    fresh = torchvision.models.densenet121(num_classes=7)
    load_pretrained(fresh, str(tmp_path / "dense.pth"), 7)
    assert torch.equal(
        fresh.features.denseblock1.denselayer1.conv2.weight, densenet.features.denseblock1.denselayer1.conv2.weight
    )


def forms_of_other_tools(state):
    """Checkpoints as other tools write them, by name."""
    prefixed = {prefix: {prefix + k: v for k, v in state.items()} for prefix in ("_orig_mod.", "model.", "module.")}
    namespace = argparse.Namespace(model="resnet18", lr=0.1, size=[3, 224, 224], out=None)
    return {
        "compiled": prefixed["_orig_mod."],
        "compiled parts": {k.replace("layer1.", "layer1._orig_mod."): v for k, v in state.items()},
        "Lightning": {"state_dict": prefixed["model."] | {"criterion.weight": torch.ones(7)}, "epoch": 3},
        "Lightning, compiled": {"state_dict": {f"model._orig_mod.{k}": v for k, v in state.items()}},
        "PyTorch's tutorial": {"model_state_dict": state, "optimizer_state_dict": {}, "epoch": 3},
        "torchvision": {"model": state, "args": namespace, "lr_scheduler": {}},
        "torchvision's average": {
            "model": {k: torch.zeros_like(v) for k, v in state.items()},
            "model_ema": prefixed["module."] | {"n_averaged": torch.tensor(5)},
            "args": namespace,
        },
        "timm": {"state_dict": state, "args": namespace, "arch": "resnet18", "metric": 0.5},
        "in two modules": {f"module.model.{k}": v for k, v in state.items()},
    }


@pytest.mark.parametrize("form", list(forms_of_other_tools({})))
def test_files_as_other_tools_write_them_are_read(file, tmp_path, form):
    network, _ = file
    torch.save(forms_of_other_tools(network.state_dict())[form], tmp_path / "other.pth")
    fresh = torchvision.models.resnet18(num_classes=7)
    load_pretrained(fresh, str(tmp_path / "other.pth"), 7)
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), network.state_dict().values(), strict=True)
    )


class Strange:
    """A class that a file may name."""


@pytest.mark.parametrize("value", [Strange(), argparse.Namespace(x=Strange()), argparse.ArgumentParser])
def test_no_other_object_is_read_from_a_file(file, tmp_path, value):
    network, _ = file
    torch.save({"state_dict": network.state_dict(), "args": value}, tmp_path / "other.pth")
    with pytest.raises(OptionError, match=r"backbone.pretrained=.*other.pth: not a complete checkpoint"):
        load_pretrained(torchvision.models.resnet18(num_classes=7), str(tmp_path / "other.pth"), 7)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_inception_with_its_auxiliary_classifier_and_its_own_normalisation(tmp_path):
    network = torchvision.models.googlenet(num_classes=7, init_weights=False, transform_input=True)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # takes this batch's statistics: what goes in then matters for what comes out
    network(torch.randn(4, 3, 64, 64))
    torch.save(network.eval().state_dict(), tmp_path / "googlenet.pth")
    made = TorchvisionBackbone("googlenet", Standard(), 7, str(tmp_path / "googlenet.pth"), noise=0.0).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(made(x), network(x))


def test_weights_that_do_not_fit_are_refused_by_name(file, tmp_path):
    _, path = file
    with pytest.raises(OptionError, match=r"backbone.pretrained=.*resnet18.pth: weights of another network: "):
        TorchvisionBackbone("resnet34", DW(), 7, path)
    with pytest.raises(OptionError, match=r"backbone.pretrained=nowhere.pth: no such file"):
        TorchvisionBackbone("resnet18", DW(), 7, "nowhere.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(OptionError, match=r"backbone.pretrained=.*holds a Tensor"):
        TorchvisionBackbone("resnet18", DW(), 7, str(tmp_path / "tensor.pth"))


def test_timm_weights(tmp_path):
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet10t", num_classes=5).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    with temporary_seed(1, "other"):
        made = TimmBackbone("resnet10t", Standard(), 5, str(tmp_path / "model.safetensors"), noise=0.0).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(made(x), network(x))
