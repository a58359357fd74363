"""Tensor and sequence parallelism: what is split, what it equals, and what crosses devices for it."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from artifex.config import Config
from artifex.models import layers
from artifex.models.convolution import Conv, UpConv
from artifex.models.resnet import ResnetBlock, SpatialAttention, Upsample
from artifex.models.transformer.config import DecoderConfig
from artifex.models.transformer.decoder import Block, stream
from artifex.models.transformer.positions import Positions
from artifex.scaling import axes, placement
from artifex.scaling.execution import Execution, execution
from artifex.scaling.local import local, total
from artifex.scaling.mesh_utils import create_device_mesh
from artifex.scaling.plan import Plan
from artifex.scaling.strategies import combine, strategies_for
from artifex.training.state import blueprint


def spread(sizes, **how):
    """Rules and mesh of these sizes."""
    mesh = create_device_mesh(
        tuple(sizes.values()), tuple(sizes), devices=jax.devices()[: int(np.prod([*sizes.values()]))]
    )
    return combine(strategies_for(tuple(sizes), **how)), mesh


VOCAB, EMBED = 24, 8
TABLE = jax.random.normal(jax.random.key(0), (VOCAB, EMBED))
IDS = jax.random.randint(jax.random.key(1), (4, 6), 0, VOCAB)
WEIGHTS = jax.random.normal(jax.random.key(2), (4, 6, EMBED))


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 4}, {"fsdp": 2, "context": 2, "tensor": 2}])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_words_of_a_table_split_by_its_entries_are_those_of_the_whole(sizes, sequence_parallel):
    rules, mesh = spread(sizes, sequence_parallel=sequence_parallel)
    ids = IDS.at[0, 0].set(-1).at[1, 1].set(VOCAB)

    def words(table):
        with execution(Execution(rules=rules, mesh=mesh)):
            table = axes.shard_parameter(table, "vocab", "embed")
            x = layers.take_words(table, ids)
            return jnp.sum(jnp.where(jnp.isnan(x), 0.0, x) * WEIGHTS), x

    (_, got), gradient = jax.jit(jax.value_and_grad(words, has_aux=True))(TABLE)
    known = np.asarray((ids >= 0) & (ids < VOCAB))
    np.testing.assert_array_equal(np.isnan(np.asarray(got)).all(-1), ~known)
    np.testing.assert_array_equal(np.asarray(got)[known], np.asarray(TABLE)[np.asarray(ids)[known]])
    expected = np.zeros(TABLE.shape)
    np.add.at(expected, np.asarray(ids)[known], np.asarray(WEIGHTS)[known])
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6)


def test_words_are_taken_inside_a_pipeline_stage():
    rules, mesh = spread({"pipeline": 2, "data": 2, "tensor": 2})

    def stage(table, ids):
        with execution(Execution(rules=rules, mesh=mesh)):
            table = axes.shard_parameter(table, "vocab", "embed")
            here = jnp.sum(layers.take_words(table, ids) * WEIGHTS)
        return jax.lax.psum(here, "pipeline")

    over_stages = jax.shard_map(
        stage,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(),
        axis_names={"pipeline"},
        check_vma=False,
    )
    value, gradient = jax.jit(jax.value_and_grad(over_stages))(TABLE, IDS)
    expected = lambda table: 2 * jnp.sum(table[IDS] * WEIGHTS)  # noqa: E731
    np.testing.assert_allclose(value, expected(TABLE), rtol=1e-6)
    np.testing.assert_allclose(gradient, jax.grad(expected)(TABLE), rtol=1e-6, atol=1e-6)


IMAGES = jax.random.normal(jax.random.key(3), (2, 8, 8, 16))
CONDITION = jax.random.normal(jax.random.key(4), (2, 12))


def on_tensor_devices(model, call, *arrays, ways=4):
    """`call(model, *arrays)`, its gradients by parameters and arrays, and the text of the program, by tensor alone."""
    rules, mesh = spread({"tensor": ways})
    graphdef, state = nnx.split(model)
    where = jax.tree.map(
        lambda leaf, names: placement.layout(leaf.shape, names, rules.params, rules, mesh),
        nnx.to_pure_dict(state),
        placement.names_of(model),
    )

    def loss(state, *arrays):
        with execution(Execution(rules=rules, mesh=mesh)):
            y = call(nnx.merge(graphdef, state), *arrays)
        return jnp.sum(jnp.square(y)), y

    placed = jax.device_put(nnx.to_pure_dict(state), where)
    arrays = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec()))
    forward = jax.jit(lambda *args: loss(*args)[1]).lower(placed, *arrays).compile()
    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(placed, *arrays)
    return y, gradients, forward


def alone(model, call, *arrays):
    graphdef, state = nnx.split(model)

    def loss(state, *arrays):
        y = call(nnx.merge(graphdef, state), *arrays)
        return jnp.sum(jnp.square(y)), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        nnx.to_pure_dict(state), *arrays
    )
    forward = jax.jit(lambda *args: loss(*args)[1]).lower(nnx.to_pure_dict(state), *arrays).compile()
    return y, gradients, forward


def moved(compiled, kind):
    """Sizes of what collectives of a kind bring, from XLA's text."""
    found = re.findall(rf"= \(?(\w+)\[([\d,]*)\][^=]* {kind}(?:-start)?\(", compiled.as_text())
    return sorted(math.prod(map(int, dims.split(","))) if dims else 1 for _, dims in found)


def flops(compiled):
    costs = compiled.cost_analysis()
    assert costs is not None
    return costs["flops"]


def equal(got, expected):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("groups", [8, 2])  # whole groups on each of four devices, and groups cut in two
def test_the_two_convolutions_of_a_residual_block_need_one_sum_of_an_image(groups):
    block = ResnetBlock(16, 16, groups=groups, condition=12, scale_shift=True, rngs=nnx.Rngs(0))
    call = lambda block, x, c: block(x, c)  # noqa: E731
    y, gradients, here = on_tensor_devices(block, call, IMAGES, CONDITION)
    expected, of_one, one = alone(block, call, IMAGES, CONDITION)
    equal((y, gradients), (expected, of_one))
    assert [size for size in moved(here, "all-reduce") if size >= IMAGES.size // 4] == [IMAGES.size]
    for kind in ("all-gather", "all-to-all", "collective-permute"):
        assert [size for size in moved(here, kind) if size >= IMAGES.size // 4] == []
    convolutions = 2 * (2 * 9 * 16 * IMAGES.size)
    norms = flops(one) - 0.9 * convolutions  # the border of an image has fewer taps
    assert flops(here) < convolutions / 4 + norms


@pytest.mark.parametrize("outputs", [16, 3])
def test_a_lone_convolution_divides_its_outputs_or_else_its_inputs(outputs):
    conv = Conv(16, outputs, rngs=nnx.Rngs(0))
    y, gradients, here = on_tensor_devices(conv, lambda conv, x: conv(x), IMAGES)
    expected, of_one, one = alone(conv, lambda conv, x: conv(x), IMAGES)
    equal((y, gradients), (expected, of_one))
    assert flops(here) < 0.3 * flops(one)
    kind = "all-gather" if outputs == 16 else "all-reduce"
    assert [size for size in moved(here, kind) if size > outputs] == [y.size]


@pytest.mark.parametrize("heads", [4, 1])
def test_attention_over_pixels_is_divided_by_heads_or_else_by_queries(heads):
    layer = SpatialAttention(16, heads, groups=4, rngs=nnx.Rngs(0))
    y, gradients, here = on_tensor_devices(layer, lambda layer, x: layer(x), IMAGES)
    expected, of_one, one = alone(layer, lambda layer, x: layer(x), IMAGES)
    equal((y, gradients), (expected, of_one))
    assert flops(here) < 0.4 * flops(one)


@pytest.mark.parametrize("layer", [UpConv(16, 8, rngs=nnx.Rngs(0)), Upsample(16, rngs=nnx.Rngs(0))])
def test_what_makes_an_image_larger_divides_its_outputs(layer):
    y, gradients, here = on_tensor_devices(layer, lambda layer, x: layer(x), IMAGES)
    expected, of_one, one = alone(layer, lambda layer, x: layer(x), IMAGES)
    equal((y, gradients), (expected, of_one))
    assert flops(here) < 0.3 * flops(one)


CONFIG = DecoderConfig(vocab_size=32, embed_dim=32, num_layers=2, num_heads=4, mlp_dim=48, sequence_length=16)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_layer_of_a_decoder_moves_its_stream_as_often_as_megatron_does(sequence_parallel):
    rules, mesh = spread({"tensor": 4}, sequence_parallel=sequence_parallel)
    block = Block(CONFIG, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(block)
    x_BTD = jax.random.normal(jax.random.key(5), (2, 16, 32))

    def apply(state, x_BTD):
        with execution(Execution(rules=rules, mesh=mesh)):
            return stream(nnx.merge(graphdef, state)(stream(x_BTD), Positions(np.arange(16)))[0])

    shapes = jax.tree.map(
        lambda leaf, names: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=placement.layout(leaf.shape, names, rules.params, rules, mesh)
        ),
        nnx.to_pure_dict(state),
        placement.names_of(block),
    )
    where = NamedSharding(mesh, PartitionSpec(None, "tensor" if sequence_parallel else None))
    x = jax.ShapeDtypeStruct(x_BTD.shape, x_BTD.dtype, sharding=where)
    program = jax.jit(apply).lower(shapes, x).compile()
    # on a CPU a reduce-scatter is an all-reduce and a slice; `test_targets` counts those of a GPU
    assert moved(program, "all-reduce") == [x_BTD.size] * 2
    assert moved(program, "all-gather") == ([x_BTD.size] * 2 if sequence_parallel else [])


def test_devices_that_share_hidden_units_have_the_same_positions_inside_local():
    rules, mesh = spread({"data": 2, "tensor": 4}, sequence_parallel=True)
    x_BTD, up_DF, down_FD = (
        jax.random.normal(jax.random.key(n), s) for n, s in enumerate(((4, 8, 6), (6, 16), (16, 6)))
    )
    stream_names = ("batch", "sequence", None)
    layer = local(
        lambda x, up, down: total(jnp.tanh(x @ up) @ down, "act_mlp"),
        inputs=(stream_names, (None, "act_mlp"), ("act_mlp", None)),
        outputs=stream_names,
    )

    def on_mesh(x_BTD, up_DF, down_FD):
        with execution(Execution(rules=rules, mesh=mesh)):
            return stream(layer(stream(x_BTD), up_DF, down_FD))

    expected = jnp.tanh(x_BTD @ up_DF) @ down_FD
    np.testing.assert_allclose(jax.jit(on_mesh)(x_BTD, up_DF, down_FD), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_heads": 6, "embed_dim": 48}, "heads 6 of .* over the 4 devices of mesh axis 'tensor'.* 3 or 6.* 4 or 8"),
        ({"mlp_dim": 50}, "mlp 50 of .* over the 4 devices of mesh axis 'tensor'.* 2 or 5, .*mlp_dim 48 or 52"),
        (
            {"num_heads": 2, "num_kv_heads": 1},
            "heads 2 of .* over the 4 devices .* make tensor 2, or the model's num_heads 4",
        ),
    ],
)
def test_heads_and_hidden_units_that_do_not_divide_are_refused(model, message):
    small = {"name": "llama-nano", "embed_dim": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": None}
    config = Config.from_dict({"model": small | model, "device": {"tensor": 4}})
    plan = Plan.from_device(config.device, 4)
    with pytest.raises(ValueError, match=message):
        blueprint(config, plan, plan.make_mesh(jax.devices()[:4]))
