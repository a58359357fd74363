"""37 + 63 = 100: a run that is stopped and goes on is, bit for bit and sample for sample, the run that never stopped.

The reference is the run that never stopped. Each family trains on its own data, over at least one end of an epoch
after the stop, with accumulation, an average of its weights, and dropout where it has any.
"""

import contextlib
import dataclasses
import os
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
import xxhash
from flax import nnx

sys.path.append(str(Path(__file__).parents[1]))
import cells

from artifex import models, train
from artifex.config import Config
from artifex.models.weights import save_pretrained
from artifex.training.image_task import ImageTask
from artifex.training.loop import fit
from artifex.training.meter import Meter
from artifex.training.step import make_step

STOP, STEPS, ROWS = 37, 100, 16
EVERY_DAY = ("VAE",)
OPTIMISED = ("UNet", "KL autoencoder")  # whose steps are slow as the other tests compile them
WITH_DROPOUT = ("llama", "gpt2, dropout", "gemma2", "mixture", "mixture, capacity")


@dataclasses.dataclass
class Trained:
    """What a run went through, by step: a digest of its batches, its losses; and its last state, on the host."""

    batches: dict[int, str]
    losses: dict[int, float]
    state: object = None


def config_of(family: str, folder: Path, **device) -> Config:
    preset, fields = cells.FAMILIES[family]
    text = models.PRESETS[preset].reads == "text"
    if family == "latent DiT":
        fields = {**fields, "autoencoder_weights": str(folder / "kl")}
    if family in WITH_DROPOUT:
        fields = {**fields, "dropout": 0.1}
    license = str(Path(__file__).parents[2] / "LICENSE")
    return Config.from_dict(
        {
            "model": {"name": preset, **fields},
            "data": {"source": license, "sequence_length": 64}
            if text
            else {"source": "digits", "validation_fraction": 0.5},
            "training": {"batch_size": ROWS, "steps": STEPS, "gradient_accumulation": 2, "ema_decay": 0.9}
            | ({"sample_tokens": 0} if text else {"sample_images": 0})
            | {"validate_every": 0, "attention": "blockwise"},
            "optimizer": {"name": "adamw", "learning_rate": 1e-3, "warmup_steps": 10},
            "checkpoint": {"every": STOP},
            "logging": {"progress": False},
            "device": device,
        }
    )


def trained(config: Config, folder: Path, *, stop: int | None = None) -> Trained:
    """Train, or go on, to the last step, or until a signal comes while step `stop` is saved."""
    devices = jax.devices()[: int(np.prod(list(config.device.model_dump(exclude_unset=True).values())))]
    with mock.patch("jax.devices", lambda *_: devices), mock.patch("jax.device_count", lambda *_: len(devices)):
        run = train.open_run(config, folder)
        # features of a text are no arrays of a batch of a run, which nothing reads beside images yet
        run_step = make_step(run.blue) if config.model.name == "mmdit-digits" else train.prepare(run)
        save, found = run.checkpoints.save, Trained({}, {})

        def noting(state, batch):
            content = jax.device_get(batch)
            digest = xxhash.xxh3_128()
            for leaf in jax.tree.leaves(content):
                digest.update(np.ascontiguousarray(leaf))
            state, metrics = run_step(state, batch)
            step = run.start + len(found.losses) + 1
            found.batches[step], found.losses[step] = digest.hexdigest(), float(metrics["loss"])
            return state, metrics

        def saving(step, state, metadata):
            save(step, state, metadata)
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        run.checkpoints.save = saving
        ends = contextlib.nullcontext() if stop is None else pytest.raises(SystemExit)
        with run.lock, run.checkpoints, run.report, ends:
            found.state = jax.device_get(fit(run, noting, Meter(run)))
    return found


@pytest.fixture(autouse=True, scope="module")
def reading_text():
    """The preset that the zoo lacks, whose batches have features of a text that are a function of the step."""
    batches = ImageTask.batches

    def with_text(task, start, part=(0, 1)):
        stream = batches(task, start, part)
        if task.config.model.name != "mmdit-digits":
            return stream
        return Streamed(stream, start)

    with cells.presets(), mock.patch.object(ImageTask, "batches", with_text):
        yield


class Streamed:
    """Batches with a condition."""

    def __init__(self, stream, start):
        self.stream, self.step, self.close = stream, start, stream.close

    def __next__(self):
        draw = np.random.default_rng(self.step).normal
        self.step += 1
        condition = {name: np.float32(draw(size=(ROWS, *shape))) for name, shape in cells.TEXT.items()}
        return next(self.stream) | {"condition": condition}


FAMILIES = [pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.slow) for name in cells.FAMILIES]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A family, the folder of its run that was stopped, and the run that never was."""
    folder = tmp_path_factory.mktemp("resume")
    if request.param == "latent DiT":
        spec = config_of(request.param, folder).model.spec().autoencoder
        save_pretrained(folder / "kl", "kl-digits", spec, nnx.to_pure_dict(nnx.state(spec.build(nnx.Rngs(0)))))
    jax.config.update("jax_disable_most_optimizations", request.param not in OPTIMISED)
    whole = trained(config_of(request.param, folder), folder / "whole")
    half = trained(config_of(request.param, folder), folder / "half", stop=STOP)
    assert half.batches == {step: whole.batches[step] for step in range(1, STOP + 1)}
    yield request.param, folder, whole
    jax.config.update("jax_disable_most_optimizations", True)


def went_on(family, name, **device) -> Trained:
    name_of_family, folder, _ = family
    shutil.copytree(folder / "half", folder / name)
    found = trained(config_of(name_of_family, folder, **device), folder / name)
    assert [*found.losses] == list(range(STOP + 1, STEPS + 1))
    return found


def test_a_run_that_was_stopped_ends_bit_equal_to_the_one_that_never_was(family):
    _, _, whole = family
    found = went_on(family, "resumed")
    assert found.batches == {step: whole.batches[step] for step in found.batches}
    assert found.losses == {step: whole.losses[step] for step in found.losses}
    assert jax.tree.structure(found.state) == jax.tree.structure(whole.state)
    for path, leaf in jax.tree_util.tree_leaves_with_path(whole.state):
        other = dict(jax.tree_util.tree_leaves_with_path(found.state))[path]
        assert leaf.dtype == other.dtype and leaf.tobytes() == other.tobytes(), jax.tree_util.keystr(path)


@pytest.mark.slow
def test_under_another_mesh_it_reads_the_same_and_its_losses_agree(family):
    _, _, whole = family
    found = went_on(family, "elsewhere", fsdp=4, tensor=2)
    assert found.batches == {step: whole.batches[step] for step in found.batches}
    apart = {step: abs(found.losses[step] / whole.losses[step] - 1) for step in found.losses}
    print(
        f"\n{family[0]}: losses of {len(apart)} steps within {max(apart.values()):.1e}, the first {apart[STOP + 1]:.1e}"
    )
    assert max(apart.values()) < 1e-5


def test_the_stop_lies_before_the_end_of_an_epoch(family):
    name, folder, _ = family
    run = train.open_run(config_of(name, folder, data=8), folder / "unused")
    rows = run.task.windows().windows_per_epoch if run.task.noun == "tokens" else len(run.task.corpus.train)
    assert STOP * ROWS // rows < STEPS * ROWS // rows and STOP * ROWS % rows
