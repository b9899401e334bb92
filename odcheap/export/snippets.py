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
WITH_OPENVINO = """With OpenVINO (`pip install openvino`):

```python
import json

import numpy as np
import openvino

images = np.random.rand({shape}).astype(np.float32)  # {kind} in [0, 1]; preprocess.json says how a file becomes this
student = openvino.Core().compile_model("student.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
logits = student(images)[0]
with open("labels.json", encoding="utf-8") as file:
    classes = json.load(file)
print(*(classes[k] for k in logits.argmax(1)))
```

Without the hint OpenVINO computes with 16 bits on CPUs that have operations for them, and the logits differ slightly.
`benchmark_app -m student.onnx -hint latency -infer_precision f32 -shape "[{shape}]"`, which is a part of OpenVINO,
measures the time of {count} on your machine."""
SNIPPETS = {STUDENT_FILE: WITH_ODCHEAP, PTE: WITH_EXECUTORCH, PROGRAM: WITH_PYTORCH}


def list_snippets(names: Collection[str], shape: tuple[int, int, int, int], with_openvino: bool = False) -> list[str]:
    """Returns paragraphs of Markdown, each with the code that runs one file of an export.

    Args:
        names: The names of the exported files.
        shape: The shape (n, C, H, W) of images that all files can take.
        with_openvino: Whether to add a paragraph with code that runs `student.onnx` in OpenVINO.
    """
    values = {
        "{shape}": ", ".join(map(str, shape)),
        "{kind}": "gray" if shape[1] == 1 else "RGB",
        "{count}": "one image" if shape[0] == 1 else f"{shape[0]} images",
    }
    snippets = [snippet for name, snippet in SNIPPETS.items() if name in names] + [WITH_OPENVINO] * with_openvino
    for field, value in values.items():
        snippets = [snippet.replace(field, value) for snippet in snippets]
    return snippets
