"""What an array may be made of: its dtype, shape, numbers and key, checked before anything is computed."""

from __future__ import annotations

import difflib
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

THREEFRY = "threefry2x32"
"""The kind of keys whose numbers each device can draw for its own part."""

DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "float32", "float64", "complex64", "complex128"),
)
"""What `dtype` may name; those of 64 bits a number, and complex128, need `jax_enable_x64`."""


def is_integer(value: Any) -> bool:
    """Whether it is one of Python's or NumPy's integers, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def checked_dtype(dtype: Any, default: Any, kind: Any, what: str) -> np.dtype:
    """`dtype` or else `default` as NumPy's, of the abstract `kind`.

    Raises `TypeError` for what is no dtype, and `ValueError` for a name that is unknown, a dtype that JAX would change
    for another, and one of another kind.
    """
    asked = default if dtype is None else dtype
    if isinstance(asked, type):
        asked = {bool: "bool", int: "int32", float: "float32", complex: "complex64"}.get(asked, asked)
    try:
        found = np.dtype(asked)
    except TypeError:
        if not isinstance(asked, str):
            raise TypeError(f"dtype must be a dtype or the name of one, got {asked!r}") from None
        near = difflib.get_close_matches(asked, DTYPES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(DTYPES)}"
        raise ValueError(f"unknown dtype {asked!r}: {hint}") from None
    if found.name not in DTYPES:
        raise ValueError(f"dtype {found.name} is none that arrays have here; known are {', '.join(DTYPES)}")
    made = jax.dtypes.canonicalize_dtype(found)
    if made != found:
        raise ValueError(
            f"dtype {found.name} needs jax_enable_x64, without which JAX makes {made.name} of it; ask for {made.name}, "
            "or jax.config.update('jax_enable_x64', True)"
        )
    if not jax.numpy.issubdtype(found, kind):
        wanted = {np.floating: "a float", np.integer: "an integer", np.number: "a number"}[kind]
        raise ValueError(f"{what} makes no {found.name}; its dtype is {wanted}'s")
    return found


def checked_shape(what: str, shape: tuple[Any, ...]) -> tuple[int, ...]:
    """The sizes of a shape given as integers or as one tuple of them."""
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], list | tuple) else shape
    if not all(map(is_integer, sizes)):
        raise TypeError(f"the shape of {what} must be integers, or one tuple of them, got {shape!r}")
    if any(size < 0 for size in sizes):
        raise ValueError(f"shape {sizes} of {what} has a dim below 0; each is at least 0")
    return tuple(int(size) for size in sizes)


def checked_number(name: str, value: Any) -> int | float:
    """`value` as one of Python's numbers; `TypeError` for what is none, `ValueError` for one that is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be finite")
    return int(value) if is_integer(value) else float(value)


def on_host(what: str, value: Any) -> np.ndarray:
    """`value` as an array of NumPy; `TypeError` for what is none, or none of numbers."""
    try:
        found = np.asarray(value)
    except ValueError as error:
        raise TypeError(f"{what} is no array: {error}; give lists of one length in each dim") from None
    # the small floats are NumPy's kind V, as records are, but registered
    if found.dtype.kind not in "biufc" and found.dtype.isbuiltin != 2:
        raise TypeError(f"{what} must be numbers, got {type(value).__name__} of dtype {found.dtype}")
    return found


def checked_values(what: str, values: Any, dtype: np.dtype) -> np.ndarray:
    """`values` of the host in `dtype`; `ValueError` where that has no such number. Floats are rounded."""
    before = np.asarray(values)
    if before.dtype == dtype:
        return before
    if np.iscomplexobj(before) and not np.issubdtype(dtype, np.complexfloating):
        raise ValueError(f"{what}: {dtype.name} has no complex numbers; take the real part, or dtype complex64")
    with np.errstate(over="ignore", invalid="ignore"):
        after = before.astype(dtype)
        if jnp.issubdtype(dtype, jnp.inexact):
            wrong = np.isfinite(before) & ~np.isfinite(after)
        else:
            exact = before.dtype if before.dtype.kind in "biu" else np.dtype("float64")
            # -1 becomes a large number of a dtype without signs, and that is -1 again on its way back
            wrong = (after.astype(exact) != before.astype(exact)) | ((after < 0) != (before < 0))
    if np.any(wrong):
        raise ValueError(f"{what}: {before[wrong].flat[0]} is no {dtype.name}; take a wider dtype, or round it first")
    return after


def checked_key(key: Any) -> Any:
    """The two numbers of `key`, of the host where they are known, so that they go to whichever devices need them.

    Raises `TypeError` for what is no key, `ValueError` for one whose numbers would depend on how an array is split.
    """
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed and (not isinstance(key, jax.Array) or key.dtype != np.uint32 or key.shape != (2,)):
        got = f"an array of {key.dtype} {key.shape}" if isinstance(key, jax.Array) else repr(key)
        raise TypeError(f"key must be a key of jax.random, such as jax.random.key(0), got {got}")
    if typed and key.shape:
        raise TypeError(f"key must be one key, got {key.shape} of them; draw with each, or take one by its index")
    kind = str(jax.random.key_impl(key))
    if kind != THREEFRY:
        raise ValueError(
            f"numbers of a key of {kind} depend on how an array is split; make it by "
            f"jax.random.key(seed, impl={THREEFRY!r})"
        )
    if not jax.config.jax_threefry_partitionable:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(
            "jax_threefry_partitionable is off, without which numbers depend on how an array is split; "
            "jax.config.update('jax_threefry_partitionable', True), or leave JAX_THREEFRY_PARTITIONABLE unset"
        )
    data = jax.random.key_data(key)
    return data if isinstance(data, Tracer) else np.asarray(data)
