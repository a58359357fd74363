"""Discrete codes: the codebook against a plain k-means in NumPy, FSQ's grid, perplexity, gradients straight through."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from artifex.models.vae.config import VQConfig
from artifex.models.vae.quantizers import FiniteScalarQuantizer, VectorQuantizer, candidates, perplexity

SMALL = VQConfig(image_size=8, channels=1, block_channels=(16,), residual_blocks=1, codes=12, latent_dim=4)
CONFIGS = {"vq": SMALL, "fsq": dataclasses.replace(SMALL, quantizer="fsq", fsq_levels=(4, 3, 2))}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return nnx.jit(CONFIGS[request.param].build)(nnx.Rngs(0))


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(0), (6, 8, 8, 1), minval=-1, maxval=1)


@nnx.jit
def train_once(model, batch, key):
    loss, metrics = model.loss(batch, nnx.Rngs(key))
    return loss, metrics, model


validate = nnx.jit(lambda model, batch: model.loss(batch))


def quantizer(codes=5, width=3, decay=0.9, revive_below=0.0):
    return VectorQuantizer(codes, width, decay=decay, revive_below=revive_below, rngs=nnx.Rngs(0))


@nnx.jit
def quantized(quantizer, z, weights, key):
    out = quantizer(z, weights, key)
    return out, quantizer


def vectors(seed, images=4, width=3):
    return jax.random.normal(jax.random.key(seed), (images, 2, 3, width))


def test_the_codebook_is_the_running_k_means_of_what_chose_it():
    model, decay = quantizer(), 0.9
    codebook = np.random.default_rng(0).normal(size=(5, 3))
    counts, sums = np.ones(5), codebook.copy()
    nnx.update(model, {"counts": jnp.asarray(counts, jnp.float32), "sums": jnp.asarray(sums, jnp.float32)})
    for seed in (1, 2, 3):
        z = np.float64(vectors(seed)).reshape(-1, 3)
        choice = [int(np.argmin([np.sum((one - entry) ** 2) for entry in codebook])) for one in z]
        for k in range(5):
            mine = [one for one, chosen in zip(z, choice, strict=True) if chosen == k]
            counts[k] = decay * counts[k] + (1 - decay) * len(mine)
            sums[k] = decay * sums[k] + (1 - decay) * sum(mine, np.zeros(3))
            codebook[k] = sums[k] / counts[k]
        out, model = quantized(model, vectors(seed), jnp.ones(4), jax.random.key(seed))
        np.testing.assert_array_equal(np.ravel(out.codes), choice)
        np.testing.assert_allclose(model.counts[...], counts, rtol=1e-5)
        np.testing.assert_allclose(model.codebook, codebook, rtol=1e-3, atol=1e-4)


def test_averaged_counts_and_sums_are_the_codebook_of_an_averaged_encoder():
    """An encoder that drifts: its average gives the average of its vectors, whose k-means the averaged codebook is."""
    model, base = quantizer(codes=2, decay=0.0), vectors(5)
    base = base.at[:2].add(20.0)
    start = jnp.stack([jnp.mean(base[:2], (0, 1, 2)), jnp.mean(base[2:], (0, 1, 2))])
    nnx.update(model, {"counts": jnp.full(2, 12.0), "sums": 12 * start})
    z = np.asarray(base)
    average = {"z": z, "counts": np.full(2, 12.0, np.float32), "sums": 12 * np.asarray(start)}
    for step in range(40):
        z = np.asarray(base) + 0.1 * step
        _, model = quantized(model, jnp.asarray(z), jnp.ones(4), jax.random.key(step))
        latest = {"z": z, "counts": np.asarray(model.counts[...]), "sums": np.asarray(model.sums[...])}
        average = {name: 0.9 * average[name] + 0.1 * latest[name] for name in average}
    newest = np.asarray(model.codebook)
    nnx.update(model, {name: jnp.asarray(average[name]) for name in ("counts", "sums")})
    means = [average["z"][:2].mean((0, 1, 2)), average["z"][2:].mean((0, 1, 2))]
    np.testing.assert_allclose(model.codebook, means, rtol=1e-4, atol=1e-4)
    assert np.abs(newest - means).min() > 0.5


def test_the_first_batch_starts_the_codebook_at_its_own_vectors():
    z = vectors(0)
    out, model = quantized(quantizer(decay=0.999), z, jnp.ones(4), jax.random.key(0))
    entries, pool = np.asarray(model.codebook), np.asarray(z).reshape(-1, 3)
    distances = np.abs(entries[:, None] - pool[None]).max(axis=-1).min(axis=-1)
    assert distances.max() < 0.01  # moved by a thousandth since
    assert len(np.unique(np.asarray(out.codes))) == 5


def test_unused_codes_are_replaced_by_vectors_of_the_batch_and_used_ones_stay():
    model = quantizer(revive_below=0.1)
    start, counts = jnp.array([[0.0] * 3, [1.0] * 3, [50.0] * 3, [60.0] * 3, [-1.0] * 3]), [5.0, 5.0, 0.01, 0.02, 5.0]
    nnx.update(model, {"counts": jnp.array(counts), "sums": start * jnp.array(counts)[:, None]})
    z, weights = vectors(3).at[3].set(99.0), jnp.array([1.0, 1.0, 1.0, 0.0])
    again = nnx.clone(model)
    _, model = quantized(model, z, weights, jax.random.key(0))
    codebook = np.asarray(model.codebook)
    assert np.abs(codebook).max() < 5, "neither the far entries nor a row that fills up the batch"
    kept = np.asarray(start)[[0, 1, 4]]
    assert np.abs(codebook[[0, 1, 4]] - kept).max() < 0.5
    _, again = quantized(again, z, weights, jax.random.key(0))
    np.testing.assert_array_equal(again.codebook, codebook)


@pytest.mark.parametrize("count", [3, 8, 30])
def test_candidates_are_any_vectors_of_images_that_count_and_no_two_the_same(count):
    there = jnp.array([False, True, True, False, True, False])
    allowed = np.array([4, 5, 6, 7, 8, 9, 10, 11, 16, 17, 18, 19])
    draw = jax.jit(jax.vmap(lambda key: candidates(key, there, 4, count)))
    found = np.asarray(draw(jax.random.split(jax.random.key(0), 3_000)))
    assert found.shape == (3_000, count) and set(found.ravel()) == set(allowed)
    for row in found[:100]:
        assert len(set(row)) == min(count, len(allowed))
    for column in found.T[: len(allowed)]:
        shares = np.bincount(column, minlength=24)[allowed] / 3_000
        np.testing.assert_allclose(shares, 1 / 12, atol=4.5 * np.sqrt(1 / 12 / 3_000))


def test_a_batch_without_images_leaves_the_codebook_alone():
    model = quantizer(revive_below=0.1)
    _, model = quantized(model, vectors(0), jnp.ones(4), jax.random.key(0))
    before = np.asarray(model.codebook)
    _, model = quantized(model, vectors(1), jnp.zeros(4), jax.random.key(1))
    np.testing.assert_allclose(model.codebook, before, rtol=1e-4)


@pytest.mark.parametrize("used", [1, 3, 8])
def test_perplexity_counts_the_codes_that_are_used_alike(used):
    counts = jnp.zeros(8).at[:used].set(7.0)
    assert float(perplexity(counts)) == pytest.approx(used, rel=1e-5)


def test_the_gradient_passes_a_codebook_as_if_it_were_not_there():
    model, z = quantizer(), vectors(0)
    slope = jax.random.normal(jax.random.key(9), z.shape)
    found = jax.grad(lambda z: jnp.sum(model(z, jnp.ones(4)).values * slope))(z)
    np.testing.assert_array_equal(found, slope)
    # and the commitment draws each vector to its entry
    out = model(z, jnp.ones(4))
    pull = jax.grad(lambda z: jnp.sum(model(z, jnp.ones(4)).commitment))(z)
    np.testing.assert_allclose(pull, 2 * (z - out.values) / (2 * 3 * 3), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("levels", [(8, 5, 5), (2, 3), (7,)])
def test_fsq_codes_are_all_points_of_the_grid_once(levels):
    fsq, count = FiniteScalarQuantizer(levels), int(np.prod(levels))
    points = np.asarray(fsq.vectors(jnp.arange(count)))
    axes = [(np.arange(level) - level // 2) / (level // 2) for level in levels]
    grid = [point[::-1] for point in itertools.product(*axes[::-1])]  # the first number turns fastest
    np.testing.assert_allclose(points, grid, atol=1e-6)
    # a number far inside each level's cell comes back as that level
    half, offset = (np.array(levels) - 1) / 2, 0.5 * (1 - np.array(levels) % 2)
    inside = np.clip((points * (np.array(levels) // 2) + offset) / half, -0.9999, 0.9999)
    z = np.arctanh(inside) - np.arctanh(offset / (half * 1.001))
    out = fsq(jnp.asarray(z, jnp.float32).reshape(1, count, 1, len(levels)), jnp.ones(1))
    np.testing.assert_array_equal(np.ravel(out.codes), np.arange(count))
    np.testing.assert_allclose(out.values.reshape(points.shape), points, atol=1e-5)


def test_fsq_values_stay_on_the_grid_and_pass_the_gradient_of_the_squashing():
    fsq, z = FiniteScalarQuantizer((5, 3)), jnp.array([[-9.0, 9.0], [0.3, -0.2], [2.0, 0.9]]).reshape(1, 3, 1, 2)
    out = fsq(z, jnp.ones(1))
    steps = np.asarray(out.values) * np.array([2, 1])
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-5)
    assert np.abs(out.values).max() <= 1 + 1e-6
    found = jax.grad(lambda z: jnp.sum(fsq(z, jnp.ones(1)).values))(z)
    # odd levels: reach (levels - 1) / 2 (1 + 1e-3), divided by levels // 2
    np.testing.assert_allclose(found, 1.001 * (1 - np.tanh(np.asarray(z)) ** 2), rtol=1e-3, atol=1e-6)


def test_codes_are_what_the_decoder_sees(model, images):
    found = model.encode(images)
    assert found.codes.shape == (6, 4, 4) and int(found.codes.max()) < model.cfg.num_codes
    np.testing.assert_allclose(model.decode_codes(found.codes), model.decode(found.values), atol=1e-4)
    np.testing.assert_allclose(model.reconstruct(images), jnp.clip(model.decode_codes(found.codes), -1, 1), atol=1e-4)


def test_validation_changes_nothing_and_training_the_buffers(model, images):
    before = nnx.to_pure_dict(nnx.state(nnx.clone(model)))
    validate(model, {"image": images})
    after = nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    _, metrics, trained = train_once(nnx.clone(model), {"image": images}, jax.random.key(0))
    used = np.asarray(trained.usage[...])
    np.testing.assert_allclose(used.sum(axis=1), 0.01 * 6, rtol=1e-4)  # one code an image at each position
    assert (used.sum(axis=0) > 0).sum() == float(metrics["codes_used"]) >= float(metrics["perplexity"]) >= 1


def test_rows_that_fill_up_a_batch_change_nothing(model, images):
    mask = jnp.array([1.0] * 6 + [0.0] * 2)
    filled = [jnp.concatenate([images, jnp.full((2, 8, 8, 1), value)]) for value in (-1.0, 0.5)]
    found = [train_once(nnx.clone(model), {"image": image, "mask": mask}, jax.random.key(0)) for image in filled]
    (loss, metrics, trained), (other_loss, other_metrics, other) = found
    assert float(metrics["weight"]) == 6 and float(loss) == float(other_loss)
    assert {name: float(value) for name, value in metrics.items()} == {
        name: float(value) for name, value in other_metrics.items()
    }
    jax.tree.map(
        np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(trained)), nnx.to_pure_dict(nnx.state(other))
    )
    whole, masked = validate(model, {"image": images}), validate(model, {"image": filled[1], "mask": mask})
    for name, value in whole[1].items():
        np.testing.assert_allclose(masked[1][name], value, rtol=1e-5, err_msg=name)


def test_samples_draw_each_positions_codes_by_their_use(model):
    size, one = model.cfg.latent_size, nnx.clone(model)
    codes = jnp.arange(size**2) % model.cfg.num_codes
    one.usage[...] = jax.nn.one_hot(codes, model.cfg.num_codes)
    drawn = one.sample(jax.random.key(0), count=2)
    expected = jnp.clip(one.decode_codes(codes.reshape(1, size, size)), -1, 1)
    assert drawn.shape == (2, 8, 8, 1)
    np.testing.assert_allclose(drawn, jnp.concatenate([expected, expected]), atol=1e-5)
    with pytest.raises(ValueError, match="no particular class"):
        one.sample(jax.random.key(0), count=1, labels=jnp.zeros(1, jnp.int32))
