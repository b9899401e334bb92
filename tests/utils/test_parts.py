import functools
import sys

import hydra
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from odcheap.utils.errors import OptionError
from odcheap.utils.parts import build_part, find_conf_dir, list_parts, part_settings, read_part

GROUPS = ("block_type", "backbone", "method", "data")


@pytest.fixture
def config_dir(tmp_path, monkeypatch):
    """A user's own conf directory with a package beside it."""
    (tmp_path / "userpackage.py").write_text(
        "class Thing:\n"
        "    def __init__(self, size, rate=1.0, inner=None, **rest):\n"
        "        self.size, self.rate, self.inner, self.rest = size, rate, inner, rest\n"
    )
    folder = tmp_path / "conf" / "thing"
    (folder / "sub").mkdir(parents=True)
    (folder / "base.yaml").write_text("_target_: userpackage.Thing\nsize: ???\nrate: 1e-3\n")
    (folder / "own.yaml").write_text("defaults:\n  - base\n  - sub: inner\nsize: 3\nextra: {a: 1}\n")
    (folder / "sub" / "inner.yaml").write_text("_target_: userpackage.Thing\nsize: 5\n_partial_: true\n")
    (folder / "linked.yaml").write_text("_target_: userpackage.Thing\nsize: ${data.size}\n")
    (folder / "loop.yaml").write_text("defaults: [loop]\n")
    (folder / "broken.yaml").write_text("a: [1\n")
    (folder / "missing.yaml").write_text("_target_: no_such_package.Thing\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "conf"
    sys.modules.pop("userpackage", None)


def test_every_shipped_part_is_read_as_hydra_reads_it():
    with hydra.initialize_config_dir(str(find_conf_dir()), version_base="1.3"):
        for group in GROUPS:
            for name in list_parts(group):
                composed = OmegaConf.to_container(hydra.compose(f"{group}/{name}"), resolve=False)
                for key in group.split("/"):
                    composed = composed[key]
                assert read_part(group, name) == composed, (group, name)


def test_settings_hold_names_and_options_only():
    node = read_part("backbone", "resnet56_converted")
    settings = part_settings(OmegaConf.create(node), "resnet56_converted")
    assert settings["part"] == "resnet56_converted"
    assert settings["network"]["depth"] == 56
    assert "_target_" not in str(settings)
    assert "odcheap." not in str(settings)
    assert type(settings["network"]) is dict


def test_settings_refuse_an_option_called_part():
    with pytest.raises(ValueError, match="part"):
        part_settings({"part": 3}, "own")


def test_builds_a_part_and_the_parts_in_it():
    conv = build_part("block_type", {"part": "Group", "groups": 2})
    assert conv.groups == 2
    build = build_part("backbone", part_settings(read_part("backbone", "resnet20"), "resnet20"), conv=conv)
    assert isinstance(build, functools.partial)
    assert build(num_classes=7).num_classes == 7
    converted = build_part("backbone", {"part": "resnet56_converted", "network": {"depth": 8}}, conv=conv)
    assert sum(1 for name, _ in converted(num_classes=3).named_modules() if name.endswith("conv1")) == 4


def test_users_own_parts(config_dir):
    assert list_parts("thing", [config_dir])[0] == "base"
    own = build_part("thing", {"part": "own", "rate": 2.0}, config_dirs=[config_dir])
    assert (own.size, own.rate, own.rest.keys()) == (3, 2.0, {"extra", "sub"})
    assert own.rest["sub"]().size == 5
    assert build_part("thing", {"part": "base", "size": 1}, config_dirs=[config_dir]).rate == 0.001
    assert build_part("thing", {"part": "base"}, config_dirs=[config_dir], size=9).size == 9
    free = build_part("thing", {"part": "own", "extra": {"b": [1, 2]}}, config_dirs=[config_dir])
    assert free.rest["extra"] == {"a": 1, "b": [1, 2]}  # a node that calls nothing takes any plain option


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "is not the name"),
        ({"part": "None"}, "unknown; must be one of"),
        ({"part": "../block_type/DW"}, "is not the name"),
        ({"part": "base"}, "size=\\?\\?\\?: must be given"),
        ({"part": "linked"}, "must be given"),
        ({"part": "loop"}, "circle"),
        ({"part": "broken"}, "not a valid YAML"),
        ({"part": "own", "unknown": 1}, "is not an option"),
        ({"part": "own", "_target_": "os.system"}, "is not an option"),
        ({"part": "own", "extra": {"_target_": "os.system"}}, "is not an option"),
        ({"part": "own", "extra": {"a": {"_target_": "os.system"}}}, "is not an option"),
        ({"part": "own", "rate": {"_target_": "os.system"}}, "is not an option"),
        ({"part": "own", "rate": [{"_args_": [1]}]}, "is not an option"),
        ({"part": "own", "sub": {"_partial_": False}}, "is not an option"),
        ({"part": "own", "sub": 5}, "must be a part's options"),
        ({"part": "own", "rate": "${oc.env:HOME}"}, "must be a value"),
        ({"part": "own", "rate": "???"}, "must be a value"),
        ({"part": "own", "rate": float("nan")}, "finite"),
        ({"part": "own", "rate": object()}, "must be a number"),
        ("own", "must be settings"),
    ],
)
def test_refuses(settings, message, config_dir):
    with pytest.raises(OptionError, match=message) as caught:
        build_part("thing", settings, config_dirs=[config_dir])
    assert "\n" not in str(caught.value)


def test_a_package_that_is_missing_is_named(config_dir):
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        build_part("thing", {"part": "missing"}, config_dirs=[config_dir])


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["${data.mean}", "???"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.just("_target_"), inner, max_size=3),
    max_leaves=8,
)


@given(plain, plain)
def test_wild_settings_end_in_one_error(name, options):
    """Nothing but the block types is ever called, and every refusal is an `OptionError`."""
    settings = {"part": name} | (options if isinstance(options, dict) else {"groups": options})
    try:
        made = build_part("block_type", settings)
    except OptionError:
        return
    assert type(made).__name__ in list_parts("block_type")


@given(plain)
def test_wild_options_of_a_known_part(value):
    for settings in ({"part": "resnet56_converted", "network": value}, {"part": "resnet20", "depth": value}):
        try:
            build = build_part("backbone", settings)
        except OptionError:
            continue
        assert isinstance(build, functools.partial)
        assert build.func.__module__.startswith("odcheap.models")
