"""How many times as fast a student is as the standard network: the ratio, and what is known of it."""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from odcheap.export.latency import Timings, fastest
from odcheap.predict import Timing

# The speedup is not stated if the quartiles of the rounds' ratios differ by a larger factor than this one, or if the
# calls with one thread ran in a smaller fraction of the time: other programs used the cores then.
MAX_SPREAD = 1.25
MIN_RUNNING = 0.75


class Speedup(NamedTuple):
    """The time of the standard network divided by the time of a student.

    Attributes:
        value: The median of the ratios of all rounds.
        low, high: The quartiles of these ratios.
    """

    value: float
    low: float
    high: float

    @property
    def is_resolved(self) -> bool:
        """Whether both quartiles agree on which network is faster."""
        return self.low > 1 or self.high < 1


def compare_timings(standard: Timing, student: Timing) -> Speedup:
    """Returns how many times as fast a student is as the standard network, from ratios of each round of a measurement.

    Args:
        standard: The times of the standard network.
        student: The times of the student, in the same rounds.
    """
    pairs = list(zip(standard.rounds, student.rounds, strict=True)) or [(standard.p50, student.p50)]
    ratios = [ours / theirs for ours, theirs in pairs]
    # Quartiles and not extremes: in one of many rounds another program may have used the cores.
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
    return Speedup(median, low, high)


def compute_speedups(timings: Timings, name: str, standard: str, runtime: str) -> dict[int, Speedup]:
    """Returns the speedups of a network or file by the number of images; empty if it was not timed in the runtime.

    Args:
        timings: The times of both networks.
        name: The name of the network or file.
        standard: The name of the standard network.
        runtime: The runtime, such as "ONNX Runtime".
    """
    batches = sorted({key.batch for key in timings if (key.name, key.runtime) == (name, runtime)})
    return {
        batch: compare_timings(fastest(timings, standard, runtime, batch), fastest(timings, name, runtime, batch))
        for batch in batches
    }


def format_speedup(speedup: Speedup) -> str:
    """Describes a speedup with the quartiles of its rounds, rounded to what the range leaves known.

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
    """Returns values as text with the digits that a range leaves known: one more than those that change in it.

    The smallest value keeps one digit at least, and no value has more than two decimals.

    Args:
        low: The lower end of the range.
        high: The upper end.
        values: The values to write.
    """
    width = max(high - low, 0.01 * low)
    step = min(math.floor(math.log10(width)), math.floor(math.log10(low)))
    return [f"{round(value, max(0, min(2, -step))) + 0.0:.{max(0, min(2, -step))}f}" for value in values]


def describe_disturbance(speedups: Iterable[Speedup], timings: Timings) -> str:
    """Returns why speedups are too uncertain to be stated, as part of a sentence; empty if nothing is wrong.

    Args:
        speedups: The speedups.
        timings: All times that were measured with them.
    """
    # The system's load is no measure of this: it is a mean over a minute in which this program itself was busy.
    known = [t.running for key, t in timings.items() if key.threads == 1 and not math.isnan(t.running)]
    running, reasons = statistics.mean(known or [1.0]), []
    if running < MIN_RUNNING:
        waited = f"{100 * (1 - running):.0f} % of the time"
        reasons.append(f"the machine was busy (the calls waited for other programs for {waited})")
    if any(speedup.high > MAX_SPREAD * speedup.low for speedup in speedups):
        reasons.append("the rounds of the measurement disagree")
    return ", and ".join(reasons)


def find_opposites(first: Mapping[int, Speedup], second: Mapping[int, Speedup]) -> dict[int, Speedup]:
    """Returns the entries of `second` in which another network is faster than in `first`.

    Args:
        first: Speedups by the number of images in a call; see `compute_speedups`.
        second: The same in another runtime.
    """
    return {
        batch: speedup
        for batch, speedup in second.items()
        if batch in first and speedup.is_resolved and (speedup.value - 1) * (first[batch].value - 1) < 0
    }
