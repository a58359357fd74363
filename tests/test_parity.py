"""Logits equal those of `transformers` with the same random weights, read from its folders and written to them. Needs
the extra `parity`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from artifex import models
from artifex.models import weights
from artifex.models.transformer.moe import balance

torch = pytest.importorskip("torch", reason="parity with transformers needs: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="parity with transformers needs: pip install -e '.[parity]'")

VOCABULARY, LENGTH = 97, 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SIZES = {"vocab_size": VOCABULARY, "n_embd": 48, "n_inner": 80, "n_layer": 3, "n_head": 4, "n_positions": LENGTH}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA2 = {"num_hidden_layers": 4, "head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 24}
QWEN3_WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
# name -> (their model, what its configuration has besides)
CASES = {
    "llama-4-key-heads": ("Llama", {"num_key_value_heads": 4}),
    "llama-2-key-heads": ("Llama", {"head_dim": 16}),
    "llama-1-key-head": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("Mistral", {"sliding_window": 11}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "router_aux_loss_coef": 0.02}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-window": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True, **QWEN3_WINDOW}),
    "gemma2": ("Gemma2", GEMMA2),
    "gpt2": ("GPT2", {}),
}


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, (2, 40))


def make(case: str):
    """Their model, with values that matter in every tensor, biases and norms too."""
    family, more = CASES[case]
    config = getattr(transformers, f"{family}Config")(**((GPT2_SIZES if family == "GPT2" else SIZES) | more))
    # written out: their fused attention knows no soft cap
    config._attn_implementation = "eager"
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1))
    return model


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens())).logits.float().numpy()


@pytest.fixture(scope="module", params=CASES)
def theirs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = make(request.param)
    model.save_pretrained(folder)
    return model, weights.from_pretrained(folder)


def test_a_folder_of_transformers_computes_the_same_logits(theirs):
    model, ours = theirs
    expected = their_logits(model)
    got = nnx.jit(lambda model, ids: model(ids))(ours, jnp.asarray(tokens()))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


def test_transformers_reads_what_we_write_to_the_same_logits(theirs, tmp_path):
    model, ours = theirs
    weights.save_pretrained(tmp_path, ours, layout=type(model).__name__, max_shard_bytes=60_000)
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(report.values()), report
    np.testing.assert_allclose(their_logits(again.eval()), their_logits(model), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_are_read_exactly_as_float32(dtype, tmp_path):
    model = make("llama-2-key-heads").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    read = weights.from_pretrained(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(read))} == {np.dtype("float32")}
    assert (read.embed.table[...] == model.model.embed_tokens.weight.detach().float().numpy()).all()
    gate = torch.stack([layer.mlp.gate_proj.weight for layer in model.model.layers]).float().detach().numpy()
    assert (np.asarray(read.layers.mlp.gate.kernel[...]) == gate.swapaxes(1, 2)).all()


@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_the_balance_loss_of_experts_is_theirs(chosen):
    theirs = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func
    logits_SE = np.random.default_rng(chosen).normal(size=(96, 8)).astype(np.float32) * 2
    expert_SK = np.argsort(-logits_SE, axis=-1)[:, :chosen]
    size_E = jnp.asarray(np.bincount(expert_SK.ravel(), minlength=8), jnp.int32)
    expected = float(theirs((torch.from_numpy(logits_SE),), 8, chosen))
    assert float(balance(jnp.asarray(logits_SE), size_E)["load_balance"]) == pytest.approx(expected, rel=1e-5)
    assert expected > chosen  # which it is at uniform load


def test_the_weight_of_the_balance_loss_goes_in_and_out_as_it_is(tmp_path):
    model = make("mixtral")
    model.save_pretrained(tmp_path)
    ours = weights.from_pretrained(tmp_path)
    assert ours.cfg.load_balance_weight == 0.02 == models.PRESETS["mixtral-8x7b"].load_balance_weight
    weights.save_pretrained(tmp_path / "out", ours, layout="MixtralForCausalLM")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["router_aux_loss_coef"] == 0.02
