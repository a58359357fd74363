"""Arrays are read straight from their files where these hold them as they are, and by Orbax where they do not."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from artifex.scaling import manifest, straight
from artifex.scaling.checkpoints import CheckpointError, Checkpoints

RNG = np.random.default_rng(0)
VALUES = {  # by how they lie in files: one run of bytes, rows of rows, a scalar, one byte each
    "rows": RNG.standard_normal((16, 8), np.float32),
    "cube": RNG.integers(0, 2**16, (4, 8, 6), np.uint16),
    "count": np.array(-7, np.int32),
    "mask": RNG.integers(0, 2, (16,)) == 1,
}
WRITTEN = {"rows": (None, "a"), "cube": ("b", "a"), "count": (), "mask": (("a", "b"),)}
ASKED = {
    "as it was written": WRITTEN,
    "whole": dict.fromkeys(WRITTEN, ()),
    "other dims": {"rows": ("a", "b"), "cube": (None, ("a", "b")), "count": (), "mask": ("b",)},
    "copies": {"rows": ("b",), "cube": (None, None, "b"), "count": (), "mask": ()},
}


def layouts(specs: dict) -> dict:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    return {name: NamedSharding(mesh, PartitionSpec(*spec)) for name, spec in specs.items()}


def asked(specs: dict) -> dict:
    return {
        name: jax.ShapeDtypeStruct(VALUES[name].shape, VALUES[name].dtype, sharding=layout)
        for name, layout in layouts(specs).items()
    }


def assert_bits_equal(restored: dict) -> None:
    assert {name: np.asarray(x).tobytes() for name, x in restored.items()} == {
        name: value.tobytes() for name, value in VALUES.items()
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with step 1. Read only."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder) as opened:
        opened.save(1, jax.tree.map(jax.device_put, VALUES, layouts(WRITTEN)), {})
    return folder


@pytest.fixture
def checkpoints(saved, tmp_path):
    """A copy of it that may be changed."""
    shutil.copytree(saved, tmp_path / "run")
    with Checkpoints(tmp_path / "run") as opened:
        yield opened


@pytest.mark.parametrize("block", [8, 100, 2**20])
@pytest.mark.parametrize("specs", ASKED.values(), ids=ASKED)
def test_arrays_come_back_without_orbax_in_blocks_of_any_size(checkpoints, monkeypatch, specs, block):
    monkeypatch.setattr(manifest, "BLOCK", block)
    monkeypatch.setattr(Checkpoints, "_read_by_orbax", None)
    restored = checkpoints.restore(1, asked(specs))
    assert_bits_equal(restored)
    assert {name: x.sharding for name, x in restored.items()} == layouts(specs)


def test_what_is_restored_can_be_donated_where_devices_hold_copies(checkpoints):
    specs = ASKED["copies"]
    one, other = checkpoints.restore(1, asked(specs)), checkpoints.restore(1, asked(specs))
    add = jax.jit(lambda x: x + jnp.ones((), x.dtype), donate_argnums=0)
    for _ in range(3):
        one["rows"] = add(one["rows"])
    np.testing.assert_allclose(np.asarray(one["rows"]), VALUES["rows"] + 3, rtol=1e-5)
    assert len({np.asarray(shard.data).tobytes() for shard in one["rows"].addressable_shards}) == 2
    assert_bits_equal(other)


def reseal(checkpoints: Checkpoints) -> None:
    """Sign what lies in the folder of step 1 now, as if it had been saved so."""
    folder = checkpoints.folder / "1"
    body = json.loads((folder / manifest.NAME).read_text())
    (folder / manifest.NAME).unlink()
    manifest.seal(folder, {key: body[key] for key in ("step", "versions", "metadata", "arrays")})


def written_otherwise(folder, options: dict) -> None:
    """By Zarr in TensorStore, in other chunks than Orbax's or compressed."""
    file = {"driver": "file", "path": str(folder)}
    metadata = {"shape": [16, 8], "data_type": "float32", **options}
    spec = {"driver": "zarr3", "kvstore": file, "metadata": metadata}
    tensorstore.open(spec, create=True, delete_existing=True).result().write(VALUES["rows"]).result()


CHUNKS = {"name": "regular", "configuration": {"chunk_shape": [5, 8]}}
ZSTD = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd", "configuration": {"level": 1}}]


@pytest.mark.parametrize("options", [{}, {"codecs": ZSTD}, {"chunk_grid": CHUNKS}], ids=["plain", "zstd", "uneven"])
def test_an_array_that_lies_otherwise_is_read_by_orbax(checkpoints, monkeypatch, options):
    written_otherwise(checkpoints.folder / "1/arrays/rows", options)
    reseal(checkpoints)
    by_orbax = []
    read = Checkpoints._read_by_orbax
    monkeypatch.setattr(
        Checkpoints, "_read_by_orbax", lambda self, step, wanted: by_orbax.extend(wanted) or read(self, step, wanted)
    )
    assert_bits_equal(checkpoints.restore(1, asked(WRITTEN)))
    assert by_orbax == ["rows"]


@pytest.mark.parametrize("compressed", [False, True], ids=["by us", "by Orbax"])
def test_a_chunk_that_changed_is_refused_and_nothing_is_read_by_orbax(checkpoints, monkeypatch, compressed):
    home = checkpoints.folder / "1/arrays/rows"
    if compressed:
        written_otherwise(home, {"codecs": ZSTD})
        reseal(checkpoints)
    file = sorted(path for path in home.rglob("*") if path.is_file() and path.name != "zarr.json")[-1]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    monkeypatch.setattr(ocp.AsyncCheckpointer, "restore", None)
    name = file.relative_to(checkpoints.folder / "1")
    with pytest.raises(CheckpointError, match=f"{name} is damaged: its content does not match its checksum"):
        checkpoints.restore(1, asked(WRITTEN))


def test_a_description_that_no_files_can_fit_is_left_to_orbax(checkpoints):
    home = checkpoints.folder / "1/arrays/rows"
    said = json.loads((home / "zarr.json").read_text())
    for wrong in ([16, 0], [16, -2], [16], [2**62, 2], "16", None, [16, True]):
        said["chunk_grid"]["configuration"]["chunk_shape"] = wrong
        said["codecs"][0]["configuration"]["chunk_shape"] = wrong
        text = json.dumps(said).encode()
        assert straight._plain(text, (16, 8), "float32") is None
    assert straight._plain(b"[" * 10_000, (16, 8), "float32") is None
    assert straight._plain(b"\xff", (16, 8), "float32") is None
