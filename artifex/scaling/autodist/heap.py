"""How many bytes arrays of known lifetimes take where each needs one place: XLA's own two ways, and the better of both.

Buffers are placed one after the other, the largest first, or the longest-lived first, each into the smallest gap that
is free for all its life: `GlobalDecreasingSizeBestFitHeap` of XLA's heap simulator. Gaps that nothing fits into are why
this is more than the most that is alive at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from artifex.scaling.autodist.liveness import Buffer

ALIGNED = 64  # bytes: where a buffer may begin
SMALL = 1e-4  # of the sum: smaller buffers fill gaps, and are added up by their own peak


def heap_bytes(buffers: Sequence[Buffer]) -> float:
    """Bytes of a heap that holds all of them."""
    every = [one for one in buffers if one.size > 0]
    if not every:
        return 0.0
    begin = np.array([one.begin for one in every])
    end = np.array([one.end for one in every])
    size = np.array([-(-one.size // ALIGNED) * ALIGNED for one in every])
    return min(
        _placed(begin, end, size, order) for order in (np.lexsort((begin, -size)), np.lexsort((begin, begin - end)))
    )


def _placed(begin: np.ndarray, end: np.ndarray, size: np.ndarray, order: np.ndarray) -> float:
    begin, end, size = begin[order], end[order], size[order]
    offset, top = np.zeros(len(size)), 0.0
    for index in range(len(size)):
        meets = np.flatnonzero((begin[:index] <= end[index]) & (end[:index] >= begin[index]))
        if not len(meets):
            top = max(top, size[index])
            continue
        by = meets[np.argsort(offset[meets], kind="stable")]
        low, high = offset[by], np.maximum.accumulate(offset[by] + size[by])
        gap_at = np.concatenate(([0.0], high))
        gap = np.concatenate((low, [np.inf])) - gap_at
        fits = np.flatnonzero(gap >= size[index])
        chosen = fits[np.argmin(gap[fits])]
        offset[index] = gap_at[chosen]
        top = max(top, offset[index] + size[index])
    return float(top)
