"""A function of whole arrays that are stacked, when each is divided: every device then takes some of the stack.

FSDP and tensor parallelism leave each device a part of every matrix of a stack. What is made of whole matrices, such as
their orthogonal factors, would gather all of them on every device and be computed there as often as there are devices.
Exchanged once, each device has whole matrices of its own; exchanged back, its part of all results.

Dims: R the arrays of a stack.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

STACKED = ("layers", "experts")  # leading dims that count arrays


def stacked(names: tuple[str, ...]) -> int:
    """How many leading dims count arrays that are stacked."""
    return next((dim for dim, name in enumerate(names) if name not in STACKED), len(names))


def over_stack(
    function: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    names: tuple[str, ...],
    sharding: NamedSharding | None = None,
) -> jax.Array:
    """`function` of the arrays that are stacked in x, whose logical axes are `names`, in the shape and layout of x.

    `function` takes (R, ...) arrays, stacked under one dim, to as many of the same shape, each on its own, and zeros to
    zeros. With the `sharding` of x, the mesh axes that split the arrays divide the stack instead while it runs: by one
    all-to-all for each, and as many back. A stack that does not divide is filled up with zeros, so a device never has
    more than ceil(R / devices) arrays. Without it, all are computed at once.
    """
    first = stacked(names)
    if sharding is None or sharding.mesh.size == 1:
        return function(x.reshape(-1, *x.shape[first:])).reshape(x.shape)
    sizes, spec = sharding.mesh.shape, tuple(sharding.spec) + (None,) * (x.ndim - len(sharding.spec))
    # the last axis of a dim first: its neighbours join to the part that the axis before it has
    cuts = [(dim - first + 1, axis) for dim in range(first, x.ndim) for axis in reversed(_axes(spec[dim]))]
    ways = math.prod(sizes[axis] for _, axis in cuts)

    def on_device(part: jax.Array) -> jax.Array:
        own = part.reshape(-1, *part.shape[first:])
        some = jnp.pad(own, [(0, -len(own) % ways)] + [(0, 0)] * (own.ndim - 1))
        for dim, axis in cuts:
            some = jax.lax.all_to_all(some, axis, 0, dim, tiled=True)
        some = function(some)
        for dim, axis in reversed(cuts):
            some = jax.lax.all_to_all(some, axis, dim, 0, tiled=True)
        return some[: len(own)].reshape(part.shape)

    spec = PartitionSpec(*spec)
    return jax.shard_map(on_device, mesh=sharding.mesh, in_specs=spec, out_specs=spec)(x)


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())
