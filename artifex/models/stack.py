"""Repeated blocks: stacked under a leading `layers` dim, run scanned or unrolled, with or without recomputation.

The stacked tree is the same however it is run, on one device and on a thousand; how it is run is a setting of the step.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

UNROLL_UP_TO = 16  # layers; unrolled is about a tenth faster on a CPU, but its compile time grows with depth


@dataclasses.dataclass(frozen=True)
class Execution:
    """How blocks run. These settings change time and memory, not values beyond rounding.

    `remat`: what the backward pass computes again: nothing ("none"), all but matrix products ("dots"), or all ("full").
    `unroll`: layers to an iteration of the scan; "auto" takes all of them up to 16 layers without remat, else 1,
    because XLA on a CPU saves memory by remat only in scanned layers.
    `attention`: see `artifex.models.attention.implementation_for`, which "auto" follows.
    """

    remat: Literal["none", "dots", "full"] = "none"
    unroll: int | Literal["auto"] = "auto"
    attention: Literal["auto", "tiles", "xla", "cudnn"] = "auto"

    def layers_at_once(self, num_layers: int) -> int:
        """`unroll` as a number, at most `num_layers`."""
        if self.unroll == "auto":
            return num_layers if num_layers <= UNROLL_UP_TO and self.remat == "none" else 1
        return min(self.unroll, num_layers)


_DEFAULT = Execution()
_EXECUTION: contextvars.ContextVar[Execution] = contextvars.ContextVar("artifex_execution", default=_DEFAULT)


@contextlib.contextmanager
def execution(how: Execution) -> Iterator[None]:
    """Run stacks as `how` says.

    Enter it inside the function that is jitted: the cache of `jax.jit` knows no contexts.
    """
    token = _EXECUTION.set(how)
    try:
        yield
    finally:
        _EXECUTION.reset(token)


def current_execution() -> Execution:
    """How blocks run here: what the innermost `execution` says, or the defaults."""
    return _EXECUTION.get()


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` blocks made by `make`, as one module whose parameters have a leading dim named `layers`."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def build(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    return build(rngs)


def run_stack(
    blocks: nnx.Module, x: jax.Array, num_layers: int, apply: Callable, per_layer: Any = None
) -> tuple[jax.Array, Any]:
    """x through all blocks: `x, out = apply(block, x, its slice of per_layer)` for each, and the outs stacked.

    `per_layer` is a tree of arrays with a leading `layers` dim (keys, caches), or None.
    """
    graphdef, state = nnx.split(blocks)
    how = _EXECUTION.get()

    def body(x: jax.Array, layer: tuple[Any, Any]) -> tuple[jax.Array, Any]:
        params, own = layer
        return apply(nnx.merge(graphdef, params), x, own)

    if how.remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if how.remat == "dots" else None
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    return jax.lax.scan(body, x, (nnx.to_pure_dict(state), per_layer), unroll=how.layers_at_once(num_layers))


def unstack(blocks: nnx.Module, num_layers: int) -> list[nnx.Module]:
    """The blocks one by one, each with its own slice of the parameters."""
    graphdef, state = nnx.split(blocks)
    params = nnx.to_pure_dict(state)
    return [nnx.merge(graphdef, jax.tree.map(lambda a, i=i: jnp.asarray(a)[i], params)) for i in range(num_layers)]
