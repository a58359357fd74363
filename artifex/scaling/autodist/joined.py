"""What a GPU makes of sums over devices: it adds first what is added to each other, and scatters what is cut.

The gradients that queries, keys and values send back to one input are three partial sums; XLA's
`all-reduce-reassociate` and `reduce-scatter-reassociate` make one collective of them. Of a sum that only a part of each
device is read of, as ZeRO-1 reads gradients, `reduce-scatter-creator` makes a reduce-scatter.
"""

from __future__ import annotations

import collections
import dataclasses

from artifex.scaling.autodist.dims import elementwise
from artifex.scaling.autodist.order import ALIASES
from artifex.scaling.autodist.partition import SENT, Sent
from artifex.scaling.autodist.program import Block, Op, Value

ADDITIONS = ("add", "add_any")
SUMS = ("all-reduce", "reduce-scatter")


def join_sums(program: Block, sends: list[Sent]) -> list[Sent]:
    """Do so in place, in `program` with its collectives written in. Returns what is sent then."""
    instead: dict[int, Sent | None] = {}
    _block(program, instead)
    return [one for one in (instead.get(id(one), one) for one in sends) if one is not None]


def _block(block: Block, instead: dict[int, Sent | None]) -> None:
    """`instead` grows by what is sent in place of another, by the id of that."""
    reads = collections.Counter(id(value) for op in block.ops for value in op.ins if value is not None)
    reads.update(id(value) for value in block.outs if value is not None)
    made: dict[int, Op] = {}  # the sum over devices that an array is and nothing else reads
    dropped: set[int] = set()
    ops: list[Op] = []
    for op in block.ops:
        for inner in op.blocks:
            _block(inner, instead)
        once = [value for value in op.ins if value is not None and reads[id(value)] == 1]
        sums = [made[id(value)] for value in once if id(value) in made]
        if op.name in SUMS and SENT in op.params:
            made[id(op.outs[0])] = op
        elif op.name in ALIASES and len(sums) == 1 and op.outs[0].split == sums[0].outs[0].split:
            made[id(op.outs[0])] = sums[0]
        elif op.name in ADDITIONS and len(sums) == 2 and _alike(*sums):
            kept, other = sums
            (first,), (second,) = kept.ins, other.ins
            assert first is not None and second is not None
            partial = Value(first.shape, first.itemsize, list(first.split))
            joined = Op(kept.name, [partial], op.outs, kept.params, [])
            ops += [Op(op.name, [first, second], [partial], op.params, []), joined]
            made[id(op.outs[0])] = joined
            instead[id(other.params[SENT])] = None
            dropped |= {id(kept), id(other)}
            continue
        elif elementwise(op) and not op.blocks:
            for sent in (one.params[SENT] for one in sums if one.name == "all-reduce"):
                if set(sent.axes) <= op.outs[0].axes:  # each device reads its part
                    instead[id(sent)] = dataclasses.replace(sent, kind="reduce-scatter", bytes=sent.bytes / 2)
        ops.append(op)
    block.ops = [op for op in ops if id(op) not in dropped]


def _alike(one: Op, other: Op) -> bool:
    """Whether both sum arrays of one shape, that lie alike, over the same mesh axes."""
    (first,), (second,) = one.ins, other.ins
    if first is None or second is None or one.name != other.name:
        return False
    same = first.shape == second.shape and first.split == second.split and one.outs[0].split == other.outs[0].split
    return same and one.params[SENT].axes == other.params[SENT].axes
