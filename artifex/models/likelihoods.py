"""The probability of a discrete level under a Gaussian: the likelihood of pixels.

Ho et al. 2020 (arXiv:2006.11239), equation 13; Salimans et al. 2017 (arXiv:1701.05517).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr


def discretized_gaussian(
    x: jax.Array, mean: jax.Array, std: jax.Array, *, levels: int, low: float = -1.0, high: float = 1.0
) -> jax.Array:
    """log of the probability that N(mean, std) gives the bin of `x`, one of `levels` values evenly from low to high.

    The bin is (high - low) / (levels - 1) wide with `x` in its middle; the lowest and the highest are open, so that
    all probabilities sum to 1. Shapes broadcast by JAX's rules; float32, with gradients at any distance.
    """
    half = 0.5 * (high - low) / (levels - 1)
    lowest, highest = x < low + half, x > high - half
    c, d = jnp.abs(x - mean) / std, half / std
    # By symmetry the bin lies below the mean, from -c - d to -c + d, unless it is open and holds the mean.
    holds_mean = (lowest & (mean < x)) | (highest & (mean > x))
    upper, lower = log_ndtr(jnp.where(holds_mean, c, -c) + d), log_ndtr(-c - d)
    closed = upper + jnp.log1p(-jnp.exp(jnp.minimum(lower - upper, -1e-6)))
    # A difference of almost equal float32 probabilities says nothing; the density in the middle does.
    density = jnp.log(2 * d) - 0.5 * (jnp.square(c) + math.log(2 * math.pi))
    closed = jnp.where(d * jnp.maximum(c, 1) < 0.01, density, closed)
    return jnp.where(lowest | highest, upper, closed)
