"""What does not change in a loop, taken out of it, as compilers do: casts and layouts of weights in a loop over
microbatches, and so also the gathers that follow them."""

from __future__ import annotations

from artifex.scaling.autodist.program import Block, Op, Value

LIGHT = {"convert_element_type", "transpose", "reshape", "rev", "squeeze", "expand_dims", "sharding_constraint", "copy"}
LIGHT |= {"slice", "concatenate", "add", "add_any"}  # of which kernels are made that join a resize and a convolution


def hoist(block: Block) -> None:
    """Move light operations on what enters a `scan` unchanged in front of it, in place, inner loops first."""
    ops: list[Op] = []
    for op in block.ops:
        for inner in op.blocks:
            hoist(inner)
        if op.name == "scan":
            ops += _out_of(op)
        ops.append(op)
    block.ops = ops


def _out_of(loop: Op) -> list[Op]:
    (body,), consts = loop.blocks, loop.params["num_consts"]
    outside: dict[int, Value | None] = {
        id(inside): out for inside, out in zip(body.ins[:consts], loop.ins[:consts], strict=True)
    }
    moved, kept = [], []
    for op in body.ops:
        fixed = all(value is None or id(value) in outside for value in op.ins)
        if op.name not in LIGHT or not fixed or not any(value is not None for value in op.ins):
            kept.append(op)
            continue
        ins = [None if value is None else outside[id(value)] for value in op.ins]
        outs = [Value(out.shape, out.itemsize, list(out.split), out.pinned) for out in op.outs]
        moved.append(Op(op.name, ins, outs, op.params, []))
        for inside, out in zip(op.outs, outs, strict=True):
            outside[id(inside)] = out
    used = {id(value) for op in kept for value in op.ins if value is not None}
    used |= {id(value) for value in body.outs if value is not None}
    for op in body.ops:
        if op in kept:
            continue
        for inside in op.outs:
            if id(inside) in used:
                enter(loop, inside, outside[id(inside)])
    body.ops = kept
    return moved


def enter(loop: Op, inside: Value, outside: Value | None) -> None:
    """Let one more array enter a `scan` unchanged."""
    consts = loop.params["num_consts"]
    loop.ins.insert(consts, outside)
    loop.blocks[0].ins.insert(consts, inside)
    loop.params = {**loop.params, "num_consts": consts + 1}
