"""softmax(Q K^T) V for every family: causal or not, windowed, soft-capped, by the implementation that fits the device.

Dims: B batch, T queries, S keys, N query heads, K key heads, G = N / K, H head_dim.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from artifex.models import cpu
from artifex.models.attention import blockwise, cudnn, splash, tiles
from artifex.scaling import axes
from artifex.scaling.execution import Platform, current_execution
from artifex.scaling.local import local

Implementation = Literal["tiles", "blockwise", "splash", "cudnn"]

IMPLEMENTATIONS: dict[Implementation, Callable[..., jax.Array]] = {
    "tiles": tiles.tiles,
    "blockwise": blockwise.blockwise,
    "splash": splash.splash,
    "cudnn": cudnn.cudnn,
}
"""Each computes `attention(query, key, value, causal=, window=, softcap=, scale=)` of one device's part."""

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

    `implementation_for` says how it is computed, unless `Execution.attention` does; on a mesh each device computes the
    batch rows and heads that the rules give it. Raises `ValueError` for heads that do not divide, `causal` with T != S,
    a window without `causal`, and cuDNN where it cannot be.
    """
    (_, T, N, H), (S, K) = query_BTNH.shape, key_BSKH.shape[1:3]
    if N % K:
        raise ValueError(f"{N} query heads do not divide by {K} key heads; each key head serves as many query heads")
    if causal and T != S:
        raise ValueError(f"causal attention has {T} queries and {S} keys; expected as many of each")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window {window} with causal={causal}; a window is at least 1 and looks back: set causal")
    window = None if window is None or window >= S else window
    how = _implementation(query_BTNH.dtype, H, S, softcap)
    if (taken := _TAKEN.get()) is not None:
        taken.add(how)
    bounds: dict[str, Any] = {"window": window, "softcap": softcap, "scale": scale}
    if how == "blockwise" and current_execution().on_one_cpu:
        bounds["block"] = cpu.ATTENTION_BLOCK
    attention = functools.partial(IMPLEMENTATIONS[how], causal=causal, **bounds)
    heads = "act_kv_heads"
    if axes.activation_axes("act_kv_heads", K) != axes.activation_axes("act_heads", N):
        # key heads that do not divide over the devices that share the query heads: each is held by several
        repeats, heads = _repeats(K, axes.ways(("act_heads",), (N,))[0]), "act_heads"
        key_BSKH, value_BSKH = (jnp.repeat(x, repeats, axis=2) for x in (key_BSKH, value_BSKH))
    queries, keys = ("batch", None, "act_heads", None), ("batch", None, heads, None)
    return local(attention, inputs=(queries, keys, keys), outputs=queries)(query_BTNH, key_BSKH, value_BSKH)


@contextlib.contextmanager
def recording() -> Iterator[set[Implementation]]:
    """The implementations that calls traced inside take, so that a run can name them."""
    taken: set[Implementation] = set()
    token = _TAKEN.set(taken)
    try:
        yield taken
    finally:
        _TAKEN.reset(token)


def implementation_for(
    platform: Platform, dtype: Any, head_dim: int, softcap: float | None = None, *, keys: int = 0, one_cpu: bool = True
) -> Implementation:
    """How attention is computed on a platform. None but "tiles" holds all scores of a head at once, in any direction.

    "splash", JAX's kernel, on a TPU. On a GPU "cudnn" for what it takes (`artifex.models.attention.cudnn.takes`), else
    "blockwise", our own scan with a running maximum, which is also what simulated devices run. On one CPU device
    "tiles", plain products, for fewer `keys` than `artifex.models.cpu.TILES_BELOW`.
    """
    if platform == "tpu":
        return "splash"
    if platform == "gpu":
        return "cudnn" if cudnn.takes(dtype, head_dim, softcap) else "blockwise"
    return "tiles" if one_cpu and keys < cpu.TILES_BELOW else "blockwise"


def _implementation(dtype: Any, head_dim: int, keys: int, softcap: float | None) -> Implementation:
    """The one that the execution at hand asks for, or the device's."""
    how = current_execution()
    if how.attention == "auto":
        assert how.platform is not None, "an execution knows its platform"
        return implementation_for(how.platform, dtype, head_dim, softcap, keys=keys, one_cpu=how.on_one_cpu)
    if how.attention == "splash" and how.platform != "tpu":
        raise ValueError(f"attention 'splash' is for TPUs, the platform is {how.platform!r}; set attention to 'auto'")
    return how.attention


def _repeats(heads: int, ways: int) -> int:
    """How often each key head must be there, so that as many fall on each of `ways` devices."""
    return next(count for count in range(1, ways + 1) if heads * count % ways == 0)
