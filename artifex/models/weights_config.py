"""What the `config.json` beside weights says: our configuration of a model, in our words or in another library's.

Ours is `{"model": {"name": PRESET, every field}}`; theirs is what a `Layout` of `artifex.models.LAYOUTS` reads and
writes. Imports no JAX.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from artifex import models
from artifex.models.layouts import Layout
from artifex.models.safetensors_io import read_json, shown

CONFIG = "config.json"


def read_config(folder: str | Path) -> Any:
    """The configuration of the model a folder holds: see `artifex.models.weights.from_pretrained`."""
    return described(Path(folder))[0]


def described(folder: str | Path) -> tuple[Any, Layout | None]:
    """The configuration in a folder, and the layout of its tensors; None: our own."""
    folder = Path(folder)
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}; expected a folder written by save_pretrained")
    try:
        config = read_json(file)
    except ValueError as error:
        raise ValueError(f"{folder} describes no model: {error}") from error
    try:
        if "model" in config:
            return spec_of(config["model"]), None
        architecture = config["_class_name"] if "_class_name" in config else config["architectures"][0]
        layout = models.LAYOUTS.get(architecture)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{file} describes no model: expected {{'model': {{'name': ...}}}}, or 'architectures' or '_class_name' as "
            f"other libraries write them ({type(error).__name__}: {error})"
        ) from error
    if layout is None:
        raise ValueError(f"{file} is of a {shown(str(architecture))}; known are {', '.join(sorted(models.LAYOUTS))}")
    try:
        return layout.read_config(config), layout
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{file} describes no {architecture}: {type(error).__name__} {error}") from error


def spec_of(section: Mapping[str, Any]) -> Any:
    """The configuration that `section_of` wrote down."""
    fields = dict(section)
    return models.preset(fields.pop("name"), **fields)


def section_of(name: str, cfg: Any) -> dict[str, Any]:
    """`cfg` as the fields of preset `name`, all of them, in the words of JSON."""
    section = {"name": name, **json.loads(json.dumps(dataclasses.asdict(cfg)))}
    if spec_of(section) != cfg:
        raise ValueError(f"preset {name!r} with other fields is not {cfg}; name the preset that it was made from")
    return section


def preset_like(cfg: Any) -> str:
    """The preset that `cfg` shares most fields with, so that a Llama is said to be one."""

    def shared(name: str) -> int:
        return sum(getattr(models.PRESETS[name], field.name) == value for field, value in fields)

    fields = [(field, getattr(cfg, field.name)) for field in dataclasses.fields(cfg)]
    for name in sorted((name for name, base in models.PRESETS.items() if type(base) is type(cfg)), key=shared)[::-1]:
        try:
            section_of(name, cfg)
        except (ValueError, TypeError):  # parts of another kind
            continue
        return name
    raise ValueError(f"no preset is a {type(cfg).__name__} like {cfg}; write it in another library's layout")


def chosen_layout(cfg: Any, name: str) -> tuple[Layout, dict[str, Any]]:
    """The layout `name` and its `config.json`."""
    fitting = {key: layout for key, layout in models.LAYOUTS.items() if layout.config is type(cfg)}
    if name != "huggingface":
        if name not in fitting:
            known = ", ".join(["artifex", *sorted(fitting)])
            raise ValueError(f"layout {name!r} does not hold a {type(cfg).__name__}; choose one of {known}")
        return fitting[name], fitting[name].write_config(cfg)
    reasons = []
    for layout in fitting.values():
        try:
            return layout, layout.write_config(cfg)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(
        f"no layout of another library holds this {type(cfg).__name__}: {'; '.join(reasons) or 'none has one'}"
    )
