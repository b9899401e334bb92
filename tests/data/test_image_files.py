"""Pictures of every kind that Pillow writes, and files that are none."""

import contextlib
import os
import socket
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from torchvision.transforms import v2

from odcheap.data import image_folder
from odcheap.data.folder_trees import Files
from odcheap.data.image_folder import EvalImages, TrainImages, TrainingTransform
from odcheap.predict import ImageError, decode_image, is_image_file, read_regular


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
    assert [decode_image(tmp_path / "x.png", 16).getpixel((k, 0))[0] for k in range(3)] == [0, 100, 255]


def test_twelve_bits_in_sixteen_are_scaled_by_what_is_said_and_never_guessed(tmp_path):
    twelve = np.random.default_rng(0).integers(0, 4096, (20, 20)).astype(np.uint16)
    for name in ("x.png", "x.tif"):
        Image.fromarray(twelve).save(tmp_path / name)
        with pytest.raises(ImageError, match="bit_depth does not say how many of them are used"):
            decode_image(tmp_path / name)
        assert np.array_equal(np.asarray(decode_image(tmp_path / name, 12))[..., 0], twelve // 16)
        with pytest.raises(ImageError, match=r"a pixel of 40\d\d, too large for bit_depth=10"):
            decode_image(tmp_path / name, 10)


def test_sixteen_bits_of_color_are_read_in_full_or_refused(tmp_path):
    rows = b"".join(b"\0" + struct.pack(">3H", 65535, 256 * 100, 0) for _ in range(2))
    (tmp_path / "x.png").write_bytes(png(1, 2, 16, 2, rows))
    assert decode_image(tmp_path / "x.png", 16).getpixel((0, 0)) == (255, 100, 0)
    for depth in (None, 12):
        with pytest.raises(ImageError, match="bit_depth"):
            decode_image(tmp_path / "x.png", depth)


def test_a_pgm_says_its_range_itself(tmp_path):
    (tmp_path / "x.pgm").write_bytes(b"P5 2 1 4095\n" + struct.pack(">2H", 4095, 2048))
    assert [decode_image(tmp_path / "x.pgm").getpixel((k, 0))[0] for k in (0, 1)] == [255, 128]


def png(width, height, bits, kind, rows, *chunks):
    """A PNG with further chunks (name, content) before its pixels."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    parts = [chunk(*entry) for entry in (*chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))]
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(parts)


def test_long_texts_and_profiles_of_a_png_are_ignored(tmp_path):
    long = zlib.compress(bytes(2 << 20))
    for name, content in ((b"iCCP", b"x\0\0" + long), (b"zTXt", b"x\0\0" + long), (b"iCCP", b"?")):
        (tmp_path / "x.png").write_bytes(png(1, 1, 8, 2, b"\0\1\2\3", (name, content)))
        assert decode_image(tmp_path / "x.png").getpixel((0, 0)) == (1, 2, 3)


TEXT_FOR_A_NUMBER = struct.pack("<HHI4s", 0x11A, 2, 3, b"72\0\0")  # XResolution, as some cameras write it
TURNED = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
TURNED += TEXT_FOR_A_NUMBER + bytes(4)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_of_odd_exif_data_the_orientation_is_used(tmp_path, suffix):
    assert decode_image(saved(tmp_path / f"x.{suffix}", exif=TURNED)).size == (8, 12)


@given(changes=st.lists(st.tuples(st.integers(6, len(TURNED) - 1), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_whole_pixels_are_read_whatever_the_exif_data_are(tmp_path_factory, suffix, changes):
    exif = bytearray(TURNED)
    for place, value in changes:
        exif[place] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = saved(tmp_path_factory.mktemp("x") / f"x.{suffix}", exif=bytes(exif))
    assert decode_image(path).size in ((12, 8), (8, 12))


def test_a_turned_tiff_is_turned_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(saved(tmp_path / "x.tif", exif=exif)).size == (8, 12)


@pytest.mark.parametrize("name", ["cat.png", "cat.jpg", "cat.eps"])
def test_postscript_starts_nothing(tmp_path, monkeypatch, name):
    """A `gs` on the path, which Pillow would start for an EPS, leaves a file behind."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / name).write_bytes(eps)
    with pytest.raises(ImageError, match=r"PostScript, which is a program: convert it to PNG"):
        decode_image(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    assert not is_image_file(str(tmp_path), "cat.eps")


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "link to a pipe", "/dev/zero"])
def test_only_regular_files_are_opened(tmp_path, kind):
    path = tmp_path / "x.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))
    else:
        path.symlink_to(kind)
    with pytest.raises(ImageError, match=r"x.png cannot be read as an image .*not a regular file"):
        decode_image(path)


def test_a_file_of_many_gigabytes_is_not_read(tmp_path):
    with open(tmp_path / "x.png", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ImageError, match="more than 536,870,912"):
        decode_image(tmp_path / "x.png")


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


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "its content is none of JPEG"),
        (b"not a picture", "its content is none of JPEG"),
        (b"\x89PNG\r\n\x1a\n", ""),
        (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC: convert it to JPEG or PNG"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path, content, reason):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=rf"x.jpg cannot be read as an image \(.*{reason}"):
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
    data = TrainImages(files(tmp_path, 6, broken=(2, 3)), TrainingTransform(8, 0.5, False), seed=0)
    assert data[0, 1].target == 1
    assert not data[0, 1].broken
    sample = data[0, 2]
    assert (sample.target, sample.image.shape) == (4, (1, 3, 8, 8))
    assert [path for path, _ in sample.broken] == [str(tmp_path / f"{k}.png") for k in (2, 3)]


def test_nothing_but_broken_pictures_gives_no_label(tmp_path):
    data = TrainImages(files(tmp_path, 3, broken=(0, 1, 2)), TrainingTransform(8, 0.5, False), seed=0)
    sample = data[0, 2]
    assert (sample.target, sample.image.shape, len(sample.broken)) == (-1, (1, 3, 8, 8), 3)


def test_evaluation_leaves_a_broken_picture_out(tmp_path):
    data = EvalImages(files(tmp_path, 3, broken=(1,)), image_folder.evaluation_transform(8, 9), (3, 8, 8))
    batch = image_folder.collate([data[k] for k in range(3)])
    assert batch.target.tolist() == [0, -1, 2]
    assert batch.image.shape == (1, 3, 3, 8, 8)
    assert batch.broken[0][0].endswith("1.png")


def test_augmentation_depends_on_seed_epoch_and_index_alone(tmp_path):
    listed = files(tmp_path, 3)
    transform = TrainingTransform(8, 0.1, flip=True)
    data = TrainImages(listed, transform, seed=0)
    state = torch.get_rng_state()
    once = data[4, 1].image
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(data[4, 1].image, once)
    others = [data[5, 1].image, TrainImages(listed, transform, seed=1)[4, 1].image]
    assert not all(torch.equal(other, once) for other in others)


def test_flipping_can_be_turned_off_and_takes_every_second_picture(tmp_path):
    saved(tmp_path / "0.png", size=(40, 40))
    listed = Files(str(tmp_path), np.array([b"0.png"]), np.array([0]))

    def bright_left(flip):
        data = TrainImages(listed, TrainingTransform(16, 1.0, flip), seed=0)
        return [bool(data[epoch, 0].image[0, 0, 8, 0] > 100) for epoch in range(200)]

    assert all(bright_left(False))
    assert 70 < sum(bright_left(True)) < 130


class RecordingTransform(TrainingTransform):
    """Keeps the size and the reduction with which images are decoded, and the crop."""

    def __init__(self, *options):
        super().__init__(*options)
        self.seen = []

    def apply(self, image, crop, reduction=1):
        self.seen.append((image.size, reduction, crop))
        return super().apply(image, crop, reduction)


def photograph(folder, name, size=(1000, 750), mode="RGB", **options):
    """A list of one file, whose picture is smooth and has neither symmetries nor repetitions."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3)).astype(np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)
    image.save(folder / name, quality=95, **options)
    return Files(str(folder), np.array([name.encode()]), np.array([0]))


def compare_with_full_decode(listed, size, epochs=40, views=1):
    """Returns each decoded size, reduction and crop. Crops must be those of the whole image, and samples nearly so."""
    transform = RecordingTransform(size, 0.08, True)
    data = TrainImages(listed, transform, seed=0, views=views)
    full = decode_image(listed.path(0))
    found = []
    for epoch in range(epochs):
        transform.seen.clear()
        sample = data[epoch, 0]
        assert [crop for _, _, crop in transform.seen] == data.draw_crops(full.size, epoch, 0)
        for made, (decoded, reduction, crop) in zip(sample.image, transform.seen, strict=True):
            whole = TrainingTransform.apply(transform, full, crop)
            # The crop's edges were rounded: this changes less than a shift by half a pixel in both directions does.
            shifts = sum(whole.float().diff(dim=dim).abs().mean() for dim in (1, 2))
            assert (made.float() - whole.float()).abs().mean() < 1 + shifts / 2
            found.append((decoded, reduction, crop))
    return full.size, found


def test_a_jpeg_is_decoded_no_larger_than_its_crop_needs(tmp_path):
    full, found = compare_with_full_decode(photograph(tmp_path, "x.jpg"), size=60)
    assert {reduction for _, reduction, _ in found} == {2, 4, 8}
    for decoded, reduction, crop in found:
        smaller = min(crop.width, crop.height)
        assert decoded == tuple(-(-side // reduction) for side in full)
        assert smaller >= 60 * reduction
        assert reduction == 8 or smaller < 60 * 2 * reduction


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_photograph_stands_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    full, found = compare_with_full_decode(photograph(tmp_path, "x.jpg", exif=exif), size=60, epochs=10)
    assert full == ((1000, 750) if orientation < 5 else (750, 1000))
    assert max(reduction for _, reduction, _ in found) > 2
    assert all(decoded[0] == -(-full[0] // reduction) for decoded, reduction, _ in found)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gray.jpg", {"mode": "L"}),
        ("cmyk.jpg", {"mode": "CMYK"}),
        ("progressive.jpg", {"progressive": True}),
        ("odd.jpg", {"size": (1003, 757)}),
        ("two.mpo", {"save_all": True, "append_images": [Image.new("RGB", (40, 40))]}),
        ("x.png", {"format": "JPEG"}),
    ],
)
def test_jpegs_of_every_kind_are_reduced(tmp_path, name, options):
    _, found = compare_with_full_decode(photograph(tmp_path, name, **options), size=60, epochs=10)
    assert min(reduction for _, reduction, _ in found) > 1


@pytest.mark.parametrize(("name", "size"), [("x.jpg", (110, 90)), ("x.png", (1000, 750)), ("x.webp", (1000, 750))])
def test_small_jpegs_and_other_formats_are_decoded_whole(tmp_path, name, size):
    full, found = compare_with_full_decode(photograph(tmp_path, name, size), size=60, epochs=10)
    assert all((decoded, reduction) == (full, 1) for decoded, reduction, _ in found)


def test_views_share_a_decoded_image_that_is_large_enough_for_each(tmp_path):
    listed = photograph(tmp_path, "x.jpg")
    _, found = compare_with_full_decode(listed, size=60, views=3)
    _, alone = compare_with_full_decode(listed, size=60)
    assert [crop for _, _, crop in found[::3]] == [crop for _, _, crop in alone]
    for k in range(0, len(found), 3):
        assert len({reduction for _, reduction, _ in found[k : k + 3]}) == 1
        assert all(min(crop.width, crop.height) >= 60 * reduction for _, reduction, crop in found[k : k + 3])


def test_a_truncated_jpeg_is_broken_also_at_a_reduced_size(tmp_path):
    listed = photograph(tmp_path, "x.jpg")
    content = listed.path(0).read_bytes()
    listed.path(0).write_bytes(content[: len(content) * 9 // 10])
    sample = TrainImages(listed, TrainingTransform(60, 0.08, True), seed=0)[0, 0]
    assert sample.target == -1
    assert "runcated" in sample.broken[0][1]


def test_evaluation_decodes_jpegs_whole(tmp_path):
    listed = photograph(tmp_path, "x.jpg")
    transform = image_folder.evaluation_transform(60, 68)
    with Image.open(listed.path(0)) as image:
        assert torch.equal(EvalImages(listed, transform, (3, 60, 60))[0].image[0], transform(image))


def test_crops_are_those_of_torchvision_on_pillow_images(tmp_path):
    """The pixels may differ by the rounding of two implementations, and the random numbers are equal."""
    listed = photograph(tmp_path, "x.png", (300, 200))
    reference = v2.Compose([v2.RandomResizedCrop(60, scale=(0.08, 1)), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    transform, image = TrainingTransform(60, 0.08, True), decode_image(listed.path(0))
    for seed in range(20):
        torch.manual_seed(seed)
        expected = reference(image)
        torch.manual_seed(seed)
        assert (transform.apply(image, transform.draw(image.size)).int() - expected.int()).abs().max() <= 1


def test_a_batch_is_channels_last_with_one_view_and_with_several(tmp_path):
    for views in (1, 2):
        data = TrainImages(photograph(tmp_path, "x.jpg"), TrainingTransform(60, 0.08, True), seed=0, views=views)
        samples = [data[epoch, 0] for epoch in range(3)]
        batch = image_folder.collate(samples).image
        assert batch.shape == (views, 3, 3, 60, 60)
        for view, images in enumerate(batch):
            assert images.is_contiguous(memory_format=torch.channels_last)
            expected = [sample.image[view] for sample in samples]
            assert torch.equal(images, torch.stack(expected))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_a_virtual_file_is_read_although_its_size_is_0():
    assert b"Name:" in read_regular("/proc/self/status", 1 << 20)


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
    data = TrainImages(listed, TrainingTransform(32, 0.08, True), seed=0)
    batch = image_folder.collate([data[0, k] for k in (0, 1)])
    assert batch.image.shape == (1, 2, 3, 32, 32)
    assert batch.image.dtype == torch.uint8


def test_names_of_pictures(tmp_path):
    saved(tmp_path / "without.png").rename(tmp_path / "without")
    (tmp_path / "README").write_text("?")
    os.mkfifo(tmp_path / "pipe")
    folder = str(tmp_path)
    assert all(is_image_file(folder, name) for name in ("a.jpg", "A.JPEG", "b.png", "c.webp", "d.tiff", "without"))
    names = ("notes.txt", ".hidden.jpg", "jpg", "x.npy", "x.eps", "README", "pipe")
    assert not any(is_image_file(folder, name) for name in names)
