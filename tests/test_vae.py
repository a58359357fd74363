"""The convolutional VAE: its divergence, likelihoods and bound against integrals, and what every image model holds."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from artifex.models.convolution import UpConv, convolve, upsample, upsampled_convolve
from artifex.models.likelihoods import discretized_gaussian
from artifex.models.vae.config import PRESETS, KLAutoencoderConfig, VAEConfig, VQConfig
from artifex.models.vae.vae import gaussian_kl

SMALL = VAEConfig(image_size=8, channels=1, block_channels=(8, 16), residual_blocks=1, latent_dim=4, levels=17)
CONFIGS = {
    "gaussian": SMALL,
    "bernoulli": dataclasses.replace(SMALL, likelihood="bernoulli", beta=4.0, residual_blocks=0),
    "kl": KLAutoencoderConfig(image_size=8, channels=1, block_channels=(8, 16), layers_per_block=1, groups=8),
}
loss_of = nnx.jit(lambda model, batch: model.loss(batch))


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return nnx.jit(CONFIGS[request.param].build)(nnx.Rngs(0))


@pytest.fixture(scope="module")
def images():
    levels = np.random.default_rng(0).integers(0, 17, (6, 8, 8, 1))
    return jnp.asarray(levels / 8 - 1, jnp.float32)


def test_the_kl_divergence_is_the_integral_of_q_log_q_over_p():
    mean, logvar = np.array([0.0, 1.5, -0.3]), np.array([0.0, -2.0, 1.0])
    z = np.linspace(-20, 20, 200_001)
    q = stats.norm(mean[:, None], np.exp(logvar / 2)[:, None])
    integrals = np.sum(q.pdf(z) * (q.logpdf(z) - stats.norm.logpdf(z)), axis=1) * (z[1] - z[0])
    found = gaussian_kl(jnp.asarray(mean, jnp.float32)[:, None], jnp.asarray(logvar, jnp.float32)[:, None])
    np.testing.assert_allclose(found, integrals, rtol=1e-5, atol=1e-6)
    together = gaussian_kl(jnp.asarray(mean, jnp.float32)[None], jnp.asarray(logvar, jnp.float32)[None])
    np.testing.assert_allclose(together, [integrals.sum()], rtol=1e-5)


log_probability = jax.jit(discretized_gaussian, static_argnames=("levels", "low", "high"))


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_a_bin_has_the_probability_that_the_gaussian_gives_it(levels):
    x = np.linspace(-1, 1, levels)
    mean, std = (grid.ravel() for grid in np.meshgrid([-1.7, -1.0, 0.013, 0.9], [0.02, 0.3, 4.0]))
    half = 1 / (levels - 1)
    edges = np.concatenate([[-np.inf], x[1:] - half, [np.inf]])
    low, high = ((side[None] - mean[:, None]) / std[:, None] for side in (edges[:-1], edges[1:]))
    # on the side of the mean where the difference of two probabilities is exact
    flip = low > 0
    near, far = np.where(flip, -low, high), np.where(flip, -high, low)
    expected = stats.norm.logcdf(near) + np.log1p(-np.exp(stats.norm.logcdf(far) - stats.norm.logcdf(near)))
    arrays = (jnp.asarray(value, jnp.float32) for value in (x[None], mean[:, None], std[:, None]))
    found = log_probability(*arrays, levels=levels)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(np.exp(np.float64(found)).sum(axis=1), 1, atol=1e-3)


def test_the_likelihood_has_a_gradient_at_any_distance_and_width():
    def value(mean, log_std):
        return discretized_gaussian(jnp.float32(0.25), mean, jnp.exp(log_std), levels=65_536)

    slope = jax.jit(jax.grad(value, (0, 1)))
    for mean, log_std in [(0.25, 0.0), (90.0, -4.0), (-90.0, 3.0), (0.26, -14.0)]:
        slopes = slope(jnp.float32(mean), jnp.float32(log_std))
        assert np.isfinite(slopes).all()
        assert mean == 0.25 or np.sign(slopes[0]) == np.sign(0.25 - mean)


def test_bits_per_dim_do_not_change_with_the_scale_of_the_data():
    rng = np.random.default_rng(0)
    x, mean = rng.integers(0, 256, 500) / 127.5 - 1, rng.normal(size=500)
    values = [jnp.asarray(value, jnp.float32) for value in (x, mean, (x + 1) * 127.5, (mean + 1) * 127.5)]
    ours = log_probability(values[0], values[1], jnp.float32(0.4), levels=256)
    theirs = log_probability(values[2], values[3], jnp.float32(0.4 * 127.5), levels=256, low=0, high=255)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def test_a_vae_blind_to_its_latent_scores_the_entropy_of_independent_pixels():
    std, levels = 0.35, 17
    x = np.linspace(-1, 1, levels)
    edges = np.concatenate([[-np.inf], x[1:] - 1 / (levels - 1), [np.inf]])
    p = np.diff(stats.norm.cdf(edges / std))
    drawn = np.random.default_rng(0).choice(x, p=p, size=(512, 8, 8, 1))
    blind = nnx.jit(dataclasses.replace(SMALL, gaussian_std=std).build)(nnx.Rngs(0))
    for layer in (blind.mean, blind.logvar, blind.expand):
        layer.kernel[...] = jnp.zeros_like(layer.kernel[...])
    for block in blind.decoder.blocks:
        block.conv2.kernel[...] = jnp.zeros_like(block.conv2.kernel[...])
    loss, metrics = loss_of(blind, {"image": jnp.asarray(drawn, jnp.float32)})
    assert metrics["kl"] == 0
    assert float(metrics["bits_per_dim"]) == pytest.approx(-np.sum(p * np.log2(p)), rel=0.01)
    assert float(loss) == pytest.approx(64 * float(metrics["bits_per_dim"]) * math.log(2), rel=1e-5)


def test_the_bernoulli_likelihood_is_that_of_coins():
    log_odds, x = np.array([-3.0, 0.2, 5.0]), np.array([1.0, -1.0, 1.0])
    model = CONFIGS["bernoulli"].build(nnx.Rngs(0))
    shape = (1, 1, 3, 1)
    arrays = jnp.asarray(x, jnp.float32).reshape(shape), jnp.asarray(log_odds, jnp.float32).reshape(shape)
    expected = stats.bernoulli.logpmf((x + 1) / 2, 1 / (1 + np.exp(-log_odds))).sum()
    np.testing.assert_allclose(model.likelihood.log_probability(*arrays), [expected], rtol=1e-5)


def test_beta_weighs_the_divergence_in_the_loss_alone(images):
    plain = nnx.jit(SMALL.build)(nnx.Rngs(0))
    heavy = nnx.clone(plain)
    heavy.cfg = dataclasses.replace(SMALL, beta=4.0)
    (loss, metrics), (heavy_loss, heavy_metrics) = loss_of(plain, {"image": images}), loss_of(heavy, {"image": images})
    assert float(heavy_loss - loss) == pytest.approx(3 * float(metrics["kl"]), rel=1e-3)
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {name: float(value) for name, value in heavy_metrics.items()}
    )


def test_rows_that_fill_up_a_batch_change_nothing(model, images):
    whole = loss_of(model, {"image": images})
    mask = jnp.array([1.0] * 6 + [0.0] * 2)
    filled = [jnp.concatenate([images, jnp.full((2, 8, 8, 1), value)]) for value in (-1.0, 0.5)]
    (loss, metrics), (other_loss, other) = (loss_of(model, {"image": image, "mask": mask}) for image in filled)
    assert float(metrics["weight"]) == float(whole[1]["weight"]) == 6
    assert float(loss) == float(other_loss)
    assert {name: float(value) for name, value in metrics.items()} == {n: float(value) for n, value in other.items()}
    # the noise differs with the shape of the batch, the divergence needs none
    np.testing.assert_allclose(metrics["kl"], whole[1]["kl"], rtol=1e-5)


def test_images_are_drawn_by_the_key_alone_and_of_no_class(model):
    drawn = model.sample(jax.random.key(1), count=3)
    assert drawn.shape == (3, 8, 8, 1) and drawn.dtype == jnp.float32 and float(jnp.abs(drawn).max()) <= 1
    np.testing.assert_array_equal(drawn, model.sample(jax.random.key(1), count=3))
    assert (drawn != model.sample(jax.random.key(2), count=3)).any()
    with pytest.raises(ValueError, match="no particular class"):
        model.sample(jax.random.key(0), count=1, labels=jnp.zeros(1, jnp.int32))


def test_an_interpolation_starts_and_ends_at_the_reconstructions(images):
    model = nnx.jit(SMALL.build)(nnx.Rngs(0))
    way = model.interpolate(images[0], images[1], 5)
    assert way.shape == (5, 8, 8, 1)
    np.testing.assert_allclose(way[jnp.array([0, -1])], model.reconstruct(images[:2]), atol=1e-5)
    with pytest.raises(ValueError, match="steps"):
        model.interpolate(images[0], images[1], 1)


def test_bfloat16_parameters_give_the_loss_of_float32(images):
    model = nnx.jit(SMALL.build)(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    small = nnx.merge(graphdef, jax.tree.map(lambda value: value.astype(jnp.bfloat16), state))
    (exact, _), (loss, _) = loss_of(model, {"image": images}), loss_of(small, {"image": images})
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(float(exact), rel=0.03)


def test_a_convolution_of_an_enlarged_image_is_four_of_the_small_one():
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 6))
    expected = jax.jit(lambda x, kernel: convolve(upsample(x), kernel, 1, (1, 1)))(x, kernel)
    np.testing.assert_allclose(jax.jit(upsampled_convolve)(x, kernel), expected, atol=1e-4)


def test_a_transposed_convolution_is_the_one_of_jax():
    layer = UpConv(3, 6, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 3))
    expected = jax.lax.conv_transpose(x, layer.kernel[...], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(nnx.jit(lambda layer, x: layer(x))(layer, x), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "fields", "name"),
    [
        (VAEConfig, {"image_size": 30}, "image_size 30"),
        (VAEConfig, {"latent_dim": 0}, "latent_dim is 0"),
        (VAEConfig, {"block_channels": ()}, "block_channels is"),
        (VAEConfig, {"block_channels": (12,), "residual_blocks": 1}, "block_channels .* groups 8"),
        (VAEConfig, {"residual_blocks": -1}, "residual_blocks is -1"),
        (VAEConfig, {"levels": 1}, "levels is 1"),
        (VAEConfig, {"beta": -1.0}, "beta is"),
        (VAEConfig, {"gaussian_std": 0.0}, "gaussian_std is 0"),
        (VAEConfig, {"gaussian_std": 1.0, "likelihood": "bernoulli"}, "gaussian_std is 1"),
        (VQConfig, {"codes": 0}, "codes is 0"),
        (VQConfig, {"residual_blocks": -1}, "residual_blocks is -1"),
        (VQConfig, {"commitment": -1.0}, "commitment is"),
        (VQConfig, {"ema_decay": 1.0}, "ema_decay is 1"),
        (VQConfig, {"revive_below": -0.1}, "revive_below is"),
        (VQConfig, {"fsq_levels": (4, 1)}, "fsq_levels is"),
        (KLAutoencoderConfig, {"groups": 48}, "block_channels .* groups 48"),
        (KLAutoencoderConfig, {"kl_weight": -1.0}, "kl_weight is"),
        (KLAutoencoderConfig, {"latent_scale": 0.0}, "latent_scale is"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_its_field(kind, fields, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        kind(**fields)


@pytest.mark.parametrize("shape", [(2, 9, 8, 1), (2, 8, 8, 3)])
def test_an_autoencoder_refuses_images_that_its_levels_cannot_halve_and_other_channels(shape):
    with pytest.raises(ValueError, match="the autoencoder takes 1 channels and sizes that divide by 2"):
        nnx.eval_shape(lambda: PRESETS["kl-digits"].build(nnx.Rngs(0)).encode(jnp.zeros(shape)))


def test_every_preset_reads_images_and_halves_them_as_it_says():
    for cfg in PRESETS.values():
        assert cfg.reads == "images" and cfg.num_classes == 0
    assert PRESETS["sd-autoencoder"].latent_size == 64
    assert PRESETS["kl-digits"].latent_size == PRESETS["vq-digits"].latent_size == 4
