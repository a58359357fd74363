"""What `transformers` calls the decoder's tensors: Llama, Mistral, Mixtral, Qwen3, Gemma 2, GPT-2. Imports no JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from artifex.models.layouts import Entry, Layout
from artifex.models.transformer import config_json
from artifex.models.transformer.config import DecoderConfig

LINEAR = (1, 0)  # theirs are (out, in)


def norm(theirs: str, ours: str, bias: bool = False) -> list[Entry]:
    """Scale, and bias where it has one, of a norm."""
    scale = Entry(f"{theirs}.weight", f"{ours}.scale")
    return [scale, Entry(f"{theirs}.bias", f"{ours}.bias")] if bias else [scale]


def head(cfg: DecoderConfig) -> Entry:
    """The output head, which files of a model without one of its own may repeat."""
    if cfg.tied_head:
        return Entry("lm_head.weight", "embed.table", optional=True)
    return Entry("lm_head.weight", "head.kernel", LINEAR)


def llama_entries(cfg: DecoderConfig) -> list[Entry]:
    """Every tensor of a Llama and of what grew out of it."""
    entries = [Entry("model.embed_tokens.weight", "embed.table"), *norm("model.norm", "norm"), head(cfg)]
    step = len(cfg.attention_pattern)
    for first in range(step):
        ours = "layers" if step == 1 else f"layers.blocks.{first}"
        entries += [dataclasses.replace(entry, first=first, step=step) for entry in _block(cfg, ours)]
    return entries


def _block(cfg: DecoderConfig, ours: str) -> list[Entry]:
    theirs, attention = "model.layers.{layers}", f"{ours}.attention"
    entries = [
        *[
            Entry(f"{theirs}.self_attn.{name[0]}_proj.weight", f"{attention}.{name}.kernel", LINEAR, (1, 2))
            for name in ("query", "key", "value")
        ],
        Entry(f"{theirs}.self_attn.o_proj.weight", f"{attention}.out.kernel", LINEAR, (2, 1)),
        *norm(f"{theirs}.input_layernorm", f"{ours}.attention_norm"),
    ]
    if cfg.qk_norm:
        entries += norm(f"{theirs}.self_attn.q_norm", f"{attention}.query_norm")
        entries += norm(f"{theirs}.self_attn.k_norm", f"{attention}.key_norm")
    if cfg.post_norms:
        entries += norm(f"{theirs}.post_attention_layernorm", f"{ours}.attention_post_norm")
        entries += norm(f"{theirs}.pre_feedforward_layernorm", f"{ours}.mlp_norm")
        entries += norm(f"{theirs}.post_feedforward_layernorm", f"{ours}.mlp_post_norm")
    else:
        entries += norm(f"{theirs}.post_attention_layernorm", f"{ours}.mlp_norm")
    if cfg.num_experts:
        moe, expert = f"{theirs}.block_sparse_moe", "experts.{experts}"
        entries.append(Entry(f"{moe}.gate.weight", f"{ours}.moe.router.kernel", LINEAR))
        for name, number in (("gate", 1), ("up", 3), ("down", 2)):
            entries.append(Entry(f"{moe}.{expert}.w{number}.weight", f"{ours}.moe.{name}.kernel", LINEAR))
    else:
        for name in ("gate", "up", "down"):
            entries.append(Entry(f"{theirs}.mlp.{name}_proj.weight", f"{ours}.mlp.{name}.kernel", LINEAR))
    return entries


def gpt2_entries(cfg: DecoderConfig) -> list[Entry]:
    """Every tensor of a GPT-2. Its kernels are (in, out); query, key and value lie in one."""
    block = "transformer.h.{layers}"
    heads = [f"layers.attention.{name}" for name in ("query", "key", "value")]
    return [
        Entry("transformer.wte.weight", "embed.table"),
        Entry("transformer.wpe.weight", "positions.table"),
        *norm(f"{block}.ln_1", "layers.attention_norm", bias=True),
        Entry(f"{block}.attn.c_attn.weight", tuple(f"{path}.kernel" for path in heads), None, (1, 2)),
        Entry(f"{block}.attn.c_attn.bias", tuple(f"{path}.bias" for path in heads), None, (2,)),
        Entry(f"{block}.attn.c_proj.weight", "layers.attention.out.kernel", None, (2, 1)),
        Entry(f"{block}.attn.c_proj.bias", "layers.attention.out.bias"),
        *norm(f"{block}.ln_2", "layers.mlp_norm", bias=True),
        Entry(f"{block}.mlp.c_fc.weight", "layers.mlp.up.kernel"),
        Entry(f"{block}.mlp.c_fc.bias", "layers.mlp.up.bias"),
        Entry(f"{block}.mlp.c_proj.weight", "layers.mlp.down.kernel"),
        Entry(f"{block}.mlp.c_proj.bias", "layers.mlp.down.bias"),
        *norm("transformer.ln_f", "norm", bias=True),
        head(cfg),
    ]


FREQUENCIES = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)  # stored by releases before 2024
MASK = (r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",)


def _layout(architecture: str, read: Callable, write: Callable, **more: Any) -> Layout:
    more = {"entries": llama_entries, "ignored": FREQUENCIES} | more
    return Layout(architecture, read, config_json.checked(architecture, read, write), **more)


LAYOUTS: list[Layout] = [
    _layout("LlamaForCausalLM", config_json.read_llama, config_json.write_llama),
    _layout("MistralForCausalLM", config_json.read_mistral, config_json.write_mistral),
    _layout("MixtralForCausalLM", config_json.read_mixtral, config_json.write_mixtral),
    _layout("Qwen3ForCausalLM", config_json.read_qwen3, config_json.write_qwen3),
    _layout("Gemma2ForCausalLM", config_json.read_gemma2, config_json.write_gemma2),
    _layout(
        "GPT2LMHeadModel",
        config_json.read_gpt2,
        config_json.write_gpt2,
        entries=gpt2_entries,
        ignored=MASK,
        prefix="transformer.",
    ),
]
