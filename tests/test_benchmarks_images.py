"""The benchmark of the image models runs, and what it compares computes the same."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "image_step.py"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dit", "unet", "vae"])
def test_the_training_step_computes_what_bare_jax_and_pytorch_compute(model):
    # as a user would start it: on one device and by JAX's own promotion rules
    ours = ("JAX_NUM_CPU_DEVICES", "JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION", "NPROC")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    with_torch = all(importlib.util.find_spec(name) for name in ("torch", "diffusers"))
    command = [sys.executable, BENCHMARK, model, "--small", "--rounds", "2", *([] if with_torch else ["--no-torch"])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = dict(re.findall(r"^(.+): loss ([^\s,]+)", done.stdout, re.MULTILINE))
    norms = dict(re.findall(r"^(.+): loss .+ gradient (\S+)", done.stdout, re.MULTILINE))
    assert losses.keys() >= {"ours", "bare JAX", *(["PyTorch"] if with_torch else [])}
    assert norms.keys() == {"ours", "bare JAX"}
    for computed in (losses, norms):
        assert [float(value) for value in computed.values()] == pytest.approx(
            [float(computed["ours"])] * len(computed), rel=1e-5
        )
    assert "ours / bare JAX = " in done.stdout
