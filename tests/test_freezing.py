"""Frozen parameters: chosen by patterns, bitwise unchanged by every optimizer, and no work of the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from artifex.config import Config
from artifex.scaling.plan import Plan
from artifex.training import freezing
from artifex.training.state import blueprint
from artifex.training.step import make_step

SIZES = {"vocab_size": 64, "embed_dim": 32, "num_layers": 2, "num_heads": 8, "head_dim": 4, "mlp_dim": 48}
MODEL = {"name": "llama-nano", "sequence_length": 16, "tied_head": False, **SIZES}
FREEZE = ["embed/*", "layers/attention/*", "norm/scale"]


def built(devices: int = 1, model=None, device=None, optimizer=None, **training):
    cfg = Config.from_dict(
        {
            "model": MODEL | (model or {}),
            "data": {"sequence_length": 16},
            "training": {"batch_size": 8, "steps": 20, **training},
            "optimizer": {"name": "adamw", "warmup_steps": 0, "learning_rate": 0.1, **(optimizer or {})},
            "device": device or {},
        }
    )
    parts = cfg.training.gradient_accumulation
    plan = Plan.from_device(cfg.device, devices, microbatches=parts)
    return blueprint(cfg, plan, plan.make_mesh(jax.devices()[:devices]))


def batch(step: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(step).integers(0, 64, (8, 17), dtype=np.int32)
    return {"tokens": draw[:, :-1], "targets": draw[:, 1:]}


def stepped(blue, steps: int):
    step, state = make_step(blue), blue.init()
    before = jax.device_get(state)
    for index in range(steps):
        state, metrics = step(state, jax.device_put(batch(index), blue.batch_sharding(batch(index))))
    return before, jax.device_get(state), jax.device_get(metrics)


def leaves(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in _with_path(tree)}


def _with_path(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def is_frozen(path: str) -> bool:
    return "embed/" in path or "attention/" in path or path.endswith("/norm/scale") or path == "norm/scale"


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon", "sgd"])
def test_every_optimizer_leaves_the_frozen_bitwise_and_keeps_no_state_of_them(name):
    more = {"gradient_accumulation": 2, "ema_decay": 0.9, "freeze": FREEZE}
    blue = built(8, device={"fsdp": 4, "tensor": 2}, optimizer={"name": name, "weight_decay": 0.5}, **more)
    before, after, _ = stepped(blue, 2)
    for part in ("params", "ema"):
        old, new = leaves(getattr(before, part)), leaves(getattr(after, part))
        assert old.keys() == new.keys(), "the tree of the model is one"
        changed = {path for path in old if old[path].tobytes() != new[path].tobytes()}
        assert changed == {path for path in old if not is_frozen(path)}
    owners = [path for path in leaves(after.optimizer) if path.endswith(("kernel", "table", "scale"))]
    assert owners and not [path for path in owners if is_frozen(path)]


def test_the_others_move_as_if_nothing_were_frozen():
    plain = {"name": "sgd", "momentum": 0.0, "clip_norm": None, "weight_decay": 0.1}
    first, free, _ = stepped(built(optimizer=plain), 1)
    _, after, metrics = stepped(built(optimizer=plain, freeze=FREEZE), 1)
    free, after = leaves(free.params), leaves(after.params)
    for path in free:
        np.testing.assert_allclose(
            after[path], leaves(first.params)[path] if is_frozen(path) else free[path], rtol=1e-5
        )
    decay = 0.1 * 0.1
    moved = [
        (leaves(first.params)[path] * (1 if path.endswith("scale") else 1 - decay) - free[path]) / 0.1
        for path in free
        if not is_frozen(path)
    ]
    norm = np.sqrt(sum(np.sum(np.square(part, dtype=np.float64)) for part in moved))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-3)  # of what is trained alone


def test_the_backward_pass_ends_where_nothing_trained_lies_before():
    def flops(freeze):
        blue = built(model={"num_layers": 4, "vocab_size": 8}, freeze=freeze, unroll=4, optimizer={"name": "sgd"})
        data = {name: jax.ShapeDtypeStruct((8, 16), jnp.int32) for name in ("tokens", "targets")}
        return make_step(blue).lower(blue.state, data).cost_analysis()["flops"]

    # a product costs once forward, and once for each of its two gradients
    np.testing.assert_allclose(flops(["embed/*", "layers/*"]) / flops(None), 1 / 3, rtol=0.1)


def test_where_nothing_is_frozen_the_tree_is_passed_on_as_it_is():
    tree = {"a": {"b": 1}, "c": 2, "empty": {}}
    trained, held = freezing.split(tree, frozenset())
    assert trained is tree and freezing.join(trained, held) is tree


def test_a_tree_is_split_and_joined_without_a_rest():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": {0: 3, 1: 4}, "f": 5}
    trained, held = freezing.split(tree, frozenset({"a/b", "a/c/d", "e/1"}))
    assert (trained, held) == ({"e": {0: 3}, "f": 5}, {"a": {"b": 1, "c": {"d": 2}}, "e": {1: 4}})
    assert freezing.join(trained, held) == tree


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (["embd/*"], r"training.freeze 'embd/\*' matches no parameter; did you mean 'embed/\*'"),
        (["norm/*", "layers/mlp/upp/kernel"], "did you mean 'layers/mlp/up/kernel'"),
        (["*"], "matches all 12 parameters, and nothing is left to train"),
    ],
)
def test_a_pattern_that_means_nothing_is_answered_with_the_nearest_path(freeze, message):
    with pytest.raises(ValueError, match=message):
        built(freeze=freeze)


@pytest.mark.parametrize("given", ["embed/*", ["embed/*"], ("embed/*",)])
def test_one_pattern_may_stand_alone(given):
    config = Config.from_dict({"training": {"freeze": given}})
    assert config.training.freeze == ("embed/*",)
    assert Config.from_dict(config.to_dict()) == config
