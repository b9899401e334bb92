"""`python -m odcheap.export JOB_DIR`: a run's student as files for a device, checked and timed."""

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from odcheap import predict
from odcheap.config.messages import hide_library_warnings
from odcheap.export import evidence, latency, model_card, onnx, quantize, verify
from odcheap.export.model_card import DENSE, STANDARD, File
from odcheap.export.product import Product, of_run
from odcheap.layers.fuse import cheap_form, dense_form, has_pairs
from odcheap.models import flops
from odcheap.models.build import NormalizedNetwork
from odcheap.training import summary
from odcheap.utils.console import print_error, say
from odcheap.utils.errors import Failure, OptionError, describe_external_failure
from odcheap.utils.files import write_atomic, write_text

INT8_OPSET = 13  # the first that has scales for channels
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
    out = Path(os.path.realpath(given.out or given.job_dir / "export"))
    wish = Wish(out, given.data_dir, given.int8, given.batch, given.opset, given.overwrite, given.seconds)
    hide_library_warnings()
    try:
        check(wish)
        export(of_run(given.job_dir, given.student), wish)
    except (Failure, predict.PredictError) as error:
        return print_error(str(error))
    except KeyboardInterrupt:
        print_error("interrupted: nothing was written")
        return 130
    except (OSError, MemoryError, RuntimeError) as error:
        line = describe_external_failure(error)
        if line is None and not isinstance(error, OSError):
            raise
        return print_error(line or str(error))
    return 0


def check(wish: Wish) -> None:
    if wish.batch is not None and wish.batch < 1:
        raise OptionError("--batch", wish.batch, "must be 1 or more")
    if wish.int8 and (wish.batch or 1) > CALIBRATION:
        raise OptionError("--batch", wish.batch, f"must be at most {CALIBRATION} with --int8, the pictures it looks at")
    if wish.int8 and wish.opset is not None and wish.opset < INT8_OPSET:
        raise OptionError("--opset", wish.opset, f"must be {INT8_OPSET} or more with --int8")
    if not wish.seconds > 0:
        raise OptionError("--seconds", wish.seconds, "must be above 0")
    if wish.out.is_mount():
        raise OptionError("--out", wish.out, "is a mount point, which cannot be replaced: name a folder in it")
    if not wish.out.exists() or (wish.out.is_dir() and not any(wish.out.iterdir())):
        return
    own = exported(wish.out)
    others = sorted({path.name for path in wish.out.iterdir()} - own) if wish.out.is_dir() else []
    if not own or others:
        which = f" ({others[0]} is none of an export's files)" if own else ""
        raise OptionError("--out", wish.out, f"is there and is no export{which}: name another folder")
    if not wish.overwrite:
        raise OptionError("--out", wish.out, "holds an export; --overwrite replaces it, another --out leaves it")


def exported(folder: Path) -> set[str]:
    """The names that the card in this folder lists, its own among them; none where there is no card."""
    path = folder / predict.CARD_FILE
    text = path.read_text(errors="replace") if path.is_file() else ""
    names = {found[2] for found in predict.CHECKSUM_LINE.finditer(text)}
    return names | {predict.CARD_FILE} if predict.PREPROCESS_FILE in names else set()


def export(product: Product, wish: Wish) -> None:
    """Writes the folder, which appears when everything in it has been checked."""
    say(f"{product.job_dir}: {product.name}")
    data, reason = data_of(product, wish)
    preprocess = preprocessing(product)
    with beside(wish.out) as folder:
        files = write_files(product, wish, data, preprocess, folder)
        batches = predict.TIMED_BATCH_SIZES if wish.batch is None else (wish.batch,)
        found = timed(product, wish, files, folder, batches)
        if any(file.name == DENSE for file in files) and not faster(found, DENSE, batches):
            (folder / DENSE).unlink()
            files = [file for file in files if file.name != DENSE]
            found = {key: time for key, time in found.items() if key.name != DENSE}
        proven = verify.prove(product, data, reason, preprocess, folder, wish.batch)
        cpu = summary.describe_machine(torch.device("cpu"))
        machine = f"{cpu['cpu']}, {os.cpu_count()} cores"
        text = model_card.card(
            product, folder, files, found, batches, proven, machine, shape_of(folder / "student.onnx")
        )
        write_text(folder / predict.CARD_FILE, text)
    for line in [*model_card.first_words(text).split("\n"), f"written: {wish.out}"]:
        say(line)


def data_of(product: Product, wish: Wish) -> tuple[pl.LightningDataModule | None, str]:
    """The run's images; None and why, where they are not at hand and nobody said where they are."""
    if wish.data_dir is not None and "data_dir" not in product.config["data"].get("load", {}):
        raise OptionError("--data-dir", wish.data_dir, "the run's images lie in no folder: leave it out")
    try:
        data = evidence.data_of(product.config, wish.data_dir)
        if data.fingerprint != product.settings["split"]:
            where = wish.data_dir or product.config["data"]["load"].get("data_dir")
            raise OptionError("data_dir", where, "holds other images than the run was trained with")
    except OptionError as error:
        if wish.data_dir is not None or wish.int8:
            raise
        say(f"warning: not verified on data ({error}); --data-dir says where the run's images are")
        return None, str(error)
    return data, ""


def preprocessing(product: Product) -> dict[str, Any]:
    settings = product.settings
    return {
        "input": "images: RGB, float32 in [0, 1], channels first; mean and std are applied inside the graph",
        "shorter_side": settings["shorter_side"],
        "size": settings["image_size"][1:],
        "interpolation": "bilinear",
        "mean": settings["mean"],
        "std": settings["std"],
    }


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place in the end; nothing is left of it where something goes wrong."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(".part", f".{out.name}.", out.parent))
    except OSError as error:
        raise OptionError("--out", out, f"cannot be written ({error.strerror})") from error
    try:
        yield folder
        folder.chmod(0o755)  # not for our eyes only, as temporary folders are
        take_place(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def take_place(folder: Path, out: Path) -> None:
    """The older export goes when the new one is there, and comes back where that fails."""
    older = folder.with_suffix(".old")
    if out.exists():
        out.rename(older)
    try:
        folder.rename(out)
    except OSError:
        if older.exists():
            older.rename(out)
        raise
    shutil.rmtree(older, ignore_errors=True)


def write_files(
    product: Product, wish: Wish, data: pl.LightningDataModule | None, preprocess: dict[str, Any], folder: Path
) -> list[File]:
    """All but the card; the files that ONNX Runtime runs are returned."""
    summary.write_student(folder / "student.safetensors", product.network, product.settings)
    write_text(folder / predict.PREPROCESS_FILE, json.dumps(preprocess, indent=2) + "\n")
    write_text(folder / predict.LABELS_FILE, json.dumps(product.settings["classes"], indent=1) + "\n")
    shutil.copyfile(predict.__file__, folder / "predict.py")
    cheap = normalised(cheap_form(product.network), product)
    program = onnx.program(cheap, product.image_size, wish.batch)
    contents = {"student.pt2": onnx.to_pt2(program), "student.onnx": onnx.to_onnx(program, wish.opset)}
    forms = {"student.onnx": cheap}
    if has_pairs(product.network):
        forms[DENSE] = dense = normalised(dense_form(product.network), product)
        made = onnx.to_onnx(onnx.program(dense, product.image_size, wish.batch), wish.opset)
        contents[DENSE] = made
    if wish.int8:
        say(f"8-bit integers, calibrated on up to {CALIBRATION} training pictures")
        contents[verify.INT8] = quantize.to_int8(contents["student.onnx"], calibration(data, wish.batch))
        forms[verify.INT8] = cheap
    for name, content in contents.items():
        write_atomic(folder / name, lambda file, content=content: file.write(content))
    size = product.image_size
    return [File(name, flops.count_params(network), flops.count_macs(network, size)) for name, network in forms.items()]


def normalised(network: nn.Module, product: Product) -> nn.Module:
    return NormalizedNetwork(network, product.settings["mean"], product.settings["std"]).eval()


def calibration(data: pl.LightningDataModule, batch: int | None) -> Iterator[np.ndarray]:
    images = (sample.image.numpy() for sample in evidence.samples(data, "train", CALIBRATION))
    while chunk := list(itertools.islice(images, batch or predict.BATCH_SIZE)):
        if batch is None or len(chunk) == batch:
            yield np.stack(chunk).astype(np.float32) / np.float32(255)


def timed(product: Product, wish: Wish, files: list[File], folder: Path, batches: tuple[int, ...]) -> latency.Timings:
    size, standard = product.image_size, normalised(product.standard, product)
    models = {file.name: (folder / file.name).read_bytes() for file in files}
    models[STANDARD] = onnx.to_onnx(onnx.program(standard, size, wish.batch), wish.opset)
    works = latency.onnx_calls(models, size, batches)
    works |= latency.torch_calls(
        {"the student": normalised(product.network, product), STANDARD: standard}, size, batches
    )
    say(f"timing {len(works)} ways, {wish.seconds:g} s each, in turns")
    return predict.time_alternately(works, wish.seconds)


def shape_of(path: Path) -> str:
    """What the file takes: `(n, 3, height, width)`, with numbers where they are fixed."""
    (images,) = predict.create_session(path.read_bytes()).get_inputs()
    return f"({', '.join(map(str, images.shape))})"


def faster(found: latency.Timings, name: str, batches: tuple[int, ...]) -> bool:
    """Than the cheap form, for one of the batches."""
    times = ((latency.fastest(found, n, latency.ONNX_RUNTIME, b).p50 for n in (name, "student.onnx")) for b in batches)
    return any(ours < cheap for ours, cheap in times)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
