"""The convolutional VAE and beta-VAE, with likelihoods that are probabilities of the data's discrete levels.

Kingma and Welling 2013 (arXiv:1312.6114), Higgins et al. 2017 ("beta-VAE"): the loss is
-log p(x|z) + beta KL(q(z|x) || N(0, 1)) in nats to an image, z drawn from q = N(mean, exp(logvar)).

Dims: B batch, H height, W width, C channels, Z latent, S steps of an interpolation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from artifex.models.batch import check_images
from artifex.models.convolution import Conv, UpConv, image
from artifex.models.layers import Linear, noise_key, parameter
from artifex.models.likelihoods import discretized_gaussian
from artifex.models.module import Module
from artifex.models.resnet import ResnetBlock
from artifex.models.rows import fill_up
from artifex.models.vae.config import VAEConfig
from artifex.scaling.execution import compiled

LOGVAR_RANGE = (-30.0, 20.0)  # of a posterior, so that its exponential stays finite


def gaussian_kl(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, summed over all dims but the first: (B,). arXiv:1312.6114, (10)."""
    each = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)
    return jnp.sum(each, axis=tuple(range(1, mean.ndim)))


def image_weights(batch: Mapping[str, jax.Array]) -> jax.Array:
    """(B,): 1 for each image, 0 for a row that only fills up the batch."""
    mask = batch.get("mask")
    return jnp.ones(batch["image"].shape[0]) if mask is None else mask.astype(jnp.float32)


def weighted_mean(values_B: jax.Array, weights_B: jax.Array) -> jax.Array:
    """The mean of `values_B` over the rows whose weight is not 0."""
    return jnp.sum(jnp.where(weights_B > 0, values_B, 0.0) * weights_B) / jnp.maximum(jnp.sum(weights_B), 1)


class ConvEncoder(Module):
    """Convolutions of window 4 and stride 2, then residual blocks: (B, H, W, C) -> (B, H / 2^n, W / 2^n, last)."""

    def __init__(self, channels: int, widths: Sequence[int], residual_blocks: int, groups: int, *, rngs: nnx.Rngs):
        sizes = list(zip((channels, *widths[:-1]), widths, strict=True))
        self.convs = nnx.List([Conv(i, o, 4, stride=2, padding=(1, 1), scale=2.0, rngs=rngs) for i, o in sizes])
        self.blocks = nnx.List(
            [ResnetBlock(widths[-1], widths[-1], groups=groups, rngs=rngs) for _ in range(residual_blocks)]
        )

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        h = x_BHWC.astype(self.convs[0].kernel[...].dtype)
        for conv in self.convs:
            h = nnx.silu(conv(h))
        for block in self.blocks:
            h = block(h)
        return h


class ConvDecoder(Module):
    """Residual blocks, then transposed convolutions of stride 2: (B, H, W, last) -> (B, 2^n H, 2^n W, channels)."""

    def __init__(self, channels: int, widths: Sequence[int], residual_blocks: int, groups: int, *, rngs: nnx.Rngs):
        self.blocks = nnx.List(
            [ResnetBlock(widths[-1], widths[-1], groups=groups, rngs=rngs) for _ in range(residual_blocks)]
        )
        sizes = list(zip(widths[::-1], (*widths[-2::-1], channels), strict=True))
        self.convs = nnx.List([UpConv(i, o, rngs=rngs) for i, o in sizes])

    def __call__(self, h_BHWC: jax.Array) -> jax.Array:
        for block in self.blocks:
            h_BHWC = block(h_BHWC)
        for conv in self.convs:
            h_BHWC = conv(nnx.silu(h_BHWC))
        return h_BHWC


class Gaussian(Module):
    """Pixels of `levels` values, each from a Gaussian around the decoder's output; its deviation is `std`, or learned.

    A learned one is shared by all pixels of a channel: Rybkin et al. 2021 (arXiv:2006.13202).
    """

    def __init__(self, channels: int, levels: int, std: float | None):
        self.levels, self.fixed = levels, std
        # exp(-1), about a third of the range, is near what a blurred mean image misses
        self.log_std = parameter(jnp.full(channels, -1.0), "conv_out") if std is None else None

    def log_probability(self, x_BHWC: jax.Array, y_BHWC: jax.Array) -> jax.Array:
        """log p(x | decoder output y) in nats, (B,)."""
        learned = self.log_std
        std = jnp.float32(self.fixed) if learned is None else jnp.exp(learned[...].astype(jnp.float32))
        std = jnp.broadcast_to(std, x_BHWC.shape[-1:])[None, None, None]
        return jnp.sum(discretized_gaussian(x_BHWC, y_BHWC, std, levels=self.levels), axis=(1, 2, 3))

    def mean(self, y_BHWC: jax.Array) -> jax.Array:
        """The expected image."""
        return y_BHWC


class Bernoulli(Module):
    """Pixels that are -1 or 1, the decoder's output the log-odds of 1.

    A pixel x between them counts as (x + 1) / 2 of a 1; the bound then is a score, no probability.
    """

    def log_probability(self, x_BHWC: jax.Array, y_BHWC: jax.Array) -> jax.Array:
        """log p(x | decoder output y) in nats, (B,)."""
        return jnp.sum(0.5 * (x_BHWC + 1) * y_BHWC - nnx.softplus(y_BHWC), axis=(1, 2, 3))

    def mean(self, y_BHWC: jax.Array) -> jax.Array:
        """The expected image."""
        return 2 * nnx.sigmoid(y_BHWC) - 1


class VAE(Module):
    """An image as one vector of `latent_dim` numbers, Gaussian given the image."""

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        sizes = (cfg.channels, cfg.block_channels, cfg.residual_blocks, cfg.groups)
        self.encoder = ConvEncoder(*sizes, rngs=rngs)
        side, width = cfg.image_size >> len(cfg.block_channels), cfg.block_channels[-1]
        grid, names = (side, side, width), ("kernel", "kernel", "conv_in")
        # of what the encoder predicts and the decoder reads: not hidden
        ends: dict[str, Any] = {"bias": True, "hidden": False, "rngs": rngs}
        self.mean = Linear((*grid, cfg.latent_dim), (*names, "latent"), inputs=3, **ends)
        self.logvar = Linear((*grid, cfg.latent_dim), (*names, "latent"), inputs=3, **ends)
        names = ("kernel", "kernel", "conv_out")
        self.expand = Linear((cfg.latent_dim, *grid), ("latent", *names), **ends)
        self.decoder = ConvDecoder(*sizes, rngs=rngs)
        self.likelihood = (
            Gaussian(cfg.channels, cfg.levels, cfg.gaussian_std) if cfg.likelihood == "gaussian" else Bernoulli()
        )

    def encode(self, x_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance of q(z|x), each (B, Z) float32."""
        h = self.encoder(x_BHWC)
        mean, logvar = self.mean(h).astype(jnp.float32), self.logvar(h).astype(jnp.float32)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, z_BZ: jax.Array) -> jax.Array:
        """The expected image for latents (B, Z): (B, H, W, C) float32, not clipped."""
        return self.likelihood.mean(self._outputs(z_BZ))

    def _outputs(self, z_BZ: jax.Array) -> jax.Array:
        h = image(self.expand(z_BZ.astype(self.expand.kernel[...].dtype)))
        return self.decoder(h).astype(jnp.float32)

    def loss(
        self, batch: Mapping[str, jax.Array], rngs: nnx.Rngs | None = None, *, index: int | jax.Array = 0
    ) -> tuple[jax.Array, dict]:
        """Nats to an image, with the KL divergence times `beta`; `nats` and `bits_per_dim` are the bound, beta 1.

        Without `rngs` the noise is that of batch `index`.
        """
        check_images(batch)
        x_BHWC, weights_B = batch["image"], image_weights(batch)
        mean, logvar = self.encode(x_BHWC)
        noise = jax.random.normal(noise_key(rngs, index), mean.shape)
        outputs = self._outputs(mean + jnp.exp(0.5 * logvar) * noise)
        reconstruction = -weighted_mean(self.likelihood.log_probability(x_BHWC, outputs), weights_B)
        kl = weighted_mean(gaussian_kl(mean, logvar), weights_B)
        nats = reconstruction + kl
        values = math.prod(x_BHWC.shape[1:])
        metrics = {
            "weight": jnp.sum(weights_B),
            "nats": nats,
            "bits_per_dim": nats / (values * math.log(2)),
            "kl": kl,
            "reconstruction": reconstruction,
        }
        return reconstruction + self.cfg.beta * kl, metrics

    def reconstruct(self, x_BHWC: jax.Array) -> jax.Array:
        """The image of the posterior's mean, in [-1, 1]."""
        return _reconstruct(self, x_BHWC)

    def sample(self, key: jax.Array, *, count: int, labels: jax.Array | None = None) -> jax.Array:
        """`count` expected images of latents from N(0, 1), (count, H, W, C) in [-1, 1]. There are no labels to take."""
        refuse_labels(labels)
        return _decode(self, jax.random.normal(key, (count, self.cfg.latent_dim)))

    def interpolate(self, a_HWC: jax.Array, b_HWC: jax.Array, steps: int) -> jax.Array:
        """Images of `steps` latents on the line from one image's mean to another's, ends included: (steps, H, W, C)."""
        if steps < 2:
            raise ValueError(f"steps is {steps}; an interpolation has at least its 2 ends")
        return _interpolate(self, jnp.stack([a_HWC, b_HWC]), jnp.linspace(0, 1, steps))


def refuse_labels(labels: jax.Array | None) -> None:
    """Raise `ValueError` where a model without classes is asked for some."""
    if labels is not None:
        raise ValueError("labels given, but an autoencoder draws images of no particular class; leave them out")


@compiled()
def _decode(model: VAE, z_BZ: jax.Array) -> jax.Array:
    return jnp.clip(model.decode(fill_up(z_BZ)), -1, 1)[: z_BZ.shape[0]]


@compiled()
def _reconstruct(model: VAE, x_BHWC: jax.Array) -> jax.Array:
    return jnp.clip(model.decode(model.encode(fill_up(x_BHWC))[0]), -1, 1)[: x_BHWC.shape[0]]


@compiled()
def _interpolate(model: VAE, ends_BHWC: jax.Array, part_S: jax.Array) -> jax.Array:
    a_Z, b_Z = model.encode(ends_BHWC)[0]
    return jnp.clip(model.decode(a_Z[None] + part_S[:, None] * (b_Z - a_Z)[None]), -1, 1)
