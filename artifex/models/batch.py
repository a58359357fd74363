"""What a batch is: the arrays that a model's loss reads, looked at by name, kind and shape while it is traced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

TEXT = (
    "'tokens' and 'targets', integers (B, T), and perhaps 'mask' (B, T), 1 where a target counts, and 'segments' and "
    "'positions', integers (B, T), of rows of several documents"
)
IMAGES = "'image', floats (B, H, W, C) in [-1, 1], and perhaps 'mask' (B,), 1 where a row counts"
LATENTS = "'latent_mean' and 'latent_logvar', floats (B, H, W, Z), and perhaps 'mask' (B,), 1 where a row counts"


def check_text(batch: Any, *needed: str) -> None:
    """Raise `TypeError` for what is no mapping, `ValueError` where one of `needed` is missing or no integers (B, T).

    Arrays (B, T) of another shape than the first are refused too: they would be broadcast, and the loss be plausible.
    """
    _check_there(batch, needed, TEXT)
    for name in needed:
        _check_array(name, batch[name], 2, jnp.integer, "integers (B, T)")
    for name in ("segments", "positions"):
        if name in batch:
            _check_array(name, batch[name], 2, jnp.integer, "integers (B, T)")
    shape = jnp.shape(batch[needed[0]])
    for name in ("tokens", "targets", "mask", "segments", "positions"):
        if name in batch and jnp.shape(batch[name]) != shape:
            raise ValueError(
                f"the batch's {name!r} is of shape {jnp.shape(batch[name])}, its {needed[0]!r} of {shape}; give both "
                "one shape (B, T)"
            )


def check_images(batch: Any, num_classes: int = 0) -> None:
    """Raise `TypeError` for what is no mapping, `ValueError` where the image, or the label of a model with classes, is
    missing or of another kind or shape."""
    _check_pictures(batch, num_classes, ("image",), IMAGES, "floats (B, H, W, C) in [-1, 1]")


def check_latents(batch: Any, num_classes: int = 0) -> None:
    """`check_images` of a batch with what an autoencoder says of the images in place of them."""
    _check_pictures(batch, num_classes, ("latent_mean", "latent_logvar"), LATENTS, "floats (B, H, W, Z)")
    if jnp.shape(batch["latent_mean"]) != jnp.shape(batch["latent_logvar"]):
        raise ValueError(
            f"the batch's 'latent_mean' is of shape {jnp.shape(batch['latent_mean'])}, its 'latent_logvar' of "
            f"{jnp.shape(batch['latent_logvar'])}; give both one shape (B, H, W, Z)"
        )


def _check_pictures(batch: Any, num_classes: int, arrays: tuple[str, ...], expected: str, kind: str) -> None:
    needed = arrays
    if num_classes:
        needed, expected = (*arrays, "label"), f"{expected}, and 'label', integers (B,) from 0 to {num_classes - 1}"
    _check_there(batch, needed, expected)
    for name in arrays:
        _check_array(name, batch[name], 4, jnp.floating, kind)
    rows = jnp.shape(batch[arrays[0]])[:1]
    if num_classes:
        _check_array("label", batch["label"], 1, jnp.integer, f"integers {rows}, one an image")
    for name in needed[len(arrays) :] + ("mask",) * ("mask" in batch):
        if jnp.shape(batch[name]) != rows:
            raise ValueError(
                f"the batch's {name!r} is of shape {jnp.shape(batch[name])}; give one for each image, {rows}"
            )


def _check_there(batch: Any, needed: tuple[str, ...], expected: str) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(f"the batch is a {type(batch).__name__}; expected a mapping with {expected}")
    missing = [name for name in needed if name not in batch]
    if missing:
        raise ValueError(
            f"the batch has no {missing[0]!r} (it has {', '.join(map(repr, batch)) or 'nothing'}); expected a mapping "
            f"with {expected}"
        )


def _check_array(name: str, value: Any, rank: int, kind: Any, expected: str) -> None:
    dtype = jnp.result_type(value)
    if jnp.ndim(value) != rank or not jnp.issubdtype(dtype, kind):
        raise ValueError(f"the batch's {name!r} is {dtype} of shape {jnp.shape(value)}; expected {expected}")
