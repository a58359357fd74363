"""Latents computed once: the same loss without the encoder, kept by what they follow from."""

import jax
import numpy as np
import pytest
from flax import nnx

from artifex import train
from artifex.config import Config
from artifex.data.image_batches import ImageBatches
from artifex.models.weights import save_pretrained
from artifex.scaling.plan import Plan
from artifex.training.latent_cache import with_latents
from artifex.training.run_folder import RunFolder
from artifex.training.state import blueprint
from artifex.training.task import batch_shapes, open_task

pytest.importorskip("sklearn", reason="the digits need: pip install -e '.[images]'")

MODEL = {
    "name": "latent-dit-digits",
    "network": {"embed_dim": 16, "num_layers": 1, "num_heads": 2},
    "autoencoder": {"block_channels": [8, 8], "mid_attention": False, "latent_shift": 0.1, "latent_scale": 0.9},
    "sampling_steps": 2,
}


def config(**sections) -> Config:
    base = {
        "model": MODEL,
        "data": {"source": "digits", "validation_fraction": 0.2, "flip": True, "cache_latents": True},
        "training": {"batch_size": 16, "steps": 2, "sample_images": 0, "score_images": 0},
        "optimizer": {"warmup_steps": 0},
        "device": {"data": 8},
    }
    return Config.from_dict({key: base.get(key, {}) | sections.get(key, {}) for key in {**base, **sections}})


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    cfg, folder = config(), RunFolder(tmp_path_factory.mktemp("latents"))
    plan = Plan.from_device(cfg.device, 8)
    blue = blueprint(cfg, plan, plan.make_mesh())
    state, images = blue.init(), open_task(cfg, folder)
    return blue, state, images, with_latents(images, blue, state, folder), folder


def test_the_loss_is_that_of_the_images_and_no_step_encodes(cached):
    blue, state, images, latents, _ = cached
    loss = blue.loss
    run = jax.jit(loss)
    for step, key in ((0, jax.random.key(1)), (200, jax.random.key(2))):
        pair = [next(task.batches(step)) for task in (images, latents)]
        of_images, of_latents = (float(run(state.params, state.buffers, batch, key)[0]) for batch in pair)
        np.testing.assert_allclose(of_latents, of_images, rtol=1e-5)
        np.testing.assert_array_equal(pair[0]["label"], pair[1]["label"])
    batch = pair[1]
    program = str(jax.make_jaxpr(loss)(state.params, state.buffers, batch, key))
    assert "conv_general_dilated" not in program
    assert {name: (x.shape, str(x.dtype)) for name, x in batch.items()} == batch_shapes(blue.config)


def test_validation_reads_latents_of_the_same_images(cached):
    blue, state, images, latents, _ = cached
    run = jax.jit(blue.loss)
    both = [list(task.validation(None)) for task in (images, latents)]
    assert len(both[0]) == len(both[1])
    for pair in (pair for place, pair in enumerate(zip(*both, strict=True)) if place in (0, len(both[0]) - 1)):
        of_images, of_latents = (float(run(state.params, state.buffers, batch, None)[0]) for batch in pair)
        np.testing.assert_allclose(of_latents, of_images, rtol=1e-5)


def test_what_is_there_is_read_and_another_autoencoder_has_latents_of_its_own(cached):
    blue, state, images, latents, folder = cached
    files = {path: path.stat().st_mtime_ns for path in folder.cache.iterdir()}
    assert len(files) == 2
    with_latents(images, blue, state, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.cache.iterdir()} == files
    other = jax.tree.map(lambda leaf: leaf * 0.5, state.buffers)
    state.buffers, before = other, state.buffers
    again = with_latents(images, blue, state, folder)
    state.buffers = before
    assert len(list(folder.cache.iterdir())) == 4
    assert again.latents is not None
    assert not np.array_equal(again.latents[1], latents.latents[1])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"crop": 1}}, "data.crop must be 0 with data.cache_latents, got 1"),
        ({"model": {"name": "unet-digits"}}, "'unet-digits' has no autoencoder"),
    ],
)
def test_what_has_no_latents_to_keep_is_refused(sections, message):
    values = config().to_dict()
    values["data"] |= sections.get("data", {})
    values["model"] = sections.get("model", values["model"])
    with pytest.raises(ValueError, match=message):
        Config.from_dict(values)


def test_latents_of_another_corpus_are_refused(cached):
    _, _, images, latents, _ = cached
    how = {"batch_size": 8, "latents": latents.latents[0]}
    with pytest.raises(ValueError, match=r"expected \(1, 1420, 2\) and 3 dims more"):
        ImageBatches(images.corpus, **how)
    with pytest.raises(ValueError, match="crop is 1; expected"):
        ImageBatches(images.corpus, flip=True, crop=1, **how)


@pytest.mark.slow
def test_a_run_trains_and_resumes_on_its_latents(tmp_path):
    made = {"block_channels": [8, 8], "mid_attention": False}
    kl = Config.from_dict({"model": {"name": "kl-digits", **made}, "data": {"source": "digits"}}).model.spec()
    save_pretrained(tmp_path / "kl", "kl-digits", kl, nnx.to_pure_dict(nnx.state(kl.build(nnx.Rngs(0)))))
    # shift and scale are measured, after which the run's configuration has them
    cfg = config(model={"autoencoder": made, "autoencoder_weights": str(tmp_path / "kl")})
    folder = train.train(cfg, tmp_path / "latent")
    files = {path: path.stat().st_mtime_ns for path in (folder / "cache").glob("*.npy")}
    cfg.training.steps = 3
    train.train(cfg, tmp_path / "latent")
    assert {path: path.stat().st_mtime_ns for path in (folder / "cache").glob("*.npy")} == files and files
    assert (folder / "loss.png").exists()
