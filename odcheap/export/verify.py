"""Checks that every exported file computes the same as the trained network.

Each file is run in its own runtime, and image files are decoded for it: the test images of the run, or images of noise
if there are no test images.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from odcheap import predict
from odcheap.data.base import ImageData, LabeledImage
from odcheap.data.image_folder import evaluation_transform
from odcheap.data.transforms import Normalization
from odcheap.export import executorch, openvino
from odcheap.export.executorch import PTE, PTE_INT8
from odcheap.export.load_run import RunStudent
from odcheap.export.onnx import MAX_DIFFERENCE
from odcheap.utils.console import say, show_progress
from odcheap.utils.errors import Failure, OptionError, first_line
from odcheap.utils.parts import build_part, read_part
from odcheap.utils.text import escape_control_chars, format_accuracy

INT8 = "student-int8.onnx"
FLOAT_FILES = {INT8: "student.onnx", PTE_INT8: PTE}  # for each file with 8-bit integers, the one with floats
NOISE_IMAGES = 64
BATCH_SIZE = 250
SUFFIXES = (".onnx", ".pt2", ".pte", ".safetensors")
# Runs a student.safetensors in a new process that cannot import Lightning, Hydra or ONNX Runtime.
BARE_PROCESS = """
import json, sys
from pathlib import Path
for name in ("pytorch_lightning", "lightning_fabric", "hydra", "omegaconf", "torchmetrics", "onnxruntime", "sklearn"):
    sys.modules[name] = None
import numpy, torch
from odcheap import predict
from odcheap.models.build import load_student
student, preprocess, files, out, *config_dirs = sys.argv[1:]
network = load_student(student, config_dirs)
predictor = lambda images: network(torch.from_numpy(images)).numpy()
paths = [Path(path) for path in json.loads(Path(files).read_text())]
with torch.inference_mode():
    results = predict.predict_files(predictor, paths, json.loads(preprocess))
    numpy.save(out, numpy.stack([logits for _, logits in results]))
"""


class LabeledImages(Protocol):
    """The attributes and methods of a data set that the checks use; see `ImageData`."""

    norm: Normalization

    @property
    def labels(self) -> dict[str, np.ndarray]: ...

    def iterate_images(self, part: str, index: Iterable[int]) -> Iterator[LabeledImage]: ...


class Reference(NamedTuple):
    """What the outputs of exported files are compared with.

    Attributes:
        files: The image files.
        labels: Their labels (N,); None for images of noise.
        logits: The logits (N, K) of the trained network, with images prepared as in the evaluations of the training.
    """

    files: list[Path]
    labels: np.ndarray | None
    logits: np.ndarray

    def top1(self, logits: np.ndarray) -> float | None:
        """Returns the top-1 accuracy of logits (N, K); None if there are no labels."""
        return None if self.labels is None else float((logits.argmax(1) == self.labels).mean())


class Verification(NamedTuple):
    """The results of the checks.

    Attributes:
        images: The number of images.
        on_data: Whether these were the test images of the run.
        differences: For each file, the largest difference between one of its logits and the trained network's. A file
            that was also run in OpenVINO has a second entry; see `name_in_openvino`.
        top1: For each file, its top-1 accuracy; None if there are no labels. There are entries for OpenVINO, too.
        reason: Why there were no test images; empty if there were.
        confusion: The confusion matrix of `student.onnx` (K, K), true classes by predicted ones; None without labels.
        agreement: For each file with 8-bit integers, the share of the images for which it predicts the class that the
            trained network predicts.
        changes: For each file with 8-bit integers, the number of images that only it classifies correctly, and of those
            that only the file with floats classifies correctly, see `FLOAT_FILES`; empty without labels.
    """

    images: int
    on_data: bool
    differences: dict[str, float]
    top1: dict[str, float | None]
    reason: str
    confusion: np.ndarray | None = None
    agreement: Mapping[str, float] = {}
    changes: Mapping[str, tuple[int, int]] = {}


def load_data(config: dict[str, Any], data_dir: str | None = None, config_dirs: Sequence[Path] = ()) -> ImageData:
    """Reads the data set of a run; nothing is downloaded or written.

    Args:
        config: The content of the run's `config.yaml`.
        data_dir: The folder of the images now; None if they are in the folder that the config names.
        config_dirs: Further `conf` directories, with data sets that odcheap does not have.

    Raises:
        OptionError: The images are not there, or the config describes no data set.
    """
    try:
        settings = dict(config["data"])
        if isinstance(settings.get("load"), dict):
            load = settings["load"]
            changes = {"data_dir": data_dir or load.get("data_dir"), "read_only": True}
            known = read_part("data", settings.get("part"), config_dirs).get("load") or {}
            settings["load"] = load | {option: value for option, value in changes.items() if option in known}
        data = build_part("data", settings, config_dirs=config_dirs)
        data.read()
    except OptionError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OptionError("JOB_DIR", "config.yaml", f"describes no data set ({first_line(error)})") from error
    return data


def iterate_samples(data: LabeledImages, part: str, limit: int | None = None) -> Iterator[LabeledImage]:
    """Yields the images of a part as they are evaluated, without those that cannot be read.

    Args:
        data: The data set.
        part: "train", "val" or "test".
        limit: The largest number of images, which are spread evenly over the part; None for all images.
    """
    count = len(data.labels[part])
    return data.iterate_images(part, range(count) if limit is None else range(0, count, -(-count // limit)))


def split_batches(samples: Iterable[LabeledImage], size: int) -> Iterator[list[LabeledImage]]:
    """Yields lists of `size` samples; the last list may be shorter."""
    samples = iter(samples)
    while batch := list(itertools.islice(samples, size)):
        yield batch


@torch.inference_mode()
def compute_test_reference(data: LabeledImages, network: nn.Module, folder: Path) -> Reference:
    """Computes the logits of all test images with the trained network.

    Args:
        data: The data set.
        network: The trained network; it takes normalized images.
        folder: A folder to which images are written that do not come from files.
    """
    files, labels, logits = [], [], []
    samples = show_progress(iterate_samples(data, "test"), len(data.labels["test"]), "the trained network")
    for batch in split_batches(samples, BATCH_SIZE):
        for sample in batch:
            files.append(sample.path or save_image(sample.image, folder / f"{len(files):06d}.png"))
            labels.append(sample.label)
        logits.append(network(data.norm.apply(torch.stack([sample.image for sample in batch]))))
    if not files:
        raise Failure("data_dir: none of the test images can be read")
    return Reference(files, np.array(labels), torch.cat(logits).numpy())


@torch.inference_mode()
def compute_noise_reference(settings: dict[str, Any], network: nn.Module, folder: Path) -> Reference:
    """Computes the logits of images of noise, whose contrast increases, with the trained network.

    Args:
        settings: The settings of the student; see `StudentSettings`.
        network: The trained network; it takes normalized images.
        folder: The folder to which the images are written.
    """
    size, generator = settings["image_size"], torch.Generator().manual_seed(0)
    contrast = torch.linspace(0.1, 1, NOISE_IMAGES)[:, None, None, None]
    noise = 2 * torch.rand(NOISE_IMAGES, *size, generator=generator) - 1
    images = (127.5 + 127.5 * contrast * noise).round().byte()
    files = [save_image(image, folder / f"{k:06d}.png") for k, image in enumerate(images)]
    transform = evaluation_transform(size[-1], settings["shorter_side"])
    decoded = (predict.convert_channels(predict.decode_image(file), size[0]) for file in files)
    inputs = torch.stack([transform(image) for image in decoded])
    norm = Normalization(tuple(settings["mean"]), tuple(settings["std"]))
    return Reference(files, None, network(norm.apply(inputs)).numpy())


def save_image(image: Tensor, path: Path) -> Path:
    """Writes an image (C, H, W) uint8 to a file whose suffix names the format, and returns the path."""
    Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(path)
    return path


def verify_files(
    run: RunStudent,
    data: LabeledImages | None,
    reason: str,
    preprocess: dict[str, Any],
    folder: Path,
    batch: int | None,
    with_openvino: bool = False,
) -> Verification:
    """Compares the logits of every exported file with those of the trained network.

    The logits of files with 8-bit integers are not compared; only their accuracy is measured.

    Args:
        run: The exported student.
        data: The data set with the test images; None if they are not available.
        reason: Why they are not available; empty if they are.
        preprocess: The content of `preprocess.json`.
        folder: The folder of the exported files.
        batch: The number of images that a static graph takes; None if the number may vary.
        with_openvino: Whether the ONNX files are also run in OpenVINO.

    Raises:
        Failure: A file does not compute the same as the network.
    """
    # The accuracy of the trained network itself is compared with that of its run first.
    differences, top1, confusion, agreement = {}, {}, None, {}
    correct: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as images:
        if data is None:
            reference = compute_noise_reference(run.settings, run.network, Path(images))
        else:
            reference = compute_test_reference(data, run.network, Path(images))
            check_accuracy(run, reference)
        for path in sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES):
            say(f"checking {path.name} on {len(reference.files):,} images")
            logits = compute_logits(path, preprocess, reference, batch, run.config_dirs)
            top1[path.name] = reference.top1(logits)
            if with_openvino and path.suffix == ".onnx":
                name = name_in_openvino(path.name)
                own = compute_logits_in_openvino(path, preprocess, reference)
                top1[name] = reference.top1(own)
                if path.name not in FLOAT_FILES:
                    differences[name] = check_logits(name, own, reference)
            if reference.labels is not None:
                correct[path.name] = logits.argmax(1) == reference.labels
            if path.name not in FLOAT_FILES:
                differences[path.name] = check_logits(path.name, logits, reference)
            else:
                agreement[path.name] = float((logits.argmax(1) == reference.logits.argmax(1)).mean())
            if path.name == "student.onnx" and reference.labels is not None:
                confusion = predict.count_confusion(
                    reference.labels.tolist(), logits.argmax(1).tolist(), logits.shape[1]
                )
    changes = {}
    for name in FLOAT_FILES.keys() & correct.keys():
        int8, own = correct[name], correct[FLOAT_FILES[name]]
        changes[name] = int((int8 & ~own).sum()), int((own & ~int8).sum())
    return Verification(
        len(reference.files), data is not None, differences, top1, reason, confusion, agreement, changes
    )


def check_accuracy(run: RunStudent, reference: Reference) -> None:
    """Raises `Failure` if the accuracy of the trained network differs from that in the run's summary.

    Some difference is allowed, since rounding can change the class of an image whose two largest logits are close.
    """
    # They count as close if they differ by less than a thousandth after a run in 32 bits on a CPU, where only the order
    # of sums differs, and otherwise by less than 3 % of the range of the logits: a GPU rounds the factors of products
    # to 11 bits, and bfloat16 has 8. With less than 32 bits, half a percent of all images may be classified differently
    # in addition.
    if run.test_top1 is None:
        return
    ordered = np.sort(reference.logits, axis=1)
    trainer = run.config.get("trainer") or {}
    is_32_bit = str(trainer.get("precision")) in ("32", "32-true")
    exact = is_32_bit and trainer.get("accelerator") == "cpu"
    gap = 1e-3 if exact else 0.03 * (ordered[:, -1] - ordered[:, 0])
    ties = (ordered[:, -1] - ordered[:, -2] < gap).mean()
    top1 = reference.top1(reference.logits) or 0.0
    if abs(top1 - run.test_top1) > ties + (0 if is_32_bit else 0.005) + 1e-6:
        here, known = format_accuracy(top1), format_accuracy(run.test_top1)
        line = f"the network's test accuracy is {here} % here, {known} % in the run's summary"
        raise Failure(f"{line}: other images than the run's, or other weights")


def check_logits(name: str, logits: np.ndarray, reference: Reference) -> float:
    """Returns the largest difference between a logit of a file and the trained network's; raises if one is too large.

    Args:
        name: The name of the file, for the message.
        logits: The logits of the file, (N, K).
        reference: The logits of the trained network.

    Raises:
        Failure: A difference is larger than rounding can explain.
    """
    differences = np.abs(logits - reference.logits)
    if not (differences <= MAX_DIFFERENCE + 1e-5 * np.abs(reference.logits)).all():
        worst = np.unravel_index(np.nan_to_num(differences, nan=np.inf).argmax(), differences.shape)
        where = escape_control_chars(reference.files[worst[0]])
        raise Failure(f"{name}: a logit differs from the trained network's by {differences[worst]:.2g} on {where}")
    return float(differences.max())


def compute_logits(
    path: Path, preprocess: dict[str, Any], reference: Reference, batch: int | None, config_dirs: Sequence[Path] = ()
) -> np.ndarray:
    """Returns the logits (N, K) of an exported file, which is run in its own runtime.

    Args:
        path: The exported file.
        preprocess: The content of `preprocess.json`.
        reference: The image files.
        batch: The number of images that a static graph takes; None if the number may vary.
        config_dirs: Further `conf` directories, with parts of the student that odcheap does not have.

    Raises:
        Failure: The file cannot be loaded or run.
    """
    # The runtimes: a new process with PyTorch and odcheap, PyTorch alone, ExecuTorch, and ONNX Runtime.
    if path.suffix == ".safetensors":
        return run_in_bare_process(path, preprocess, reference, config_dirs)
    if path.suffix == ".pt2":
        graph = torch.export.load(path).module()

        def run(images: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return graph(torch.from_numpy(images)).numpy()

        predictor = predict.pad_batches(run, batch)
    elif path.suffix == ".pte":
        try:
            predictor = executorch.create_predictor(path.read_bytes(), batch)
        except Failure as error:
            raise Failure(f"{path.name}: {error}") from error
    else:
        try:
            predictor = predict.create_predictor(predict.create_session(path.read_bytes()))
        except predict.PredictError as error:
            raise Failure(f"{path.name}: {error}") from error
    return run_predictor(predictor, path.name, preprocess, reference)


def run_predictor(
    predictor: predict.Predictor, name: str, preprocess: dict[str, Any], reference: Reference
) -> np.ndarray:
    """Returns the logits (N, K) of image files.

    Args:
        predictor: A function that runs the network.
        name: The name of the file with the network, which is shown beside the progress.
        preprocess: The content of `preprocess.json`.
        reference: The image files.
    """
    results = predict.predict_files(predictor, reference.files, preprocess)
    return np.stack([logits for _, logits in show_progress(results, len(reference.files), name)])


def name_in_openvino(name: str) -> str:
    """Returns the name under which the results of a file in OpenVINO are kept, such as "student.onnx in OpenVINO"."""
    return f"{name} in {openvino.OPENVINO}"


def compute_logits_in_openvino(path: Path, preprocess: dict[str, Any], reference: Reference) -> np.ndarray:
    """Returns the logits (N, K) of an ONNX file, which is run in OpenVINO.

    Args:
        path: The ONNX file.
        preprocess: The content of `preprocess.json`.
        reference: The image files.

    Raises:
        Failure: OpenVINO cannot load the file.
    """
    try:
        predictor = openvino.create_predictor(path.read_bytes())
    except Failure as error:
        raise Failure(f"{path.name}: {error}") from error
    return run_predictor(predictor, name_in_openvino(path.name), preprocess, reference)


def run_in_bare_process(
    path: Path, preprocess: dict[str, Any], reference: Reference, config_dirs: Sequence[Path] = ()
) -> np.ndarray:
    """Returns the logits (N, K) of a `student.safetensors`.

    It is loaded in a new process in which Lightning, Hydra and ONNX Runtime cannot be imported.

    Args:
        path: The exported file.
        preprocess: The content of `preprocess.json`.
        reference: The image files.
        config_dirs: Further `conf` directories, with parts of the student that odcheap does not have.

    Raises:
        Failure: The file cannot be loaded or run.
    """
    search = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), *sys.path]))
    with tempfile.TemporaryDirectory() as folder:
        files, out = Path(folder) / "files.json", Path(folder) / "logits.npy"
        files.write_text(json.dumps([str(file.resolve()) for file in reference.files]))
        arguments = [path.resolve(), json.dumps(preprocess), files, out, *(d.resolve() for d in config_dirs)]
        command = [sys.executable, "-c", BARE_PROCESS, *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": search}
        process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if process.returncode:
            last = (process.stderr.strip() or "no message").split("\n")[-1]
            raise Failure(f"{path.name}: a bare process cannot load or run it ({last})")
        return np.load(out)
