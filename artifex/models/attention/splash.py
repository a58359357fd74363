"""Attention by JAX's own TPU kernel, splash attention: blocks of scores live in the chip's fast memory alone.

Dims: B batch, T queries, S keys, N query heads, K key heads, H head_dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from artifex.models.attention.blockwise import BLOCK, SAVED, even, padded

LANES = 128  # blocks of queries and of keys are multiples of it


def splash(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    segments_BT: jax.Array | None = None,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float | None,
    block: int = BLOCK,
    interpret: bool = False,
) -> jax.Array:
    """softmax(scale Q K^T) V, (B, T, N, H) in the dtype of `query_BTNH`, by `jax.experimental.pallas.ops.tpu`.

    Blocks that a mask hides are neither computed nor read, in both directions. With `segments_BT`, int32, a query sees
    the keys of its own segment alone. Lengths are padded to whole blocks and the padding hidden; any H will do. XLA
    cannot divide the kernel: call it on one device's part, in a `shard_map` with `check_vma=False`. The output and the
    logsumexp of each query are named "attention" for remat policies. `interpret` runs it anywhere, slowly.
    """
    # here: it takes 0.4 s, which a run without a TPU need not spend
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        FullMask,
        LocalMask,
        MultiHeadMask,
        SegmentIds,
        make_splash_mha,
    )

    _, T, N, H = query_BTNH.shape
    S = key_BSKH.shape[1]
    rows, columns = even(T, block, LANES), even(S, block, LANES)
    factor = H**-0.5 if scale is None else scale
    # the kernel knows no scale: one that is no power of two rounds 16-bit queries once more
    query_BTNH, key_BSKH = padded(query_BTNH * factor, rows), padded(key_BSKH, columns)
    shape = (query_BTNH.shape[1], key_BSKH.shape[1])
    ids = segment_ids(segments_BT, query_BTNH.shape[0], T, S, shape, causal)
    segments = None if ids is None else SegmentIds(*ids)
    if not causal:
        mask = FullMask(shape)
    else:  # what pads the keys comes after every query
        mask = CausalMask(shape) if window is None else LocalMask(shape, (window - 1, 0), offset=0)
    kernel = make_splash_mha(
        MultiHeadMask([mask] * N),  # K heads of keys may be fewer
        # dQ by a kernel of its own: the joint one holds a dQ for every block of keys
        block_sizes=BlockSizes(
            block_q=rows,
            block_kv=columns,
            block_q_dkv=rows,
            block_kv_dkv=columns,
            block_q_dq=rows,
            block_kv_dq=columns,
        ),
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=SAVED,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    heads_first = [x.swapaxes(1, 2) for x in (query_BTNH, key_BSKH, padded(value_BSKH, columns))]
    out_BNTH: Any = jax.vmap(lambda *arrays: kernel(*arrays[:3], segment_ids=arrays[3]))(*heads_first, segments)
    return out_BNTH[:, :, :T].swapaxes(1, 2)


def segment_ids(
    segments_BT: jax.Array | None, B: int, T: int, S: int, padded_to: tuple[int, int], causal: bool
) -> tuple[jax.Array, jax.Array] | None:
    """Segments of queries and of keys, padding counted, which queries that are none never see; None where all see all.

    Padding of queries belongs to the last segment, so that it sees something. What pads the keys comes after every
    query, which suffices where attention is causal.
    """
    queries, keys = padded_to
    if segments_BT is not None:
        of_queries = jnp.pad(segments_BT, ((0, 0), (0, queries - T)), mode="edge")
        return of_queries, jnp.pad(segments_BT, ((0, 0), (0, keys - S)), constant_values=jnp.iinfo(jnp.int32).min)
    if causal or keys == S:
        return None
    hidden_BS = jnp.broadcast_to(jnp.arange(keys)[None] >= S, (B, keys))
    return jnp.zeros((B, queries), jnp.int32), hidden_BS.astype(jnp.int32)
