"""What every model of the zoo holds, on real data: one row a preset. A model that is added needs a row here."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from artifex import models
from artifex.config import Config
from artifex.scaling.checkpoints import Checkpoints
from artifex.scaling.plan import Plan
from artifex.training.run_folder import RunFolder
from artifex.training.state import blueprint
from artifex.training.step import make_evaluate, make_step
from artifex.training.task import open_task

STEPS = 30
TEXT = {"sequence_length": 64}
# preset -> fields that make it small; of two that differ in loss or process alone, one is smaller still
ZOO = {
    "llama-nano": {"embed_dim": 64, "num_layers": 2, "mlp_dim": 128},
    "gpt2-nano": {"embed_dim": 64, "num_layers": 2},
    "qwen3-nano": {"embed_dim": 64, "num_layers": 2, "mlp_dim": 128},
    "gemma2-nano": {"embed_dim": 64, "num_layers": 2, "mlp_dim": 128},
    "moe-nano": {"embed_dim": 64, "num_layers": 2, "mlp_dim": 128, "expert_mlp_dim": 64},
    "linear-nano": {"embed_dim": 64, "num_layers": 2, "mlp_dim": 128},
    "masked-nano": {"decoder": {"embed_dim": 64, "num_layers": 2, "mlp_dim": 128}},
    "vae-digits": {"block_channels": [32]},
    "beta-vae-digits": {"block_channels": [32]},
    "bernoulli-vae-digits": {"block_channels": [32]},
    "vq-digits": {"block_channels": [32]},
    "fsq-digits": {"block_channels": [32]},
    "kl-digits": {"block_channels": [16, 32]},
    "unet-digits": {"network": {"block_channels": [16, 32], "layers_per_block": 1}},
    "iddpm-digits": {"network": {"block_channels": [32], "attention_levels": [], "mid_attention": False}},
    "edm-digits": {"network": {"block_channels": [32], "attention_levels": [], "mid_attention": False}},
    "dit-digits": {},
    "latent-dit-digits": {"network": {"num_layers": 2}},
}
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 4},
    "data-fsdp": {"data": 2, "fsdp": 4},
    "data-fsdp-tensor": {"data": 2, "fsdp": 2, "tensor": 2},
}
EVERY_DAY = "data-fsdp-tensor"
# the presets that train on it every day: of the others the matrix has the families
SPREAD = ("gemma2-nano", "masked-nano", "fsq-digits", "dit-digits")


def config(preset: str, **device) -> Config:
    text = models.PRESETS[preset].reads == "text"
    return Config.from_dict(
        {
            "model": {"name": preset, **ZOO[preset]},
            "data": {"source": "stdlib", **TEXT} if text else {"source": "digits", "validation_fraction": 0.2},
            "training": {"steps": STEPS, "batch_size": 16, "validation_batches": 2},
            "optimizer": {"name": "adamw", "learning_rate": 3e-3, "warmup_steps": 3},
            "device": device,
        }
    )


@functools.cache
def batches(reads: str) -> list[dict[str, np.ndarray]]:
    task = open_task(config("llama-nano" if reads == "text" else "vae-digits"), RunFolder(Path("unused")))
    stream = task.batches(0)
    found = [next(stream) for _ in range(STEPS)]
    stream.close()
    return found


def on(preset: str, **device):
    cfg = config(preset, **device)
    count = math.prod(device.values()) if device else 1
    plan = Plan.from_device(cfg.device, count)
    return blueprint(cfg, plan, plan.make_mesh(jax.devices()[:count]))


def trained(blue, steps: int):
    """The state after some steps, the loss of each, and the buffers before the first."""
    state, step, losses = blue.init(), make_step(blue), []
    fresh = jax.device_get(state.buffers)
    for batch in batches(blue.config.model.reads)[:steps]:
        state, metrics = step(state, jax.device_put(batch, blue.batch_sharding(batch)))
        losses.append(float(metrics["loss"]))
    assert step.num_compiled() == 1, "traced once"
    return state, losses, fresh


LIKE_OTHERS = ("kl-digits", "iddpm-digits", "edm-digits", "latent-dit-digits")  # whose every part another row trains


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name in LIKE_OTHERS)) for name in ZOO],
)
def alone(request):
    """The preset, trained on one device."""
    blue = on(request.param)
    return request.param, blue, *trained(blue, STEPS)


def test_every_preset_that_trains_on_two_cores_has_a_row():
    small = {name for name in models.list_models() if name.endswith(("-nano", "-digits"))}
    assert small - set(ZOO) == set()


def test_loss_falls_in_thirty_steps_on_real_data(alone):
    _, _, _, losses, _ = alone
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:3]), losses


def test_validation_is_the_same_each_time(alone):
    _, blue, state, *_ = alone
    evaluate = make_evaluate(blue)
    batch = batches(blue.config.model.reads)[0]
    first, second = evaluate(state, batch), evaluate(state, batch)
    assert first.keys() == second.keys() and all(float(first[name]) == float(second[name]) for name in first)


@pytest.mark.parametrize(
    ("alone", "mesh"),
    [
        pytest.param(preset, mesh, marks=() if mesh == EVERY_DAY and preset in SPREAD else pytest.mark.slow)
        for preset in ZOO
        for mesh in MESHES
    ],
    indirect=["alone"],
)
def test_training_on_a_mesh_equals_one_device(alone, mesh, tmp_path):
    preset, blue, _, losses, _ = alone
    spread = on(preset, **MESHES[mesh])
    state, got, _ = trained(spread, 4)
    np.testing.assert_allclose(got, losses[:4], rtol=2e-4)
    # and the checkpoint opens on one device, bit for bit
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, state, {})
        checkpoints.wait()
        here = checkpoints.restore(4, blue.state)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(here), jax.device_get(state))


def test_a_sample_has_its_shape_and_is_a_function_of_the_key(alone):
    _, blue, state, *_ = alone
    cfg = blue.config.model.spec()
    how = {"prompt": np.full((2, 4), 32), "num_tokens": 8} if cfg.reads == "text" else {"count": 4}

    def draw(seed):
        return np.asarray(blue.run(state, lambda model: model.sample(jax.random.key(seed), **how)))

    first = draw(0)
    assert first.shape == ((2, 8) if cfg.reads == "text" else (4, cfg.image_size, cfg.image_size, cfg.channels))
    if cfg.reads == "images":
        assert first.dtype == np.float32 and np.abs(first).max() <= 1
    np.testing.assert_array_equal(first, draw(0))
    assert (first != draw(1)).any()


def test_bfloat16_stays_near_float32(alone):
    _, blue, state, *_ = alone
    batch = batches(blue.config.model.reads)[1]

    @jax.jit
    def loss(params, buffers):
        return nnx.merge(blue.graphdef, params, buffers).loss(batch)[0]

    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.params)
    full, half = float(loss(state.params, state.buffers)), float(loss(low, state.buffers))
    assert abs(half - full) < 0.03 * abs(full) + 0.01


def test_buffers_change_in_training_alone(alone):
    preset, _, state, _, fresh = alone
    changed = [
        jax.tree_util.keystr(path)
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(fresh), jax.tree.leaves(state.buffers), strict=True
        )
        if (np.asarray(old) != np.asarray(new)).any()
    ]
    assert bool(changed) == (preset in ("vq-digits", "fsq-digits")), changed
