"""The code in a model card that runs the exported files in Python."""

from collections.abc import Collection

STUDENT_FILE, PROGRAM = "student.safetensors", "student.pt2"
WITH_ODCHEAP = """With odcheap, from the weights:

```python
from odcheap import load_student
student = load_student("student.safetensors")
logits = student(images)
```"""
WITH_PYTORCH = """With PyTorch alone:

```python
import torch
student = torch.export.load("student.pt2").module()
logits = student(images)
```

**Do not load a `.pt2` file of a stranger**: this format can contain pickled Python objects, and loading them can run
any code. The other files contain numbers and text only."""
SNIPPETS = {STUDENT_FILE: WITH_ODCHEAP, PROGRAM: WITH_PYTORCH}


def list_snippets(names: Collection[str]) -> list[str]:
    """Returns paragraphs of Markdown, each with the code that runs one file of an export.

    Args:
        names: The names of the exported files.
    """
    return [snippet for name, snippet in SNIPPETS.items() if name in names]
