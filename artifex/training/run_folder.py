"""The folder of a run: configuration, metrics, loss curve, samples; and what a resumed run may change.

Every process may call all of it; the first one writes.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifex.config import Config
from artifex.config_io import ConfigError
from artifex.data.classes import FILE as CLASSES
from artifex.models.weights import holds_weights
from artifex.scaling import manifest
from artifex.scaling.manifest import CheckpointError
from artifex.scaling.processes import all_say, by_first
from artifex.training.metrics_file import MetricsFile, beside
from artifex.training.run_lock import NAME as LOCK
from artifex.training.task import Metrics, Score

if TYPE_CHECKING:
    from artifex.training.trackers import Trackers

SEEN = 60  # seconds in which a file that one process wrote appears to another; NFS may remember that it was not there
FIXED = {
    "model": None,
    "data": None,
    "training": ("seed", "batch_size", "start_from", "start_from_partial", "start_from_rows", "freeze"),
    "optimizer": ("name",),
}
"""What makes a run the run it is: changed, the saved steps would not be steps of this run. None: the whole section."""
BATCH_SIZE = ("training", "batch_size")
"""Of these the one with which a run can go on where it stands, on request: the order of rows does not depend on it."""


def check_seen(file: str | Path) -> None:
    """Raise `CheckpointError`, on every process, where one does not see a file that the first has written."""
    all_say(None)  # it has
    until = time.monotonic() + SEEN
    while not (sees := Path(file).exists()) and time.monotonic() < until:
        time.sleep(0.1)
    blind = [process for process, sees in enumerate(all_say(sees)) if not sees]
    if blind:
        raise CheckpointError(
            f"{file}, which process 0 wrote, is not seen by process {', '.join(map(str, blind))}; give a --run-dir on "
            "a file system that all processes share"
        )


class RunFolder:
    """Everything a run writes below `path`; `weights/` and, last of all, `loss.png` at its end."""

    TOKENIZER = "tokenizer.json"
    PROMPT = "prompt.txt"  # what samples continue where nothing else is asked for

    def __init__(self, path: str | Path):
        self.path = path = Path(path)
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.lines = MetricsFile(self.metrics)
        self.say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)  # of what the user should know
        self.lost = 0  # samples that could not be written
        self.picture = path / "loss.png"
        self.samples = path / "samples"
        self.checkpoints = path / "checkpoints"
        self.weights = path / "weights"
        self.tokenizer = path / self.TOKENIZER
        self.replay = path / "replay"
        self.tensorboard, self.wandb = path / "tensorboard", path / "wandb"
        self.stacks = path / "stall.txt"  # what the run was at when it stood still
        self.trackers: Trackers | None = None
        self.cache = path / "cache"  # what can be made again: a trained tokenizer, compiled programs

    def saved(self, *, start_anew: bool = False) -> Config | None:
        """The configuration of the run that is here, of its newest step where `config.json` is lost; None where none
        is here. Raises `ConfigError` where `config.json` cannot be read and no step has it, unless `start_anew`."""
        problem = None
        if self.config.exists():
            try:
                return Config.from_file(self.config)
            except ConfigError as error:
                problem = error
        steps = sorted(int(path.name) for path in self.checkpoints.glob("[0-9]*") if path.name.isdecimal())
        for step in reversed(steps):
            with contextlib.suppress(CheckpointError, ConfigError, OSError, KeyError, TypeError):
                return Config.from_dict(manifest.read(self.checkpoints / str(step))["metadata"]["config"])
        if problem is not None and not self._is_new() and not start_anew:
            raise ConfigError(f"{problem}; put a copy of it back, or give --start-anew, which renames what is there")
        return None

    def open(
        self, config: Config, saved: Config | None, *, start_anew: bool = False, other_batch_size: bool = False
    ) -> list[str]:
        """Check that the folder is free or holds this run, of which it has `saved`; returns what else differs, a line
        each. With `other_batch_size` that may be the batch size. Writes nothing.

        Raises `ValueError` where the folder holds another run, or something else; with `start_anew` only what is no
        part of a run is refused.
        """
        if saved is not None:
            lost = [] if self._has_config() else [f"{self.config} cannot be read; it is that of the newest step again"]
            return lost + self._compare(saved.to_dict(), config.to_dict(), other_batch_size)
        if self._is_new():
            return []
        there = sorted(entry.name for entry in self.path.iterdir() if entry.name != LOCK)
        ours = {*(file.name for file in vars(self).values() if isinstance(file, Path)), self.PROMPT, CLASSES}
        if not set(there) <= ours:
            raise ValueError(f"{self.path} is not empty and holds no run (no config.json); choose another --run-dir")
        if not start_anew:
            raise ValueError(
                f"{self.path} holds {', '.join(there)} of a run and no config.json; put it back, choose another "
                "--run-dir, or give --start-anew, which renames what is there"
            )
        return []

    def _has_config(self) -> bool:
        try:
            Config.from_file(self.config)
        except (ConfigError, OSError):
            return False
        return True

    def _is_new(self) -> bool:
        """Whether nothing is here but what a start leaves that was ended at once."""
        if not self.path.exists():
            return True
        names = {entry.name for entry in self.path.iterdir()} - {self.cache.name, LOCK}
        empty = {self.samples.name, self.checkpoints.name, self.config.name}
        return names <= empty and not any(self.samples.glob("*")) and not any(self.checkpoints.glob("*"))

    @by_first
    def begin(self, config: Config, step: int) -> None:
        """Write the resolved configuration, which alone repeats the run, and set aside what was written after `step`.

        Called when the first step is done: a start that fails leaves the folder as it was.
        """
        if not step:  # the samples of a run that is begun anew are not those of this one
            for folder in (self.samples, self.replay):
                if folder.is_dir() and any(folder.iterdir()):
                    folder.rename(beside(folder, "left"))
        if self.config.exists() and not self._has_config():
            self.config.rename(beside(self.config, "damaged"))
        for line in self.lines.keep_up_to(step):
            self.say(line)
        self.lay_out(config)
        self.picture.unlink(missing_ok=True)  # it is drawn last, so where it is nothing is missing

    def lay_out(self, config: Config) -> None:
        """The folders, and the configuration, whole or as it was."""
        self.samples.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)  # before it is saved there: that it is gone is to be noticed
        whole = self.config.with_name(f".{self.config.name}")
        config.save(whole)
        whole.replace(self.config)

    @by_first
    def keep_metrics_up_to(self, step: int) -> None:
        """Set aside the lines that a run which goes on from `step` writes again, and those that cannot be read."""
        for line in self.lines.keep_up_to(step):
            self.say(line)

    def holds_steps(self) -> bool:
        """Whether there is anything in the folder of the checkpoints."""
        return self.checkpoints.is_dir() and any(self.checkpoints.iterdir())

    def is_finished(self) -> bool:
        """Whether the run's last step left all it leaves: weights, and the curve, which is drawn after all else."""
        return self.picture.exists() and holds_weights(self.weights)

    def has_line(self, step: int, split: str) -> bool:
        """Whether `metrics.jsonl` has a line of `split` at `step`."""
        return any(record["step"] == step and record["split"] == split for record in self.read_metrics())

    def _compare(self, saved: dict[str, Any], now: dict[str, Any], other_batch_size: bool) -> list[str]:
        broken, changes = [], []
        for section in now:
            if not isinstance(now[section], dict):
                continue
            for field in sorted(now[section].keys() | saved.get(section, {}).keys()):
                old, new = saved.get(section, {}).get(field), now[section].get(field)
                if old == new:
                    continue
                fixed = section in FIXED and (FIXED[section] is None or field in FIXED[section])
                fixed = fixed and not (other_batch_size and (section, field) == BATCH_SIZE)
                (broken if fixed else changes).append(f"{section}.{field} was {old}, now {new}")
        if broken:
            alone = len(broken) == 1 and broken[0].startswith(".".join(BATCH_SIZE))
            raise ValueError(
                f"{self.path} holds another run: {'; '.join(broken)}; choose another --run-dir, or leave the settings "
                f"as saved{', or go on with it from the same sample: --other-batch-size' if alone else ''}"
            )
        return [f"changed since it was saved: {change}" for change in changes]

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every line of `metrics.jsonl` that can be read."""
        return self.lines.read()

    @by_first
    def log(self, record: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`, or let it wait where that cannot be done."""
        self.lines.append(record, self.say)
        if self.trackers is not None:
            self.trackers.log(record)

    @by_first
    def track(self, config: Config, step: int) -> None:
        """Tell the trackers of `logging.track` what is written from now on, and what was up to `step`."""
        if config.logging.track is None:
            return
        from artifex.training.trackers import Trackers

        known = {"records": self.read_metrics(), "config": config.to_dict(), "start": step}
        self.trackers = Trackers(config.logging.track, self.path, **known, say=self.say)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the trackers write what is outstanding."""
        if self.trackers is not None:
            self.trackers.close()

    def cannot_write(self, what: str, error: OSError) -> None:
        """Say, once, that something to look at could not be written: the run goes on without."""
        self.lost += 1
        if self.lost == 1:
            self.say(f"warning: {what} cannot be written: {error}; the run goes on without")

    def programs(self, where: str) -> Path | None:
        """Where compiled programs are kept, by `training.compile_cache`."""
        return {"run": self.cache / "programs", "off": None}.get(where, Path(where))

    def batch(self, step: int) -> Path:
        """The file of a batch that is kept, of a step that was not finite."""
        return self.replay / f"step-{step:07d}.npz"

    def sample(self, step: int, ending: str) -> Path:
        """The file of the sample made at a step."""
        return self.samples / f"step-{step:07d}{ending}"

    @by_first
    def plot(self, score_of: Callable[[Metrics], Score]) -> None:
        """Draw the score of both splits over the steps, to `loss.png`, which appears whole or not at all."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        records = [record for record in self.read_metrics() if isinstance(record.get("loss"), int | float)]
        score = score_of(records[-1]) if records else Score("loss", 1.0, "loss")
        values = [
            (r["split"], r["step"], r[score.field] * score.scale) for r in records if r.get(score.field) is not None
        ]
        for split, style in (("train", {"alpha": 0.6, "lw": 1}), ("validation", {"marker": "o", "ms": 3})):
            points = [(step, value) for of, step, value in values if of == split]
            if points:
                axes.plot(*zip(*points, strict=True), label=f"{split}, last {points[-1][1]:.3f}", **style)
        # the first steps fall from chance level and would flatten all that follows
        lows = [value for _, _, value in values if math.isfinite(value)]
        if lows:
            later = sorted(lows)[: len(lows) - int(len(lows) * 0.03)]
            low, high = later[0], later[-1]
            if high > low:
                axes.set_ylim(low - 0.06 * (high - low), high + 0.02 * (high - low))
        axes.set(xlabel="step", ylabel=score.unit)
        axes.grid(alpha=0.3)
        axes.legend()
        whole = self.picture.with_name(f".{self.picture.name}")
        figure.savefig(whole, dpi=120, format="png")
        whole.replace(self.picture)
