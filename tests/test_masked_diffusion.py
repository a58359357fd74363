"""Masked diffusion over text: its bound and its samples where the best denoiser is known in closed form."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from artifex.models.cross_entropy import cross_entropy
from artifex.models.layers import strata
from artifex.models.staged import Stack, Start
from artifex.models.transformer.config import DecoderConfig
from artifex.models.transformer.masked import hide
from artifex.models.transformer.masked_config import PRESETS, MaskedDiffusionConfig

SMALL = DecoderConfig(
    vocab_size=6, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=24, sequence_length=24, causal=False
)
CFG = MaskedDiffusionConfig(SMALL, sampling_steps=8)
UNIGRAM = np.array([0.5, 0.25, 0.15, 0.08, 0.02])
IDS = np.arange(6, dtype=np.int32)[None, None]
loss_of = nnx.jit(lambda model, batch: model.loss(batch))
training_loss_of = nnx.jit(lambda model, batch, key: model.loss(batch, nnx.Rngs(key)))


class Denoiser(nnx.Module):
    """Stands in for the decoder: its stream is its logits, and its head the identity."""

    def __init__(self):
        self.layers = nnx.Dict()

    @property
    def stack(self):
        return Stack(("layers",), 1, lambda block, stream, beside, own: (stream, {}))

    def dropout_key(self, rngs):
        return None

    def begin(self, tokens_BT, key, places):
        return Start(self(tokens_BT))

    def cross_entropy(self, x_BTD, targets_BT, mask_BT, never=None):
        return cross_entropy(x_BTD, jnp.eye(6), targets_BT, mask_BT, never=never)


class Unigram(Denoiser):
    """The best denoiser of independent tokens: their distribution, whatever is seen. It likes the mask best of all."""

    def __call__(self, tokens_BT, rngs=None, **packed):
        return jnp.broadcast_to(jnp.log(jnp.float32([*UNIGRAM, 5.0])), (*tokens_BT.shape, 6))


class Watched(Denoiser):
    """Uniform over 5 tokens where it sees a mask; over 10^6 as many where it does not, so that the loss would tell."""

    def __call__(self, tokens_BT, rngs=None, **packed):
        seen_BT1 = (tokens_BT != 5)[..., None]
        return jnp.where(seen_BT1 & (tokens_BT[..., None] == IDS), -1e6, 0.0)


@pytest.fixture(scope="module")
def model():
    return CFG.build(nnx.Rngs(0))


def oracle(denoiser):
    model = CFG.build(nnx.Rngs(0))
    model.decoder = denoiser
    return model


def data(rows, length=24, seed=0):
    tokens = np.random.default_rng(seed).choice(5, (rows, length), p=UNIGRAM)
    return {"tokens": jnp.zeros((rows, length), jnp.int32), "targets": jnp.asarray(tokens, jnp.int32)}


@pytest.mark.parametrize("training", [True, False])
def test_the_bound_of_the_best_denoiser_is_the_entropy(training):
    model, batch = oracle(Unigram()), data(4_096)
    loss, metrics = training_loss_of(model, batch, jax.random.key(7)) if training else loss_of(model, batch)
    surprisal = -np.log(UNIGRAM)
    entropy = (UNIGRAM * surprisal).sum()
    # a row is the mean surprisal of its h hidden tokens, and the mean of 1 / h is 3.78 / 24
    variance = ((UNIGRAM * surprisal**2).sum() - entropy**2) * 3.78 / 24
    assert float(loss) == pytest.approx(entropy, abs=4 * np.sqrt(variance / 4_096))
    assert metrics["weight"] == 4_096 * 24


def test_only_hidden_tokens_count():
    # a uniform guess costs log 5 at any number of hidden tokens
    loss, _ = training_loss_of(oracle(Watched()), data(64), jax.random.key(3))
    assert float(loss) == pytest.approx(np.log(5), rel=1e-5)


def test_every_number_of_tokens_is_hidden_as_often_and_every_token():
    there = np.ones((4_096, 6), bool)
    there[:, 4] = there[0] = False  # padding, and a row of nothing else
    hidden = np.asarray(jax.jit(hide)(jnp.asarray(there), jax.random.key(0)))
    assert not (hidden & ~there).any()
    number = hidden[1:].sum(axis=1)
    np.testing.assert_allclose(np.bincount(number) / 4_095, [0, *[0.2] * 5], atol=0.001)  # strata leave no more
    for h in range(1, 6):
        share = hidden[1:][number == h].mean(axis=0)
        np.testing.assert_allclose(share[there[1]], h / 5, atol=4 * np.sqrt(0.25 / 819))


def test_times_are_stratified_and_that_of_each_row_is_uniform():
    drawn = np.asarray(jax.vmap(lambda key: strata(8, key))(jax.random.split(jax.random.key(0), 400)))
    ordered = np.sort(drawn, axis=1)
    assert ((ordered > np.arange(8) / 8) & (ordered <= np.arange(1, 9) / 8)).all()
    quarters = [0.25, 0.5, 0.75]
    np.testing.assert_allclose(np.quantile(ordered * 8 - np.arange(8), quarters), quarters, atol=0.08)
    deviation = 4 * np.sqrt(0.25 / 400)  # of a quantile of 400 uniform numbers, four times
    np.testing.assert_allclose(np.quantile(drawn, quarters, axis=0), np.full((8, 3), quarters).T, atol=deviation)


class Fading(Denoiser):
    """Knows that all tokens are 0, the surer the more it sees."""

    def __call__(self, tokens_BT, rngs=None, **packed):
        seen_B11 = jnp.mean((tokens_BT != 5).astype(jnp.float32), axis=1)[:, None, None]
        return jnp.broadcast_to(jnp.where(IDS == 0, 8 * seen_B11, 0.0), (*tokens_BT.shape, 6))


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_any_rows_of_a_validation_batch_estimate_the_bound(rows):
    """Its mean over t of (1/t) E[sum over hidden tokens] by numbers: h of 24 are hidden, binomially, at g(h) each."""
    model, length = oracle(Fading()), 24
    h, t = np.arange(1, length + 1)[:, None], (np.arange(20_000) + 0.5) / 20_000
    sure = 8 * (1 - h / length)
    ways = np.array([[math.comb(length, int(k))] for k in h[:, 0]])
    binomial = ways * t**h * (1 - t) ** (length - h)
    bound = np.mean(np.sum(binomial * h / t * (np.log(np.exp(sure) + 4) - sure), axis=0)) / length
    batch = {"targets": jnp.zeros((16, length), jnp.int32), "mask": jnp.zeros((16, length)).at[:rows].set(1)}
    each = np.asarray(jax.jit(jax.vmap(lambda index: model.loss(batch, index=index)[0]))(jnp.arange(4_000)))
    assert np.mean(each) == pytest.approx(bound, abs=4 * np.std(each) / np.sqrt(4_000))
    assert 0 < np.std(each) / np.sqrt(4_000) < 0.03 * bound


def test_padding_counts_neither_as_input_nor_as_target(model):
    batch = data(4)
    mask = jnp.ones((4, 24)).at[:, 17:].set(0).at[3].set(0)
    loss, metrics = loss_of(model, batch | {"mask": mask})
    other = batch["targets"].at[:, 17:].set(1).at[3].set(2)
    again, _ = loss_of(model, {"tokens": batch["tokens"], "targets": other, "mask": mask})
    assert loss == again and metrics["weight"] == 3 * 17
    everything = float(loss_of(model, batch | {"mask": jnp.ones((4, 24))})[0])
    assert everything == pytest.approx(float(loss_of(model, batch)[0]), rel=1e-6)
    assert loss_of(model, batch | {"mask": jnp.zeros((4, 24))})[0] == 0


def test_training_draws_anew_and_validation_does_not(model):
    batch = data(4)
    first, second = (training_loss_of(model, batch, jax.random.key(seed))[0] for seed in (1, 2))
    assert first != second
    assert loss_of(model, batch)[0] == loss_of(model, batch)[0]


def test_tokens_on_both_sides_are_seen(model):
    tokens = jnp.asarray([[5] * 24])
    call = nnx.jit(lambda model, tokens: model(tokens))
    changed = np.abs(call(model, tokens.at[0, 12].set(1)) - call(model, tokens)).max(axis=(0, 2))
    assert (changed > 0).all()


@pytest.mark.parametrize("steps", [1, 5, 64])
def test_samples_of_the_best_denoiser_have_its_distribution(steps):
    model = oracle(Unigram())
    prompt = jnp.zeros((512, 2), jnp.int32)
    tokens = np.asarray(model.sample(jax.random.key(0), prompt=prompt, num_tokens=22, steps=steps))
    assert tokens.shape == (512, 22)
    shares = np.bincount(tokens.ravel(), minlength=6) / tokens.size
    assert shares[5] == 0  # the mask
    np.testing.assert_allclose(shares[:5], UNIGRAM, atol=4 * np.sqrt(0.25 / tokens.size))
    pairs = np.histogram2d(tokens[:, :-1].ravel(), tokens[:, 1:].ravel(), bins=(np.arange(6), np.arange(6)))[0]
    np.testing.assert_allclose(pairs / pairs.sum(), np.outer(UNIGRAM, UNIGRAM), atol=4 * np.sqrt(0.2 / tokens.size))


class Copies(Denoiser):
    """Knows that a row repeats one token: the token that is seen, or any while none is."""

    def __call__(self, tokens_BT, rngs=None, **packed):
        seen_B1V = (tokens_BT[..., None] == IDS).any(axis=1, keepdims=True) & (IDS < 5)
        return jnp.broadcast_to(jnp.where(seen_B1V, 30.0, 0.0), (*tokens_BT.shape, 6))


def test_a_token_is_drawn_given_those_revealed_before():
    prompt = jnp.arange(5)[:, None]
    assert (oracle(Copies()).sample(jax.random.key(0), prompt=prompt, num_tokens=9) == prompt).all()
    # without a prompt the first token revealed decides, where no other is revealed in the same step
    agree = [
        len(set(np.ravel(oracle(Copies()).sample(jax.random.key(seed), num_tokens=3, steps=1_000)))) == 1
        for seed in range(5)
    ]
    assert all(agree)


def test_a_sample_is_a_pure_function_of_its_key(model):
    prompt = jnp.asarray([[1, 2, 3], [0, 0, 4]])
    draw = [model.sample(jax.random.key(seed), prompt=prompt, num_tokens=20, top_k=4, top_p=0.9) for seed in (0, 0, 1)]
    assert draw[0].shape == (2, 20) and draw[0].dtype == jnp.int32
    assert (draw[0] == draw[1]).all() and (draw[0] != draw[2]).any()
    assert model.sample(jax.random.key(0), num_tokens=24, temperature=0).shape == (1, 24)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"num_tokens": 0, "prompt": None}, "num_tokens is 0"),
        ({"num_tokens": 25, "prompt": None}, "model has 24"),
        ({"num_tokens": 24}, "ask for at most 23"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"prompt": jnp.asarray([[5]])}, "vocabulary is 0 to 4"),
    ],
    ids=str,
)
def test_samples_out_of_range_are_refused(model, how, message):
    with pytest.raises(ValueError, match=message):
        model.sample(jax.random.key(0), **({"prompt": jnp.asarray([[1]]), "num_tokens": 4} | how))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"decoder": dataclasses.replace(SMALL, causal=True)}, "decoder has causal=True"),
        ({"decoder": dataclasses.replace(SMALL, num_experts=4)}, "decoder has num_experts 4"),
        ({"decoder": dataclasses.replace(SMALL, z_loss_weight=0.1)}, "decoder has z_loss_weight 0.1"),
        ({"decoder": dataclasses.replace(SMALL, vocab_size=1)}, "decoder has vocab_size 1"),
        ({"sampling_steps": 0}, "sampling_steps is 0"),
    ],
    ids=["causal", "experts", "z_loss", "vocabulary", "steps"],
)
def test_configurations_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CFG, **overrides)


def test_presets_have_one_id_more_than_their_data():
    for cfg in PRESETS.values():
        assert cfg.vocab_size == cfg.mask_id == cfg.decoder.vocab_size - 1
        assert cfg.sequence_length == cfg.decoder.sequence_length


def test_bfloat16_stays_near_float32(model):
    graphdef, state = nnx.split(model)
    half = nnx.merge(graphdef, jax.tree.map(lambda a: a.astype(jnp.bfloat16), state))
    exact, rough = loss_of(model, data(8))[0], loss_of(half, data(8))[0]
    assert rough.dtype == jnp.float32 and float(rough) == pytest.approx(float(exact), rel=0.01)
