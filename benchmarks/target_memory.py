"""What a training step of ours needs of a device that is not there, as one line of JSON; or the whole program.

    python benchmarks/target_memory.py v5e:4x4 llama3.2-1b --mesh fsdp=16 --batch 64 --sequence 2048
    python benchmarks/target_memory.py h100:2x8 llama3-8b --mesh fsdp=4,tensor=4 --batch 64 --sequence 2048

`python -m artifex.train --dry-run --target` answers the same of any configuration; this is for many of them, of one
preset each, and for reading the program. Nothing runs. `pip install -e '.[tpu]'` brings the compiler for TPUs,
`'.[gpu-targets]'` that for GPUs. One compile a process.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import tempfile
import time

from artifex.scaling.targets import CHIPS, Target


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
    options.add_argument("--compiler", default="{}", help="JSON of options of the compiler's own")
    options.add_argument("--text", type=pathlib.Path, help="write the compiled program here")
    args = options.parse_args()
    print(json.dumps(measured(args, target_of(args.target))))


def target_of(name: str) -> Target:
    """The target of a name, which may leave its platform out."""
    kind = name.split(":")[0]
    return Target.parse(f"{CHIPS[kind].platform}:{name}" if kind in CHIPS else name)


def measured(args: argparse.Namespace, target: Target) -> dict[str, float | int | str]:
    """Bytes of one device, and seconds, of the step's compile."""
    target.check_compiler()
    os.environ.update(target.environment())

    from artifex.config import Config
    from artifex.models import PRESETS
    from artifex.training.for_target import dump_options, program_text
    from artifex.training.memory import compile_step, placed_batch
    from artifex.training.state import blueprint, planned
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
    devices = target.devices()
    start = time.perf_counter()
    plan = planned(config, len(devices))
    blue, shapes = blueprint(config, plan, plan.make_mesh(devices)), batch_shapes(config)
    lowered = make_step(blue).lower(blue.state, placed_batch(blue, shapes))
    lowering, start = time.perf_counter() - start, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        chosen = (dump_options(target, folder) or {}) | json.loads(args.compiler)
        step = compile_step(blue, shapes, lowered=lowered, options=chosen)
        compiling = time.perf_counter() - start
        if args.text is not None:
            args.text.write_text(program_text(step.compiled, target, folder), encoding="utf-8")
    return {
        "target": args.target,
        "model": args.model,
        "state_GiB": round((step.whole - step.own) / 2**30, 3),
        "temporary_GiB": round(step.own / 2**30, 3),
        "whole_GiB": round(step.whole / 2**30, 3),
        "lowering_s": round(lowering, 1),
        "compile_s": round(compiling, 1),
    }


if __name__ == "__main__":
    main()
