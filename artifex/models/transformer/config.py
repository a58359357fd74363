"""The decoder's configuration and presets. Imports no JAX, so that configuration errors answer at once."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from flax import nnx

    from artifex.models.transformer.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder: GPT-2, Llama, Qwen3, Gemma 2, Mixtral and what lies between. Sizes are in elements.

    `num_heads * head_dim` need not be `embed_dim`. Raises `ValueError` for sizes that do not fit together and for
    options that need another one.
    """

    reads: ClassVar[Literal["text", "images"]] = "text"

    vocab_size: int = 256  # entries of the token table
    embed_dim: int = 128  # width of the residual stream
    num_layers: int = 3  # blocks
    num_heads: int = 4  # query heads
    num_kv_heads: int | None = None  # key and value heads; none: one for each query head, fewer are shared by groups
    head_dim: int | None = None  # features of a head; none: embed_dim / num_heads
    mlp_dim: int | None = None  # hidden width of a feed-forward layer; none: 4 embed_dim
    sequence_length: int = 256  # the longest sequence in tokens, prompt and continuation together
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # before each attention and feed-forward layer, and at the end
    norm_eps: float = 1e-5  # added to the variance, above 0
    norm_offset: float = 0.0  # an RMS norm multiplies by this + its scale; 1 in Gemma, whose scales start at 0
    post_norms: bool = False  # a norm after each attention and feed-forward layer too, as in Gemma 2
    positions: Literal["rope", "learned"] = "rope"  # turned queries and keys, or a table added to the tokens
    rope_theta: float = 10_000.0  # base of the rotary wavelengths, above 0
    rope_scaling_factor: float = 1.0  # above 1: Llama 3's scaling, this much slower turns of the long wavelengths
    rope_original_length: int = 8_192  # tokens from which a wavelength counts as long for that scaling
    attention: Literal["softmax", "linear"] = "softmax"  # linear: a state of fixed size in place of keys and values
    causal: bool = True  # each position sees itself and those before; false: all, as masked diffusion needs
    qk_norm: bool = False  # an RMS norm over head_dim on queries and keys before they are turned, as in Qwen3
    query_scale: float | None = None  # scores are multiplied by this; none: head_dim^-1/2
    attention_pattern: tuple[Literal["global", "local"], ...] = ("global",)  # reach of the layers in turn, repeated
    window: int | None = None  # newest keys that a local layer sees, its own position among them
    attention_softcap: float | None = None  # c bounds scores by c tanh(score / c), as in Gemma 2; none: unbounded
    logit_softcap: float | None = None  # the same for logits
    mlp: Literal["swiglu", "geglu", "gelu"] = "swiglu"  # feed-forward layer: gated as in Llama or Gemma, plain in GPT-2
    num_experts: int = 0  # experts in place of each feed-forward layer; 0: none
    experts_per_token: int = 2  # experts that a token goes to
    num_shared_experts: int = 0  # experts that every token goes to besides
    expert_mlp_dim: int | None = None  # hidden width of an expert; none: that of a feed-forward layer
    capacity_factor: float | None = None  # an expert takes this times its even share while training; none: all tokens
    expert_buffer: float | None = None  # rows for a device of experts, in even shares; none: whatever may come
    normalize_expert_weights: bool = True  # the weights of a token's experts sum to 1, as in Mixtral
    load_balance_weight: float = 0.01  # of the loss that evens the experts' load, 0 or above
    router_z_weight: float = 0.001  # of the loss that keeps the router's logits small, 0 or above
    z_loss_weight: float = 0.0  # of the loss that keeps log(sum of exp(logits)) near 0, 0 or above; PaLM: 0.0001
    bias: bool = False  # in projections and norms, as in GPT-2
    tied_head: bool = True  # the output head is the token table
    embed_scale: bool = False  # token vectors are multiplied by embed_dim^1/2, as in Gemma
    dropout: float = 0.0  # of embeddings and of each residual branch while training, from 0 to below 1

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embed_dim", "num_layers", "num_heads", "sequence_length", "rope_original_length"):
            _positive(name, getattr(self, name))
        for name in ("num_kv_heads", "head_dim", "mlp_dim", "expert_mlp_dim", "window"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} does not divide by num_heads {self.num_heads}; "
                "choose sizes that do, or set head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} does not divide by num_kv_heads {self.kv_heads}; "
                "each key head serves the same number of query heads"
            )
        if self.positions == "rope" and self.per_head % 2:
            raise ValueError(f"head_dim {self.per_head} is odd; rotary positions turn pairs of features, make it even")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")
        positive = ("norm_eps", "rope_theta", "query_scale", "attention_softcap", "logit_softcap")
        for name in (*positive, "capacity_factor", "expert_buffer"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} {value} is not a positive number")
        if not self.rope_scaling_factor >= 1:
            raise ValueError(f"rope_scaling_factor {self.rope_scaling_factor} is below 1; 1 is no scaling")
        if not 0 <= self.z_loss_weight < math.inf:
            raise ValueError(f"z_loss_weight {self.z_loss_weight} is not a number from 0 up")
        if self.norm != "rmsnorm" and self.norm_offset:
            raise ValueError(f"norm_offset {self.norm_offset} is for norm 'rmsnorm', not {self.norm!r}; leave it at 0")
        self._check_attention()
        self._check_experts()

    def _check_attention(self) -> None:
        pattern = self.attention_pattern
        if not pattern or set(pattern) - {"global", "local"}:
            raise ValueError(f"attention_pattern {pattern!r} is no sequence of 'global' and 'local'")
        if self.num_layers % len(pattern):
            raise ValueError(
                f"num_layers {self.num_layers} does not divide by the {len(pattern)} layers of attention_pattern "
                f"{pattern!r}; the pattern repeats"
            )
        if ("local" in pattern) != (self.window is not None):
            raise ValueError(
                f"window {self.window} with attention_pattern {pattern!r}; local layers need a window, others have none"
            )
        if self.window is not None and not self.causal:
            raise ValueError(f"window {self.window} with causal=False; a window looks back, leave it out")
        if self.attention == "linear":
            softmax_only = {"causal": True, "qk_norm": False, "query_scale": None, "attention_softcap": None}
            softmax_only |= {"attention_pattern": ("global",)}
            for name, default in softmax_only.items():
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name} {getattr(self, name)!r} is for attention 'softmax'; with 'linear' leave it {default!r}"
                    )

    def _check_experts(self) -> None:
        for name in ("num_experts", "num_shared_experts", "load_balance_weight", "router_z_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} is not a number from 0 up")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token {self.experts_per_token} is not from 1 to num_experts {self.num_experts}"
            )
        if self.num_experts and (self.mlp == "gelu" or self.bias):
            raise ValueError(
                f"num_experts {self.num_experts} with mlp {self.mlp!r} and bias={self.bias}; experts are gated and "
                "have no bias: choose mlp 'swiglu' or 'geglu' and bias False"
            )
        if self.expert_buffer is not None and self.capacity_factor is not None:
            raise ValueError(
                f"expert_buffer {self.expert_buffer} beside capacity_factor {self.capacity_factor}; a capacity bounds "
                "the buffers already, leave one of the two out"
            )
        if not self.num_experts:
            for name in ("num_shared_experts", "expert_mlp_dim", "capacity_factor", "expert_buffer"):
                if getattr(self, name):
                    raise ValueError(f"{name} {getattr(self, name)} without experts; set num_experts, or leave it out")

    # A derived size stays None in its field, so that replacing the size it derives from moves it along.
    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def per_head(self) -> int:
        """Features of one head."""
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def feed_forward(self) -> int:
        """Hidden width of the feed-forward layers."""
        return self.mlp_dim or 4 * self.embed_dim

    @property
    def windows(self) -> list[int | None]:
        """The window of each layer of the pattern; None sees every key."""
        return [self.window if reach == "local" else None for reach in self.attention_pattern]

    @property
    def num_groups(self) -> int:
        """Repetitions of the attention pattern: the size of the stacked `layers` dim."""
        return self.num_layers // len(self.attention_pattern)

    def build(self, rngs: nnx.Rngs) -> Decoder:
        """The model with fresh parameters."""
        from artifex.models.transformer.decoder import Decoder

        return Decoder(self, rngs=rngs)


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")


def _gpt2(embed: int, layers: int, heads: int, **more) -> DecoderConfig:
    sizes: dict = {"vocab_size": 50_257, "sequence_length": 1_024, "head_dim": embed // heads}
    layout: dict = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True}
    return DecoderConfig(embed_dim=embed, num_layers=layers, num_heads=heads, **(sizes | layout | more))


def _llama(embed: int, layers: int, heads: int, kv_heads: int, mlp_dim: int, **more) -> DecoderConfig:
    grouped = kv_heads if kv_heads != heads else None
    sizes: dict = {"num_kv_heads": grouped, "head_dim": embed // heads, "mlp_dim": mlp_dim, "tied_head": False}
    return DecoderConfig(embed_dim=embed, num_layers=layers, num_heads=heads, **(sizes | more))


def _qwen3(embed: int, layers: int, heads: int, kv_heads: int, mlp_dim: int, **more) -> DecoderConfig:
    sizes: dict = {"vocab_size": 151_936, "sequence_length": 40_960, "head_dim": 128}
    layout: dict = {"qk_norm": True, "norm_eps": 1e-6, "rope_theta": 1_000_000.0, "tied_head": True}
    return _llama(embed, layers, heads, kv_heads, mlp_dim, **(sizes | layout | more))


def _gemma2(embed: int, layers: int, heads: int, kv_heads: int, mlp_dim: int, **more) -> DecoderConfig:
    sizes: dict = {"vocab_size": 256_000, "sequence_length": 8_192, "head_dim": 256, "window": 4_096}
    norms: dict = {"norm_eps": 1e-6, "norm_offset": 1.0, "post_norms": True}
    caps: dict = {"attention_softcap": 50.0, "logit_softcap": 30.0}
    layout: dict = {"attention_pattern": ("local", "global"), "mlp": "geglu", "embed_scale": True, "tied_head": True}
    return _llama(embed, layers, heads, kv_heads, mlp_dim, **(sizes | norms | caps | layout | more))


def _nano(**more) -> DecoderConfig:
    return _llama(128, 3, 4, 4, 384, **({"vocab_size": 256, "sequence_length": 256, "head_dim": None} | more))


_MISTRAL: dict = {"vocab_size": 32_000, "sequence_length": 32_768}
_LLAMA3: dict = {"vocab_size": 128_256, "sequence_length": 8_192, "rope_theta": 500_000.0}

PRESETS: dict[str, DecoderConfig] = {
    # Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": 124M, 355M, 774M, 1.56B
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1_024, 24, 16),
    "gpt2-large": _gpt2(1_280, 36, 20),
    "gpt2-xl": _gpt2(1_600, 48, 25),
    "gpt2-nano": _gpt2(128, 3, 4, vocab_size=256, sequence_length=256, head_dim=None),
    # Aether's model: a GPT whose feed-forward layers are plain linear layers as wide as the residual stream
    "minigpt-linear": _gpt2(768, 12, 12, mlp_dim=768, dropout=0.1),
    # Touvron et al. 2023 (arXiv:2307.09288)
    "llama2-7b": _llama(4_096, 32, 32, 32, 11_008, vocab_size=32_000, sequence_length=4_096),
    "llama2-13b": _llama(5_120, 40, 40, 40, 13_824, vocab_size=32_000, sequence_length=4_096),
    "llama2-70b": _llama(8_192, 80, 64, 8, 28_672, vocab_size=32_000, sequence_length=4_096),
    # Grattafiori et al. 2024 (arXiv:2407.21783)
    "llama3.2-1b": _llama(
        2_048,
        16,
        32,
        8,
        8_192,
        **(_LLAMA3 | {"tied_head": True, "rope_scaling_factor": 32.0, "sequence_length": 131_072}),
    ),
    "llama3-8b": _llama(4_096, 32, 32, 8, 14_336, **_LLAMA3),
    "llama3-70b": _llama(8_192, 80, 64, 8, 28_672, **_LLAMA3),
    "llama-nano": _nano(tied_head=True),
    "llama-mini": _llama(384, 6, 6, 6, 1_024, vocab_size=256, sequence_length=256, head_dim=None),
    # Jiang et al. 2023 (arXiv:2310.06825) and 2024 (arXiv:2401.04088)
    "mistral-7b": _llama(4_096, 32, 32, 8, 14_336, attention_pattern=("local",), window=4_096, **_MISTRAL),
    "mixtral-8x7b": _llama(
        4_096,
        32,
        32,
        8,
        14_336,
        num_experts=8,
        load_balance_weight=0.02,  # their router_aux_loss_coef
        router_z_weight=0.0,
        rope_theta=1_000_000.0,
        **_MISTRAL,
    ),
    # a token's 2 experts cost what llama-nano's feed-forward layer does
    "moe-nano": _nano(tied_head=True, num_experts=8, expert_mlp_dim=192),
    # Yang et al. 2025 (arXiv:2505.09388)
    "qwen3-0.6b": _qwen3(1_024, 28, 16, 8, 3_072),
    "qwen3-1.7b": _qwen3(2_048, 28, 16, 8, 6_144),
    "qwen3-4b": _qwen3(2_560, 36, 32, 8, 9_728),
    "qwen3-8b": _qwen3(4_096, 36, 32, 8, 12_288, tied_head=False),
    "qwen3-nano": _qwen3(128, 3, 4, 2, 384, vocab_size=256, sequence_length=256, head_dim=None),
    # Gemma Team 2024 (arXiv:2408.00118)
    "gemma2-2b": _gemma2(2_304, 26, 8, 4, 9_216),
    "gemma2-9b": _gemma2(3_584, 42, 16, 8, 14_336),
    "gemma2-27b": _gemma2(4_608, 46, 32, 16, 36_864, head_dim=128, query_scale=144**-0.5),
    "gemma2-nano": _gemma2(128, 4, 4, 2, 384, vocab_size=256, sequence_length=256, head_dim=None, window=64),
    "linear-nano": _nano(tied_head=True, attention="linear"),
}
