"""The conversion, held against hand counts, hand-built networks and the families of torchvision and timm."""

import copy
import warnings

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from odcheap.layers.cheap_conv import DW, CheapConv, Standard
from odcheap.layers.spatial import Shift2d
from odcheap.models import flops
from odcheap.models.cifar import CifarResNet
from odcheap.models.convert import ConversionTable, cheapen, conversion_table, find_spatial_convs

TYPES = ["Shift", "DW", "Group"]
CONVERTED = [("googlenet", "DW"), ("resnet18", "Group"), ("squeezenet1_1", "Shift")]
NOTHING = ["mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "shufflenet_v2_x0_5"]
CONVERTED_TIMM = [("dla34", "Group"), ("repvgg_a0", "Shift"), ("tf_efficientnetv2_b0", "DW")]
TIMM = ["resnet18d", "densenet121", "gernet_s", "cspresnet50", "dla34", "hrnet_w18_small", "vovnet39a", "selecsls42b"]
TIMM += ["res2net50_14w_8s", "repvgg_a0", "tf_efficientnetv2_b0"]
TRANSFORMERS = ("vit", "swin", "maxvit")
ALL = [n for n in torchvision.models.list_models(module=torchvision.models) if not n.startswith(TRANSFORMERS)]


def build(name: str) -> nn.Module:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}  # theirs takes ten seconds
    options |= {"aux_logits": False} if name == "inception_v3" else {}  # needs pictures of 299 pixels
    return torchvision.models.get_model(name, weights=None, num_classes=7, **options)


def outputs(network, x):
    """All that a network returns: two of them have auxiliary classifiers."""
    out = network(x)
    return list(out) if isinstance(out, tuple) else [out]


def by_hand(conv: nn.Conv2d, block_type: str, pixels: int) -> tuple[int, int]:
    """Parameters and MACs of a pair with `pixels` outputs, from the definition."""
    taps, c, out = conv.kernel_size[0] * conv.kernel_size[1], conv.in_channels, conv.out_channels
    groups = max(g for g in range(1, 5) if c % g == 0)
    spatial = {"Shift": 0, "DW": c * taps, "Group": c * (c // groups) * taps}[block_type]
    mixing = c * out
    return spatial + mixing + (out if conv.bias is not None else 0), (spatial + mixing) * pixels


def check_conversion(before: nn.Module, block_type: str, size: int) -> None:
    after = cheapen(before, block_type)
    made = conversion_table(before, after, (3, size, size))
    expected = list(made.params[:1] + made.macs[:1])
    for row in made.rows:
        conv, now = before.get_submodule(row.name), after.get_submodule(row.name)
        if not isinstance(now, CheapConv):
            assert "kept: " in row.after
            reasons = ("the stem", "groups already", "of its own", "moves none of", "no number of groups")
            assert any(reason in row.after for reason in reasons)
            assert (row.after == "kept: the stem") == (row is made.rows[0])
            plain = type(conv) is nn.Conv2d and conv.groups == 1 and conv.in_channels >= 9
            assert not plain or row is made.rows[0] or conv.in_channels % 2
            continue
        pixels = row.macs[0] // conv.weight.numel()
        assert (row.params[1], row.macs[1]) == by_hand(conv, block_type, pixels), row
        expected[0] += row.params[1] - row.params[0]
        expected[1] += row.macs[1] - row.macs[0]
    assert [made.params[1], made.macs[1]] == expected
    assert (flops.count_params(after), flops.count_macs(after, (3, size, size))) == (made.params[1], made.macs[1])
    x = torch.randn(2, 3, size, size)
    shapes = [out.shape for out in outputs(before, x)]
    found = outputs(after, x)
    assert [out.shape for out in found] == shapes
    sum(out.square().sum() for out in found).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in after.parameters())


@pytest.mark.parametrize(("name", "block_type"), CONVERTED)
def test_torchvision_networks(name, block_type):
    check_conversion(build(name), block_type, 64)


@pytest.mark.slow
@pytest.mark.parametrize("block_type", TYPES)
@pytest.mark.parametrize("name", ALL)
def test_every_torchvision_network(name, block_type):
    before = build(name)
    if list(replaceable(before)):
        check_conversion(before, block_type, 96)
    else:
        with pytest.raises(ValueError, match="nothing to replace"):
            cheapen(before, block_type)


def replaceable(model):
    return [c for c in list(find_spatial_convs(model).values())[1:] if c.groups == 1]


@pytest.mark.parametrize("name", NOTHING)
def test_networks_with_nothing_to_replace_are_refused(name):
    before = build(name)
    assert not replaceable(before)
    with pytest.raises(ValueError, match=r"block_type=DW: nothing to replace.*the stem"):
        cheapen(before, "DW")


def check_timm(name, block_type):
    timm = pytest.importorskip("timm")
    check_conversion(timm.create_model(name, num_classes=7), block_type, 64)


@pytest.mark.parametrize(("name", "block_type"), CONVERTED_TIMM)
def test_timm_networks(name, block_type):
    check_timm(name, block_type)


@pytest.mark.slow
@pytest.mark.parametrize("block_type", TYPES)
@pytest.mark.parametrize("name", TIMM)
def test_timm_networks_with_every_type(name, block_type):
    check_timm(name, block_type)


@pytest.mark.parametrize(
    ("block_type", "parameters", "multiplications"),
    [("Shift", 102_106, 14_598_784), ("DW", 119_818, 19_188_352), ("Group", 311_194, 45_564_544)],
)
def test_the_converted_resnet56_costs_what_a_hand_count_says(block_type, parameters, multiplications):
    """The reference's figures for the stride on the spatial operator."""
    after = cheapen(CifarResNet(56, Standard(), 10), block_type)
    assert (flops.count_params(after), flops.count_macs(after, (3, 32, 32))) == (parameters, multiplications)


def test_a_conversion_by_hand_gives_the_same_outputs():
    before = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 20, (3, 5), stride=(2, 1), padding=(1, 2), bias=True),
        nn.BatchNorm2d(20),
        nn.Conv2d(20, 8, 1),
    ).double()
    after = cheapen(before, "DW", init="kaiming")
    torch.nn.init.normal_(after[2].pointwise.bias)
    hand = copy.deepcopy(before)
    hand[2] = nn.Sequential(
        nn.Conv2d(12, 12, (3, 5), stride=(2, 1), padding=(1, 2), groups=12, bias=False), nn.Conv2d(12, 20, 1)
    ).double()
    hand[2][0].weight.data = after[2].spatial.weight.data
    hand[2][1].weight.data, hand[2][1].bias.data = after[2].pointwise.weight.data, after[2].pointwise.bias.data
    x = torch.randn(2, 3, 9, 11, dtype=torch.double)
    torch.testing.assert_close(after.eval()(x), hand.eval()(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("block_type", TYPES)
def test_the_stride_may_stand_on_either_layer(block_type):
    after = cheapen(nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 3, stride=2, padding=1)), block_type)
    dear = copy.deepcopy(after)
    dear[1].spatial.stride, dear[1].pointwise.stride = (1, 1), (2, 2)
    x = torch.randn(2, 3, 13, 10)
    torch.testing.assert_close(after(x), dear(x))


kernels = st.tuples(st.integers(1, 5), st.integers(1, 5)).filter(lambda size: max(size) > 1)


@given(data=st.data(), kernel=kernels, mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("block_type", TYPES)
def test_any_window_keeps_the_shape_for_any_image(block_type, data, kernel, mode):
    dilation = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = data.draw(st.one_of(st.sampled_from(["same", "valid"]), st.tuples(st.integers(0, 3), st.integers(0, 3))))
    stride = (1, 1) if padding == "same" else data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch: "same" with an even kernel copies the image
        conv = nn.Conv2d(26, 5, kernel, stride, padding, dilation, padding_mode=mode)
        x = torch.randn(1, 26, data.draw(st.integers(9, 16)), data.draw(st.integers(9, 16)))
        (after,) = [cheapen(nn.Sequential(conv), block_type, keep=())]
        assert after(x).shape == conv(x).shape


@pytest.mark.parametrize("block_type", ["DW", "Group"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_the_border_is_that_of_the_replaced_convolution(block_type, mode):
    conv = nn.Conv2d(8, 6, 3, padding=2, padding_mode=mode, dilation=2)
    after = cheapen(nn.Sequential(conv), block_type, keep=())[0]
    x = torch.randn(1, 8, 7, 6)
    padded = nn.functional.pad(x, (2, 2, 2, 2), mode="constant" if mode == "zeros" else mode)
    spatial = nn.functional.conv2d(padded, after.spatial.weight, dilation=2, groups=after.spatial.groups)
    torch.testing.assert_close(after(x), after.pointwise(spatial))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize(
    "window", [{"padding": 1}, {"padding": "same"}, {"stride": 2}, {"dilation": 2, "padding": (0, 2)}]
)
def test_a_converted_shift_is_a_convolution_with_ones_where_it_reads(window, mode):
    conv = nn.Conv2d(10, 10, (3, 2), bias=False, padding_mode=mode, **window)
    shift = cheapen(nn.Sequential(conv), "Shift", keep=())[0].spatial
    assert isinstance(shift, Shift2d)
    with torch.no_grad():
        conv.weight.zero_()
        for c in range(10):
            row, column = (c // 2 % 3, c % 2) if c < 6 else (1, 1)
            conv.weight[c, c, row, column] = 1
    x = torch.randn(2, 10, 9, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.testing.assert_close(shift(x), conv(x))


@pytest.mark.parametrize("block_type", TYPES)
def test_fit_reproduces_what_a_pair_can_express(block_type):
    """A network that is already cheap, written with dense kernels, is converted without any loss."""
    cheap = cheapen(small(), block_type, init="kaiming").double()
    torch.nn.init.normal_(cheap[2].pointwise.bias)
    dense = small().double()
    impulse = torch.eye(18, dtype=torch.double)[:, :, None, None] * torch.zeros(1, 1, 5, 5).index_fill(
        2, torch.tensor(2), 1
    )
    impulse = impulse * torch.zeros(1, 1, 5, 5).index_fill(3, torch.tensor(2), 1)
    with torch.no_grad():
        response = cheap[2](impulse) - cheap[2].pointwise.bias[None, :, None, None]  # (I, O, 5, 5), mirrored kernels
        dense[2].weight.copy_(response[:, :, 1:4, 1:4].flip(2, 3).transpose(0, 1))
        dense[2].bias.copy_(cheap[2].pointwise.bias)
        dense[0].load_state_dict(cheap[0].state_dict())
    again = cheapen(dense, block_type, init="fit")
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    torch.testing.assert_close(again(x), dense(x))
    torch.testing.assert_close(again(x), cheap(x))


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 18, 3), nn.ReLU(), nn.Conv2d(18, 6, 3, padding=1))


def test_auto_fits_what_was_trained_and_starts_the_rest_anew():
    fresh = CifarResNet(8, Standard(), 10)
    trained = copy.deepcopy(fresh)
    trained(torch.randn(4, 3, 16, 16))
    assert weights_equal(cheapen(trained, "Shift"), cheapen(trained, "Shift", init="fit"))
    assert not weights_equal(cheapen(fresh, "Shift"), cheapen(fresh, "Shift", init="fit"))
    plain = small()
    assert not weights_equal(cheapen(plain, "Shift"), cheapen(plain, "Shift", init="fit"))
    nn.init.normal_(plain[2].weight)
    assert weights_equal(cheapen(plain, "Shift"), cheapen(plain, "Shift", init="fit"))


def test_networks_whose_normalisation_tells_nothing_are_judged_by_their_weights():
    for norm, trained in ((nn.InstanceNorm2d, False), (torchvision.ops.FrozenBatchNorm2d, True)):
        network = nn.Sequential(nn.Conv2d(3, 18, 3), norm(18), nn.Conv2d(18, 6, 3))
        assert weights_equal(cheapen(network, "Shift"), cheapen(network, "Shift", init="fit")) is False
        if trained:
            network[1].running_mean.fill_(0.5)
        else:
            nn.init.normal_(network[2].weight)
        assert weights_equal(cheapen(network, "Shift"), cheapen(network, "Shift", init="fit"))


def test_the_table_leaves_the_modes_as_they_are():
    before = build("resnet18").train()
    before.bn1.eval()
    conversion_table(before, cheapen(before, "DW"), (3, 32, 32))
    assert before.training
    assert before.layer1.training
    assert not before.bn1.training


def test_a_converted_shift_takes_a_single_image_too():
    after = cheapen(small(), "Shift")
    image = torch.randn(3, 9, 9)
    torch.testing.assert_close(after(image), after(image[None])[0])


def weights_equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_the_given_network_stays_as_it_is_and_untouched_layers_keep_their_weights():
    before = build("resnet18").eval()
    state = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    after = cheapen(before, "DW")
    assert all(torch.equal(before.state_dict()[name], tensor) for name, tensor in state.items())
    assert torch.equal(after.conv1.weight, before.conv1.weight)
    assert torch.equal(after.fc.weight, before.fc.weight)
    assert not any(m.training for m in after.modules())
    assert {id(p) for p in after.parameters()}.isdisjoint({id(p) for p in before.parameters()})


def test_a_layer_used_in_two_places_stays_one():
    layer = nn.Conv2d(12, 12, 3, padding=1)
    after = cheapen(nn.Sequential(nn.Conv2d(3, 12, 3), layer, layer), "DW")
    assert after[1] is after[2]
    assert isinstance(after[1], CheapConv)


def test_keep_takes_names_modules_and_patterns_and_refuses_strangers():
    before = build("resnet18")
    after = cheapen(before, "DW", keep=["conv1", "layer1", "layer4.*.conv2"])
    kept = {name for name in find_spatial_convs(before) if not isinstance(after.get_submodule(name), CheapConv)}
    expected = {"conv1", *(f"layer1.{b}.conv{c}" for b in (0, 1) for c in (1, 2)), "layer4.0.conv2", "layer4.1.conv2"}
    assert kept == expected
    assert isinstance(cheapen(before, "DW", keep=()).conv1, CheapConv)
    with pytest.raises(ValueError, match=r"keep=layer1.0.conv3: no K x K convolution.*layer1.0.conv1"):
        cheapen(before, "DW", keep=["layer1.0.conv3"])


def test_a_shift_layer_with_too_few_channels_is_kept_and_listed():
    before = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 24, 5), nn.Conv2d(24, 16, 3))
    after = cheapen(before, "Shift")
    made = str(conversion_table(before, after, (3, 32, 32)))
    assert [type(layer) for layer in after] == [nn.Conv2d] * 3 + [CheapConv]
    assert "kept: the stem" in made
    assert "kept: a shift of 9 taps moves none of 8 channels" in made
    assert "kept: a shift of 25 taps moves none of 16 channels" in made


def test_group_takes_the_largest_divisor_and_the_table_says_so():
    before = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 7, 3), nn.Conv2d(7, 8, 3), nn.Conv2d(8, 8, 3))
    after = cheapen(before, "Group", groups=4)
    made = conversion_table(before, after, (3, 32, 32))
    assert [row.after for row in made.rows] == [
        "kept: the stem",
        "groups 3 + 1 x 1",
        "kept: no number of groups up to 4 divides its 7 channels",
        "groups 4 + 1 x 1",
    ]
    assert isinstance(made, ConversionTable)


class Odd(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class OddWithin(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight, bias) * 2


def test_convolutions_of_another_kind_are_kept_and_listed():
    odd, computed = Odd(12, 12, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(12, 12, 3))
    within, grouped = OddWithin(12, 12, 3), nn.Conv2d(12, 12, 3, groups=2)
    before = nn.Sequential(nn.Conv2d(3, 12, 3), odd, within, computed, grouped, nn.Conv2d(12, 12, 3))
    rows = conversion_table(before, cheapen(before, "DW"), (3, 32, 32)).rows
    assert [row.after for row in rows[1:]] == [
        "kept: a Odd computes in a way of its own",
        "kept: a OddWithin computes in a way of its own",
        "kept: its weights are computed from others",
        "kept: in 2 groups already",
        "depth-wise + 1 x 1",
    ]


@pytest.mark.parametrize("block_type", ["Shift", "DW", "Group", "RepDW"])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "bias": False}, {"kernel_size": 5, "padding": 2, "dilation": 2}])
def test_a_pair_offers_what_a_convolution_offers(block_type, options):
    conv = nn.Conv2d(32, 24, **{"kernel_size": 3, "padding": 1} | options)
    pair = cheapen(nn.Sequential(nn.Conv2d(3, 32, 3), conv), block_type)[1]
    assert isinstance(pair, CheapConv)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    assert [getattr(pair, name) for name in names] == [getattr(conv, name) for name in names]
    assert (pair.bias is None) == (conv.bias is None)
    assert not hasattr(pair, "weight")
    with pytest.raises(AttributeError, match="a cheap pair has no `weight`.*`keep` of `cheapen`"):
        _ = pair.weight
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pair.nothing


def test_the_stride_of_a_pair_whose_second_layer_has_it():
    assert DW()(16, 32, stride=2).stride == (2, 2)


class AsksForItsWidth(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(c, 16, 3, padding=1) for c in (3, 16, 16))

    def forward(self, x):
        return self.b(self.a(self.stem(x))).mean((2, 3)).view(-1, self.b.out_channels)


class UsesWeightsByHand(AsksForItsWidth):
    def forward(self, x):
        weight = self.b.weight
        return F.conv2d(self.a(self.stem(x)), weight - weight.mean(), self.b.bias, padding=1)


class AsksForTheClass(AsksForItsWidth):
    def forward(self, x):
        assert type(self.a) is nn.Conv2d, "the layer is no convolution"
        return super().forward(x)


class Tied(AsksForItsWidth):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(16, 16, 3, padding=1)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(super().forward(x)[..., None, None])


def reasons_kept(network):
    convs = find_spatial_convs(network).items()  # some of them are parts of pairs
    return {name: conv.reason_kept for name, conv in convs if hasattr(conv, "reason_kept")}


def test_a_network_that_asks_its_layer_for_the_width_is_converted():
    after = cheapen(AsksForItsWidth(), "DW")
    assert reasons_kept(after) == {"stem": "the stem"}
    assert after(torch.zeros(1, 3, 8, 8)).shape == (1, 16)


def test_a_layer_whose_weights_are_used_by_hand_is_kept_and_listed():
    before = UsesWeightsByHand()
    after = cheapen(before, "DW")
    assert reasons_kept(after) == {"stem": "the stem", "b": "only its weights are used"}
    assert after(torch.zeros(1, 3, 8, 8)).shape == (1, 16, 8, 8)
    assert "kept: only its weights are used" in str(conversion_table(before, after, (3, 32, 32)))


def test_a_network_that_cannot_be_run_with_pairs_is_refused():
    with pytest.raises(ValueError, match=r"AsksForTheClass cannot be run after the conversion \(the layer is no conv"):
        cheapen(AsksForTheClass(), "DW")
    assert cheapen(AsksForTheClass(), "DW", keep=["stem", "a"])(torch.zeros(1, 3, 8, 8)).shape == (1, 16)


def test_tied_layers_are_kept_and_stay_tied():
    after = cheapen(Tied(), "DW")
    assert after.a.weight is after.b.weight
    shared = "its weights are shared with another layer"
    assert reasons_kept(after) == {"stem": "the stem", "a": shared, "b": shared}


def test_layers_with_the_old_weight_norm_and_with_hooks_are_kept_and_work():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        normed = nn.utils.weight_norm(nn.Conv2d(16, 16, 3))
    layers = [nn.Conv2d(3, 16, 3), normed, *(nn.Conv2d(16, 16, 3) for _ in range(3))]
    before, seen = nn.Sequential(*layers), []
    before[2].register_forward_hook(lambda *_: seen.append("forward"))
    before[3].register_forward_pre_hook(lambda *_: seen.append("before"))
    after = cheapen(before, "DW")
    assert not seen  # the trial run calls no hooks
    kept = ["the stem", "its weights are computed from others", "it has hooks", "it has hooks"]
    assert list(reasons_kept(after).values()) == kept
    after(torch.zeros(1, 3, 16, 16)).sum().backward()
    assert seen == ["forward", "before"]
    assert after[1].weight_g.grad is not None


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_a_layer_with_any_hook_is_kept(register):
    before = nn.Sequential(*(nn.Conv2d(c, 16, 3) for c in (3, 16, 16)))
    getattr(before[1], register)(lambda *_: None)
    assert reasons_kept(cheapen(before, "DW")) == {"0": "the stem", "1": "it has hooks"}


@pytest.mark.parametrize(
    ("block_type", "options", "message"),
    [
        ("Dw", {}, "block_type=Dw: unknown; must be one of DW, Group, RepDW, Shift"),
        ("Group", {"groups": 0}, "block_type.groups=0: must be a whole number"),
        ("DW", {"keep": 5}, "keep=5: must be a list of names"),
        ("DW", {"init": "svd"}, "init=svd: must be one of auto, fit, kaiming"),
    ],
)
def test_unknown_words_are_refused(block_type, options, message):
    with pytest.raises(ValueError, match=message):
        cheapen(small(), block_type, **options)
