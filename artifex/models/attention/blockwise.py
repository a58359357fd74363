"""Attention block by block with a running maximum: neither direction holds more scores than one block's.

Dims: B batch, T queries, S keys, N query heads, K key heads, G = N / K, H head_dim; R the queries of a block and, of
each, the G heads that share a key head. Milakov and Gimelshein 2018 (arXiv:1805.02867), Dao 2023 (arXiv:2307.08691).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# A block's scores are then 1 MiB a head. At 8,192 causal tokens 136 pairs of blocks follow each other, and a sixteenth
# of their scores is hidden; blocks of 256 make 528 pairs, of 1,024 four times the scores and an eighth of them hidden.
BLOCK = 512
STEP = 8  # blocks are multiples of it, as the products of a GPU want their dims
HIDDEN = -1e30  # finite: a row of hidden scores alone, which padding makes, has weights and a gradient of 0, no NaN
SAVED = "attention"  # what a remat policy calls the output and the logsumexp, which are all the backward pass needs


def blockwise(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float | None,
    block: int = BLOCK,
) -> jax.Array:
    """softmax(scale Q K^T) V, (B, T, N, H) in the dtype of `query_BTNH`, by blocks of about `block`.

    Only pairs of blocks in which some query sees some key are computed, in both directions. Products take the arrays as
    they are, 16-bit weights rounded once for them; sums, maxima and accumulators are float32. The backward pass
    computes scores again from the logsumexp of each query, which is saved beside the output, both named `SAVED`.
    """
    _, T, _, H = query_BTNH.shape
    S = key_BSKH.shape[1]
    rows, columns = even(T, block, STEP), even(S, block, STEP)
    form = _Form(causal, window, softcap, H**-0.5 if scale is None else scale, S, rows, columns)
    whole = (padded(query_BTNH, rows), padded(key_BSKH, columns), padded(value_BSKH, columns))
    out_BTNH: Any = _attention(form, *whole)
    return out_BTNH[:, :T]


@dataclasses.dataclass(frozen=True)
class _Form:
    """What is known before there are numbers: which keys a query sees, and the blocks, `rows` by `columns`."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    keys: int  # without padding
    rows: int
    columns: int

    def pairs(self, T: int, S: int) -> jax.Array:
        """(pairs, 3): query block, key block, whether it is the first of its query block; those with a key seen."""
        pairs = []
        for i in range(T // self.rows):
            first, last = 0, S // self.columns - 1
            if self.causal:
                last = min(((i + 1) * self.rows - 1) // self.columns, last)
            if self.window is not None:
                first = max(i * self.rows - self.window + 1, 0) // self.columns
            pairs += [(i, j, j == first) for j in range(first, last + 1)]
        return jnp.array(pairs, jnp.int32)

    def seen(self, i: jax.Array, j: jax.Array, G: int, S: int) -> jax.Array | None:
        """(R, columns): whether a query of block `i` sees a key of block `j`; None where all see all."""
        if not self.causal and self.keys == S:
            return None
        shape = (self.rows * G, self.columns)
        query_RS = i * self.rows + jax.lax.broadcasted_iota(jnp.int32, shape, 0) // G
        key_RS = j * self.columns + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        if not self.causal:
            return key_RS < self.keys
        seen_RS = key_RS <= query_RS  # what pads the keys comes after every query
        return seen_RS if self.window is None else seen_RS & (key_RS > query_RS - self.window)

    def scores(self, query_BKRH: jax.Array, key_BKSH: jax.Array) -> jax.Array:
        """Scaled and bounded, float32; nothing is hidden yet."""
        scores_BKRS = self.scale * _product("BKRH,BKSH->BKRS", query_BKRH, key_BKSH)
        return scores_BKRS if self.softcap is None else self.softcap * jnp.tanh(scores_BKRS / self.softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(form: _Form, query_BTNH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array) -> jax.Array:
    return _forward(form, query_BTNH, key_BSKH, value_BSKH)[0]


def _forward(form: _Form, query_BTNH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array) -> tuple[jax.Array, Any]:
    """The output, and what the backward pass needs: the arguments, the output and log sum exp of each row's scores.

    m' = max(m, max s), l' = l exp(m - m') + sum exp(s - m'), o' = o exp(m - m') + exp(s - m') V; the output is o / l.
    """
    (B, T, N, H), (S, K) = query_BTNH.shape, key_BSKH.shape[1:3]
    G = N // K
    R = form.rows * G

    def pair(carry: Any, indices: jax.Array) -> tuple[Any, None]:
        out_BTNH, logsumexp_BKR, top_BKR, sum_BKR, mixed_BKRH = carry
        i, j, first = indices
        query_BKRH = _part(query_BTNH, i, form.rows, K)
        key_BKSH, value_BKSH = _part(key_BSKH, j, form.columns, K), _part(value_BSKH, j, form.columns, K)
        scores_BKRS = form.scores(query_BKRH, key_BKSH)
        if (seen_RS := form.seen(i, j, G, S)) is not None:
            scores_BKRS = jnp.where(seen_RS[None, None], scores_BKRS, HIDDEN)
        before_BKR = jnp.where(first, -jnp.inf, top_BKR)  # forgets the query block before
        top_BKR = jnp.maximum(before_BKR, jnp.max(scores_BKRS, axis=-1))
        weights_BKRS = jnp.exp(scores_BKRS - top_BKR[..., None])
        kept_BKR = jnp.exp(before_BKR - top_BKR)
        sum_BKR = sum_BKR * kept_BKR + jnp.sum(weights_BKRS, axis=-1)
        added_BKRH = _product("BKRS,BKSH->BKRH", weights_BKRS.astype(value_BKSH.dtype), value_BKSH)
        mixed_BKRH = mixed_BKRH * kept_BKR[..., None] + added_BKRH
        # written at every pair, its last stands: one block is float32, the whole output never is
        out_BTNH = _put(out_BTNH, mixed_BKRH / sum_BKR[..., None], i)
        logsumexp_BKR = jax.lax.dynamic_update_slice_in_dim(logsumexp_BKR, top_BKR + jnp.log(sum_BKR), i * R, axis=2)
        return (out_BTNH, logsumexp_BKR, top_BKR, sum_BKR, mixed_BKRH), None

    zeros = functools.partial(jnp.zeros_like, query_BTNH, dtype=jnp.float32)  # like it, also in a shard_map
    start = (
        jnp.zeros_like(query_BTNH),
        zeros(shape=(B, K, T * G)),
        zeros(shape=(B, K, R)),
        zeros(shape=(B, K, R)),
        zeros(shape=(B, K, R, H)),
    )
    (out_BTNH, logsumexp_BKR, *_), _ = jax.lax.scan(pair, start, form.pairs(T, S))
    out_BTNH, logsumexp_BKR = checkpoint_name(out_BTNH, SAVED), checkpoint_name(logsumexp_BKR, SAVED)
    return out_BTNH, (query_BTNH, key_BSKH, value_BSKH, out_BTNH, logsumexp_BKR)


def _backward(form: _Form, kept: Any, dout_BTNH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dV = P^T dO, dS = P (dO V^T - sum dO O) times the slope of the soft cap, dQ = dS K and dK = dS^T Q, scaled."""
    query_BTNH, key_BSKH, value_BSKH, out_BTNH, logsumexp_BKR = kept
    (B, T, N, H), (S, K) = query_BTNH.shape, key_BSKH.shape[1:3]
    G = N // K
    R = form.rows * G
    shared_BTN = jnp.sum(dout_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1)
    shared_BKR = shared_BTN.reshape(B, T, K, G).swapaxes(1, 2).reshape(B, K, T * G)

    def pair(carry: Any, indices: jax.Array) -> tuple[Any, None]:
        dquery_BTNH, dkey_BSKH, dvalue_BSKH, dquery_BKRH = carry
        i, j, first = indices
        query_BKRH, dout_BKRH = _part(query_BTNH, i, form.rows, K), _part(dout_BTNH, i, form.rows, K)
        key_BKSH, value_BKSH = _part(key_BSKH, j, form.columns, K), _part(value_BSKH, j, form.columns, K)
        scores_BKRS = form.scores(query_BKRH, key_BKSH)
        weights_BKRS = jnp.exp(scores_BKRS - jax.lax.dynamic_slice_in_dim(logsumexp_BKR, i * R, R, 2)[..., None])
        if (seen_RS := form.seen(i, j, G, S)) is not None:
            weights_BKRS = jnp.where(seen_RS[None, None], weights_BKRS, 0.0)
        dweights_BKRS = _product("BKRH,BKSH->BKRS", dout_BKRH, value_BKSH)
        shared_BKR1 = jax.lax.dynamic_slice_in_dim(shared_BKR, i * R, R, 2)[..., None]
        dscores_BKRS = weights_BKRS * (dweights_BKRS - shared_BKR1)
        if form.softcap is not None:
            dscores_BKRS = dscores_BKRS * (1.0 - jnp.square(scores_BKRS / form.softcap))
        weights_BKRS, dscores_BKRS = weights_BKRS.astype(dout_BKRH.dtype), dscores_BKRS.astype(key_BKSH.dtype)
        dquery_BKRH = jnp.where(first, 0.0, dquery_BKRH) + _product("BKRS,BKSH->BKRH", dscores_BKRS, key_BKSH)
        dquery_BTNH = _put(dquery_BTNH, form.scale * dquery_BKRH, i)
        dkey_BSKH = _add(dkey_BSKH, form.scale * _product("BKRS,BKRH->BKSH", dscores_BKRS, query_BKRH), j)
        dvalue_BSKH = _add(dvalue_BSKH, _product("BKRS,BKRH->BKSH", weights_BKRS, dout_BKRH), j)
        return (dquery_BTNH, dkey_BSKH, dvalue_BSKH, dquery_BKRH), None

    zeros = functools.partial(jnp.zeros_like, dtype=jnp.float32)
    start = (
        jnp.zeros_like(query_BTNH),
        zeros(key_BSKH),
        zeros(value_BSKH),
        zeros(query_BTNH, shape=(B, K, R, H)),
    )
    (dquery_BTNH, dkey_BSKH, dvalue_BSKH, _), _ = jax.lax.scan(pair, start, form.pairs(T, S))
    return dquery_BTNH, dkey_BSKH.astype(key_BSKH.dtype), dvalue_BSKH.astype(value_BSKH.dtype)


_attention.defvjp(_forward, _backward)


def even(length: int, block: int, step: int) -> int:
    """The size, a multiple of `step`, of the fewest blocks of at most `block` that cut `length`, padded the least."""
    count = -(-length // block)
    return -(-length // (step * count)) * step


def padded(x_BTNH: jax.Array, block: int) -> jax.Array:
    """With zeros behind, so that blocks cut it."""
    return jnp.pad(x_BTNH, ((0, 0), (0, -x_BTNH.shape[1] % block), (0, 0), (0, 0)))


def _product(letters: str, *arrays: jax.Array) -> jax.Array:
    return jnp.einsum(letters, *arrays, preferred_element_type=jnp.float32)


def _part(x_BTNH: jax.Array, index: jax.Array, size: int, K: int) -> jax.Array:
    """Block `index` of `size` queries, or keys, as (B, K, R, H)."""
    B, _, _, H = x_BTNH.shape
    part_BTKGH = jax.lax.dynamic_slice_in_dim(x_BTNH, index * size, size, 1).reshape(B, size, K, -1, H)
    return part_BTKGH.swapaxes(1, 2).reshape(B, K, -1, H)


def _whole(x_BKRH: jax.Array, N: int) -> jax.Array:
    """`_part` undone: (B, K, R, H) as (B, size, N, H)."""
    B, K, _, H = x_BKRH.shape
    return x_BKRH.reshape(B, K, -1, N // K, H).swapaxes(1, 2).reshape(B, -1, N, H)


def _put(x_BTNH: jax.Array, block_BKRH: jax.Array, index: jax.Array) -> jax.Array:
    """`x_BTNH` with this for its block `index`."""
    block_BTNH = _whole(block_BKRH, x_BTNH.shape[2]).astype(x_BTNH.dtype)
    return jax.lax.dynamic_update_slice_in_dim(x_BTNH, block_BTNH, index * block_BTNH.shape[1], axis=1)


def _add(x_BTNH: jax.Array, block_BKRH: jax.Array, index: jax.Array) -> jax.Array:
    """`x_BTNH` with this added to its block `index`."""
    _, K, R, _ = block_BKRH.shape
    return _put(x_BTNH, block_BKRH + _part(x_BTNH, index, R, K), index)
