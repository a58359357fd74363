"""Which dims of an operation's operands and results are split alike: what a partitioner knows of operations."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

from artifex.scaling.autodist.program import Op, Value

Pair = tuple[Value, int, Value, int]  # a dim of an operand, and the dim of a result that is split alike
Dims = Iterator[tuple[int, int, int]]  # the result, a dim of the operand, the dim of that result


def pairs(op: Op) -> list[Pair]:
    """The dims of operands and results of one operation that are split alike."""
    return [
        (value, i, op.outs[k], j)
        for index, value in enumerate(op.ins)
        if value is not None
        for k, i, j in _dims(op, index, value)
        if i < len(value.shape) and j < len(op.outs[k].shape)
    ]


def elementwise(op: Op) -> bool:
    """Whether each number of the result is of one number of each operand."""
    reduces = op.name.startswith("reduce_") and "axes" in op.params
    return op.name not in _KNOWN and not reduces and not _opaque(op.name)


def _dims(op: Op, index: int, value: Value) -> Dims:
    """For operand `index`."""
    if (known := _KNOWN.get(op.name)) is not None:
        yield from known(op, index, value)
    elif op.name.startswith("reduce_") and "axes" in op.params:
        yield from _reduced(op, index, value)
    else:
        yield from _elementwise(op, index, value)


def _elementwise(op: Op, index: int, value: Value) -> Dims:
    for k, result in enumerate(op.outs):
        if len(result.shape) == len(value.shape):
            yield from ((k, d, d) for d in range(len(value.shape)) if value.shape[d] == result.shape[d])
        elif _opaque(op.name):  # a kernel: dims of the same size in the same order
            yield from ((k, i, j) for i, j in matched(value.shape, result.shape))


def _broadcast(op: Op, index: int, value: Value) -> Dims:
    if index == 0:
        for i, j in enumerate(op.params["broadcast_dimensions"]):
            if value.shape[i] == op.outs[0].shape[j]:
                yield 0, i, j


def _transpose(op: Op, index: int, value: Value) -> Dims:
    yield from ((0, i, j) for j, i in enumerate(op.params["permutation"]))


def _reshape(op: Op, index: int, value: Value) -> Dims:
    yield from ((0, i, j) for i, j in matched(value.shape, op.outs[0].shape))


def _squeeze(op: Op, index: int, value: Value) -> Dims:
    left = [dim for dim in range(len(value.shape)) if dim not in op.params["dimensions"]]
    yield from ((0, i, j) for j, i in enumerate(left))


def _expand(op: Op, index: int, value: Value) -> Dims:
    kept = [dim for dim in range(len(op.outs[0].shape)) if dim not in op.params["dimensions"]]
    yield from ((0, i, j) for i, j in enumerate(kept))


def _convolution(op: Op, index: int, value: Value) -> Dims:
    numbers = op.params["dimension_numbers"]
    if index == 1:
        yield 0, numbers.rhs_spec[0], numbers.out_spec[1]
        return
    yield 0, numbers.lhs_spec[0], numbers.out_spec[0]
    if all(size == 1 for size in op.params["rhs_dilation"]):
        for i, j in zip(numbers.lhs_spec[2:], numbers.out_spec[2:], strict=True):
            if value.shape[i] == op.outs[0].shape[j]:
                yield 0, i, j


def _scatter(op: Op, index: int, value: Value) -> Dims:
    numbers, out = op.params["dimension_numbers"], op.outs[0]
    if index == 0:
        yield from ((0, dim, dim) for dim in range(len(value.shape)))
    elif index == 2:
        gone = {*numbers.inserted_window_dims, *getattr(numbers, "operand_batching_dims", ())}
        kept = [dim for dim in range(len(out.shape)) if dim not in gone]
        for i, j in zip(numbers.update_window_dims, kept, strict=False):
            if value.shape[i] == out.shape[j]:
                yield 0, i, j


def _part(op: Op, index: int, value: Value) -> Dims:
    if index == 0 or (op.name == "dynamic_update_slice" and index == 1):
        for k, result in enumerate(op.outs):
            yield from ((k, d, d) for d in range(len(value.shape)) if value.shape[d] == result.shape[d])


def _concatenate(op: Op, index: int, value: Value) -> Dims:
    yield from ((0, dim, dim) for dim in range(len(value.shape)) if dim != op.params["dimension"])


def _reversed(op: Op, index: int, value: Value) -> Dims:
    yield from ((0, dim, dim) for dim in range(len(value.shape)) if dim not in op.params["dimensions"])


def _each(op: Op, index: int, value: Value) -> Dims:
    yield from ((index, dim, dim) for dim in range(len(value.shape)))


def _reduced(op: Op, index: int, value: Value) -> Dims:
    left = [dim for dim in range(len(value.shape)) if dim not in op.params["axes"]]
    yield from ((index if index < len(op.outs) else 0, i, j) for j, i in enumerate(left))


def _along(op: Op, index: int, value: Value) -> Dims:
    rank = len(value.shape)
    along = op.params.get("dimension", op.params.get("axis", rank - 1))
    for k in range(len(op.outs)) if op.name == "top_k" else [min(index, len(op.outs) - 1)]:
        yield from ((k, dim, dim) for dim in range(rank) if dim != along)


def _opaque(name: str) -> bool:
    return "attention" in name or name in ("pallas_call", "custom_call", "ffi_call")


def _dot(op: Op, index: int, value: Value) -> Dims:
    rank = len(value.shape)
    numbers = op.params.get("dimension_numbers")
    if numbers is None:
        numbers = op.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    (summed_l, summed_r), (batch_l, batch_r) = numbers
    summed, batch = ((summed_l, batch_l), (summed_r, batch_r))[min(index, 1)]
    if index > 1:
        return
    for j, i in enumerate(batch):
        yield 0, i, j
    free = [dim for dim in range(rank) if dim not in summed and dim not in batch]
    before = len(batch_l)
    if index == 1:
        left = op.ins[0]
        before += (len(left.shape) if left is not None else 0) - len(summed_l) - len(batch_l)
    for j, i in enumerate(free):
        yield 0, i, before + j


def contracted(op: Op) -> list[tuple[int, int]]:
    """(dim of the left, dim of the right operand) pairs that a product sums over."""
    numbers = op.params.get("dimension_numbers")
    if op.name == "conv_general_dilated":
        return [(numbers.lhs_spec[1], numbers.rhs_spec[1])]  # pyright: ignore[reportOptionalMemberAccess]
    if numbers is None:
        numbers = op.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    (left, right), _ = numbers
    return list(zip(left, right, strict=True))


def _gather(op: Op, index: int, value: Value) -> Dims:
    numbers, out = op.params["dimension_numbers"], op.outs[0]
    if index == 0:
        gone = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
        kept = [dim for dim in range(len(value.shape)) if dim not in gone]
        for i, j in zip(kept, numbers.offset_dims, strict=False):
            if op.params["slice_sizes"][i] == value.shape[i]:
                yield 0, i, j
    elif index == 1:
        places = [dim for dim in range(len(out.shape)) if dim not in numbers.offset_dims]
        yield from ((0, i, j) for i, j in zip(range(len(value.shape) - 1), places, strict=False))


@functools.cache
def matched(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Dims of a reshape that correspond: those of equal size, and of dims merged or cut the leading one."""
    found, i, j = [], 0, 0
    while i < len(before) and j < len(after):
        ends_i, ends_j = i + 1, j + 1
        while (a := math.prod(before[i:ends_i])) != (b := math.prod(after[j:ends_j])):
            if a < b and ends_i < len(before):
                ends_i += 1
            elif b < a and ends_j < len(after):
                ends_j += 1
            else:
                return tuple(found)
        ones_i = [dim for dim in range(i, ends_i) if before[dim] > 1]
        ones_j = [dim for dim in range(j, ends_j) if after[dim] > 1]
        if ones_i and ones_j:
            found.append((ones_i[0], ones_j[0]))
        i, j = ends_i, ends_j
    return tuple(found)


_KNOWN: dict[str, Callable[[Op, int, Value], Dims]] = {
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "expand_dims": _expand,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "concatenate": _concatenate,
    "rev": _reversed,
    "optimization_barrier": _each,
    **dict.fromkeys(("dot_general", "ragged_dot_general", "ragged_dot"), _dot),
    **dict.fromkeys(("scatter-add", "scatter", "scatter_add"), _scatter),
    **dict.fromkeys(("dynamic_slice", "slice", "pad", "dynamic_update_slice", "split"), _part),
    **dict.fromkeys(("argmax", "argmin"), _reduced),
    **dict.fromkeys(("sort", "top_k", "cumsum", "cumlogsumexp", "cummax", "cumprod"), _along),
}
