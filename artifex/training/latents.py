"""How far an autoencoder's latents lie from mean 0 and deviation 1: measured before diffusion over them begins.

Rombach et al. 2022 (arXiv:2112.10752), appendix G: a diffusion process ends in noise of deviation 1, so the latents are
shifted and scaled to mean 0 and deviation 1 over all their numbers. What is measured goes into the run's configuration,
from where a resumed run and the weights have it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from artifex.config import Config
from artifex.data.image_batches import to_float
from artifex.data.images import ImageCorpus
from artifex.scaling.execution import compiled
from artifex.training.frozen import differing
from artifex.training.making import Made
from artifex.training.start import open_source
from artifex.training.state import Blueprint, blueprint
from artifex.training.task import Corpus

FIELDS = ("latent_shift", "latent_scale")
MEASURED, CHECKED = 2_048, 256  # images: four digits of a number to train with, and two to compare one by
AT_ONCE = 64  # images that are encoded in one call
FAR = 0.2  # of the deviation: from here on the run says that the latents are not what diffusion expects


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and deviation of all numbers of the drawn latents of `images` training images."""

    mean: float
    std: float
    images: int


def as_known(config: Config, saved: Config | None) -> Config:
    """`config` with shift and scale where it leaves them to be measured and they are known already: to the run that is
    `saved`, or to weights that the run starts from, of a network over the latents of the same autoencoder."""
    wanted = getattr(config.model.spec(), "autoencoder", None)
    unknown = [name for name in FIELDS if wanted is not None and getattr(wanted, name) is None]
    if saved is not None:
        known = getattr(saved.model.spec(), "autoencoder", None)
    elif unknown and config.training.start_from is not None:
        known = getattr(open_source(config.training.start_from).spec, "autoencoder", None)
    else:
        return config
    if not unknown or type(known) is not type(wanted) or differing(known, wanted):
        return config
    return _with(config, {name: value for name in unknown if (value := getattr(known, name)) is not None})


def settle(blue: Blueprint, made: Made, corpus: Corpus) -> tuple[Blueprint, list[str]]:
    """The blueprint with a shift and scale that fit the training images, and lines on them: see `fitted`.

    By the autoencoder in the state, wherever that came from. Without one, nothing.
    """
    cfg = getattr(blue.config.model.spec(), "autoencoder", None)
    if cfg is None:
        return blue, []
    assert isinstance(corpus, ImageCorpus), "an autoencoder is of images"
    stated = None not in (cfg.latent_shift, cfg.latent_scale)
    found = blue.run(made(), lambda model: moments(model.autoencoder, corpus, CHECKED if stated else MEASURED))
    config, lines = fitted(blue.config, found)
    return blue if stated else blueprint(config, blue.plan, blue.mesh), lines


def fitted(config: Config, found: Moments) -> tuple[Config, list[str]]:
    """`config` with what it leaves open of shift and scale as `found`, to four digits, and lines on both.

    What it states is compared: a line warns where the latents then have a mean or deviation more than a fifth off.
    """
    autoencoder = config.model.spec().autoencoder
    exact = {"latent_shift": found.mean, "latent_scale": 1.0 / found.std}
    measured = {name: float(f"{exact[name]:.4g}") for name in FIELDS if getattr(autoencoder, name) is None}
    config = _with(config, measured)
    shift, scale = config.model.spec().autoencoder.shift_and_scale
    so = f"; so {' and '.join(f'{name} is {value}' for name, value in measured.items())}" if measured else ""
    lines = [f"latents of {found.images:,} training images: mean {found.mean:.4g}, deviation {found.std:.4g}{so}"]
    mean, std = (found.mean - shift) * scale, found.std * scale
    if abs(mean) > FAR or abs(std - 1) > FAR:
        lines.append(
            f"warning: with latent_shift {shift} and latent_scale {scale} diffusion sees latents of mean {mean:.3g} "
            f"and deviation {std:.3g}, where it expects 0 and 1; set both to none in model.autoencoder to have them "
            "measured"
        )
    return config, lines


def moments(autoencoder: Any, corpus: ImageCorpus, most: int) -> Moments:
    """Those of the latents of at most `most` images, spread evenly over the training split.

    A latent is drawn from its posterior, so the mean variance of the posteriors is part of the whole.
    """
    split = corpus.train
    rows = min(AT_ONCE, most, len(split))
    batches = min(most, len(split)) // rows  # all of one shape, so that one program is compiled
    places = np.arange(batches * rows) * len(split) // (batches * rows)
    parts = [
        jax.device_get(_moments(autoencoder, to_float(np.stack([split.image(at) for at in part]), corpus.levels)))
        for part in places.reshape(batches, rows).tolist()
    ]
    mean, square = np.asarray(parts, np.float64).mean(0)
    return Moments(float(mean), math.sqrt(square - mean**2), batches * rows)


@compiled()
def _moments(autoencoder: Any, image_BHWC: Any) -> tuple[jax.Array, jax.Array]:
    mean, logvar = autoencoder.encode(image_BHWC)
    return jnp.mean(mean), jnp.mean(jnp.square(mean) + jnp.exp(logvar))


def _with(config: Config, fields: dict[str, float]) -> Config:
    if not fields:
        return config
    values = config.to_dict()
    autoencoder = {**values["model"].get("autoencoder", {}), **fields}
    return Config.from_dict(values | {"model": values["model"] | {"autoencoder": autoencoder}})
