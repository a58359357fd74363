"""The folder of a run: configuration, metrics, loss curve, samples; and what a resumed run may change.

Every process may call all of it; the first one writes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from artifex.config import Config
from artifex.models.weights import holds_weights
from artifex.scaling.manifest import CheckpointError
from artifex.scaling.processes import all_say, by_first
from artifex.training.run_lock import NAME as LOCK
from artifex.training.task import Metrics, Score

SEEN = 60  # seconds in which a file that one process wrote appears to another; NFS may remember that it was not there
FIXED = {
    "model": None,
    "data": None,
    "training": ("seed", "batch_size", "start_from", "start_from_partial", "freeze"),
    "optimizer": ("name",),
}
"""What makes a run the run it is: changed, the saved steps would not be steps of this run. None: the whole section."""


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
        self.picture = path / "loss.png"
        self.samples = path / "samples"
        self.checkpoints = path / "checkpoints"
        self.weights = path / "weights"
        self.tokenizer = path / self.TOKENIZER
        self.replay = path / "replay"
        self.cache = path / "cache"  # what can be made again: a trained tokenizer

    def open(self, config: Config) -> list[str]:
        """Check that the folder is free or holds this run; returns what else differs, a line each. Writes nothing.

        Raises `ValueError` where the folder holds another run, or something else.
        """
        if self.config.exists():
            return self._compare(Config.from_file(self.config).to_dict(), config.to_dict())
        if self.path.exists() and {entry.name for entry in self.path.iterdir()} - {self.cache.name, LOCK}:
            raise ValueError(f"{self.path} is not empty and holds no run (no config.json); choose another --run-dir")
        return []

    @by_first
    def begin(self, config: Config, step: int) -> None:
        """Write the resolved configuration, which alone repeats the run, and drop what was written after `step`.

        Called when the first step is done: a start that fails leaves the folder as it was.
        """
        self.samples.mkdir(parents=True, exist_ok=True)
        config.save(self.config)
        self.keep_metrics_up_to(step)
        self.picture.unlink(missing_ok=True)  # it is drawn last, so where it is nothing is missing

    def is_finished(self) -> bool:
        """Whether the run's last step left all it leaves: weights, and the curve, which is drawn after all else."""
        return self.picture.exists() and holds_weights(self.weights)

    def has_line(self, step: int, split: str) -> bool:
        """Whether `metrics.jsonl` has a line of `split` at `step`."""
        return any(record["step"] == step and record["split"] == split for record in self.read_metrics())

    def _compare(self, saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
        broken, changes = [], []
        for section in now:
            if not isinstance(now[section], dict):
                continue
            for field in sorted(now[section].keys() | saved.get(section, {}).keys()):
                old, new = saved.get(section, {}).get(field), now[section].get(field)
                if old == new:
                    continue
                fixed = section in FIXED and (FIXED[section] is None or field in FIXED[section])
                (broken if fixed else changes).append(f"{section}.{field} was {old}, now {new}")
        if broken:
            raise ValueError(
                f"{self.path} holds another run: {'; '.join(broken)}; choose another --run-dir, or leave the settings "
                "as saved"
            )
        return changes

    @by_first
    def keep_metrics_up_to(self, step: int) -> None:
        """Drop the lines a resumed run will write again, and a last line that was cut off."""
        if not self.metrics.exists():
            return
        kept = [record for record in self.read_metrics() if record["step"] <= step] if step else []
        self.metrics.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every complete line of `metrics.jsonl`."""
        records = []
        for line in self.metrics.read_text().splitlines() if self.metrics.exists() else []:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break  # a killed run may leave half a line, always the last
        return records

    @by_first
    def log(self, record: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`. JSON has no word for a number that is not finite: it is null there, and
        `not_finite` says which it was."""
        odd = {key: str(x) for key, x in record.items() if isinstance(x, float) and not math.isfinite(x)}
        told = record | dict.fromkeys(odd) | ({"not_finite": odd} if odd else {})
        with self.metrics.open("a") as file:
            file.write(json.dumps(told, allow_nan=False) + "\n")

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
        records = [record for record in self.read_metrics() if record.get("loss") is not None]
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
