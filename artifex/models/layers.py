"""Annotated layers: linear maps, embeddings and norms whose every parameter names every dim, and rotary positions.

Dims: B batch, T sequence, D embed, H head_dim.
A kernel keeps the dims of what it maps between, such as (embed, heads, head_dim), so that each has its own name.
Layers compute in the dtype of their parameters; norms and angles in float32.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from artifex.models import cpu
from artifex.models.module import Module
from artifex.scaling import axes
from artifex.scaling.execution import current_execution
from artifex.scaling.local import index, local, parts


def parameter(value: jax.Array, *names: str, inputs: int = 0) -> nnx.Param:
    """A parameter whose metadata names each dim of `value` by the vocabulary of `artifex.scaling.axes`.

    `inputs` says that it is a matrix inside the model, between vectors of features, and how many of its dims, those
    before the outputs, are inputs. It is 0 for biases, tables, norms and convolutions, and for maps from data or to
    predictions. Optimizers of matrices read it: `artifex.optim.inputs_of`.
    """
    axes.check_names(names, value.shape, "parameter")
    if not 0 <= inputs < max(len(names), 1):
        raise ValueError(f"parameter {names} has {inputs} input dims; expected 0, or fewer than its {len(names)} dims")
    # eager_sharding off: a model is built, abstractly or not, without any mesh at hand
    return nnx.Param(_strong(value), out_sharding=names, eager_sharding=False, inputs=inputs)


class Buffer(nnx.Variable):
    """State that no gradient reaches: a running mean, a frozen weight.

    A model that changes one does so in `loss` with `rngs` given; training carries the new value to the next step.
    """


class Statistic(Buffer):
    """A `Buffer` of running sums, from which the model derives what goes with its parameters: a codebook, a frequency.

    A run that averages its parameters averages these by the same decay: sums over a longer time, which fit them.
    """


class Frozen(Buffer):
    """A `Buffer` that is a weight of a part that is not trained: computed with in a step's dtype, and never changed."""


def buffer(value: jax.Array, *names: str, kind: type[Buffer] = Buffer) -> Buffer:
    """A `Buffer`, or a `Statistic`, whose metadata names each dim of `value`, as `parameter` does."""
    axes.check_names(names, value.shape, "buffer")
    return kind(_strong(value), out_sharding=names, eager_sharding=False)


def laid_as(weight: nnx.Variable) -> contextlib.AbstractContextManager[None]:
    """Within it, code lays weights out as this one is, which a run may keep from being divided unasked."""
    return axes.claimed_alone() if weight.get_metadata("whole", False) else contextlib.nullcontext()


def freeze(module: nnx.Module) -> nnx.Module:
    """Turn every parameter of `module` into a `Frozen` one, in place: it is saved with the model and never trained."""
    for path, leaf in list(nnx.iter_graph(module)):
        if isinstance(leaf, nnx.Param):
            owner = functools.reduce(_item, path[:-1], module)
            frozen = Frozen(leaf.get_raw_value(), **leaf.get_metadata())
            if isinstance(owner, nnx.Module):
                setattr(owner, str(path[-1]), frozen)
            else:
                owner[path[-1]] = frozen
    return module


class Linear(Module):
    """y = x W + b over one or more trailing dims of x.

    `shape` is (*inputs, *outputs) with `inputs` many input dims; `names` names each. Weights start as a normal
    distribution cut at two deviations, of variance `scale` / (product of the inputs); the bias starts at 0. A map that
    reads data, or puts out what the model predicts, is not `hidden`: see `parameter`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        names: Sequence[str],
        *,
        inputs: int = 1,
        bias: bool = False,
        scale: float = 1.0,
        hidden: bool = True,
        rngs: nnx.Rngs,
    ):
        self.inputs = inputs
        # 0.8796: the standard deviation of a unit normal cut at 2
        std = math.sqrt(scale / math.prod(shape[:inputs])) / 0.8796
        value = std * jax.random.truncated_normal(rngs.params(), -2, 2, tuple(shape))
        self.kernel = parameter(value, *names, inputs=inputs if hidden else 0)
        self.bias = parameter(jnp.zeros(tuple(shape[inputs:])), *names[inputs:]) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = product(x, self.kernel[...], self.inputs)
        return y if self.bias is None else y + _lift(self.bias[...], y.ndim)


def product(x: jax.Array, kernel: jax.Array, inputs: int = 1, out: Any = None) -> jax.Array:
    """The last `inputs` dims of x contracted with the first of the kernel, in dtype `out`; none: that of both.

    The dims stay apart, because two that are split cannot be merged in place, but on one CPU device: see
    `artifex.models.cpu`. Sums across devices, of x W and in both gradients, are taken in the execution's reduce dtype.
    """
    sums = current_execution().reduce_dtype
    if out is None and sums is not None and jnp.dtype(sums).itemsize > x.dtype.itemsize:
        return _summed(x, kernel, inputs, sums)
    if not cpu.merges_dims():
        return jnp.tensordot(x, kernel, inputs, preferred_element_type=out)
    rows, outputs = x.shape[: x.ndim - inputs], kernel.shape[inputs:]
    width = math.prod(kernel.shape[:inputs])
    y = jnp.matmul(x.reshape(-1, width), kernel.reshape(width, -1), preferred_element_type=out)
    return y.reshape(*rows, *outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _summed(x: jax.Array, kernel: jax.Array, inputs: int, dtype: str) -> jax.Array:
    return jnp.tensordot(x, kernel, inputs, preferred_element_type=jnp.dtype(dtype)).astype(x.dtype)


def _summed_backward(inputs: int, dtype: str, saved: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    (x, kernel), rows = saved, saved[0].ndim - inputs
    outputs = list(range(inputs, kernel.ndim))
    product = functools.partial(jnp.tensordot, preferred_element_type=jnp.dtype(dtype))
    dx = product(g, kernel, (list(range(rows, g.ndim)), outputs))
    dkernel = product(x, g, (list(range(rows)), list(range(rows))))
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


_summed.defvjp(lambda x, kernel, inputs, dtype: (_summed(x, kernel, inputs, dtype), (x, kernel)), _summed_backward)


def fused(x: jax.Array, *linears: Linear) -> list[jax.Array]:
    """The outputs of several linear maps of the last dim of x, on one CPU device by one product of their kernels.

    The parameters stay apart, because their names differ, and elsewhere so do the products: joined, a dim that is
    split would have to be laid out anew.
    """
    if not cpu.joins(math.prod(x.shape[:-1])):
        return [linear(x) for linear in linears]
    kernel = jnp.concatenate([linear.kernel[...].reshape(x.shape[-1], -1) for linear in linears], axis=-1)
    shapes = [linear.kernel.shape[1:] for linear in linears]
    ends = itertools.accumulate(math.prod(shape) for shape in shapes)
    parts = jnp.split(product(x, kernel), list(ends)[:-1], axis=-1)
    outputs = [part.reshape(*x.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)]
    biases = [linear.bias for linear in linears]
    return [y if bias is None else y + _lift(bias[...], y.ndim) for y, bias in zip(outputs, biases, strict=True)]


def take_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows (..., D) of `table` (N, D) for integer `ids` (...); NaN for ids outside [0, N).

    Indexing would take the last row for those beyond, and count negative ones from the end: a loss would be plausible.
    """
    return table.at[ids].get(mode="fill", wrap_negative_indices=False)


def take_words(table_VD: jax.Array, ids: jax.Array) -> jax.Array:
    """`take_rows` of a table whose entries are `vocab`, for ids (B,) or (B, T), which may be split over devices.

    Each takes what lies in its part, zeros for the rest, and the parts are summed, by which no number changes. So the
    parts are gathered over the devices that divide the batch and not the tokens, and no gather crosses the entries that
    are split, on which XLA aborts inside a region that is manual over another axis.
    """
    count = axes.ways(("act_vocab",), table_VD.shape[:1])[0]
    names = ("batch", "sequence")[: ids.ndim]
    if count == 1:
        lay = functools.partial(axes.shard_as_read, names=names, weight=("vocab", "embed"), shape=table_VD.shape)
        return lay(take_rows(table_VD, lay(ids)))
    take = local(
        _words_of_part, inputs=[("act_vocab", None), (*names, "act_vocab")], outputs=(*names, "act_vocab", None)
    )
    of_parts = take(table_VD, jnp.broadcast_to(ids[..., None], (*ids.shape, count)))
    # jnp.sum would send float32; of the parts all but one are 0
    return axes.shard(jax.lax.reduce_sum(of_parts, (of_parts.ndim - 2,)), *names, "hidden")


def _words_of_part(table_VD: jax.Array, ids: jax.Array) -> jax.Array:
    size = table_VD.shape[0]
    place = ids - index("act_vocab") * size
    here, known = (place >= 0) & (place < size), (ids >= 0) & (ids < parts("act_vocab") * size)
    rows = take_rows(table_VD, jnp.where(here, place, 0))
    return jnp.where(here[..., None], rows, jnp.where(known, 0, jnp.nan)[..., None].astype(rows.dtype))


def take_of_few(table: jax.Array, ids: jax.Array) -> jax.Array:
    """`take_rows` of a small table, gathered first: that costs little, and XLA aborts on some layouts of its rows and
    of the ids inside a region that is manual over another axis."""
    return take_rows(axes.shard(table, None, None), ids)


class Embed(Module):
    """A table of `count` learned vectors; `names` are those of its two dims."""

    def __init__(self, count: int, features: int, names: Sequence[str], *, std: float = 0.02, rngs: nnx.Rngs):
        self.take = take_words if names[0] == "vocab" else take_of_few
        self.table = parameter(std * jax.random.normal(rngs.params(), (count, features)), *names)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Rows (..., D) for integer `ids` (...); NaN where an id is not in [0, count)."""
        with laid_as(self.table):
            return self.take(self.table[...], ids)


class RMSNorm(Module):
    """x / rms(x) * scale over the last dim, in float32. Zhang and Sennrich 2019 (arXiv:1910.07467)."""

    def __init__(self, features: int, name: str = "embed", *, eps: float = 1e-5):
        self.eps = eps
        self.scale = parameter(jnp.ones(features), name)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return x32.astype(x.dtype) * _lift(self.scale[...], x.ndim)


class LayerNorm(Module):
    """(x - mean) / std * scale + bias over the last dim, in float32. Ba et al. 2016 (arXiv:1607.06450)."""

    def __init__(self, features: int, name: str = "embed", *, eps: float = 1e-5, bias: bool = True):
        self.eps = eps
        self.scale = parameter(jnp.ones(features), name)
        self.bias = parameter(jnp.zeros(features), name) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        y = x32.astype(x.dtype) * _lift(self.scale[...], x.ndim)
        return y if self.bias is None else y + _lift(self.bias[...], x.ndim)


def rope_frequencies(head_dim: int, theta: float, factor: float = 1.0, original_length: int = 8_192) -> np.ndarray:
    """Angles per position, (H/2,): theta^(-2i/H). Su et al. 2021 (arXiv:2104.09864).

    With `factor` above 1, Llama 3's scaling (arXiv:2407.21783): wavelengths longer than `original_length` turn
    `factor` times slower, those shorter than a quarter of it stay, and in between the two are blended.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if factor == 1:
        return frequencies
    turns = original_length * frequencies / (2 * math.pi)  # full turns within the original length
    keep = np.clip((turns - 1) / (4 - 1), 0, 1)
    return (frequencies * (keep + (1 - keep) / factor)).astype(np.float32)


def rope(
    x: jax.Array, positions: jax.Array | np.ndarray, frequencies: np.ndarray, below: int | None = None
) -> jax.Array:
    """Turn the pairs (i, i + H/2) of x (B, T, ..., H) by position, (T,) or (B, T), times frequency.

    NumPy positions make sines and cosines constants of the program; of others, XLA computes them again in every loop
    that reads them. Where all are known to be `below` a number, they are looked up on one CPU device.
    """
    cos, sin = _turns(positions, frequencies, below)
    shape = (*positions.shape, *(1,) * (x.ndim - 3), cos.shape[-1])
    shape = shape if positions.ndim == 2 else (1, *shape)
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _turns(positions: jax.Array | np.ndarray, frequencies: np.ndarray, below: int | None) -> tuple[Any, Any]:
    """Cosines and sines (..., H/2) of positions (...) times frequency."""
    if below is not None and isinstance(every := cpu.positions(below), np.ndarray):
        cos, sin = _turns(every, frequencies, None)
        return jnp.asarray(cos)[positions], jnp.asarray(sin)[positions]
    xp = np if isinstance(positions, np.ndarray) else jnp
    # float32: bfloat16 rounds 257 to 256, and sin(257) != sin(256)
    angles = positions.astype(np.float32)[..., None] * frequencies.reshape(*(1,) * positions.ndim, -1)
    return xp.cos(angles), xp.sin(angles)


def dropout(
    x: jax.Array, rate: float, key: jax.Array | None, arranged: Callable[[jax.Array], jax.Array] | None = None
) -> jax.Array:
    """Zero a fraction `rate` of x and scale up the rest; without a key, x as it is.

    `arranged` puts what is drawn into the order of x, so that an order changes no number.
    """
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    kept = kept if arranged is None else arranged(kept)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def noise_key(rngs: nnx.Rngs | None, index: int | jax.Array = 0) -> jax.Array:
    """The key of a loss's noise: a new one of `rngs`, or without them, in validation, that of batch `index`."""
    return jax.random.fold_in(jax.random.key(0), index) if rngs is None else rngs.noise()


def strata(count: int, key: jax.Array) -> jax.Array:
    """`count` numbers in (0, 1], one in each of as many equal parts, at the same random place in each, in any order.

    Kingma et al. 2021 (arXiv:2107.00630), appendix I.1: each alone is uniform, and their mean varies less. Drawn in
    any order, so that any rows of a batch, such as those that are no padding, have numbers from all of (0, 1].
    """
    place_key, order_key = jax.random.split(key)
    ordered = (jnp.arange(count, dtype=jnp.float32) + 1 - jax.random.uniform(place_key)) / count
    return jax.random.permutation(order_key, ordered)


def _strong(value: jax.Array) -> jax.Array:
    """`value` with a dtype of its own: a step would trace once more for one that was only implied, as by `jnp.full`."""
    return jax.lax.convert_element_type(value, value.dtype)


def _item(node: Any, key: Any) -> Any:
    return getattr(node, key) if isinstance(key, str) and hasattr(node, key) else node[key]


def _lift(value: jax.Array, ndim: int) -> jax.Array:
    """`value` with leading dims of size 1, up to `ndim`."""
    return value.reshape((1,) * (ndim - value.ndim) + value.shape)
