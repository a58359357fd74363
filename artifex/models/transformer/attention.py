"""Softmax attention of the decoder: projections, norms and rotary positions of queries and keys, and their cache.

Dims: B batch, T queries, S keys, D embed, N query heads, K key heads, G = N / K, H head_dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from artifex.models import layers
from artifex.models.attention import dot_product_attention
from artifex.models.attention.tiles import attend, seen
from artifex.models.transformer.config import DecoderConfig
from artifex.models.transformer.norms import rms_norm
from artifex.scaling import axes


class Cache(NamedTuple):
    """Keys and values of the positions seen so far; rows beyond them are zero."""

    key_BKSH: jax.Array  # heads before positions: a step reads it as it lies, in half the time for 8 rows on a CPU
    value_BKSH: jax.Array

    def write(self, key_BTKH: jax.Array, value_BTKH: jax.Array, start: int | jax.Array) -> Cache:
        """The cache with positions `start` to `start + T` filled."""
        put = jax.lax.dynamic_update_slice_in_dim
        key_BKTH, value_BKTH = key_BTKH.swapaxes(1, 2), value_BTKH.swapaxes(1, 2)
        return Cache(put(self.key_BKSH, key_BKTH, start, 2), put(self.value_BKSH, value_BKTH, start, 2))


def projections(cfg: DecoderConfig, rngs: nnx.Rngs) -> tuple[layers.Linear, ...]:
    """The maps from the residual stream to queries, keys and values, and from the heads back to it."""
    query, key = (cfg.embed_dim, cfg.num_heads, cfg.per_head), (cfg.embed_dim, cfg.kv_heads, cfg.per_head)
    return (
        layers.Linear(query, ("embed", "heads", "head_dim"), bias=cfg.bias, rngs=rngs),
        layers.Linear(key, ("embed", "kv_heads", "head_dim"), bias=cfg.bias, rngs=rngs),
        layers.Linear(key, ("embed", "kv_heads", "head_dim"), bias=cfg.bias, rngs=rngs),
        layers.Linear(
            (cfg.num_heads, cfg.per_head, cfg.embed_dim),
            ("heads", "head_dim", "embed"),
            inputs=2,
            bias=cfg.bias,
            scale=0.5 / cfg.num_layers,  # 2 residual branches a layer: their sum keeps the variance of the stream
            rngs=rngs,
        ),
    )


class Attention(nnx.Module):
    """`dot_product_attention` between projections; a layer with a `window` sees the newest keys alone."""

    def __init__(self, cfg: DecoderConfig, *, window: int | None = None, rngs: nnx.Rngs):
        self.cfg, self.window = cfg, window
        self.query, self.key, self.value, self.out = projections(cfg, rngs)
        if cfg.qk_norm:
            self.query_norm = rms_norm(cfg, cfg.per_head, "head_dim")
            self.key_norm = rms_norm(cfg, cfg.per_head, "head_dim")

    @staticmethod
    def empty_cache(cfg: DecoderConfig, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        """Room for `length` positions of one layer."""
        zeros = jnp.zeros((batch, cfg.kv_heads, length, cfg.per_head), dtype)
        return Cache(zeros, zeros)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_T: jax.Array | np.ndarray,
        cache: Cache | None = None,
        start: int | jax.Array = 0,
        valid: int | jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Attend within x, or, with a cache, from x at positions `start` on to all positions up to each of its own.

        `valid`, for modules that carry a state: how many positions of x are no padding. Here padding's keys stay
        behind every query until they are overwritten.
        """
        query_BTNH, key_BTKH, value_BTKH = self.project(x_BTD, positions_T)
        bounds: dict[str, Any] = {"softcap": self.cfg.attention_softcap, "scale": self.cfg.query_scale}
        if cache is None:
            reach: dict[str, Any] = {"causal": self.cfg.causal, "window": self.window}
            mixed_BTNH = dot_product_attention(query_BTNH, key_BTKH, value_BTKH, **reach, **bounds)
        else:
            cache = cache.write(key_BTKH, value_BTKH, start)
            query_BTKGH = query_BTNH.reshape(*key_BTKH.shape[:3], -1, self.cfg.per_head)
            # a start known while tracing is the prompt's: no later position is filled yet
            filled = start + x_BTD.shape[1] if isinstance(start, int) else cache.key_BKSH.shape[2]
            keys_BKSH, values_BKSH = cache.key_BKSH[:, :, :filled], cache.value_BKSH[:, :, :filled]
            seen_TS = seen(positions_T, jnp.arange(filled), self.window)
            mixed_BKGTH = attend(query_BTKGH.transpose(0, 2, 3, 1, 4), keys_BKSH, values_BKSH, seen_TS, **bounds)
            mixed_BTNH = mixed_BKGTH.transpose(0, 3, 1, 2, 4).reshape(query_BTNH.shape)
        return self.out(axes.shard(mixed_BTNH, "batch", "sequence", "act_heads", None)), cache

    def project(self, x_BTD: jax.Array, positions_T: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries (B, T, N, H), keys and values (B, T, K, H), normed and turned by their positions if so configured."""
        query_BTNH, key_BTKH, value_BTKH = layers.fused(x_BTD, self.query, self.key, self.value)
        query_BTNH = axes.shard(query_BTNH, "batch", "sequence", "act_heads", None)
        key_BTKH = axes.shard(key_BTKH, "batch", "sequence", "act_kv_heads", None)
        value_BTKH = axes.shard(value_BTKH, "batch", "sequence", "act_kv_heads", None)
        if self.cfg.qk_norm:
            query_BTNH, key_BTKH = self.query_norm(query_BTNH), self.key_norm(key_BTKH)
        if self.cfg.positions == "rope":
            query_BTNH, key_BTKH = self.turn(query_BTNH, positions_T), self.turn(key_BTKH, positions_T)
        return query_BTNH, key_BTKH, value_BTKH

    def turn(self, x: jax.Array, positions_T: jax.Array | np.ndarray) -> jax.Array:
        """Rotary positions on (B, T, ..., H)."""
        cfg = self.cfg
        frequencies = layers.rope_frequencies(
            cfg.per_head, cfg.rope_theta, cfg.rope_scaling_factor, cfg.rope_original_length
        )
        return layers.rope(x, positions_T, frequencies)
