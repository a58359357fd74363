"""How a run is spread: the size of each form of parallelism, the mesh it makes, and the strategies combined on it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
from jax.sharding import Mesh, PartitionSpec

from artifex.scaling.axes import Names, Rules
from artifex.scaling.mesh_utils import check_count
from artifex.scaling.strategies import (
    ContextParallelStrategy,
    DataParallelStrategy,
    ExpertParallelStrategy,
    FSDPStrategy,
    PipelineParallelStrategy,
    ShardingStrategy,
    TensorParallelStrategy,
    ZeROStrategy,
    combine,
    errors_name,
    partition_spec,
    place,
    strategies_for,
)

__all__ = [
    "ContextParallelStrategy",
    "DataParallelStrategy",
    "ExpertParallelStrategy",
    "FSDPStrategy",
    "MultiDimensionalStrategy",
    "ParallelismConfig",
    "PipelineParallelStrategy",
    "ShardingConfig",
    "ShardingStrategy",
    "TensorParallelStrategy",
    "ZeROStrategy",
    "combine",
    "strategies_for",
]


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """The devices of each form of parallelism; 1 is off, and one of them may be -1, the rest (`filled`).

    With `fsdp_enabled` the data-parallel devices also divide the weights that have a dim of at least
    `fsdp_min_weight_size`; with `zero_stage` 1 the optimizer's state alone, with 2 gradients too. Raises `TypeError`
    for anything but integers, `ValueError` for other sizes below 1, for FSDP or ZeRO over one device, and for both.
    """

    data_parallel_size: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    fsdp_enabled: bool = False
    fsdp_min_weight_size: int = 1024
    expert_parallel_size: int = 1
    context_parallel_size: int = 1
    zero_stage: Literal[0, 1, 2] = 0

    def __post_init__(self) -> None:
        open_sizes = [name for name, size in self._sizes.items() if size == -1]
        if len(open_sizes) > 1:
            raise ValueError(f"{' and '.join(open_sizes)} are -1; only one can take the rest of the devices")
        for name, size in self._sizes.items():
            if size != -1:
                check_count(name, size)
        if check_count("zero_stage", self.zero_stage, least=0) > 2:
            raise ValueError(f"zero_stage is {self.zero_stage}; 1 and 2 are stages, 3 is fsdp_enabled=True")
        if self.zero_stage and (self.fsdp_enabled or self.data_parallel_size == 1):
            raise ValueError(
                f"zero_stage {self.zero_stage} stands beside fsdp_enabled={self.fsdp_enabled} and data_parallel_size "
                f"{self.data_parallel_size}; it needs at least 2 data-parallel devices, and FSDP is its stage 3"
            )
        check_count("fsdp_min_weight_size", self.fsdp_min_weight_size, least=0)
        if not isinstance(self.fsdp_enabled, bool):
            raise TypeError(f"fsdp_enabled must be True or False, got {self.fsdp_enabled!r}")
        if self.fsdp_enabled and self.data_parallel_size == 1:
            raise ValueError(
                "fsdp_enabled divides the weights over the data-parallel devices, but data_parallel_size is 1; "
                "raise it to at least 2, or leave fsdp_enabled off"
            )

    @property
    def _sizes(self) -> dict[str, int]:
        names = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in names if name.endswith("_parallel_size")}

    def filled(self, device_count: int) -> ShardingConfig:
        """With -1 replaced by what the other sizes leave of the devices. Raises `ValueError` where they do not divide
        them."""
        known = math.prod(size for size in self._sizes.values() if size != -1)
        name = next((name for name, size in self._sizes.items() if size == -1), None)
        if name is None:
            return self
        if check_count("device_count", device_count) % known:
            raise ValueError(
                f"{name} is -1, but the other sizes have the product {known}, which does not divide the {device_count} "
                "devices; change one of them"
            )
        return dataclasses.replace(self, **{name: device_count // known})

    @classmethod
    def from_device_count(cls, device_count: int) -> ShardingConfig:
        """A start that uses every device: data parallelism below 8 devices, from 8 on beside a tensor parallelism of 4
        where that divides the count, or else of 2, or else of none. 8 is data 2 x tensor 4, 100 is 25 x 4, 7 is 7 x 1.

        Four stays inside one node of any usual size. `DeviceMeshManager.optimize_for_transformer` reads the model too.
        """
        count = check_count("device_count", device_count)
        tensor = math.gcd(count, 4) if count >= 8 else 1
        return cls(data_parallel_size=count // tensor, tensor_parallel_size=tensor)

    def get_total_device_count(self) -> int:
        """The devices the run needs: the product of the sizes. Raises `ValueError` where one of them is -1."""
        if -1 in self._sizes.values():
            raise ValueError("a size is -1, the rest of the devices; say of how many: config.filled(device_count)")
        return math.prod(_axes_of(self).values())


@dataclasses.dataclass(frozen=True)
class ParallelismConfig:
    """A `ShardingConfig` with the mesh that carries it. Nothing is checked when made: see `is_valid` and `check`."""

    mesh_shape: tuple[int, ...]
    mesh_axis_names: tuple[str, ...]
    sharding_config: ShardingConfig

    @classmethod
    def from_sharding_config(cls, config: ShardingConfig, device_count: int | None = None) -> ParallelismConfig:
        """The mesh axes "data", "expert", "context", "model" (tensor parallelism) and "pipeline" of those sizes that
        are not 1, in this order; on one device a "data" axis of 1. A size of -1 takes the rest of `device_count`
        devices, or of all there are."""
        config = config.filled(jax.device_count() if device_count is None else device_count)
        sizes = {axes[0]: size for axes, size in _axes_of(config).items() if size > 1} or {"data": 1}
        return cls(tuple(sizes.values()), tuple(sizes), config)

    @property
    def axis_sizes(self) -> dict[str, int]:
        """The mesh as axis name -> size: all that specs and placement need, without a device."""
        return dict(zip(self.mesh_axis_names, self.mesh_shape, strict=True))

    def is_valid(self) -> bool:
        """Whether `check` finds nothing wrong."""
        try:
            self.check()
        except (TypeError, ValueError):
            return False
        return True

    def check(self) -> None:
        """Raise `TypeError` or `ValueError` for sizes that are not positive integers, names that repeat or are not one
        to each axis, a product other than the sharding configuration's device count, and axes that are named after a
        strategy and have another size there. An "fsdp" axis is a part of the data-parallel size."""
        shape, names, config = self.mesh_shape, self.mesh_axis_names, self.sharding_config
        if len(shape) != len(names) or len(set(names)) != len(names) or not shape:
            raise ValueError(f"mesh_shape {shape} needs as many mesh_axis_names, all different; got {names}")
        for name, size in self.axis_sizes.items():
            check_count(f"mesh axis {name!r}", size)
        if math.prod(shape) != config.get_total_device_count():
            raise ValueError(
                f"mesh_shape {shape} has {math.prod(shape)} devices, the sharding configuration "
                f"{config.get_total_device_count()}; make both the same, as from_sharding_config does"
            )
        for axes, size in _axes_of(config).items():
            present = {axis: self.axis_sizes[axis] for axis in axes if axis in self.axis_sizes}
            if present and math.prod(present.values()) != size:
                raise ValueError(
                    f"mesh axes {present} do not have the {size} devices that the sharding configuration gives "
                    f"{axes[0]}; make both the same, as from_sharding_config does"
                )
        if "fsdp" in names and not config.fsdp_enabled:
            raise ValueError("the mesh has an 'fsdp' axis but fsdp_enabled is off; set it, or name the axis 'data'")

    def strategies(self) -> dict[str, ShardingStrategy]:
        """The strategy of each mesh axis, and where `fsdp_enabled` FSDP ("fsdp"), on its own axis or on the data axis.

        Raises as `check` and `strategies_for` do.
        """
        self.check()
        named = strategies_for(self.mesh_axis_names, zero=self.sharding_config.zero_stage)
        if self.sharding_config.fsdp_enabled:
            axis = "fsdp" if "fsdp" in named else "data"
            named["fsdp"] = FSDPStrategy(axis, min_weight_size=self.sharding_config.fsdp_min_weight_size)
        return {name: strategy.on(self.axis_sizes) for name, strategy in named.items()}

    @property
    def rules(self) -> Rules:
        """The strategies' tables combined."""
        return combine(self.strategies())


def _axes_of(config: ShardingConfig) -> dict[tuple[str, ...], int]:
    """The names that the mesh axes of each form of parallelism may have, the usual one first, and their product."""
    return {
        ("data", "fsdp"): config.data_parallel_size,
        ("expert",): config.expert_parallel_size,
        ("context",): config.context_parallel_size,
        ("model", "tensor"): config.tensor_parallel_size,
        ("pipeline",): config.pipeline_parallel_size,
    }


@dataclasses.dataclass(frozen=True)
class MultiDimensionalStrategy:
    """Several strategies on one mesh, by names of your choice.

    Raises `ValueError` where two strategies conflict (see `combine`), one splits over an axis the configuration's mesh
    does not have, an axis of several devices is used by none, or FSDP and the configuration's FSDP settings disagree.
    """

    strategies: Mapping[str, ShardingStrategy]
    config: ParallelismConfig

    def __post_init__(self) -> None:
        self.config.check()
        axes = self.config.mesh_axis_names
        for name, strategy in self.strategies.items():
            if strategy.axis_name not in axes:
                raise ValueError(
                    f"strategy {name!r} splits over mesh axis {strategy.axis_name!r}, but the configuration's mesh has "
                    f"{axes}; give the axis a size in the configuration, or leave the strategy out"
                )
            strategy.on(self.config.axis_sizes)
        self._check_fsdp()
        used = self.rules.mesh_axes
        for axis, size in self.config.axis_sizes.items():
            if size > 1 and axis not in used:
                raise ValueError(
                    f"no strategy splits over mesh axis {axis!r}: its {size} devices would repeat each other's work; "
                    "add a strategy for it, or set its size to 1"
                )

    def _check_fsdp(self) -> None:
        config = self.config.sharding_config
        fsdp = {name: s.min_weight_size for name, s in self.strategies.items() if isinstance(s, FSDPStrategy)}
        if config.fsdp_enabled and not fsdp:
            raise ValueError(
                f"the configuration has fsdp_enabled, but none of the strategies {tuple(self.strategies)} is an "
                "FSDPStrategy; add one, or take config.strategies()"
            )
        for name, least in fsdp.items():
            if config.fsdp_enabled and least != config.fsdp_min_weight_size:
                raise ValueError(
                    f"strategy {name!r} has min_weight_size {least}, the configuration fsdp_min_weight_size "
                    f"{config.fsdp_min_weight_size}; give both the same"
                )

    @functools.cached_property
    def rules(self) -> Rules:
        """The strategies' tables combined."""
        return combine(self.strategies)

    def get_combined_partition_spec(
        self, tensor_name: str, tensor_shape: Names, shape: Sequence[int] | None = None
    ) -> PartitionSpec:
        """The spec of a tensor whose dims have the logical axes `tensor_shape`; no mesh axis appears twice.

        With `shape`, its sizes in elements, it is what fits the configuration's mesh: a weight dim that does not divide
        stays whole, a batch that does not is a `ValueError`. Errors begin with `tensor_name`.
        """
        with errors_name(tensor_name):
            return partition_spec(self.rules, tensor_shape, shape, self.config.axis_sizes)

    def apply_sharding(self, arrays: Any, mesh: Mesh, names: Any) -> Any:
        """Place an array, or every array of a tree, as `get_combined_partition_spec` says.

        `names` are the logical axes of the array, for a tree a tree of such tuples. Raises `ValueError` where `mesh`
        is not the configuration's.
        """
        if dict(mesh.shape) != self.config.axis_sizes:
            raise ValueError(
                f"the mesh is {dict(mesh.shape)}, the configuration's {self.config.axis_sizes}; create it by "
                "DeviceMeshManager().create_mesh_from_config(config)"
            )
        return place(arrays, mesh, names, self.get_combined_partition_spec)
