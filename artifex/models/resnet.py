"""The residual block, attention over pixels and resampling that UNets and convolutional autoencoders are made of.

Dims: B batch, H height, W width, C channels, E condition, N heads, S pixels (H W), D features of a head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from artifex.models import layers
from artifex.models.attention import dot_product_attention
from artifex.models.convolution import Conv, GroupNorm, by_channels, image, upsampled_convolve
from artifex.models.module import Module
from artifex.scaling import axes


class ResnetBlock(Module):
    """x + conv2(dropout(silu(norm2(conv1(silu(norm1(x))) + W silu(c))))): Ho et al. 2020 (arXiv:2006.11239).

    With `scale_shift`, (scale, shift) = W silu(c) act after the second norm, norm2(h) (1 + scale) + shift, as in
    Dhariwal and Nichol 2021 (arXiv:2105.05233). Where channels change, x passes through a 1x1 convolution. `condition`
    is the width of c; without it the block takes none. `out_scale` is the `scale` of conv2's first weights: with 0 the
    block starts as what passes beside it.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        groups: int = 32,
        eps: float = 1e-5,
        condition: int | None = None,
        scale_shift: bool = False,
        dropout: float = 0.0,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.scale_shift, self.rate = scale_shift, dropout
        self.norm1 = GroupNorm(inputs, groups, eps=eps)
        self.conv1 = Conv(inputs, outputs, names=("conv_in", "conv_hidden"), rngs=rngs)
        width = 2 * outputs if scale_shift else outputs
        self.condition = (
            None
            if condition is None
            else layers.Linear((condition, width), ("condition", "conv_hidden"), bias=True, rngs=rngs)
        )
        self.norm2 = GroupNorm(outputs, groups, eps=eps, name="conv_hidden")
        self.conv2 = Conv(outputs, outputs, names=("conv_hidden", "conv_out"), scale=out_scale, rngs=rngs)
        self.shortcut = Conv(inputs, outputs, 1, rngs=rngs) if inputs != outputs else None

    def __call__(self, x_BHWC: jax.Array, c_BE: jax.Array | None = None, key: jax.Array | None = None) -> jax.Array:
        """(B, H, W, inputs) -> (B, H, W, outputs); `key` draws the dropout, none: no dropout."""
        h_BHWC = self.conv1(nnx.silu(self.norm1(x_BHWC)))
        h_BHWC = self._conditioned(h_BHWC, c_BE)
        h_BHWC = self.conv2(layers.dropout(nnx.silu(h_BHWC), self.rate, key))
        kept = x_BHWC if self.shortcut is None else self.shortcut(x_BHWC)
        return image(kept + h_BHWC)

    def _conditioned(self, h_BHWC: jax.Array, c_BE: jax.Array | None) -> jax.Array:
        if self.condition is None:
            return self.norm2(h_BHWC)
        assert c_BE is not None, "a block with a condition is called with one"
        c = self.condition(nnx.silu(c_BE))[:, None, None]
        if not self.scale_shift:
            return self.norm2(h_BHWC + c)
        scale, shift = jnp.split(c, 2, axis=-1)
        return self.norm2(h_BHWC) * (1 + scale) + shift


class SpatialAttention(Module):
    """x + out(attention over all pixels of the group norm of x), heads dividing the channels.

    `out_scale` is the `scale` of the first weights of `out`: with 0 it starts as the identity.
    """

    def __init__(
        self,
        channels: int,
        heads: int = 1,
        *,
        groups: int = 32,
        eps: float = 1e-5,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        if channels % heads:
            raise ValueError(f"{channels} channels do not divide into {heads} attention heads; choose a divisor")
        self.heads = heads
        self.norm = GroupNorm(channels, groups, eps=eps)
        shape, names = (channels, channels), ("conv_in", "conv_hidden")
        self.query = layers.Linear(shape, names, bias=True, rngs=rngs)
        self.key = layers.Linear(shape, names, bias=True, rngs=rngs)
        self.value = layers.Linear(shape, names, bias=True, rngs=rngs)
        self.out = layers.Linear(shape, ("conv_hidden", "conv_out"), bias=True, scale=out_scale, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        B, H, W, C = x_BHWC.shape
        x_BSC = axes.shard(self.norm(x_BHWC).reshape(B, H * W, C), "batch", None, "channels")
        made = layers.fused(x_BSC, self.query, self.key, self.value)
        q_BSND, k_BSND, v_BSND = (
            axes.shard(part, "batch", None, "act_channels").reshape(B, H * W, self.heads, C // self.heads)
            for part in made
        )
        mixed_BHWC = _attend(q_BSND, k_BSND, v_BSND).reshape(B, H, W, C)
        names = ("conv_hidden", "conv_out")
        return image(x_BHWC + by_channels(layers.product, mixed_BHWC, self.out.kernel[...], self.out.bias, names))


def _attend(q_BSND: jax.Array, k_BSND: jax.Array, v_BSND: jax.Array) -> jax.Array:
    """Attention by heads; where those do not divide over the devices, each takes some of the pixels that ask.

    No query sees another, so that a group of them can stand where a head does, beside others that read the same keys.
    One head of all channels, as autoencoders have, cannot be split by channels: scores are sums over them, and the
    S x S of them are more than the queries.
    """
    B, S, N, D = q_BSND.shape
    ways = axes.most_ways("act_heads")
    if N % ways == 0 or S % ways:
        return dot_product_attention(q_BSND, k_BSND, v_BSND)
    grouped = q_BSND.reshape(B, ways, S // ways, N, D).transpose(0, 2, 3, 1, 4)
    mixed = dot_product_attention(grouped.reshape(B, S // ways, N * ways, D), k_BSND, v_BSND)
    return mixed.reshape(B, S // ways, N, ways, D).transpose(0, 3, 1, 2, 4).reshape(B, S, N, D)


class Downsample(Module):
    """A 3x3 convolution of stride 2: (B, H, W, C) -> (B, H/2, W/2, C). `padding` is that before and after."""

    def __init__(self, channels: int, padding: tuple[int, int] = (1, 1), *, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, stride=2, padding=padding, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return self.conv(x_BHWC)


class Upsample(Module):
    """Each pixel as a square of four, then a 3x3 convolution: (B, H, W, C) -> (B, 2H, 2W, C)."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return by_channels(upsampled_convolve, x_BHWC, self.conv.kernel[...], self.conv.bias, self.conv.names)
