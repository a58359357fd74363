"""The KL autoencoder of latent diffusion: residual encoder and decoder with a Gaussian latent of a few channels.

Rombach et al. 2022 (arXiv:2112.10752), without perceptual and adversarial losses: in the mean over an image's values,
loss = |x - x'| + (x - x')^2 + kl_weight KL(q(z|x) || N(0, 1)), z drawn from q = N(mean, exp(logvar)).

Dims: B batch, H height, W width, C channels, Z latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from artifex.models.batch import check_images
from artifex.models.convolution import Conv, GroupNorm
from artifex.models.layers import noise_key
from artifex.models.module import Module
from artifex.models.resnet import Downsample, ResnetBlock, SpatialAttention, Upsample
from artifex.models.rows import fill_up
from artifex.models.vae.config import KLAutoencoderConfig
from artifex.models.vae.vae import LOGVAR_RANGE, gaussian_kl, image_weights, refuse_labels, weighted_mean
from artifex.scaling.execution import by_rows, compiled

EPS = 1e-6  # of every group norm


class Level(Module):
    """Residual blocks at one resolution, then a change of resolution but at the last level."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, groups: int, resample: nnx.Module | None, *, rngs: nnx.Rngs
    ):
        self.blocks = nnx.List(
            [ResnetBlock(outputs if i else inputs, outputs, groups=groups, eps=EPS, rngs=rngs) for i in range(blocks)]
        )
        self.resample = resample

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        for block in self.blocks:
            x_BHWC = block(x_BHWC)
        return x_BHWC if self.resample is None else self.resample(x_BHWC)


class Middle(Module):
    """Residual block, attention over all pixels (or none), residual block."""

    def __init__(self, channels: int, groups: int, attention: bool, *, rngs: nnx.Rngs):
        self.block1 = ResnetBlock(channels, channels, groups=groups, eps=EPS, rngs=rngs)
        self.attention = SpatialAttention(channels, groups=groups, eps=EPS, rngs=rngs) if attention else None
        self.block2 = ResnetBlock(channels, channels, groups=groups, eps=EPS, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        x_BHWC = self.block1(x_BHWC)
        return self.block2(x_BHWC if self.attention is None else self.attention(x_BHWC))


class Encoder(Module):
    """(B, H, W, C) -> (B, H / 2^n, W / 2^n, 2 Z): mean and log-variance, before the convolution on them."""

    def __init__(self, cfg: KLAutoencoderConfig, *, rngs: nnx.Rngs):
        widths: Sequence[int] = cfg.block_channels
        last = widths[-1]
        self.conv_in = Conv(cfg.channels, widths[0], rngs=rngs)
        self.levels = nnx.List()
        for index, width in enumerate(widths):
            down = Downsample(width, (0, 1), rngs=rngs) if index + 1 < len(widths) else None
            before = widths[max(index - 1, 0)]
            self.levels.append(Level(before, width, cfg.layers_per_block, cfg.groups, down, rngs=rngs))
        self.middle = Middle(last, cfg.groups, cfg.mid_attention, rngs=rngs)
        self.norm_out = GroupNorm(last, cfg.groups, eps=EPS)
        self.conv_out = Conv(last, 2 * cfg.latent_channels, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        h = self.conv_in(x_BHWC.astype(self.conv_in.kernel[...].dtype))
        for level in self.levels:
            h = level(h)
        return self.conv_out(nnx.silu(self.norm_out(self.middle(h))))


class Decoder(Module):
    """(B, H / 2^n, W / 2^n, Z) -> (B, H, W, C)."""

    def __init__(self, cfg: KLAutoencoderConfig, *, rngs: nnx.Rngs):
        widths = cfg.block_channels[::-1]
        self.conv_in = Conv(cfg.latent_channels, widths[0], rngs=rngs)
        self.middle = Middle(widths[0], cfg.groups, cfg.mid_attention, rngs=rngs)
        self.levels = nnx.List()
        for index, width in enumerate(widths):
            up = Upsample(width, rngs=rngs) if index + 1 < len(widths) else None
            before = widths[max(index - 1, 0)]
            self.levels.append(Level(before, width, cfg.layers_per_block + 1, cfg.groups, up, rngs=rngs))
        self.norm_out = GroupNorm(widths[-1], cfg.groups, eps=EPS)
        self.conv_out = Conv(widths[-1], cfg.channels, rngs=rngs)

    def __call__(self, z_BHWZ: jax.Array) -> jax.Array:
        h = self.middle(self.conv_in(z_BHWZ))
        for level in self.levels:
            h = level(h)
        return self.conv_out(nnx.silu(self.norm_out(h)))


class KLAutoencoder(Module):
    """An image as a small one of `latent_channels`, in which diffusion runs."""

    def __init__(self, cfg: KLAutoencoderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.encoder = Encoder(cfg, rngs=rngs)
        Z = cfg.latent_channels
        self.latent_out = Conv(2 * Z, 2 * Z, 1, rngs=rngs) if cfg.latent_convs else None
        self.latent_in = Conv(Z, Z, 1, rngs=rngs) if cfg.latent_convs else None
        self.decoder = Decoder(cfg, rngs=rngs)

    @by_rows()
    def encode(self, x_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance of q(z|x), each (B, latent_size, latent_size, Z) float32, as yet unscaled.

        Raises `ValueError` for other channels, and for sizes that do not halve as often as the levels ask.
        """
        halved, channels = 2 ** (len(self.cfg.block_channels) - 1), self.cfg.channels
        if x_BHWC.shape[1] % halved or x_BHWC.shape[2] % halved or x_BHWC.shape[3] != channels:
            raise ValueError(
                f"images of shape {x_BHWC.shape[1:]}, but the autoencoder takes {channels} channels and sizes that "
                f"divide by {halved}; resize them"
            )
        h = self.encoder(x_BHWC)
        h = h if self.latent_out is None else self.latent_out(h)
        mean, logvar = jnp.split(h.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    @by_rows()
    def decode(self, z_BHWZ: jax.Array) -> jax.Array:
        """The image of an unscaled latent: (B, H, W, C) float32, not clipped."""
        z = z_BHWZ.astype(self.decoder.conv_in.kernel[...].dtype)
        z = z if self.latent_in is None else self.latent_in(z)
        return self.decoder(z).astype(jnp.float32)

    def loss(
        self, batch: Mapping[str, jax.Array], rngs: nnx.Rngs | None = None, *, index: int | jax.Array = 0
    ) -> tuple[jax.Array, dict]:
        """The equation above. Without `rngs` the noise is that of batch `index`.

        `kl` is in nats to an image; `latent_mean` and `latent_std` are over all numbers of the drawn latents:
        `latent_shift` and 1 / `latent_scale` for diffusion.
        """
        check_images(batch)
        x_BHWC, weights_B = batch["image"], image_weights(batch)
        mean, logvar = self.encode(x_BHWC)
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(noise_key(rngs, index), mean.shape)
        error = x_BHWC - self.decode(z)
        mse = weighted_mean(jnp.mean(jnp.square(error), axis=(1, 2, 3)), weights_B)
        absolute = weighted_mean(jnp.mean(jnp.abs(error), axis=(1, 2, 3)), weights_B)
        kl = weighted_mean(gaussian_kl(mean, logvar), weights_B)
        latent_mean = weighted_mean(jnp.mean(z, axis=(1, 2, 3)), weights_B)
        latent_variance = weighted_mean(jnp.mean(jnp.square(z - latent_mean), axis=(1, 2, 3)), weights_B)
        metrics = {
            "weight": jnp.sum(weights_B),
            "mse": mse,
            "kl": kl,
            "latent_mean": latent_mean,
            "latent_std": jnp.sqrt(latent_variance),
        }
        return absolute + mse + self.cfg.kl_weight * kl / math.prod(x_BHWC.shape[1:]), metrics

    def reconstruct(self, x_BHWC: jax.Array) -> jax.Array:
        """The image of the posterior's mean, in [-1, 1]."""
        return _reconstruct(self, x_BHWC)

    def sample(self, key: jax.Array, *, count: int, labels: jax.Array | None = None) -> jax.Array:
        """`count` images of independent Gaussian latents, (count, H, W, C) in [-1, 1]: what diffusion starts from.

        Their mean and deviation are those that `latent_shift` and `latent_scale` state. There are no labels to take.
        """
        refuse_labels(labels)
        size, (shift, scale) = self.cfg.latent_size, self.cfg.shift_and_scale
        noise = jax.random.normal(key, (count, size, size, self.cfg.latent_channels))
        return _decode(self, noise / scale + shift)


@compiled()
def _decode(model: KLAutoencoder, z_BHWZ: jax.Array) -> jax.Array:
    return jnp.clip(model.decode(fill_up(z_BHWZ)), -1, 1)[: z_BHWZ.shape[0]]


@compiled()
def _reconstruct(model: KLAutoencoder, x_BHWC: jax.Array) -> jax.Array:
    return jnp.clip(model.decode(model.encode(fill_up(x_BHWC))[0]), -1, 1)[: x_BHWC.shape[0]]
