"""What a run measures: loss one step late, throughput, time spent waiting for data; and what must stop it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import jax

from artifex.config import Config
from artifex.data.text import TextCorpus
from artifex.training.progress import Report
from artifex.training.run_folder import RunFolder


def unit_of(corpus: TextCorpus) -> tuple[str, float]:
    """The unit losses are shown in, and how many of it a nat per token is: bits per byte where bytes are known."""
    known = corpus.bytes_per_token["validation"]
    return ("bits per byte", 1 / math.log(2) / known) if known else ("bits per token", 1 / math.log(2))


class Meter:
    """Reads metrics one step late, writes them at intervals, and refuses what is not finite.

    A line of the `train` split is the mean over the steps since the line before. Throughput counts neither
    compilation nor what runs `aside`: validation, checkpoints, samples.
    """

    def __init__(self, config: Config, corpus: TextCorpus, folder: RunFolder, report: Report):
        self.config, self.folder, self.report = config, folder, report
        self.unit, self.per_nat = unit_of(corpus)
        self.tokens_per_step = config.training.batch_size * config.data.sequence_length
        self.late: tuple[int, dict[str, jax.Array]] | None = None
        self.began = self.since = time.perf_counter()
        self.data_wait, self.losses, self.timed_steps = 0.0, [], 0
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
        self.losses.append(metrics["loss"])
        if not self.compiled:  # the first step compiles: it is in no rate
            self.compiled, self.since, self.data_wait = True, time.perf_counter(), 0.0
        else:
            self.timed_steps += 1
        if step % self.config.logging.every == 0 or step == self.config.training.steps:
            self.write(step, metrics)
        else:
            self.report.advance(step, None)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line of the `train` split, to the file and beside the bar."""
        seconds = time.perf_counter() - self.since
        rate = self.timed_steps * self.tokens_per_step / seconds if self.timed_steps else None
        loss = sum(self.losses) / len(self.losses)
        self.folder.log(
            {
                "step": step,
                "split": "train",
                "loss": loss,
                "grad_norm": metrics["grad_norm"],
                "learning_rate": metrics["learning_rate"],
                "tokens": step * self.tokens_per_step,
                "tokens_per_second": rate,
                "data_wait_seconds": self.data_wait,
                "elapsed_seconds": time.perf_counter() - self.began,
            }
        )
        shown = f"loss {loss:.3f} ({loss * self.per_nat:.3f} {self.unit})"
        if rate:
            shown += f"  {rate:,.0f} tokens/s  data wait {self.data_wait / seconds:.1%}"
        self.report.advance(step, shown)
        self.since, self.data_wait, self.losses, self.timed_steps = time.perf_counter(), 0.0, [], 0

    def validated(self, step: int, loss: float, targets: int) -> None:
        """One line of the `validation` split."""
        value = loss * self.per_nat
        record: dict[str, Any] = {"step": step, "split": "validation", "loss": loss, self.unit.replace(" ", "_"): value}
        self.folder.log(record | {"targets": targets, "elapsed_seconds": time.perf_counter() - self.began})
        self.report.line(f"step {step}: validation loss {loss:.4f} nats per token, {value:.4f} {self.unit}")

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Work that is no training: everything outstanding is read before it, and its time is in no rate."""
        self.flush()
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began
