"""`python -m odcheap.export JOB_DIR`: a run's student as files for a device, checked and timed."""

import argparse
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from odcheap import card, cost, deploy, evidence, predict, proof, quantise, summary, timings
from odcheap.card import DENSE, STANDARD, File
from odcheap.cli import failed, hush, say
from odcheap.errors import Failure, OptionError
from odcheap.files import write_atomic, write_text
from odcheap.forms import Normalised, cheap_form, dense_form, has_pairs
from odcheap.product import Product, of_run

CALIBRATION = 512  # training pictures that say which values 8 bits must hold


class Wish(NamedTuple):
    """What is asked for: `batch` and `opset` make a static graph; `seconds` are spent on each timing."""

    out: Path
    data_dir: str | None
    int8: bool
    batch: int | None
    opset: int | None
    overwrite: bool
    seconds: float


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser("python -m odcheap.export", description=__doc__)
    parser.add_argument("job_dir", type=Path, metavar="JOB_DIR", help="a run's folder")
    parser.add_argument("--student", type=int, help="student k of the selected epoch (default: the chosen one)")
    parser.add_argument("--out", type=Path, help="the folder to write (default: JOB_DIR/export)")
    parser.add_argument("--data-dir", help="where the run's images lie now, for the checks (default: where they lay)")
    parser.add_argument("--int8", action="store_true", help="8-bit integers too, calibrated on training images")
    parser.add_argument("--batch", type=int, help="a static graph for so many pictures, for a device's compiler")
    parser.add_argument("--opset", type=int, help="ONNX's opset (default: PyTorch's choice)")
    parser.add_argument("--overwrite", action="store_true", help="replace an older export")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each timing (default: %(default)s)")
    given = parser.parse_args(arguments)
    out = given.out or given.job_dir / "export"
    wish = Wish(out, given.data_dir, given.int8, given.batch, given.opset, given.overwrite, given.seconds)
    hush()
    try:
        check(wish)
        export(of_run(given.job_dir, given.student), wish)
    except Failure as error:
        return failed(predict.plain(error))
    return 0


def check(wish: Wish) -> None:
    if wish.batch is not None and wish.batch < 1:
        raise OptionError("--batch", wish.batch, "must be 1 or more")
    if not wish.seconds > 0:
        raise OptionError("--seconds", wish.seconds, "must be above 0")
    if not wish.out.exists():
        return
    is_export = wish.out.is_dir() and (wish.out / predict.PREPROCESS).is_file()
    if not is_export and (not wish.out.is_dir() or any(wish.out.iterdir())):
        raise OptionError("--out", wish.out, "is there and is no export: name another folder")
    if is_export and not wish.overwrite:
        raise OptionError("--out", wish.out, "holds an export; --overwrite replaces it, another --out leaves it")


def export(product: Product, wish: Wish) -> None:
    """Writes the folder, which appears when everything in it has been checked."""
    say(f"{predict.plain(product.job_dir)}: {product.name}")
    data, reason = data_of(product, wish)
    preprocess = preprocessing(product)
    with beside(wish.out) as folder:
        files = write_files(product, wish, data, preprocess, folder)
        batches = predict.BATCHES if wish.batch is None else (wish.batch,)
        found = timed(product, wish, files, folder, batches)
        if any(file.name == DENSE for file in files) and not faster(found, DENSE, batches):
            (folder / DENSE).unlink()
            files = [file for file in files if file.name != DENSE]
            found = {key: time for key, time in found.items() if key.name != DENSE}
        proven = proof.prove(product, data, reason, preprocess, folder, wish.batch)
        cpu = summary.machine(torch.device("cpu"))
        text = card.card(product, folder, files, found, batches, proven, f"{cpu['cpu']}, {os.cpu_count()} cores")
        write_text(folder / predict.CARD, text)
    say(f"{card.first_words(text)}\nwritten: {predict.plain(wish.out)}")


def data_of(product: Product, wish: Wish) -> tuple[pl.LightningDataModule | None, str]:
    """The run's images; None and why, where they are not at hand and nobody said where they are."""
    if wish.data_dir is not None and "data_dir" not in product.config["data"].get("load", {}):
        raise OptionError("--data-dir", wish.data_dir, "the run's images lie in no folder: leave it out")
    try:
        data = evidence.data_of(product.config, wish.data_dir)
        if data.fingerprint != product.settings["split"]:
            raise OptionError("--data-dir", wish.data_dir, "holds other images than the run was trained with")
    except OptionError as error:
        if wish.data_dir is not None or wish.int8:
            raise
        say(f"warning: not verified on data ({predict.plain(error)}); --data-dir says where the images are")
        return None, str(error)
    return data, ""


def preprocessing(product: Product) -> dict[str, Any]:
    settings = product.settings
    return {
        "input": "images: RGB, (n, 3, height, width), float32 in [0, 1]; mean and std are applied inside the graph",
        "shorter_side": settings["shorter_side"],
        "size": settings["image_size"][1:],
        "interpolation": "bilinear",
        "mean": settings["mean"],
        "std": settings["std"],
    }


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place in the end; nothing is left of it where something goes wrong."""
    folder = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise OptionError("--out", out, f"cannot be written ({error.strerror})") from error
    try:
        yield folder
        shutil.rmtree(out, ignore_errors=True)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_files(
    product: Product, wish: Wish, data: pl.LightningDataModule | None, preprocess: dict[str, Any], folder: Path
) -> list[File]:
    """All but the card; the files that ONNX Runtime runs are returned."""
    summary.write_student(folder / "student.safetensors", product.network, product.settings)
    write_text(folder / predict.PREPROCESS, json.dumps(preprocess, indent=2) + "\n")
    write_text(folder / predict.LABELS, json.dumps(product.settings["classes"], indent=1) + "\n")
    shutil.copyfile(predict.__file__, folder / "predict.py")
    cheap = normalised(cheap_form(product.network), product)
    program = deploy.program(cheap, product.image_size, wish.batch)
    contents = {"student.pt2": deploy.to_pt2(program), "student.onnx": deploy.to_onnx(program, wish.opset)}
    forms = {"student.onnx": cheap}
    if has_pairs(product.network):
        forms[DENSE] = dense = normalised(dense_form(product.network), product)
        made = deploy.to_onnx(deploy.program(dense, product.image_size, wish.batch), wish.opset)
        contents[DENSE] = made
    if wish.int8:
        say(f"8-bit integers, calibrated on up to {CALIBRATION} training pictures")
        contents[proof.INT8] = quantise.to_int8(contents["student.onnx"], calibration(data, wish.batch))
        forms[proof.INT8] = cheap
    for name, content in contents.items():
        write_atomic(folder / name, lambda file, content=content: file.write(content))
    size = product.image_size
    return [File(name, cost.params(network), cost.macs(network, size)) for name, network in forms.items()]


def normalised(network: nn.Module, product: Product) -> nn.Module:
    return Normalised(network, product.settings["mean"], product.settings["std"]).eval()


def calibration(data: pl.LightningDataModule, batch: int | None) -> Iterator[np.ndarray]:
    images = (sample.image.numpy() for sample in evidence.samples(data, "train", CALIBRATION))
    while chunk := list(itertools.islice(images, batch or predict.AT_ONCE)):
        if batch is None or len(chunk) == batch:
            yield np.stack(chunk).astype(np.float32) / np.float32(255)


def timed(product: Product, wish: Wish, files: list[File], folder: Path, batches: tuple[int, ...]) -> timings.Found:
    size, standard = product.image_size, normalised(product.standard, product)
    models = {file.name: (folder / file.name).read_bytes() for file in files}
    models[STANDARD] = deploy.to_onnx(deploy.program(standard, size, wish.batch), wish.opset)
    works = timings.in_onnxruntime(models, size, batches)
    works |= timings.in_torch({"the student": normalised(product.network, product), STANDARD: standard}, size, batches)
    say(f"timing {len(works)} ways, {wish.seconds:g} s each, in turns")
    return predict.side_by_side(works, wish.seconds)


def faster(found: timings.Found, name: str, batches: tuple[int, ...]) -> bool:
    """Than the cheap form, for one of the batches."""
    times = ((timings.fastest(found, n, timings.ORT, b).p50 for n in (name, "student.onnx")) for b in batches)
    return any(ours < cheap for ours, cheap in times)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
