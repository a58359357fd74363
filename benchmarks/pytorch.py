"""The same decoder by `transformers` in PyTorch, with the parameters of the bare one. Needs the extra `parity`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
import transformers
from flax import nnx

from artifex.models.transformer.config import DecoderConfig
from artifex.models.weights import save_pretrained
from artifex.models.weights_config import chosen_layout


def build(cfg: DecoderConfig, bare: Any) -> Any:
    """A Llama or a GPT-2 with the values of `bare.from_model(params, join=True)`, on the GPU where there is one."""
    torch.set_num_threads(os.cpu_count() or 1)
    config, weights = (_gpt2 if cfg.positions == "learned" else _llama)(
        cfg, jax.tree.map(lambda a: np.array(a, np.float32), bare)
    )
    kind = transformers.GPT2LMHeadModel if cfg.positions == "learned" else transformers.LlamaForCausalLM
    model: Any = kind._from_config(config, attn_implementation="sdpa")
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in weights.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def shaped(cfg: DecoderConfig) -> Any:
    """The class of `transformers` for this decoder with its configuration, on the default device."""
    values = chosen_layout(cfg, "huggingface")[1]
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values))


def load(cfg: DecoderConfig, params: Any) -> Any:
    """The class of `transformers` for this decoder with these parameters, by way of a checkpoint in its layout."""
    torch.set_num_threads(os.cpu_count() or 1)
    ours = cfg.build(nnx.Rngs(0))
    nnx.update(ours, params)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder, ours, layout="huggingface")
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa", dtype="float32"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _llama(cfg: DecoderConfig, bare: Any) -> tuple[Any, dict[str, np.ndarray]]:
    config = transformers.LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.embed_dim,
        intermediate_size=cfg.feed_forward,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.kv_heads,
        head_dim=cfg.per_head,
        max_position_embeddings=cfg.sequence_length,
        rms_norm_eps=cfg.norm_eps,
        tie_word_embeddings=cfg.tied_head,
    )
    weights = {"model.embed_tokens.weight": bare["embed"], "model.norm.weight": bare["norm"]["scale"]}
    if not cfg.tied_head:
        weights["lm_head.weight"] = bare["head"].T
    for index, layer in enumerate(bare["layers"]):
        at = f"model.layers.{index}."
        parts = np.split(layer["qkv"]["kernel"], 3, axis=-1) + np.split(layer["gate_up"]["kernel"], 2, axis=-1)
        names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
        parts += [layer["out"]["kernel"], layer["down"]["kernel"]]
        names += ["self_attn.o_proj", "mlp.down_proj"]
        weights |= {f"{at}{name}.weight": part.T for name, part in zip(names, parts, strict=True)}
        weights[at + "input_layernorm.weight"] = layer["norm1"]["scale"]
        weights[at + "post_attention_layernorm.weight"] = layer["norm2"]["scale"]
    return config, weights


def _gpt2(cfg: DecoderConfig, bare: Any) -> tuple[Any, dict[str, np.ndarray]]:
    config = transformers.GPT2Config(
        vocab_size=cfg.vocab_size,
        n_embd=cfg.embed_dim,
        n_inner=cfg.feed_forward,
        n_layer=cfg.num_layers,
        n_head=cfg.num_heads,
        n_positions=cfg.sequence_length,
        layer_norm_epsilon=cfg.norm_eps,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    weights = {"transformer.wte.weight": bare["embed"], "transformer.wpe.weight": bare["positions"]}
    theirs = {"qkv": "attn.c_attn", "out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    for index, layer in enumerate(bare["layers"]):
        at = f"transformer.h.{index}."
        for name, there in theirs.items():  # kept as (in, out) there too
            weights |= {f"{at}{there}.weight": layer[name]["kernel"], f"{at}{there}.bias": layer[name]["bias"]}
        for name, there in {"norm1": "ln_1", "norm2": "ln_2"}.items():
            weights |= {f"{at}{there}.weight": layer[name]["scale"], f"{at}{there}.bias": layer[name]["bias"]}
    weights |= {"transformer.ln_f.weight": bare["norm"]["scale"], "transformer.ln_f.bias": bare["norm"]["bias"]}
    return config, weights


def make_step(
    model: Any,
    tokens: np.ndarray,
    targets: np.ndarray,
    dtype: str,
    rate: float,
    adamw: dict[str, float],
    *,
    compiled: bool,
) -> tuple[Callable[[], float], Callable[[], float]]:
    """One training step as a call that returns the loss, and the loss alone, never compiled."""
    device = next(model.parameters()).device
    tokens_BT, targets_BT = (torch.from_numpy(np.asarray(a, np.int64)).to(device) for a in (tokens, targets))
    betas, eps, decay = (adamw["b1"], adamw["b2"]), adamw["eps"], adamw["weight_decay"]
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas, eps, decay, fused=True)
    faster = torch.compile(model) if compiled else model

    def loss(forward: Any) -> torch.Tensor:
        with torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
            logits_BTV = forward(tokens_BT, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())

    def step() -> float:
        value = loss(faster)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return value.item()

    def alone() -> float:
        with torch.no_grad():
            return loss(model).item()

    return step, alone


def make_generate(
    model: Any, prompt: np.ndarray, new_tokens: int, dtype: str, *, compiled: bool
) -> Callable[[], np.ndarray]:
    """Greedy decoding as a call that returns the new tokens; compiled: with a cache of one size, as that needs."""
    device = next(model.parameters()).device
    model = model.eval().to(getattr(torch, dtype))
    prompt_BP = torch.from_numpy(np.asarray(prompt, np.int64)).to(device)
    how: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    if compiled:
        model.forward = torch.compile(model.forward)
        how["cache_implementation"] = "static"
    # neither token ends a text: both rivals decode to the last
    model.generation_config.eos_token_id, model.generation_config.bos_token_id = None, None

    def generate() -> np.ndarray:
        with torch.inference_mode():
            mask = torch.ones_like(prompt_BP)
            return (
                model.generate(prompt_BP, attention_mask=mask, pad_token_id=0, **how)[:, prompt.shape[1] :]
                .cpu()
                .numpy()
            )

    return generate
