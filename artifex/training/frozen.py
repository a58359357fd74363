"""The frozen part of a model, such as the autoencoder of latent diffusion, from the folder that holds its weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from artifex.models.weights import read_params
from artifex.training.state import Blueprint, TrainState

SCALES = ("latent_scale", "latent_shift")  # of the model that uses the latents, measured after the weights were made


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
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"model.autoencoder_weights {folder} holds no config.json; give the weights folder of a run")
    try:
        section = json.loads(file.read_text())["model"]
    except (KeyError, TypeError, ValueError):
        return  # the layout of another library: its reader checks every tensor
    have = json.loads(json.dumps(dataclasses.asdict(wanted)))
    other = [
        f"{name} is {section[name]} there and {value} here"
        for name, value in have.items()
        if name not in SCALES and name in section and section[name] != value
    ]
    if other:
        raise ValueError(
            f"model.autoencoder_weights {folder} holds another autoencoder: {'; '.join(other)}; set model.autoencoder "
            "to match, or give another folder"
        )
