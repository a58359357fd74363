"""The dense causal decoder: GPT-2, Llama and what lies between.

Dims: B batch, T sequence, D embed, F mlp, V vocab, L layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from artifex.models import layers
from artifex.models.stack import run_stack, stack
from artifex.models.transformer.attention import Attention, Cache
from artifex.models.transformer.config import DecoderConfig
from artifex.models.transformer.generate import generate
from artifex.scaling import axes

CONSTANT_POSITIONS = 2**15


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)). Shazeer 2020 (arXiv:2002.05202)."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        D, F = cfg.embed_dim, cfg.feed_forward
        self.gate = layers.Linear((D, F), ("embed", "mlp"), bias=cfg.bias, rngs=rngs)
        self.up = layers.Linear((D, F), ("embed", "mlp"), bias=cfg.bias, rngs=rngs)
        self.down = layers.Linear((F, D), ("mlp", "embed"), bias=cfg.bias, scale=0.5 / cfg.num_layers, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF, up_BTF = layers.fused(x_BTD, self.gate, self.up)
        return self.down(axes.shard(jax.nn.silu(gate_BTF) * up_BTF, "batch", "sequence", "act_mlp"))


class GeluMLP(nnx.Module):
    """down(gelu(up(x))) with the tanh form of GPT-2. Hendrycks and Gimpel 2016 (arXiv:1606.08415)."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        D, F = cfg.embed_dim, cfg.feed_forward
        self.up = layers.Linear((D, F), ("embed", "mlp"), bias=cfg.bias, rngs=rngs)
        self.down = layers.Linear((F, D), ("mlp", "embed"), bias=cfg.bias, scale=0.5 / cfg.num_layers, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        h_BTF = axes.shard(jax.nn.gelu(self.up(x_BTD), approximate=True), "batch", "sequence", "act_mlp")
        return self.down(h_BTF)


def norm(cfg: DecoderConfig) -> nnx.Module:
    """The configured norm over the residual stream."""
    if cfg.norm == "rmsnorm":
        return layers.RMSNorm(cfg.embed_dim, eps=cfg.norm_eps)
    return layers.LayerNorm(cfg.embed_dim, eps=cfg.norm_eps, bias=cfg.bias)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.dropout = cfg.dropout
        self.attention_norm = norm(cfg)
        self.attention = Attention(cfg, rngs=rngs)
        self.mlp_norm = norm(cfg)
        self.mlp = SwiGLU(cfg, rngs=rngs) if cfg.mlp == "swiglu" else GeluMLP(cfg, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_T: jax.Array | np.ndarray,
        key: jax.Array | None = None,
        cache: Cache | None = None,
        start: int | jax.Array = 0,
    ) -> tuple[jax.Array, Cache | None]:
        keys = (None, None) if key is None else jax.random.split(key)
        mixed_BTD, cache = self.attention(self.attention_norm(x_BTD), positions_T, cache, start)
        x_BTD = stream(x_BTD + layers.dropout(mixed_BTD, self.dropout, keys[0]))
        x_BTD = stream(x_BTD + layers.dropout(self.mlp(self.mlp_norm(x_BTD)), self.dropout, keys[1]))
        return x_BTD, cache


def stream(x_BTD: jax.Array) -> jax.Array:
    """The residual stream, laid out by its names."""
    return axes.shard(x_BTD, "batch", "sequence", "hidden")


class Decoder(nnx.Module):
    """Tokens (B, T) -> logits (B, T, V) of the next token at each position."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embed = layers.Embed(cfg.vocab_size, cfg.embed_dim, ("vocab", "embed"), rngs=rngs)
        if cfg.positions == "learned":
            self.positions = layers.Embed(cfg.sequence_length, cfg.embed_dim, ("positions", "embed"), rngs=rngs)
        self.layers = stack(lambda rngs: Block(cfg, rngs=rngs), cfg.num_layers, rngs)
        self.norm = norm(cfg)
        if not cfg.tied_head:
            self.head = layers.Linear((cfg.embed_dim, cfg.vocab_size), ("embed", "vocab"), rngs=rngs)

    def __call__(self, tokens_BT: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Logits (B, T, V), float32. Raises `ValueError` for sequences longer than the model's."""
        length = tokens_BT.shape[1]
        self.check_length(length)
        key = rngs.dropout() if rngs is not None and self.cfg.dropout > 0 else None
        # constants of the program, as long as they are small beside it
        positions_T = np.arange(length) if length <= CONSTANT_POSITIONS else jnp.arange(length)
        x_BTD = self.embed_tokens(tokens_BT, positions_T, key)
        keys_L = None if key is None else jax.random.split(jax.random.fold_in(key, 1), self.cfg.num_layers)
        x_BTD, _ = run_stack(
            self.layers, x_BTD, self.cfg.num_layers, lambda block, x, key: (block(x, positions_T, key)[0], None), keys_L
        )
        return self.read_out(x_BTD)

    def embed_tokens(
        self, tokens_BT: jax.Array, positions_T: jax.Array | np.ndarray, key: jax.Array | None = None
    ) -> jax.Array:
        """Token and, where they are learned, position vectors: (B, T, D)."""
        x_BTD = self.embed(tokens_BT)
        if self.cfg.positions == "learned":
            x_BTD = x_BTD + self.positions(jnp.asarray(positions_T))[None]
        return stream(layers.dropout(x_BTD, self.cfg.dropout, key))

    def read_out(self, x_BTD: jax.Array) -> jax.Array:
        """Final norm and output head: float32 logits (B, T, V)."""
        x_BTD = self.norm(x_BTD)
        logits_BTV = self.embed.attend(x_BTD) if self.cfg.tied_head else self.head(x_BTD)
        return axes.shard(logits_BTV, "batch", "sequence", "act_vocab").astype(jnp.float32)

    def loss(self, batch: dict[str, jax.Array], rngs: nnx.Rngs | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean cross entropy in nats per target, and `{"weight": number of targets}`.

        `batch`: `tokens` and `targets` (B, T), integers, and optionally `mask` (B, T), 1 where a target counts.
        """
        logits_BTV, targets_BT = self(batch["tokens"], rngs), batch["targets"]
        # a comparison, not a gather: it stays local where logits are split over the vocabulary
        hit_BTV = jnp.arange(logits_BTV.shape[-1])[None, None] == targets_BT[..., None]
        picked_BT = jnp.sum(jnp.where(hit_BTV, logits_BTV, 0.0), axis=-1)
        nats_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT
        mask_BT = batch.get("mask")
        if mask_BT is None:
            return jnp.mean(nats_BT), {"weight": jnp.float32(nats_BT.size)}
        mask_BT = mask_BT.astype(jnp.float32)
        weight = jnp.sum(mask_BT)
        return jnp.sum(nats_BT * mask_BT) / jnp.maximum(weight, 1.0), {"weight": weight}

    def sample(self, key: jax.Array, **how: Any) -> jax.Array:
        """Continuations of a prompt: see `artifex.models.transformer.generate.generate`."""
        return generate(self, key, **how)

    def check_length(self, length: int) -> None:
        """Raise `ValueError` where `length` positions are more than the model was made for."""
        if length > self.cfg.sequence_length:
            raise ValueError(
                f"sequence of {length} tokens, but the model's sequence_length is {self.cfg.sequence_length}; "
                "shorten the input or build the model with a longer one"
            )
