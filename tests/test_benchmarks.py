"""The benchmarks run, and what they compare computes the same."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str) -> str:
    """What the script prints, as a user would start it: on one device and by JAX's own promotion rules."""
    ours = ("JAX_NUM_CPU_DEVICES", "JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION", "NPROC")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, BENCHMARKS / script, "--small", "--no-torch", "--rounds", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_training_step_computes_what_bare_jax_computes():
    computed = dict(re.findall(r"^(.+): loss (\S+), norm of its gradient", run("train_step.py"), re.MULTILINE))
    assert {"ours", "ours, scanned", "bare JAX", "bare JAX, joined", "bare JAX, scanned"} == computed.keys()
    for name, loss in computed.items():
        assert float(loss) == pytest.approx(float(computed["ours"]), rel=1e-5), name


@pytest.mark.slow
def test_decoding_gives_the_tokens_of_bare_jax():
    assert re.findall(r"(\S+) % of the tokens of bare JAX are ours", run("generate.py")) == ["100.0", "100.0"]
