"""Options are checked against the signatures that they go to, before anything is built."""

import re
from pathlib import Path

import pytest
from hydra import initialize_config_dir

from odcheap.config.command_line import check_choices, is_path_option
from odcheap.config.compose import compose_run, find_source, list_groups
from odcheap.config.options import BUILDERS, check_complete, check_options
from odcheap.config.signatures import Signature, import_signature, read_signature
from odcheap.distributed import launch  # noqa: F401 - registers values of trainer=multinode
from odcheap.utils.errors import OptionError
from odcheap.utils.parts import find_conf_dir, list_parts, read_part


@pytest.fixture
def check():
    """Composes the config of these overrides and checks it."""
    with initialize_config_dir(str(find_conf_dir()), version_base="1.3"):

        def run(*overrides, config_dirs=()):
            config = compose_run(["job_dir=unused", "data=digits", *overrides])
            check_options(config, config_dirs)
            return config

        yield run


def test_every_part_of_conf_passes(check):
    for group, names in list_groups().items():
        for name in names:
            check(f"{group}=[{name}]" if group == "experiment" else f"{group}={name}")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("num_stu=four", "num_stu=four: must be a whole number, 1 or more and at most 100"),
        ("num_stu=true", "num_stu=true: must be a whole number"),
        ("num_stu=null", "num_stu=null: must be a whole number"),
        ("num_stu=2.5", "num_stu=2.5: must be a whole number"),
        ('num_stu="5"', "num_stu=5: must be a whole number"),
        ("seed=1000000000000000000000000000000", r"must be at most 2\^53 in size, as every whole number"),
        ("seed=5.0", "seed=5.0: must be a whole number"),
        ("method.temperature=1e-320", "method.temperature=1e-320: must be finite, also as float32"),
        ("method.detach_teacher=1", "method.detach_teacher=1: must be true or false"),
        ("data.std=[1e308]", r"data.std=.1e\+308.: must be finite, also"),
        ("data.mean=0.5", "data.mean=0.5: must be a"),
        ("data.name=null", "data.name=null: must be a string$"),
        ("data.name=2024", """2024: must be a string; write it in quotes: data.name='"2024"'"""),
        ("data.select=last", "data.select=last: always equals select: set that option"),
        ("data.seed=5", "data.seed=5: always equals seed: set that option"),
        ("data={seed: 5}", "data.seed=5: always equals seed: set that option"),
        ("data.load=x", "data.load=x: must be a part with options of its own, such as data.load.NAME=VALUE"),
        ("backbone={depth: x}", "backbone.depth=x: must be a whole number"),
        ("+backbone.new=x", "backbone.new=x: is not an option of this backbone"),
        ("+method.alpha=3", "method.alpha=3: is not an option of this method"),
        ("method._partial_=false", "method._partial_=false: is not an option"),
        ("method._target_=os.system", "method._target_=os.system: is not an option"),
        ("data.load._target_=${seed}", "data.load._target_=0: is not an option"),
        ("+trainer.profiler={_target_: builtins.open}", "trainer.profiler=.*: is not an option"),
        ("+trainer.plugins=[{_target_: subprocess.run}]", "trainer.plugins=.*: is not an option"),
        ("+trainer.max_epoch=3", "trainer.max_epoch=3: is not an option of this trainer"),
        ("trainer.devices=auto", "must be a whole number, 1 or more; CUDA_VISIBLE_DEVICES chooses the GPUs"),
        ("trainer.devices=1.5", "trainer.devices=1.5: must be a whole number"),
        ("trainer.strategy=ddp_spawn", "trainer.strategy=ddp_spawn: must be one of auto, ddp"),
        ("optimizer.lr=nan", "optimizer.lr=nan: must be finite"),
        ("optimizer.lr=-inf", "optimizer.lr=-inf: must be finite"),
        ("optimizer.lr=0", "optimizer.lr=0: must be a number, above 0"),
        ("+optimizer.betas=[0.9,0.99]", "optimizer.betas=.*: is not an option of this optimizer"),
        (
            "scheduler.milestones=[0.5,2]",
            "scheduler.milestones=.0.5, 2.: must be a list of entries, each a number, 0 or more and at most 1",
        ),
        ("scheduler.milestones=0", "scheduler.milestones=0: must be a list"),
        ("scheduler.fractions=5", "scheduler.fractions=5: must be a list"),
        ("scheduler.gamma=x", "scheduler.gamma=x: must be a number"),
        ("overwrite=1", "overwrite=1: must be true or false"),
        ("capture=0", "capture=0: must be one of auto, true, false"),
        ("kernels=true", "kernels=true: must be one of auto, off"),
        ("select=best", "select=best: must be one of val, last, test"),
        ("checkpoint_every=-1", "checkpoint_every=-1: must be a number, 0 or more, or null"),
        ("logger.tensorboard=5", "logger.tensorboard=5: is a part; choose it with logger=NAME|must be a part"),
        ("+logger.mine={_target_: x}", "logger.mine=.*: is a part; choose it with logger=NAME"),
        ("logger.tensorboard.name=5", "logger.tensorboard.name=5: must be a string"),
        ("job_dir=5", r"job_dir=5: must be a path \(for a folder called 5, write ./5\)"),
        ("data_dir=null", "data_dir=null: must be a path"),
    ],
)
def test_what_does_not_fit_the_signature_is_refused(check, given, line):
    with pytest.raises(OptionError, match=line):
        check(given)


def test_a_list_of_a_fixed_length_is_refused_with_its_length(check):
    line = r"optimizer.betas=\[0.9\]: must be a list of exactly 2 entries, each a number$"
    with pytest.raises(OptionError, match=line):
        check("optimizer=adamw", "optimizer.betas=[0.9]")


@pytest.mark.parametrize(
    "given",
    [
        ["data.val_size=0.1"],
        ["checkpoint_every=null"],
        ["checkpoint_every=0.5"],
        ["optimizer.lr=1"],
        ["optimizer.lr=1e30"],
        ["+optimizer.dampening=0.1"],
        ["optimizer=adamw", "optimizer.betas=[0.9,0.99]"],
        ["data.mean=[0,0.5,1]"],
        ["resume=auto"],
        ["capture=true"],
        ["kernels=off"],
        ["logger=csv"],
        ["logger.tensorboard=null"],
        ["logger.tensorboard.version=1"],
        ["logger.tensorboard.name=null"],
        ["+logger.tensorboard.flush_secs=5"],
        ["trainer.precision=32"],
        ["trainer.benchmark=null"],
        ["trainer.log_every_n_steps=null"],
        ["+trainer.profiler=simple"],
        ["num_stu=???"],  # left to `check_complete`
        ["method=kd"],
    ],
)
def test_what_fits_is_taken(check, given):
    check(*given)


def test_what_must_be_given_is_named(check):
    with pytest.raises(OptionError, match=r"method\.teacher_weights=\?\?\?: must be given"):
        check_complete(check("method=kd").cfg)
    with pytest.raises(OptionError, match="method.teacher_weights=5: must be a path"):
        check("method=kd", "method.teacher_weights=5")
    check("method=kd", "method.teacher_weights=[a,runs/b]")
    for value in ("[]", "[5]", "null"):
        with pytest.raises(OptionError, match=r"method.teacher_weights=.*: must be a"):
            check("method=kd", f"method.teacher_weights={value}")


def test_a_part_of_the_user_s_own_is_checked_against_its_signature(tmp_path, monkeypatch, check):
    (tmp_path / "my_optimizers.py").write_text(
        "from typing import Annotated\n\nfrom pydantic import Field\n\n\n"
        "def optimize(params, lr: float, rho: Annotated[float, Field(gt=0, lt=1)] = 0.5): ...\n"
    )
    (tmp_path / "conf" / "optimizer").mkdir(parents=True)
    text = "_target_: my_optimizers.optimize\n_partial_: true\nlr: 0.1\nrho: 0.5\n"
    (tmp_path / "conf" / "optimizer" / "mine.yaml").write_text(text)
    (tmp_path / "conf" / "optimizer" / "lost.yaml").write_text("_target_: no_such_package.optimize\n")
    monkeypatch.syspath_prepend(tmp_path)
    config_dirs, search = [tmp_path / "conf"], f"hydra.searchpath=[file://{tmp_path}/conf]"
    check(search, "optimizer=mine", config_dirs=config_dirs)
    with pytest.raises(OptionError, match="optimizer.rho=1: must be a number, above 0 and below 1"):
        check(search, "optimizer=mine", "optimizer.rho=1", config_dirs=config_dirs)
    with pytest.raises(OptionError, match="optimizer._target_=no_such_package.optimize: cannot be imported"):
        check(search, "optimizer=lost", config_dirs=config_dirs)


@pytest.mark.parametrize(
    "given",
    ["method=od,dml", "method=glob(*)", "experiment=[cifar10_od,short]", "experiment=[]", "seed=3"],
)
def test_names_of_parts_are_taken_in_sweeps_too(given):
    check_choices(["-m", given], list_groups())


@pytest.mark.parametrize("given", ["method=3", "logger=[]", "method=[od,dml]", "block_type={DW: 1}", "scheduler=null"])
def test_what_names_no_part_is_refused_with_the_names(given):
    with pytest.raises(OptionError, match=r"must be one of \w+, \w+"):
        check_choices([given], list_groups())


def test_paths_are_known_by_their_names():
    paths = ["job_dir=a=b", "backbone.pretrained=x", "data.load.data_dir=x", "hydra.sweep.dir=x", "weights=x"]
    assert all(map(is_path_option, paths))
    assert not any(map(is_path_option, ["seed=1", "method=od", "hydra.sweep.subdir=x"]))


def test_entries_of_hydras_search_path_are_directories_or_packages(tmp_path, monkeypatch):
    (tmp_path / "lab_parts" / "conf").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert find_source("file", "/a") == Path("/a")
    assert find_source("pkg", "lab_parts.conf") == tmp_path / "lab_parts" / "conf"
    with pytest.raises(OptionError, match=r"hydra.searchpath=pkg://nowhere.conf: there is no such package; install"):
        find_source("pkg", "nowhere.conf")
    with pytest.raises(OptionError, match=r"hydra.searchpath=http://x: must be file://DIRECTORY or pkg://PACKAGE"):
        find_source("http", "x")


def list_targets(node):
    """Returns the Python paths of a part and of the parts in it."""
    if not isinstance(node, dict):
        return []
    inner = [target for value in node.values() for target in list_targets(value)]
    return [node["_target_"], *inner] if "_target_" in node else inner


def name_types(hint):
    """Returns the names in an annotation without their modules; the order of the members of a union is arbitrary."""
    return sorted(re.findall(r"(\w+)(?![\w.])", repr(hint)))


@pytest.mark.parametrize("group", ["block_type", "backbone", "method", "data", "optimizer", "scheduler", "trainer"])
def test_signatures_read_from_the_source_are_those_of_the_import(group):
    targets = {target for part in list_parts(group) for target in list_targets(read_part(group, part))}
    more = {"optimizer": ["torch.optim.Adam", "torch.optim.Rprop"], "scheduler": ["torch.optim.lr_scheduler.CyclicLR"]}
    for target in [*sorted(targets), *more.get(group, []), *filter(None, [BUILDERS.get(group)])]:
        found, known = read_signature(group, target), import_signature(group, target)
        assert found[1:] == known[1:], target
        own = {name: name_types(hint) for name, hint in known.annotations.items() if name in found.annotations}
        assert {name: name_types(hint) for name, hint in found.annotations.items()} == own
        # These are objects, and no options.
        assert {*known.annotations} - {*found.annotations} <= {"network", "params"}, target


def test_a_definition_that_cannot_be_read_refuses_nothing(tmp_path, monkeypatch):
    text = "from lost import Base, wrap\n\n\nclass Child(Base): ...\n\n\n@wrap\ndef build(rate: float): ...\n"
    text += "\n\nclass Own(Base):\n    def __init__(self, rate: float, scale: Base, **options): ...\n"
    (tmp_path / "unread.py").write_text(text)
    (tmp_path / "broken.py").write_text("def build(:")
    (tmp_path / "circle.py").write_text("from circle import build\n")
    monkeypatch.syspath_prepend(tmp_path)
    for target in ("unread.Child", "unread.build", "unread.Lost", "lost.build", "broken.build", "circle.build"):
        assert read_signature("", target) == Signature({}, set(), set(), takes_any=True)
    assert read_signature("", "unread.Own") == ({"rate": float}, {"rate", "scale"}, set(), True)
