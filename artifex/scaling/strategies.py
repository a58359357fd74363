"""Strategies: how tensors are spread over the axes of a mesh. Each one is a table of rules for logical axes.

A strategy answers with specs for names (`get_partition_spec`), places arrays by them (`apply_sharding`) and combines
with others by the union of their tables (`combine`). A linear kernel is [in_features, out_features], as in Flax NNX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
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
    Rules,
    check_name,
    check_names,
    mesh_sizes,
    resolve,
)
from artifex.scaling.mesh_utils import check_count

MeshLike = Mesh | Mapping[str, int]
"""A mesh, or the sizes of its axes by name, which need no devices."""

ShardDimension = Literal["out_features", "in_features"]


@dataclasses.dataclass(frozen=True)
class ShardingStrategy(ABC):
    """One form of parallelism over one mesh axis: `axis_name`, or on a mesh without that name the axis at position
    `mesh_axis` (None: such a mesh is an error)."""

    axis_name: str
    mesh_axis: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.axis_name, str) or not self.axis_name:
            raise ValueError(f"axis_name {self.axis_name!r} is not the name of a mesh axis")
        if self.mesh_axis is not None:
            check_count("mesh_axis", self.mesh_axis, least=0)

    @property
    @abstractmethod
    def rules(self) -> Rules:
        """What this strategy maps each logical axis to."""

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


@dataclasses.dataclass(frozen=True)
class DataParallelStrategy(ShardingStrategy):
    """Every device holds the whole model and works on its part of the batch.

    An array without names is a batch: its first dim is split and must divide.
    """

    axis_name: str = "data"

    @property
    def rules(self) -> Rules:
        return Rules.of(activations={"batch": self.axis_name}, strategy="data")

    def names_for(self, shape: tuple[int, ...], ways: int) -> Names:
        return (("batch",) + (None,) * len(shape))[: len(shape)]


@dataclasses.dataclass(frozen=True)
class FSDPStrategy(ShardingStrategy):
    """Data parallelism whose devices also divide the weights and the optimizer's state among them (ZeRO stage 3:
    Rajbhandari et al. 2019, arXiv:1910.02054).

    A weight with no dim of at least `min_weight_size` stays whole. Of the others one dim is split: by name the first
    of `WEIGHTS` that divides, without names the largest that reaches `min_weight_size` and divides.
    """

    axis_name: str = "fsdp"
    min_weight_size: int = 1024

    WEIGHTS: ClassVar[tuple[str, ...]] = (
        *("embed", "out_features", "in_features", "conv_out", "conv_in", "vocab", "mlp", "expert_mlp", "heads"),
        *("kv_heads", "latent", "codes", "classes", "positions", "head_dim", "experts"),
        *("condition", "context", "frequencies"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("min_weight_size", self.min_weight_size, least=0)

    @property
    def rules(self) -> Rules:
        return self.rules_beside(())

    def rules_beside(self, claimed: Collection[str]) -> Rules:
        """The table without the names that other strategies have claimed: FSDP takes the dims they leave."""
        return Rules.of(
            params={name: self.axis_name for name in self.WEIGHTS if name not in claimed},
            activations={"batch": self.axis_name},
            min_weight_size={self.axis_name: self.min_weight_size} if self.min_weight_size else None,
            strategy="fsdp",
        )

    def should_shard_weight(self, weight: Any) -> bool:
        """Whether some dim of the array reaches `min_weight_size`."""
        return any(size >= self.min_weight_size for size in weight.shape)

    def names_for(self, shape: tuple[int, ...], ways: int) -> Names:
        able = [dim for dim, size in enumerate(shape) if size >= self.min_weight_size and size % ways == 0]
        chosen = max(able, key=lambda dim: shape[dim], default=None)
        return tuple(self.WEIGHTS[0] if dim == chosen else None for dim in range(len(shape)))


@dataclasses.dataclass(frozen=True)
class TensorParallelStrategy(ShardingStrategy):
    """Every layer is divided: projections into heads and hidden units by their outputs, those back by their inputs
    (Shoeybi et al. 2019, arXiv:1909.08053), so that each pair of layers needs one all-reduce.

    `shard_dimension` is the dim of a linear kernel outside such pairs that is split. An array without names is such a
    kernel, of rank 2, and must divide.
    """

    axis_name: str = "model"
    shard_dimension: ShardDimension = "out_features"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard_dimension not in get_args(ShardDimension):
            raise ValueError(f"shard_dimension {self.shard_dimension!r} is not one of {get_args(ShardDimension)}")

    @property
    def rules(self) -> Rules:
        weights = ("vocab", "heads", "kv_heads", "mlp", "expert_mlp", self.shard_dimension)
        activations = ("act_heads", "act_kv_heads", "act_mlp", "act_vocab")
        return Rules.of(
            params=dict.fromkeys(weights, self.axis_name),
            activations=dict.fromkeys(activations, self.axis_name),
            strategy="tensor",
        )

    def names_for(self, shape: tuple[int, ...], ways: int) -> Names:
        if len(shape) != 2:
            raise ValueError(
                f"tensor parallelism cannot tell which dim of an array of shape {shape} to split; only an "
                "[in_features, out_features] kernel may come without names, give names=(...)"
            )
        return ("in_features", "out_features")

    def get_attention_qkv_spec(self) -> PartitionSpec:
        """Of an [embed, heads * head_dim] kernel: each device has some heads."""
        return PartitionSpec(None, self.axis_name)

    def get_attention_output_spec(self) -> PartitionSpec:
        """Of a [heads * head_dim, embed] kernel."""
        return PartitionSpec(self.axis_name, None)

    def get_mlp_up_spec(self) -> PartitionSpec:
        """Of an [embed, mlp] kernel, up or gate: each device has some hidden units."""
        return PartitionSpec(None, self.axis_name)

    def get_mlp_down_spec(self) -> PartitionSpec:
        """Of an [mlp, embed] kernel."""
        return PartitionSpec(self.axis_name, None)

    def get_linear_weight_spec(self) -> PartitionSpec:
        """Of any other [in_features, out_features] kernel, by `shard_dimension`."""
        return partition_spec(self.rules, ("in_features", "out_features"))


@dataclasses.dataclass(frozen=True)
class PipelineParallelStrategy(ShardingStrategy):
    """Consecutive layers form `num_stages` stages, one to each device of the axis (None: as many as the axis has).

    An array without names is stacked under a leading `layers` dim, which must divide.
    """

    axis_name: str = "pipeline"
    num_stages: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_stages is not None:
            check_count("num_stages", self.num_stages)

    @property
    def rules(self) -> Rules:
        return Rules.of(params={"layers": self.axis_name}, strategy="pipeline")

    def on(self, mesh: MeshLike) -> Self:
        here = super().on(mesh)
        ways = mesh_sizes(mesh)[here.axis_name]
        if self.num_stages not in (None, ways):
            raise ValueError(
                f"num_stages is {self.num_stages}, but mesh axis {here.axis_name!r} has {ways} devices; "
                f"set num_stages={ways}"
            )
        return dataclasses.replace(here, num_stages=ways)

    def names_for(self, shape: tuple[int, ...], ways: int) -> Names:
        return (("layers",) + (None,) * len(shape))[: len(shape)]

    def assign_layers_to_stages(self, num_layers: int) -> list[int]:
        """Layers of each stage, as even as can be, the larger ones first: 10 over 4 is [3, 3, 2, 2].

        Raises `ValueError` where there are more stages than layers.
        """
        stages = self._stages()
        if check_count("num_layers", num_layers) < stages:
            raise ValueError(
                f"{num_layers} layers cannot fill {stages} pipeline stages; set num_stages to at most {num_layers}"
            )
        each, more = divmod(num_layers, stages)
        return [each + (stage < more) for stage in range(stages)]

    def get_forward_communication_pattern(self) -> list[tuple[int, int]]:
        """(sender, receiver) of activations: each stage to the next."""
        return [(stage, stage + 1) for stage in range(self._stages() - 1)]

    def get_backward_communication_pattern(self) -> list[tuple[int, int]]:
        """(sender, receiver) of gradients: each stage to the one before, the last stage first."""
        return [(receiver, sender) for sender, receiver in reversed(self.get_forward_communication_pattern())]

    def _stages(self) -> int:
        if self.num_stages is None:
            raise ValueError("num_stages is not set; give it, or take the strategy on a mesh: strategy.on(mesh)")
        return self.num_stages


def strategies_for(mesh_axes: Sequence[str], *, fsdp_min_weight_size: int = 0) -> dict[str, ShardingStrategy]:
    """The strategy that each mesh axis is named after; "model" and "tensor" are both tensor parallelism.

    Raises `ValueError` for an axis named after none, and for an `fsdp_min_weight_size` without an "fsdp" axis.
    """
    known: dict[str, ShardingStrategy] = {
        "data": DataParallelStrategy("data"),
        "fsdp": FSDPStrategy("fsdp", min_weight_size=fsdp_min_weight_size),
        "tensor": TensorParallelStrategy("tensor"),
        "model": TensorParallelStrategy("model"),
        "pipeline": PipelineParallelStrategy("pipeline"),
    }
    for axis in mesh_axes:
        if axis not in known:
            raise ValueError(f"no strategy is named after mesh axis {axis!r}; known are {', '.join(known)}")
    if fsdp_min_weight_size and "fsdp" not in mesh_axes:
        raise ValueError(
            f"fsdp_min_weight_size {fsdp_min_weight_size} has no effect: the mesh axes are {tuple(mesh_axes)}; "
            "give fsdp a size, or leave fsdp_min_weight_size at 0"
        )
    return {axis: known[axis] for axis in mesh_axes}


def combine(strategies: Mapping[str, ShardingStrategy]) -> Rules:
    """The union of the strategies' tables; FSDP takes the weight dims that the others leave.

    Strategies that divide the batch (data parallelism and FSDP) may share a mesh axis or each have their own. Any
    other two on one axis, and two that send one name to different axes, raise `ValueError` naming both.
    """
    claimed = [s.rules for s in strategies.values() if not isinstance(s, FSDPStrategy)]
    taken = {rule.name for rules in claimed for rule in rules.params}
    tables = {key: s.rules_beside(taken) if isinstance(s, FSDPStrategy) else s.rules for key, s in strategies.items()}
    for (first, one), (second, other) in itertools.combinations(tables.items(), 2):
        for axis in one.mesh_axes:
            if axis in other.mesh_axes and not (_divides_batch(one, axis) and _divides_batch(other, axis)):
                raise ValueError(
                    f"strategies {first!r} and {second!r} both split over mesh axis {axis!r}; give each an axis of its "
                    "own (only data parallelism and FSDP share one)"
                )
        mapped = {rule.name: rule.axes for rule in one.params}
        for rule in other.params:
            if mapped.get(rule.name, rule.axes) != rule.axes:
                raise ValueError(
                    f"strategy {first!r} maps {rule.name!r} to mesh axes {mapped[rule.name]}, strategy {second!r} to "
                    f"{rule.axes}; leave one of the two out"
                )
    return functools.reduce(Rules.union, tables.values(), Rules())


def _divides_batch(rules: Rules, axis: str) -> bool:
    return any(rule.name == "batch" and axis in rule.axes for rule in rules.activations)


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
