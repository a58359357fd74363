"""Weights alone: a folder with `config.json` and `model.safetensors`, in and out, strictly.

A tensor's name is its path in the model's canonical tree with dots, `layers.attention.query.kernel`, and its shape is
the one the model has: repeated blocks stay stacked.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from artifex import models

CONFIG, TENSORS = "config.json", "model.safetensors"


def save_pretrained(folder: str | Path, name: str, cfg: Any, params: Any) -> None:
    """Write `params`, the nested dicts of a model built from preset `name` with configuration `cfg`, to `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = {
        _dotted(path): np.asarray(jax.device_get(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    # numpy may hand over a view with other strides; safetensors writes the buffer as it lies
    save_file({path: np.ascontiguousarray(value) for path, value in flat.items()}, folder / TENSORS)
    text = json.dumps({"model": {"name": name, **dataclasses.asdict(cfg)}}, indent=2)
    (folder / CONFIG).write_text(text + "\n")


def from_pretrained(folder: str | Path) -> nnx.Module:
    """The model a folder holds.

    Raises `FileNotFoundError` where a file is missing, and `ValueError` for a configuration that is none and for
    tensors that are missing, unknown, misshapen or of another dtype, with the first of them listed.
    """
    folder = Path(folder)
    for file in (CONFIG, TENSORS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} holds no {file}; expected a folder written by save_pretrained")
    try:
        section = dict(json.loads((folder / CONFIG).read_text())["model"])
        cfg = models.preset(section.pop("name"), **section)
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{folder / CONFIG} describes no model: expected {{'model': {{'name': ...}}}} ({error})"
        ) from error
    graphdef, state = nnx.split(nnx.eval_shape(lambda: cfg.build(nnx.Rngs(0))))
    abstract = nnx.to_pure_dict(state)
    try:
        tensors = load_file(folder / TENSORS)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS} is no safetensors file: {error}") from error
    _check(folder, {_dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}, tensors)
    params = jax.tree_util.tree_map_with_path(lambda path, _: jax.numpy.asarray(tensors[_dotted(path)]), abstract)
    return nnx.merge(graphdef, params)


def _dotted(path: Any) -> str:
    return ".".join(str(key.key) for key in path)


def _check(folder: Path, expected: dict[str, Any], got: dict[str, np.ndarray]) -> None:
    wrong = [f"missing {path}" for path in expected if path not in got]
    wrong += [f"unknown {path}" for path in got if path not in expected]
    for path in expected.keys() & got.keys():
        want, have = expected[path], got[path]
        if want.shape != have.shape or want.dtype != have.dtype:
            wrong.append(f"{path} is {have.dtype}{list(have.shape)}, expected {want.dtype}{list(want.shape)}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{folder / TENSORS} does not fit {folder / CONFIG}: {'; '.join(wrong[:5])}{more}")
