"""Attention over a split sequence by exchanging positions for heads: DeepSpeed-Ulysses (arXiv:2309.14509).

An all-to-all gives each of n parts every position of N / n heads, any attention of one device computes them, and an
all-to-all brings the output back.

Dims: B batch, T queries of the part, S keys of the part, N query heads, K key heads, H head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from artifex.scaling import local


def ulysses(
    attention: Callable[..., jax.Array],
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """`attention` of the whole sequence, (B, T, N, H): this part's positions, on one part of `sequence`.

    The query heads must divide by the parts. Key heads that do not are each sent as often as makes them.
    """
    query, *keys = exchanged(query_BTNH, key_BSKH, value_BSKH)
    segments = () if segments_BT is None else (local.gathered(segments_BT, "sequence", dim=1),)
    mixed_BTNH = attention(query, *keys, *segments)
    return local.exchange(mixed_BTNH, "sequence", split=1, join=2)


def exchanged(*arrays_BTNH: jax.Array) -> list[jax.Array]:
    """All positions of this part's share of the heads."""
    parts = local.parts("sequence")
    repeated = (jnp.repeat(x, repeats(x.shape[2], parts), axis=2) for x in arrays_BTNH)
    return [local.exchange(x, "sequence", split=2, join=1) for x in repeated]


def repeats(heads: int, ways: int) -> int:
    """How often each key head must be there, so that as many fall on each of `ways` devices."""
    return ways // math.gcd(heads, ways)


def check_heads(heads: int, parts: int) -> None:
    """Raise `ValueError` unless the query heads of a device can be exchanged over so many parts."""
    if heads % parts:
        fits = math.gcd(heads, parts)
        raise ValueError(
            f"context_attention 'ulysses' exchanges {heads} query heads over {parts} parts of the sequence, which do "
            f"not divide; split it over {fits}, or set device.context_attention to 'ring', which takes any"
        )
