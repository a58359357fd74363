"""Files of the safetensors format: opened without trusting them, mapped into memory, written tensor by tensor.

A set of tensors is one file, or several with an index that says which file holds which tensor. What is written here
carries digests, by `artifex.models.digests`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from artifex.models import digests
from artifex.scaling import processes

LIMIT = 100_000_000  # bytes of a header, as in the safetensors library, or of an index
SHARD_BYTES = 5 * 10**9  # of one file, if its tensors allow it
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_LOG = logging.getLogger("artifex")
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where one tensor lies: `begin` is the first of its `size` bytes in `file`. `dtype` is None where NumPy has none
    for it, `digest` where the file carries none."""

    file: Path
    begin: int
    size: int
    shape: tuple[int, ...]
    code: str
    digest: str | None = None

    @property
    def dtype(self) -> np.dtype | None:
        return DTYPES.get(self.code)

    def array(self) -> np.ndarray:
        """The tensor, mapped: bytes are read where they are looked at."""
        assert self.dtype is not None, "the caller has looked"
        if 0 in self.shape:  # nothing to map
            return np.empty(self.shape, self.dtype)
        return np.asarray(np.memmap(self.file, self.dtype, "r", self.begin, self.shape))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor to write: the arrays of `pieces`, one after the other along the first dim."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def index_of(name: str) -> str:
    """The index of the files that stand for the one file `name`."""
    return f"{name}.index.json"


def open_tensors(folder: str | Path, name: str) -> dict[str, Stored]:
    """Every tensor of the file `name` in `folder`, or of the files in its index; only headers are read.

    Raises `FileNotFoundError` where there is neither, and `ValueError` for pickles, for files that are broken or made
    to deceive (headers beyond 100 MB or the file, offsets that overlap, leave holes or pass the end, shapes that do
    not fit them, unknown dtypes, duplicate keys), for an index that disagrees with its files, and for one that leads
    out of the folder.
    """
    folder = Path(folder)
    single, index = folder / name, folder / index_of(name)
    if single.is_file() and index.is_file():
        raise ValueError(f"{folder} holds both {name} and {index.name}; remove the one that is out of date")
    if single.is_file():
        return _tensors_in(single)
    if index.is_file():
        return _tensors_of_index(folder, index)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise ValueError(
            f"{folder} holds {shown(pickles[0])} and no {name}: a pickle runs what its author wrote when it is opened; "
            "convert it to safetensors where it was made"
        )
    raise FileNotFoundError(f"{folder} holds no {name}; expected a folder written by save_pretrained")


def read_json(file: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `ValueError` for any other content and for duplicate keys."""
    file = Path(file)
    if file.stat().st_size > LIMIT:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes; expected at most {LIMIT:,}")
    return _object(file.read_bytes(), file)


def write_tensors(
    folder: str | Path,
    name: str,
    tensors: Sequence[Tensor],
    texts: Mapping[str, str],
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `tensors` as `name` in `folder`, or, above `max_shard_bytes`, as several files with an index; and `texts`,
    contents of files by name.

    Only the piece being written is in memory. Every file is complete before the first of them gets its name; files
    of an earlier set of that name are removed.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem, shards = name.removesuffix(".safetensors"), _shards(tensors, max_shard_bytes)
    count = len(shards)
    names = [name] if count == 1 else [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    if count > 1:
        total = {"total_size": sum(tensor.nbytes for tensor in tensors)}
        where = {tensor.name: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
        index = json.dumps({"metadata": total, "weight_map": dict(sorted(where.items()))}, indent=2)
        texts = {index_of(name): index + "\n", **texts}
    unfinished = {file: folder / f".{file}.{os.getpid()}.partial" for file in (*names, *texts)}
    try:
        for file, shard in zip(names, shards, strict=True):
            _write_file(unfinished[file], shard)
        for file, text in texts.items():
            unfinished[file].write_text(text, encoding="utf-8")
        for file, path in unfinished.items():
            path.replace(folder / file)
    finally:
        for path in unfinished.values():
            path.unlink(missing_ok=True)
    ours = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    for path in folder.iterdir():
        if ours.fullmatch(path.name) and path.name not in unfinished:
            path.unlink()


def shown(name: str) -> str:
    """A name out of a file, fit for one line."""
    name = name if len(name) <= 200 else name[:200] + "..."
    return name if name.isprintable() else repr(name)


def _tensors_in(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, "numpy"):  # checks the header: sizes, offsets, shapes, dtypes
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file: {shown(str(error))}") from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length)
    header = _object(text, file)
    metadata = header.pop("__metadata__", {})
    in_order = sorted(header, key=lambda name: header[name]["data_offsets"])
    digest_of = dict(zip(in_order, digests.digests_in(file, text, metadata, len(header)) or [], strict=False))
    tensors: dict[str, Stored] = {}
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        where = Stored(file, 8 + length + begin, end - begin, tuple(tensor["shape"]), tensor["dtype"])
        tensors[name] = dataclasses.replace(where, digest=digest_of.get(name))
    return tensors


def verify(tensors: Mapping[str, Stored]) -> None:
    """Read those of `tensors` whose file carries digests, each process a share. Raises `ValueError`, on every process,
    where one does not match its own; a line of the log names files that carry none."""
    known = {name: (one.file, one.begin, one.size, one.digest) for name, one in tensors.items() if one.digest}
    share = [*known][processes.index() :: processes.count()]
    if problem := next(filter(None, processes.all_say(digests.damage({name: known[name] for name in share}))), None):
        raise ValueError(problem)
    without = sorted({str(one.file) for one in tensors.values() if not one.digest})
    if without and processes.is_first():
        more = f" and {len(without) - 1} more" if len(without) > 1 else ""
        _LOG.warning("%s%s: no checksums in it, so damage would not be found", without[0], more)


def _tensors_of_index(folder: Path, index: Path) -> dict[str, Stored]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise ValueError(f"{index} is no index: expected {{'weight_map': {{tensor: file}}}}")
    files = {name: _inside(folder, name, index) for name in sorted(set(where.values()))}
    tensors: dict[str, Stored] = {}
    for name, path in files.items():
        found = _tensors_in(path)
        listed = {tensor for tensor, file in where.items() if file == name}
        if odd := sorted(listed ^ found.keys()):
            raise ValueError(
                f"{index} disagrees with {name}: {shown(odd[0])} is {'not in it' if odd[0] in listed else 'not listed'}"
                f"{f', nor are {len(odd) - 1} more consistent' if len(odd) > 1 else ''}"
            )
        tensors |= found
    return tensors


def _inside(folder: Path, name: str, index: Path) -> Path:
    """The file `name` of an index, which must be a plain name, and no link out of the folder."""
    if PureWindowsPath(name).name != name or not name.endswith(".safetensors"):  # Windows': / and \ and drives
        raise ValueError(f"{index} names {shown(name)!r}; expected the plain name of a .safetensors file beside it")
    file = folder / name
    try:
        found = file.is_file()
    except OSError:  # a name that is too long for a file
        found = False
    if not found:
        raise ValueError(f"{index} names {shown(name)}, which is not in {folder}")
    homes = [folder.resolve()]
    if homes[0].parent.name == "snapshots":  # a cache of the Hugging Face hub: links into the folder of its contents
        homes.append(homes[0].parent.parent / "blobs")
    if not any(file.resolve().is_relative_to(home) for home in homes):
        raise ValueError(f"{index} names {shown(name)}, a link out of {folder}; put the file itself there")
    return file


def _object(text: bytes, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON that can be read: {shown(str(error))}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a JSON {type(value).__name__}; expected an object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {shown(key)!r} stands there twice")
        values[key] = value
    return values


def _shards(tensors: Sequence[Tensor], limit: int) -> list[list[Tensor]]:
    """Tensors in order, as many to a file as fit, at least one."""
    shards, size = [[]], 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_file(file: Path, tensors: Sequence[Tensor]) -> None:
    # widest dtypes first: each tensor then lies at a multiple of its item size
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    marks = {"format": "pt", digests.FIELD: digests.blank(len(tensors))}  # transformers asks for the first
    header: dict[str, Any] = {"__metadata__": marks}
    begin = 0
    for tensor in tensors:
        if tensor.dtype not in CODES:
            raise ValueError(f"{tensor.name} is {tensor.dtype}, which safetensors has no name for; convert it first")
        end = begin + tensor.nbytes
        header[tensor.name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        found = []
        for tensor in tensors:
            digest = digests.hasher()
            for piece in tensor.pieces():
                assert piece.dtype == tensor.dtype
                part = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
                digest.update(part)
                stream.write(part)
            found.append(digest.hexdigest())
        assert stream.tell() == 8 + len(text) + begin
        digests.fill(stream, text, found)
        stream.flush()
        os.fsync(stream.fileno())
