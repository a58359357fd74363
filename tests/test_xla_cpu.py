"""What XLA for CPUs is asked for: on one device of a processor with AVX2 alone, and in no program within another."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from artifex.config import Config
from artifex.models.transformer.config import DecoderConfig
from artifex.scaling import xla_cpu
from artifex.scaling.execution import Execution
from artifex.training.memory import compile_step
from artifex.training.state import blueprint, planned
from artifex.training.step import make_evaluate, make_step

RUN = {
    "model": {"name": "llama-nano", "embed_dim": 64, "num_layers": 1, "vocab_size": 64, "sequence_length": 16},
    "data": {"sequence_length": 16},
    "training": {"batch_size": 8},
}
PROCESSORS = {
    "flags\t\t: fpu sse4_2 avx avx2 fma\n": True,
    "model name\t: of 2024\nflags\t\t: fpu avx2 avx512f avx512bw\n": False,
    "flags\t\t: fpu sse4_2\n": False,
    "Features\t: fp asimd\n": False,  # of an ARM
}


@pytest.fixture(params=[True, False], ids=["Eigen", "YNNPACK"])
def eigen(request, monkeypatch):
    monkeypatch.setattr(xla_cpu, "has_eigen_multiply", lambda: request.param)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    return request.param


@pytest.mark.parametrize("text", PROCESSORS)
def test_eigen_multiplies_where_there_is_avx2_and_no_more(text, tmp_path):
    (tmp_path / "cpuinfo").write_text(text)
    assert xla_cpu.has_eigen_multiply(tmp_path / "cpuinfo") == PROCESSORS[text]


def test_nothing_is_asked_for_where_the_processor_is_unknown_or_the_flags_say_what_they_want(tmp_path, monkeypatch):
    assert not xla_cpu.has_eigen_multiply(tmp_path / "no file")
    monkeypatch.setattr(xla_cpu, "has_eigen_multiply", lambda: True)
    monkeypatch.setenv("XLA_FLAGS", f"--{xla_cpu.OPTION}=individual_dot")
    assert Execution().compiler_options == {}


def step():
    config = Config.from_dict(RUN)
    plan = planned(config, 1)
    blue, tokens = blueprint(config, plan, plan.make_mesh(jax.devices()[:1])), ((8, 16), jnp.int32)
    return blue, compile_step(blue, {"tokens": tokens, "targets": tokens}).compiled.as_text()


def by_ynnpack(text):
    """Fusions that YNNPACK computes, and how many of them have a product."""
    called = re.findall(r"calls=(%[\w.]+).*__ynn_fusion", text)
    bodies = dict(re.findall(r"^(%[\w.]+) [^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    return len(called), sum(" dot(" in bodies[name] for name in called)


def test_on_one_device_ynnpack_multiplies_only_what_is_summed_at_once(monkeypatch):
    monkeypatch.setattr(xla_cpu, "has_eigen_multiply", lambda: False)
    blue, text = step()
    assert blue.compiler_options is None
    products = by_ynnpack(text)[1]
    monkeypatch.setattr(xla_cpu, "has_eigen_multiply", lambda: True)
    fusions, left = by_ynnpack(step()[1])
    assert products > 20 and left < products / 4, (products, left)
    assert fusions - left > 0, "sums are still YNNPACK's"


def test_on_a_mesh_nothing_is_asked_for(eigen):
    mesh = jax.make_mesh((8,), ("data",))
    assert Execution(mesh=mesh).compiler_options == {} and bool(Execution().compiler_options) == eigen


def test_steps_and_evaluations_run_within_another_program_too(eigen):
    blue, _ = step()
    tokens = np.arange(8 * 17, dtype=np.int32).reshape(8, 17) % 64
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    run, evaluate = make_step(blue), make_evaluate(blue)

    def twice(state):
        for _ in range(2):
            state, metrics = run(state, batch)
        return metrics["loss"], evaluate(state, batch)["loss"]

    within = jax.jit(twice)(blue.init())
    np.testing.assert_allclose(within, twice(blue.init()), rtol=1e-6)
    state = blue.init()
    known = jax.jit(lambda: evaluate(state, batch)["loss"])()
    np.testing.assert_allclose(known, evaluate(state, batch)["loss"], rtol=1e-6)


def test_generation_gives_the_same_tokens_alone_and_within_another_program(eigen):
    cfg = DecoderConfig(embed_dim=32, num_layers=1, num_heads=2, vocab_size=64, sequence_length=16)
    model, prompt = cfg.build(nnx.Rngs(0)), np.arange(6, dtype=np.int32).reshape(2, 3)
    draw = lambda prompt: model.sample(jax.random.key(0), prompt=prompt, num_tokens=8, temperature=0)  # noqa: E731
    alone = draw(prompt)
    np.testing.assert_array_equal(jax.jit(draw)(prompt), alone)
    np.testing.assert_array_equal(jax.jit(lambda: draw(prompt))(), alone)
    shapes = jax.eval_shape(draw, prompt)
    assert shapes.shape == alone.shape


@pytest.mark.parametrize(("rows", "heads"), [(1, 2), (1, 1), (3, 2), (3, 1)])
def test_a_token_is_written_to_the_caches_in_place(rows, heads, eigen):
    """Copies of a layer's keys and values took a tenth of a token's time."""
    how = {"embed_dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": heads, "vocab_size": 64}
    graphdef, state = nnx.split(DecoderConfig(**how, sequence_length=64).build(nnx.Rngs(0)))
    prompt = np.arange(rows * 3, dtype=np.int32).reshape(rows, 3)

    def draw(state):
        return nnx.merge(graphdef, state).sample(jax.random.key(0), prompt=prompt, num_tokens=8, temperature=0)

    text = jax.jit(draw, compiler_options=Execution().compiler_options).lower(state).compile().as_text()
    (loop,) = re.findall(r" while\(.*body=(%[\w.]+)", text)
    body = re.search(rf"^{re.escape(loop)} [^\n]*\{{\n(.*?)^\}}", text, re.MULTILINE | re.DOTALL)[1]
    assert len(re.findall(r"dynamic-update-slice\S* = .* fusion\(", body)) == 2 * 2 + 1  # of a layer keys and values
    assert re.findall(r"= f32\S* copy\(", body) == []
