"""How each array of a traced step is split, as XLA's partitioner would carry it on from what the step constrains.

What is constrained, and what enters and leaves, is pinned. From there axes go forwards along each operation, then back,
dim by dim, where they divide and the array has no other dim with them (Xu et al. 2021, arXiv:2105.04663, section 3.5).
Through what makes one number of one number they go first, so that a product is computed as its result is constrained
rather than as an operand lies.
"""

from __future__ import annotations

from collections.abc import Iterator

from artifex.scaling.autodist.dims import elementwise, pairs
from artifex.scaling.autodist.program import Axes, Block, Op, Value, manual_axes

ROUNDS = 10  # each takes what is known one level of nesting further


def lay_out(program: Block, sizes: dict[str, int]) -> None:
    """Fill in `split` of every value of `program` on a mesh of `sizes`."""
    for light in (True, False):
        spread = _Spread(sizes, light)
        for _ in range(ROUNDS):
            spread.changed = False
            spread.block(program)
            if not spread.changed:
                break


class _Spread:
    def __init__(self, sizes: dict[str, int], light: bool) -> None:
        self.sizes, self.light = sizes, light
        self.changed = False

    def block(self, block: Block) -> None:
        for op in block.ops:
            self.op(op, forward=True)
        for op in reversed(block.ops):
            if not op.blocks:
                self.op(op, forward=False)
            elif op.name != "shard_map":
                for inside, outside, kind in (each for body in op.blocks for each in boundary(op, body)):
                    (self.stacked if kind == "stack" else self.alike)(inside, outside)

    def op(self, op: Op, *, forward: bool) -> None:
        if op.name == "shard_map":
            self.region(op)
            return
        if op.blocks:
            self.around(op)
            return
        if self.light and not elementwise(op):
            return
        for source, i, target, j in pairs(op):
            if forward:
                self.give(source.split[i], target, j)
            else:
                self.give(target.split[j], source, i)

    def give(self, axes: Axes, to: Value, dim: int) -> None:
        if not axes or to.pinned or to.split[dim]:
            return
        taken, ways = [], 1
        for axis in axes:
            if axis in to.axes or to.shape[dim] % (ways * self.sizes[axis]):
                break
            taken.append(axis)
            ways *= self.sizes[axis]
        if taken:
            to.split[dim] = tuple(taken)
            self.changed = True

    def alike(self, one: Value | None, other: Value | None) -> None:
        if one is None or other is None or one is other or len(one.shape) != len(other.shape):
            return
        for dim in range(len(one.shape)):
            self.give(one.split[dim], other, dim)
            self.give(other.split[dim], one, dim)

    def stacked(self, each: Value | None, stack: Value | None) -> None:
        """One slice and the stack of all, which has a leading dim more."""
        if each is None or stack is None:
            return
        for dim in range(len(each.shape)):
            self.give(stack.split[dim + 1], each, dim)
            self.give(each.split[dim], stack, dim + 1)

    def around(self, op: Op) -> None:
        """A loop or a conditional: its body lies as what goes in and comes out."""
        for block in op.blocks:
            for inside, outside, kind in boundary(op, block):
                (self.stacked if kind == "stack" else self.alike)(inside, outside)
            self.block(block)
            for inside, outside, kind in boundary(op, block):
                (self.stacked if kind == "stack" else self.alike)(inside, outside)

    def region(self, op: Op) -> None:
        """Arguments and results of a region lie as it says; inside, axes that it does not take go on by themselves."""
        manual = manual_axes(op)
        (block,) = op.blocks
        for outside, spec in zip(op.outs, op.params["out_specs"], strict=True):
            if not outside.pinned:
                _pin_some(outside, spec)
        for inside, outside, spec in zip(block.ins, op.ins, op.params["in_specs"], strict=True):
            if outside is not None:
                for dim, entry in enumerate(spec):
                    self.give((entry,) if isinstance(entry, str) else tuple(entry or ()), outside, dim)
                for dim, axes in enumerate(outside.split):
                    self.give(tuple(axis for axis in axes if axis not in manual), inside, dim)
        for inside, outside in zip(block.outs, op.outs, strict=True):
            if inside is not None:
                for dim, axes in enumerate(outside.split):
                    self.give(tuple(axis for axis in axes if axis not in manual), inside, dim)
        self.block(block)
        for inside, outside in zip(block.outs, op.outs, strict=True):
            if inside is not None and not manual >= set(self.sizes):
                for dim, axes in enumerate(inside.split):
                    free = tuple(axis for axis in axes if axis not in outside.axes)
                    outside.split[dim] = outside.split[dim] + free


def _pin_some(value: Value, spec: object) -> None:
    value.pin(spec)  # pyright: ignore[reportArgumentType]


def boundary(op: Op, block: Block) -> Iterator[tuple[Value | None, Value | None, str]]:
    """(inside, outside, "same" or "stack") of what crosses the edge of a loop's or a conditional's body."""
    if op.name == "scan":
        consts, carried = op.params["num_consts"], op.params["num_carry"]
        for index, (inside, outside) in enumerate(zip(block.ins, op.ins, strict=True)):
            yield inside, outside, "same" if index < consts + carried else "stack"
        for index, (inside, outside) in enumerate(zip(block.outs, op.outs, strict=True)):
            yield inside, outside, "same" if index < carried else "stack"
        for index in range(carried):
            yield block.outs[index], block.ins[consts + index], "same"
    elif op.name == "while":
        skip = op.params["cond_nconsts"]
        for inside, outside in zip(block.ins, op.ins[skip:], strict=True):
            yield inside, outside, "same"
        consts = op.params["body_nconsts"]
        for index, (inside, outside) in enumerate(zip(block.outs, op.outs, strict=True)):
            yield inside, outside, "same"
            yield inside, block.ins[consts + index], "same"
    elif op.name == "cond":
        for inside, outside in zip(block.ins, op.ins[1:], strict=True):
            yield inside, outside, "same"
        for inside, outside in zip(block.outs, op.outs, strict=True):
            yield inside, outside, "same"
