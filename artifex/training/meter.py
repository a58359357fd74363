"""What a run measures: loss one step late, throughput, time spent waiting for data; and what must stop it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax

from artifex.training import finite
from artifex.training.position import rows_before
from artifex.training.progress import Report
from artifex.training.replay import host, keep_batch
from artifex.training.run_folder import RunFolder
from artifex.training.state import Blueprint
from artifex.training.task import Metrics, Task


class Meter:
    """Reads metrics one step late, writes them at intervals, and refuses what is not finite.

    A line of the `train` split is the mean over the steps since the line before. Throughput counts neither
    compilation nor what runs `aside`: validation, checkpoints, samples.
    """

    def __init__(self, blue: Blueprint, task: Task, folder: RunFolder, report: Report):
        self.blue, self.config, self.task, self.folder, self.report = blue, blue.config, task, folder, report
        self.late: tuple[int, dict[str, jax.Array]] | None = None
        self.began = self.since = time.perf_counter()
        self.data_wait, self.since_line, self.timed_steps = 0.0, [], 0
        self.compiled = False
        self.in_a_row = 0
        before = (record for record in folder.read_metrics() if record["step"] <= report.start)
        self.skipped = sum(record["split"] == "skipped" for record in before)

    def waited(self, seconds: float) -> None:
        """Add to the time spent waiting for data."""
        self.data_wait += seconds

    def read_late(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take the metrics of `step` and read those of the step before."""
        self.flush()
        self.late = (step, metrics)

    def flush(self) -> None:
        """Read what is outstanding. Raises `FloatingPointError` for a step that is not finite and not skipped."""
        if self.late is None:
            return
        step, arrays = self.late
        self.late = None
        metrics = host(arrays)
        problem = finite.told(self.blue, step, metrics)
        if problem is not None:
            self.refuse(step, metrics, problem)
        else:
            self.in_a_row = 0
            del metrics[finite.METRIC]
            self.since_line.append(metrics)
        if not self.compiled:  # the first step compiles: it is in no rate
            self.compiled, self.since, self.data_wait = True, time.perf_counter(), 0.0
        else:
            self.timed_steps += 1
        if self.since_line and (step % self.config.logging.every == 0 or step == self.config.training.steps):
            self.write(step, self.since_line[-1])
        else:
            self.report.advance(step, None)

    def refuse(self, step: int, metrics: Metrics, problem: str) -> None:
        """Keep the batch of a step that is not finite, and count the step as skipped; or raise `FloatingPointError`,
        where steps are not to be skipped, too many were, or the state itself is not finite."""
        cfg, kept = self.config.training, ""
        try:
            keep_batch(self.task, self.folder, step)
        except OSError as error:
            kept = f"; its batch could not be kept: {error}"
        values = {name: metrics[name] for name in ("loss", "grad_norm")}
        line = {"step": step, **values, "problem": problem}
        self.in_a_row += 1
        if cfg.not_finite == "skip" and not finite.is_finite(metrics) and self.in_a_row <= cfg.skips_in_a_row:
            self.skipped += 1
            self.folder.log({**line, "split": "skipped", "skipped": self.skipped})
            self.report.line(f"skipped, the run's skip number {self.skipped}: {problem}{kept}")
            return
        self.folder.log({**line, "split": "train", "stopped": problem})
        many = f", and {self.in_a_row - 1} before it were skipped" if self.in_a_row > 1 else ""
        raise FloatingPointError(
            f"{problem}{many}: the run stops and its last good checkpoint stays{kept}; lower "
            "optimizer.learning_rate, set optimizer.clip_norm, or look at the data of this step: python -m "
            f"artifex.train {self.folder.path} --replay {step}"
        )

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
                task.noun: rows_before(task, step) * task.per_step // self.config.training.batch_size,
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

    def validated(self, step: int, metrics: Metrics, weight: float) -> Metrics:
        """One line of the `validation` split: means over `weight` targets or images. Returns them by their names."""
        score = self.task.score(metrics)
        named = {**metrics, score.key: metrics[score.field] * score.scale}
        record: dict[str, Any] = {"step": step, "split": "validation", **named}
        self.folder.log(record | {"targets": int(weight), "elapsed_seconds": time.perf_counter() - self.began})
        others = "".join(
            f", {name} {value:.4g}" for name, value in metrics.items() if name not in ("loss", "nats", score.field)
        )
        own = "" if score.unit == "loss" else f", {named[score.key]:.4f} {score.unit}"
        of = " nats per token" if self.task.noun == "tokens" else ""
        over = f"{int(weight):,} {'targets' if self.task.noun == 'tokens' else self.task.noun}"
        self.report.line(f"step {step}: validation loss {metrics['loss']:.4f}{of}{own}{others}; over {over}")
        return named

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Work that is no training: everything outstanding is read before it, and its time is in no rate."""
        self.flush()
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began
