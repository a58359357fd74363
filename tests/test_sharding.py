"""Strategies combine by the union of their tables; conflicts are errors that name both sides."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from artifex.scaling.axes import ACTIVATION_AXES, WEIGHT_AXES, Rules, resolve
from artifex.scaling.mesh_utils import DeviceMeshManager, create_device_mesh
from artifex.scaling.sharding import (
    DataParallelStrategy,
    FSDPStrategy,
    MultiDimensionalStrategy,
    ParallelismConfig,
    PipelineParallelStrategy,
    ShardingConfig,
    TensorParallelStrategy,
    ZeROStrategy,
    combine,
    strategies_for,
)
from artifex.scaling.strategies import partition_spec

DATA, FSDP = DataParallelStrategy("data"), FSDPStrategy("fsdp", min_weight_size=0)
TENSOR, PIPELINE = TensorParallelStrategy("model"), PipelineParallelStrategy("pipeline")


def array(*shape):
    return jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape)


def configuration(**sizes):
    return ParallelismConfig.from_sharding_config(ShardingConfig(**sizes))


# Strategies together


def spec_of(rules, *names):
    """Of a tensor of 16 in every dim, on a mesh of two devices on every axis."""
    return partition_spec(rules, names, (16,) * len(names), dict.fromkeys(rules.mesh_axes, 2))


def test_each_mesh_axis_is_named_after_its_strategy():
    strategies = strategies_for(("data", "fsdp", "tensor", "pipeline"), fsdp_min_weight_size=64)
    assert {axis: type(strategy) for axis, strategy in strategies.items()} == {
        "data": DataParallelStrategy,
        "fsdp": FSDPStrategy,
        "tensor": TensorParallelStrategy,
        "pipeline": PipelineParallelStrategy,
    }
    assert all(strategy.axis_name == axis for axis, strategy in strategies.items())
    assert combine(strategies).min_weight_size == (("fsdp", 64),)
    assert isinstance(strategies_for(("data", "model"))["model"], TensorParallelStrategy)


@pytest.mark.parametrize(
    "axes, least, message",
    [
        (("data", "modle"), 0, "'modle'.*known are pipeline, data"),
        (("data", "model"), 64, "no effect.*'data', 'model'"),
    ],
)
def test_axes_named_after_no_strategy_and_settings_without_effect_are_errors(axes, least, message):
    with pytest.raises(ValueError, match=message):
        strategies_for(axes, fsdp_min_weight_size=least)


def test_fsdp_takes_the_weight_dims_that_tensor_parallelism_leaves():
    rules = combine(strategies_for(("data", "fsdp", "tensor")))
    assert spec_of(rules, "embed", "heads", "head_dim") == P("fsdp", "tensor", None)
    assert spec_of(rules, "mlp", "embed") == P("tensor", "fsdp")
    assert spec_of(rules, "vocab", "embed") == P("tensor", "fsdp")
    assert spec_of(rules, "in_features", "out_features") == P("fsdp", "tensor")
    assert spec_of(rules, "layers", "embed") == P(None, "fsdp")
    assert spec_of(rules, "batch", "sequence", "act_mlp") == P(("data", "fsdp"), None, "tensor")
    rows = combine({"fsdp": FSDP, "tensor": TensorParallelStrategy("tensor", shard_dimension="in_features")})
    assert spec_of(rows, "in_features", "out_features") == P("tensor", "fsdp")


def test_the_order_of_strategies_does_not_change_weight_specs():
    strategies = strategies_for(("data", "fsdp", "tensor", "pipeline"))
    specs = set()
    for order in itertools.permutations(strategies):
        rules = combine({axis: strategies[axis] for axis in order})
        specs.add(
            tuple(spec_of(rules, "layers", *names) for names in itertools.permutations(("embed", "mlp", "vocab"), 2))
        )
    assert len(specs) == 1


@pytest.mark.parametrize(
    "strategies, message",
    [
        ({"dp": DATA, "tp": TensorParallelStrategy("data")}, "'dp' and 'tp' both split over mesh axis 'data'"),
        ({"zero": FSDPStrategy("model"), "tp": TENSOR}, "'zero' and 'tp' both split over mesh axis 'model'"),
        ({"pp": PipelineParallelStrategy("data"), "dp": DATA}, "'pp' and 'dp' both split over mesh axis 'data'"),
        ({"a": TENSOR, "b": TensorParallelStrategy("tensor")}, "'a' maps 'vocab' to .*'model'.* 'b' to .*'tensor'"),
    ],
)
def test_conflicts_name_both_strategies(strategies, message):
    with pytest.raises(ValueError, match=message):
        combine(strategies)


def test_data_parallelism_and_fsdp_share_one_axis_or_have_two():
    one = combine({"data": DATA, "fsdp": FSDPStrategy("data")})
    assert spec_of(one, "batch", "hidden") == P("data", None)
    assert one.mesh_axes == ("data",)
    two = combine({"data": DATA, "fsdp": FSDP})
    assert spec_of(two, "batch", "hidden") == P(("data", "fsdp"), None)
    assert set(two.mesh_axes) == {"data", "fsdp"}


# Configurations


@pytest.mark.parametrize("count", [*range(1, 101), 1024, 99_991, 100_000])
def test_a_device_count_is_used_to_the_last_device(count):
    config = ShardingConfig.from_device_count(count)
    assert config.get_total_device_count() == count
    assert config.tensor_parallel_size <= 4
    assert ParallelismConfig.from_sharding_config(config).is_valid()


@pytest.mark.parametrize(
    "count, sizes", [(1, (1, 1)), (4, (4, 1)), (7, (7, 1)), (8, (2, 4)), (10, (5, 2)), (100, (25, 4))]
)
def test_device_counts_of_known_sizes(count, sizes):
    config = ShardingConfig.from_device_count(device_count=count)
    assert (config.data_parallel_size, config.tensor_parallel_size) == sizes


@pytest.mark.parametrize(
    "settings",
    [
        {"data_parallel_size": 0},
        {"tensor_parallel_size": -2},
        {"context_parallel_size": 0},
        {"zero_stage": 3},
        {"zero_stage": 1},
        {"pipeline_parallel_size": 2.0},
        {"data_parallel_size": True},
        {"fsdp_min_weight_size": -1},
        {"fsdp_enabled": "yes"},
        {"fsdp_enabled": True, "tensor_parallel_size": 4},
    ],
)
def test_a_sharding_configuration_that_means_nothing_cannot_be_made(settings):
    with pytest.raises((TypeError, ValueError), match=next(iter(settings))):
        ShardingConfig(**settings)


def test_a_size_of_minus_one_takes_the_rest():
    config = ShardingConfig(data_parallel_size=-1, tensor_parallel_size=2, context_parallel_size=3)
    assert config.filled(24).get_total_device_count() == 24
    assert ParallelismConfig.from_sharding_config(config, 24).axis_sizes == {"data": 4, "context": 3, "model": 2}
    assert ParallelismConfig.from_sharding_config(ShardingConfig(data_parallel_size=-1)).axis_sizes == {"data": 8}
    with pytest.raises(ValueError, match="the product 6, which does not divide the 8 devices"):
        config.filled(8)
    with pytest.raises(ValueError, match=r"say of how many: config.filled"):
        config.get_total_device_count()
    with pytest.raises(ValueError, match="data_parallel_size and expert_parallel_size are -1; only one"):
        ShardingConfig(data_parallel_size=-1, expert_parallel_size=-1)


@pytest.mark.parametrize(
    "sizes, mesh",
    [
        ((2, 1, 1, False, 0, 2, 2), {"data": 2, "expert": 2, "context": 2}),
        ((4, 2, 1), {"data": 4, "model": 2}),
        ((1, 4, 1), {"model": 4}),
        ((2, 1, 4), {"data": 2, "pipeline": 4}),
        ((2, 3, 4), {"data": 2, "model": 3, "pipeline": 4}),
        ((1, 1, 1), {"data": 1}),
    ],
)
def test_each_size_above_one_is_a_mesh_axis(sizes, mesh):
    config = ShardingConfig(*sizes)
    parallel = ParallelismConfig.from_sharding_config(config)
    assert dict(zip(parallel.mesh_axis_names, parallel.mesh_shape, strict=True)) == parallel.axis_sizes == mesh
    assert parallel.is_valid() and math.prod(parallel.mesh_shape) == config.get_total_device_count()


FSDP_8 = ShardingConfig(data_parallel_size=4, tensor_parallel_size=2, fsdp_enabled=True)


@pytest.mark.parametrize(
    "shape, names, config, valid",
    [
        ((2, 4), ("data", "model"), ShardingConfig(2, 4), True),
        ((2, 4), ("x", "y"), ShardingConfig(4, 2), True),  # own names: the product is all there is to check
        ((2, 2, 2), ("data", "fsdp", "model"), FSDP_8, True),
        ((4, 2), ("data", "model"), ShardingConfig(2, 4), False),
        ((2, 2), ("data", "model"), ShardingConfig(2, 4), False),
        ((2, 4), ("data",), ShardingConfig(2, 4), False),
        ((2, 4), ("data", "data"), ShardingConfig(2, 4), False),
        ((-2, -4), ("data", "model"), ShardingConfig(2, 4), False),
        ((2.0, 4), ("data", "model"), ShardingConfig(2, 4), False),
        ((), (), ShardingConfig(), False),
        ((4, 2), ("fsdp", "model"), ShardingConfig(4, 2), False),  # an fsdp axis with fsdp_enabled off
    ],
)
def test_a_configuration_is_valid_where_mesh_and_sizes_agree(shape, names, config, valid):
    parallel = ParallelismConfig(shape, names, config)
    assert parallel.is_valid() is valid
    if not valid:
        with pytest.raises((TypeError, ValueError)):
            parallel.strategies()


def test_fsdp_takes_effect_on_the_data_axis():
    config = configuration(data_parallel_size=4, tensor_parallel_size=2, fsdp_enabled=True, fsdp_min_weight_size=512)
    assert spec_of(config.rules, "embed", "mlp") == P(None, "model")  # 16 is below 512
    loose = configuration(data_parallel_size=4, tensor_parallel_size=2, fsdp_enabled=True, fsdp_min_weight_size=16)
    assert spec_of(loose.rules, "embed", "mlp") == P("data", "model")
    without = configuration(data_parallel_size=4, tensor_parallel_size=2)
    assert spec_of(without.rules, "embed", "mlp") == P(None, "model")


def test_fsdp_can_have_an_axis_of_its_own():
    config = ParallelismConfig(
        (2, 2, 2), ("data", "fsdp", "model"), dataclasses.replace(FSDP_8, fsdp_min_weight_size=0)
    )
    assert spec_of(config.rules, "embed", "mlp") == P("fsdp", "model")
    assert spec_of(config.rules, "batch", "act_mlp") == P(("data", "fsdp"), "model")


# What the data-parallel devices divide


@pytest.mark.parametrize(
    "stage, params, gradients, optimizer",
    [(0, None, None, None), (1, None, None, "data"), (2, None, "data", "data"), (3, "data", "data", "data")],
)
def test_each_stage_of_zero_divides_one_thing_more(stage, params, gradients, optimizer):
    zero = {0: DataParallelStrategy("data"), 3: FSDPStrategy("data", min_weight_size=0)}
    rules = combine({"data": zero.get(stage) or ZeROStrategy("data", stage=stage)})
    for table, axis in ((rules.params, params), (rules.gradients, gradients), (rules.optimizer, optimizer)):
        assert resolve(("embed", "mlp"), (16, 16), table, {"data": 8}).spec == P(axis, None)
    assert resolve(("batch",), (16,), rules.activations, {"data": 8}).spec == P("data")


def test_hybrid_parallelism_repeats_weights_across_the_slow_axis_and_zero_divides_the_rest_over_both():
    rules = combine(strategies_for(("data", "fsdp", "tensor"), zero=1))
    sizes = {"data": 2, "fsdp": 4, "tensor": 2}
    of = lambda table: resolve(("embed", "mlp"), (64, 64), table, sizes).spec  # noqa: E731
    assert of(rules.params) == of(rules.gradients) == P("fsdp", "tensor")
    assert of(rules.optimizer) == P(("fsdp", "data"), "tensor")


def test_every_axis_but_data_divides_the_weights_that_its_devices_would_repeat():
    rules = combine(strategies_for(("pipeline", "data", "fsdp", "expert", "context", "tensor")))
    sizes = dict.fromkeys(("pipeline", "data", "fsdp", "expert", "context", "tensor"), 2)
    of = lambda *names: resolve(names, (64,) * len(names), rules.params, sizes).spec  # noqa: E731
    assert of("vocab", "embed") == P("tensor", ("fsdp", "context", "expert", "pipeline"))
    assert of("layers", "embed", "mlp") == P("pipeline", ("fsdp", "context", "expert"), "tensor")
    assert of("layers", "experts", "embed", "expert_mlp") == P("pipeline", "expert", ("fsdp", "context"), "tensor")
    # as far as a dim divides
    assert resolve(("layers", "embed"), (3, 4), rules.params, sizes).spec == P(None, ("fsdp", "context"))


def test_positions_are_split_where_nothing_else_is():
    rules = combine(strategies_for(("context", "tensor"), sequence_parallel=True))
    sizes = {"context": 2, "tensor": 4}
    of = lambda *names: resolve(names, (16,) * len(names), rules.activations, sizes).spec  # noqa: E731
    assert of("batch", "sequence", "hidden") == P(None, ("context", "tensor"), None)
    assert of("batch", "sequence", "act_mlp") == P(None, "context", "tensor")


# The multi-dimensional strategy


def multi(strategies=None, **settings):
    settings = {
        "data_parallel_size": 4,
        "tensor_parallel_size": 2,
        "fsdp_enabled": True,
        "fsdp_min_weight_size": 0,
    } | settings
    named = {"data": DATA, "tensor": TENSOR, "fsdp": FSDPStrategy("data", min_weight_size=0)}
    return MultiDimensionalStrategy(strategies=strategies or named, config=configuration(**settings))


def axes_in(spec):
    return [axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]


def test_a_combined_spec_never_uses_a_mesh_axis_twice():
    strategy = multi()
    for known in (WEIGHT_AXES, ACTIVATION_AXES):
        for names in itertools.permutations(known, 3):
            used = axes_in(strategy.get_combined_partition_spec("tensor", names))
            assert len(used) == len(set(used)), names


def test_combined_specs_of_known_tensors():
    strategy = multi()
    expected = {
        ("batch", "sequence", "hidden"): P("data", None, None),
        ("hidden", "batch"): P(None, "data"),
        ("batch", "sequence", "act_mlp"): P("data", None, "model"),
        ("embed", "heads", "head_dim"): P("data", "model", None),
        ("mlp", "embed"): P("model", "data"),
    }
    assert {names: strategy.get_combined_partition_spec("t", names) for names in expected} == expected


def test_a_combined_spec_of_known_sizes_is_what_fits():
    spec = multi(fsdp_min_weight_size=0).get_combined_partition_spec
    assert spec("head", ("embed", "vocab"), (12, 50_257)) == P("data", None)
    assert spec("head", ("embed", "vocab"), (10, 50_256)) == P(None, "model")
    with pytest.raises(ValueError, match=r"tokens: dim 0 \(batch\).*such as 8"):
        spec("tokens", ("batch", "sequence"), (6, 3))
    with pytest.raises(ValueError, match=r"tokens: .*'bach'.*did you mean 'batch'"):
        spec("tokens", ("bach", "sequence"))


def test_combined_placement_is_the_combined_spec_and_keeps_values():
    strategy = multi()
    mesh = DeviceMeshManager().create_mesh_from_config(strategy.config)
    weights, names = {"up": array(8, 6), "scale": array(7)}, {"up": ("embed", "mlp"), "scale": ("embed",)}
    placed = strategy.apply_sharding(weights, mesh, names)
    assert placed["up"].sharding.spec == P("data", "model") and placed["up"].addressable_shards[0].data.shape == (2, 3)
    assert placed["scale"].is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, placed, weights)
    with pytest.raises(ValueError, match="create_mesh_from_config"):
        strategy.apply_sharding(weights, create_device_mesh((2, 4), ("data", "model")), names)


@pytest.mark.parametrize(
    "strategies, settings, message",
    [
        ({"dp": DATA, "tp": TensorParallelStrategy("data")}, {"fsdp_enabled": False}, "'dp' and 'tp' both split"),
        ({"data": DATA, "pipe": PIPELINE}, {}, "'pipe' splits over mesh axis 'pipeline'.*'data', 'model'"),
        ({"data": DATA, "tensor": TENSOR}, {}, r"fsdp_enabled, but none .*\('data', 'tensor'\)"),
        ({"data": DATA}, {"fsdp_enabled": False}, "no strategy splits over mesh axis 'model': its 2 devices"),
        ({"fsdp": FSDPStrategy("data", min_weight_size=8), "tensor": TENSOR}, {}, "min_weight_size 8.*size 0"),
        (
            {"data": DATA, "tensor": TENSOR, "pipe": PipelineParallelStrategy("pipeline", num_stages=3)},
            {"fsdp_enabled": False, "pipeline_parallel_size": 2},
            "num_stages is 3, but mesh axis 'pipeline' has 2",
        ),
    ],
)
def test_strategies_and_configuration_must_agree(strategies, settings, message):
    with pytest.raises(ValueError, match=message):
        multi(strategies, **settings)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 2, 4), (1, 1, 1)])
def test_the_strategies_of_a_configuration_are_its_multi_dimensional_strategy(sizes):
    config = ParallelismConfig.from_sharding_config(ShardingConfig(*sizes))
    strategy = MultiDimensionalStrategy(config.strategies(), config)
    assert isinstance(strategy.rules, Rules) and strategy.rules == config.rules
    assert set(strategy.rules.mesh_axes) == set(config.mesh_axis_names)
