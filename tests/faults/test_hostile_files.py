"""Whatever a file holds that a user hands over, its reader reads it or refuses it by its own error: soon, in little
memory, without a look outside the folder and without running anything."""

import codecs
import dataclasses
import hashlib
import json
import os
import random
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash
from flax import nnx
from runs import SECTIONS

from artifex import models
from artifex.config import Config
from artifex.config_io import dump_yaml
from artifex.data import classes, tokenizers
from artifex.models import digests, safetensors_io, weights, weights_config
from artifex.scaling import manifest
from artifex.scaling.autodist import constraints, plan_file
from artifex.scaling.checkpoints import CheckpointError, Checkpoints
from artifex.training import run_lock
from artifex.training.metrics_file import MetricsFile

SECONDS = 2.0  # that a reader may take, of its own thread
MEGABYTES = 600  # that all changes of a file may add to what the process holds
RUNS = ("exec", "compile", "pickle.find_class", "marshal.loads", "subprocess.Popen", "os.system", "socket.connect")
CONSTRAINTS = """- {module: attention, allowed_axes: [tensor, fsdp]}
- {parameter: "embed/*", replicate: true}
- {axis: experts, allowed_axes: [expert], replicate: false}
"""
PLAN = """schema: 1
about: {rows: 16}
device: {data: 2, fsdp: 2, tensor: 2}
training: {remat: full, gradient_accumulation: 2}
mesh: {data: 2, fsdp: 2, tensor: 2}
notes: [a note]
versions: {jax: 0.10.2}
"""
WATCHED: dict[str, Any] = {"folder": None, "wrong": []}


def watch(event: str, args: tuple) -> None:
    """An audit hook: files opened outside the folder that is read, and whatever runs code."""
    if WATCHED["folder"] is None:
        return
    if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
        path = os.path.realpath(os.fsdecode(args[0]))
        if not path.startswith(WATCHED["folder"]):
            WATCHED["wrong"].append(f"opened {path}")
    elif event in RUNS:
        WATCHED["wrong"].append(event)


sys.addaudithook(watch)
for name in ("utf-8-sig", *(f"utf-{bits}{order}" for bits in (16, 32) for order in ("", "-le", "-be"))):
    codecs.lookup(name)  # imported where JSON begins like one of them


@dataclasses.dataclass(frozen=True)
class Reader:
    """One kind of file: what lies in the folder, which file of it is changed and how, who reads it, and the error by
    which that refuses."""

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    error: type[Exception]
    change: Callable[[bytes, random.Random], bytes] = hostile.changed


def written(name: str, text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return make


def a_step(folder: Path) -> Path:
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones((4, 2)), "n": jnp.int32(3)}, {"note": "text"})
    return folder / "1" / manifest.NAME


def signed(value: Any) -> Any:
    if isinstance(value, dict):
        value.pop("checksum", None)
        text = json.dumps(value, sort_keys=True).encode("utf-8", "surrogatepass")
        value["checksum"] = hashlib.sha256(text).hexdigest()
    return value


def read_step(file: Path) -> Any:
    """As `Checkpoints` does: the manifest, each file it lists, and what is asked for when a run goes on."""
    body = manifest.read(file.parent, 1)
    problems = [manifest.damage(file.parent, name, entry) for name, entry in body["files"].items()]
    return problems, {path: jax.ShapeDtypeStruct(x["shape"], x["dtype"]) for path, x in body["arrays"].items()}


def some_weights(folder: Path, **options: Any) -> None:
    tiny = {"embed_dim": 8, "num_layers": 1, "num_heads": 1, "head_dim": 8, "mlp_dim": 8}
    model = models.preset("llama-nano", **tiny).build(nnx.Rngs(0))
    weights.save_pretrained(folder, model, tokenizer=tokenizers.ByteTokenizer(), **options)


def one_file(folder: Path) -> Path:
    some_weights(folder)
    return folder / weights.TENSORS


def an_index(folder: Path) -> Path:
    some_weights(folder, max_shard_bytes=4_000)
    return folder / safetensors_io.index_of(weights.TENSORS)


def a_described_model(folder: Path) -> Path:
    some_weights(folder)
    return folder / weights_config.CONFIG


def changed_tensors(content: bytes, rng: random.Random) -> bytes:
    """The file as bytes, or its header as JSON, of the right length and, mostly, with the digest that belongs to it."""
    if rng.random() < 0.3:
        return hostile.bent(content, rng)
    length = int.from_bytes(content[:8], "little")
    header = hostile.changed(content[8 : 8 + length], rng)
    if rng.random() < 0.7:
        try:
            said = json.loads(header)["__metadata__"][digests.FIELD]
            blank = "0" * len(said)
            found = xxhash.xxh3_128(header.replace(said.encode(), blank.encode())).hexdigest()
            header = header.replace(said.encode(), (found + said[32:]).encode())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
    length = rng.choice([len(header)] * 8 + [0, max(0, len(header) - 1), 2**63, 2**32])
    return length.to_bytes(8, "little") + header + content[8 + length :]


def read_tensors(file: Path) -> Any:
    tensors = safetensors_io.open_tensors(file.parent, weights.TENSORS)
    safetensors_io.verify(tensors)
    return [one.array().sum(dtype=np.float64) for one in tensors.values() if one.dtype is not None]


def a_bpe(folder: Path) -> Path:
    bpe = tokenizers.train_bpe(["It was day 3 in the harbour, and the boats lay still.\n"] * 3, 270)
    tokenizers.save_tokenizer(bpe, folder / "tokenizer.json")
    return folder / "tokenizer.json"


def metrics(folder: Path) -> Path:
    lines = [{"step": step, "split": "train", "loss": 1.5, "not_finite": {"a": "nan"}} for step in range(6)]
    return written("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))(folder)


def changed_lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    lines[at] = hostile.changed(lines[at], rng) + rng.choice([b"\n", b"\n", b"", b"\r\n"])
    return b"".join(lines)


def read_lock(file: Path) -> Any:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        found = run_lock._read(descriptor)
        return found and run_lock._who(found)
    finally:
        os.close(descriptor)


LOCK = {"host": "a", "pid": 7, "started": 9, "boot": "b", "processes": "c", "since": "2026-01-01 00:00:00"}
READERS = {
    "configuration.json": Reader(written("c.json", json.dumps(SECTIONS)), Config.from_file, ValueError),
    "configuration.yaml": Reader(written("c.yaml", dump_yaml(SECTIONS)), Config.from_file, ValueError, hostile.bent),
    "manifest": Reader(a_step, read_step, CheckpointError, lambda *a: hostile.changed(*a, sign=signed)),
    "metrics": Reader(metrics, lambda file: MetricsFile(file).read(), OSError, changed_lines),
    "safetensors": Reader(one_file, read_tensors, ValueError, changed_tensors),
    "index": Reader(an_index, read_tensors, ValueError),
    "tokenizer": Reader(a_bpe, tokenizers.load_tokenizer, ValueError),
    "ids": Reader(
        written("t.json", '{"artifex_tokenizer": "ids", "vocab_size": 300}'),
        lambda file: tokenizers.load_tokenizer(file).encode("17"),
        ValueError,
    ),
    "config.json of weights": Reader(
        a_described_model, lambda file: weights_config.read_config(file.parent), ValueError
    ),
    "plan": Reader(written("plan.yaml", PLAN), plan_file.read, ValueError, hostile.bent),
    "constraints": Reader(written("c.yaml", CONSTRAINTS), constraints.read, ValueError, hostile.bent),
    "classes": Reader(
        written("classes.json", '["a", "b", "c"]'), lambda file: classes.load_classes(file.parent, 3), ValueError
    ),
    "lock": Reader(written("run.lock", json.dumps(LOCK)), read_lock, ValueError),
}


def faults(reader: Reader, folder: Path, seeds: range) -> list[str]:
    """What went otherwise than it may, a line a change."""
    file = reader.make(folder)
    content, found = file.read_bytes(), []
    reader.read(file)  # what is imported late is
    before = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        file.write_bytes(reader.change(content, random.Random(seed)))
        WATCHED.update(folder=str(folder.resolve()), wrong=[])
        began, told = time.thread_time(), None
        try:
            reader.read(file)
        except reader.error as error:
            told = None if str(error) else "an error without a word"
        except BaseException as error:  # noqa: BLE001 that is what is looked for
            where = traceback.extract_tb(error.__traceback__)[-1]
            told = f"{type(error).__name__}: {str(error)[:200]} ({where.filename}:{where.lineno})"
        finally:
            WATCHED["folder"] = None
        seconds = time.thread_time() - began
        told = told or (f"{seconds:.1f} s" if seconds > SECONDS else None) or next(iter(WATCHED["wrong"]), None)
        if told:
            found.append(f"{seed}: {told}")
    file.write_bytes(content)
    after = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}
    found += [f"wrote {path}" for path in after.keys() ^ before.keys()]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    return [*found, *([f"{grown:.0f} MB"] if grown > MEGABYTES else [])]


@pytest.mark.parametrize("name", READERS)
def test_a_changed_file_is_read_or_refused(name, tmp_path):
    (tmp_path / "inside").mkdir()
    assert faults(READERS[name], tmp_path / "inside", range(150)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_ten_thousand_changed_files_are_read_or_refused(name, tmp_path):
    (tmp_path / "inside").mkdir()
    assert faults(READERS[name], tmp_path / "inside", range(1_000, 11_000)) == []


def with_entry(*keys: str, value: Any) -> Callable[[bytes], bytes]:
    """A change of JSON that puts `value` at the end of `keys`, "*" being each key there."""

    def put(inner: Any, keys: tuple[str, ...]) -> None:
        for key in [*inner] if keys[0] == "*" else keys[:1]:
            if len(keys) == 1:
                inner[key] = value
            else:
                put(inner[key], keys[1:])

    def change(content: bytes) -> bytes:
        whole = json.loads(content)
        put(whole, keys)
        return json.dumps(signed(whole) if "checksum" in whole else whole).encode()

    return change


ONCE = {  # what got past a reader, or through it, when these tests were first run
    "a dtype that NumPy compiles": ("manifest", with_entry("arrays", "w", "dtype", value="f4,,")),
    "a dtype that NumPy warns of": ("manifest", with_entry("arrays", "w", "dtype", value="a10")),
    "a dtype that is a record": ("manifest", with_entry("arrays", "w", "dtype", value="f4,f4")),
    "a name that is too long": ("index", with_entry("weight_map", "*", value="a" * 300 + ".safetensors")),
    "a library that panics": ("tokenizer", with_entry("model", "continuing_subword_prefix", value="x" * 40)),
    "nested without end": ("lock", lambda _: b"[" * 4_000),
}


@pytest.mark.parametrize(("name", "change"), ONCE.values(), ids=ONCE)
def test_what_once_got_past_a_reader_is_refused(name, change, tmp_path):
    (tmp_path / "inside").mkdir()
    changes = dataclasses.replace(READERS[name], change=lambda content, _: change(content))
    assert faults(changes, tmp_path / "inside", range(1)) == []
    file = changes.make(tmp_path / "inside")
    file.write_bytes(change(file.read_bytes()))
    if name == "lock":
        assert changes.read(file) is None
    else:
        with pytest.raises(changes.error):
            changes.read(file)


def be(kind: str, file: Path) -> None:
    outside = file.parent.parent / "outside"
    content = file.read_bytes()
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "link to itself":
        file.symlink_to(file)
    elif kind == "link to a device":
        file.symlink_to("/dev/zero")
    elif kind == "terabyte":
        with file.open("wb") as stream:
            stream.write(content)
            stream.truncate(2**40)
    else:
        assert kind == "gone", outside


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to itself", "link to a device", "terabyte", "gone"])
@pytest.mark.parametrize("name", [name for name in READERS if name not in ("lock", "ids")])
def test_what_is_no_such_file_is_refused_and_nobody_waits_for_it(name, kind, tmp_path):
    (tmp_path / "inside").mkdir()
    reader = READERS[name]
    if (name, kind) == ("metrics", "terabyte"):
        pytest.skip("a run's own measurements may be of any size")
    file = reader.make(tmp_path / "inside")
    be(kind, file)
    began = time.monotonic()
    try:
        reader.read(file)
    except (reader.error, FileNotFoundError) as error:
        assert str(error)
    assert time.monotonic() - began < 10
