"""What a model card says about speed: the student beside the standard network, 8-bit integers, and other runtimes."""

import math
from collections.abc import Iterable, Mapping

from odcheap.export.latency import Speedup, Timings, compute_speedups, describe_disturbance, fastest
from odcheap.export.load_run import RunStudent
from odcheap.export.runtimes import DENSE, EXECUTORCH, INT8, ONNX, ONNX_RUNTIME, OPENVINO, PTE, PTE_INT8
from odcheap.models import flops
from odcheap.utils.text import count_things, format_code

STANDARD, STUDENT = "the standard network", "the student"  # their names in timings


def compare_with_standard(timings: Timings) -> dict[str, dict[int, Speedup]]:
    """Returns how many times as fast the student is as the standard network (the same with standard convolutions).

    Returns:
        A dict of dicts. The inner dict maps the number of images in a call to the speedup. The keys of the outer dict:

        - "student.onnx" and "student-dense.onnx", if they were timed: the speedups of these files in ONNX Runtime;
        - other runtimes, such as "PyTorch", if there the student is slower although it is faster in ONNX Runtime, or
          faster although it is slower in ONNX Runtime.
    """
    reference = STANDARD, ONNX_RUNTIME
    own = compute_speedups(timings, (ONNX, ONNX_RUNTIME), reference)
    compared = {ONNX: own}
    for runtime in sorted({key.runtime for key in timings} - {ONNX_RUNTIME}):
        name = ONNX if runtime == OPENVINO else STUDENT
        compared[runtime] = find_opposites(own, compute_speedups(timings, (name, runtime), (STANDARD, runtime)))
    compared[DENSE] = compute_speedups(timings, (DENSE, ONNX_RUNTIME), reference)
    return {name: speedups for name, speedups in compared.items() if speedups}


def find_opposites(first: Mapping[int, Speedup], second: Mapping[int, Speedup]) -> dict[int, Speedup]:
    """Returns the speedups in `second` that are clearly above 1 while those in `first` are below 1, or the reverse.

    Args:
        first: Speedups in one runtime, by the number of images in a call.
        second: Speedups of the same network in another runtime, in the same form.
    """
    return {
        batch: speedup
        for batch, speedup in second.items()
        if batch in first and speedup.is_resolved and (speedup.value - 1) * (first[batch].value - 1) < 0
    }


def is_standard(run: RunStudent) -> bool:
    """Returns whether the exported student already has standard convolutions only, so that there is no speedup."""
    return str(run.network) == str(run.standard)


def find_disturbance(run: RunStudent, timings: Timings) -> str:
    """Returns why the student's speedups are too uncertain for the card, as text; empty if they are certain enough."""
    compared = {} if is_standard(run) else compare_with_standard(timings)
    return describe_disturbance([speedup for part in compared.values() for speedup in part.values()], timings)


def describe_speed(run: RunStudent, timings: Timings) -> list[str]:
    """Returns lines of Markdown that compare the student with the standard network in ONNX Runtime.

    The text is bold if the student is slower. A runtime in which the opposite is true is named, too. If the times are
    too uncertain, the lines say why, and compare numbers of multiply-accumulates in place of times.
    """
    if is_standard(run):
        return ["This is the standard network itself."]
    if reason := find_disturbance(run, timings):
        return describe_unmeasured_speed(run, reason)
    compared = compare_with_standard(timings)
    own, dense = compared.pop(ONNX), compared.pop(DENSE, None)
    opening = "Compared with the standard network of the same architecture,"
    if min(speedup.value for speedup in own.values()) < 1:
        opening = "**Not faster than the standard network here**:"
    text = f"{opening} in ONNX Runtime on this CPU the student {format_speedups(own)}"
    for runtime, opposite in compared.items():
        place = runtime if "GPU" in runtime else f"{runtime} on this CPU"
        text += f". **In {place} it is the opposite**: it {format_speedups(opposite)}"
    rounds = max(len(timing.rounds) for timing in timings.values())
    text += f" (ranges: quartiles of {rounds} rounds)." if rounds > 1 else "."
    return [text] + ([f"{format_code(DENSE)}, which computes the same, {format_speedups(dense)}."] if dense else [])


def describe_unmeasured_speed(run: RunStudent, reason: str) -> list[str]:
    """Returns lines that say why there is no speedup, how many multiply-accumulates there are, and what to do.

    Args:
        run: The exported student.
        reason: Why no speedup could be measured, as part of a sentence, from `describe_disturbance`.
    """
    standard, student = (flops.count_macs(network, run.image_size) for network in (run.standard, run.network))
    ratio = f"{standard / student:.1f} times fewer" if student <= standard else f"{student / standard:.1f} times more"
    again = "`odcheap export JOB_DIR --overwrite`" if run.job_dir else "`export_student` with `overwrite=True`"
    return [
        f"**The speed could not be measured**: {reason}.",
        f"The student needs {ratio} multiply-accumulates than the standard network ({student / 1e6:.2f} M and "
        f"{standard / 1e6:.2f} M), but fewer do not always take less time.",
        f"On a quiet machine, {again} measures the speed, and `python predict.py --bench` the times of the files here.",
    ]


def describe_further_speeds(timings: Timings) -> list[str]:
    """Returns lines of Markdown about the speed of 8-bit integers, and in OpenVINO and ExecuTorch.

    The list is empty if the machine was too busy for exact times, which another part of the card then says.
    """
    if describe_disturbance((), timings):
        return []
    # Pairs of a network and what it is compared with, each with its runtime.
    pairs = [((INT8, runtime), (ONNX, runtime)) for runtime in (ONNX_RUNTIME, OPENVINO)]
    pairs += [((ONNX, OPENVINO), (ONNX, ONNX_RUNTIME))]
    pairs += [((name, EXECUTORCH), (other, EXECUTORCH)) for name, other in ((PTE, STANDARD), (PTE_INT8, PTE))]
    lines = []
    for network, other in pairs:
        speedups = compute_speedups(timings, network, other)
        if not speedups:
            continue
        this, that = f"{format_name(network[0])} in {network[1]}", other[1]
        if network[1] == other[1]:
            that = format_name(other[0])
        if reason := describe_disturbance(speedups.values(), timings):
            lines.append(f"**The speed of {this} could not be measured**: {reason}.")
        elif any(speedup.high < 1 for speedup in speedups.values()):
            lines.append(f"**Slower than {that} here**: {this} {format_speedups(speedups)}.")
        else:
            lines.append(f"Compared with {that} on this CPU, {this} {format_speedups(speedups)}.")
    return lines + describe_executorch_times(timings)


def describe_executorch_times(timings: Timings) -> list[str]:
    """Returns a line of Markdown with the times of a call in ExecuTorch and ONNX Runtime; none without ExecuTorch."""
    batches = {key.name: key.batch for key in timings if key.runtime == EXECUTORCH}
    if not batches:
        return []
    networks = [(name, EXECUTORCH) for name in (STANDARD, PTE, PTE_INT8) if name in batches] + [(ONNX, ONNX_RUNTIME)]
    times = [
        f"{1000 * fastest(timings, name, runtime, batches[PTE]).p50:.3g} ms for {format_name(name)}"
        for name, runtime in networks
    ]
    images = count_things(batches[PTE], "image")
    note = f"Times of {images} in ExecuTorch, with the number of threads that it takes by itself"
    return [f"{note}: {', '.join(times)} in ONNX Runtime."]


def format_name(name: str) -> str:
    """Returns the name of a file as code in Markdown; "the standard network" is returned unchanged."""
    return name if name == STANDARD else format_code(name)


def format_speedups(speedups: Mapping[int, Speedup]) -> str:
    """Returns speedups, by the number of images, as text: "is 2.9 (2.8 to 3.0) times as fast with 1 image"."""
    return " and ".join(
        f"{format_speedup(speedup)} with {count_things(batch, 'image')}" for batch, speedup in speedups.items()
    )


def format_speedup(speedup: Speedup) -> str:
    """Returns a text about a speedup and its quartiles, with only those digits that the quartiles leave certain.

    Example:
        >>> format_speedup(Speedup(2.884, 2.81, 2.97))
        'is 2.9 (2.8 to 3.0) times as fast'
        >>> format_speedup(Speedup(0.26, 0.25, 0.27))
        'takes 3.8 (3.7 to 4.0) times as long'
        >>> format_speedup(Speedup(7.28, 4.2, 20.65))
        'is 7 (4 to 21) times as fast'
        >>> format_speedup(Speedup(1.02, 0.94, 1.1))
        'is neither clearly faster nor slower (0.9 to 1.1 times as fast)'
    """
    if not speedup.is_resolved:
        low, high = round_to_known(speedup.low, speedup.high, (speedup.low, speedup.high))
        return f"is neither clearly faster nor slower ({low} to {high} times as fast)"
    if speedup.value < 1:
        speedup = Speedup(1 / speedup.value, 1 / speedup.high, 1 / speedup.low)
        words = "takes {} ({} to {}) times as long"
    else:
        words = "is {} ({} to {}) times as fast"
    return words.format(*round_to_known(speedup.low, speedup.high, speedup))


def round_to_known(low: float, high: float, values: Iterable[float]) -> list[str]:
    """Returns values as text, rounded to the first digit that changes between `low` and `high`.

    `low` keeps one digit at least, and no value has more than two decimals.

    Args:
        low: The lower end of the range of the measured values.
        high: The upper end of this range.
        values: The values to write, such as the median and the two ends of the range.
    """
    width = max(high - low, 0.01 * low)
    step = min(math.floor(math.log10(width)), math.floor(math.log10(low)))
    return [f"{round(value, max(0, min(2, -step))) + 0.0:.{max(0, min(2, -step))}f}" for value in values]
