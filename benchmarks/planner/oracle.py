"""What XLA makes of the grid: every case compiled for 8 devices that need not be there, a JSON line each.

    python benchmarks/planner/oracle.py FAMILY COUNT FILE [--target gpu:h100:1x8]

Cases that stand in FILE already are not compiled again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import grid

from artifex.scaling.targets import Target


def measured(case: dict[str, Any], target: Target, devices: list[Any]) -> dict[str, Any]:
    """Bytes of a device, what it sends by (axes, kind), and the FLOPs of all devices."""
    from artifex.config import Config
    from artifex.scaling.flops import flops
    from artifex.training.for_target import dump_options, program_text
    from artifex.training.memory import compile_step, placed_batch
    from artifex.training.state import blueprint, planned
    from artifex.training.step import make_step
    from artifex.training.task import batch_shapes

    config = Config.from_dict(case)
    plan = planned(config, grid.DEVICES)
    blue = blueprint(config, plan, plan.make_mesh(devices))
    shapes = batch_shapes(config)
    start = time.perf_counter()
    traced = make_step(blue).trace(blue.state, placed_batch(blue, shapes))
    with tempfile.TemporaryDirectory() as folder:
        step = compile_step(blue, shapes, lowered=traced.lower(), options=dump_options(target, folder))
        text = program_text(step.compiled, target, folder)
    took = time.perf_counter() - start
    used = step.compiled.memory_analysis()
    sends = step.sends(text)
    return {
        "whole": step.whole,
        "argument": used.argument_size_in_bytes,
        "output": used.output_size_in_bytes,
        "alias": used.alias_size_in_bytes,
        "temp": used.temp_size_in_bytes,
        "flops": flops(traced.jaxpr).total,
        "sends": [["+".join(row.axes), row.kind, row.sent, row.bound] for row in sends.rows] if sends else [],
        "anew": list(step.anew),
        "seconds": took,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=grid.FAMILIES)
    parser.add_argument("count", type=int)
    parser.add_argument("file", type=Path)
    parser.add_argument("--target", type=Target.parse, default=Target.parse(f"cpu:{grid.DEVICES}"))
    asked = parser.parse_args()
    os.environ |= asked.target.environment()
    devices = asked.target.devices()
    done = set()
    if asked.file.exists():
        rows = [json.loads(line) for line in asked.file.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if row["family"] == asked.family]
        done = {json.dumps(grid.case_of(asked.family, row["settings"]), sort_keys=True) for row in rows}
    with asked.file.open("a", encoding="utf-8") as file:
        for case in grid.sampled(asked.family, asked.count):
            case = json.loads(json.dumps(case))
            if json.dumps(case, sort_keys=True) in done:
                continue
            try:
                found = measured(case, asked.target, devices)
            except ValueError as error:
                found = {"refused": str(error)}
            training = {key: value for key, value in case["training"].items() if key != "batch_size"}
            settings = {"device": case["device"], "training": training}
            print(json.dumps({"family": asked.family, "settings": settings, **found}), file=file, flush=True)


if __name__ == "__main__":
    main()
