"""Configuration -> optax chain: schedule, clipping, optimizer, weight-decay mask."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from artifex.config import OptimizerConfig

TABLES = {"vocab", "positions", "classes", "codes"}  # a row each for an id: looked up, so never a matrix for Muon
BATCHED = {"layers", "experts"}  # dims that count matrices


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


def make_optimizer(cfg: OptimizerConfig, steps: int, names: Any) -> optax.GradientTransformation:
    """The optax chain for a tree of parameters whose logical axes are `names` (same tree, a tuple at each leaf).

    Weight decay leaves out biases and norm scales. Muon (Jordan 2024) takes the matrices inside the model, by their
    names, with update sizes matched to AdamW's (Liu et al. 2025, arXiv:2502.16982); tables, heads, norms and biases
    go to AdamW.
    """
    rate = make_schedule(cfg, steps)
    decayed = _map_names(lambda path, _: path[-1].key not in ("bias", "scale"), names)
    if cfg.name == "adamw":
        chosen = optax.adamw(rate, b1=cfg.beta1, b2=cfg.beta2, eps=cfg.eps, weight_decay=cfg.weight_decay, mask=decayed)
    elif cfg.name == "lion":
        chosen = optax.lion(rate, b1=cfg.beta1, b2=cfg.beta2, weight_decay=cfg.weight_decay, mask=decayed)
    elif cfg.name == "adafactor":
        # optax.adafactor decays by weight_decay alone; here, as in the others, it is times the learning rate
        chosen = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(cfg.weight_decay, decayed),
            optax.scale_by_learning_rate(rate),
        )
    elif cfg.name == "muon":
        direction = muon(
            1.0,  # the rate comes after the decay: optax's own would decay norms as well
            beta=cfg.momentum,
            adam_b1=cfg.beta1,
            adam_b2=cfg.beta2,
            eps=cfg.eps,
            muon_weight_dimension_numbers=_map_names(lambda path, axes: matrix_dims(axes), names),
            consistent_rms=0.2,
        )
        chosen = optax.chain(
            direction,
            optax.scale(-1.0),
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


def matrix_dims(names: tuple[str, ...]) -> MuonDimensionNumbers | None:
    """Which dims of a weight are a matrix's inputs and outputs, by its logical axes; None where it is no matrix.

    A weight that reads the residual stream has `embed` first and everything after it is output; any other weight
    has one output dim, the last.
    """
    dims = [dim for dim, name in enumerate(names) if name not in BATCHED]
    if len(dims) < 2 or TABLES & set(names) or "embed" not in names:
        return None
    split = 1 if names[dims[0]] == "embed" else len(dims) - 1
    return MuonDimensionNumbers(tuple(dims[:split]), tuple(dims[split:]))


def _promoting(function: Callable) -> Callable:
    """`function` with JAX's ordinary promotion: optax mixes its integer step count with floats."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return call


def _map_names(function: Callable[[Any, tuple[str, ...]], Any], names: Any) -> Any:
    return jax.tree_util.tree_map_with_path(function, names, is_leaf=lambda node: isinstance(node, tuple))
