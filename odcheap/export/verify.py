"""Whether what was exported computes what was trained: every artefact in its own runtime, from image files."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch

from odcheap import predict
from odcheap.export.evidence import Pictures, of_data, of_noise, watched
from odcheap.export.onnx import DIFFERENT
from odcheap.export.product import Product
from odcheap.utils.console import say
from odcheap.utils.errors import Failure
from odcheap.utils.text import escape_control_chars

INT8 = "student-int8.onnx"
BARE = """
import json, sys
from pathlib import Path
for name in ("pytorch_lightning", "lightning_fabric", "hydra", "omegaconf", "torchmetrics", "onnxruntime", "sklearn"):
    sys.modules[name] = None
import numpy, torch
from odcheap import predict
from odcheap.models.build import load_student
student, preprocess, files, out = sys.argv[1:]
network = load_student(student)
ask = lambda images: network(torch.from_numpy(images)).numpy()
with torch.inference_mode():
    found = predict.predict_files(ask, [Path(f) for f in json.loads(Path(files).read_text())], json.loads(preprocess))
    numpy.save(out, numpy.stack([logits for _, logits in found]))
"""


class Proven(NamedTuple):
    """What the checks have seen: differences of logits and top-1 by file; `reason` says why there was no data."""

    pictures: int
    of_data: bool
    differences: dict[str, float]
    top1: dict[str, float | None]
    reason: str


def prove(
    product: Product,
    data: pl.LightningDataModule | None,
    reason: str,
    preprocess: dict[str, Any],
    folder: Path,
    batch: int | None,
) -> Proven:
    """Holds every artefact in `folder` against the trained network; `Failure` where one computes something else.

    8-bit integers may, and only their accuracy is told.
    """
    differences, top1 = {}, {}
    with tempfile.TemporaryDirectory() as beside:
        if data is None:
            pictures = of_noise(product.settings, product.network, Path(beside))
        else:
            pictures = of_data(data, product.network, Path(beside))
            as_in_summary(product, pictures)
        for path in sorted(path for path in folder.iterdir() if path.suffix in (".onnx", ".pt2", ".safetensors")):
            say(f"checking {path.name} on {len(pictures.files):,} pictures")
            logits = logits_of(path, preprocess, pictures, batch)
            top1[path.name] = pictures.top1(logits)
            if path.name != INT8:
                differences[path.name] = held(path.name, logits, pictures)
    return Proven(len(pictures.files), data is not None, differences, top1, reason)


def as_in_summary(product: Product, pictures: Pictures) -> None:
    """`Failure` where the trained network's accuracy is not the one that the run has measured.

    Pictures whose two best logits lie close may differ: closer than a thousandth where the run evaluated in 32 bits on
    a CPU (others add up in another order); else closer than three hundredths of the logits' range (a GPU's 32 bits are
    rounded to 11, bfloat16 has 8), and in fewer bits half a hundredth of all pictures besides.
    """
    if product.test_top1 is None:
        return
    best = np.sort(pictures.logits, axis=1)
    trainer = product.config.get("trainer") or {}
    in_32 = str(trainer.get("precision")) in ("32", "32-true")
    gap = 1e-3 if in_32 and trainer.get("accelerator") == "cpu" else 0.03 * (best[:, -1] - best[:, 0])
    near = (best[:, -1] - best[:, -2] < gap).mean()
    found, allowed = pictures.top1(pictures.logits), near + (0 if in_32 else 0.005) + 1e-6
    if abs(found - product.test_top1) > allowed:
        line = f"the network's test accuracy is {found:.4f} here, {product.test_top1:.4f} in the run's summary"
        raise Failure(f"{line}: other images than the run's, or other weights")


def logits_of(path: Path, preprocess: dict[str, Any], pictures: Pictures, batch: int | None) -> np.ndarray:
    if path.suffix == ".safetensors":
        return bare_logits(path, preprocess, pictures)
    if path.suffix == ".pt2":
        return pt2_logits(path, preprocess, pictures, batch)
    return onnx_logits(path, preprocess, pictures)


def onnx_logits(path: Path, preprocess: dict[str, Any], pictures: Pictures) -> np.ndarray:
    try:
        return gathered(
            predict.create_predictor(predict.create_session(path.read_bytes())), preprocess, pictures, path.name
        )
    except predict.PredictError as error:
        raise Failure(f"{path.name}: {error}") from error


def pt2_logits(path: Path, preprocess: dict[str, Any], pictures: Pictures, fixed: int | None) -> np.ndarray:
    graph = torch.export.load(path).module()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return graph(torch.from_numpy(images)).numpy()

    return gathered(predict.pad_batches(run, fixed), preprocess, pictures, path.name)


def gathered(
    ask: Callable[[np.ndarray], np.ndarray], preprocess: dict[str, Any], pictures: Pictures, name: str
) -> np.ndarray:
    found = predict.predict_files(ask, pictures.files, preprocess)
    return np.stack([logits for _, logits in watched(found, len(pictures.files), name)])


def bare_logits(path: Path, preprocess: dict[str, Any], pictures: Pictures) -> np.ndarray:
    """In a new process, in which Lightning, Hydra and ONNX Runtime cannot be imported."""
    root = str(Path(__file__).parents[2])
    search = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        files, out = Path(folder) / "files.json", Path(folder) / "logits.npy"
        files.write_text(json.dumps([str(file.resolve()) for file in pictures.files]))
        command = [sys.executable, "-c", BARE, str(path.resolve()), json.dumps(preprocess), str(files), str(out)]
        done = subprocess.run(
            command, cwd=folder, env=os.environ | {"PYTHONPATH": search}, capture_output=True, text=True
        )
        if done.returncode:
            last = (done.stderr.strip() or "no message").split("\n")[-1]
            raise Failure(f"{path.name}: a bare process cannot load or run it ({last})")
        return np.load(out)


def held(name: str, logits: np.ndarray, pictures: Pictures) -> float:
    """The largest difference; `Failure` where one is too large.

    Where none is, another class can come first only on pictures whose two best logits are as good as equal.
    """
    apart = np.abs(logits - pictures.logits)
    if not (apart <= DIFFERENT + 1e-5 * np.abs(pictures.logits)).all():
        worst = np.unravel_index(np.nan_to_num(apart, nan=np.inf).argmax(), apart.shape)
        where = escape_control_chars(pictures.files[worst[0]])
        raise Failure(f"{name}: a logit differs from the trained network's by {apart[worst]:.2g} on {where}")
    return float(apart.max())
