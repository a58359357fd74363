"""What a step has made that is not finite: one number, found while gradients and new state are at hand.

A loss and a gradient can be finite and the update of them not: too large a rate, a number that bfloat16 cannot hold.
So each device looks at its own part of what a step makes, and all tell each other which array is the first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from artifex.training.spill import fetched

if TYPE_CHECKING:
    from artifex.training.state import Blueprint, TrainState

NONE = 2**31 - 1  # the number of no array
METRIC = "not_finite"  # under which a step reports it
GRADIENTS = "gradients"


def looked_at(gradients: Any, state: TrainState) -> dict[str, Any]:
    """The arrays that a step makes, by path and in the order of their numbers: gradients, then the new state."""
    parts = {
        GRADIENTS: gradients,
        "params": state.params,
        "buffers": state.buffers,
        "optimizer": state.optimizer,
        "ema": state.ema,
        "ema_buffers": state.ema_buffers,
    }
    found = {}
    for part, tree in parts.items():
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                found["/".join([part, *(jax.tree_util.keystr((key,), simple=True) for key in keys)])] = leaf
    return found


def of_blueprint(blue: Blueprint) -> dict[str, Any]:
    """The same, abstract, each with its sharding: what the numbers of a step stand for."""
    shapes = blue.split(blue.state.params)[0]
    where = blue.gradient_shardings(shapes, "optimizer")  # as the update reads them
    placed = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, where)
    return looked_at(placed, blue.state)


def first_of(blue: Blueprint, arrays: Mapping[str, Any]) -> jax.Array:
    """The number of the first array with a NaN or an infinity, else `NONE`; in a function that is traced."""
    mesh = blue.mesh

    def here(*parts: jax.Array) -> jax.Array:
        finite = jnp.stack([jnp.all(jnp.isfinite(part)) for part in parts])
        number = jnp.where(jnp.all(finite), NONE, jnp.argmin(finite)).astype(jnp.int32)
        return number if mesh.size == 1 else jax.lax.pmin(number, mesh.axis_names)

    if mesh.size == 1:
        return here(*arrays.values())
    # by hand: XLA would reduce each array over the devices by a collective of its own
    abstract, whole = of_blueprint(blue), PartitionSpec()
    specs = tuple(abstract[path].sharding.spec for path in arrays)
    return jax.shard_map(here, mesh=mesh, in_specs=specs, out_specs=whole, check_vma=False)(*arrays.values())


def is_finite(metrics: Mapping[str, Any]) -> bool:
    """Whether a step's loss and gradient, host values, are finite: by what a step is skipped."""
    return math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])


def told(blue: Blueprint, step: int, metrics: Mapping[str, Any]) -> str | None:
    """What of a step is not finite, in words, by the metrics it reported; None where all is."""
    odd = [f"{name} is {metrics[name]}" for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]
    path = None if metrics[METRIC] == NONE else list(of_blueprint(blue))[int(metrics[METRIC])]
    if odd:
        return f"{' and '.join(odd)} at step {step}" + (
            f"; the first array that is not finite is {path}" if path else ""
        )
    return path and f"{path} is not finite after step {step}, though loss and gradient are"


def check(blue: Blueprint, state: TrainState) -> None:
    """Raise `FloatingPointError` where a state that was read holds what is not finite: a look at all of it."""

    def look(state: TrainState) -> jax.Array:
        moments, ema = fetched((state.optimizer, state.ema), (blue.shardings.optimizer, blue.shardings.ema))
        return first_of(blue, looked_at({}, dataclasses.replace(state, optimizer=moments, ema=ema)))

    number = int(jax.jit(look)(state))
    if number != NONE:
        raise FloatingPointError(
            f"{list(looked_at({}, state))[number]} of step {int(jax.device_get(state.step))} is not finite: no weights "
            "are made of it; take an earlier step"
        )
