import pytest

from odcheap.report import costs
from odcheap.report.command import main
from odcheap.utils.parts import list_parts


def found(*overrides):
    return {(row.backbone, row.block_type): row for row in costs.count_costs(overrides)}


def test_costs_are_those_of_the_reference():
    """../shared/reference.md, and for the converted network the hand counts with the stride on the spatial operator."""
    rows = found("backbone=resnet56") | found("backbone=resnet56_converted")
    params_and_macs = {key: (row.params, row.macs) for key, row in rows.items()}
    shared = {"Standard": 855_770, "Shift": 102_106, "DW": 119_818, "Group": 311_194}
    shared["RepDW"] = shared["DW"] + 1968  # a bias for each channel of a spatial operator
    stride_on = {
        "resnet56": {
            "Standard": 125_747_840,
            "Shift": 15_385_216,
            "DW": 20_472_448,
            "RepDW": 20_472_448,
            "Group": 50_774_656,
        },
        "resnet56_converted": {
            "Standard": 125_747_840,
            "Shift": 14_598_784,
            "DW": 19_188_352,
            "RepDW": 19_188_352,
            "Group": 45_564_544,
        },
    }
    assert params_and_macs == {(b, t): (shared[t], stride_on[b][t]) for b in stride_on for t in shared}


def test_published_costs_of_standard_networks():
    """torchvision's documentation: ResNet-18 11,689,512 parameters and 1.81 GFLOPs (its word for MACs)."""
    row = found("backbone=resnet18", "block_type=Standard")["resnet18", "Standard"]
    assert (row.params, round(row.macs / 1e9, 2), row.pixels) == (11_689_512, 1.81, 224)


@pytest.mark.slow
def test_every_backbone_has_its_costs():
    rows = found()
    assert len(rows) == len(list_parts("block_type")) * (len(list_parts("backbone")) - len(("torchvision", "timm")))
    assert not [row.refused for row in rows.values() if row.refused]


def test_the_table_says_how_much_cheaper_and_what_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(costs, "MAX_SMALL_SIZE", 224)  # builds once
    assert main(["--costs", "backbone=torchvision", "backbone.name=mobilenet_v3_small"]) == 0
    out = capsys.readouterr().out
    assert "torchvision mobilenet_v3_small │ Standard" in out
    assert "block_type=DW: nothing to replace" in out
    assert main(["--costs", "backbone=resnet20", "backbone.depth=8"]) == 0
    assert "1.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["backbone=resnet17"], "backbone=resnet17: unknown; must be one of densenet40, "),
        (["runs/sweep"], "--costs=runs/sweep: needs options such as backbone=resnet56 instead of this"),
        (["backbone=resnet20", "block_type=Group", "block_type.groups=0"], "block_type.groups=0: must be a whole"),
        (["backbone=torchvision"], "backbone.name=???: must be given"),
        (["backbone.depths=3"], "backbone.depths: there is no such option; did you mean backbone.depth"),
    ],
)
def test_bad_options_are_one_line(capsys, options, message):
    assert main(["--costs", *options]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
