"""Saving and restoring a state of about 1 GiB against writing and reading the same bytes; and the memory it takes.

    JAX_NUM_CPU_DEVICES=8 python benchmarks/checkpoint.py --folder FOLDER

On one device, and split over all. Raw writing is one file written serially and synced; a save is timed until the step
counts, and the call that holds the loop by itself. Raw reading is that of the step's files, which the system has in
memory, into new memory; a restore verifies the same files, and a resume looks for the newest sound step before.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import report
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from setups import machine

from artifex.scaling.checkpoints import Checkpoints
from artifex.scaling.leaves import by_path

MIB = 2**20


def shapes(width: int) -> dict[str, Any]:
    """Of a stacked decoder's weights and their two moments; the second last dim is `width` but in norms."""
    layers, mlp = 6, width * 11 // 4
    weights = {
        "embed": (8 * width, width),
        "attention": dict.fromkeys(("query", "key", "value", "out"), (layers, width, width)),
        "mlp": dict.fromkeys(("gate", "up", "down"), (layers, width, mlp)),
        "norm": (layers, width),
    }
    return {"params": weights, "optimizer": {"mu": weights, "nu": weights}}


def state_on(devices: list[Any], width: int) -> Any:
    """Random bits in those shapes, each array split over `devices` as FSDP does."""
    mesh = jax.make_mesh((len(devices),), ("fsdp",), axis_types=(AxisType.Auto,), devices=devices)
    rng = np.random.default_rng(0)

    def made(shape: tuple[int, ...]) -> jax.Array:
        spec = PartitionSpec(None, "fsdp") if len(shape) > 1 else PartitionSpec("fsdp")
        return jax.device_put(rng.random(shape, np.float32), NamedSharding(mesh, spec))

    return jax.block_until_ready(jax.tree.map(made, shapes(width), is_leaf=lambda x: isinstance(x, tuple)))


def write_raw(path: Path, arrays: list[np.ndarray]) -> None:
    with path.open("wb", buffering=0) as file:
        for array in arrays:
            view = array.reshape(-1).view(np.uint8).data
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())


def read_raw(files: list[Path]) -> list[mmap.mmap]:
    blocks = []
    for path in files:
        blocks.append(mmap.mmap(-1, path.stat().st_size))
        with path.open("rb", buffering=0) as file:
            file.readinto(blocks[-1])
    return blocks


def resident(field: str) -> int:
    """Bytes of this process in memory, now ("VmRSS") or at most since `forget_peak` ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class Clock:
    """Seconds and bytes of memory above those before, of each thing that is measured, a round after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.memory: dict[str, list[int]] = defaultdict(list)

    def __call__(self, name: str, call: Callable[[], Any]) -> Any:
        os.sync()  # nobody pays for what another wrote
        ctypes.CDLL(None).malloc_trim(0)  # nor has memory that another left
        forget_peak()
        before, began = resident("VmRSS"), time.perf_counter()
        result = call()
        self.seconds[name].append(time.perf_counter() - began)
        self.memory[name].append(resident("VmHWM") - before)
        return result


def measured(folder: Path, state: Any, rounds: int) -> Clock:
    """Each of the things that are compared once a round, in turn; a first round is not counted."""
    arrays = [np.array(x) for x in jax.tree.leaves(state)]
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    raw, clock = folder / "raw", Clock()
    with Checkpoints(folder / "steps", keep=2) as checkpoints:

        def save() -> None:
            began = time.perf_counter()
            checkpoints.save(step, state, {})
            clock.seconds["the call"].append(time.perf_counter() - began)
            checkpoints.wait()

        def resume() -> Any:
            newest, _ = checkpoints.newest_restorable()
            assert newest == step
            return restore()

        def write() -> None:
            write_raw(raw, arrays)

        def restore() -> Any:
            return checkpoints.restore(step, target)

        for step in range(rounds + 1):
            if step == 1:
                clock = Clock()
            for name, call in rotated({"raw write": write, "save": save}, step):
                clock(name, call)
            raw.unlink()
            files = [path for path in (folder / "steps" / str(step) / "arrays").rglob("*") if path.is_file()]
            reads = {"raw read": functools.partial(read_raw, files), "restore": restore, "resume": resume}
            for name, call in rotated(reads, step):
                clock(name, call)
            shutil.rmtree(folder / "steps" / str(step))
        checkpoints.save(step + 1, state, {})
        restored = checkpoints.restore(step + 1, target)
        assert all(map(equal, jax.tree.leaves(restored), arrays))
    return clock


def rotated(calls: dict[str, Callable[[], Any]], by: int) -> list[tuple[str, Callable[[], Any]]]:
    first = by % len(calls)
    return [*calls.items()][first:] + [*calls.items()][:first]


def equal(x: jax.Array, expected: np.ndarray) -> bool:
    return all(np.array_equal(shard.data, expected[shard.index]) for shard in x.addressable_shards)


def record(clock: Clock, size: int, devices: int) -> report.Record:
    """What came out, printed too."""
    pairs = [("raw write", "save"), ("raw read", "restore"), ("raw read", "resume")]
    name = f"checkpoint, {devices} device{'s' * (devices > 1)}"
    made = report.record(name, clock.seconds, work=size / MIB, unit="MiB", ratios=pairs)
    report.show(made)
    print(f"the loop is held {1e3 * statistics.median(clock.seconds['the call']):.1f} ms")
    for what in ("save", "restore"):
        memory = max(clock.memory[what]) / size
        print(f"memory of a {what}: at most {memory:.2f} of the state's size", flush=True)
        made["variants"][what]["memory"] = memory
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="times that each is timed")
    parser.add_argument("--small", action="store_true", help="4 MiB, to see that it runs")
    parser.add_argument("--folder", type=Path, help="where to write; the default is the system's temporary one")
    report.add_json(parser)
    args = parser.parse_args()
    records = []
    print(machine())
    for devices in (jax.devices()[:1], jax.devices())[: jax.device_count()]:
        state = state_on(devices, 64 if args.small else 1024)
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        print(f"\n{len(by_path(state))} arrays, {size / MIB:,.0f} MiB, devices: {len(devices)}")
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            records.append(record(measured(Path(folder), state, args.rounds), size, len(devices)))
    report.finish(args, records)


if __name__ == "__main__":
    main()
