"""Which example stands where in an epoch, and which rows of a batch a process holds: functions of (seed, step)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from grain.experimental import index_shuffle

_STORED_ORDER = 2**16  # index_shuffle walks at least this many places: 1.7 ms an example among 31


@functools.lru_cache(maxsize=8)  # a batch asks for the same epoch once a row
def epoch_order(seed: int, epoch: int, count: int) -> tuple[int, Callable[[int], int]]:
    """A 64-bit number of the epoch's own, and its order: a permutation of range(`count`), place -> example."""
    hashed = np.random.SeedSequence(seed, spawn_key=(epoch,))
    number, shuffle = hashed.generate_state(2, np.uint64).tolist()
    if count > _STORED_ORDER:
        return number, functools.partial(_shuffled, count=count, seed=shuffle % 2**32)
    # Raw bits, because numpy keeps them from release to release, and does not keep `permutation`.
    return number, np.argsort(np.random.Philox(hashed).random_raw(count), kind="stable").__getitem__


def _shuffled(place: int, count: int, seed: int) -> int:
    """Where a permutation of range(count) that is nowhere stored sends `place`."""
    # In grain 0.2.18 index_shuffle sends 0 and max_index to one place where max_index is a power of 4 from 2**16 up.
    # An odd bound is none; walking on from the one or two places beyond the last example leaves a permutation.
    while True:
        place = index_shuffle(place, max_index=count | 1, seed=seed, rounds=4)
        if place < count:
            return place


def local_rows(batch_size: int, process_index: int, process_count: int) -> range:
    """The rows of the global batch that process `process_index` holds."""
    rows = batch_size // process_count
    return range(process_index * rows, (process_index + 1) * rows)


def check_rows(batch_size: int, process_index: int, process_count: int) -> None:
    """Raise `ValueError` unless a batch divides into equal parts for the processes."""
    for name, value in (("batch_size", batch_size), ("process_count", process_count)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not in [0, {process_count})")
    if batch_size % process_count:
        near = -(-batch_size // process_count) * process_count
        raise ValueError(
            f"batch_size {batch_size} does not divide by the {process_count} processes; set it to e.g. {near}"
        )
