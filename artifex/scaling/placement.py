"""Where everything lives: abstract tree + rules + mesh -> shardings, bytes per device, and the table of `explain`."""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from artifex.scaling.axes import Resolution, Rule, Rules, check_mesh, check_names, mesh_sizes, resolve
from artifex.scaling.names import ACTIVATION_AXES
from artifex.scaling.strategies.base import Table

Tree = Any


def names_of(model: nnx.Module | nnx.State) -> Tree:
    """The logical axes of every parameter: nested dicts with a tuple of names at each leaf.

    Raises `ValueError` for a parameter that names no axes, too few, or unknown ones.
    """
    state = model if isinstance(model, nnx.State) else nnx.state(model)
    names: dict = {}
    for path, variable in nnx.to_flat_state(state):
        where, axes = "/".join(map(str, path)), variable.get_metadata().get("out_sharding")
        if axes is None:
            raise ValueError(f"parameter {where} of shape {variable.shape} names no logical axes; name each dim")
        check_names(axes, variable.shape, f"parameter {where}")
        node = names
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = tuple(axes)
    return names


def shapes_of(model: nnx.Module | nnx.State) -> Tree:
    """The parameters as nested dicts of `jax.ShapeDtypeStruct`."""
    state = model if isinstance(model, nnx.State) else nnx.state(model)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), nnx.to_pure_dict(state))


def path_of(keys: Iterable[Any]) -> str:
    """The path of a leaf of nested dicts, "layers/mlp/up/kernel"."""
    return "/".join(str(getattr(key, "key", key)) for key in keys)


def leaves_with_names(tree: Tree, names: Tree) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """(path, leaf, names) for each leaf; `names` has the same tree with a tuple at each leaf."""
    named = jax.tree.leaves(names, is_leaf=lambda node: isinstance(node, tuple))
    for (path, leaf), axes in zip(jax.tree_util.tree_leaves_with_path(tree), named, strict=True):
        yield path_of(path), leaf, axes


def sharding(
    leaf: Any, like: Any, names: tuple[str, ...], table: tuple[Rule, ...], rules: Rules, mesh: Mesh
) -> NamedSharding:
    """Where one array that belongs to the parameter `like` with logical axes `names` lives, by one table of `rules`.

    An array that has lost dims of its parameter (a factored second moment) keeps the names of the dims it kept; one
    that is no part of its parameter lives whole on every device.
    """
    kept = kept_names(leaf.shape, like.shape, names)
    if kept is None:
        return NamedSharding(mesh, PartitionSpec())
    return layout(leaf.shape, kept, table, rules, mesh)


def layout(
    shape: tuple[int, ...], names: tuple[str, ...], table: tuple[Rule, ...], rules: Rules, mesh: Mesh
) -> NamedSharding:
    """Where an array of this shape and these logical axes lives, by one table of `rules`."""
    return NamedSharding(mesh, resolve(names, shape, table, mesh_sizes(mesh), rules.min_weight_size).spec)


def shardings(tree: Tree, like: Tree, names: Tree, rules: Rules, table: Table, mesh: Mesh) -> Tree:
    """`sharding` of each array of a tree, which belongs to the parameter at its place in `like`, by its path."""

    def place(keys: Any, leaf: Any, like: Any, names: tuple[str, ...]) -> NamedSharding:
        own = rules.of_path(path_of(keys))
        return sharding(leaf, like, names, getattr(own, table), own, mesh)

    return jax.tree_util.tree_map_with_path(place, tree, like, names)


def kept_names(shape: tuple[int, ...], full: tuple[int, ...], names: tuple[str, ...]) -> tuple[str, ...] | None:
    """The names of the dims of `full` that `shape` kept, in order; None where `shape` is no such part."""
    kept, dims = [], iter(zip(full, names, strict=True))
    for size in shape:
        name = next((name for have, name in dims if have == size), None)
        if name is None:
            return None
        kept.append(name)
    return tuple(kept)


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter under a plan: where it lives, which rules won, and why a dim was left whole."""

    path: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    resolution: Resolution
    total_bytes: int
    bytes_per_device: int


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """What a strategy does to every parameter of a model. Prints as a table; renders as one in a notebook."""

    rows: tuple[Row, ...]
    sizes: Mapping[str, int]
    activations: tuple[tuple[str, tuple[str, ...]], ...] = ()  # a name, and the mesh axes that split it

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(math.prod(row.shape) for row in self.rows)

    @property
    def bytes_per_device(self) -> int:
        """Bytes of parameters on each device."""
        return sum(row.bytes_per_device for row in self.rows)

    @property
    def total_bytes(self) -> int:
        """Bytes of one copy of the parameters."""
        return sum(row.total_bytes for row in self.rows)

    def split_over(self, axis: str) -> int:
        """Bytes of the parameters that mesh axis `axis` splits."""
        return sum(row.total_bytes for row in self.rows if axis in _axes(row.resolution.spec))

    def table(self) -> list[tuple[str, ...]]:
        """Head and rows as text, without columns that are empty in every row."""
        head = ("parameter", "shape", "logical axes", "rule", "spec", "per device", "left whole because")
        body = [
            (
                row.path,
                "x".join(map(str, row.shape)),
                ", ".join(row.names),
                ", ".join(map(str, row.resolution.won)) or "none",
                _spec_text(row.resolution.spec),
                size_text(row.bytes_per_device),
                "; ".join(row.resolution.notes),
            )
            for row in self.rows
        ]
        used = [any(cells) for cells in zip(*body, strict=True)]
        return [tuple(itertools.compress(row, used)) for row in (head, *body)]

    def splits(self) -> list[tuple[str, ...]]:
        """Head and rows as text: the dims of activations that are split."""
        head = ("activation", "what it is", "split over", "ways")
        return [
            head,
            *(
                (name, ACTIVATION_AXES[name], "+".join(axes), str(math.prod(self.sizes[axis] for axis in axes)))
                for name, axes in self.activations
            ),
        ]

    def totals(self) -> list[str]:
        """A line for the mesh, one for each of its axes, one for the whole."""
        mesh = " x ".join(f"{axis}={size}" for axis, size in self.sizes.items())
        lines = [f"mesh {mesh}: {math.prod(self.sizes.values())} devices"]
        for axis, size in self.sizes.items():
            split = self.split_over(axis)
            share = f"{split / max(self.total_bytes, 1):.0%}"
            lines.append(
                f"  {axis:<10} splits {size_text(split)} of {size_text(self.total_bytes)} ({share}) {size} ways"
            )
        whole = sum(1 for row in self.rows if not row.resolution.won)
        lines.append(
            f"{self.parameters:,} parameters in {len(self.rows)} tensors, {whole} of them whole on every device: "
            f"{size_text(self.bytes_per_device)} per device of {size_text(self.total_bytes)}"
        )
        return lines

    def __repr__(self) -> str:
        splits = [*_aligned(self.splits()), ""] if self.activations else []
        return "\n".join([*_aligned(self.table()), "", *splits, *self.totals()])

    def _repr_html_(self) -> str:
        totals = html.escape("\n".join(self.totals()))
        return f"{_html(self.table())}{_html(self.splits()) if self.activations else ''}<pre>{totals}</pre>"


def explain(model: nnx.Module | nnx.State, strategy: Any, mesh: Mesh | Mapping[str, int]) -> Explanation:
    """What `strategy` does to every parameter of `model` on `mesh`, before anything is allocated, and which dims of
    activations it splits where they divide.

    `model` may be abstract (`nnx.eval_shape`); `strategy` is `Rules` or anything with `rules` (a strategy, a `Plan`);
    `mesh` is a mesh or just its sizes, `{"data": 4, "model": 2}`. Raises `ValueError` for a rule that names an axis
    the mesh lacks.
    """
    rules = strategy if isinstance(strategy, Rules) else strategy.rules
    sizes = mesh_sizes(mesh)
    check_mesh(rules, sizes)
    rows = []
    for path, leaf, names in leaves_with_names(shapes_of(model), names_of(model)):
        resolution = _resolved(rules, path, names, leaf.shape, sizes)
        total = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        share = total // resolution.shard_count(sizes)
        rows.append(Row(path, tuple(leaf.shape), names, resolution, total, share))
    over = ((rule.name, tuple(axis for axis in rule.axes if sizes[axis] > 1)) for rule in rules.activations)
    return Explanation(tuple(rows), sizes, tuple((name, axes) for name, axes in over if axes))


def _resolved(
    rules: Rules, path: str, names: tuple[str, ...], shape: tuple[int, ...], sizes: Mapping[str, int]
) -> Resolution:
    """What the rules make of the parameter at `path`, and a note where `Rules.whole` leaves a dim whole."""
    every, own = (
        resolve(names, shape, table, sizes, rules.min_weight_size)
        for table in (rules.params, rules.of_path(path).params)
    )
    return every if own.spec == every.spec else dataclasses.replace(own, notes=(*own.notes, "device.whole says so"))


def bytes_on_device(tree: Tree) -> int:
    """Bytes one device holds of a tree of arrays or `jax.ShapeDtypeStruct`s with shardings; what lies in the memory of
    its host is none of them."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
        if leaf.sharding.memory_kind in (None, "device")
    )


def size_text(size: float) -> str:
    """Bytes as text: `384 B`, `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def _aligned(table: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    head, *body = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
    return [head, "  ".join("-" * width for width in widths), *body]


def _html(table: list[tuple[str, ...]]) -> str:
    def row(cells: tuple[str, ...], tag: str) -> str:
        style = "text-align:left;font-family:monospace"
        return "<tr>" + "".join(f'<{tag} style="{style}">{html.escape(cell)}</{tag}>' for cell in cells) + "</tr>"

    head, *body = table
    return f"<table>{row(head, 'th')}{''.join(row(cells, 'td') for cells in body)}</table>"


def _axes(spec: PartitionSpec) -> set[str]:
    return {axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ())}


def _spec_text(spec: PartitionSpec) -> str:
    parts = ["+".join((entry,) if isinstance(entry, str) else entry) if entry else "-" for entry in spec]
    return f"({', '.join(parts)})"
