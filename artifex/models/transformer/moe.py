"""A mixture of gated experts: top-k routing, dropless or with a capacity, with shared experts and balance losses.

Dims: B batch, T sequence, D embed, F hidden width of an expert, E experts, K experts of a token, S tokens (B * T),
A assignments (K * S, the first choices of all tokens before their second), C capacity of an expert in a row, P parts
of the experts or of the sequence, M rows of a buffer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from artifex.models import layers
from artifex.models.module import Module
from artifex.models.transformer.config import DecoderConfig
from artifex.models.transformer.experts import (
    Kernels,
    collect,
    dispatch,
    laid_out,
    ranked,
    served,
    sizes,
    summed,
)
from artifex.models.transformer.feed_forward import GATES, GatedMLP
from artifex.scaling import axes
from artifex.scaling.local import exchange, gathered, index, local, parts, split_by, total

REPORT = ("load_balance", "router_z", "expert_utilisation", "dropped", "overflow")


class ExpertLinear(Module):
    """The kernels (E, inputs, outputs) of E linear maps, each started as `layers.Linear` starts one."""

    def __init__(self, shape: tuple[int, int, int], names: tuple[str, str, str], *, scale: float, rngs: nnx.Rngs):
        std = math.sqrt(scale / shape[1]) / 0.8796
        value = std * jax.random.truncated_normal(rngs.params(), -2, 2, shape)
        self.kernel = layers.parameter(value, *names, inputs=1)


class MoE(Module):
    """sum over the k likeliest experts of p_e(x) down_e(act(gate_e(x)) * up_e(x)), p = softmax(x W) in float32.

    With `normalize_expert_weights` the k probabilities of a token are divided by their sum (Jiang et al. 2024,
    arXiv:2401.04088). Without a capacity no token is dropped. With one, each expert takes at most
    ceil(capacity_factor * T * k / E) assignments of each row of T tokens, first come first served: the first choices of
    all tokens of the row before any second choice. An assignment over it adds nothing. Rows are the groups of GShard
    (Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1): what is dropped depends on no other row, nor on how rows are
    spread over devices. It does depend on later tokens: generation takes every token.

    Each device routes its own tokens. Where experts are split they travel to their experts' devices and back; each
    device has a buffer for every other, which holds what a capacity lets through, or `expert_buffer` times an even
    share, or whatever may come. What a buffer does not hold adds nothing, and is counted as `overflow`.
    """

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        E, D, F = cfg.num_experts, cfg.embed_dim, cfg.expert_mlp_dim or cfg.feed_forward
        # a tenth of the usual variance: Fedus et al. 2021 (arXiv:2101.03961), section 2.4
        self.router = layers.Linear((D, E), ("embed", "experts"), scale=0.1, hidden=False, rngs=rngs)
        wide = ("experts", "embed", "expert_mlp")
        self.gate = ExpertLinear((E, D, F), wide, scale=1.0, rngs=rngs)
        self.up = ExpertLinear((E, D, F), wide, scale=1.0, rngs=rngs)
        self.down = ExpertLinear((E, F, D), ("experts", "expert_mlp", "embed"), scale=0.5 / cfg.num_layers, rngs=rngs)
        # side by side they are one gated layer: Dai et al. 2024 (arXiv:2401.06066)
        together = dataclasses.replace(cfg, mlp_dim=cfg.num_shared_experts * F) if cfg.num_shared_experts else None
        self.shared = GatedMLP(together, rngs=rngs) if together else None

    def __call__(self, x_BTD: jax.Array, *, dropless: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The mixture (B, T, D), where it is `dropless` without a capacity or a bounded buffer, and float32 scalars:

        `load_balance`: E sum_e f_e P_e with f_e the share of tokens that choose expert e and P_e its mean probability;
        K at uniform load (Fedus et al. 2021, equation 4, where K is 1).
        `router_z`: the mean of logsumexp(x W)^2 (Zoph et al. 2022, arXiv:2202.08906, equation 5).
        `expert_utilisation`: exp of the entropy of f / K, over E; 1 where all experts are chosen alike.
        `dropped`: the share of assignments over capacity.
        `overflow`: the share of assignments that found their buffer full.
        """
        cfg = dataclasses.replace(self.cfg, capacity_factor=None, expert_buffer=None) if dropless else self.cfg
        of_token, wide = ("batch", "sequence", None), ("act_experts", None, "act_mlp")
        inputs = (of_token, (None, None), wide, wide, ("act_experts", "act_mlp", None))
        of_part = local(functools.partial(mixture, cfg), inputs=inputs, outputs=[of_token, *[()] * len(REPORT)])
        arrays = (part.kernel[...] for part in (self.router, self.gate, self.up, self.down))
        y_BTD, *report = of_part(x_BTD, *arrays)
        y_BTD = axes.shard(y_BTD, "batch", "sequence", "hidden")
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        return y_BTD, dict(zip(REPORT, report, strict=True))


class Routed(NamedTuple):
    """Where the tokens of one device's part go."""

    expert_A: jax.Array
    row_A: jax.Array  # the row of the batch that an assignment is of
    size_EB: jax.Array  # assignments of each expert, by row
    kept_EB: jax.Array  # how many of them it takes
    capacity: int | None  # the most that it takes of a row


def mixture(cfg: DecoderConfig, x_BTD: jax.Array, router_DE: jax.Array, *kernels: Any) -> tuple[jax.Array, ...]:
    """The mixture (B, T, D) of one device's own tokens, and what all devices report together, as in `REPORT`."""
    x_SD = x_BTD.reshape(-1, x_BTD.shape[-1])
    logits_SE = layers.product(x_SD.astype(jnp.float32), router_DE.astype(jnp.float32))
    weight_SK, expert_SK = jax.lax.top_k(jax.nn.softmax(logits_SE, axis=-1), cfg.experts_per_token)
    if cfg.normalize_expert_weights:
        weight_SK = weight_SK / jnp.sum(weight_SK, axis=-1, keepdims=True)
    routed = route(cfg, expert_SK.reshape(*x_BTD.shape[:2], -1))
    if routed.capacity is not None and parts("sequence") == 1 and travels():
        chosen_AD, overflow = by_capacity(cfg, x_SD, routed, kernels), jnp.int32(0)
    else:
        chosen_AD, overflow = by_experts(cfg, x_SD, routed, kernels)
    y_SD = total(mixed(chosen_AD, weight_SK), "act_mlp")
    counts = jnp.stack([jnp.sum(routed.size_EB - routed.kept_EB), overflow]).astype(jnp.float32)
    assignments = expert_SK.size * parts("batch") * parts("sequence")
    dropped, overflow = total(counts, "batch", "sequence") / assignments
    balanced = balance(logits_SE, jnp.sum(routed.size_EB, axis=1))
    return y_SD.reshape(x_BTD.shape), *balanced.values(), dropped, overflow


def travels() -> bool:
    """Whether each device has tokens of its own for its experts: else all devices of the experts have the same ones,
    as where a batch does not divide. On one device there is nowhere to go, and the tokens are its own."""
    return split_by("act_experts", "batch", "sequence")


def route(cfg: DecoderConfig, expert_BTK: jax.Array) -> Routed:
    """What each expert takes of the assignments of these rows, or of these parts of rows."""
    B, T, K = expert_BTK.shape
    E, whole = cfg.num_experts, T * parts("sequence")
    expert_A, row_A = expert_BTK.transpose(2, 0, 1).reshape(-1), jnp.tile(jnp.repeat(jnp.arange(B), T), K)
    chosen_EBTK = expert_BTK[None] == jnp.arange(E)[:, None, None, None]
    size_EBK = jnp.sum(chosen_EBTK, axis=2, dtype=jnp.int32)
    size_EB = jnp.sum(size_EBK, axis=-1)
    if cfg.capacity_factor is None:
        return Routed(expert_A, row_A, size_EB, size_EB, None)
    # an expert is chosen at most once by a token
    C = min(math.ceil(cfg.capacity_factor * whole * K / E), whole)
    size_PEBK = gathered(size_EBK[None], "sequence", dim=0)
    all_EBK = jnp.sum(size_PEBK, axis=0)
    # before a part's k-th choices come all choices before the k-th, and the k-th of the parts before it
    earlier_P = (jnp.arange(len(size_PEBK)) < index("sequence")).astype(jnp.int32)
    first_EBK = jnp.cumsum(all_EBK, axis=-1) - all_EBK + jnp.tensordot(earlier_P, size_PEBK, 1)
    kept_EB = jnp.sum(jnp.clip(C - first_EBK, 0, size_EBK), axis=-1)
    return Routed(expert_A, row_A, size_EB, kept_EB, min(C, T))


def by_capacity(cfg: DecoderConfig, x_SD: jax.Array, routed: Routed, kernels: Kernels) -> jax.Array:
    """What its expert makes of each assignment, (A, D), 0 over capacity: C places for each expert and row, which are
    exchanged for those of all rows of the own experts. Nothing is larger than the experts' input."""
    (E, B), C = routed.size_EB.shape, routed.capacity
    assert C is not None
    run_A = routed.expert_A * B + routed.row_A
    first, owner = C * jnp.arange(E * B), jnp.repeat(jnp.arange(E * B), C)
    rows = laid_out(run_A, routed.size_EB.reshape(-1), first, routed.kept_EB.reshape(-1), owner)
    x_EMD = exchange(dispatch(x_SD, rows).reshape(E, B * C, -1), "act_experts", split=0, join=1)
    gate_EDF, up_EDF, down_EFD = kernels
    gate_EMF, up_EMF = (checkpoint_name(x_EMD @ kernel, "hidden") for kernel in (gate_EDF, up_EDF))
    y_EMD = (GATES[cfg.mlp](gate_EMF) * up_EMF) @ down_EFD
    return collect(exchange(y_EMD, "act_experts", split=1, join=0).reshape(E * B * C, -1), rows)


def by_experts(cfg: DecoderConfig, x_SD: jax.Array, routed: Routed, kernels: Kernels) -> tuple[jax.Array, jax.Array]:
    """What its expert makes of each assignment, (A, D), 0 over capacity, and how many found their buffer full."""
    E, S, activation = cfg.num_experts, x_SD.shape[0], GATES[cfg.mlp]
    P, here, A = parts("act_experts"), len(kernels[0]), routed.expert_A.size
    expert_A = within_capacity(routed) if routed.capacity is not None else routed.expert_A
    if P == 1:
        return served(x_SD, expert_A, kernels, activation), jnp.int32(0)
    if not travels():
        own_A = expert_A - index("act_experts") * here
        own_A = jnp.where((own_A >= 0) & (own_A < here), own_A, here)
        chosen_AD = served(x_SD, own_A, kernels, activation, expected=A // P)
        return total(chosen_AD, "act_experts"), jnp.int32(0)
    M = buffer_rows(cfg, routed, S, P)
    to_A = jnp.where(expert_A < E, expert_A // here, P)
    size_P = sizes(to_A, P)
    kept_P = jnp.minimum(size_P, M)
    rows = laid_out(to_A, size_P, M * jnp.arange(P), kept_P, jnp.repeat(jnp.arange(P), M))
    there_N = (expert_A % here).at[rows.source_N].get(mode="fill", fill_value=here)
    swap = functools.partial(exchange, name="act_experts", split=0, join=0)
    y_ND = served(swap(dispatch(x_SD, rows)), swap(there_N), kernels, activation, expected=A)
    return collect(swap(y_ND), rows), jnp.sum(size_P - kept_P)


def within_capacity(routed: Routed) -> jax.Array:
    """The expert of each assignment; one past the last for those that it does not take."""
    E, B = routed.size_EB.shape
    run_A = routed.expert_A * B + routed.row_A
    rank_A = ranked(run_A, routed.size_EB.reshape(-1))[-1]
    return jnp.where(rank_A < routed.kept_EB.reshape(-1)[run_A], routed.expert_A, E)


def buffer_rows(cfg: DecoderConfig, routed: Routed, tokens: int, P: int) -> int:
    """Rows that one device has for each of the P devices of the experts."""
    here = cfg.num_experts // P
    most = tokens * min(cfg.experts_per_token, here)  # a token chooses an expert once
    if routed.capacity is not None:
        return min(most, here * routed.size_EB.shape[1] * routed.capacity)
    if cfg.expert_buffer is None:
        return most
    return min(most, math.ceil(cfg.expert_buffer * routed.expert_A.size / P))


def mixed(chosen_AD: jax.Array, weight_SK: jax.Array) -> jax.Array:
    """The weighted sum (S, D) of what its experts make of each token."""
    S, K = weight_SK.shape
    chosen_KSD = chosen_AD.reshape(K, S, -1)
    return summed(chosen_KSD * weight_SK.T.astype(chosen_KSD.dtype)[..., None])


def balance(logits_SE: jax.Array, size_E: jax.Array) -> dict[str, jax.Array]:
    """The losses and the metric that speak of how the router spreads the tokens of all devices: see `MoE.__call__`."""
    E, tokens = size_E.size, logits_SE.shape[0] * parts("batch") * parts("sequence")
    summed = (
        size_E,
        jnp.sum(jax.nn.softmax(logits_SE, axis=-1), axis=0),
        jnp.sum(jnp.square(jax.nn.logsumexp(logits_SE, axis=-1))),
    )
    size_E, probability_E, squares = total(summed, "batch", "sequence")
    share_E = size_E.astype(jnp.float32) / jnp.sum(size_E).astype(jnp.float32)
    entropy = -jnp.sum(jax.scipy.special.xlogy(share_E, share_E))
    return {
        "load_balance": E * jnp.sum(size_E.astype(jnp.float32) / tokens * (probability_E / tokens)),
        "router_z": squares / tokens,
        "expert_utilisation": jnp.exp(entropy) / E,
    }
