"""The decoder's configuration and presets. Imports no JAX, so that configuration errors answer at once."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from flax import nnx

    from artifex.models.transformer.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A dense causal decoder: GPT-2, Llama and what lies between. Sizes are in elements.

    `num_heads * head_dim` need not be `embed_dim`. Raises `ValueError` for sizes that do not fit together.
    """

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
    positions: Literal["rope", "learned"] = "rope"  # turned queries and keys, or a table added to the tokens
    rope_theta: float = 10_000.0  # base of the rotary wavelengths, above 0
    rope_scaling_factor: float = 1.0  # above 1: Llama 3's scaling, this much slower turns of the long wavelengths
    rope_original_length: int = 8_192  # tokens from which a wavelength counts as long for that scaling
    mlp: Literal["swiglu", "gelu"] = "swiglu"  # feed-forward layer: gated as in Llama, or plain as in GPT-2
    bias: bool = False  # in projections and norms, as in GPT-2
    tied_head: bool = True  # the output head is the token table
    dropout: float = 0.0  # of embeddings and of each residual branch while training, from 0 to below 1

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embed_dim", "num_layers", "num_heads", "sequence_length", "rope_original_length"):
            _positive(name, getattr(self, name))
        for name in ("num_kv_heads", "head_dim", "mlp_dim"):
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
        for name in ("norm_eps", "rope_theta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} is not positive")
        if not self.rope_scaling_factor >= 1:
            raise ValueError(f"rope_scaling_factor {self.rope_scaling_factor} is below 1; 1 is no scaling")

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


def _llama(embed: int, layers: int, heads: int, kv_heads: int, mlp: int, **more) -> DecoderConfig:
    grouped = kv_heads if kv_heads != heads else None
    sizes: dict = {"num_kv_heads": grouped, "head_dim": embed // heads, "mlp_dim": mlp, "tied_head": False}
    return DecoderConfig(embed_dim=embed, num_layers=layers, num_heads=heads, **(sizes | more))


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
    "llama-nano": _llama(128, 3, 4, 4, 384, vocab_size=256, sequence_length=256, tied_head=True, head_dim=None),
    "llama-mini": _llama(384, 6, 6, 6, 1_024, vocab_size=256, sequence_length=256, head_dim=None),
}
