"""The code in a model card that runs the exported files in Python."""

from collections.abc import Collection

from odcheap.export.executorch import PTE

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
WITH_EXECUTORCH = """With ExecuTorch (`pip install executorch torch`; phones have interfaces for C++, Java and Swift):

```python
import json
from pathlib import Path
import torch
from executorch.runtime import Runtime
program = Runtime.get().load_program("student.pte")
images = torch.rand({shape})  # {kind} in [0, 1]; preprocess.json says how an image file becomes this
(logits,) = program.load_method("forward").execute([images])
print(json.loads(Path("labels.json").read_text())[int(logits[0].argmax())])
```"""
SNIPPETS = {STUDENT_FILE: WITH_ODCHEAP, PTE: WITH_EXECUTORCH, PROGRAM: WITH_PYTORCH}


def list_snippets(names: Collection[str], shape: tuple[int, int, int, int]) -> list[str]:
    """Returns paragraphs of Markdown, each with the code that runs one file of an export.

    Args:
        names: The names of the exported files.
        shape: The shape (n, C, H, W) of images that all files can take.
    """
    sizes, kind = ", ".join(map(str, shape)), "gray" if shape[1] == 1 else "RGB"
    snippets = (snippet for name, snippet in SNIPPETS.items() if name in names)
    return [snippet.replace("{shape}", sizes).replace("{kind}", kind) for snippet in snippets]
