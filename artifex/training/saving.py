"""Saving from the loop: a save that fails is told at the step it fails in, and by setting ends the run or not."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from artifex.scaling import processes
from artifex.scaling.manifest import CheckpointError
from artifex.scaling.placement import size_text
from artifex.training.position import told

if TYPE_CHECKING:
    from artifex.training.loop import Run
    from artifex.training.state import TrainState
    from artifex.training.task import Metrics


class Saver:
    """The checkpoints of a loop. `tried` is the step of the last save that was begun."""

    def __init__(self, run: Run):
        self.run = run
        self.tried = run.start
        self.failed = 0

    def save(self, step: int, state: TrainState, validation: Metrics | None = None) -> None:
        """Begin to save `step`, with what its `validation` measured, once the save before has ended. Raises
        `CheckpointError` where one of them fails and `checkpoint.on_failure` is "stop"."""
        run, self.tried = self.run, step
        if processes.is_first() and not run.folder.samples.is_dir():  # the folder vanished, or lost it
            self._attempt(lambda: run.folder.lay_out(run.config), step)
            self._attempt(lambda: run.task.save_beside(run.folder.path), step)
        beside = {**run.blue.metadata(), "data": told(run.task, step)}
        if validation is not None:  # by which `checkpoint.keep_best` judges
            beside["validation"] = {name: value for name, value in validation.items() if math.isfinite(value)}
        self._attempt(run.checkpoints.wait, step)
        self._attempt(lambda: run.checkpoints.save(step, state, beside), step)

    def look(self, step: int) -> None:
        """Whether the save under way has failed, without waiting for it. Raises as `save`."""
        ended = self.run.checkpoints.has_ended()
        if ended is None:
            return
        if processes.count() > 1:  # all ask in the same step
            if step % self.run.config.logging.every:
                return
            ended = any(processes.all_say(ended or None))
        if ended:
            self._attempt(self.run.checkpoints.wait, step)

    def settle(self) -> None:
        """Wait for the last save. Raises `CheckpointError` where it failed, whatever the setting: nothing follows that
        would make up for it."""
        try:
            self.run.checkpoints.wait()
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self._room()}") from error

    def _attempt(self, what: Callable[[], None], step: int) -> None:
        try:
            what()
        except (CheckpointError, OSError) as error:
            if self.run.config.checkpoint.on_failure == "stop":
                raise CheckpointError(f"{error}; {self._room()}") from error
            self.failed += 1
            count = "1 save has" if self.failed == 1 else f"{self.failed} saves have"
            self.run.report.line(f"warning: at step {step}: {error}; {self._room()}; the run goes on, {count} failed")

    def _room(self) -> str:
        """What a step takes, and what there is."""
        need = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.run.blue.state))
        folder = self.run.checkpoints.folder
        there = next(place for place in (folder, *folder.parents) if place.is_dir())
        return f"a step takes {size_text(need)}, {size_text(shutil.disk_usage(Path(there)).free)} are free there"
