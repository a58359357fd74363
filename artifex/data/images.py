"""An image source becomes a corpus: images to train on, images held out, their labels, and a fingerprint of all.

Dims: N images, H height, W width, C channels; H = W = image_size.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from artifex.data.changes import Header, channel_changes, file_changes, left_out
from artifex.data.image_files import ImageFiles, is_dataset, read_dataset, read_folder
from artifex.data.image_sources import (
    Source,
    find_idx,
    is_cifar,
    read_cifar,
    read_digits,
    read_idx,
    read_npy,
    read_npz,
    reading,
)

_MOST_CLASSES = 65_536
_HASHED_WHOLE = 2**30  # bytes; of larger arrays 1,024 images are hashed
_SAMPLED = 1024
_AS_HERE: Mapping[str, str] = types.MappingProxyType({})


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSplit:
    """Images at random access, decoded when asked for where they are files, and their labels."""

    pixels: np.ndarray | ImageFiles  # of the whole source; arrays (N, H, W, C) of uint8, perhaps mapped
    chosen: np.ndarray  # which of them are in this split
    labels: np.ndarray | None  # int32 (N,), of this split
    image_size: int
    channels: int

    def __len__(self) -> int:
        return len(self.chosen)

    def image(self, index: int) -> np.ndarray:
        """uint8 (H, W, C). Raises `ValueError` with the file's name where a file cannot be decoded."""
        place = int(self.chosen[index])
        if isinstance(self.pixels, ImageFiles):
            return self.pixels.image(place, self.image_size, self.channels)
        return _as_channels(np.asarray(self.pixels[place]), self.channels)

    @property
    def decodes(self) -> bool:
        """Whether an image costs a file and its decoding, which more than one thread makes faster."""
        return isinstance(self.pixels, ImageFiles)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageCorpus:
    """What `load_images` read. Values of images are 0 to `levels` - 1."""

    source: str
    train: ImageSplit
    validation: ImageSplit
    image_size: int
    channels: int
    levels: int  # 256; of the digits 17
    class_names: tuple[str, ...]  # empty without labels
    fingerprint: str  # of all pixels and labels of either split; of files: of names, sizes and samples of the content
    skipped: tuple[str, ...]  # files that are corrupt
    ignored: tuple[str, ...]  # files that are neither PNG nor JPEG, and links to folders
    changes: tuple[str, ...]  # how images differ from what is stored, and what was left out, a line each

    @property
    def num_classes(self) -> int:
        """Every label is below it; 0 without labels."""
        return len(self.class_names)

    def describe(self) -> str:
        """One line: what there is to train on and what is held out."""
        size = f"{self.image_size}x{self.image_size}x{self.channels}"
        line = f"{self.source}: {len(self.train):,} training and {len(self.validation):,} validation images of {size}"
        line += f", {self.num_classes} classes" if self.num_classes else ", no labels"
        if self.class_names != tuple(map(str, range(self.num_classes))):
            line += f" ({', '.join(self.class_names[:5])}{', ...' * (self.num_classes > 5)})"
        return f"{line}, {self.levels} levels"


def load_images(
    source: str | os.PathLike[str],
    *,
    image_size: int,
    channels: int,
    labels: bool = True,
    validation_fraction: float = 0.05,
    corrupt: Literal["refuse", "skip"] = "refuse",
    settings: Mapping[str, str] = _AS_HERE,
) -> ImageCorpus:
    """Read `source` and split it into training and validation.

    `source` is 'digits' (scikit-learn's; a folder of that name: './digits') or a path:

    - a folder of PNG and JPEG files: in sub-folders, each a class, or directly in it and without labels. Each is cut
      to its middle square and resampled; transparency is laid on white;
    - a `.npz` with one array of images named image, images, x, x_train or train_images, and perhaps labels named label,
      labels, y, y_train or train_labels; held out are x_test (y_test) or test_images (test_labels) where present;
    - a `.npy`. Arrays are (N, H, W) or (N, H, W, C), uint8, or floats in [0, 1], or in [-1, 1] if any is negative;
    - an IDX file of images, plain or .gz, or a folder with MNIST's; held out is t10k where present;
    - a folder with CIFAR-10 or CIFAR-100 in the binary version; held out is the test batch;
    - a folder saved by Hugging Face's `datasets`; held out is validation or test.

    Where no split is published, an image is held out if a hash of its name, or in an array of its index, falls in
    `validation_fraction`. Colours become grey by their luma, and grey is repeated, as `channels` (1 or 3) asks.
    `labels` False leaves labels out. `corrupt`: whether files that are no images end in an error or are skipped and
    counted; what only decoding can tell is an error when it is drawn. `settings`: other names of arguments, for lines.

    Raises `ValueError` for what is missing, unreadable, damaged, forged or of another size, and `ImportError` with the
    command to install what a source needs.
    """
    if image_size < 1 or channels not in (1, 3):
        raise ValueError(f"image_size is {image_size}, channels is {channels}; expected at least 1, and 1 or 3")
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}; it must be between 0 and 1, e.g. 0.05")
    if corrupt not in ("refuse", "skip"):
        raise ValueError(f"corrupt is {corrupt!r}; expected 'refuse' or 'skip'")
    name = os.fspath(source)
    read = read_digits() if source == "digits" else _read_path(Path(name).expanduser(), labels)
    if not labels:
        read = read._replace(labels=None, held_out_labels=None)
    kept, headers, skipped = _whole_files(read.images, corrupt)
    if read.held_out is None:
        both = _split(name, _names(read.images), kept, validation_fraction)
        parts = [(read.images, chosen, read.labels) for chosen in both]
    else:
        held_out, held_out_headers, held_out_skipped = _whole_files(read.held_out, corrupt)
        headers, skipped = headers + held_out_headers, skipped + held_out_skipped
        parts = [(read.images, kept, read.labels), (read.held_out, held_out, read.held_out_labels)]
    _check_sizes(name, [pixels for pixels, *_ in parts], image_size, settings.get("image_size", "image_size"))
    class_names = _check_labels(name, parts, read.class_names)
    train, validation = (
        ImageSplit(pixels, chosen, _chosen_labels(of_all, chosen), image_size, channels)
        for pixels, chosen, of_all in parts
    )
    header = repr((image_size, channels, read.levels, class_names, tuple(header.size for header in headers)))
    return ImageCorpus(
        name,
        train,
        validation,
        image_size,
        channels,
        read.levels,
        class_names,
        _hash(header, (train, validation)),
        skipped,
        read.ignored,
        read.changes + _changes(train, validation, headers, skipped, read.ignored, settings),
    )


def only_classes(corpus: ImageCorpus, classes: Sequence[int]) -> ImageCorpus:
    """The images of `classes`, numbered anew from 0 in this order. What was held out stays held out.

    Raises `ValueError` where the corpus has no labels or no such class, or a split is left without images.
    """
    if not corpus.num_classes:
        raise ValueError(f"data.classes is {tuple(classes)}, but {corpus.source} has no labels; leave it out")
    if max(classes) >= corpus.num_classes:
        raise ValueError(
            f"data.classes names {max(classes)}, but the classes of {corpus.source} are 0 to {corpus.num_classes - 1}"
        )
    names = tuple(corpus.class_names[place] for place in classes)
    others = [name for place, name in enumerate(corpus.class_names) if place not in classes]
    number = np.full(corpus.num_classes, -1, np.int32)
    number[list(classes)] = np.arange(len(classes))

    def part(split: ImageSplit) -> ImageSplit:
        assert split.labels is not None
        labels = number[split.labels]
        if not (labels >= 0).any():
            raise ValueError(f"{corpus.source} has a split without images of classes {', '.join(names)}; give more")
        return dataclasses.replace(split, chosen=split.chosen[labels >= 0], labels=labels[labels >= 0])

    return dataclasses.replace(
        corpus,
        train=part(corpus.train),
        validation=part(corpus.validation),
        class_names=names,
        changes=(*corpus.changes, f"classes {', '.join(others)} left out (data.classes)"),
        fingerprint=hashlib.sha256(f"{corpus.fingerprint} {tuple(classes)}".encode()).hexdigest(),
    )


def _read_path(path: Path, labels: bool) -> Source:
    with reading(path):
        path.stat()  # what is missing is said here
    if not path.is_dir():
        reader = {".npy": read_npy, ".npz": read_npz}.get(path.suffix, read_idx)
        return reader(path)
    if is_dataset(path):
        return read_dataset(path)
    idx = find_idx(path)
    if idx is not None:
        return read_idx(idx)
    return read_cifar(path) if is_cifar(path) else read_folder(path, labels)


def _whole_files(
    images: np.ndarray | ImageFiles, corrupt: Literal["refuse", "skip"]
) -> tuple[np.ndarray, tuple[Header, ...], tuple[str, ...]]:
    """Which images can be decoded as far as is known, the headers of their files, and the names of the others."""
    if not isinstance(images, ImageFiles):
        return np.arange(len(images)), (), ()
    checked = images.check()
    bad = [index for index, found in enumerate(checked) if isinstance(found, str)]
    if bad and corrupt == "refuse":
        more = f" (and {len(bad) - 1} more are corrupt)" if len(bad) > 1 else ""
        raise ValueError(
            f"{images.title(bad[0])} is corrupt: {checked[bad[0]]}{more}; mend or remove it, or set corrupt to 'skip'"
        )
    kept = np.array([index for index, found in enumerate(checked) if not isinstance(found, str)], np.int64)
    return (
        kept,
        tuple(found for found in checked if not isinstance(found, str)),
        tuple(images.names[index] for index in bad),
    )


def _changes(
    train: ImageSplit,
    validation: ImageSplit,
    headers: Sequence[Header],
    skipped: Sequence[str],
    ignored: Sequence[str],
    settings: Mapping[str, str],
) -> tuple[str, ...]:
    """How the images differ from what is stored, and which files were left out."""
    if isinstance(train.pixels, ImageFiles):
        lines = file_changes(headers, train.image_size, train.channels, settings)
    else:
        stored = {1: 0, 3: 0}
        for split in (train, validation):
            assert isinstance(split.pixels, np.ndarray)
            stored[split.pixels.shape[-1]] += len(split)
        lines = channel_changes(stored[3], stored[1], train.channels, settings)
    files = len(headers) + len(skipped)
    how = f"{settings.get('corrupt', 'corrupt')}=refuse stops at them"
    lines += left_out(skipped, files, "unreadable as images", how)
    return (*lines, *left_out(ignored, files + len(ignored), "neither PNG nor JPEG"))


def _names(images: np.ndarray | ImageFiles) -> Sequence[str]:
    return images.names if isinstance(images, ImageFiles) else [str(index) for index in range(len(images))]


def _split(source: str, names: Sequence[str], kept: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    if len(kept) < 2:
        raise ValueError(f"{source} has {len(kept)} images, too few to hold some out; give more")
    digests = [hashlib.sha256(os.fsencode(names[int(index)])).digest() for index in kept]
    place = np.array([int.from_bytes(digest[:8]) / 2**64 for digest in digests])
    held_out = place < fraction
    held_out[place.argmin()] = True  # neither side is empty
    held_out[place.argmax()] = False
    return kept[~held_out], kept[held_out]


def _check_sizes(source: str, parts: Sequence[np.ndarray | ImageFiles], image_size: int, setting: str) -> None:
    for pixels in parts:
        if not len(pixels):
            raise ValueError(f"{source} has a split without images; give more")
        if not isinstance(pixels, ImageFiles) and pixels.shape[1:3] != (image_size, image_size):
            height, width = pixels.shape[1:3]
            remedy = f"set {setting} to {height}" if height == width else "store squares"
            raise ValueError(
                f"{source} holds images of {height}x{width}, but {setting} is {image_size}: {remedy}; arrays are not "
                "resized"
            )


def _check_labels(
    source: str,
    parts: Sequence[tuple[np.ndarray | ImageFiles, np.ndarray, np.ndarray | None]],
    names: tuple[str, ...] | None,
) -> tuple[str, ...]:
    """The names of the classes, after a look at all labels."""
    given = [labels for *_, labels in parts if labels is not None]
    if not given:
        return ()
    if len(given) < len(parts):
        raise ValueError(
            f"{source} has labels for one of training and test images; add the others, or set labels False"
        )
    for pixels, _, labels in parts:
        assert labels is not None
        if labels.dtype.kind not in "iu" or labels.size != len(pixels) or len(labels) != len(pixels):
            raise ValueError(
                f"{source} has labels {labels.dtype} of shape {labels.shape}; expected integers ({len(pixels)},), one "
                "an image, or labels set to False"
            )
    low, high = (int(bound([bound(labels) for labels in given])) for bound in (np.min, np.max))
    limit = _MOST_CLASSES if names is None else len(names)
    if low < 0 or high >= limit:
        raise ValueError(f"{source} has label {low if low < 0 else high}, outside [0, {limit}); number classes from 0")
    return names if names is not None else tuple(map(str, range(high + 1)))


def _chosen_labels(labels: np.ndarray | None, chosen: np.ndarray) -> np.ndarray | None:
    return None if labels is None else labels.reshape(-1)[chosen].astype(np.int32)


def _as_channels(image_HWC: np.ndarray, channels: int) -> np.ndarray:
    if image_HWC.shape[-1] == channels:
        return image_HWC
    if channels == 3:
        return np.repeat(image_HWC, 3, axis=-1)
    # ITU-R 601-2 luma in 16-bit fixed point, as Pillow rounds it
    luma = image_HWC.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32) + np.uint32(2**15)
    return (luma >> 16).astype(np.uint8)[..., None]


def _hash(header: str, splits: Iterable[ImageSplit]) -> str:
    """One hash of all parts, each hashed alone first: where a part ends is part of it."""
    digests = [hashlib.sha256(header.encode()).digest()]
    for split in splits:
        labels = b"" if split.labels is None else split.labels.astype("<i4").tobytes()
        content = hashlib.sha256()
        for part in _content(split):
            content.update(part)
        digests += [hashlib.sha256(labels).digest(), content.digest()]
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _content(split: ImageSplit) -> Iterator[bytes]:
    """Of an array every pixel of the split; above 1 GiB and of files, a sample, and which images there are."""
    pixels, chosen = split.pixels, split.chosen
    sample = chosen[np.linspace(0, len(chosen) - 1, min(len(chosen), _SAMPLED)).astype(np.int64)]
    if isinstance(pixels, ImageFiles):
        yield "\0".join(pixels.names[index] for index in chosen).encode(errors="surrogateescape")
        for index in sample[:: max(1, len(sample) // 64)]:
            file = pixels.file(int(index))
            yield hashlib.sha256(file.read_bytes() if isinstance(file, Path) else file.getbuffer()).digest()
        return
    yield repr((len(chosen), pixels.shape)).encode()
    if pixels.nbytes > _HASHED_WHOLE:
        chosen = sample
    for first in range(0, len(chosen), 1024):
        yield np.ascontiguousarray(pixels[chosen[first : first + 1024]]).tobytes()
