"""Logits equal those of `transformers` with the same random weights. Needs the extra `parity`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from artifex import models

torch = pytest.importorskip("torch", reason="parity with transformers needs: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="parity with transformers needs: pip install -e '.[parity]'")

SIZES = {"vocab_size": 97, "embed_dim": 48, "num_layers": 3, "num_heads": 4, "mlp_dim": 80, "sequence_length": 64}


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 40))


def randomise(model) -> None:
    """Give every tensor, biases and norms too, values that matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1))


def stacked(state: dict, pattern: str, turn) -> jnp.ndarray:
    """One tensor of every layer, turned into our layout and stacked under `layers`."""
    return jnp.stack([jnp.asarray(turn(state[pattern.format(i)].numpy())) for i in range(SIZES["num_layers"])])


def llama_params(state: dict, kv_heads: int) -> dict:
    D, N, H = SIZES["embed_dim"], SIZES["num_heads"], SIZES["embed_dim"] // SIZES["num_heads"]
    block = "model.layers.{}."
    projections = {
        name: {"kernel": stacked(state, f"{block}self_attn.{theirs}.weight", lambda w, n=n: w.T.reshape(D, n, H))}
        for name, theirs, n in (("query", "q_proj", N), ("key", "k_proj", kv_heads), ("value", "v_proj", kv_heads))
    }
    out = stacked(state, block + "self_attn.o_proj.weight", lambda w: w.T.reshape(N, H, D))
    mlp = {
        name: {"kernel": stacked(state, f"{block}mlp.{name}_proj.weight", np.transpose)}
        for name in ("gate", "up", "down")
    }
    norms = {
        name: {"scale": stacked(state, f"{block}{theirs}.weight", np.asarray)}
        for name, theirs in (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"))
    }
    params = {
        "embed": {"table": jnp.asarray(state["model.embed_tokens.weight"].numpy())},
        "layers": {"attention": projections | {"out": {"kernel": out}}, "mlp": mlp, **norms},
        "norm": {"scale": jnp.asarray(state["model.norm.weight"].numpy())},
    }
    return params | {"head": {"kernel": jnp.asarray(state["lm_head.weight"].numpy().T)}}


def gpt2_params(state: dict) -> dict:
    D, N, H = SIZES["embed_dim"], SIZES["num_heads"], SIZES["embed_dim"] // SIZES["num_heads"]
    block = "transformer.h.{}."
    attention = {}
    for index, name in enumerate(("query", "key", "value")):
        part = slice(index * D, (index + 1) * D)
        attention[name] = {
            "kernel": stacked(state, block + "attn.c_attn.weight", lambda w, p=part: w[:, p].reshape(D, N, H)),
            "bias": stacked(state, block + "attn.c_attn.bias", lambda b, p=part: b[p].reshape(N, H)),
        }
    attention["out"] = {
        "kernel": stacked(state, block + "attn.c_proj.weight", lambda w: w.reshape(N, H, D)),
        "bias": stacked(state, block + "attn.c_proj.bias", np.asarray),
    }
    mlp = {
        name: {part: stacked(state, f"{block}mlp.{theirs}.{ending}", np.asarray) for part, ending in KERNEL_AND_BIAS}
        for name, theirs in (("up", "c_fc"), ("down", "c_proj"))
    }
    norms = {
        name: {part: stacked(state, f"{block}{theirs}.{ending}", np.asarray) for part, ending in SCALE_AND_BIAS}
        for name, theirs in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2"))
    }
    return {
        "embed": {"table": jnp.asarray(state["transformer.wte.weight"].numpy())},
        "positions": {"table": jnp.asarray(state["transformer.wpe.weight"].numpy())},
        "layers": {"attention": attention, "mlp": mlp, **norms},
        "norm": {part: jnp.asarray(state[f"transformer.ln_f.{ending}"].numpy()) for part, ending in SCALE_AND_BIAS},
    }


KERNEL_AND_BIAS = (("kernel", "weight"), ("bias", "bias"))
SCALE_AND_BIAS = (("scale", "weight"), ("bias", "bias"))


def assert_same_logits(ours, params: dict, theirs) -> None:
    graphdef, state = nnx.split(ours)
    have = jax.tree.map(jnp.shape, nnx.to_pure_dict(state))
    assert have == jax.tree.map(jnp.shape, params)
    ids = tokens()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    got = nnx.merge(graphdef, params)(jnp.asarray(ids))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("scaling", [1.0, 8.0])
def test_logits_equal_those_of_llama(kv_heads, scaling):
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    if scaling > 1:
        limits = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
        rope |= {"rope_type": "llama3", "factor": scaling, **limits}
    config = transformers.LlamaConfig(
        vocab_size=SIZES["vocab_size"],
        hidden_size=SIZES["embed_dim"],
        intermediate_size=SIZES["mlp_dim"],
        num_hidden_layers=SIZES["num_layers"],
        num_attention_heads=SIZES["num_heads"],
        num_key_value_heads=kv_heads,
        max_position_embeddings=SIZES["sequence_length"],
        rms_norm_eps=1e-5,
        rope_parameters=rope,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    randomise(theirs)
    ours = models.create(
        "llama3-8b",
        rngs=nnx.Rngs(0),
        **SIZES,
        num_kv_heads=kv_heads,
        head_dim=None,
        rope_scaling_factor=scaling,
        rope_original_length=32,
    )
    assert_same_logits(ours, llama_params(theirs.state_dict(), kv_heads), theirs)


def test_logits_equal_those_of_gpt2():
    config = transformers.GPT2Config(
        vocab_size=SIZES["vocab_size"],
        n_embd=SIZES["embed_dim"],
        n_inner=SIZES["mlp_dim"],
        n_layer=SIZES["num_layers"],
        n_head=SIZES["num_heads"],
        n_positions=SIZES["sequence_length"],
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    randomise(theirs)
    ours = models.create("gpt2", rngs=nnx.Rngs(0), **SIZES, head_dim=None)
    assert_same_logits(ours, gpt2_params(theirs.state_dict()), theirs)
