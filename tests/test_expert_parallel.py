"""Expert parallelism: what travels, what a buffer does not hold, and that no mesh changes a result."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from artifex.config import Config
from artifex.models.transformer import moe
from artifex.models.transformer.config import DecoderConfig
from artifex.scaling.axes import activation_rules
from artifex.scaling.plan import Plan
from artifex.scaling.strategies import combine, strategies_for
from artifex.training.state import blueprint
from artifex.training.step import make_step
from artifex.training.task import batch_shapes

CFG = DecoderConfig(embed_dim=16, num_heads=2, mlp_dim=24, expert_mlp_dim=8, num_experts=8, experts_per_token=2)
B, T, E, K = 8, 16, 8, 2
MESHES = {
    "expert 8": {"expert": 8},
    "data 2, expert 4": {"data": 2, "expert": 4},
    "fsdp 2, expert 2, tensor 2": {"fsdp": 2, "expert": 2, "tensor": 2},
    "expert 4, context 2": {"expert": 4, "context": 2},
    "context 8": {"context": 8},
}
EVERY_DAY = ("data 2, expert 4", "expert 4, context 2")
KINDS = {"dropless": {}, "capacity": {"capacity_factor": 0.8}}


def mesh_of(sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))


def layer_of(**overrides):
    layer = moe.MoE(dataclasses.replace(CFG, **overrides), rngs=nnx.Rngs(0))
    layer.router.kernel[...] = 8 * layer.router.kernel[...]  # far from uniform: some experts are chosen much more often
    return layer


def inputs(rows=B):
    return jax.random.normal(jax.random.key(3), (rows, T, 16))


def on(sizes, function):
    """`function` jitted, as the strategies that the axes are named after lay it out."""
    if sizes is None:
        return jax.jit(function)
    rules, mesh = combine(strategies_for(tuple(sizes))), mesh_of(sizes)

    def under(*args):
        with activation_rules(rules, mesh):
            return function(*args)

    return jax.jit(under)


@functools.cache
def value_and_slopes(kind, mesh):
    graphdef, state = nnx.split(layer_of(**KINDS[kind], num_shared_experts=1))

    def objective(state, x_BTD):
        y_BTD, aux = nnx.merge(graphdef, state)(x_BTD)
        return (y_BTD**2).sum() + aux["load_balance"] + aux["router_z"], (y_BTD, aux)

    slopes = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    return jax.device_get(on(MESHES.get(mesh), slopes)(state, inputs()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "mesh", [pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.slow) for name in MESHES]
)
def test_no_mesh_changes_a_result_or_a_gradient(mesh, kind):
    one, many = value_and_slopes(kind, "one device"), value_and_slopes(kind, mesh)
    aux = one[0][1][1]
    assert aux["overflow"] == 0 and (aux["dropped"] > 0.1) == (kind == "capacity")
    for expected, found in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_do_not_divide_are_served_by_experts_that_are_split(kind):
    layer, x_BTD = layer_of(**KINDS[kind]), inputs(3)
    expected, aux = nnx.jit(lambda layer, x: layer(x))(layer, x_BTD)
    found, its_aux = on({"expert": 8}, lambda x: layer(x))(x_BTD)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert its_aux["dropped"] == pytest.approx(float(aux["dropped"]), abs=1e-7) and its_aux["overflow"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_it_works_where_the_stages_of_a_pipeline_are_manual_already(kind):
    graphdef, state = nnx.split(layer_of(**KINDS[kind]))
    slopes = jax.value_and_grad(lambda state, x: (nnx.merge(graphdef, state)(x)[0] ** 2).sum())
    expected = jax.jit(slopes)(state, inputs())
    sizes, spec = {"pipeline": 2, "expert": 4}, jax.sharding.PartitionSpec
    rules, mesh = combine(strategies_for(tuple(sizes))), mesh_of(sizes)

    def stages(state, x_2BTD):
        with activation_rules(rules, mesh):
            stage = lambda state, x_2BTD: jax.tree.map(lambda a: a[None], slopes(state, x_2BTD[0]))  # noqa: E731
            specs = {"in_specs": (spec(), spec("pipeline")), "out_specs": spec("pipeline")}
            inside = jax.shard_map(stage, mesh=mesh, axis_names={"pipeline"}, check_vma=False, **specs)
            return inside(state, x_2BTD)

    found = jax.jit(stages)(state, np.stack([inputs(), inputs()]))
    for one, two in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        for each in two:
            np.testing.assert_allclose(each, one, rtol=1e-5, atol=1e-5 * float(np.abs(one).max()))


def by_hand(layer, x_BTD):
    """Weights and choices of each token (S, K), and what every expert makes of it (S, E, D)."""
    x_SD = np.asarray(x_BTD, np.float64).reshape(-1, 16)
    logits_SE = x_SD @ np.asarray(layer.router.kernel[...], np.float64)
    probability_SE = np.exp(logits_SE) / np.exp(logits_SE).sum(-1, keepdims=True)
    expert_SK = np.argsort(-probability_SE, axis=-1)[:, :K]
    weight_SK = np.take_along_axis(probability_SE, expert_SK, axis=-1)
    gate, up, down = (np.asarray(part.kernel[...], np.float64) for part in (layer.gate, layer.up, layer.down))
    wide = np.einsum("SD,EDF->SEF", x_SD, gate)
    out_SED = np.einsum("SEF,EFD->SED", wide / (1 + np.exp(-wide)) * np.einsum("SD,EDF->SEF", x_SD, up), down)
    return weight_SK / weight_SK.sum(-1, keepdims=True), expert_SK, out_SED


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3])
def test_what_a_buffer_does_not_hold_adds_nothing_and_is_counted(factor):
    layer, x_BTD = layer_of(expert_buffer=factor), inputs()
    weight_SK, expert_SK, out_SED = by_hand(layer, x_BTD)
    expected_SD, lost, each = np.zeros((B * T, 16)), 0, B * T // 8
    room = math.ceil(factor * each * K / 4)  # each of 4 expert devices' share of a device's 32 assignments
    for device in range(8):
        taken = [0] * 4
        for rank in range(K):
            for token in range(device * each, (device + 1) * each):
                expert = expert_SK[token, rank]
                if taken[expert // 2] < room:
                    taken[expert // 2] += 1
                    expected_SD[token] += weight_SK[token, rank] * out_SED[token, expert]
                else:
                    lost += 1
    y_BTD, aux = on(MESHES["data 2, expert 4"], lambda x: layer(x))(x_BTD)
    np.testing.assert_allclose(np.asarray(y_BTD).reshape(-1, 16), expected_SD, atol=3e-6)
    assert float(aux["overflow"]) == pytest.approx(lost / expert_SK.size, abs=1e-7)
    assert lost > 0 or factor > 1
    assert aux["dropped"] == 0
    # generation takes every token
    served, aux = on(MESHES["data 2, expert 4"], lambda x: layer(x, dropless=True))(x_BTD)
    whole_SD = np.einsum("SK,SKD->SD", weight_SK, np.take_along_axis(out_SED, expert_SK[..., None], axis=1))
    np.testing.assert_allclose(np.asarray(served).reshape(-1, 16), whole_SD, atol=3e-6)
    assert aux["overflow"] == 0


SMALL = {"embed_dim": 64, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "expert_mlp_dim": 64}
ROWS, LENGTH = 16, 32


@functools.cache
def built(kind, mesh):
    sizes = {**MESHES, "data 8": {"data": 8}}.get(mesh, {})
    count = math.prod(sizes.values())
    config = Config.from_dict(
        {
            "model": {"name": "mixtral-8x7b", **SMALL, **KINDS[kind], "vocab_size": 96, "sequence_length": LENGTH},
            "data": {"source": "stdlib", "sequence_length": LENGTH},
            "training": {"batch_size": ROWS, "steps": 100, "unroll": 1},
            "optimizer": {"name": "sgd", "learning_rate": 0.1, "warmup_steps": 2},
            "device": sizes,
        }
    )
    plan = Plan.from_device(config.device, count)
    blue = blueprint(config, plan, plan.make_mesh(jax.devices()[:count]))
    shapes = {name: jax.ShapeDtypeStruct(*of) for name, of in batch_shapes(config).items()}
    where = blue.batch_sharding(shapes)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[name]) for name, x in shapes.items()}
    return blue, make_step(blue).lower(blue.state, batch).compile()


def losses(kind, mesh, steps=5):
    blue, step = built(kind, mesh)
    state, found = blue.init(), []
    for index in range(steps):
        tokens = np.random.default_rng(index).integers(0, 96, (ROWS, LENGTH + 1), np.int32) ** 2 // 128
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
        state, metrics = step(state, jax.device_put(batch, blue.batch_sharding(batch)))
        found.append((metrics["loss"], metrics["dropped"], metrics["overflow"]))
    return np.array(jax.device_get(found))


TRAINED = [("dropless", "data 2, expert 4"), ("capacity", "fsdp 2, expert 2, tensor 2")]
SLOW = [(kind, mesh) for kind in KINDS for mesh in MESHES if (kind, mesh) not in TRAINED]


@pytest.mark.parametrize(("kind", "mesh"), [*TRAINED, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_five_steps_of_training_equal_those_of_one_device(kind, mesh):
    np.testing.assert_allclose(losses(kind, mesh), losses(kind, "one device"), rtol=1e-5, atol=1e-6)


def flops(kind, mesh):
    costs = built(kind, mesh)[1].cost_analysis()
    assert costs is not None
    return costs["flops"]


@pytest.mark.parametrize(
    "mesh", ["data 8", "fsdp 2, expert 2, tensor 2", pytest.param("data 2, expert 4", marks=pytest.mark.slow)]
)
def test_a_capacity_bounds_the_work_of_each_of_eight_devices(mesh):
    share = flops("capacity", mesh) / flops("capacity", "one device")
    # devices that hold all weights update all of them, and look whether each is finite: work that is not of the rows
    bound = 1.15 if mesh == "data 8" else 1.1
    assert share < bound / 8, f"{8 * share:.3f} of an eighth"


def test_dropless_experts_that_are_split_work_on_their_own_rows_alone():
    # XLA counts the body of a loop once, so a product of one block, of which each has 9: 3 forwards and 6 backwards
    def other_turns(rows, experts):
        block = 2 ** int(math.log2(min(128, rows / (4 * experts))))
        return (experts * math.ceil(rows / experts / block) - 1) * 9 * 2 * block * 64 * 64  # by even load

    rows = K * ROWS * LENGTH
    of_one = flops("dropless", "one device") + other_turns(rows, 8)
    share = (flops("dropless", "data 2, expert 4") + other_turns(rows // 8, 2)) / of_one
    assert share < 1.1 / 8, f"{8 * share:.3f} of an eighth"


@pytest.mark.parametrize(
    ("model", "expert", "message"),
    [
        (
            {"name": "moe-nano"},
            16,
            r"'expert' has 16 devices for the 8 experts of 'moe-nano'.*device.expert=8 and device.fsdp=2",
        ),
        (
            {"name": "moe-nano", "num_experts": 6},
            4,
            r"for the 6 experts.*device.expert=2 and device.fsdp=2, .* such as 8",
        ),
        (
            {"name": "llama-nano"},
            4,
            r"4 devices for experts, but 'llama-nano' has none; set device.expert=1 and device.fsdp=4",
        ),
    ],
)
def test_experts_that_the_devices_cannot_share_are_refused_with_the_nearest_that_they_can(model, expert, message):
    config = Config.from_dict({"model": model, "data": {"source": "stdlib"}, "device": {"expert": expert}})
    plan = Plan.from_device(config.device, expert)
    mesh: Any = jax.sharding.AbstractMesh(plan.mesh_shape, plan.axis_names)  # nothing can compile
    with pytest.raises(ValueError, match=message):
        blueprint(config, plan, mesh)


def shapes_of(text, operation):
    return [
        tuple(map(int, dims.split(",")))
        for line in re.findall(rf"= (.*?) {operation}(?:-start)?\(", text)
        for dims in re.findall(r"\w+\[([\d,]+)\]", line)
    ]


@pytest.mark.parametrize(("kind", "mesh"), TRAINED)
def test_tokens_travel_and_nothing_is_gathered_but_weights_of_fsdp(kind, mesh):
    text = built(kind, mesh)[1].as_text()
    assert shapes_of(text, "all-to-all")
    of_all_experts = 8 * 64 * 64 // MESHES[mesh].get("tensor", 1)
    tokens_of_two = 2 * ROWS * LENGTH * MESHES[mesh].get("tensor", 1) // 8
    for shape in shapes_of(text, "all-gather"):
        assert math.prod(shape) < of_all_experts, shape
        assert shape[-1] != 64 or math.prod(shape[:-1]) < tokens_of_two, shape
    # the words of a part, which each device looks up among its own, are weights that FSDP divides as well
    words = f"f32[{96 // MESHES[mesh].get('tensor', 1)},64]"
    inside = [line for line in text.splitlines() if " all-gather" in line and "shard_map" in line]
    assert [line for line in inside if words not in line] == []
