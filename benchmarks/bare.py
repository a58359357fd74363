"""The decoder in bare JAX: pure functions of dicts of arrays, as fast as we can write them. The benchmarks' opponent.

Imports nothing of the package, and takes over a decoder's parameters by `from_model`. What the tree holds decides the
layout: a `bias` in a norm makes it a LayerNorm, learned `positions` replace rotary ones, a `gate` makes a SwiGLU. Every
query head has a key head of its own.

Dims: B batch, T queries, S keys, D embed, N heads, H head_dim.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Tree = Any
Turns = tuple[Any, ...]  # cosines and sines (T, H / 2) of rotary positions
HIDDEN = -1e30  # added to the score of a key that a query must not see


def from_model(params: Tree, *, scan: bool = False, join: bool = False) -> Tree:
    """Copies of a decoder's parameters, each kernel a matrix. `layers` is a list, or stays stacked to be scanned.

    `join`: kernels that read one input are stored as one, as decoding has it best.
    """
    blocks = params["layers"]
    linears = {**blocks["attention"], **blocks["mlp"]}
    layers = {name: _matrix(p, 2 if name == "out" else 1) for name, p in linears.items()}
    if join:
        layers["qkv"] = _joined(*(layers.pop(name) for name in ("query", "key", "value")))
        if "gate" in layers:
            layers["gate_up"] = _joined(layers.pop("gate"), layers.pop("up"))
    layers |= {"norm1": blocks["attention_norm"], "norm2": blocks["mlp_norm"]}
    count = layers["norm1"]["scale"].shape[0]
    tree = {
        "layers": layers if scan else [jax.tree.map(lambda a, i=i: a[i], layers) for i in range(count)],
        "norm": params["norm"],
    }
    tree |= {name: params[name]["table"] for name in ("embed", "positions") if name in params}
    tree |= {"head": params["head"]["kernel"]} if "head" in params else {}
    return jax.tree.map(jnp.copy, tree)


def _matrix(linear: Tree, inputs: int) -> Tree:
    """Weights (L, *inputs, *outputs) as (L, in, out), biases as (L, out)."""
    layers, *dims = linear["kernel"].shape
    shapes = {"kernel": (layers, math.prod(dims[:inputs]), -1), "bias": (layers, -1)}
    return {name: value.reshape(shapes[name]) for name, value in linear.items()}


def _joined(*linears: Tree) -> Tree:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *linears)


def linear(x: jax.Array, p: Tree) -> jax.Array:
    y = (x.reshape(-1, x.shape[-1]) @ p["kernel"]).reshape(*x.shape[:-1], -1)
    return y + p["bias"] if "bias" in p else y


def norm(x: jax.Array, p: Tree) -> jax.Array:
    x32 = x.astype(jnp.float32)
    if "bias" in p:
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    y = (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-5)).astype(x.dtype) * p["scale"]
    return y + p["bias"] if "bias" in p else y


def rope(x_BTNH: jax.Array, turns: Turns) -> jax.Array:
    cos, sin = turns[0][:, None], turns[1][:, None]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)


def attend(q_BNTH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, bias_TS: jax.Array | np.ndarray) -> jax.Array:
    scores = jnp.matmul(q_BNTH * q_BNTH.shape[-1] ** -0.5, k_BNSH.mT, preferred_element_type=jnp.float32) + bias_TS
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    mixed = weights.astype(v_BNSH.dtype) @ v_BNSH
    return mixed / weights.sum(-1, keepdims=True).astype(mixed.dtype)


def causal(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array) -> jax.Array:
    """In four tiles of queries, each with the keys up to its end: three eighths of the scores are never made."""
    q, k, v = (a.swapaxes(1, 2) for a in (q_BTNH, k_BTNH, v_BTNH))
    length = q.shape[2]
    bias_TS = np.where(np.tri(length, dtype=bool), np.float32(0), np.float32(HIDDEN))
    mixed, tile = [], max(64, -(-length // 4))
    for begin in range(0, length, tile):
        end = min(begin + tile, length)
        mixed.append(attend(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], bias_TS[begin:end, :end]))
    return jnp.concatenate(mixed, axis=2).swapaxes(1, 2)


def block(x_BTD: jax.Array, p: Tree, heads: int, turns: Turns | None, mix: Callable) -> tuple[jax.Array, Any]:
    """`mix(q, k, v)`, of (B, T, N, H) each, returns the attended values and what else comes out of the block."""
    y = norm(x_BTD, p["norm1"])
    if "qkv" in p:
        q, k, v = jnp.split(linear(y, p["qkv"]), 3, axis=-1)
    else:
        q, k, v = linear(y, p["query"]), linear(y, p["key"]), linear(y, p["value"])
    q, k, v = (a.reshape(*a.shape[:2], heads, -1) for a in (q, k, v))
    if turns is not None:
        q, k = rope(q, turns), rope(k, turns)
    mixed_BTNH, out = mix(q, k, v)
    x_BTD = x_BTD + linear(mixed_BTNH.reshape(*x_BTD.shape[:2], -1), p["out"])
    y = norm(x_BTD, p["norm2"])
    if "gate_up" in p:
        gate, up = jnp.split(linear(y, p["gate_up"]), 2, axis=-1)
        hidden = jax.nn.silu(gate) * up
    elif "gate" in p:
        hidden = jax.nn.silu(linear(y, p["gate"])) * linear(y, p["up"])
    else:
        hidden = jax.nn.gelu(linear(y, p["up"]), approximate=True)
    return x_BTD + linear(hidden, p["down"]), out


def all_turns(params: Tree, length: int, head_dim: int) -> Turns | None:
    """Made by NumPy, they are constants of the program; XLA would compute others in each loop that reads them."""
    if "positions" in params:
        return None
    frequencies = 10_000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = np.arange(length)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def read_out(params: Tree, x_BTD: jax.Array) -> jax.Array:
    kernel = params["head"] if "head" in params else params["embed"].T
    return linear(norm(x_BTD, params["norm"]), {"kernel": kernel}).astype(jnp.float32)


def make_loss(heads: int, head_dim: int, dtype: str = "float32", attention: str | None = None) -> Callable:
    """`loss(params, tokens, targets)` in nats. `attention` names an implementation of `jax.nn.dot_product_attention`
    to use instead of the tiles above."""

    def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        if attention is None:
            return causal(q, k, v), None
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=attention), None  # pyright: ignore

    def loss(params: Tree, tokens_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
        params = jax.tree.map(lambda value: value.astype(dtype), params)
        length = tokens_BT.shape[1]
        x_BTD = params["embed"][tokens_BT]
        if "positions" in params:
            x_BTD = x_BTD + params["positions"][:length]
        step = functools.partial(block, heads=heads, turns=all_turns(params, length, head_dim), mix=mix)
        if isinstance(params["layers"], list):
            for layer in params["layers"]:
                x_BTD, _ = step(x_BTD, layer)
        else:
            x_BTD, _ = jax.lax.scan(step, x_BTD, params["layers"])
        logits_BTV = read_out(params, x_BTD)
        hit_BTV = targets_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
        picked_BT = jnp.where(hit_BTV, logits_BTV, 0).sum(-1)
        return jnp.mean(jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT)

    return loss


def make_step(loss: Callable, optimizer: optax.GradientTransformation) -> Callable:
    """`step(params, optimizer_state, tokens, targets) -> (params, optimizer_state, loss)`, buffers reused."""

    def step(params: Tree, state: Tree, tokens_BT: jax.Array, targets_BT: jax.Array) -> tuple[Tree, Tree, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, tokens_BT, targets_BT)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


@functools.partial(jax.jit, static_argnames=("num_tokens", "heads", "head_dim"))
def generate(params: Tree, prompt_BP: jax.Array, *, num_tokens: int, heads: int, head_dim: int) -> jax.Array:
    """The likeliest continuation (B, num_tokens): one program, a cache for each layer, one scan over tokens."""
    start = prompt_BP.shape[1]
    length = start + num_tokens - 1
    turns = all_turns(params, length, head_dim)

    def forward(tokens_BT: jax.Array, caches: list | None, at: int | jax.Array) -> tuple[jax.Array, list]:
        count = tokens_BT.shape[1]
        x_BTD, filled = params["embed"][tokens_BT], []
        if "positions" in params:
            x_BTD = x_BTD + jax.lax.dynamic_slice_in_dim(params["positions"], at, count)
        here = turns and tuple(jax.lax.dynamic_slice_in_dim(jnp.asarray(table), at, count) for table in turns)

        def mix(cache: tuple | None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple]:
            new = [kept.swapaxes(1, 2) for kept in (k, v)]
            if len(prompt_BP) == 1:  # a dim of one row makes XLA copy each cache instead of writing in place
                new = [kept[0] for kept in new]
            if cache is None:  # the prompt
                pad = ((0, 0),) * (new[0].ndim - 2) + ((0, length - count), (0, 0))
                return causal(q, k, v), tuple(jnp.pad(kept, pad) for kept in new)
            put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=at, axis=-2)
            keys, values = (put(old, kept) for old, kept in zip(cache, new, strict=True))
            bias_TS = jnp.where(jnp.arange(length) <= at, 0.0, HIDDEN)[None]
            return attend(q.swapaxes(1, 2), keys, values, bias_TS).swapaxes(1, 2), (keys, values)

        for index, layer in enumerate(params["layers"]):
            cache = None if caches is None else caches[index]
            x_BTD, cache = block(x_BTD, layer, heads, here, functools.partial(mix, cache))
            filled.append(cache)
        return jnp.argmax(read_out(params, x_BTD[:, -1:])[:, 0], axis=-1).astype(jnp.int32), filled

    def step(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
        token_B, caches, at = carry
        token_B, caches = forward(token_B[:, None], caches, at)
        return (token_B, caches, at + 1), token_B

    first_B, caches = forward(prompt_BP, None, 0)
    _, rest_NB = jax.lax.scan(step, (first_B, caches, start), None, length=num_tokens - 1)
    return jnp.concatenate([first_B[:, None], rest_NB.T], axis=1)
