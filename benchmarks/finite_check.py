"""What the check that a step's result is finite costs: the compiled step with it, as a share of the step without.

    JAX_NUM_CPU_DEVICES=8 python benchmarks/finite_check.py [--device.fsdp 4 --device.tensor 2 ...]

Takes the arguments of `python -m artifex.train`. XLA's own counts, of one device.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp

from artifex.cli import parse_train
from artifex.config import Config
from artifex.train import plan_of
from artifex.training import finite
from artifex.training.memory import placed_batch
from artifex.training.state import blueprint
from artifex.training.step import make_step
from artifex.training.task import batch_shapes


def compiled(config: Config) -> Any:
    plan = plan_of(config, jax.device_count())
    blue = blueprint(config, plan, plan.make_mesh())
    return make_step(blue).lower(blue.state, placed_batch(blue, batch_shapes(config))).compile()


def main() -> None:
    config = parse_train(sys.argv[1:]).config
    checked, first_of = compiled(config), finite.first_of
    finite.first_of = lambda *arrays: jnp.int32(finite.NONE)
    bare = compiled(config)
    finite.first_of = first_of
    for what in ("flops", "bytes accessed"):
        ratio = checked.cost_analysis()[what] / bare.cost_analysis()[what]
        print(f"{what:16}{ratio - 1:+.2%}")
    count = [step.as_text().count(" all-reduce(") for step in (checked, bare)]
    print(f"{'all-reduces':16}{count[0] - count[1]:+d} to {count[1]}")


if __name__ == "__main__":
    main()
