"""Mixture of experts: against the dense sum over experts and a simulation of capacities, written out in NumPy."""

import dataclasses
import functools
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from artifex.models.transformer import block_kernels, experts, moe
from artifex.models.transformer.config import DecoderConfig
from artifex.scaling.axes import Rules, activation_rules, resolve
from artifex.scaling.placement import leaves_with_names, names_of, shapes_of

CFG = DecoderConfig(embed_dim=16, num_heads=2, mlp_dim=24, expert_mlp_dim=8, num_experts=4, experts_per_token=2)
balance = jax.jit(moe.balance)
apply = nnx.jit(lambda layer, x: layer(x))


def layer_of(seed=0, **overrides):
    cfg = dataclasses.replace(CFG, **overrides)
    layer = moe.MoE(cfg, rngs=nnx.Rngs(seed))
    layer.router.kernel[...] = 8 * layer.router.kernel[...]  # far from uniform: some experts are chosen much more often
    return layer


def inputs(shape=(8, 24, 16), seed=3):
    return jax.random.normal(jax.random.key(seed), shape)


def rows_of(x_BTD):
    return np.asarray(x_BTD, np.float64).reshape(-1, x_BTD.shape[-1])


def gated(x, gate, up, down, kind):
    x, gate, up, down = (np.asarray(a, np.float64) for a in (x, gate, up, down))
    wide = x @ gate
    act = wide / (1 + np.exp(-wide))
    if kind == "geglu":
        act = 0.5 * wide * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    return (act * (x @ up)) @ down


def by_hand(layer, x_BTD):
    """Every expert's output for every token (S, E, D), the router's probabilities (S, E), and choices (S, K)."""
    cfg, x_SD = layer.cfg, rows_of(x_BTD)
    kernels = [np.asarray(part.kernel[...]) for part in (layer.gate, layer.up, layer.down)]
    outputs_SED = np.stack([gated(x_SD, g, u, d, cfg.mlp) for g, u, d in zip(*kernels, strict=True)], axis=1)
    logits_SE = x_SD @ np.asarray(layer.router.kernel[...], np.float64)
    probability_SE = np.exp(logits_SE) / np.exp(logits_SE).sum(-1, keepdims=True)
    return outputs_SED, probability_SE, np.argsort(-probability_SE, axis=-1)[:, : cfg.experts_per_token]


def weights_of(probability_SE, expert_SK, normalize=True):
    weight_SK = np.take_along_axis(probability_SE, expert_SK, axis=-1)
    return weight_SK / weight_SK.sum(-1, keepdims=True) if normalize else weight_SK


@pytest.mark.parametrize(
    "overrides",
    [{}, {"mlp": "geglu", "normalize_expert_weights": False}, {"experts_per_token": 1}, {"num_shared_experts": 2}],
    ids=str,
)
@pytest.mark.parametrize("path", ["by_blocks", "by_ragged_dot"])
def test_dropless_is_the_dense_sum_over_experts(overrides, path, monkeypatch):
    product = getattr(experts, path)
    monkeypatch.setattr(experts, "by_blocks", lambda *args, expected: product(*args))
    layer, x_BTD = layer_of(**overrides), inputs()
    cfg = layer.cfg
    outputs_SED, probability_SE, expert_SK = by_hand(layer, x_BTD)
    expected_SD = np.zeros((outputs_SED.shape[0], cfg.embed_dim))
    for token, chosen in enumerate(expert_SK):
        weights = weights_of(probability_SE[token], chosen, cfg.normalize_expert_weights)
        for expert, weight in zip(chosen, weights, strict=True):
            expected_SD[token] += weight * outputs_SED[token, expert]
    if cfg.num_shared_experts:
        assert layer.shared is not None and layer.shared.gate.kernel.shape == (16, 2 * 8)
        gate, up, down = (part.kernel[...] for part in (layer.shared.gate, layer.shared.up, layer.shared.down))
        expected_SD += gated(rows_of(x_BTD), gate, up, down, cfg.mlp)
    y_BTD, aux = jax.jit(layer.__call__)(x_BTD)
    np.testing.assert_allclose(np.asarray(y_BTD).reshape(-1, 16), expected_SD, atol=2e-6)
    assert aux["dropped"] == 0


BY_LOOP = [functools.partial(experts.block_product, empty) for empty in get_args(experts.Empty)]


@pytest.mark.parametrize(
    "product",
    [functools.partial(block_kernels.block_product, True), *BY_LOOP],
    ids=["on GPUs", *get_args(experts.Empty)],
)
def test_each_block_is_multiplied_by_its_expert_and_nothing_comes_of_those_behind_the_last(product):
    rng = np.random.default_rng(0)
    x_bRD, g_bRF, kernel_EDF = (
        rng.normal(size=s).astype(np.float32) for s in ((5, 16, 128), (5, 16, 256), (4, 128, 256))
    )
    owner_b, end_E = np.int32([0, 0, 2, 3, 3]), np.int32([2, 2, 3, 4])  # expert 1 has no block, and block 4 is none's
    if product is BY_LOOP[0]:
        x_bRD[4] = g_bRF[4] = 0  # as they are where they are computed
    ends = jnp.asarray(end_E if product not in BY_LOOP else end_E[-1])
    y_bRF, pull = jax.vjp(lambda x, w: product(jnp.asarray(owner_b), ends, x, w), x_bRD, kernel_EDF)
    slopes = pull(jnp.asarray(g_bRF))
    sums_EDF = np.zeros_like(kernel_EDF)
    for b, expert in enumerate(owner_b[:4]):
        np.testing.assert_allclose(y_bRF[b], x_bRD[b] @ kernel_EDF[expert], atol=1e-4)
        np.testing.assert_allclose(slopes[0][b], g_bRF[b] @ kernel_EDF[expert].T, atol=1e-4)
        sums_EDF[expert] += x_bRD[b].T @ g_bRF[b]
    np.testing.assert_allclose(slopes[1], sums_EDF, atol=1e-4)
    assert not y_bRF[4].any() and not slopes[0][4].any() and not sums_EDF[1].any()


def test_a_tokens_experts_in_bfloat16_are_added_before_they_are_rounded():
    x_KSD = jax.random.normal(jax.random.key(0), (8, 64, 32), jnp.bfloat16)
    exact_SD = np.asarray(x_KSD, np.float64).sum(0)
    found_SD = np.asarray(jax.jit(experts.summed)(x_KSD), np.float64)
    assert (np.abs(found_SD - exact_SD) <= 2.0**-8 * np.abs(exact_SD) + 1e-6).all()  # half of a unit in the last place


@pytest.mark.parametrize("size", [1, 3, 40])
def test_any_number_of_tokens_is_served(size):
    layer, x_BTD = layer_of(), inputs((1, size, 16))
    outputs_SED, probability_SE, expert_SK = by_hand(layer, x_BTD)
    weight_SK = weights_of(probability_SE, expert_SK)
    expected_SD = np.einsum("SK,SKD->SD", weight_SK, np.take_along_axis(outputs_SED, expert_SK[..., None], axis=1))
    np.testing.assert_allclose(np.asarray(apply(layer, x_BTD)[0][0]), expected_SD, atol=2e-6)


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.4, 9.0])
def test_capacity_drops_exactly_what_it_says(factor):
    layer, x_BTD = layer_of(capacity_factor=factor), inputs()
    outputs_SED, probability_SE, expert_SK = by_hand(layer, x_BTD)
    weight_SK = weights_of(probability_SE, expert_SK)
    capacity, dropped = math.ceil(factor * 24 * 2 / 4), 0
    expected_SD = np.zeros((expert_SK.shape[0], 16))
    for row in range(8):
        taken = [0] * 4
        for rank in range(2):
            for token in range(24 * row, 24 * row + 24):
                expert = expert_SK[token, rank]
                if taken[expert] < capacity:
                    taken[expert] += 1
                    expected_SD[token] += weight_SK[token, rank] * outputs_SED[token, expert]
                else:
                    dropped += 1
    y_BTD, aux = apply(layer, x_BTD)
    np.testing.assert_allclose(np.asarray(y_BTD).reshape(-1, 16), expected_SD, atol=2e-6)
    assert float(aux["dropped"]) == pytest.approx(dropped / expert_SK.size, abs=1e-7)
    if factor <= 1:
        assert dropped > 0  # the load is uneven: an even share does not hold it


def test_a_token_of_which_all_choices_are_dropped_gets_nothing():
    layer, x_BTD = layer_of(capacity_factor=0.3), jnp.broadcast_to(inputs((1, 1, 16)), (1, 30, 16))
    y_SD = np.asarray(apply(layer, x_BTD)[0][0])  # equal tokens: the first to come are served, 0.3 * 60 / 4 = 4.5
    assert (y_SD[:5] == y_SD[0]).all() and y_SD[0].any()
    assert not y_SD[5:].any()


def test_balance_loss_is_1_at_uniform_load_and_greater_elsewhere():
    every = jnp.asarray(np.float32(20 * np.eye(4)[np.arange(64) % 4]))
    even = balance(every, jnp.full(4, 16))
    assert float(even["load_balance"]) == pytest.approx(1, abs=1e-5)
    assert float(even["expert_utilisation"]) == pytest.approx(1, abs=1e-5)
    same = balance(jnp.asarray([[20.0, 0.0, 0.0, 0.0]] * 64), jnp.asarray([64, 0, 0, 0]))
    assert float(same["load_balance"]) == pytest.approx(4, abs=1e-5)
    assert float(same["expert_utilisation"]) == pytest.approx(0.25, abs=1e-5)
    rng = np.random.default_rng(0)
    for scale in (0.1, 1, 3):  # where choices follow the probabilities, uneven is always above 1
        logits_SE = scale * rng.normal(size=4) * np.ones((10_000, 1))
        share_E = np.exp(logits_SE[0]) / np.exp(logits_SE[0]).sum()
        loss = balance(jnp.float32(logits_SE), jnp.asarray(np.round(1e4 * share_E), jnp.int32))["load_balance"]
        assert float(loss) == pytest.approx(4 * (share_E**2).sum(), rel=1e-3) and loss > 1


def test_losses_are_the_published_formulas():
    layer, x_BTD = layer_of(), inputs()
    _, probability_SE, expert_SK = by_hand(layer, x_BTD)
    logits_SE = rows_of(x_BTD) @ np.asarray(layer.router.kernel[...], np.float64)
    share_E = np.bincount(expert_SK.ravel(), minlength=4) / expert_SK.size
    choosing_E = share_E * expert_SK.shape[1]  # the share of tokens
    aux = apply(layer, x_BTD)[1]
    assert all(value.dtype == jnp.float32 and value.shape == () for value in aux.values())
    assert float(aux["load_balance"]) == pytest.approx(4 * (choosing_E * probability_SE.mean(0)).sum(), rel=1e-5)
    assert float(aux["router_z"]) == pytest.approx(np.mean(np.log(np.exp(logits_SE).sum(-1)) ** 2), rel=1e-5)
    assert float(aux["expert_utilisation"]) == pytest.approx(np.exp(-(share_E * np.log(share_E)).sum()) / 4, rel=1e-5)


def objective(graphdef, state, x_BTD):
    y_BTD, aux = nnx.merge(graphdef, state)(x_BTD)
    return jnp.sum(jnp.square(y_BTD.astype(jnp.float32))) + aux["load_balance"] + aux["router_z"]


@pytest.mark.parametrize("overrides", [{}, {"capacity_factor": 1.0}], ids=["dropless", "capacity"])
def test_gradients_are_those_of_finite_differences(overrides):
    graphdef, state = nnx.split(layer_of(**overrides))
    x_BTD = inputs()
    value = jax.jit(lambda state: objective(graphdef, state, x_BTD))
    slopes = jax.jit(jax.grad(lambda state: objective(graphdef, state, x_BTD)))(state)
    assert all(np.abs(slope).max() > 1e-3 for slope in jax.tree.leaves(slopes))
    step = jax.tree.map(lambda a: 1e-3 * jax.random.normal(jax.random.key(a.size), a.shape), state)
    ahead, behind = (jax.tree.map(lambda a, b, s=s: a + s * b, state, step) for s in (0.5, -0.5))
    along = sum(jnp.sum(a * b) for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(step), strict=True))
    assert float(value(ahead) - value(behind)) == pytest.approx(float(along), rel=2e-2)


def test_bfloat16_stays_near_float32():
    layer, x_BTD = layer_of(num_shared_experts=1), inputs()
    layer.router.kernel[...] = layer.router.kernel[...].astype(jnp.bfloat16).astype(jnp.float32)  # the same choices
    exact = apply(layer, x_BTD.astype(jnp.bfloat16).astype(jnp.float32))[0]
    graphdef, state = nnx.split(layer)
    half = nnx.merge(graphdef, jax.tree.map(lambda a: a.astype(jnp.bfloat16), state))
    rough, aux = apply(half, x_BTD.astype(jnp.bfloat16))
    assert rough.dtype == jnp.bfloat16 and aux["load_balance"].dtype == jnp.float32
    error = jnp.sqrt(jnp.mean(jnp.square(rough.astype(jnp.float32) - exact)) / jnp.mean(jnp.square(exact)))
    assert float(error) < 0.02


RULES = {
    "data": Rules.of(activations={"batch": "x"}),
    "fsdp": Rules.of({"embed": "x"}, {"batch": "x"}),
    "tensor": Rules.of({"expert_mlp": "x", "mlp": "x"}, {"act_mlp": "x"}),
    "experts": Rules.of({"experts": "y"}, {"batch": "x", "act_experts": "y"}),
}


@pytest.mark.parametrize("overrides", [{}, {"capacity_factor": 1.0}], ids=["dropless", "capacity"])
@pytest.mark.parametrize("strategy", RULES)
def test_8_devices_equal_one(strategy, overrides):
    rules, shape = RULES[strategy], (2, 4) if strategy == "experts" else (8, 1)
    mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    layer, x_BTD = layer_of(num_shared_experts=1, **overrides), inputs()
    graphdef, state = nnx.split(layer)
    grads = jax.value_and_grad(lambda *args: objective(graphdef, *args), argnums=(0, 1))
    expected = jax.jit(grads)(state, x_BTD)

    def spread(state, x_BTD):
        with activation_rules(rules, mesh):
            return grads(state, x_BTD)

    names = leaves_with_names(shapes_of(layer), names_of(layer))
    specs = [resolve(of, leaf.shape, rules.params, dict(mesh.shape)).spec for _, leaf, of in names]
    assert any(any(spec) for spec in specs) == bool(rules.params)
    leaves, tree = jax.tree.flatten(state)
    placed = [jax.device_put(a, jax.NamedSharding(mesh, spec)) for a, spec in zip(leaves, specs, strict=True)]
    for one, many in zip(
        jax.tree.leaves(expected),
        jax.tree.leaves(jax.jit(spread)(jax.tree.unflatten(tree, placed), x_BTD)),
        strict=True,
    ):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5 * float(jnp.abs(one).max()))
