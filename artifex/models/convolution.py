"""Convolutions, resampling and group norm on images with channels last, every parameter named.

Where a mesh divides layers, each device computes some output channels of a convolution, and they are gathered behind
it. Of two in a row that nothing else reads between, the first leaves its outputs apart (`conv_hidden`) and the second
sums over them, so that the two need one all-reduce (Shoeybi et al. 2019, arXiv:1909.08053). One whose outputs do not
divide, such as the last with its 3, sums over its inputs as well.

Dims: B batch, H height, W width, C channels, I and O channels in and out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from artifex.models import cpu_convolution
from artifex.models.cpu_convolution import NHWC
from artifex.models.layers import parameter
from artifex.models.module import Module
from artifex.scaling import axes
from artifex.scaling.execution import current_execution

PIXELS = ("batch", "height", "width")


def image(x_BHWC: jax.Array) -> jax.Array:
    """A feature map, laid out by its names."""
    return axes.shard(x_BHWC, *PIXELS, "channels")


def apart(x_BHWC: jax.Array) -> jax.Array:
    """A feature map of which each device has some channels."""
    return axes.shard(x_BHWC, *PIXELS, "act_channels")


def by_channels(
    convolve: Callable[[jax.Array, jax.Array], jax.Array],
    x_BHWI: jax.Array,
    kernel: jax.Array,
    bias: nnx.Param | None,
    names: Sequence[str],
) -> jax.Array:
    """`convolve(x, kernel)` plus bias, each device with the channels that the rules give it; `names` are those of I, O.

    Both ends are constrained: told of one alone, XLA may gather the kernel and have every device compute all.
    """
    if names[1] == "conv_hidden":
        return apart(_plus(convolve(image(x_BHWI), kernel), bias, "act_channels"))
    if names[0] == "conv_hidden" or not axes.activation_axes("act_channels", kernel.shape[-1]):
        return image(_plus(image(convolve(apart(x_BHWI), kernel)), bias, "channels"))
    return image(_plus(apart(convolve(image(x_BHWI), kernel)), bias, "act_channels"))


def _plus(y_BHWO: jax.Array, bias: nnx.Param | None, channels: str) -> jax.Array:
    # the bias laid out as y: else XLA makes an image of it, and gathers that
    return y_BHWO if bias is None else y_BHWO + axes.shard(bias[...], channels)[None, None, None]


class Conv(Module):
    """A square convolution (B, H, W, I) -> (B, H / stride, W / stride, O), zero-padded so that stride 1 keeps the size.

    `names` are those of the kernel's channel dims. `padding` (before, after) on both spatial dims replaces the even
    one. Weights start as a normal distribution cut at two deviations, of variance `scale` / (size^2 I).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        names: Sequence[str] = ("conv_in", "conv_out"),
        bias: bool = True,
        scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.stride, self.names = stride, tuple(names)
        self.padding = padding if padding is not None else ((size - 1) // 2, size // 2)
        std = math.sqrt(scale / (size * size * inputs)) / 0.8796  # the deviation of a unit normal cut at 2
        value = std * jax.random.truncated_normal(rngs.params(), -2, 2, (size, size, inputs, outputs))
        self.kernel = parameter(value, "kernel", "kernel", *names)
        self.bias = parameter(jnp.zeros(outputs), names[1]) if bias else None

    def __call__(self, x_BHWI: jax.Array) -> jax.Array:
        run = functools.partial(convolve, stride=self.stride, padding=self.padding)
        return by_channels(run, x_BHWI, self.kernel[...], self.bias, self.names)


def convolve(x_BHWI: jax.Array, kernel: jax.Array, stride: int, padding: tuple[int, int]) -> jax.Array:
    """The convolution itself; one of a single pixel is a product of matrices."""
    if kernel.shape[:2] == (1, 1) and stride == 1:
        return jnp.tensordot(x_BHWI, kernel[0, 0], 1)
    return _convolve(x_BHWI, kernel, stride, (padding, padding))


def _convolve(x_BHWI: jax.Array, kernel: jax.Array, stride: int, padding: cpu_convolution.Padding) -> jax.Array:
    if current_execution().on_one_cpu:
        return cpu_convolution.convolve(x_BHWI, kernel, stride, padding)
    return jax.lax.conv_general_dilated(x_BHWI, kernel, (stride, stride), padding, dimension_numbers=NHWC)


class GroupNorm(Module):
    """Each group of channels of each example to mean 0 and deviation 1, in float32, then scale and bias by channel.

    Wu and He 2018 (arXiv:1803.08494). `groups` divides `channels`. Named `conv_hidden`, a device norms its own
    channels; where that cuts through groups, means of channels cross devices, never pixels.
    """

    def __init__(self, channels: int, groups: int = 32, *, eps: float = 1e-5, name: str = "conv_out"):
        if channels % groups:
            raise ValueError(f"{channels} channels do not divide into {groups} groups; choose a divisor")
        self.groups, self.eps = groups, eps
        self.channels = "act_channels" if name == "conv_hidden" else "channels"
        self.scale = parameter(jnp.ones(channels), name)
        self.bias = parameter(jnp.zeros(channels), name)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        # Sums over pixels channel by channel, then over the few channels of a group: along the contiguous dim, twice
        # as fast on a CPU as both at once.
        x32 = x_BHWC.astype(jnp.float32).reshape(x_BHWC.shape[0], -1, x_BHWC.shape[-1])
        x32 = x32 - self._over_group(jnp.mean(x32, axis=1))
        variance = self._over_group(jnp.mean(jnp.square(x32), axis=1))
        # as the image: else XLA splits what is whole as the weights are split, and gathers images
        scale_C, bias_C = (
            axes.shard(weight[...].astype(jnp.float32), self.channels) for weight in (self.scale, self.bias)
        )
        scale = jax.lax.rsqrt(variance + self.eps) * scale_C[None, None]
        y = x32 * scale + bias_C[None, None]
        return y.reshape(x_BHWC.shape).astype(x_BHWC.dtype)

    def _over_group(self, mean_BC: jax.Array) -> jax.Array:
        """The mean over the channels of each group, once for each channel: (B, 1, C)."""
        B, C = mean_BC.shape
        grouped = mean_BC.reshape(B, self.groups, C // self.groups)
        return jnp.broadcast_to(jnp.mean(grouped, axis=-1, keepdims=True), grouped.shape).reshape(B, 1, C)


def upsample(x_BHWC: jax.Array) -> jax.Array:
    """Each pixel as a square of four: (B, 2H, 2W, C)."""
    B, H, W, C = x_BHWC.shape
    x = jnp.broadcast_to(x_BHWC[:, :, None, :, None], (B, H, 2, W, 2, C))
    return x.reshape(B, 2 * H, 2 * W, C)


class UpConv(Module):
    """A transposed convolution of window 4 and stride 2: (B, H, W, I) -> (B, 2H, 2W, O).

    Computed as four convolutions of window 2, one for each phase of the output, which XLA runs seven times faster on a
    CPU than one over a dilated input and as fast elsewhere. The kernel (4, 4, I, O) is that of
    `jax.lax.conv_transpose(..., strides=(2, 2), padding="SAME")`.
    """

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        # each output pixel sees 4 of the 16 taps
        std = math.sqrt(1 / (4 * inputs)) / 0.8796
        value = std * jax.random.truncated_normal(rngs.params(), -2, 2, (4, 4, inputs, outputs))
        self.kernel = parameter(value, "kernel", "kernel", "conv_in", "conv_out")
        self.bias = parameter(jnp.zeros(outputs), "conv_out")

    def __call__(self, x_BHWI: jax.Array) -> jax.Array:
        return by_channels(transposed_convolve, x_BHWI, self.kernel[...], self.bias, ("conv_in", "conv_out"))


def transposed_convolve(x_BHWI: jax.Array, kernel: jax.Array) -> jax.Array:
    """`jax.lax.conv_transpose` of stride 2 with a (4, 4, I, O) kernel: (B, 2H, 2W, O)."""
    taps = [[kernel[row::2, column::2] for column in range(2)] for row in range(2)]
    return phase_convolve(x_BHWI, taps)


def upsampled_convolve(x_BHWI: jax.Array, kernel: jax.Array) -> jax.Array:
    """`convolve(upsample(x), kernel)` of a (3, 3, I, O) kernel without the upsampled image: (B, 2H, 2W, O).

    Two of the three taps of a row fall on the same small pixel, so each phase of the output is a convolution of window
    2 with summed taps: 16 products to a small pixel in place of 36.
    """
    rows = [(kernel[:1], kernel[1:2] + kernel[2:]), (kernel[:1] + kernel[1:2], kernel[2:])]
    taps = []
    for row in rows:
        k = jnp.concatenate(row)
        first = jnp.concatenate((k[:, :1], k[:, 1:2] + k[:, 2:]), axis=1)
        second = jnp.concatenate((k[:, :1] + k[:, 1:2], k[:, 2:]), axis=1)
        taps.append([first, second])
    return phase_convolve(x_BHWI, taps)


def phase_convolve(x_BHWI: jax.Array, taps: Sequence[Sequence[jax.Array]]) -> jax.Array:
    """Output pixel (2i + row, 2j + column) from a convolution of window 2 with `taps[row][column]` (2, 2, I, O).

    The window of row 0 covers the small rows i - 1 and i, that of row 1 the rows i and i + 1; likewise the columns.
    """
    B, H, W, _ = x_BHWI.shape
    rows = []
    for row in range(2):
        phases = []
        for column in range(2):
            phases.append(_convolve(x_BHWI, taps[row][column], 1, ((1 - row, row), (1 - column, column))))
        rows.append(jnp.stack(phases, axis=3))
    return jnp.stack(rows, axis=2).reshape(B, 2 * H, 2 * W, -1)  # (B, H, row, W, column, O)
