"""The frozen part of a model, such as the autoencoder of latent diffusion, from the folder that holds its weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from artifex.models.weights import read_config, read_params
from artifex.training.state import Blueprint, TrainState

OF_THE_USE = ("latent_scale", "latent_shift", "image_size", "kl_weight")
"""Fields that may differ from those the weights were made with: how latents are scaled, which was measured afterwards,
the size of the images, which a convolution does not know, and the loss."""


def fresh_state(blue: Blueprint) -> TrainState:
    """The state a run begins with: random, but for the frozen parts, which are read straight into their shards.

    Raises `ValueError` where a frozen part would stay random, or where the folder holds another autoencoder.
    """
    spec = blue.config.model.spec()
    if getattr(spec, "autoencoder", None) is None:
        return blue.init()
    if not spec.autoencoder_weights:
        raise ValueError(
            f"model.autoencoder_weights is empty, so the frozen autoencoder of {blue.config.model.name!r} would stay "
            "random; train one first and give its run's weights folder"
        )
    folder = Path(spec.autoencoder_weights)
    _check_same(folder, spec.autoencoder)
    state, part = blue.init(), "autoencoder"
    read = read_params(folder, blue.state.buffers[part], spec.autoencoder, blue.shardings.buffers[part])
    return dataclasses.replace(state, buffers={**state.buffers, part: read})


def _check_same(folder: Path, wanted: Any) -> None:
    have = read_config(folder)
    if type(have) is not type(wanted):
        raise ValueError(
            f"model.autoencoder_weights {folder} holds a model of {type(have).__name__}, expected "
            f"{type(wanted).__name__}; give the weights folder of such an autoencoder"
        )
    other = [
        f"{field.name} is {getattr(have, field.name)} there and {getattr(wanted, field.name)} here"
        for field in dataclasses.fields(wanted)
        if field.name not in OF_THE_USE and getattr(have, field.name) != getattr(wanted, field.name)
    ]
    if other:
        raise ValueError(
            f"model.autoencoder_weights {folder} holds another autoencoder: {'; '.join(other)}; set model.autoencoder "
            "to match, or give another folder"
        )
