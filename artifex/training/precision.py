"""The model of a step: parameters and frozen weights in its compute dtype, running values as they are.

The state holds all of them in float32. Cast copies live as long as a step, and frozen weights leave it as they came.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from artifex.models.layers import Frozen
from artifex.training.freezing import join


def in_dtype(tree: Any, dtype: str) -> Any:
    """A tree of floating-point arrays in another dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), tree)


def model_in(dtype: str, graphdef: Any, params: Any, buffers: Any) -> Any:
    """The model of nested dicts `params` and `buffers`; the first, and what is `Frozen` of the second, in `dtype`."""
    model = nnx.merge(graphdef, in_dtype(params, dtype), buffers)
    nnx.update(model, in_dtype(nnx.state(model, Frozen), dtype))
    return model


def carried(model: Any, buffers: Any) -> Any:
    """`buffers` for the next step: what the model has changed, and the very arrays in `buffers` of what is `Frozen`."""
    _, _, _, running = nnx.split(model, nnx.Param, Frozen, ...)
    return join(buffers, nnx.to_pure_dict(running))
