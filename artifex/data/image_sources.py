"""Arrays of images in the formats they are published in: NumPy's, IDX (MNIST), CIFAR's binary and the digits.

Dims: N images, H height, W width, C channels.
A file is checked against its own size before anything of the size it declares is made.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from artifex.data.image_files import ImageFiles

IMAGE_KEYS = ("image", "images", "x", "x_train", "train_images")
LABEL_KEYS = ("label", "labels", "y", "y_train", "train_labels")
HELD_OUT_IMAGE_KEYS = ("x_test", "test_images")
HELD_OUT_LABEL_KEYS = ("y_test", "test_labels")

_MOST_EXPANSION = 200  # bytes that a stored byte may become; photographs become 1 to 4, scanned digits about 5
_ALWAYS_EXPANDED = 2**26  # bytes; blank images compress by more than that, but are then few


class Source(NamedTuple):
    """What was read: images (arrays (N, H, W, C) of uint8), their labels, and a published split to hold out."""

    images: np.ndarray | ImageFiles
    labels: np.ndarray | None
    held_out: np.ndarray | ImageFiles | None = None
    held_out_labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None  # None: the labels' own numbers
    levels: int = 256
    ignored: tuple[str, ...] = ()  # names of files that are no images
    changes: tuple[str, ...] = ()  # what reading changed or left out, a line each


def read_digits() -> Source:
    """scikit-learn's 1,797 scanned digits of 8x8 pixels and 17 grey levels, which come with the library."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            f"the digits need scikit-learn: pip install 'artifex[images]', or scikit-learn alone ({error})"
        ) from error
    values, labels = load_digits(return_X_y=True)
    return Source(np.asarray(values).reshape(-1, 8, 8, 1).astype(np.uint8), np.asarray(labels), levels=17)


def read_npy(path: str | Path) -> Source:
    """Images from a `.npy`, mapped where they are uint8. It has no labels."""
    path = Path(path)
    with reading(path):
        with path.open("rb") as file:
            _npy_header(file, str(path), os.path.getsize(path))
        stored = [_channels_last(np.lib.format.open_memmap(path, mode="r"), path)]
        (images,) = _as_pixels(stored, path)
    return Source(images, None, changes=_rounded(stored))


def read_npz(path: str | Path) -> Source:
    """Images and labels from a `.npz`, by the names of its arrays."""
    path = Path(path)
    with reading(path), zipfile.ZipFile(path) as archive:
        entries = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}

        def read(keys: Sequence[str], needed: bool = False) -> np.ndarray | None:
            there = [key for key in keys if key in entries]
            if len(there) > 1 or (needed and not there):
                raise ValueError(
                    f"{path} holds {', '.join(entries) or 'nothing'}; expected one array of images, named as one of "
                    f"{', '.join(keys)}"
                )
            return _read_entry(archive, entries[there[0]], path) if there else None

        pixels = [_channels_last(read(IMAGE_KEYS, needed=True), path)]
        held_out = read(HELD_OUT_IMAGE_KEYS)
        if held_out is not None:
            pixels.append(_channels_last(held_out, path))
        labels, held_out_labels = read(LABEL_KEYS), read(HELD_OUT_LABEL_KEYS)
    images, *rest = _as_pixels(pixels, path)
    known = {*IMAGE_KEYS, *LABEL_KEYS, *HELD_OUT_IMAGE_KEYS, *HELD_OUT_LABEL_KEYS}
    unread = [f"array {name} of {path.name} was not read" for name in entries if name not in known]
    return Source(images, labels, rest[0] if rest else None, held_out_labels, changes=(*_rounded(pixels), *unread))


def find_idx(folder: str | Path) -> Path | None:
    """The training images of a folder in MNIST's format."""
    folder = Path(folder)
    names = [f"train-images{dot}idx3-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_idx(path: str | Path) -> Source:
    """The images of one IDX file, with the labels and the test images that stand beside it under MNIST's names."""
    path = Path(path)

    def both(images: Path) -> tuple[np.ndarray, np.ndarray | None]:
        labels = _beside(images, ("images", "labels"), ("idx3", "idx1"))
        return _read_idx_file(images, 3)[..., None], None if labels is None else _read_idx_file(labels, 1)

    test = _beside(path, ("train", "t10k")) if path.name.startswith("train") else None
    held_out, held_out_labels = both(test) if test else (None, None)
    return Source(*both(path), held_out, held_out_labels)


def is_cifar(folder: str | Path) -> bool:
    """Whether a folder holds CIFAR-10 or CIFAR-100 in the binary version."""
    folder = Path(folder)
    return any(folder.glob("data_batch_*.bin")) or (
        (folder / "train.bin").is_file() and (folder / "test.bin").is_file()
    )


def read_cifar(folder: str | Path) -> Source:
    """CIFAR-10, or CIFAR-100 with its fine labels, in the binary version: records of labels, then three planes."""
    folder = Path(folder)
    batches = sorted(folder.glob("data_batch_*.bin"))
    classes, tests, names = (10, "test_batch.bin", "batches.meta.txt")
    if not batches:
        batches, classes, tests, names = [folder / "train.bin"], 100, "test.bin", "fine_label_names.txt"
    width = 1 if classes == 10 else 2  # labels of a record: CIFAR-100 has a coarse one first

    def read(files: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
        parts = []
        for file in files:
            with reading(file):
                records = np.fromfile(file, np.uint8)
            if not len(records) or len(records) % (width + 3072):
                raise ValueError(
                    f"{file} has {len(records)} bytes, no multiple of the {width + 3072} of a CIFAR-{classes} record; "
                    "download it again"
                )
            parts.append(records.reshape(-1, width + 3072))
        records = np.concatenate(parts)
        labels = records[:, width - 1]
        if labels.max() >= classes:
            raise ValueError(f"{files[0].parent} holds label {labels.max()}, but CIFAR-{classes} has {classes} classes")
        return records[:, width:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels

    class_names = tuple(map(str, range(classes)))
    if (folder / names).is_file():
        with reading(folder / names):
            class_names = tuple((folder / names).read_text(encoding="utf-8").split())
        if len(class_names) != classes:
            raise ValueError(f"{folder / names} has {len(class_names)} names, expected {classes}; restore or remove it")
    held_out = read([folder / tests]) if (folder / tests).is_file() else (None, None)
    return Source(*read(batches), *held_out, class_names)


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn what a file that is missing, unreadable or damaged raises into a `ValueError` of one line."""
    path = Path(path)
    try:
        yield
    except (EOFError, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or no such file ({error}); copy or download it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); download it again") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _npy_header(file: IO[bytes], name: str, size: int) -> None:
    """Refuse an array of Python objects, and one that `size` bytes, header and all, do not hold."""
    try:
        version = np.lib.format.read_magic(file)  # pyright: ignore[reportArgumentType]
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(file)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise ValueError(f"{name} is not an array ({_first_line(error)}); write it with numpy.save") from error
    if dtype.hasobject:
        raise ValueError(f"{name} holds pickled Python objects, which could run code; store numbers")
    needed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or needed != size - file.tell():
        raise ValueError(
            f"{name} declares {dtype} of shape {shape}, {needed} bytes, but holds {size - file.tell()}; it was cut "
            "short or forged"
        )


def _read_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> np.ndarray:
    name = f"{path}:{info.filename}"
    _check_expansion(info.file_size, min(info.compress_size, os.path.getsize(path)), name)
    with archive.open(info) as file:
        _npy_header(file, name, info.file_size)
    with archive.open(info) as file:
        try:
            array = np.lib.format.read_array(file, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{name} is damaged ({_first_line(error)}); write it again") from error
        file.read(1)  # at the end the checksum is compared
    return array


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _check_expansion(size: int, stored: int, name: str) -> None:
    if size > max(_ALWAYS_EXPANDED, _MOST_EXPANSION * stored):
        raise ValueError(
            f"{name} would grow from {stored} bytes to {size}, more than {_MOST_EXPANSION} times; "
            "store it without compression if it is to be trusted"
        )


def _channels_last(array: np.ndarray | None, path: Path) -> np.ndarray:
    assert array is not None
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise ValueError(
            f"{path} holds {array.dtype} of shape {array.shape}; expected images (N, H, W), (N, H, W, 1) or "
            "(N, H, W, 3), channels last and without alpha"
        )
    return array


def _as_pixels(arrays: Sequence[np.ndarray], path: Path) -> list[np.ndarray]:
    """uint8 as it is; floats, all of [0, 1] or with negative ones of [-1, 1], rounded to 256 levels."""
    if all(array.dtype == np.uint8 for array in arrays):
        return list(arrays)
    if not all(array.dtype.kind == "f" for array in arrays):
        found = ", ".join(str(array.dtype) for array in arrays)
        raise ValueError(f"{path} holds images of {found}; expected uint8, or floats in [0, 1] or [-1, 1]")
    low = np.min([array.min(initial=0) for array in arrays])
    high = np.max([array.max(initial=0) for array in arrays])
    if not (low >= -1 and high <= 1):  # so written, nan is refused as well
        raise ValueError(f"{path} holds values from {low} to {high}; expected [0, 1] or [-1, 1], or uint8")
    start, scale = (-1, 127.5) if low < 0 else (0, 255)
    made = []
    for array in arrays:
        pixels = np.empty(array.shape, np.uint8)
        for first in range(0, len(array), 1024):  # in parts: the float copy of a mapped array may not fit
            part = array[first : first + 1024].astype(np.float32)
            pixels[first : first + 1024] = np.rint((part - start) * scale)
        made.append(pixels)
    return made


def _rounded(stored: Sequence[np.ndarray]) -> tuple[str, ...]:
    """The line on what `_as_pixels` changes."""
    count = sum(len(array) for array in stored)
    return () if stored[0].dtype == np.uint8 else (f"{count:,} images of {stored[0].dtype} rounded to 256 levels",)


def _beside(path: Path, *changes: tuple[str, str]) -> Path | None:
    """The file beside `path` with another name, compressed or not."""
    name = path.name.removesuffix(".gz")
    for old, new in changes:
        name = name.replace(old, new)
    if name == path.name.removesuffix(".gz"):
        return None
    return next((file for file in (path.with_name(name), path.with_name(f"{name}.gz")) if file.is_file()), None)


def _read_idx_file(path: Path, ndim: int) -> np.ndarray:
    """An IDX file of bytes: 0, 0, 8, ndim, the sizes as big-endian 32-bit integers, then the values."""
    with reading(path), path.open("rb") as raw:
        stored = os.path.getsize(path)
        is_gzip = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file = gzip.GzipFile(fileobj=raw) if is_gzip else raw
        header = file.read(4 + 4 * ndim)
        if header[:4] != bytes([0, 0, 8, ndim]) or len(header) < 4 + 4 * ndim:
            raise ValueError(
                f"{path} begins with {header[:4].hex(' ') or 'nothing'}; expected 00 00 08 {ndim:02x}, an IDX file of "
                f"bytes in {ndim} dims, or a .npy, a .npz or a folder"
            )
        shape = struct.unpack(f">{ndim}I", header[4:])
        needed = math.prod(shape)
        if not is_gzip:
            if needed != stored - len(header) or not needed:
                raise ValueError(f"{path} declares shape {shape}, but holds {stored - len(header)} bytes; get it again")
            return np.memmap(path, np.uint8, "r", len(header), shape)
        _check_expansion(needed, stored, str(path))
        content = file.read(needed + 1)
    if len(content) != needed or not needed:
        raise ValueError(f"{path} declares shape {shape}, but holds other than {needed} bytes; download it again")
    return np.frombuffer(content, np.uint8).reshape(shape)
