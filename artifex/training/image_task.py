"""Learning from images: batches of pictures, grids to look at, and a score of what was drawn."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from artifex.config import Config
from artifex.data.classes import save_classes
from artifex.data.image_batches import ImageBatches, all_images, image_validation_batches
from artifex.data.images import ImageCorpus, load_images, only_classes
from artifex.evaluation.grids import pairs_grid, save_grid
from artifex.scaling.execution import Execution, execution
from artifex.scaling.processes import by_first, fetched, is_first
from artifex.training.run_folder import RunFolder
from artifex.training.task import Batch, Metrics, Score

COLUMNS = 10  # of a grid
DRAW = 250  # images drawn at once for a score
NEIGHBOURS = 50_000  # training images that are looked through for the nearest
PAIRS = 20  # images beside their reconstruction or nearest neighbour


@dataclasses.dataclass(frozen=True)
class ImageTask:
    """A set of pictures for a model of images.

    With `latents`, of the training and the held-out images, batches have these in place of the images.
    """

    config: Config
    corpus: ImageCorpus
    latents: tuple[np.ndarray, np.ndarray] | None = None
    noun: str = "images"
    shift: int = 0

    @classmethod
    def open(cls, config: Config) -> ImageTask:
        """Read the configured images. Raises `ValueError` where their labels or values are not the model's."""
        spec = config.model.spec()
        corpus = load_images(
            config.data.source,
            image_size=spec.image_size,
            channels=spec.channels,
            validation_fraction=config.data.validation_fraction,
            corrupt=config.data.corrupt,
            settings=_settings(spec),
        )
        if config.data.classes is not None:
            corpus = only_classes(corpus, config.data.classes)
        if spec.num_classes and corpus.num_classes != spec.num_classes:
            raise ValueError(
                f"{config.model.name!r} is made for {spec.num_classes} classes, but {corpus.source} has "
                f"{corpus.num_classes or 'no labels'}; set model.network.num_classes={corpus.num_classes}"
            )
        levels = getattr(spec, "levels", None)
        if levels is not None and levels != corpus.levels:
            raise ValueError(
                f"model.levels is {levels}, but a channel of {corpus.source} has {corpus.levels} values; set "
                f"model.levels={corpus.levels}"
            )
        return cls(config, corpus)

    @property
    def per_step(self) -> int:
        """Images of one step."""
        return self.config.training.batch_size

    def batches(self, start: int, part: tuple[int, int] = (0, 1)) -> Any:
        """Every image once an epoch, in the order of (seed, step), augmented as configured."""
        return ImageBatches(
            self.corpus,
            batch_size=self.config.training.batch_size,
            seed=self.config.training.seed,
            flip=self.config.data.flip,
            crop=self.config.data.crop,
            latents=self.latents and self.latents[0],
            shift=self.shift,
            process_index=part[0],
            process_count=part[1],
        ).stream(start)

    def validation(self, count: int | None, part: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Held-out images, `count` batches of them; None: each image once."""
        return image_validation_batches(
            self.corpus,
            batch_size=self.config.training.batch_size,
            count=count,
            latents=self.latents and self.latents[1],
            process_index=part[0],
            process_count=part[1],
        )

    def score(self, metrics: Metrics) -> Score:
        """Bits per dim where the model has a likelihood, else its loss."""
        field = "bits_per_dim" if "bits_per_dim" in metrics else "loss"
        return Score(field, 1.0, field.replace("_", " "))

    @by_first
    def save_beside(self, folder: str | Path) -> None:
        """The names of the classes, of a model that has classes."""
        if self.config.model.spec().num_classes:
            save_classes(self.corpus.class_names, folder)

    def look(self, model: Any, folder: RunFolder, step: int) -> None:
        """A grid of samples, a row for each class where there are few; of an autoencoder its reconstructions too."""
        count = self.config.training.sample_images
        if not count:
            return
        images, _ = self._draw(model, count, self.config.training.seed)
        shown, columns, names = self._rows(model, count)
        by_first(save_grid)(images[shown], folder.sample(step, ".png"), columns=columns, row_labels=names)
        if hasattr(model, "reconstruct"):
            self._reconstructions(model, folder.sample(step, "-reconstructions.png"))

    def conclude(self, model: Any, folder: RunFolder, step: int) -> tuple[Metrics, list[str]]:
        """`final.png`: reconstructions, or samples above their nearest training images; and scores where labels are."""
        lines, scores = [f"sample from it:  {self._command(model, folder)}"], {}
        if self.config.training.sample_images:
            self._final(model, folder.samples / "final.png")
        if self.config.training.score_images and self.corpus.num_classes:
            scores = self._scores(model)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
            lines.insert(0, f"{self.config.training.score_images} samples: {shown}")
        return scores, lines

    def _final(self, model: Any, path: Path) -> None:
        from artifex.evaluation.frechet import nearest_neighbours

        if hasattr(model, "reconstruct"):
            self._reconstructions(model, path)
            return
        images, _ = self._draw(model, PAIRS, self.config.training.seed)
        if not is_first():
            return
        known, _ = all_images(self.corpus.train, self.corpus.levels, most=NEIGHBOURS)
        shown, columns, names = self._rows(model, PAIRS)
        images = images[shown]
        nearest = known[nearest_neighbours(images, known)]
        pairs_grid(images, nearest, path, columns=columns, row_labels=names, title="sample, nearest training image")

    def _reconstructions(self, model: Any, path: Path) -> None:
        images, _ = all_images(self.corpus.validation, self.corpus.levels, most=PAIRS)
        again = fetched(model.reconstruct(images))
        title = "held-out image, its reconstruction"
        by_first(pairs_grid)(images, again, path, columns=min(COLUMNS, len(images)), title=title)

    def _rows(self, model: Any, count: int) -> tuple[np.ndarray, int, list[str] | None]:
        """Which of `count` images of classes in turn to show in which order, in how many columns, and the rows' names.

        As many of each class, a row a class, where there is room for that.
        """
        classes = model.cfg.num_classes
        if not 1 < classes <= min(2 * COLUMNS, count):
            return np.arange(count), COLUMNS, None
        each = count // classes
        return np.arange(each * classes).reshape(each, classes).T.ravel(), each, list(self.corpus.class_names)

    def _command(self, model: Any, folder: RunFolder) -> str:
        names = self.corpus.class_names
        named = model.cfg.num_classes and names != tuple(map(str, range(len(names))))
        labels = f"--labels {shlex.join(names[:3])} " if named else ""
        return f"python -m artifex.sample {folder.path} {labels}--out samples.png"

    def _scores(self, model: Any) -> dict[str, float]:
        from artifex.evaluation.frechet import judge, score_samples

        count, parts, labels = self.config.training.score_images, [], []
        for index, begin in enumerate(range(0, count, DRAW)):  # one shape, so that one program is compiled
            drawn, its = self._draw(model, DRAW, self.config.training.seed + 1 + index)
            parts.append(drawn[: count - begin])
            labels.append(None if its is None else its[: count - begin])
        known = None if labels[0] is None else np.concatenate(labels)
        made = [("", np.concatenate(parts), known)]
        if hasattr(model, "reconstruct"):
            images, _ = all_images(self.corpus.validation, self.corpus.levels, most=count)
            made.append(("reconstruction_", fetched(model.reconstruct(images)), None))
        if not is_first():  # the others have done their part of what was drawn
            return {}
        with execution(Execution()):  # on a device of its own: on the run's mesh it would wait for the other processes
            classifier = judge(self.corpus)
            return {
                f"{of}{name}": value
                for of, these, labelled in made
                for name, value in score_samples(self.corpus, these, labelled, classifier=classifier).items()
            }

    def _labels(self, model: Any, count: int) -> np.ndarray | None:
        classes = model.cfg.num_classes
        return np.arange(count, dtype=np.int32) % classes if classes else None

    def _draw(self, model: Any, count: int, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
        labels = self._labels(model, count)
        how = {} if labels is None else {"labels": labels}
        return fetched(model.sample(jax.random.key(seed), count=count, **how)), labels


def _settings(spec: Any) -> dict[str, str]:
    """What the configuration calls the arguments of `load_images` that a model of `spec` decides."""
    part = (
        "model"
        if not hasattr(spec, "network")
        else "model.network"
        if spec.autoencoder is None
        else "model.autoencoder"
    )
    channels = f"{part}.in_channels={part}.out_channels" if part == "model.network" else f"{part}.channels"
    return {"image_size": f"{part}.image_size", "channels": channels, "corrupt": "data.corrupt"}
