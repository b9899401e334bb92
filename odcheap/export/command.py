"""Writes a run's student as files for a device, and checks them; `arguments` has the help of the command."""

import argparse
import errno
import fcntl
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from odcheap import predict
from odcheap.config.messages import hide_library_warnings
from odcheap.data.base import ImageData, LabeledImage
from odcheap.distributed.signals import SignalListener, Stopped
from odcheap.export import executorch, latency, model_card, onnx, openvino, qat, quantize, speedup, verify
from odcheap.export.arguments import parse_arguments
from odcheap.export.executorch import PTE, PTE_INT8
from odcheap.export.load_run import RunStudent, describe_preprocessing, load_run_student
from odcheap.export.model_card import DENSE, STANDARD, STUDENT
from odcheap.export.quantize import count_epochs
from odcheap.export.results import RESULTS_FILE, describe_results
from odcheap.export.snippets import PROGRAM, STUDENT_FILE
from odcheap.layers.fuse import cheap_form, dense_form, has_pairs
from odcheap.models.build import NormalizedNetwork
from odcheap.runs.folder import TEMPORARY
from odcheap.training import summary
from odcheap.utils.console import keep_going_without_output, print_error, say, show_progress
from odcheap.utils.errors import Failure, OptionError, describe_external_failure
from odcheap.utils.files import write_atomic, write_json, write_text
from odcheap.utils.text import format_accuracy, hide_folders

OLDEST_INT8_OPSET = 13  # the first with a scale for each channel
MAX_CARD = 1 << 20  # characters of a model card that are read
CALIBRATION_IMAGES = 512  # training images that determine the ranges of 8-bit feature maps
MAX_LOST_TOP1 = 0.005  # by 8-bit integers; if they lose more, a line names the fine-tuning
TEMPORARY_NAME = re.compile(r"\.[a-z0-9_]{8}\.part", re.ASCII)  # after the dot and the name of the folder to write

FILES = ("student.onnx", DENSE, verify.INT8, PTE, PTE_INT8, PROGRAM, STUDENT_FILE, "predict.py")
FILES += (predict.PREPROCESS_FILE, predict.LABELS_FILE, RESULTS_FILE, predict.CARD_FILE)

Versions = dict[str, tuple[int, int]]  # see `read_versions`


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: The command-line arguments; None for those of this process.

    Returns:
        The exit status: 0, 1 after an error, or 128 + the number of a signal.
    """
    options = parse_arguments(arguments)
    hide_library_warnings()
    try:
        with keep_going_without_output(), SignalListener():
            options.out = resolve_out(options.job_dir, options.out)
            older = check_options(options)
            export(load_run_student(options.job_dir, options.student, options.config_dir), options, older)
    except (Failure, predict.PredictError) as error:
        return print_error(str(error))
    except Stopped as stop:
        print_error(f"{stop.name}: interrupted, nothing was written")
        return 128 + stop.signum
    except (OSError, MemoryError, RuntimeError) as error:
        line = describe_external_failure(error)
        if line is None and not isinstance(error, OSError):
            raise
        return print_error(line or str(error))
    return 0


def resolve_out(job_dir: Path, out: Path | None) -> Path:
    """Returns the folder to write. A link that the user names is followed; one in the run's folder is refused.

    Links are resolved here, because the folder is renamed at the end and a link would be replaced by it.

    Args:
        job_dir: The run's folder.
        out: The folder that the user has given; None for `export` in the run's folder.

    Raises:
        OptionError: `export` in the run's folder is a link.
    """
    default = job_dir / "export"
    if out is None and default.is_symlink():
        raise OptionError("--out", default, "is a link to elsewhere: name the folder to write with --out")
    return Path(os.path.realpath(out or default))


def check_options(options: argparse.Namespace) -> Versions | None:
    """Checks the values of the options, and that the folder may be written.

    Args:
        options: The options of the command, of which `batch`, `opset`, `int8`, `qat`, `executorch`, `openvino`,
            `seconds`, `out` and `overwrite` are read.

    Returns:
        The files of the older export that will be replaced; None if there is none.

    Raises:
        OptionError: A value is not allowed, or the folder must not be replaced.
        Failure: An option needs a package that is not installed.
    """
    batch, opset, out = options.batch, options.opset, options.out

    # Values.
    if batch is not None and batch < 1:
        raise OptionError("--batch", batch, "must be 1 or more")
    calibrated = "--int8" if options.int8 else "--executorch" if options.executorch else ""
    if calibrated and (batch or 1) > CALIBRATION_IMAGES:
        allowed = f"must be at most {CALIBRATION_IMAGES} with {calibrated}, which calibrates on that many images"
        raise OptionError("--batch", batch, allowed)
    if options.int8 and opset is not None and opset < OLDEST_INT8_OPSET:
        raise OptionError("--opset", opset, f"must be {OLDEST_INT8_OPSET} or more with --int8")
    if options.qat < 0:
        raise OptionError("--qat", options.qat, "must be 1 or more epochs")
    if options.qat and not options.int8:
        raise OptionError("--qat", options.qat, "needs --int8")
    if not options.seconds > 0:
        raise OptionError("--seconds", options.seconds, "must be above 0")
    if options.executorch:
        executorch.check_installed()
    if options.openvino:
        openvino.check_installed()

    # The folder: only an export is ever replaced, and only if nobody has put other files into it.
    if out.is_mount():
        raise OptionError("--out", out, "is a mount point, which cannot be replaced: name a folder in it")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    versions = read_versions(out)  # read first, so that a later change is noticed
    exported = list_exported(out)
    others = sorted(path.name for path in out.iterdir() if not is_exported(path, exported)) if out.is_dir() else []
    if not exported or others:
        which = f" ({others[0]} is not a file of an export)" if exported else ""
        raise OptionError("--out", out, f"exists and is not an export{which}: name another folder")
    if not options.overwrite:
        raise OptionError("--out", out, "holds an export; --overwrite replaces it, another --out leaves it")
    return versions


def read_versions(folder: Path) -> Versions:
    """Returns, for each name in a folder, its inode and modification time, which change if it is written again."""
    entries = {path.name: path.lstat() for path in folder.iterdir()} if folder.is_dir() else {}
    return {name: (entry.st_ino, entry.st_mtime_ns) for name, entry in entries.items()}


def is_exported(path: Path, names: set[str]) -> bool:
    """Returns whether a path is a regular file with one of these names, and not a folder or a link."""
    return path.name in names and path.is_file() and not path.is_symlink()


def list_exported(folder: Path) -> set[str]:
    """Returns the names of the files that a folder's model card lists, and that of the card; empty without a card."""
    path = folder / predict.CARD_FILE
    text = ""
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read(MAX_CARD)
    names = {match[2] for match in predict.CHECKSUM_LINE.finditer(text)}
    return names | {predict.CARD_FILE} if predict.PREPROCESS_FILE in names else set()


def export(run: RunStudent, options: argparse.Namespace, older: Versions | None) -> None:
    """Exports the student of a run, with the run's own images.

    Args:
        run: The student.
        options: The options of the command.
        older: The files of an older export that is replaced; see `check_options`.
    """
    say(f"{run.job_dir}: {run.title}")
    write_export(run, options, older, *load_test_data(run, options))


def write_export(
    run: RunStudent,
    options: argparse.Namespace,
    older: Versions | None,
    data: verify.LabeledImages | None,
    reason: str,
) -> None:
    """Writes the folder of an export, which is made only after all files have been checked.

    Args:
        run: The student.
        options: The options of the command.
        older: The files of an older export that is replaced; see `check_options`.
        data: The data set with test images, and with training images for 8-bit integers; None if it is not available.
        reason: Why it is not available.
    """
    preprocess = describe_preprocessing(run.settings)
    with replace_folder(options.out, older) as folder:
        # The dense form stays only if it is faster here.
        files = write_files(run, options, data, preprocess, folder)
        timings = time_files(run, options, files, folder)
        if DENSE in files and not is_faster(timings, DENSE):
            (folder / DENSE).unlink()
            del files[DENSE]
            timings = {key: timing for key, timing in timings.items() if key.name != DENSE}
        verification = verify.verify_files(run, data, reason, preprocess, folder, options.batch, options.openvino)
        cpu = f"{summary.describe_machine(torch.device('cpu'))['cpu']}, {os.cpu_count()} cores"
        graph = describe_graph(folder / "student.onnx")
        write_json(folder / RESULTS_FILE, describe_results(run, verification))
        text = model_card.write_card(run, folder, files, timings, verification, cpu, graph)
        write_text(folder / predict.CARD_FILE, text)
    for line in [*model_card.extract_opening(text).split("\n"), f"written: {options.out}"]:
        say(line)
    if not options.qat and (advice := advise_fine_tuning(run, verification)):
        say(advice)


def advise_fine_tuning(run: RunStudent, verification: verify.Verification) -> str | None:
    """Returns the advice to fine-tune the network with the rounding of 8-bit integers, if its accuracy makes it useful.

    Args:
        run: The student that is exported.
        verification: The accuracies of the exported files, as the checks have measured them.

    Returns:
        A line for the user with the option that does it, if the network in 8-bit integers is less accurate than in
        floats by more than half a point; otherwise None.
    """
    floats, integers = (verification.top1.get(name) for name in ("student.onnx", verify.INT8))
    if floats is None or integers is None or floats - integers <= MAX_LOST_TOP1:
        return None
    option, points = "--qat" if run.job_dir else "qat=3", format_accuracy(floats - integers)
    return f"8-bit integers lose {points} percentage points: {option} fine-tunes the network with their rounding"


def load_test_data(run: RunStudent, options: argparse.Namespace) -> tuple[ImageData | None, str]:
    """Loads the data set on which a run was trained, to check the exported files on its test images.

    Args:
        run: The student that is exported.
        options: The options of the command, of which `data_dir` and `int8` are used.

    Returns:
        The data set and an empty text; or, if it is not available and no option needs it, None and the reason.

    Raises:
        OptionError: `data_dir` was given, but is not a folder with the images of the run.
        Failure: The data set is not available, but `int8` needs it.
    """
    data_dir, load = options.data_dir, run.config["data"].get("load") or {}
    if data_dir is not None and "data_dir" not in load:
        raise OptionError("--data-dir", data_dir, "must not be given: the run's images are not read from a folder")
    try:
        data = verify.load_data(run.config, data_dir, run.config_dirs)
        if data.fingerprint != run.settings["split"]:
            where = data_dir or load.get("data_dir")
            raise OptionError("data_dir", where, "holds other images than the run was trained with")
    except OptionError as error:
        if data_dir is not None:
            raise
        if options.int8:
            raise Failure(f"--int8: needs the run's images ({error}); --data-dir says where they are") from error
        say(f"warning: not verified on data ({error}); --data-dir says where the run's images are")
        known = [Path.home(), load.get("data_dir") or "", run.job_dir or "", *run.config_dirs]
        reason = str(error).replace(f"data_dir={load.get('data_dir')}:", "data_dir:", 1)  # the card names no folder
        return None, hide_folders(reason, known)
    return data, ""


@contextmanager
def replace_folder(out: Path, older: Versions | None = None) -> Generator[Path]:
    """Yields a temporary folder. At the end it takes the place of `out`; after an error nothing of it is left.

    Args:
        out: The folder to write.
        older: The files of an older export in `out`, which are removed; None if `out` does not exist or is empty.

    Raises:
        OptionError: The folder cannot be written, or another process has written there meanwhile; those files are kept.
    """
    changed = OptionError("--out", out, "another process has written here meanwhile, which is kept")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_partial_exports(out)
        folder = Path(tempfile.mkdtemp(".part", f".{out.name}.", out.parent))
    except OSError as error:
        raise OptionError("--out", out, f"cannot be written ({error.strerror})") from error
    aside = folder.with_suffix(".old")
    lock = os.open(folder, os.O_RDONLY)  # it is free when this process has ended, however it has ended
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
        folder.chmod(0o755)  # temporary folders are readable by their owner only
        if older is not None:
            out.rename(aside)
            if read_versions(aside) != older:
                raise changed
        try:
            folder.rename(out)  # replaces an empty folder, and nothing else
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise changed from error
            raise
        for name in older or ():
            (aside / name).unlink(missing_ok=True)
        if aside.exists():
            aside.rmdir()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if aside.exists() and not out.exists():
            aside.rename(out)
        os.close(lock)


def remove_partial_exports(out: Path) -> None:
    """Removes the temporary folders of exports to `out` that were killed; a folder that a process has locked stays.

    A folder with other files than those of an export belongs to somebody else, and stays too.
    """
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*.part"):
        if not TEMPORARY_NAME.fullmatch(folder.name.removeprefix(f".{out.name}")):
            continue
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # a file, a link, or another user's folder
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if all(is_partial_file(path) for path in folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # an export that runs, or a file system without locks
            pass
        finally:
            os.close(lock)


def is_partial_file(path: Path) -> bool:
    """Returns whether an export may have written the file, perhaps not to its end."""
    match = TEMPORARY.fullmatch(path.name)
    return path.is_file() and not path.is_symlink() and (match["name"] if match else path.name) in FILES


def write_files(
    run: RunStudent,
    options: argparse.Namespace,
    data: verify.LabeledImages | None,
    preprocess: dict[str, Any],
    folder: Path,
) -> dict[str, nn.Module]:
    """Writes all files except the model card, and returns the networks in those files that are timed, by their names.

    Args:
        run: The student.
        options: The options of the command.
        data: The data set with training images for 8-bit integers; None if it is not available.
        preprocess: The content of `preprocess.json`.
        folder: The folder to write.
    """
    if run.has_settings:
        summary.write_student(folder / STUDENT_FILE, run.network, run.settings)
    write_json(folder / predict.PREPROCESS_FILE, preprocess)
    write_json(folder / predict.LABELS_FILE, run.settings["classes"])
    shutil.copyfile(predict.__file__, folder / "predict.py")
    cheap = add_normalization(cheap_form(run.network), run)
    program = onnx.export_program(cheap, run.image_size, options.batch)
    contents = {"student.onnx": onnx.to_onnx(program, options.opset)}
    if options.pt2:
        contents[PROGRAM] = onnx.to_pt2(program)
    forms = {"student.onnx": cheap}
    if has_pairs(run.network):
        forms[DENSE] = dense = add_normalization(dense_form(run.network), run)
        contents[DENSE] = onnx.to_onnx(onnx.export_program(dense, run.image_size, options.batch), options.opset)
    if options.int8 and data is not None:
        say(f"8-bit integers, calibrated on up to {CALIBRATION_IMAGES} training images")
        contents[verify.INT8] = quantize_student(contents["student.onnx"], run, options, data)
        forms[verify.INT8] = cheap
    if options.executorch:
        programs = convert_to_executorch(program, run, options, data)
        contents |= programs
        forms |= dict.fromkeys(programs, cheap)
    for name, content in contents.items():
        write_atomic(folder / name, lambda file, content=content: file.write(content))
    return forms


def quantize_student(content: bytes, run: RunStudent, options: argparse.Namespace, data: verify.LabeledImages) -> bytes:
    """Returns the content of the ONNX file with 8-bit integers, in the form that ONNX Runtime runs faster here.

    With `--openvino` it is the QDQ form, since OpenVINO cannot run the other one.

    Args:
        content: The content of `student.onnx`.
        run: The student.
        options: The options of the command.
        data: The data set with training images.
    """
    batches = list(iterate_calibration_batches(data, options.batch))
    prepared = quantize.prepare_model(content)
    scales: dict[str, qat.Scale] = {}
    if options.qat:
        prepared, scales = fine_tune_student(prepared, batches, options, data)
    forms = [quantize.QDQ] if options.openvino else list(quantize.FORMATS)
    contents = {form: quantize.quantize_model(prepared, batches, form, scales) for form in forms}
    form = forms[0]
    if len(forms) > 1:
        form = quantize.choose_form(contents, run.image_size, timed_batches(options), options.seconds)
    return quantize.write_epochs(contents[form], options.qat) if scales else contents[form]


def fine_tune_student(
    prepared: bytes, batches: Sequence[np.ndarray], options: argparse.Namespace, data: verify.LabeledImages
) -> tuple[bytes, dict[str, qat.Scale]]:
    """Fine-tunes a network with the rounding of 8-bit integers, and keeps the result if it is not worse.

    The accuracies on the held-out images are compared; if there are none, the result is kept.

    Args:
        prepared: The content of the ONNX file with floats, from `quantize.prepare_model`.
        batches: Batches of images for the calibration.
        options: The options of the command.
        data: The data set.

    Returns:
        The content of the ONNX file with floats to quantize, and the learned scales of its feature maps; those given
        and an empty dict if the fine-tuning did not help.
    """
    calibrated = quantize.quantize_model(prepared, batches, quantize.QDQ)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = qat.RoundedNetwork(prepared, calibrated, device)
    count = len(data.labels["train"])
    size = min(qat.BATCH_SIZE, count)
    say(f"fine-tuning with the rounding of 8-bit integers, {count_epochs(options.qat)} of {count:,} training images")
    epochs = (iterate_training_batches(data, epoch, size) for epoch in range(options.qat))
    teacher = predict.create_predictor(predict.create_session(prepared))
    tuned, scales = qat.fine_tune(network, teacher, epochs, options.qat * (count // size))
    if not len(data.labels.get("val", ())):
        return tuned, scales
    files = {"calibrated": calibrated, "fine-tuned": quantize.quantize_model(tuned, batches, quantize.QDQ, scales)}
    top1 = {name: measure_held_out_top1(content, data) for name, content in {"floats": prepared, **files}.items()}
    figures = ", ".join(f"{format_accuracy(value)} % {name}" for name, value in top1.items())
    is_better = top1["fine-tuned"] >= top1["calibrated"]
    say(f"on the held-out images: {figures}; {'the fine-tuned' if is_better else 'the calibrated'} integers are kept")
    return (tuned, scales) if is_better else (prepared, {})


def iterate_training_batches(data: verify.LabeledImages, epoch: int, size: int) -> Iterator[np.ndarray]:
    """Yields batches of training images (n, C, H, W), float32 in [0, 1], in an order that depends on the epoch.

    Args:
        data: The data set.
        epoch: The number of the epoch, from 0.
        size: The number of images in a batch; images that do not fill the last batch are left out.
    """
    count = len(data.labels["train"])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch)).tolist()
    images = show_progress(data.iterate_images("train", order), count, f"epoch {epoch + 1}")
    for chunk in verify.split_batches(images, size):
        if len(chunk) == size:
            yield stack_images(chunk)


def measure_held_out_top1(content: bytes, data: verify.LabeledImages) -> float:
    """Returns the accuracy of an ONNX file on the held-out images."""
    predictor, correct, count = predict.create_predictor(predict.create_session(content)), 0, 0
    for chunk in verify.split_batches(verify.iterate_samples(data, "val"), verify.BATCH_SIZE):
        predicted = predictor(stack_images(chunk)).argmax(1)
        correct += int((predicted == [sample.label for sample in chunk]).sum())
        count += len(chunk)
    return correct / max(count, 1)


def stack_images(samples: Sequence[LabeledImage]) -> np.ndarray:
    """Returns the images of samples as a batch (n, C, H, W), float32 in [0, 1]."""
    return np.stack([sample.image.numpy() for sample in samples]).astype(np.float32) / np.float32(255)


def convert_to_executorch(
    program: onnx.Program, run: RunStudent, options: argparse.Namespace, data: verify.LabeledImages | None
) -> dict[str, bytes]:
    """Returns the contents of the files for ExecuTorch: with floats, and with 8-bit integers if there are images.

    Args:
        program: The traced student.
        run: The student.
        options: The options of the command.
        data: The data set with training images for 8-bit integers; None if it is not available.

    Returns:
        The contents by the names of the files, `student.pte` and `student-int8.pte`.
    """
    say(f"{PTE}, for ExecuTorch")
    files = {PTE: executorch.to_pte(program, run.image_size, options.batch)}
    if data is not None and len(data.labels["train"]):
        say(f"{PTE_INT8}, calibrated on up to {CALIBRATION_IMAGES} training images")
        batches = iterate_calibration_batches(data, options.batch)
        files[PTE_INT8] = executorch.to_int8_pte(program, run.image_size, batches, options.batch)
    else:
        say(f"{PTE_INT8} is not written: there are no training images for its calibration")
    for name, file in files.items():
        if file.portable:
            say(f"warning: XNNPACK does not run these operators of {name}, which are slow: {', '.join(file.portable)}")
    return {name: file.content for name, file in files.items()}


def timed_batches(options: argparse.Namespace) -> tuple[int, ...]:
    """Returns the numbers of images in a call that are timed."""
    return predict.TIMED_BATCH_SIZES if options.batch is None else (options.batch,)


def add_normalization(network: nn.Module, run: RunStudent) -> nn.Module:
    """Returns a network, in eval mode, that normalizes images in [0, 1] as `run` does, then calls the given network."""
    return NormalizedNetwork(network, run.settings["mean"], run.settings["std"]).eval()


def iterate_calibration_batches(data: verify.LabeledImages, batch: int | None) -> Iterator[np.ndarray]:
    """Yields batches of training images (n, C, H, W), float32 in [0, 1].

    If `batch` is given, for a static graph, all batches have this number of images.
    """
    samples = verify.iterate_samples(data, "train", CALIBRATION_IMAGES)
    for chunk in verify.split_batches(samples, batch or predict.BATCH_SIZE):
        if batch is None or len(chunk) == batch:
            yield stack_images(chunk)


def time_files(run: RunStudent, options: argparse.Namespace, files: Iterable[str], folder: Path) -> latency.Timings:
    """Times alternately: the files in their runtimes, the standard network in the same, and both networks in PyTorch.

    With `--openvino` the ONNX files are also timed in OpenVINO.

    Args:
        run: The student, with its standard network.
        options: The options of the command.
        files: The names of the files.
        folder: The folder of these files.
    """
    size, standard, batches = run.image_size, add_normalization(run.standard, run), timed_batches(options)
    contents = {name: (folder / name).read_bytes() for name in files}
    programs = {name: content for name, content in contents.items() if name.endswith(".pte")}
    models = {name: content for name, content in contents.items() if name not in programs}
    traced = onnx.export_program(standard, size, options.batch)
    models[STANDARD] = onnx.to_onnx(traced, options.opset)
    if programs:
        say("the standard network, for ExecuTorch")
        programs[STANDARD] = executorch.to_pte(traced, size, options.batch).content
    networks = {STUDENT: add_normalization(run.network, run), STANDARD: standard}
    calls = latency.onnx_calls(models, size, batches) | latency.torch_calls(networks, size, batches)
    calls |= latency.executorch_calls(programs, size, options.batch)
    if options.openvino:
        calls |= openvino.openvino_calls(models, size, batches)
    say(f"{len(calls)} timings of {options.seconds:g} s each")
    return predict.time_alternately(calls, options.seconds)


def is_faster(timings: latency.Timings, name: str) -> bool:
    """Returns whether an ONNX file is faster than `student.onnx` for at least one number of images in a call.

    Args:
        timings: The times of the files and of the standard network.
        name: The name of the file.
    """
    own, cheap = (
        speedup.compute_speedups(timings, file, STANDARD, latency.ONNX_RUNTIME) for file in (name, "student.onnx")
    )
    return any(own[batch].value > cheap[batch].value for batch in own)


def describe_graph(path: Path) -> str:
    """Describes an ONNX file's input and operators: `(n, 3, height, width), any number of images; ONNX opset 18`."""
    (images,) = predict.create_session(path.read_bytes()).get_inputs()
    shape, batch = ", ".join(map(str, images.shape)), images.shape[0]
    count = (
        f"a static graph for exactly {model_card.count_images(batch)}"
        if isinstance(batch, int)
        else "any number of images"
    )
    return f"({shape}), {count}; ONNX opset {onnx.read_opset(path)}"
