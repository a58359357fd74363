"""Memory: what a step needs is what it allocates, a refusal comes first, and what is said to fit does."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from artifex import train
from artifex.cli import parse_train
from artifex.config import Config
from artifex.training import memory
from artifex.training.state import blueprint
from artifex.training.task import batch_shapes


def config(rows: int = 64, **sections) -> Config:
    sizes = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "mlp_dim": 32, "sequence_length": 32}
    base = {
        "model": {"name": "llama-nano", **sizes},
        "data": {"sequence_length": 32},
        "training": {"batch_size": rows, "validation_batches": 1},
        "optimizer": {"name": "sgd"},
        "logging": {"progress": False},
    }
    return Config.from_dict({key: base.get(key, {}) | sections.get(key, {}) for key in {**base, **sections}})


def compiled(cfg: Config) -> memory.CompiledStep:
    plan = train.plan_of(cfg, jax.device_count())
    return memory.compile_step(blueprint(cfg, plan, plan.make_mesh()), batch_shapes(cfg))


def test_layers_that_are_split_are_gathered_one_at_a_time():
    model = {**config().model.model_dump(), "num_layers": 8, "embed_dim": 64, "mlp_dim": 512}
    shape = {"model": model, "device": {"fsdp": 8}}
    default, scanned, unrolled = (
        compiled(config(8, **shape, training={"batch_size": 8, "unroll": unroll})).own for unroll in ("auto", 1, 8)
    )
    assert default <= scanned < unrolled


@pytest.fixture(scope="module")
def step():
    return compiled(config())


def test_what_a_step_needs_holds_at_least_its_state_batch_and_logits(step):
    state = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.blue.state))
    batch, logits = 2 * 64 * 32 * 4 / 8, 64 * 32 * 256 * 4 / 8  # bytes on each of 8 devices
    assert state + batch + logits < step.whole < 20 * (state + batch + logits)
    assert step.own >= logits


def test_a_step_that_fits_is_returned_and_one_byte_less_is_refused_with_what_fits(step):
    shapes = step.shapes
    assert memory.fitting_step(step.blue, shapes, step.whole).whole == step.whole
    assert memory.fitting_step(step.blue, shapes, None).whole == step.whole
    have = step.whole - step.own // 2
    with pytest.raises(MemoryError, match="out of memory: the step needs") as refused:
        memory.fitting_step(step.blue, shapes, have)
    line = str(refused.value)
    assert "\n" not in line and "MiB on each device" in line
    (change,) = re.findall(r"(--[^;]*) fits: its step, compiled", line)
    # typed as it stands there, it makes a run whose step takes no more
    section, field = re.fullmatch(r"--(\w+)\.([\w-]+)=.*", change).groups()
    value = getattr(getattr(parse_train([change]).config, section), field.replace("-", "_"))
    other = config(**{section: {**getattr(config(), section).model_dump(), field.replace("-", "_"): value}})
    assert compiled(other).whole <= have


def test_where_nothing_fits_every_attempt_is_listed_and_none_is_advised(step):
    clause = memory.what_fits(step, 1000)
    assert "fits" not in clause and "--training.remat=full needs" in clause and "--device.fsdp=-1 needs" in clause
    assert clause.endswith("divide it over more devices by --device.fsdp")


def test_a_state_that_only_fits_divided_is_refused_with_the_division(step):
    need = memory.bytes_on_device(step.blue.state)
    memory.check_state(step.blue, need)
    with pytest.raises(MemoryError, match=r"--device.fsdp=-1 leaves [\d.]+ KiB of it on each"):
        memory.check_state(step.blue, need - 1)


def test_a_run_that_cannot_fit_is_refused_before_it_leaves_a_trace(tmp_path):
    (tmp_path / "text.txt").write_text("a text that is long enough for a window of 32 bytes\n" * 40)
    # the hidden layer of 2^18 tokens x 2^18 numbers: 256 GiB
    cfg = config(
        8192,
        data={"source": str(tmp_path / "text.txt"), "sequence_length": 32},
        model={**config().model.model_dump(), "mlp_dim": 2**18},
    )
    with pytest.raises(MemoryError, match=r"the step needs .* GiB on each device .*, which has"):
        train.train(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_xlas_error_about_memory_is_one_line_and_others_pass():
    with pytest.raises(MemoryError) as refused, memory.explained("no room"):
        jax.block_until_ready(jax.jit(lambda: jnp.zeros(2**45))())
    assert str(refused.value) == f"no room (Out of memory allocating {2**47} bytes)"
    with pytest.raises(jax.errors.JaxRuntimeError, match="mine"), memory.explained("no room"):
        raise jax.errors.JaxRuntimeError("INTERNAL: mine")


def test_a_tpu_compilers_refusal_is_one_line():
    """Its words, for there is no TPU to say them."""
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.41G of 15.75G hbm.\n\nTotal hbm usage:\n"
    says = r"^no room \(Ran out of memory .* Used 18.41G of 15.75G hbm\)$"
    with pytest.raises(MemoryError, match=says), memory.explained("no room"):
        raise jax.errors.JaxRuntimeError(said)


def test_a_cpu_has_at_most_its_share_of_the_machine():
    with open("/proc/meminfo", encoding="ascii") as file:
        total = int(file.readline().split()[1]) * 1024
    have = memory.device_bytes()
    assert have is not None and 0 < have <= total // jax.device_count()
