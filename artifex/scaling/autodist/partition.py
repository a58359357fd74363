"""What the devices must send each other so that each operation finds its operands as it needs them.

    program, sends = partition(program, sizes)

Behind `artifex.scaling.autodist.layouts`: where an operand lies otherwise than its operation computes, a collective is
written before it; where a product sums over a dim that is split, one behind it. What XLA joins, such as the gathers of
one array for three products, is one here as well.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from artifex.scaling.autodist.dims import contracted, pairs
from artifex.scaling.autodist.invariant import enter
from artifex.scaling.autodist.program import Axes, Block, Op, Value, manual_axes
from artifex.scaling.autodist.work import Taken, share_taken

Split = list[Axes]
PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot")
SCATTERS = ("scatter-add", "scatter_add")
SENT = "sent"  # the parameter of a sum over devices that has its `Sent`
IN_REGIONS = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ppermute": "collective-permute",
}


@dataclasses.dataclass(frozen=True)
class Sent:
    """A collective: `times` in a step each device sends `bytes` over the mesh axes `axes`."""

    kind: str
    axes: Axes
    bytes: float
    times: float = 1.0


def partition(
    program: Block,
    sizes: dict[str, int],
    *,
    scatters: bool = True,
    hoists: bool = True,
    taken: Taken | None = None,
) -> list[Sent]:
    """Write the collectives into `program`, in place, and return them. Without `scatters`, as on a CPU, devices sum all
    of what each needs a part of; without `hoists`, as on a GPU, what stays the same in a loop is gathered in each of
    its turns. `taken`: see `artifex.scaling.communication`."""
    writer = _Writer(sizes, scatters, hoists, taken or {})
    writer.block(program, 1.0)
    return writer.sent


@dataclasses.dataclass(eq=False)
class Around:
    """The loop that a body is of, and what is written in front of it."""

    loop: Op
    ops: list[Op]
    known: dict
    times: float
    around: Around | None

    def constant(self, value: Value) -> Value | None:
        """What enters the loop as `value` and stays the same in it."""
        body, count = self.loop.blocks[0], self.loop.params["num_consts"]
        pairs = zip(body.ins[:count], self.loop.ins[:count], strict=True)
        return next((outside for inside, outside in pairs if inside is value), None)


def scattered_over(op: Op) -> set[str]:
    """The mesh axes that split what is added up and not the sums."""
    value, window = op.ins[2], op.params["dimension_numbers"].update_window_dims
    if value is None:
        return set()
    return {axis for dim, axes in enumerate(value.split) if dim not in window for axis in axes} - op.outs[0].axes


def divided_in_part(op: Op, sizes: dict[str, int]) -> bool:
    """Whether it is a region that divides some mesh axes by hand and leaves others to the partitioner."""
    return op.name == "shard_map" and not {axis for axis, size in sizes.items() if size > 1} <= manual_axes(op)


class _Writer:
    def __init__(self, sizes: dict[str, int], scatters: bool, hoists: bool, taken: Taken) -> None:
        self.sizes, self.scatters, self.hoists, self.taken = sizes, scatters, hoists, taken
        self.sent: list[Sent] = []
        self.around: Around | None = None
        self.in_part = False  # in a region of some mesh axes, where XLA gathers what a scatter adds up

    def ways(self, axes: Any) -> int:
        return math.prod(self.sizes[axis] for axis in axes)

    def block(self, block: Block, times: float, shares: Sequence[float] = (), around: Around | None = None) -> None:
        ops, known, conditionals = [], {}, iter(shares)
        outer, self.around = self.around, around
        for op in block.ops:
            self.op(op, ops, known, times * (next(conditionals, 1.0) if op.name == "cond" else 1.0))
        block.ops = ops
        self.around = outer

    def op(self, op: Op, ops: list[Op], known: dict, times: float) -> None:
        if op.blocks:
            turns = {"scan": op.params.get("length"), "while": op.params.get("turns")}.get(op.name) or 1
            outer, self.in_part = self.in_part, self.in_part or divided_in_part(op, self.sizes)
            for inner in op.blocks:
                around = Around(op, ops, known, times, self.around) if op.name == "scan" else None
                self.block(inner, times * turns, share_taken(inner, turns, self.taken), around)
            self.in_part = outer
            if op.name == "shard_map":
                self.enter(op, ops, known, times)
            ops.append(op)
            return
        if op.name in IN_REGIONS:
            self.in_region(op, times)
            ops.append(op)
            return
        if op.name in PRODUCTS:
            self.product(op, ops, known, times)
            return
        if op.name == "sharding_constraint":
            value = op.ins[0]
            assert value is not None
            op.ins[0] = self.moved(value, op.outs[0].split, ops, known, times)
            ops.append(op)
            return
        if op.name.startswith("reduce_") and "axes" in op.params:
            self.reduction(op, ops, times)
            return
        if op.name in SCATTERS and not self.in_part and (summed := scattered_over(op)):
            self.scatter(op, summed, ops, known, times)
            return
        for index, value in enumerate(op.ins):
            if value is None or not value.shape or not value.axes:
                continue
            wanted: Split = [()] * len(value.shape)
            mine = [pair for pair in pairs(op) if pair[0] is value]
            for _, i, out, j in mine:
                if set(value.split[i]) & set(out.split[j]) or not value.split[i]:
                    wanted[i] = out.split[j]
            if any(wanted) or mine:
                if all(set(have) <= set(want) for have, want in zip(value.split, wanted, strict=True)):
                    continue
                op.ins[index] = self.moved(value, wanted, ops, known, times)
        ops.append(op)

    def moved(self, value: Value, wanted: Split, ops: list[Op], known: dict, times: float) -> Value:
        """`value` split as `wanted`, made by a collective where it has to travel."""
        if value.split == wanted:
            return value
        key = (id(value), tuple(wanted))
        if key in known:
            return known[key]
        if self.hoists and self.around is not None and (outside := self.around.constant(value)) is not None:
            return self.before(value, outside, wanted, known)
        have, want = value.axes, {axis for dim in wanted for axis in dim}
        gone = have - want
        crossed = {
            axis for axis in have & want if [axis in dim for dim in value.split] != [axis in dim for dim in wanted]
        }
        after = Value(value.shape, value.itemsize, list(wanted))
        if gone or crossed:
            kind = "all-gather" if gone else "all-to-all"
            axes = tuple(axis for axis in self.sizes if axis in (gone or crossed))
            n = self.ways(axes)
            size = value.bytes(self.sizes, gone) * (n - 1) / n
            self.sent.append(Sent(kind, axes, size, times))
            ops.append(Op(kind, [value], [after], {}, []))
        else:  # each takes its part
            ops.append(Op("take_part", [value], [after], {}, []))
        known[key] = after
        return after

    def before(self, value: Value, outside: Value, wanted: Split, known: dict) -> Value:
        """What enters a loop unchanged, moved in front of it, once."""
        inner = self.around
        assert inner is not None
        self.around = inner.around
        there = self.moved(outside, wanted, inner.ops, inner.known, inner.times)
        self.around = inner
        inside = Value(value.shape, value.itemsize, list(wanted))
        enter(inner.loop, inside, there)
        known[id(value), tuple(wanted)] = inside
        return inside

    def product(self, op: Op, ops: list[Op], known: dict, times: float) -> None:
        (left, right), out = op.ins[:2], op.outs[0]
        if left is None or right is None:
            ops.append(op)
            return
        sums = contracted(op)
        wanted: list[Split] = [[()] * len(left.shape), [()] * len(right.shape)]
        summed: list[str] = []
        for i, j in sums:
            # of a sum over parts that do not lie alike, XLA gathers both
            common = left.split[i] if left.split[i] == right.split[j] else ()
            wanted[0][i] = wanted[1][j] = common
            summed += common
        computed: Split = [()] * len(out.shape)
        links = [(0 if value is left else 1, i, j) for value, i, _, j in pairs(op)]
        if left is right:
            links = [(0, i, j) for _, i, j in links] + [(1, i, j) for _, i, j in links]
        for which, i, j in links:
            value = (left, right)[which]
            # an axis that both would split another dim by, or that is summed over, is gathered in the second
            keep = tuple(axis for axis in value.split[i] if axis in out.split[j] and axis not in summed)
            if set(out.split[j]) & set(summed):  # of a dim that the sum is split by, XLA computes all
                keep = ()
            wanted[which][i] = keep
            if keep:
                computed[j] = keep
        for which, value in enumerate((left, right)):
            need = [
                tuple(axis for axis in want) if not (set(have) - set(want)) else want
                for have, want in zip(value.split, wanted[which], strict=True)
            ]
            if any(set(have) - set(want) for have, want in zip(value.split, need, strict=True)):
                op.ins[which] = self.moved(value, need, ops, known, times)
        if not summed:
            ops.append(op)
            return
        axes = tuple(axis for axis in self.sizes if axis in summed)
        partial = Value(out.shape, out.itemsize, computed)
        ops.append(Op(op.name, op.ins, [partial], op.params, []))
        self.total(partial, out, axes, ops, times)

    def reduction(self, op: Op, ops: list[Op], times: float) -> None:
        value = op.ins[0]
        summed = {axis for dim in op.params["axes"] for axis in value.split[dim]} if value is not None else set()
        if summed:
            self.summed(op, summed, ops, times)
        else:
            ops.append(op)

    def scatter(self, op: Op, over: set[str], ops: list[Op], known: dict, times: float) -> None:
        """Each device adds up what it has, split as the sums are."""
        value, window = op.ins[2], op.params["dimension_numbers"].update_window_dims
        assert value is not None
        wanted: Split = [tuple(axis for axis in dim if axis in over) for dim in value.split]
        for _, i, out, j in (pair for pair in pairs(op) if pair[0] is value):
            wanted[i] = out.split[j] if i in window else wanted[i]
        op.ins[2] = self.moved(value, wanted, ops, known, times)
        self.summed(op, over, ops, times)

    def summed(self, op: Op, over: set[str], ops: list[Op], times: float) -> None:
        """The operation on what each device has, and the sum of its first result `over` mesh axes."""
        out = op.outs[0]
        split = [tuple(axis for axis in dim if axis not in over) for dim in out.split]
        partial = Value(out.shape, out.itemsize, split)
        ops.append(Op(op.name, op.ins, [partial, *op.outs[1:]], op.params, []))
        self.total(partial, out, tuple(axis for axis in self.sizes if axis in over), ops, times)

    def total(self, partial: Value, out: Value, axes: Axes, ops: list[Op], times: float) -> None:
        """The sum over `axes` of what each device has; where the sum is then split by some, each gets its part, and
        only that is summed over the others."""
        parted = tuple(axis for axis in axes if axis in out.axes)
        if parted and (rest := tuple(axis for axis in axes if axis not in parted)):
            part = Value(out.shape, out.itemsize, list(out.split))
            self.total(partial, part, parted, ops, times)
            self.total(part, out, rest, ops, times)
            return
        n, size = self.ways(axes), partial.bytes(self.sizes)
        if parted and self.scatters:
            sent = Sent("reduce-scatter", axes, size * (n - 1) / n, times)
            self.sent.append(sent)
            ops.append(Op("reduce-scatter", [partial], [out], {SENT: sent}, []))
            return
        sent = Sent("all-reduce", axes, 2 * size * (n - 1) / n, times)
        self.sent.append(sent)
        if out.split == partial.split:
            ops.append(Op("all-reduce", [partial], [out], {SENT: sent}, []))
            return
        summed = Value(out.shape, out.itemsize, list(partial.split))
        ops.append(Op("all-reduce", [partial], [summed], {SENT: sent}, []))
        ops.append(Op("take_part", [summed], [out], {}, []))

    def enter(self, op: Op, ops: list[Op], known: dict, times: float) -> None:
        for index, (value, spec) in enumerate(zip(op.ins, op.params["in_specs"], strict=True)):
            if value is None:
                continue
            wanted = Value(value.shape, value.itemsize, [])
            wanted.pin(spec)
            manual = manual_axes(op)
            split = [
                dim + tuple(axis for axis in have if axis not in manual and axis not in dim)
                for dim, have in zip(wanted.split, value.split, strict=True)
            ]
            op.ins[index] = self.moved(value, split, ops, known, times)

    def in_region(self, op: Op, times: float) -> None:
        kind, named = IN_REGIONS[op.name], op.params.get("axes", op.params.get("axis_name"))
        named = (named,) if isinstance(named, str) else tuple(axis for axis in named or () if isinstance(axis, str))
        n = self.ways(named)
        if n == 1:
            return
        for value in op.ins:
            if value is None:
                continue
            size = value.bytes(self.sizes)
            each = {
                "all-reduce": 2 * (n - 1) / n,
                "all-gather": n - 1,
                "reduce-scatter": (n - 1) / n,
                "all-to-all": (n - 1) / n,
                "collective-permute": 1.0,
            }[kind]
            self.sent.append(Sent(kind, tuple(axis for axis in self.sizes if axis in named), size * each, times))
