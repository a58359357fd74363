"""The decoder: blocks of attention and feed-forward layers between a token table and an output head.

Dims: B batch, T sequence, D embed, V vocab, L layers of the stack.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from artifex.models import layers
from artifex.models.batch import check_text
from artifex.models.cross_entropy import cross_entropy, read_logits
from artifex.models.module import Module
from artifex.models.stack import stack, unstack
from artifex.models.staged import Stack, Start, staged_loss, through
from artifex.models.transformer.attention import Attention, Place
from artifex.models.transformer.config import DecoderConfig
from artifex.models.transformer.feed_forward import dense
from artifex.models.transformer.generate import generate
from artifex.models.transformer.linear_attention import LinearAttention
from artifex.models.transformer.moe import MoE
from artifex.models.transformer.norms import stream_norm
from artifex.models.transformer.positions import Positions, positions_of
from artifex.scaling import axes

Aux = dict[str, jax.Array]
"""What a mixture of experts says of its routing, by name; empty for dense layers."""


class Block(Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with post-norms, each branch is normed at its end as well."""

    def __init__(self, cfg: DecoderConfig, *, window: int | None = None, rngs: nnx.Rngs):
        self.dropout = cfg.dropout
        self.attention_norm = stream_norm(cfg)
        linear = cfg.attention == "linear"
        self.attention = LinearAttention(cfg, rngs=rngs) if linear else Attention(cfg, window=window, rngs=rngs)
        self.attention_post_norm = stream_norm(cfg) if cfg.post_norms else None
        self.mlp_norm = stream_norm(cfg)
        self.mlp: Any = None if cfg.num_experts else dense(cfg, rngs=rngs)
        self.moe: Any = MoE(cfg, rngs=rngs) if cfg.num_experts else None
        self.mlp_post_norm = stream_norm(cfg) if cfg.post_norms else None

    def __call__(
        self,
        x_BTD: jax.Array,
        positions: Positions,
        key: jax.Array | None = None,
        cache: Any = None,
        at: Place | None = None,
    ) -> tuple[jax.Array, Any, Aux]:
        """The stream after the block, its attention's cache, and what its experts report."""
        keys = (None, None) if key is None else jax.random.split(key)
        read_BTD = axes.shard_for_pair(self.attention_norm(x_BTD), "act_heads")
        mixed_BTD, cache = self.attention(read_BTD, positions, cache, at)
        mixed_BTD = axes.shard_for_pair(mixed_BTD, "act_heads")
        x_BTD = self.add(x_BTD, mixed_BTD, self.attention_post_norm, keys[0], positions)
        mixed_BTD, aux = self.feed_forward(self.mlp_norm(x_BTD), decoding=at is not None)
        return self.add(x_BTD, mixed_BTD, self.mlp_post_norm, keys[1], positions), cache, aux

    def feed_forward(self, x_BTD: jax.Array, *, decoding: bool = False) -> tuple[jax.Array, Aux]:
        """The dense layer, or the mixture of experts and its report; decoding, experts take every token, because a
        capacity would be shared with the padding of other prompts."""
        if self.mlp is None:
            return self.moe(x_BTD, dropless=decoding)
        return axes.shard_for_pair(self.mlp(axes.shard_for_pair(x_BTD, "act_mlp")), "act_mlp"), {}

    def add(
        self,
        x_BTD: jax.Array,
        branch_BTD: jax.Array,
        norm: nnx.Module | None,
        key: jax.Array | None,
        positions: Positions | None = None,
    ) -> jax.Array:
        """The stream with a branch's output added; where a key drops some of it, in the order of `positions`."""
        branch_BTD = checkpoint_name(stream(branch_BTD), "branch")
        branch_BTD = branch_BTD if norm is None else norm(branch_BTD)
        return stream(x_BTD + layers.dropout(branch_BTD, self.dropout, key, positions and positions.arranged))


class Group(Module):
    """Consecutive blocks whose attention reaches differ, repeated as one: `cfg.attention_pattern`."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(cfg, window=window, rngs=rngs) for window in cfg.windows])

    def __call__(
        self,
        x_BTD: jax.Array,
        positions: Positions,
        key: jax.Array | None = None,
        cache: Any = None,
        at: Place | None = None,
    ) -> tuple[jax.Array, Any, Aux]:
        """The stream after all blocks, a cache for each, and the means of what their experts report."""
        count = len(self.blocks)
        keys = [None] * count if key is None else jax.random.split(key, count)
        caches, filled, reports = [None] * count if cache is None else cache, [], []
        for block, key, cache in zip(self.blocks, keys, caches, strict=True):
            x_BTD, cache, aux = block(x_BTD, positions, key, cache, at)
            filled.append(cache)
            reports.append(aux)
        return x_BTD, filled, jax.tree.map(lambda *values: sum(values) / len(values), *reports)


def repeated(cfg: DecoderConfig, rngs: nnx.Rngs) -> Block | Group:
    """What the stack repeats: one block, or a group of them where they differ."""
    if len(cfg.windows) > 1:
        return Group(cfg, rngs=rngs)
    return Block(cfg, window=cfg.windows[0], rngs=rngs)


def stream(x_BTD: jax.Array) -> jax.Array:
    """The residual stream, laid out by its names."""
    return axes.shard(x_BTD, "batch", "sequence", "hidden")


def _apply(block: Block | Group, x_BTD: jax.Array, places: Positions, key: jax.Array | None) -> tuple[jax.Array, Aux]:
    x_BTD, _, aux = block(x_BTD, places, key)
    return x_BTD, aux


class Decoder(Module):
    """Tokens (B, T) -> logits (B, T, V) of the next token at each position."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embed = layers.Embed(cfg.vocab_size, cfg.embed_dim, ("vocab", "embed"), rngs=rngs)
        if cfg.positions == "learned":
            self.positions = layers.Embed(cfg.sequence_length, cfg.embed_dim, ("positions", "embed"), rngs=rngs)
        self.layers = stack(lambda rngs: repeated(cfg, rngs), cfg.num_groups, rngs)
        self.norm = stream_norm(cfg)
        if not cfg.tied_head:
            self.head = layers.Linear((cfg.embed_dim, cfg.vocab_size), ("embed", "vocab"), hidden=False, rngs=rngs)

    def __call__(
        self,
        tokens_BT: jax.Array,
        rngs: nnx.Rngs | None = None,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """Logits (B, T, V), float32. `positions` and `segments` (B, T), integers, are those of `loss`.

        Raises `ValueError` for sequences longer than the model's.
        """
        places = positions_of(self.cfg, tokens_BT.shape, positions, segments)
        return self.read_out(places.restored(through(self, self.begin(tokens_BT, self.dropout_key(rngs), places))[0]))

    @property
    def stack(self) -> Stack:
        """The repeated blocks, and how one runs."""
        return Stack(("layers",), self.cfg.num_groups, _apply)

    def dropout_key(self, rngs: nnx.Rngs | None) -> jax.Array | None:
        """The key of all dropout of one pass; None where nothing is dropped."""
        return rngs.dropout() if rngs is not None and self.cfg.dropout > 0 else None

    def begin(self, tokens_BT: jax.Array, key: jax.Array | None, places: Positions) -> Start:
        """The embedded tokens in the order of `places`, these beside them, and a key for each layer. Raises
        `ValueError` for too many tokens."""
        self.check_length(tokens_BT.shape[1])
        x_BTD = self.embed_tokens(places.arranged(tokens_BT), places.index)
        x_BTD = stream(layers.dropout(x_BTD, self.cfg.dropout, key, places.arranged))
        keys_L = None if key is None else jax.random.split(jax.random.fold_in(key, 1), self.cfg.num_groups)
        return Start(x_BTD, places, keys_L)

    def blocks(self) -> list[Block]:
        """The blocks one by one, in the order in which they run: for looking at what each does."""
        repeats: list[Any] = unstack(self.layers, self.cfg.num_groups)
        return [block for one in repeats for block in (one.blocks if isinstance(one, Group) else [one])]

    def embed_tokens(self, tokens_BT: jax.Array, index: jax.Array | np.ndarray) -> jax.Array:
        """Token and, where they are learned, position vectors: (B, T, D); `index` is (T,) or (B, T)."""
        x_BTD = self.embed(tokens_BT)
        if self.cfg.embed_scale:
            x_BTD = x_BTD * math.sqrt(self.cfg.embed_dim)
        if self.cfg.positions == "learned":
            index = jnp.asarray(index)
            x_BTD = x_BTD + self.positions(index if index.ndim == 2 else index[None])
        return stream(x_BTD)

    def read_out(self, x_BTD: jax.Array) -> jax.Array:
        """Final norm and output head: float32 logits (B, T, V)."""
        return read_logits(self.norm(x_BTD), self.head_DV, softcap=self.cfg.logit_softcap)

    @property
    def head_DV(self) -> jax.Array:
        """The output head, which may be the token table."""
        return self.embed.table[...].T if self.cfg.tied_head else self.head.kernel[...]

    def cross_entropy(
        self, x_BTD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array | None, never: int | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Final norm, output head, and `artifex.models.cross_entropy.cross_entropy` of its logits."""
        cap = self.cfg.logit_softcap
        with layers.laid_as(self.embed.table if self.cfg.tied_head else self.head.kernel):
            return cross_entropy(self.norm(x_BTD), self.head_DV, targets_BT, mask_BT, softcap=cap, never=never)

    def loss(
        self, batch: dict[str, jax.Array], rngs: nnx.Rngs | None = None, *, index: int | jax.Array = 0
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean cross entropy in nats per target, and `{"weight": number of targets}`.

        With experts the weighted balance losses are added to it, and with `z_loss_weight` that times `z_loss`, the
        mean square of logsumexp(logits); the metrics then hold the cross entropy as `nats`, and these
        (`artifex.models.transformer.moe.MoE`).
        `batch`: `tokens` and `targets` (B, T), integers, and optionally `mask` (B, T), 1 where a target counts. Rows of
        several documents have `segments` (B, T), integers, one number a document, which sees no other, and perhaps
        `positions` (B, T), of each token in its document, which are else counted. There is no noise, whatever its
        `index`. NaN for token ids outside the vocabulary, and for such targets where they
        count. Raises `TypeError` or `ValueError` for what is no such batch.
        """
        return staged_loss(self, batch, rngs, index)

    def prepare(
        self, batch: dict[str, jax.Array], rngs: nnx.Rngs | None, index: int | jax.Array
    ) -> tuple[dict[str, Any], jax.Array | None]:
        """The batch, and the key of its dropout."""
        check_text(batch, "tokens", "targets")
        return dict(batch), self.dropout_key(rngs)

    def before(self, rows: dict[str, Any], key: jax.Array | None) -> Start:
        """What enters the blocks."""
        packed = (rows.get("positions"), rows.get("segments"))
        places = positions_of(self.cfg, rows["tokens"].shape, *packed, must_divide=True)
        return self.begin(rows["tokens"], key, places)

    def after(
        self, x_BTD: jax.Array, aux: Aux, places: Positions, rows: dict[str, Any]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss and metrics of what the blocks made of the rows."""
        targets_BT, mask_BT = (places.arranged(rows.get(name)) for name in ("targets", "mask"))
        nats, z_loss, weight = self.cross_entropy(x_BTD, targets_BT, mask_BT)
        cfg, loss = self.cfg, nats
        if cfg.num_experts:
            balance = cfg.load_balance_weight * aux["load_balance"] + cfg.router_z_weight * aux["router_z"]
            loss = loss + balance
        if cfg.z_loss_weight:
            loss, aux = loss + cfg.z_loss_weight * z_loss, aux | {"z_loss": z_loss}
        return loss, (aux | {"nats": nats} if aux else {}) | {"weight": weight}

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
