"""What lies in the host's memory between updates takes none of a device's, and trains as if it lay there.

JAX's CPU devices know that kind of memory too, though it is the same: so the program runs here, and a user's run that
asks for it on a CPU is refused.
"""

import jax
import numpy as np
import pytest

from artifex.config import Config
from artifex.scaling.checkpoints import Checkpoints
from artifex.scaling.placement import bytes_on_device
from artifex.scaling.plan import Plan
from artifex.train import train
from artifex.training.state import blueprint
from artifex.training.step import make_step

SMALL = {"embed_dim": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 64, "sequence_length": 16, "vocab_size": 64}


def built(threshold):
    config = Config.from_dict(
        {
            "model": {"name": "llama-nano", **SMALL},
            "data": {"sequence_length": 16},
            "training": {"batch_size": 8, "spill_threshold_mb": threshold, "ema_decay": 0.9},
            "optimizer": {"name": "adamw"},
            "device": {"fsdp": 4},
        }
    )
    plan = Plan.from_device(config.device, 4)
    return blueprint(config, plan, plan.make_mesh(jax.devices()[:4]))


def trained(blue):
    state, step = blue.init(), make_step(blue)
    for index in range(3):
        tokens = np.random.default_rng(index).integers(0, 64, (8, 17)).astype(np.int32)
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
        state, metrics = step(state, jax.device_put(batch, blue.batch_sharding(batch)))
    return state, float(metrics["loss"])


def test_spilled_state_trains_bit_for_bit_alike_and_is_none_of_a_devices_bytes(tmp_path):
    kept, away = built(None), built(0)
    one, other = trained(kept), trained(away)
    assert one[1] == other[1]
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(run[0]) for run in (one, other)))
    for tree in (other[0].optimizer, other[0].ema):
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}
        assert kinds == {"pinned_host"}, "and it went back there"
    assert bytes_on_device(away.state) < 0.26 * bytes_on_device(kept.state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, other[0], {})
        checkpoints.wait()
        for blue in (kept, away):
            here = checkpoints.restore(3, blue.state)
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(here), jax.device_get(one[0]))
            assert jax.tree.map(lambda leaf: leaf.sharding, here) == blue.shardings


def test_arrays_below_the_threshold_stay():
    blue = built(0.002)  # MB on each device: 2,000 bytes
    for leaf in jax.tree.leaves(blue.state.optimizer):
        part = np.prod(leaf.sharding.shard_shape(leaf.shape)) * 4
        assert (leaf.sharding.memory_kind == "pinned_host") == (leaf.ndim > 0 and part >= 2_000)


def test_a_run_on_cpus_refuses_to_spill(tmp_path):
    with pytest.raises(ValueError, match="spill_threshold_mb is 100, but the devices are CPUs"):
        train(Config.from_dict({"training": {"spill_threshold_mb": 100.0}}), tmp_path)
