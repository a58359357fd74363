"""What a backward pass keeps, by name: settings are read strictly, change no value, and keep what they say."""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from artifex import models
from artifex.config import Config
from artifex.scaling import remat
from artifex.scaling.execution import Execution, execution
from artifex.train import train

SMALL = {"num_layers": 2, "embed_dim": 32, "num_heads": 2, "num_kv_heads": 2, "mlp_dim": 64, "sequence_length": 16}
NAMED = ["qkv=keep", "attention=keep", "hidden=keep", "branch=keep", "qkv=keep,attention=keep,hidden=keep"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("none", "none"),
        ("dots", "dots"),
        ("full", "full"),
        ("hidden=keep, qkv=offload", "qkv=offload,hidden=keep"),  # in one order, so that equal settings compare equal
        ({"block": "offload", "qkv": "recompute"}, "block=offload"),
        ("qkv=recompute", "full"),
    ],
)
def test_a_setting_has_one_text(given, expected):
    assert remat.canonical(given) == expected == remat.canonical(remat.canonical(given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("some", "has 'some'; expected none, dots, full, or pairs such as qkv=keep: name some of qkv"),
        ("atention=keep", "did you mean 'attention'"),
        ("qkv=store", "qkv='store'; choose keep, offload or recompute"),
        ("qkv=keep,qkv=offload", "names 'qkv' twice"),
        ("block=recompute", "keep or offload it"),
        ({"mlp": "keep"}, "has 'mlp'"),
    ],
)
def test_what_is_no_setting_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        remat.canonical(given)


def test_a_cpu_has_no_host_to_offload_to():
    with pytest.raises(ValueError, match="remat offloads 'block' to the host, but the devices are CPUs"):
        Execution(remat="block=offload", platform="cpu")
    assert Execution(remat="block=offload", platform="tpu").remat == "block=offload"


def test_a_run_that_cannot_offload_is_refused_before_data_is_read(tmp_path):
    config = Config.from_dict({"data": {"source": "nowhere"}, "training": {"remat": {"block": "offload"}}})
    with pytest.raises(ValueError, match="remat offloads 'block'"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def gradient(model, setting, platform="cpu"):
    graphdef, params = nnx.split(model)
    batch = {"tokens": jnp.arange(32).reshape(2, 16) % 7, "targets": jnp.arange(1, 33).reshape(2, 16) % 7}

    def loss(params):
        with execution(Execution(remat=setting, unroll=1, attention="blockwise", platform=platform)):
            return nnx.merge(graphdef, params).loss(batch)[0]

    return jax.grad(loss), nnx.to_pure_dict(params)


def products(jaxpr):
    """Products of the program, in every loop counted once."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name in ("dot_general", "ragged_dot_general")
        count += sum(products(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params))
    return count


@pytest.mark.parametrize("preset", ["llama-nano", "moe-nano", "dit-digits"])
def test_every_setting_has_the_gradient_of_none(preset):
    if preset == "dit-digits":
        model = models.create(preset, rngs=nnx.Rngs(0), network={"num_layers": 2, "embed_dim": 32, "num_heads": 2})
        graphdef, params = nnx.split(model)
        params = jax.tree.map(lambda leaf: leaf + 0.02, nnx.to_pure_dict(params))  # none of its gates is 0
        batch = {"image": np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1)).astype(np.float32)}
        batch["label"] = np.arange(2, dtype=np.int32)

        def found(setting):
            def loss(params):
                with execution(Execution(remat=setting, unroll=1)):
                    return nnx.merge(graphdef, params).loss(batch)[0]

            return jax.jit(jax.grad(loss))(params)
    else:
        model = models.create(preset, rngs=nnx.Rngs(0), vocab_size=7, **SMALL)

        def found(setting):
            grad, params = gradient(model, setting)
            return jax.jit(grad)(params)

    expected = found("none")
    for setting in ("dots", "full", NAMED[-1]):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found(setting), expected)


def test_what_is_kept_is_not_computed_again():
    model = models.create("llama-nano", rngs=nnx.Rngs(0), vocab_size=7, **SMALL)
    counts = {}
    for setting in ("none", "full", "dots", *NAMED):
        grad, params = gradient(model, setting, platform="tpu")  # on one CPU maps of the same rows may be one product
        counts[setting] = products(jax.make_jaxpr(grad)(params).jaxpr) - counts.get("none", 0)
    again = {setting: count for setting, count in counts.items() if setting != "none"}
    # forward: queries, keys, values, scores and their product with values, output, gate, up; the last, down, is read by
    # no gradient of the block
    assert again["full"] == 8
    assert again["qkv=keep"] == 5
    assert again["attention=keep"] == 6
    assert again["hidden=keep"] == 6
    assert again["branch=keep"] == 7  # of what a layer adds, the output projection alone is read again
    assert again["qkv=keep,attention=keep,hidden=keep"] == 1  # the projection of attention's output
    assert again["dots"] == 0  # nor the scores: the output of attention is kept, and its backward needs no more


def test_what_goes_to_the_host_is_named_in_the_program_for_a_tpu():
    model = models.create("llama-nano", rngs=nnx.Rngs(0), vocab_size=7, **SMALL)
    grad, params = gradient(model, "qkv=offload,block=offload", platform="tpu")
    text = jax.jit(grad).trace(params).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("pinned_host") == 4  # of a layer queries, keys, values and the stream
    assert (
        "pinned_host"
        not in jax.jit(gradient(model, "full", "tpu")[0]).trace(params).lower(lowering_platforms=("tpu",)).as_text()
    )


def test_every_name_marks_something():
    from artifex.models.transformer import config

    marked = set()

    def names(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "name":
                marked.add(equation.params["name"])
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                names(inner)

    for attention in ("softmax", "linear"):
        cfg = dataclasses.replace(config.PRESETS["llama-nano"], attention=attention, vocab_size=7, **SMALL)
        grad, params = gradient(cfg.build(nnx.Rngs(0)), "none")
        marked.clear()
        names(jax.make_jaxpr(grad)(params).jaxpr)
        assert marked == set(remat.RESIDUALS)
