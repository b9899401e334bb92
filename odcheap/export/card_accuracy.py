"""What a model card says about the accuracy of the student and of its classes, and about its training images."""

from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from odcheap import predict
from odcheap.export.load_run import RunStudent
from odcheap.export.runtimes import INT8, ONNX
from odcheap.export.verify import Verification
from odcheap.utils.text import MISSING, escape_markdown, format_accuracy, format_code, format_count

MAX_ROWS = 50  # classes in a table; of more classes, those with the lowest recall are shown
MAX_NAMES = 10  # of classes in a sentence
FEW_IMAGES = 30  # of a class, for which its recall is known roughly only
MAX_P_VALUE = 0.05  # below which a difference counts as resolved
PARTS = {"train": "images for the training", "val": "held out", "test": "test images"}
SELECTED_ON = {
    "val": "on held-out images",
    "last": "by no images: it is student 0 after the last epoch",
    "test": "**on the test images**, so that the test accuracy is too high an estimate",
}

Figures = dict[str, Any] | None  # see `compute_figures`


def to_markdown(table: pd.DataFrame) -> str:
    """Returns a table in Markdown, without its index; cells are written as they are."""
    return table.to_markdown(index=False, tablefmt="github", disable_numparse=True)


def compute_figures(run: RunStudent, verification: Verification) -> Figures:
    """Returns the student's accuracies on the test images.

    They are those that the export has measured. If it had no test images, they are those in the run's summary.

    Args:
        run: The exported student.
        verification: The results of the checks of the export.

    Returns:
        A dict as `predict.summarize_confusion` returns it, with keys such as `images`, `correct`, `top1` and `classes`.
        The entry `predicted` of each class is None if the figures come from the summary. None in place of the dict if
        neither the checks nor the summary have the figures.
    """
    classes = run.settings["classes"]
    if verification.confusion is not None:
        return predict.summarize_confusion(verification.confusion, classes)
    by_class = (run.summary or {}).get("classes") or {}
    of_class = [(by_class.get(name) or {}).get("test") or 0 for name in classes]
    recalls = [(run.recall or {}).get(name) for name in classes]
    if verification.on_data or not sum(of_class) or all(recall is None for recall in recalls):
        return None
    right = [round((recall or 0) * count) for recall, count in zip(recalls, of_class, strict=True)]
    figures = predict.summarize_counts(of_class, right, classes)
    for entry in figures["classes"].values():
        entry["predicted"] = None
    return figures


def describe_accuracy(run: RunStudent, verification: Verification, figures: Figures) -> list[str]:
    """Returns lines of Markdown with the test accuracy, its origin, its interval, and what guessing would give.

    Args:
        run: The exported student.
        verification: The results of the checks of the export.
        figures: What `compute_figures` has returned for these two arguments.
    """
    lines, interval = [], ""
    if run.job_dir is not None and run.summary is None:
        lines.append("**The run has not finished**: a later epoch may be better.")
    if figures is not None:
        interval = " (95 % interval {} to {})".format(*map(format_accuracy, figures["top1_interval"]))
    by_summary = f"{format_accuracy(run.test_top1)} % by the run's summary"
    if verification.on_data:
        precision = escape_markdown(run.config.get("trainer", {}).get("precision"))
        own = f"; {by_summary}, in {precision}" if run.test_top1 is not None else ""
        top1 = format_accuracy(verification.top1[ONNX])
        lines.append(f"Test accuracy {top1} %{interval} on {verification.images:,} images{own}.")
    elif run.test_top1 is not None:
        lines.append(f"Test accuracy {by_summary}{interval}; **not verified on data** here.")
    else:
        lines.append("**Not verified on data**: no test accuracy is known.")
    if figures is not None:
        lines += [describe_guessing(figures), *describe_failing_classes(figures)]
    for name, changes in sorted(verification.changes.items()):
        where = "" if name == INT8 else f" ({format_code(name)})"
        change = describe_change(*changes, verification.images)
        lines.append(f"In 8-bit integers{where} {format_accuracy(verification.top1[name])} %: {change}.")
    return lines


def describe_change(gained: int, lost: int, images: int) -> str:
    """Returns a text that compares the correct predictions of two networks, with an exact sign test.

    Args:
        gained: The number of images that only the new network, such as that with 8-bit integers, classifies correctly.
        lost: The number of images that only the old network classifies correctly.
        images: The number of all images.
    """
    if not gained and not lost:
        return "the same images are classified correctly"
    more = gained - lost
    text = f"{abs(more):,} of {images:,} images {'more' if more > 0 else 'fewer'}" if more else "as many images"
    text += f" {'is' if abs(more) == 1 else 'are'} classified correctly ({gained:,} gained, {lost:,} lost)"
    p_value = binomtest(gained, gained + lost).pvalue  # for paired answers this is McNemar's exact test
    verdict = "a difference that is resolved" if p_value < MAX_P_VALUE else "a difference that is **not resolved**"
    digits = f"p = {p_value:.2f}" if p_value >= 0.01 else "p < 0.01"
    return f"{text}, {verdict} (exact sign test, {digits})"


def describe_guessing(figures: dict[str, Any]) -> str:
    """Returns a sentence that compares the accuracy in `compute_figures` with always predicting the largest class."""
    largest, low = figures["largest_class"], figures["top1_interval"][0]
    line = f"Always answering {format_code(largest['name'])} would give {format_accuracy(largest['share'])} % "
    line += "on the test images, no other class more"
    if figures["top1"] <= largest["share"]:
        return f"{line}: **the student is not better than that**."
    if low <= largest["share"]:
        return f"{line}: **so few test images do not show that the student is better**."
    balanced = format_accuracy(figures["balanced_accuracy"])
    return f"{line}; the balanced accuracy (mean recall of the classes) is {balanced} %."


def describe_failing_classes(figures: dict[str, Any]) -> list[str]:
    """Returns sentences about classes that fail; an empty list if none does.

    They say if all images are classified as one class, and which classes are never recognized or have no test images.

    Args:
        figures: The accuracies, as `compute_figures` returns them.
    """
    tested = {name: entry for name, entry in figures["classes"].items() if entry["images"]}
    answers = [name for name, entry in figures["classes"].items() if entry["predicted"]]
    never = [name for name, entry in tested.items() if not entry["correct"]]
    untested = [name for name in figures["classes"] if name not in tested]
    lines = [f"**Every test image was classified as {format_code(answers[0])}.**"] if len(answers) == 1 else []
    if never:
        which = f"{len(never)} of the {len(tested)} classes"
        lines.append(f"**No test image of {which} is recognized**: {list_classes(never)}.")
    if untested:
        lines.append(f"Classes without test images: {list_classes(untested)}.")
    return lines


def list_classes(names: list[str]) -> str:
    """Returns the names of classes as code in Markdown, joined by commas; of more than ten, the first ten and "..."."""
    return ", ".join([format_code(name) for name in names[:MAX_NAMES]] + ["..."] * (len(names) > MAX_NAMES))


def tabulate_classes(run: RunStudent, verification: Verification, figures: Figures) -> list[str]:
    """Returns lines of Markdown with a table of the classes: images, recall, and the most frequent wrong prediction.

    Args:
        run: The exported student.
        verification: The results of the checks of the export.
        figures: What `compute_figures` has returned for these two arguments.
    """
    names, by_class, lines = run.settings["classes"], (run.summary or {}).get("classes"), []
    table = pd.DataFrame({"class": [format_code(name) for name in names]})
    if by_class:
        for part, title in (("train", "training images"), ("val", "held out")):
            table[title] = [format_count((by_class.get(name) or {}).get(part)) for name in names]
    if figures is not None:
        entries = [figures["classes"][name] for name in names]
        intervals = [map(format_accuracy, entry["recall_interval"] or ()) for entry in entries]
        table["test images"] = [format_count(entry["images"]) for entry in entries]
        table["recall, %"] = [format_accuracy(entry["recall"]) for entry in entries]
        table["95 % interval"] = [" to ".join(limits) or MISSING for limits in intervals]
        if verification.confusion is not None:
            wrong = verification.confusion * (1 - np.eye(len(names), dtype=int))
            most = [(names[other], wrong[k, other]) for k, other in enumerate(wrong.argmax(1))]
            table["times predicted"] = [format_count(entry["predicted"]) for entry in entries]
            table["most often taken for"] = [f"{format_code(name)} ({n:,})" if n else "" for name, n in most]
    if len(names) > MAX_ROWS:
        which = "that come first"
        if figures is not None:
            recalls = pd.Series([entry["recall"] for entry in entries], dtype=float)
            which, table = "with the lowest recall", table.loc[recalls.sort_values(kind="stable").index]
        table = table[:MAX_ROWS]
        lines = [f"These are the {MAX_ROWS} of {len(names):,} classes {which}; `labels.json` has all names.", ""]
    return [*lines, to_markdown(table)]


def describe_training_data(run: RunStudent) -> list[str]:
    """Returns lines of Markdown that say on which images the student was trained and selected."""
    summary = run.summary or {}
    images = summary.get("images") or {}
    if run.job_dir is None:
        return ["The export was made in Python, and does not know on which images the network was trained."]
    if not images:
        return ["The run has not finished, or it is of an earlier version: the numbers of its images are not known."]
    counts = [f"{images[part]:,} {words}" for part, words in PARTS.items() if part in images]
    lines = [f"- Data set {format_code(summary.get('data'))}: {', '.join(counts)}."]
    chosen = (summary.get("selected") or {}).get("selected_on")
    if chosen in SELECTED_ON:
        lines.append(f"- Student and epoch were selected {SELECTED_ON[chosen]}.")
    if unreadable := summary.get("unreadable"):
        lines.append(f"- {len(unreadable):,} images could not be read and were left out.")
    lines.append(f"- The hash of the images and of which are held out is {format_code(run.settings['split'])}.")
    return lines


def describe_rare_classes(figures: Figures) -> str:
    """Returns a line of Markdown that names the classes with few test images; an empty text if there are none."""
    entries = {} if figures is None else figures["classes"]
    few = [name for name, entry in entries.items() if entry["images"] < FEW_IMAGES]
    known = f"there are fewer than {FEW_IMAGES} test images, so their recall is known roughly only"
    return f"- Of these classes {known}: {list_classes(few)}.\n" if few else ""
