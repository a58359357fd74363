"""A run folder without a step to go on from: whether it is a run that has just begun, or one whose steps were lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from artifex.scaling import processes
from artifex.scaling.manifest import CheckpointError
from artifex.training.run_folder import RunFolder

REMEDY = "or give --start-anew to begin at step 0: what is there is renamed and stays"


def check_nothing_lost(path: str | Path, skipped: Sequence[str]) -> None:
    """Raise `CheckpointError`, on every process, where steps of the run in `path` are damaged, one sentence each in
    `skipped`, or where its other files show that steps were saved which are gone."""
    folder = RunFolder(path)
    if skipped:
        raise CheckpointError(
            f"no step in {folder.checkpoints} can be restored, so the run would start anew: {'; '.join(skipped)}; put "
            f"a copy of the folder back, {REMEDY}"
        )
    if gone := processes.first_says(_gone(folder)):
        raise CheckpointError(f"{gone}, so the run would start anew; put a copy of the steps back, {REMEDY}")


def _gone(folder: RunFolder) -> str | None:
    """What shows that steps were saved, in a folder that has none; or None."""
    config = folder.saved()
    if config is None:
        return None
    last = max((record["step"] for record in folder.read_metrics()), default=0)
    if last and not folder.checkpoints.is_dir():  # made at the first step
        return f"{folder.path} has metrics up to step {last} and no {folder.checkpoints.name}/"
    if folder.is_finished():
        return f"{folder.path} is a finished run and {folder.checkpoints} has no step"
    every = config.checkpoint.every or config.training.steps
    # a save returns before it is complete, and the one begun last may have been killed
    begun, unfinished = max(last - 1, 0) // every, len(list(folder.checkpoints.glob("*.saving-*")))
    if begun > unfinished:
        return f"{folder.path} has metrics up to step {last}, saved every {every}, and {folder.checkpoints} has no step"
    return None
