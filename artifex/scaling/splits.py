"""What `device_mesh` and `tensor_split` mean, as a sharding of JAX, and a sharding in words and as a picture.

A *mesh axis* has as many devices as its size says; `tensor_split` says for each axis which dim of the tensor it splits.

Which devices? With `mesh=`, or inside `with jax.set_mesh(mesh):`, all of that mesh, whatever `device_mesh` says: it has
an entry for each axis of the mesh, the axis's size, or 1 to keep copies along it. So (2, 1) and (1, 2) on a mesh of
(2, 2) lie on the same four devices and meet in one computation. Without a mesh, the first that `jax.devices()` lists,
as many as `device_mesh` multiplies to, in that order: meshes of one count meet in one computation, of two counts not.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from artifex.scaling.array_checks import is_integer
from artifex.scaling.pictures import draw_shards
from artifex.scaling.placement import size_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def sharding_for(
    shape: Sequence[int],
    device_mesh: Sequence[int] | None = None,
    tensor_split: Sequence[int | None] | None = None,
    mesh: Mesh | None = None,
) -> NamedSharding | None:
    """Where a tensor of `shape` lives; None where nothing is asked for, and JAX may put it anywhere.

    `tensor_split[i]` is the dim that mesh axis i splits, from 0, or from the end below 0; None keeps copies along the
    axis. By default axis i splits dim i, for every axis of `device_mesh` larger than 1. `tensor_split` alone, with a
    mesh at hand, splits over the whole of it; neither: a copy on each of the mesh's devices, or inside `jax.jit`
    wherever XLA likes. Raises `TypeError` for anything but integers, `ValueError` for more devices than there are, a
    `device_mesh` that is not of the mesh, a dim that is not there, is split twice or does not divide, and for mesh axes
    that are not Auto.
    """
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {mesh!r}; a shape alone is device_mesh=")
    whole = mesh if mesh is not None else _mesh_at_hand()
    if device_mesh is None and tensor_split is None:
        if whole is None or isinstance(whole, AbstractMesh):
            return None
        _check_axis_types(whole, ())
        return NamedSharding(whole, PartitionSpec())
    if device_mesh is None and whole is None:
        raise ValueError(
            f"tensor_split {tensor_split} splits over no mesh; give device_mesh, such as (2,), or mesh, or set one by "
            "jax.set_mesh"
        )
    sizes = tuple(whole.shape.values()) if device_mesh is None and whole else _checked_sizes(device_mesh)
    if whole is None:
        whole = _first_devices(sizes)
    else:
        _check_part_of(sizes, whole)
    split = _checked_split(tensor_split, sizes, shape, tuple(whole.axis_names))
    _check_axis_types(whole, split)
    return NamedSharding(whole, PartitionSpec(*split))


COPIES = "copies"  # the axis that no dim is split over, where no mesh is known


@dataclasses.dataclass(frozen=True, repr=False)
class Spread:
    """How an array lies on devices: prints as words, draws as a picture."""

    shape: tuple[int, ...]
    dtype: np.dtype
    mesh: Mesh
    axes: tuple[tuple[str, ...], ...]
    """For each dim the axes of `mesh` that split it."""

    @property
    def parts(self) -> tuple[int, ...]:
        """Into how many parts each dim is split."""
        return tuple(math.prod(self.mesh.shape[axis] for axis in over) for over in self.axes)

    @property
    def copies(self) -> int:
        """How many devices hold each part."""
        return self.mesh.size // math.prod(self.parts)

    @property
    def total_bytes(self) -> int:
        """Bytes of one copy of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def bytes_per_device(self) -> int:
        """Bytes on each device."""
        return self.total_bytes // math.prod(self.parts)

    def draw(self, axes: Axes) -> None:
        """Draw on matplotlib's `axes` a frame for each device, filled where it holds the array: see `draw_shards`."""
        spec = PartitionSpec(*(over or None for over in self.axes))
        draw_shards(axes, spec, self.shape, self.mesh, (None,) * len(self.shape))

    def __repr__(self) -> str:
        where = f"{self.mesh.devices.flat[0].platform} {_ranges([device.id for device in self.mesh.devices.flat])}"
        head = f"{self.dtype.name} {self.shape}, {size_text(self.total_bytes)}"
        if self.mesh.size == 1:
            return f"{head}: whole on {where}"
        lines = [f"{head}: {size_text(self.bytes_per_device)} on each of {self.mesh.size} devices, {where}"]
        for dim, (size, ways, over) in enumerate(zip(self.shape, self.parts, self.axes, strict=True)):
            how = f"{ways} parts of {size // ways} over {' and '.join(over)}" if ways > 1 else "whole"
            lines.append(f"  dim {dim}: {size}, {how}")
        used = set(itertools.chain(*self.axes))
        kept = [axis for axis, size in self.mesh.shape.items() if axis not in used and size > 1]
        if kept:
            along = "" if kept == [COPIES] else f", along {' and '.join(kept)}"
            lines.append(f"  {self.copies} copies of each part{along}")
        return "\n".join(lines)


def sharding_of(x: Any) -> Spread:
    """How `x`, an array of JAX or a `jax.ShapeDtypeStruct` with a sharding, lies on devices.

    Raises `TypeError` for anything else, such as a NumPy array, or one inside of `jax.jit`, which lies nowhere yet.
    """
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, Sharding):
        raise TypeError(f"{type(x).__name__} lies on no devices; sharding_of takes a jax.Array outside of jax.jit")
    shape, dtype = tuple(x.shape), np.dtype(x.dtype)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        entries = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in sharding.spec]
        return Spread(shape, dtype, sharding.mesh, tuple(entries + [()] * (len(shape) - len(entries))))
    # no mesh is known, as of some results of a jit without out_shardings: an axis for each dim, and one of copies
    slices = sharding.devices_indices_map(shape)
    order = sorted(slices, key=lambda device: ([part.start or 0 for part in slices[device] or ()], device.id))
    parts = [size // part if part else 1 for size, part in zip(shape, sharding.shard_shape(shape), strict=True)]
    grid = np.array(order, dtype=object).reshape(*parts, -1)
    names = [f"axis{dim}" for dim in range(len(parts))]
    return Spread(shape, dtype, Mesh(grid, (*names, COPIES)), tuple((name,) for name in names))


def _mesh_at_hand() -> Mesh | AbstractMesh | None:
    """The mesh of `jax.set_mesh`; inside `jax.jit` its sizes, which are all that is known there."""
    sizes = jax.sharding.get_abstract_mesh()
    if sizes.empty:
        return None
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:  # while a function is traced
        return sizes
    return sizes if mesh.empty else mesh


def _first_devices(sizes: tuple[int, ...]) -> Mesh:
    devices, wanted = jax.devices(), math.prod(sizes)
    if wanted > len(devices):
        hint = f"; or simulate {wanted} on a CPU: JAX_NUM_CPU_DEVICES={wanted}" if devices[0].platform == "cpu" else ""
        raise ValueError(
            f"device_mesh {sizes} needs {wanted} devices, {len(devices)} present; choose sizes whose product is at "
            f"most {len(devices)}{hint}"
        )
    grid = np.array(devices[:wanted], dtype=object).reshape(sizes)
    return Mesh(grid, tuple(f"axis{i}" for i in range(len(sizes))), axis_types=(AxisType.Auto,) * len(sizes))


def _checked_sizes(device_mesh: Any) -> tuple[int, ...]:
    if not isinstance(device_mesh, list | tuple) or not all(map(is_integer, device_mesh)):
        raise TypeError(f"device_mesh must be a tuple of integers, such as (2,) or (2, 2), got {device_mesh!r}")
    sizes = tuple(int(size) for size in device_mesh)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"device_mesh {sizes} is not a mesh: it has an axis at least, and each axis a device at least")
    return sizes


def _check_part_of(sizes: tuple[int, ...], mesh: Mesh | AbstractMesh) -> None:
    """Raise `ValueError` unless each of `sizes` is the size of the mesh's axis, or 1."""
    written = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    if len(sizes) != len(mesh.shape):
        raise ValueError(
            f"device_mesh {sizes} has {len(sizes)} axes, but the mesh at hand, {written}, {len(mesh.shape)}; give each "
            "axis its size, or 1 to keep copies along it"
        )
    for i, (size, (axis, there)) in enumerate(zip(sizes, mesh.shape.items(), strict=True)):
        if size not in (1, there):
            raise ValueError(
                f"axis {i} of device_mesh {sizes} has size {size}, but {axis} of the mesh at hand, {written}, {there}; "
                f"give {there}, or 1 to keep copies along it"
            )


def _check_axis_types(mesh: Mesh | AbstractMesh, split: Sequence[str | None]) -> None:
    """Raise `ValueError` for an axis whose arrays' types say how they lie, or that splits where a device has a part."""
    for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if kind == AxisType.Explicit:
            raise ValueError(
                f"mesh axis {axis!r} is Explicit, and arrays here lie on Auto axes; make the mesh by "
                f"create_device_mesh, or by jax.make_mesh with axis_types=(AxisType.Auto,) * {len(mesh.axis_names)}"
            )
        if kind == AxisType.Manual and axis in split:
            raise ValueError(
                f"mesh axis {axis!r} is Manual here, inside jax.shard_map, where a device has its own part only; make "
                "the part, without a split over that axis"
            )


def _checked_split(
    tensor_split: Any, sizes: tuple[int, ...], shape: Sequence[int], names: tuple[str, ...]
) -> list[str | None]:
    """For each dim the name of the mesh axis that splits it, or None."""
    if tensor_split is None:
        split: list[int | None] = [i if size > 1 else None for i, size in enumerate(sizes)]
    else:
        if not isinstance(tensor_split, list | tuple) or not all(d is None or is_integer(d) for d in tensor_split):
            raise TypeError(
                f"tensor_split must be a tuple of dims, or None, for each mesh axis, such as (0, None), got "
                f"{tensor_split!r}"
            )
        split = list(tensor_split)
    if len(split) != len(sizes):
        raise ValueError(
            f"tensor_split {tuple(split)} has {len(split)} entries, device_mesh {sizes} {len(sizes)} axes; give a dim, "
            "or None, for each axis"
        )
    over: list[str | None] = [None] * len(shape)
    axis_of: dict[int, int] = {}
    for i, (dim, size) in enumerate(zip(split, sizes, strict=True)):
        if dim is None:
            continue
        if not -len(shape) <= dim < len(shape):
            raise ValueError(
                f"mesh axis {i} of {size} devices would split dim {dim}, but shape {tuple(shape)} has {len(shape)} "
                f"dims; set tensor_split to another dim there, or to None to keep copies along the axis"
            )
        dim %= len(shape)
        if dim in axis_of:
            raise ValueError(
                f"tensor_split {tuple(split)} splits dim {dim} twice, by mesh axes {axis_of[dim]} and {i}; split it by "
                "one, of a device_mesh in which both are one axis, or set the other entry to None"
            )
        axis_of[dim] = i
        if shape[dim] % size:
            below = shape[dim] // size * size
            near = f"{below} would, or {below + size}" if below else f"{size} would"
            raise ValueError(
                f"dim {dim} of shape {tuple(shape)} is {shape[dim]}, which does not divide by the {size} devices of "
                f"mesh axis {i} ({names[i]}); {near}"
            )
        over[dim] = names[i] if size > 1 else None
    return over


def _ranges(ids: Sequence[int]) -> str:
    """Numbers as text, those that follow each other as a range: `0-3, 6`."""
    text, rest = [], list(ids)
    while rest:
        length = next((i for i, n in enumerate(rest) if n != rest[0] + i), len(rest))
        text.append(f"{rest[0]}-{rest[length - 1]}" if length > 2 else ", ".join(map(str, rest[:length])))
        del rest[:length]
    return ", ".join(text)
