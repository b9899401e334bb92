import io
import time

import numpy as np
import pytest
from PIL import Image

from odcheap.utils.confusion_plot import MIN_POINTS, WIDTH, plot_confusion, render_png


def draw(size, name="class {}", title=""):
    counts = np.random.default_rng(0).integers(0, 9, (size, size)) + 90 * np.eye(size, dtype=int)
    return plot_confusion(counts, [name.format(k) for k in range(size)], title), counts


@pytest.mark.parametrize("size", [2, 3, 10, 20, 37, 100, 1000])
def test_every_text_can_be_read_and_is_inside_of_a_column(size):
    figure, _ = draw(size, title="student 1 of epoch 5")
    start = time.perf_counter()
    with Image.open(io.BytesIO(render_png(figure, dpi=100))) as image:
        assert image.width == pytest.approx(100 * WIDTH, abs=1)
    assert time.perf_counter() - start < 30
    axes = figure.axes[0]
    texts = [*axes.get_xticklabels(), *axes.get_yticklabels(), *axes.texts, axes.xaxis.label, axes.yaxis.label]
    assert min(text.get_fontsize() for text in texts) >= MIN_POINTS
    for labels, side in ((axes.get_xticklabels(), "width"), (axes.get_yticklabels(), "height")):
        boxes = [label.get_window_extent() for label in labels]
        start = "x0" if side == "width" else "y0"
        places = sorted(getattr(box, start) for box in boxes)
        gaps = np.diff(places)
        assert (gaps > 0.8 * labels[0].get_fontsize() * 100 / 72).all(), "names of classes cover each other"
        assert all(box.x0 >= 0 and box.x1 <= 100 * WIDTH for box in boxes)


def test_cells_have_their_counts_while_these_can_be_read():
    figure, counts = draw(10)
    assert [text.get_text() for text in figure.axes[0].texts] == [str(count) for count in counts.flat]
    assert not draw(100)[0].axes[0].texts


def test_colors_are_shares_of_the_true_class_and_a_class_without_images_has_none():
    shares = plot_confusion([[3, 1], [0, 0]], ["cat", "dog"]).axes[0].images[0].get_array()
    assert shares[0].tolist() == [0.75, 0.25]
    assert shares.mask[1].all()


def test_classes_that_are_left_unnamed_are_announced():
    axes = draw(100)[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["class 0", "class 5"]
    assert "every 5th class is named" in axes.get_ylabel()
    assert "named" not in draw(20)[0].axes[0].get_ylabel()


def test_names_of_other_people_are_one_short_line_and_no_formula():
    figure = plot_confusion([[1, 0], [0, 1]], ["$x^2$", "two\nlines" + "x" * 100_000], "$title$")
    assert render_png(figure, dpi=50)
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["$x^2$", r"two\nlinesxxxxxxx…"]
    assert not any(text.get_parse_math() for text in [*axes.get_yticklabels(), axes.title])


def test_counts_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="K x K for K classes"):
        plot_confusion([[1, 2]], ["a", "b"])
