"""Attention by cuDNN's flash attention, through JAX: blocks of scores live in a GPU's fast memory alone.

Dims: B batch, T queries, S keys, N query heads, K key heads, H head_dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

HEAD_DIM = 128  # the most its kernels take before Hopper


def cudnn(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float | None,
) -> jax.Array:
    """softmax(scale Q K^T) V, (B, T, N, H) in the dtype of `query_BTNH`; any lengths.

    XLA divides it over batch alone, so on a mesh call it on one device's part, in a `shard_map`.
    Raises `ValueError` for what it does not take.
    """
    H = query_BTNH.shape[-1]
    if not takes(query_BTNH.dtype, H, softcap):
        raise ValueError(
            f"attention 'cudnn' takes float16 or bfloat16, a head_dim up to {HEAD_DIM} in steps of 8 and no softcap, "
            f"got {query_BTNH.dtype}, {H} and {softcap}; compute in bfloat16, or set attention to 'auto'"
        )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.nn.dot_product_attention(
            query_BTNH,
            key_BSKH,
            value_BSKH,
            scale=H**-0.5 if scale is None else scale,
            is_causal=causal,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )


def takes(dtype: Any, head_dim: int, softcap: float | None) -> bool:
    """Whether it computes such attention."""
    return (
        jnp.dtype(dtype) in (jnp.float16, jnp.bfloat16) and head_dim <= HEAD_DIM and head_dim % 8 == 0 and not softcap
    )
