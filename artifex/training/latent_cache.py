"""What a frozen autoencoder says of every image, computed once and kept on disk, so that no step runs the encoder.

Dims: N images, R of them encoded at once, H height, W width, Z latent channels.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from artifex.data.image_batches import to_float
from artifex.data.images import ImageSplit
from artifex.scaling import processes
from artifex.scaling.execution import compiled
from artifex.scaling.placement import leaves_with_names
from artifex.training.frozen import OF_THE_USE
from artifex.training.image_task import ImageTask
from artifex.training.run_folder import RunFolder, check_seen
from artifex.training.state import Blueprint, TrainState
from artifex.training.task import Task


def with_latents(task: Task, blue: Blueprint, state: TrainState, folder: RunFolder) -> ImageTask:
    """`task` with batches of latents: those in the cache of `folder`, where they are of the same images by the same
    autoencoder, or computed now. They are mapped, so memory holds what is read.

    4 bytes x 2 x latent_size^2 x latent_channels an image, twice that of the training images where `data.flip` mirrors
    them. Of several processes each reads and encodes its own images, and the first one writes.
    """
    assert isinstance(task, ImageTask), "Config.check: latents are of images"
    return blue.run(state, _with_latents, task, blue, _key(task, blue, state), folder)


def _with_latents(model: Any, task: ImageTask, blue: Blueprint, key: str, folder: RunFolder) -> ImageTask:
    corpus, rows = task.corpus, blue.config.training.batch_size // blue.plan.microbatches

    def encoded(image_RHWC: np.ndarray) -> np.ndarray:
        placed = blue.placed({"image": to_float(image_RHWC, corpus.levels)})
        return processes.fetched(encode(model.autoencoder, placed["image"]))

    mapped = functools.partial(_mapped, encode=encoded, rows=rows, part=blue.part)
    train = mapped(folder.cache / f"latents-{key}-train.npy", corpus.train, flip=task.config.data.flip)
    held_out = mapped(folder.cache / f"latents-{key}-validation.npy", corpus.validation, flip=False)
    return dataclasses.replace(task, latents=(train, held_out))


@compiled()
def encode(autoencoder: Any, image_RHWC: jax.Array) -> jax.Array:
    """Mean and log-variance (R, 2, H, W, Z), float32."""
    return jnp.stack(autoencoder.encode(image_RHWC), axis=1)


def _mapped(
    file: Path, split: ImageSplit, *, encode: Callable, rows: int, part: tuple[int, int], flip: bool
) -> np.ndarray:
    """The latents of a split, (1 or 2, N, 2, H, W, Z), from `file`, which appears whole or not at all. `part`: which of
    the `rows` that are encoded at once this process gives."""
    if not processes.first_says(file.exists()):
        (p, P), unfinished = part, file.with_name(f".{file.name}")
        latents: np.ndarray | None = None
        for mirrored in range(1 + flip):
            for begin in range(0, len(split), rows):
                places = np.minimum(np.arange(begin, begin + rows), len(split) - 1)  # one shape: one program
                image_RHWC = np.stack([split.image(place) for place in np.split(places, P)[p].tolist()])
                found = encode(image_RHWC[:, :, ::-1] if mirrored else image_RHWC)
                if not processes.is_first():
                    continue
                if latents is None:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    shape = (1 + flip, len(split), *found.shape[1:])
                    latents = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=shape)
                latents[mirrored, begin : begin + rows] = found[: len(split) - begin]
        if latents is not None:
            assert isinstance(latents, np.memmap)
            latents.flush()
            unfinished.replace(file)
    check_seen(file)
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _key(task: ImageTask, blue: Blueprint, state: TrainState) -> str:
    """Of all that latents follow from: the images, whether they are mirrored, the autoencoder, and its dtype."""
    made = dataclasses.asdict(blue.config.model.spec().autoencoder)
    made = {name: value for name, value in made.items() if name not in OF_THE_USE}
    said = (task.corpus.fingerprint, task.config.data.flip, blue.config.training.compute_dtype, made)
    key = hashlib.sha256(repr(said).encode())
    weights, names = state.buffers["autoencoder"], blue.buffer_names["autoencoder"]
    for path, leaf, _ in leaves_with_names(weights, names):
        key.update(path.encode())
        key.update(np.ascontiguousarray(processes.fetched(leaf)).data)
    return key.hexdigest()[:16]
