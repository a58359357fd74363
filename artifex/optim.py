"""Configuration -> optax chain: schedule, clipping, optimizer, weight-decay mask."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util

from artifex.config import OptimizerConfig
from artifex.muon import muon
from artifex.scaling.stacks import stacked


def make_schedule(cfg: OptimizerConfig, steps: int) -> Callable[[Any], Any]:
    """Learning rate by step: linear warm-up from 0, then `cfg.schedule` down to its final fraction at `steps`."""
    peak, final = cfg.learning_rate, cfg.learning_rate * cfg.final_learning_rate_fraction
    rest = max(steps - cfg.warmup_steps, 1)
    if cfg.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=cfg.final_learning_rate_fraction)
    elif cfg.schedule == "linear":
        after = optax.linear_schedule(peak, final, rest)
    else:
        after = optax.constant_schedule(peak)
    if cfg.warmup_steps:
        # from 1 / warmup_steps, not 0: no step is spent without learning
        warmup = optax.linear_schedule(peak / cfg.warmup_steps, peak, max(cfg.warmup_steps - 1, 1))
        after = optax.join_schedules([warmup, after], [cfg.warmup_steps])
    return _promoting(after)


def inputs_of(params: nnx.State) -> Any:
    """How many dims of each parameter are inputs, 0 where it is no matrix inside the model: nested dicts of numbers."""
    known = nnx.to_flat_state(params)
    return traverse_util.unflatten_dict({path: leaf.get_metadata().get("inputs", 0) for path, leaf in known})


def make_optimizer(
    cfg: OptimizerConfig, steps: int, names: Any, inputs: Any, shardings: Any = None
) -> optax.GradientTransformation:
    """The optax chain for a tree of parameters whose logical axes are `names` (same tree, a tuple at each leaf).

    `inputs`, the same tree, is that of `inputs_of`: Muon (Jordan 2024) takes the matrices inside the model, with update
    sizes matched to AdamW's (Liu et al. 2025, arXiv:2502.16982); the rest goes to AdamW. Weight decay takes what has
    two dims or more and is no bias: kernels and tables. Repeated blocks and experts count as parameters of their own.
    On a mesh, `shardings`, the same tree, says where the optimizer's arrays of each live; the numbers are the same.
    """
    rate = make_schedule(cfg, steps)
    decayed = _map_names(lambda path, axes: path[-1].key != "bias" and len(axes) - stacked(axes) > 1, names)
    if cfg.name == "adamw":
        chosen = optax.adamw(rate, b1=cfg.beta1, b2=cfg.beta2, eps=cfg.eps, weight_decay=cfg.weight_decay, mask=decayed)
    elif cfg.name == "lion":
        chosen = optax.lion(rate, b1=cfg.beta1, b2=cfg.beta2, weight_decay=cfg.weight_decay, mask=decayed)
    elif cfg.name == "adafactor":
        # optax.adafactor decays by weight_decay alone; here, as in the others, it is times the learning rate
        chosen = optax.chain(
            optax.scale_by_factored_rms(),
            clip_by_rms(names),
            optax.add_decayed_weights(cfg.weight_decay, decayed),
            optax.scale_by_learning_rate(rate),
        )
    elif cfg.name == "muon":
        direction = muon(
            names,
            inputs,
            beta=cfg.momentum,
            adam_b1=cfg.beta1,
            adam_b2=cfg.beta2,
            eps=cfg.eps,
            shardings=shardings,
        )
        chosen = optax.chain(
            direction,
            optax.scale(-1.0),  # the rate comes after the decay
            optax.add_decayed_weights(cfg.weight_decay, decayed),
            optax.scale_by_learning_rate(rate),
        )
    else:
        chosen = optax.chain(
            optax.add_decayed_weights(cfg.weight_decay, decayed), optax.sgd(rate, momentum=cfg.momentum or None)
        )
    if cfg.clip_norm is not None:
        chosen = optax.chain(optax.clip_by_global_norm(cfg.clip_norm), chosen)
    return optax.GradientTransformation(chosen.init, _promoting(chosen.update))


def clip_by_rms(names: Any, threshold: float = 1.0) -> optax.GradientTransformation:
    """Each parameter's update divided by max(1, rms / threshold): Shazeer and Stern 2018 (arXiv:1804.04235), (5).

    optax's own would take one rms of all layers of a stack.
    """

    def clip(_: Any, axes: tuple[str, ...], update: jax.Array) -> jax.Array:
        own = tuple(range(stacked(axes), update.ndim))
        rms = jnp.sqrt(jnp.mean(jnp.square(update), axis=own, keepdims=True))
        return update / jnp.maximum(1.0, rms / threshold)

    return optax.stateless(lambda updates, _: _map_names(clip, names, updates))


def _promoting(function: Callable) -> Callable:
    """`function` with JAX's ordinary promotion: optax mixes its integer step count with floats."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return call


def _map_names(function: Callable, names: Any, *trees: Any) -> Any:
    is_names = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree_util.tree_map_with_path(function, names, *trees, is_leaf=is_names)
