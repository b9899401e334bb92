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


def dkd(z, t, temperature, alpha=1.0, beta=8.0):
    """T^2 (alpha TCKD + beta NCKD), image by image."""
    total = 0.0
    for n, label in enumerate(TARGET):
        p, q = softmax(t[n], temperature), softmax(z[n], temperature)
        others = [j for j in range(CLASSES) if j != label]
        pairs = np.array([[p[label], 1 - p[label]], [q[label], 1 - q[label]]])
        rest_p, rest_q = p[others] / p[others].sum(), q[others] / q[others].sum()
        total += alpha * kl(pairs[:1], pairs[1:]) + beta * kl(rest_p[None], rest_q[None])
    return temperature**2 * total / IMAGES


def dist(z, t, temperature, beta=1.0, gamma=1.0):
    """beta (1 - correlation over the classes) + gamma (1 - correlation over the images), each averaged; without T^2."""
    p, q = softmax(t, temperature), softmax(z, temperature)
    inter = np.mean([1 - np.corrcoef(p[n], q[n])[0, 1] for n in range(IMAGES)])
    intra = np.mean([1 - np.corrcoef(p[:, j], q[:, j])[0, 1] for j in range(CLASSES)])
    return beta * inter + gamma * intra


def standardized(z, t, temperature):
    z, t = ((x - x.mean(1, keepdims=True)) / (x.std(1, keepdims=True) + 1e-7) for x in (z, t))
    return soft(z, t, temperature)


DISTANCES = {"kl": soft, "dkd": dkd, "dist": dist, "standardized": standardized}


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


class Patches(torch.nn.Module):
    """A network without feature maps at the ends of stages: a convolution to patches, then a linear layer."""

    def __init__(self):
        super().__init__()
        self.patches, self.fc = torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.fc(self.patches(x).flatten(2).mean(2))
