"""Softmax attention of the decoder: projections, norms and rotary positions of queries and keys, and their cache.

Dims: L layers, B batch, T queries, S rows of a cache, D embed, N query heads, K key heads, G = N / K, H head_dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from artifex.models import cpu, layers
from artifex.models.attention import dot_product_attention
from artifex.models.attention.tiles import attend
from artifex.models.module import Module
from artifex.models.transformer.config import DecoderConfig
from artifex.models.transformer.norms import rms_norm
from artifex.models.transformer.positions import Positions
from artifex.scaling import axes
from artifex.scaling.execution import current_execution


class Place(NamedTuple):
    """Where tokens that are being decoded stand.

    `layer` says whose part of a cache is theirs, None where it is theirs alone; `start` their first position: 0 as a
    number for a prompt, else that of one token. The first `valid` of them are no padding.
    """

    layer: jax.Array | None
    start: int | jax.Array
    valid: int | jax.Array


class Cache(NamedTuple):
    """Keys and values of the positions seen so far, of one layer (B, K, S, H) or of several (L, B, K, S, H); of B and K
    on one CPU device those that are not 1 (`cpu.held_dims`).

    Position p is in row p % S: of more than S positions the newest S are kept, which is all that a window of S sees.
    """

    key: jax.Array  # heads before positions: a step reads it as it lies, in half the time for 8 rows on a CPU
    value: jax.Array

    def write(self, key_BTKH: jax.Array, value_BTKH: jax.Array, at: Place) -> Cache:
        """The cache with these positions filled in, in place."""
        return Cache(_put(self.key, key_BTKH, at), _put(self.value, value_BTKH, at)).sharded()

    def read(self, layer: jax.Array | None, batch: int, heads: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values (B, K, S, H) of a layer."""

        def of_layer(rows: jax.Array) -> jax.Array:
            rows = rows if layer is None else jax.lax.dynamic_index_in_dim(rows, layer, keepdims=False)
            return rows.reshape(batch, heads, *rows.shape[-2:])

        return of_layer(self.key), of_layer(self.value)

    def seen(self, position: jax.Array | int) -> jax.Array:
        """(1, S): which rows hold positions up to `position`, the newest one; from S on all of them do."""
        return (jnp.arange(self.key.shape[-2]) <= position)[None]

    def sharded(self) -> Cache:
        """Laid out by the names of its dims."""
        if current_execution().on_one_cpu:
            return self
        names = (None,) * (self.key.ndim - 4) + ("batch", "act_kv_heads", None, None)
        return Cache(axes.shard(self.key, *names), axes.shard(self.value, *names))


def _put(rows: jax.Array, new_BTKH: jax.Array, at: Place) -> jax.Array:
    """`rows`, of one layer or several, with the positions from `at.start` on replaced."""
    S, T, H = rows.shape[-2], new_BTKH.shape[1], new_BTKH.shape[3]
    first = at.start % S
    if T > S:  # of a prompt beyond the window, the newest valid ones; a row before all of them is hidden by `seen`
        row_S = jnp.arange(S)
        kept_S = at.valid - 1 - (at.valid - 1 - row_S) % S
        new_BTKH, first = jnp.take(new_BTKH, jnp.maximum(kept_S, 0), axis=1), 0
    which = () if at.layer is None else (at.layer,)
    held = rows.shape[len(which) : -2]
    new = new_BTKH.swapaxes(1, 2).astype(rows.dtype).reshape(*(1 for _ in which), *held, -1, H)
    return jax.lax.dynamic_update_slice(rows, new, (*which, *(0 for _ in held), first, 0))


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


class Attention(Module):
    """`dot_product_attention` between projections; a layer with a `window` sees the newest keys alone."""

    def __init__(self, cfg: DecoderConfig, *, window: int | None = None, rngs: nnx.Rngs):
        self.cfg, self.window = cfg, window
        self.query, self.key, self.value, self.out = projections(cfg, rngs)
        if cfg.qk_norm:
            self.query_norm = rms_norm(cfg, cfg.per_head, "head_dim")
            self.key_norm = rms_norm(cfg, cfg.per_head, "head_dim")

    @staticmethod
    def empty_cache(
        cfg: DecoderConfig, layers: int | None, batch: int, length: int, dtype: jnp.dtype, window: int | None = None
    ) -> Cache:
        """Room for `length` positions of one layer, or of so many, or for the `window` newest of them."""
        rows = length if window is None else min(window, length)
        shape = (*cpu.held_dims(batch, cfg.kv_heads), rows, cfg.per_head)
        zeros = jnp.zeros(shape if layers is None else (layers, *shape), dtype)
        return Cache(zeros, zeros).sharded()

    def __call__(
        self,
        x_BTD: jax.Array,
        positions: Positions,
        cache: Cache | None = None,
        at: Place | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Attend within x; with a cache, which takes up x's keys, a prompt so, and one token to all in the cache.

        Where padding follows a prompt, its keys stay behind every query until they are overwritten.
        """
        query_BTNH, key_BTKH, value_BTKH = self.project(x_BTD, positions)
        bounds: dict[str, Any] = {"softcap": self.cfg.attention_softcap, "scale": self.cfg.query_scale}
        if cache is not None and at is not None:
            cache = cache.write(key_BTKH, value_BTKH, at)
        if cache is None or at is None or isinstance(at.start, int):
            reach: dict[str, Any] = {"causal": self.cfg.causal, "window": self.window}
            reach |= {"order": positions.order}
            mixed_BTNH = dot_product_attention(query_BTNH, key_BTKH, value_BTKH, positions.segments, **reach, **bounds)
        else:
            B, T, K, H = key_BTKH.shape
            query_BKGTH = query_BTNH.reshape(B, T, K, -1, H).transpose(0, 2, 3, 1, 4)
            mixed_BKGTH = attend(query_BKGTH, *cache.read(at.layer, B, K), cache.seen(at.start), **bounds)
            mixed_BTNH = mixed_BKGTH.transpose(0, 3, 1, 2, 4).reshape(query_BTNH.shape)
        return self.out(axes.shard(mixed_BTNH, "batch", "sequence", "act_heads", None)), cache

    def project(self, x_BTD: jax.Array, positions: Positions) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries (B, T, N, H), keys and values (B, T, K, H), normed and turned by their positions if so configured."""
        query_BTNH, key_BTKH, value_BTKH = layers.fused(x_BTD, self.query, self.key, self.value)
        query_BTNH = axes.shard(query_BTNH, "batch", "sequence", "act_heads", None)
        key_BTKH = axes.shard(key_BTKH, "batch", "sequence", "act_kv_heads", None)
        value_BTKH = axes.shard(value_BTKH, "batch", "sequence", "act_kv_heads", None)
        if self.cfg.qk_norm:
            query_BTNH, key_BTKH = self.query_norm(query_BTNH), self.key_norm(key_BTKH)
        if self.cfg.positions == "rope":
            query_BTNH, key_BTKH = (positions.turned(self.cfg, x) for x in (query_BTNH, key_BTKH))
        return tuple(checkpoint_name(x, "qkv") for x in (query_BTNH, key_BTKH, value_BTKH))
