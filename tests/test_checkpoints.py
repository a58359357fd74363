"""Checkpoints: bit-equal under any layout, kept whole or refused with the reason."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import tensorstore
import xxhash
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from artifex.scaling.checkpoints import CheckpointError, Checkpoints

RNG = np.random.default_rng(0)
BITS = RNG.integers(0, 2**32, (16, 8), np.uint32)
BITS[2, :6] = 0x7F800001, 0xFFC00000, 0x7F800000, 0xFF800000, 0x00000001, 0x80000000  # NaNs, infinities, 1e-45, -0.0
VALUES = {
    "params": {
        "layers": {
            "kernel": BITS.view(np.float32),
            "bias": RNG.integers(0, 2**16, (8,), np.uint16).view(ml_dtypes.bfloat16),
        },
        "head": RNG.integers(0, 2**16, (8, 16), np.uint16).view(np.float16),
        "large": RNG.standard_normal((512, 1024), np.float32),  # those who hold a copy share the writing of it
    },
    "optimizer": {"0": {"count": np.array(-7, np.int32), "mask": BITS[0] % 2 == 0}},
    "rng": BITS[1, :2],
    "scale": np.array(0.1, np.float32),
}
SPECS = {  # FSDP over the first mesh axis, tensor parallelism over the last
    "kernel": ("first", "last"),
    "head": ("last", "first"),
    "mask": (("first", "last"),),
}
MESHES = {"4x2": (4, 2), "8": (8,), "2x2": (2, 2), "1": (1,)}


def mesh_of(shape: tuple[int, ...]) -> jax.sharding.Mesh:
    names = ("first", "last")[: len(shape)]
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def layouts(shape: tuple[int, ...], transposed: bool = False) -> dict:
    """A sharding for each of VALUES; `transposed` splits other dims."""
    mesh = mesh_of(shape)

    def layout(path, _):
        entries = [(entry,) if isinstance(entry, str) else entry for entry in SPECS.get(path[-1].key, ())]
        spec = [tuple(axis for axis in entry if axis in mesh.axis_names) for entry in entries]
        return NamedSharding(mesh, PartitionSpec(*(reversed(spec) if transposed else spec)))

    return jax.tree.map_with_path(layout, VALUES)


def placed() -> dict:
    return jax.tree.map(jax.device_put, VALUES, layouts((4, 2)))


def asked(shape: tuple[int, ...] = (1,), transposed: bool = False) -> dict:
    return jax.tree.map(
        lambda value, sharding: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding),
        VALUES,
        layouts(shape, transposed),
    )


def small(value: float = 0.0) -> dict:
    return {"w": jnp.full((4,), value, jnp.float32), "n": jnp.asarray(int(value), jnp.int32)}


def assert_bits_equal(got, expected) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert np.asarray(got).tobytes() == np.asarray(expected).tobytes()


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder with step 5, saved under (4, 2). Read only."""
    folder = tmp_path_factory.mktemp("shared")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(5, placed(), {"model": {"name": "llama-nano"}, "position": 80})
    return folder


@pytest.fixture
def checkpoints(tmp_path):
    with Checkpoints(tmp_path / "run") as opened:
        yield opened


@pytest.mark.parametrize("transposed", [False, True], ids=["same-specs", "other-specs"])
@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_arrays_are_bit_equal_under_any_mesh(shared, shape, transposed):
    target = asked(shape, transposed=transposed)
    with Checkpoints(shared) as checkpoints:
        restored = checkpoints.restore(5, target)
    jax.tree.map(assert_bits_equal, restored, VALUES)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, target)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    params: dict
    optimizer: optax.OptState
    step: jax.Array


def test_a_tree_of_any_classes_comes_back_as_it_was(checkpoints):
    params = {"layers": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-3, 0.0, 9)))
    state = State(params, optimizer.init(params), jnp.asarray(3, jnp.int32))
    checkpoints.save(0, state, {})
    restored = checkpoints.restore(0, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(assert_bits_equal, restored, state)


def test_arrays_are_plain_zarr_under_their_paths(shared):
    """Another library reads them, knowing nothing of us."""
    for folder, value in {
        "params.layers.kernel": VALUES["params"]["layers"]["kernel"],
        "params.layers.bias": VALUES["params"]["layers"]["bias"],
        "optimizer.0.count": VALUES["optimizer"]["0"]["count"],
    }.items():
        file = {"driver": "file", "path": str(shared / "5" / "arrays" / folder)}
        array = tensorstore.open({"driver": "zarr3", "kvstore": file}, open=True).result().read().result()
        assert_bits_equal(array, value)


def test_a_part_is_restored_without_reading_the_rest(checkpoints):
    checkpoints.save(1, placed(), {})
    checkpoints.wait()
    for path in (checkpoints.folder / "1" / "arrays").glob("optimizer.*/zarr.json"):
        path.unlink()
    params = checkpoints.restore(1, asked()["params"], under="params")
    jax.tree.map(assert_bits_equal, params, VALUES["params"])
    assert_bits_equal(checkpoints.restore(1, asked()["scale"], under="scale"), VALUES["scale"])
    with pytest.raises(CheckpointError, match="optimizer"):
        checkpoints.restore(1, asked())


def like(shape, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh_of((1,)), PartitionSpec()))


@pytest.mark.parametrize(
    ("name", "leaf", "message"),
    [
        ("head", like((8, 16), jnp.bfloat16), r"params/head: saved float16\[8, 16\], asked bfloat16\[8, 16\]"),
        ("head", like((16, 8), jnp.float16), r"params/head: saved float16\[8, 16\], asked float16\[16, 8\]"),
        ("head", None, r"params/head: saved float16\[8, 16\], asked nothing"),
        ("extra", like((3,), jnp.int32), r"params/extra: saved nothing, asked int32\[3\]"),
    ],
    ids=["dtype", "shape", "missing", "unexpected"],
)
def test_a_target_that_differs_is_refused_before_anything_is_read(checkpoints, name, leaf, message):
    checkpoints.save(1, placed(), {})
    checkpoints.wait()
    for file in (checkpoints.folder / "1" / "arrays").rglob("*"):
        if file.is_file():
            file.unlink()
    target = asked()
    target["params"][name] = leaf
    with pytest.raises(ValueError, match=message):
        checkpoints.restore(1, target)


def test_a_target_without_shardings_is_refused(shared):
    with Checkpoints(shared) as checkpoints, pytest.raises(TypeError, match=r"scale is asked for by .*sharding="):
        checkpoints.restore(5, jax.ShapeDtypeStruct((), jnp.float32), under="scale")


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_arrays_donated_after_save_are_saved_as_they_were(tmp_path, shape):
    mesh = mesh_of(shape)
    host = RNG.standard_normal((1024, 1024), np.float32)
    layouts = [NamedSharding(mesh, PartitionSpec("first")), NamedSharding(mesh, PartitionSpec())]
    state = {f"w{i}": jax.device_put(host, layout) for i, layout in enumerate(layouts)}
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(3):
            state = step(state)
        jax.block_until_ready(state)
        restored = checkpoints.restore(1, state)
    for name in restored:
        assert_bits_equal(restored[name], host)


def test_metadata_comes_back_unchanged(checkpoints):
    metadata = {"model": {"name": "ünï", "sizes": [1, 2.5, None, True]}, "rate": 0.1, "large": 2**70}
    checkpoints.save(1, small(), metadata)
    metadata["model"]["sizes"].append("changed after save")
    checkpoints.wait()
    expected = {"model": {"name": "ünï", "sizes": [1, 2.5, None, True]}, "rate": 0.1, "large": 2**70}
    assert checkpoints.metadata(1) == expected


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        (float("nan"), ValueError, r"metadata\['a'\]\[0\] is nan"),
        ((1, 2), TypeError, r"metadata\['a'\]\[0\] is of type tuple"),
        ({1: 2}, TypeError, r"metadata\['a'\]\[0\] has the key 1"),
        (np.float32(1), TypeError, r"metadata\['a'\]\[0\] is of type float32"),
    ],
    ids=["nan", "tuple", "int-key", "numpy"],
)
def test_metadata_that_json_would_change_is_refused(checkpoints, entry, error, message):
    with pytest.raises(error, match=message):
        checkpoints.save(1, small(), {"a": [entry]})
    assert not checkpoints.folder.exists()


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({}, ValueError, "no named leaves"),
        (jnp.ones(3), ValueError, "no named leaves"),
        ({"a": {"b": 1.0}}, TypeError, "a/b is of type float"),
        ({"key": jax.random.key(0)}, TypeError, "save jax.random.key_data"),
        ({"a": jnp.ones((0, 2))}, ValueError, "a has shape .* no elements"),
        ({"a/b": jnp.ones(1)}, ValueError, "the key 'a/b' cannot name a file"),
        ({"a": {"w": jnp.ones(1), "W": jnp.ones(1)}}, ValueError, "share a folder"),
        ({"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)}, ValueError, "share a folder"),
    ],
    ids=["empty", "bare", "float", "key", "no-elements", "slash", "case", "dot"],
)
def test_a_tree_that_cannot_be_kept_is_refused(checkpoints, tree, error, message):
    with pytest.raises(error, match=message):
        checkpoints.save(1, tree, {})
    assert not checkpoints.folder.exists()


def test_a_manifest_tells_all_that_was_saved(shared):
    step = shared / "5"
    content = json.loads((step / "manifest.json").read_text())
    assert content["step"] == 5
    assert content["metadata"] == {"model": {"name": "llama-nano"}, "position": 80}
    assert set(content["versions"]) == {"artifex", "jax", "flax", "orbax-checkpoint"}
    assert len(content["arrays"]) == 8
    assert content["arrays"]["params/layers/bias"] == {"shape": [8], "dtype": "bfloat16"}
    assert content["arrays"]["optimizer/0/count"] == {"shape": [], "dtype": "int32"}
    files = [path for path in step.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert content["files"] == {
        path.relative_to(step).as_posix(): {
            "size": len(path.read_bytes()),
            "xxh3_128": xxhash.xxh3_128(path.read_bytes()).hexdigest(),
        }
        for path in files
    }
