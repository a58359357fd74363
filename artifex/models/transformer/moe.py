"""A mixture of gated experts: top-k routing, dropless or with a capacity, with shared experts and balance losses.

Dims: B batch, T sequence, D embed, F hidden width of an expert, E experts, K experts of a token, S tokens (B * T),
A assignments (K * S, the first choices of all tokens before their second), N rows (assignments by expert), C capacity
of an expert, R rows of a block, b blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from artifex.models import cpu, layers
from artifex.models.transformer.config import DecoderConfig
from artifex.models.transformer.feed_forward import GATES, GatedMLP
from artifex.scaling import axes
from artifex.scaling.local import local, total

Kernels = tuple[jax.Array, jax.Array, jax.Array]  # gate and up (E, D, F), down (E, F, D)
Activation = Callable[[jax.Array], jax.Array]


class Rows(NamedTuple):
    """Where assignments lie once they are ordered by expert. Indices out of range mean: none."""

    slot_A: jax.Array  # the row of each assignment; N where it is dropped
    source_N: jax.Array  # the assignment in each row; A where it is empty


class ExpertLinear(nnx.Module):
    """The kernels (E, inputs, outputs) of E linear maps, each started as `layers.Linear` starts one."""

    def __init__(self, shape: tuple[int, int, int], names: tuple[str, str, str], *, scale: float, rngs: nnx.Rngs):
        std = math.sqrt(scale / shape[1]) / 0.8796
        value = std * jax.random.truncated_normal(rngs.params(), -2, 2, shape)
        self.kernel = layers.parameter(value, *names, inputs=1)


class MoE(nnx.Module):
    """sum over the k likeliest experts of p_e(x) down_e(act(gate_e(x)) * up_e(x)), p = softmax(x W) in float32.

    With `normalize_expert_weights` the k probabilities of a token are divided by their sum (Jiang et al. 2024,
    arXiv:2401.04088). Without a capacity no token is dropped. With one, each expert takes at most
    ceil(capacity_factor * tokens * k / E) assignments of the tokens it is given in one call, first come first served:
    the first choices of all tokens before any second choice (Lepikhin et al. 2020, arXiv:2006.16668). An assignment
    over it adds nothing. Which ones are over depends on later tokens too: generation takes every
    token.
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
        """The mixture (B, T, D), without a capacity where it is `dropless`, and float32 scalars:

        `load_balance`: E sum_e f_e P_e with f_e the share of tokens that choose expert e and P_e its mean probability;
        K at uniform load (Fedus et al. 2021, equation 4, where K is 1).
        `router_z`: the mean of logsumexp(x W)^2 (Zoph et al. 2022, arXiv:2202.08906, equation 5).
        `expert_utilisation`: exp of the entropy of f / K, over E; 1 where all experts are chosen alike.
        `dropped`: the share of assignments over capacity.
        """
        cfg, x_SD = self.cfg, x_BTD.reshape(-1, x_BTD.shape[-1])
        logits_SE = layers.product(x_SD.astype(jnp.float32), self.router.kernel[...].astype(jnp.float32))
        weight_SK, expert_SK = jax.lax.top_k(jax.nn.softmax(logits_SE, axis=-1), cfg.experts_per_token)
        if cfg.normalize_expert_weights:
            weight_SK = weight_SK / jnp.sum(weight_SK, axis=-1, keepdims=True)
        size_E = sizes(expert_SK, cfg.num_experts)
        kernels = (self.gate.kernel[...], self.up.kernel[...], self.down.kernel[...])
        if cfg.capacity_factor is None or dropless:
            y_BTD, kept_E = self.served(x_BTD, weight_SK, expert_SK, kernels), size_E
        else:
            # an expert is chosen at most once by a token
            C = min(math.ceil(cfg.capacity_factor * expert_SK.size / cfg.num_experts), x_SD.shape[0])
            y_SD, kept_E = capped(x_SD, weight_SK, expert_SK, kernels, GATES[cfg.mlp], capacity=C)
            y_BTD = y_SD.reshape(x_BTD.shape)
        y_BTD = axes.shard(y_BTD, "batch", "sequence", "hidden")
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        dropped = jnp.sum(size_E - kept_E).astype(jnp.float32) / expert_SK.size
        return y_BTD, balance(logits_SE, size_E) | {"dropped": dropped}

    def served(self, x_BTD: jax.Array, weight_SK: jax.Array, expert_SK: jax.Array, kernels: Kernels) -> jax.Array:
        """The mixture (B, T, D) in which every expert takes all that chose it: each device for its own tokens, with its
        part of every expert's hidden width."""
        K, activation = self.cfg.experts_per_token, GATES[self.cfg.mlp]

        def of_part(x_BTD: jax.Array, weight_BTK: jax.Array, expert_BTK: jax.Array, *kernels: Any) -> jax.Array:
            x_SD, choice = x_BTD.reshape(-1, x_BTD.shape[-1]), (weight_BTK.reshape(-1, K), expert_BTK.reshape(-1, K))
            y_SD = served(x_SD, *choice, kernels, activation)
            return total(y_SD, "act_mlp").reshape(x_BTD.shape)

        of_token, wide = ("batch", "sequence", None), ("act_experts", None, "act_mlp")
        inputs = (of_token, of_token, of_token, wide, wide, ("act_experts", "act_mlp", None))
        choice = (each_SK.reshape(*x_BTD.shape[:2], K) for each_SK in (weight_SK, expert_SK))
        if axes.activation_axes("act_experts", self.cfg.num_experts):  # XLA brings the tokens to experts that are split
            return of_part(x_BTD, *choice, *kernels)
        return local(of_part, inputs=inputs, outputs=of_token)(x_BTD, *choice, *kernels)


def sizes(expert_SK: jax.Array, experts: int) -> jax.Array:
    """(E,): how many tokens chose each expert."""
    return jnp.sum(expert_SK.reshape(-1, 1) == jnp.arange(experts)[None], axis=0, dtype=jnp.int32)


def mixed(chosen_AD: jax.Array, weight_SK: jax.Array) -> jax.Array:
    """The weighted sum (S, D) of what its experts make of each token."""
    S, K = weight_SK.shape
    chosen_KSD = chosen_AD.reshape(K, S, -1)
    return jnp.sum(chosen_KSD * weight_SK.T.astype(chosen_KSD.dtype)[..., None], axis=0)


def balance(logits_SE: jax.Array, size_E: jax.Array) -> dict[str, jax.Array]:
    """The losses and the metric that speak of how the router spreads tokens: see `MoE.__call__`."""
    share_E = size_E.astype(jnp.float32) / jnp.sum(size_E).astype(jnp.float32)
    mean_E = jnp.mean(jax.nn.softmax(logits_SE, axis=-1), axis=0)
    entropy = -jnp.sum(jax.scipy.special.xlogy(share_E, share_E))
    return {
        "load_balance": share_E.size * jnp.sum(size_E.astype(jnp.float32) / logits_SE.shape[0] * mean_E),
        "router_z": jnp.mean(jnp.square(jax.nn.logsumexp(logits_SE, axis=-1))),
        "expert_utilisation": jnp.exp(entropy) / share_E.size,
    }


def served(
    x_SD: jax.Array, weight_SK: jax.Array, expert_SK: jax.Array, kernels: Kernels, activation: Activation
) -> jax.Array:
    """The mixture (S, D) in which every expert takes all that chose it."""
    expert_A = expert_SK.T.reshape(-1)
    mix = by_blocks if cpu.experts_by_blocks() else by_ragged_dot
    return mixed(mix(x_SD, expert_A, sizes(expert_SK, len(kernels[0])), kernels, activation), weight_SK)


def by_ragged_dot(
    x_SD: jax.Array, expert_A: jax.Array, size_E: jax.Array, kernels: Kernels, activation: Activation
) -> jax.Array:
    """Rows ordered by expert, and one product of runs of rows with their experts.

    XLA has it as one operation on GPU and TPU; for a CPU it computes every expert for every row.
    """
    order_A, place_A = ordered(expert_A)
    rows = Rows(slot_A=place_A, source_N=order_A)
    gate_EDF, up_EDF, down_EFD = kernels
    x_ND = axes.shard(dispatch(x_SD, rows), "batch", "hidden")
    gate_NF, up_NF = (
        checkpoint_name(jax.lax.ragged_dot(x_ND, kernel, size_E), "hidden") for kernel in (gate_EDF, up_EDF)
    )
    h_NF = axes.shard(activation(gate_NF) * up_NF, "batch", "act_mlp")
    return collect(axes.shard(jax.lax.ragged_dot(h_NF, down_EFD, size_E), "batch", "hidden"), rows)


def by_blocks(
    x_SD: jax.Array, expert_A: jax.Array, size_E: jax.Array, kernels: Kernels, activation: Activation
) -> jax.Array:
    """Rows ordered by expert, each expert's padded to whole blocks, and a copy of its kernels for each block.

    On a CPU, for 8 experts of which 2 are taken, a fifth of the time of `by_ragged_dot`, and with gradients a third.
    """
    A, E = expert_A.size, size_E.size
    R = max(1, min(cpu.EXPERT_ROWS, A // (4 * E)))  # padding is R / 2 rows an expert, so an eighth at most
    count = (A + E * (R - 1)) // R  # the most blocks there can be
    blocks_E = (size_E + R - 1) // R
    end_E = jnp.cumsum(blocks_E)
    # the blocks that are left over belong to the last expert, and are empty
    owner_b = jnp.minimum(jnp.sum(jnp.arange(count)[:, None] >= end_E[None], axis=1), E - 1)
    rows = laid_out(expert_A, size_E, (end_E - blocks_E) * R, size_E, jnp.repeat(owner_b, R))
    gate_bDF, up_bDF, down_bFD = (kernel[owner_b] for kernel in kernels)
    x_bRD = dispatch(x_SD, rows).reshape(count, R, -1)
    gate_bRF, up_bRF = (checkpoint_name(x_bRD @ kernel, "hidden") for kernel in (gate_bDF, up_bDF))
    h_bRF = activation(gate_bRF) * up_bRF
    return collect((h_bRF @ down_bFD).reshape(count * R, -1), rows)


def capped(
    x_SD: jax.Array,
    weight_SK: jax.Array,
    expert_SK: jax.Array,
    kernels: Kernels,
    activation: Activation,
    *,
    capacity: int,
) -> tuple[jax.Array, jax.Array]:
    """The mixture (S, D) but for the assignments over `capacity`, and how many each expert takes."""
    E, C = len(kernels[0]), capacity
    expert_A, size_E = expert_SK.T.reshape(-1), sizes(expert_SK, E)
    kept_E = jnp.minimum(size_E, C)
    rows = laid_out(expert_A, size_E, C * jnp.arange(E), kept_E, jnp.repeat(jnp.arange(E), C))
    gate_EDF, up_EDF, down_EFD = kernels
    x_ECD = axes.shard(dispatch(x_SD, rows).reshape(E, C, -1), "act_experts", None, "hidden")
    gate_ECF, up_ECF = (checkpoint_name(x_ECD @ kernel, "hidden") for kernel in (gate_EDF, up_EDF))
    h_ECF = axes.shard(activation(gate_ECF) * up_ECF, "act_experts", None, "act_mlp")
    y_ECD = axes.shard(h_ECF @ down_EFD, "act_experts", None, "hidden")
    return mixed(collect(y_ECD.reshape(E * C, -1), rows), weight_SK), kept_E


def ordered(expert_A: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The assignments ordered by expert, and the place of each in that order; within an expert they keep theirs."""
    order_A = jnp.argsort(expert_A, stable=True)
    numbers_A = jnp.arange(expert_A.size, dtype=order_A.dtype)
    return order_A, jnp.zeros_like(order_A).at[order_A].set(numbers_A, unique_indices=True)


def laid_out(
    expert_A: jax.Array, size_E: jax.Array, first_E: jax.Array, kept_E: jax.Array, expert_N: jax.Array
) -> Rows:
    """Rows in which expert e's first `kept_E` assignments lie from row `first_E` on; `expert_N` says whose a row is."""
    A, N = expert_A.size, expert_N.size
    order_A, place_A = ordered(expert_A)
    begin_E = jnp.cumsum(size_E) - size_E
    rank_A = place_A - begin_E[expert_A]
    slot_A = jnp.where(rank_A < kept_E[expert_A], first_E[expert_A] + rank_A, N)
    rank_N = jnp.arange(N) - first_E[expert_N]
    taken_N = jnp.minimum(begin_E[expert_N] + rank_N, A - 1)
    return Rows(slot_A, jnp.where(rank_N < kept_E[expert_N], order_A[taken_N], A))


@jax.custom_vjp
def dispatch(x_SD: jax.Array, rows: Rows) -> jax.Array:
    """The token of each row, (N, D); empty rows are 0. The gradient is a gather too, where XLA would scatter."""
    # an empty row's source, A, is a multiple of S: it is made to miss instead of wrapping round
    S, A = x_SD.shape[0], rows.slot_A.size
    return _take(x_SD, jnp.where(rows.source_N < A, rows.source_N % S, S))


@jax.custom_vjp
def collect(y_ND: jax.Array, rows: Rows) -> jax.Array:
    """The row of each assignment, (A, D); dropped ones are 0. The gradient is a gather too."""
    return _take(y_ND, rows.slot_A)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="fill", fill_value=0)


def _dispatch_backward(saved, g_ND):
    rows, S = saved
    g_AD = _take(g_ND, rows.slot_A)
    return jnp.sum(g_AD.reshape(-1, S, g_AD.shape[-1]), axis=0), None


dispatch.defvjp(lambda x_SD, rows: (dispatch(x_SD, rows), (rows, x_SD.shape[0])), _dispatch_backward)
collect.defvjp(lambda y_ND, rows: (collect(y_ND, rows), rows), lambda rows, g_AD: (_take(g_AD, rows.source_N), None))
