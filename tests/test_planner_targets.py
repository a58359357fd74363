"""Plans for machines that are not there, proved by compiling for them: they fit, and need what was predicted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_targets import GPU, TPU

RUNS = {
    "llama3-8b": {"rows": 64, "tokens": 2_048},
    "llama3-70b": {"rows": 1_024, "tokens": 8_192},
}


def planned(model: str, cluster: str, folder: Path) -> tuple[dict, float]:
    """The plan that the command writes, and bytes by the compiler over bytes predicted."""
    size = RUNS[model]
    fields = {
        "model.name": model,
        "data.sequence-length": size["tokens"],
        "training.batch-size": size["rows"],
        "training.compute-dtype": "bfloat16",
        "optimizer.name": "adamw",
        "optimizer.warmup-steps": 0,
    }
    typed = [f"--{name}={value}" for name, value in fields.items()]
    command = [
        sys.executable,
        "-m",
        "artifex.plan",
        "--cluster",
        cluster,
        "--top",
        "3",
        "--verify",
        "--out",
        str(folder),
    ]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    ended = subprocess.run([*command, *typed], env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-500:]
    plan = yaml.safe_load((folder / "plan.yaml").read_text(encoding="utf-8"))
    return plan, plan["proof"]["bytes"] / plan["predicted"]["bytes_in_all"]


@pytest.mark.slow
@GPU
@pytest.mark.parametrize(("model", "cluster"), [("llama3-8b", "gpu:h100:2x8"), ("llama3-70b", "gpu:h100:128x8")])
def test_a_plan_for_gpus_fits_and_needs_and_sends_what_was_predicted(model, cluster, tmp_path):
    plan, ratio = planned(model, cluster, tmp_path)
    assert plan["proof"]["bytes"] <= plan["cluster"]["limit_bytes"]
    assert ratio == pytest.approx(1, abs=0.10)
    sent = sum(plan["predicted"]["sent_bytes"].values())
    assert sum(plan["proof"]["sent_bytes"].values()) == pytest.approx(sent, rel=0.05)


@pytest.mark.slow
@TPU
def test_a_plan_of_70b_for_1024_tpus_fits_and_needs_what_was_predicted(tmp_path):
    plan, ratio = planned("llama3-70b", "tpu:v5p:8x8x16", tmp_path)
    assert plan["proof"]["bytes"] <= plan["cluster"]["limit_bytes"]
    assert ratio == pytest.approx(1, abs=0.10)
