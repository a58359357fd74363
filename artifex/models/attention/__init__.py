"""softmax(Q K^T) V for every family: causal or not, windowed, soft-capped, by the implementation that fits the device.

Dims: B batch, T queries, S keys, N query heads, K key heads, G = N / K, H head_dim.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from artifex.models.attention.tiles import tiles
from artifex.models.stack import current_execution
from artifex.scaling import axes

Implementation = Literal["tiles", "xla", "cudnn"]

CUDNN_HEAD_DIM = 128  # the most its kernels take before Hopper

_TAKEN: contextvars.ContextVar[set[Implementation] | None] = contextvars.ContextVar("artifex_attention", default=None)


def dot_product_attention(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    *,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> jax.Array:
    """softmax(scale Q K^T) V, (B, T, N, H) in the dtype of `query_BTNH` (Vaswani et al. 2017, arXiv:1706.03762).

    N is a multiple of K: groups of query heads share a key head (Ainslie et al. 2023, arXiv:2305.13245). `causal`
    hides the keys after each query; `window` leaves it the `window` newest of them, its own among these. `softcap` c
    bounds scores by c tanh(score / c) (Gemma 2, arXiv:2408.00118). `scale` None is H^-0.5. Weights are float32.

    `implementation_for` says how it is computed, unless `Execution.attention` does. Raises `ValueError` for heads
    that do not divide, `causal` with T != S, a window without `causal`, and cuDNN where it cannot be.
    """
    (_, T, N, H), (S, K) = query_BTNH.shape, key_BSKH.shape[1:3]
    if N % K:
        raise ValueError(f"{N} query heads do not divide by {K} key heads; each key head serves as many query heads")
    if causal and T != S:
        raise ValueError(f"causal attention has {T} queries and {S} keys; expected as many of each")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window {window} with causal={causal}; a window is at least 1 and looks back: set causal")
    window = None if window is None or window >= S else window
    how = _implementation(query_BTNH, softcap)
    if (taken := _TAKEN.get()) is not None:
        taken.add(how)
    if how == "tiles":
        return tiles(query_BTNH, key_BSKH, value_BSKH, causal, window, softcap, scale)
    # float32: JAX's product of bfloat16 has no gradient under strict promotion, and XLA rounds on a TPU anyway
    dtype = jnp.dtype(jnp.float32) if how == "xla" else query_BTNH.dtype
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        mixed_BTNH = jax.nn.dot_product_attention(
            query_BTNH.astype(dtype),
            key_BSKH.astype(dtype),
            value_BSKH.astype(dtype),
            scale=H**-0.5 if scale is None else scale,
            is_causal=causal,
            local_window_size=None if window is None else (window - 1, 0),
            implementation=how,
        )
    return mixed_BTNH.astype(query_BTNH.dtype)


@contextlib.contextmanager
def recording() -> Iterator[set[Implementation]]:
    """The implementations that calls traced inside take, so that a run can name them."""
    taken: set[Implementation] = set()
    token = _TAKEN.set(taken)
    try:
        yield taken
    finally:
        _TAKEN.reset(token)


def implementation_for(platform: str, dtype: Any, head_dim: int, *, softcap: float | None = None) -> Implementation:
    """How attention is computed on `platform` ("cpu", "gpu", "tpu"; as `jax.default_backend()` says).

    "cudnn" (flash attention) on a GPU for 16-bit numbers and a `head_dim` up to 128 in steps of 8, else "xla" there
    and on a TPU. "tiles", which is our own, on a CPU, where it is the fastest, and for a softcap, which the others
    do not know.
    """
    if softcap is not None or platform == "cpu":
        return "tiles"
    return "cudnn" if platform in ("gpu", "cuda") and _cudnn_takes(dtype, head_dim) else "xla"


def _cudnn_takes(dtype: Any, head_dim: int) -> bool:
    return jnp.dtype(dtype) in (jnp.float16, jnp.bfloat16) and head_dim <= CUDNN_HEAD_DIM and head_dim % 8 == 0


def _implementation(query_BTNH: jax.Array, softcap: float | None) -> Implementation:
    """The one that the execution at hand asks for, or the device's."""
    asked, dtype, head_dim = current_execution().attention, query_BTNH.dtype, query_BTNH.shape[-1]
    if asked == "auto" or softcap is not None:
        chosen = implementation_for(jax.default_backend(), dtype, head_dim, softcap=softcap)
        # cuDNN's kernel needs every sequence whole
        return "xla" if chosen == "cudnn" and axes.activation_axes("sequence", query_BTNH.shape[1]) else chosen
    if asked == "cudnn" and not _cudnn_takes(dtype, head_dim):
        raise ValueError(
            f"attention 'cudnn' takes float16 or bfloat16 and a head_dim up to {CUDNN_HEAD_DIM} in steps of 8, got "
            f"{dtype} and {head_dim}; compute in bfloat16, or set attention to 'auto'"
        )
    return asked
