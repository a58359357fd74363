"""The frozen part of a model, such as the autoencoder of latent diffusion, from the folder that holds its weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from artifex import models
from artifex.cli import text_of
from artifex.config import Config
from artifex.models.weights import holds_weights, read_config, read_params
from artifex.training.state import Blueprint, TrainState

OF_THE_USE = ("latent_scale", "latent_shift", "kl_weight")
"""Fields that may differ from those the weights were made with: how latents are scaled, which is measured afterwards,
and the loss."""


def fresh_state(blue: Blueprint) -> TrainState:
    """The state a run begins with: random, but for the frozen parts, which are read straight into their shards.

    Raises `ValueError` where a frozen part would stay random, or where the folder holds another autoencoder.
    """
    spec = blue.config.model.spec()
    if getattr(spec, "autoencoder", None) is None:
        return blue.init()
    folder = autoencoder_folder(blue.config)
    state, part = blue.init(), "autoencoder"
    read = read_params(folder, blue.state.buffers[part], spec.autoencoder, blue.shardings.buffers[part])
    return dataclasses.replace(state, buffers={**state.buffers, part: read})


def autoencoder_folder(config: Config) -> Path:
    """The folder of the autoencoder's weights. Raises `ValueError` where it is missing, or holds another one."""
    spec = config.model.spec()
    folder = Path(spec.autoencoder_weights)
    if not spec.autoencoder_weights or not folder.is_dir():
        there = f"{folder} is no folder" if spec.autoencoder_weights else "is empty"
        command, made = _training(config, folder)
        raise ValueError(
            f"model.autoencoder_weights {there}, so the frozen autoencoder of {config.model.name!r} would stay random; "
            f"train one by `{command}`" + ("" if folder == made else f" and give {made}")
        )
    _check_same(folder, spec.autoencoder)
    return folder


def _training(config: Config, folder: Path) -> tuple[str, Path]:
    """The command that trains the autoencoder of `config` on its data, and the folder its weights will be in.

    That is `folder` where it is the weights folder of a run.
    """
    wanted = config.model.spec().autoencoder
    changes = {
        name: differing(preset, wanted) for name, preset in models.PRESETS.items() if type(preset) is type(wanted)
    }
    name = min(changes, key=lambda name: len(changes[name]))
    run = folder.parent if folder.name == "weights" else Path("runs") / name
    fields = [f"--model.{field.replace('_', '-')} {text_of(getattr(wanted, field))}" for field in changes[name]]
    words = ["python -m artifex.train", f"--model.name {name}", *fields, f"--data.source {config.data.source}"]
    return " ".join([*words, f"--run-dir {run}"]), run / "weights"


def differing(have: Any, wanted: Any) -> list[str]:
    """Fields by which two autoencoders of one family compute otherwise."""
    names = [field.name for field in dataclasses.fields(wanted) if field.name not in OF_THE_USE]
    return [name for name in names if getattr(have, name) != getattr(wanted, name)]


def _check_same(folder: Path, wanted: Any) -> None:
    have = read_config(folder)
    if type(have) is not type(wanted):
        raise ValueError(
            f"model.autoencoder_weights {folder} holds a model of {type(have).__name__}, expected "
            f"{type(wanted).__name__}; give the weights folder of such an autoencoder"
        )
    fields = differing(have, wanted)
    # the size in another library's file is the largest of several that a published autoencoder was made for
    if not holds_weights(folder) and "image_size" in fields:
        fields.remove("image_size")
    others = [f"{name} is {getattr(have, name)} there and {getattr(wanted, name)} here" for name in fields]
    if others:
        raise ValueError(
            f"model.autoencoder_weights {folder} holds another autoencoder: {'; '.join(others)}; set model.autoencoder "
            "to match, or give another folder"
        )
