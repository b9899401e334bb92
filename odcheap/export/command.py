"""Writes a run's student as files for a device, and checks them; `arguments` has the help of the command."""

import argparse
import errno
import fcntl
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from odcheap import predict
from odcheap.config.messages import hide_library_warnings
from odcheap.data.base import ImageData
from odcheap.distributed.signals import SignalListener, Stopped
from odcheap.export import executorch, latency, model_card, onnx, runtimes, verify
from odcheap.export.arguments import parse_arguments
from odcheap.export.card_speed import STANDARD, STUDENT
from odcheap.export.load_run import RunStudent, describe_preprocessing, load_run_student
from odcheap.export.quantize import CALIBRATION_IMAGES, iterate_calibration_batches, quantize_student, timed_batches
from odcheap.layers.fuse import cheap_form, dense_form, has_pairs
from odcheap.models.build import NormalizedNetwork
from odcheap.runs.folder import TEMPORARY
from odcheap.training import summary
from odcheap.utils.console import keep_going_without_output, print_error, say
from odcheap.utils.errors import Failure, OptionError, describe_external_failure
from odcheap.utils.files import write_atomic, write_json, write_text
from odcheap.utils.text import format_accuracy, hide_folders

OLDEST_INT8_OPSET = 13  # the first with a scale for each channel
MAX_CARD = 1 << 20  # characters of a model card that are read
MAX_LOST_TOP1 = 0.005  # by 8-bit integers; if they lose more, a line names the fine-tuning
TEMPORARY_NAME = re.compile(r"\.[a-z0-9_]{8}\.part", re.ASCII)  # after the dot and the name of the folder to write
PREDICT = "predict.py"
FILES = {*runtimes.FILES, PREDICT, predict.PREPROCESS_FILE, predict.LABELS_FILE, predict.CARD_FILE}
FILES |= {model_card.RESULTS_FILE}

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
            run = load_run_student(options.job_dir, options.student, options.config_dir)
            say(f"{run.job_dir}: {run.title}")
            write_export(run, options, older, *load_test_data(run, options))
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
    """Returns the absolute path of the folder to write, in which all symbolic links are resolved.

    Links are resolved because a temporary folder takes the place of this path at the end. It would otherwise replace
    the link and not the folder to which the link leads.

    Args:
        job_dir: The run's folder.
        out: The folder that the user has given; None for `export` in the run's folder.

    Raises:
        OptionError: `out` is None, and `export` in the run's folder is a link.
    """
    default = job_dir / "export"
    if out is None and default.is_symlink():
        raise OptionError("--out", default, "is a link to elsewhere: name the folder to write with --out")
    return Path(os.path.realpath(out or default))


def check_options(options: argparse.Namespace) -> Versions | None:
    """Checks the options of an export, and returns which files will be replaced.

    Args:
        options: The options of the command, of which `batch`, `opset`, `int8`, `qat`, `executorch`, `openvino`,
            `seconds`, `out` and `overwrite` are read.

    Returns:
        The files of the older export that will be replaced, as `read_versions` returns them; None if there is none.

    Raises:
        OptionError: The value of an option is not allowed, or `out` contains files that must not be replaced.
        Failure: An option needs a package that is not installed.
    """
    batch, opset, epochs, out = options.batch, options.opset, options.qat, options.out
    calibrated = "--int8" if options.int8 else "--executorch" if options.executorch else ""
    many = f"must be at most {CALIBRATION_IMAGES} with {calibrated}, which calibrates on that many images"
    old = f"must be {OLDEST_INT8_OPSET} or more with --int8"
    checks = (
        (batch is None or batch >= 1, "--batch", batch, "must be 1 or more"),
        (not calibrated or (batch or 1) <= CALIBRATION_IMAGES, "--batch", batch, many),
        (not options.int8 or opset is None or opset >= OLDEST_INT8_OPSET, "--opset", opset, old),
        (epochs >= 0, "--qat", epochs, "must be 1 or more epochs"),
        (not epochs or options.int8, "--qat", epochs, "needs --int8"),
        (options.seconds > 0, "--seconds", options.seconds, "must be above 0"),
    )
    for is_allowed, option, value, allowed in checks:
        if not is_allowed:
            raise OptionError(option, value, allowed)
    if options.executorch:
        runtimes.check_installed(runtimes.EXECUTORCH)
    if options.openvino:
        runtimes.check_installed(runtimes.OPENVINO)

    # The folder: only an export is ever replaced, and only if nobody has put other files into it.
    if out.is_mount():
        raise OptionError("--out", out, "is a mount point, which cannot be replaced: name a folder in it")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    versions = read_versions(out)  # read first, so that a later change is noticed
    exported = list_exported(out)
    files = {path.name for path in out.iterdir() if path.is_file() and not path.is_symlink()} if exported else set()
    others = sorted(versions.keys() - (files & exported))
    if not exported or others:
        which = f" ({others[0]} is not a file of an export)" if exported else ""
        raise OptionError("--out", out, f"exists and is not an export{which}: name another folder")
    if not options.overwrite:
        raise OptionError("--out", out, "holds an export; --overwrite replaces it, another --out leaves it")
    return versions


def read_versions(folder: Path) -> Versions:
    """Returns the inode and the modification time (ns) of each file in a folder, by name, to notice later changes."""
    entries = {path.name: path.lstat() for path in folder.iterdir()} if folder.is_dir() else {}
    return {name: (entry.st_ino, entry.st_mtime_ns) for name, entry in entries.items()}


def list_exported(folder: Path) -> set[str]:
    """Returns the names of a model card and of the files that it lists; empty if the folder has no model card."""
    path = folder / predict.CARD_FILE
    text = ""
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read(MAX_CARD)
    names = {match[2] for match in predict.CHECKSUM_LINE.finditer(text)}
    return names | {predict.CARD_FILE} if predict.PREPROCESS_FILE in names else set()


def write_export(
    run: RunStudent,
    options: argparse.Namespace,
    older: Versions | None,
    data: verify.LabeledImages | None,
    reason: str,
) -> None:
    """Writes, times and checks the files of an export. The folder `options.out` appears only if all checks succeed.

    Args:
        run: The student to export.
        options: The options of the command, as `parse_arguments` returns them.
        older: The files of an older export that are replaced, as `check_options` returned them; None if there are none.
        data: The data set with test images, and with training images for 8-bit integers. If it is None, the files are
            checked on images of noise.
        reason: Why `data` is None, as text for the model card; empty if it is not None.
    """
    with replace_folder(options.out, older) as folder:
        # The dense form stays only if it is faster here.
        files = write_files(run, options, data, folder)
        timings = time_files(run, options, files, folder)
        if runtimes.DENSE in files and not is_faster(timings, runtimes.DENSE):
            (folder / runtimes.DENSE).unlink()
            del files[runtimes.DENSE]
            timings = {key: timing for key, timing in timings.items() if key.name != runtimes.DENSE}
        verification = verify.verify_files(run, data, reason, folder, options.batch, options.openvino)
        write_json(folder / model_card.RESULTS_FILE, model_card.describe_results(run, verification))
        cpu = f"{summary.describe_machine(torch.device('cpu'))['cpu']}, {os.cpu_count()} cores"
        graph = onnx.describe_graph((folder / runtimes.ONNX).read_bytes())
        text = model_card.write_card(run, folder, files, timings, verification, cpu, graph)
        write_text(folder / predict.CARD_FILE, text)
    for line in [*model_card.extract_opening(text).split("\n"), f"written: {options.out}"]:
        say(line)
    if not options.qat and (advice := advise_fine_tuning(run, verification)):
        say(advice)


def advise_fine_tuning(run: RunStudent, verification: verify.Verification) -> str | None:
    """Returns advice to use quantization-aware training if 8-bit integers lose more than half a percentage point.

    Returns:
        A line for the user that names the option. None if the 8-bit integers lose less, or if either accuracy is not
        known.
    """
    floats, integers = (verification.top1.get(name) for name in (runtimes.ONNX, runtimes.INT8))
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
        The data set and an empty text. If the data set is not available and no option needs it, None and the reason.

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
    """A context manager that yields a temporary folder, which takes the place of `out` at the end.

    After an error the temporary folder is removed, and `out` stays unchanged.

    Args:
        out: The folder to write.
        older: The files of an older export in `out`, as `read_versions` returned them before; they are removed. None
            if `out` does not exist or is empty.

    Raises:
        OptionError: The folder cannot be written, or another process has written to `out` meanwhile.
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
    """Removes the temporary folders that killed exports to `out` have left.

    A folder stays if a running export has locked it, or if it contains a file that is not part of an export.
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
    """Returns whether a path is a file with the name of an exported file, or with the temporary form of such a name."""
    match = TEMPORARY.fullmatch(path.name)
    return path.is_file() and not path.is_symlink() and (match["name"] if match else path.name) in FILES


def write_files(
    run: RunStudent, options: argparse.Namespace, data: verify.LabeledImages | None, folder: Path
) -> dict[str, nn.Module]:
    """Writes all files of an export except `results.json` and the model card.

    Args:
        run: The student.
        options: The options of the command.
        data: The data set. Its training images calibrate the network with 8-bit integers, if one is asked for. None if
            the data set is not available.
        folder: The existing folder to which the files are written.

    Returns:
        For each file that will be timed, by its name, the PyTorch network that the file contains.
    """
    write_json(folder / predict.PREPROCESS_FILE, describe_preprocessing(run.settings))
    write_json(folder / predict.LABELS_FILE, run.settings["classes"])
    shutil.copyfile(predict.__file__, folder / PREDICT)
    if run.job_dir is not None:  # the settings of a run build the network again
        summary.write_student(folder / runtimes.WEIGHTS, run.network, run.settings)
    cheap = add_normalization(cheap_form(run.network), run)
    program = onnx.export_program(cheap, run.image_size, options.batch)
    contents = {runtimes.ONNX: onnx.to_onnx(program, options.opset)}
    if has_pairs(run.network):
        dense = add_normalization(dense_form(run.network), run)
        traced = onnx.export_program(dense, run.image_size, options.batch)
        contents[runtimes.DENSE] = onnx.to_onnx(traced, options.opset)
    if options.int8 and data is not None:
        say(f"8-bit integers, calibrated on up to {CALIBRATION_IMAGES} training images")
        contents[runtimes.INT8] = quantize_student(contents[runtimes.ONNX], run.image_size, options, data)
    if options.executorch:
        contents |= convert_to_executorch(program, run, options, data)
    forms = {name: dense if name == runtimes.DENSE else cheap for name in contents}
    if options.pt2:
        contents[runtimes.PT2] = onnx.to_pt2(program)
    for name, content in contents.items():
        write_atomic(folder / name, lambda file, content=content: file.write(content))
    return forms


def convert_to_executorch(
    program: onnx.Program, run: RunStudent, options: argparse.Namespace, data: verify.LabeledImages | None
) -> dict[str, bytes]:
    """Returns the contents of the files for ExecuTorch.

    Args:
        program: The traced student.
        run: The student.
        options: The options of the command.
        data: The data set with training images for 8-bit integers; None if it is not available.

    Returns:
        A dict from the name of a file to its content: `student.pte` with floats and, if there are training images,
        `student-int8.pte` with 8-bit integers.
    """
    say(f"{runtimes.PTE}, for ExecuTorch")
    files = {runtimes.PTE: executorch.to_pte(program, run.image_size, options.batch)}
    if data is not None and len(data.labels["train"]):
        say(f"{runtimes.PTE_INT8}, calibrated on up to {CALIBRATION_IMAGES} training images")
        batches = iterate_calibration_batches(data, options.batch)
        files[runtimes.PTE_INT8] = executorch.to_int8_pte(program, run.image_size, batches, options.batch)
    else:
        say(f"{runtimes.PTE_INT8} is not written: there are no training images for its calibration")
    for name, file in files.items():
        if file.portable:
            say(f"warning: XNNPACK does not run these operators of {name}, which are slow: {', '.join(file.portable)}")
    return {name: file.content for name, file in files.items()}


def add_normalization(network: nn.Module, run: RunStudent) -> nn.Module:
    """Returns a network in eval mode that normalizes images in [0, 1] as the student of `run`, then calls `network`."""
    return NormalizedNetwork(network, run.settings["mean"], run.settings["std"]).eval()


def time_files(run: RunStudent, options: argparse.Namespace, files: Iterable[str], folder: Path) -> latency.Timings:
    """Measures how long exported files take in their runtimes, and the standard network in the same runtimes.

    The student and the standard network are also timed in PyTorch, and with `--openvino` the ONNX files in OpenVINO.
    All calls are timed alternately, so that a change of the machine's speed affects all of them.

    Args:
        run: The student, with its standard network: the same network with standard convolutions.
        options: The options of the command, of which `batch`, `opset`, `openvino` and `seconds` are read.
        files: The names of the exported files to time.
        folder: The folder of these files.
    """
    size, standard, batches = run.image_size, add_normalization(run.standard, run), timed_batches(options.batch)
    contents = {name: (folder / name).read_bytes() for name in files}
    programs = {name: content for name, content in contents.items() if name.endswith(".pte")}
    models = {name: content for name, content in contents.items() if name not in programs}
    traced = onnx.export_program(standard, size, options.batch)
    models[STANDARD] = onnx.to_onnx(traced, options.opset)
    if programs:
        say("the standard network, for ExecuTorch")
        programs[STANDARD] = executorch.to_pte(traced, size, options.batch).content
    networks = {STUDENT: add_normalization(run.network, run), STANDARD: standard}
    calls = latency.file_calls(runtimes.ONNX_RUNTIME, models, size, batches) | latency.torch_calls(
        networks, size, batches
    )
    calls |= latency.file_calls(runtimes.EXECUTORCH, programs, size, batches[:1])
    if options.openvino:
        calls |= latency.file_calls(runtimes.OPENVINO, models, size, batches)
    say(f"{len(calls)} timings of {options.seconds:g} s each")
    return predict.time_alternately(calls, options.seconds)


def is_faster(timings: latency.Timings, name: str) -> bool:
    """Returns whether an ONNX file is faster than `student.onnx` for at least one number of images in a call.

    Args:
        timings: The times of both files in ONNX Runtime.
        name: The name of the ONNX file, such as "student-dense.onnx".
    """
    speedups = latency.compute_speedups(timings, (name, runtimes.ONNX_RUNTIME), (runtimes.ONNX, runtimes.ONNX_RUNTIME))
    return any(speedup.value > 1 for speedup in speedups.values())
