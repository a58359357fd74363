"""Meshes use every device, have the shape that was asked for, and refuse what cannot be one."""

import itertools
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from artifex.scaling import mesh_utils
from artifex.scaling.mesh_utils import (
    SIZE_AXES,
    DeviceMeshManager,
    create_device_mesh,
    get_optimal_mesh_shape,
    mesh_layout,
    setup_mesh,
)
from artifex.scaling.sharding import ParallelismConfig, ShardingConfig

NOT_INTEGERS = [(2.0, 4), (2, "4"), "24", 8, (True, 8), (None, 8), {2, 4}, np.array([2, 4])]


def device(**settings):
    """A configuration's `device` section, as `mesh_layout` reads it."""
    return SimpleNamespace(**({"mesh_shape": None, "auto_detect_mesh": True} | dict.fromkeys(SIZE_AXES, 1) | settings))


@pytest.fixture
def devices(monkeypatch):
    """Pretend that the machine has only so many devices."""
    everything = jax.devices()
    return lambda count: monkeypatch.setattr(jax, "devices", lambda: everything[:count])


@pytest.mark.parametrize("shape", [(8,), [2, 4], (2, 2, 2), (1, 2, 1, 4), (np.int64(4), 2)], ids=str)
def test_a_mesh_has_the_shape_asked_for_and_every_device_once(shape):
    mesh = create_device_mesh(shape, tuple("abcd")[: len(shape)])
    assert mesh.devices.shape == tuple(shape)
    assert {d.id for d in mesh.devices.flat} == {d.id for d in jax.devices()}
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_a_mesh_can_be_made_of_some_devices():
    some = jax.devices()[2:5]
    assert set(create_device_mesh((3,), ("data",), some).devices.flat) == set(some)


@pytest.mark.parametrize("count, shape", [(4, (2, 4)), (8, (3, 3)), (1, (2,)), (0, (1,))])
def test_a_product_other_than_the_device_count_is_an_error(count, shape):
    with pytest.raises(ValueError) as error:
        create_device_mesh(shape, tuple("abcd")[: len(shape)], jax.devices()[:count])
    assert str(error.value) == f"Number of devices {count} must equal the product of mesh_shape {shape}"


@pytest.mark.parametrize("shape", NOT_INTEGERS, ids=str)
@pytest.mark.parametrize("make", [lambda s: create_device_mesh(s, ("data", "model")), setup_mesh])
def test_a_shape_of_anything_but_integers_is_a_type_error(make, shape):
    with pytest.raises(TypeError) as error:
        make(shape)
    assert str(error.value) == "mesh_shape must be a tuple of integers"


@pytest.mark.parametrize("shape", [(0, 8), (-2, -4), ()], ids=str)
def test_axes_without_devices_are_an_error(shape):
    with pytest.raises(ValueError, match="at least one"):
        create_device_mesh(shape, tuple("abcd")[: len(shape)])


@pytest.mark.parametrize(
    "names, error",
    [
        (("data",), ValueError),
        (("a", "b", "c"), ValueError),
        (("data", "data"), ValueError),
        (("data", 1), TypeError),
        (("data", ""), TypeError),
        ("ab", TypeError),
        (None, TypeError),
    ],
)
def test_each_axis_needs_a_name_of_its_own(names, error):
    with pytest.raises(error, match="axis_names"):
        create_device_mesh((2, 4), names)


# The most balanced shape


def factorisations(n, parts):
    """Every ascending way to write `n` as a product of `parts` factors, by trying all factors."""
    if parts == 0:
        return [()] if n == 1 else []
    smaller = [(*rest, f) for f in range(1, n + 1) if n % f == 0 for rest in factorisations(n // f, parts - 1)]
    return [shape for shape in smaller if list(shape) == sorted(shape)]


def imbalance(shape):
    """Largest, then negative smallest, then the same of what lies between."""
    return (shape[-1], -shape[0], *imbalance(shape[1:-1])) if len(shape) > 1 else shape


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_the_optimal_shape_is_the_most_balanced_of_all_factorisations(rank):
    for n in range(1, 201):
        assert get_optimal_mesh_shape(n, rank) == min(factorisations(n, rank), key=imbalance), n


@pytest.mark.parametrize(
    "count, rank, shape",
    [
        (8, 2, (2, 4)),
        (16, 2, (4, 4)),
        (8, 4, (1, 2, 2, 2)),
        (7, 2, (1, 7)),
        (12, 3, (2, 2, 3)),
        (100_000, 2, (250, 400)),
        (99_991, 3, (1, 1, 99_991)),
        (2**20, 5, (16,) * 5),
        (10**12, 3, (10_000,) * 3),
    ],
)
def test_the_optimal_shape_of_known_counts(count, rank, shape):
    assert get_optimal_mesh_shape(count, rank) == shape
    assert DeviceMeshManager().get_optimal_mesh_shape(device_count=count, dimensions=rank) == shape


def test_the_optimal_shape_of_a_number_with_many_divisors_uses_all_devices():
    for rank in range(1, 9):
        shape = get_optimal_mesh_shape(735_134_400, rank)  # 1,344 divisors, the most below a thousand million
        assert math.prod(shape) == 735_134_400 and len(shape) == rank and list(shape) == sorted(shape)


@pytest.mark.parametrize("count, rank, error", [(0, 2, ValueError), (8, 0, ValueError), (8.0, 2, TypeError)])
def test_counts_below_one_have_no_optimal_shape(count, rank, error):
    with pytest.raises(error):
        get_optimal_mesh_shape(count, rank)


# Shapes for transformers

SIZES = ["125M", "350m", "1.5B", "7B", "13b", "30B", "70b", "180B", "1T", 10**13]
LENGTHS = [1, 512, 2048, 4096, 32_768, 131_072, 10**6]
COUNTS = [*range(1, 65), 96, 100, 128, 1000, 1024, 65_536, 99_991, 100_000]


@pytest.mark.parametrize(
    "count, size, length, shape",
    [
        (8, "7B", 2048, (4, 2)),  # 112 GB of weights, gradients and moments on devices of 80 GB
        (32, "70B", 4096, (4, 8)),  # 1,120 GB: as many as a node has
        (8, "125M", 2048, (8, 1)),
        (1, "70B", 2048, (1, 1)),
        (7, "70B", 2048, (1, 7)),
        (11, "70B", 2048, (11, 1)),  # a prime above the node: only data parallelism uses all
    ],
)
def test_transformer_shapes_of_known_models(count, size, length, shape):
    manager = DeviceMeshManager()
    assert manager.optimize_for_transformer(device_count=count, model_size=size, sequence_length=length) == shape


@pytest.mark.parametrize("size, length", [("125M", 128), ("7B", 2048), ("1T", 8192)])
def test_transformer_shapes_use_all_devices_and_stay_in_a_node(size, length):
    for count in [*range(1, 2001), 4096, 9999, 65_536, 99_991, 100_000]:
        data, tensor = DeviceMeshManager().optimize_for_transformer(count, size, length)
        assert data * tensor == count and 1 <= tensor <= 8


@pytest.mark.parametrize("count", COUNTS)
def test_larger_models_and_longer_sequences_never_get_less_tensor_parallelism(count):
    choose = DeviceMeshManager().optimize_for_transformer
    table = np.array([[choose(count, size, length)[1] for length in LENGTHS] for size in SIZES])
    assert (np.diff(table, axis=0) >= 0).all() and (np.diff(table, axis=1) >= 0).all()


def test_the_sequence_length_counts():
    choose = DeviceMeshManager().optimize_for_transformer
    assert choose(8, "1.5B", sequence_length=1_000_000)[1] > choose(8, "1.5B", sequence_length=1024)[1]


def test_tensor_parallelism_leaves_the_node_only_when_told():
    choose = DeviceMeshManager().optimize_for_transformer
    assert choose(64, "1T")[1] == 8
    assert choose(64, "1T", max_tensor_parallel=64)[1] == 64
    assert choose(64, "1T", max_tensor_parallel=2)[1] == 2


def test_a_model_size_can_be_a_number_of_parameters():
    choose = DeviceMeshManager().optimize_for_transformer
    assert choose(64, 7_000_000_000) == choose(64, "7B") == choose(64, " 7.0 b ")


@pytest.mark.parametrize("size", ["", "7", "B", "-7B", "7Q", "7,5B", "0B", "nan", "1e9", 0, -1])
def test_a_model_size_that_cannot_be_read_is_an_error(size):
    with pytest.raises(ValueError, match="model_size"):
        DeviceMeshManager().optimize_for_transformer(8, size)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_size": 7e9},
        {"model_size": None},
        {"model_size": True},
        {"sequence_length": 2048.0},
        {"sequence_length": 0},
        {"device_count": 0},
        {"max_tensor_parallel": 0},
    ],
)
def test_sizes_that_are_not_positive_integers_are_errors(settings):
    with pytest.raises((TypeError, ValueError), match=next(iter(settings))):
        DeviceMeshManager().optimize_for_transformer(**({"device_count": 8} | settings))


# Validation


def test_a_valid_shape_is_valid_for_its_product_alone():
    validate = DeviceMeshManager().validate_mesh_config
    for shape in itertools.product((1, 2, 3, 4), repeat=3):
        assert [n for n in range(70) if validate(shape, n)] == [math.prod(shape)]
    assert validate(mesh_shape=[4, 2], device_count=8)


@pytest.mark.parametrize("shape", [*NOT_INTEGERS, (0, 8), (-2, -4), ()], ids=str)
def test_what_is_no_mesh_is_not_valid(shape):
    assert not any(DeviceMeshManager().validate_mesh_config(shape, n) for n in (0, 1, 8))


@pytest.mark.parametrize("count", [0, -8, 8.0, "8", None])
def test_nothing_is_valid_for_what_is_no_device_count(count):
    assert not DeviceMeshManager().validate_mesh_config((4, 2), count)


# The manager


def test_a_manager_builds_its_own_shape():
    mesh = DeviceMeshManager((4, 2), ("data", "model")).create_mesh()
    assert dict(mesh.shape) == {"data": 4, "model": 2}


def test_a_manager_without_a_shape_says_so():
    with pytest.raises(ValueError, match="create_mesh_from_config"):
        DeviceMeshManager().create_mesh()


def test_a_manager_builds_a_configuration_on_its_devices():
    config = ParallelismConfig.from_sharding_config(ShardingConfig(data_parallel_size=3))
    mesh = DeviceMeshManager(devices=jax.devices()[5:]).create_mesh_from_config(config)
    assert [d.id for d in mesh.devices.flat] == [5, 6, 7]


def test_a_manager_refuses_a_configuration_of_another_shape():
    config = ParallelismConfig.from_sharding_config(ShardingConfig(2, 4))
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(4, 2\)"):
        DeviceMeshManager((4, 2), ("data", "model")).create_mesh_from_config(config)


def test_a_manager_refuses_a_configuration_that_is_not_valid():
    config = ParallelismConfig((2, 2), ("data", "model"), ShardingConfig(2, 4))
    with pytest.raises(ValueError, match="4 devices"):
        DeviceMeshManager().create_mesh_from_config(config)


@pytest.mark.parametrize(
    "shape, names, error",
    [((2, 4), None, ValueError), (None, ("a",), ValueError), ((2, 0), ("a", "b"), ValueError), ("24", "ab", TypeError)],
)
def test_a_manager_of_no_mesh_cannot_be_made(shape, names, error):
    with pytest.raises(error):
        DeviceMeshManager(shape, names)


# The mesh of a run


def test_an_explicit_shape_goes_before_the_configuration_and_that_before_detection():
    configured = device(mesh_shape=(4, 2))
    assert dict(setup_mesh((2, 4), configured).shape) == {"data": 2, "model": 4}
    assert dict(setup_mesh(device_config=configured).shape) == {"data": 4, "model": 2}
    assert dict(setup_mesh().shape) == dict(setup_mesh(device_config=device()).shape) == {"data": 8, "model": 1}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7, 8])
def test_detection_uses_every_device_for_the_batch(devices, count):
    devices(count)
    assert setup_mesh().devices.shape == (count, 1)


@pytest.mark.parametrize(
    "count, sizes, layout",
    [
        (8, {"data": 2, "fsdp": 2, "tensor": 2}, ((2, 2, 2), ("data", "fsdp", "tensor"))),
        (8, {"data": -1, "tensor": 4}, ((2, 4), ("data", "tensor"))),
        (8, {"fsdp": -1}, ((8,), ("fsdp",))),
        (8, {"data": 8, "fsdp": -1}, ((8, 1), ("data", "fsdp"))),
        (1, {"data": -1}, ((1,), ("data",))),
        (100_000, {"data": 4, "fsdp": -1, "tensor": 8}, ((4, 3125, 8), ("data", "fsdp", "tensor"))),
        (6, {}, ((6, 1), ("data", "model"))),
    ],
)
def test_each_size_that_is_not_one_is_a_mesh_axis(count, sizes, layout):
    assert mesh_layout(device(**sizes), count) == layout


@pytest.mark.parametrize(
    "count, sizes, message",
    [
        (8, {"data": 2, "tensor": 2}, "data=2, tensor=2 multiply to 4, .* 8 devices; set data=4 or data=-1"),
        (8, {"fsdp": 2, "tensor": 2}, "fsdp=2, tensor=2 multiply to 4, .* 8 devices; set data=2 or data=-1"),
        (8, {"data": 4, "tensor": 3}, "multiply to 12, .* 8 devices; set tensor=2 or tensor=-1"),
        (8, {"data": 16}, "multiply to 16, .* set data=8 or data=-1"),
        (8, {"tensor": 3}, "multiply to 3, .* set tensor=2 and data=-1, or tensor=-1"),
        (8, {"data": -1, "tensor": 3}, "product 3, which does not divide the 8 devices; set tensor=8"),
        (7, {"data": 2, "fsdp": 2, "tensor": 2}, "choose sizes whose product is 7"),
        (8, {"data": -1, "fsdp": -1}, "only one axis can take the rest; give data or fsdp a size"),
        (8, {"data": 0}, "at least 1"),
        (8, {"tensor": -2}, "at least 1"),
    ],
)
def test_sizes_that_do_not_use_every_device_are_an_error_with_a_remedy(count, sizes, message):
    with pytest.raises(ValueError, match=message):
        mesh_layout(device(**sizes), count)


def test_without_detection_something_must_be_given():
    with pytest.raises(ValueError, match=r"auto_detect_mesh is false.*mesh_shape.*\(8, 1\)"):
        setup_mesh(device_config=device(auto_detect_mesh=False))
    assert setup_mesh(device_config=device(auto_detect_mesh=False, fsdp=8)).axis_names == ("fsdp",)
    assert setup_mesh((8, 1), device(auto_detect_mesh=False)).axis_names == ("data", "model")


@pytest.mark.parametrize("shape", [(8,), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("make", [setup_mesh, lambda shape: setup_mesh(device_config=device(mesh_shape=shape))])
def test_the_shape_of_a_run_is_two_dimensional(make, shape):
    with pytest.raises(ValueError, match=r"\(batch, model\).*create_device_mesh"):
        make(shape)


def test_the_shape_of_a_run_must_use_every_device(devices):
    devices(4)
    with pytest.raises(ValueError) as error:
        setup_mesh((2, 4))
    assert str(error.value) == "Number of devices 4 must equal the product of mesh_shape (2, 4)"
    assert setup_mesh([2, 2]).devices.shape == (2, 2)


class Chip:
    """What JAX's routines ask of a device that is not there."""

    def __init__(self, id, process, platform="gpu"):
        self.id, self.process_index, self.platform, self.device_kind = id, process, platform, platform


@pytest.mark.parametrize(
    ("shape", "machines", "inside"),
    [
        ((4, 4), 4, [True, True, True, True]),  # the first axis across the machines, the last inside
        ((2, 2, 4), 4, [True] * 4),
        ((8, 2), 4, [True] * 8),
        ((2, 8), 4, [False, False]),  # the last axis is wider than a machine
        ((16,), 4, [False]),
    ],
)
def test_the_first_axes_go_across_machines_and_the_last_stay_inside_one(shape, machines, inside):
    count = math.prod(shape)
    chips = [Chip(n, n % machines) for n in range(count)]  # in an order that is none of the mesh's
    grid = mesh_utils._grid(shape, chips)
    assert grid.shape == shape and {chip.id for chip in grid.flat} == set(range(count))
    rows = grid.reshape(-1, shape[-1])
    assert [len({chip.process_index for chip in row}) == 1 for row in rows] == inside
