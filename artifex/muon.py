"""Muon (Jordan 2024): momentum with the singular values of each matrix made alike, whole matrices on each device.

The numbers and the state are those of `optax.contrib.muon`, which leaves a mesh to gather every matrix on every device.

Dims: R matrices of a stack, I inputs, O outputs.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from optax.contrib import MuonState

from artifex.scaling.stacks import over_stack, stacked

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x^3, x^5: steepest at 0 of those that keep the values near 1
STEPS = 5
RMS = 0.2  # of an update, as AdamW's are: Liu et al. 2025 (arXiv:2502.16982), equation 4

Matrix = tuple[tuple[str, ...], int, NamedSharding | None]
"""Of a stack of matrices the logical axes, how many of the dims are inputs, and where it lives on a mesh."""


def muon(
    names: Any, inputs: Any, *, beta: float, adam_b1: float, adam_b2: float, eps: float, shardings: Any = None
) -> optax.GradientTransformation:
    """Downhill at rate 1: Muon where `inputs`, a tree of numbers, is not 0, AdamW without decay for the rest.

    `names`, the same tree, has the logical axes of each parameter. With `shardings`, the same tree, every device
    orthogonalises its share of the matrices of a stack; without, all are at hand.
    """
    labels = jax.tree.map(lambda count: "muon" if count else "adam", inputs)
    axes = jax.tree.leaves(names, is_leaf=lambda node: isinstance(node, tuple))
    counts: list[int] = jax.tree.leaves(inputs)
    where: list[NamedSharding | None] = [None] * len(counts) if shardings is None else jax.tree.leaves(shardings)
    matrices = [each for each in zip(axes, counts, where, strict=True) if each[1]]
    return optax.partition(
        {
            "muon": optax.chain(_orthogonal_momentum(matrices, beta, eps), optax.scale(-1.0)),
            "adam": optax.adamw(1.0, b1=adam_b1, b2=adam_b2, eps=eps, weight_decay=0.0, nesterov=True),
        },
        labels,
    )


def _orthogonal_momentum(matrices: list[Matrix], beta: float, eps: float) -> optax.GradientTransformation:
    """Nesterov's momentum, orthogonalised; `matrices` are those of each leaf, in order."""

    def init(params: Any) -> MuonState:
        # optax's own fields: a checkpoint of either opens with the other
        return MuonState(jnp.int32(0), optax.tree.zeros_like(params), jnp.float32(COEFFICIENTS))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MuonState]:
        momentum, count = optax.tree.update_moment(updates, state.mu, beta, 1), optax.safe_increment(state.count)
        ahead = jax.tree.map(
            lambda mean, gradient: beta * mean + (1 - beta) * gradient,
            optax.tree.bias_correction(momentum, beta, optax.safe_increment(count)),
            optax.tree.bias_correction(updates, beta, count),
        )
        leaves, tree = jax.tree.flatten(ahead)
        found = [one(x, *of) for x, of in zip(leaves, matrices, strict=True)]
        return jax.tree.unflatten(tree, found), MuonState(count, momentum, state.ns_coeffs)

    def one(x: jax.Array, names: tuple[str, ...], inputs: int, where: NamedSharding | None) -> jax.Array:
        own = x.shape[stacked(names) :]
        longest = max(math.prod(own[:inputs]), math.prod(own[inputs:]))
        # unrolled on one device: the numbers are optax's to the last bit. A loop on a mesh: XLA would hold what several
        # steps make at once, on 8 CPU devices 4 times a device's share of the matrices, and compile long for a TPU
        function = functools.partial(_orthogonal, inputs=inputs, eps=eps, unroll=where is None or where.mesh.size == 1)
        update = over_stack(function, x, names, where)
        return RMS * jnp.sqrt(jnp.float32(longest)) * update

    return optax.GradientTransformation(init, update)


def _orthogonal(x: jax.Array, inputs: int, eps: float, unroll: bool) -> jax.Array:
    """Each matrix U S V' of a stack (R, *inputs, *outputs) as U S' V', its values S' between about 0.7 and 1.2."""
    x_RIO = x.reshape(len(x), math.prod(x.shape[1 : 1 + inputs]), -1)
    return jax.vmap(functools.partial(newton_schulz, eps=eps, unroll=unroll))(x_RIO).reshape(x.shape)


def newton_schulz(x_IO: jax.Array, eps: float, unroll: bool) -> jax.Array:
    """Five steps X <- a X + b X X' X + c X X' X X' X from X over its Frobenius norm; the smaller side comes first."""
    wide = x_IO.shape[0] <= x_IO.shape[1]
    x = x_IO if wide else x_IO.T
    x = x / (jnp.linalg.norm(x) + eps)
    a, b, c = COEFFICIENTS

    def step(_: Any, x: jax.Array) -> jax.Array:
        square = x @ x.T
        return a * x + (b * square + c * square @ square) @ x

    x = jax.lax.fori_loop(0, STEPS, step, x, unroll=unroll)
    return x if wide else x.T
