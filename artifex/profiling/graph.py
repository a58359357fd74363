"""Who sends how much to whom in a step, by its collectives."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from artifex.scaling.communication import Collective

Edge = tuple[int, int]


def graph(rows: Iterable[Collective], mesh: Mapping[str, int]) -> dict[Edge, float]:
    """(sender, receiver) -> bytes, by the places of devices in a mesh of such sizes, row-major."""
    found: dict[Edge, float] = {}
    for row in rows:
        for group in groups(row.axes, mesh):
            pairs, share = _ways(row.kind, group)
            for pair in pairs:
                found[pair] = found.get(pair, 0.0) + row.sent * share
    return dict(sorted(found.items()))


def groups(axes: Sequence[str], mesh: Mapping[str, int]) -> Iterator[list[int]]:
    """The devices that differ along these axes alone, group by group."""
    sizes = list(mesh.values())
    place = {at: number for number, at in enumerate(itertools.product(*map(range, sizes)))}
    fixed = [index for index, axis in enumerate(mesh) if axis not in axes]
    by_fixed: dict[tuple[int, ...], list[int]] = {}
    for at, number in place.items():
        by_fixed.setdefault(tuple(at[index] for index in fixed), []).append(number)
    yield from by_fixed.values()


def _ways(kind: str, group: list[int]) -> tuple[list[Edge], float]:
    """The pairs in which a collective of a group sends, and the share of what a device sends that each takes."""
    if kind == "all-to-all":
        return list(itertools.permutations(group, 2)), 1 / max(len(group) - 1, 1)
    return list(zip(group, [*group[1:], group[0]], strict=True)) if len(group) > 1 else [], 1.0
