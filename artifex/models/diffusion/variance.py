"""The learned variance of the ancestral step. Nichol and Dhariwal 2021 (arXiv:2102.09672), section 3.1.

A network with twice the channels puts out v behind its prediction. A step from time t to s < t, whose true posterior is

    q(x_s | x_t, x_0) = N(c x_0 + k x_t, beta_tilde)                                               (1)
    beta = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2,   beta_tilde = beta sigma_s^2 / sigma_t^2
    c = alpha_s beta / sigma_t^2,   k = alpha_t sigma_s^2 / (alpha_s sigma_t^2)

is then drawn, with the network's x_0, from

    p(x_s | x_t) = N(c x_0 + k x_t, exp(u log beta + (1 - u) log beta_tilde)),   u = (v + 1) / 2   (2)

between the variances that would be right for data spread as noise is, and for a single image. A squared error says
nothing of v. It is trained by the bound on -log p(x_0), of a chain through all entries i = 0 ... 999 of the table:

    L_vlb = -log p(x_0 | entry 0) + sum_{i > 0} KL(q || p) + KL(q(entry 999 | x_0) || N(0, 1))     (3)
    L_hybrid = L_simple + 0.001 L_vlb, the mean of p detached in L_vlb                             (4)

L_vlb is in bits per dim, as in the authors' code, which is what the 0.001 is for.

Dims: B batch; other arrays are (B, ...) alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from artifex.models.diffusion.process import Process, per_example
from artifex.models.diffusion.samplers import Times, schedule
from artifex.models.likelihoods import discretized_gaussian

BOUND_WEIGHT = 0.001  # of equation (4)
ENTRIES = 1_000  # of the table of a DDPM

DenoiseAndVary = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def variances(
    alpha_t: jax.Array, sigma_t: jax.Array, alpha_s: jax.Array, sigma_s: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(beta_tilde, beta) of equation (1); beta_tilde is 0 where s is clean data."""
    # of variances, not of alpha: 1 - (alpha_t / alpha_s)^2 would leave three digits of float32 at the first entries
    beta = jnp.square(sigma_t) - jnp.square(alpha_t / alpha_s * sigma_s)
    return beta * jnp.square(sigma_s / sigma_t), beta


def log_variance(v: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """log of the variance of equation (2) between `low` and `high`, (beta_tilde, beta)."""
    u = 0.5 * (v + 1.0)
    return u * jnp.log(high) + (1.0 - u) * jnp.log(low)


def bound(
    x0: jax.Array, predicted: jax.Array, v: jax.Array, t_B: jax.Array, process: Process, *, levels: int | None
) -> jax.Array:
    """(B,): estimates of L_vlb, equation (3), by its term at t_B, entries of the table; in bits per dim.

    `predicted` is the network's x_0, which gets no gradient from here. `levels` is how many values x_0 takes evenly
    from -1 to 1; None: it is continuous, and the bound one on its density. At entry 0, whose beta_tilde is 0, that of
    entry 1 stands for it, as in the authors' code. `process` is a `DDPM`.
    """
    predicted = jax.lax.stop_gradient(predicted)
    last = ENTRIES - 1
    index_B = jnp.round(last * t_B)
    first_B = index_B == 0
    s_B = jnp.maximum(index_B - 1.0, 0.0) / last
    alpha_s = jnp.where(first_B, 1.0, process.alpha(s_B))
    sigma_s = jnp.where(first_B, 0.0, process.sigma(s_B))
    low_B, high_B = variances(process.alpha(t_B), process.sigma(t_B), alpha_s, sigma_s)
    ends = jnp.array([0.0, 1.0 / last], jnp.float32)
    alphas, sigmas = process.alpha(ends), process.sigma(ends)
    low_B = jnp.where(first_B, variances(alphas[1], sigmas[1], alphas[0], sigmas[0])[0], low_B)
    low, high, first = (per_example(value, x0) for value in (low_B, high_B, first_B))
    log_p = log_variance(v, low, high)

    shift = per_example(alpha_s * high_B / jnp.square(process.sigma(t_B)), x0) * (x0 - predicted)
    log_ratio = log_p - jnp.log(low)
    kl = 0.5 * (log_ratio + jnp.exp(-log_ratio) - 1.0 + jnp.square(shift) * jnp.exp(-log_p))
    nll = _decoder_nll(x0, jnp.where(first, predicted, x0), log_p, levels)  # where it is not used, far from overflow
    alpha2 = jnp.square(process.alpha(jnp.float32(1.0)))
    prior = 0.5 * (alpha2 * (jnp.square(x0) - 1.0) - jnp.log1p(-alpha2))
    nats = ENTRIES * jnp.where(first, nll, kl) + prior
    return jnp.mean(nats, axis=tuple(range(1, x0.ndim))) / math.log(2.0)


def _decoder_nll(x0: jax.Array, mean: jax.Array, log_p: jax.Array, levels: int | None) -> jax.Array:
    """-log p(x_0 | entry 0) in nats, elementwise: of the level that x_0 has, or as a density."""
    if levels is not None:
        return -discretized_gaussian(x0, mean, jnp.exp(0.5 * log_p), levels=levels)
    return 0.5 * (jnp.square(x0 - mean) * jnp.exp(-log_p) + log_p + math.log(2.0 * math.pi))


def ddpm(denoise: DenoiseAndVary, x_T: jax.Array, process: Process, times: Times, key: jax.Array) -> jax.Array:
    """Ancestral, by equation (2); the step to clean data adds no noise.

    As `samplers.ddpm`, but `denoise(x, t_B)` gives (x_0, v). Between chosen entries the betas are those of the steps
    that are taken, as in section 4 of the paper.
    """
    alpha, sigma = schedule(process, times)
    low, high = variances(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:])
    clean = alpha[1:] * high / jnp.square(sigma[:-1])
    kept = alpha[:-1] / alpha[1:] * jnp.square(sigma[1:] / sigma[:-1])
    noisy = jnp.arange(len(times)) < len(times) - 1
    low = jnp.where(noisy, low, high)  # whose logarithm is finite

    def step(x: jax.Array, row: tuple) -> tuple[jax.Array, None]:
        t, clean, kept, low, high, noisy, key = row
        x0, v = denoise(x, jnp.full(x.shape[:1], t))
        deviation = jnp.where(noisy, jnp.exp(0.5 * log_variance(v, low, high)), 0.0)
        return clean * x0 + kept * x + deviation * jax.random.normal(key, x.shape), None

    rows = (jnp.asarray(times), clean, kept, low, high, noisy, jax.random.split(key, len(times)))
    return jax.lax.scan(step, x_T, rows)[0]
