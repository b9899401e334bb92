"""Lines that a run prints before its training."""

from types import SimpleNamespace

import numpy as np
import pytest

from odcheap.training.experiment import describe_few_images


def data(train, val, limit=None):
    labels = {"train": np.array(train, dtype=int), "val": np.array(val, dtype=int), "test": np.array([0])}
    return SimpleNamespace(labels=labels, classes=["a", "b", "c"], limit=limit)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (data([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2]), ""),
        (data([0, 0, 1, 1, 2, 2], []), ""),  # nothing is held out
        (
            data([0, 0, 0, 1], [0, 0, 1, 1, 2, 2], 4),
            "warning: 2 of 3 classes have fewer than 2 training images (data.limit=4); their accuracies say little",
        ),
        (
            data([0, 0, 1, 1, 2], [0, 1, 2]),
            "warning: 1 of 3 classes have fewer than 2 training images, and 3 of 3 classes have fewer than 2 held-out "
            "images; their accuracies say little",
        ),
    ],
    ids=["enough", "no held-out", "limit", "both"],
)
def test_classes_with_fewer_than_two_images_are_named_in_one_line(given, line):
    assert describe_few_images(given) == line
