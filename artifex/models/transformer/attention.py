"""Grouped-query attention with rotary positions and a cache of keys and values.

Dims: B batch, T queries, S keys, D embed, N query heads, K key heads, G = N / K, H head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from artifex.models import layers
from artifex.models.transformer.config import DecoderConfig
from artifex.scaling import axes


class Cache(NamedTuple):
    """Keys and values of the positions seen so far; rows beyond them are zero."""

    key_BSKH: jax.Array
    value_BSKH: jax.Array

    @classmethod
    def empty(cls, cfg: DecoderConfig, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        """Room for `length` positions of one layer."""
        zeros = jnp.zeros((batch, length, cfg.kv_heads, cfg.per_head), dtype)
        return cls(zeros, zeros)

    def write(self, key_BTKH: jax.Array, value_BTKH: jax.Array, start: int | jax.Array) -> Cache:
        """The cache with positions `start` to `start + T` filled."""
        put = jax.lax.dynamic_update_slice_in_dim
        return Cache(put(self.key_BSKH, key_BTKH, start, 1), put(self.value_BSKH, value_BTKH, start, 1))


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
        self, x_BTD: jax.Array, positions_T: jax.Array, cache: Cache | None = None, start: int | jax.Array = 0
    ) -> tuple[jax.Array, Cache | None]:
        """Attend within x, or, with a cache, from x at positions `start` on to all positions up to each of its own."""
        query_BTNH, key_BTKH, value_BTKH = self.project(x_BTD, positions_T)
        if cache is None:
            mixed_BTNH = layers.attend(query_BTNH, key_BTKH, value_BTKH, is_causal=True)
        else:
            cache = cache.write(key_BTKH, value_BTKH, start)
            # a start known while tracing is the prompt's: no later position is filled yet
            seen = start + x_BTD.shape[1] if isinstance(start, int) else cache.key_BSKH.shape[1]
            mask_TS = jnp.arange(seen)[None, :] <= positions_T[:, None]
            mixed_BTNH = layers.attend(
                query_BTNH, cache.key_BSKH[:, :seen], cache.value_BSKH[:, :seen], mask=mask_TS[None, None]
            )
        return self.out(axes.shard(mixed_BTNH, "batch", "sequence", "act_heads", None)), cache

    def project(self, x_BTD: jax.Array, positions_T: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries (B, T, N, H), keys and values (B, T, K, H), turned by their positions where the model is rotary."""
        cfg = self.cfg
        K, G, H = cfg.kv_heads, cfg.num_heads // cfg.kv_heads, cfg.per_head
        batch, length = x_BTD.shape[:2]
        if axes.activation_axes("act_kv_heads", K) != axes.activation_axes("act_heads", cfg.num_heads):
            # too few key heads for the mesh axis that splits the query heads: a joint product would gather the queries
            q, k, v = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
            if cfg.positions == "rope":
                q, k = self.turn(q, positions_T), self.turn(k, positions_T)
            return axes.shard(q, "batch", "sequence", "act_heads", None), k, v
        joint_BTKJH = layers.fused_linear(x_BTD, (self.query, self.key, self.value), (G, 1, 1), rows=K)
        joint_BTKJH = axes.shard(joint_BTKJH, "batch", "sequence", "act_kv_heads", None, None)
        queries_and_key, value = joint_BTKJH[:, :, :, : G + 1], joint_BTKJH[:, :, :, G + 1]
        if cfg.positions == "rope":
            queries_and_key = self.turn(queries_and_key, positions_T)
        return queries_and_key[:, :, :, :G].reshape(batch, length, K * G, H), queries_and_key[:, :, :, G], value

    def turn(self, x: jax.Array, positions_T: jax.Array) -> jax.Array:
        """Rotary positions on (B, T, ..., H)."""
        cfg = self.cfg
        frequencies = layers.rope_frequencies(
            cfg.per_head, cfg.rope_theta, cfg.rope_scaling_factor, cfg.rope_original_length
        )
        return layers.rope(x, positions_T, frequencies)
