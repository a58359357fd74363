"""The networks' configurations and their named sizes. Imports no JAX, so that configuration errors answer at once."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from flax import nnx

    from artifex.models.diffusion.dit import DiT
    from artifex.models.diffusion.mmdit import MMDiT
    from artifex.models.diffusion.unet import UNet


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """A convolutional UNet with residual and attention blocks: DDPM, and ADM with `scale_shift` and `head_dim`.

    Raises `ValueError` for sizes that do not fit together.
    """

    image_size: int = 32  # height and width in pixels
    in_channels: int = 3  # channels of the noisy image
    out_channels: int = 3  # channels of the prediction
    num_classes: int = 0  # labels it is conditioned on; 0: none
    block_channels: tuple[int, ...] = (128, 256, 256, 256)  # channels of each level, each half as high and wide
    layers_per_block: int = 2  # residual blocks of a level on the way down; one more on the way up
    attention_levels: tuple[int, ...] = (1,)  # levels, from 0, with attention after each residual block
    mid_attention: bool = True  # attention between the two residual blocks at the bottom
    head_dim: int | None = None  # features of an attention head; none: one head of all channels
    groups: int = 32  # groups of a group norm
    norm_eps: float = 1e-6  # added to the variance, above 0
    scale_shift: bool = False  # time and class scale and shift the norm inside a residual block instead of being added
    downsample_padding: Literal[0, 1] = 0  # of the stride-2 convolutions: 1 on each side, or 0: behind alone
    condition_dim: int | None = None  # width of the time and class embedding; none: 4 times the first level's channels
    cosine_first: bool = False  # cosines before sines in the time embedding
    frequency_shift: int = 1  # the i-th of n frequencies is 10000^(-i / (n - shift)), 0 or 1
    dropout: float = 0.0  # share of activations dropped in each residual block while training

    def __post_init__(self) -> None:
        _check_positive(self, "image_size", "in_channels", "out_channels", "layers_per_block", "groups", "norm_eps")
        _check_positive(self, "head_dim", "condition_dim")
        if not self.block_channels or min(self.block_channels) <= 0:
            raise ValueError(f"block_channels is {self.block_channels}; give a positive number for each level")
        if self.num_classes < 0:
            raise ValueError(f"num_classes is {self.num_classes}; 0 is a network without labels")
        wrong = [channels for channels in self.block_channels if channels % self.groups]
        if wrong:
            raise ValueError(f"block_channels {wrong[0]} does not divide by groups {self.groups}; choose a divisor")
        halvings = len(self.block_channels) - 1
        if self.image_size % 2**halvings:
            raise ValueError(
                f"image_size {self.image_size} does not divide by {2**halvings}; "
                f"{len(self.block_channels)} levels halve it {halvings} times"
            )
        for level in self.attention_levels:
            if not 0 <= level < len(self.block_channels):
                raise ValueError(f"attention_levels has {level}; levels are 0 to {len(self.block_channels) - 1}")
        for level in {*self.attention_levels, *([halvings] if self.mid_attention else [])}:
            if self.head_dim and self.block_channels[level] % self.head_dim:
                raise ValueError(
                    f"head_dim {self.head_dim} does not divide the {self.block_channels[level]} channels of level "
                    f"{level}; choose a divisor"
                )
        if self.downsample_padding not in (0, 1) or self.frequency_shift not in (0, 1):
            name = "downsample_padding" if self.downsample_padding not in (0, 1) else "frequency_shift"
            raise ValueError(f"{name} is {getattr(self, name)}; choose 0 or 1")
        if self.block_channels[0] % 2 or self.block_channels[0] < 4:
            raise ValueError(f"block_channels starts with {self.block_channels[0]}; as many sines and cosines are half")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")

    # A derived size stays None in its field, so that replacing the size it derives from moves it along.
    @property
    def condition(self) -> int:
        """Width of the embedding of time and class."""
        return self.condition_dim or 4 * self.block_channels[0]

    @property
    def residual_blocks(self) -> int:
        """How many there are: on the way down, two at the bottom, on the way up."""
        return len(self.block_channels) * (2 * self.layers_per_block + 1) + 2

    def heads(self, channels: int) -> int:
        """Attention heads over `channels`."""
        return channels // self.head_dim if self.head_dim else 1

    def build(self, rngs: nnx.Rngs) -> UNet:
        """The network itself."""
        from artifex.models.diffusion.unet import UNet

        return UNet(self, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """A diffusion transformer with adaLN-Zero, Peebles and Xie 2022 (arXiv:2212.09748).

    `out_channels` twice `in_channels` leaves room for a learned variance beside the prediction. Raises `ValueError`
    for sizes that do not fit together.
    """

    image_size: int = 32  # height and width in pixels, of the latent where the model is a latent one
    in_channels: int = 4  # channels of the noisy image
    out_channels: int = 8  # channels of the output
    num_classes: int = 1000  # labels it is conditioned on; 0: none
    patch_size: int = 2  # pixels on a side of the square that becomes one token
    embed_dim: int = 384  # width of the residual stream
    num_layers: int = 12  # blocks
    num_heads: int = 6  # attention heads, embed_dim / num_heads features each
    mlp_dim: int | None = None  # hidden width of a feed-forward layer; none: 4 embed_dim
    mlp_norm_eps: float = 1e-6  # added to the variance before a feed-forward layer, above 0; 1e-5 in diffusers' files

    dropout: ClassVar[float] = 0.0  # published without

    def __post_init__(self) -> None:
        _check_transformer(self)
        _check_positive(self, "mlp_norm_eps")
        if self.num_classes < 0:
            raise ValueError(f"num_classes is {self.num_classes}; 0 is a network without labels")

    @property
    def feed_forward(self) -> int:
        """Hidden width of the feed-forward layers."""
        return self.mlp_dim or 4 * self.embed_dim

    def build(self, rngs: nnx.Rngs) -> DiT:
        """The network itself."""
        from artifex.models.diffusion.dit import DiT

        return DiT(self, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """A transformer over an image and a text stream that attend to each other, Esser et al. 2024 (arXiv:2403.03206).

    Its condition is `{"context": (batch, any length, context_dim), "pooled": (batch, pooled_dim)}`. Raises
    `ValueError` for sizes that do not fit together.
    """

    image_size: int = 32  # height and width in pixels, of the latent where the model is a latent one
    in_channels: int = 16  # channels of the noisy image
    out_channels: int = 16  # channels of the prediction
    patch_size: int = 2  # pixels on a side of the square that becomes one token
    embed_dim: int = 1536  # width of both residual streams
    num_layers: int = 24  # blocks, at least 2; the last one has no text output
    num_heads: int = 24  # attention heads, embed_dim / num_heads features each
    mlp_dim: int | None = None  # hidden width of a feed-forward layer; none: 4 embed_dim
    context_dim: int = 4096  # features of a text token
    pooled_dim: int = 2048  # features of the whole text's vector
    position_grid: int | None = None  # patches on a side of the grid whose centre gives positions; none: the image's

    num_classes: ClassVar[int] = 0  # it is conditioned on text, never on labels
    dropout: ClassVar[float] = 0.0  # published without

    def __post_init__(self) -> None:
        _check_transformer(self)
        _check_positive(self, "context_dim", "pooled_dim")
        if self.num_layers < 2:
            raise ValueError(f"num_layers is {self.num_layers}; give at least 2, because the last has no text output")
        if self.position_grid is not None and self.position_grid < self.image_size // self.patch_size:
            raise ValueError(
                f"position_grid is {self.position_grid}; the image has {self.image_size // self.patch_size} patches "
                "on a side, give at least that many"
            )

    @property
    def feed_forward(self) -> int:
        """Hidden width of the feed-forward layers."""
        return self.mlp_dim or 4 * self.embed_dim

    def build(self, rngs: nnx.Rngs) -> MMDiT:
        """The network itself."""
        from artifex.models.diffusion.mmdit import MMDiT

        return MMDiT(self, rngs=rngs)


NetworkConfig = UNetConfig | DiTConfig | MMDiTConfig


def _check_positive(cfg: Any, *names: str) -> None:
    for name in names:
        if getattr(cfg, name) is not None and not getattr(cfg, name) > 0:
            raise ValueError(f"{name} is {getattr(cfg, name)}; give a positive number")


def _check_transformer(cfg: DiTConfig | MMDiTConfig) -> None:
    _check_positive(cfg, "image_size", "in_channels", "out_channels", "patch_size", "embed_dim", "num_layers")
    _check_positive(cfg, "num_heads", "mlp_dim")
    if cfg.image_size % cfg.patch_size:
        raise ValueError(
            f"image_size {cfg.image_size} does not divide by patch_size {cfg.patch_size}; choose a divisor"
        )
    if cfg.embed_dim % cfg.num_heads:
        raise ValueError(f"embed_dim {cfg.embed_dim} does not divide by num_heads {cfg.num_heads}; choose a divisor")
    if cfg.embed_dim % 4:
        raise ValueError(
            f"embed_dim {cfg.embed_dim} does not divide by 4; positions are sines and cosines of rows and columns"
        )


_UNET_DIGITS: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 1,
    "num_classes": 10,
    "block_channels": (32, 64),
    "groups": 8,
    "downsample_padding": 1,
}

UNET: dict[str, UNetConfig] = {
    "ddpm-cifar": UNetConfig(dropout=0.1),  # Ho et al. 2020 (arXiv:2006.11239)
    "unet-32": UNetConfig(block_channels=(64, 128, 128), head_dim=64),
    "unet-digits": UNetConfig(out_channels=1, **_UNET_DIGITS),
    "iddpm-digits": UNetConfig(out_channels=2, scale_shift=True, **_UNET_DIGITS),  # beside the prediction, a variance
}
"""UNets by name."""

DIT_WIDTHS = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}  # Table 1 of the paper
DIT: dict[str, DiTConfig] = {
    f"dit-{size}{patch}": DiTConfig(patch_size=patch, embed_dim=width, num_layers=depth, num_heads=heads)
    for size, (width, depth, heads) in DIT_WIDTHS.items()
    for patch in (2, 4, 8)
} | {
    "dit-digits": DiTConfig(
        image_size=8, in_channels=1, out_channels=1, num_classes=10, embed_dim=128, num_layers=4, num_heads=4
    ),
}
"""Diffusion transformers by name: DiT-S/2 is "dit-s2"."""

MMDIT: dict[str, MMDiTConfig] = {
    "sd3-medium": MMDiTConfig(image_size=128, position_grid=192),
    "mmdit-digits": MMDiTConfig(
        image_size=8,
        in_channels=1,
        out_channels=1,
        embed_dim=96,
        num_layers=4,
        num_heads=4,
        context_dim=32,
        pooled_dim=32,
    ),
    "mmdit-nano": MMDiTConfig(
        image_size=8,
        in_channels=3,
        out_channels=3,
        embed_dim=32,
        num_layers=2,
        num_heads=2,
        context_dim=24,
        pooled_dim=16,
    ),
}
"""Text-conditioned transformers by name."""
