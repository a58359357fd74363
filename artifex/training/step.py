"""The compiled training step: a pure function of (state, batch) with donated state and pinned shardings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from artifex.optim import make_schedule
from artifex.scaling.program import Program
from artifex.training import finite
from artifex.training.freezing import join
from artifex.training.pipelined import pipelined
from artifex.training.precision import in_dtype
from artifex.training.spill import fetched
from artifex.training.state import Blueprint, TrainState, within

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_step(blue: Blueprint) -> Program:
    """`step(state, batch) -> (state, metrics)`, compiled on first use; the state's buffers are reused.

    Metrics are scalars: `loss`, `grad_norm` before clipping, `learning_rate`, what the model reports, and the number by
    which `finite.told` names what is not finite. With `training.not_finite` "skip" a loss or gradient that is not
    finite changes nothing but the step's number, as with `optax.apply_if_finite`.
    """
    schedule = make_schedule(blue.config.optimizer, blue.config.training.steps)
    decay = blue.config.training.ema_decay
    gradients, skips = _gradients(blue), blue.config.training.not_finite == "skip"

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        loss, metrics, buffers, grads = gradients(state.params, state.buffers, batch, key)
        trained, held = blue.split(state.params)
        # the optimizer computes in float32, whatever parameters and gradients are kept in
        grads, trained = in_dtype(grads, "float32"), in_dtype(trained, "float32")
        moments, averaged = fetched((state.optimizer, state.ema), (blue.shardings.optimizer, blue.shardings.ema))
        with jax.named_scope("optimizer"):
            updates, optimizer = blue.optimizer.update(grads, moments, trained)
            trained = optax.apply_updates(trained, updates)
        ema, ema_buffers = averaged, state.ema_buffers
        if decay is not None:
            # warms up as (1 + t) / (10 + t), so that the average forgets the random start
            t = state.step.astype(jnp.float32)
            kept = jnp.minimum(decay, (1 + t) / (10 + t))
            averages = (blue.split(ema)[0], ema_buffers)
            latest = (trained, within(buffers, ema_buffers))
            average, ema_buffers = jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, averages, latest)
            ema = join(average, blue.split(ema)[1])
        params = join(in_dtype(trained, blue.config.training.param_dtype), held)
        after = TrainState(state.step + 1, params, buffers, optimizer, ema, ema_buffers, state.key)
        norm = optax.tree.norm(grads)
        if skips:
            good = jnp.isfinite(loss) & jnp.isfinite(norm)
            before = dataclasses.replace(state, step=after.step, optimizer=moments, ema=averaged)
            after = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, before)
        rate = schedule(_updates(moments, state.step) if skips else state.step)
        told = {"loss": loss, "grad_norm": norm, "learning_rate": jnp.asarray(rate, jnp.float32)}
        return after, metrics | told | {finite.METRIC: finite.first_of(blue, finite.looked_at(grads, after))}

    whole = NamedSharding(blue.mesh, PartitionSpec())
    # pinned: XLA would change the layout of some outputs, and a resumed run would no longer be bitwise equal
    return Program(step, blue.compiler_options, donate_argnums=0, out_shardings=(blue.shardings, whole))


def _updates(moments: Any, step: jax.Array) -> jax.Array:
    """How many updates an optimizer has made by its own count, by which it takes its rate; fewer than the steps where
    some were skipped."""
    counts = [count for _, count in optax.tree.get_all_with_path(moments, "count")]
    return functools.reduce(jnp.maximum, counts) if counts else step


def _gradients(blue: Blueprint) -> Callable:
    """`gradients(params, buffers, batch, key) -> (loss, metrics, buffers, grads)` over all microbatches; `grads` are of
    the parameters that are not frozen.

    Each microbatch is weighed by its targets, and changes the buffers that the next one sees.
    """

    def plain(params: Any, *rest: Any) -> tuple[tuple[jax.Array, tuple[Metrics, Any]], Any]:
        trained, held = blue.split(params)
        value, grads = jax.value_and_grad(lambda trained: blue.loss(join(trained, held), *rest), has_aux=True)(trained)
        return value, in_dtype(grads, blue.config.training.gradient_dtype)

    of_batch = plain if blue.plan.pipeline is None else pipelined(blue)

    def value_and_grad(*args: Any) -> tuple[tuple[jax.Array, tuple[Metrics, Any]], Any]:
        value, grads = of_batch(*args)
        return value, blue.laid_out(grads)

    parts = blue.plan.microbatches

    def whole(params: Any, buffers: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics, Any, Any]:
        (loss, (metrics, buffers)), grads = value_and_grad(params, buffers, batch, key)
        return loss, metrics, buffers, grads

    once = jax.jit(value_and_grad, inline=True)  # traced once, for its shapes and in the loop

    def accumulated(params: Any, buffers: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics, Any, Any]:
        def add(carry: tuple[Any, Any], part: tuple[Batch, jax.Array]) -> tuple[tuple[Any, Any], None]:
            (sums, buffers), (batch, index) = carry, part
            (loss, (metrics, buffers)), grads = once(params, buffers, batch, jax.random.fold_in(key, index))
            weight = metrics.pop("weight")
            weighed = jax.tree.map(lambda value: weight.astype(value.dtype) * value, (loss, metrics, grads))
            *sums, grads = jax.tree.map(jnp.add, sums, (weight, *weighed))
            # as the update reads them: gradients that stay whole (`zero` 1) would be gathered again in each turn
            return ((*sums, blue.laid_out(grads, "optimizer")), buffers), None

        # row r goes to part r % parts: a device keeps its own rows
        split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
        first = jax.tree.map(lambda x: x[0], split)
        (_, (shapes, _)), like = jax.eval_shape(once, params, buffers, first, key)
        shapes = {name: shape for name, shape in shapes.items() if name != "weight"}
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes, like))
        start = (jnp.float32(0), jnp.float32(0), *zeros)
        ((weight, *sums), buffers), _ = jax.lax.scan(add, (start, buffers), (split, jnp.arange(parts)))
        weight_or_1 = jnp.maximum(weight, 1.0)
        loss, metrics, grads = jax.tree.map(lambda total: total / weight_or_1.astype(total.dtype), tuple(sums))
        return loss, metrics | {"weight": weight}, buffers, grads

    return whole if parts == 1 else accumulated


def make_evaluate(blue: Blueprint) -> Callable[..., Metrics]:
    """`evaluate(state, batch, index=0)`: `weight`, and `loss` and every metric times it, so that batches add up.

    `index` counts the batches, each of which has noise of its own. Compiled on first use; the weights are
    `state.weights`, with the buffers that go with them.
    """

    def evaluate(weights: Any, buffers: Any, batch: Batch, index: jax.Array) -> Metrics:
        mean, (metrics, _) = blue.loss(weights, buffers, batch, None, index)
        weight = metrics.pop("weight")
        return {name: value * weight for name, value in (metrics | {"loss": mean}).items()} | {"weight": weight}

    compiled = Program(evaluate, blue.compiler_options)
    return lambda state, batch, index=0: compiled(state.weights, state.weights_buffers, batch, np.int32(index))
