"""Decoding with a cache of keys and values: greedy, temperature, top-k and top-p, as one compiled loop.

Dims: B batch, P prompt, V vocab.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from artifex.models.rows import fill_up
from artifex.models.stack import stack_states, stack_with_state
from artifex.models.transformer.attention import Attention, Place
from artifex.models.transformer.linear_attention import LinearAttention
from artifex.models.transformer.positions import Positions
from artifex.scaling.execution import compiled

if TYPE_CHECKING:
    from artifex.models.transformer.decoder import Decoder

PROMPT_BLOCK = 32  # prompts are padded to a multiple of this many tokens, so that few lengths are compiled


def generate(
    model: Decoder,
    key: jax.Array,
    *,
    prompt: jax.Array,
    num_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> jax.Array:
    """`num_tokens` tokens (B, num_tokens) that continue `prompt` (B, P), drawn by `key` alone.

    `temperature` divides the logits, 0 is greedy; `top_k` keeps the k likeliest tokens; `top_p` in (0, 1] the fewest
    whose probability reaches p (Holtzman et al. 2019, arXiv:1904.09751). Raises `ValueError` for settings out of
    range, an empty prompt, token ids outside the vocabulary (where they are known: not inside a `jax.jit`), more
    positions than the model has, and a model that is not causal. Experts take every token, whatever their capacity.
    """
    if not model.cfg.causal:
        raise ValueError("the decoder has causal=False: it cannot continue a prompt; use masked diffusion to sample")
    prompt = jnp.asarray(prompt)
    check_request(model.cfg, prompt, num_tokens, temperature, top_k, top_p)
    if not prompt.size:
        raise ValueError(f"prompt has shape {prompt.shape}; a continuation needs at least one token")
    length = prompt.shape[1]
    room = min(-(-length // PROMPT_BLOCK) * PROMPT_BLOCK, model.cfg.sequence_length)
    prompt = jnp.pad(prompt.astype(jnp.int32), ((0, 0), (0, room - length)))
    if top_k is not None and top_k >= model.cfg.vocab_size:
        top_k = None
    return _generate(
        model,
        key,
        prompt,
        jnp.int32(length),
        None if temperature == 0 else jnp.float32(temperature),
        None if top_p is None or top_p == 1 else jnp.float32(top_p),
        num_tokens=num_tokens,
        top_k=top_k,
    )


@compiled("num_tokens", "top_k")
def _generate(
    model: Decoder,
    key: jax.Array,
    prompt_BP: jax.Array,
    length: jax.Array,
    temperature: jax.Array | None,
    top_p: jax.Array | None,
    *,
    num_tokens: int,
    top_k: int | None,
) -> jax.Array:
    rows = prompt_BP.shape[0]
    prompt_BP = fill_up(prompt_BP)
    batch, room = prompt_BP.shape
    caches = empty_caches(model, batch, room + num_tokens - 1)
    run = stack_with_state(model.layers, model.cfg.num_groups, decode)

    def forward(tokens_BT: jax.Array, caches: Any, start: int | jax.Array, valid: int | jax.Array):
        """Logits (B, V) after the first `valid` of `tokens_BT`, which stand at positions `start` on, and the caches."""
        positions_T = start + jnp.arange(tokens_BT.shape[1])
        places = Positions(positions_T, below=room + num_tokens)
        x_BTD, caches = run(model.embed_tokens(tokens_BT, positions_T), caches, places, start, valid)
        x_B1D = jax.lax.dynamic_slice_in_dim(x_BTD, valid - 1, 1, axis=1)
        return model.read_out(x_B1D)[:, 0], caches

    def step(carry: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
        token_B, caches, position = carry
        logits_BV, caches = forward(token_B[:, None], caches, position, 1)
        token_B = pick(logits_BV, key, temperature, top_k, top_p)
        return (token_B, caches, position + 1), token_B

    # Rows of the cache between the prompt's end and `room` hold keys of padding: position t overwrites its row
    # before any query can see it. Attention with a state leaves out what is not valid.
    keys = jax.random.split(key, num_tokens)
    logits_BV, caches = forward(prompt_BP, caches, 0, length)
    first_B = pick(logits_BV, keys[0], temperature, top_k, top_p)
    _, rest_NB = jax.lax.scan(step, (first_B, caches, length), keys[1:])
    return jnp.concatenate([first_B[:, None], rest_NB.T], axis=1)[:rows]


def empty_caches(model: Decoder, batch: int, length: int) -> Any:
    """Room for `length` positions in every layer: `stack_states` of caches, or of a list of them for each group."""
    cfg, dtype = model.cfg, model.embed.table[...].dtype
    kind = LinearAttention if cfg.attention == "linear" else Attention

    def make(layers: int | None) -> Any:
        caches = [kind.empty_cache(cfg, layers, batch, length, dtype, window) for window in cfg.windows]
        return caches if len(caches) > 1 else caches[0]

    return stack_states(make, cfg.num_groups)


def decode(
    block: Any,
    x_BTD: jax.Array,
    caches: Any,
    layer: jax.Array | None,
    positions: Positions,
    start: int | jax.Array,
    valid: int | jax.Array,
) -> tuple[jax.Array, Any]:
    """A block, or a group of them, applied to a prompt or a token, and the caches: for `stack_with_state`."""
    x_BTD, caches, _ = block(x_BTD, positions, None, caches, Place(layer, start, valid))
    return x_BTD, caches


def pick(
    logits_BV: jax.Array, key: jax.Array, temperature: jax.Array | None, top_k: int | None, top_p: jax.Array | None
) -> jax.Array:
    """One token (B,) for each row of logits; `temperature` None takes the likeliest."""
    if temperature is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / temperature
    if top_k is not None:
        logits_BV = jnp.where(logits_BV < jax.lax.top_k(logits_BV, top_k)[0][:, -1:], -jnp.inf, logits_BV)
    if top_p is not None:
        ranked_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probability_BV = jax.nn.softmax(ranked_BV, axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV  # the likeliest token always stays
        least_B1 = jnp.min(jnp.where(before_BV < top_p, ranked_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


def check_request(
    cfg: Any, prompt: jax.Array, num_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """Raise `ValueError` for settings out of range and for a prompt that is none or does not fit the model.

    `cfg` has a `vocab_size` and a `sequence_length`; the prompt may be empty.
    """
    if prompt.ndim != 2 or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise ValueError(
            f"prompt has shape {prompt.shape} and dtype {prompt.dtype}; expected integer token ids (batch, length)"
        )
    if num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}; ask for at least 1")
    if not (temperature >= 0 and temperature < float("inf")):
        raise ValueError(f"temperature is {temperature}; expected a number from 0 (greedy) up")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; expected at least 1, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected a probability in (0, 1]")
    known = prompt.size and not isinstance(prompt, Tracer)
    low, high = (int(prompt.min()), int(prompt.max())) if known else (0, 0)
    if low < 0 or high >= cfg.vocab_size:
        raise ValueError(f"prompt holds token ids {low} to {high}; the model's vocabulary is 0 to {cfg.vocab_size - 1}")
    total, room = prompt.shape[1] + num_tokens, cfg.sequence_length - prompt.shape[1]
    if room < num_tokens:
        remedy = f"ask for at most {room} new tokens" if room > 0 else "shorten the prompt"
        raise ValueError(
            f"a prompt of {prompt.shape[1]} and {num_tokens} new tokens need {total} positions, the model has "
            f"{cfg.sequence_length}; {remedy}"
        )
