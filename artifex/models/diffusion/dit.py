"""The diffusion transformer with adaLN-Zero. Peebles and Xie 2022 (arXiv:2212.09748).

Dims: B batch, H height, W width, C channels, T tokens, D embed, E condition.
"""

from __future__ import annotations

import jax
from flax import nnx

from artifex.models.attention import dot_product_attention
from artifex.models.diffusion.blocks import Block, Condition, Head, Patches
from artifex.models.diffusion.networks import DiTConfig
from artifex.models.module import Module
from artifex.models.stack import stack
from artifex.models.staged import Stack, Start, through

FREQUENCIES = 256  # sines and cosines of the time


class DiT(Module):
    """Noisy images, times and labels -> prediction. One embedding of time and label serves all blocks."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.patches = Patches(cfg, rngs=rngs)
        self.condition = Condition(FREQUENCIES, cfg.embed_dim, cfg.num_classes, rngs=rngs)
        self.layers = stack(lambda rngs: Block(cfg, mlp_norm_eps=cfg.mlp_norm_eps, rngs=rngs), cfg.num_layers, rngs)
        self.head = Head(cfg, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array, t_B: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        """float32 (B, H, W, out_channels), for t from 0 to 999.

        `condition`: integer labels (B,), where `num_classes` means none; without any, none for all. Raises `ValueError`
        for images and labels that the network does not take.
        """
        start = self.begin(x_BHWC, t_B, condition)
        return self.finish(through(self, start)[0], start.beside)

    @property
    def stack(self) -> Stack:
        """The repeated blocks, and how one runs."""
        return Stack(("layers",), self.cfg.num_layers, _apply)

    def begin(self, x_BHWC: jax.Array, t_B: jax.Array, condition: jax.Array | None = None) -> Start:
        """Patches, and beside them the embedding of time and label (B, E)."""
        return Start(self.patches(x_BHWC), self.condition(t_B, condition))

    def finish(self, x_BTD: jax.Array, c_BE: jax.Array) -> jax.Array:
        """The prediction from the stream after all blocks."""
        return self.head(x_BTD, c_BE)


@jax.named_scope("Block")
def _apply(block: Block, x_BTD: jax.Array, c_BE: jax.Array, _: None) -> tuple[jax.Array, None]:
    qkv, rest = block.open(x_BTD, c_BE)
    return block.close(x_BTD, dot_product_attention(*qkv), rest), None
