"""Attention over a split sequence: keys and values go round the parts, and each adds what its queries see of them.

Liu et al. 2023 (arXiv:2310.01889). No part ever holds more keys than its own and two that visit, nor more scores than
one block's. Going round again backwards, the gradients of keys and values travel with them and end at home.

With the sequence in the order of `zigzag` a part's queries and keys are two chunks, an early and a late one, and every
visit costs it two pairs of chunks: the late queries see the early keys, and of equal halves one sees the other's whole,
the early ones where the visitor is from before, else the late ones.

Dims: B batch, T queries of the part, S keys of the part, N query heads, K key heads, G = N / K, H head_dim; n parts,
c positions of a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from artifex.models.attention.blockwise import (
    BLOCK,
    SAVED,
    Form,
    attend,
    attend_backward,
    blockwise,
    nothing_seen,
    padded,
    shared,
)
from artifex.scaling import local

Order = Literal["given", "zigzag"]
Pair = Literal["own", "all", "late sees early", "equal halves"]


def ring(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    segments_BT: jax.Array | None = None,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float | None,
    order: Order = "given",
    block: int = BLOCK,
) -> jax.Array:
    """softmax(scale Q K^T) V, (B, T, N, H) in the dtype of `query_BTNH`, of this part of `sequence`.

    `order` is that of the positions of all parts; "zigzag" is for causal attention and needs an even T. Maxima, sums,
    accumulators and the gradients that travel are float32. The output and the logsumexp of each query are saved for
    the backward pass, named `SAVED`.
    """
    H, n = query_BTNH.shape[-1], local.parts("sequence")
    bounds: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap}
    if n == 1:
        arrays = (query_BTNH, key_BSKH, value_BSKH, segments_BT)
        return blockwise(*arrays, **bounds, scale=scale, block=block)
    halves = 2 if order == "zigzag" else 1
    chunks = query_BTNH.shape[1] // halves, key_BSKH.shape[1] // halves
    form = Form.of(*chunks, block, **bounds, scale=H**-0.5 if scale is None else scale)
    route = Route(form, n, halves, *chunks)
    attention = jax.custom_vjp(functools.partial(_output, route))
    # both may be traced when the part is left: within a scan, JAX differentiates what was traced
    forward, backward = (local.held(functools.partial(half, route)) for half in (_forward, _backward))
    attention.defvjp(forward, backward)
    return attention(query_BTNH, key_BSKH, value_BSKH, segments_BT)


@dataclasses.dataclass(frozen=True)
class Visit:
    """At step `step` the keys of the part so many before visit; `pairs` of chunks are computed, on every part alike."""

    step: int
    pairs: tuple[Pair, ...]


@dataclasses.dataclass(frozen=True)
class Leg:
    """A visit: its pairs, how many parts on the visitor came since the visit before, and goes after it."""

    pairs: tuple[Pair, ...]
    before: int
    after: int


@dataclasses.dataclass(frozen=True)
class Route:
    """Who visits when, and what is computed then: known before there are numbers, and the same on every part."""

    form: Form
    parts: int
    halves: int
    queries: int  # of a chunk
    keys: int

    @functools.cached_property
    def visits(self) -> list[Visit]:
        """The steps at which some part sees some visiting key; a window leaves out those between."""
        n, form = self.parts, self.form
        if not form.causal:
            return [Visit(step, ("all",)) for step in range(n)]
        # a window reaches into so many chunks before its own
        reach = 2 * n if form.window is None else (form.window - 2) // self.queries + 1
        found = [Visit(0, ("own",) + ("late sees early",) * (self.halves == 2 and reach >= 1))]
        for step in range(1, n):
            each: dict[Pair, int] = {"all": step}
            if self.halves == 2:  # from `step` parts before, or round the ring from n - step after
                each = {"late sees early": min(1 + step, n + 1 - step), "equal halves": min(step, n - step)}
            pairs: tuple[Pair, ...] = tuple(pair for pair, least in each.items() if least <= reach)
            found += [Visit(step, pairs)] if pairs else []
        return found

    def legs(self) -> Iterator[tuple[Leg, list[int]]]:
        """The steps of visits, those that follow each other and are alike together."""
        steps = [visit.step for visit in self.visits]
        gaps = [0, *(after - before for before, after in itertools.pairwise(steps)), 0]
        legs = [Leg(visit.pairs, *gaps[at : at + 2]) for at, visit in enumerate(self.visits)]
        for leg, run in itertools.groupby(zip(legs, steps, strict=True), key=lambda entry: entry[0]):
            yield leg, [step for _, step in run]

    def cut(self, x: jax.Array, size: int) -> jax.Array:
        """(B, T, ...) with each chunk padded to whole blocks of `size`."""
        chunks = [padded(chunk, size) for chunk in jnp.split(x, self.halves, axis=1)]
        return chunks[0] if len(chunks) == 1 else jnp.concatenate(chunks, axis=1)

    def joined(self, x: jax.Array, size: int) -> jax.Array:
        """`cut` undone; `size` is a chunk's without padding."""
        chunks = [chunk[:, :size] for chunk in jnp.split(x, self.halves, axis=1)]
        return chunks[0] if len(chunks) == 1 else jnp.concatenate(chunks, axis=1)

    def work(self, pairs: tuple[Pair, ...], step: Any) -> Iterator[tuple[Form, Any]]:
        """A form and a table of pairs of blocks for each kind of mask that a visit needs."""
        assert local.parts("sequence") == self.parts, "a route is for the parts that it was made on"
        form, here = self.form, local.index("sequence")
        there = (here - step) % self.parts
        rows, columns = (-(-count // size) for count, size in ((self.queries, form.rows), (self.keys, form.columns)))
        sizes = (rows * form.rows, columns * form.columns, self.keys)
        whole = form.pairs(*sizes, everything=True)

        def placed(table: Any, query: Any, key: Any, ahead: Any) -> jax.Array:
            """A table for chunk `query` of the queries and chunk `key` of the keys, so many chunks before."""
            columns_of = (query * rows, key * columns, 0, ahead * self.queries, 0)
            return table + jnp.stack([jnp.asarray(value, jnp.int32) for value in columns_of])[None]

        tables = []
        for pair in pairs:
            if pair == "own":  # each chunk sees itself
                own = form.pairs(*sizes)
                yield form, jnp.concatenate([placed(own, half, half, 0) for half in range(self.halves)])
            elif pair == "all":
                tables.append(placed(whole, 0, 0, here - there))
            elif pair == "late sees early":
                tables.append(placed(whole, 1, 0, 2 * self.parts - 1 - here - there))
            else:
                half = jnp.int32(there > here)
                tables.append(placed(whole, half, half, jnp.abs(here - there)))
        if tables:
            # in zigzag order every key is before every query: only a window hides some
            masked = form.causal and (self.halves == 1 or form.window is not None)
            yield form if masked else form.unmasked, jnp.concatenate(tables)


def _output(route: Route, *arrays: Any) -> jax.Array:
    return _forward(route, *arrays)[0]


def _forward(
    route: Route, query_BTNH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array, segments_BT: jax.Array | None
) -> tuple[jax.Array, Any]:
    query, keys, of_queries, of_keys = _cut(route, query_BTNH, key_BSKH, value_BSKH, segments_BT)

    def add(state: Any, visitor: Any, pairs: tuple[Pair, ...], step: Any) -> tuple[Any, tuple]:
        keys, of_keys = visitor
        segments = None if of_queries is None else (of_queries, of_keys)
        for form, table in route.work(pairs, step):
            state = attend(form, table, state, query, keys, segments)
        return state, ()

    (out, logsumexp), _ = _round(route, add, nothing_seen(query, keys[0], jnp.float32), (keys, of_keys), ())
    out_BTNH = checkpoint_name(route.joined(out, route.queries).astype(query_BTNH.dtype), SAVED)
    logsumexp = checkpoint_name(logsumexp, SAVED)
    return out_BTNH, (query_BTNH, key_BSKH, value_BSKH, segments_BT, out_BTNH, logsumexp)


def _backward(route: Route, kept: Any, dout_BTNH: jax.Array) -> tuple[Any, Any, Any, None]:
    *arrays, out_BTNH, logsumexp = kept
    query, keys, of_queries, of_keys = _cut(route, *arrays)
    dout, out = route.cut(dout_BTNH, route.form.rows), route.cut(out_BTNH, route.form.rows)
    rows = (query, dout, logsumexp, shared(dout, out, keys[0].shape[2]))
    zeros = functools.partial(jnp.zeros_like, dtype=jnp.float32)

    def add(dquery: Any, visitor: Any, pairs: tuple[Pair, ...], step: Any) -> tuple[Any, tuple]:
        keys, of_keys = visitor
        segments = None if of_queries is None else (of_queries, of_keys)
        gradients = (dquery, zeros(keys[0]), zeros(keys[1]))
        for form, table in route.work(pairs, step):
            gradients = attend_backward(form, table, gradients, rows, keys, segments, 1.0)
        return gradients[0], gradients[1:]

    dquery, dkeys = _round(route, add, zeros(query), (keys, of_keys), tuple(zeros(x) for x in keys))
    dquery_BTNH = route.joined(route.form.scale * dquery, route.queries)
    dkey_BSKH, dvalue_BSKH = (route.joined(x, route.keys) for x in dkeys)
    query, key, value, _ = arrays
    return dquery_BTNH.astype(query.dtype), dkey_BSKH.astype(key.dtype), dvalue_BSKH.astype(value.dtype), None


def _cut(route: Route, query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None) -> tuple:
    """Queries, keys with values, and the segments of both, in chunks of whole blocks."""
    rows, columns = route.form.rows, route.form.columns
    keys = (route.cut(key, columns), route.cut(value, columns))
    both = (None, None) if segments is None else (route.cut(segments, rows), route.cut(segments, columns))
    return route.cut(query, rows), keys, *both


def _round(route: Route, add: Callable, state: Any, visitor: Any, gathered: Any) -> tuple[Any, Any]:
    """`state, more = add(state, visitor, pairs, step)` at every visit, and the sums of `more` over all whom this part's
    own keys visited.

    The next visitor comes while one is computed with, and what was `gathered` for it on the way one visit behind it.
    """

    def go(carry: Any, step: Any, leg: Leg) -> tuple[Any, None]:
        state, visitor, gathered = carry
        gathered = local.neighbours(gathered, "sequence", leg.before) if leg.before else gathered
        coming = local.neighbours(visitor, "sequence", leg.after) if leg.after else visitor
        state, more = add(state, visitor, leg.pairs, step)
        return (state, coming, jax.tree.map(jnp.add, gathered, more)), None

    carry = (state, visitor, gathered)
    for leg, steps in route.legs():
        if len(steps) == 1:
            carry, _ = go(carry, steps[0], leg)
        else:  # scanned, so that a program does not grow with the parts
            carry, _ = jax.lax.scan(functools.partial(go, leg=leg), carry, jnp.array(steps, jnp.int32))
    state, _, gathered = carry
    away = route.visits[-1].step
    return state, local.neighbours(gathered, "sequence", route.parts - away) if away else gathered
