"""The model zoo: every model by name, each written once for one device in the field's standard terms.

    model = models.create("llama-nano", rngs=nnx.Rngs(0), num_layers=4)
    models.list_models("*gpt*")

Importing this package, listing models and checking overrides import no JAX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fnmatch
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from artifex.models.diffusion import config as _diffusion
from artifex.models.diffusion import layouts as _diffusion_layouts
from artifex.models.layouts import Layout
from artifex.models.transformer import config as _transformer
from artifex.models.transformer import layouts as _transformer_layouts
from artifex.models.transformer import masked_config as _masked
from artifex.models.vae import config as _vae
from artifex.models.vae import layouts as _vae_layouts

if TYPE_CHECKING:
    import jax
    from flax import nnx


def _latent(diffusion: str, autoencoder: str, image_size: int, **more: int) -> _diffusion.DiffusionConfig:
    """A diffusion model over the latents of an autoencoder, its network as large as the latents are."""
    of = _vae.PRESETS[autoencoder]
    assert isinstance(of, _vae.KLAutoencoderConfig), f"{autoencoder} has no continuous latents"
    of = dataclasses.replace(of, image_size=image_size)
    base = _diffusion.PRESETS[diffusion]
    channels = {"in_channels": of.latent_channels, "out_channels": of.latent_channels}
    if base.network.out_channels == 2 * base.network.in_channels:  # beside the prediction, a variance
        channels["out_channels"] *= 2
    network = dataclasses.replace(base.network, image_size=of.latent_size, **channels, **more)
    return dataclasses.replace(base, network=network, autoencoder=of)


PRESETS: dict[str, Any] = {
    **_transformer.PRESETS,
    **_masked.PRESETS,
    **_vae.PRESETS,
    **_diffusion.PRESETS,
    # Peebles and Xie 2022: 256 x 256 images as latents of Stable Diffusion's autoencoder
    **{f"latent-{name}": _latent(name, "sd-autoencoder", 256) for name in ("dit-s2", "dit-b2", "dit-l2", "dit-xl2")},
    "latent-dit-digits": _latent("dit-digits", "kl-digits", 8, patch_size=1),
}
"""Preset name -> the frozen configuration of its family."""

LAYOUTS: dict[str, Layout] = {
    layout.architecture: layout
    for layout in (*_transformer_layouts.LAYOUTS, *_vae_layouts.LAYOUTS, *_diffusion_layouts.LAYOUTS)
}
"""Another library's name for an architecture -> how it writes the model down: see `artifex.models.weights`."""


class GenerativeModel(Protocol):
    """What training and sampling ask of a model.

    `loss` returns the mean loss and its metrics, scalars: `metrics["weight"]` is the count the mean was taken over, so
    that parts of a batch add up, and every other metric is a mean over the same count. Where the loss is more than a
    likelihood, `metrics["nats"]` is the likelihood. Without `rngs` it is validation: no dropout, and the noise is that
    of batch `index`.
    `sample` is a pure function of its key. `cfg` is the configuration the model was built from.
    """

    cfg: Any

    def loss(
        self, batch: dict[str, jax.Array], rngs: nnx.Rngs | None = None, *, index: int | jax.Array = 0
    ) -> tuple[jax.Array, dict[str, jax.Array]]: ...

    def sample(self, key: jax.Array, **how: Any) -> jax.Array: ...


def list_models(pattern: str = "*") -> list[str]:
    """Preset names that match a shell pattern, sorted."""
    return sorted(fnmatch.filter(PRESETS, pattern))


def preset(name: str, **overrides: Any) -> Any:
    """The configuration of preset `name` with some fields replaced.

    A field that is itself a configuration, such as the network of a diffusion model, takes a mapping of its own fields.
    Raises `ValueError` for an unknown preset or field, with the nearest known one, and for values that do not fit.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}: {_nearest(name, PRESETS)}")
    return _replaced(f"model {name!r}", PRESETS[name], overrides)


def _replaced(what: str, base: Any, overrides: Mapping[str, Any]) -> Any:
    fields, changes = [field.name for field in dataclasses.fields(base)], {}
    for field, value in overrides.items():
        if field not in fields:
            raise ValueError(f"{what} has no field {field!r}: {_nearest(field, fields)}")
        part = getattr(base, field)
        if dataclasses.is_dataclass(part) and isinstance(value, Mapping):
            changes[field] = _replaced(f"{what}: {field}", part, value)
        else:  # frozen configurations hold tuples where files have lists
            changes[field] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(base, **changes)


def layouts_of(cfg: Any) -> list[str]:
    """What a model of this configuration can be written in by `artifex.models.weights.save_pretrained`: "artifex", and
    of `LAYOUTS` those that have words for it."""
    found = ["artifex"]
    for name, layout in LAYOUTS.items():
        if layout.config is type(cfg):
            with contextlib.suppress(ValueError):
                layout.write_config(cfg)
                found.append(name)
    return found


def create(name: str, *, rngs: nnx.Rngs, **overrides: Any) -> Any:
    """Build preset `name` with fresh parameters; `overrides` replace fields of its configuration.

    Inside `nnx.eval_shape(lambda: create(...))` nothing is allocated, whatever the size.
    """
    return preset(name, **overrides).build(rngs)


def _nearest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
