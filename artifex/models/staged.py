"""A loss said in parts around a stack of blocks: data, what comes before the stack, a block, what comes after.

    rows, key = model.prepare(batch, rngs, index)         # data and noise, through which no gradient goes
    start = model.before(rows, key)                       # the stream into the stack, and what stands beside it
    stream, report = through(model, start)                # the blocks, one after the other
    loss, metrics = model.after(stream, report, start.beside, rows)

`loss` is their composition; a pipeline runs the same parts, each stage some of the blocks and one microbatch at a time.
So nothing a block reads is closed over: it comes with its microbatch, in the stream or beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from artifex.models.stack import run_stack


class Stack(NamedTuple):
    """The repeated blocks of a model: where they are in its tree, how many, and `apply(block, stream, beside, own)`,
    the stream after one and what it reports, a tree of scalars. `own` is the block's slice of `Start.per_layer`."""

    path: tuple[str, ...]
    count: int
    apply: Callable[[Any, Any, Any, Any], tuple[Any, Any]]

    def under(self, name: str) -> Stack:
        """That of a model which has this one's as its part `name`."""
        return self._replace(path=(name, *self.path))


class Start(NamedTuple):
    """What enters a stack: the stream, (B, T, D) or a tree of such; what every block reads beside it, a tree of arrays;
    and a tree of arrays with a leading dim of layers, such as keys."""

    stream: Any
    beside: Any = None
    per_layer: Any = None


class Staged(Protocol):
    """A model whose loss is said in parts.

    `prepare` draws all noise but dropout's: it gives a tree of arrays whose leading dim is rows, and the key of the
    dropout, or None. `after` is a mean of rows by `metrics["weight"]`, as a loss is, so that parts of the rows add up;
    `beside` depends on each row alone, and on no key.
    """

    @property
    def stack(self) -> Stack: ...

    def prepare(
        self, batch: dict[str, jax.Array], rngs: nnx.Rngs | None, index: int | jax.Array, /
    ) -> tuple[dict[str, Any], jax.Array | None]: ...

    def before(self, rows: dict[str, Any], key: jax.Array | None, /) -> Start: ...

    def after(
        self, stream: Any, report: Any, beside: Any, rows: dict[str, Any], /
    ) -> tuple[jax.Array, dict[str, jax.Array]]: ...


def through(model: Any, start: Start) -> tuple[Any, Any]:
    """The stream after all blocks of `model.stack`, and the means over them of what they report."""
    path, count, apply = model.stack
    blocks = functools.reduce(getattr, path, model)
    stream, reports = run_stack(blocks, start.stream, count, apply, start.per_layer, beside=start.beside)
    return stream, jax.tree.map(jnp.mean, reports)


def staged_loss(
    model: Staged, batch: dict[str, jax.Array], rngs: nnx.Rngs | None, index: int | jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The composition of a model's parts: its loss and metrics."""
    rows, key = model.prepare(batch, rngs, index)
    start = model.before(rows, key)
    stream, report = through(model, start)
    return model.after(stream, report, start.beside, rows)
