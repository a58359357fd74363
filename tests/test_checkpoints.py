"""Checkpoints: bit-equal under any layout, refused when damaged, never lost to a later failure."""

import dataclasses
import hashlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import tensorstore
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from artifex.scaling import manifest
from artifex.scaling.checkpoints import CheckpointError, Checkpoints

RNG = np.random.default_rng(0)
BITS = RNG.integers(0, 2**32, (16, 8), np.uint32)  # as float32: NaNs of every kind, infinities, denormals
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


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


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


def test_a_flipped_bit_in_any_file_is_found(checkpoints):
    checkpoints.save(1, small(1), {})
    checkpoints.save(2, small(2), {"note": "text"})
    checkpoints.wait()
    step = checkpoints.folder / "2"
    files = sorted(path for path in step.rglob("*") if path.is_file())
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        flip_bit(path)
        with pytest.raises(CheckpointError, match=rf"step 2 .*{path.name}.*restore step 1 instead"):
            checkpoints.restore(2, small())
        path.write_bytes(content)
    assert_bits_equal(checkpoints.restore(2, small())["w"], np.full((4,), 2, np.float32))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [truncate, Path.unlink], ids=["truncated", "missing"])
def test_a_step_with_a_broken_file_is_not_complete(checkpoints, harm):
    checkpoints.save(1, small(1), {})
    checkpoints.save(2, small(2), {})
    checkpoints.wait()
    harm(checkpoints.folder / "2" / "arrays" / "w" / "c" / "0")
    assert checkpoints.steps() == [1]
    assert checkpoints.latest() == 1
    with pytest.raises(CheckpointError, match=r"step 2 .*arrays/w/c/0 .*restore step 1 instead"):
        checkpoints.restore(2, small())


def test_the_newest_restorable_step_is_found_and_the_others_are_reported(checkpoints):
    for step in (1, 2, 3):
        checkpoints.save(step, small(step), {})
    checkpoints.wait()
    (checkpoints.folder / "4" / "arrays").mkdir(parents=True)
    flip_bit(checkpoints.folder / "3" / "arrays" / "w" / "c" / "0")
    (checkpoints.folder / "2" / "arrays" / "n" / "c").unlink()
    step, skipped = checkpoints.newest_restorable()
    assert step == 1
    assert [text.split(":")[0] for text in skipped] == ["step 4", "step 3", "step 2"]
    assert "never finished" in skipped[0]
    assert "arrays/w/c/0 is damaged" in skipped[1]
    assert "arrays/n/c is missing" in skipped[2]


def test_an_empty_or_absent_folder_has_no_steps(tmp_path):
    with Checkpoints(tmp_path / "absent") as checkpoints:
        assert checkpoints.steps() == []
        assert checkpoints.latest() is None
        assert checkpoints.newest_restorable() == (None, [])
        with pytest.raises(CheckpointError, match="there is no step 3"):
            checkpoints.metadata(3)
    assert not (tmp_path / "absent").exists()


def test_the_newest_steps_stay(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (0, 10, 20, 30):
            checkpoints.save(step, small(step), {})
        checkpoints.wait()
        assert checkpoints.steps() == [20, 30]
        assert sorted(os.listdir(tmp_path)) == ["20", "30"]
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)


def test_save_returns_before_the_files_are_written(checkpoints, monkeypatch):
    released = threading.Event()
    seal = manifest.seal
    monkeypatch.setattr(manifest, "seal", lambda *args: (released.wait(20), seal(*args)))
    checkpoints.save(1, small(), {})
    assert checkpoints.steps() == []
    released.set()
    checkpoints.wait()
    assert checkpoints.steps() == [1]


def test_a_synchronous_save_returns_when_all_is_written(tmp_path):
    with Checkpoints(tmp_path, asynchronous=False) as checkpoints:
        checkpoints.save(1, small(), {})
        assert checkpoints.steps() == [1]


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


def test_a_full_disk_is_one_sentence_and_costs_no_earlier_step(tmp_path, capfd):
    mesh = mesh_of((8,))
    big = {"w": jax.device_put(np.ones((8, 1 << 16), np.float32), NamedSharding(mesh, PartitionSpec("first")))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, big, {})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # every shard is larger
        try:
            checkpoints.save(2, big, {})
            with pytest.raises(
                CheckpointError, match=r"step 2 was not saved .*File too large.*untouched: \[1\]"
            ) as at_wait:
                checkpoints.wait()
            checkpoints.save(2, big, {})
            with pytest.raises(CheckpointError, match="step 2 was not saved"):
                checkpoints.save(3, big, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(at_wait.value)
        assert len(str(at_wait.value)) < 500
        assert checkpoints.newest_restorable() == (1, [])
        checkpoints.save(2, big, {})  # the disk has space again
        checkpoints.wait()
        assert checkpoints.newest_restorable() == (2, [])
    assert capfd.readouterr() == ("", "")


def test_what_lingers_of_a_failed_save_does_not_stop_the_next(checkpoints, monkeypatch):
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # as if a busy writer brought its folder back
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "seal", lambda folder, _: (folder / "absent").stat())
        checkpoints.save(1, small(1), {})
        with pytest.raises(CheckpointError, match=r"step 1 was not saved .*No such file"):
            checkpoints.wait()
    checkpoints.save(1, small(2), {})
    checkpoints.wait()
    assert_bits_equal(checkpoints.restore(1, small())["w"], np.full((4,), 2, np.float32))


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        Checkpoints(tmp_path / "file" / "run") as checkpoints,
        pytest.raises(CheckpointError, match=r"step 1 was not saved .*Not a directory"),
    ):
        checkpoints.save(1, small(), {})


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


def test_steps_count_up(checkpoints):
    checkpoints.save(2, small(), {})
    for step in (2, 1, -1):
        with pytest.raises(ValueError, match=f"step {step} is not above 2"):
            checkpoints.save(step, small(), {})


def test_a_resumed_run_replaces_what_it_left_behind(tmp_path, caplog):
    with Checkpoints(tmp_path) as first:
        for step in (1, 2, 3):
            first.save(step, small(step), {})
    (tmp_path / "4.saving-1" / "arrays").mkdir(parents=True)  # killed while saving
    with Checkpoints(tmp_path) as second:  # goes on from step 1
        second.save(2, small(20), {})
        second.wait()
        assert second.steps() == [1, 2]
        assert_bits_equal(second.restore(2, small())["w"], np.full((4,), 20, np.float32))
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "2.left-1", "3.left-1"]
    assert [(record.name, record.levelname) for record in caplog.records] == [("artifex", "WARNING")] * 2


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
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }


def test_a_manifest_of_an_unknown_format_is_refused(checkpoints, monkeypatch):
    monkeypatch.setattr(manifest, "FORMAT", 2)
    checkpoints.save(1, small(), {})
    checkpoints.wait()
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 2, this version reads 1; update artifex"):
        checkpoints.metadata(1)


def test_orbax_does_not_speak(checkpoints, caplog, capfd):
    caplog.set_level(logging.INFO)
    checkpoints.save(1, small(1), {})
    checkpoints.restore(1, small())
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_a_process_killed_while_saving_leaves_the_earlier_step(tmp_path):
    program = """
        import os, signal, sys
        import jax.numpy as jnp
        from artifex.scaling import manifest
        from artifex.scaling.checkpoints import Checkpoints

        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(1, {"w": jnp.full((4,), 1.0)}, {})
        checkpoints.wait()
        manifest.seal = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.save(2, {"w": jnp.full((4,), 2.0)}, {})
        checkpoints.wait()
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.parent.name.split("-")[0] for path in sorted(tmp_path.glob("*/arrays"))] == ["1", "2.saving"]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        assert checkpoints.newest_restorable() == (1, [])
        restored = checkpoints.restore(1, {"w": like((4,), jnp.float32)})
    assert_bits_equal(restored["w"], np.ones((4,), np.float32))
