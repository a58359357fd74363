"""How a model runs: the execution at hand is the one that was entered, also in programs that are compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from artifex.config import Config
from artifex.models import cpu, layers
from artifex.scaling.axes import Rules
from artifex.scaling.execution import Execution, compiled, current_execution, execution, held
from artifex.scaling.plan import Plan
from artifex.training.state import blueprint


def mesh_of(count):
    return Mesh(np.array(jax.devices()[:count]), ("data",), axis_types=(AxisType.Auto,))


def test_without_one_the_defaults_of_the_machine_hold():
    how = current_execution()
    assert (how.platform, how.mesh, how.remat, how.on_one_cpu) == ("cpu", None, "none", True)


@pytest.mark.parametrize(("devices", "layers_at_once"), [(1, 12), (8, 1)])
def test_what_is_chosen_for_one_cpu_device_does_not_hold_on_a_mesh(devices, layers_at_once):
    with execution(Execution(mesh=mesh_of(devices))):
        assert cpu.layers_at_once(12) == layers_at_once
        assert cpu.merges_dims() == cpu.joins(64) == (devices == 1)
        assert isinstance(cpu.positions(8), np.ndarray) == (devices == 1)
    with execution(Execution(mesh=mesh_of(devices), unroll=3)):
        assert cpu.layers_at_once(12) == 3 and cpu.layers_at_once(2) == 2


def test_a_compiled_function_is_compiled_for_each_execution_and_each_once():
    traced = []

    @compiled("power")
    def norm(model, x, *, power):
        traced.append(current_execution().remat)
        return jnp.sum(model(x)) ** power

    model, x = layers.Linear((4, 2), ("embed", "mlp"), rngs=nnx.Rngs(0)), jnp.ones((3, 4))
    plain = norm(model, x, power=2)
    for setting in ("full", "dots", "full", "none"):
        with execution(Execution(remat=setting)):
            np.testing.assert_allclose(norm(model, x, power=2), plain, rtol=1e-6)
    assert traced == ["none", "full", "dots"]


def test_a_backward_pass_that_is_traced_later_has_the_execution_of_its_loss():
    seen = []

    def loss(x):
        with execution(Execution(remat="full", rules=Rules.of(activations={"batch": "data"}), mesh=mesh_of(8))):
            same = jax.custom_vjp(lambda x: x)
            same.defvjp(lambda x: (x, None), held(lambda _, ct: (seen.append(current_execution()), (ct,))[1]))
            return same(x)

    jax.grad(loss)(1.0)
    assert [(how.remat, how.mesh.size) for how in seen] == [("full", 8)]


def test_a_blueprint_runs_a_model_under_its_plan_and_in_its_dtype():
    config = Config.from_dict(
        {
            "model": {"name": "llama-nano", "embed_dim": 32, "num_layers": 1, "vocab_size": 64, "sequence_length": 16},
            "data": {"sequence_length": 16},
            "training": {"batch_size": 8, "compute_dtype": "bfloat16", "remat": "dots"},
            "device": {"fsdp": 8},
        }
    )
    plan = Plan.from_device(config.device, 8, remat="dots")
    blue = blueprint(config, plan, plan.make_mesh())
    state = blue.init()

    def look(model, word):
        how, kernel = current_execution(), model.layers.attention.query.kernel[...]
        return word, how.mesh.size, how.remat, how.platform, kernel.dtype.name, kernel.sharding.spec

    stored = state.params["layers"]["attention"]["query"]["kernel"]
    assert blue.run(state, look, "seen") == ("seen", 8, "dots", "cpu", "bfloat16", stored.sharding.spec)
    assert stored.dtype == jnp.float32
