"""Grouped-query attention with rotary positions and a cache of keys and values.

Dims: B batch, T queries, S keys, D embed, N query heads, K key heads, G = N / K, H head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from artifex.models import layers
from artifex.models.transformer.config import DecoderConfig
from artifex.scaling import axes

TILE = 64  # queries at least: smaller products run below a CPU's rate


class Cache(NamedTuple):
    """Keys and values of the positions seen so far; rows beyond them are zero."""

    key_BKSH: jax.Array  # heads before positions: a step reads it as it lies, in half the time for 8 rows on a CPU
    value_BKSH: jax.Array

    @classmethod
    def empty(cls, cfg: DecoderConfig, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        """Room for `length` positions of one layer."""
        zeros = jnp.zeros((batch, cfg.kv_heads, length, cfg.per_head), dtype)
        return cls(zeros, zeros)

    def write(self, key_BKTH: jax.Array, value_BKTH: jax.Array, start: int | jax.Array) -> Cache:
        """The cache with positions `start` to `start + T` filled."""
        put = jax.lax.dynamic_update_slice_in_dim
        return Cache(put(self.key_BKSH, key_BKTH, start, 2), put(self.value_BKSH, value_BKTH, start, 2))


def causal_attention(query_BKGTH: jax.Array, key_BKTH: jax.Array, value_BKTH: jax.Array) -> jax.Array:
    """`attend` within one sequence, by tiles of queries, each to the keys up to its own end: (B, K, G, T, H).

    Four tiles do without three eighths of the scores.
    """
    length = key_BKTH.shape[2]
    # where the sequence is split over a mesh, a tile would be a part of it
    tile = length if axes.activation_axes("sequence", length) else max(TILE, -(-length // 4))
    mixed = []
    for begin in range(0, length, tile):
        end = min(begin + tile, length)
        seen_TS = np.arange(begin, end)[:, None] >= np.arange(end)
        mixed.append(attend(query_BKGTH[:, :, :, begin:end], key_BKTH[:, :, :end], value_BKTH[:, :, :end], seen_TS))
    return jnp.concatenate(mixed, axis=3)


def attend(
    query_BKGTH: jax.Array, key_BKSH: jax.Array, value_BKSH: jax.Array, seen_TS: jax.Array | np.ndarray
) -> jax.Array:
    """softmax(Q K^T / sqrt(H)) V over the keys that each query has `seen`: (B, K, G, T, H). Weights are float32."""
    B, K, G, T, H = query_BKGTH.shape
    query_BKRH = (query_BKGTH * H**-0.5).reshape(B, K, G * T, H)  # R: the queries of all heads that share a key head
    scores_BKRS = jnp.einsum("BKRH,BKSH->BKRS", query_BKRH, key_BKSH, preferred_element_type=jnp.float32)
    # added, not selected: a selection has another one as its gradient
    hidden_TS = jnp.where(seen_TS, 0.0, -1e30)
    scores_BKRS = scores_BKRS + jnp.tile(hidden_TS, (G, 1))[None, None]
    top_BKR1 = jax.lax.stop_gradient(jnp.max(scores_BKRS, axis=-1, keepdims=True))
    weights_BKRS = jnp.exp(scores_BKRS - top_BKR1)
    mixed_BKRH = jnp.einsum("BKRS,BKSH->BKRH", weights_BKRS.astype(value_BKSH.dtype), value_BKSH)
    # divided after the product: H numbers a query instead of S
    mixed_BKRH = mixed_BKRH / jnp.sum(weights_BKRS, axis=-1, keepdims=True).astype(mixed_BKRH.dtype)
    return mixed_BKRH.reshape(B, K, G, T, H)


class Attention(nnx.Module):
    """softmax(Q K^T / sqrt(H)) V, causal (Vaswani et al. 2017, arXiv:1706.03762), with groups of query heads on one
    key head (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        query, key = (cfg.embed_dim, cfg.num_heads, cfg.per_head), (cfg.embed_dim, cfg.kv_heads, cfg.per_head)
        self.query = layers.Linear(query, ("embed", "heads", "head_dim"), bias=cfg.bias, rngs=rngs)
        self.key = layers.Linear(key, ("embed", "kv_heads", "head_dim"), bias=cfg.bias, rngs=rngs)
        self.value = layers.Linear(key, ("embed", "kv_heads", "head_dim"), bias=cfg.bias, rngs=rngs)
        self.out = layers.Linear(
            (cfg.num_heads, cfg.per_head, cfg.embed_dim),
            ("heads", "head_dim", "embed"),
            inputs=2,
            bias=cfg.bias,
            scale=0.5 / cfg.num_layers,  # 2 residual branches a layer: their sum keeps the variance of the stream
            rngs=rngs,
        )

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_T: jax.Array | np.ndarray,
        cache: Cache | None = None,
        start: int | jax.Array = 0,
    ) -> tuple[jax.Array, Cache | None]:
        """Attend within x, or, with a cache, from x at positions `start` on to all positions up to each of its own."""
        query_BKGTH, key_BKTH, value_BKTH = self.project(x_BTD, positions_T)
        if cache is None:
            mixed_BKGTH = causal_attention(query_BKGTH, key_BKTH, value_BKTH)
        else:
            cache = cache.write(key_BKTH, value_BKTH, start)
            # a start known while tracing is the prompt's: no later position is filled yet
            seen = start + x_BTD.shape[1] if isinstance(start, int) else cache.key_BKSH.shape[2]
            seen_TS = jnp.arange(seen)[None, :] <= positions_T[:, None]
            mixed_BKGTH = attend(query_BKGTH, cache.key_BKSH[:, :, :seen], cache.value_BKSH[:, :, :seen], seen_TS)
        heads = (self.cfg.num_heads, self.cfg.per_head)
        mixed_BTNH = mixed_BKGTH.transpose(0, 3, 1, 2, 4).reshape(*x_BTD.shape[:2], *heads)
        return self.out(axes.shard(mixed_BTNH, "batch", "sequence", "act_heads", None)), cache

    def project(self, x_BTD: jax.Array, positions_T: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries (B, K, G, T, H), keys and values (B, K, T, H), turned by their positions if the model is rotary."""
        query_BTNH, key_BTKH, value_BTKH = layers.fused(x_BTD, self.query, self.key, self.value)
        query_BTNH = axes.shard(query_BTNH, "batch", "sequence", "act_heads", None)
        key_BTKH = axes.shard(key_BTKH, "batch", "sequence", "act_kv_heads", None)
        value_BTKH = axes.shard(value_BTKH, "batch", "sequence", "act_kv_heads", None)
        if self.cfg.positions == "rope":
            query_BTNH, key_BTKH = self.turn(query_BTNH, positions_T), self.turn(key_BTKH, positions_T)
        query_BTKGH = query_BTNH.reshape(*key_BTKH.shape[:3], -1, self.cfg.per_head)
        return query_BTKGH.transpose(0, 2, 3, 1, 4), key_BTKH.swapaxes(1, 2), value_BTKH.swapaxes(1, 2)

    def turn(self, x: jax.Array, positions_T: jax.Array | np.ndarray) -> jax.Array:
        """Rotary positions on (B, T, ..., H)."""
        cfg = self.cfg
        frequencies = layers.rope_frequencies(
            cfg.per_head, cfg.rope_theta, cfg.rope_scaling_factor, cfg.rope_original_length
        )
        return layers.rope(x, positions_T, frequencies)
