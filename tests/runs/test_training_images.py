import json

import numpy as np
import pytest

from odcheap.data.base import ImageDigests
from odcheap.runs.training_images import find_known_images, hash_file_contents, hash_image, read_digests, write_digests
from odcheap.utils.errors import OptionError


def test_a_list_comes_back_as_it_was_written(tmp_path):
    digests = ImageDigests("files", 3, bytes(range(16)), b"")
    write_digests(tmp_path, digests)
    assert read_digests(tmp_path, "RUN") == digests
    assert read_digests(tmp_path / "none", "RUN") is None


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "x"},
        {"key": "0"},
        {"train": "not base64!"},
        {"train": "AAAA"},
        {"val": 3},
        {"digest_bytes": 4},
        {"key": None},
    ],
    ids=str,
)
def test_a_list_with_other_content_is_one_line(tmp_path, change):
    write_digests(tmp_path, ImageDigests("files", 3, bytes(16), bytes(8)))
    path = tmp_path / "training_images.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(OptionError, match="RUN=.*training_images.json: "):
        read_digests(tmp_path, "RUN")


def test_an_image_that_was_trained_on_and_held_out_counts_once():
    digests = ImageDigests("pixels", 0, b"a" * 8 + b"b" * 8, b"b" * 8 + b"c" * 8)
    hashes = [{b"c" * 8}, {b"b" * 8}, {b"d" * 8}, set(), {b"x" * 8, b"a" * 8}]
    assert find_known_images(digests, hashes) == ([1, 4], [0])


def test_files_of_equal_ends_differ_by_their_whole_content(tmp_path):
    for k in range(2):
        (tmp_path / f"{k}.png").write_bytes(bytes(5000) + bytes([k]) + bytes(5000))
    first, second = hash_file_contents([tmp_path / "0.png", tmp_path / "1.png"], key=1)
    assert len(first) == 2
    assert len(first & second) == 1  # that of the ends


def test_pixels_have_a_hash_of_their_own():
    image = np.zeros((3, 4, 4), np.uint8)
    assert hash_image(image, 0) == hash_image(image.copy(), 0)
    assert not hash_image(image, 0) & hash_image(image + 1, 0)
    assert not hash_image(image, 0) & hash_image(image, 1)
