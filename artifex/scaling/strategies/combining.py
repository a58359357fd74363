"""Strategies together: which one a mesh axis is named after, and the union of their tables."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

from artifex.scaling.axes import Rules
from artifex.scaling.strategies.base import ShardingStrategy, with_the_rest
from artifex.scaling.strategies.data import DataParallelStrategy, FSDPStrategy, ZeROStrategy
from artifex.scaling.strategies.layers import ContextParallelStrategy, ExpertParallelStrategy, TensorParallelStrategy
from artifex.scaling.strategies.pipeline import PipelineParallelStrategy

DIVIDING = (FSDPStrategy, ContextParallelStrategy, ExpertParallelStrategy, PipelineParallelStrategy, ZeROStrategy)
"""Strategies that divide weight dims nobody has claimed, in the order in which they cut one dim."""


def strategies_for(
    mesh_axes: Sequence[str],
    *,
    fsdp_min_weight_size: int = 0,
    zero: Literal[0, 1, 2] = 0,
    sequence_parallel: bool = False,
) -> dict[str, ShardingStrategy]:
    """The strategy that each mesh axis is named after; "model" and "tensor" are both tensor parallelism.

    `zero` is the stage of the "data" axis, 0 for plain data parallelism. Raises `ValueError` for an axis named after no
    strategy, and for settings without their axis: `fsdp_min_weight_size`, `zero`. `sequence_parallel` is how tensor
    parallelism is done, and says nothing without it.
    """
    known: dict[str, ShardingStrategy] = {
        "pipeline": PipelineParallelStrategy("pipeline"),
        "data": ZeROStrategy("data", stage=zero) if zero else DataParallelStrategy("data"),
        "replica": DataParallelStrategy("replica"),
        "fsdp": FSDPStrategy("fsdp", min_weight_size=fsdp_min_weight_size),
        "expert": ExpertParallelStrategy("expert"),
        "context": ContextParallelStrategy("context"),
        "tensor": TensorParallelStrategy("tensor", sequence_parallel=sequence_parallel),
        "model": TensorParallelStrategy("model", sequence_parallel=sequence_parallel),
    }
    for axis in mesh_axes:
        if axis not in known:
            raise ValueError(f"no strategy is named after mesh axis {axis!r}; known are {', '.join(known)}")
    for name, value, of in (
        ("fsdp_min_weight_size", fsdp_min_weight_size, {"fsdp"}),
        ("zero", zero, {"data"}),
    ):
        if value and not of & set(mesh_axes):
            raise ValueError(
                f"{name} {value} has no effect: the mesh axes are {tuple(mesh_axes)}; give {max(of)} a size, or leave "
                f"{name} at {type(value)(0)}"
            )
    return {axis: known[axis] for axis in mesh_axes}


def combine(strategies: Mapping[str, ShardingStrategy]) -> Rules:
    """The union of the strategies' tables; weight dims that nobody claims are for those that divide the rest.

    Strategies that divide the batch may share a mesh axis or each have their own. Any other two on one axis, and two
    that send one name to different axes, raise `ValueError` naming both.
    """
    for (first, one), (second, other) in itertools.combinations(strategies.items(), 2):
        if one.axis_name == other.axis_name and not (_divides_only_batch(one) and _divides_only_batch(other)):
            raise ValueError(
                f"strategies {first!r} and {second!r} both split over mesh axis {one.axis_name!r}; give each an axis "
                "of its own (only data parallelism and FSDP share one)"
            )
        mapped = {rule.name: rule.axes for rule in one.claims.params}
        for rule in other.claims.params:
            if mapped.get(rule.name, rule.axes) != rule.axes:
                raise ValueError(
                    f"strategy {first!r} maps {rule.name!r} to mesh axes {mapped[rule.name]}, strategy {second!r} to "
                    f"{rule.axes}; leave one of the two out"
                )
    claims = functools.reduce(Rules.union, (one.claims for one in strategies.values()), Rules())
    dividing = [one for one in strategies.values() if isinstance(one, DIVIDING)]
    return with_the_rest(claims, sorted(dividing, key=lambda one: DIVIDING.index(type(one))))


def _divides_only_batch(strategy: ShardingStrategy) -> bool:
    return {rule.name for rule in strategy.claims.everything} == {"batch"}
