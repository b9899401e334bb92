"""How long finished runs' students take here, and the standard network in their place, each kind once."""

from typing import Any, NamedTuple

from odcheap.export import onnx
from odcheap.layers.cheap_conv import Standard
from odcheap.models.build import built, rebuilt, settings_of
from odcheap.report import statistics
from odcheap.report.load_runs import Found
from odcheap.utils.errors import Failure
from odcheap.utils.files import read_safetensors


class Times(NamedTuple):
    """Milliseconds of one picture."""

    student: float
    standard: float


def measured(found: list[Found], seconds: float = 1.0) -> dict[str, Times]:
    """By the row's name; nothing for a student that cannot be rebuilt."""
    folders = {id(entry.run): entry.folder for entry in found}
    by_network: dict[str, Times | None] = {}
    times: dict[str, Times] = {}
    for row in statistics.rows(entry.run for entry in found):
        run = next(iter(row.by_seed.values()))
        kind = repr(sorted((k, v) for k, v in run.options.items() if k.startswith(("backbone", "block_type"))))
        if kind not in by_network:
            by_network[kind] = of(folders[id(run)] / "student.safetensors", seconds)
        if by_network[kind] is not None:
            times[row.name] = by_network[kind]
    return times


def of(path: Any, seconds: float) -> Times | None:
    """None where the student cannot be rebuilt, as one of an older version."""
    try:
        tensors, metadata = read_safetensors(path)
        settings = settings_of(metadata, "student", path)
        student = rebuilt(settings, tensors, "student", str(path))
        standard = built(settings, Standard(), "student", str(path)).eval()
    except Failure:
        return None
    size = tuple(settings["image_size"])
    models = (onnx.fastest_onnx(network, size) for network in (student, standard))
    return Times(*(1000 * onnx.latency(model, size, 1, seconds) for model in models))
