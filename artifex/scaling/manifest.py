"""A step folder's manifest: what was saved, and a checksum for every file. A step without a valid one is not saved.

`manifest.json` is written last. It holds the step, the versions that wrote it, the caller's metadata, shape and dtype
of every array by its path in the tree, size and SHA-256 of every file, and a checksum of itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "manifest.json"
FORMAT = 1


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
    """Write `body`, with size and checksum of every file now under `folder`, to its manifest."""
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in paths
    }
    content = {"format": FORMAT, **body, "files": files}
    content["checksum"] = _checksum(content)
    with (folder / NAME).open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


def sync(folder: str | Path) -> None:
    """Let the names in `folder`, not only the contents of its files, survive a power cut."""
    folder = Path(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(folder: str | Path) -> dict[str, Any]:
    """The manifest of `folder`. Raises `CheckpointError` where there is none, or not the one that was written."""
    folder = Path(folder)
    path = folder / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{NAME} is missing: the save was never finished") from None
    except ValueError:  # neither UTF-8 nor JSON
        raise CheckpointError(f"{NAME} is damaged: it is not JSON") from None
    if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
        raise CheckpointError(f"{NAME} is damaged: it does not match its own checksum")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{NAME} has format {content['format']}, this version reads {FORMAT}; update artifex")
    return content


def wrong_size(folder: str | Path, name: str, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with the file `name` at a glance, or None."""
    folder = Path(folder)
    try:
        size = (folder / name).stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is missing"
    return None if size == entry["size"] else f"{name} has {size} bytes instead of {entry['size']}"


def damage(folder: str | Path, name: str, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with the file `name` once all of it is read, or None."""
    folder = Path(folder)
    problem = wrong_size(folder, name, entry)
    if problem is None and _sha256(folder / name) != entry["sha256"]:
        problem = f"{name} is damaged: its content does not match its checksum"
    return problem


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
