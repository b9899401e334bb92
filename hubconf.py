"""Entry points for `torch.hub.load(CLONE, "student", source="local", path="export/student.safetensors")`."""

from odcheap.models.build import load_student as student  # noqa: F401 - the entry point's name

dependencies = ["torch", "safetensors", "yaml", "pydantic"]
