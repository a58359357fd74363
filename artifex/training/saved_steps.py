"""What saved steps hold, as text: sizes, the tree with its names, what a mesh needs for it, how two of them differ."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

from artifex.scaling import leaves, manifest
from artifex.scaling.axes import resolve
from artifex.scaling.checkpoints import Checkpoints
from artifex.scaling.manifest import CheckpointError
from artifex.scaling.placement import kept_names, size_text
from artifex.scaling.retention import Retention
from artifex.scaling.strategies import combine, strategies_for

LISTED = 20  # differing arrays that are listed
BLOCK = 2**22  # elements compared at once
ASIDE = {"left": "set aside: the run went on from before it", "saving": "its save was never finished"}


def located(path: str | Path, step: int | None = None) -> tuple[Path, int | None]:
    """The folder of checkpoints that `path` is, or has, or is a step of; and the step, where one is named.

    Raises `FileNotFoundError` where there is none, `ValueError` where `path` is one step and `step` another.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder; expected a run, its checkpoints, or one step of them")
    if (path / manifest.NAME).exists() and re.fullmatch("[0-9]+", path.name):
        if step not in (None, int(path.name)):
            raise ValueError(
                f"{path} is step {path.name} alone, so there is no step {step}; give the run folder instead"
            )
        return path.parent, int(path.name)
    return (path / "checkpoints" if (path / "checkpoints").is_dir() else path), step


def chosen(path: str | Path, step: int | None = None) -> tuple[Path, int]:
    """The folder of checkpoints at `path` and the step that is meant: `step`, or the newest that is complete."""
    folder, step = located(path, step)
    with Checkpoints(folder) as checkpoints:
        known = checkpoints.steps()
    if step is None and not known:
        raise FileNotFoundError(f"{folder} holds no complete step; `ls` and `verify` say what is there")
    return folder, known[-1] if step is None else step


def listing(path: str | Path) -> list[str]:
    """A line for each step, with why it is kept by the settings of the newest, and for what was set aside or never
    finished. Reads manifests and sizes, no array."""
    folder, one = located(path)
    rows = [("step", "size", "arrays", "files", "saved", "kept as", "state")]
    kept = _kept(folder)
    found = sorted((_key(entry.name), entry) for entry in folder.iterdir() if _key(entry.name))
    for _, entry in found:
        number, _, aside = entry.name.partition(".")
        if one is not None and entry.name != str(one):
            continue
        try:
            body = manifest.read(entry, int(number))
        except CheckpointError as error:
            state = ASIDE["saving"] if aside.startswith("saving") else str(error)
            rows.append((entry.name, size_text(_bytes_below(entry)), "", "", "", "", state))
            continue
        files = body["files"]
        problems = [problem for name in files if (problem := manifest.wrong_size(entry, name, files[name]))]
        state = ASIDE["left"] if aside else "complete"
        when = datetime.fromtimestamp((entry / manifest.NAME).stat().st_mtime).strftime("%Y-%m-%d %H:%M")
        size = size_text(sum(file["size"] for file in files.values()))
        why = "" if aside else ", ".join(kept.get(int(number), []))
        rows.append((entry.name, size, str(len(body["arrays"])), str(len(files)), when, why, (problems or [state])[0]))
    if len(rows) == 1:
        raise FileNotFoundError(f"{folder} holds no step")
    return [str(folder), *_aligned(rows)]


def _kept(folder: Path) -> dict[int, list[str]]:
    """Each complete step that stays, and why, by the settings that the newest was saved with."""
    with Checkpoints(folder) as checkpoints:
        beside = {step: checkpoints.metadata(step) for step in checkpoints.steps()}
    if not beside:
        return {}
    config = beside[max(beside)].get("config", {})
    rule = Retention.of(config.get("checkpoint", {}))
    return rule.kept({step: rule.value(metadata) for step, metadata in beside.items()})


def shown(path: str | Path, step: int | None = None, mesh: Mapping[str, int] | None = None) -> list[str]:
    """The tree of a step: path, dtype, shape, names of the dims, bytes; and with `mesh`, sizes by axis, what a device
    holds of each array where the axes of the mesh say how it is spread."""
    folder, step = chosen(path, step)
    with Checkpoints(folder) as checkpoints:
        arrays, metadata = checkpoints.arrays(step), checkpoints.metadata(step)
        versions = checkpoints.versions(step)
    named = {key: tuple(names) for key, names in metadata.get("names", {}).items()}
    rules = combine(strategies_for(tuple(mesh))) if mesh else None
    rows, totals = [("array", "dtype", "shape", "names", "bytes", "a device")], {}
    for key, leaf in arrays.items():
        whole = math.prod(leaf.shape) * leaf.dtype.itemsize
        shape, names = _names_of(key, leaf.shape, arrays, named)
        share = whole
        if rules is not None and mesh is not None and names is not None and shape is not None:
            own = rules.of_path(_owner(key, named) or key)
            table = own.params if key.partition("/")[0] in ("params", "buffers") else own.optimizer
            share = whole // resolve(names, leaf.shape, table, mesh, own.min_weight_size).shard_count(mesh)
        part = totals.setdefault(key.partition("/")[0], [0, 0, 0])
        totals[key.partition("/")[0]] = [part[0] + math.prod(leaf.shape), part[1] + whole, part[2] + share]
        rows.append(
            (key, str(leaf.dtype), str(list(leaf.shape)), " ".join(names or ()), size_text(whole), size_text(share))
        )
    for part, (count, whole, share) in totals.items():
        rows.append((f"{part}, all", "", f"{count:,} numbers", "", size_text(whole), size_text(share)))
    sums = [sum(total[i] for total in totals.values()) for i in range(3)]
    rows.append(("all", "", f"{sums[0]:,} numbers", "", size_text(sums[1]), size_text(sums[2])))
    columns = 6 if mesh else 5
    model = metadata.get("model", {}).get("name")
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    head = f"{folder / str(step)}: {f'{model}, ' if model else ''}written by {made}"
    return [head, *_aligned([row[:columns] for row in rows])]


def verified(path: str | Path, step: int | None = None) -> tuple[list[str], bool]:
    """A line for each step, or for each of its files that is damaged, once all of them are read; and whether all are as
    they were saved."""
    folder, step = located(path, step)
    with Checkpoints(folder) as checkpoints:
        there = checkpoints.folders()
    if not there:
        raise FileNotFoundError(f"{folder} holds no step")
    if step is not None and step not in there:
        raise FileNotFoundError(f"there is no step {step} in {folder}; there are {', '.join(map(str, there))}")
    known = there if step is None else [step]
    lines, whole = [], True
    for one in known:
        home = folder / str(one)
        try:
            files = manifest.read(home, one)["files"]
        except CheckpointError as error:
            lines, whole = [*lines, f"step {one}: {error}"], False
            continue
        with ThreadPoolExecutor() as pool:
            problems = list(filter(None, pool.map(lambda name: manifest.damage(home, name, files[name]), files)))  # noqa: B023
        size = size_text(sum(file["size"] for file in files.values()))
        lines += [f"step {one}: {problem}" for problem in problems] or [
            f"step {one}: whole, {len(files)} files, {size}"
        ]
        whole = whole and not problems
    return lines, whole


def differences(a: tuple[Path, int], b: tuple[Path, int]) -> list[str]:
    """How two steps differ, a line each, none where they hold the same: what they say of themselves, then arrays. Where
    all digests of an array are alike its values are not read."""
    with Checkpoints(a[0]) as first, Checkpoints(b[0]) as second:
        opened = ((first, a[1]), (second, b[1]))
        told = [dict(_flat(checkpoints.metadata(step))) for checkpoints, step in opened]
        lines = [
            f"{key}: {told[0].get(key, 'nothing')} and {told[1].get(key, 'nothing')}"
            for key in sorted(told[0].keys() | told[1].keys())
            if told[0].get(key) != told[1].get(key)
        ]
        trees = [checkpoints.arrays(step) for checkpoints, step in opened]
        files = [_digests(folder / str(step), step) for folder, step in (a, b)]
        unlike = []
        for path in dict.fromkeys([*trees[0], *trees[1]]):
            kinds = [f"{tree[path].dtype}{list(tree[path].shape)}" if path in tree else "nothing" for tree in trees]
            if kinds[0] != kinds[1]:
                unlike.append(f"{path}: {kinds[0]} and {kinds[1]}")
            elif files[0][leaves.array_folder(path)] != files[1][leaves.array_folder(path)]:
                values = [_value(checkpoints, step, path, trees[0][path]) for checkpoints, step in opened]
                if line := _unlike(*values):
                    unlike.append(f"{path}: {line}")
    if len(unlike) > LISTED:
        unlike = [*unlike[:LISTED], f"and {len(unlike) - LISTED} more arrays"]
    return lines + unlike


def _key(name: str) -> tuple[int, str]:
    found = re.fullmatch(r"(0|[1-9][0-9]{0,17})(\.(?:left|saving)-[0-9]+)?", name)
    return (int(found[1]), found[2] or "") if found else ()  # type: ignore[return-value]


def _bytes_below(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _owner(path: str, named: Mapping[str, Any]) -> str | None:
    """The parameter that an array belongs to: the one whose path its own ends with."""
    parts = path.split("/")
    return next((end for i in range(1, len(parts)) if (end := "/".join(parts[i:])) in named), None)


def _names_of(
    path: str, shape: tuple[int, ...], arrays: Mapping[str, Any], named: Mapping[str, tuple[str, ...]]
) -> tuple[tuple[int, ...] | None, tuple[str, ...] | None]:
    """The shape of the parameter an array belongs to, and the names of the dims that the array has of it."""
    owner = _owner(path, named)
    like = next((arrays[key].shape for key in (f"params/{owner}", f"buffers/{owner}") if key in arrays), None)
    return like, None if owner is None or like is None else kept_names(shape, like, named[owner])


def _digests(folder: Path, step: int) -> dict[str, dict[str, Any]]:
    """Array folder -> file in it -> its size and digest."""
    found: dict[str, dict[str, Any]] = {}
    for name, entry in manifest.read(folder, step)["files"].items():
        parts = name.split("/", 2)
        if len(parts) == 3:
            found.setdefault(parts[1], {})[parts[2]] = entry
    return found


def _value(checkpoints: Checkpoints, step: int, path: str, leaf: Any) -> np.ndarray:
    where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = leaves.nested({path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)})
    return np.asarray(jax.tree.leaves(checkpoints.restore(step, target, part=True))[0])


def _unlike(a: np.ndarray, b: np.ndarray) -> str | None:
    """How many of two arrays' values differ, by how much at most, and the first place; as bits, so that NaN is NaN."""
    count, most, first = 0, 0.0, None
    bits = np.dtype(f"u{a.dtype.itemsize}")
    flat = [np.ascontiguousarray(x).reshape(-1) for x in (a, b)]
    for begin in range(0, a.size, BLOCK):
        x, y = (part[begin : begin + BLOCK] for part in flat)
        (places,) = np.nonzero(x.view(bits) != y.view(bits))
        if places.size:
            first = begin + int(places[0]) if first is None else first
            count += places.size
            with np.errstate(invalid="ignore"):  # what is not finite
                gaps = np.abs(x[places].astype(np.float64) - y[places].astype(np.float64))
            most = max(most, float(np.max(gaps, initial=0.0, where=np.isfinite(gaps))))
    if first is None:
        return None
    at = [int(index) for index in np.unravel_index(first, a.shape)]
    return f"{count:,} of {a.size:,} values differ, by at most {most:.3g}, first at {at}"


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else name)
    else:
        yield key, value


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
