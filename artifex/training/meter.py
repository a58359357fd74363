"""What a run measures: loss one step late, throughput, time spent waiting for data; and what must stop it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import jax

from artifex.config import Config
from artifex.training.progress import Report
from artifex.training.run_folder import RunFolder
from artifex.training.task import Metrics, Task


class Meter:
    """Reads metrics one step late, writes them at intervals, and refuses what is not finite.

    A line of the `train` split is the mean over the steps since the line before. Throughput counts neither
    compilation nor what runs `aside`: validation, checkpoints, samples.
    """

    def __init__(self, config: Config, task: Task, folder: RunFolder, report: Report):
        self.config, self.task, self.folder, self.report = config, task, folder, report
        self.late: tuple[int, dict[str, jax.Array]] | None = None
        self.began = self.since = time.perf_counter()
        self.data_wait, self.since_line, self.timed_steps = 0.0, [], 0
        self.compiled = False

    def waited(self, seconds: float) -> None:
        """Add to the time spent waiting for data."""
        self.data_wait += seconds

    def read_late(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take the metrics of `step` and read those of the step before."""
        self.flush()
        self.late = (step, metrics)

    def flush(self) -> None:
        """Read what is outstanding. Raises `FloatingPointError` for a loss or gradient that is not finite."""
        if self.late is None:
            return
        step, arrays = self.late
        self.late = None
        metrics = {key: float(value) for key, value in jax.device_get(arrays).items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                self.folder.log({"step": step, "split": "train", "loss": None, "stopped": f"{name} is {metrics[name]}"})
                raise FloatingPointError(
                    f"{name} is {metrics[name]} at step {step}: the run stops and its last good checkpoint stays; "
                    "lower optimizer.learning_rate, set optimizer.clip_norm, or look at the data of this step"
                )
        self.since_line.append(metrics)
        if not self.compiled:  # the first step compiles: it is in no rate
            self.compiled, self.since, self.data_wait = True, time.perf_counter(), 0.0
        else:
            self.timed_steps += 1
        if step % self.config.logging.every == 0 or step == self.config.training.steps:
            self.write(step, metrics)
        else:
            self.report.advance(step, None)

    def write(self, step: int, last: Metrics) -> None:
        """One line of the `train` split, to the file and beside the bar."""
        seconds, task = time.perf_counter() - self.since, self.task
        rate = self.timed_steps * task.per_step / seconds if self.timed_steps else None
        count = len(self.since_line)
        means = {name: sum(line[name] for line in self.since_line) / count for name in last if name != "weight"}
        self.folder.log(
            {
                "step": step,
                "split": "train",
                **means,
                "grad_norm": last["grad_norm"],
                "learning_rate": last["learning_rate"],
                task.noun: step * task.per_step,
                f"{task.noun}_per_second": rate,
                "data_wait_seconds": self.data_wait,
                "elapsed_seconds": time.perf_counter() - self.began,
            }
        )
        score = task.score(means)
        shown = f"loss {means['loss']:.3f}"
        if score.unit != "loss":
            shown += f" ({means[score.field] * score.scale:.3f} {score.unit})"
        if rate:
            shown += f"  {rate:,.0f} {task.noun}/s  data wait {self.data_wait / seconds:.1%}"
        self.report.advance(step, shown)
        self.since, self.data_wait, self.since_line, self.timed_steps = time.perf_counter(), 0.0, [], 0

    def validated(self, step: int, metrics: Metrics, weight: float) -> None:
        """One line of the `validation` split: means over `weight` targets or images."""
        score = self.task.score(metrics)
        value = metrics[score.field] * score.scale
        record: dict[str, Any] = {"step": step, "split": "validation", **metrics, score.key: value}
        self.folder.log(record | {"targets": int(weight), "elapsed_seconds": time.perf_counter() - self.began})
        others = "".join(
            f", {name} {value:.4g}" for name, value in metrics.items() if name not in ("loss", "nats", score.field)
        )
        own = "" if score.unit == "loss" else f", {value:.4f} {score.unit}"
        of = " nats per token" if self.task.noun == "tokens" else ""
        over = f"{int(weight):,} {'targets' if self.task.noun == 'tokens' else self.task.noun}"
        self.report.line(f"step {step}: validation loss {metrics['loss']:.4f}{of}{own}{others}; over {over}")

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Work that is no training: everything outstanding is read before it, and its time is in no rate."""
        self.flush()
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began
