"""Schedules against their published formulas, and conversions between predictions."""

import math
import statistics

import jax.numpy as jnp
import numpy as np
import pytest

from artifex.models.diffusion import objective
from artifex.models.diffusion.process import DDPM, EDM, FlowMatching, corrupt, rates

PROCESSES = {
    "ddpm_linear": DDPM("linear"),
    "ddpm_cosine": DDPM("cosine"),
    "edm": EDM(),
    "flow": FlowMatching("logit_normal"),
}
KINDS: list[objective.Prediction] = ["x0", "eps", "v", "velocity", "edm"]
WEIGHTINGS: list[objective.Weighting] = ["simple", "min_snr", "edm"]
QUANTILE = statistics.NormalDist().inv_cdf


def normal(seed, shape=(7, 3, 2)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("index", [0, 1, 499, 998, 999])
def test_linear_schedule_has_the_published_alpha_bar_at_each_index(index):
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1_000))[index]
    t = jnp.float32(index / 999)
    np.testing.assert_allclose(PROCESSES["ddpm_linear"].alpha(t) ** 2, alpha_bar, rtol=3e-6)
    np.testing.assert_allclose(PROCESSES["ddpm_linear"].sigma(t) ** 2, 1 - alpha_bar, rtol=3e-6)


@pytest.mark.parametrize("index", [0, 250, 499, 998, 999])
def test_cosine_schedule_has_the_published_alpha_bar_at_each_index(index):
    def f(i):
        return math.cos((i / 1_000 + 0.008) / 1.008 * math.pi / 2) ** 2

    # beta is at most 0.999, which the last index alone would exceed
    alpha_bar = f(index + 1) / f(0) if index < 999 else f(999) / f(0) * 0.001
    np.testing.assert_allclose(PROCESSES["ddpm_cosine"].alpha(jnp.float32(index / 999)) ** 2, alpha_bar, rtol=1e-5)


def test_edm_visits_the_published_noise_levels():
    steps, (low, high, rho) = 18, (0.002, 80.0, 7.0)
    i = np.arange(steps)
    expected = (high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    edm = PROCESSES["edm"]
    sigma = edm.sigma(jnp.asarray(edm.times(steps)))
    np.testing.assert_allclose(sigma, expected, rtol=2e-5)
    np.testing.assert_allclose(edm.network_time(jnp.asarray(edm.times(steps))), np.log(expected) / 4, atol=1e-5)


@pytest.mark.parametrize("u", [0.01, 0.3, 0.5, 0.9])
def test_training_times_have_their_published_quantiles(u):
    at = jnp.float32(u)
    edm, flow = PROCESSES["edm"], PROCESSES["flow"]
    np.testing.assert_allclose(jnp.log(edm.sigma(edm.training_time(at))), -1.2 + 1.2 * QUANTILE(u), atol=1e-4)
    np.testing.assert_allclose(flow.training_time(at), 1 / (1 + math.exp(-QUANTILE(u))), rtol=1e-5)
    np.testing.assert_allclose(FlowMatching().training_time(at), u, rtol=1e-6)
    assert round(float(PROCESSES["ddpm_linear"].training_time(at)) * 999) == int(1_000 * u)


@pytest.mark.parametrize("name", PROCESSES)
def test_signal_to_noise_falls_and_sampling_times_fall_from_noise(name):
    process = PROCESSES[name]
    t = jnp.linspace(0.001, 1, 400)
    assert np.all(np.diff(process.alpha(t) / process.sigma(t)) < 0)
    for steps in (1, 7, 1_000):
        times = process.times(steps)
        assert times.shape == (steps,) and times[0] == 1 and np.all(np.diff(times) < 0) and times[-1] >= 0
    assert PROCESSES["ddpm_linear"].times(1_000)[-1] == 0
    np.testing.assert_allclose(PROCESSES["ddpm_linear"].times(4) * 999, [999, 749, 499, 249], rtol=1e-6)


def test_rates_are_the_closed_forms():
    t = jnp.asarray([0.1, 0.5, 0.9])
    alpha_rate, sigma_rate = rates(PROCESSES["flow"], t)
    np.testing.assert_array_equal(alpha_rate, -np.ones(3))
    np.testing.assert_array_equal(sigma_rate, np.ones(3))
    sigma = np.asarray(PROCESSES["edm"].sigma(t))
    alpha_rate, sigma_rate = rates(PROCESSES["edm"], t)
    np.testing.assert_array_equal(alpha_rate, np.zeros(3))
    np.testing.assert_allclose(sigma_rate, 7 * sigma ** (6 / 7) * (80 ** (1 / 7) - 0.002 ** (1 / 7)), rtol=1e-5)
    # d alpha_bar / dt = 999 alpha_bar log(1 - beta) on the way to the next entry of the table
    beta = np.linspace(1e-4, 0.02, 1_000)
    alpha_bar = np.cumprod(1 - beta)
    alpha_rate, _ = rates(PROCESSES["ddpm_linear"], jnp.float32(500 / 999))
    np.testing.assert_allclose(alpha_rate, 999 / 2 * np.sqrt(alpha_bar[500]) * np.log1p(-beta[501]), rtol=1e-4)


@pytest.mark.parametrize("name", PROCESSES)
def test_every_prediction_returns_to_every_other_through_x0(name):
    process = PROCESSES[name]
    t_B = jnp.asarray([0.05, 0.2, 0.4, 0.5, 0.6, 0.8, 0.9])
    x0, eps = normal(0), normal(1)
    x_t = corrupt(process, x0, eps, t_B)

    targets = {kind: np.asarray(objective.target(kind, x0, eps, t_B, process)) for kind in KINDS}
    for first in KINDS:
        output = objective.from_x0(first, x0, x_t, t_B, process)
        np.testing.assert_allclose(output, targets[first], atol=2e-4 * np.abs(targets[first]).max())
        back = objective.to_x0(first, output, x_t, t_B, process)
        for second in KINDS:
            again = objective.from_x0(second, back, x_t, t_B, process)
            # float32 keeps few digits of data far below the noise, and of noise far below the data
            size = np.abs(targets[second]).max()
            np.testing.assert_allclose(again, targets[second], atol=1e-3 * size, err_msg=f"{first}, {second}")


def test_predictions_are_the_published_ones():
    x0, eps = normal(0), normal(1)
    ddpm, t = PROCESSES["ddpm_linear"], jnp.float32(300 / 999)
    alpha = math.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, 1_000))[300])
    np.testing.assert_allclose(
        objective.target("v", x0, eps, t, ddpm), alpha * eps - math.sqrt(1 - alpha**2) * x0, atol=1e-5
    )
    np.testing.assert_allclose(
        objective.target("velocity", x0, eps, jnp.float32(0.3), PROCESSES["flow"]), eps - x0, atol=1e-6
    )
    edm, t = PROCESSES["edm"], jnp.float32(0.6)
    sigma = float(edm.sigma(t))
    skip = 0.5**2 / (sigma**2 + 0.5**2)
    out = sigma * 0.5 / math.sqrt(sigma**2 + 0.5**2)
    np.testing.assert_allclose(objective.to_x0("edm", eps, x0, t, edm), skip * x0 + out * eps, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(edm.input_scale(t), 1 / math.sqrt(sigma**2 + 0.5**2), rtol=1e-5)


def test_weightings_are_the_published_ones():
    ddpm, edm = PROCESSES["ddpm_linear"], PROCESSES["edm"]
    t = jnp.asarray([0.05, 0.2, 0.5, 0.95])
    snr = np.square(np.asarray(ddpm.alpha(t)) / np.asarray(ddpm.sigma(t)))
    cut = np.minimum(snr, 5)
    published: dict[objective.Prediction, np.ndarray] = {"x0": cut, "eps": cut / snr, "v": cut / (snr + 1)}
    for kind, expected in published.items():
        np.testing.assert_allclose(objective.weight("min_snr", kind, t, ddpm), expected, rtol=1e-4)
    sigma = np.asarray(edm.sigma(t))
    on_x0 = (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2
    np.testing.assert_allclose(objective.weight("edm", "x0", t, edm), on_x0, rtol=1e-4)
    np.testing.assert_allclose(objective.weight("edm", "edm", t, edm), np.ones(4), rtol=1e-4)
    np.testing.assert_array_equal(objective.weight("simple", "v", t, edm), np.ones(4))


@pytest.mark.parametrize("name", PROCESSES)
def test_targets_and_weights_are_finite_at_the_ends_of_training(name):
    process = PROCESSES[name]
    t = process.training_time(jnp.asarray([0.0, 1.0]))
    for kind in KINDS:
        assert np.all(np.isfinite(objective.target(kind, normal(0, (2, 4)), normal(1, (2, 4)), t, process)))
        for weighting in WEIGHTINGS:
            assert np.all(np.isfinite(objective.weight(weighting, kind, t, process))), (kind, weighting)
