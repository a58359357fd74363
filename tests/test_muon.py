"""Muon: optax's numbers, on one device and many, where every device takes its share of the work and of the memory."""

import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from artifex.config import Config, OptimizerConfig
from artifex.muon import muon
from artifex.optim import make_optimizer
from artifex.scaling.placement import shardings
from artifex.scaling.plan import Plan
from artifex.scaling.strategies import combine, strategies_for
from artifex.training.state import blueprint
from artifex.training.step import make_step

NAMES = {
    "up": {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")},
    "out": {"kernel": ("layers", "heads", "head_dim", "embed")},
    "experts": {"kernel": ("layers", "experts", "expert_mlp", "embed")},
    "alone": {"kernel": ("mlp", "embed")},
}
INPUTS = {
    "up": {"kernel": 1, "bias": 0},
    "out": {"kernel": 2},
    "experts": {"kernel": 1},
    "alone": {"kernel": 1},
}
SIZES = {"layers": 3, "embed": 16, "mlp": 24, "heads": 8, "head_dim": 2, "experts": 2, "expert_mlp": 32}


def arrays(seed: int, sizes: dict[str, int] = SIZES) -> dict:
    draw = lambda names: jax.random.normal(jax.random.key(seed), [sizes[name] for name in names])  # noqa: E731
    return jax.tree.map(draw, NAMES, is_leaf=lambda node: isinstance(node, tuple))


def test_updates_and_state_are_those_of_optax():
    how: dict[str, Any] = {"adam_b1": 0.9, "adam_b2": 0.95, "eps": 1e-8, "beta": 0.95}
    dims = {
        "up": {"kernel": MuonDimensionNumbers((1,), (2,)), "bias": None},
        "out": {"kernel": MuonDimensionNumbers((1, 2), (3,))},
        "experts": {"kernel": MuonDimensionNumbers((2,), (3,))},
        "alone": {"kernel": MuonDimensionNumbers((0,), (1,))},
    }
    theirs = optax.contrib.muon(1.0, **how, muon_weight_dimension_numbers=dims, consistent_rms=0.2)
    ours, params = muon(NAMES, INPUTS, **how), arrays(0)
    states = [optimizer.init(params) for optimizer in (ours, theirs)]
    with jax.numpy_dtype_promotion("standard"):
        for step in range(3):
            results = [
                jax.jit(optimizer.update)(arrays(step), state, params)
                for optimizer, state in zip((ours, theirs), states, strict=True)
            ]
            states = [state for _, state in results]
            found, expected = (jax.tree_util.tree_leaves_with_path(result) for result in results)
            # the paths too: they are the names under which a checkpoint keeps the state
            assert [path for path, _ in found] == [path for path, _ in expected]
            for (path, ours_is), (_, theirs_is) in zip(found, expected, strict=True):
                np.testing.assert_allclose(ours_is, theirs_is, rtol=1e-6, atol=1e-6, err_msg=str(path))


def compiled(device: dict[str, int], sizes: dict[str, int] = SIZES):
    """Muon's update compiled for a mesh, and its arguments placed there."""
    plan = Plan(tuple(device.values()), tuple(device), combine(strategies_for(tuple(device))))
    mesh = plan.make_mesh(jax.devices()[: plan.device_count])
    cfg = OptimizerConfig(name="muon", warmup_steps=0, learning_rate=1.0, clip_norm=None)
    params = arrays(0, sizes)
    where = shardings(params, params, NAMES, plan.rules, "optimizer", mesh)
    optimizer = make_optimizer(cfg, 10, NAMES, INPUTS, where)
    params, gradients = jax.device_put((params, arrays(1, sizes)), (where, where))
    arguments = gradients, optimizer.init(params), params
    return jax.jit(optimizer.update, out_shardings=(where, None)).lower(*arguments).compile(), arguments


@pytest.fixture(scope="module")
def of_one_device():
    update, arguments = compiled({"data": 1})
    return update(*arguments)[0]


@pytest.mark.parametrize("device", [{"data": 2, "fsdp": 2, "tensor": 2}, {"pipeline": 3, "fsdp": 2}], ids="+".join)
def test_updates_are_equal_on_one_device_and_many(of_one_device, device):
    update, arguments = compiled(device)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, update(*arguments)[0], of_one_device)


def test_each_device_orthogonalises_its_share_of_a_stack():
    sizes = SIZES | {"layers": 8, "embed": 64, "mlp": 96, "head_dim": 8, "expert_mlp": 64}
    whole, divided = (compiled(device, sizes)[0].cost_analysis() for device in ({"data": 8}, {"fsdp": 8}))
    assert whole and divided
    # 32 matrices divide over the devices; with the one that stands alone each has 5 of 33, 0.157 of the products
    assert divided["flops"] < 0.18 * whole["flops"]


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_no_optimizer_gathers_what_is_divided():
    """Under FSDP a step with Muon or Adafactor needs little beyond one with AdamW."""
    needed = {}
    for name in ("adamw", "muon", "adafactor"):
        model = {"name": "llama-nano", "vocab_size": 64, "embed_dim": 128, "num_layers": 8, "mlp_dim": 512}
        cfg = Config.from_dict(
            {
                "model": model | {"num_heads": 8, "head_dim": 16, "sequence_length": 16},
                "data": {"sequence_length": 16},
                "training": {"batch_size": 8, "remat": "full"},
                "optimizer": {"name": name},
                "device": {"fsdp": 8},
            }
        )
        plan = Plan.from_device(cfg.device, 8, remat="full")
        blue = blueprint(cfg, plan, plan.make_mesh(jax.devices()))
        shapes = {key: jax.ShapeDtypeStruct((8, 16), np.int32) for key in ("tokens", "targets")}
        where = blue.batch_sharding(shapes)
        batch = {key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[key]) for key, x in shapes.items()}
        needed[name] = make_step(blue).lower(blue.state, batch).compile().memory_analysis().temp_size_in_bytes
    # gathered, the matrices of all layers took 6.8 times as much
    assert max(needed["muon"], needed["adafactor"]) < 1.1 * needed["adamw"], needed
