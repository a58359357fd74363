"""Products of blocks of rows with the kernels of their experts, as two Triton kernels for GPUs.

Programs of one output tile's columns run beside each other for all blocks, so that an expert's kernel is read from
memory about once, however many blocks it has. Blocks behind the last are not multiplied.

Dims: b blocks, R rows of a block, E experts, D inputs, F outputs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

TILE = 128  # rows and columns of an output that one program makes
STEP_BYTES = 128  # of the dim that is summed over, at a time: of 16-bit numbers 64


def fits(rows: int, inputs: int, outputs: int) -> bool:
    """Whether tiles divide them: Triton's tensors have powers of two as sizes, in products 16 at least."""
    return rows % 16 == 0 and rows & (rows - 1) == 0 and inputs % TILE == 0 and outputs % TILE == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def block_product(
    interpret: bool, owner_b: jax.Array, end_E: jax.Array, x_bRD: jax.Array, kernel_EDF: jax.Array
) -> jax.Array:
    """x[b] W[owner[b]], (b, R, F), for blocks ordered by owner of which expert e's end before `end_E[e]`; 0 behind the
    last. `interpret` runs it where there is no GPU, slowly."""
    return _forward(interpret, owner_b, end_E, x_bRD, kernel_EDF, turned=False)


def _forward(interpret: bool, owner_b, end_E, x_bRD, kernel_EDF, *, turned: bool):
    count, R, inputs = x_bRD.shape
    outputs, width = kernel_EDF.shape[1 if turned else 2], STEP_BYTES // x_bRD.dtype.itemsize

    def program(owner_ref: Any, end_ref: Any, x_ref: Any, kernel_ref: Any, y_ref: Any) -> None:
        b, columns = pl.program_id(0), pl.ds(pl.program_id(1) * TILE, TILE)
        owner = owner_ref[b]

        def step(k, sum_RF):
            part = pl.ds(k * width, width)
            x_RD = triton.load(x_ref.at[b, :, part])
            if turned:
                kernel_DF = triton.load(kernel_ref.at[owner, columns, part]).T
            else:
                kernel_DF = triton.load(kernel_ref.at[owner, part, columns])
            return sum_RF + triton.dot(x_RD, kernel_DF)

        steps = jax.lax.select(b < end_ref[kernel_EDF.shape[0] - 1], jnp.int32(inputs // width), jnp.int32(0))
        y_RF = jax.lax.fori_loop(0, steps, step, jnp.zeros((R, TILE), jnp.float32))
        triton.store(y_ref.at[b, :, columns], y_RF.astype(y_ref.dtype))

    return pl.pallas_call(
        program,
        grid=(count, outputs // TILE),
        out_shape=jax.ShapeDtypeStruct((count, R, outputs), x_bRD.dtype),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
    )(owner_b, end_E, x_bRD, kernel_EDF)


def _backward(interpret: bool, saved, g_bRF):
    owner_b, end_E, x_bRD, kernel_EDF = saved
    E, D, F = kernel_EDF.shape

    def program(end_ref: Any, x_ref: Any, g_ref: Any, sum_ref: Any) -> None:
        e = pl.program_id(2)
        inputs, outputs = (pl.ds(pl.program_id(axis) * TILE, TILE) for axis in (0, 1))

        def step(b, sum_DF):
            return sum_DF + triton.dot(triton.load(x_ref.at[b, :, inputs]).T, triton.load(g_ref.at[b, :, outputs]))

        first = jax.lax.select(e > 0, end_ref[jnp.maximum(e - 1, 0)], jnp.int32(0))
        sum_DF = jax.lax.fori_loop(first, end_ref[e], step, jnp.zeros((TILE, TILE), jnp.float32))
        triton.store(sum_ref.at[e, inputs, outputs], sum_DF.astype(sum_ref.dtype))

    g_EDF = pl.pallas_call(
        program,
        grid=(D // TILE, F // TILE, E),
        out_shape=jax.ShapeDtypeStruct((E, D, F), kernel_EDF.dtype),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
    )(end_E, x_bRD, g_bRF)
    return None, None, _forward(interpret, owner_b, end_E, g_bRF, kernel_EDF, turned=True), g_EDF


block_product.defvjp(lambda interpret, *args: (block_product(interpret, *args), args), _backward)
