"""Converts the ONNX file of a student to 8-bit integers, in the form that ONNX Runtime runs faster here."""

import argparse
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from odcheap import predict
from odcheap.data.base import LabeledImage
from odcheap.export import qat, verify
from odcheap.export.latency import compute_speedups, file_calls
from odcheap.export.onnx import INPUT
from odcheap.export.runtimes import ONNX_RUNTIME, create_predictor
from odcheap.utils.console import say, show_progress
from odcheap.utils.text import count_things, format_accuracy

# The two forms of an ONNX file with 8-bit integers. In the first, each layer is one operator of integers, as ONNX
# Runtime runs it; the second has the operators of the float network, between pairs of QuantizeLinear and
# DequantizeLinear, which other runtimes and compilers can read too.
QOPERATOR, QDQ = "QOperator", "QDQ"
FORMATS = {QOPERATOR: QuantFormat.QOperator, QDQ: QuantFormat.QDQ}
EPOCHS = "odcheap.fine_tuned_epochs"  # a property of an ONNX file
CALIBRATION_IMAGES = 512  # training images that determine the ranges of 8-bit feature maps


def quantize_student(
    model: bytes, image_size: tuple[int, int, int], options: argparse.Namespace, data: verify.LabeledImages
) -> bytes:
    """Converts the ONNX file of a student to 8-bit integers, and returns the content of the new ONNX file.

    ONNX has two forms of such files, "QOperator" and "QDQ". The form that ONNX Runtime runs faster on this machine is
    returned; with `--openvino` it is always "QDQ", since OpenVINO cannot run the other form.

    Args:
        model: The content of `student.onnx`.
        image_size: The shape (C, H, W) of an image.
        options: The options of the command, of which `batch`, `qat`, `openvino` and `seconds` are read.
        data: The data set, whose training images are used for the calibration and for quantization-aware training.
    """
    batches = list(iterate_calibration_batches(data, options.batch))
    prepared = prepare_model(model)
    scales: dict[str, qat.Scale] = {}
    if options.qat:
        prepared, scales = fine_tune_student(prepared, batches, options.qat, data)
    forms = (QDQ,) if options.openvino else (QOPERATOR, QDQ)
    contents = {form: quantize_model(prepared, batches, form, scales) for form in forms}
    form = choose_form(contents, image_size, timed_batches(options.batch), options.seconds)
    return write_epochs(contents[form], options.qat) if scales else contents[form]


def timed_batches(batch: int | None) -> tuple[int, ...]:
    """Returns the numbers of images in a call that are timed: `batch`, or 1 and 64 if that is None."""
    return predict.TIMED_BATCH_SIZES if batch is None else (batch,)


def fine_tune_student(
    prepared: bytes, batches: Sequence[np.ndarray], epochs: int, data: verify.LabeledImages
) -> tuple[bytes, dict[str, qat.Scale]]:
    """Trains a network with simulated 8-bit rounding, and keeps the result if it is not worse on held-out images.

    If the data set has no held-out images, the result is always kept.

    Args:
        prepared: The content of the ONNX file with floats, from `prepare_model`.
        batches: Batches of images (n, C, H, W), float32 in [0, 1], to measure the ranges of feature maps.
        epochs: The number of epochs.
        data: The data set with training images and perhaps held-out images.

    Returns:
        The content of an ONNX file with the trained weights as floats, and the learned scales of its feature maps by
        name. If the result is worse, `prepared` and an empty dict.
    """
    calibrated = quantize_model(prepared, batches, QDQ)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = qat.RoundedNetwork(prepared, calibrated, device)
    count = len(data.labels["train"])
    size = min(qat.BATCH_SIZE, count)
    say(
        f"fine-tuning with the rounding of 8-bit integers, {count_things(epochs, 'epoch')} of {count:,} training images"
    )
    batches_of_epochs = (iterate_training_batches(data, epoch, size) for epoch in range(epochs))
    teacher = create_predictor(ONNX_RUNTIME, prepared)
    tuned, scales = qat.fine_tune(network, teacher, batches_of_epochs, epochs * (count // size))
    if not len(data.labels.get("val", ())):
        return tuned, scales
    files = {"calibrated": calibrated, "fine-tuned": quantize_model(tuned, batches, QDQ, scales)}
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
    samples = show_progress(data.iterate_images("train", order), count, f"epoch {epoch + 1}")
    return (images for images, _ in iterate_batches(samples, size) if len(images) == size)


def iterate_calibration_batches(data: verify.LabeledImages, batch: int | None) -> Iterator[np.ndarray]:
    """Yields batches of up to 512 training images in total, (n, C, H, W), float32 in [0, 1], for the calibration.

    Args:
        data: The data set.
        batch: The number of images in each batch, for a static graph; None if the batches may have any number.
    """
    samples = verify.iterate_samples(data, "train", CALIBRATION_IMAGES)
    batches = iterate_batches(samples, batch or predict.BATCH_SIZE)
    return (images for images, _ in batches if batch is None or len(images) == batch)


def iterate_batches(samples: Iterable[LabeledImage], size: int) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Yields images (n, C, H, W), float32 in [0, 1], with their labels in batches; the last one may be smaller."""
    for chunk in verify.split_batches(samples, size):
        images = np.stack([sample.image.numpy() for sample in chunk])
        yield images.astype(np.float32) / np.float32(255), [sample.label for sample in chunk]


def measure_held_out_top1(content: bytes, data: verify.LabeledImages) -> float:
    """Returns the accuracy of an ONNX file on the held-out images."""
    predictor, right = create_predictor(ONNX_RUNTIME, content), []
    for images, labels in iterate_batches(verify.iterate_samples(data, "val"), verify.BATCH_SIZE):
        right += (predictor(images).argmax(1) == labels).tolist()
    return sum(right) / max(len(right), 1)


class BatchReader(CalibrationDataReader):
    """Passes batches of images to the calibration of ONNX Runtime, one after the other.

    Args:
        batches: Batches of images (n, C, H, W), float32 in [0, 1].
    """

    def __init__(self, batches: Iterator[np.ndarray]):
        self.batches = batches

    def get_next(self) -> dict[str, np.ndarray]:
        """Returns the next batch by the name of the network's input; an empty dict after the last batch."""
        images = next(self.batches, None)
        return {} if images is None else {INPUT: images}


def prepare_model(model: bytes) -> bytes:
    """Returns the content of an ONNX file in the form that the quantization needs.

    Constants are computed, batch norms are folded into convolutions, and the shapes of all tensors are stated.
    """
    with tempfile.TemporaryDirectory() as folder:
        original, prepared = Path(folder) / "original.onnx", Path(folder) / "prepared.onnx"
        original.write_bytes(model)
        quant_pre_process(original, prepared)
        return prepared.read_bytes()


def quantize_model(
    model: bytes, batches: Sequence[np.ndarray], form: str, scales: Mapping[str, qat.Scale] | None = None
) -> bytes:
    """Converts an ONNX file to 8-bit weights, with a scale for each channel, and 8-bit feature maps.

    Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only
    inference", 2018, in the implementation of ONNX Runtime.

    Args:
        model: The content of the ONNX file to quantize, from `prepare_model`.
        batches: Batches of images (n, C, H, W), float32 in [0, 1], with which the ranges of the feature maps are
            measured.
        form: "QOperator", in which each layer is one operator on integers; or "QDQ", in which float operators stand
            between pairs of the operators QuantizeLinear and DequantizeLinear, for other runtimes than ONNX Runtime.
        scales: The learned scales of feature maps, by the names of their tensors, from `qat.fine_tune`. The scales of
            all other feature maps are measured on `batches`.

    Returns:
        The content of the new ONNX file.
    """
    learned = {
        name: [{"scale": np.array(scale.scale, np.float32), "zero_point": np.array(scale.zero_point, np.uint8)}]
        for name, scale in (scales or {}).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        original, quantized = Path(folder) / "original.onnx", Path(folder) / "int8.onnx"
        original.write_bytes(model)
        quantize_static(
            original,
            quantized,
            BatchReader(iter(batches)),
            quant_format=FORMATS[form],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"TensorQuantOverrides": learned},
        )
        return quantized.read_bytes()


def choose_form(
    contents: Mapping[str, bytes], size: tuple[int, int, int], batches: tuple[int, ...], seconds: float
) -> str:
    """Returns the form, "QOperator" or "QDQ", in which ONNX Runtime runs a quantized network faster on this machine.

    Args:
        contents: The content of the network's ONNX file in each form, by the name of the form. If there is only one
            form, it is returned.
        size: The shape (C, H, W) of an image.
        batches: The numbers of images in a call that are timed. If they disagree, the geometric mean of the speedups
            decides.
        seconds: The time for each measurement, in seconds.
    """
    if len(contents) == 1:
        return next(iter(contents))
    timings = predict.time_alternately(file_calls(ONNX_RUNTIME, contents, size, batches), seconds)
    speedups = compute_speedups(timings, (QOPERATOR, ONNX_RUNTIME), (QDQ, ONNX_RUNTIME))
    ratio = statistics.geometric_mean(speedup.value for speedup in speedups.values())
    form, other = (QOPERATOR, QDQ) if ratio > 1 else (QDQ, QOPERATOR)
    say(f"the {form} form of the 8-bit integers is kept, {max(ratio, 1 / ratio):.2f} times as fast as {other}")
    return form


def read_form(content: bytes) -> str:
    """Returns the form of an ONNX file with 8-bit integers: "QOperator" if it has integer operators, or "QDQ"."""
    nodes = onnx.load_from_string(content).graph.node
    return QOPERATOR if any(node.op_type.startswith("QLinear") for node in nodes) else QDQ


def write_epochs(content: bytes, epochs: int) -> bytes:
    """Stores the number of epochs of 8-bit training as a property of an ONNX file, and returns the new content."""
    model = onnx.load_from_string(content)
    onnx.helper.set_model_props(model, {EPOCHS: str(epochs)})
    return model.SerializeToString()


def describe_origin(content: bytes) -> str:
    """Returns a text about an ONNX file with 8-bit integers, such as "QOperator form, fine-tuned for 3 epochs"."""
    properties = {entry.key: entry.value for entry in onnx.load_from_string(content).metadata_props}
    tuned = f", fine-tuned for {count_things(int(properties[EPOCHS]), 'epoch')}" if EPOCHS in properties else ""
    return f"{read_form(content)} form{tuned}"
