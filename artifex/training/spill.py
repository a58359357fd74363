"""Optimizer state and averages that lie in the memory of the hosts: fetched for their update, and sent back after it.

Between two updates nothing reads them, and they are the larger part of a state: of AdamW's in float32 two thirds. Each
step moves them over the host's link both ways, so that is for runs whose steps are long beside it.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from artifex.scaling.execution import platform_of

HOST = "pinned_host"


def check(threshold_mb: float | None, mesh: Mesh) -> None:
    """Raise `ValueError` where arrays are to be spilled, and the devices have no memory apart from their host's."""
    if threshold_mb is not None and platform_of(mesh) == "cpu":
        raise ValueError(
            f"training.spill_threshold_mb is {threshold_mb:g}, but the devices are CPUs, whose memory is the host's; "
            "leave it out"
        )


def spilled(threshold_mb: float | None, tree: Any, shardings: Any) -> Any:
    """The shardings with those arrays in the host's memory of which a device's part has at least so many MB."""

    if threshold_mb is None:
        return shardings
    least = threshold_mb * 1e6

    def place(leaf: Any, where: NamedSharding) -> NamedSharding:
        part = math.prod(where.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        # a scalar stays: XLA computes with it on the device whatever its place
        return where.with_memory_kind(HOST) if leaf.ndim and part >= least else where

    return jax.tree.map(place, tree, shardings)


def fetched(tree: Any, shardings: Any) -> Any:
    """Arrays on the devices, in a function that is traced, by the shardings that they have."""

    def fetch(leaf: jax.Array, where: NamedSharding) -> jax.Array:
        return jax.device_put(leaf, where.with_memory_kind("device")) if where.memory_kind == HOST else leaf

    return jax.tree.map(fetch, tree, shardings)
