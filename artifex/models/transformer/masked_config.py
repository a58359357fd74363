"""The configuration and presets of masked discrete diffusion over text. Imports no JAX."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

from artifex.models.transformer.config import DecoderConfig

if TYPE_CHECKING:
    from flax import nnx

    from artifex.models.transformer.masked import MaskedDiffusion


BYTES = DecoderConfig(vocab_size=257, causal=False)


@dataclasses.dataclass(frozen=True)
class MaskedDiffusionConfig:
    """A decoder without the causal mask that fills in masked tokens.

    The decoder's last token id is the mask, so it has one id more than the data. Raises `ValueError` for a causal
    decoder, one with experts or a z-loss, and sizes out of range.
    """

    reads: ClassVar[Literal["text", "images"]] = "text"

    decoder: DecoderConfig = BYTES  # the network; its last token id is the mask
    sampling_steps: int = 64  # times at which tokens are revealed, unless a sample asks for another number

    def __post_init__(self) -> None:
        if self.decoder.causal:
            raise ValueError(
                "decoder has causal=True; masked tokens are filled in from both sides, set causal to False"
            )
        if self.decoder.num_experts:
            raise ValueError(
                f"decoder has num_experts {self.decoder.num_experts}; the bound has no place for losses of experts, "
                "set it to 0"
            )
        if self.decoder.z_loss_weight:
            raise ValueError(
                f"decoder has z_loss_weight {self.decoder.z_loss_weight}; the bound has no place for a loss of "
                "normalizers, set it to 0"
            )
        if self.decoder.vocab_size < 2:
            raise ValueError(f"decoder has vocab_size {self.decoder.vocab_size}; expected the data's ids and the mask")
        if self.sampling_steps < 1:
            raise ValueError(f"sampling_steps is {self.sampling_steps}; it must be at least 1")

    @property
    def vocab_size(self) -> int:
        """Token ids of the data."""
        return self.decoder.vocab_size - 1

    @property
    def mask_id(self) -> int:
        """The token that hides another."""
        return self.decoder.vocab_size - 1

    @property
    def sequence_length(self) -> int:
        """The longest sequence in tokens."""
        return self.decoder.sequence_length

    def build(self, rngs: nnx.Rngs) -> MaskedDiffusion:
        """The model with fresh parameters."""
        from artifex.models.transformer.masked import MaskedDiffusion

        return MaskedDiffusion(self, rngs=rngs)


def _network(embed: int, layers: int, heads: int, mlp: int, vocab: int, length: int) -> DecoderConfig:
    sizes: dict = {"embed_dim": embed, "num_layers": layers, "num_heads": heads, "mlp_dim": mlp, "vocab_size": vocab}
    return DecoderConfig(sequence_length=length, causal=False, **sizes)


PRESETS: dict[str, MaskedDiffusionConfig] = {
    "masked-nano": MaskedDiffusionConfig(_network(128, 3, 4, 384, 257, 256)),
    "masked-mini": MaskedDiffusionConfig(_network(384, 6, 6, 1_024, 257, 256)),
    # the size of Sahoo et al. 2024, with GPT-2's tokens and gated feed-forward layers of as many parameters
    "masked-small": MaskedDiffusionConfig(_network(768, 12, 12, 2_048, 50_258, 1_024), sampling_steps=1_000),
}
