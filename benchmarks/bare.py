"""The decoder in bare JAX: pure functions of dicts of arrays, as fast as we can write them. The benchmarks' opponent.

Imports nothing of the package, and takes over a decoder's parameters by `from_model`. What the tree holds decides the
layout: a `bias` in a norm makes it a LayerNorm, learned `positions` replace rotary ones, `gate_up` makes a SwiGLU.
Every query head has a key head of its own.

Dims: B batch, T queries, S keys, D embed, N heads, H head_dim, F mlp, V vocab.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def from_model(params: Tree, scan: bool = False) -> Tree:
    """Copies of a decoder's parameters: kernels as matrices, joined where they read one input; `layers` a list, or
    stacked to be scanned."""
    blocks = params["layers"]
    attention, mlp = blocks["attention"], blocks["mlp"]
    layers = {
        "norm1": blocks["attention_norm"],
        "norm2": blocks["mlp_norm"],
        "qkv": _joined(attention["query"], attention["key"], attention["value"]),
        "out": _matrix(attention["out"], inputs=2),
        "down": mlp["down"],
    }
    layers |= {"gate_up": _joined(mlp["gate"], mlp["up"])} if "gate" in mlp else {"up": mlp["up"]}
    count = blocks["attention_norm"]["scale"].shape[0]
    tree = {
        "embed": params["embed"]["table"],
        "norm": params["norm"],
        "layers": layers if scan else [jax.tree.map(lambda a, i=i: a[i], layers) for i in range(count)],
    }
    if "positions" in params:
        tree["positions"] = params["positions"]["table"]
    if "head" in params:
        tree["head"] = params["head"]["kernel"]
    return jax.tree.map(jnp.copy, tree)


def _matrix(linear: Tree, inputs: int = 1) -> Tree:
    """Stacked weights (L, *inputs, *outputs) as (L, in, out), and biases as (L, out)."""
    layers, *dims = linear["kernel"].shape
    rows = functools.reduce(int.__mul__, dims[:inputs])
    return {name: a.reshape((layers, rows, -1) if name == "kernel" else (layers, -1)) for name, a in linear.items()}


def _joined(*linears: Tree) -> Tree:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *map(_matrix, linears))


def linear(x: jax.Array, p: Tree) -> jax.Array:
    y = x @ p["kernel"]
    return y + p["bias"] if "bias" in p else y


def norm(x: jax.Array, p: Tree) -> jax.Array:
    x32 = x.astype(jnp.float32)
    if "bias" in p:
        x32 = x32 - x32.mean(-1, keepdims=True)
    y = (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-5)).astype(x.dtype) * p["scale"]
    return y + p["bias"] if "bias" in p else y


def rope(x_BTNH: jax.Array, positions_T: jax.Array) -> jax.Array:
    half = x_BTNH.shape[-1] // 2
    angles = positions_T[:, None].astype(jnp.float32) * 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x_BTNH.dtype)
