"""Convolutions on one CPU device: gradients are those of JAX, and Eigen computes all of them in loops too."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from artifex.config import Config
from artifex.models.cpu_convolution import NHWC, convolve
from artifex.training.memory import compile_step
from artifex.training.state import blueprint, planned
from artifex.training.task import batch_shapes

CASES = {  # height, width, window, stride, padding
    "the usual": (8, 8, 3, 1, ((1, 1), (1, 1))),
    "halved": (8, 8, 4, 2, ((1, 1), (1, 1))),
    "halved, padded behind": (8, 6, 3, 2, ((0, 1), (0, 1))),
    "a size that the stride does not divide": (9, 7, 3, 2, ((1, 0), (0, 1))),
    "a phase": (8, 8, 2, 1, ((1, 0), (0, 1))),
    "pixels left out": (8, 8, 1, 2, ((0, 0), (0, 0))),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_jax(case, dtype):
    height, width, window, stride, padding = CASES[case]
    drawn = np.random.default_rng(0)
    x, kernel = drawn.normal(size=(3, height, width, 5)), drawn.normal(size=(window, window, 5, 6))
    x, kernel = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)

    def theirs(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=NHWC)

    expected, theirs_back = jax.vjp(theirs, x, kernel)
    found, back = jax.vjp(lambda x, kernel: convolve(x, kernel, stride, padding), x, kernel)
    gradient = jnp.asarray(drawn.normal(size=expected.shape), dtype)
    for ours, right in zip((found, *back(gradient)), (expected, *theirs_back(gradient)), strict=True):
        assert ours.dtype == dtype
        tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(ours, right, rtol=tolerance, atol=tolerance * np.abs(right).max())


@pytest.mark.parametrize(
    "model",
    [
        {"name": "unet-digits", "network": {"block_channels": [16, 32]}},
        {"name": "vae-digits", "block_channels": [16]},
        {"name": "vq-digits", "block_channels": [16]},
    ],
    ids=lambda model: model["name"],
)
def test_eigen_computes_every_convolution_of_microbatches(model):
    training = {"batch_size": 8, "gradient_accumulation": 2}
    config = Config.from_dict({"model": model, "data": {"source": "digits"}, "training": training})
    plan = planned(config, 1)
    blue = blueprint(config, plan, plan.make_mesh(jax.devices()[:1]))
    text = compile_step(blue, batch_shapes(config)).compiled.as_text()
    assert " while(" in text
    labels = re.findall(r" convolution\(.*dim_labels=(\S+?)[,\n]", text)
    assert len(labels) > 10 and set(labels) == {"b01f_01io->b01f"}
    assert "rhs_reversal" not in text
