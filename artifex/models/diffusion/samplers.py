"""Samplers: from noise to data along a falling grid of times, each one compiled loop around one call of the network.

    x = sampler(denoise, x_T, process, times, key)

`denoise(x, t_B)` is the mean of x_0 given x_t = x, whatever network, prediction and guidance it is made of; `x_T` is
noise of deviation sigma at times[0]. A step leads from one time to the next, the last one to clean data (alpha = 1,
sigma = 0). All steps are in terms of x_0 and the eps that follows from it, and so never divide by alpha, which is 0 at
t = 1 of flow matching. With t the time of a step and s the next:

    x_t = alpha_t x_0 + sigma_t eps                                                                (1)
    dx = x_0 d(alpha) + eps d(sigma), the probability flow                                         (2)
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from artifex.models.diffusion.process import Process

Denoise = Callable[[jax.Array, jax.Array], jax.Array]
Times = jax.Array | np.ndarray


def time_grid(process: Process, steps: int) -> np.ndarray:
    """The times (steps,) at which each step starts, as published for the process; raises `ValueError` below 1 step."""
    if steps < 1:
        raise ValueError(f"{steps} sampling steps; ask for at least 1")
    return process.times(steps)


def ddim(
    denoise: Denoise, x_T: jax.Array, process: Process, times: Times, key: jax.Array | None = None, *, eta: float = 0.0
) -> jax.Array:
    """x_s = alpha_s x_0 + sqrt(sigma_s^2 - f^2) eps + f z; equation 12 of Song et al. 2020 (arXiv:2010.02502).

    z is fresh noise, and f = eta sigma_s sqrt(1 - (sigma_s alpha_t / (sigma_t alpha_s))^2). `eta`, in [0, 1], is 0 for
    the probability flow; above 0 it needs a key, or raises `ValueError`.
    """
    if eta and key is None:
        raise ValueError(f"ddim with eta {eta} draws noise; give it a key, or eta 0")
    alpha, sigma = schedule(process, times)
    ratio = sigma[1:] * alpha[:-1] / (sigma[:-1] * alpha[1:])
    renewed = eta**2 * jnp.maximum(1.0 - jnp.square(ratio), 0.0)
    kept, fresh = sigma[1:] * jnp.sqrt(1.0 - renewed), sigma[1:] * jnp.sqrt(renewed)
    keys = jax.random.split(key, len(times)) if eta and key is not None else None

    def step(x: jax.Array, row: tuple) -> tuple[jax.Array, None]:
        t, alpha_t, sigma_t, alpha_s, kept, fresh, key = row
        x0 = denoise(x, jnp.full(x.shape[:1], t))
        x = alpha_s * x0 + kept * (x - alpha_t * x0) / sigma_t
        return (x if key is None else x + fresh * jax.random.normal(key, x.shape)), None

    rows = (jnp.asarray(times), alpha[:-1], sigma[:-1], alpha[1:], kept, fresh, keys)
    return jax.lax.scan(step, x_T, rows)[0]


def ddpm(denoise: Denoise, x_T: jax.Array, process: Process, times: Times, key: jax.Array | None = None) -> jax.Array:
    """Ancestral: x_s from the posterior q(x_s | x_t, x_0), equations 6 and 7 of Ho et al. 2020 (arXiv:2006.11239).

    The same step as `ddim` with eta = 1. Raises `ValueError` without a key.
    """
    return ddim(denoise, x_T, process, times, key, eta=1.0)


def euler(denoise: Denoise, x_T: jax.Array, process: Process, times: Times, key: jax.Array | None = None) -> jax.Array:
    """Euler's step of equation (2): x_s = x_t + (alpha_s - alpha_t) x_0 + (sigma_s - sigma_t) eps. Order 1.

    By equation (1) that is `ddim` with eta = 0. For EDM it is Euler in sigma, for flow matching Euler in t.
    """
    return ddim(denoise, x_T, process, times)


def heun(denoise: Denoise, x_T: jax.Array, process: Process, times: Times, key: jax.Array | None = None) -> jax.Array:
    """Euler's step, then the mean of its slopes at both ends; Algorithm 1 of Karras et al. 2022 (arXiv:2206.00364).

    Order 2, by 2 N - 1 calls of the network: the last step, to clean data, has no slope at its end.
    """
    alpha, sigma = schedule(process, times)
    steps = len(times)
    # One call of the network a turn: turns 2i predict from time i, turns 2i + 1 correct from time i + 1.
    turn = np.arange(2 * steps - 1)
    at, step_of, predicts = (turn + 1) // 2, turn // 2, turn % 2 == 0
    d_alpha, d_sigma = jnp.diff(alpha)[step_of], jnp.diff(sigma)[step_of]

    def move(carry: tuple, row: tuple) -> tuple[tuple, None]:
        t, alpha_t, sigma_t, d_alpha, d_sigma, predicts = row
        x, half = carry
        x0 = denoise(x, jnp.full(x.shape[:1], t))
        change = d_alpha * x0 + d_sigma * (x - alpha_t * x0) / sigma_t
        return (jnp.where(predicts, x + change, half + 0.5 * change), x + 0.5 * change), None

    rows = (jnp.asarray(times)[at], alpha[at], sigma[at], d_alpha, d_sigma, predicts)
    return jax.lax.scan(move, (x_T, x_T), rows)[0][0]


def dpm_solver_pp_2m(
    denoise: Denoise, x_T: jax.Array, process: Process, times: Times, key: jax.Array | None = None
) -> jax.Array:
    """DPM-Solver++(2M), Algorithm 2 of Lu et al. 2022 (arXiv:2211.01095): order 2 by one call of the network a step.

    x_s = sigma_s / sigma_t x_t - alpha_s (e^-h - 1) D with h the step in log(alpha / sigma), and D the x_0 at t,
    extrapolated by that of the step before. The first and the last step are of order 1, for which D = x_0.
    """
    alpha, sigma = schedule(process, times)
    shrink = sigma[1:] / sigma[:-1]
    gain = alpha[1:] - alpha[:-1] * shrink  # -alpha_s (e^-h - 1)
    h = jnp.diff(jnp.log(alpha) - jnp.log(sigma))  # infinite in a step to clean data, or from where alpha is 0
    extrapolate = jnp.pad(h[1:-1] / (2 * h[:-2]), 1)[: len(times)]

    def step(carry: tuple, row: tuple) -> tuple[tuple, None]:
        t, shrink, gain, extrapolate = row
        x, before = carry
        x0 = denoise(x, jnp.full(x.shape[:1], t))
        return (shrink * x + gain * (x0 + extrapolate * (x0 - before)), x0), None

    rows = (jnp.asarray(times), shrink, gain, extrapolate)
    return jax.lax.scan(step, (x_T, jnp.zeros_like(x_T)), rows)[0][0]


def schedule(process: Process, times: Times) -> tuple[jax.Array, jax.Array]:
    """(alpha, sigma) at each of the times and of clean data, (N + 1,) each."""
    t = jnp.asarray(times)
    return (jnp.append(process.alpha(t), jnp.float32(1)), jnp.append(process.sigma(t), jnp.float32(0)))


SAMPLERS: dict[str, Callable[..., jax.Array]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
}
