"""Code on one device's part of a tensor, and communication with the other parts, by logical names.

    attend = local(kernel, inputs=[("batch", None, "act_heads", None)] * 3, outputs=("batch", None, "act_heads", None))

A dim is split where the rules at hand split its name; on one device, or without rules, `local` is the plain call and
every function here means the one part that is all. Inside, `index`, `parts`, `total`, `exchange` and `neighbours` take
the names and mean whatever mesh axes the rules give them.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from artifex.scaling import axes

_SPLIT: contextvars.ContextVar[Mapping[str, tuple[str, ...]] | None] = contextvars.ContextVar(
    "artifex_split", default=None
)


def local(
    function: Callable[..., Any], *, inputs: Sequence[axes.Names], outputs: tuple[str | None, ...] | list[axes.Names]
) -> Callable[..., Any]:
    """`function` on each device's parts of its arguments, whose dims are named by `inputs`, one tuple an argument.

    `outputs` names the dims of the array it returns; of a tuple of arrays, it is a list. On whole arrays `function`
    must compute the same, but for the parts. What no name splits, every device holds whole. Works inside a region that
    is manual over other mesh axes, such as a pipeline's stages. A name means one split, that of the first array that
    has it: what is (batch, sequence) lies as the (batch, sequence, act_heads) before it. Positions are split by no mesh
    axis that splits what is computed with, wherever that name stands: of a layer whose hidden units tensor parallelism
    divides, each device needs all positions of its context. Raises `ValueError` for names that do not fit their arrays,
    and where a size does not divide so, as for heads of which some do not.
    """
    named = {name for names in (*inputs, *(outputs if isinstance(outputs, list) else [outputs])) for name in names}

    def call(*arrays: Any) -> Any:
        layout = axes.layout()
        if layout is None:
            return function(*arrays)
        layout = layout.for_computing(named)
        specs, split = [], {}
        for names, array in zip(inputs, arrays, strict=True):
            specs.append(_spec(layout, names, array.shape, split))
        with _parts({}), axes.activated(None):
            shapes = jax.eval_shape(function, *arrays)
        if isinstance(outputs, list):
            out = tuple(_spec(layout, names, like.shape, split) for names, like in zip(outputs, shapes, strict=True))
        else:
            out = _spec(layout, outputs, shapes.shape, split)

        def on_parts(*arrays: Any) -> Any:
            with _parts(split), axes.activated(None):
                return function(*arrays)

        # without the check of what varies over which axis: kernels say nothing of it
        return jax.shard_map(
            on_parts,
            mesh=layout.mesh,
            in_specs=tuple(specs),
            out_specs=out,
            axis_names=set(layout.free),
            check_vma=False,
        )(*arrays)

    return call


def parts(name: str) -> int:
    """Into how many parts `name` is split here."""
    return jax.lax.axis_size(_axes(name)) if _axes(name) else 1


def index(name: str) -> jax.Array | int:
    """Which of the parts of `name` this one is, from 0."""
    return jax.lax.axis_index(_axes(name)) if _axes(name) else 0


def split_by(name: str, *names: str) -> bool:
    """Whether an array that `names` split has another part on each part of `name`, and not the same one on all of them.

    True where `name` is not split. Raises `ValueError` where that holds for some of its parts only.
    """
    over, among = set(_axes(name)), {axis for other in names for axis in _axes(other)}
    if over & among not in (set(), over):
        raise ValueError(
            f"{name!r} is split over {_axes(name)}, but {' and '.join(names)} over {tuple(sorted(over & among))} of "
            "these alone; let the rules send them to all of these mesh axes, or to none"
        )
    return over <= among


def total(x: Any, *names: str) -> Any:
    """The sum of x, or of each leaf of it, over all parts of `names`."""
    over = tuple(axis for name in names for axis in _axes(name))
    return jax.lax.psum(x, over) if over else x


def exchange(x: jax.Array, name: str, *, split: int, join: int) -> jax.Array:
    """All-to-all over the parts of `name`: dim `split` is cut into as many pieces, piece i goes to part i, and what
    comes from the parts lies in their order along dim `join`. `split` must divide; the shape stays where both are one.
    """
    over = _axes(name)
    return jax.lax.all_to_all(x, over, split, join, tiled=True) if over else x


def gathered(x: jax.Array, name: str, *, dim: int) -> jax.Array:
    """All parts of `name` one after the other along `dim`."""
    over = _axes(name)
    return jax.lax.all_gather(x, over, axis=dim, tiled=True) if over else x


def neighbours(x: Any, name: str, shift: int = 1) -> Any:
    """x of the part `shift` before this one in the ring of the parts of `name`: each sends to the one `shift` on."""
    over, count = _axes(name), parts(name)
    if count == 1:
        return x
    ring = [(part, (part + shift) % count) for part in range(count)]
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, over, ring), x)


def held(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` on the parts at hand now, whenever it is traced: see `artifex.scaling.execution.held`."""
    split = _SPLIT.get()

    @functools.wraps(function)
    def under(*args: Any) -> Any:
        with _parts(split), axes.activated(None):
            return function(*args)

    return under


def _axes(name: str) -> tuple[str, ...]:
    return (_SPLIT.get() or {}).get(axes.check_name(name, axes.ACTIVATION_AXES), ())


@contextlib.contextmanager
def _parts(split: Mapping[str, tuple[str, ...]] | None) -> Iterator[None]:
    token = _SPLIT.set(split)
    try:
        yield
    finally:
        _SPLIT.reset(token)


def _spec(layout: axes.Layout, names: axes.Names, shape: Sequence[int], split: dict[str, tuple]) -> PartitionSpec:
    """Where an array lives: each name is split as in an earlier array, else as the rules say; notes in `split` how."""
    entries, taken = [], {axis for name in names if name for axis in split.get(name, ())}
    for name, size, entry in zip(names, shape, layout.spec(names, shape), strict=True):
        over = (entry,) if isinstance(entry, str) else tuple(entry or ())
        if name is None:
            over = ()
        elif name in split:
            if size % math.prod(layout.sizes[axis] for axis in split[name]):
                raise ValueError(
                    f"{name!r} of size {size} would be split over {over or 'nothing'}, of another array over "
                    f"{split[name] or 'nothing'}; a name means one split inside local: make the sizes divide alike"
                )
            over = split[name]
        else:
            over = split[name] = tuple(axis for axis in over if axis not in taken)
        entries.append(over or None)
    return PartitionSpec(*entries)
