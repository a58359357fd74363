"""What a network predicts, how x_0 follows from it, and how errors are weighted over time.

Every prediction is a combination of data and noise, which together with x_t = alpha x_0 + sigma eps gives x_0:

    output = a x_0 + b eps                                                                         (1)
    x_0 = p x_t + q output,   p = -b / d,   q = sigma / d,   d = a sigma - b alpha                 (2)

    kind        a                              b                           source
    "x0"        1                              0
    "eps"       0                              1                           Ho et al. 2020 (arXiv:2006.11239)
    "v"         -sigma                         alpha                       Salimans and Ho 2022 (arXiv:2202.00512)
    "velocity"  alpha'                         sigma'                      Lipman et al. 2022 (arXiv:2210.02747)
    "edm"       sigma / (sigma_data s)         -alpha sigma_data / s       Karras et al. 2022 (arXiv:2206.00364)

with s^2 = alpha^2 sigma_data^2 + sigma^2, the variance of x_t: p and q of "edm" are the c_skip and c_out of Karras et
al. (their table 1, for any alpha), and it is -v in units of the data. A weight w on the error of x_0 is one of w q^2 on
the error of the output, because the errors differ by the factor q:

    w |x_0 error|^2 = w q^2 |output error|^2                                                       (3)

    weighting   w
    "simple"    1 / q^2: the plain error of the output
    "min_snr"   min(snr, 5)                                                Hang et al. 2023 (arXiv:2303.09556)
    "edm"       s^2 / (sigma sigma_data)^2: the plain error of a prediction "edm"

`t` is (B,) or has no dims; other arrays are (B, ...).
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from artifex.models.diffusion.process import Process, per_example, rates

Prediction = Literal["x0", "eps", "v", "velocity", "edm"]
Weighting = Literal["simple", "min_snr", "edm"]
MIN_SNR_GAMMA = 5.0


def target(kind: Prediction, x0: jax.Array, eps: jax.Array, t: jax.Array, process: Process) -> jax.Array:
    """What the network should put out, by equation (1): finite at every t."""
    a, b = _mixture(kind, t, process)
    return per_example(a, x0) * x0 + per_example(b, eps) * eps


def to_x0(kind: Prediction, output: jax.Array, x_t: jax.Array, t: jax.Array, process: Process) -> jax.Array:
    """x_0 from the network's output, by equation (2).

    "eps" says nothing of x_0 where alpha is 0, at t = 1 of flow matching: infinite there.
    """
    if kind == "x0":
        return output
    (_, b), d = _mixture(kind, t, process), _determinant(kind, t, process)
    return per_example(-b / d, x_t) * x_t + per_example(process.sigma(t) / d, output) * output


def from_x0(kind: Prediction, x0: jax.Array, x_t: jax.Array, t: jax.Array, process: Process) -> jax.Array:
    """The output that stands for x_0: the inverse of `to_x0`, for sigma above 0."""
    if kind == "x0":
        return x0
    return target(kind, x0, noise(x0, x_t, t, process), t, process)


def noise(x0: jax.Array, x_t: jax.Array, t: jax.Array, process: Process) -> jax.Array:
    """The eps that made x_t of x_0, for sigma above 0."""
    return (x_t - per_example(process.alpha(t), x0) * x0) / per_example(process.sigma(t), x_t)


def weight(weighting: Weighting, kind: Prediction, t: jax.Array, process: Process) -> jax.Array:
    """w q^2 of equation (3): the factor of the squared error of an output of this kind.

    For sigma above 0, and alpha above 0 where it is "eps": both hold at every training time.
    """
    if weighting == "simple":
        return jnp.ones_like(t)
    alpha2, sigma2 = jnp.square(process.alpha(t)), jnp.square(process.sigma(t))
    # w sigma^2 rather than w: the snr of nearly clean data overflows
    if weighting == "min_snr":
        times_sigma2 = jnp.minimum(alpha2, MIN_SNR_GAMMA * sigma2)
    else:
        times_sigma2 = alpha2 + sigma2 / process.sigma_data**2
    return times_sigma2 / jnp.square(_determinant(kind, t, process))


def _mixture(kind: Prediction, t: jax.Array, process: Process) -> tuple[jax.Array, jax.Array]:
    """(a, b) of equation (1)."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    match kind:
        case "x0":
            return jnp.ones_like(t), jnp.zeros_like(t)
        case "eps":
            return jnp.zeros_like(t), jnp.ones_like(t)
        case "v":
            return -sigma, alpha
        case "velocity":
            return rates(process, t)
        case "edm":
            scale = jax.lax.rsqrt(jnp.square(alpha * process.sigma_data) + jnp.square(sigma))
            return sigma * scale / process.sigma_data, -alpha * process.sigma_data * scale
    raise ValueError(f"prediction {kind!r} is unknown; choose among x0, eps, v, velocity, edm")


def _determinant(kind: Prediction, t: jax.Array, process: Process) -> jax.Array:
    """d of equation (2)."""
    a, b = _mixture(kind, t, process)
    return a * process.sigma(t) - b * process.alpha(t)
