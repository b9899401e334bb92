"""How long finished runs' students take here, each kind of network once."""

from typing import Any

from odcheap import compare, deploy
from odcheap.errors import Failure
from odcheap.files import read_safetensors
from odcheap.rebuild import rebuilt, settings_of
from odcheap.study import Found


def measured(found: list[Found], seconds: float = 1.0) -> dict[str, float]:
    """Milliseconds of one picture by the row's name; nothing for a student that cannot be rebuilt."""
    folders = {id(entry.run): entry.folder for entry in found}
    by_network: dict[str, float | None] = {}
    times: dict[str, float] = {}
    for row in compare.rows(entry.run for entry in found):
        run = next(iter(row.by_seed.values()))
        kind = repr(sorted((k, v) for k, v in run.options.items() if k.startswith(("backbone", "block_type"))))
        if kind not in by_network:
            by_network[kind] = of(folders[id(run)] / "student.safetensors", seconds)
        if by_network[kind] is not None:
            times[row.name] = by_network[kind]
    return times


def of(path: Any, seconds: float) -> float | None:
    """None where the student cannot be rebuilt, as one of an older version."""
    try:
        tensors, metadata = read_safetensors(path)
        settings = settings_of(metadata, "student", path)
        network = rebuilt(settings, tensors, "student", str(path))
    except Failure:
        return None
    size = tuple(settings["image_size"])
    return 1000 * deploy.latency(deploy.fastest_onnx(network, size), size, 1, seconds)
