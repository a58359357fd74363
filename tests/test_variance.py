"""The learned variance of the ancestral step: its bound against closed forms, what trains it and what samples by it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from artifex.models import layers
from artifex.models.diffusion import variance
from artifex.models.diffusion.config import PRESETS, DiffusionConfig
from artifex.models.diffusion.guidance import guided
from artifex.models.diffusion.process import DDPM

COSINE = np.cos((np.arange(1_001) / 1_000 + 0.008) / 1.008 * np.pi / 2) ** 2
BETAS = {"linear": np.linspace(1e-4, 0.02, 1_000), "cosine": np.minimum(1 - COSINE[1:] / COSINE[:-1], 0.999)}


def kl(mean, var, other_mean, other_var):
    """KL(N(mean, var) || N(other_mean, other_var)) in nats."""
    return 0.5 * (np.log(other_var / var) + (var + (mean - other_mean) ** 2) / other_var - 1)


def reference(kind, i, x0, predicted, v, levels):
    """1,000 times the term of entry i and the constant one, in bits, in float64: Ho et al. 2020, equations 5 to 13."""
    beta = BETAS[kind]
    kept = np.cumprod(1 - beta)
    before = np.append(1.0, kept[:-1])
    tilde = (1 - before) / (1 - kept) * beta
    tilde[0] = tilde[1]
    u = (v + 1) / 2
    p_var = np.exp(u * np.log(beta[i]) + (1 - u) * np.log(tilde[i]))
    if i == 0:
        deviation = np.sqrt(p_var)
        if levels is None:
            term = -stats.norm.logpdf(x0, predicted, deviation)
        else:
            half = 1 / (levels - 1)
            upper = np.where(x0 > 1 - half, np.inf, x0 + half)
            lower = np.where(x0 < half - 1, -np.inf, x0 - half)
            term = -np.log(stats.norm.cdf(upper, predicted, deviation) - stats.norm.cdf(lower, predicted, deviation))
    else:
        apart = np.sqrt(before[i]) * beta[i] / (1 - kept[i]) * (x0 - predicted)
        term = kl(apart, tilde[i], 0.0, p_var)
    prior = kl(np.sqrt(kept[-1]) * x0, 1 - kept[-1], 0.0, 1.0)
    return (1_000 * term + prior).mean() / np.log(2)


@functools.partial(jax.jit, static_argnums=(4, 5))
def bound(x0, predicted, v, t_B, kind, levels):
    return variance.bound(x0, predicted, v, t_B, DDPM(kind), levels=levels)


@pytest.mark.parametrize("kind", BETAS)
@pytest.mark.parametrize("levels", [257, None])
def test_each_term_of_the_bound_is_its_closed_form(kind, levels):
    draw, entries = np.random.default_rng(0), [0, 1, 2, 40, 500, 997, 999]
    x0 = draw.integers(0, 9, (len(entries), 60)) / 4 - 1.0
    predicted = x0 + draw.normal(size=x0.shape) * np.where(np.arange(len(entries)) < 3, 0.01, 1.0)[:, None]
    v = draw.uniform(-1.2, 1.2, x0.shape)
    t_B = np.array(entries, np.float32) / 999
    got = bound(*(jnp.asarray(value, jnp.float32) for value in (x0, predicted, v)), t_B, kind, levels)
    expected = [reference(kind, i, *row, levels) for i, *row in zip(entries, x0, predicted, v, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=2e-3)


def test_the_bound_of_gaussian_data_is_its_entropy_with_the_larger_variance_and_more_with_the_smaller():
    """For N(0, 1), E[x_0 | x_t] = alpha x_t, and a step back has the variance of that forth: no bound is lower."""
    process, draw = DDPM("linear"), np.random.default_rng(0)
    t_B = jnp.arange(1_000, dtype=jnp.float32) / 999
    x0, eps = (jnp.asarray(draw.normal(size=(1_000, 2_000)), jnp.float32) for _ in range(2))
    alpha, sigma = process.alpha(t_B)[:, None], process.sigma(t_B)[:, None]
    predicted = alpha * (alpha * x0 + sigma * eps)
    large, small = (float(jnp.mean(bound(x0, predicted, jnp.full_like(x0, v), t_B, "linear", None))) for v in (1, -1))
    assert abs(large - stats.norm.entropy() / np.log(2)) < 0.06
    assert small > large + 0.1


class Two(nnx.Module):
    """A gain times x as the prediction, and behind it a number as v."""

    def __init__(self, cfg, rngs):
        self.gain = layers.parameter(jnp.full((cfg.in_channels,), 0.3), "conv_in")
        self.v = layers.parameter(jnp.full((cfg.in_channels,), 0.2), "conv_in")

    def __call__(self, x, t_B, condition=None):
        return jnp.concatenate(
            [x * self.gain[...][None, None, None], jnp.broadcast_to(self.v[...][None, None, None], x.shape)], -1
        )


@dataclasses.dataclass(frozen=True)
class TwoConfig:
    image_size: int = 4
    in_channels: int = 2
    out_channels: int = 4
    num_classes: int = 0
    dropout: float = 0.0

    def build(self, rngs):
        return Two(self, rngs)


def model_of(**fields) -> Any:
    parts: dict[str, Any] = {"network": TwoConfig(), "process": "ddpm_cosine", "prediction": "eps", "sampler": "ddpm"}
    return DiffusionConfig(**(parts | {"sampling_steps": 4} | fields)).build(nnx.Rngs(0))


def test_the_squared_error_trains_the_prediction_and_the_bound_the_variance_alone():
    model = model_of(levels=17)
    image = jnp.asarray(np.random.default_rng(0).integers(0, 17, (8, 4, 4, 2)) / 8 - 1, jnp.float32)

    @functools.partial(nnx.jit, static_argnums=2)
    def gradient(model, image, part):
        def value(model):
            loss, metrics = model.loss({"image": image}, nnx.Rngs(0))
            return {"loss": loss, **metrics}[part]

        return nnx.grad(value)(model), value(model)

    (of_loss, loss), (of_mse, mse), (of_vlb, vlb) = (gradient(model, image, part) for part in ("loss", "mse", "vlb"))
    np.testing.assert_allclose(loss, mse + 0.001 * vlb, rtol=1e-6)
    network = {name: state["network"] for name, state in (("loss", of_loss), ("mse", of_mse), ("vlb", of_vlb))}
    np.testing.assert_array_equal(network["mse"]["v"][...], 0)
    np.testing.assert_array_equal(network["vlb"]["gain"][...], 0)
    np.testing.assert_allclose(network["loss"]["gain"][...], network["mse"]["gain"][...], rtol=1e-5)
    np.testing.assert_allclose(network["loss"]["v"][...], 0.001 * network["vlb"]["v"][...], rtol=1e-3)
    assert np.abs(network["vlb"]["v"][...]).min() > 0


def test_samples_follow_the_variance_where_noise_is_added_alone():
    small, large = model_of(), model_of()
    for model, v in ((small, -1.0), (large, 1.0)):
        model.network.v[...] = jnp.full((2,), v)
    key = jax.random.key(0)
    assert np.abs(small.sample(key, count=2) - large.sample(key, count=2)).max() > 0.01
    flow = {"count": 2, "sampler": "ddim"}
    np.testing.assert_array_equal(small.sample(key, **flow), large.sample(key, **flow))


def test_guidance_leaves_the_variance_that_of_the_condition():
    def network(x, t_B, condition):
        return jnp.concatenate([x, x], -1) + condition[:, None, None, None]

    x, t_B, condition = jnp.ones((3, 2, 2, 1)), jnp.zeros(3), jnp.array([1.0, 2.0, 3.0])
    got = guided(network, 4.0, 0.0)(x, t_B, condition)
    np.testing.assert_allclose(got[..., 0], 1 + 4 * condition[:, None, None] * jnp.ones((3, 2, 2)))
    np.testing.assert_allclose(got[..., 1], 1 + condition[:, None, None] * jnp.ones((3, 2, 2)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"process": "flow", "prediction": "v"}, "network puts out a variance .* process 'flow' has no use for"),
        ({"levels": 1}, "levels is 1"),
        ({"levels": 17, "network": TwoConfig(out_channels=2)}, "levels 17 has no effect"),
    ],
)
def test_a_variance_without_a_chain_and_levels_without_a_bound_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        model_of(**fields)


def test_published_transformers_and_improved_ddpm_learn_their_variance():
    learns = {name for name, cfg in PRESETS.items() if cfg.learns_variance}
    assert learns == {"dit-s2", "dit-b2", "dit-l2", "dit-xl2", "iddpm-digits"}
