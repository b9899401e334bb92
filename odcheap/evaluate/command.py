"""Measures the accuracy of a student on other images of known classes; `arguments` has the help of the command."""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from odcheap import __version__, predict
from odcheap.config.messages import hide_library_warnings
from odcheap.evaluate.arguments import parse_arguments
from odcheap.evaluate.inputs import MODEL_OPTION, EvaluatedImages, Model, list_images, load_model, to_bytes
from odcheap.runs.training_images import find_known_images, hash_file_contents, hash_image
from odcheap.utils.confusion_plot import plot_confusion, render_png
from odcheap.utils.console import keep_going_without_output, print_error, say, show_progress
from odcheap.utils.errors import Failure, OptionError, describe_external_failure
from odcheap.utils.files import read_json, write_atomic, write_csv, write_json
from odcheap.utils.text import hide_folders

RESULT, TABLE, PICTURE = "evaluation.json", "confusion.csv", "confusion.png"
MARK = "odcheap_evaluation"  # the entry of `evaluation.json` by which it is known
MAX_NAMED = 3  # training images that a line names; the file names all


def main(arguments: Sequence[str] | None = None, prog: str = "odcheap evaluate") -> int:
    """Runs `odcheap evaluate`.

    Args:
        arguments: The command-line arguments; None for those of this process.
        prog: The name of the command in its help.

    Returns:
        The exit status: 0, or 1 after an error, which includes an image that could not be read.
    """
    options = parse_arguments(arguments, prog)
    hide_library_warnings()
    try:
        with keep_going_without_output():
            return evaluate(options)
    except (Failure, predict.PredictError) as error:
        return print_error(str(error))
    except (OSError, MemoryError, RuntimeError) as error:
        line = describe_external_failure(error)
        if line is None and not isinstance(error, OSError):
            raise
        return print_error(line or str(error))


def evaluate(options: argparse.Namespace) -> int:
    """Classifies the images that the user has named, prints the result, writes its files, and returns the exit status.

    Args:
        options: The parsed arguments of the command.

    Raises:
        OptionError: An argument is wrong.
        Failure: No image can be classified.
    """
    # The model, the images and the folder are checked before anything is computed.
    if not options.model.is_dir():
        raise OptionError(MODEL_OPTION, options.model, "no such folder")
    model = load_model(options)
    images = list_images(options, model.classes)
    out = prepare_folder(options)
    say(f"{options.model}: {model.title}")
    say(f"{images.title}: {len(images.names):,} images")
    for line in images.remarks:
        say(line)

    predicted, failures, hashes = predict_all(model, images)
    for line in failures:
        print_error(line)
    if len(failures) == len(images.names):
        raise Failure(f"{images.title}: none of its {len(images.names):,} images can be classified")
    if failures:
        say(predict.describe_read(len(images.names), len(failures)))
    content: dict[str, Any] = {MARK: __version__, "inputs": describe_inputs(options), "student": model.title}
    content |= summarize(model, images, predicted, hashes) | {"unreadable": failures, "left_out": images.remarks}

    # Print the result, then write its files; the file with all metrics comes last.
    counts = predict.count_confusion(images.target, predicted, len(model.classes))
    predict.print_evaluation(counts, content)
    say("")
    for line in describe_training_images(model, content):
        say(line)
    if model.test_top1 is not None:
        say(f"on the run's own test images its top-1 is {100 * model.test_top1:.2f} %")
    write_csv(out / TABLE, predict.tabulate_confusion(counts, model.classes))
    title = f"{hide_folders(images.title)}: top-1 {100 * content['top1']:.2f} %"
    picture = render_png(plot_confusion(counts, model.classes, title))
    write_atomic(out / PICTURE, lambda file: file.write(picture))
    write_json(out / RESULT, content)
    say(f"written: {out / RESULT}, {TABLE}, {PICTURE}")
    return int(bool(failures))


def predict_all(model: Model, images: EvaluatedImages) -> tuple[list[int], list[str], list[set[bytes]] | None]:
    """Classifies images, and computes the hashes by which a run's training images are recognized.

    Args:
        model: The model that classifies.
        images: The images to classify.

    Returns:
        A tuple of three lists: the predicted label of each image, -1 if it could not be classified; a line of text
        about each image that could not be classified; and a set of hashes for each image. The third element is None if
        the images cannot be compared with the run's training images.
    """
    digests = model.digests
    pixel_hashes: list[set[bytes]] = []

    def iterate() -> Iterator[tuple[str, np.ndarray | predict.ImageError]]:
        prepared = images.iterate_prepared(model.preprocess)
        for name, image in show_progress(prepared, len(images.names), "classified"):
            if digests is not None and digests.kind == "pixels":
                is_read = isinstance(image, np.ndarray)
                pixel_hashes.append(hash_image(to_bytes(image), digests.key) if is_read else set())
            yield name, image

    # Hashes of pixels are computed while the images are classified, those of files afterwards.
    results = predict.predict_images(model.predictor, iterate(), model.preprocess)
    predicted, failures = predict.collect_predictions(results)
    if digests is not None and digests.kind == "pixels":
        return predicted, failures, pixel_hashes
    if digests is None or images.files is None:
        return predicted, failures, None
    read = [k for k, label in enumerate(predicted) if label != predict.NOT_PREDICTED]
    contents = dict(zip(read, hash_file_contents([images.files[k] for k in read], digests.key), strict=True))
    return predicted, failures, [contents.get(k, set()) for k in range(len(predicted))]


def summarize(
    model: Model, images: EvaluatedImages, predicted: list[int], hashes: list[set[bytes]] | None
) -> dict[str, Any]:
    """Returns the metrics of all images, and of those images that the run used neither to train nor to select.

    Args:
        model: The model that has classified the images.
        images: The classified images.
        predicted: The predicted label of each image, -1 if it could not be classified.
        hashes: The hashes of each image, as `predict_all` returns them, or None.

    Returns:
        A dict with the entries of `predict.summarize_confusion` for all images, and three more:

        - `trained_on`: the names of the images that were training images of the run;
        - `selected_on`: the names of the images that were held-out images of the run;
        - `unused`: a dict with `images`, `correct`, `top1` and `top1_interval` of all other images. It is None if the
          run used none of the images, or if no other image was classified.

        All three are None if `hashes` is None.
    """
    count = len(model.classes)
    content = predict.summarize_confusion(predict.count_confusion(images.target, predicted, count), model.classes)
    content |= {"trained_on": None, "selected_on": None, "unused": None}
    if hashes is None or model.digests is None:
        return content
    # Images that the run has used say too much about it: the metrics of all other images are computed, too.
    trained, held_out = find_known_images(model.digests, hashes)
    content |= {"trained_on": [images.names[k] for k in trained], "selected_on": [images.names[k] for k in held_out]}
    used = {*trained, *held_out}
    rest = [k for k in range(len(predicted)) if k not in used]
    unused = predict.count_confusion([images.target[k] for k in rest], [predicted[k] for k in rest], count)
    if used and unused.any():
        figures = predict.summarize_confusion(unused, model.classes)
        content["unused"] = {name: figures[name] for name in ("images", "correct", "top1", "top1_interval")}
    return content


def describe_training_images(model: Model, content: dict[str, Any]) -> list[str]:
    """Returns lines of text that name evaluated images that the run has used, and give the accuracy on all others.

    Args:
        model: The model that was evaluated.
        content: The dict that `summarize` returned; it may have further entries.
    """
    trained, held_out = content["trained_on"], content["selected_on"]
    if trained is None:
        return [model.reason] if model.digests is None else ["these images cannot be compared with the training images"]
    if not trained and not held_out:
        is_pixels = model.digests is not None and model.digests.kind == "pixels"
        what = "images has exactly the pixels of" if is_pixels else "files is byte for byte"
        line = f"none of these {what} a training image or a held-out image of the run"
        return [f"{line}; re-saved or resized copies are not found"]
    # Warn about images that the run has used, then state the accuracy on the others.
    lines = []
    for names, what in ((trained, "was trained on"), (held_out, "has selected its student and epoch on")):
        if names:
            named = ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")
            lines.append(f"warning: the run {what} {len(names):,} of these images: {named}")
    unused = content["unused"]
    if unused is None:
        return [*lines, "no other images are there, so this is no estimate of the accuracy on new images"]
    low, high = unused["top1_interval"]
    interval = f"95 % interval {100 * low:.2f} to {100 * high:.2f}"
    others = f"on the other {unused['images']:,} images"
    return [*lines, f"{others} top-1 is {100 * unused['top1']:.2f} % ({interval}), which counts for new images"]


def describe_inputs(options: argparse.Namespace) -> dict[str, str | None]:
    """Returns what is evaluated, for `evaluation.json`; only a file with the same inputs is overwritten later.

    Args:
        options: The parsed arguments of the command.

    Returns:
        A dict with three entries: `model` is the folder of the run or export, `file` is the name of the ONNX file or
        None for a run, and `images` is the folder of the images or the name of the data set.
    """
    onnx_file = "student.onnx" if predict.is_export(options.model) else None
    return {
        "model": os.path.realpath(options.model),
        "file": options.file or onnx_file,
        "images": os.path.realpath(options.images) if os.path.isdir(options.images) else options.images,
    }


def default_folder(options: argparse.Namespace) -> Path:
    """Returns the default folder of the result, which is in the folder of a run or beside the folder of an export.

    Args:
        options: The parsed arguments of the command.
    """
    *_, above, name = ["", "root", *Path(os.path.realpath(options.images)).parts[1:]]
    name = f"{above}-{name}" if name in predict.PART_FOLDERS else name  # `photos-test` for photos/test
    # Nothing is written into an export, whose model card lists all its files.
    folder = Path(os.path.realpath(options.model))
    is_export = predict.is_export(options.model)
    return (folder.with_name(f"{folder.name}-evaluation") if is_export else options.model / "evaluation") / name


def prepare_folder(options: argparse.Namespace) -> Path:
    """Makes the folder for the result of the evaluation, and returns it.

    Args:
        options: The parsed arguments of the command.

    Raises:
        OptionError: The folder cannot be made, or a file of the result is there already and is not from an evaluation
            of the same model on the same images.
    """
    folder = options.out or default_folder(options)
    if options.out is None and (folder.is_symlink() or folder.parent.is_symlink()):
        raise OptionError("--out", folder, "is a link to elsewhere: name the folder to write with --out")
    # Only the result of the same evaluation is replaced.
    there = [name for name in (RESULT, TABLE, PICTURE) if os.path.lexists(folder / name)]
    if there:
        inputs = read_inputs(folder / RESULT)
        if inputs is None or any((folder / name).is_dir() for name in there):
            allowed = f"holds a {there[0]} that no evaluation has written: name another folder"
            raise OptionError("--out", folder, allowed)
        if inputs != describe_inputs(options):
            raise OptionError("--out", folder, "holds the evaluation of another model or other images: name another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError("--out", folder, f"cannot be written ({error.strerror})") from error
    return folder


def read_inputs(path: Path) -> Any:
    """Reads the entry `inputs` of an `evaluation.json`; returns None if no evaluation has written such a file."""
    if path.is_symlink() or not path.is_file():
        return None
    try:
        content = read_json(path, "--out")
    except OptionError:
        return None
    return content.get("inputs") if isinstance(content, dict) and MARK in content else None
