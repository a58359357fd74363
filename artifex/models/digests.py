"""Digests of a safetensors file, kept in its own header: they go where the file goes, and other libraries ignore them.

`__metadata__` has one field more: the XXH3 of the header, as it is with zeros in this field, and after it that of each
tensor, in the order in which they lie in the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import xxhash

FIELD = "artifex.xxh3_128"
DIGITS = 32
BLOCK = 2**20  # bytes read at once
REMEDY = "copy it anew, or, if another program changed it, let that save it without the metadata"

hasher = xxhash.xxh3_128


def blank(count: int) -> str:
    """What stands in the field of a file of `count` tensors until they are written."""
    return "0" * DIGITS * (count + 1)


def fill(stream: BinaryIO, header: bytes, tensors: list[str]) -> None:
    """Write the digests of the `header` at byte 8 of `stream`, and of its `tensors`, into the field that is blank."""
    place = blank(len(tensors)).encode()
    stream.seek(8 + header.index(b'"%s":"%s"' % (FIELD.encode(), place)) + len(FIELD) + 4)
    stream.write("".join([hasher(header).hexdigest(), *tensors]).encode())


def digests_in(file: str | Path, header: bytes, metadata: Mapping[str, str], count: int) -> list[str] | None:
    """The digests of the `count` tensors of `file`, in their order; None where it has none. Raises `ValueError` where
    the header is not the one that was written."""
    if FIELD not in metadata:
        return None
    said = metadata[FIELD]
    if not re.fullmatch("[0-9a-f]*", said) or len(said) != len(blank(count)):
        raise ValueError(f"{file} is damaged: its checksums are not those of {count} tensors; {REMEDY}")
    if hasher(header.replace(said.encode(), blank(count).encode())).hexdigest() != said[:DIGITS]:
        raise ValueError(f"{file} is damaged: its header does not match its checksum; {REMEDY}")
    return [said[i : i + DIGITS] for i in range(DIGITS, len(said), DIGITS)]


def damage(parts: Mapping[str, tuple[Path, int, int, str]]) -> str | None:
    """What is first found wrong with tensors, by name (file, first byte, bytes, digest), once all of them are read."""

    def of(name: str) -> str | None:
        file, begin, size, digest = parts[name]
        found = _digest(file, begin, size)
        return None if found == digest else f"{file} is damaged: {name} does not match its checksum; {REMEDY}"

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        return next(filter(None, pool.map(of, parts)), None)


def _digest(file: Path, begin: int, size: int) -> str:
    found, block = hasher(), memoryview(bytearray(min(BLOCK, size)))
    with file.open("rb", buffering=0) as stream:
        stream.seek(begin)
        while size and (count := stream.readinto(block[: min(BLOCK, size)])):
            found.update(block[:count])
            size -= count
    return found.hexdigest()
