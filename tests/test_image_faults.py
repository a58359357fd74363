"""Damaged, forged and hostile image files: refused in one line, or skipped and counted where that was asked for."""

import gzip
import io
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest

from artifex.data.images import load_images

GREY = {"image_size": 6, "channels": 1}
RNG = np.random.default_rng(3)


def pixels(count=20, size=6, channels=1):
    return RNG.integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def drawn(split):
    return np.stack([split.image(index) for index in range(len(split))])


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def picture(path, array, **how):
    pillow = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    pillow.fromarray(array.squeeze()).save(path, **how)


def test_corrupt_files_are_refused_by_name_or_skipped_and_counted(tmp_path):
    pytest.importorskip("PIL.Image")
    for number, image in enumerate(pixels(10, 64)):
        picture(tmp_path / f"{number}.png", image)
        picture(tmp_path / f"{number}.jpg", image)
    whole = {name: (tmp_path / name).read_bytes() for name in ("1.png", "2.png", "3.jpg", "4.jpg")}
    (tmp_path / "1.png").write_bytes(whole["1.png"][:200])
    flipped = bytearray(whole["2.png"])
    flipped[len(flipped) // 2] ^= 255
    (tmp_path / "2.png").write_bytes(flipped)
    (tmp_path / "3.jpg").write_bytes(whole["3.jpg"][:-200])
    (tmp_path / "4.jpg").write_bytes(whole["4.jpg"] + bytes(10_000))  # whole, with something behind it
    (tmp_path / "5.png").write_bytes(b"")
    (tmp_path / "6.jpg").write_bytes(b"GIF89a")
    os.mkfifo(tmp_path / "pipe.png")
    bad = ("1.png", "2.png", "3.jpg", "5.png", "6.jpg", "pipe.png")
    with pytest.raises(ValueError, match=r"1\.png is corrupt: .* \(and 5 more are corrupt\); .* set corrupt to 'skip'"):
        load_images(tmp_path, **GREY)
    corpus = load_images(tmp_path, **GREY, corrupt="skip")
    assert corpus.skipped == bad
    assert corpus.changes[-1] == (
        "6 of 21 files left out, unreadable as images: 1.png, 2.png, 3.jpg, ... (corrupt=refuse stops at them)"
    )
    assert len(drawn(corpus.train)) + len(drawn(corpus.validation)) == 15
    for name in bad:
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n")
        with pytest.raises(ValueError, match=rf"{name} is corrupt") as caught:
            load_images(tmp_path, **GREY)
        assert "\n" not in str(caught.value)
        (tmp_path / name).unlink()


def test_a_picture_that_declares_too_many_pixels_is_never_decoded(tmp_path):
    pytest.importorskip("PIL.Image")

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"bomb.png is corrupt: Image size \(3600000000 pixels\) exceeds limit"):
        load_images(tmp_path, **GREY)


def test_loops_of_links_end(tmp_path):
    for number, image in enumerate(pixels(4)):
        picture(tmp_path / "a" / f"{number}.png", image)
    (tmp_path / "a" / "round").symlink_to(tmp_path, target_is_directory=True)
    corpus = load_images(tmp_path, **GREY)
    assert len(corpus.train) + len(corpus.validation) == 4
    assert corpus.ignored == ("a/round",)
    (tmp_path / "a" / "self.png").symlink_to(tmp_path / "a" / "self.png")
    with pytest.raises(
        ValueError, match=r"self\.png cannot be read: Too many levels of symbolic links; mend or remove"
    ):
        load_images(tmp_path, **GREY, corrupt="skip")


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def forged(shape, body=b""):
    """A .npy that declares uint8 of `shape` and holds `body`."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + body


def zipped(**entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def damaged(content, find, change):
    place = content.index(find)
    return content[:place] + change + content[place + len(change) :]


IMAGES = np.arange(720, dtype=np.uint8).reshape(20, 6, 6)
HOSTILE = {
    "empty.npy": (b"", "is not an array"),
    "text.npy": (b"not an array", "is not an array"),
    "pickle.npy": (npy(np.array([{}] * 3)), "holds pickled Python objects"),
    "short.npy": (npy(IMAGES)[:-1], r"declares uint8 of shape \(20, 6, 6\), 720 bytes, but holds 719"),
    "long.npy": (npy(IMAGES) + b"x", "720 bytes, but holds 721"),
    "huge.npy": (forged((2**40, 2**40, 2**40)), r"shape \(1099511627776, .* but holds 0"),
    "negative.npy": (forged((-1, -36, 20), bytes(720)), "declares uint8 of shape"),
    "flat.npy": (npy(IMAGES[0]), r"holds uint8 of shape \(6, 6\); expected images \(N, H, W\)"),
    "alpha.npy": (npy(np.zeros((4, 6, 6, 4), np.uint8)), "channels last and without alpha"),
    "first.npy": (npy(np.zeros((4, 3, 6, 6), np.uint8)), "channels last and without alpha"),
    "integers.npy": (npy(IMAGES.astype(np.int64)), "holds images of int64; expected uint8, or floats"),
    "range.npy": (npy(IMAGES.astype(np.float32)), r"holds values from 0.0 to 255.0; expected \[0, 1\] or \[-1, 1\]"),
    "nan.npy": (npy(np.full((4, 6, 6), np.nan)), "holds values from nan to nan"),
    "one.npy": (npy(IMAGES[:1]), "has 1 images, too few to hold some out"),
    "none.npy": (npy(IMAGES[:0]), "has 0 images, too few"),
    "size.npy": (npy(np.zeros((4, 7, 7), np.uint8)), "images of 7x7, but image_size is 6: set image_size to 7"),
    "oblong.npy": (npy(np.zeros((4, 7, 6), np.uint8)), "images of 7x6, but image_size is 6: store squares"),
    "text.npz": (b"not an archive", "is damaged or no such file"),
    "short.npz": (zipped(images=npy(IMAGES))[:-30], "is damaged or no such file"),
    "bits.npz": (damaged(zipped(images=npy(IMAGES)), b"PK\x01\x02", b"PK\x01\x03"), "is damaged or no such file"),
    "pickle.npz": (zipped(images=npy(np.array([{}] * 3))), "images.npy holds pickled Python objects"),
    "labels.npz": (zipped(x=npy(IMAGES), y=npy(np.array([{}] * 20))), "y.npy holds pickled Python objects"),
    "huge.npz": (zipped(images=forged((2**40, 6, 6))), r"images.npy declares uint8 of shape \(1099511627776, 6, 6\)"),
    "keys.npz": (zipped(pictures=npy(IMAGES)), "holds pictures; expected one array of images, named as one of image, "),
    "twice.npz": (zipped(x=npy(IMAGES), images=npy(IMAGES)), "holds x, images; expected one array of images"),
    "count.npz": (zipped(x=npy(IMAGES), y=npy(np.arange(19))), r"labels int64 of shape \(19,\); expected integers"),
    "float.npz": (zipped(x=npy(IMAGES), y=npy(np.zeros(20))), "has labels float64"),
    "minus.npz": (zipped(x=npy(IMAGES), y=npy(np.arange(20) - 1)), r"has label -1, outside \[0, 65536\)"),
    "many.npz": (
        zipped(x=npy(IMAGES), y=npy(np.arange(20) * 2**40)),
        r"has label 20890720927744, outside \[0, 65536\)",
    ),
    "half.npz": (
        zipped(x=npy(IMAGES), y=npy(np.arange(20)), x_test=npy(IMAGES)),
        "labels for one of training and test",
    ),
    "magic": (b"\x00\x00\x09\x03" + idx(IMAGES)[4:], "begins with 00 00 09 03; expected 00 00 08 03, an IDX file"),
    "empty": (b"", "begins with nothing; expected 00 00 08 03"),
    "cut": (idx(IMAGES)[:9], "begins with 00 00 08 03"),
    "short": (idx(IMAGES)[:-1], r"declares shape \(20, 6, 6\), but holds 719 bytes"),
    "long": (idx(IMAGES) + b"x", "but holds 721 bytes"),
    "huge": (bytes([0, 0, 8, 3]) + b"\xff" * 12, r"declares shape \(4294967295, 4294967295, 4294967295\)"),
    "short.gz": (gzip.compress(idx(IMAGES))[:-20], "is damaged or no such file"),
    "sum.gz": (gzip.compress(idx(IMAGES))[:-8] + bytes(8), "is damaged or no such file"),
    "huge.gz": (gzip.compress(bytes([0, 0, 8, 3]) + b"\xff" * 12), "would grow from .* more than 200 times"),
    "more.gz": (gzip.compress(idx(IMAGES) + b"x"), "holds other than 720 bytes"),
    "less.gz": (gzip.compress(idx(IMAGES)[:-1]), "holds other than 720 bytes"),
    "picture.png": (b"\x89PNG", "begins with 89 50 4e 47; expected .* an IDX file .* or a folder"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_or_forged_file_is_refused_in_one_line(tmp_path, name):
    content, message = HOSTILE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_images(tmp_path / name, **GREY)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_archive_that_would_fill_the_memory_is_refused_before_it_is_unpacked(tmp_path):
    shape = (2**26 // 36 + 1, 6, 6)
    (tmp_path / "bomb.npz").write_bytes(zipped(images=forged(shape, bytes(shape[0] * 36))))
    assert (tmp_path / "bomb.npz").stat().st_size < 2**17
    with pytest.raises(ValueError, match=r"images.npy would grow from \d+ bytes to \d+, more than 200 times"):
        load_images(tmp_path / "bomb.npz", **GREY)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("data_batch_1.bin", 3072, "has 3072 bytes, no multiple of the 3073 of a CIFAR-10 record"),
        ("data_batch_1.bin", 0, "has 0 bytes"),
        ("data_batch_1.bin", 3073 * 2, "holds label 255, but CIFAR-10 has 10 classes"),
        ("train.bin", 3074 * 2, "holds label 255, but CIFAR-100 has 100 classes"),
        ("test.bin", 3073, "no multiple of the 3074 of a CIFAR-100 record"),
    ],
)
def test_damaged_cifar_files_are_refused(tmp_path, name, size, message):
    if name in ("train.bin", "test.bin"):
        for other in ("train.bin", "test.bin"):
            (tmp_path / other).write_bytes(bytes(3074 * 2))
    (tmp_path / name).write_bytes(b"\xff" * size)
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path, image_size=32, channels=3)


def test_what_is_missing_or_holds_no_images_is_refused(tmp_path):
    for name in ("gone", "gone.npy", "gone.npz"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read: No such file or directory"):
            load_images(tmp_path / name, **GREY)
    with pytest.raises(ValueError, match=r"has no PNG or JPEG files \(there are no other files\), IDX or CIFAR"):
        load_images(tmp_path, **GREY)
    (tmp_path / "data_batch_1").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match=r"there are 1 others, e.g. data_batch_1.*versions get the binary one"):
        load_images(tmp_path, **GREY)
    for change, message in (
        ({"image_size": 0}, "image_size is 0"),
        ({"channels": 2}, "channels is 2"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0; it must be between 0 and 1"),
        ({"corrupt": "ignore"}, "corrupt is 'ignore'; expected 'refuse' or 'skip'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_images(tmp_path, **GREY | change)
