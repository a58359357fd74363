"""A step that was not finite, again: its batch is kept in the run's folder, and the steps before it are made anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from artifex.scaling.processes import by_first
from artifex.training import finite

if TYPE_CHECKING:
    from artifex.training.loop import Run
    from artifex.training.run_folder import RunFolder
    from artifex.training.state import TrainState
    from artifex.training.task import Task

KEPT = 8  # batches that a run keeps at most; the others are made again from the data


@by_first
def keep_batch(task: Task, folder: RunFolder, step: int) -> None:
    """Write the whole batch of `step` to the run's folder, for `replay`. A batch is a function of seed and step, so it
    is made again rather than held on to in every step."""
    file = folder.batch(step)
    if file.exists() or len(list(file.parent.glob("*.npz"))) >= KEPT:
        return
    batches = task.batches(step - 1)
    batch = next(batches)
    batches.close()
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_name(f".{file.name}")
    np.savez(whole, **batch)
    whole.replace(file)


def replay(run: Run, run_step: Callable[[TrainState, Any], Any], step: int) -> None:
    """Take an opened run's steps up to `step` and say what that one makes, of its kept batch where there is one. Writes
    nothing."""
    blue, state, (p, P) = run.blue, run.state, run.blue.part
    batches = run.task.batches(run.start, (p, P))
    metrics: dict[str, Any] = {}
    for index in range(run.start + 1, step + 1):
        batch = next(batches)
        if index == step and (file := run.folder.batch(step)).is_file():
            with np.load(file, allow_pickle=False) as kept:
                own = {name: np.split(kept[name], P)[p] for name in kept.files}
            same = own.keys() == batch.keys() and all(
                np.array_equal(own[name], batch[name], equal_nan=True) for name in own
            )
            run.report.line(f"the batch of {file}, {'which' if same else 'not what'} the data give now")
            batch = own
        state, metrics = run_step(state, blue.placed(batch))
        if index < step and (problem := finite.told(blue, index, host(metrics))):
            run.report.line(problem)
    batches.close()
    metrics = host(metrics)
    run.report.line(finite.told(blue, step, metrics) or f"all is finite at step {step}")
    shown = {name: value for name, value in metrics.items() if name != finite.METRIC}
    run.report.line(", ".join(f"{name} {value:.6g}" for name, value in shown.items()))


def host(metrics: Any) -> dict[str, float]:
    """A step's metrics as numbers of Python."""
    return {name: float(value) for name, value in jax.device_get(metrics).items()}
