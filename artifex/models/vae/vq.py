"""An autoencoder with a grid of discrete codes: VQ-VAE or FSQ, as its quantizer is.

van den Oord et al. 2017 (arXiv:1711.00937), equation 3 with the codebook moved by running means:
loss = mean (x - x')^2 + commitment * mean (z - stop_gradient(e))^2, both over all numbers of an image.

Dims: B batch, H height, W width, C channels, Z latent, K codes, P positions of the grid.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from artifex.models.batch import check_images
from artifex.models.convolution import Conv
from artifex.models.layers import Statistic, buffer
from artifex.models.module import Module
from artifex.models.rows import fill_up
from artifex.models.vae.config import VQConfig
from artifex.models.vae.quantizers import FiniteScalarQuantizer, Quantized, VectorQuantizer, perplexity
from artifex.models.vae.vae import ConvDecoder, ConvEncoder, image_weights, refuse_labels, weighted_mean
from artifex.scaling.execution import compiled


class VQVAE(Module):
    """An image as (H, W) codes of `cfg.num_codes`. `usage` holds how often each is used at each position."""

    def __init__(self, cfg: VQConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        sizes, width = (cfg.channels, cfg.block_channels, cfg.residual_blocks, cfg.groups), cfg.block_channels[-1]
        self.encoder = ConvEncoder(*sizes, rngs=rngs)
        self.quantizer = (
            VectorQuantizer(cfg.codes, cfg.latent_dim, decay=cfg.ema_decay, revive_below=cfg.revive_below, rngs=rngs)
            if cfg.quantizer == "vq"
            else FiniteScalarQuantizer(cfg.fsq_levels)
        )
        self.project = Conv(width, self.quantizer.width, 1, names=("conv_in", "latent"), rngs=rngs)
        self.expand = Conv(self.quantizer.width, width, 1, names=("latent", "conv_out"), rngs=rngs)
        self.decoder = ConvDecoder(*sizes, rngs=rngs)
        self.usage = buffer(jnp.zeros((cfg.latent_size**2, cfg.num_codes)), "positions", "codes", kind=Statistic)

    def encode(self, x_BHWC: jax.Array) -> Quantized:
        """Values, codes (B, H, W) and commitment for images."""
        return self.quantizer(self.project(self.encoder(x_BHWC)), jnp.ones(x_BHWC.shape[0]))

    def decode(self, values_BHWZ: jax.Array) -> jax.Array:
        """Images (B, H, W, C) float32 of quantized values, not clipped."""
        values = values_BHWZ.astype(self.expand.kernel[...].dtype)
        return self.decoder(self.expand(values)).astype(jnp.float32)

    def decode_codes(self, codes_BHW: jax.Array) -> jax.Array:
        """Images of codes."""
        return self.decode(self.quantizer.vectors(codes_BHW))

    def loss(
        self, batch: Mapping[str, jax.Array], rngs: nnx.Rngs | None = None, *, index: int | jax.Array = 0
    ) -> tuple[jax.Array, dict]:
        """The equation above; with `rngs`, the codebook and the usage follow the batch.

        `perplexity` and `codes_used` are of the codes of this batch. Validation draws nothing, whatever its `index`.
        """
        check_images(batch)
        x_BHWC, weights_B = batch["image"], image_weights(batch)
        z_BHWZ = self.project(self.encoder(x_BHWC))
        quantized = self.quantizer(z_BHWZ, weights_B, None if rngs is None else rngs.noise())
        uses_PK = self._uses(quantized.codes, weights_B)
        if rngs is not None:
            kept = self.cfg.ema_decay
            self.usage[...] = kept * self.usage[...] + (1 - kept) * uses_PK
        errors_B = jnp.mean(jnp.square(x_BHWC - self.decode(quantized.values)), axis=(1, 2, 3))
        mse, commitment = weighted_mean(errors_B, weights_B), weighted_mean(quantized.commitment, weights_B)
        counts_K = jnp.sum(uses_PK, axis=0)
        metrics = {
            "weight": jnp.sum(weights_B),
            "mse": mse,
            "commitment": commitment,
            "perplexity": perplexity(counts_K),
            "codes_used": jnp.sum(counts_K > 0).astype(jnp.float32),
        }
        return mse + self.cfg.commitment * commitment, metrics

    def _uses(self, codes_BHW: jax.Array, weights_B: jax.Array) -> jax.Array:
        """How many images of the batch use each code at each position: (P, K)."""
        codes_BP = codes_BHW.reshape(codes_BHW.shape[0], -1)
        position_BP = jnp.broadcast_to(jnp.arange(codes_BP.shape[1])[None], codes_BP.shape)
        weights_BP = jnp.broadcast_to(weights_B[:, None], codes_BP.shape)
        return jnp.zeros_like(self.usage[...]).at[position_BP, codes_BP].add(weights_BP)

    def reconstruct(self, x_BHWC: jax.Array) -> jax.Array:
        """The image of its codes, in [-1, 1]."""
        return _reconstruct(self, x_BHWC)

    def sample(self, key: jax.Array, *, count: int, labels: jax.Array | None = None) -> jax.Array:
        """`count` images (count, H, W, C) in [-1, 1], each position's code drawn by its running frequency there.

        Positions are drawn apart from each other: this shows what the codes mean, a model over them draws images.
        There are no labels to take.
        """
        refuse_labels(labels)
        return _sample(self, key, count=count)


@compiled()
def _reconstruct(model: VQVAE, x_BHWC: jax.Array) -> jax.Array:
    return jnp.clip(model.decode(model.encode(fill_up(x_BHWC)).values), -1, 1)[: x_BHWC.shape[0]]


@compiled("count")
def _sample(model: VQVAE, key: jax.Array, *, count: int) -> jax.Array:
    usage_PK = model.usage[...]
    # untrained, all codes are as likely
    logits_PK = jnp.log(jnp.maximum(usage_PK, 1e-30))
    codes_BP = jax.random.categorical(key, logits_PK, shape=(count, usage_PK.shape[0]))
    size = model.cfg.latent_size
    codes_BHW = fill_up(codes_BP.reshape(count, size, size))
    return jnp.clip(model.decode_codes(codes_BHW), -1, 1)[:count]
