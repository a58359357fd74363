"""Frozen weights are computed with in the step's dtype, and the state keeps them as they are."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from artifex.config import Config
from artifex.models import layers
from artifex.scaling.plan import Plan
from artifex.training.state import blueprint
from artifex.training.step import make_step

MODEL = {
    "name": "latent-dit-digits",
    "network": {"embed_dim": 16, "num_layers": 1, "num_heads": 2},
    "autoencoder": {"block_channels": [8, 8], "mid_attention": False, "latent_shift": 0.0, "latent_scale": 1.0},
}
VQ = {"name": "vq-digits", "block_channels": [8], "groups": 4, "codes": 8, "latent_dim": 4}


def built(model: dict, dtype: str, **training):
    training = {"batch_size": 8, "compute_dtype": dtype, **training}
    cfg = Config.from_dict({"model": model, "data": {"source": "digits"}, "training": training})
    plan = Plan.from_device(cfg.device, 1, microbatches=cfg.training.gradient_accumulation)
    return blueprint(cfg, plan, plan.make_mesh(jax.devices()[:1]))


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"image": rng.uniform(-1, 1, (8, 8, 8, 1)).astype(np.float32), "label": np.arange(8, dtype=np.int32)}


def convolutions(jaxpr) -> list[jnp.dtype]:
    """The dtypes of both operands of every convolution of a program."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            found += [operand.aval.dtype for operand in equation.invars]
        for inner in jaxprs_in_params(equation.params):
            found += convolutions(inner)
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_frozen_encoder_computes_in_the_dtype_of_the_step_and_passes_through(dtype):
    blue = built(MODEL, dtype)
    given = blue.state.params, blue.state.buffers, batch(), jax.random.key(0)
    program, (_, (_, buffers)) = jax.make_jaxpr(blue.loss, return_shape=True)(*given)
    assert set(convolutions(program.jaxpr)) == {jnp.dtype(dtype)}  # a diffusion transformer has none of its own
    # the last outputs are the very inputs: nothing is cast back, nothing copied
    first = len(jax.tree.leaves(given[0]))
    count = len(jax.tree.leaves(buffers))
    assert program.jaxpr.outvars[-count:] == program.jaxpr.invars[first : first + count]


def test_frozen_weights_leave_a_step_of_microbatches_as_they_came():
    blue = built(MODEL, "bfloat16", gradient_accumulation=2)
    state = blue.init()
    before = jax.device_get(state.buffers)
    state, metrics = make_step(blue)(state, jax.device_put(batch()))
    assert np.isfinite(metrics["loss"])
    assert {leaf.dtype for leaf in jax.tree.leaves(before)} == {np.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.buffers), before)


def test_running_sums_stay_float32():
    blue = built(VQ, "bfloat16")
    given = blue.state.params, blue.state.buffers, {"image": batch()["image"]}, jax.random.key(0)
    program, (_, (_, buffers)) = jax.make_jaxpr(blue.loss, return_shape=True)(*given)
    assert {leaf.dtype for leaf in jax.tree.leaves(buffers)} == {np.dtype("float32")}
    # the sums of a codebook are new ones
    assert not set(map(id, program.jaxpr.outvars)) & set(map(id, program.jaxpr.invars))


def test_in_float32_the_loss_is_that_of_the_model_as_it_is():
    blue = built(MODEL, "float32")
    state, key = blue.init(), jax.random.key(1)
    model = nnx.merge(blue.graphdef, state.params, state.buffers)
    plain = nnx.jit(lambda model, batch, key: model.loss(batch, nnx.Rngs(key))[0])(model, batch(), key)
    np.testing.assert_array_equal(jax.jit(blue.loss)(state.params, state.buffers, batch(), key)[0], plain)


def test_freezing_leaves_names_and_running_values():
    module: Any = nnx.Module()
    module.kernel = layers.parameter(jnp.ones((2, 3)), "embed", "mlp", inputs=1)
    module.sums = layers.buffer(jnp.zeros(3), "mlp", kind=layers.Statistic)
    frozen: Any = layers.freeze(module)
    assert isinstance(frozen.kernel, layers.Frozen) and type(frozen.sums) is layers.Statistic
    assert frozen.kernel.get_metadata()["out_sharding"] == ("embed", "mlp")
