"""Rows that are drawn together: filled up so that every device has as many, and in chunks that fit its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from artifex.scaling import axes


def fill_up(rows: Any) -> Any:
    """A tree of arrays (B, ...) with rows added up to a multiple of the devices that split `batch`: the first again.

    Without it, rows that do not divide would be whole on every device, each of which would do all of the work.
    """
    ways = axes.most_ways("batch")

    def fill(x: jax.Array) -> jax.Array:
        missing = -x.shape[0] % ways
        if not missing:
            return x
        x = jnp.concatenate([x, jnp.broadcast_to(x[:1], (missing, *x.shape[1:]))])
        return axes.shard(x, "batch", *(None,) * (x.ndim - 1))

    return jax.tree.map(fill, rows)


def in_chunks(draw: Callable[[Any, jax.Array], jax.Array], rows: Any, key: jax.Array, at_once: int) -> jax.Array:
    """`draw(rows, key)`, arrays (B, ...) for a tree of them, one after the other for chunks of at most `at_once` rows.

    The first chunk has `key`, so that a few rows are drawn as if there were no chunks. What is drawn does not depend on
    the number of devices.
    """
    count = jax.tree.leaves(rows)[0].shape[0]
    chunks = -(-count // at_once)

    def one(chunk: Any, key: jax.Array) -> jax.Array:
        size = jax.tree.leaves(chunk)[0].shape[0]
        return draw(fill_up(chunk), key)[:size]

    if chunks == 1:
        return one(rows, key)

    def cut(x: jax.Array) -> jax.Array:
        missing = chunks * at_once - count
        x = jnp.concatenate([x, jnp.broadcast_to(x[:1], (missing, *x.shape[1:]))])
        return x.reshape(chunks, at_once, *x.shape[1:])

    keys = jnp.stack([key, *(jax.random.fold_in(key, chunk) for chunk in range(1, chunks))])
    drawn = jax.lax.map(lambda chunk: one(*chunk), (jax.tree.map(cut, rows), keys))
    return drawn.reshape(-1, *drawn.shape[2:])[:count]
