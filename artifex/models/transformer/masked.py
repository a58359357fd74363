"""Masked discrete diffusion over text: a decoder without the causal mask learns to fill in hidden tokens.

At time t in [0, 1] each token is hidden with probability t (alpha_t = 1 - t). The negative log likelihood of x_0 is
at most E_t [1/t sum over hidden i of -log p(x_0^i | x_t)], equation 10 of Sahoo et al. 2024 (arXiv:2406.07524) and
equation 5 of Shi et al. 2024 (arXiv:2406.04329) for this schedule. Of n tokens h are hidden, and the integral of
P(h | t) / t over t is 1/h for every h from 1 to n, so the same bound is

    E_h [n/h sum over hidden i of -log p(x_0^i | x_h)],   h uniform from 1 to n                    (1)

equation 6 of Nie et al. 2025 (arXiv:2502.09992), without the variance of h/t, which has no bound.

Dims: B batch, T sequence, P prompt, V vocab with the mask.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from artifex.models import layers
from artifex.models.batch import check_text
from artifex.models.cross_entropy import without
from artifex.models.module import Module
from artifex.models.rows import fill_up
from artifex.models.staged import Stack, Start, staged_loss
from artifex.models.transformer.decoder import Decoder
from artifex.models.transformer.generate import check_request, pick
from artifex.models.transformer.masked_config import MaskedDiffusionConfig
from artifex.models.transformer.positions import positions_of
from artifex.scaling.execution import compiled


class MaskedDiffusion(Module):
    """Tokens (B, T), some of them masked -> logits (B, T, V) of what stands at each position."""

    def __init__(self, cfg: MaskedDiffusionConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.decoder = Decoder(cfg.decoder, rngs=rngs)

    def __call__(
        self,
        tokens_BT: jax.Array,
        rngs: nnx.Rngs | None = None,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """Logits (B, T, V), float32; that of the mask is -1e30: it is never what stands there. `positions` and
        `segments` (B, T) are those of `loss`."""
        logits_BTV = self.decoder(tokens_BT, rngs, positions=positions, segments=segments)
        return without(logits_BTV, self.cfg.mask_id)

    def loss(
        self, batch: dict[str, jax.Array], rngs: nnx.Rngs | None = None, *, index: int | jax.Array = 0
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Equation (1) in nats per token of `batch["targets"]`, and `{"weight": number of tokens}`.

        `mask` (B, T), optional, is 1 where a token counts, else 0; the network sees the others hidden. `segments` and
        `positions` (B, T), optional, are those of rows of several documents, as for the decoder; such a row is one x_0.
        The rows' h are those of B strata; without `rngs`, what is hidden is that of batch `index`. NaN where a token
        that counts is not in the data's vocabulary. Raises `TypeError` or `ValueError` for what is no batch of text.
        """
        return staged_loss(self, batch, rngs, index)

    @property
    def stack(self) -> Stack:
        """The repeated blocks of the decoder."""
        return self.decoder.stack.under("decoder")

    def prepare(
        self, batch: dict[str, jax.Array], rngs: nnx.Rngs | None, index: int | jax.Array
    ) -> tuple[dict[str, Any], jax.Array | None]:
        """What is seen of each row, and by what each of its tokens counts; the key of the dropout."""
        check_text(batch, "targets")
        # the mask is no token of the data: an id that no table has, seen or hidden
        clean_BT = jnp.asarray(batch["targets"], jnp.int32)
        clean_BT = jnp.where(clean_BT == self.cfg.mask_id, -1, clean_BT)
        key = layers.noise_key(rngs, index)
        counts_BT = batch.get("mask", jnp.ones(clean_BT.shape)).astype(jnp.float32)
        hidden_BT = hide(counts_BT > 0, key)
        seen_BT = jnp.where(hidden_BT | (counts_BT == 0), self.cfg.mask_id, clean_BT)
        weight_BT = hidden_BT.astype(jnp.float32)
        share_B1 = jnp.sum(weight_BT, axis=1, keepdims=True) / jnp.maximum(jnp.sum(counts_BT, axis=1, keepdims=True), 1)
        weight_BT = weight_BT / jnp.where(share_B1 > 0, share_B1, 1.0)
        rows = {"seen": seen_BT, "clean": clean_BT, "weight": weight_BT, "counts": counts_BT}
        rows |= {name: batch[name] for name in ("positions", "segments") if name in batch}
        return rows, self.decoder.dropout_key(rngs)

    def before(self, rows: dict[str, Any], key: jax.Array | None) -> Start:
        """What enters the blocks."""
        packed = (rows.get("positions"), rows.get("segments"))
        places = positions_of(self.cfg.decoder, rows["seen"].shape, *packed, must_divide=True)
        return self.decoder.begin(rows["seen"], key, places)

    def after(
        self, x_BTD: jax.Array, aux: Any, beside: Any, rows: dict[str, Any]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss and metrics of what the blocks made of the rows."""
        nats, _, weights = self.decoder.cross_entropy(x_BTD, rows["clean"], rows["weight"], never=self.cfg.mask_id)
        count = jnp.sum(rows["counts"])
        return nats * weights / jnp.maximum(count, 1.0), {"weight": count}

    def sample(
        self,
        key: jax.Array,
        *,
        prompt: jax.Array | None = None,
        num_tokens: int,
        steps: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> jax.Array:
        """`num_tokens` tokens (B, num_tokens) after `prompt` (B, P), or one row without one, drawn by `key` alone.

        All start masked; between times t and s, on `steps` even times from 1 to 0, each masked one is revealed with
        probability (t - s) / t, by the logits at t. `temperature`, `top_k`, `top_p` and the errors are those of
        `artifex.models.transformer.generate.generate`; besides, `ValueError` for `steps` below 1.
        """
        cfg, steps = self.cfg, self.cfg.sampling_steps if steps is None else steps
        prompt = jnp.zeros((1, 0), jnp.int32) if prompt is None else jnp.asarray(prompt)
        check_request(cfg, prompt, num_tokens, temperature, top_k, top_p)
        if steps < 1:
            raise ValueError(f"steps is {steps}; ask for at least 1")
        return _unmask(
            self,
            key,
            prompt.astype(jnp.int32),
            jnp.int32(steps),
            None if temperature == 0 else jnp.float32(temperature),
            None if top_p is None or top_p == 1 else jnp.float32(top_p),
            num_tokens=num_tokens,
            top_k=None if top_k is not None and top_k >= cfg.vocab_size else top_k,
        )


def hide(there_BT: jax.Array, key: jax.Array) -> jax.Array:
    """(B, T): h of each row's tokens that are `there`, of n, every choice as likely, h from 1 to n by strata."""
    share_key, order_key = jax.random.split(key)
    noise_BT = jnp.where(there_BT, jax.random.uniform(order_key, there_BT.shape), 2.0)
    count_B = jnp.sum(there_BT, axis=1)
    h_B = jnp.ceil(layers.strata(count_B.size, share_key) * count_B.astype(jnp.float32)).astype(jnp.int32)
    last_B1 = jnp.take_along_axis(jnp.sort(noise_BT, axis=1), jnp.maximum(h_B - 1, 0)[:, None], axis=1)
    return there_BT & (noise_BT <= last_B1)


@compiled("num_tokens", "top_k")
def _unmask(
    model: MaskedDiffusion,
    key: jax.Array,
    prompt_BP: jax.Array,
    steps: jax.Array,
    temperature: jax.Array | None,
    top_p: jax.Array | None,
    *,
    num_tokens: int,
    top_k: int | None,
) -> jax.Array:
    rows = prompt_BP.shape[0]
    prompt_BP = fill_up(prompt_BP)
    batch, length = prompt_BP.shape
    masked_BT = jnp.full((batch, num_tokens), model.cfg.mask_id, jnp.int32)

    def reveal(step: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        logits_BTV = model(jnp.concatenate([prompt_BP, tokens_BT], axis=1))[:, length:]
        of_token, of_time = jax.random.split(jax.random.fold_in(key, step))
        flat = logits_BTV.reshape(batch * num_tokens, -1)
        drawn_BT = pick(flat, of_token, temperature, top_k, top_p).reshape(tokens_BT.shape)
        # (t - s) / t with t = 1 - step / steps and s = t - 1 / steps: 1 in the last step
        shown_BT = jax.random.uniform(of_time, tokens_BT.shape) * (steps - step).astype(jnp.float32) < 1
        return jnp.where((tokens_BT == model.cfg.mask_id) & shown_BT, drawn_BT, tokens_BT)

    return jax.lax.fori_loop(0, steps, reveal, masked_BT)[:rows]
