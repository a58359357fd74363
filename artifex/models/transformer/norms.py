"""The decoder's norms: over the residual stream and over the features of a head, as its configuration says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from artifex.models import layers
from artifex.models.module import Module
from artifex.models.transformer.config import DecoderConfig


class OffsetRMSNorm(Module):
    """x / rms(x) * (offset + scale) over the last dim, all of it in float32 as in Gemma (arXiv:2403.08295).

    The scale starts at 1 - offset: weight decay then pulls the factor to the offset, not to 0.
    """

    def __init__(self, features: int, name: str, *, offset: float, eps: float):
        self.offset, self.eps = offset, eps
        self.scale = layers.parameter(jnp.full(features, 1 - offset), name)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        factor = self.offset + self.scale[...].astype(jnp.float32)
        return (x32 * factor.reshape((1,) * (x.ndim - 1) + factor.shape)).astype(x.dtype)


def stream_norm(cfg: DecoderConfig) -> nnx.Module:
    """The configured norm over the residual stream."""
    if cfg.norm == "layernorm":
        return layers.LayerNorm(cfg.embed_dim, eps=cfg.norm_eps, bias=cfg.bias)
    return rms_norm(cfg, cfg.embed_dim, "embed")


def rms_norm(cfg: DecoderConfig, features: int, name: str) -> nnx.Module:
    """An RMS norm over a dim called `name`."""
    if cfg.norm_offset:
        return OffsetRMSNorm(features, name, offset=cfg.norm_offset, eps=cfg.norm_eps)
    return layers.RMSNorm(features, name, eps=cfg.norm_eps)
