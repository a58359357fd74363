"""What the devices of a compiled step send each other: bytes of each kind of collective over each axis of the mesh.

    communication(compiled.as_text(), mesh)

Read from XLA's text, loops by their turns. Of W bytes, whole, one of n devices sends

    W (n - 1) / n     in an all-gather, a reduce-scatter, an all-to-all
    2 W (n - 1) / n   in an all-reduce
    W                 in a permutation, of which W is what it has

which are those of a ring, and the least that any way of doing them needs. A CPU's program has an all-reduce where those
of a GPU and a TPU have a reduce-scatter.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
from jax.sharding import Mesh

from artifex.scaling.axes import mesh_sizes
from artifex.scaling.hlo import SHAPE, Instruction, Program
from artifex.scaling.placement import size_text

Bound = Literal["", "at most", "at least"]
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_IOTA = r"\[[\d,]+\](?:<=\[[\d,]+\])?(?:T\([\d,]+\))?"
_MESH_GROUPS = rf"replica_groups=mesh\[([^\]]*)\](?:, *device_ids=\(({_IOTA})\))? *\{{([^}}]*)\}}"
_BYTES = {"pred": 1.0, "token": 0.0, "c64": 8.0, "c128": 16.0}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over the same devices: `times` in a step, in which each sends `sent` bytes in all.

    `axes`: the axes of the mesh along which the devices differ that take part together; `devices`: how many these are.
    `bound`: "at most" under a conditional of which nothing says how often it is taken, "at least" in a loop whose end
    depends on data.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    times: int
    sent: float
    bound: Bound = ""

    @property
    def key(self) -> tuple:
        """What they have in common."""
        return self.axes, self.kind, self.devices, self.bound


@dataclasses.dataclass(frozen=True, repr=False)
class Communication:
    """The collectives of a step, those that send most first. Prints as a table."""

    rows: tuple[Collective, ...]

    def sent(self, *axes: str, kind: str | None = None) -> float:
        """Bytes that a device sends in a step: over exactly these axes, by collectives of this kind; without, over all,
        by all."""
        return sum(
            row.sent
            for row in self.rows
            if (not axes or set(row.axes) == set(axes)) and (kind is None or row.kind == kind)
        )

    def __repr__(self) -> str:
        if not self.rows:
            return "the devices send each other nothing"
        head = ("mesh axes", "collective", "times", "a device sends")
        groups: dict[tuple, set[int]] = {}  # how many devices take part, where that is not the same in all of a kind
        for row in self.rows:
            groups.setdefault(row.key[:2], set()).add(row.devices)
        body = [
            (
                " x ".join(row.axes),
                row.kind + (f" of {row.devices}" if len(groups[row.key[:2]]) > 1 else ""),
                f"{row.bound} {row.times:,}".strip(),
                size_text(row.sent),
            )
            for row in self.rows
        ]
        table = [head, *body, ("in all", "", "", size_text(self.sent()))]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        aligned = (str.ljust, str.ljust, str.rjust, str.rjust)
        lines = [
            "  ".join(align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True))
            for row in table
        ]
        return "\n".join(lines)


def communication(
    text: str, mesh: Mesh | Mapping[str, int], taken: Mapping[int, Sequence[int]] | None = None
) -> Communication:
    """What the program of `text`, as XLA writes it, sends between the devices of `mesh`, or of a mesh of such sizes.

    `taken` says for loops of so many turns in how many of these each conditional of their body, in the order of the
    program, takes its second branch, that for true: `artifex.scaling.pipeline.schedules.Schedule.taken`.
    """
    found: dict[tuple, Collective] = {}
    for one in collectives(text, mesh, taken):
        have = found.get(one.key, dataclasses.replace(one, times=0, sent=0.0))
        found[one.key] = dataclasses.replace(have, times=have.times + one.times, sent=have.sent + one.sent)
    return Communication(tuple(sorted(found.values(), key=lambda row: -row.sent)))


def collectives(
    text: str, mesh: Mesh | Mapping[str, int], taken: Mapping[int, Sequence[int]] | None = None
) -> list[Collective]:
    """The same one by one, in the order of the program. Those that send nothing, in groups of one, are left out."""
    return list(_Walk(Program.of(text), mesh_sizes(mesh), taken or {}).of_entry())


@dataclasses.dataclass(frozen=True)
class _Walk:
    program: Program
    sizes: Mapping[str, int]
    taken: Mapping[int, Sequence[int]]

    def of_entry(self) -> Iterator[Collective]:
        return self.of(self.program.entry, 1, "", ())

    def of(
        self, computation: str, times: int, bound: Bound, taken: Sequence[int], under: Collection[tuple] = ()
    ) -> Iterator[Collective]:
        """Those of a computation that runs so often; `taken` of its conditionals, where it is known; `under`: what
        those around it have started."""
        conditionals = iter(taken)
        started = set(under)  # of what a TPU goes on with in several fusions, and through loops between them
        for one in self.program.computations[computation].values():
            if one.opcode == "while":
                yield from self.of_loop(computation, one, times, bound, started)
            elif one.opcode == "conditional":
                yield from self.of_conditional(one, times, bound, next(conditionals, None))
            elif one.opcode == "fusion" and one.called:
                yield from self.of_fusion(one.called, times, bound, started)
            elif one.opcode in ("call", "async-start") and one.called:
                yield from self.of(one.called, times, bound, (), started)
            elif (kind := one.opcode.removesuffix("-start")) in KINDS:
                yield from self.of_one(computation, one, kind, times, bound)

    def of_loop(
        self, computation: str, loop: Instruction, times: int, bound: Bound, started: Collection[tuple]
    ) -> Iterator[Collective]:
        turns, body = self.program.turns(computation, loop), loop.attribute("body")
        assert body is not None, loop
        if turns is None:
            yield from self.of(body, times, bound or "at least", (), started)
            return
        inside = self.program.computations[body].values()
        count = sum(one.opcode == "conditional" for one in inside)
        known = self.taken.get(turns, ())
        known = [n * times for n in known] if len(known) == count else ()
        yield from self.of(body, times * turns, bound, known, started)

    def of_conditional(self, one: Instruction, times: int, bound: Bound, second: int | None) -> Iterator[Collective]:
        if second is None or len(one.branches) != 2:
            for branch in one.branches:
                yield from self.of(branch, times, "at most", ())
            return
        for branch, each in zip(one.branches, (times - second, second), strict=True):
            yield from self.of(branch, each, bound, ())

    def of_fusion(self, name: str, times: int, bound: Bound, started: set[tuple]) -> Iterator[Collective]:
        for computation, collective in self.fused(name):
            if (kind := collective.opcode.removesuffix("-start")) not in KINDS:
                continue
            chain = re.search(r'chain_id="(\d+)"', collective.rest)
            if chain or self.is_part(computation):
                # a TPU's asynchronous collective: its start, what is computed meanwhile, and its end all name it
                key = (kind, collective.attribute("channel_id"), chain and chain[1])
                if key in started:
                    continue
                started.add(key)
            if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # a TPU writes it as a fusion of the sum and a part of it
            yield from self.of_one(computation, collective, kind, times, bound)

    def fused(self, computation: str) -> Iterator[tuple[str, Instruction]]:
        """The instructions of a fusion, and of fusions in it, with the computation that has them."""
        for one in self.program.computations[computation].values():
            yield computation, one
            if one.opcode == "fusion" and one.called:
                yield from self.fused(one.called)

    def is_part(self, computation: str) -> bool:
        inside = self.program.computations[computation].values()
        return computation.startswith("async_collective_fusion") or any(
            "AsyncCollective" in one.rest for one in inside if one.opcode == "custom-call"
        )

    def of_one(self, computation: str, one: Instruction, kind: str, times: int, bound: Bound) -> Iterator[Collective]:
        groups = groups_of(one.rest, math.prod(self.sizes.values()))
        devices, axes = max(map(len, groups)), axes_of(groups, self.sizes)
        if not axes or not times:
            return
        there = sum(_bytes(self.program.computations[computation][name].shape) for name in one.operands)
        share = (devices - 1) / devices
        each = {"all-reduce": 2 * share, "all-gather": devices - 1, "reduce-scatter": share, "all-to-all": share}
        yield Collective(kind, axes, devices, times, times * there * each.get(kind, 1.0), bound)


def groups_of(attributes: str, count: int) -> list[list[int]]:
    """The devices that take part together in a collective, by the attributes of its instruction, among `count`; of a
    permutation sender and receiver. Raises `ValueError` for a way to write them that is unknown."""
    if found := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        return [[int(a), int(b)] for a, b in re.findall(r"(\d+),(\d+)", found[1])] or [[0]]
    if found := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _iota(found[2]).reshape(_numbers(found[1])).tolist()
    if found := re.search(_MESH_GROUPS, attributes):
        return _of_mesh(*found.groups())
    if "replica_groups={}" in attributes or "replica_groups" not in attributes:
        return [list(range(count))]
    raise ValueError(f"unknown replica groups: {attributes[:200]}")


def _of_mesh(axes: str, order: str | None, chosen: str) -> list[list[int]]:
    """Groups by the axes of a mesh of XLA's own, `mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a','b':(1)2}`: an axis,
    or of it the part of size 2 behind the first (1) ways."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    devices = _iota(order).reshape(-1) if order else np.arange(math.prod(sizes.values()))
    split, together = [], []
    for name, size in sizes.items():
        parts = sorted((int(a), int(b)) for a, b in re.findall(rf"'{re.escape(name)}':\((\d+)\)(\d+)", chosen))
        if not parts:
            split.append(size)
            together.append(f"'{name}'" in chosen)
            continue
        before = 1
        for start, ways in parts:
            split += [start // before, ways]
            together += [False, True]
            before = start * ways
        split.append(size // before)
        together.append(False)
    ids = devices.reshape(split)
    dims = sorted(range(ids.ndim), key=lambda dim: together[dim])
    inside = math.prod(itertools.compress(split, together))
    return ids.transpose(dims).reshape(-1, inside).tolist()


def _iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: the numbers from 0 in that shape, its dims in that order; `[8,..]<=[2,4]T(1,0)` reshaped."""
    shape, _, source = text.partition("<=") if "<=" in text else ("", "", text)
    found = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", source)
    assert found, text
    dims = _numbers(found[1])
    ids = np.arange(math.prod(dims)).reshape(dims)
    ids = ids.transpose(_numbers(found[2])) if found[2] else ids
    return ids.reshape(_numbers(shape.strip("[]"))) if shape else ids


def axes_of(groups: Iterable[Sequence[int]], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of a mesh along which devices of one group differ; a device's number is its place in the mesh."""
    differ: set[int] = set()
    for group in groups:
        places = np.array(np.unravel_index(list(group), tuple(sizes.values())))
        differ |= set(np.flatnonzero((places != places[:, :1]).any(axis=1)).tolist())
    return tuple(name for index, name in enumerate(sizes) if index in differ)


@functools.cache
def _bytes(shape: str) -> float:
    """Of all arrays in a shape."""
    return sum(_size(kind) * math.prod(_numbers(dims)) for kind, dims in SHAPE.findall(shape))


def _size(kind: str) -> float:
    """Bytes of a number: `f32`, `bf16`, `f8e4m3fn`, `s4`."""
    if kind in _BYTES:
        return _BYTES[kind]
    bits = re.match(r"[a-z]+(\d+)", kind)
    assert bits, kind
    return int(bits[1]) / 8


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
