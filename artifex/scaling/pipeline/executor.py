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
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from artifex.scaling import axes
from artifex.scaling.pipeline.schedules import Schedule, Tables, tables
from artifex.scaling.pipeline.sharing import Shared
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

    def on_device(rest: Tree, stack: Tree, rows: Tree, keys: Any) -> Any:
        stack = jax.tree.map(lambda leaf: leaf[:, 0], stack)  # this device's: (stages, layers of a stage, ...)
        index, share = jax.lax.axis_index(axis), Shared.of(axis, schedule.devices, rows)
        device = _Device(parts, place, axis, index, share, dtype, lay_out, rest, stack, rows, keys)
        sums, (of_rest, of_stack) = device.all_ticks(table)
        return sums, (of_rest, jax.tree.map(lambda leaf: leaf[:, None], of_stack))

    def run(rest: Tree, stack: Tree, rows: Tree, keys: Any) -> Any:
        by_stage, whole = PartitionSpec(None, axis), PartitionSpec()
        (weight, sums), (of_rest, of_stage) = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(whole, by_stage, whole, whole),
            out_specs=(whole, (whole, by_stage)),
            axis_names={axis},
            check_vma=False,
        )(rest, jax.tree.map(place.by_stage, stack), rows, keys)
        gradients = (of_rest, jax.tree.map(place.joined, of_stage))
        weight_or_1 = jnp.maximum(weight, 1.0)
        mean = lambda total: total / weight_or_1.astype(total.dtype)  # noqa: E731
        (loss, metrics), gradients = jax.tree.map(mean, (sums, gradients))
        return (loss, metrics | {"weight": weight}), gradients

    return run


@dataclasses.dataclass(frozen=True)
class _Device:
    """What one device of the pipeline does, tick by tick; the same program on all.

    A state is a stream and the sum of what layers have reported so far. Of what is passed on, kept and summed the
    layout is always given: XLA asks both branches of a conditional for one layout.
    """

    parts: Parts
    place: Layers
    axis: str
    index: jax.Array
    share: Shared
    dtype: Any
    lay_out: Callable[[Tree, Tree], tuple[Tree, Tree]]
    rest: Tree
    stack: Tree
    rows: Tree
    keys: Any

    @functools.cached_property
    def state(self) -> Tree:
        """Shapes and dtypes of a state."""

        def enter_and_leave(rest: Tree, stack: Tree, rows: Tree, key: Any) -> Tree:
            stream, beside, per_layer = self.parts.before(rest, rows, key)
            own = jax.tree.map(lambda leaf: leaf[: self.place.each], per_layer)
            return self.parts.blocks(_at(stack, 0), stream, beside, own, jnp.ones(self.place.each, bool))

        return jax.eval_shape(enter_and_leave, self.rest, self.stack, *self.microbatch(0))

    def microbatch(self, m: Any) -> tuple[Tree, Any]:
        """Rows and key of a microbatch."""
        return _at(self.rows, m), None if self.keys is None else self.keys[m]

    def all_ticks(self, table: Tables) -> tuple[Tree, Tree]:
        """Sums of weights, losses and metrics over all microbatches, and of gradients."""
        blank = self.laid(_zeros(self.state))
        streams, waiting = (self.laid(_zeros(self.state, slots + 1)) for slots in (table.streams, table.gradients))
        none = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, self.dtype), (self.rest[0], self.stack[0]))
        sums = _zeros(jax.eval_shape(lambda state, m: self.ended(state, m)[0], self.state, jnp.int32(0)))
        start = (blank, blank, streams, waiting, self.lay_out(*none), sums)
        columns = {name: jnp.asarray(column) for name, column in table.columns.items()}
        (*_, gradients, sums), _ = jax.lax.scan(self.tick, start, columns)
        sums, of_rest = self.share.total((sums, gradients[0]))
        return sums, (of_rest, gradients[1])

    def tick(self, carry: tuple, row: dict[str, jax.Array]) -> tuple[tuple, None]:
        """Take in what has arrived, go forwards, end a microbatch, go backwards, and pass on."""
        arrived, returned, streams, waiting, gradients, sums = carry
        mine = {name: column[self.index] for name, column in row.items()}
        streams, waiting = _put(streams, arrived, mine["stream_to"]), _put(waiting, returned, mine["gradient_to"])
        blank = lambda: self.laid(_zeros(self.state))  # noqa: E731
        state = jax.lax.cond(mine["any_forward"] == 1, lambda: self.forward(streams, mine), blank)

        def end() -> tuple:
            more, of_rest, of_state = self.ended(state, mine["ended"])
            added = self.lay_out(_add(gradients[0], of_rest), gradients[1])
            return _add(sums, more), added, self.laid(_put(waiting, of_state, mine["end_to"]))

        still = lambda: (sums, self.lay_out(*gradients), self.laid(waiting))  # noqa: E731
        sums, gradients, waiting = jax.lax.cond(mine["ends"] == 1, end, still)
        gradients, of_state = jax.lax.cond(
            mine["any_backward"] == 1,
            lambda: self.backward(streams, waiting, gradients, mine),
            lambda: (self.lay_out(*gradients), blank()),
        )
        on, back = self.place.schedule.sends()
        arrived = jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, self.axis, on), state)
        returned = jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, self.axis, back), of_state)
        return (arrived, returned, streams, waiting, gradients, sums), None

    def forward(self, streams: Tree, mine: dict[str, jax.Array]) -> Tree:
        """The state that leaves this tick's stage."""
        v, m = mine["forward_v"], mine["forward_m"]
        return self.stage(self.rest, _at(self.stack, v), _at(streams, mine["forward_from"]), v, m)

    def backward(self, streams: Tree, waiting: Tree, gradients: Tree, mine: dict[str, jax.Array]) -> tuple[Tree, Tree]:
        """The sums of gradients with those of this tick's stage added, and that of the state that entered it."""
        v, m, there = mine["backward_v"], mine["backward_m"], mine["backward"] == 1
        trained, held = (_at(side, v) for side in self.stack)
        _, pull = jax.vjp(
            lambda rest, piece, state: self.stage((rest, self.rest[1]), (piece, held), state, v, m),
            self.rest[0],
            trained,
            _at(streams, mine["backward_from"]),
        )
        of_rest, of_piece, of_state = pull(_at(waiting, mine["gradient_from"]))
        of_rest, of_piece = jax.tree.map(lambda g: jnp.where(there, g, 0), (of_rest, of_piece))
        # laid out before they are added as well: behind the slice XLA would not see where its sums are to lie
        of_rest, of_piece = self.lay_out(of_rest, jax.tree.map(lambda g: g[None], of_piece))
        pieces = jax.tree.map(lambda total, g: total.at[v].add(g[0].astype(total.dtype)), gradients[1], of_piece)
        return self.lay_out(_add(gradients[0], of_rest), pieces), self.laid(of_state)

    def stage(self, rest: Tree, piece: Tree, state: Tree, v: jax.Array, m: jax.Array) -> Tree:
        """The state after a stage, of the one before it or, at the first, of what enters the stack."""
        stream, beside, per_layer = self.parts.before(rest, *self.microbatch(m))
        first = (self.index == 0) & (v == 0)
        state = jax.tree.map(lambda new, old: jnp.where(first, new, old), (stream, _zeros(state[1])), state)
        layer, there = (jnp.asarray(of)[v, self.index] for of in self.place.places())
        own = jax.tree.map(lambda leaf: leaf[layer], per_layer)
        stream, report = self.parts.blocks(piece, state[0], beside, own, there)
        return self.laid((stream, jax.tree.map(jnp.add, state[1], report)))

    def ended(self, state: Tree, m: jax.Array) -> tuple[Tree, Tree, Tree]:
        """What comes after the stack, of the microbatch that the last device has ended: its weight and weighed loss and
        metrics, the gradients of parameters outside of the stack, and that of the state."""
        stream, report = self.share.of_last(state, self.index)
        rows, key = self.microbatch(m)
        rows = self.share.rows(rows)

        def weighed(rest: Tree, stream: Tree, report: Tree) -> tuple[jax.Array, Tree]:
            _, beside, _ = self.parts.before((rest, self.rest[1]), rows, key)
            mean = jax.tree.map(lambda total: total / self.place.count, report)
            loss, metrics = self.parts.after((rest, self.rest[1]), stream, mean, beside, rows)
            weight = metrics.pop("weight")
            return loss * weight, (weight, jax.tree.map(lambda mean: mean * weight, (loss, metrics)))

        of_each, sums = jax.grad(weighed, argnums=(0, 1, 2), has_aux=True)(self.rest[0], stream, report)
        of_rest, *of_state = of_each
        return (*self.share.counted((sums, of_rest), self.index), self.share.back(tuple(of_state), self.index))

    @staticmethod
    def laid(state: Tree) -> Tree:
        """States, or several of them under leading dims, with their streams laid out by their names."""
        stream, report = state
        names = ("batch", "sequence", "hidden")
        return jax.tree.map(lambda x: axes.shard(x, *(None,) * (x.ndim - 3), *names), stream), report


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
