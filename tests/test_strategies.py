"""Each strategy puts every dim where its table says, and arrays where the spec says."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from artifex.scaling.mesh_utils import create_device_mesh
from artifex.scaling.names import ACTIVATION_AXES, VOCABULARY, WEIGHT_AXES
from artifex.scaling.sharding import (
    DataParallelStrategy,
    FSDPStrategy,
    PipelineParallelStrategy,
    ShardingStrategy,
    TensorParallelStrategy,
)

DATA, FSDP = DataParallelStrategy("data"), FSDPStrategy("fsdp", min_weight_size=0)
TENSOR, PIPELINE = TensorParallelStrategy("model"), PipelineParallelStrategy("pipeline")


def mesh_of(**sizes):
    count = math.prod(sizes.values())
    return create_device_mesh(tuple(sizes.values()), tuple(sizes), jax.devices()[:count])


def array(*shape):
    return jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape)


# Data parallelism


def test_data_parallelism_splits_the_batch_and_nothing_else():
    assert DATA.get_partition_spec(("batch", "sequence", "hidden")) == P("data", None, None)
    assert all(DATA.get_partition_spec((name,)) == P(None) for name in VOCABULARY if name != "batch")


def test_a_batch_without_names_is_split_on_its_first_dim():
    batch = {"tokens": array(8, 3), "weights": array(4), "step": array()}
    placed = DATA.apply_sharding(batch, mesh_of(data=4, model=2))
    assert jax.tree.map(lambda x: x.sharding.spec, placed) == {
        "tokens": P("data", None),
        "weights": P("data"),
        "step": P(),
    }
    assert placed["tokens"].addressable_shards[0].data.shape == (2, 3)
    jax.tree.map(np.testing.assert_array_equal, placed, batch)


@pytest.mark.parametrize("names", [None, {"tokens": ("batch", "sequence")}])
def test_a_batch_that_does_not_divide_is_an_error_with_a_remedy(names):
    with pytest.raises(ValueError, match=r"tokens: dim 0 \(batch\) .* 4 devices of mesh axis data; .* such as 8"):
        DATA.apply_sharding({"tokens": array(6, 3)}, mesh_of(data=4), names)


# The mesh axis


def test_a_mesh_without_the_axis_is_met_by_position():
    mesh = mesh_of(batch=2, model=4)
    assert DataParallelStrategy("data", mesh_axis=0).apply_sharding(array(2, 4), mesh).sharding.spec == P("batch", None)
    assert TensorParallelStrategy("tp", mesh_axis=1).apply_sharding(array(2, 4), mesh).sharding.spec == P(None, "model")


def test_the_name_of_an_axis_goes_before_its_position():
    strategy = TensorParallelStrategy("model", mesh_axis=1)
    assert strategy.apply_sharding(array(4, 4), mesh_of(model=2, data=2)).sharding.spec == P(None, "model")


@pytest.mark.parametrize("position", [None, 2])
def test_a_mesh_with_neither_name_nor_position_is_an_error(position):
    with pytest.raises(ValueError, match=r"FSDPStrategy .*'fsdp'.*\('data', 'model'\)"):
        FSDPStrategy("fsdp", mesh_axis=position).apply_sharding(array(8), mesh_of(data=2, model=4))


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataParallelStrategy(""),
        lambda: DataParallelStrategy("data", mesh_axis=-1),
        lambda: DataParallelStrategy("data", mesh_axis=0.0),
        lambda: FSDPStrategy("data", min_weight_size=-1),
        lambda: TensorParallelStrategy("model", shard_dimension="out"),
        lambda: PipelineParallelStrategy("pipeline", num_stages=0),
    ],
)
def test_strategies_that_mean_nothing_cannot_be_made(make):
    with pytest.raises((TypeError, ValueError)):
        make()


def test_the_strategy_itself_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        ShardingStrategy("data")


# FSDP


def test_fsdp_splits_the_batch_and_one_dim_of_every_weight():
    assert FSDP.get_partition_spec(("batch", "sequence", "hidden")) == P("fsdp", None, None)
    assert FSDP.get_partition_spec(("embed", "heads", "head_dim")) == P("fsdp", None, None)
    assert FSDP.get_partition_spec(("mlp", "embed")) == P(None, "fsdp")
    splittable = set(WEIGHT_AXES) - {"layers", "kernel", "modulation"}
    assert {name for name in WEIGHT_AXES if FSDP.get_partition_spec((name,)) == P("fsdp")} == splittable


def test_fsdp_takes_another_dim_where_the_first_does_not_divide():
    sizes = {"fsdp": 4}
    assert FSDP.get_partition_spec(("embed", "mlp"), (6, 8), sizes) == P(None, "fsdp")
    assert FSDP.get_partition_spec(("embed", "mlp"), (6, 7), sizes) == P(None, None)


@pytest.mark.parametrize("names", [None, ("in_features", "out_features")])
def test_a_256_by_4096_weight_is_split_on_the_dim_that_reaches_the_threshold(names):
    strategy, mesh = FSDPStrategy("fsdp", mesh_axis=0, min_weight_size=1024), mesh_of(data=4, model=2)
    weight = array(256, 4096)
    assert strategy.should_shard_weight(weight)
    placed = strategy.apply_sharding(weight, mesh, names)
    assert placed.sharding.spec == P(None, "data")
    assert {shard.data.shape for shard in placed.addressable_shards} == {(256, 1024)}


def test_small_weights_stay_whole():
    strategy, mesh = FSDPStrategy("fsdp", min_weight_size=64), mesh_of(fsdp=4)
    for shape, names in (((60, 32), ("embed", "mlp")), ((60,), ("embed",)), ((), ())):
        assert not strategy.should_shard_weight(array(*shape))
        assert strategy.apply_sharding(array(*shape), mesh).is_fully_replicated
        assert strategy.apply_sharding(array(*shape), mesh, names).is_fully_replicated
    assert strategy.should_shard_weight(array(64))
    assert strategy.apply_sharding(array(8, 64), mesh, ("embed", "mlp")).sharding.spec == P("fsdp", None)


def test_the_largest_dim_that_divides_is_split_without_names():
    strategy, mesh = FSDPStrategy("fsdp", min_weight_size=8), mesh_of(fsdp=4)
    shapes = {(16, 32): P(None, "fsdp"), (32, 16): P("fsdp", None), (16, 30): P("fsdp", None), (9, 30): P(None, None)}
    for shape, spec in shapes.items():
        assert strategy.apply_sharding(array(*shape), mesh).sharding.spec == spec
        assert strategy.get_partition_spec(shape=shape, mesh=mesh) == spec


# Tensor parallelism

KERNELS = {("embed", "heads"): "qkv", ("heads", "embed"): "output", ("embed", "mlp"): "up", ("mlp", "embed"): "down"}


def test_tensor_parallel_kernels_are_column_then_row_parallel():
    assert TENSOR.get_attention_qkv_spec() == TENSOR.get_mlp_up_spec() == P(None, "model")
    assert TENSOR.get_attention_output_spec() == TENSOR.get_mlp_down_spec() == P("model", None)


def test_the_rules_agree_with_the_specs_of_the_layers():
    specs = {
        "qkv": TENSOR.get_attention_qkv_spec(),
        "output": TENSOR.get_attention_output_spec(),
        "up": TENSOR.get_mlp_up_spec(),
        "down": TENSOR.get_mlp_down_spec(),
    }
    assert {names: TENSOR.get_partition_spec(names) for names in KERNELS} == {
        n: specs[layer] for n, layer in KERNELS.items()
    }


@pytest.mark.parametrize("first, second", [("qkv", "output"), ("up", "down")])
def test_a_column_parallel_and_a_row_parallel_layer_need_one_all_reduce(first, second):
    specs = {"qkv": TENSOR.get_attention_qkv_spec, "output": TENSOR.get_attention_output_spec}
    specs |= {"up": TENSOR.get_mlp_up_spec, "down": TENSOR.get_mlp_down_spec}
    mesh = mesh_of(model=4)
    place = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))  # noqa: E731
    operands = place(array(2, 8), P()), place(array(8, 16), specs[first]()), place(array(16, 8), specs[second]())
    program = jax.jit(lambda x, up, down: x @ up @ down, out_shardings=jax.NamedSharding(mesh, P()))
    text = program.lower(*operands).compile().as_text()
    assert text.count(" all-reduce(") == 1 and "all-gather" not in text and "all-to-all" not in text


@pytest.mark.parametrize("dimension, spec", [("out_features", P(None, "model")), ("in_features", P("model", None))])
def test_a_linear_kernel_is_split_on_the_dim_asked_for(dimension, spec):
    strategy = TensorParallelStrategy("model", shard_dimension=dimension)
    assert strategy.get_linear_weight_spec() == spec
    assert strategy.get_partition_spec(("in_features", "out_features")) == spec
    assert strategy.apply_sharding(array(8, 4), mesh_of(data=2, model=4)).sharding.spec == spec


def test_tensor_parallel_activations_follow_the_weights():
    for name in ACTIVATION_AXES:
        split = name in ("act_heads", "act_kv_heads", "act_mlp", "act_vocab", "act_channels")
        assert TENSOR.get_partition_spec(("batch", name)) == (P(None, "model") if split else P(None, None))


def test_tensor_parallelism_asks_for_names_it_cannot_guess():
    with pytest.raises(ValueError, match=r"layer\.bias: .*\(8,\).*names"):
        TENSOR.apply_sharding({"layer": {"bias": array(8)}}, mesh_of(model=4))
    assert TENSOR.apply_sharding(array(8), mesh_of(model=4), ("mlp",)).sharding.spec == P("model")


def test_a_nameless_kernel_that_does_not_divide_is_an_error_and_a_named_one_stays_whole():
    with pytest.raises(ValueError, match=r"dim 1 \(out_features\).*4 devices of mesh axis model.*such as 8"):
        TENSOR.apply_sharding(array(4, 6), mesh_of(model=4))
    placed = TENSOR.apply_sharding(array(6, 4), mesh_of(model=4), ("vocab", "embed"))
    assert placed.is_fully_replicated


# Pipeline parallelism


@pytest.mark.parametrize(
    "layers, stages, assigned",
    [(24, 4, [6, 6, 6, 6]), (10, 4, [3, 3, 2, 2]), (7, 7, [1] * 7), (5, 1, [5]), (11, 3, [4, 4, 3])],
)
def test_layers_are_spread_evenly_over_the_stages(layers, stages, assigned):
    assert (
        PipelineParallelStrategy("pipeline", num_stages=stages).assign_layers_to_stages(num_layers=layers) == assigned
    )


def test_more_stages_than_layers_is_an_error():
    with pytest.raises(ValueError, match="3 layers cannot fill 4 pipeline stages; set num_stages to at most 3"):
        PipelineParallelStrategy("pipeline", num_stages=4).assign_layers_to_stages(3)


def test_stages_pass_activations_on_and_gradients_back():
    strategy = PipelineParallelStrategy("pipeline", num_stages=4)
    assert strategy.get_forward_communication_pattern() == [(0, 1), (1, 2), (2, 3)]
    assert strategy.get_backward_communication_pattern() == [(3, 2), (2, 1), (1, 0)]
    assert PipelineParallelStrategy("pipeline", num_stages=1).get_forward_communication_pattern() == []


def test_stacked_layers_are_split_into_stages():
    mesh = mesh_of(data=2, pipeline=4)
    assert PIPELINE.get_partition_spec(("layers", "embed", "mlp")) == P("pipeline", None, None)
    assert PIPELINE.apply_sharding(array(8, 3), mesh).sharding.spec == P("pipeline", None)
    with pytest.raises(ValueError, match=r"\(layers\).*4 devices"):
        PIPELINE.apply_sharding(array(6, 3), mesh)


def test_stages_are_as_many_as_their_mesh_axis_has_devices():
    assert PIPELINE.on({"pipeline": 4}).assign_layers_to_stages(24) == [6, 6, 6, 6]
    with pytest.raises(ValueError, match="num_stages is 2, but mesh axis 'pipeline' has 4 devices"):
        PipelineParallelStrategy("pipeline", num_stages=2).apply_sharding(array(8), mesh_of(pipeline=4))
    with pytest.raises(ValueError, match="num_stages is not set"):
        PIPELINE.assign_layers_to_stages(24)


# Specs in general


@pytest.mark.parametrize("strategy", [DATA, FSDP, TENSOR, PIPELINE], ids=lambda s: type(s).__name__)
def test_arrays_are_placed_by_the_spec_and_keep_their_values(strategy):
    mesh = mesh_of(**{strategy.axis_name: 4})
    for names in itertools.permutations(WEIGHT_AXES, 2):
        if not {"layers", "embed", "mlp"} & set(names):
            continue
        placed = strategy.apply_sharding(array(8, 12), mesh, names)
        assert placed.sharding.spec == strategy.get_partition_spec(names, (8, 12), mesh)
        assert placed.sharding.spec == strategy.get_partition_spec(names)
        np.testing.assert_array_equal(placed, array(8, 12))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"names": ("batch", "embedd")}, "'embedd'.*did you mean 'embed'"),
        ({"names": ("batch", "embed")}, "mix names of weights"),
        ({"names": ("batch",), "shape": (8, 8), "mesh": {"data": 2}}, "2 dims but 1 logical axes"),
        ({"names": ("batch",), "shape": (8,)}, "shape and mesh together"),
        ({"mesh": {"data": 2}}, "shape and mesh together"),
        ({}, "shape and mesh together"),
    ],
)
def test_a_spec_that_cannot_be_told_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        DATA.get_partition_spec(**arguments)


def test_a_dim_without_a_name_is_never_split():
    for strategy in (DATA, FSDP, TENSOR, PIPELINE):
        assert strategy.get_partition_spec((None, None)) == P(None, None)


def test_an_axis_of_one_device_splits_nothing():
    assert DATA.get_partition_spec(("batch",), (3,), {"data": 1}) == P(None)
