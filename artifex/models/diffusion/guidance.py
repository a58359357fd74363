"""Classifier-free guidance as a network made of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Network = Callable[..., jax.Array]


def guided(network: Network, scale: float | jax.Array, null: Any) -> Network:
    """`network(x, t, condition)` with output null + scale (conditional - null), by one call with twice the batch.

    `null` stands for "no condition": a tree like the condition's, whose leaves broadcast to its leaves, such as one
    label. Scale 1 is the conditional output, 0 the unconditional one, above 1 sharper than the data: 1 + w of Ho and
    Salimans 2022 (arXiv:2207.12598). Guiding the output guides x_0, which is affine in it. A variance behind the
    prediction is the conditional one, as Peebles and Xie 2022 (arXiv:2212.09748) have it: no mixture of two.
    """

    def network_of_both(x: jax.Array, t_B: jax.Array, condition: Any) -> jax.Array:
        def both(given: jax.Array, nothing: Any) -> jax.Array:
            return jnp.concatenate([given, jnp.broadcast_to(jnp.asarray(nothing, given.dtype), given.shape)])

        twice = jax.tree.map(both, condition, null)
        output = network(jnp.concatenate([x, x]), jnp.concatenate([t_B, t_B]), twice)
        conditional, unconditional = jnp.split(output, 2)
        mixed = unconditional + scale * (conditional - unconditional)
        return jnp.concatenate([mixed[..., : x.shape[-1]], conditional[..., x.shape[-1] :]], axis=-1)

    return network_of_both
