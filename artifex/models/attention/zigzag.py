"""The order in which a causal sequence is shared out so that every part has the same work: zigzag.

Of n parts, part i holds chunks i and 2n - 1 - i of the 2n that the sequence is cut into. Whichever other part's keys
visit it, two of its four pairs of chunks are seen whole and two not at all; in the order as it is, part 0 would wait
while the last one sees everything (Brandon et al. 2023, arXiv:2311.09431, with chunks as in Llama 3's training,
arXiv:2407.21783, section 3.3.2).

Dims: B batch, T sequence, n parts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def to_zigzag(x: Any, parts: int, dim: int = 1) -> Any:
    """`x` with its positions along `dim` in the order of `parts` parts; as it is for one. NumPy stays NumPy."""
    if parts == 1:
        return x
    xp = np if isinstance(x, np.ndarray) else jnp
    chunks = x.reshape(*x.shape[:dim], 2 * parts, -1, *x.shape[dim + 1 :])
    first, second = xp.split(chunks, 2, axis=dim)
    return xp.stack([first, xp.flip(second, dim)], axis=dim + 1).reshape(x.shape)


def from_zigzag(x: jax.Array, parts: int, dim: int = 1) -> jax.Array:
    """`to_zigzag` undone."""
    if parts == 1:
        return x
    pairs = x.reshape(*x.shape[:dim], parts, 2, -1, *x.shape[dim + 1 :])
    first, second = (jax.lax.index_in_dim(pairs, half, dim + 1, keepdims=False) for half in (0, 1))
    return jnp.concatenate([first, jnp.flip(second, dim)], axis=dim).reshape(x.shape)
