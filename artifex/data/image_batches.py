"""Images become batches: floats in [-1, 1], in an order and with changes that are functions of (seed, step).

Dims: B rows of a global batch, R of them on this process, H height, W width, C channels.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator

import grain
import numpy as np

from artifex.data.images import ImageCorpus, ImageSplit
from artifex.data.order import check_rows, epoch_order, local_rows

Batch = dict[str, np.ndarray]


def to_float(pixels: np.ndarray, levels: int) -> np.ndarray:
    """v / (levels - 1) * 2 - 1 in float32: 0 becomes -1, levels - 1 becomes 1."""
    return pixels.astype(np.float32) / np.float32(levels - 1) * np.float32(2) - np.float32(1)


def all_images(split: ImageSplit, levels: int, *, most: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """The images of a split, or at most `most` spread evenly over it, in memory, and their labels where it has any.

    Float32 (N, H, W, C) in [-1, 1] and int32 (N,).
    """
    count = len(split) if most is None else min(most, len(split))
    places = np.arange(count) * len(split) // count
    images = to_float(np.stack([split.image(place) for place in places.tolist()]), levels)
    return images, None if split.labels is None else split.labels[places]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageBatches:
    """Training batches without end: `batch_at(step)` is `image`, float32 [R, H, W, C] in [-1, 1], and, where there are
    labels, `label`, int32 [R].

    An epoch visits every image once, in an order of its own. `flip` mirrors half of the images from left to right;
    `crop` shifts each by up to that many pixels up, down, left and right, and fills with what lies inside, reflected.
    Order and changes follow from (seed, row since step 0) by a hash: any step is reached at once, and process p of P
    holds rows [p B/P, (p+1) B/P) of the one global batch. `shift` counts the rows that steps of another size took
    beyond `batch_size` each, or fell short by, below 0.

    With `latents`, what an autoencoder says of every training image, float32 (1, N, 2, H, W, Z), or (2, ...) with those
    of the mirrored ones, a batch has `latent_mean` and `latent_logvar` [R, H, W, Z] in place of `image`.

    Raises `ValueError` for sizes that do not fit together.
    """

    corpus: ImageCorpus
    _: dataclasses.KW_ONLY
    batch_size: int  # of all processes together
    seed: int = 0
    flip: bool = False
    crop: int = 0
    latents: np.ndarray | None = None
    shift: int = 0
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        check_rows(self.batch_size, self.process_index, self.process_count)
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")
        if not 0 <= self.crop < self.corpus.image_size:
            raise ValueError(f"crop is {self.crop}; images of {self.corpus.image_size} pixels shift by 0 to one less")
        if self.latents is not None:
            wanted = (1 + self.flip, len(self.corpus.train), 2)
            if self.crop or self.latents.shape[:3] != wanted:
                raise ValueError(
                    f"latents are of shape {self.latents.shape} and crop is {self.crop}; expected {wanted} and 3 dims "
                    "more, and crop 0: compute them of this corpus, with this flip"
                )

    @property
    def images_per_epoch(self) -> int:
        """Images that one pass over the corpus visits: an epoch is this many rows, batch_size of them a step."""
        return len(self.corpus.train)

    def batch_at(self, step: int) -> Batch:
        """This process's rows of the batch of `step` >= 0."""
        if step < 0:
            raise ValueError(f"step is {step}; the first is 0")
        local = local_rows(self.batch_size, self.process_index, self.process_count)
        first = self.shift + step * self.batch_size + local.start
        split, places = self.corpus.train, [self._image_at(first + row) for row in range(len(local))]
        if self.latents is not None:
            mirrored_R = self._words(first, len(places))[:, 0] >> 63 if self.flip else np.zeros(len(places), np.int64)
            return _labelled(split, places, _posterior(self.latents, mirrored_R, places))
        image_RHWC = np.stack([split.image(place) for place in places])
        if self.flip or self.crop:
            image_RHWC = self._changed(image_RHWC, first)
        return _labelled(split, places, {"image": to_float(image_RHWC, self.corpus.levels)})

    def _image_at(self, row: int) -> int:
        """Which image the row-th row since step 0 shows."""
        epoch, place = divmod(row, self.images_per_epoch)
        _, image_at = epoch_order(self.seed, epoch, self.images_per_epoch)
        return int(image_at(place))

    def _changed(self, image_RHWC: np.ndarray, first: int) -> np.ndarray:
        """Rows flipped and shifted, those from row `first` since step 0 on."""
        words_R4 = self._words(first, len(image_RHWC))
        size, crop = self.corpus.image_size, self.crop
        inside = np.pad(np.arange(size), crop, mode="reflect") if crop else np.arange(size)
        shifts = 2 * crop + 1
        changed = np.empty_like(image_RHWC)
        for row_HWC, image_HWC, words in zip(changed, image_RHWC, words_R4.tolist(), strict=True):
            rows, columns = inside[words[1] % shifts :][:size], inside[words[2] % shifts :][:size]
            if self.flip and words[0] >> 63:
                columns = columns[::-1]
            row_HWC[:] = image_HWC[rows[:, None], columns]
        return changed

    def _words(self, first: int, rows: int) -> np.ndarray:
        """Four random numbers for each row from `first` on, by which it is changed: places of one long sequence."""
        key = np.random.SeedSequence(self.seed, spawn_key=(0, 1)).generate_state(2, np.uint64)
        # a count of Philox is four numbers: row r has those of count first + r, whichever batch it is drawn in
        return np.random.Philox(key=key, counter=first).random_raw(4 * rows).reshape(-1, 4)

    def stream(self, start_step: int = 0) -> grain.DatasetIterator[Batch]:
        """The batches from `start_step` on, prepared ahead in the background; `close()` ends it.

        Arrays: two by one thread. Files: one by each of as many threads as there are cores, at most 16.
        """
        if start_step < 0:
            raise ValueError(f"start_step is {start_step}; the first is 0")
        threads = min(16, os.cpu_count() or 1) if self.corpus.train.decodes else 1
        ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads))
        return iter(grain.MapDataset.range(start_step, sys.maxsize).map(self.batch_at).to_iter_dataset(ahead))


def image_validation_batches(
    corpus: ImageCorpus,
    *,
    batch_size: int,
    count: int | None = None,
    latents: np.ndarray | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """At most `count` batches (None: all) of held-out images, spread evenly over them, the same at every call.

    Beside what a training batch has stands `mask`, float32 [R]: 0 where the last batch has no image left and holds
    zeros, so every batch has one shape. `latents` are those of the held-out images, as in
    `ImageBatches`. Raises `ValueError` at the call for sizes that do not fit together.
    """
    check_rows(batch_size, process_index, process_count)
    if count is not None and count < 1:
        raise ValueError(f"count is {count}; at least 1 validation batch is needed")
    split = corpus.validation
    chosen = len(split) if count is None else min(len(split), count * batch_size)
    blank = np.zeros((corpus.image_size, corpus.image_size, corpus.channels), np.uint8)

    def batch_at(step: int) -> Batch:
        rows = [step * batch_size + row for row in local_rows(batch_size, process_index, process_count)]
        mask_R = np.array([row < chosen for row in rows], np.float32)
        places = [row * len(split) // chosen for row in rows if row < chosen]
        missing = len(rows) - len(places)
        if latents is None:
            images = [split.image(place) for place in places] + [blank] * missing
            content = {"image": to_float(np.stack(images), corpus.levels)}
        else:
            content = _posterior(latents, np.zeros(len(rows), np.int64), places + [0] * missing)
        batch = _labelled(split, places + [0] * missing, content)
        return {name: _masked(value, mask_R) for name, value in batch.items()} | {"mask": mask_R}

    return map(batch_at, range(-(-chosen // batch_size)))


def _posterior(latents: np.ndarray, mirrored_R: np.ndarray, places: list[int]) -> Batch:
    both_R2HWZ = np.asarray(latents[mirrored_R, places])
    return {"latent_mean": both_R2HWZ[:, 0], "latent_logvar": both_R2HWZ[:, 1]}


def _labelled(split: ImageSplit, places: Iterable[int], batch: Batch) -> Batch:
    return batch if split.labels is None else batch | {"label": split.labels[list(places)]}


def _masked(value: np.ndarray, mask_R: np.ndarray) -> np.ndarray:
    return np.where(mask_R.reshape(-1, *(1,) * (value.ndim - 1)) > 0, value, np.zeros_like(value))
