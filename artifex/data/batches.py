"""Tokens become batches: windows of a corpus, in an order that is a pure function of (seed, step).

Dims: B rows of a global batch, R of them on this process, T tokens of a window.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator

import grain
import numpy as np

from artifex.data import DataError
from artifex.data.order import check_rows, epoch_order, local_rows

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Training batches without end: `batch_at(step)` is `tokens` and `targets`, both int32 [R, T].

    The corpus is a ring. An epoch cuts it, at an offset of its own, into windows of T tokens that do not overlap and
    leave less than one window out, and visits them in an order of its own; an example is a window and the same
    window one token later. Offset and order follow from (seed, epoch) by a hash: any step is reached at once, no
    order of a large corpus is stored, and process p of P holds rows [p B/P, (p+1) B/P) of the one global batch.

    `vocab_size` lets every drawn batch be checked for ids outside [0, vocab_size), which a model would not notice.
    `shift` counts the rows that steps of another size took beyond `batch_size` each, or fell short by, below 0.
    Raises `ValueError` for sizes that do not fit together and for fewer than T + 1 tokens.
    """

    tokens: np.ndarray  # any integer dtype, in memory or memory-mapped
    _: dataclasses.KW_ONLY
    batch_size: int  # of all processes together
    sequence_length: int
    seed: int = 0
    vocab_size: int | None = None
    shift: int = 0
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        _check_sizes(self.tokens, self.batch_size, self.sequence_length, self.process_index, self.process_count)
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")
        if len(self.tokens) < self.sequence_length + 1:
            raise ValueError(
                f"the training tokens are {len(self.tokens)}, but one window needs sequence_length + 1 = "
                f"{self.sequence_length + 1}; lower sequence_length or give more text"
            )

    @property
    def windows_per_epoch(self) -> int:
        """Windows that one pass over the corpus visits: an epoch is this many rows, batch_size of them a step."""
        return len(self.tokens) // self.sequence_length

    def batch_at(self, step: int) -> Batch:
        """This process's rows of the batch of `step` >= 0."""
        if step < 0:
            raise ValueError(f"step is {step}; the first is 0")
        local = local_rows(self.batch_size, self.process_index, self.process_count)
        window_RT = np.empty((len(local), self.sequence_length + 1), self.tokens.dtype)
        for row_T, row in zip(window_RT, local, strict=True):
            start = self._start(self.shift + step * self.batch_size + row)
            chunk = self.tokens[start : start + len(row_T)]
            row_T[: len(chunk)] = chunk
            row_T[len(chunk) :] = self.tokens[: len(row_T) - len(chunk)]  # around the ring
        _check_ids(window_RT, self.vocab_size)
        return {"tokens": window_RT[:, :-1].astype(np.int32), "targets": window_RT[:, 1:].astype(np.int32)}

    def _start(self, row: int) -> int:
        """Where the window of the row-th row since step 0 begins."""
        epoch, place = divmod(row, self.windows_per_epoch)
        offset, window_at = epoch_order(self.seed, epoch, self.windows_per_epoch)
        return (offset + int(window_at(place)) * self.sequence_length) % len(self.tokens)

    def stream(self, start_step: int = 0) -> grain.DatasetIterator[Batch]:
        """The batches from `start_step` on, two of them prepared ahead by a background thread; `close()` ends it."""
        if start_step < 0:
            raise ValueError(f"start_step is {start_step}; the first is 0")
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(grain.MapDataset.range(start_step, sys.maxsize).map(self.batch_at).to_iter_dataset(ahead))


def validation_batches(
    tokens: np.ndarray,
    *,
    batch_size: int,
    sequence_length: int,
    count: int | None = None,
    vocab_size: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """At most `count` batches (None: all) of windows spread evenly over `tokens`, the same at every call.

    The windows do not overlap; `mask`, float32 [R, T], is 0 where the last window is short and where the last batch
    has no window left, so every batch has one shape. With count None each token but the first is a target once.
    Raises `ValueError` at the call for sizes that do not fit together and for fewer than 2 tokens.
    """
    _check_sizes(tokens, batch_size, sequence_length, process_index, process_count)
    if count is not None and count < 1:
        raise ValueError(f"count is {count}; at least 1 validation batch is needed")
    if len(tokens) < 2:
        raise ValueError(f"the validation tokens are {len(tokens)}, but a prediction needs 2; give more text")
    windows = -(-(len(tokens) - 1) // sequence_length)
    chosen = windows if count is None else min(windows, count * batch_size)

    def batch_at(step: int) -> Batch:
        local = local_rows(batch_size, process_index, process_count)
        window_RT = np.zeros((len(local), sequence_length + 1), tokens.dtype)
        mask_RT = np.zeros((len(local), sequence_length), np.float32)
        for row_T, valid_T, row in zip(window_RT, mask_RT, local, strict=True):
            place = step * batch_size + row
            if place < chosen:
                start = place * windows // chosen * sequence_length
                chunk = tokens[start : start + len(row_T)]
                row_T[: len(chunk)] = chunk
                valid_T[: len(chunk) - 1] = 1
        _check_ids(window_RT, vocab_size)
        shifted = {"tokens": window_RT[:, :-1].astype(np.int32), "targets": window_RT[:, 1:].astype(np.int32)}
        return shifted | {"mask": mask_RT}

    return map(batch_at, range(-(-chosen // batch_size)))


def _check_sizes(tokens: np.ndarray, batch_size: int, sequence_length: int, index: int, count: int) -> None:
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens are {tokens.dtype} of shape {tokens.shape}; expected integers in one dim")
    if sequence_length < 1:
        raise ValueError(f"sequence_length is {sequence_length}; it must be at least 1")
    check_rows(batch_size, index, count)


def _check_ids(window_RT: np.ndarray, vocab_size: int | None) -> None:
    if vocab_size is None or (window_RT.dtype.kind == "u" and np.iinfo(window_RT.dtype).max < vocab_size):
        return
    low, high = window_RT.min(), window_RT.max()
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise DataError(f"the tokens hold id {bad}, outside [0, {vocab_size}); give the tokenizer they were made with")
