"""Arrays of a step straight from their files: each byte is read once, into its place, and hashed as it comes.

Orbax writes one file for each chunk, which holds its elements as they are (Zarr 3, no compression, one inner chunk).
Read through it they are copied twice into new memory, after they were read once to be verified.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from artifex.scaling import leaves, manifest

_INDEX = 20  # bytes at the end of a file: where its one inner chunk begins, how long it is, a checksum of these two
_ALIGNED = 64  # bytes; where an array begins so, a CPU device takes it without a copy

Box = tuple[slice, ...]  # a part of an array, from and to in each dim


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A part of an array and the file that holds it."""

    box: Box
    name: str
    entry: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of an array in memory, and the devices that hold it."""

    box: Box
    data: np.ndarray
    devices: list[Any]


def read(folder: str | os.PathLike[str], body: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Those of the arrays `wanted` that lie in `folder` as they are, in the shardings asked for; `body` is its
    manifest.

    Raises `CheckpointError` on the first file that is not as it was saved. Files are verified that hold a part of what
    this process's devices ask for.
    """
    folder = Path(folder)
    with ThreadPoolExecutor() as pool:
        try:
            found = pool.map(lambda path: _chunks(folder, body, path), wanted)
            under_way = {
                path: _begun(pool, folder, chunks, wanted[path])
                for path, chunks in zip(wanted, found, strict=True)
                if chunks is not None
            }
            return {path: _placed(wanted[path], *under_way.pop(path)) for path in list(under_way)}
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _chunks(folder: Path, body: Mapping[str, Any], path: str) -> list[Chunk] | None:
    """The files of the array at `path`; None if they are not known to hold its elements as they are."""
    home, saved = f"arrays/{leaves.array_folder(path)}", body["arrays"][path]
    description = f"{home}/zarr.json"
    if description not in body["files"]:
        return None
    text = manifest.content(folder, description, body["files"][description])
    shape, dtype = tuple(saved["shape"]), np.dtype(saved["dtype"])
    chunk = _plain(text, shape, saved["dtype"])
    if chunk is None:
        return None
    size = math.prod(chunk) * dtype.itemsize + _INDEX
    found = []
    for at in itertools.product(*(range(n // c) for n, c in zip(shape, chunk, strict=True))):
        name = "/".join([home, "c", *map(str, at)])
        if body["files"].get(name, {}).get("size") != size:  # nothing is written for a chunk of zeros, by some versions
            return None
        box = tuple(slice(i * c, (i + 1) * c) for i, c in zip(at, chunk, strict=True))
        found.append(Chunk(box, name, body["files"][name]))
    return found


def _plain(text: bytes, shape: tuple[int, ...], dtype: str) -> tuple[int, ...] | None:
    """The shape of an array's chunks by its zarr.json, where it says that they lie as they are."""
    try:
        said = json.loads(text)
        chunk = said["chunk_grid"]["configuration"]["chunk_shape"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    raw = little if np.dtype(dtype).itemsize > 1 else {"name": "bytes"}
    sharded = {"chunk_shape": chunk, "codecs": [raw], "index_codecs": [little, {"name": "crc32c"}]}
    expected = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "sharding_indexed", "configuration": sharded}],
    }
    if {key: said.get(key) for key in expected} != expected:
        return None
    if not (isinstance(chunk, list) and len(chunk) == len(shape) and all(type(c) is int and c > 0 for c in chunk)):
        return None
    return tuple(chunk) if all(n % c == 0 for n, c in zip(shape, chunk, strict=True)) else None


def _begun(
    pool: ThreadPoolExecutor, folder: Path, chunks: list[Chunk], x: jax.Array | jax.ShapeDtypeStruct
) -> tuple[list[Shard], list[Future[None]]]:
    """Memory for what this process's devices hold of `x`, and the reading into it of the files that have part of it."""
    devices: dict[Any, tuple[Box, list[Any]]] = {}
    for device, index in x.sharding.addressable_devices_indices_map(x.shape).items():
        assert index is not None  # it is for devices of other processes alone
        box = tuple(slice(*part.indices(n)[:2]) for part, n in zip(index, x.shape, strict=True))
        key = tuple((part.start, part.stop) for part in box)
        devices.setdefault(key, (box, []))[1].append(device)
    shards = [Shard(box, _memory(box, x.dtype), those) for box, those in devices.values()]
    reading = []
    for chunk in chunks:
        parts = [shard for shard in shards if _common(chunk.box, shard.box) is not None]
        if parts:
            reading.append(pool.submit(manifest.read_into, folder, chunk.name, chunk.entry, _blocks(chunk, parts)))
    return shards, reading


def _placed(x: jax.Array | jax.ShapeDtypeStruct, shards: list[Shard], reading: list[Future[None]]) -> jax.Array:
    for future in reading:
        future.result()
    kind = x.sharding.memory_kind
    return jax.make_array_from_single_device_arrays(
        x.shape,
        x.sharding,
        [
            jax.device_put(shard.data, SingleDeviceSharding(device, memory_kind=kind))
            for shard in shards
            for device in shard.devices
        ],
    )


def _memory(box: Box, dtype: Any) -> np.ndarray:
    shape, dtype = tuple(part.stop - part.start for part in box), np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    bytes_ = np.empty(size + _ALIGNED, np.uint8)
    first = -bytes_.ctypes.data % _ALIGNED
    return bytes_[first : first + size].view(dtype).reshape(shape)


def _common(one: Box, other: Box) -> Box | None:
    """What two parts have in common; the whole of a scalar with itself."""
    both = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
    return both if all(part.start < part.stop for part in both) else None


def _within(part: Box, whole: Box) -> tuple[Any, ...]:
    # the dots: of a scalar, too, they give a view
    return (*(slice(p.start - w.start, p.stop - w.start) for p, w in zip(part, whole, strict=True)), ...)


def _blocks(chunk: Chunk, shards: list[Shard]) -> Iterator[memoryview]:
    """The memory that the file of `chunk` is read into, a block after the other; between two, what lies apart in
    `shards` is copied there."""
    dtype = shards[0].data.dtype
    for box in _slabs(chunk.box, dtype.itemsize):
        shape = tuple(part.stop - part.start for part in box)
        places = [(shard, common) for shard in shards if (common := _common(box, shard.box)) is not None]
        only = places[0][0].data[_within(places[0][1], places[0][0].box)] if len(places) == 1 else None
        if only is not None and only.shape == shape and only.flags.c_contiguous:
            yield _bytes_of(only)
            continue
        block = np.empty(shape, dtype)
        yield _bytes_of(block)
        for shard, common in places:
            shard.data[_within(common, shard.box)] = block[_within(common, box)]
    yield memoryview(bytearray(_INDEX))


def _slabs(box: Box, itemsize: int) -> Iterator[Box]:
    """`box` in the order of its elements, in parts that each are one run of them and about `manifest.BLOCK` bytes."""
    shape = [part.stop - part.start for part in box]
    dim = next((i for i in range(len(shape)) if math.prod(shape[i + 1 :]) * itemsize <= manifest.BLOCK), None)
    if dim is None:
        yield box  # a scalar
        return
    rows = max(1, manifest.BLOCK // (math.prod(shape[dim + 1 :]) * itemsize))
    for lead in itertools.product(*(range(part.start, part.stop) for part in box[:dim])):
        for start in range(box[dim].start, box[dim].stop, rows):
            run = slice(start, min(start + rows, box[dim].stop))
            yield (*(slice(i, i + 1) for i in lead), run, *box[dim + 1 :])


def _bytes_of(x: np.ndarray) -> memoryview:
    return x.reshape(-1).view(np.uint8).data
