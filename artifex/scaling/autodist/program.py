"""A traced step as the planner reads it: operations in order, calls inlined, loops and regions as blocks of their own.

    program = read(jax.jit(step).trace(*args).jaxpr, where)

Of every array it knows shape, bytes and, for each dim, the mesh axes that split it; `artifex.scaling.autodist.layouts`
fills in what the step leaves open. Nothing here is compiled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import NamedSharding, PartitionSpec

from artifex.scaling.flops import turns_of

Axes = tuple[str, ...]


@dataclasses.dataclass(eq=False, slots=True)
class Value:
    """An array: `split` has the mesh axes of each dim. One that is `pinned` lies as the step says."""

    shape: tuple[int, ...]
    itemsize: float
    split: list[Axes]
    pinned: bool = False

    @classmethod
    def of(cls, aval: Any) -> Value:
        """That of an abstract value of JAX's; a key or a token counts nothing."""
        shape = tuple(size if isinstance(size, int) else 1 for size in getattr(aval, "shape", ()))
        try:
            itemsize = float(np.dtype(aval.dtype).itemsize)
        except (TypeError, AttributeError):
            itemsize = 8.0 if hasattr(aval, "dtype") else 0.0
        return cls(shape, itemsize, [()] * len(shape))

    def pin(self, spec: PartitionSpec) -> None:
        """Let it lie as `spec` says."""
        entries = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
        self.split = [*entries, *[()] * (len(self.shape) - len(entries))]
        self.pinned = True

    @property
    def axes(self) -> set[str]:
        """The mesh axes that split it."""
        return {axis for dim in self.split for axis in dim}

    @property
    def whole(self) -> float:
        """Bytes of all of it."""
        return self.itemsize * math.prod(self.shape)

    def bytes(self, sizes: dict[str, int], without: frozenset[str] | set[str] = frozenset()) -> float:
        """Bytes of a device's part, as if the axes `without` did not split it."""
        ways = math.prod(sizes[axis] for dim in self.split for axis in dim if axis not in without)
        return self.whole / ways


@dataclasses.dataclass(eq=False, slots=True)
class Op:
    """An operation: `ins` has None for a number of the program's own. `blocks` are bodies, branches, regions."""

    name: str
    ins: list[Value | None]
    outs: list[Value]
    params: dict[str, Any]
    blocks: list[Block]


@dataclasses.dataclass(eq=False, slots=True)
class Block:
    """Operations in order, from `ins` to `outs`."""

    ins: list[Value]
    ops: list[Op]
    outs: list[Value | None]

    def every(self) -> Iterator[Op]:
        """Its operations and those of the blocks in them."""
        for op in self.ops:
            yield op
            for block in op.blocks:
                yield from block.every()


def manual_axes(region: Op) -> frozenset[str]:
    """The mesh axes that a `shard_map` divides by hand."""
    params = region.params
    return frozenset(params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"])


def read(jaxpr: Any, where: Sequence[Any] = (), out: Sequence[Any] = ()) -> Block:
    """The program of a jaxpr whose arguments and results lie as `where` and `out` say, `NamedSharding`s or None."""
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    block = _block(jaxpr)
    for values, shardings in ((block.ins, where), (block.outs, out)):
        for value, sharding in zip(values, shardings, strict=False):
            if value is not None and isinstance(sharding, NamedSharding):
                value.pin(sharding.spec)
    _without_dead(block)
    return block


def _block(jaxpr: Jaxpr) -> Block:
    known: dict[Any, Value | None] = {}
    ins = [Value.of(var.aval) for var in jaxpr.invars]
    known |= dict(zip(jaxpr.invars, ins, strict=True))
    known |= {var: Value.of(var.aval) for var in jaxpr.constvars}
    ops: list[Op] = []
    _inline(jaxpr, known, ops)
    return Block(ins, ops, [None if isinstance(var, Literal) else known[var] for var in jaxpr.outvars])


def _inline(jaxpr: Jaxpr, known: dict[Any, Value | None], ops: list[Op]) -> None:
    for equation in jaxpr.eqns:
        ins = [None if isinstance(var, Literal) else known[var] for var in equation.invars]
        name, params = equation.primitive.name, equation.params
        inner = _called(name, params)
        if inner is not None and len(inner.invars) == len(ins):
            inside: dict[Any, Value | None] = dict(zip(inner.invars, ins, strict=True))
            inside |= {var: Value.of(var.aval) for var in inner.constvars}
            _inline(inner, inside, ops)
            for var, value in zip(equation.outvars, inner.outvars, strict=True):
                known[var] = None if isinstance(value, Literal) else inside[value]
            continue
        if name == "reduce_precision" and _changes_nothing(equation):
            known[equation.outvars[0]] = ins[0]
            continue
        if name == "while":
            params = {**params, "turns": turns_of(equation)}
        outs = [Value.of(var.aval) for var in equation.outvars]
        known |= dict(zip(equation.outvars, outs, strict=True))
        if name == "sharding_constraint" and isinstance(params["sharding"], NamedSharding):
            outs[0].pin(params["sharding"].spec)
        ops.append(Op(name, ins, outs, params, [_block(inner) for inner in _bodies(name, params)]))


def _changes_nothing(precision: Any) -> bool:
    """Whether a `reduce_precision` is to what the numbers have: JAX marks what recomputation keeps by one."""
    kind, params = jnp.finfo(precision.invars[0].aval.dtype), precision.params
    return (params["exponent_bits"], params["mantissa_bits"]) == (kind.nexp, kind.nmant)


_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_lin": "",
}


def _called(name: str, params: dict[str, Any]) -> Jaxpr | None:
    inner = params.get(_CALLS.get(name, ""))
    return inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner


def _bodies(name: str, params: dict[str, Any]) -> list[Jaxpr]:
    if name == "scan":
        found = [params["jaxpr"]]
    elif name == "while":
        found = [params["body_jaxpr"]]
    elif name == "cond":
        found = list(params["branches"])
    elif name == "shard_map":
        found = [params["jaxpr"]]
    else:
        found = []
    return [each.jaxpr if isinstance(each, ClosedJaxpr) else each for each in found]


def _without_dead(block: Block) -> None:
    """Leave out what nothing reads, as compilers do; loops keep what they carry."""
    used = {id(value) for value in block.outs if value is not None}
    kept = []
    for op in reversed(block.ops):
        if not any(id(out) in used for out in op.outs) and op.name not in ("debug_callback",):
            continue
        for inner in op.blocks:
            if op.name == "scan":
                carried = op.params["num_carry"]
                inner.outs = [
                    value if index < carried or id(out) in used else None
                    for index, (value, out) in enumerate(zip(inner.outs, op.outs, strict=True))
                ]
            elif op.name in ("cond", "shard_map"):
                inner.outs = [
                    value if id(out) in used else None for value, out in zip(inner.outs, op.outs, strict=True)
                ]
            _without_dead(inner)
            if op.name == "scan":
                _without_unread(op, inner)
        used |= {id(value) for value in op.ins if value is not None}
        kept.append(op)
    block.ops = kept[::-1]


def _without_unread(loop: Op, body: Block) -> None:
    """What enters a loop and is not read there is not read by it."""
    read = {id(value) for op in body.ops for value in op.ins} | {id(value) for value in body.outs}
    consts, carried = loop.params["num_consts"], loop.params["num_carry"]
    for index, inside in enumerate(body.ins):
        if not consts <= index < consts + carried and id(inside) not in read:
            loop.ins[index] = None
