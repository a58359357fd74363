"""What a training step of ours needs of a device that is not there: compiled for a TPU slice or for GPUs, on a CPU.

    python benchmarks/target_memory.py v5e:4x4 llama3.2-1b --mesh fsdp=16 --batch 64 --sequence 2048
    python benchmarks/target_memory.py h100:2x8 llama3-8b --mesh fsdp=4,tensor=4 --batch 64 --sequence 2048

Nothing runs. `pip install -e '.[tpu]'` brings the compiler for TPUs, `'.[cuda13]'` that for GPUs. A slice is named as
JAX names it; of GPUs "h100:HOSTSxGPUS". One compile a process.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import pathlib
import tempfile
import time

H100 = (
    "gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 "
    "shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 "
    "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: "
    "3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048 "
    "shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 "
    'registers_per_block_limit: 65536 } platform_name: "CUDA" dnn_version_info { major: 9 } '
    'device_description_str: "NVIDIA H100 80GB HBM3"'
)
TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("target", help="v5e:4x4, v5p:2x2x4, v6e:4x4, h100:2x8, ...")
    options.add_argument("model")
    options.add_argument("--mesh", default="fsdp=16", help="axis=size,...")
    options.add_argument("--batch", type=int, default=64, help="rows of the global batch")
    options.add_argument("--sequence", type=int, default=2_048)
    options.add_argument("--remat", default="full")
    options.add_argument("--optimizer", default="adamw")
    options.add_argument("--set", default="{}", help="JSON of sections that replace these")
    options.add_argument("--text", type=pathlib.Path, help="write the compiled program here")
    args = options.parse_args()
    print(json.dumps(measured(args)))


def measured(args: argparse.Namespace) -> dict[str, float | int | str]:
    """Bytes of one device, and seconds, of the step's compile."""
    os.environ.update(TPU if not args.target.startswith("h100") else {}, JAX_PLATFORMS="cpu")
    import jax

    from artifex.config import Config
    from artifex.models import PRESETS
    from artifex.scaling.plan import Plan
    from artifex.training.state import blueprint
    from artifex.training.step import make_step
    from artifex.training.task import batch_shapes

    sizes = {axis: int(size) for axis, size in (part.split("=") for part in args.mesh.split(","))}
    training = {"batch_size": args.batch, "steps": 1_000, "compute_dtype": "bfloat16", "remat": args.remat}
    text = PRESETS[args.model].reads == "text"
    sections = {
        "model": {"name": args.model} | ({"sequence_length": args.sequence} if text else {}),
        "data": {"sequence_length": args.sequence} if text else {"source": "digits"},
        "optimizer": {"name": args.optimizer},
        "training": training,
        "device": sizes,
    }
    for name, section in json.loads(args.set).items():
        sections[name] = sections.get(name, {}) | section
    config = Config.from_dict(sections)
    devices = devices_of(args.target)
    start = time.perf_counter()
    plan = Plan.from_device(config.device, len(devices), remat=args.remat, batch_size=args.batch)
    blue = blueprint(config, plan, plan.make_mesh(devices))
    shapes = {name: jax.ShapeDtypeStruct(*kind) for name, kind in batch_shapes(config).items()}
    where = blue.batch_sharding(shapes)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[name]) for name, x in shapes.items()}
    lowered = make_step(blue).lower(blue.state, batch)
    lowering, start = time.perf_counter() - start, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        # the text of a program for these cannot be had, but what XLA writes down after it is divided
        unreadable = args.target.startswith(("v5p", "v6e", "tpu7x"))
        dump = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        compiled = lowered.compile(compiler_options=dump if unreadable else None)
        if args.text is not None:
            found = sorted(pathlib.Path(folder).glob("*jit_step*after_spmd-partitioning*.txt"))
            program = found[-1].read_text(encoding="utf-8") if unreadable else compiled.as_text()
            args.text.write_text(program, encoding="utf-8")
    used = compiled.memory_analysis()
    return {
        "target": args.target,
        "model": args.model,
        "state_GiB": round(used.argument_size_in_bytes / 2**30, 3),
        "temporary_GiB": round(used.temp_size_in_bytes / 2**30, 3),
        "peak_GiB": round(used.peak_memory_in_bytes / 2**30, 3),
        "lowering_s": round(lowering, 1),
        "compile_s": round(time.perf_counter() - start, 1),
    }


def devices_of(target: str) -> list:
    """The devices of a topology that is not there."""
    from jax.experimental import topologies

    kind, _, shape = target.partition(":")
    if kind != "h100":
        return list(topologies.get_topology_desc(platform="tpu", topology_name=target).devices)
    # by name: neither is part of JAX's interface, and the plugin need not be there
    xla_client = importlib.import_module("jax._src.lib").xla_client
    try:
        plugin = importlib.import_module("jax_plugins.xla_cuda13")
    except ImportError:
        plugin = importlib.import_module("jax_plugins.xla_cuda12")
    library = str(pathlib.Path(plugin.__file__ or "").parent / "xla_cuda_plugin.so")
    with contextlib.suppress(Exception):  # without a driver it raises, and is loaded all the same
        plugin.initialize()
    with contextlib.suppress(Exception):
        xla_client.load_pjrt_plugin_dynamically("cuda", library)
    described = {"target_config": H100, "topology": f"1x{shape}"}
    return list(topologies.get_topology_desc(platform="cuda", topology_name=kind, **described).devices)


if __name__ == "__main__":
    main()
