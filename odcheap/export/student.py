"""Exports a network that was trained in Python, without a run of odcheap."""

import argparse
import copy
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from odcheap.data.transforms import Normalization
from odcheap.export.command import check_options, write_export
from odcheap.export.load_run import RunStudent
from odcheap.export.verify import ImageFiles, Sample
from odcheap.layers.cheap_conv import CheapConv
from odcheap.layers.fuse import fold_branches, standard_form
from odcheap.models.convert import describe_layer
from odcheap.utils.console import say
from odcheap.utils.errors import OptionError, first_line


def export_student(
    network: nn.Module,
    classes: Sequence[str],
    out: str | Path = "export",
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    shorter_side: int | None = None,
    samples: Sequence[Sample] = (),
    calibration: Sequence[str | Path] = (),
    name: str | None = None,
    batch: int | None = None,
    opset: int | None = None,
    qat: int = 0,
    openvino: bool = False,
    pt2: bool = False,
    executorch: bool = False,
    seconds: float = 1.0,
    overwrite: bool = False,
) -> Path:
    """Writes a network as files for a device, as `odcheap export` does for the student of a run.

    The folder contains `student.onnx`, `preprocess.json`, `labels.json`, `predict.py` and the model card `README.md`
    with checksums. The folder appears only if every file with floats computes the same as the network.

    Args:
        network: A network that maps normalized images (N, 3, H, W), or gray ones (N, 1, H, W), to logits (N, K); it is
            not changed.
        classes: The names of the K classes, in the order of the logits.
        out: The folder to write.
        image_size: The side, in pixels, of the square images that the network takes.
        mean: The mean of each channel, on the scale [0, 1], with which images are normalized for the network. Give
            three numbers for RGB images or one for gray images, and zeros if the network takes images in [0, 1].
        std: The standard deviation of each channel with which images are normalized, in the same form as `mean`. Give
            ones if the network takes images in [0, 1].
        shorter_side: The number of pixels to which the shorter side of an image is resized before its center is
            cropped; None for `image_size`.
        samples: Test images as pairs of a file and its label, such as `torchvision.datasets.ImageFolder(...).samples`.
            The exported files are checked on them, and the model card states the accuracy. If there are none, the files
            are checked on images of random noise.
        calibration: Files of training images. If they are given, `student-int8.onnx` with 8-bit integers is written,
            too. The ranges of its feature maps are measured on these images. `samples` must then be given as well.
        name: The name of the network in the model card; None for the name of its class.
        batch: The fixed number of images in a call, for compilers that need a static graph. None allows any number.
        opset: The version of ONNX's operators; None for 18, if possible.
        qat: The number of epochs of quantization-aware training before the conversion to 8-bit integers; 0 for none. A
            copy of the network is trained on the images of `calibration`, which should then be many; labels are not
            needed.
        openvino: True to check and time the ONNX files in OpenVINO, too, which must be installed.
        pt2: True to write `student.pt2`, too, for `torch.export.load`. This format can contain pickled Python
            objects, so the people to whom you give the file have to trust you.
        executorch: True to write `student.pte` for ExecuTorch, too, and with `calibration` also `student-int8.pte`,
            which has 8-bit integers. This needs the extra `executorch`.
        seconds: The time for each measurement of speed, in seconds.
        overwrite: True to replace an older export in `out`; otherwise an older export is an error.

    Returns:
        The absolute path of the folder.

    Raises:
        OptionError: An argument is not allowed, a file does not exist, or the network does not return one logit for
            each class.
        Failure: A file does not compute the same as the network, or a package that an argument needs is not installed.
            Nothing is written then.

    Example:
        >>> import tempfile
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        >>> half = (0.5, 0.5, 0.5)
        >>> out = tempfile.mkdtemp() + "/export"
        >>> folder = export_student(  # doctest: +ELLIPSIS
        ...     network, ["cat", "dog"], out, image_size=16, mean=half, std=half, seconds=0.01
        ... )
        Sequential: ...
        >>> sorted(path.name for path in folder.iterdir())[:3]
        ['README.md', 'labels.json', 'predict.py']
    """
    # Check the arguments, and try the network.
    norm = Normalization(read_channels("mean", mean), read_channels("std", std))
    shorter_side = image_size if shorter_side is None else shorter_side
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        raise OptionError("classes", classes, 'must be a list with the name of each class, such as ["cat", "dog"]')
    classes, samples, calibration = list(map(str, classes)), list(samples), list(calibration)
    check_images(image_size, shorter_side, samples, calibration, len(classes))
    network = copy.deepcopy(network).cpu().float().eval()
    channels = len(norm.mean)
    check_network(network, (channels, image_size, image_size), len(classes))
    network = fold_branches(network)

    # Describe the network as a run describes its student.
    own = network.network if hasattr(network, "network") else network  # a network that odcheap has wrapped
    name = type(own).__name__ if name is None else name
    settings: dict[str, Any] = {
        "backbone": {"part": name},
        "block_type": describe_pairs(network),
        "classes": classes,
        "split": None,
        "image_size": [channels, image_size, image_size],
        "shorter_side": shorter_side,
        "mean": list(norm.mean),
        "std": list(norm.std),
    }
    student = RunStudent(None, name, network, standard_form(network).eval(), settings, {}, None, None)
    forms = {
        "batch": batch,
        "opset": opset,
        "qat": qat,
        "int8": bool(calibration),
        "pt2": pt2,
        "executorch": executorch,
    }
    others = {"out": Path(out).resolve(), "overwrite": overwrite, "openvino": openvino, "seconds": seconds}
    options = argparse.Namespace(**forms, **others)
    parts = {"test": samples, "train": [(path, 0) for path in calibration]}
    data = ImageFiles(parts, image_size, shorter_side, norm) if samples else None
    try:
        say(f"{name}: {len(classes)} classes")
        write_export(student, options, check_options(options), data, "" if samples else "no test images were given")
    except OptionError as error:
        raise error.without_dashes() from None
    return options.out


def read_channels(option: str, values: Any) -> tuple[float, ...]:
    """Returns the mean or the standard deviation of the channels as a tuple of one or three floats.

    Args:
        option: The name of the argument, "mean" or "std".
        values: The value that the caller has given for this argument.

    Raises:
        OptionError: `values` is not a sequence of one or three finite numbers.
    """
    try:
        channels = () if isinstance(values, str) else tuple(map(float, values))
    except (TypeError, ValueError):
        channels = ()
    if len(channels) not in (1, 3) or not all(map(math.isfinite, channels)):
        none = {"mean": "(0, 0, 0)", "std": "(1, 1, 1)"}[option]
        allowed = f"must be three numbers, or one for gray images; {none} if the input is not normalized"
        raise OptionError(option, values, allowed)
    return channels


def check_images(
    image_size: int, shorter_side: int, samples: list[Sample], calibration: list[str | Path], classes: int
) -> None:
    """Checks the sizes, labels and files that were given to `export_student`. It returns nothing if all are allowed.

    Args:
        image_size: The side, in pixels, of the images that the network takes.
        shorter_side: The number of pixels to which the shorter side of an image is resized.
        samples: Test images as pairs of a file and its label.
        calibration: Files of training images.
        classes: The number of classes.

    Raises:
        OptionError: A size is not a positive integer; `shorter_side` is less than `image_size`; `calibration` is given
            without `samples`; a label is not in 0 to `classes` - 1; or a file does not exist.
    """
    for option, side in (("image_size", image_size), ("shorter_side", shorter_side)):
        if not isinstance(side, int) or side < 1:
            raise OptionError(option, side, "must be a whole number of pixels, 1 or more")
    if shorter_side < image_size:
        raise OptionError("shorter_side", shorter_side, f"must be image_size={image_size} or more")
    if calibration and not samples:
        raise OptionError("samples", samples, "must be given with calibration, to measure what 8-bit integers lose")
    for path, label in samples:
        if not 0 <= label < classes:
            raise OptionError("samples", f"({path}, {label})", f"its label must be 0 to {classes - 1}")
    for option, paths in (("samples", [path for path, _ in samples]), ("calibration", calibration)):
        missing = next((path for path in paths if not Path(path).is_file()), None)
        if missing is not None:
            raise OptionError(option, missing, "no such file")


@torch.inference_mode()
def check_network(network: nn.Module, image_size: tuple[int, int, int], classes: int) -> None:
    """Runs a network on two black images, and raises `OptionError` if the result is not logits (2, `classes`).

    Args:
        network: The network in eval mode, on the CPU.
        image_size: (C, H, W) of the images.
        classes: The number of classes.

    Raises:
        OptionError: The network cannot be run on such images, or it returns something else than these logits.
    """
    try:
        logits = network(torch.zeros(2, *image_size))
    except Exception as error:  # the network's own code may raise anything
        allowed = f"cannot be run on images of {' x '.join(map(str, image_size))} ({first_line(error)})"
        raise OptionError("network", type(network).__name__, allowed) from error
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        allowed = f"must return logits (N, {classes}) for {classes} classes; for two images it returns {found}"
        raise OptionError("network", type(network).__name__, allowed)


def describe_pairs(network: nn.Module) -> dict[str, str]:
    """Returns a dict that names the kinds of cheap convolution (`CheapConv`) in a network.

    Returns:
        A dict with the only key `part`, such as `{"part": "depth-wise + 1 x 1"}`. Several kinds are joined by "and".
        The dict is empty if the network has no `CheapConv`.
    """
    kinds = {describe_layer(module): None for module in network.modules() if isinstance(module, CheapConv)}
    return {"part": " and ".join(kinds)} if kinds else {}
