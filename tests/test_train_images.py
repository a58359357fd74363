"""Runs of image models: what they write, how they go on, the frozen part, and pictures from the command line."""

import contextlib
import io
import json
import re
import types

import jax
import numpy as np
import pytest
from flax import nnx

from artifex import sample, train
from artifex.cli import parse_train
from artifex.config import Config
from artifex.data.image_batches import all_images
from artifex.data.images import load_images
from artifex.models.weights import from_pretrained, save_pretrained
from artifex.scaling.checkpoints import Checkpoints
from artifex.training import latents
from artifex.training.frozen import autoencoder_folder
from artifex.training.image_task import ImageTask
from artifex.training.run_folder import RunFolder
from artifex.training.state import blueprint
from artifex.training.task import open_task

pytest.importorskip("sklearn", reason="the digits need: pip install -e '.[images]'")

UNET = {
    "name": "unet-digits",
    "network": {"block_channels": [8, 8], "layers_per_block": 1, "attention_levels": [], "mid_attention": False},
    "sampler": "euler",
    "sampling_steps": 2,
}
KL = {"name": "kl-digits", "block_channels": [8, 8], "mid_attention": False}
LATENT = {
    "name": "latent-dit-digits",
    "network": {"embed_dim": 16, "num_layers": 1, "num_heads": 2},
    "autoencoder": {"block_channels": [8, 8], "mid_attention": False},
    "sampler": "euler",
    "sampling_steps": 2,
}


def config(model: dict, steps: int = 4, **training) -> Config:
    return Config.from_dict(
        {
            "model": model,
            "data": {"source": "digits", "validation_fraction": 0.2},
            "training": {"steps": steps, "batch_size": 16, "sample_images": 20, "score_images": 0, **training},
            "optimizer": {"name": "adamw", "learning_rate": 1e-3, "warmup_steps": 1},
            "checkpoint": {"every": 2},
            "logging": {"every": 1, "progress": False},
            "device": {"data": 8},
        }
    )


def records(folder, split: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == split]


def state_of(folder, cfg: Config, step: int):
    plan = train.plan_of(cfg, jax.device_count())
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return jax.device_get(checkpoints.restore(step, blueprint(cfg, plan, plan.make_mesh()).state))


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet") / "run"
    jax.config.update("jax_disable_most_optimizations", False)  # the classifier that scores is trained for 500 steps
    try:
        return train.train(config(UNET, score_images=30), folder)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    return train.train(config(KL, 2), tmp_path_factory.mktemp("kl") / "run")


def test_an_image_run_writes_grids_scores_and_weights(unet):
    assert [record["images"] for record in records(unet, "train")] == [16, 32, 48, 64]
    assert sorted(path.name for path in (unet / "samples").iterdir()) == [
        "final.png",
        "step-0000002.png",
        "step-0000004.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in [*(unet / "samples").iterdir(), unet / "loss.png"])
    (scores,) = records(unet, "samples")
    assert 0 <= scores["accuracy"] <= 1 and scores["frechet_digits"] > 0
    assert from_pretrained(unet / "weights").cfg.network.block_channels == (8, 8)


def test_an_autoencoders_run_shows_its_reconstructions(kl):
    assert (kl / "samples" / "step-0000002-reconstructions.png").exists()
    (validation,) = records(kl, "validation")
    held_out = load_images("digits", image_size=8, channels=1, validation_fraction=0.2).validation
    assert validation["targets"] == len(held_out) > 20 * 16, "the last validation reads every image"
    assert {"mse", "kl", "latent_std"} <= validation.keys()


def test_resuming_is_bitwise_with_a_codebook_that_no_gradient_reaches(tmp_path):
    cfg = config({"name": "vq-digits", "block_channels": [8], "groups": 4, "codes": 8, "latent_dim": 4}, ema_decay=0.5)
    train.train(cfg, tmp_path / "whole")
    cfg.training.steps = 2
    train.train(cfg, tmp_path / "parts")
    cfg.training.steps = 4
    train.train(cfg, tmp_path / "parts")
    whole, parts = (state_of(tmp_path / name, cfg, 4) for name in ("whole", "parts"))
    assert jax.tree.leaves(whole.buffers)
    jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)
    jax.tree.map(np.testing.assert_array_equal, whole.buffers, parts.buffers)
    jax.tree.map(np.testing.assert_array_equal, whole.ema_buffers, parts.ema_buffers)
    # what samples, from the run or its weights, has the averages: of the encoder, and of the codebook that fits it
    for found in (sample.load(tmp_path / "parts"), from_pretrained(tmp_path / "parts" / "weights")):
        tree = nnx.to_pure_dict(nnx.state(found))
        np.testing.assert_array_equal(tree["quantizer"]["sums"], whole.ema_buffers["quantizer"]["sums"])
        np.testing.assert_array_equal(tree["project"]["kernel"], whole.ema["project"]["kernel"])
        assert (tree["quantizer"]["sums"] != whole.buffers["quantizer"]["sums"]).any()


@pytest.mark.slow
def test_the_frozen_autoencoder_is_the_trained_one_and_stays_it(kl, tmp_path):
    folder = train.train(config(LATENT | {"autoencoder_weights": str(kl / "weights")}), tmp_path / "latent")
    frozen = nnx.to_pure_dict(nnx.state(from_pretrained(folder / "weights").autoencoder))
    trained = nnx.to_pure_dict(nnx.state(from_pretrained(kl / "weights")))
    assert jax.tree.structure(frozen) == jax.tree.structure(trained)
    jax.tree.map(np.testing.assert_array_equal, frozen, trained)
    drawn = sample.load(folder).sample(jax.random.key(0), count=3)
    assert drawn.shape == (3, 8, 8, 1)


@pytest.mark.slow
def test_a_latent_run_measures_shift_and_scale_of_its_training_images_and_keeps_them(kl, tmp_path, capsys):
    cfg = config(LATENT | {"autoencoder_weights": str(kl / "weights")}, 2)
    folder = train.train(cfg, tmp_path / "latent")
    # drawn latents of every training image, in NumPy from what the encoder gives
    images, _ = all_images(open_task(cfg, RunFolder(tmp_path)).corpus.train, 17)
    mean, logvar = map(np.asarray, nnx.jit(lambda model, x: model.encode(x))(from_pretrained(kl / "weights"), images))
    z = mean + np.exp(0.5 * logvar) * np.random.default_rng(0).normal(size=mean.shape)
    ran = Config.from_file(folder / "config.json").model.spec().autoencoder
    assert abs(ran.latent_shift - z.mean()) < 0.02 * z.std()
    np.testing.assert_allclose(ran.latent_scale, 1 / z.std(), rtol=0.01)
    line = f"so latent_shift is {ran.latent_shift} and latent_scale is {ran.latent_scale}"
    assert capsys.readouterr().out.count(line) == 1
    # a checkpoint and the weights have the same numbers
    for path in (folder, folder / "weights"):
        assert sample.load(path).autoencoder.cfg == ran
    saved = from_pretrained(folder / "weights")
    encoded = nnx.jit(lambda model, x: model.encode(x, jax.random.key(0)))(saved, images)
    assert abs(float(encoded.mean())) < 0.02 and abs(float(encoded.std()) - 1) < 0.02


@pytest.mark.slow
def test_a_latent_run_that_goes_on_or_is_started_from_measures_nothing_anew(kl, tmp_path, capsys):
    cfg = config(LATENT | {"autoencoder_weights": str(kl / "weights")}, 2)
    folder = train.train(cfg, tmp_path / "latent")
    ran = Config.from_file(folder / "config.json").model.spec().autoencoder
    assert "; so latent_shift is" in capsys.readouterr().out
    cfg.training.steps = 4
    train.train(cfg, folder)
    # and a run that starts from it, autoencoder and all, has them from there
    start = config(LATENT, 1, start_from=str(folder), sample_images=0)
    began = train.train(start, tmp_path / "began")
    assert "; so latent_" not in capsys.readouterr().out  # what is known is compared, and that is said
    for path in (folder, began):
        assert Config.from_file(path / "config.json").model.spec().autoencoder == ran


def test_a_configured_scale_that_does_not_fit_the_latents_is_a_line_of_the_run():
    def fitted(**autoencoder):
        cfg = config(LATENT | {"autoencoder": {**LATENT["autoencoder"], **autoencoder}})
        again, lines = latents.fitted(cfg, latents.Moments(mean=0.3, std=1.25, images=100))
        return again.model.spec().autoencoder.shift_and_scale, lines

    (numbers, lines) = fitted()
    assert numbers == (0.3, 0.8) and len(lines) == 1
    (numbers, lines) = fitted(latent_shift=0.1, latent_scale=0.9)
    assert numbers == (0.1, 0.9) and len(lines) == 1
    (numbers, lines) = fitted(latent_shift=0.3, latent_scale=1.2)
    assert numbers == (0.3, 1.2) and lines[1].startswith("warning: with latent_shift 0.3 and latent_scale 1.2")
    assert "mean 0 and deviation 1.5, where it expects 0 and 1" in lines[1]
    (numbers, lines) = fitted(latent_shift=0.0)
    assert numbers == (0.0, 0.8) and "mean 0.24 and deviation 1," in lines[1]


def test_missing_weights_name_the_command_that_trains_them(tmp_path):
    for folder in (tmp_path / "ae" / "weights", None):
        given = {} if folder is None else {"autoencoder_weights": str(folder)}
        with pytest.raises(ValueError, match=r"autoencoder_weights .* would stay random; train one by") as refusal:
            train.train(config(LATENT | given), tmp_path / "latent")
        command = re.search("`python -m artifex.train (.*)`", str(refusal.value))
        assert command is not None
        parsed = parse_train(command[1].split())
        assert parsed.config.model.spec() == config(LATENT).model.spec().autoencoder
        assert parsed.config.data.source == "digits" and (folder is None or parsed.run_dir == folder.parent)


def test_an_autoencoder_for_images_of_another_size_is_refused_but_where_it_was_published_for_several(kl, tmp_path):
    larger = {"autoencoder": {**LATENT["autoencoder"], "image_size": 16}, "network": {"image_size": 8}}
    own = config(LATENT | larger | {"autoencoder_weights": str(kl / "weights")})
    with pytest.raises(ValueError, match="another autoencoder: image_size is 8 there and 16 here"):
        autoencoder_folder(own)
    save_pretrained(tmp_path / "theirs", from_pretrained(kl / "weights"), layout="AutoencoderKL")
    theirs = config(LATENT | larger | {"autoencoder_weights": str(tmp_path / "theirs")})
    assert autoencoder_folder(theirs) == tmp_path / "theirs"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "autoencoder_weights is empty"),
        ({"autoencoder_weights": "{unet}/weights"}, "holds a model of DiffusionConfig, expected KLAutoencoderConfig"),
        (
            {"autoencoder_weights": "{kl}/weights", "autoencoder": {"block_channels": [8, 16], "mid_attention": False}},
            r"block_channels is \(8, 8\) there and \(8, 16\) here",
        ),
    ],
)
def test_an_autoencoder_that_is_missing_or_another_is_refused(kl, unet, tmp_path, changes, message):
    given = {
        name: value.format(kl=kl, unet=unet) if isinstance(value, str) else value for name, value in changes.items()
    }
    with pytest.raises(ValueError, match=message):
        train.train(config(LATENT | given), tmp_path / "latent")


def test_classes_and_levels_other_than_the_datas_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"made for 3 classes, but digits has 10; set model.network.num_classes=10"):
        train.train(config({"name": "unet-digits", "network": {"num_classes": 3}}), tmp_path / "run")
    with pytest.raises(ValueError, match=r"model.levels is 256, but a channel of digits has 17 values"):
        train.train(config({"name": "vae-digits", "levels": 256}), tmp_path / "run")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A run on pictures of 12 x 8 pixels in the folders circle, square and triangle, and what it printed."""
    pillow = pytest.importorskip("PIL.Image")
    root, random = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for kind in ("circle", "square", "triangle"):
        (root / "data" / kind).mkdir(parents=True)
        for number in range(10):
            pixels = random.integers(0, 256, (8, 12, 3), dtype=np.uint8)
            pillow.fromarray(pixels).save(root / "data" / kind / f"{number}.png")
    made = UNET | {"network": UNET["network"] | {"num_classes": 3}}
    cfg = config(made, 1, sample_images=7).to_dict()
    cfg["data"]["source"] = str(root / "data")
    (root / "run.json").write_text(json.dumps(cfg))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train.main([str(root / "run.json"), "--run-dir", str(root / "run")])
    return root / "run", printed.getvalue()


def test_a_run_says_what_it_did_to_the_pictures_and_which_setting_changes_it(shapes):
    _, printed = shapes
    assert "30 images of 12 x 8 became 8 x 8 (model.network.image_size is 8)\n" in printed
    assert "30 images cut to the middle square" in printed
    assert (
        "30 images in colour became grey (model.network.in_channels=model.network.out_channels=3 keeps the colour)"
        in printed
    )
    assert "3 classes (circle, square, triangle)" in printed and "--labels circle square triangle --out" in printed


def test_classes_are_drawn_by_name_from_a_run_and_from_its_weights(shapes, tmp_path, capsys):
    run, _ = shapes
    drawn = []
    for number, (path, labels) in enumerate(
        [(run, ["square", "circle"]), (run / "weights", ["square", "circle"]), (run / "weights", ["1", "0"])]
    ):
        out = tmp_path / f"{number}.png"
        sample.main([str(path), "--labels", *labels, "--num-samples", "2", "--out", str(out)])
        drawn.append(out.read_bytes())
    assert len(set(drawn)) == 1
    with pytest.raises(SystemExit) as stop:
        sample.main([str(run / "weights"), "--labels", "sqare"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: label 'sqare' is no class of the model: did you mean 'square'?\n"


def test_a_grid_has_a_row_for_each_class_with_its_name(shapes):
    import matplotlib.image

    run, _ = shapes
    height, width, _ = matplotlib.image.imread(run / "samples" / "step-0000001.png").shape
    margin = 12 + 8 * len("triangle")
    assert (height, width) == (3 * (48 + 2) + 2, 2 * (48 + 2) + 2 + margin), "7 images: 2 of each of 3 classes"


def test_reconstructions_show_every_held_out_image_and_nothing_else(tmp_path):
    import matplotlib.image

    np.savez(
        tmp_path / "white.npz", x_train=np.full((4, 8, 8), 255, np.uint8), x_test=np.full((3, 8, 8), 255, np.uint8)
    )
    cfg = config(KL)
    cfg.data.source = str(tmp_path / "white.npz")
    task = ImageTask.open(cfg)
    rows = sum(float(batch["mask"].sum()) for batch in task.validation(None))
    assert rows == 3 < cfg.training.batch_size, "the only batch holds rows that are no images"
    task._reconstructions(types.SimpleNamespace(reconstruct=lambda images: images), tmp_path / "final.png")
    picture = matplotlib.image.imread(tmp_path / "final.png")[..., :3]
    ground = picture[30, 0]  # left of the first pair
    shown = picture[40]  # a line of pixels through all pairs, below the title
    assert ((shown == 1).all(-1) | (shown == ground).all(-1)).all(), "a row without an image would be black"
    assert (shown == 1).all(-1).sum() == 3 * 2 * 48


def test_the_command_line_draws_a_row_for_each_class(unet, tmp_path, capsys):
    import matplotlib.image

    out = tmp_path / "grid.png"
    sample.main([str(unet), "--labels", "3", "7", "--num-samples", "5", "--guidance", "1.5", "--out", str(out)])
    assert capsys.readouterr().out.strip() == f"{out}: 10 images, one row for each of 2 classes"
    height, width, _ = matplotlib.image.imread(out).shape
    assert width > 2 * height
    before = out.read_bytes()
    sample.main(
        [str(unet / "weights"), "--labels", "3", "7", "--num-samples", "5", "--guidance", "1.5", "--out", str(out)]
    )
    assert out.read_bytes() == before, "the run and its weights draw the same"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x"], "--prompt does not apply"),
        (["--labels", "12"], "the model's classes are 0 to 9"),
        (["--sampler", "eular"], "sampler 'eular' is unknown"),
        (["--steps", "0"], "steps"),
        (["--out", "nowhere/x.png"], "folder of --out nowhere/x.png does not exist"),
        (["--out", "x.jpg"], "is no .png file"),
        (["--num-samples", "0"], "num_samples is 0"),
    ],
)
def test_drawing_answers_mistakes_with_one_line_and_code_2(unet, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        sample.main([str(unet), *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
