"""Arrays made in their shards: `ones(128, 64, device_mesh=(2, 2), tensor_split=(0, 1))` and its kin.

`device_mesh` is the sizes of a mesh, `tensor_split[i]` the dim that its axis i splits (None: copies along it); without
`tensor_split` axis i splits dim i. `mesh=`, or `with jax.set_mesh(mesh):` around the call, gives the devices, and
`device_mesh` then says along which of that mesh's axes the array is split: `artifex.scaling.splits` has the rules, and
the errors, which all come before anything is computed. Without any of the three an array is a plain one of JAX, which
goes where the arrays it meets lie.

A shape is integers or one tuple: `ones(128, 64)`, `ones((128, 64))`. The dtype is float32 unless given, and int32 for
integers. Each device computes its own part and never holds the whole, and the numbers do not depend on how an array is
split: the random ones are those of `jax.random` on one device, bit for bit. All of it works inside `jax.jit`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, Sharding

from artifex.scaling.array_checks import (
    THREEFRY,
    checked_dtype,
    checked_key,
    checked_number,
    checked_shape,
    checked_values,
    is_integer,
    on_host,
)
from artifex.scaling.splits import sharding_for
from artifex.scaling.splits import sharding_of as sharding_of

Sizes = Sequence[int] | None
Split = Sequence[int | None] | None
Shape = int | Sequence[int]


def ones(
    *shape: Shape, device_mesh: Sizes = None, tensor_split: Split = None, mesh: Mesh | None = None, dtype: Any = None
) -> jax.Array:
    """Ones."""
    sizes = checked_shape("ones", shape)
    return _full(sizes, 1.0, dtype, sharding_for(sizes, device_mesh, tensor_split, mesh))


def zeros(
    *shape: Shape, device_mesh: Sizes = None, tensor_split: Split = None, mesh: Mesh | None = None, dtype: Any = None
) -> jax.Array:
    """Zeros."""
    sizes = checked_shape("zeros", shape)
    return _full(sizes, 0.0, dtype, sharding_for(sizes, device_mesh, tensor_split, mesh))


def empty(
    *shape: Shape, device_mesh: Sizes = None, tensor_split: Split = None, mesh: Mesh | None = None, dtype: Any = None
) -> jax.Array:
    """Zeros, as JAX leaves no memory unwritten."""
    sizes = checked_shape("empty", shape)
    return _full(sizes, 0.0, dtype, sharding_for(sizes, device_mesh, tensor_split, mesh))


def full(
    *shape: Shape,
    fill_value: Any,
    device_mesh: Sizes = None,
    tensor_split: Split = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
) -> jax.Array:
    """`fill_value` everywhere, a number; the dtype is that of the number.

    Raises `ValueError` for a number that the dtype has not, such as 0.5 of an int32.
    """
    sizes = checked_shape("full", shape)
    return _full(sizes, fill_value, dtype, sharding_for(sizes, device_mesh, tensor_split, mesh))


def arange(
    start: float,
    stop: float | None = None,
    step: float = 1,
    *,
    device_mesh: Sizes = None,
    tensor_split: Split = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
) -> jax.Array:
    """start + i step from `start` up to, and without, `stop`; `arange(n)` is 0 to n - 1. Of integers an int32."""
    start, stop = (0, start) if stop is None else (start, stop)
    start, stop, step = (
        checked_number(name, value) for name, value in (("start", start), ("stop", stop), ("step", step))
    )
    if step == 0:
        raise ValueError(f"arange from {start} to {stop} in steps of 0 never ends; give another step")
    default = "int32" if all(map(is_integer, (start, stop, step))) else "float32"
    made = checked_dtype(dtype, default, np.number, "arange")
    count = max(math.ceil((stop - start) / step), 0)
    where = sharding_for((count,), device_mesh, tensor_split, mesh)
    checked_values("the last number", start + max(count - 1, 0) * step, made)
    ends = [checked_values(name, value, made) for name, value in (("start", start), ("step", step))]
    return _program(_arange, where, count, made)(*ends)


def linspace(
    start: float,
    stop: float,
    num: int = 50,
    *,
    endpoint: bool = True,
    device_mesh: Sizes = None,
    tensor_split: Split = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
) -> jax.Array:
    """`num` numbers at equal distances from `start` to `stop`, which is the last of them where `endpoint` says so."""
    (count,) = checked_shape("linspace", (num,))
    made = checked_dtype(dtype, "float32", np.floating, "linspace")
    where = sharding_for((count,), device_mesh, tensor_split, mesh)
    ends = [
        checked_values(name, checked_number(name, value), made) for name, value in (("start", start), ("stop", stop))
    ]
    return _program(_linspace, where, count, made, bool(endpoint))(*ends)


def eye(
    rows: int,
    columns: int | None = None,
    *,
    device_mesh: Sizes = None,
    tensor_split: Split = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
) -> jax.Array:
    """Ones on the diagonal of a matrix of zeros, square unless `columns` is given."""
    shape = checked_shape("eye", (rows, rows if columns is None else columns))
    made = checked_dtype(dtype, "float32", np.generic, "eye")
    return _program(_eye, sharding_for(shape, device_mesh, tensor_split, mesh), shape, made)()


def randn(
    *shape: Shape,
    key: jax.Array,
    device_mesh: Sizes = None,
    tensor_split: Split = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
) -> jax.Array:
    """Normal numbers of mean 0 and variance 1: those of `jax.random.normal(key, shape, dtype)`."""
    sizes = checked_shape("randn", shape)
    return _random(jax.random.normal, "randn", key, sizes, dtype, sharding_for(sizes, device_mesh, tensor_split, mesh))


def rand(
    *shape: Shape,
    key: jax.Array,
    device_mesh: Sizes = None,
    tensor_split: Split = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
) -> jax.Array:
    """Numbers from 0 up to, and without, 1: those of `jax.random.uniform(key, shape, dtype)`."""
    sizes = checked_shape("rand", shape)
    return _random(jax.random.uniform, "rand", key, sizes, dtype, sharding_for(sizes, device_mesh, tensor_split, mesh))


def randint(
    *shape: Shape,
    low: int = 0,
    high: int,
    key: jax.Array,
    device_mesh: Sizes = None,
    tensor_split: Split = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
) -> jax.Array:
    """Integers from `low` up to, and without, `high`: those of `jax.random.randint(key, shape, low, high, dtype)`."""
    sizes = checked_shape("randint", shape)
    return _randint(sizes, low, high, key, dtype, sharding_for(sizes, device_mesh, tensor_split, mesh))


def array(
    data: Any, *, device_mesh: Sizes = None, tensor_split: Split = None, mesh: Mesh | None = None, dtype: Any = None
) -> jax.Array:
    """`data`, an array of NumPy or JAX or nested lists of numbers, of which each device gets a copy of its part.

    The dtype is that of the data, and 32 bits of what has 64. Raises `TypeError` for what is no array of numbers and
    `ValueError` for numbers of the host that the dtype has not: an integer too large, 0.5 of an int32.
    """
    if isinstance(data, jax.Array):
        made = checked_dtype(dtype, data.dtype, np.generic, "array")
        where = sharding_for(data.shape, device_mesh, tensor_split, mesh)
        data = data.astype(made)
        if where is None:
            return jnp.array(data)
        return _constrained(data, where) if isinstance(data, Tracer) else jax.device_put(data, where, may_alias=False)
    data = on_host("data", data)
    default = {"float64": "float32", "complex128": "complex64", "int64": "int32", "uint64": "uint32"}
    made = checked_dtype(dtype, default.get(data.dtype.name, data.dtype), np.generic, "array")
    where = sharding_for(data.shape, device_mesh, tensor_split, mesh)
    data = checked_values("data", data, made)
    if where is None or isinstance(where.mesh, AbstractMesh):
        return jnp.array(data) if where is None else _constrained(jnp.array(data), where)
    # a copy of the part, or JAX would use NumPy's own memory where that is aligned, and see it change
    return jax.make_array_from_callback(data.shape, where, lambda index: np.array(data[index]))


def ones_like(
    x: Any, *, device_mesh: Sizes = None, tensor_split: Split = None, mesh: Mesh | None = None, dtype: Any = None
) -> jax.Array:
    """Ones of the shape and dtype of x, which lie as x does unless `device_mesh`, `tensor_split` or `mesh` is given.

    Inside `jax.jit` nothing lies anywhere yet: there, and for an array of NumPy, it is as `ones`.
    """
    return full_like(x, 1, device_mesh=device_mesh, tensor_split=tensor_split, mesh=mesh, dtype=dtype)


def zeros_like(
    x: Any, *, device_mesh: Sizes = None, tensor_split: Split = None, mesh: Mesh | None = None, dtype: Any = None
) -> jax.Array:
    """Zeros, as `ones_like`."""
    return full_like(x, 0, device_mesh=device_mesh, tensor_split=tensor_split, mesh=mesh, dtype=dtype)


def empty_like(
    x: Any, *, device_mesh: Sizes = None, tensor_split: Split = None, mesh: Mesh | None = None, dtype: Any = None
) -> jax.Array:
    """Zeros, as `empty`; else as `ones_like`."""
    return full_like(x, 0, device_mesh=device_mesh, tensor_split=tensor_split, mesh=mesh, dtype=dtype)


def full_like(
    x: Any,
    fill_value: Any,
    *,
    device_mesh: Sizes = None,
    tensor_split: Split = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
) -> jax.Array:
    """`fill_value` everywhere, as `ones_like`."""
    shape, kind, where = _like(x, device_mesh, tensor_split, mesh)
    return _full(shape, fill_value, kind if dtype is None else dtype, where)


def randn_like(
    x: Any,
    *,
    key: jax.Array,
    device_mesh: Sizes = None,
    tensor_split: Split = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
) -> jax.Array:
    """Normal numbers, as `randn` and `ones_like`."""
    shape, kind, where = _like(x, device_mesh, tensor_split, mesh)
    return _random(jax.random.normal, "randn_like", key, shape, kind if dtype is None else dtype, where)


def rand_like(
    x: Any,
    *,
    key: jax.Array,
    device_mesh: Sizes = None,
    tensor_split: Split = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
) -> jax.Array:
    """Numbers from 0 to 1, as `rand` and `ones_like`."""
    shape, kind, where = _like(x, device_mesh, tensor_split, mesh)
    return _random(jax.random.uniform, "rand_like", key, shape, kind if dtype is None else dtype, where)


def randint_like(
    x: Any,
    *,
    low: int = 0,
    high: int,
    key: jax.Array,
    device_mesh: Sizes = None,
    tensor_split: Split = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
) -> jax.Array:
    """Integers, as `randint` and `ones_like`."""
    shape, kind, where = _like(x, device_mesh, tensor_split, mesh)
    return _randint(shape, low, high, key, kind if dtype is None else dtype, where)


def _like(x: Any, device_mesh: Sizes, tensor_split: Split, mesh: Mesh | None) -> tuple[tuple, Any, Sharding | None]:
    """Shape, dtype and place of an array made after x."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"{type(x).__name__} has no shape and dtype to make an array after; give an array")
    shape, there = tuple(x.shape), getattr(x, "sharding", None)
    # an array that JAX may move, as it made it without a place, says nothing of where another belongs
    if there is not None and getattr(x, "committed", True) and device_mesh is tensor_split is mesh is None:
        return shape, x.dtype, there
    return shape, x.dtype, sharding_for(shape, device_mesh, tensor_split, mesh)


def _full(shape: tuple[int, ...], value: Any, dtype: Any, where: Sharding | None) -> jax.Array:
    number = on_host("fill_value", value)
    if number.ndim:
        raise TypeError(f"fill_value must be one number, got {number.ndim} dims; array() takes the others")
    default = {"i": "int32", "u": "int32", "f": "float32", "c": "complex64"}.get(number.dtype.kind, number.dtype)
    made = checked_dtype(dtype, default, np.generic, "full")
    return _program(jnp.full, where, shape)(checked_values("fill_value", number, made))


def _randint(shape: tuple[int, ...], low: Any, high: Any, key: Any, dtype: Any, where: Sharding | None) -> jax.Array:
    for name, value in (("low", low), ("high", high)):
        if not is_integer(value):
            raise TypeError(f"{name} must be an integer, got {value!r}")
    made = checked_dtype(dtype, "int32", np.integer, "randint")
    if low >= high:
        raise ValueError(f"low {low} is not below high {high}, which is the first integer left out; swap or widen them")
    if low < np.iinfo(made).min or high - 1 > np.iinfo(made).max:
        raise ValueError(f"integers from {low} to {high - 1} are not all of {made.name}; take a wider dtype")
    numbers = checked_key(key)
    return _program(_integers, where, shape, made, int(low), int(high))(numbers)


def _random(
    draw: Callable[..., jax.Array], what: str, key: Any, shape: tuple[int, ...], dtype: Any, where: Sharding | None
) -> jax.Array:
    made = checked_dtype(dtype, "float32", np.floating, what)
    numbers = checked_key(key)
    return _program(_drawn, where, draw, shape, made)(numbers)


@functools.lru_cache(maxsize=4096)
def _program(make: Callable[..., jax.Array], where: Sharding | None, *settings: Any) -> Callable[..., jax.Array]:
    """`make` compiled so that each device computes its part; kept, because a new function would be compiled anew."""
    made = functools.partial(make, *settings)
    if isinstance(where, NamedSharding) and isinstance(where.mesh, AbstractMesh):
        return lambda *inputs: _constrained(made(*inputs), where)  # inside a jit, whose own result then has the mesh
    return jax.jit(made, out_shardings=where)


def _arange(count: int, dtype: np.dtype, start: jax.Array, step: jax.Array) -> jax.Array:
    wide = _wide(dtype)
    places = jnp.arange(count).astype(wide)
    return (start.astype(wide) + places * step.astype(wide)).astype(dtype)


def _linspace(count: int, dtype: np.dtype, endpoint: bool, start: jax.Array, stop: jax.Array) -> jax.Array:
    wide = _wide(dtype)
    first, last = start.astype(wide), stop.astype(wide)
    places, steps = jnp.arange(count), max(count - 1, 1) if endpoint else count
    share = places.astype(wide) / jnp.asarray(steps, wide)
    line = first * (1 - share) + last * share
    return jnp.where(places == (steps if endpoint else -1), last, line).astype(dtype)


def _wide(dtype: np.dtype) -> np.dtype:
    """What is counted in: float32 for shorter floats, as bfloat16 counts only to 256."""
    short = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return np.dtype("float32") if short else dtype


def _eye(shape: tuple[int, int], dtype: np.dtype) -> jax.Array:
    return jnp.eye(*shape, dtype=dtype)


def _drawn(draw: Callable[..., jax.Array], shape: tuple[int, ...], dtype: np.dtype, key: jax.Array) -> jax.Array:
    return draw(jax.random.wrap_key_data(key, impl=THREEFRY), shape, dtype)


def _integers(shape: tuple[int, ...], dtype: np.dtype, low: int, high: int, key: jax.Array) -> jax.Array:
    return jax.random.randint(jax.random.wrap_key_data(key, impl=THREEFRY), shape, low, high, dtype)


def _constrained(x: jax.Array, where: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, where)
