"""A diffusion model: a network that undoes a corruption process, on pixels or on the latents of a frozen autoencoder.

Dims: B batch, H height, W width, C channels.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from artifex.models import layers
from artifex.models.batch import check_images, check_latents
from artifex.models.diffusion import objective, variance
from artifex.models.diffusion.config import DiffusionConfig
from artifex.models.diffusion.guidance import Network, guided
from artifex.models.diffusion.process import DDPM, EDM, FlowMatching, Process, corrupt, per_example
from artifex.models.diffusion.samplers import SAMPLERS, time_grid
from artifex.models.module import Module
from artifex.models.rows import in_chunks
from artifex.models.staged import Stack, Start
from artifex.scaling import axes
from artifex.scaling.execution import compiled


class Diffusion(Module):
    """Learns to recover x_0 from x_t, and draws images by doing so from noise on.

    Conditions are integer labels (B,), or a tree of arrays (B, ...) such as embedded text. A share of them is replaced
    in training by "none", which is label `num_classes` or zeros.
    """

    def __init__(self, cfg: DiffusionConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.process = process_of(cfg)
        self.network: Any = cfg.network.build(rngs)
        self.autoencoder: Any = None if cfg.autoencoder is None else layers.freeze(cfg.autoencoder.build(rngs))

    def loss(
        self, batch: dict[str, jax.Array], rngs: nnx.Rngs | None = None, *, index: int | jax.Array = 0
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean over images and their dims of the weighted squared error of the prediction.

        Where the network puts out a variance, plus 0.001 of the bound that trains it (`variance.bound`): the metrics
        `mse` and `vlb`, in bits per dim, are the two.

        `batch`: "image" (B, H, W, C) in [-1, 1], "label" (B,) where the model has classes, optionally "mask" (B,), 0
        for rows that do not count, and, for a network that reads text, optionally "condition". Over latents, what the
        autoencoder says of the images, "latent_mean" and "latent_logvar", may stand in place of them. Times are the B
        strata of their distribution. Without `rngs` noise and times are those of batch `index`, latents are means and
        every condition stays. NaN for labels outside [0, num_classes]. Raises `TypeError` or `ValueError` for what is
        no such batch.
        """
        rows, key = self.prepare(batch, rngs, index)
        network = self.network if key is None else functools.partial(self.network, key=key)
        return self.score(*self._predict(network, self._noised(rows), rows["t"], rows["condition"]), rows)

    def prepare(
        self, batch: dict[str, jax.Array], rngs: nnx.Rngs | None, index: int | jax.Array
    ) -> tuple[dict[str, Any], jax.Array | None]:
        """What the network works on, its noise, times and conditions; the key of the network's dropout."""
        encoded = self.autoencoder is not None and "latent_mean" in batch
        (check_latents if encoded else check_images)(batch, self.cfg.num_classes)
        eps_key, time_key, drop_key, latent_key = jax.random.split(layers.noise_key(rngs, index), 4)
        latent_key = None if rngs is None else latent_key
        if encoded:
            x0 = self.latent(batch["latent_mean"], batch["latent_logvar"], latent_key)
        else:
            x0 = self.encode(batch["image"], latent_key)
        B = x0.shape[0]
        t_B = self.process.training_time(layers.strata(B, time_key))
        eps = jax.random.normal(eps_key, x0.shape)
        condition = batch["label"] if self.cfg.num_classes else batch.get("condition")
        if rngs is not None:
            condition = self._drop(condition, drop_key, B)
        key = rngs.dropout() if rngs is not None and self.cfg.network.dropout else None
        rows = {"x0": x0, "eps": eps, "t": t_B, "condition": condition}
        return rows | {"mask": batch.get("mask", jnp.ones(B))}, key

    def _noised(self, rows: dict[str, Any]) -> jax.Array:
        return corrupt(self.process, rows["x0"], rows["eps"], rows["t"])

    @property
    def stack(self) -> Stack | None:
        """The repeated blocks of the network; None where it has no stack."""
        return self.network.stack.under("network") if hasattr(self.network, "stack") else None

    def before(self, rows: dict[str, Any], key: jax.Array | None) -> Start:
        """What enters the network's blocks."""
        x_t, t_B = self._noised(rows), rows["t"]
        scaled = per_example(self.process.input_scale(t_B), x_t) * x_t
        return self.network.begin(scaled, self.process.network_time(t_B), rows["condition"])

    def after(
        self, stream: Any, report: Any, beside: Any, rows: dict[str, Any]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss and metrics of what the network's blocks made of the rows."""
        output, channels = self.network.finish(stream, beside), rows["x0"].shape[-1]
        return self.score(output[..., :channels], output[..., channels:], rows)

    def score(self, output: jax.Array, v: jax.Array, rows: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss and metrics of a prediction, and of what the network puts out beside it."""
        x0, eps, t_B, mask_B = rows["x0"], rows["eps"], rows["t"], rows["mask"]
        error = output - objective.target(self.cfg.prediction, x0, eps, t_B, self.process)
        weight_B = objective.weight(self.cfg.weighting, self.cfg.prediction, t_B, self.process)
        loss_B = weight_B * jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))
        weight = jnp.sum(mask_B)
        loss = jnp.sum(mask_B * loss_B) / jnp.maximum(weight, 1.0)
        if not self.cfg.learns_variance:
            return loss, {"weight": weight}
        predicted = objective.to_x0(self.cfg.prediction, output, self._noised(rows), t_B, self.process)
        vlb_B = variance.bound(x0, predicted, v, t_B, self.process, levels=self.cfg.levels)
        vlb = jnp.sum(mask_B * vlb_B) / jnp.maximum(weight, 1.0)
        return loss + variance.BOUND_WEIGHT * vlb, {"weight": weight, "mse": loss, "vlb": vlb}

    def encode(self, image_BHWC: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """What the network works on: the image, or its latent, drawn by `key` or the mean, shifted and scaled."""
        if self.autoencoder is None:
            return image_BHWC
        mean, logvar = self.autoencoder.encode(image_BHWC)
        return self.latent(mean, logvar, key)

    def latent(self, mean: jax.Array, logvar: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The latent (B, H, W, Z) of what the autoencoder says of an image, drawn by `key` or the mean, shifted and
        scaled."""
        if key is not None:
            mean = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        shift, scale = self.autoencoder.cfg.shift_and_scale
        return jax.lax.stop_gradient((mean - shift) * scale)

    def decode(self, x0: jax.Array) -> jax.Array:
        """The image (B, H, W, C) in [-1, 1] of what the network works on."""
        if self.autoencoder is not None:
            shift, scale = self.autoencoder.cfg.shift_and_scale
            x0 = self.autoencoder.decode(x0 / scale + shift)
        return jnp.clip(x0, -1.0, 1.0)

    def denoise(self, network: Network, x: jax.Array, t_B: jax.Array, condition: Any = None) -> jax.Array:
        """The mean of x_0 given x_t = x, by `network`: the model's own, or that under guidance.

        On pixels it is cut to [-1, 1], where every mean of images lies: Ho et al. 2020 in their code, and what keeps
        guided samples from saturating.
        """
        return self.denoise_and_vary(network, x, t_B, condition)[0]

    def denoise_and_vary(
        self, network: Network, x: jax.Array, t_B: jax.Array, condition: Any = None
    ) -> tuple[jax.Array, jax.Array]:
        """That mean, and the v of `variance` that the network puts out beside it: no channels where it has none."""
        output, v = self._predict(network, x, t_B, condition)
        x0 = objective.to_x0(self.cfg.prediction, output, x, t_B, self.process)
        return x0 if self.autoencoder is not None else jnp.clip(x0, -1.0, 1.0), v

    def sample(
        self,
        key: jax.Array,
        *,
        count: int,
        labels: jax.Array | np.ndarray | None = None,
        condition: Any = None,
        guidance: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
    ) -> jax.Array:
        """`count` images (count, H, W, C) in [-1, 1], drawn by `key` alone.

        Of large images `cfg.draws_at_once` are drawn at a time. `labels` (count,), where the model has classes; without
        them, the classes in turn. `condition` is what a network that reads text takes. `guidance`, `steps` and
        `sampler` replace those of the configuration. Raises `ValueError` for labels out of range or without classes,
        other counts, guidance without anything to guide by, and settings out of range.
        """
        steps = self.cfg.sampling_steps if steps is None else steps
        sampler = self.cfg.sampler if sampler is None else sampler
        if count < 1:
            raise ValueError(f"count is {count}; ask for at least 1 image")
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler {sampler!r} is unknown; choose among {', '.join(SAMPLERS)}")
        time_grid(self.process, steps)
        condition = self._labels(labels, count) if condition is None else self._text(condition, labels, count)
        if guidance is None:
            guidance = self.cfg.guidance if condition is not None else 1.0
        if not (0 <= guidance < float("inf")):
            raise ValueError(f"guidance is {guidance}; expected 1 for none, or a number from 0 up")
        if guidance != 1 and condition is None:
            raise ValueError(f"guidance is {guidance} but there is no label or text to guide by; set it to 1")
        scale = None if guidance == 1 else jnp.float32(guidance)
        return _sample(self, key, condition, scale, count=count, steps=steps, sampler=sampler)

    def _predict(self, network: Network, x: jax.Array, t_B: jax.Array, condition: Any) -> tuple[jax.Array, jax.Array]:
        """The network's prediction for x_t = x, and what it puts out behind that."""
        scaled = per_example(self.process.input_scale(t_B), x) * x
        output = network(scaled, self.process.network_time(t_B), condition)
        return output[..., : x.shape[-1]], output[..., x.shape[-1] :]

    def _null(self, condition: Any) -> Any:
        """What stands for no condition."""
        return jax.tree.map(lambda leaf: jnp.asarray(self.cfg.num_classes, leaf.dtype), condition)

    def _drop(self, condition: Any, key: jax.Array, batch: int) -> Any:
        """`condition` with each example's replaced by none with the configured probability."""
        dropped_B = jax.random.bernoulli(key, self.cfg.condition_dropout, (batch,))

        def drop(leaf: jax.Array, nothing: jax.Array) -> jax.Array:
            return jnp.where(per_example(dropped_B, leaf), nothing, leaf)

        return jax.tree.map(drop, condition, self._null(condition))

    def _labels(self, labels: jax.Array | np.ndarray | None, count: int) -> jax.Array | None:
        classes = self.cfg.num_classes
        if not classes:
            if labels is not None:
                raise ValueError("labels are given to a model without classes; leave them out")
            return None
        labels = np.arange(count) % classes if labels is None else np.asarray(labels)
        if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"labels are {labels.dtype} {labels.shape}; expected one integer for each of {count} images"
            )
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"labels are {labels.min()} to {labels.max()}; the model's classes are 0 to {classes - 1}")
        return jnp.asarray(labels, jnp.int32)

    def _text(self, condition: Any, labels: Any, count: int) -> Any:
        if self.cfg.num_classes or not self.cfg.conditional or labels is not None:
            raise ValueError("condition is for models that read text; give labels where the model has classes")
        sizes = {leaf.shape[0] for leaf in jax.tree.leaves(condition)}
        if sizes != {count}:
            raise ValueError(f"condition has {sorted(sizes)} rows; expected one for each of {count} images")
        return condition


def process_of(cfg: DiffusionConfig) -> Process:
    """The process that a configuration names."""
    match cfg.process:
        case "ddpm_linear":
            return DDPM("linear", cfg.sigma_data)
        case "ddpm_cosine":
            return DDPM("cosine", cfg.sigma_data)
        case "edm":
            return EDM(sigma_data=cfg.sigma_data)
        case "flow":
            return FlowMatching("uniform" if cfg.training_times == "uniform" else "logit_normal", cfg.sigma_data)


@compiled("count", "steps", "sampler")
def _sample(
    model: Diffusion,
    key: jax.Array,
    condition: Any,
    guidance: jax.Array | None,
    *,
    count: int,
    steps: int,
    sampler: str,
) -> jax.Array:
    cfg, process = model.cfg.network, model.process
    start_key, sampler_key = jax.random.split(key)
    times = time_grid(process, steps)
    noise = jax.random.normal(start_key, (count, cfg.image_size, cfg.image_size, cfg.in_channels))
    noise = axes.shard(noise, "batch", "height", "width", "channels")

    def draw(rows: tuple[jax.Array, Any], key: jax.Array) -> jax.Array:
        x_T, condition = rows
        network = model.network if guidance is None else guided(model.network, guidance, model._null(condition))

        def denoise(x: jax.Array, t_B: jax.Array) -> tuple[jax.Array, jax.Array]:
            return model.denoise_and_vary(network, x, t_B, condition)

        # a variance is for the ancestral step alone; the others follow the probability flow, which has none
        if sampler == "ddpm" and model.cfg.learns_variance:
            return model.decode(variance.ddpm(denoise, x_T, process, times, key))
        return model.decode(SAMPLERS[sampler](lambda x, t_B: denoise(x, t_B)[0], x_T, process, times, key))

    x_T = process.sigma(jnp.asarray(times[0])) * noise
    return in_chunks(draw, (x_T, condition), sampler_key, model.cfg.draws_at_once)
