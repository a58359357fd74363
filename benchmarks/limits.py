"""What grows with the number of devices, measured where one machine can: a line of JSON for each question and count.

    python benchmarks/limits.py start 1024        # JAX's devices and our mesh
    python benchmarks/limits.py place 1024        # llama3-70b built and placed by the shape of a mesh, without devices
    python benchmarks/limits.py blueprint 1024    # its whole training state on simulated devices
    python benchmarks/limits.py save 64           # files, manifest, seconds of a checkpoint in as many parts
    python benchmarks/limits.py hash 1            # SHA-256 of a checkpoint's bytes, by one thread
    python benchmarks/limits.py order 100000      # a batch, where so many processes share an epoch
    python benchmarks/limits.py target 12800x8    # llama3-70b compiled for so many hosts of H100s: `'.[gpu-targets]'`

One question a process: memory is that of the process, at its highest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MODEL = "llama3-70b"
ARRAYS = 4  # of a checkpoint; each is one folder, so that figures are of one array


def main() -> None:
    questions: dict[str, Callable[[str], dict[str, Any]]] = {
        "start": start,
        "place": place,
        "blueprint": state,
        "save": save,
        "hash": hashed,
        "order": order,
        "target": target,
    }
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("question", choices=questions)
    options.add_argument("devices", help="how many; of target HOSTSxGPUS")
    args = options.parse_args()
    if args.question in ("start", "blueprint", "save"):
        os.environ["JAX_NUM_CPU_DEVICES"] = args.devices
    os.environ["JAX_PLATFORMS"] = "cpu"
    found = questions[args.question](args.devices)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps({"question": args.question, "devices": args.devices, **found, "peak_MiB": round(peak)}))


@contextmanager
def timed(found: dict[str, Any], name: str) -> Iterator[None]:
    """Put the seconds and the growth of the process within it to `found`."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    yield
    found[f"{name}_s"] = round(time.perf_counter() - begin, 3)
    found[f"{name}_MiB"] = round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10, 1)


def sizes_of(count: int) -> dict[str, int]:
    """A mesh of so many devices that the model's dims divide over: FSDP to 1,024, beside it data parallelism."""
    fsdp = math.gcd(count, 1_024)
    return {"data": count // fsdp, "fsdp": fsdp}


def config_of(sizes: dict[str, int]) -> Any:
    from artifex.config import Config

    return Config.from_dict(
        {
            "model": {"name": MODEL, "sequence_length": 2_048},
            "data": {"sequence_length": 2_048},
            "optimizer": {"name": "adamw"},
            "training": {
                "batch_size": sizes["data"] * sizes["fsdp"],
                "compute_dtype": "bfloat16",
                "remat": "full",
            },
            "device": sizes,
        }
    )


def start(count: str) -> dict[str, Any]:
    import jax

    from artifex.scaling.mesh_utils import create_device_mesh

    found: dict[str, Any] = {}
    with timed(found, "devices"):
        jax.devices()
    with timed(found, "mesh"):
        create_device_mesh((int(count),), ("fsdp",))
    return found


def place(count: str) -> dict[str, Any]:
    from flax import nnx

    from artifex import models
    from artifex.scaling.placement import explain
    from artifex.scaling.strategies import DataParallelStrategy, FSDPStrategy, combine

    found: dict[str, Any] = {}
    with timed(found, "build"):
        model = nnx.eval_shape(lambda: models.create(MODEL, rngs=nnx.Rngs(0)))
    with timed(found, "place"):
        rules = combine({"data": DataParallelStrategy("data"), "fsdp": FSDPStrategy("fsdp")})
        told = explain(model, rules, sizes_of(int(count)))
    return found | {"parameters": told.parameters, "bytes_per_device": told.bytes_per_device}


def state(count: str) -> dict[str, Any]:
    import jax

    from artifex.scaling.placement import bytes_on_device
    from artifex.training.state import blueprint, planned

    found: dict[str, Any] = {}
    with timed(found, "devices"):
        config, have = config_of(sizes_of(int(count))), jax.devices()
    with timed(found, "blueprint"):
        plan = planned(config, len(have))
        blue = blueprint(config, plan, plan.make_mesh(have))
    return found | {"arrays": len(jax.tree.leaves(blue.state)), "bytes_per_device": bytes_on_device(blue.state)}


def save(count: str) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from artifex.scaling import manifest
    from artifex.scaling.checkpoints import Checkpoints
    from artifex.scaling.mesh_utils import create_device_mesh

    mesh = create_device_mesh((int(count),), ("fsdp",))
    where = NamedSharding(mesh, PartitionSpec("fsdp"))
    tree = {f"array{index}": jax.device_put(jnp.ones((int(count), 256)), where) for index in range(ARRAYS)}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, asynchronous=False) as checkpoints:
        with timed(found, "save"):
            checkpoints.save(1, tree, {})
        with timed(found, "restore"):
            checkpoints.restore(1, tree)
        step = Path(folder) / "1"
        files = sum(1 for path in step.rglob("*") if path.is_file())
        with timed(found, "seal"):  # once more, alone: what process 0 does when all have written
            manifest.seal(step, {})
        found |= {"arrays": ARRAYS, "files": files, "manifest_bytes": (step / "manifest.json").stat().st_size}
    return found


def hashed(count: str) -> dict[str, Any]:
    content = bytes(2**28)
    begin = time.process_time()
    for _ in range(int(count)):
        hashlib.sha256(content).digest()
    return {"GB_per_cpu_second": round(int(count) * len(content) / 1e9 / (time.process_time() - begin), 2)}


def order(count: str) -> dict[str, Any]:
    """The last process's 8 rows, of an epoch of 500 million windows, or as many as the count needs."""
    import numpy as np

    from artifex.data.batches import Batches

    processes, rows, length = int(count), 8, 4
    tokens = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint16), (2_000_000_000,), (0,))  # no memory
    batches = Batches(
        tokens,
        batch_size=rows * processes,
        sequence_length=length,
        process_index=processes - 1,
        process_count=processes,
    )
    found: dict[str, Any] = {}
    batches.batch_at(0)
    with timed(found, "ten_batches"):
        for step in range(1_000, 1_010):
            batches.batch_at(step)
    return found


def target(shape: str) -> dict[str, Any]:
    from artifex.scaling.targets import Target

    to = Target.parse(f"gpu:h100:{shape}")
    to.check_compiler()
    os.environ.update(to.environment())

    from artifex.training.memory import compile_step, placed_batch
    from artifex.training.state import blueprint, planned
    from artifex.training.step import make_step
    from artifex.training.task import batch_shapes

    found: dict[str, Any] = {}
    with timed(found, "devices"):
        devices = to.devices()
    with timed(found, "blueprint"):
        config = config_of(sizes_of(to.device_count))
        plan = planned(config, len(devices))
        blue = blueprint(config, plan, plan.make_mesh(devices))
    with timed(found, "lower"):
        shapes = batch_shapes(config)
        lowered = make_step(blue).lower(blue.state, placed_batch(blue, shapes))
    with timed(found, "compile"):
        step = compile_step(blue, shapes, lowered=lowered)
    return found | {"GiB_per_device": round(step.whole / 2**30, 2)}


if __name__ == "__main__":
    main()
