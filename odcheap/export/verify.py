"""Checks that every exported file computes the same as the trained network.

Each file is run in its own runtime on decoded image files. These are the run's test images, or images of random noise
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
from odcheap.export.load_run import RunStudent, describe_preprocessing
from odcheap.export.onnx import MAX_DIFFERENCE
from odcheap.export.runtimes import EXECUTORCH, FLOAT_FILES, ONNX, ONNX_RUNTIME, OPENVINO, PYTORCH, create_predictor
from odcheap.utils.console import say, show_progress
from odcheap.utils.errors import Failure, OptionError, first_line
from odcheap.utils.parts import build_part, read_part
from odcheap.utils.text import escape_control_chars, format_accuracy

NOISE_IMAGES = 64
BATCH_SIZE = 250
BARE = "a bare process"  # with PyTorch and odcheap
RUNTIMES = {".onnx": ONNX_RUNTIME, ".pt2": PYTORCH, ".pte": EXECUTORCH, ".safetensors": BARE}
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

Sample = tuple[str | Path, int]  # an image file and its label


class LabeledImages(Protocol):
    """The part of the interface of a data set (`ImageData`) that the checks of an export use."""

    norm: Normalization

    @property
    def labels(self) -> dict[str, np.ndarray]: ...

    def iterate_images(self, part: str, index: Iterable[int]) -> Iterator[LabeledImage]: ...


class ImageFiles:
    """A data set of image files with labels, for the checks of an export that was made in Python.

    Args:
        parts: Lists of pairs (file, label), by the name of the part. "test" has the images for the checks, "train"
            those for the calibration of 8-bit integers.
        image_size: The side, in pixels, of the images that the network takes.
        shorter_side: The number of pixels to which the shorter side of an image is resized before its center is
            cropped.
        norm: The normalization that the network expects.
    """

    def __init__(self, parts: Mapping[str, Sequence[Sample]], image_size: int, shorter_side: int, norm: Normalization):
        self.parts, self.norm = parts, norm
        self.transform = evaluation_transform(image_size, shorter_side)

    @property
    def labels(self) -> dict[str, np.ndarray]:
        return {part: np.array([label for _, label in samples], dtype=int) for part, samples in self.parts.items()}

    def iterate_images(self, part: str, index: Iterable[int]) -> Iterator[LabeledImage]:
        for k in index:
            path, label = self.parts[part][k]
            try:
                image = predict.convert_channels(predict.decode_image(path), len(self.norm.mean))
            except predict.ImageError as error:
                raise OptionError("samples", path, first_line(error)) from error
            yield LabeledImage(self.transform(image), label, Path(path))


class Reference(NamedTuple):
    """The logits of the trained network, with which the logits of exported files are compared.

    Attributes:
        files: The N image files.
        labels: Their labels (N,); None for images of noise.
        logits: The logits (N, K) of the trained network, for images that are prepared as in its evaluations.
    """

    files: list[Path]
    labels: np.ndarray | None
    logits: np.ndarray


class Verification(NamedTuple):
    """The results of the checks of an export.

    Without test images only `images`, `differences` and `reason` are set.

    Attributes:
        images: The number of images on which the files were checked.
        differences: The largest absolute difference of a logit from the trained network's, by the name of the file with
            floats. A file that was also run in OpenVINO has a second entry, such as "student.onnx in OpenVINO".
        top1: The top-1 accuracy on the test images, a fraction, by the same names and those of 8-bit files.
        reason: Why the files were checked on images of noise; empty if they were checked on test images.
        confusion: The confusion matrix of `student.onnx`, (K, K): rows are true classes, columns predicted classes.
        agreement: By the name of each 8-bit file, the share of the images for which it predicts the same class as the
            trained network.
        changes: By the name of each 8-bit file, two numbers of images: those that only this file classifies correctly,
            and those that only the same network's file with floats classifies correctly.
    """

    images: int
    differences: Mapping[str, float]
    top1: Mapping[str, float] = {}
    reason: str = ""
    confusion: np.ndarray | None = None
    agreement: Mapping[str, float] = {}
    changes: Mapping[str, tuple[int, int]] = {}

    @property
    def on_data(self) -> bool:
        """Whether the files were checked on the run's test images."""
        return not self.reason


def load_data(config: dict[str, Any], data_dir: str | None = None, config_dirs: Sequence[Path] = ()) -> ImageData:
    """Builds the data set of a run and reads its list of images; nothing is downloaded or written.

    Args:
        config: The content of the run's `config.yaml`.
        data_dir: The folder in which the images are now; None for the folder that `config` names.
        config_dirs: The user's own `conf` directories, if they define the data set.

    Raises:
        OptionError: The images are not in the folder, or `config` describes no data set.
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
    """Yields the images of a part, resized and cropped as in evaluations. Unreadable images are left out.

    Args:
        data: The data set.
        part: "train", "val" or "test".
        limit: The largest number of images to yield, taken evenly from the whole part; None for all images.
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
        folder: A folder. Images that do not come from files are written to it, so that every image has a file.

    Raises:
        Failure: None of the test images can be read.
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


def compute_noise_reference(settings: dict[str, Any], network: nn.Module, folder: Path) -> Reference:
    """Computes the logits of 64 images of random noise, from low to high contrast, with the trained network.

    Args:
        settings: The settings of the student, a dict with the keys of `StudentSettings`.
        network: The trained network; it takes normalized images.
        folder: The folder to which the images are written.
    """
    size, generator = settings["image_size"], torch.Generator().manual_seed(0)
    contrast = torch.linspace(0.1, 1, NOISE_IMAGES)[:, None, None, None]
    noise = 2 * torch.rand(NOISE_IMAGES, *size, generator=generator) - 1
    images = (127.5 + 127.5 * contrast * noise).round().byte()
    samples = [(save_image(image, folder / f"{k:06d}.png"), 0) for k, image in enumerate(images)]
    norm = Normalization(tuple(settings["mean"]), tuple(settings["std"]))
    data = ImageFiles({"test": samples}, size[-1], settings["shorter_side"], norm)
    return compute_test_reference(data, network, folder)._replace(labels=None)


def save_image(image: Tensor, path: Path) -> Path:
    """Writes an image (C, H, W) uint8 to a file whose suffix names the format, and returns the path."""
    Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(path)
    return path


def verify_files(
    run: RunStudent,
    data: LabeledImages | None,
    reason: str,
    folder: Path,
    batch: int | None,
    with_openvino: bool = False,
) -> Verification:
    """Runs every exported file, and compares its logits with those of the trained network.

    The logits of files with 8-bit integers are not compared; only their accuracy is measured.

    Args:
        run: The exported student.
        data: The data set with the test images. If it is None, the files are run on images of random noise.
        reason: Why `data` is None, as text; empty if it is not None.
        folder: The folder of the exported files.
        batch: The number of images that a static graph takes; None if the number may vary.
        with_openvino: True to run the ONNX files in OpenVINO, too.

    Raises:
        Failure: A file does not compute the same as the network, or the network has another test accuracy than the
            run's summary says.
    """
    preprocess, differences, predicted = describe_preprocessing(run.settings), {}, {}
    with tempfile.TemporaryDirectory() as images:
        # The accuracy of the trained network itself is compared with that of its run first.
        if data is None:
            reference = compute_noise_reference(run.settings, run.network, Path(images))
        else:
            reference = compute_test_reference(data, run.network, Path(images))
            check_accuracy(run, reference)
        for path in sorted(path for path in folder.iterdir() if path.suffix in RUNTIMES):
            say(f"checking {path.name} on {len(reference.files):,} images")
            runtimes = {path.name: RUNTIMES[path.suffix]}
            if with_openvino and path.suffix == ".onnx":
                runtimes[name_in_openvino(path.name)] = OPENVINO
            for name, runtime in runtimes.items():
                logits = compute_logits(path, runtime, preprocess, reference, batch, run.config_dirs)
                predicted[name] = logits.argmax(1)
                if path.name not in FLOAT_FILES:
                    differences[name] = check_logits(name, logits, reference)
    labels, expected = reference.labels, reference.logits.argmax(1)
    if labels is None:
        return Verification(len(reference.files), differences, reason=reason)
    is_right = {name: classes == labels for name, classes in predicted.items()}
    pairs = {name: (is_right[name], is_right[own]) for name, own in FLOAT_FILES.items() if name in is_right}
    return Verification(
        len(reference.files),
        differences,
        top1={name: float(right.mean()) for name, right in is_right.items()},
        confusion=predict.count_confusion(labels.tolist(), predicted[ONNX].tolist(), reference.logits.shape[1]),
        agreement={name: float((predicted[name] == expected).mean()) for name in pairs},
        changes={name: (int((int8 & ~own).sum()), int((own & ~int8).sum())) for name, (int8, own) in pairs.items()},
    )


def check_accuracy(run: RunStudent, reference: Reference) -> None:
    """Raises `Failure` if the test accuracy of the loaded network differs from the accuracy in the run's summary.

    A small difference is allowed: on another device, rounding can change the predicted class if the two largest logits
    of an image are nearly equal. Nothing is checked if the run has no summary.

    Args:
        run: The exported student, with the summary of its run.
        reference: What the network, as it was loaded from the run, has computed for the test images.
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
    top1 = float((reference.logits.argmax(1) == reference.labels).mean())
    if abs(top1 - run.test_top1) > ties + (0 if is_32_bit else 0.005) + 1e-6:
        here, known = format_accuracy(top1), format_accuracy(run.test_top1)
        line = f"the network's test accuracy is {here} % here, {known} % in the run's summary"
        raise Failure(f"{line}: other images than the run's, or other weights")


def check_logits(name: str, logits: np.ndarray, reference: Reference) -> float:
    """Returns the largest absolute difference between the logits of an exported file and of the trained network.

    Args:
        name: The name of the file, for the message.
        logits: The logits of the file, (N, K).
        reference: The logits of the trained network for the same images.

    Raises:
        Failure: A logit differs by more than rounding can explain.
    """
    differences = np.abs(logits - reference.logits)
    if not (differences <= MAX_DIFFERENCE + 1e-5 * np.abs(reference.logits)).all():
        worst = np.unravel_index(np.nan_to_num(differences, nan=np.inf).argmax(), differences.shape)
        where = escape_control_chars(reference.files[worst[0]])
        raise Failure(f"{name}: a logit differs from the trained network's by {differences[worst]:.2g} on {where}")
    return float(differences.max())


def compute_logits(
    path: Path,
    runtime: str,
    preprocess: dict[str, Any],
    reference: Reference,
    batch: int | None,
    config_dirs: Sequence[Path] = (),
) -> np.ndarray:
    """Runs an exported file on image files, and returns the logits (N, K).

    Args:
        path: The exported file.
        runtime: "ONNX Runtime", "OpenVINO" or "ExecuTorch"; or "a bare process" for a `student.safetensors`, which
            `load_student` then loads in a new process that has not imported the code of the run.
        preprocess: The content of `preprocess.json`.
        reference: What the trained network has computed. Only its list of image files is used here.
        batch: The number of images that a static graph takes; None if the number may vary.
        config_dirs: The user's own `conf` directories, if the student needs config files that odcheap does not have.

    Raises:
        Failure: The file cannot be loaded or run.
    """
    if runtime == BARE:
        return run_in_bare_process(path, preprocess, reference, config_dirs)
    try:
        predictor = create_predictor(runtime, path.read_bytes(), batch)
    except (Failure, predict.PredictError) as error:
        raise Failure(f"{path.name}: {error}") from error
    results = predict.predict_files(predictor, reference.files, preprocess)
    return np.stack([logits for _, logits in show_progress(results, len(reference.files), path.name)])


def name_in_openvino(name: str) -> str:
    """Returns the name under which the results of a file in OpenVINO are kept, such as "student.onnx in OpenVINO"."""
    return f"{name} in {OPENVINO}"


def run_in_bare_process(
    path: Path, preprocess: dict[str, Any], reference: Reference, config_dirs: Sequence[Path] = ()
) -> np.ndarray:
    """Runs a `student.safetensors` on image files, and returns the logits (N, K).

    A new process is used in which Lightning, Hydra and ONNX Runtime cannot be imported, to show that the file can be
    loaded without them.

    Args:
        path: The exported file.
        preprocess: The content of `preprocess.json`.
        reference: The reference whose image files are used.
        config_dirs: The user's own `conf` directories, if the student needs config files that odcheap does not have.

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
