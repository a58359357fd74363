"""Linear attention: its chunks against the double sum over positions and against the recurrence, in NumPy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from artifex.models.transformer import linear_attention
from artifex.models.transformer.attention import Place
from artifex.models.transformer.config import DecoderConfig
from artifex.models.transformer.linear_attention import LinearAttention, State, chunked
from artifex.models.transformer.positions import Positions

CFG = DecoderConfig(embed_dim=24, num_heads=4, num_kv_heads=2, head_dim=6, sequence_length=64)
DECAY_K = np.array([0.7, 0.97])
chunks_of = jax.jit(lambda q, k, v, state, valid: chunked(q, k, v, np.log(DECAY_K), state, valid))


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(linear_attention, "CHUNK", 8)


def qkv(length, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((2, 2, 3, length, 5), (2, 2, length, 5), (2, 2, length, 4))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def quadratic(query_BKGTH, key_BKTH, value_BKTV, xp: Any = np):
    """The definition: a weight for each pair of positions."""
    ages = np.arange(key_BKTH.shape[2])[:, None] - np.arange(key_BKTH.shape[2])
    kept_KTS = np.where(ages >= 0, DECAY_K[:, None, None] ** np.maximum(ages, 0), 0).astype(query_BKGTH.dtype)
    scores = xp.einsum("BKGTH,BKSH->BKGTS", query_BKGTH, key_BKTH) * kept_KTS[None, :, None]
    return xp.einsum("BKGTS,BKSV->BKGTV", scores, value_BKTV)


def recurrence(key_BKTH, value_BKTV, count):
    """The state after `count` positions, one at a time."""
    state = np.zeros((*key_BKTH.shape[:2], key_BKTH.shape[-1], value_BKTV.shape[-1]))
    for t in range(count):
        state = DECAY_K[None, :, None, None] * state + key_BKTH[:, :, t, :, None] * value_BKTV[:, :, t, None, :]
    return state


@pytest.mark.parametrize("length", [1, 8, 21])
def test_chunks_equal_the_quadratic_form_and_end_in_the_recurrence(length):
    q, k, v = qkv(length)
    mixed, state = chunks_of(q, k, v, None, None)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    np.testing.assert_allclose(mixed, quadratic(q, k, v), atol=2e-5)
    np.testing.assert_allclose(state.sum, recurrence(k, v, length), atol=2e-5)


def test_gradients_equal_those_of_the_quadratic_form():
    inputs, weights = qkv(21), jax.random.normal(jax.random.key(9), (2, 2, 3, 21, 4))
    ours = jax.jit(jax.grad(lambda q, k, v: jnp.sum(weights * chunked(q, k, v, np.log(DECAY_K))[0]), argnums=(0, 1, 2)))
    plain = jax.jit(jax.grad(lambda q, k, v: jnp.sum(weights * quadratic(q, k, v, jnp)), argnums=(0, 1, 2)))
    for one, other in zip(ours(*inputs), plain(*inputs), strict=True):
        np.testing.assert_allclose(one, other, atol=5e-5)


@pytest.mark.parametrize("valid", [1, 7, 8, 13, 20])
def test_padding_does_not_reach_the_state(valid):
    q, k, v = qkv(20)
    earlier = State(jax.random.normal(jax.random.key(5), (2, 2, 5, 4)))
    padded = chunks_of(q, k.at[:, :, valid:].set(50), v.at[:, :, valid:].set(-50), earlier, jnp.int32(valid))
    faded = DECAY_K[None, :, None, None] ** valid * np.asarray(earlier.sum, np.float64)
    np.testing.assert_allclose(padded[1].sum, faded + recurrence(k, v, valid), atol=5e-5)
    whole = chunks_of(q, k, v, earlier, None)
    np.testing.assert_allclose(padded[0][..., :valid, :], whole[0][..., :valid, :], atol=1e-5)


def test_a_prompt_and_single_steps_equal_the_whole_sequence():
    layer = LinearAttention(CFG, rngs=nnx.Rngs(0))
    x_BTD = jax.random.normal(jax.random.key(1), (2, 18, 24))
    step = nnx.jit(
        lambda layer, x, positions, state, valid: layer(x, Positions(positions), state, Place(None, 0, valid))
    )
    whole_BTD, none = nnx.jit(lambda layer, x: layer(x, Positions(np.arange(18))))(layer, x_BTD)
    assert none is None
    state = LinearAttention.empty_cache(CFG, None, 2, 18, jnp.bfloat16)
    prompt = x_BTD.at[:, 13:].set(7.0)[:, :16]  # three positions of padding
    y_BTD, state = step(layer, prompt, jnp.arange(16), state, jnp.int32(13))
    parts = [y_BTD[:, :13]]
    for t in range(13, 18):
        y_BTD, state = step(layer, x_BTD[:, t : t + 1], jnp.arange(t, t + 1), state, jnp.int32(1))
        parts.append(y_BTD)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole_BTD, atol=2e-5)


@pytest.mark.parametrize("positions", ["rope", "none"])
def test_the_layer_is_its_equation(positions):
    cfg = dataclasses.replace(CFG, positions=positions)
    layer, x_BTD = LinearAttention(cfg, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (1, 12, 24))
    x = np.asarray(x_BTD, np.float64)
    projected = [np.einsum("BTD,DNH->BTNH", x, part.kernel[...]) for part in (layer.query, layer.key, layer.value)]
    query, key = (np.where(y > 0, y + 1, np.exp(np.minimum(y, 0))) for y in projected[:2])
    if positions == "rope":  # as complex numbers: pair (i, i + 3) turns by position * 10000^(-i/3)
        turn = np.exp(1j * np.arange(12)[:, None] * 10_000.0 ** (-np.arange(3) / 3))[None, :, None]
        turned = [(y[..., :3] + 1j * y[..., 3:]) * turn for y in (query, key)]
        query, key = (np.concatenate([y.real, y.imag], axis=-1) for y in turned)
    decay_K, mixed = (1 - 1 / 64, 1 / 2), np.zeros((1, 12, 4, 6))
    for t in range(12):
        for s in range(t + 1):
            for head in range(4):
                score = (query[:, t, head] * key[:, s, head // 2]).sum(-1, keepdims=True) / np.sqrt(6)
                mixed[:, t, head] += decay_K[head // 2] ** (t - s) * score * projected[2][:, s, head // 2]
    mixed = mixed / np.sqrt((mixed**2).mean(-1, keepdims=True) + 1e-5)
    expected = np.einsum("BTNH,NHD->BTD", mixed, layer.out.kernel[...])
    ours = nnx.jit(lambda layer, x: layer(x, Positions(np.arange(12)))[0])(layer, x_BTD)
    np.testing.assert_allclose(ours, expected, atol=5e-5)


def test_bfloat16_keeps_a_float32_state_and_stays_near():
    layer, x_BTD = LinearAttention(CFG, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (2, 40, 24))
    graphdef, weights = nnx.split(layer)
    run = jax.jit(
        lambda weights, x, state: nnx.merge(graphdef, weights)(x, Positions(np.arange(40)), state, Place(None, 0, 40))
    )
    state = LinearAttention.empty_cache(CFG, None, 2, 40, jnp.float32)
    exact, _ = run(weights, x_BTD, state)
    rough, after = run(jax.tree.map(lambda a: a.astype(jnp.bfloat16), weights), x_BTD.astype(jnp.bfloat16), state)
    assert rough.dtype == jnp.bfloat16 and after.sum.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean(jnp.square(rough.astype(jnp.float32) - exact)) / jnp.mean(jnp.square(exact)))
    assert float(error) < 0.03
