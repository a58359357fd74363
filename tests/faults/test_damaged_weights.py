"""Exported weights that were damaged are refused, wherever the bit flipped; other libraries read them as ever."""

import json
import logging
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import xxhash
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from artifex import models
from artifex.data.tokenizers import ByteTokenizer
from artifex.models import digests, weights

TINY = {"embed_dim": 16, "num_layers": 2, "num_heads": 2, "head_dim": 8, "mlp_dim": 16}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "weights"
    cfg = models.preset("llama-nano", **TINY)
    weights.save_pretrained(folder, cfg.build(nnx.Rngs(0)), tokenizer=ByteTokenizer())
    return folder


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "weights"))


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def header_of(file: Path) -> dict:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


def test_a_flip_anywhere_in_the_file_is_refused(exported, folder, caplog):
    whole, file = (exported / weights.TENSORS).read_bytes(), folder / weights.TENSORS
    (length,) = struct.unpack("<Q", whole[:8])
    name = 8 + whole[8 : 8 + length].index(digests.FIELD.encode())
    positions = np.random.default_rng(0).integers(0, len(whole), 60).tolist()
    positions += [0, 8, 9, name + 40, 8 + length - 1, 8 + length, len(whole) - 1]
    for position in positions:
        file.write_bytes(whole)
        flip(file, position)
        with pytest.raises(ValueError, match=r"model.safetensors (is damaged: .*checksum|is no )") as refused:
            weights.from_pretrained(folder)
        assert "\n" not in str(refused.value)
    file.write_bytes(whole)
    flip(file, name + 3)  # in the field's own name: all else is as it was
    with caplog.at_level(logging.WARNING, "artifex"):
        weights.from_pretrained(folder)
    assert "no checksums in it" in caplog.text


def test_the_digests_are_those_of_the_tensors_as_another_library_reads_them(exported):
    file = exported / weights.TENSORS
    tensors = load_file(file)
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    assert metadata.pop("format") == "pt"
    (said,) = metadata.values()
    header = header_of(file)
    header.pop("__metadata__")
    in_order = sorted(header, key=lambda name: header[name]["data_offsets"])
    expected = [xxhash.xxh3_128(np.ascontiguousarray(tensors[name]).tobytes()).hexdigest() for name in in_order]
    assert said[32:] == "".join(expected)
    model = nnx.to_pure_dict(nnx.state(weights.from_pretrained(exported)))
    assert {"/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(model)} == {
        name.replace(".", "/") for name in tensors
    }


def test_several_files_are_each_verified(exported, tmp_path):
    model = weights.from_pretrained(exported)
    weights.save_pretrained(tmp_path / "many", model, max_shard_bytes=8_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        flip(file, file.stat().st_size - 1)
        with pytest.raises(ValueError, match=f"{file.name} is damaged"):
            weights.from_pretrained(tmp_path / "many")
        flip(file, file.stat().st_size - 1)
    weights.from_pretrained(tmp_path / "many")


def test_of_what_is_not_asked_for_nothing_is_verified(folder):
    described = weights.described_params(folder)
    wanted = {"norm.scale": jax.ShapeDtypeStruct(described["norm.scale"].shape, np.float32, sharding=None)}
    file = folder / weights.TENSORS
    begin = header_of(file)["embed.table"]["data_offsets"][0]
    flip(file, file.stat().st_size - sum(t.nbytes for t in load_file(file).values()) + begin)
    weights.read_some(folder, wanted)
    with pytest.raises(ValueError, match=r"embed.table does not match"):
        weights.read_some(folder, {"embed.table": jax.ShapeDtypeStruct(described["embed.table"].shape, np.float32)})


def test_weights_without_digests_are_read_and_it_is_said(folder, caplog):
    save_file(load_file(folder / weights.TENSORS), folder / weights.TENSORS, {"format": "pt"})
    with caplog.at_level(logging.WARNING, "artifex"):
        weights.from_pretrained(folder)
    (record,) = caplog.records
    assert record.getMessage().endswith("model.safetensors: no checksums in it, so damage would not be found")


def test_a_file_that_another_library_changed_and_kept_the_digests_of_is_refused_with_the_remedy(folder):
    file = folder / weights.TENSORS
    tensors = load_file(file)
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    tensors["norm.scale"] = tensors["norm.scale"] * 2
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match="let that save it without the metadata"):
        weights.from_pretrained(folder)
    save_file(tensors, file, {"format": "pt"})
    weights.from_pretrained(folder)


def test_the_command_that_samples_refuses_damaged_weights_with_one_line(folder):
    flip(folder / weights.TENSORS, (folder / weights.TENSORS).stat().st_size - 5)
    words = [sys.executable, "-m", "artifex.sample", str(folder), "--prompt", "It"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert "is damaged" in done.stderr and done.stderr.count("\n") == 1
