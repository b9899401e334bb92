"""The content of an export's `results.json`: what the model card says about accuracy and size, for programs."""

from typing import Any

from odcheap.export.card_accuracy import compute_figures
from odcheap.export.load_run import RunStudent
from odcheap.export.model_card import name_network
from odcheap.export.verify import Verification
from odcheap.models import flops
from odcheap.utils.text import hide_folders

RESULTS_FILE = "results.json"
FIGURES = ("images", "correct", "top1", "top1_interval", "balanced_accuracy")


def describe_results(run: RunStudent, verification: Verification) -> dict[str, Any]:
    """Returns the accuracy and the size of an exported student.

    Args:
        run: The exported student.
        verification: The results of the checks.

    Returns:
        A dict with these entries. Accuracies are fractions.

        - `network`: its block type, backbone and options such as depth.
        - `data`: the name of the data set of its training; None if it is not known.
        - `test`: the student's figures on the test images: the number of `images`, how many of them are `correct`, the
          accuracy `top1` with its 95 % interval `top1_interval`, and the mean recall of the classes
          `balanced_accuracy`; None if they are not known.
        - `verified_on_data`: whether the export measured the figures in `test`; otherwise they are those of the run's
          summary.
        - `top1`: the accuracy of each exported file on the test images, by its name; empty without labeled test images.
        - `params`, `macs`: the numbers of parameters and of multiply-accumulates.
    """
    figures, data = compute_figures(run, verification), (run.summary or {}).get("data")
    return {
        "network": name_network(run),
        "data": None if data is None else hide_folders(data),
        "test": None if figures is None else {name: figures[name] for name in FIGURES},
        "verified_on_data": verification.on_data,
        "top1": {name: top1 for name, top1 in verification.top1.items() if top1 is not None},
        "params": flops.count_params(run.network),
        "macs": flops.count_macs(run.network, run.image_size),
    }
