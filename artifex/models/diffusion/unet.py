"""The UNet of DDPM (Ho et al. 2020, arXiv:2006.11239) and, by its options, of ADM (Dhariwal and Nichol 2021,
arXiv:2105.05233).

In both the last map of each residual block, of each attention and of the whole starts at 0, and residual blocks drop
activations out in training.

Dims: B batch, H height, W width, C channels, E condition.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from artifex.models.convolution import Conv, GroupNorm
from artifex.models.diffusion.blocks import Condition
from artifex.models.diffusion.networks import UNetConfig
from artifex.models.module import Module
from artifex.models.resnet import Downsample, ResnetBlock, SpatialAttention, Upsample

Keys = Iterator[jax.Array | None]  # one for the dropout of each residual block, in their order


def resnet(cfg: UNetConfig, inputs: int, outputs: int, rngs: nnx.Rngs) -> ResnetBlock:
    """A residual block as configured."""
    how = {"groups": cfg.groups, "eps": cfg.norm_eps, "scale_shift": cfg.scale_shift, "dropout": cfg.dropout}
    return ResnetBlock(inputs, outputs, condition=cfg.condition, **how, out_scale=0.0, rngs=rngs)


def attention(cfg: UNetConfig, channels: int, rngs: nnx.Rngs) -> SpatialAttention:
    """Attention over all pixels as configured."""
    how = {"groups": cfg.groups, "eps": cfg.norm_eps}
    return SpatialAttention(channels, cfg.heads(channels), **how, out_scale=0.0, rngs=rngs)


class Stage(Module):
    """A residual block, and attention where its level has any."""

    def __init__(self, cfg: UNetConfig, level: int, inputs: int, *, rngs: nnx.Rngs):
        channels = cfg.block_channels[level]
        self.resnet = resnet(cfg, inputs, channels, rngs)
        self.attention = attention(cfg, channels, rngs) if level in cfg.attention_levels else None

    def __call__(self, x_BHWC: jax.Array, c_BE: jax.Array, keys: Keys) -> jax.Array:
        x_BHWC = self.resnet(x_BHWC, c_BE, next(keys))
        return x_BHWC if self.attention is None else self.attention(x_BHWC)


class Down(Module):
    """A level on the way down; its last step, except at the bottom, halves the image."""

    def __init__(self, cfg: UNetConfig, level: int, *, rngs: nnx.Rngs):
        channels, above = cfg.block_channels[level], cfg.block_channels[max(level - 1, 0)]
        inputs = [above, *[channels] * (cfg.layers_per_block - 1)]
        self.stages = nnx.List([Stage(cfg, level, width, rngs=rngs) for width in inputs])
        bottom = level == len(cfg.block_channels) - 1
        self.downsample = None if bottom else Downsample(channels, (cfg.downsample_padding, 1), rngs=rngs)

    def __call__(self, x_BHWC: jax.Array, c_BE: jax.Array, keys: Keys) -> tuple[jax.Array, list[jax.Array]]:
        """The image and what each step made, for the way up."""
        made = []
        for stage in self.stages:
            x_BHWC = stage(x_BHWC, c_BE, keys)
            made.append(x_BHWC)
        if self.downsample is not None:
            x_BHWC = self.downsample(x_BHWC)
            made.append(x_BHWC)
        return x_BHWC, made


class Up(Module):
    """A level on the way up: each residual block takes one image of the way down beside its own."""

    def __init__(self, cfg: UNetConfig, level: int, *, rngs: nnx.Rngs):
        widths = cfg.block_channels
        below, channels, above = widths[min(level + 1, len(widths) - 1)], widths[level], widths[max(level - 1, 0)]
        own = [below, *[channels] * cfg.layers_per_block]
        beside = [*[channels] * cfg.layers_per_block, above]
        inputs = [a + b for a, b in zip(own, beside, strict=True)]
        self.stages = nnx.List([Stage(cfg, level, width, rngs=rngs) for width in inputs])
        self.upsample = Upsample(channels, rngs=rngs) if level else None

    def __call__(self, x_BHWC: jax.Array, skips: list[jax.Array], c_BE: jax.Array, keys: Keys) -> jax.Array:
        """Takes its images from the end of `skips`."""
        for stage in self.stages:
            x_BHWC = stage(jnp.concatenate([x_BHWC, skips.pop()], axis=-1), c_BE, keys)
        return x_BHWC if self.upsample is None else self.upsample(x_BHWC)


class Middle(Module):
    """Residual block, attention, residual block at the bottom."""

    def __init__(self, cfg: UNetConfig, *, rngs: nnx.Rngs):
        channels = cfg.block_channels[-1]
        self.resnet1 = resnet(cfg, channels, channels, rngs)
        self.attention = attention(cfg, channels, rngs) if cfg.mid_attention else None
        self.resnet2 = resnet(cfg, channels, channels, rngs)

    def __call__(self, x_BHWC: jax.Array, c_BE: jax.Array, keys: Keys) -> jax.Array:
        x_BHWC = self.resnet1(x_BHWC, c_BE, next(keys))
        x_BHWC = x_BHWC if self.attention is None else self.attention(x_BHWC)
        return self.resnet2(x_BHWC, c_BE, next(keys))


class UNet(Module):
    """Noisy images, times and labels -> prediction, 0 at the start."""

    def __init__(self, cfg: UNetConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        first, levels = cfg.block_channels[0], range(len(cfg.block_channels))
        self.condition = Condition(
            first,
            cfg.condition,
            cfg.num_classes,
            cosine_first=cfg.cosine_first,
            shift=cfg.frequency_shift,
            rngs=rngs,
        )
        self.conv_in = Conv(cfg.in_channels, first, rngs=rngs)
        self.down = nnx.List([Down(cfg, level, rngs=rngs) for level in levels])
        self.middle = Middle(cfg, rngs=rngs)
        self.up = nnx.List([Up(cfg, level, rngs=rngs) for level in reversed(levels)])
        self.norm_out = GroupNorm(first, cfg.groups, eps=cfg.norm_eps)
        self.conv_out = Conv(first, cfg.out_channels, scale=0.0, rngs=rngs)

    def __call__(
        self,
        x_BHWC: jax.Array,
        t_B: jax.Array,
        condition: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """float32 (B, H, W, out_channels), for t from 0 to 999.

        `condition`: integer labels (B,), where `num_classes` means none; without any, none for all. `key` draws the
        dropout, none: no dropout. Raises `ValueError` for images and labels that the network does not take.
        """
        halved, channels = 2 ** (len(self.cfg.block_channels) - 1), self.cfg.in_channels
        if x_BHWC.shape[1] % halved or x_BHWC.shape[2] % halved or x_BHWC.shape[3] != channels:
            raise ValueError(
                f"images of shape {x_BHWC.shape[1:]}, but the network takes {channels} channels and sizes that divide "
                f"by {halved}; resize them"
            )
        keys = itertools.repeat(None) if key is None else iter(jax.random.split(key, self.cfg.residual_blocks))
        c_BE = self.condition(t_B, condition)
        x_BHWC = self.conv_in(x_BHWC.astype(self.conv_in.kernel.dtype))
        skips = [x_BHWC]
        for down in self.down:
            x_BHWC, made = down(x_BHWC, c_BE, keys)
            skips += made
        x_BHWC = self.middle(x_BHWC, c_BE, keys)
        for up in self.up:
            x_BHWC = up(x_BHWC, skips, c_BE, keys)
        return self.conv_out(jax.nn.silu(self.norm_out(x_BHWC))).astype(jnp.float32)
