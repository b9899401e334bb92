"""What the methods' tests share: the pieces of the papers' formulas in NumPy, and small students."""

import numpy as np
import torch

from odcheap.layers.cheap_conv import DW
from odcheap.methods.base import Method
from odcheap.methods.students import Students
from odcheap.models.cifar import CifarResNet

CLASSES, IMAGES = 5, 7
TARGET = np.arange(IMAGES) % CLASSES


def softmax(z, temperature=1.0):
    e = np.exp((z - z.max(-1, keepdims=True)) / temperature)
    return e / e.sum(-1, keepdims=True)


def ce(z):
    return -np.log(softmax(z)[range(IMAGES), TARGET]).mean()


def kl(p, q):
    """Of predictions, averaged over the images."""
    return (p * np.log(p / q)).sum(1).mean()


def soft(z, t, temperature):
    """T^2 KL(softmax(t / T) || softmax(z / T))."""
    return temperature**2 * kl(softmax(t, temperature), softmax(z, temperature))


def logits(*shape, seed=0):
    return 3 * np.random.default_rng(seed).normal(size=(*shape, IMAGES, CLASSES))


def students(num_stu=3) -> Students:
    return Students(lambda: CifarResNet(8, DW(), CLASSES), num_stu, seed=0)


def terms(method: Method, **outputs) -> dict[str, float]:
    """The method's terms for these outputs; their sum must be its loss."""
    given = {name: None if value is None else torch.from_numpy(value) for name, value in outputs.items()}
    found = {name: value.item() for name, value in method.loss(given, torch.from_numpy(TARGET)).items()}
    np.testing.assert_allclose(found.pop("loss"), sum(found.values()), rtol=1e-12)
    return found


def check(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


def reached(method: Method, prefix: str) -> set[str]:
    """Whose weights get a gradient from the terms of that name, `student_<k>` or the part's own name."""
    method.zero_grad()
    images = torch.randn(2 * CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = method.loss(method(images), torch.arange(2 * CLASSES) % CLASSES)
    sum(value for name, value in found.items() if name.startswith(prefix)).backward()
    names = [name for name, p in method.named_parameters() if p.grad is not None and p.grad.any()]
    return {f"student_{n.split('.')[2]}" if n.startswith("students.") else n.split(".")[0] for n in names}
