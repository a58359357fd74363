"""A transformer over two streams, image and text, that attend jointly. Esser et al. 2024 (arXiv:2403.03206).

Dims: B batch, H height, W width, C channels, T image tokens, S text tokens, D embed, E condition, X text features.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from artifex.models import layers
from artifex.models.attention import dot_product_attention
from artifex.models.diffusion.blocks import AdaptiveNorm, Block, Head, Patches, TimeEmbedding, by_heads, stream
from artifex.models.diffusion.networks import MMDiTConfig
from artifex.models.module import Module
from artifex.models.stack import stack
from artifex.models.staged import Stack, Start, through

FREQUENCIES = 256  # sines and cosines of the time


class JointBlock(Module):
    """A block of its own for each stream; queries, keys and values of both attend as one sequence."""

    def __init__(self, cfg: MMDiTConfig, *, rngs: nnx.Rngs):
        self.image, self.text = Block(cfg, rngs=rngs), Block(cfg, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, y_BSD: jax.Array, c_BE: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_image, image_rest = self.image.open(x_BTD, c_BE)
        of_text, text_rest = self.text.open(y_BSD, c_BE)
        joint = [jnp.concatenate(pair, axis=1) for pair in zip(of_image, of_text, strict=True)]
        mixed = dot_product_attention(*joint)
        image, text = mixed[:, : x_BTD.shape[1]], mixed[:, x_BTD.shape[1] :]
        return self.image.close(x_BTD, image, image_rest), self.text.close(y_BSD, text, text_rest)


class LastBlock(Module):
    """The last block: nothing reads its text stream, so of the text it has keys and values alone."""

    def __init__(self, cfg: MMDiTConfig, *, rngs: nnx.Rngs):
        self.image = Block(cfg, rngs=rngs)
        self.text_norm = AdaptiveNorm(cfg.embed_dim, cfg.embed_dim, rngs=rngs)
        shape = (cfg.embed_dim, cfg.num_heads, cfg.embed_dim // cfg.num_heads)
        self.text_key = layers.Linear(shape, ("embed", "heads", "head_dim"), bias=True, rngs=rngs)
        self.text_value = layers.Linear(shape, ("embed", "heads", "head_dim"), bias=True, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, y_BSD: jax.Array, c_BE: jax.Array) -> jax.Array:
        (query, key, value), rest = self.image.open(x_BTD, c_BE)
        of_text = layers.fused(self.text_norm(y_BSD, c_BE), self.text_key, self.text_value)
        text_key, text_value = (by_heads(part) for part in of_text)
        key, value = jnp.concatenate([key, text_key], 1), jnp.concatenate([value, text_value], 1)
        return self.image.close(x_BTD, dot_product_attention(query, key, value), rest)


class PooledEmbedding(Module):
    """second(silu(first(x))): the whole text's vector (B, pooled_dim) -> (B, condition)."""

    def __init__(self, features: int, condition: int, *, rngs: nnx.Rngs):
        names = ("in_features", "condition")
        self.first = layers.Linear((features, condition), names, bias=True, hidden=False, rngs=rngs)
        self.second = layers.Linear((condition, condition), ("condition", "condition"), bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(jax.nn.silu(self.first(x.astype(self.first.kernel.dtype))))


class MMDiT(Module):
    """Noisy images, times and embedded text -> prediction."""

    def __init__(self, cfg: MMDiTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.patches = Patches(cfg, cfg.position_grid, rngs=rngs)
        self.time = TimeEmbedding(FREQUENCIES, cfg.embed_dim, shift=0, rngs=rngs)
        self.pooled = PooledEmbedding(cfg.pooled_dim, cfg.embed_dim, rngs=rngs)
        shape, names = (cfg.context_dim, cfg.embed_dim), ("context", "embed")
        self.context = layers.Linear(shape, names, bias=True, hidden=False, rngs=rngs)
        self.layers = stack(lambda rngs: JointBlock(cfg, rngs=rngs), cfg.num_layers - 1, rngs)
        self.last = LastBlock(cfg, rngs=rngs)
        self.head = Head(cfg, rngs=rngs)

    def __call__(
        self, x_BHWC: jax.Array, t_B: jax.Array, condition: Mapping[str, jax.Array] | None = None
    ) -> jax.Array:
        """float32 (B, H, W, out_channels), for t from 0 to 1000.

        `condition`: "context" (B, S, context_dim), the embedded tokens of a text, and "pooled" (B, pooled_dim), a
        vector of the whole; without any, one token of zeros and a vector of zeros: no text. Raises `ValueError` for
        another structure.
        """
        start = self.begin(x_BHWC, t_B, condition)
        return self.finish(through(self, start)[0], start.beside)

    @property
    def stack(self) -> Stack:
        """The repeated blocks, all but the last, and how one runs."""
        return Stack(("layers",), self.cfg.num_layers - 1, _apply)

    def begin(self, x_BHWC: jax.Array, t_B: jax.Array, condition: Mapping[str, jax.Array] | None = None) -> Start:
        """Patches and text as two streams, and beside them the embedding of time and text (B, E)."""
        context_BSX, pooled = self.text(condition, x_BHWC.shape[0])
        c_BE = self.time(t_B) + self.pooled(pooled)
        y_BSD = stream(self.context(context_BSX.astype(self.context.kernel.dtype)))
        return Start((self.patches(x_BHWC), y_BSD), c_BE)

    def finish(self, streams: tuple[jax.Array, jax.Array], c_BE: jax.Array) -> jax.Array:
        """The prediction from both streams before the last block."""
        return self.head(self.last(*streams, c_BE), c_BE)

    def text(self, condition: Mapping[str, jax.Array] | None, batch: int) -> tuple[jax.Array, jax.Array]:
        """The text's tokens (B, S, X) and vector (B, pooled_dim), zeros where there is none."""
        if condition is None:
            return jnp.zeros((batch, 1, self.cfg.context_dim)), jnp.zeros((batch, self.cfg.pooled_dim))
        if set(condition) != {"context", "pooled"}:
            raise ValueError(f"condition has {sorted(condition)}; give 'context' and 'pooled'")
        context, pooled = condition["context"], condition["pooled"]
        if context.ndim != 3 or (context.shape[0], context.shape[2]) != (batch, self.cfg.context_dim):
            raise ValueError(f"context is {context.shape}; give ({batch}, tokens, {self.cfg.context_dim})")
        if pooled.shape != (batch, self.cfg.pooled_dim):
            raise ValueError(f"pooled is {pooled.shape}; give ({batch}, {self.cfg.pooled_dim})")
        return context, pooled


def _apply(
    block: JointBlock, streams: tuple[jax.Array, jax.Array], c_BE: jax.Array, _: None
) -> tuple[tuple[jax.Array, jax.Array], None]:
    return block(*streams, c_BE), None
