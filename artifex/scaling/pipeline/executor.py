"""The executor of pipeline schedules: one scan over the ticks of a table, on all devices of the axis at once.

It runs inside a `jax.shard_map` that is manual over that axis alone, so data, FSDP, tensor, expert and context
parallelism go on beside it. In a tick a device takes a microbatch through one of its stages forwards, another one
backwards, and passes streams on and gradients back to its neighbours. Going backwards it computes the stage again from
the stream that entered it, which is all that is kept of a microbatch: as many as the schedule has underway, whatever
their number. What comes after the stack is divided by rows among the devices, as soon as the last stage has ended a
microbatch; what comes before it is computed by each device for the microbatch that it works on, which needs what stands
beside the stream anyway.

An idle device computes on whatever is in its last slot, and nobody takes the result: no device branches alone, because
the devices of a stage talk to each other, and every collective must be met by all that take part in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from artifex.scaling import axes
from artifex.scaling.pipeline.schedules import Schedule, tables
from artifex.scaling.strategies import PipelineParallelStrategy

Tree = Any


@dataclasses.dataclass(frozen=True)
class Parts:
    """A loss said in parts, as functions of parameters outside of the stack and of a piece of the stack.

    `before(rest, rows, key) -> (stream, beside, per_layer)`: streams are (B, T, D), or a tree of such; `per_layer` has
    a leading dim of all layers, or is None. `blocks(piece, stream, beside, per_layer, there) -> (stream, report)`:
    through the layers of a piece, of which `there` (layers,) says which are no padding, and the sum of what these
    report. `after(rest, stream, report, beside, rows) -> (loss, metrics)` with the mean `report` of all layers; loss
    and metrics are means of rows by `metrics["weight"]`.
    """

    before: Callable[[Tree, Tree, Any], tuple[Tree, Tree, Tree]]
    blocks: Callable[[Tree, Tree, Tree, Tree, jax.Array], tuple[Tree, Tree]]
    after: Callable[[Tree, Tree, Tree, Tree, Tree], tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Layers:
    """Which layers each stage has: as even as can be, the larger stages first; shorter ones are padded in the step."""

    count: int
    schedule: Schedule

    @property
    def each(self) -> int:
        """Layers of the longest stage."""
        return -(-self.count // self.schedule.stages)

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """(V, S, layers of a stage): the layer in each place, some other one where there is none, and whether there is
        one."""
        S, V, each = self.schedule.devices, self.schedule.stages_per_device, self.each
        sizes = np.array(PipelineParallelStrategy(num_stages=S * V).assign_layers_to_stages(self.count))
        first, place = np.cumsum(sizes) - sizes, np.arange(each)
        layer = np.minimum(first[:, None] + place[None], self.count - 1)
        there = place[None] < sizes[:, None]
        return layer.reshape(V, S, each), there.reshape(V, S, each)

    def by_stage(self, leaf: jax.Array) -> jax.Array:
        """(layers, ...) -> (V, S, layers of a stage, ...)."""
        layer, there = self.places()
        if there.all():
            return leaf.reshape(*layer.shape, *leaf.shape[1:])
        return leaf[layer.reshape(-1)].reshape(*layer.shape, *leaf.shape[1:])

    def joined(self, leaf: jax.Array) -> jax.Array:
        """The inverse of `by_stage`: what is in places without a layer is left out."""
        _, there = self.places()
        flat = leaf.reshape(-1, *leaf.shape[3:])
        return flat if there.all() else flat[np.flatnonzero(there)]


def value_and_grad(
    parts: Parts,
    schedule: Schedule,
    layers: int,
    mesh: Mesh,
    *,
    axis: str,
    dtype: Any = jnp.float32,
    lay_out: Callable[[Tree, Tree], tuple[Tree, Tree]] = lambda rest, stack: (rest, stack),
) -> Callable[..., tuple[tuple[jax.Array, dict[str, jax.Array]], tuple[Tree, Tree]]]:
    """`run(rest, stack, rows, keys) -> ((loss, metrics), gradients of rest and of stack)`, by the schedule over `axis`.

    `rest` and `stack` are pairs of trees: what is differentiated, and what is held; leaves of `stack` have a leading
    dim of `layers`. `rows` have leading dims (microbatches, rows of one, ...), `keys` (microbatches,) or are None.
    Losses of microbatches are weighed by their weights; gradients are summed in `dtype`. `lay_out` constrains gradients
    of `rest` and of a device's part of `stack`, whose leaves lead with (stages of a device, layers of a stage).
    """
    table, place = tables(schedule), Layers(layers, schedule)

    def run(rest: Tree, stack: Tree, rows: Tree, keys: Any) -> Any:
        by_stage = jax.tree.map(place.by_stage, stack)
        of_stack, whole = PartitionSpec(None, axis), PartitionSpec()
        device = _Device(parts, schedule, place, table.columns, axis, dtype, lay_out, (table.streams, table.gradients))
        (weight, sums), (of_rest, of_stage) = jax.shard_map(
            device.all_ticks,
            mesh=mesh,
            in_specs=(whole, of_stack, whole, whole),
            out_specs=(whole, (whole, of_stack)),
            axis_names={axis},
            check_vma=False,
        )(rest, by_stage, rows, keys)
        weight_or_1 = jnp.maximum(weight, 1.0)
        loss, metrics = jax.tree.map(lambda total: total / weight_or_1.astype(total.dtype), sums)
        gradients = (of_rest, jax.tree.map(place.joined, of_stage))
        gradients = jax.tree.map(lambda total: total / weight_or_1.astype(total.dtype), gradients)
        return (loss, metrics | {"weight": weight}), gradients

    return run


@dataclasses.dataclass(frozen=True)
class _Device:
    """What one device of the pipeline does, tick by tick; the same program on all."""

    parts: Parts
    schedule: Schedule
    place: Layers
    columns: dict[str, np.ndarray]
    axis: str
    dtype: Any
    lay_out: Callable[[Tree, Tree], tuple[Tree, Tree]]
    slots: tuple[int, int]

    def all_ticks(self, rest: Tree, stack: Tree, rows: Tree, keys: Any) -> Any:
        """Sums of weights, losses and metrics over all microbatches, and of gradients."""
        S, between = self.schedule.devices, PipelineParallelStrategy(num_stages=self.schedule.devices)
        # with several stages each, the last device goes on at the first
        around = [(S - 1, 0)] if self.schedule.stages_per_device > 1 else []
        on = between.get_forward_communication_pattern() + around
        back = between.get_backward_communication_pattern() + [(to, of) for of, to in around]
        index = jax.lax.axis_index(self.axis)
        stack = jax.tree.map(lambda leaf: leaf[:, 0], stack)  # this device's: (V, layers of a stage, ...)
        of_microbatch = lambda m: (_at(rows, m), None if keys is None else keys[m])  # noqa: E731

        def stage(rest: Tree, piece: Tree, state: Tree, v: jax.Array, m: jax.Array) -> Tree:
            """The state, a stream and the sum of reports so far, after a stage."""
            stream, beside, per_layer = self.parts.before(rest, *of_microbatch(m))
            first = (index == 0) & (v == 0)
            state = jax.tree.map(lambda new, old: jnp.where(first, new, old), (stream, _zeros(state[1])), state)
            layer, there = (jnp.asarray(of)[v, index] for of in self.place.places())
            own = jax.tree.map(lambda leaf: leaf[layer], per_layer)
            stream, report = self.parts.blocks(piece, state[0], beside, own, there)
            return self._laid((stream, jax.tree.map(jnp.add, state[1], report)))

        def end(rest: Tree, state: Tree, m: jax.Array, share: Tree) -> tuple[jax.Array, Any]:
            rows, key = of_microbatch(m)
            rows = share(rows)
            _, beside, _ = self.parts.before(rest, rows, key)
            report = jax.tree.map(lambda total: total / self.place.count, state[1])
            loss, metrics = self.parts.after(rest, state[0], report, beside, rows)
            weight = metrics.pop("weight")
            return loss * weight, (weight, (loss * weight, jax.tree.map(lambda mean: mean * weight, metrics)))

        nothing = jax.eval_shape(self._empty, rest, stack, *of_microbatch(0))
        share = _Shared.of(self.axis, S, jax.tree.leaves(rows)[0].shape[1])

        def ended(rest: Tree, state: Tree, m: jax.Array) -> Any:
            """Sums, gradients of `rest`, and of the last stage's stream on all devices, of one microbatch."""
            mine = share.of_last(state, index == S - 1)
            of_rest, of_state, sums = _pulled(lambda r, s: end((r, rest[1]), s, m, share.rows), rest[0], mine)
            return share.masked(sums, index), share.masked(of_rest, index), share.back(of_state, index)

        sums_like = jax.eval_shape(lambda *args: ended(*args)[0], rest, nothing, jnp.int32(0))

        def tick(carry: Tree, row: dict[str, jax.Array]) -> tuple[Tree, None]:
            arrived, returned, streams, waiting, gradients, sums = carry
            mine = {name: column[index] for name, column in row.items()}
            streams = _put(streams, arrived, mine["stream_to"])
            waiting = _put(waiting, returned, mine["gradient_to"])

            def forward() -> Tree:
                v, m = mine["forward_v"], mine["forward_m"]
                return stage(rest, _at(stack, v), _at(streams, mine["forward_from"]), v, m)

            # XLA asks both branches of a conditional for one layout, so each result is given its own in both
            state = jax.lax.cond(mine["any_forward"] == 1, forward, lambda: self._laid(_zeros(nothing)))

            def at_end() -> Tree:
                new, of_rest, of_state = ended(rest, state, mine["ended"])
                added = (_add(gradients[0], of_rest), gradients[1])
                waits = self._laid(_put(waiting, of_state, mine["end_to"]))
                return jax.tree.map(jnp.add, sums, new), self.lay_out(*added), waits

            sums, gradients, waiting = jax.lax.cond(
                mine["ends"] == 1, at_end, lambda: (sums, self.lay_out(*gradients), self._laid(waiting))
            )

            def backward() -> Tree:
                v, m, there = mine["backward_v"], mine["backward_m"], mine["backward"] == 1
                held = (rest[1], _at(stack[1], v))
                _, pull = jax.vjp(
                    lambda r, piece, state: stage((r, held[0]), (piece, held[1]), state, v, m),
                    rest[0],
                    _at(stack[0], v),
                    _at(streams, mine["backward_from"]),
                )
                of_rest, of_piece, of_state = pull(_at(waiting, mine["gradient_from"]))
                of_rest, of_piece = jax.tree.map(lambda g: jnp.where(there, g, 0), (of_rest, of_piece))
                pieces = jax.tree.map(lambda total, g: total.at[v].add(g.astype(total.dtype)), gradients[1], of_piece)
                return self.lay_out(_add(gradients[0], of_rest), pieces), self._laid(of_state)

            gradients, of_state = jax.lax.cond(
                mine["any_backward"] == 1,
                backward,
                lambda: (self.lay_out(*gradients), self._laid(_zeros(nothing))),
            )
            arrived = jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, self.axis, on), state)
            returned = jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, self.axis, back), of_state)
            return (arrived, returned, streams, waiting, gradients, sums), None

        blank = self._laid(_zeros(nothing))
        streams, waiting = (self._laid(_zeros(nothing, count + 1)) for count in self.slots)
        none = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, self.dtype), (rest[0], stack[0]))
        start = (blank, blank, streams, waiting, self.lay_out(*none), _zeros(sums_like))
        columns = {name: jnp.asarray(column) for name, column in self.columns.items()}
        (*_, gradients, sums), _ = jax.lax.scan(tick, start, columns)
        sums, of_rest = share.total((sums, gradients[0]))
        return sums, (of_rest, jax.tree.map(lambda leaf: leaf[:, None], gradients[1]))

    def _empty(self, rest: Tree, stack: Tree, rows: Tree, key: Any) -> Tree:
        """A state, for its shapes: what enters a stage and leaves it."""
        stream, beside, per_layer = self.parts.before(rest, rows, key)
        piece = jax.tree.map(lambda leaf: leaf[0], stack)
        own = jax.tree.map(lambda leaf: leaf[: self.place.each], per_layer)
        return self.parts.blocks(piece, stream, beside, own, jnp.ones(self.place.each, bool))

    @staticmethod
    def _laid(state: Tree) -> Tree:
        """Streams, or several of them under leading dims, laid out by their names."""
        stream, report = state
        names = ("batch", "sequence", "hidden")
        return jax.tree.map(lambda x: axes.shard(x, *(None,) * (x.ndim - 3), *names), stream), report


@dataclasses.dataclass(frozen=True)
class _Shared:
    """How the devices of a pipeline share what comes after its stack: `ways` parts of the rows of a microbatch, row r
    in part r % ways, so that rows that lie on one data-parallel device stay there. With 1 way all compute all, and one
    counts: in the time in which one alone would."""

    axis: str
    ways: int

    @classmethod
    def of(cls, axis: str, devices: int, rows: int) -> _Shared:
        split = axes.most_ways("batch")
        return cls(axis, devices if rows % (devices * split) == 0 else 1)

    def rows(self, tree: Tree) -> Tree:
        """This device's part of rows."""
        if self.ways == 1:
            return tree
        index = jax.lax.axis_index(self.axis)
        return jax.tree.map(lambda x: _rows(jax.lax.dynamic_index_in_dim(self._cut(x), index, 1, keepdims=False)), tree)

    def of_last(self, state: Tree, last: jax.Array) -> Tree:
        """This device's part of the rows of the stream of the `last` device, and its report."""
        stream, report = state
        report = self.total(jax.tree.map(lambda x: jnp.where(last, x, 0), report))
        if self.ways == 1:
            return self.total(jax.tree.map(lambda x: jnp.where(last, x, 0), stream)), report
        # every device sends as much, and what the last one sent is taken: the bytes of a reduce-scatter, without a sum
        parts = lambda x: jax.lax.all_to_all(self._cut(x), self.axis, 1, 1, tiled=True)  # noqa: E731
        return jax.tree.map(lambda x: _rows(parts(x)[:, -1]), stream), report

    def masked(self, tree: Tree, index: jax.Array) -> Tree:
        """What counts of each device, so that the sum over devices is that of all rows."""
        return tree if self.ways > 1 else jax.tree.map(lambda x: jnp.where(index == 0, x, 0), tree)

    def back(self, state: Tree, index: jax.Array) -> Tree:
        """The gradient of all rows of the stream, and of the report."""
        stream, report = state
        report = self.total(self.masked(report, index))
        if self.ways == 1:
            return stream, report
        whole = lambda x: jax.lax.all_gather(x, self.axis, axis=1)  # noqa: E731
        return jax.tree.map(lambda x: whole(x).reshape(-1, *x.shape[1:]), stream), report

    def total(self, tree: Tree) -> Tree:
        """The sum over all devices, in float32: XLA for CPUs has none of 16 bits where others axes are automatic."""
        return jax.tree.map(lambda x: jax.lax.psum(x.astype(jnp.float32), self.axis).astype(x.dtype), tree)

    def _cut(self, x: jax.Array) -> jax.Array:
        return x.reshape(-1, self.ways, *x.shape[1:])


def _pulled(function: Callable, *args: Tree) -> tuple[Any, ...]:
    """The gradients of a function's first result, and its second."""
    gradients, aux = jax.grad(function, argnums=tuple(range(len(args))), has_aux=True)(*args)
    return *gradients, aux


def _rows(x: jax.Array) -> jax.Array:
    return axes.shard(x, "batch", *(None,) * (x.ndim - 1))


def _at(tree: Tree, index: Any) -> Tree:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False), tree)


def _put(tree: Tree, values: Tree, index: Any) -> Tree:
    return jax.tree.map(
        lambda leaf, value: jax.lax.dynamic_update_index_in_dim(leaf, value.astype(leaf.dtype), index, 0), tree, values
    )


def _add(totals: Tree, more: Tree) -> Tree:
    return jax.tree.map(lambda total, value: total + value.astype(total.dtype), totals, more)


def _zeros(tree: Tree, *leading: int) -> Tree:
    return jax.tree.map(lambda leaf: jnp.zeros((*leading, *leaf.shape), leaf.dtype), tree)
