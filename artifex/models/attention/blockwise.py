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
import numpy as np
from jax.ad_checkpoint import checkpoint_name

# A block's scores are then 1 MiB a head. At 8,192 causal tokens 136 pairs of blocks follow each other, and a sixteenth
# of their scores is hidden; blocks of 256 make 528 pairs, of 1,024 four times the scores and an eighth of them hidden.
BLOCK = 512
STEP = 8  # blocks are multiples of it, as the products of a GPU want their dims
HIDDEN = -1e30  # finite: a row of hidden scores alone, which padding makes, has weights and a gradient of 0, no NaN
SAVED = "attention"  # what a remat policy calls the output and the logsumexp, which are all the backward pass needs

Segments = tuple[jax.Array, jax.Array]  # of queries (B, T) and of keys (B, S): who sees whom


def blockwise(
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
) -> jax.Array:
    """softmax(scale Q K^T) V, (B, T, N, H) in the dtype of `query_BTNH`, by blocks of about `block`.

    Only pairs of blocks in which some query sees some key are computed, in both directions. Products take the arrays as
    they are, 16-bit weights rounded once for them; sums, maxima and accumulators are float32. The backward pass
    computes scores again from the logsumexp of each query, which is saved beside the output, both named `SAVED`.
    With `segments_BT`, integers, a query sees the keys of its own segment alone.
    """
    _, T, _, H = query_BTNH.shape
    S = key_BSKH.shape[1]
    form = Form.of(T, S, block, causal, window, softcap, H**-0.5 if scale is None else scale)
    whole = (padded(query_BTNH, form.rows), padded(key_BSKH, form.columns), padded(value_BSKH, form.columns))
    segments = None
    if segments_BT is not None:
        segments = (padded(segments_BT, form.rows), padded(segments_BT, form.columns))
    out_BTNH: Any = _attention(form, S, *whole, segments)
    return out_BTNH[:, :T]


@dataclasses.dataclass(frozen=True)
class Form:
    """What is known before there are numbers: which keys a query sees, and the blocks, `rows` by `columns`."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    rows: int
    columns: int
    hides: bool  # what pads the keys

    @classmethod
    def of(
        cls, T: int, S: int, block: int, causal: bool, window: int | None, softcap: float | None, scale: float
    ) -> Form:
        """For T queries and S keys, in blocks of at most about `block`."""
        rows, columns = even(T, block, STEP), even(S, block, STEP)
        return cls(causal, window, softcap, scale, rows, columns, S % columns > 0)

    @property
    def unmasked(self) -> Form:
        """The same where every query comes after every key, within its window."""
        return dataclasses.replace(self, causal=False, window=None)

    def pairs(self, T: int, S: int, keys: int, *, everything: bool = False) -> np.ndarray:
        """(pairs, 5): query block, key block, whether it is the first of its query block, by how many positions the
        first query is ahead of the first key, and how many keys of the block are no padding. Those pairs in which a key
        is seen, of T queries and S keys that start at one position, or `everything`; padding beyond `keys`."""
        pairs = []
        for i in range(T // self.rows):
            first, last = 0, S // self.columns - 1
            if self.causal and not everything:
                last = min(((i + 1) * self.rows - 1) // self.columns, last)
                if self.window is not None:
                    first = max(i * self.rows - self.window + 1, 0) // self.columns
            j = np.arange(first, last + 1)
            begin = j * self.columns
            pairs.append(
                [np.full_like(j, i), j, j == first, i * self.rows - begin, np.minimum(keys - begin, self.columns)]
            )
        return np.concatenate([np.stack(each, axis=1) for each in pairs]).astype(np.int32)

    def seen(self, ahead: jax.Array, keys: jax.Array, G: int, segments: Segments | None) -> jax.Array | None:
        """(1 or B, R, columns): whether a query of a block sees a key of a block; None where all see all."""
        shape = (1, self.rows * G, self.columns)
        query_1RS = ahead + jax.lax.broadcasted_iota(jnp.int32, shape, 1) // G
        key_1RS = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
        parts = []
        if self.causal:
            parts.append(key_1RS <= query_1RS)
        if self.window is not None:
            parts.append(key_1RS > query_1RS - self.window)
        if self.hides:
            parts.append(key_1RS < keys)
        if segments is not None:
            parts.append(jnp.repeat(segments[0], G, axis=1)[:, :, None] == segments[1][:, None])
        return functools.reduce(jnp.logical_and, parts) if parts else None

    def scores(self, query_BKRH: jax.Array, key_BKSH: jax.Array) -> jax.Array:
        """Scaled and bounded, float32; nothing is hidden yet."""
        scores_BKRS = self.scale * _product("BKRH,BKSH->BKRS", query_BKRH, key_BKSH)
        return scores_BKRS if self.softcap is None else self.softcap * jnp.tanh(scores_BKRS / self.softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(form: Form, keys: int, query: jax.Array, key: jax.Array, value: jax.Array, segments: Any) -> jax.Array:
    return _forward(form, keys, query, key, value, segments)[0]


def _forward(
    form: Form, keys: int, query: jax.Array, key: jax.Array, value: jax.Array, segments: Segments | None
) -> tuple[jax.Array, Any]:
    """The output, and what the backward pass needs: the arguments, the output and log sum exp of each row's scores."""
    pairs = form.pairs(query.shape[1], key.shape[1], keys)
    state = attend(form, pairs, nothing_seen(query, key, query.dtype), query, (key, value), segments)
    out, logsumexp = (checkpoint_name(x, SAVED) for x in state)
    return out, (query, key, value, segments, out, logsumexp)


def _backward(form: Form, keys: int, kept: Any, dout: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    query, key, value, segments, out, logsumexp = kept
    rows = (query, dout, logsumexp, shared(dout, out, key.shape[2]))
    zeros = functools.partial(jnp.zeros_like, dtype=jnp.float32)
    start = (jnp.zeros_like(query), zeros(key), zeros(value))
    pairs = form.pairs(query.shape[1], key.shape[1], keys)
    dquery, dkey, dvalue = attend_backward(form, pairs, start, rows, (key, value), segments, form.scale)
    return dquery, dkey.astype(key.dtype), dvalue.astype(value.dtype), None


_attention.defvjp(_forward, _backward)


def nothing_seen(query_BTNH: jax.Array, key_BSKH: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The output and logsumexp of queries that have seen no key yet."""
    B, T, N, _ = query_BTNH.shape  # like the queries, also in a shard_map
    rest = jnp.full_like(
        query_BTNH, -jnp.inf, dtype=jnp.float32, shape=(B, key_BSKH.shape[2], T * N // key_BSKH.shape[2])
    )
    return jnp.zeros_like(query_BTNH, dtype=dtype), rest


def attend(
    form: Form,
    pairs: jax.Array | np.ndarray,
    state: tuple[jax.Array, jax.Array],
    query_BTNH: jax.Array,
    keys: tuple[jax.Array, jax.Array],
    segments: Segments | None,
) -> tuple[jax.Array, jax.Array]:
    """The output (B, T, N, H) and logsumexp (B, K, T G) after `pairs` of blocks, where `state` is that before them.

    m' = max(m, max s), l' = l exp(m - m') + sum exp(s - m'), o' = o exp(m - m') + exp(s - m') V; the output is o / l.
    What is a finished row, with o / l for o and 1 for l and the logsumexp for m, can thus see more keys later.
    """
    (B, _, N, H), K = query_BTNH.shape, keys[0].shape[2]
    G = N // K
    R = form.rows * G

    def pair(carry: Any, indices: jax.Array) -> tuple[Any, None]:
        out_BTNH, logsumexp_BKR, top_BKR, sum_BKR, mixed_BKRH = carry
        i, j, first, ahead, real = indices
        query_BKRH = _part(query_BTNH, i, form.rows, K)
        key_BKSH, value_BKSH = (_part(x, j, form.columns, K) for x in keys)
        scores_BKRS = form.scores(query_BKRH, key_BKSH)
        if (seen_BRS := form.seen(ahead, real, G, _of_block(segments, form, i, j))) is not None:
            scores_BKRS = jnp.where(seen_BRS[:, None], scores_BKRS, HIDDEN)
        # takes up the query block where it was left, and forgets the one before
        before_BKR = jnp.where(first, jax.lax.dynamic_slice_in_dim(logsumexp_BKR, i * R, R, 2), top_BKR)
        sum_BKR = jnp.where(first, 1.0, sum_BKR)
        mixed_BKRH = jnp.where(first, _part(out_BTNH, i, form.rows, K).astype(jnp.float32), mixed_BKRH)
        top_BKR = jnp.maximum(before_BKR, jnp.max(scores_BKRS, axis=-1))
        weights_BKRS = jnp.exp(scores_BKRS - top_BKR[..., None])
        kept_BKR = jnp.exp(before_BKR - top_BKR)
        sum_BKR = sum_BKR * kept_BKR + jnp.sum(weights_BKRS, axis=-1)
        added_BKRH = _product("BKRS,BKSH->BKRH", weights_BKRS.astype(value_BKSH.dtype), value_BKSH)
        mixed_BKRH = mixed_BKRH * kept_BKR[..., None] + added_BKRH
        # written at every pair, its last stands: one block is float32, whatever the whole output is
        out_BTNH = _put(out_BTNH, mixed_BKRH / sum_BKR[..., None], i)
        logsumexp_BKR = jax.lax.dynamic_update_slice_in_dim(logsumexp_BKR, top_BKR + jnp.log(sum_BKR), i * R, axis=2)
        return (out_BTNH, logsumexp_BKR, top_BKR, sum_BKR, mixed_BKRH), None

    zeros = functools.partial(jnp.zeros_like, query_BTNH, dtype=jnp.float32)  # like it, also in a shard_map
    start = (*state, zeros(shape=(B, K, R)), zeros(shape=(B, K, R)), zeros(shape=(B, K, R, H)))
    (out_BTNH, logsumexp_BKR, *_), _ = jax.lax.scan(pair, start, jnp.asarray(pairs))
    return out_BTNH, logsumexp_BKR


def shared(dout_BTNH: jax.Array, out_BTNH: jax.Array, K: int) -> jax.Array:
    """sum dO O of each row, (B, K, T G): what the gradients of all its scores have in common."""
    B, T, N, _ = out_BTNH.shape
    shared_BTN = jnp.sum(dout_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1)
    return shared_BTN.reshape(B, T, K, N // K).swapaxes(1, 2).reshape(B, K, -1)


def attend_backward(
    form: Form,
    pairs: jax.Array | np.ndarray,
    gradients: tuple[jax.Array, jax.Array, jax.Array],
    rows: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    keys: tuple[jax.Array, jax.Array],
    segments: Segments | None,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`gradients` of queries, keys and values with those of `pairs` of blocks added, dQ times `scale`.

    `rows`: queries, the gradient of their output, their logsumexp over all keys there are, and what is `shared`.
    dV = P^T dO, dS = P (dO V^T - sum dO O) times the slope of the soft cap, dQ = dS K and dK = dS^T Q, scaled.
    """
    query_BTNH, dout_BTNH, logsumexp_BKR, shared_BKR = rows
    (B, _, N, H), K = query_BTNH.shape, keys[0].shape[2]
    G = N // K
    R = form.rows * G

    def pair(carry: Any, indices: jax.Array) -> tuple[Any, None]:
        dquery_BTNH, dkey_BSKH, dvalue_BSKH, dquery_BKRH = carry
        i, j, first, ahead, real = indices
        query_BKRH, dout_BKRH = _part(query_BTNH, i, form.rows, K), _part(dout_BTNH, i, form.rows, K)
        key_BKSH, value_BKSH = (_part(x, j, form.columns, K) for x in keys)
        scores_BKRS = form.scores(query_BKRH, key_BKSH)
        weights_BKRS = jnp.exp(scores_BKRS - jax.lax.dynamic_slice_in_dim(logsumexp_BKR, i * R, R, 2)[..., None])
        if (seen_BRS := form.seen(ahead, real, G, _of_block(segments, form, i, j))) is not None:
            weights_BKRS = jnp.where(seen_BRS[:, None], weights_BKRS, 0.0)
        dweights_BKRS = _product("BKRH,BKSH->BKRS", dout_BKRH, value_BKSH)
        shared_BKR1 = jax.lax.dynamic_slice_in_dim(shared_BKR, i * R, R, 2)[..., None]
        dscores_BKRS = weights_BKRS * (dweights_BKRS - shared_BKR1)
        if form.softcap is not None:
            dscores_BKRS = dscores_BKRS * (1.0 - jnp.square(scores_BKRS / form.softcap))
        weights_BKRS, dscores_BKRS = weights_BKRS.astype(dout_BKRH.dtype), dscores_BKRS.astype(key_BKSH.dtype)
        before_BKRH = jnp.where(first, _part(dquery_BTNH, i, form.rows, K).astype(jnp.float32), dquery_BKRH)
        dquery_BKRH = before_BKRH + _product("BKRS,BKSH->BKRH", dscores_BKRS, key_BKSH)
        dquery_BTNH = _put(dquery_BTNH, scale * dquery_BKRH, i)
        dkey_BSKH = _add(dkey_BSKH, form.scale * _product("BKRS,BKRH->BKSH", dscores_BKRS, query_BKRH), j)
        dvalue_BSKH = _add(dvalue_BSKH, _product("BKRS,BKRH->BKSH", weights_BKRS, dout_BKRH), j)
        return (dquery_BTNH, dkey_BSKH, dvalue_BSKH, dquery_BKRH), None

    start = (*gradients, jnp.zeros_like(query_BTNH, dtype=jnp.float32, shape=(B, K, R, H)))
    (dquery_BTNH, dkey_BSKH, dvalue_BSKH, _), _ = jax.lax.scan(pair, start, jnp.asarray(pairs))
    return dquery_BTNH, dkey_BSKH, dvalue_BSKH


def _of_block(segments: Segments | None, form: Form, i: jax.Array, j: jax.Array) -> Segments | None:
    """The segments of a block of queries and of a block of keys."""
    if segments is None:
        return None
    sizes = ((i, form.rows), (j, form.columns))
    query_BT, key_BS = (
        jax.lax.dynamic_slice_in_dim(x, index * size, size, 1) for x, (index, size) in zip(segments, sizes, strict=True)
    )
    return query_BT, key_BS


def even(length: int, block: int, step: int) -> int:
    """The size, a multiple of `step`, of the fewest blocks of at most `block` that cut `length`, padded the least."""
    count = -(-length // block)
    return -(-length // (step * count)) * step


def padded(x: jax.Array, block: int) -> jax.Array:
    """(B, T, ...) with zeros behind, so that blocks cut it."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), *((0, 0),) * (x.ndim - 2)))


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
