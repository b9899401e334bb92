"""odcheap: small, cheap convolutional networks, trained by online distillation."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported when first used: `odcheap.predict` works without PyTorch, and commands start without what they do not need.
_MODULES = {
    "BlockType": "odcheap.layers.cheap_conv",
    "OnlineDistillation": "odcheap.methods.od",
    "Shift2d": "odcheap.layers.spatial",
    "Students": "odcheap.methods.students",
    "add_weight_noise": "odcheap.models.wrappers",
    "cheapen": "odcheap.models.convert",
    "conversion_table": "odcheap.models.convert",
    "export_student": "odcheap.export.student",
    "load_reference": "odcheap.runs.reference",
    "load_student": "odcheap.models.build",
    "soft_kl": "odcheap.methods.losses",
}
__all__ = list(_MODULES)

if TYPE_CHECKING:  # the same names for type checkers
    from odcheap.export.student import export_student as export_student
    from odcheap.layers.cheap_conv import BlockType as BlockType
    from odcheap.layers.spatial import Shift2d as Shift2d
    from odcheap.methods.losses import soft_kl as soft_kl
    from odcheap.methods.od import OnlineDistillation as OnlineDistillation
    from odcheap.methods.students import Students as Students
    from odcheap.models.build import load_student as load_student
    from odcheap.models.convert import cheapen as cheapen
    from odcheap.models.convert import conversion_table as conversion_table
    from odcheap.models.wrappers import add_weight_noise as add_weight_noise
    from odcheap.runs.reference import load_reference as load_reference


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
