"""What the page on sharded arrays shows: its examples equal NumPy on 1, 2, 4 and 8 devices, its errors are raised."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from artifex.scaling import arrays
from artifex.scaling.mesh_utils import create_device_mesh

PAGE = Path(__file__).parents[1] / "docs/scaling/arrays.md"


def examples() -> list[str]:
    """The blocks of data, model and mixed parallelism and of the loop."""
    section = PAGE.read_text().split("## Parallelism by hand")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def check_layer(ran: dict, x_ways: int, w_ways: int) -> None:
    """A layer's outputs and gradients by NumPy, and that inputs and kernel lie in as many parts as they should."""
    x, g = np.asarray(ran["inputs"]), np.asarray(ran["output_gradients"])
    kernel, bias = (np.asarray(each[...]) for each in (ran["model"].kernel, ran["model"].bias))
    close = {"rtol": 1e-4, "atol": 1e-3}  # sums of up to 1,024 float32, in another order
    np.testing.assert_allclose(ran["outputs"], x @ kernel + bias, **close)
    np.testing.assert_allclose(ran["gradients"].kernel[...], x.T @ g, **close)
    np.testing.assert_allclose(ran["gradients"].bias[...], g.sum(0), **close)
    for array, dim, ways in ((ran["inputs"], 0, x_ways), (ran["model"].kernel[...], 1, w_ways)):
        shards = array.addressable_shards
        assert len(shards) == ran["devices"]
        assert {shard.data.shape[dim] for shard in shards} == {array.shape[dim] // ways}
    assert {shard.data.size for shard in ran["outputs"].addressable_shards} == {ran["outputs"].size // ran["devices"]}


def check_loop(ran: dict) -> None:
    """Fifty steps of gradient descent with momentum, by NumPy."""
    x, y = np.asarray(ran["inputs"], np.float64), np.asarray(ran["targets"], np.float64)
    kernel, bias, losses = np.zeros((32, 16)), np.zeros(16), []
    moments = [0 * kernel, 0 * bias]
    for _ in range(50):
        error = x @ kernel + bias - y
        losses.append((error**2).mean())
        for i, gradient in enumerate((x.T @ error, error.sum(0))):
            moments[i] = 0.9 * moments[i] + 2 * gradient / error.size
        kernel, bias = kernel - 0.5 * moments[0], bias - 0.5 * moments[1]
    np.testing.assert_allclose(ran["losses"], losses, rtol=1e-5)
    np.testing.assert_allclose(ran["state"][0]["kernel"], kernel, atol=1e-5)
    np.testing.assert_allclose(ran["state"][0]["bias"], bias, atol=1e-5)
    for leaf in jax.tree.leaves(ran["state"]):
        assert {shard.data.shape[-1] for shard in leaf.addressable_shards} == {16 // ran["model_ways"]}


def run_and_check(count: int) -> None:
    data, model, mixed, loop = examples()
    ran: dict = {}
    exec(data, ran)
    assert ran["devices"] == count
    check_layer(ran, count, 1)
    exec(model, ran)
    check_layer(ran, 1, count)
    exec(mixed, ran)
    ways = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4)}[count]
    assert (ran["model_ways"], ran["data_ways"]) == ways
    check_layer(ran, ways[1], ways[0])
    exec(loop, ran)
    check_loop(ran)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_the_examples_give_what_numpy_gives(count, monkeypatch):
    present = jax.devices()[:count]
    monkeypatch.setattr(jax, "devices", lambda: present)
    run_and_check(count)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_the_examples_give_what_numpy_gives_where_there_are_no_more_devices(count):
    program = f"import test_array_examples as examples; examples.run_and_check({count})"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(count)}
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, env=environment, check=True, timeout=300)


def on_a_mesh(device_mesh):
    mesh = create_device_mesh((2, 2), ("model", "data"), devices=jax.devices()[:4])
    return arrays.ones(8, 8, mesh=mesh, device_mesh=device_mesh)


def without_partitionable():
    with jax.threefry_partitionable(False):
        return arrays.rand(2, key=jax.random.key(0))


PROVOKED = [  # one for each row of the page's table of errors
    lambda: arrays.ones(16, 16, device_mesh=(4, 4)),
    lambda: arrays.ones(130, 64, device_mesh=(4,)),
    lambda: arrays.ones(64, 64, device_mesh=(2, 2), tensor_split=(0, 0)),
    lambda: arrays.ones(64, device_mesh=(2, 2)),
    lambda: arrays.ones(64, 64, device_mesh=(2, 2), tensor_split=(0,)),
    lambda: arrays.ones(64, 64, tensor_split=(0,)),
    lambda: on_a_mesh((4,)),
    lambda: on_a_mesh((4, 1)),
    lambda: arrays.ones(64, mesh=jax.make_mesh((2,), ("a",), (AxisType.Explicit,), devices=jax.devices()[:2])),
    lambda: arrays.ones(64, device_mesh=2),
    lambda: arrays.ones(64, dtype="float33"),
    lambda: arrays.ones(64, dtype="float64"),
    lambda: arrays.full(64, fill_value=0.5, dtype="int32"),
    lambda: arrays.rand(64, key=0),
    lambda: arrays.rand(64, key=jax.random.key(0, impl="rbg")),
    without_partitionable,
]


def test_each_error_on_the_page_is_what_the_code_says():
    rows = re.findall(r"^\| `(.*?)` \| ", PAGE.read_text().split("## Errors")[1], re.MULTILINE)
    for message, provoke in zip(rows, PROVOKED, strict=True):
        with pytest.raises((ValueError, TypeError)) as caught:
            provoke()
        assert re.fullmatch(re.escape(message).replace(re.escape("..."), ".+"), str(caught.value))
