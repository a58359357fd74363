"""Dense feed-forward layers: gated, or plain as in GPT-2.

Dims: B batch, T sequence, D embed, F mlp.
"""

from __future__ import annotations

import functools

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from artifex.models import layers
from artifex.models.module import Module
from artifex.models.transformer.config import DecoderConfig
from artifex.scaling import axes

GATES = {"swiglu": jax.nn.silu, "geglu": functools.partial(jax.nn.gelu, approximate=True)}
"""What is applied to the gate, by the name of the layer."""


class GatedMLP(Module):
    """down(f(gate(x)) * up(x)) with f of `GATES`. Shazeer 2020 (arXiv:2002.05202)."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        D, F = cfg.embed_dim, cfg.feed_forward
        self.kind = cfg.mlp
        self.gate = layers.Linear((D, F), ("embed", "mlp"), bias=cfg.bias, rngs=rngs)
        self.up = layers.Linear((D, F), ("embed", "mlp"), bias=cfg.bias, rngs=rngs)
        self.down = layers.Linear((F, D), ("mlp", "embed"), bias=cfg.bias, scale=0.5 / cfg.num_layers, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF, up_BTF = (checkpoint_name(h, "hidden") for h in layers.fused(x_BTD, self.gate, self.up))
        return self.down(axes.shard(GATES[self.kind](gate_BTF) * up_BTF, "batch", "sequence", "act_mlp"))


class GeluMLP(Module):
    """down(gelu(up(x))) with the tanh form of GPT-2. Hendrycks and Gimpel 2016 (arXiv:1606.08415)."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        D, F = cfg.embed_dim, cfg.feed_forward
        self.up = layers.Linear((D, F), ("embed", "mlp"), bias=cfg.bias, rngs=rngs)
        self.down = layers.Linear((F, D), ("mlp", "embed"), bias=cfg.bias, scale=0.5 / cfg.num_layers, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        h_BTF = jax.nn.gelu(checkpoint_name(self.up(x_BTD), "hidden"), approximate=True)
        return self.down(axes.shard(h_BTF, "batch", "sequence", "act_mlp"))


def dense(cfg: DecoderConfig, *, rngs: nnx.Rngs) -> GatedMLP | GeluMLP:
    """The configured layer."""
    return GeluMLP(cfg, rngs=rngs) if cfg.mlp == "gelu" else GatedMLP(cfg, rngs=rngs)
