"""Values that no option may have."""

import pytest
from omegaconf import OmegaConf

from odcheap.config.messages import list_groups
from odcheap.config.options import check_choices, check_paths, check_tree, check_type
from odcheap.utils.errors import OptionError
from odcheap.utils.parts import find_conf_dir

PART = OmegaConf.create({"a": 1})


@pytest.mark.parametrize(
    ("key", "value", "default", "words"),
    [
        ("num_stu", "four", 4, "num_stu=four: must be a number"),
        ("num_stu", True, 4, "num_stu=true: must be a number"),
        ("num_stu", None, 4, "num_stu=null: must be a number"),
        ("num_stu", 2.5, 4, "num_stu=2.5: must be a whole number"),
        ("seed", 10**30, 0, r"must be within 2\^53, as every whole number"),
        ("method.temperature", 1e-320, 4.0, "method.temperature=1e-320: must be finite, also in 32 bits"),
        (
            "data.std",
            OmegaConf.create([1e308]),
            OmegaConf.create([0.1]),
            r"data.std=.1e\+308.: must be finite, also",
        ),
        ("method.teacher_mean", "x", None, "must be a list, such as method.teacher_mean="),
        ("method.teacher_size", 2.5, None, "method.teacher_size=2.5: must be a whole number"),
        ("method.teacher_network", 5, None, "method.teacher_network=5: must be a word"),
        ("data.workers", "x", None, "data.workers=x: must be a number"),
        ("trainer.devices", "auto", 1, "trainer.devices=auto: must be a number"),
        ("trainer.devices", 1.5, 1, "trainer.devices=1.5: must be a whole number"),
        ("optimizer.lr", float("nan"), 0.1, "optimizer.lr=nan: must be finite"),
        ("optimizer.lr", -float("inf"), 0.1, "optimizer.lr=-inf: must be finite"),
        ("overwrite", 1, False, "overwrite=1: must be true or false"),
        ("data.load", "x", PART, "data.load=x: must be a part with options of its own"),
        ("data.mean", 0.5, OmegaConf.create([0.1, 0.2]), "must be a list, such as data.mean=.0.1,0.2."),
        ("data.mean", OmegaConf.create(["x"]), OmegaConf.create([0.1]), "data.mean=..x..: must be a number"),
        ("data.name", None, "cifar10", "data.name=null: must be a word$"),
        (
            "data.name",
            2024,
            "cifar10",
            """2024: must be a word; .* looks like none: data.name='"2024"'""",
        ),
        ("logger.tensorboard.name", 5, "tensorboard", "must be a word"),
        ("logger.tensorboard", 5, PART, "logger.tensorboard=5: must be a part with options of its own"),
        ("data.select", "x", "val", "data.select=x: is no option of its own: give select"),
        ("method._partial_", False, True, "is no option"),
    ],
)
def test_what_is_not_of_the_default_s_kind_is_refused(key, value, default, words):
    with pytest.raises(OptionError, match=words):
        check_type(key, value, default)


@pytest.mark.parametrize(
    ("key", "value", "default"),
    [
        ("data.val_size", 0.1, 5000),
        ("checkpoint_every", None, 15),
        ("checkpoint_every", 0.5, 15),
        ("optimizer.lr", 1, 0.1),
        ("optimizer.lr", 1e30, 0.1),
        ("data.mean", OmegaConf.create([0, 0.5]), OmegaConf.create([0.1, 0.2])),
        ("resume", "auto", None),
        ("capture", True, "auto"),
        ("logger.mine", OmegaConf.create({"_target_": "x"}), None),
        ("logger.csv", None, None),
        ("trainer.precision", 32, "32-true"),
        ("trainer.benchmark", None, True),
        ("logger.tensorboard", None, PART),
        ("logger.tensorboard.version", 1, ""),
        ("logger.tensorboard.name", None, "tensorboard"),
        ("method.teacher_mean", None, None),
        ("select", 5, "val"),  # has its choices named later
        ("trainer.log_every_n_steps", None, 1),
    ],
)
def test_what_an_option_may_be_is_taken(key, value, default):
    check_type(key, value, default)


@pytest.mark.parametrize(
    "given",
    ["method=od,dml", "method=glob(*)", "experiment=[cifar10_od,short]", "experiment=[]", "seed=3"],
)
def test_names_of_parts_are_taken_in_sweeps_too(given):
    check_choices(["-m", given], list_groups([find_conf_dir()]))


def test_what_is_in_a_part_is_looked_at_too():
    default = OmegaConf.create({"network": {"depth": 56, "_partial_": True, "conv": {"a": 1}}, "needed": "???"})
    for given in ({"depth": "x"}, {"depth": None}, {"conv": None}, {"conv": {"a": "x"}}, {"_partial_": False}):
        value = OmegaConf.merge(default, {"network": given})
        with pytest.raises(OptionError, match=r"backbone\.network\.(depth|conv|conv\.a|_partial_)="):
            check_tree("backbone", value, default)
    check_tree("backbone", OmegaConf.merge(default, {"network": {"depth": 20}, "needed": "x"}), default)
    with pytest.raises(OptionError, match="backbone.network.new=x: is no option of this backbone"):
        check_tree("backbone", OmegaConf.merge(default, {"network": {"new": "x"}}), default)


@pytest.mark.parametrize("given", ["method=3", "logger=[]", "method=[od,dml]", "block_type={DW: 1}", "scheduler=null"])
def test_what_names_no_part_is_refused_with_the_names(given):
    with pytest.raises(OptionError, match=r"must be one of \w+, \w+"):
        check_choices([given], list_groups([find_conf_dir()]))


def test_paths_are_words():
    check_paths(OmegaConf.create({"resume": None, "job_dir": "5", "data_dir": "data"}))
    with pytest.raises(OptionError, match="job_dir=5: must be a path"):
        check_paths(OmegaConf.create({"job_dir": 5}))
    with pytest.raises(OptionError, match="data_dir=null: must be a path"):
        check_paths(OmegaConf.create({"data_dir": None}))
    with pytest.raises(OptionError, match="method.teacher_weights=null: must be a path"):
        check_paths(OmegaConf.create({"method": {"teacher_weights": None}}))
