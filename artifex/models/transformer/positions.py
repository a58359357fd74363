"""Where the tokens of a stream stand: in which document, at which place of it, and in which order they lie.

Dims: B batch, T sequence.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from artifex.models import cpu, layers
from artifex.models.attention import sequence_parts
from artifex.models.attention.ring import Order
from artifex.models.attention.zigzag import from_zigzag, to_zigzag
from artifex.models.transformer.config import DecoderConfig
from artifex.scaling.execution import current_execution


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positions:
    """`index`: the place of each token in its document, (T,) where all rows are alike, or (B, T). `segments`: (B, T),
    the documents, which do not see each other, or None for one a row. `parts`: in whose zigzag order the tokens lie;
    1 is the order as it is. `below`: what every index is known to be less than, or None."""

    index: jax.Array | np.ndarray
    segments: jax.Array | None = None
    parts: int = dataclasses.field(default=1, metadata={"static": True})
    below: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def order(self) -> Order:
        """What attention has to know."""
        return "given" if self.parts == 1 else "zigzag"

    @property
    def begins_BT(self) -> jax.Array | None:
        """Whether another document than that of the token before begins here; None for one document a row."""
        return None if self.segments is None else begins(self.segments)

    def turned(self, cfg: DecoderConfig, x: jax.Array) -> jax.Array:
        """`x` (B, T, ..., H), queries or keys, with rotary positions."""
        how = (cfg.per_head, cfg.rope_theta, cfg.rope_scaling_factor, cfg.rope_original_length)
        return layers.rope(x, self.index, layers.rope_frequencies(*how), self.below)

    def arranged(self, x: Any) -> Any:
        """`x` (B, T, ...), or None, in the order of the stream."""
        return None if x is None else to_zigzag(x, self.parts)

    def restored(self, x: jax.Array) -> jax.Array:
        """`arranged` undone."""
        return from_zigzag(x, self.parts)


def positions_of(
    cfg: DecoderConfig,
    shape: tuple[int, ...],
    index_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    *,
    must_divide: bool = False,
) -> Positions:
    """Of a stream of `shape` (B, T), in the order that its attention wants; `index_BT` None counts in each segment.

    Where `must_divide`, raises `ValueError` for T that the rules cannot split; else such a sequence is left whole.
    """
    B, T = shape
    parts = sequence_parts(B, T, cfg.num_heads, divides=False)
    softmax = cfg.causal and cfg.attention != "linear" and current_execution().context_attention == "ring"
    # experts with a capacity are first come first served: another order would have them drop other tokens
    turned = softmax and (cfg.num_experts == 0 or cfg.capacity_factor is None)
    unit = 2 * parts if turned and parts > 1 else parts
    if T % unit and must_divide:
        each = f"{unit} chunks, two for each of the {parts} parts" if unit > parts else f"the {parts} parts"
        near = max(T // unit, 1) * unit
        raise ValueError(
            f"a sequence of {T} tokens does not divide over {each} that context parallelism splits it into; "
            f"{near} would, or {near + unit}"
        )
    parts = parts if unit > parts and not T % unit else 1
    counted = cpu.positions(T) if segments_BT is None else within(segments_BT)
    index = counted if index_BT is None else index_BT
    segments_BT = None if segments_BT is None else to_zigzag(jnp.asarray(segments_BT, jnp.int32), parts)
    return Positions(to_zigzag(index, parts, dim=index.ndim - 1), segments_BT, parts)


def begins(segments_BT: jax.Array) -> jax.Array:
    """(B, T): whether another segment than that of the token before begins here; never at the first."""
    return jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)))


def within(segments_BT: jax.Array) -> jax.Array:
    """(B, T): the place of each token in its segment, from 0."""
    place_1T = jnp.arange(segments_BT.shape[1])[None]
    first_BT = jax.lax.cummax(jnp.where(begins(segments_BT), place_1T, 0), axis=1)
    return place_1T - first_BT
