"""What a run learns from and how its progress is looked at: everything in which text and images differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

    from artifex.config import Config
    from artifex.training.run_folder import RunFolder

Batch = dict[str, "np.ndarray"]
Metrics = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Score:
    """The number a run is judged by: the metric `field` times `scale`, in `unit`."""

    field: str
    scale: float
    unit: str

    @property
    def key(self) -> str:
        """The name under which metrics.jsonl holds it."""
        return self.unit.replace(" ", "_")


class Corpus(Protocol):
    """A data set; `fingerprint` identifies its content."""

    @property
    def source(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def changes(self) -> tuple[str, ...]:
        """What reading did to the data or left out of it, a line each."""
        ...

    def describe(self) -> str:
        """One line on what there is to learn from."""
        ...


class Task(Protocol):
    """A data set opened for a configuration.

    `noun` is what a step counts, "tokens" or "images", `per_step` how many of them. Of a batch of B rows, a `part`
    (p, P) holds the rows [p B/P, (p+1) B/P): whichever process makes it, the batch is the same. After `step` steps
    `step` * B + `shift` rows were drawn: see `artifex.training.position`.
    """

    @property
    def config(self) -> Config: ...

    @property
    def shift(self) -> int: ...

    @property
    def corpus(self) -> Corpus: ...

    @property
    def noun(self) -> str: ...

    @property
    def per_step(self) -> int: ...

    def batches(self, start: int, part: tuple[int, int] = (0, 1)) -> Any:
        """An iterator, with `close()`, over the training batches from step `start` on."""
        ...

    def validation(self, count: int | None, part: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """`count` held-out batches spread evenly, None for all that is held out: the same ones at each call."""
        ...

    def score(self, metrics: Metrics) -> Score:
        """What to show of a model that reports these metrics."""
        ...

    def save_beside(self, folder: str | Path) -> None:
        """Write to `folder` what samples from its weights need besides them, on the process that writes."""
        ...

    def look(self, model: Any, folder: RunFolder, step: int) -> None:
        """Write what the model makes at `step` to the run's samples, the same draw each time."""
        ...

    def conclude(self, model: Any, folder: RunFolder, step: int) -> tuple[Metrics, list[str]]:
        """The last look: scores of the samples, for metrics.jsonl, and lines for the user."""
        ...


def open_task(config: Config, folder: RunFolder) -> Task:
    """Read the data that the configured model learns from. Raises `ValueError` where it does not fit the model."""
    if config.model.reads == "text":
        from artifex.training.text_task import TextTask

        return TextTask.open(config, folder)
    from artifex.training.image_task import ImageTask

    return ImageTask.open(config)


def batch_shapes(config: Config) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each array of the global batch of `config`; reads no data."""
    rows, spec = config.training.batch_size, config.model.spec()
    shapes: dict[str, tuple[tuple[int, ...], str]]
    if config.model.reads == "text":
        shape = (rows, config.data.sequence_length)
        return {"tokens": (shape, "int32"), "targets": (shape, "int32")}
    if config.data.cache_latents:
        size, channels = spec.autoencoder.latent_size, spec.autoencoder.latent_channels
        shapes = dict.fromkeys(("latent_mean", "latent_logvar"), ((rows, size, size, channels), "float32"))
    else:
        shapes = {"image": ((rows, spec.image_size, spec.image_size, spec.channels), "float32")}
    return shapes | ({"label": ((rows,), "int32")} if spec.num_classes else {})


def attention_of(config: Config) -> dict[str, Any] | None:
    """What the plan must divide where it splits sequences, as `artifex.scaling.plan.Plan.check_sequence` takes it; None
    for models that attend over no sequence, such as those of convolutions."""
    spec = config.model.spec()
    if config.model.reads == "text":
        cfg = getattr(spec, "decoder", spec)
        in_order = cfg.attention == "linear" or (cfg.num_experts and cfg.capacity_factor is not None)
        return {
            "length": config.data.sequence_length,
            "heads": cfg.num_heads,
            "balanced": cfg.causal and not in_order,
            "softmax": cfg.attention != "linear",
            "setting": "data.sequence_length",
        }
    network: Any = getattr(spec, "network", None)
    if not hasattr(network, "patch_size"):
        return None
    tokens = (network.image_size // network.patch_size) ** 2
    how = {"balanced": False, "softmax": True, "setting": "the number of patches"}
    return {"length": tokens, "heads": network.num_heads, **how}
