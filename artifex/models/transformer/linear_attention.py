"""Causal linear attention with a decay per head: a state of fixed size in place of keys and values.

Dims: B batch, T sequence, D embed, N query heads, K key heads, G = N / K, H head_dim (V: of values), L chunks of C
positions, R = G * C.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from artifex.models import layers
from artifex.models.attention import KEYS, QUERIES, SEGMENTS, sequence_parts, with_heads_of
from artifex.models.module import Module
from artifex.models.transformer.attention import projections
from artifex.models.transformer.config import DecoderConfig
from artifex.models.transformer.positions import Positions
from artifex.scaling import axes, local

CHUNK = 64  # positions that see each other by scores; longer ones grow quadratically, shorter ones make more states


class State(NamedTuple):
    """The sum of key-value products of the positions seen so far, each decayed by its age, in float32: (B, K, H, V) of
    one layer, or (L, B, K, H, V) of several."""

    sum: jax.Array

    def sharded(self) -> State:
        """Laid out by the names of its dims."""
        names = (None,) * (self.sum.ndim - 4) + ("batch", "act_kv_heads", None, None)
        return State(axes.shard(self.sum, *names))


class LinearAttention(Module):
    """rms(sum over s <= t of decay^(t - s) (R_t f(q_t) . R_s f(k_s)) v_s), f = elu + 1 of Katharopoulos et al. 2020
    (arXiv:2006.16236), the decay a constant of the head (Sun et al. 2023, arXiv:2307.08621), R the rotary turn of a
    position, and rms, over each head without a scale, in place of the sum of the weights (Qin et al. 2022,
    arXiv:2210.10340, equation 16): that sum may come near 0, and its gradients are unbounded.

    The parameters are those of softmax attention. The cost of a token does not grow with the tokens before it.
    """

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.query, self.key, self.value, self.out = projections(cfg, rngs)

    @staticmethod
    def empty_cache(
        cfg: DecoderConfig, layers: int | None, batch: int, length: int, dtype: jnp.dtype, window: int | None = None
    ) -> State:
        """The state before the first position, of one layer or of so many; of one size and dtype whatever `length`,
        `dtype` and `window` are."""
        shape = (batch, cfg.kv_heads, cfg.per_head, cfg.per_head)
        return State(jnp.zeros(shape if layers is None else (layers, *shape), jnp.float32)).sharded()

    def __call__(
        self, x_BTD: jax.Array, positions: Positions, cache: State | None = None, at: Any = None
    ) -> tuple[jax.Array, State | None]:
        """Attend within x, or, with a cache, go on from the state of its layer `at.layer`; in rows of several documents
        the state begins anew with each. Where the rules split the sequence, parts hand their state on.

        The first `at.valid` positions of x enter the new state; what follows is padding, which a state, unlike rows of
        a cache, could not overwrite later.
        """
        state = cache
        if cache is not None and at is not None and at.layer is not None:
            state = State(cache.sum[at.layer])
        qkv, begins_BT = self.project(x_BTD, positions), positions.begins_BT
        if cache is None and sequence_parts(*qkv[0].shape[:3]) > 1:
            mixed_BTNH = mixed_by_parts(*qkv, np.log(decays(self.cfg.kv_heads)), begins_BT)
        else:
            valid = None if at is None else at.valid
            mixed_BTNH, state = mixed(*qkv, np.log(decays(self.cfg.kv_heads)), begins_BT, state, valid)
        mixed_BTNH = checkpoint_name(mixed_BTNH, "attention")
        y_BTD = self.out(axes.shard(mixed_BTNH, "batch", "sequence", "act_heads", None))
        if cache is None or at is None or state is None:
            return y_BTD, None
        if at.layer is not None:
            state = State(cache.sum.at[at.layer].set(state.sum))
        return y_BTD, state.sharded()

    def project(self, x_BTD: jax.Array, positions: Positions) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries (B, T, N, H) and keys (B, T, K, H), mapped by f and turned if the model is rotary, and values."""
        query_BTNH, key_BTKH, value_BTKH = layers.fused(x_BTD, self.query, self.key, self.value)
        query_BTNH = axes.shard(query_BTNH, "batch", "sequence", "act_heads", None)
        key_BTKH = axes.shard(key_BTKH, "batch", "sequence", "act_kv_heads", None)
        value_BTKH = axes.shard(value_BTKH, "batch", "sequence", "act_kv_heads", None)
        query_BTNH, key_BTKH = jax.nn.elu(query_BTNH) + 1, jax.nn.elu(key_BTKH) + 1
        if self.cfg.positions == "rope":
            query_BTNH, key_BTKH = (positions.turned(self.cfg, x) for x in (query_BTNH, key_BTKH))
        key_BTKH = key_BTKH * self.cfg.per_head**-0.5
        return tuple(checkpoint_name(x, "qkv") for x in (query_BTNH, key_BTKH, value_BTKH))


def decays(heads: int) -> np.ndarray:
    """What is left of a head's state after one position, (K,): 1 - 2^-e with e from 6 to 1 over the heads.

    A spread of memories, from 64 positions to 2, as the exponents from 5 on of Sun et al. 2023 (arXiv:2307.08621,
    equation 8): on bytes of source code the shorter ones reached 3.0 bits where 3 to 9 reached 3.3.
    """
    return 1 - 2.0 ** -np.linspace(6, 1, heads)


def mixed(
    query_BTNH: jax.Array,
    key_BTKH: jax.Array,
    value_BTKH: jax.Array,
    log_K: np.ndarray | jax.Array,
    begins_BT: jax.Array | None = None,
    state: State | None = None,
    valid: int | jax.Array | None = None,
) -> tuple[jax.Array, State]:
    """`chunked`, each head divided by its rms, as (B, T, N, H) in the dtype of the queries, and the state after it."""
    query_BTKGH = query_BTNH.reshape(*key_BTKH.shape[:3], -1, query_BTNH.shape[-1])
    heads_first = (query_BTKGH.transpose(0, 2, 3, 1, 4), key_BTKH.swapaxes(1, 2), value_BTKH.swapaxes(1, 2))
    mixed_BKGTH, state = chunked(*heads_first, log_K, state, valid, begins_BT)
    mixed_BKGTH = mixed_BKGTH * jax.lax.rsqrt(jnp.mean(jnp.square(mixed_BKGTH), axis=-1, keepdims=True) + 1e-5)
    mixed_BTNH = mixed_BKGTH.transpose(0, 3, 1, 2, 4).reshape(query_BTNH.shape).astype(query_BTNH.dtype)
    return mixed_BTNH, state


def mixed_by_parts(
    query_BTNH: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array, log_K: np.ndarray, begins_BT: jax.Array | None
) -> jax.Array:
    """`mixed` of a sequence that is split: each device its own positions, with the state of those before handed on."""
    key_BTKH, value_BTKH, heads = with_heads_of(query_BTNH, key_BTKH, value_BTKH)
    logs_K = jnp.asarray(np.repeat(log_K, key_BTKH.shape[2] // len(log_K)), jnp.float32)
    keys = (*KEYS[:2], heads, None)
    arrays, names = [query_BTNH, key_BTKH, value_BTKH, logs_K], [QUERIES, keys, keys, (heads,)]
    if begins_BT is not None:
        arrays, names = [*arrays, begins_BT], [*names, SEGMENTS]
    return local.local(lambda *arrays: mixed(*arrays)[0], inputs=names, outputs=QUERIES)(*arrays)


def chunked(
    query_BKGTH: jax.Array,
    key_BKTH: jax.Array,
    value_BKTV: jax.Array,
    log_K: np.ndarray | jax.Array,
    state: State | None = None,
    valid: int | jax.Array | None = None,
    begins_BT: jax.Array | None = None,
) -> tuple[jax.Array, State]:
    """y_t = sum over s <= t of decay^(t - s) (q_t . k_s) v_s, (B, K, G, T, V) in float32, and the state after it.

    Within a chunk by scores, between chunks by the state S <- decay^C S + sum over the chunk of decay^(C - 1 - s)
    k_s v_s^T. `log_K` are the logarithms of the decays. `state` is that of the positions before, to which the parts of
    `sequence` before this one add theirs; of the T positions the first `valid` enter the new one. Where `begins_BT`, a
    document begins, and nothing from before is seen; such rows have no `valid`.
    """
    B, K, G, T, H = query_BKGTH.shape
    xp = np if isinstance(log_K, np.ndarray) else jnp
    C = min(CHUNK, T)
    L = -(-T // C)
    query_BKGLCH = _split(query_BKGTH, L, C)
    query_BKLRH = query_BKGLCH.swapaxes(2, 3).reshape(B, K, L, G * C, H)
    key_BKLCH, value_BKLCV = _split(key_BKTH, L, C), _split(value_BKTV, L, C)
    ages = np.arange(C, dtype=np.float32)
    # documents that have begun in the chunk before each of its positions, or with it
    count_BLC = None
    if begins_BT is not None:
        count_BLC = jnp.cumsum(_split(begins_BT[..., None].astype(jnp.int32), L, C)[..., 0], axis=-1)
    # within chunks
    age_CC = ages[:, None] - ages[None]
    kept_KCC = xp.exp(log_K[:, None, None] * np.maximum(age_CC, 0)[None])
    kept_KCC = xp.where((age_CC >= 0)[None], kept_KCC, 0).astype(np.float32)
    scores_BKLRC = jnp.einsum("BKLRH,BKLCH->BKLRC", query_BKLRH, key_BKLCH, preferred_element_type=jnp.float32)
    scores_BKLRC = scores_BKLRC * xp.tile(kept_KCC, (1, G, 1))[None, :, None]
    if count_BLC is not None:
        same_BLCC = jnp.tile(count_BLC[..., None] == count_BLC[..., None, :], (1, 1, G, 1))
        scores_BKLRC = jnp.where(same_BLCC[:, None], scores_BKLRC, 0.0)
    within_BKLRV = jnp.einsum(
        "BKLRC,BKLCV->BKLRV", scores_BKLRC.astype(value_BKLCV.dtype), value_BKLCV, preferred_element_type=jnp.float32
    )
    # between chunks
    weight_1KLC, faded_1KL = _kept(log_K, T if valid is None else valid, L, C, count_BLC)
    weighted_BKLCH = key_BKLCH.astype(jnp.float32) * weight_1KLC[..., None]
    added_BKLHV = jnp.einsum("BKLCH,BKLCV->BKLHV", weighted_BKLCH, value_BKLCV.astype(jnp.float32))
    first_BKHV = jnp.zeros_like(added_BKLHV[:, :, 0]) if state is None else state.sum
    last_BKHV, before_LBKHV = _states(first_BKHV, added_BKLHV, faded_1KL)
    reach_KR = xp.tile(xp.exp(log_K[:, None] * (ages + 1)[None]), (1, G)).astype(np.float32)
    reach_1KLR = reach_KR[None, :, None]
    if count_BLC is not None:  # up to the first document that begins
        reach_1KLR = jnp.where(jnp.tile(count_BLC == 0, (1, 1, G))[:, None], reach_1KLR, 0.0)
    reaching_BKLRH = query_BKLRH.astype(jnp.float32) * reach_1KLR[..., None]
    across_BKLRV = jnp.einsum("BKLRH,LBKHV->BKLRV", reaching_BKLRH, before_LBKHV)
    mixed_BKLGCV = (within_BKLRV + across_BKLRV).reshape(B, K, L, G, C, -1)
    return mixed_BKLGCV.swapaxes(2, 3).reshape(B, K, G, L * C, -1)[:, :, :, :T], State(last_BKHV)


def _kept(
    log_K: Any, valid: int | jax.Array, L: int, C: int, count_BLC: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """What is left at the end of a chunk of each of its positions, (1 or B, K, L, C), and of the state before it,
    (1 or B, K, L)."""
    count_L = jnp.clip(valid - C * np.arange(L), 0, C)
    left_LC = count_L[:, None] - 1 - np.arange(C)[None]  # positions that follow in the chunk; none for padding
    weight_KLC = jnp.where(
        left_LC >= 0, jnp.exp(_per_head(log_K, 2) * jnp.maximum(left_LC, 0).astype(jnp.float32)[None]), 0.0
    )
    weight_1KLC, faded_1KL = weight_KLC[None], jnp.exp(_per_head(log_K, 1) * count_L.astype(jnp.float32)[None])[None]
    if count_BLC is not None:  # what is left is of the document there
        weight_1KLC = jnp.where((count_BLC == count_BLC[..., -1:])[:, None], weight_1KLC, 0.0)
        faded_1KL = jnp.where((count_BLC[..., -1] == 0)[:, None], faded_1KL, 0.0)
    return weight_1KLC, faded_1KL


def _states(first_BKHV: jax.Array, added_BKLHV: jax.Array, faded_1KL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The state after all chunks, and that before each, (L, B, K, H, V)."""

    def step(sum_BKHV: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        added_BKHV, faded_1K = chunk
        return sum_BKHV * faded_1K[..., None, None] + added_BKHV, sum_BKHV

    chunks = (jnp.moveaxis(added_BKLHV, 2, 0), jnp.moveaxis(faded_1KL, 2, 0))
    if local.parts("sequence") > 1:
        own_BKHV, _ = jax.lax.scan(lambda sum, chunk: (step(sum, chunk)[0], None), jnp.zeros_like(first_BKHV), chunks)
        first_BKHV = first_BKHV + handed_on(own_BKHV, jnp.prod(faded_1KL, axis=2))
    return jax.lax.scan(step, first_BKHV, chunks)


def handed_on(sum_BKHV: jax.Array, faded_1K: jax.Array) -> jax.Array:
    """What the parts of `sequence` before this one leave of their sums, of which a part lets `faded_1K` through.

    A prefix sum in log2 of the parts steps: Hillis and Steele 1986 (doi:10.1145/7902.7903).
    """
    here, shift = local.index("sequence"), 1
    while shift < local.parts("sequence"):
        earlier_BKHV, earlier_1K = local.neighbours((sum_BKHV, faded_1K), "sequence", shift)
        there = here >= shift
        sum_BKHV = sum_BKHV + jnp.where(there, faded_1K[..., None, None] * earlier_BKHV, 0.0)
        faded_1K = jnp.where(there, faded_1K * earlier_1K, faded_1K)
        shift *= 2
    return jnp.where(here > 0, local.neighbours(sum_BKHV, "sequence"), 0.0)


def _split(x: jax.Array, L: int, C: int) -> jax.Array:
    """(..., T, H) padded with zeros and cut into chunks: (..., L, C, H)."""
    *lead, T, H = x.shape
    return jnp.pad(x, ((0, 0),) * len(lead) + ((0, L * C - T), (0, 0))).reshape(*lead, L, C, H)


def _per_head(log_K: Any, dims: int) -> Any:
    return log_K.astype(np.float32).reshape(-1, *(1,) * dims)
