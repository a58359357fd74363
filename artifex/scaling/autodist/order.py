"""The operations of a body in the order in which a compiler runs them, and the copies that it makes of operands.

What only what enters a body decides, such as its weights gathered, is made at its begin, and the sums of its gradients
over devices are taken together at its end, as XLA's combiners have it. A GPU's compiler computes weight gradients last:
nothing waits for them but their sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

from artifex.scaling.autodist.program import Block, Op, Value
from artifex.scaling.execution import Platform

ALIASES = {"reshape", "squeeze", "expand_dims", "bitcast_convert_type", "sharding_constraint", "pvary", "name"}
ALIASES |= {"optimization_barrier", "copy", "copy_p", "stop_gradient"}
PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot"}
LIGHT = ALIASES | {"convert_element_type", "transpose", "slice", "all-gather", "relaid"}


@dataclasses.dataclass(frozen=True)
class Habits:
    """Of a compiler: whether it copies operands whose dims stand in another order, and computes last the products that
    only sums over devices wait for."""

    copies_operands: bool
    gradients_last: bool


HABITS: dict[Platform, Habits] = {
    "cpu": Habits(copies_operands=True, gradients_last=False),
    "gpu": Habits(copies_operands=False, gradients_last=True),
    "tpu": Habits(copies_operands=True, gradients_last=False),
}
"""A CPU's and a GPU's as read off what they compiled; a TPU's are a CPU's, for want of more."""


def flat(block: Block, alias: dict[int, Value]) -> Iterator[Op]:
    """The operations of a block with those of its regions in their place; `alias` says which arrays are one."""
    for op in block.ops:
        if op.name != "shard_map":
            yield op
            continue
        (inner,) = op.blocks
        alias |= {id(inside): outside for inside, outside in zip(inner.ins, op.ins, strict=True) if outside is not None}
        yield from flat(inner, alias)
        alias |= {id(out): inside for out, inside in zip(op.outs, inner.outs, strict=True) if inside is not None}


def relaid(ops: Iterable[Op]) -> Iterator[Op]:
    """The operations, with a copy before each product and convolution of an operand whose dims stand in another order
    than it is read in, and one behind of a result that is written in another."""
    made: dict[tuple, Value] = {}
    for op in ops:
        if op.name not in ("dot_general", "conv_general_dilated"):
            yield op
            continue
        ins, outs = list(op.ins), list(op.outs)
        for which, order in enumerate(_orders(op)[:2]):
            value = ins[which]
            if value is None or _stands(value, order):
                continue
            key = (id(value), order)
            if key not in made:
                made[key] = _in_order(value, order)
                yield Op("relaid", [value], [made[key]], {}, [])
            ins[which] = made[key]
        order = _orders(op)[2]
        if _stands(outs[0], order):
            yield Op(op.name, ins, outs, op.params, op.blocks)
            continue
        between = _in_order(outs[0], order)
        yield Op(op.name, ins, [between], op.params, op.blocks)
        yield Op("relaid", [between], outs, {}, [])


def _orders(op: Op) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The dims of both operands and of the result in the order in which a CPU takes them: of a product rows x sums,
    sums x columns, rows x columns; of a convolution N H W C, H W I O, N H W C."""
    if op.name == "dot_general":
        summed, batch = op.params["dimension_numbers"]
        ranks = [len(value.shape) if value is not None else 0 for value in op.ins[:2]]
        left, right = ([d for d in range(ranks[i]) if d not in summed[i] and d not in batch[i]] for i in (0, 1))
        whole = tuple(range(len(op.outs[0].shape)))
        return (*batch[0], *left, *summed[0]), (*batch[1], *summed[1], *right), whole
    numbers = op.params["dimension_numbers"]
    (n, c, *of_lhs), (o, i, *of_rhs), (m, f, *of_out) = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    return (n, *of_lhs, c), (*of_rhs, i, o), (m, *of_out, f)


def _stands(value: Value, order: tuple[int, ...]) -> bool:
    large = [d for d in order if value.shape[d] > 1]
    return large == sorted(large)


def _in_order(value: Value, order: tuple[int, ...]) -> Value:
    return Value(tuple(value.shape[d] for d in order), value.itemsize, [value.split[d] for d in order])


Root = Callable[[Value], Value]


def in_order(ops: list[Op], block: Block, root: Root, habits: Habits, carried: int) -> list[Op]:
    """The operations of a block, of which `root` says which arrays are one, and whose first `carried` results a loop
    hands on: gathers of what enters first, sums that nothing here reads last."""
    entering = {id(value) for value in block.ins}
    early, others, late = [], [], []
    read = {id(root(value)) for op in ops for value in op.ins if value is not None}
    for op in ops:
        if op.name in LIGHT and all(value is None or id(root(value)) in entering for value in op.ins):
            entering |= {id(root(out)) for out in op.outs}
            early.append(op)
        elif op.name in ("all-reduce", "reduce-scatter") and not any(id(root(out)) in read for out in op.outs):
            late.append(op)
        else:
            others.append(op)
    if habits.gradients_last:
        others = _gradients_last(others, block.outs[:carried], root)
    moved = {id(out) for op in late for out in op.outs}
    behind = [op for op in others if any(value is not None and id(value) in moved for value in op.ins)]
    return [*early, *(op for op in others if op not in behind), *late, *behind] if behind else [*early, *others, *late]


def _gradients_last(ops: list[Op], carried: Sequence[Value | None], root: Root) -> list[Op]:
    """Of a loop's body, behind what the next turn waits for. Of other operations, behind the last loop, where two or
    more exchanges follow, or the loop has a ring: the product is what the first of them hides behind."""
    if carried:
        ops = _wanted_first(ops, carried, root)
    last = max((index for index, op in enumerate(ops) if op.name == "scan"), default=None)
    if last is None:
        return ops
    loop, tail = ops[last], ops[last + 1 :]
    ring = any(op.name == "ppermute" for block in loop.blocks for op in block.every())
    exchanges = sum(op.name == "all-to-all" for op in tail)
    if exchanges > 1 or (ring and exchanges):
        ops = [*_wanted_first(ops[: last + 1], loop.outs, root), *tail]
    return ops


def _wanted_first(ops: list[Op], values: Iterable[Value | None], root: Root) -> list[Op]:
    """The products that do not lead to `values`, and what follows from them, behind all others."""
    needed = {id(root(value)) for value in values if value is not None}
    for op in reversed(ops):
        if any(id(root(out)) in needed for out in op.outs):
            needed |= {id(root(value)) for value in op.ins if value is not None}
    first, then = [], []
    follows: set[int] = set()
    for op in ops:
        unneeded = op.name in PRODUCTS and not any(id(root(out)) in needed for out in op.outs)
        if unneeded or any(value is not None and id(root(value)) in follows for value in op.ins):
            follows |= {id(root(out)) for out in op.outs}
            then.append(op)
        else:
            first.append(op)
    return [*first, *then]
