"""What a strategy is: a table of rules over one mesh axis, specs for names, and arrays placed by them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from artifex.scaling.axes import (
    ACTIVATION_AXES,
    WEIGHT_AXES,
    Names,
    Rule,
    Rules,
    check_name,
    check_names,
    mesh_sizes,
    resolve,
)
from artifex.scaling.mesh_utils import check_count

MeshLike = Mesh | Mapping[str, int]
"""A mesh, or the sizes of its axes by name, which need no devices."""


Table = Literal["params", "gradients", "optimizer"]

REST: tuple[str, ...] = (
    *("embed", "out_features", "in_features", "conv_out", "conv_hidden", "conv_in", "vocab", "mlp", "expert_mlp"),
    *("heads", "kv_heads", "latent", "codes", "classes", "positions", "head_dim", "experts"),
    *("condition", "context", "frequencies"),
)
"""Weight dims in the order in which strategies that divide whatever is left choose one."""


def leading(name: str, shape: tuple[int, ...]) -> Names:
    """`name` for the first dim of an array, and None for the others."""
    return (name,) * bool(shape) + (None,) * (len(shape) - 1)


@dataclasses.dataclass(frozen=True)
class ShardingStrategy(ABC):
    """One form of parallelism over one mesh axis: `axis_name`, or on a mesh without that name the axis at position
    `mesh_axis` (None: such a mesh is an error)."""

    axis_name: str
    mesh_axis: int | None = None

    label: ClassVar[str]  # what rules and errors call it

    def __post_init__(self) -> None:
        if not isinstance(self.axis_name, str) or not self.axis_name:
            raise ValueError(f"axis_name {self.axis_name!r} is not the name of a mesh axis")
        if self.mesh_axis is not None:
            check_count("mesh_axis", self.mesh_axis, least=0)

    divides: ClassVar[tuple[Table, ...]] = ()
    """The tables in which it divides, among the devices of its axis, weight dims that no strategy has claimed."""

    @property
    @abstractmethod
    def claims(self) -> Rules:
        """What this strategy maps to its axis whatever stands beside it."""

    @property
    def rules(self) -> Rules:
        """What this strategy alone maps each logical axis to."""
        return with_the_rest(self.claims, [self])

    @abstractmethod
    def names_for(self, shape: tuple[int, ...], ways: int) -> Names:
        """The logical axes an array that comes without names is taken to have, on a mesh axis of `ways` devices."""

    def on(self, mesh: MeshLike) -> Self:
        """This strategy with `axis_name` an axis of `mesh`. Raises `ValueError` where the mesh has no such axis."""
        axes = tuple(mesh_sizes(mesh))
        if self.axis_name in axes:
            return self
        if self.mesh_axis is None or self.mesh_axis >= len(axes):
            raise ValueError(
                f"{type(self).__name__} splits over mesh axis {self.axis_name!r} (position {self.mesh_axis}), but the "
                f"mesh has {axes}; name one of them as axis_name, or give its position as mesh_axis"
            )
        return dataclasses.replace(self, axis_name=axes[self.mesh_axis])

    def get_partition_spec(
        self, names: Names | None = None, shape: Sequence[int] | None = None, mesh: MeshLike | None = None
    ) -> PartitionSpec:
        """The spec of a tensor whose dims have these logical axes (None: a dim of its own, never split).

        Without `shape` and `mesh` it is what the rules ask for; with both, what `apply_sharding` does: a weight dim
        that does not divide stays whole. Names may be left out where shape and mesh are given; the strategy's class
        says what such an array is taken for. Raises `ValueError` for unknown names, weight and activation names in
        one tensor, a mesh without the strategy's axis, and a batch that does not divide.
        """
        if mesh is None or shape is None:
            if names is None or shape is not None:
                raise ValueError("get_partition_spec needs names, or shape and mesh together, or all three")
            return partition_spec((self if mesh is None else self.on(mesh)).rules, names)
        sizes, shape, here = mesh_sizes(mesh), tuple(shape), self.on(mesh)
        if names is not None:
            return partition_spec(here.rules, names, shape, sizes)
        names = here.names_for(shape, sizes[here.axis_name])
        return partition_spec(here.rules, names, shape, sizes, must_divide=names)

    def apply_sharding(self, arrays: Any, mesh: Mesh, names: Any = None) -> Any:
        """Place an array, or every array of a tree, as `get_partition_spec` says.

        `names` are the logical axes of the array, for a tree a tree of such tuples. Values never change.
        """
        return place(arrays, mesh, names, lambda _, names, shape: self.get_partition_spec(names, shape, mesh))


def with_the_rest(rules: Rules, strategies: Sequence[ShardingStrategy]) -> Rules:
    """`rules`, and behind them, for the strategies that divide what is left, the weight dims of `REST`.

    Several divide the same dim, the first of them by the largest pieces, as far as it divides.
    """
    tables: dict[str, tuple[Rule, ...]] = {}
    for table in get_args(Table):
        dividing = [one for one in strategies if table in one.divides]
        axes = tuple(dict.fromkeys(one.axis_name for one in dividing))
        label = "+".join(dict.fromkeys(one.label for one in dividing))
        rest = tuple(Rule(name, axes, label, rest=True) for name in REST) if axes else ()
        tables[table] = getattr(rules, table) + rest
    return dataclasses.replace(rules, **tables)


def partition_spec(
    rules: Rules,
    names: Names,
    shape: Sequence[int] | None = None,
    sizes: Mapping[str, int] | None = None,
    must_divide: Collection[str | None] = ("batch",),
) -> PartitionSpec:
    """The spec of one tensor by its logical axes: with `shape` and mesh `sizes` what fits, without what is asked for.

    A weight dim that does not divide stays whole. Raises `ValueError` where a dim named in `must_divide` does not
    divide, for unknown names, and for names of weights and of activations in one tensor.
    """
    of_weights = [check_name(name) for name in names if name in WEIGHT_AXES or name not in (*ACTIVATION_AXES, None)]
    of_activations = [name for name in names if name in ACTIVATION_AXES]
    if of_weights and of_activations:
        raise ValueError(
            f"logical axes {tuple(names)} mix names of weights {of_weights} and of activations {of_activations}; the "
            "residual stream of an activation is 'hidden', its heads are 'act_heads'"
        )
    if shape is None or sizes is None:
        # Sizes unknown: take two devices on every axis, and dims that divide by all of them.
        sizes = dict.fromkeys(rules.mesh_axes, 2)
        shape = (2 ** len(sizes),) * len(names)
        rules = dataclasses.replace(rules, min_weight_size=())
    check_names(names, shape)
    if of_activations:
        table, least = rules.activations, ()
    else:
        table, least = rules.params, rules.min_weight_size
    for rule in table:
        ways = math.prod(sizes.get(axis, 1) for axis in rule.axes)
        for dim, size in enumerate(shape):
            if names[dim] == rule.name and rule.name in must_divide and size % ways:
                raise ValueError(
                    f"dim {dim} ({rule.name}) of shape {tuple(shape)} does not divide by the {ways} devices of mesh "
                    f"axis {'+'.join(rule.axes)}; make it a multiple, such as {-(-size // ways) * ways}"
                )
    return resolve(names, shape, table, sizes, least).spec


def place(arrays: Any, mesh: Mesh, names: Any, spec_of: Callable[[str, Any, tuple[int, ...]], PartitionSpec]) -> Any:
    """Put every array of a tree where `spec_of(path, its names, its shape)` says. Errors name the array."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(arrays)
    named = [None] * len(leaves) if names is None else tree.flatten_up_to(names)
    shardings = []
    for (path, leaf), its_names in zip(leaves, named, strict=True):
        where = jax.tree_util.keystr(path, simple=True, separator=".")
        with errors_name(where):
            shardings.append(NamedSharding(mesh, spec_of(where, its_names, jnp.shape(leaf))))
    return jax.device_put(arrays, tree.unflatten(shardings))


@contextlib.contextmanager
def errors_name(tensor: str) -> Iterator[None]:
    """Begin the message of a `ValueError` with the name of the tensor."""
    try:
        yield
    except ValueError as error:
        if not tensor:
            raise
        raise ValueError(f"{tensor}: {error}") from error
