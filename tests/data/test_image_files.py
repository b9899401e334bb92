"""Pictures of every kind that Pillow writes, and files that are none."""

import contextlib
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from odcheap.data import image_folder
from odcheap.data.folder_trees import Files, is_image_name
from odcheap.data.image_folder import EvalImages, TrainImages
from odcheap.predict import ImageError, decode_image


def saved(path, size=(12, 8), mode="RGB", **options):
    """A picture with a bright left half."""
    grey = np.zeros((size[1], size[0]), np.uint8)
    grey[:, : size[0] // 2] = 200
    Image.fromarray(grey).convert(mode).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", "png"),
        ("L", "jpg"),
        ("1", "png"),
        ("P", "gif"),
        ("RGBA", "png"),
        ("LA", "png"),
        ("CMYK", "jpg"),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, suffix):
    image = decode_image(saved(tmp_path / f"x.{suffix}", mode=mode))
    assert (image.mode, image.size) == ("RGB", (12, 8))
    bright, dark = image.getpixel((1, 4)), image.getpixel((10, 4))
    assert min(bright) > 150
    assert max(dark) < 50


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 256 * 100, 65535]], np.uint16)).save(tmp_path / "x.png")
    assert [decode_image(tmp_path / "x.png").getpixel((k, 0))[0] for k in range(3)] == [0, 100, 255]


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_of_unknown_range_are_refused_not_made_black(tmp_path, kind):
    Image.fromarray(np.ones((4, 4), kind)).save(tmp_path / "x.tif")
    with pytest.raises(ImageError, match=r"x.tif.*32-bit pixels .*whose range is unknown"):
        decode_image(tmp_path / "x.tif")


def test_a_transparent_palette_gives_no_warning(tmp_path):
    palette = saved(tmp_path / "x.png", mode="P", transparency=b"\x00\x80")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(palette).mode == "RGB"


def test_a_photograph_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    image = decode_image(saved(tmp_path / "x.jpg", exif=exif, quality=95))
    assert image.size == (8, 12)
    assert image.getpixel((4, 1))[0] > 150  # left has become up
    assert image.getpixel((4, 10))[0] < 50


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_named(tmp_path, content):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=r"x.jpg cannot be read as an image"):
        decode_image(tmp_path / "x.jpg")


def test_a_truncated_and_a_missing_and_a_slim_picture_are_named(tmp_path):
    whole = saved(tmp_path / "x.jpg", size=(200, 100)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    saved(tmp_path / "slim.png", size=(501, 5))
    for name, reason in (("cut.jpg", "[Tt]runcated"), ("none.jpg", "No such file"), ("slim.png", "too narrow")):
        with pytest.raises(ImageError, match=f"{name}.*{reason}"):
            decode_image(tmp_path / name)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "gif"])
def test_a_damaged_file_is_broken_or_a_picture_and_nothing_else(tmp_path_factory, suffix, data):
    path = tmp_path_factory.mktemp("damaged") / f"x.{suffix}"
    content = bytearray(saved(path).read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(ImageError):
        assert decode_image(path).mode == "RGB"


def files(tmp_path, count, broken=()):
    for k in range(count):
        saved(tmp_path / f"{k}.png", size=(10 + k, 10))
        if k in broken:
            (tmp_path / f"{k}.png").write_bytes(b"?")
    return Files(str(tmp_path), np.array([f"{k}.png".encode() for k in range(count)]), np.arange(count))


def test_the_next_readable_picture_takes_a_broken_one_s_place(tmp_path):
    data = TrainImages(files(tmp_path, 6, broken=(2, 3)), v2.PILToTensor(), seed=0, size=8)
    assert data[0, 1].target == 1
    assert not data[0, 1].broken
    sample = data[0, 2]
    assert (sample.target, sample.image.shape) == (4, (3, 10, 14))
    assert [path for path, _ in sample.broken] == [str(tmp_path / f"{k}.png") for k in (2, 3)]


def test_nothing_but_broken_pictures_gives_no_label(tmp_path):
    data = TrainImages(files(tmp_path, 3, broken=(0, 1, 2)), v2.PILToTensor(), seed=0, size=8)
    sample = data[0, 2]
    assert (sample.target, sample.image.shape, len(sample.broken)) == (-1, (3, 8, 8), 3)


def test_evaluation_leaves_a_broken_picture_out(tmp_path):
    data = EvalImages(files(tmp_path, 3, broken=(1,)), image_folder.evaluation_transform(8, 9), 8)
    batch = image_folder.collate([data[k] for k in range(3)])
    assert batch.target.tolist() == [0, -1, 2]
    assert batch.image.shape == (3, 3, 8, 8)
    assert batch.broken[0][0].endswith("1.png")


def test_augmentation_depends_on_seed_epoch_and_index_alone(tmp_path):
    listed = files(tmp_path, 3)
    transform = image_folder.training_transform(8, 0.1, flip=True)
    data = TrainImages(listed, transform, seed=0, size=8)
    state = torch.get_rng_state()
    once = data[4, 1].image
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(data[4, 1].image, once)
    others = [data[5, 1].image, TrainImages(listed, transform, seed=1, size=8)[4, 1].image]
    assert not all(torch.equal(other, once) for other in others)


def test_flipping_can_be_turned_off_and_takes_every_second_picture(tmp_path):
    saved(tmp_path / "0.png", size=(40, 40))
    listed = Files(str(tmp_path), np.array([b"0.png"]), np.array([0]))

    def bright_left(flip):
        data = TrainImages(listed, image_folder.training_transform(16, 1.0, flip), seed=0, size=16)
        return [bool(data[epoch, 0].image[0, 8, 0] > 100) for epoch in range(200)]

    assert all(bright_left(False))
    assert 70 < sum(bright_left(True)) < 130


def test_evaluation_takes_the_middle_at_the_standard_scale(tmp_path):
    """Of a 512 x 256 ramp at size 224: the shorter side becomes 256, then the middle 224 columns of 512 are left."""
    ramp = np.broadcast_to(np.arange(512) // 2, (256, 512)).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "x.png")
    made = image_folder.evaluation_transform(224, 256)(decode_image(tmp_path / "x.png"))
    assert torch.equal(made[0, 0], torch.arange(144, 368).div(2, rounding_mode="floor").to(torch.uint8))


def test_grey_and_odd_sized_pictures_train(tmp_path):
    saved(tmp_path / "0.jpg", size=(33, 7), mode="L")
    saved(tmp_path / "1.jpg", size=(5, 300))
    listed = Files(str(tmp_path), np.array([b"0.jpg", b"1.jpg"]), np.array([0, 1]))
    batch = image_folder.collate(
        [TrainImages(listed, image_folder.training_transform(32, 0.08, True), 0, 32)[0, k] for k in (0, 1)]
    )
    assert batch.image.shape == (2, 3, 32, 32)
    assert batch.image.dtype == torch.uint8


def test_names_of_pictures():
    assert all(is_image_name(name) for name in ("a.jpg", "A.JPEG", "b.png", "c.webp", "d.tiff"))
    assert not any(is_image_name(name) for name in ("notes.txt", ".hidden.jpg", "jpg", "x.npy"))
