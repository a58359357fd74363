"""What one device computes in a step: FLOPs of matrix products and convolutions, loops by their turns.

Per device, so work that several repeat counts for each of them. 2 for a multiply and an add, as
`artifex.scaling.flops` counts; of a conditional its dearest branch, in a pipeline as often as its schedule takes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from artifex.scaling.autodist.dims import contracted
from artifex.scaling.autodist.program import Block, Op
from artifex.scaling.flops import ATTENTION

Taken = Mapping[int, Sequence[int]]


def flops_of_device(program: Block, sizes: dict[str, int], taken: Taken | None = None) -> float:
    """Of a program that is laid out, on a mesh of `sizes`. `taken`: see `artifex.scaling.communication`."""
    return _block(program, sizes, taken or {}, ())


def share_taken(block: Block, length: int, taken: Taken) -> list[float]:
    """Of each conditional in the body of a loop of `length` turns, in how much of them it is taken, 1 if unknown."""
    conditionals = sum(op.name == "cond" for op in block.ops)
    known = taken.get(length, ())
    return [count / length for count in known] if len(known) == conditionals else [1.0] * conditionals


def _block(block: Block, sizes: dict[str, int], taken: Taken, shares: Sequence[float]) -> float:
    total, conditionals = 0.0, iter(shares)
    for op in block.ops:
        if op.name == "scan":
            (body,), length = op.blocks, op.params["length"]
            total += length * _block(body, sizes, taken, share_taken(body, length, taken))
        elif op.name == "while":
            total += (op.params["turns"] or 1) * _block(op.blocks[0], sizes, taken, ())
        elif op.name == "cond":
            total += next(conditionals, 1.0) * max(_block(body, sizes, taken, ()) for body in op.blocks)
        elif op.blocks:
            total += sum(_block(body, sizes, taken, ()) for body in op.blocks)
        else:
            total += _op(op, sizes)
    return total


def _op(op: Op, sizes: dict[str, int]) -> float:
    ins, out = op.ins, op.outs[0] if op.outs else None
    if out is None or not ins or ins[0] is None:
        return 0.0
    if op.name in ATTENTION:
        query, key = ins[0], ins[1]
        assert key is not None
        rows, queries, heads, features = query.shape
        ways = query.whole / query.bytes(sizes)
        return 2.0 * ATTENTION[op.name] * rows * heads * queries * key.shape[1] * features / ways
    each = out.bytes(sizes) / out.itemsize
    if op.name == "conv_general_dilated":
        numbers, kernel = op.params["dimension_numbers"], ins[1]
        assert kernel is not None
        met = kernel.bytes(sizes) / kernel.itemsize / kernel.shape[numbers.rhs_spec[0]]
        met *= math.prod(sizes[axis] for axis in kernel.split[numbers.rhs_spec[0]])
        return 2.0 * each * met / math.prod(op.params["lhs_dilation"])
    if op.name not in ("dot_general", "ragged_dot_general", "ragged_dot"):
        return 0.0
    summed = 1.0
    for dim, _ in contracted(op):
        summed *= ins[0].shape[dim] / math.prod(sizes[axis] for axis in ins[0].split[dim])
    if op.name != "dot_general":
        numbers, groups = op.params["ragged_dot_dimension_numbers"], ins[2]
        (left, _), _ = numbers.dot_dimension_numbers
        by_group = numbers.lhs_ragged_dimensions[0] in left and groups is not None
        return 2.0 * each * summed / (groups.shape[-1] if groups is not None and by_group else 1)
    return 2.0 * each * summed
