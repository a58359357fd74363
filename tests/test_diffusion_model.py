"""The diffusion model around a network small enough to say what it does."""

import dataclasses
import functools
import itertools
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from artifex.models import layers
from artifex.models.diffusion.config import PRESETS, TRAINING_TIMES, DiffusionConfig
from artifex.models.diffusion.guidance import guided
from artifex.models.diffusion.networks import MMDIT
from artifex.models.diffusion.process import per_example


class Affine(nnx.Module):
    """x w + (row of the label) + time: every input leaves a trace in the output."""

    def __init__(self, cfg, rngs):
        self.gain = layers.parameter(jax.random.normal(rngs.params(), (cfg.in_channels,)), "conv_in")
        self.rows = layers.Embed(cfg.num_classes + 1, cfg.in_channels, ("classes", "conv_in"), std=1.0, rngs=rngs)
        self.none = cfg.num_classes

    def __call__(self, x, t_B, condition=None):
        label_B = jnp.full(t_B.shape, self.none) if condition is None else condition
        rows = self.rows(label_B)[:, None, None]
        return x * self.gain[...][None, None, None] + rows + 1e-3 * per_example(t_B, x)


@dataclasses.dataclass(frozen=True)
class AffineConfig:
    image_size: int = 4
    in_channels: int = 2
    out_channels: int = 2
    num_classes: int = 3
    dropout: float = 0.0

    def build(self, rngs):
        return Affine(self, rngs)


class Perfect(nnx.Module):
    """Knows that all data are 0.25, and gives exactly the prediction that says so."""

    def __init__(self, cfg, rngs):
        self.kind = cfg.kind

    def __call__(self, x, t_B, condition=None):
        if self.kind == "velocity":  # eps - x_0 = (x_t - x_0) / t
            return (x - 0.25) / per_example(t_B / 1000, x)
        # Karras et al. 2022, table 1: x_0 = c_skip x + c_out F(c_in x, ln(sigma) / 4)
        sigma = per_example(jnp.exp(4 * t_B), x)
        total = jnp.sqrt(sigma**2 + 0.25)
        return (0.25 - 0.25 / total**2 * (x * total)) / (sigma * 0.5 / total)


@dataclasses.dataclass(frozen=True)
class PerfectConfig:
    kind: str = "velocity"
    image_size: int = 4
    in_channels: int = 2
    out_channels: int = 2
    num_classes: int = 0
    dropout: float = 0.0

    def build(self, rngs):
        return Perfect(self, rngs)


class Halver(nnx.Module):
    """An autoencoder whose latent is the image at every second pixel, times a parameter, known exactly."""

    def __init__(self, cfg, rngs):
        self.cfg = cfg
        self.gain = layers.parameter(jnp.full((1,), 2.0), "latent")

    def encode(self, x):
        z = x[:, ::2, ::2] * self.gain[...][None, None, None]
        return z, jnp.full(z.shape, -60.0)

    def decode(self, z):
        return jnp.repeat(jnp.repeat(z / self.gain[...][None, None, None], 2, 1), 2, 2)


@dataclasses.dataclass(frozen=True)
class HalverConfig:
    image_size: int = 8
    channels: int = 2
    latent_size: int = 4
    latent_channels: int = 2
    latent_scale: float = 0.5
    latent_shift: float = 0.1

    @property
    def shift_and_scale(self):
        return self.latent_shift, self.latent_scale

    def build(self, rngs):
        return Halver(self, rngs)


EDM: dict[str, Any] = {
    "process": "edm", "prediction": "edm", "weighting": "edm", "training_times": "log_normal",
}  # fmt: skip


def model_of(network: Any = None, **fields) -> Any:
    parts: dict[str, Any] = {"network": network or AffineConfig(), "sampling_steps": 3}
    return DiffusionConfig(**parts, **fields).build(nnx.Rngs(0))


def batch_of(count=6, size=4, seed=0):
    rng = np.random.default_rng(seed)
    image = jnp.asarray(rng.uniform(-1, 1, (count, size, size, 2)), jnp.float32)
    return {"image": image, "label": jnp.asarray(rng.integers(0, 3, count), jnp.int32)}


loss_of = nnx.jit(lambda model, batch: model.loss(batch))
training_loss_of = nnx.jit(lambda model, batch, key: model.loss(batch, nnx.Rngs(key)))


@pytest.mark.parametrize("fields", [{}, EDM], ids=["flow", "edm"])
def test_a_perfect_network_has_no_loss_and_samples_the_data(fields):
    model = model_of(PerfectConfig(fields.get("prediction", "velocity")), **fields)
    batch = {"image": jnp.full((5, 4, 4, 2), 0.25)}
    for loss, _ in (loss_of(model, batch), training_loss_of(model, batch, jax.random.key(1))):
        assert float(loss) < 1e-6
    np.testing.assert_allclose(model.sample(jax.random.key(0), count=2), np.full((2, 4, 4, 2), 0.25), atol=1e-5)


def test_loss_is_the_mean_squared_error_to_the_velocity():
    """Written out in NumPy for an untrained network whose output is 0, so that the error is eps - x_0 itself."""
    model = model_of()
    for leaf in (model.network.gain, model.network.rows.table):
        leaf[...] = jnp.zeros_like(leaf[...])
    batch = batch_of(4_000, seed=3)
    loss, metrics = loss_of(model, batch)
    # E (eps - x_0 - output)^2 with output 1e-3 * 1000 t: x_0 uniform in [-1, 1], eps normal, t uniform, all independent
    np.testing.assert_allclose(loss, 1 + 1 / 3 + 1 / 3, rtol=0.02)
    assert set(metrics) == {"weight"} and metrics["weight"] == 4_000


def test_validation_loss_is_deterministic_and_training_loss_follows_its_key():
    model, batch = model_of(), batch_of()
    assert float(loss_of(model, batch)[0]) == float(loss_of(model, batch)[0])
    first, again, other = (training_loss_of(model, batch, jax.random.key(seed))[0] for seed in (1, 1, 2))
    assert float(first) == float(again) != float(other)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_any_rows_of_a_validation_batch_see_all_times(rows):
    model = model_of()
    for leaf in (model.network.gain, model.network.rows.table):
        leaf[...] = jnp.zeros_like(leaf[...])
    batch = batch_of(8) | {"image": jnp.zeros((8, 4, 4, 2)), "mask": (jnp.arange(8) < rows).astype(jnp.float32)}
    each = np.asarray(jax.jit(jax.vmap(lambda index: model.loss(batch, index=index)[0]))(jnp.arange(2_000)))
    # E (eps - output)^2 with output t: 1 + 1/3
    assert np.mean(each) == pytest.approx(4 / 3, abs=4 * np.std(each) / np.sqrt(2_000))


class Shaken(Affine):
    """Affine, and where a key is given noise that tells that it was."""

    def __call__(self, x, t_B, condition=None, key=None):
        y = super().__call__(x, t_B, condition)
        return y if key is None else y + jax.random.normal(key, x.shape)


@dataclasses.dataclass(frozen=True)
class ShakenConfig(AffineConfig):
    dropout: float = 0.5

    def build(self, rngs):
        return Shaken(self, rngs)


def test_dropout_is_for_training_alone():
    model, plain, batch = model_of(ShakenConfig()), model_of(), batch_of()
    assert float(loss_of(model, batch)[0]) == float(loss_of(plain, batch)[0])
    np.testing.assert_array_equal(model.sample(jax.random.key(0), count=2), plain.sample(jax.random.key(0), count=2))
    first, other = (training_loss_of(model, batch, jax.random.key(seed))[0] for seed in (1, 2))
    assert float(first) > float(training_loss_of(plain, batch, jax.random.key(1))[0]) + 0.1 and first != other


def test_masked_rows_count_for_nothing():
    model, batch = model_of(), batch_of()
    batch["mask"] = jnp.asarray([1, 1, 1, 1, 0, 0], jnp.float32)
    loss, metrics = loss_of(model, batch)
    changed = batch | {"image": batch["image"].at[4:].set(7.0), "label": batch["label"].at[4:].set(0)}
    assert float(loss) == float(loss_of(model, changed)[0]) and metrics["weight"] == 4
    parts = [loss_of(model, batch | {"mask": jnp.eye(6, dtype=jnp.float32)[row]})[0] for row in range(4)]
    np.testing.assert_allclose(loss, np.mean(parts), rtol=1e-5)


def test_labels_are_dropped_at_their_rate_in_training_alone():
    model, batch = model_of(condition_dropout=0.3), batch_of(200)

    @nnx.jit
    def used(model, key):
        # the gradient of a row of the table tells whether any example of the batch read it
        def rows(loss):
            return jnp.any(nnx.grad(loss)(model)["network"]["rows"]["table"][...] != 0, axis=1)

        return rows(lambda m: m.loss(batch)[0]), rows(lambda m: m.loss(batch, nnx.Rngs(key))[0])

    validation, training = used(model, jax.random.key(0))
    np.testing.assert_array_equal(validation, [True, True, True, False])
    np.testing.assert_array_equal(training, [True] * 4)
    for rate in (0.3, 0.0):
        dropped = model_of(condition_dropout=rate)._drop(jnp.zeros(4_000, jnp.int32), jax.random.key(0), 4_000) == 3
        assert abs(float(jnp.mean(dropped)) - rate) <= 4 * np.sqrt(rate * (1 - rate) / 4_000)


def test_guidance_extrapolates_from_no_condition_to_the_condition():
    network = AffineConfig().build(nnx.Rngs(0))
    x, t_B, label_B = batch_of()["image"], jnp.linspace(0, 999, 6), batch_of()["label"]
    conditional, without = network(x, t_B, label_B), network(x, t_B)
    for scale, expected in {1: conditional, 0: without, 3: without + 3 * (conditional - without)}.items():
        np.testing.assert_allclose(guided(network, scale, 3)(x, t_B, label_B), expected, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddpm", "heun"])
def test_samples_are_a_pure_function_of_the_key_with_the_classes_in_turn(sampler):
    model = model_of()
    sample = functools.partial(model.sample, count=5, sampler=sampler)
    x = sample(jax.random.key(0))
    assert x.shape == (5, 4, 4, 2) and x.dtype == jnp.float32 and float(jnp.abs(x).max()) <= 1
    np.testing.assert_array_equal(x, sample(jax.random.key(0), labels=np.array([0, 1, 2, 0, 1])))
    assert not np.array_equal(x, sample(jax.random.key(1)))
    assert not np.array_equal(x, sample(jax.random.key(0), labels=np.array([2, 1, 2, 0, 1])))


def test_guided_samples_at_scale_1_and_0_are_those_with_and_without_labels():
    model, key = model_of(), jax.random.key(0)
    with_labels = model.sample(key, count=3, guidance=1.0)
    np.testing.assert_allclose(model.sample(key, count=3, guidance=1.0 + 1e-7), with_labels, atol=1e-5)
    without = model.sample(key, count=3, guidance=0.0)
    np.testing.assert_allclose(model.sample(key, count=3, guidance=0.0, labels=np.array([2, 2, 2])), without, atol=1e-5)
    assert not np.allclose(with_labels, without, atol=1e-2)


def test_a_latent_model_is_one_on_shifted_and_scaled_latents_and_leaves_its_autoencoder_alone():
    latent, plain = model_of(autoencoder=HalverConfig()), model_of()
    assert (latent.cfg.image_size, latent.cfg.channels, latent.cfg.num_classes) == (8, 2, 3)
    batch = batch_of(size=8)
    z = (2 * batch["image"][:, ::2, ::2] - 0.1) * 0.5
    np.testing.assert_allclose(loss_of(latent, batch)[0], loss_of(plain, batch | {"image": z})[0], rtol=1e-5)
    assert "autoencoder" not in nnx.state(latent, nnx.Param)
    assert "autoencoder" in nnx.state(latent, layers.Buffer)
    even = jnp.repeat(jnp.repeat(batch["image"][:, ::2, ::2], 2, 1), 2, 2)
    np.testing.assert_allclose(latent.decode(latent.encode(even)), even, atol=1e-6)
    assert latent.sample(jax.random.key(0), count=2).shape == (2, 8, 8, 2)


def test_text_is_dropped_by_example_and_guides_like_labels():
    text = {"context": jnp.ones((400, 5, 24)), "pooled": jnp.ones((400, 16))}
    dropped = model_of(PerfectConfig(), condition_dropout=0.5)._drop(text, jax.random.key(5), 400)
    kept_B = dropped["pooled"][:, 0]
    assert 150 < float(jnp.sum(kept_B)) < 250
    for name, leaf in dropped.items():
        np.testing.assert_array_equal(leaf, text[name] * per_example(kept_B, leaf))

    cfg = DiffusionConfig(network=MMDIT["mmdit-nano"], sampling_steps=2)
    model = nnx.eval_shape(lambda: cfg.build(nnx.Rngs(0)))
    batch = {"image": jnp.zeros((400, 8, 8, 3)), "condition": text}
    assert nnx.eval_shape(lambda model, batch: model.loss(batch, nnx.Rngs(0)), model, batch)[0].shape == ()
    how: dict[str, Any] = {"condition": text, "guidance": 2.0}
    drawn = nnx.eval_shape(lambda model: model.sample(jax.random.key(0), count=400, **how), model)
    assert drawn.shape == (400, 8, 8, 3)
    with pytest.raises(ValueError, match=r"condition has \[400\] rows; expected one for each of 2"):
        model.sample(jax.random.key(0), count=2, **how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"count": 2, "labels": np.array([0, 3])}, "labels are 0 to 3; the model's classes are 0 to 2"),
        ({"count": 2, "labels": np.array([0])}, r"labels are int64 \(1,\); expected one integer for each of 2"),
        ({"count": 1, "steps": 0}, "0 sampling steps"),
        ({"count": 1, "sampler": "magic"}, "sampler 'magic' is unknown"),
        ({"count": 1, "guidance": float("nan")}, "guidance is nan"),
        ({"count": 1, "condition": np.zeros(1)}, "condition is for models that read text"),
    ],
)
def test_wrong_requests_are_refused(how, message):
    with pytest.raises(ValueError, match=message):
        model_of().sample(jax.random.key(0), **how)


def test_labels_and_guidance_without_classes_are_refused():
    model = model_of(PerfectConfig())
    with pytest.raises(ValueError, match="labels are given to a model without classes"):
        model.sample(jax.random.key(0), count=1, labels=np.array([0]))
    with pytest.raises(ValueError, match=r"guidance is 2\.0 but there is no label or text"):
        model.sample(jax.random.key(0), count=1, guidance=2.0)


def test_every_choice_goes_with_every_other_but_noise_predicted_over_a_flow():
    choices = get_type_hints(DiffusionConfig)
    fields = ("process", "prediction", "weighting", "sampler")
    refused = set()
    for chosen in itertools.product(*(get_args(choices[field]) for field in fields)):
        times = TRAINING_TIMES[chosen[0]][0]
        try:
            DiffusionConfig(training_times=times, **dict(zip(fields, chosen, strict=True)))
        except ValueError:
            refused.add(chosen[:2])
    assert refused == {("flow", "eps")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prediction": "eps"}, "prediction 'eps' says nothing of the data at t = 1"),
        ({"training_times": "log_normal"}, "training_times 'log_normal' does not go with process 'flow'"),
        ({"process": "edm"}, "training_times 'uniform' does not go with process 'edm'; choose 'log_normal'"),
        ({"process": "ddpm_linear", "sampling_steps": 1_001}, "sampling_steps is 1001"),
        ({"sampling_steps": 0}, "sampling_steps is 0"),
        ({"sigma_data": 0.7}, r"sigma_data 0\.7 has no effect"),
        ({"guidance": 2.0, "condition_dropout": 0.0}, r"guidance is 2\.0 but with condition_dropout 0"),
        ({"guidance": 2.0, "network": PerfectConfig()}, r"guidance is 2\.0 but the network has no classes"),
        ({"condition_dropout": 1.0}, r"condition_dropout 1\.0"),
        ({"autoencoder_weights": "here"}, "autoencoder_weights 'here' have no autoencoder"),
        (
            {"autoencoder": HalverConfig(latent_size=2)},
            "network takes 4 x 4 x 2, but the autoencoder's latents are 2 x",
        ),
        ({"network": AffineConfig(out_channels=3)}, "network puts out 3 channels for 2"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**{"network": AffineConfig(), **fields})


@pytest.mark.parametrize("name", ["dit-s2", "unet-digits", "dit-digits", "edm-digits"])
def test_presets_take_a_batch_and_give_images(name):
    """Abstractly: shapes alone, whatever the size."""
    cfg = PRESETS[name]
    model = nnx.eval_shape(lambda: cfg.build(nnx.Rngs(0)))
    shape = (2, cfg.image_size, cfg.image_size, cfg.channels)
    batch = {"image": jax.ShapeDtypeStruct(shape, jnp.float32), "label": jax.ShapeDtypeStruct((2,), jnp.int32)}
    loss, metrics = nnx.eval_shape(lambda model, batch: model.loss(batch, nnx.Rngs(0)), model, batch)
    assert loss.shape == metrics["weight"].shape == () and loss.dtype == jnp.float32
    drawn = nnx.eval_shape(lambda model: model.sample(jax.random.key(0), count=2, steps=2), model)
    assert drawn.shape == shape and drawn.dtype == jnp.float32
