"""The run that is meant by a configuration, the file of one, or a preset's name. Imports no JAX."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from artifex import models
from artifex.config import Config
from artifex.config_io import SUFFIXES, ConfigError, did_you_mean, shown


def run_of(model: Config | str | os.PathLike[str]) -> tuple[Config, str]:
    """The run, and what to call it. Raises `ConfigError`."""
    if isinstance(model, Config):
        return model, model.model.name
    text = os.fspath(model)
    if Path(text).suffix in SUFFIXES or not isinstance(model, str):
        return Config.from_file(text), Path(text).stem
    return Config.from_dict(run_of_preset(text)), text


def run_of_preset(name: str) -> dict[str, Any]:
    """A configuration that trains a preset, as plain values, on rows as long as it takes, at most the usual. Raises
    `ConfigError` for a name that is none."""
    if name not in models.PRESETS:
        near = did_you_mean(name, models.PRESETS)
        raise ConfigError(f"model {shown(name)} is neither a file ({', '.join(SUFFIXES)}) nor a preset; {near}")
    preset, usual = models.PRESETS[name], Config().data.sequence_length
    of_text = {"sequence_length": min(usual, getattr(preset, "sequence_length", usual))}
    return {"model": {"name": name}, "data": of_text if preset.reads == "text" else {"source": "digits"}}
