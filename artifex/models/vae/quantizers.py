"""Vectors to discrete codes and back: a codebook that follows a running k-means, and rounding to a fixed grid.

Both pass the gradient straight through: the output is z + stop_gradient(quantized - z).

Dims: B batch, H height, W width, Z latent, K codes, S positions of all images (B H W).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from artifex.models.layers import Statistic, buffer, take_rows
from artifex.models.module import Module

SMOOTHING = 1e-5  # Laplace's, in uses of a code
EDGE = 1e-3  # FSQ's tanh reaches this fraction beyond the outermost levels, so that they are more than limits


class Quantized(NamedTuple):
    """What a quantizer makes of z (B, H, W, Z)."""

    values: jax.Array  # (B, H, W, Z) float32, the gradient passed straight through
    codes: jax.Array  # (B, H, W) int32
    commitment: jax.Array  # (B,) mean squared distance of z from its code


def straight_through(z: jax.Array, quantized: jax.Array) -> jax.Array:
    """The value of `quantized` with the gradient of `z`. Bengio et al. 2013 (arXiv:1308.3432)."""
    return z + jax.lax.stop_gradient(quantized - z)


def perplexity(counts_K: jax.Array) -> jax.Array:
    """exp of the entropy of the relative use of each code: n where n codes are used alike."""
    p = counts_K / jnp.maximum(jnp.sum(counts_K), 1)
    return jnp.exp(-jnp.sum(p * jnp.log(jnp.maximum(p, 1e-30))))


class VectorQuantizer(Module):
    """The nearest entry of a codebook: van den Oord et al. 2017 (arXiv:1711.00937), appendix A.1.

    Training moves entry k to the running mean of the vectors that chose it: with n_k vectors of sum s_k in a batch,
    N_k <- g N_k + (1 - g) n_k, M_k <- g M_k + (1 - g) s_k, e_k = M_k / N_k with N Laplace-smoothed. Before that,
    entries with N_k at most `revive_below` of the mean N are replaced by vectors of the batch drawn by the key. All
    are on the first batch, so the codebook starts where the encoder is.

    N and M are all there is; the codebook follows from them. So averages of both over the steps, in a run that averages
    its weights, give the codebook of the averaged encoder: the mean of all vectors that chose an entry in that time. Of
    the entries themselves they would not: one that was replaced would stand between its two places.
    """

    def __init__(self, codes: int, latent_dim: int, *, decay: float, revive_below: float, rngs: nnx.Rngs):
        self.width, self.decay, self.revive_below = latent_dim, decay, revive_below
        self.counts = buffer(jnp.zeros(codes), "codes", kind=Statistic)
        start = jax.random.normal(rngs.params(), (codes, latent_dim))
        self.sums = buffer(start, "codes", "latent", kind=Statistic)

    def __call__(self, z_BHWZ: jax.Array, weights_B: jax.Array, key: jax.Array | None = None) -> Quantized:
        """Quantize; with a `key`, move the codebook by the images whose weight is not 0."""
        z = z_BHWZ.astype(jnp.float32)
        z_SZ = jax.lax.stop_gradient(z.reshape(-1, self.width))
        if key is not None:
            self._revive(z_SZ, weights_B, key)
        codes_S = nearest(z_SZ, self.codebook)
        quantized = self.vectors(codes_S.reshape(z.shape[:-1]))
        if key is not None:
            self._follow(z_SZ, codes_S, jnp.repeat(weights_B, z_SZ.shape[0] // weights_B.shape[0]))
        commitment = jnp.mean(jnp.square(z - jax.lax.stop_gradient(quantized)), axis=(1, 2, 3))
        return Quantized(straight_through(z, quantized), codes_S.reshape(z.shape[:-1]), commitment)

    @property
    def codebook(self) -> jax.Array:
        """The entries (K, Z), M / N; random numbers before the first batch."""
        counts_K = self.counts[...]
        total = jnp.sum(counts_K)
        smoothed_K = (counts_K + SMOOTHING) / (total + counts_K.size * SMOOTHING) * total
        return self.sums[...] / jnp.where(total > 0, smoothed_K, 1.0)[:, None]

    def vectors(self, codes: jax.Array) -> jax.Array:
        """Entries (..., Z) of codes (...)."""
        return take_rows(self.codebook, codes)

    def _revive(self, z_SZ: jax.Array, weights_B: jax.Array, key: jax.Array) -> None:
        counts_K = self.counts[...]
        positions = z_SZ.shape[0] // weights_B.shape[0]
        dead_K = (counts_K <= self.revive_below * jnp.mean(counts_K)) & jnp.any(weights_B > 0)
        chosen_KZ = z_SZ[candidates(key, weights_B > 0, positions, counts_K.size)]
        count = jnp.sum(weights_B) * positions / counts_K.size  # as if all codes were used alike
        self.counts[...] = jnp.where(dead_K, count, counts_K)
        self.sums[...] = jnp.where(dead_K[:, None], count * chosen_KZ, self.sums[...])

    def _follow(self, z_SZ: jax.Array, codes_S: jax.Array, weights_S: jax.Array) -> None:
        codes, kept = self.counts.size, self.decay
        uses_K = jax.ops.segment_sum(weights_S, codes_S, codes)
        sums_KZ = jax.ops.segment_sum(weights_S[:, None] * z_SZ, codes_S, codes)
        self.counts[...] = kept * self.counts[...] + (1 - kept) * uses_K
        self.sums[...] = kept * self.sums[...] + (1 - kept) * sums_KZ


def candidates(key: jax.Array, there_B: jax.Array, positions: int, count: int) -> jax.Array:
    """`count` of the B * `positions` vectors of a batch, of images that are `there`: (count,) int32.

    Each is any of them with the same probability, and no two are the same while there are enough: one is drawn from
    each of `count` equal parts, and all are shifted together. Nothing of the batch is sorted but its B images.
    """
    image_B = jnp.argsort(~there_B)  # those that are there first
    total = jnp.maximum(jnp.sum(there_B) * positions, 1)
    size, longer = total // count, total % count  # the first parts are longer by one
    part_K = jnp.arange(count)
    begin_K, size_K = part_K * size + jnp.minimum(part_K, longer), size + (part_K < longer).astype(part_K.dtype)
    shift_key, place_key = jax.random.split(key)
    shift = jax.random.randint(shift_key, (), 0, total)
    place_K = begin_K + jax.random.randint(place_key, (count,), 0, jnp.maximum(size_K, 1))
    rank_K = (jnp.where(size_K > 0, place_K, part_K) + shift) % total
    return image_B[rank_K // positions] * positions + rank_K % positions


def nearest(z_SZ: jax.Array, codebook_KZ: jax.Array) -> jax.Array:
    """The index of the entry nearest to each vector, (S,) int32."""
    distances_SK = jnp.sum(jnp.square(codebook_KZ), axis=-1)[None] - 2 * (z_SZ @ codebook_KZ.T)
    return jnp.argmin(distances_SK, axis=-1).astype(jnp.int32)


class FiniteScalarQuantizer(Module):
    """Each latent number rounded to one of a few levels: Mentzer et al. 2023 (arXiv:2309.15505), section 3.

    Number i is squashed into (-1, 1) by tanh and rounded to one of `levels[i]` values, integers divided by
    levels[i] // 2; the digits of a code in these bases, the first number the lowest digit, are the values. There is no
    codebook to learn and nothing to commit to.
    """

    def __init__(self, levels: Sequence[int]):
        self.levels, self.width = tuple(levels), len(levels)

    def __call__(self, z_BHWZ: jax.Array, weights_B: jax.Array, key: jax.Array | None = None) -> Quantized:
        """Quantize. Nothing is drawn, and rows are not weighed."""
        z = z_BHWZ.astype(jnp.float32)
        levels, half = self._grid(z.ndim)
        reach = 0.5 * (levels - 1) * (1 + EDGE)
        offset = 0.5 * (1 - levels % 2)  # an even number of levels has none in the middle
        bounded = jnp.tanh(z + np.arctanh(offset / reach)) * reach - offset
        rounded = jnp.round(bounded)
        codes = jnp.sum((rounded + half).astype(jnp.int32) * self._bases(z.ndim), axis=-1)
        return Quantized(straight_through(bounded, rounded) / half, codes, jnp.zeros(z.shape[0]))

    def vectors(self, codes: jax.Array) -> jax.Array:
        """Values (..., Z) of codes (...)."""
        levels, half = self._grid(codes.ndim + 1)
        digits = codes[..., None] // self._bases(codes.ndim + 1) % levels.astype(np.int32)
        return (digits.astype(jnp.float32) - half) / half

    def _grid(self, ndim: int) -> tuple[np.ndarray, np.ndarray]:
        """Levels and the integer in the middle, each with as many dims as the tensor they go with."""
        levels = np.array(self.levels, np.float32).reshape((1,) * (ndim - 1) + (self.width,))
        return levels, levels // 2

    def _bases(self, ndim: int) -> np.ndarray:
        bases = [math.prod(self.levels[:index]) for index in range(self.width)]
        return np.array(bases, np.int32).reshape((1,) * (ndim - 1) + (self.width,))
