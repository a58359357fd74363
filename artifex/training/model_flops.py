"""FLOPs that a model needs to learn from a batch, whatever is computed beside: what model FLOPs utilisation counts.

Three times the products of the loss, of which the backward pass has two for each, and once those through which no
gradient goes: noise, and an encoder's latents. So neither what `remat` computes again nor idle turns of a pipeline
count (Chowdhery et al. 2022, PaLM, appendix B). Attention counts by the blocks in which a query sees a key.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh

from artifex.config import Config
from artifex.scaling.flops import flops
from artifex.training.memory import placed_batch
from artifex.training.precision import model_in
from artifex.training.state import Blueprint, blueprint, planned
from artifex.training.task import batch_shapes


def model_flops(config: Config) -> float:
    """FLOPs of a step, all devices together; traced in a second or so, nothing is compiled or allocated.

    Where only some parameters are trained (`training.freeze`), the products that make the gradients of the others count
    though nobody needs them.
    """
    blue = _on_one_device(config)
    batch: Any = placed_batch(blue, batch_shapes(blue.config))
    state = blue.state
    whole = _count(lambda params, buffers, batch: blue.loss(params, buffers, batch, None)[0], blue, batch)
    if not hasattr(nnx.merge(blue.graphdef, state.params, state.buffers), "prepare"):
        return 3 * whole
    return 3 * whole - 2 * _count(lambda *given: _prepared(blue, *given), blue, batch)


def _on_one_device(config: Config) -> Blueprint:
    """The run with one loop for its layers and nothing computed twice, on a device that reads each expert once."""
    values = config.to_dict()
    values["device"] = {"data": 1}
    values["training"] |= {"remat": "none", "gradient_accumulation": 1, "unroll": 1, "attention": "blockwise"}
    values["training"] |= {"spill_threshold_mb": None}
    config = Config.from_dict(values)
    plan = planned(config, 1)
    device = AbstractDevice(device_kind="tpu", num_cores=None, platform="tpu")
    return blueprint(config, plan, AbstractMesh(plan.mesh_shape, plan.axis_names, abstract_device=device))  # pyright: ignore


def _prepared(blue: Blueprint, params: Any, buffers: Any, batch: Any) -> Any:
    return model_in(blue.config.training.compute_dtype, blue.graphdef, params, buffers).prepare(batch, None, 0)[0]


def _count(function: Any, blue: Blueprint, batch: Any) -> float:
    count = flops(jax.jit(function).trace(blue.state.params, blue.state.buffers, batch).jaxpr)
    return math.inf if count.open_loops else count.total
