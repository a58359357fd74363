"""The decoder's configuration in the words of `transformers`, both ways. Imports no JAX."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from artifex.models.transformer.config import DecoderConfig

MISSING = object()
# Their config.json has no word for these, and they change no logits.
TRAINING_ONLY = ("dropout", "load_balance_weight", "router_z_weight")
REACHES = {"full_attention": "global", "sliding_attention": "local"}


def require(config: Mapping[str, Any], expected: Mapping[str, tuple]) -> None:
    """Raise `ValueError` for a value in `config` that is none of the `expected`, the first of which is the default."""
    for key, values in expected.items():
        if (value := config.get(key, values[0])) not in values:
            raise ValueError(f"config.json has {key} {value!r}; our decoder has {' or '.join(map(repr, values))}")


def number(config: Mapping[str, Any], key: str, default: Any = MISSING, kind: type = int) -> Any:
    """The number under `key`. Raises `ValueError` where it is missing without a default, or none."""
    value = config.get(key, default)
    if value is MISSING:
        raise ValueError(f"config.json has no {key}")
    if value is default:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float if kind is float else int):
        raise ValueError(f"config.json has {key} {value!r}; expected {'a number' if kind is float else 'an integer'}")
    return kind(value)


def read_rope(config: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """Our fields of the rotary positions; `theta` is the base where the file names none."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"config.json has rope_parameters {rope!r}; expected an object")
    require(config, {"partial_rotary_factor": (1.0, None)})
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {"rope_type", "type", "rope_theta"}
    fields = {"rope_theta": number(rope, "rope_theta", number(config, "rope_theta", theta, float), float)}
    if kind == "llama3":
        require(rope, {"low_freq_factor": (1.0,), "high_freq_factor": (4.0,)})
        known |= {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        fields["rope_scaling_factor"] = number(rope, "factor", kind=float)
        fields["rope_original_length"] = number(rope, "original_max_position_embeddings")
    elif kind != "default":
        raise ValueError(f"config.json has rope_type {kind!r}; our decoder has 'default' or 'llama3'")
    if odd := sorted(set(rope) - known):
        raise ValueError(f"config.json has {odd[0]} {rope[odd[0]]!r} for rope_type {kind!r}, which our decoder lacks")
    return fields


def write_rope(cfg: DecoderConfig) -> dict[str, Any]:
    """The inverse of `read_rope`, in the words that every release of transformers reads."""
    if cfg.rope_scaling_factor == 1:
        return {"rope_theta": cfg.rope_theta, "rope_scaling": None}
    limits = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling = {"factor": cfg.rope_scaling_factor, "original_max_position_embeddings": cfg.rope_original_length}
    return {"rope_theta": cfg.rope_theta, "rope_scaling": {"rope_type": "llama3", **limits, **scaling}}


def read_common(config: Mapping[str, Any], *, tied: bool = False, theta: float = 10_000.0) -> dict[str, Any]:
    """Our fields of the keys that all but GPT-2 share."""
    require(config, {"attention_bias": (False,), "mlp_bias": (False,), "quantization_config": (None,)})
    heads = number(config, "num_attention_heads")
    kv_heads = number(config, "num_key_value_heads", None)
    return {
        "vocab_size": number(config, "vocab_size"),
        "embed_dim": number(config, "hidden_size"),
        "num_layers": number(config, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": None if kv_heads == heads else kv_heads,
        "head_dim": number(config, "head_dim", None),
        "mlp_dim": number(config, "intermediate_size"),
        "sequence_length": number(config, "max_position_embeddings"),
        "norm_eps": number(config, "rms_norm_eps", 1e-6, float),
        "tied_head": flag(config, "tie_word_embeddings", tied),
        **read_rope(config, theta),
    }


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """The truth value under `key`; null is the default."""
    require(config, {key: (default, not default, None)})
    return default if config.get(key) is None else bool(config[key])


def read_reach(config: Mapping[str, Any], kinds: Any) -> dict[str, Any]:
    """Our pattern of local and global layers of one word of theirs for each layer; the shortest that repeats."""
    if not isinstance(kinds, list | tuple) or not all(isinstance(kind, str) and kind in REACHES for kind in kinds):
        raise ValueError(f"config.json has layer_types {kinds!r}; our decoder has {' and '.join(REACHES)}")
    if len(kinds) != (layers := number(config, "num_hidden_layers")):
        raise ValueError(f"config.json has {len(kinds)} layer_types for num_hidden_layers {layers}")
    reach = [REACHES[kind] for kind in kinds]
    period = next(n for n in range(1, layers + 1) if layers % n == 0 and reach == reach[:n] * (layers // n))
    window = number(config, "sliding_window") if "local" in reach else None
    return {"attention_pattern": tuple(reach[:period]), "window": window}


def read_llama(config: Mapping[str, Any]) -> DecoderConfig:
    """Our configuration of a `LlamaForCausalLM`."""
    require(config, {"hidden_act": ("silu",)})
    return DecoderConfig(**read_common(config))


def read_mistral(config: Mapping[str, Any]) -> DecoderConfig:
    """Our configuration of a `MistralForCausalLM`."""
    return DecoderConfig(**read_common(config), **_window_everywhere(config))


def read_mixtral(config: Mapping[str, Any]) -> DecoderConfig:
    """Our configuration of a `MixtralForCausalLM`."""
    return DecoderConfig(
        **read_common({"rms_norm_eps": 1e-5, **config}, theta=1_000_000.0),
        **_window_everywhere(config),
        num_experts=number(config, "num_local_experts", 8),
        experts_per_token=number(config, "num_experts_per_tok", 2),
        load_balance_weight=number(config, "router_aux_loss_coef", 0.001, float),
        router_z_weight=0.0,
    )


def _window_everywhere(config: Mapping[str, Any]) -> dict[str, Any]:
    require(config, {"hidden_act": ("silu",)})
    window = number(config, "sliding_window", None)
    return {} if window is None else {"attention_pattern": ("local",), "window": window}


def read_qwen3(config: Mapping[str, Any]) -> DecoderConfig:
    """Our configuration of a `Qwen3ForCausalLM`."""
    require(config, {"hidden_act": ("silu",)})
    if (kinds := config.get("layer_types")) is None:
        require(config, {"use_sliding_window": (False,)})
    reach = {} if kinds is None else read_reach(config, kinds)
    # 128 where a file has none: not hidden_size / num_attention_heads, as elsewhere
    return DecoderConfig(**read_common({"head_dim": 128, **config}), **reach, qk_norm=True)


def read_gemma2(config: Mapping[str, Any]) -> DecoderConfig:
    """Our configuration of a `Gemma2ForCausalLM`."""
    gelu = ("gelu_pytorch_tanh", None)
    require(config, {"hidden_activation": gelu, "use_bidirectional_attention": (None, False)})
    config = {"head_dim": 256, "sliding_window": 4_096, **config}
    reach = {"attention_pattern": ("local", "global"), "window": number(config, "sliding_window")}
    if config.get("layer_types") is not None:
        reach = read_reach(config, config["layer_types"])
    return DecoderConfig(
        **read_common(config, tied=True),
        **reach,
        norm_offset=1.0,
        post_norms=True,
        mlp="geglu",
        embed_scale=True,
        query_scale=number(config, "query_pre_attn_scalar", 256, float) ** -0.5,
        attention_softcap=number({"attn_logit_softcapping": 50.0, **config}, "attn_logit_softcapping", None, float),
        logit_softcap=number({"final_logit_softcapping": 30.0, **config}, "final_logit_softcapping", None, float),
    )


def read_gpt2(config: Mapping[str, Any]) -> DecoderConfig:
    """Our configuration of a `GPT2LMHeadModel`. Ours drops no attention weights while training."""
    fixed = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "quantization_config": (None,),
    }
    require(config, fixed)
    dropout = number(config, "resid_pdrop", 0.1, float)
    require(config, {"embd_pdrop": (dropout,)})
    return DecoderConfig(
        vocab_size=number(config, "vocab_size"),
        embed_dim=number(config, "n_embd"),
        num_layers=number(config, "n_layer"),
        num_heads=number(config, "n_head"),
        mlp_dim=number(config, "n_inner", None),
        sequence_length=number(config, "n_positions"),
        norm="layernorm",
        norm_eps=number(config, "layer_norm_epsilon", 1e-5, float),
        positions="learned",
        mlp="gelu",
        bias=True,
        tied_head=flag(config, "tie_word_embeddings", True),
        dropout=dropout,
    )


def write_common(cfg: DecoderConfig, model_type: str, **more: Any) -> dict[str, Any]:
    """The keys that all but GPT-2 share."""
    config = {
        "model_type": model_type,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.embed_dim,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.per_head,
        "intermediate_size": cfg.feed_forward,
        "max_position_embeddings": cfg.sequence_length,
        "rms_norm_eps": cfg.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": cfg.tied_head,
        "attention_bias": False,
        **write_rope(cfg),
    }
    return config | more


def write_llama(cfg: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a `LlamaForCausalLM`."""
    return write_common(cfg, "llama", mlp_bias=False)


def write_mistral(cfg: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a `MistralForCausalLM`."""
    return write_common(cfg, "mistral", sliding_window=cfg.window)


def write_mixtral(cfg: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a `MixtralForCausalLM`."""
    if not cfg.num_experts:
        raise ValueError("num_experts is 0; a MixtralForCausalLM has at least one, write another layout")
    experts = {"num_local_experts": cfg.num_experts, "num_experts_per_tok": cfg.experts_per_token}
    width = {"intermediate_size": cfg.expert_mlp_dim or cfg.feed_forward}
    balance = {"router_aux_loss_coef": cfg.load_balance_weight}
    return write_common(cfg, "mixtral", sliding_window=cfg.window, **width, **experts, **balance)


def _layer_types(cfg: DecoderConfig) -> list[str]:
    theirs = {ours: kind for kind, ours in REACHES.items()}
    return [theirs[reach] for reach in cfg.attention_pattern] * cfg.num_groups


def write_qwen3(cfg: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a `Qwen3ForCausalLM`."""
    window = {"sliding_window": cfg.window, "use_sliding_window": cfg.window is not None}
    return write_common(cfg, "qwen3", layer_types=_layer_types(cfg), **window)


def write_gemma2(cfg: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a `Gemma2ForCausalLM`, whose scale of scores is one over the root of an integer."""
    return write_common(
        cfg,
        "gemma2",
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=round((cfg.query_scale or cfg.per_head**-0.5) ** -2),
        sliding_window=cfg.window,
        layer_types=_layer_types(cfg),
        attn_logit_softcapping=cfg.attention_softcap,
        final_logit_softcapping=cfg.logit_softcap,
    )


def write_gpt2(cfg: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a `GPT2LMHeadModel`."""
    return {
        "model_type": "gpt2",
        "vocab_size": cfg.vocab_size,
        "n_embd": cfg.embed_dim,
        "n_layer": cfg.num_layers,
        "n_head": cfg.num_heads,
        "n_inner": cfg.feed_forward,
        "n_positions": cfg.sequence_length,
        "layer_norm_epsilon": cfg.norm_eps,
        "activation_function": "gelu_new",
        "tie_word_embeddings": cfg.tied_head,
        "resid_pdrop": cfg.dropout,
        "embd_pdrop": cfg.dropout,
        "attn_pdrop": 0.0,
    }


def checked(architecture: str, read: Callable, write: Callable) -> Callable[[DecoderConfig], dict[str, Any]]:
    """`write`, refusing a configuration that `read` would not give back: the layout has no words for it."""

    def write_config(cfg: DecoderConfig) -> dict[str, Any]:
        config = {"architectures": [architecture], "dtype": "float32", **write(cfg)}
        wanted, got = _computation(cfg), _computation(read(config))
        for field, value in wanted.items():
            same = math.isclose(value, got[field]) if isinstance(value, float) and got[field] else value == got[field]
            if not same:
                raise ValueError(f"{field} is {value!r}; a {architecture} has {got[field]!r}, write our own layout")
        return config

    return write_config


def _computation(cfg: DecoderConfig) -> dict[str, Any]:
    """The fields that logits depend on, derived sizes filled in."""
    fields = dataclasses.asdict(cfg)
    fields |= {"num_kv_heads": cfg.kv_heads, "head_dim": cfg.per_head, "mlp_dim": cfg.feed_forward}
    fields["query_scale"] = cfg.query_scale or cfg.per_head**-0.5
    unused: list[str] = list(TRAINING_ONLY)
    if cfg.num_experts:
        unused.append("mlp_dim")
        fields["expert_mlp_dim"] = cfg.expert_mlp_dim or cfg.feed_forward
    else:
        unused += ["experts_per_token", "normalize_expert_weights"]
    if cfg.positions != "rope":
        unused += ["rope_theta", "rope_scaling_factor", "rope_original_length"]
    elif cfg.rope_scaling_factor == 1:
        unused.append("rope_original_length")
    return {name: value for name, value in fields.items() if name not in unused}
