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
from artifex.models.attention import blockwise, cudnn, ring, splash, tiles
from artifex.models.attention.ring import Order
from artifex.models.attention.ulysses import check_heads, repeats, ulysses
from artifex.scaling import axes
from artifex.scaling.execution import Platform, current_execution
from artifex.scaling.local import local

Implementation = Literal["tiles", "blockwise", "splash", "cudnn", "ring"]

IMPLEMENTATIONS: dict[Implementation, Callable[..., jax.Array]] = {
    "tiles": tiles.tiles,
    "blockwise": blockwise.blockwise,
    "splash": splash.splash,
    "cudnn": cudnn.cudnn,
    "ring": ring.ring,
}
"""Each computes `attention(query, key, value, segments, causal=, window=, softcap=, scale=)` of one device's part;
tiles and cuDNN take no segments. "ring" is for a part of the positions, the others need all of them."""

QUERIES, KEYS = ("batch", "sequence", "act_heads", None), ("batch", "sequence", "act_kv_heads", None)
SEGMENTS = ("batch", "sequence")

_TAKEN: contextvars.ContextVar[set[Implementation] | None] = contextvars.ContextVar("artifex_attention", default=None)


@jax.named_scope("dot_product_attention")
def dot_product_attention(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    segments_BT: jax.Array | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    order: Order = "given",
) -> jax.Array:
    """softmax(scale Q K^T) V, (B, T, N, H) in the dtype of `query_BTNH` (Vaswani et al. 2017, arXiv:1706.03762).

    N is a multiple of K: groups of query heads share a key head (Ainslie et al. 2023, arXiv:2305.13245). `causal`
    hides the keys after each query; `window` leaves it the `window` newest of them, its own among these. With
    `segments_BT`, integers, each query sees the keys of its own segment alone: rows of several documents. `softcap` c
    bounds scores by c tanh(score / c) (Gemma 2, arXiv:2408.00118). `scale` None is H^-0.5. Weights are float32.

    `implementation_for` says how it is computed, unless `Execution.attention` does; on a mesh each device computes the
    batch rows and heads that the rules give it. Where they split the sequence, `Execution.context_attention` says how
    positions see each other; `order` "zigzag" is that of `artifex.models.attention.zigzag`, for as many parts as
    `sequence_parts` says. Raises `ValueError` for heads that do not divide, `causal` or segments with T != S, a window
    without `causal`, and implementations where they cannot be.
    """
    (B, T, N, H), (S, K) = query_BTNH.shape, key_BSKH.shape[1:3]
    if N % K:
        raise ValueError(f"{N} query heads do not divide by {K} key heads; each key head serves as many query heads")
    if causal and T != S:
        raise ValueError(f"causal attention has {T} queries and {S} keys; expected as many of each")
    if segments_BT is not None and not (T == S and segments_BT.shape == (B, T)):
        raise ValueError(f"segments are {segments_BT.shape} for ({B}, {T}) queries and {S} keys; expected one of each")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window {window} with causal={causal}; a window is at least 1 and looks back: set causal")
    window = None if window is None or window >= S else window
    parts, by = sequence_parts(B, T, N), current_execution().context_attention
    parts = parts if parts == sequence_parts(B, S, N) else 1
    if order == "zigzag" and (parts == 1 or by != "ring" or not causal):
        raise ValueError(
            f"order 'zigzag' is for a causal ring; attention is {by!r} over {parts} parts, causal={causal}"
        )
    how = _implementation(query_BTNH.dtype, H, S, softcap, segments_BT is not None, ring=parts > 1 and by == "ring")
    if (taken := _TAKEN.get()) is not None:
        taken.add(how)
    bounds: dict[str, Any] = {"window": window, "softcap": softcap, "scale": scale}
    if how == "blockwise" and current_execution().on_one_cpu:
        bounds["block"] = cpu.ATTENTION_BLOCK
    if how == "ring":
        bounds["order"] = order
    attention = functools.partial(IMPLEMENTATIONS[how], causal=causal, **bounds)
    if parts > 1 and by == "ulysses":
        check_heads(N // axes.ways(QUERIES, query_BTNH.shape)[2], parts)
        attention = functools.partial(ulysses, attention)
    key_BSKH, value_BSKH, heads = with_heads_of(query_BTNH, key_BSKH, value_BSKH)
    names = [QUERIES, *((*KEYS[:2], heads, None),) * 2] + ([] if segments_BT is None else [SEGMENTS])
    if parts == 1:
        names = [(dims[0], None, *dims[2:]) for dims in names]
    arrays = (query_BTNH, key_BSKH, value_BSKH) + (() if segments_BT is None else (segments_BT,))
    return local(attention, inputs=names, outputs=names[0])(*arrays)


def sequence_parts(B: int, T: int, N: int, *, divides: bool = True) -> int:
    """Into how many parts the rules split the T positions that N heads attend over, between layers and heads; with
    `divides` False, into how many if they divided."""
    return axes.ways(QUERIES, (B, T if divides else T * axes.most_ways("sequence"), N, 1))[1]


def with_heads_of(query_BTNH: jax.Array, *keys_BSKH: jax.Array) -> tuple[Any, ...]:
    """Arrays of key heads, and the name of these, such that they are split as the query heads are: heads that do not
    divide over the devices that share those are there several times."""
    N, K = query_BTNH.shape[2], keys_BSKH[0].shape[2]
    if axes.activation_axes("act_kv_heads", K) == axes.activation_axes("act_heads", N):
        return *keys_BSKH, "act_kv_heads"
    count = repeats(K, axes.ways(("act_heads",), (N,))[0])
    # gathered before they are repeated: of a repeat XLA sees no dim that it could split as the heads are
    lying = (axes.shard(x, "batch", "sequence", None, None, beside={"act_heads": N}) for x in keys_BSKH)
    return *(jnp.repeat(x, count, axis=2) for x in lying), "act_heads"


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
    platform: Platform,
    dtype: Any,
    head_dim: int,
    softcap: float | None = None,
    *,
    keys: int = 0,
    one_cpu: bool = True,
    segments: bool = False,
) -> Implementation:
    """How attention over all positions is computed on a platform. None but "tiles" holds all scores of a head at once,
    in any direction.

    "splash", JAX's kernel, on a TPU. On a GPU "cudnn" for what it takes (`artifex.models.attention.cudnn.takes`), else
    "blockwise", our own scan with a running maximum, which is also what simulated devices run, and what takes
    `segments` everywhere but on a TPU. On one CPU device "tiles", plain products, for fewer `keys` than
    `artifex.models.cpu.TILES_BELOW`.
    """
    if platform == "tpu":
        return "splash"
    if platform == "gpu":
        return "cudnn" if cudnn.takes(dtype, head_dim, softcap) and not segments else "blockwise"
    return "tiles" if one_cpu and keys < cpu.TILES_BELOW and not segments else "blockwise"


def _implementation(
    dtype: Any, head_dim: int, keys: int, softcap: float | None, segments: bool, *, ring: bool
) -> Implementation:
    """The one that the execution at hand asks for, or the device's."""
    how = current_execution()
    if ring:
        if how.attention not in ("auto", "blockwise"):
            raise ValueError(
                f"attention {how.attention!r} needs all positions, but the ring has a part of them and computes by "
                "blocks; set training.attention to 'auto', or device.context_attention to 'ulysses'"
            )
        return "ring"
    if how.attention == "auto":
        assert how.platform is not None, "an execution knows its platform"
        return implementation_for(
            how.platform, dtype, head_dim, softcap, keys=keys, one_cpu=how.on_one_cpu, segments=segments
        )
    if how.attention == "splash" and how.platform != "tpu":
        raise ValueError(f"attention 'splash' is for TPUs, the platform is {how.platform!r}; set attention to 'auto'")
    if segments and how.attention in ("tiles", "cudnn"):
        raise ValueError(f"attention {how.attention!r} takes no segments of documents; set attention to 'auto'")
    return how.attention
