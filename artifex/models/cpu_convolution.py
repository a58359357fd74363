"""Convolutions on one CPU device, whose gradients Eigen computes in loops as well.

XLA for CPUs has Eigen's convolution for images NHWC, kernels HWIO and windows that are not reversed. The gradients that
JAX writes have other orders, and XLA brings them into this one only outside of all loops: in those of microbatches it
computed them number by number, and the step of a UNet took 17 times as long. Here they are written in it.

Dims: B batch, H height, W width, I and O channels in and out.
"""

from __future__ import annotations

import functools

import jax

Padding = tuple[tuple[int, int], tuple[int, int]]
NHWC = ("NHWC", "HWIO", "NHWC")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x_BHWI: jax.Array, kernel_HWIO: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """`jax.lax.conv_general_dilated` of NHWC and HWIO with `padding` of height and width."""
    strides = (stride, stride)
    return jax.lax.conv_general_dilated(x_BHWI, kernel_HWIO, strides, padding, dimension_numbers=NHWC)


def _forward(
    x_BHWI: jax.Array, kernel_HWIO: jax.Array, stride: int, padding: Padding
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return convolve(x_BHWI, kernel_HWIO, stride, padding), (x_BHWI, kernel_HWIO)


def _backward(
    stride: int, padding: Padding, kept: tuple[jax.Array, jax.Array], y_BHWO: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_BHWI, kernel_HWIO = kept
    sizes = list(zip(x_BHWI.shape[1:3], kernel_HWIO.shape[:2], y_BHWO.shape[1:3], padding, strict=True))
    # of the input: the gradient, with zeros between its pixels, under the kernel turned around
    around = []
    for size, window, out, (before, _) in sizes:
        first = window - 1 - before
        around.append((first, size - ((out - 1) * stride + 1) + window - 1 - first))
    turned_HWOI = jax.lax.rev(kernel_HWIO, (0, 1)).swapaxes(2, 3)
    dilation = (stride, stride)
    of_x = jax.lax.conv_general_dilated(
        y_BHWO, turned_HWOI, (1, 1), around, lhs_dilation=dilation, dimension_numbers=NHWC
    )
    # of the kernel: each input channel as an image, of which each row of the batch is a channel
    around = []
    for size, window, out, (before, _) in sizes:
        around.append((before, window - 1 + (out - 1) * stride + 1 - size - before))
    of_kernel_IHWO = jax.lax.conv_general_dilated(
        x_BHWI.transpose(3, 1, 2, 0),
        y_BHWO.transpose(1, 2, 0, 3),
        (1, 1),
        around,
        rhs_dilation=dilation,
        dimension_numbers=NHWC,
    )
    return of_x, of_kernel_IHWO.transpose(1, 2, 0, 3)


convolve.defvjp(_forward, _backward)
