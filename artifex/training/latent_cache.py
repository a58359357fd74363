"""What a frozen autoencoder says of every image, computed once and kept on disk, so that no step runs the encoder.

Dims: N images, R of them encoded at once, H height, W width, Z latent channels.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from artifex.data.image_batches import to_float
from artifex.data.images import ImageSplit
from artifex.scaling.execution import compiled
from artifex.scaling.placement import leaves_with_names
from artifex.training.frozen import OF_THE_USE
from artifex.training.image_task import ImageTask
from artifex.training.run_folder import RunFolder
from artifex.training.state import Blueprint, TrainState
from artifex.training.task import Task


def with_latents(task: Task, blue: Blueprint, state: TrainState, folder: RunFolder) -> ImageTask:
    """`task` with batches of latents: those in the cache of `folder`, where they are of the same images by the same
    autoencoder, or computed now. They are mapped, so memory holds what is read.

    4 bytes x 2 x latent_size^2 x latent_channels an image, twice that of the training images where `data.flip` mirrors
    them. Raises `ValueError` for a run of several processes.
    """
    assert isinstance(task, ImageTask), "Config.check: latents are of images"
    if jax.process_count() > 1:
        raise ValueError(
            f"data.cache_latents is for one process, and this run has {jax.process_count()}; set it to false"
        )
    return blue.run(state, _with_latents, task, blue, _key(task, blue, state), folder)


def _with_latents(model: Any, task: ImageTask, blue: Blueprint, key: str, folder: RunFolder) -> ImageTask:
    corpus, rows = task.corpus, blue.config.training.batch_size // blue.plan.microbatches

    def encoded(image_RHWC: np.ndarray) -> np.ndarray:
        batch = {"image": to_float(image_RHWC, corpus.levels)}
        placed = jax.device_put(batch, blue.batch_sharding(batch))
        return jax.device_get(encode(model.autoencoder, placed["image"]))

    train = _mapped(folder.cache / f"latents-{key}-train.npy", corpus.train, encoded, rows, task.config.data.flip)
    held_out = _mapped(folder.cache / f"latents-{key}-validation.npy", corpus.validation, encoded, rows, False)
    return dataclasses.replace(task, latents=(train, held_out))


@compiled()
def encode(autoencoder: Any, image_RHWC: jax.Array) -> jax.Array:
    """Mean and log-variance (R, 2, H, W, Z), float32."""
    return jnp.stack(autoencoder.encode(image_RHWC), axis=1)


def _mapped(file: Path, split: ImageSplit, encode: Callable, rows: int, flip: bool) -> np.ndarray:
    """The latents of a split, (1 or 2, N, 2, H, W, Z), from `file`, which appears whole or not at all."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{file.name}")
        latents: np.ndarray | None = None
        for mirrored in range(1 + flip):
            for begin in range(0, len(split), rows):
                places = np.minimum(np.arange(begin, begin + rows), len(split) - 1)  # one shape: one program
                image_RHWC = np.stack([split.image(place) for place in places.tolist()])
                found = encode(image_RHWC[:, :, ::-1] if mirrored else image_RHWC)
                if latents is None:
                    shape = (1 + flip, len(split), *found.shape[1:])
                    latents = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
                latents[mirrored, begin : begin + rows] = found[: len(split) - begin]
        assert isinstance(latents, np.memmap), "a split has images"
        latents.flush()
        part.replace(file)
    return np.load(file, mmap_mode="r")


def _key(task: ImageTask, blue: Blueprint, state: TrainState) -> str:
    """Of all that latents follow from: the images, whether they are mirrored, the autoencoder, and its dtype."""
    made = dataclasses.asdict(blue.config.model.spec().autoencoder)
    made = {name: value for name, value in made.items() if name not in OF_THE_USE}
    said = (task.corpus.fingerprint, task.config.data.flip, blue.config.training.compute_dtype, made)
    key = hashlib.sha256(repr(said).encode())
    weights, names = state.buffers["autoencoder"], blue.buffer_names["autoencoder"]
    for path, leaf, _ in leaves_with_names(weights, names):
        key.update(path.encode())
        key.update(np.ascontiguousarray(jax.device_get(leaf)).data)
    return key.hexdigest()[:16]
