"""How arrays lie on a mesh: one array device by device, a tree of parameters row by row."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from artifex.scaling.axes import Names, mesh_sizes
from artifex.scaling.figures import FILLS, HATCHES, Picture, check_path, finish, picture
from artifex.scaling.pictures import draw_shards
from artifex.scaling.placement import Explanation, explain, path_of, size_text

WHOLE = "whole"
LETTERS = 44  # of a parameter's path
Path = str | os.PathLike[str]


def plot_sharding(
    array_or_shape: Any,
    spec: PartitionSpec | NamedSharding | None = None,
    mesh: Mesh | Mapping[str, int] | None = None,
    names: Names | None = None,
    path: Path | None = None,
) -> Picture:
    """How one array lies on its mesh: a frame for each device, filled where that device holds it.

    `array_or_shape`: a `jax.Array`, a `jax.ShapeDtypeStruct` with a sharding, or a shape with `spec` and `mesh`, which
    may be only its sizes. `names` are logical axes, one, or None, for each dim. Raises `ValueError` where it is not
    known how the array lies, for a spec that does not fit the shape or the mesh, and for an ending of `path` that is
    neither .png nor .svg.
    """
    check_path(path)
    shape = tuple(getattr(array_or_shape, "shape", array_or_shape))
    spec, mesh = _layout(array_or_shape, spec, mesh)
    sizes = mesh_sizes(mesh)
    if not sizes:
        raise ValueError(f"the mesh of the array of shape {shape} has no axes; give one, as {{'data': 8}}")
    scalar = not shape
    names = (None,) * len(shape) if names is None else names
    figure = picture(5, 5)
    axes = figure.subplots()
    draw_shards(axes, spec, shape or (1,), mesh, names or (None,))
    right, (bottom, top) = axes.get_xlim()[1], axes.get_ylim()
    frame = min(1.0, 15 / right, 20 / (bottom - top))  # inches
    figure.set_size_inches(max(5.5, frame * right), frame * (bottom - top) + 1.4)
    axes.set_xlim(0, max(5.5 / frame, right))
    what = "a scalar" if scalar else "x".join(map(str, shape))
    lines = [f"{what} as {spec_text(spec, len(shape))}", _copies(spec, sizes)]
    axes.set_title("\n".join(lines), loc="left", size="medium")
    return finish(figure, path)


def _layout(array: Any, spec: Any, mesh: Any) -> tuple[PartitionSpec, Mesh | Mapping[str, int]]:
    """Spec and mesh as they are given, else those of the array."""
    own = spec if isinstance(spec, NamedSharding) else getattr(array, "sharding", None)
    if isinstance(own, NamedSharding) and (spec is None or spec is own):
        return own.spec, own.mesh if mesh is None else mesh  # type: ignore[return-value]
    if spec is None and mesh is None and isinstance(own, SingleDeviceSharding):
        (device,) = own.device_set
        return PartitionSpec(), Mesh(np.array([device]), ("device",))
    if spec is None or mesh is None or isinstance(spec, NamedSharding):
        raise ValueError(
            f"how {_named(array)} lies is not known: it has no NamedSharding; give spec and mesh, as "
            "PartitionSpec('fsdp'), {'fsdp': 8}"
        )
    return PartitionSpec(*spec), mesh


def _named(array: Any) -> str:
    shape = getattr(array, "shape", array)
    return f"an array of shape {tuple(shape)}"


def spec_text(spec: PartitionSpec, dims: int) -> str:
    """A spec as text: `(data+fsdp, -)`."""
    entries = [*spec, *[None] * (dims - len(spec))]
    parts = ["+".join((one,) if isinstance(one, str) else one) if one else "-" for one in entries]
    return f"({', '.join(parts)})"


def _copies(spec: PartitionSpec, sizes: Mapping[str, int]) -> str:
    """How many parts there are, and copies of each."""
    axes = [axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]
    parts = math.prod(sizes[axis] for axis in axes)
    devices = math.prod(sizes.values())
    if parts == 1:
        return f"whole on each of {devices} devices" if devices > 1 else "whole on one device"
    copies = devices // parts
    return f"{parts} parts, " + ("each on one device" if copies == 1 else f"each on {copies} devices")


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of the picture: alike parameters, `count` of them; bytes are of all of them together."""

    path: str
    shape: tuple[int, ...]
    split: tuple[tuple[str, ...], ...]  # the mesh axes of each dim
    total: int
    held: int
    count: int = 1
    names: Names = ()


def plot_tree(
    tree_or_model: Any,
    plan_or_rules: Any = None,
    mesh: Mesh | Mapping[str, int] | None = None,
    path: Path | None = None,
    *,
    rows: int = 40,
) -> Picture:
    """How a tree of parameters lies on a mesh: a row a parameter, its dims as boxes, its bytes on a device as a bar.

    A box is filled and hatched by the mesh axes that split its dim, whose names stand in it; an empty one is a dim
    that stays together. Parameters that differ only in the number of their block share a row. The largest `rows` rows
    on a device are drawn, the rest summed up in one more. `tree_or_model`: a model or its state, abstract or not, with
    a plan, a strategy or rules, and a mesh or only its sizes; what `explain` gave; or a tree of arrays, or of
    `jax.ShapeDtypeStruct`s, which have their shardings. Raises `ValueError` for what is none of these, for rules that
    do not fit the mesh, `rows` below 1, and an ending of `path` that is neither .png nor .svg.
    """
    check_path(path)
    if rows < 1:
        raise ValueError(f"rows is {rows}; it must be at least 1")
    lines, sizes = _lines(tree_or_model, plan_or_rules, mesh)
    lines = sorted(_stacked(lines), key=lambda line: (-line.held, line.path))
    shown, rest = lines[:rows], lines[rows:]
    dims = max((len(line.shape) for line in shown), default=1)
    figure = picture(10.5 + 0.4 * max(dims - 3, 0), 1.7 + 0.27 * (len(shown) + bool(rest)))
    left, right = figure.subplots(1, 2, width_ratios=(max(dims, 2), 2.4), sharey=True)
    styles = _draw_dims(left, shown, dims)
    _draw_bytes(right, shown, rest)
    left.set(ylim=(len(shown) + bool(rest), 0))
    devices = math.prod(sizes.values())
    mesh_text = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    held, total = (sum(getattr(line, field) for line in lines) for field in ("held", "total"))
    whole = sum(line.count for line in lines if not any(line.split))
    count = sum(line.count for line in lines)
    figure.suptitle(
        f"{count} parameters on {mesh_text}, {devices} device{'s' * (devices != 1)}: {size_text(held)} of "
        f"{size_text(total)} on each; {whole} whole everywhere",
        x=0.01,
        ha="left",
        size="medium",
    )
    if styles:
        keys = [Patch(label=f"split by {name}", ec="0.25", **style) for name, style in styles.items()]
        figure.legend(handles=keys, loc="outside lower left", ncols=4, frameon=False, fontsize="small")
    return finish(figure, path)


def _lines(tree: Any, plan: Any, mesh: Any) -> tuple[list[Line], dict[str, int]]:
    """A line for each parameter, and the mesh's sizes."""
    if isinstance(tree, nnx.Module | nnx.State) and plan is not None:
        if mesh is None:
            raise ValueError("a model and a plan say nothing of the mesh; give one, or its sizes as {'fsdp': 8}")
        tree = explain(tree, plan, mesh)
    if isinstance(tree, Explanation):
        found = []
        for row in tree.rows:
            split = _split(row.resolution.spec, len(row.shape), tree.sizes)
            found.append(Line(row.path, row.shape, split, row.total_bytes, row.bytes_per_device, 1, row.names))
        return found, dict(tree.sizes)
    if plan is not None:
        raise ValueError(f"{type(tree).__name__} names no logical axes for a plan; give a model, or arrays alone")
    tree = nnx.to_pure_dict(nnx.state(tree)) if isinstance(tree, nnx.Module) else tree
    tree = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    found, sizes = [], {} if mesh is None else mesh_sizes(mesh)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        spec, own = _layout(leaf, None, None)
        sizes = sizes or mesh_sizes(own)
        if mesh_sizes(own) != sizes and any(spec):
            raise ValueError(f"{path_of(keys)} lies on the mesh {mesh_sizes(own)}, others on {sizes}; draw them apart")
        total = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        split = _split(spec, len(leaf.shape), sizes)
        ways = math.prod(sizes[axis] for axes in split for axis in axes)
        found.append(Line(path_of(keys), tuple(leaf.shape), split, total, total // ways))
    if not found:
        raise ValueError("the tree has no arrays; give a model or a tree of arrays")
    return found, sizes


def _split(spec: PartitionSpec, dims: int, sizes: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
    """The mesh axes that split each dim; those of size 1 split nothing."""
    entries = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
    entries += [()] * (dims - len(entries))
    return tuple(tuple(axis for axis in entry if sizes[axis] > 1) for entry in entries)


def _stacked(lines: Sequence[Line]) -> list[Line]:
    """Those whose paths differ only in a number, and that lie alike, as one: "blocks/*/kernel"."""
    together: dict[Any, Line] = {}
    for line in lines:
        name = re.sub(r"(?<=/)\d+(?=/|$)|^\d+(?=/)", "*", line.path)
        key = (name, line.shape, line.split)
        have = together.get(key)
        if have is None:
            together[key] = line
            continue
        total, held, count = have.total + line.total, have.held + line.held, have.count + 1
        together[key] = dataclasses.replace(have, path=name, total=total, held=held, count=count)
    return [*together.values()]


def _draw_dims(axes: Axes, lines: Sequence[Line], dims: int) -> dict[str, dict[str, Any]]:
    """A box for each dim of each parameter; how those that are split are filled."""
    styles: dict[str, dict[str, Any]] = {}
    for row, line in enumerate(lines):
        for dim, (size, split) in enumerate(zip(line.shape, line.split, strict=True)):
            name = "+".join(split)
            if split and name not in styles:
                number = len(styles) % len(FILLS)
                styles[name] = {"fc": FILLS[number], "hatch": HATCHES[1 + number % (len(HATCHES) - 1)]}
            look: dict[str, Any] = styles[name] if split else {"fc": "white"}
            box = Rectangle((dim + 0.02, row + 0.08), 0.96, 0.84, ec="0.6", lw=0.6, gid=f"row {row} dim {dim}", **look)
            axes.add_patch(box)
            own = f"{line.names[dim]} {size}" if line.names else str(size)
            text = f"{own} / {name}" if split else own
            ground = {"boxstyle": "square,pad=0.1", "fc": look["fc"], "ec": "none"}
            axes.text(dim + 0.5, row + 0.5, text, ha="center", va="center", size=6.2, bbox=ground)
    axes.set(xlim=(0, dims), xticks=[], yticks=[row + 0.5 for row in range(len(lines))])
    axes.set_yticklabels([_shortened(line) for line in lines], size="small")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return styles


def _shortened(line: Line) -> str:
    """The path, its beginning left out where it is long, and how many it stands for."""
    name = line.path if len(line.path) <= LETTERS else f"…{line.path[1 - LETTERS :]}"
    return name if line.count == 1 else f"{name} x {line.count}"


def _draw_bytes(axes: Axes, lines: Sequence[Line], rest: Sequence[Line]) -> None:
    """A bar for the bytes that a device holds, with what they are in words."""
    held = [line.held for line in lines] + ([sum(line.held for line in rest)] if rest else [])
    most = max(held) or 1
    for row, size in enumerate(held):
        line = lines[row] if row < len(lines) else None
        if line is None:
            text = f"{size_text(size)} in {sum(one.count for one in rest)} more"
        else:
            ways = line.total // max(line.held, 1)
            text = f"{size_text(size)}, {WHOLE}" if not any(line.split) else f"{size_text(size)}, 1/{ways}"
        look: dict[str, Any] = {"fc": "0.45", "ec": "0.45"}
        if line is not None and not any(line.split):
            look = {"fc": "0.88", "ec": "0.45", "hatch": "////"}
        axes.barh(row + 0.5, size / most, height=0.6, **look, gid=f"bytes of row {row}")
        axes.text(size / most + 0.015, row + 0.5, text, va="center", size="x-small")
    axes.set(xlim=(0, 1.55), xticks=[])
    axes.set_title("bytes on a device", loc="left", size="small")
    axes.tick_params(length=0, labelleft=False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
