"""Samplers where the mean of x_0 given x_t is known in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from artifex.models.diffusion.process import DDPM, EDM, FlowMatching, per_example
from artifex.models.diffusion.samplers import SAMPLERS, ddim, ddpm, time_grid

PROCESSES = {"ddpm_linear": DDPM("linear"), "ddpm_cosine": DDPM("cosine"), "edm": EDM(), "flow": FlowMatching()}

# A mixture of Gaussians in the plane: shares, means, deviations.
SHARES, MEANS, DEVIATIONS = np.array([0.3, 0.7]), np.array([[-1.0, 0.5], [0.8, -0.2]]), np.array([0.3, 0.5])
MEAN = SHARES @ MEANS
COVARIANCE = np.einsum("k,ki,kj->ij", SHARES, MEANS - MEAN, MEANS - MEAN) + np.eye(2) * (SHARES @ DEVIATIONS**2)


def mixture(process):
    """E[x_0 | x_t] of the mixture: responsibilities times the components' posterior means."""
    share, mean, deviation = (jnp.asarray(value, jnp.float32) for value in (SHARES, MEANS, DEVIATIONS))

    def denoise(x_BI, t_B):
        alpha, sigma = process.alpha(t_B)[:, None], process.sigma(t_B)[:, None]
        variance_BK = alpha**2 * deviation[None] ** 2 + sigma**2
        off_BKI = x_BI[:, None] - alpha[..., None] * mean[None]
        log_BK = jnp.log(share)[None] - jnp.log(variance_BK) - 0.5 * jnp.sum(off_BKI**2, -1) / variance_BK
        posterior_BKI = mean[None] + (alpha * deviation[None] ** 2 / variance_BK)[..., None] * off_BKI
        return jnp.einsum("bk,bki->bi", jax.nn.softmax(log_BK), posterior_BKI)

    return denoise


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def draw(sampler, process, steps, count, key):
    times = time_grid(process, steps)
    noise, more = jax.random.split(key)
    x_T = process.sigma(jnp.asarray(times[0])) * jax.random.normal(noise, (count, 2))
    return SAMPLERS[sampler](mixture(process), x_T, process, times, more)


@pytest.mark.parametrize(
    ("sampler", "steps", "name"),
    [
        ("ddpm", 400, "ddpm_linear"),
        ("ddpm", 400, "flow"),
        ("ddim", 200, "ddpm_linear"),
        ("ddim", 200, "ddpm_cosine"),
        ("euler", 200, "flow"),
        ("euler", 200, "edm"),
        ("heun", 50, "ddpm_cosine"),
        ("heun", 50, "edm"),
        ("heun", 50, "flow"),
        ("dpm_solver_pp_2m", 50, "ddpm_linear"),
        ("dpm_solver_pp_2m", 50, "edm"),
        ("dpm_solver_pp_2m", 50, "flow"),
    ],
)
def test_samples_of_a_known_mixture_have_its_mean_and_covariance(sampler, steps, name):
    x = np.asarray(draw(sampler, PROCESSES[name], steps, 20_000, jax.random.key(0)), np.float64)
    deviation = np.sqrt(np.trace(COVARIANCE))
    assert np.linalg.norm(x.mean(0) - MEAN) < 0.02 * deviation
    assert np.linalg.norm(np.cov(x.T) - COVARIANCE) < 0.02 * np.linalg.norm(COVARIANCE)


@pytest.mark.parametrize(
    ("sampler", "name", "low", "high"),
    [
        ("euler", "flow", 0.8, 1.3),
        ("ddim", "edm", 0.8, 1.3),
        ("heun", "flow", 1.7, 2.4),
        ("heun", "edm", 1.7, 2.4),
        ("dpm_solver_pp_2m", "edm", 1.7, 2.4),
    ],
)
def test_order_of_convergence_to_the_flow_of_a_gaussian(sampler, name, low, high):
    process, mean, deviation = PROCESSES[name], 0.4, 0.6

    def denoise(x, t_B):
        alpha, sigma = process.alpha(t_B)[:, None], process.sigma(t_B)[:, None]
        gain = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
        return mean + gain * (x - alpha * mean)

    @functools.partial(jax.jit, static_argnums=0)
    def error(steps):
        times = time_grid(process, steps)
        alpha, sigma = process.alpha(jnp.asarray(times[0])), process.sigma(jnp.asarray(times[0]))
        x_T = sigma * jnp.linspace(-2, 2, 64)[:, None]
        # the flow keeps (x_t - alpha mean) / deviation of x_t
        exact = mean + deviation * (x_T - alpha * mean) / jnp.sqrt(alpha**2 * deviation**2 + sigma**2)
        return jnp.sqrt(jnp.mean(jnp.square(SAMPLERS[sampler](denoise, x_T, process, times) - exact)))

    order = np.log2(float(error(24)) / float(error(48)))
    assert low < order < high


@pytest.mark.parametrize("name", PROCESSES)
def test_a_perfect_denoiser_leads_to_its_x0_in_one_step_or_more(name):
    process = PROCESSES[name]
    x0 = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 3)), jnp.float32)

    @jax.jit
    def ends(x_T, key):
        grids = [time_grid(process, steps) for steps in (1, 4)]
        return [sampler(lambda x, t: x0, x_T, process, times, key) for sampler in SAMPLERS.values() for times in grids]

    x_T = process.sigma(jnp.float32(1)) * jnp.asarray(np.random.default_rng(1).normal(size=x0.shape), jnp.float32)
    for x in ends(x_T, jax.random.key(2)):
        np.testing.assert_allclose(x, x0, atol=2e-5)


def test_the_ancestral_step_draws_from_the_posterior_of_ho_et_al():
    beta = np.linspace(1e-4, 0.02, 1_000)
    alpha_bar = np.cumprod(1 - beta)
    i, x0, x_t = 400, 0.3, 1.1
    times = np.array([i, i - 1], np.float32) / 999

    def denoise(x, t_B):  # the second step, to clean data, shows what the first one drew
        return jnp.where(per_example(t_B, x) > times[1], x0, x)

    x = ddpm(denoise, jnp.full((200_000, 1), x_t), PROCESSES["ddpm_linear"], times, jax.random.key(0))
    kept = 1 - alpha_bar[i]
    mean = (np.sqrt(alpha_bar[i - 1]) * beta[i] * x0 + np.sqrt(1 - beta[i]) * (1 - alpha_bar[i - 1]) * x_t) / kept
    deviation = np.sqrt((1 - alpha_bar[i - 1]) / kept * beta[i])
    assert abs(float(x.mean()) - mean) < 4 * deviation / np.sqrt(200_000)
    np.testing.assert_allclose(float(x.std()), deviation, rtol=0.01)


def test_noise_needs_a_key_and_grids_need_a_step():
    flow = PROCESSES["flow"]
    with pytest.raises(ValueError, match=r"ddim with eta 0\.5 draws noise; give it a key"):
        ddim(lambda x, t: x, jnp.ones((1, 1)), flow, time_grid(flow, 2), eta=0.5)
    with pytest.raises(ValueError, match="0 sampling steps; ask for at least 1"):
        time_grid(flow, 0)
    with pytest.raises(ValueError, match="1001 sampling steps are more than the 1000 entries"):
        time_grid(PROCESSES["ddpm_linear"], 1_001)
