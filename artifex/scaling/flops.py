"""FLOPs of a traced program, by its jaxpr: matrix products and convolutions of all devices, loops by their turns.

XLA's own count takes the body of a loop once, and cannot see into a kernel. 2 for a multiply and an add; nothing is
taken off for what a mask hides inside a kernel, and of a conditional its dearest branch counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

ATTENTION = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}
"""cuDNN's kernels: how many products of all queries with all keys each of them makes."""


@dataclasses.dataclass(frozen=True)
class Flops:
    """A count. `open_loops`: loops whose end depends on data, whose body counts once."""

    total: float = 0.0
    open_loops: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.total + other.total, self.open_loops + other.open_loops)

    def times(self, turns: int) -> Flops:
        """Of a body that runs so often."""
        return dataclasses.replace(self, total=turns * self.total)


def flops(program: Any) -> Flops:
    """Of a jaxpr, all devices together: `flops(jax.jit(f).trace(*args).jaxpr)`."""
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    return sum((_of(equation) for equation in jaxpr.eqns), Flops())


def _of(equation: Any) -> Flops:
    name, params = equation.primitive.name, equation.params
    if (count := _PRODUCTS.get(name)) is not None:
        return Flops(count(equation))
    if name in ATTENTION:
        (rows, queries, heads, features), (_, keys, *_) = (var.aval.shape for var in equation.invars[:2])
        return Flops(2.0 * ATTENTION[name] * rows * heads * queries * keys * features)
    if name == "scan":
        return flops(params["jaxpr"]).times(params["length"])
    if name == "while":
        turns = turns_of(equation)
        body = flops(params["body_jaxpr"])
        return body.times(turns) if turns is not None else body + Flops(0.0, 1 if body.total else 0)
    if name == "cond":
        return max(map(flops, params["branches"]), key=lambda count: count.total)
    inside = sum((flops(jaxpr) for value in params.values() for jaxpr in _jaxprs(value)), Flops())
    if name == "pallas_call":
        sizes = params["grid_mapping"].grid
        return inside.times(math.prod(size if isinstance(size, int) else 1 for size in sizes))
    if name == "shard_map":  # what one device does of an axis that is divided by hand
        by_hand = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
        return inside.times(math.prod(params["mesh"].shape[axis] for axis in by_hand))
    return inside


def _jaxprs(value: Any) -> Iterator[Any]:
    if isinstance(value, Jaxpr | ClosedJaxpr):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _jaxprs(each)


def _dot(equation: Any) -> float:
    (summed, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[dim] for dim in summed)


def _ragged(equation: Any) -> float:
    """Every row with the matrix of its own group; or the products of each group's rows, one matrix of sums a group."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (summed, _), _ = numbers.dot_dimension_numbers
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    groups = equation.invars[2].aval.shape[-1] if numbers.lhs_ragged_dimensions[0] in summed else 1
    return 2.0 * math.prod(out) * math.prod(left[dim] for dim in summed) / groups


def _convolution(equation: Any) -> float:
    """With what is multiplied by padding, without the zeros between the numbers of a dilated input."""
    numbers, kernel = equation.params["dimension_numbers"], equation.invars[1].aval.shape
    met = math.prod(kernel) / kernel[numbers.rhs_spec[0]] / math.prod(equation.params["lhs_dilation"])
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * met


_PRODUCTS = {"dot_general": _dot, "ragged_dot_general": _ragged, "conv_general_dilated": _convolution}


def turns_of(equation: Any) -> int | None:
    """How often a loop runs that counts up by one to a number that the program names; None for any other."""
    condition, params = equation.params["cond_jaxpr"].jaxpr, equation.params
    if [one.primitive.name for one in condition.eqns] != ["lt"]:
        return None
    given = equation.invars[: params["cond_nconsts"]]
    given += equation.invars[params["cond_nconsts"] + params["body_nconsts"] :]
    start, end = (
        one if isinstance(one, Literal) else dict(zip(condition.invars, given, strict=True)).get(one)
        for one in condition.eqns[0].invars
    )
    if not (isinstance(start, Literal) and isinstance(end, Literal)):
        return None
    return max(int(end.val) - int(start.val), 0)
