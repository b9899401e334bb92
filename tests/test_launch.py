import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from odcheap.launch import needs_processes, quoted


@pytest.mark.parametrize("value", ["runs/a=b,c=d", "/tmp/with space/x", "plain", '"quoted=already"', "a(1)", "[a,b]"])
def test_quoted_paths_are_read_as_they_were_typed(value):
    override = OverridesParser.create().parse_override(quoted(f"resume={value}"))
    assert not override.is_sweep_override()
    expected = ["a", "b"] if value == "[a,b]" else value.strip('"')
    assert override.value() == expected


@pytest.mark.parametrize(
    ("devices", "nodes", "expected"), [(1, 1, False), (2, 1, True), (2, 2, False), ("auto", 1, False)]
)
def test_processes_are_started_for_several_devices_of_one_machine(devices, nodes, expected, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    cfg = OmegaConf.create({"trainer": {"devices": devices, "num_nodes": nodes}})
    assert needs_processes(cfg) == expected
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert not needs_processes(cfg)
