"""The model zoo: every model by name, each written once for one device in the field's standard terms.

    model = models.create("llama-nano", rngs=nnx.Rngs(0), num_layers=4)
    models.list_models("*gpt*")

Importing this package, listing models and checking overrides import no JAX.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from typing import TYPE_CHECKING, Any, Protocol

from artifex.models.transformer import config as _transformer

if TYPE_CHECKING:
    import jax
    from flax import nnx

PRESETS: dict[str, Any] = {**_transformer.PRESETS}
"""Preset name -> the frozen configuration of its family."""


class GenerativeModel(Protocol):
    """What training and sampling ask of a model.

    `loss` returns the mean loss in nats and its metrics; `metrics["weight"]` is the count the mean was taken over, so
    that parts of a batch add up. `rngs` None means no dropout: validation. `sample` is a pure function of its key.
    """

    def loss(
        self, batch: dict[str, jax.Array], rngs: nnx.Rngs | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]: ...

    def sample(self, key: jax.Array, **how: Any) -> jax.Array: ...


def list_models(pattern: str = "*") -> list[str]:
    """Preset names that match a shell pattern, sorted."""
    return sorted(fnmatch.filter(PRESETS, pattern))


def preset(name: str, **overrides: Any) -> Any:
    """The configuration of preset `name` with some fields replaced.

    Raises `ValueError` for an unknown preset or field, with the nearest known one, and for values that do not fit.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}: {_nearest(name, PRESETS)}")
    base = PRESETS[name]
    fields = [field.name for field in dataclasses.fields(base)]
    for field in overrides:
        if field not in fields:
            raise ValueError(f"model {name!r} has no field {field!r}: {_nearest(field, fields)}")
    return dataclasses.replace(base, **overrides)


def create(name: str, *, rngs: nnx.Rngs, **overrides: Any) -> Any:
    """Build preset `name` with fresh parameters; `overrides` replace fields of its configuration.

    Inside `nnx.eval_shape(lambda: create(...))` nothing is allocated, whatever the size.
    """
    return preset(name, **overrides).build(rngs)


def _nearest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
