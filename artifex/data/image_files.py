"""PNG and JPEG files as images: found, checked without decoding them all, and decoded to squares when drawn."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import io
import os
import stat
import struct
import types
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from artifex.data import DataError
from artifex.data.changes import Header
from artifex.data.image_sources import Source

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg")

_FORMATS = ("PNG", "JPEG")
_END_OF_JPEG = b"\xff\xd9"  # stands nowhere in compressed data
_TAIL = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFiles:
    """Encoded images: their names, and what Pillow opens, a path or the content itself."""

    names: tuple[str, ...]  # files: relative to the source, with /
    file: Callable[[int], Path | io.BytesIO]
    title: Callable[[int], str]  # how errors name an image

    def __len__(self) -> int:
        return len(self.names)

    def check(self) -> list[Header | str]:
        """For each image what its header says, or why it cannot be an image.

        Headers are read, PNG checksums compared, a JPEG without its end is decoded, and more pixels than Pillow's limit
        are refused. Raises `ValueError` for what cannot be read at all.
        """
        workers = min(32, 4 * (os.cpu_count() or 1))  # most of the time is spent in waiting for the disk
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            return list(pool.map(self._check, range(len(self))))

    def _check(self, index: int) -> Header | str:
        pillow = _pillow()
        try:
            file = self.file(index)
            if isinstance(file, Path):
                if not stat.S_ISREG(file.stat().st_mode):  # opening a pipe would wait for ever
                    return "no regular file"
                size = file.stat().st_size
            else:
                size = len(file.getbuffer())
            with pillow.open(file, formats=_FORMATS) as image:
                _check_pixels(image)
                header = _header(image, size)
                if image.format == "PNG":
                    image.verify()
                elif not _has_end(file):
                    image.load()
        except _errors(pillow) as error:
            return _reason(error, self.title(index))
        return header

    def image(self, index: int, size: int, channels: int) -> np.ndarray:
        """uint8 (size, size, channels). Raises `DataError` with the file's name where it cannot be decoded."""
        pillow = _pillow()
        name = self.title(index)
        try:
            with pillow.open(self.file(index), formats=_FORMATS) as image:
                _check_pixels(image)
                return _square(image, size, channels)
        except _errors(pillow) as error:
            raise DataError(f"{name} cannot be decoded: {_reason(error, name)}; mend or remove it") from error


def read_folder(root: str | Path, labels: bool) -> Source:
    """The PNG and JPEG files below `root`, not through links to folders; the first folder of a name is its class."""
    root = Path(root)
    names, ignored = _find(root)
    folders = {name.split("/")[0] for name in names if "/" in name}
    direct = [name for name in names if "/" not in name]
    if not names:
        kinds = f"{len(ignored)} others, e.g. {ignored[0]}" if ignored else "no other files"
        hint = ": of CIFAR's versions get the binary one" if (root / "data_batch_1").exists() else ""
        raise ValueError(
            f"folder {root} has no PNG or JPEG files (there are {kinds}), IDX or CIFAR batches, or saved dataset{hint}"
        )
    if labels and direct and folders:
        raise ValueError(
            f"folder {root} has images both in folders of classes ({min(folders)}, ...) and outside them ({direct[0]}, "
            "...); move them, or set labels to False"
        )
    files = ImageFiles(names, lambda index: root / names[index], lambda index: str(root / names[index]))
    if not labels or direct:
        return Source(files, None, ignored=ignored)
    classes = tuple(sorted(folders))
    number = {name: place for place, name in enumerate(classes)}
    of_each = np.array([number[name.split("/")[0]] for name in names], np.int32)
    return Source(files, of_each, class_names=classes, ignored=ignored)


def is_dataset(folder: str | Path) -> bool:
    """Whether a folder was written by `save_to_disk` of Hugging Face's `datasets`."""
    folder = Path(folder)
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    )


def read_dataset(folder: str | Path) -> Source:
    """A dataset saved on disk by Hugging Face's `datasets`: its column of images, and `label` or `fine_label`.

    Of a dictionary of splits, `train` and, held out, `validation` or else `test`.
    """
    folder = Path(folder)
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"{folder} was saved by Hugging Face datasets: pip install datasets pillow ({error})"
        ) from error
    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder} is no dataset that the datasets library opens: {reason}") from error
    several = saved.items() if isinstance(saved, datasets.DatasetDict) else [("train", saved)]
    splits: dict[str, Any] = {str(name): split for name, split in several}
    if "train" not in splits:
        raise ValueError(f"dataset {folder} has the splits {', '.join(splits)}; expected train")
    held = next((name for name in ("validation", "test") if name in splits), None)
    unread = [
        f"split {name} of {len(split):,} rows was not read"
        for name, split in splits.items()
        if name not in ("train", held)
    ]
    features = splits["train"].features
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(columns) != 1:
        raise ValueError(f"dataset {folder} has {len(columns)} columns of images of {', '.join(features)}; expected 1")
    label = next((name for name in ("label", "labels", "fine_label") if name in features), None)

    def read(split: Any) -> tuple[ImageFiles, np.ndarray | None]:
        rows = split.with_format(None).cast_column(columns[0], datasets.Image(decode=False))

        def file(index: int) -> Path | io.BytesIO:
            row = rows[index][columns[0]]
            return Path(row["path"]) if row["bytes"] is None else io.BytesIO(row["bytes"])

        names = tuple(map(str, range(len(rows))))
        files = ImageFiles(names, file, lambda index: f"image {index} of {folder}")
        return files, None if label is None else np.asarray(list(rows[label]))

    class_names = features[label].names if label and isinstance(features[label], datasets.ClassLabel) else None
    held_out = (None, None) if held is None else read(splits[held])
    names = tuple(class_names) if class_names else None
    return Source(*read(splits["train"]), *held_out, names, changes=tuple(unread))


def _find(root: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the image files below `root`, sorted, and of all else that is not hidden."""

    def fail(error: OSError) -> None:
        raise ValueError(f"folder {error.filename} cannot be read: {error.strerror}") from error

    images, ignored = [], []
    for folder, folders, files in os.walk(root, onerror=fail):
        linked = [name for name in folders if Path(folder, name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*files, *linked):
            if not name.startswith("."):
                is_image = name.lower().endswith(SUFFIXES) and name not in linked
                (images if is_image else ignored).append(Path(folder, name).relative_to(root).as_posix())
    return tuple(sorted(images)), tuple(sorted(ignored))


def _square(image: Image, size: int, channels: int) -> np.ndarray:
    """The middle square of the upright image, resampled over the area that an output pixel covers (Lanczos)."""
    from PIL import Image, ImageOps

    mode = "L" if channels == 1 else "RGB"
    if image.format == "JPEG":
        image.draft(None, (2 * size, 2 * size))  # decodes large ones at a fraction of their size
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert(mode)
    side = min(image.size)
    left, top = ((extent - side) / 2 for extent in image.size)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    return np.asarray(image).reshape(size, size, channels)


def _header(image: Image, size: int) -> Header:
    width, height = image.size
    turn = image.getexif().get(0x0112, 1) if "exif" in image.info else 1  # without it a PNG would be decoded whole
    if turn in (5, 6, 7, 8):
        width, height = height, width
    return Header(
        size=size,
        width=width,
        height=height,
        colour=_is_coloured(image),
        deep=image.mode.startswith("I"),
        transparent=image.has_transparency_data,
        turned=turn in range(2, 9),
    )


def _is_coloured(image: Image) -> bool:
    """Whether it is stored in colours: three channels, or a palette that is not all grey."""
    if image.mode != "P" or image.palette is None:
        return image.mode not in ("1", "L", "LA", "F") and not image.mode.startswith("I")
    red_green_blue = np.frombuffer(image.palette.tobytes(), np.uint8).reshape(-1, len(image.palette.mode))[:, :3]
    return bool((red_green_blue != red_green_blue[:, :1]).any())


def _check_pixels(image: Image) -> None:
    limit = _pillow().MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(f"declares {image.width}x{image.height} pixels, above PIL.Image.MAX_IMAGE_PIXELS = {limit}")


def _has_end(file: Path | io.BytesIO) -> bool:
    content = file.open("rb") if isinstance(file, Path) else io.BytesIO(file.getbuffer())
    with content:
        content.seek(max(0, content.seek(0, io.SEEK_END) - _TAIL))
        return _END_OF_JPEG in content.read()


def _reason(error: Exception, name: str) -> str:
    """Why an image is corrupt. Raises `ValueError` where it could not even be read."""
    if isinstance(error, OSError) and error.errno is not None:
        raise ValueError(f"{name} cannot be read: {error.strerror}; mend or remove it") from error
    if isinstance(error, _pillow().UnidentifiedImageError):
        return "neither PNG nor JPEG"
    return str(error).partition("\n")[0] or type(error).__name__


def _errors(pillow: types.ModuleType) -> tuple[type[Exception], ...]:
    """What Pillow raises for damaged files."""
    bombs = (pillow.DecompressionBombError, pillow.DecompressionBombWarning)
    return (
        OSError,
        SyntaxError,
        ValueError,
        LookupError,
        OverflowError,
        TypeError,
        struct.error,
        zlib.error,
        EOFError,
        *bombs,
    )


def _pillow() -> types.ModuleType:
    try:
        import PIL.Image
    except ImportError as error:
        raise ImportError(f"PNG and JPEG files need Pillow: pip install pillow ({error})") from error
    return PIL.Image
