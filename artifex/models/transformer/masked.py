"""Masked discrete diffusion over text: a decoder without the causal mask learns to fill in hidden tokens.

At time t in [0, 1] each token is hidden with probability t (alpha_t = 1 - t). The negative log likelihood of x_0 is
at most E_t [1/t sum over hidden i of -log p(x_0^i | x_t)], equation 10 of Sahoo et al. 2024 (arXiv:2406.07524) and
equation 5 of Shi et al. 2024 (arXiv:2406.04329) for this schedule.

Dims: B batch, T sequence, P prompt, V vocab with the mask.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from artifex.models.transformer.decoder import Decoder, cross_entropy
from artifex.models.transformer.generate import check_request, pick
from artifex.models.transformer.masked_config import MaskedDiffusionConfig


class MaskedDiffusion(nnx.Module):
    """Tokens (B, T), some of them masked -> logits (B, T, V) of what stands at each position."""

    def __init__(self, cfg: MaskedDiffusionConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.decoder = Decoder(cfg.decoder, rngs=rngs)

    def __call__(self, tokens_BT: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Logits (B, T, V), float32; that of the mask is -1e30: it is never what stands there."""
        logits_BTV = self.decoder(tokens_BT, rngs)
        return jnp.where(jnp.arange(logits_BTV.shape[-1])[None, None] == self.cfg.mask_id, -1e30, logits_BTV)

    def loss(self, batch: dict[str, jax.Array], rngs: nnx.Rngs | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The bound in nats per token of `batch["targets"]`, and `{"weight": number of tokens}`.

        `mask` (B, T), optional, is 1 where a token counts; the network sees the others hidden. Times are spread evenly
        over the rows of the batch, shifted by one random number together; without `rngs`, times and masks are fixed.
        """
        clean_BT = batch["targets"]
        key = jax.random.key(0) if rngs is None else rngs.noise()
        counts_BT = batch.get("mask", jnp.ones(clean_BT.shape)).astype(jnp.float32)
        time_B = times(clean_BT.shape[0], key)
        hidden_BT = jax.random.uniform(jax.random.fold_in(key, 1), clean_BT.shape) < time_B[:, None]
        logits_BTV = self(jnp.where(hidden_BT | (counts_BT == 0), self.cfg.mask_id, clean_BT), rngs)
        weight_BT = hidden_BT.astype(jnp.float32) * counts_BT / time_B[:, None]
        nats, weights = cross_entropy(logits_BTV, clean_BT, weight_BT)
        count = jnp.sum(counts_BT)
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
        graphdef, state = nnx.split(self)
        return _unmask(
            graphdef,
            nnx.to_pure_dict(state),
            key,
            prompt.astype(jnp.int32),
            jnp.int32(steps),
            None if temperature == 0 else jnp.float32(temperature),
            None if top_p is None or top_p == 1 else jnp.float32(top_p),
            num_tokens=num_tokens,
            top_k=None if top_k is not None and top_k >= cfg.vocab_size else top_k,
        )


def times(count: int, key: jax.Array) -> jax.Array:
    """`count` times in (0, 1], one in each of as many equal parts, at the same random place in each.

    Kingma et al. 2021 (arXiv:2107.00630), appendix I.1: each alone is uniform, and their mean varies less.
    """
    return (jnp.arange(count, dtype=jnp.float32) + 1 - jax.random.uniform(key)) / count


@functools.partial(jax.jit, static_argnums=0, static_argnames=("num_tokens", "top_k"))
def _unmask(
    graphdef: Any,
    params: Any,
    key: jax.Array,
    prompt_BP: jax.Array,
    steps: jax.Array,
    temperature: jax.Array | None,
    top_p: jax.Array | None,
    *,
    num_tokens: int,
    top_k: int | None,
) -> jax.Array:
    model: MaskedDiffusion = nnx.merge(graphdef, params)
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

    return jax.lax.fori_loop(0, steps, reveal, masked_BT)
