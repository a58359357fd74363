"""Where the devices of a mesh stand in a picture: its last axis to the right, the one before downwards, all others
grids side by side."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from jax.sharding import Mesh

from artifex.scaling.axes import mesh_sizes

GAP = 0.5  # between grids, in widths of a cell
WIDEST = 16  # cells of a row; more are folded
DeviceMesh = Sequence[int] | Mapping[str, int] | Mesh


@dataclasses.dataclass(frozen=True)
class DeviceGrid:
    """`sizes` is axis -> size; `position` is device id -> its index along each axis."""

    sizes: dict[str, int]
    position: dict[int, tuple[int, ...]]

    def at(self, device: int) -> tuple[float, float]:
        """(column, row) of a device; fractions where grids stand side by side or rows are folded."""
        *outer, row, column = (0, *self.position[device])
        number = 0
        for index, size in zip(outer, (1, *self.sizes.values()), strict=False):
            number = number * size + index
        below, column = divmod(column, self._width)
        return number * (self._width + GAP) + column, row * (self._folds + self._fold_gap) + float(below)

    @property
    def _last(self) -> int:
        return [*self.sizes.values()][-1]

    @property
    def _width(self) -> int:
        """Cells of a row: the whole last axis, or the largest part of it that divides it and is not too wide."""
        return next(n for n in range(min(self._last, WIDEST), 0, -1) if self._last % n == 0 or n == WIDEST // 2)

    @property
    def _folds(self) -> int:
        return -(-self._last // self._width)

    @property
    def _fold_gap(self) -> float:
        return GAP if self._folds > 1 else 0.0

    @property
    def columns(self) -> float:
        """Cells to the right, gaps between grids included."""
        grids = math.prod([*self.sizes.values()][:-2])
        return grids * (self._width + GAP) - GAP

    @property
    def rows(self) -> float:
        """Cells downwards, gaps between folded rows included."""
        return (1, *self.sizes.values())[-2] * (self._folds + self._fold_gap) - self._fold_gap

    def axes_between(self, one: int, other: int) -> tuple[str, ...]:
        """The axes along which two devices differ."""
        pairs = zip(self.sizes, self.position[one], self.position[other], strict=True)
        return tuple(axis for axis, here, there in pairs if here != there)

    def caption(self) -> str:
        """Which axis runs where."""
        *outer, last = self.sizes
        parts = [*(f"{axis} grid by grid" for axis in outer[:-1]), *(f"{axis} ↓" for axis in outer[-1:]), f"{last} →"]
        parts[-1] += f" in rows of {self._width}" if self._folds > 1 else ""
        return f"devices: {', '.join(parts)}"

    def check(self, devices: Iterable[int], what: str) -> None:
        """Raise `ValueError` where one of `devices`, which `what` names, is none of the mesh."""
        strangers = sorted({device for device in devices if device not in self.position}, key=str)
        if strangers:
            ids = sorted(self.position)
            raise ValueError(
                f"{what} names device {strangers[0]!r}, but the mesh {self.sizes} has {len(ids)} devices, "
                f"{ids[0]} to {ids[-1]}; give the mesh of the measurement"
            )


def device_grid(device_mesh: DeviceMesh) -> DeviceGrid:
    """The devices of a mesh, of its sizes alone, or of sizes without names, whose axes are axis0, axis1, ...

    Without a `Mesh` devices are numbered in its order, the last axis fastest. Raises `ValueError` for no sizes, or
    one below 1.
    """
    if isinstance(device_mesh, Mesh | Mapping):
        sizes = mesh_sizes(device_mesh)
    else:
        sizes = {f"axis{number}": size for number, size in enumerate(device_mesh)}
    if not sizes or any(type(size) is not int or size < 1 for size in sizes.values()):
        raise ValueError(f"device mesh {device_mesh} needs at least one axis, each of an integer size from 1 on")
    positions = itertools.product(*map(range, sizes.values()))
    if isinstance(device_mesh, Mesh):
        return DeviceGrid(sizes, {device_mesh.devices[position].id: position for position in positions})
    return DeviceGrid(sizes, dict(enumerate(positions)))
