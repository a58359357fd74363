"""Eight simulated CPU devices and strict promotion, for the tests, the notebooks and every process they start."""

import importlib.metadata
import os

# Environment variables, and before any test imports JAX: a test that starts a process passes them on.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

# XLA runs all simulated devices on one pool of as many threads as there are cores, at least one a device. A collective
# holds its thread until every device has come, so with steps dispatched ahead eight threads can all hold one and none
# is left: XLA waits 60 s and aborts. NPROC sets the size of the pool; four steps ahead of eight devices fit into 32.
os.environ["NPROC"] = "32"

import jax
import pytest

# Compiling is most of the tests' time, and unoptimised it is half. Processes that tests start, and notebooks, which
# train for longer, are compiled as usual.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def optimised():
    """Compiled as usual: for a test that trains for hundreds of steps, which then take a sixth of the time."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="module")
def forgotten():
    """Programs are those of one file: kept, a worker held 6 GB of them at the end."""
    yield
    jax.clear_caches()


def pytest_report_header() -> str:
    """What the tests run on: a result holds for these versions."""
    names = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
