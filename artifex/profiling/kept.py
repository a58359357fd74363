"""What the forward pass keeps for the backward pass: the activations of a step, by its trace."""

from __future__ import annotations

from typing import Any

import jax

from artifex.scaling.autodist.layouts import lay_out
from artifex.scaling.autodist.program import read
from artifex.training.freezing import join
from artifex.training.memory import CompiledStep, placed_batch


def kept_bytes(step: CompiledStep) -> int | None:
    """Bytes of a device that lie between the two passes of one microbatch, besides parameters and batch: what the
    backward pass reads, laid out as the planner has it. None for a pipeline, whose stages keep their streams alone."""
    blue = step.blue
    if blue.plan.pipeline is not None:
        return None
    shapes = {
        name: ((shape[0] // blue.plan.microbatches, *shape[1:]), kind) for name, (shape, kind) in step.shapes.items()
    }
    given = (blue.state.params, blue.state.buffers, placed_batch(blue, shapes), blue.state.key)

    def residuals(params: Any, buffers: Any, batch: Any, key: Any) -> list[Any]:
        trained, held = blue.split(params)
        rngs = jax.random.wrap_key_data(key)
        _, back, _ = jax.vjp(lambda own: blue.loss(join(own, held), buffers, batch, rngs), trained, has_aux=True)
        return jax.tree.leaves(back)

    jaxpr = jax.jit(residuals).trace(*given).jaxpr
    program = read(jaxpr, tuple(leaf.sharding for leaf in jax.tree.leaves(given)), ())
    sizes = blue.plan.sizes
    lay_out(program, sizes)
    there = {id(value) for value in program.ins}
    outs = {id(value): value for value in program.outs if value is not None and id(value) not in there}
    return round(sum(value.bytes(sizes) for value in outs.values()))
