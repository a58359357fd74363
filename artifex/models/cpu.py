"""What is chosen on one CPU device, and what was measured there; everywhere else the plain form stands.

The measurements are ratios of interleaved runs on two cores in float32. None of it holds on a mesh, even one of
simulated CPU devices: joined kernels would lay split dims out anew, and 12 layers unrolled under FSDP 8 take 426 MB
where the scan takes 120 (833 and 145 with 4 microbatches), because every layer is gathered at once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from artifex.scaling.execution import current_execution

UNROLL_UP_TO = 16  # layers: unrolled a step takes a tenth less time than scanned, but its compile time grows with depth
JOIN_FROM = 64  # rows from which one product of joined kernels pays, by 21 %; for 8 YNNPACK decodes a tenth slower
TILES_BELOW = 2_048  # keys: with gradients blocks take 2.2 of the time of tiles at 256, 0.85 at 2,048, 0.67 at 4,096
ATTENTION_BLOCK = 256  # queries and keys of a block: at 2,048 five sixths of the time of 512
CONSTANT_POSITIONS = 2**15  # up to here sines and cosines are constants: XLA computes others again in every loop


def layers_at_once(num_layers: int) -> int:
    """Layers to an iteration of the scan. With remat 1: XLA on a CPU saves memory by it only in scanned layers."""
    how = current_execution()
    if how.unroll != "auto":
        return min(how.unroll, num_layers)
    unrolled = how.on_one_cpu and how.remat == "none" and num_layers <= UNROLL_UP_TO
    return num_layers if unrolled else 1


def merges_dims() -> bool:
    """Whether products of tensors are written as those of matrices: a kernel's gradient takes a sixth less time."""
    return current_execution().on_one_cpu


def joins(rows: int) -> bool:
    """Whether several maps of the same `rows` are one product of their joined kernels. For 1 row it saves a tenth, and
    for 8 too where Eigen multiplies."""
    how = current_execution()
    return how.on_one_cpu and (not 1 < rows < JOIN_FROM or bool(how.compiler_options))


def held_dims(*sizes: int) -> tuple[int, ...]:
    """Which of these dims of a cache it has, those of its products: without rows of 1 XLA writes a token in place, and
    with them it copies the cache of each layer four times."""
    return tuple(size for size in sizes if size > 1) if current_execution().on_one_cpu else sizes


def positions(length: int) -> jax.Array | np.ndarray:
    """0 to `length` - 1: numbers of the program, or on one CPU device constants of it."""
    return (np if current_execution().on_one_cpu and length <= CONSTANT_POSITIONS else jnp).arange(length)


def barrier(x: jax.Array) -> jax.Array:
    """x, computed once: an unrolled DiT is 1.7 times slower without it, as XLA computes the gated stream again."""
    return jax.lax.optimization_barrier(x) if current_execution().on_one_cpu else x
