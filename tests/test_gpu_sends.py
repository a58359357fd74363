"""What the GPUs of a machine that is not there send in a step: what is needed once is sent once, and as predicted."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx
from test_targets import GPU

from artifex import models
from artifex.config import Config

ROOT = Path(__file__).parent.parent
SHAPE = {"embed_dim": 256, "num_layers": 6, "num_heads": 8, "num_kv_heads": 8, "mlp_dim": 768}
MODEL = {"name": "llama-nano", **SHAPE, "vocab_size": 4_096, "tied_head": False, "sequence_length": 256}
DEVICES = {
    "zero": {"data": 8, "zero": 1},
    "pipeline": {"data": 4, "pipeline": 2, "zero": 2},
    "tensor": {"tensor": 8},
    "context": {"fsdp": 4, "context": 2},
}
CHILD = """
import os, json, sys
sys.path[:0] = ["benchmarks/planner"]
import oracle
from artifex.scaling.targets import Target

target = Target.parse("gpu:h100:1x8")
os.environ |= target.environment()
devices = target.devices()
found = {name: oracle.measured(case, target, devices) for name, case in json.load(sys.stdin).items()}
print(json.dumps({name: one["sends"] for name, one in found.items()}))
"""
pytestmark = [pytest.mark.slow, GPU]


def case_of(device) -> dict:
    return {
        "model": MODEL,
        "data": {"sequence_length": MODEL["sequence_length"]},
        "training": {"batch_size": 64, "gradient_accumulation": 2 if "pipeline" not in device else 1},
        "optimizer": {"name": "adamw", "warmup_steps": 0},
        "device": device,
    }


@pytest.fixture(scope="module")
def sends() -> dict[str, list]:
    """(axes, kind, bytes) that the compiled step of each case sends."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    cases = json.dumps({name: case_of(device) for name, device in DEVICES.items()})
    command = [sys.executable, "-c", CHILD]
    ended = subprocess.run(command, cwd=ROOT, env=env, input=cases, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2_000:]
    return {name: [row[:3] for row in rows] for name, rows in json.loads(ended.stdout.splitlines()[-1]).items()}


def sent(rows, *, axes=None, kind=None) -> float:
    return sum(size for where, what, size in rows if axes in (None, where) and kind in (None, what))


def bytes_of_weights() -> int:
    model = nnx.eval_shape(lambda: models.create(**MODEL, rngs=nnx.Rngs(0)))
    return sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_zero_1_gathers_new_weights_once_and_sums_of_microbatches_never(sends):
    assert sent(sends["zero"], kind="all-gather") == pytest.approx(7 / 8 * bytes_of_weights(), rel=0.02)


def test_gradients_of_a_pipeline_are_scattered_and_not_summed_whole(sends):
    assert sent(sends["pipeline"], axes="data", kind="all-reduce") < 2**20
    assert sent(sends["pipeline"], axes="data", kind="reduce-scatter") > 2**26


@pytest.mark.parametrize("name", DEVICES)
def test_bytes_sent_are_those_that_the_planner_expects(sends, name):
    from artifex.scaling.autodist.cluster import Cluster
    from artifex.scaling.autodist.estimate import estimate
    from artifex.scaling.autodist.spread import Spread
    from artifex.training.planning import RunSubject

    config = Config.from_dict(case_of(DEVICES[name]))
    how = config.training
    spread = Spread.of_sections(
        config.device, 8, remat=how.remat, accumulation=how.gradient_accumulation, rows=how.batch_size
    )
    found = estimate(RunSubject(config).traced(spread, "gpu"), Cluster.parse("gpu:h100:1x8"))
    # of ZeRO-1, XLA scatters the sums of what is no part of the stack as well, though they are to lie whole
    assert found.sent() == pytest.approx(sent(sends[name]), rel=0.15 if name == "zero" else 0.05)
