"""A training run of the package as the benchmarks time it: one device, a constant learning rate, no clipping.

Also runs by older checkouts of the package, which `--against` compares with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from workers import Built

import artifex
from artifex.config import Config
from artifex.scaling.plan import Plan
from artifex.training import step as training
from artifex.training.state import Blueprint, TrainState, blueprint

ADAMW: dict[str, Any] = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def build(model: dict[str, Any], data: dict[str, Any], settings: dict[str, Any], rate: float) -> Blueprint:
    """The run of these sections of a configuration, trained as optax's `adamw(rate, **ADAMW)` does."""
    renamed = {"b1": "beta1", "b2": "beta2"}
    optimizer = {renamed.get(name, name): value for name, value in ADAMW.items()}
    optimizer |= {"name": "adamw", "learning_rate": rate, "schedule": "constant", "warmup_steps": 0, "clip_norm": None}
    config = Config.from_dict({"model": model, "data": data, "training": settings, "optimizer": optimizer})
    plan = Plan.from_device(config.device, 1)
    return blueprint(config, plan, plan.make_mesh(jax.devices()[:1]))


def training_step(blue: Blueprint, state: TrainState, rows: dict[str, Any]) -> Built:
    """A training step of `state`, which is copied, on one batch."""
    rows = jax.device_put(rows, blue.batch_sharding(rows))
    # before Blueprint.loss it was a function of the blueprint
    loss = blue.loss if hasattr(blue, "loss") else getattr(training, "make_loss")(blue)  # noqa: B009
    computed: dict[str, Any] = measured(lambda params: loss(params, state.buffers, rows, None)[0], state.params)
    step, state = training.make_step(blue), jax.tree.map(jnp.copy, state)
    if jax.default_backend() == "gpu" and hasattr(artifex, "profile"):
        with artifex.profile(step) as prof:
            for _ in range(4):
                state, _ = prof.step(state, rows)
        computed["kinds"] = dict(prof.result.time_by("kind"))

    def call() -> jax.Array:
        nonlocal state
        state, metrics = step(state, rows)
        return metrics["loss"]

    return Built(call, computed)


def measured(loss: Callable[[Any], jax.Array], params: Any) -> dict[str, float]:
    """The loss and the norm of its gradient."""
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    return {"loss": float(value), "norm of its gradient": float(optax.global_norm(grads))}
