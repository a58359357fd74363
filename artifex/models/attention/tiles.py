"""Attention by tiles of queries, each a plain product with the keys it sees: the fastest on a CPU.

Dims: B batch, T queries, S keys, N query heads, K key heads, G = N / K, H head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

TILE = 64  # queries at least: smaller products run below a CPU's rate
MOST_TILES = 16  # each one is compiled by itself


def tiles(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float | None,
) -> jax.Array:
    """By tiles of queries, each with the keys from the start of its first query's window to its own end: (B, T, N, H).

    Without a window four tiles do without three eighths of the scores. All keys at once where attention is not causal.
    """
    (B, T, N, H), K = query_BTNH.shape, key_BSKH.shape[2]
    query_BKGTH = query_BTNH.reshape(B, T, K, -1, H).transpose(0, 2, 3, 1, 4)
    key_BKSH, value_BKSH = key_BSKH.swapaxes(1, 2), value_BSKH.swapaxes(1, 2)
    if not causal:
        mixed_BKGTH = attend(query_BKGTH, key_BKSH, value_BKSH, softcap=softcap, scale=scale)
        return checkpoint_name(mixed_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H), "attention")
    quarter = -(-T // 4)
    tile = max(TILE, quarter if window is None else max(min(window, quarter), -(-T // MOST_TILES)))
    mixed = []
    for begin in range(0, T, tile):
        end = min(begin + tile, T)
        first = 0 if window is None else max(begin - window + 1, 0) // tile * tile
        seen_TS = seen(jnp.arange(begin, end), jnp.arange(first, end), window)
        keys_BKSH, values_BKSH = key_BKSH[:, :, first:end], value_BKSH[:, :, first:end]
        mixed.append(
            attend(query_BKGTH[:, :, :, begin:end], keys_BKSH, values_BKSH, seen_TS, softcap=softcap, scale=scale)
        )
    mixed_BTNH = jnp.concatenate(mixed, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    return checkpoint_name(mixed_BTNH, "attention")


def seen(
    query_T: jax.Array | np.ndarray, key_S: jax.Array | np.ndarray, window: int | None = None
) -> jax.Array | np.ndarray:
    """(T, S): whether the key at position s is at or before the query's, and one of the `window` newest there."""
    seen_TS = key_S[None, :] <= query_T[:, None]
    return seen_TS if window is None else seen_TS & (key_S[None, :] > query_T[:, None] - window)


def attend(
    query_BKGTH: jax.Array,
    key_BKSH: jax.Array,
    value_BKSH: jax.Array,
    seen_TS: jax.Array | np.ndarray | None = None,
    *,
    softcap: float | None = None,
    scale: float | None = None,
) -> jax.Array:
    """softmax(scale Q K^T) V over the keys that each query has `seen` (None: all): (B, K, G, T, H).

    Weights are float32, those of 16-bit values rounded once for the product with them.
    """
    B, K, G, T, H = query_BKGTH.shape
    factor = H**-0.5 if scale is None else scale
    short = query_BKGTH.dtype.itemsize < 4
    scaled_BKGTH = query_BKGTH if short else query_BKGTH * factor
    query_BKRH = scaled_BKGTH.reshape(B, K, G * T, H)  # R: the queries of all heads that share a key head
    scores_BKRS = jnp.einsum("BKRH,BKSH->BKRS", query_BKRH, key_BKSH, preferred_element_type=jnp.float32)
    if short:  # a scale that is no power of two rounds 16-bit queries once more
        scores_BKRS = scores_BKRS * factor
    if softcap is not None:
        scores_BKRS = softcap * jnp.tanh(scores_BKRS / softcap)
    if seen_TS is not None:
        # added, not selected: a selection has another one as its gradient
        hidden_TS = jnp.where(seen_TS, 0.0, -1e30)
        scores_BKRS = scores_BKRS + jnp.tile(hidden_TS, (G, 1))[None, None]
    top_BKR1 = jax.lax.stop_gradient(jnp.max(scores_BKRS, axis=-1, keepdims=True))
    weights_BKRS = jnp.exp(scores_BKRS - top_BKR1)
    mixed_BKRH = jnp.einsum(
        "BKRS,BKSH->BKRH", weights_BKRS.astype(value_BKSH.dtype), value_BKSH, preferred_element_type=jnp.float32
    )
    # divided after the product, H numbers a query instead of S, and before rounding: in bfloat16 it doubles the error
    mixed_BKRH = (mixed_BKRH / jnp.sum(weights_BKRS, axis=-1, keepdims=True)).astype(value_BKSH.dtype)
    return mixed_BKRH.reshape(B, K, G, T, H)
