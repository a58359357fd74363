"""What a run measures: loss one step late, throughput, utilisation, memory, waiting for data; and what must stop it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax

from artifex.training import finite
from artifex.training.position import rows_before
from artifex.training.replay import host, keep_batch
from artifex.training.task import Metrics
from artifex.training.use import in_words, use

if TYPE_CHECKING:
    from artifex.training.loop import Run


class Meter:
    """Reads metrics one step late, writes them at intervals, and refuses what is not finite.

    A line of the `train` split is the mean over the steps since the line before. Throughput counts neither
    compilation nor what runs `aside`: validation, checkpoints, samples. `goodput` keeps the time.
    """

    def __init__(self, run: Run, step_bytes: int = 0):
        """`step_bytes`: what the compiled step takes of a device, told where the device does not say what is in use."""
        self.blue, self.config, self.task, self.folder, self.report = (
            run.blue,
            run.config,
            run.task,
            run.folder,
            run.report,
        )
        self.goodput, self.step_bytes = run.goodput, step_bytes
        self.late: tuple[int, dict[str, jax.Array]] | None = None
        self.began = time.perf_counter()
        self.mark, self.since_line, self.timed_steps = (0.0, 0.0), [], 0
        self.compiled = False
        self.in_a_row = 0
        before = (record for record in run.folder.read_metrics() if record["step"] <= run.start)
        self.skipped = sum(record["split"] == "skipped" for record in before)

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
            self.compiled, self.mark = True, self.goodput.trained()
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
        task, now = self.task, self.goodput.trained()
        seconds, data_wait = now[0] - self.mark[0], now[1] - self.mark[1]
        per_second = self.timed_steps / seconds if self.timed_steps else None
        used = use(self.blue, per_second, self.step_bytes)
        rate = per_second and per_second * task.per_step
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
                "data_wait_seconds": data_wait,
                **used,
                "elapsed_seconds": time.perf_counter() - self.began,
            }
        )
        score = task.score(means)
        shown = f"loss {means['loss']:.3f}"
        if score.unit != "loss":
            shown += f" ({means[score.field] * score.scale:.3f} {score.unit})"
        if rate:
            shown += f"  {rate:,.0f} {task.noun}/s  data wait {data_wait / seconds:.1%}"
        self.report.advance(step, shown + in_words(used))
        if self.goodput.is_due():
            self.tell(step)
        self.mark, self.since_line, self.timed_steps = self.goodput.trained(), [], 0

    def tell(self, step: int) -> None:
        """One line of the `goodput` split."""
        self.folder.log(self.goodput.told(step))

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
    def aside(self, part: str, step: int) -> Iterator[None]:
        """Work that is no training: everything outstanding is read before it, and its time is in no rate."""
        with self.goodput.during("productive", step):
            self.flush()
        with self.goodput.during(part, step):
            yield
