"""The autoencoders' configurations and presets. Imports no JAX, so that configuration errors answer at once."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from flax import nnx

    from artifex.models.vae.autoencoder import KLAutoencoder
    from artifex.models.vae.vae import VAE
    from artifex.models.vae.vq import VQVAE


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """A convolutional VAE with one latent vector for an image; a beta-VAE where `beta` is not 1.

    Each of `block_channels` halves the image. Raises `ValueError` for sizes that do not fit together.
    """

    reads: ClassVar[Literal["text", "images"]] = "images"
    num_classes: ClassVar[int] = 0

    image_size: int = 32  # height and width in pixels
    channels: int = 3  # of the image
    block_channels: tuple[int, ...] = (64, 128, 256)  # channels after each halving of the image
    residual_blocks: int = 0  # at the lowest resolution, in encoder and decoder each
    groups: int = 8  # of the group norms in residual blocks
    latent_dim: int = 128  # numbers in the latent vector
    likelihood: Literal["gaussian", "bernoulli"] = "gaussian"  # of a pixel: by levels, or (x + 1) / 2 as a probability
    gaussian_std: float | None = None  # of the Gaussian over [-1, 1]; none: learned, one for each channel
    levels: int = 256  # values a channel of the data can take, evenly from -1 to 1; for the Gaussian
    beta: float = 1.0  # factor of the KL divergence in the loss, at least 0

    def __post_init__(self) -> None:
        _positive(self, "image_size", "channels", "groups", "latent_dim")
        _check_blocks(self.image_size, self.block_channels, self.groups if self.residual_blocks else 1)
        _check_halvings(self.image_size, len(self.block_channels))
        if self.residual_blocks < 0:
            raise ValueError(f"residual_blocks is {self.residual_blocks}; it must be at least 0")
        if self.levels < 2:
            raise ValueError(f"levels is {self.levels}; a channel takes at least 2 values")
        if self.beta < 0:
            raise ValueError(f"beta is {self.beta}; it must be at least 0")
        if self.gaussian_std is not None and (self.likelihood != "gaussian" or not self.gaussian_std > 0):
            raise ValueError(
                f"gaussian_std is {self.gaussian_std} with a {self.likelihood} likelihood; it is a positive number "
                "with a gaussian one, or none"
            )

    def build(self, rngs: nnx.Rngs) -> VAE:
        """The model with fresh parameters."""
        from artifex.models.vae.vae import VAE

        return VAE(self, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """An autoencoder with a grid of discrete codes: VQ-VAE, or FSQ.

    Each of `block_channels` halves the image. Raises `ValueError` for sizes that do not fit together.
    """

    reads: ClassVar[Literal["text", "images"]] = "images"
    num_classes: ClassVar[int] = 0

    image_size: int = 32  # height and width in pixels
    channels: int = 3  # of the image
    block_channels: tuple[int, ...] = (64, 128)  # channels after each halving of the image
    residual_blocks: int = 2  # at the lowest resolution, in encoder and decoder each
    groups: int = 8  # of the group norms in residual blocks
    quantizer: Literal["vq", "fsq"] = "vq"  # nearest entry of a codebook, or rounding to a fixed grid
    codes: int = 512  # entries of the codebook; for vq
    latent_dim: int = 64  # numbers in an entry of the codebook; for vq
    commitment: float = 0.25  # factor of the distance between encoder output and entry in the loss; for vq
    ema_decay: float = 0.99  # of the running counts and means, from 0 to below 1
    revive_below: float = 0.1  # entries used less than this fraction of the mean use are replaced; 0: never; for vq
    fsq_levels: tuple[int, ...] = (8, 5, 5, 5)  # values of each number of a code, their product the codes; for fsq

    def __post_init__(self) -> None:
        _positive(self, "image_size", "channels", "groups", "codes", "latent_dim")
        _check_blocks(self.image_size, self.block_channels, self.groups if self.residual_blocks else 1)
        _check_halvings(self.image_size, len(self.block_channels))
        if self.residual_blocks < 0:
            raise ValueError(f"residual_blocks is {self.residual_blocks}; it must be at least 0")
        if self.commitment < 0:
            raise ValueError(f"commitment is {self.commitment}; it must be at least 0")
        for name in ("ema_decay", "revive_below"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to below 1")
        if not self.fsq_levels or min(self.fsq_levels) < 2:
            raise ValueError(f"fsq_levels is {self.fsq_levels}; give at least one number of levels, each at least 2")

    @property
    def num_codes(self) -> int:
        """How many different codes the quantizer has."""
        return self.codes if self.quantizer == "vq" else math.prod(self.fsq_levels)

    @property
    def latent_size(self) -> int:
        """Height and width of the grid of codes."""
        return self.image_size >> len(self.block_channels)

    def build(self, rngs: nnx.Rngs) -> VQVAE:
        """The model with fresh parameters."""
        from artifex.models.vae.vq import VQVAE

        return VQVAE(self, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class KLAutoencoderConfig:
    """The autoencoder of latent diffusion: every level but the last of `block_channels` halves the image.

    Latents for diffusion are (z - latent_shift) * latent_scale, 0 and 1 until they are measured. Raises `ValueError`
    for sizes that do not fit together.
    """

    reads: ClassVar[Literal["text", "images"]] = "images"
    num_classes: ClassVar[int] = 0

    image_size: int = 32  # height and width in pixels
    channels: int = 3  # of the image
    latent_channels: int = 4  # of the latent
    block_channels: tuple[int, ...] = (64, 128)  # channels of each resolution, from the image's down
    layers_per_block: int = 2  # residual blocks at each resolution of the encoder; the decoder has one more
    groups: int = 32  # of the group norms
    mid_attention: bool = True  # attention over all pixels at the lowest resolution
    latent_convs: bool = True  # a 1x1 convolution on each side of the latent, as in Stable Diffusion 1 and 2
    kl_weight: float = 1e-6  # factor of the KL divergence, in nats to a value of the image, in the loss; at least 0
    latent_scale: float | None = None  # 1 / the latents' deviation, above 0; none: measured when diffusion freezes it
    latent_shift: float | None = None  # the latents' mean; none: measured when diffusion freezes it

    def __post_init__(self) -> None:
        _positive(self, "image_size", "channels", "latent_channels", "layers_per_block", "groups")
        _check_blocks(self.image_size, self.block_channels, self.groups)
        _check_halvings(self.image_size, len(self.block_channels) - 1)
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight is {self.kl_weight}; it must be at least 0")
        if self.latent_scale is not None and not self.latent_scale > 0:
            raise ValueError(f"latent_scale is {self.latent_scale}; it must be above 0")

    @property
    def latent_size(self) -> int:
        """Height and width of the latent."""
        return self.image_size >> (len(self.block_channels) - 1)

    @property
    def shift_and_scale(self) -> tuple[float, float]:
        """Of the latents for diffusion: z is (z - shift) * scale there."""
        return self.latent_shift or 0.0, self.latent_scale or 1.0

    def build(self, rngs: nnx.Rngs) -> KLAutoencoder:
        """The model with fresh parameters."""
        from artifex.models.vae.autoencoder import KLAutoencoder

        return KLAutoencoder(self, rngs=rngs)


def _positive(cfg: object, *names: str) -> None:
    for name in names:
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name} is {getattr(cfg, name)}; it must be at least 1")


def _check_blocks(image_size: int, block_channels: tuple[int, ...], groups: int) -> None:
    if not block_channels or min(block_channels) < 1:
        raise ValueError(f"block_channels is {block_channels}; give at least one number of channels, each at least 1")
    for channels in block_channels:
        if channels % groups:
            raise ValueError(f"block_channels {block_channels} do not all divide by groups {groups}; choose a divisor")


def _check_halvings(image_size: int, halvings: int) -> None:
    if image_size % 2**halvings:
        raise ValueError(
            f"image_size {image_size} does not divide by {2**halvings}; block_channels halve it {halvings} times"
        )


_DIGITS: dict = {"image_size": 8, "channels": 1}

PRESETS: dict[str, VAEConfig | VQConfig | KLAutoencoderConfig] = {
    # scikit-learn's digits: 8x8 pixels of 17 levels
    "vae-digits": VAEConfig(block_channels=(32, 64), residual_blocks=1, latent_dim=16, levels=17, **_DIGITS),
    "beta-vae-digits": VAEConfig(
        block_channels=(32, 64), residual_blocks=1, latent_dim=16, levels=17, beta=4.0, **_DIGITS
    ),
    # grey pixels leave a Bernoulli few nats to win: at beta 4 its latent would say nothing
    "bernoulli-vae-digits": VAEConfig(
        block_channels=(32, 64), residual_blocks=1, latent_dim=16, likelihood="bernoulli", **_DIGITS
    ),
    "vq-digits": VQConfig(block_channels=(64,), residual_blocks=1, codes=64, latent_dim=16, **_DIGITS),
    "fsq-digits": VQConfig(block_channels=(64,), residual_blocks=1, quantizer="fsq", fsq_levels=(5, 4, 3), **_DIGITS),
    "kl-digits": KLAutoencoderConfig(
        latent_channels=2, block_channels=(32, 64), layers_per_block=1, groups=8, kl_weight=3e-3, **_DIGITS
    ),
    "vae-cifar": VAEConfig(),
    # Rombach et al. 2022 (arXiv:2112.10752), as Stable Diffusion 1 and 2 use it: 83,653,863 parameters
    "sd-autoencoder": KLAutoencoderConfig(
        image_size=512, block_channels=(128, 256, 512, 512), latent_scale=0.18215, latent_shift=0.0
    ),
    # Esser et al. 2024 (arXiv:2403.03206), Stable Diffusion 3
    "sd3-autoencoder": KLAutoencoderConfig(
        image_size=1_024,
        latent_channels=16,
        block_channels=(128, 256, 512, 512),
        latent_convs=False,
        latent_scale=1.5305,
        latent_shift=0.0609,
    ),
}
