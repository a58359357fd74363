"""Repeated blocks: stacked under a leading `layers` dim, run scanned or unrolled, with or without recomputation.

The stacked tree is the same however it is run, on one device and on a thousand; how it is run is the execution's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from artifex.models import cpu
from artifex.scaling import remat
from artifex.scaling.execution import current_execution


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` blocks made by `make`, as one module whose parameters have a leading dim named `layers`."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def build(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    return build(rngs)


def run_stack(
    blocks: nnx.Module, x: Any, num_layers: int, apply: Callable, per_layer: Any = None, *, beside: Any = None
) -> tuple[Any, Any]:
    """x through all blocks: `x, out = apply(block, x, beside, its slice of per_layer)` for each, and the outs stacked.

    `x` is an array or a tree of arrays, `beside` one that all blocks read, `per_layer` one with a leading `layers` dim
    (keys), or None.
    """
    graphdef, state = nnx.split(blocks)
    setting = current_execution().remat

    def body(x: Any, layer: tuple[Any, Any]) -> tuple[Any, Any]:
        params, own = layer
        x = jax.tree.map(lambda leaf: checkpoint_name(leaf, "block"), x)
        return apply(nnx.merge(graphdef, params), x, beside, own)

    if setting != "none":
        body = jax.checkpoint(body, policy=remat.policy(setting), prevent_cse=False)
    layers = (nnx.to_pure_dict(state), per_layer)
    return jax.lax.scan(body, x, layers, length=num_layers, unroll=cpu.layers_at_once(num_layers))


def stack_states(make: Callable[[int | None], Any], num_layers: int) -> Any:
    """States for `stack_with_state`: `make(count)` is a tree of arrays with a leading dim of `count` layers,
    `make(None)` one without that dim, of one layer."""
    return [make(None) for _ in range(num_layers)] if _unrolled(num_layers) else make(num_layers)


def stack_with_state(blocks: nnx.Module, num_layers: int, apply: Callable) -> Callable[..., tuple[Any, Any]]:
    """`run(x, states, *rest) -> (x, states)` through all blocks, for loops that run them often, such as decoding.

    `x, states = apply(block, x, states, layer, *rest)` for each, which reads and writes its own in place. Scanned, all
    layers have one tree of states, and `layer` is the index of the leading dim. Unrolled, each has its own, `layer` is
    None, and parameters are cut out of the stack before the loop: on one CPU device that costs their bytes once more
    and saves cutting them out for every token. A leading dim of 1 in place of none would have XLA copy the state there.
    """
    if _unrolled(num_layers):
        each = unstack(blocks, num_layers)

        def run(x: Any, states: list, *rest: Any) -> tuple[Any, list]:
            after = []
            for block, state in zip(each, states, strict=True):
                x, state = apply(block, x, state, None, *rest)
                after.append(state)
            return x, after

        return run

    graphdef, state = nnx.split(blocks)
    params = nnx.to_pure_dict(state)

    def scanned(x: Any, states: Any, *rest: Any) -> tuple[Any, Any]:
        def body(carry: tuple[Any, Any], layer: tuple[Any, jax.Array]) -> tuple[tuple[Any, Any], None]:
            own, index = layer
            return apply(nnx.merge(graphdef, own), *carry, index, *rest), None

        return jax.lax.scan(body, (x, states), (params, jnp.arange(num_layers)))[0]

    return scanned


def unstack(blocks: nnx.Module, num_layers: int) -> list[nnx.Module]:
    """The blocks one by one, each with its own slice of the parameters."""
    graphdef, state = nnx.split(blocks)
    params = nnx.to_pure_dict(state)
    return [nnx.merge(graphdef, jax.tree.map(lambda a, i=i: jnp.asarray(a)[i], params)) for i in range(num_layers)]


def _unrolled(num_layers: int) -> bool:
    return cpu.layers_at_once(num_layers) == num_layers
