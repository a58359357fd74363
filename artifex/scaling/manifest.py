"""A step folder's manifest: what was saved, and a digest of every file. A step without a valid one is not saved.

`manifest.json` is written last. It holds the step, the versions that wrote it, the caller's metadata, shape and dtype
of every array by its path in the tree, size and digest of every file, and a checksum of itself. What it says is
believed only where it is well formed, and no file is opened that is not a plain one in the step's own folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  NumPy knows bfloat16 by it
import numpy as np
import xxhash

NAME = "manifest.json"
FORMAT = 2  # 1 had SHA-256 alone
LIMIT = 2**28  # bytes of a manifest: a million files
DIGEST = "xxh3_128"  # eleven times as fast as SHA-256 on a core that has instructions for it: 11 GB/s against 1
DIGESTS: dict[str, Callable[[], Any]] = {DIGEST: xxhash.xxh3_128, "sha256": hashlib.sha256}
BLOCK = 2**20  # bytes read at once


class CheckpointError(RuntimeError):
    """A checkpoint was not written, or cannot be read back as it was written."""


def check_metadata(value: Any, where: str = "metadata") -> None:
    """Raise `ValueError` or `TypeError`, naming the entry, unless JSON gives `value` back unchanged."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}, which JSON would turn into text; use str keys")
            check_metadata(entry, f"{where}[{key!r}]")
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            check_metadata(entry, f"{where}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}, which JSON cannot say; leave it out or use None")
    elif not (value is None or isinstance(value, bool | int | str)):
        raise TypeError(
            f"{where} is of type {type(value).__name__}, but metadata holds dict, list, str, int, float, bool, None; "
            "convert it before saving"
        )


def seal(folder: str | Path, body: Mapping[str, Any]) -> None:
    """Write `body`, with size and digest of every file now under `folder`, to its manifest.

    Every file and every folder is on the disk before the manifest is written, and so is the manifest when this returns.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        entries = list(pool.map(_described, paths))
    for inner in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        sync(inner)
    files = {path.relative_to(folder).as_posix(): entry for path, entry in zip(paths, entries, strict=True)}
    content = {"format": FORMAT, **body, "files": files}
    content["checksum"] = _checksum(content)
    text = json.dumps(content, indent=1, allow_nan=False)
    if len(text) > LIMIT:
        raise CheckpointError(f"its {NAME} would have {len(text):,} bytes; at most {LIMIT:,} are read back")
    with (folder / NAME).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


def sync(folder: str | Path) -> None:
    """Let the names in `folder`, not only the contents of its files, survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(folder: str | Path, step: int | None = None) -> dict[str, Any]:
    """The manifest of `folder`, which must be that of `step`. Raises `CheckpointError` where there is none, or not the
    one that was written."""
    folder = Path(folder)
    problem = wrong_size(folder, NAME)
    if problem == f"{NAME} is missing":
        raise CheckpointError(f"{problem}: the save was never finished")
    if problem is not None:
        raise CheckpointError(problem)
    try:
        with (folder / NAME).open("rb") as file:
            text = file.read(LIMIT + 1)
        if len(text) > LIMIT:
            raise CheckpointError(f"{NAME} is damaged: it has more than {LIMIT:,} bytes")
        content = json.loads(text.decode("utf-8"))
        genuine = isinstance(content, dict) and content.pop("checksum", None) == _checksum(content)
    except OSError as error:
        raise CheckpointError(f"{NAME} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):  # neither UTF-8 nor JSON, or nested without end
        raise CheckpointError(f"{NAME} is damaged: it is not JSON") from None
    if not genuine:
        raise CheckpointError(f"{NAME} is damaged: it does not match its own checksum")
    if content.get("format") not in (1, FORMAT):
        raise CheckpointError(f"{NAME} has format {content.get('format')}, this version reads {FORMAT}; update artifex")
    if problem := _malformed(content) or _linked(folder, content["files"]):
        raise CheckpointError(f"{NAME} is damaged: {problem}")
    if step is not None and content["step"] != step:
        raise CheckpointError(f"{NAME} is of step {content['step']}: its folder was copied or renamed")
    return content


def wrong_size(folder: str | Path, name: str, entry: Mapping[str, Any] | None = None) -> str | None:
    """What is wrong with the file `name` at a glance, or None: it must be a plain file, of the size in `entry`."""
    try:
        found = os.lstat(Path(folder) / name)
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"
    if not stat.S_ISREG(found.st_mode):
        return f"{name} is {'a link' if stat.S_ISLNK(found.st_mode) else 'no file'}, where a plain file was saved"
    size = found.st_size
    return None if entry is None or size == entry["size"] else f"{name} has {size} bytes instead of {entry['size']}"


def content(folder: str | Path, name: str, entry: Mapping[str, Any]) -> bytes:
    """All of the file `name`. Raises `CheckpointError` if it is not what `entry` says."""
    found = bytearray(entry["size"]) if wrong_size(folder, name, entry) is None else bytearray()
    read_into(folder, name, entry, [memoryview(found)])
    return bytes(found)


def read_into(folder: str | Path, name: str, entry: Mapping[str, Any], blocks: Iterable[memoryview]) -> None:
    """Read the file `name` into `blocks`, which take as much as `entry` says that it has; each is full when the next is
    asked for. Raises `CheckpointError` if the file is not what `entry` says."""
    problem = wrong_size(folder, name, entry)
    if problem is None:
        found = DIGESTS[kind_of(entry)]()
        try:
            with open(Path(folder) / name, "rb", buffering=0) as file:
                for block in blocks:
                    while block and (count := file.readinto(block[:BLOCK])):
                        found.update(block[:count])
                        block = block[count:]
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error.strerror or error}") from None
        problem = differs(name, entry, found.hexdigest())
    if problem is not None:
        raise CheckpointError(problem)


def damage(folder: str | Path, name: str, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with the file `name` once all of it is read, or None."""
    if problem := wrong_size(folder, name, entry):
        return problem
    try:
        found = digest(Path(folder) / name, kind_of(entry))
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"
    return differs(name, entry, found)


def differs(name: str, entry: Mapping[str, Any], found: str) -> str | None:
    """What is wrong with the file `name` whose digest was `found`, or None."""
    return None if found == entry[kind_of(entry)] else f"{name} is damaged: its content does not match its checksum"


def kind_of(entry: Mapping[str, Any]) -> str:
    """Which of `DIGESTS` an entry has."""
    return next(kind for kind in DIGESTS if kind in entry)


def digest(path: str | Path, kind: str = DIGEST) -> str:
    """The digest of a file, a block in memory at a time."""
    return _digest(path, kind, durable=False)


def _described(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, DIGEST: _digest(path, DIGEST, durable=True)}


def _digest(path: str | Path, kind: str, *, durable: bool) -> str:
    found, block = DIGESTS[kind](), memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            found.update(block[:count])
        if durable:
            os.fsync(file.fileno())
    return found.hexdigest()


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _malformed(content: Mapping[str, Any]) -> str | None:
    """What is not as `seal` writes it, in a manifest that matches its own checksum: anybody can compute one."""
    parts: list[Any] = [content.get(key) for key in ("files", "arrays", "metadata")]
    if not _is_count(content.get("step")) or not all(isinstance(part, dict) for part in parts):
        return "it lacks a step, files, arrays or metadata"
    for name, entry in content["files"].items():
        steps = name.split("/")
        if not name.isprintable() or "\\" in name or {"", ".", ".."} & set(steps):
            return f"it lists {name[:200]!r}, which is no path inside the step's folder"
        if not (isinstance(entry, dict) and _is_count(entry.get("size")) and _has_digest(entry)):
            return f"it lists {name} without size and digest"
    for path, entry in content["arrays"].items():
        entry = entry if isinstance(entry, dict) else {}
        shape = entry.get("shape")
        if not (isinstance(shape, list) and all(map(_is_count, shape)) and _is_dtype(entry.get("dtype"))):
            return f"it lists array {path[:200]!r} without shape and dtype"
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _has_digest(entry: Mapping[str, Any]) -> bool:
    return any(isinstance(entry.get(kind), str) for kind in DIGESTS if kind in entry)


def _is_dtype(value: Any) -> bool:
    # by these names alone: NumPy parses others as Python ("f4,,"), and warns of some
    if not isinstance(value, str) or not re.fullmatch(r"bool|bfloat16|u?int\d+|float\d+\w*|complex\d+", value):
        return False
    try:
        return np.dtype(value).name == value
    except TypeError:
        return False


def _linked(folder: Path, files: Mapping[str, Any]) -> str | None:
    """The first folder on the way to one of the `files` that is a link."""
    folders = {parent for name in files for parent in Path(name).parents}
    with contextlib.suppress(OSError):
        for parent in sorted(folders - {Path(".")}):
            if (folder / parent).is_symlink():
                return f"{parent} is a link, where a folder was saved"
    return None
