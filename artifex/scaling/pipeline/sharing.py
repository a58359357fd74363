"""What comes after a pipeline's stack, divided among its devices by rows, whenever the last of them has ended some."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from artifex.scaling import axes
from artifex.scaling.local import local

Tree = Any


@dataclasses.dataclass(frozen=True)
class Shared:
    """How the devices of a pipeline share what comes after its stack: `ways` parts of the rows of a microbatch, row r
    in part r % ways, so that rows that lie on one data-parallel device stay there. With 1 way all compute all, and one
    counts: in the time in which one alone would."""

    axis: str
    ways: int

    @classmethod
    def of(cls, axis: str, devices: int, rows: Tree) -> Shared:
        """For `rows` whose leaves lead with (microbatches, rows of one)."""
        count = jax.tree.leaves(rows)[0].shape[1]
        return cls(axis, devices if count % (devices * axes.most_ways("batch")) == 0 else 1)

    def rows(self, tree: Tree) -> Tree:
        """This device's part of rows."""
        if self.ways == 1:
            return tree
        index = jax.lax.axis_index(self.axis)
        return jax.tree.map(lambda x: _rows(jax.lax.dynamic_index_in_dim(self._cut(x), index, 1, keepdims=False)), tree)

    def of_last(self, state: Tree, index: jax.Array) -> Tree:
        """This device's part of the rows of the last device's stream, and the report of that."""
        stream, report = state
        last = index == jax.lax.axis_size(self.axis) - 1
        report = self.total(jax.tree.map(lambda x: jnp.where(last, x, 0), report))
        if self.ways == 1:
            return self.total(jax.tree.map(lambda x: jnp.where(last, x, 0), stream)), report
        # every device sends as much, and what the last one sent is taken: the bytes of a reduce-scatter, without a sum
        parts = lambda x: jax.lax.all_to_all(self._cut(x), self.axis, 1, 1, tiled=True)[:, -1]  # noqa: E731
        return jax.tree.map(_on_parts(parts), stream), report

    def counted(self, tree: Tree, index: jax.Array) -> Tree:
        """What counts of each device, so that the sum over devices is that of all rows."""
        return tree if self.ways > 1 else jax.tree.map(lambda x: jnp.where(index == 0, x, 0), tree)

    def back(self, state: Tree, index: jax.Array) -> Tree:
        """The gradient of all rows of the stream, and of the report."""
        stream, report = state
        report = self.total(self.counted(report, index))
        if self.ways == 1:
            return stream, report
        whole = lambda x: jax.lax.all_gather(x, self.axis, axis=1).reshape(-1, *x.shape[1:])  # noqa: E731
        return jax.tree.map(_on_parts(whole), stream), report

    def total(self, tree: Tree) -> Tree:
        """The sum over all devices, in float32: XLA for CPUs has none of 16 bits where others axes are automatic."""
        return jax.tree.map(lambda x: jax.lax.psum(x.astype(jnp.float32), self.axis).astype(x.dtype), tree)

    def _cut(self, x: jax.Array) -> jax.Array:
        return x.reshape(-1, self.ways, *x.shape[1:])


def _on_parts(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """A function of each device's part of a stream: XLA would gather the other axes' parts for an exchange over one."""
    names = ("batch", "sequence", "hidden")
    return local(function, inputs=[names], outputs=names)


def _rows(x: jax.Array) -> jax.Array:
    return axes.shard(x, "batch", *(None,) * (x.ndim - 1))
