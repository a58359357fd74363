"""Where a run stands in its data: what a checkpoint says of it, and the same place with another batch size.

A run draws rows, windows of text or images, one after the other, and the order of all rows is a function of the seed
alone. So a place is a number of rows, whatever the size of the batches that took them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from artifex.training.task import Task


def rows_before(task: Task, step: int) -> int:
    """The rows that the first `step` steps have drawn."""
    return task.shift + step * task.config.training.batch_size


def told(task: Task, step: int) -> dict[str, Any]:
    """What a checkpoint of `step` says of the data and of the place in it."""
    place = {"batches": step, "rows": rows_before(task, step)}
    return {"fingerprint": task.corpus.fingerprint, **place, "described": task.corpus.describe()}


def at_its_place(task: Task, step: int, saved: Mapping[str, Any]) -> tuple[Task, list[str]]:
    """`task` at the row where the run stood at `step`, by a checkpoint's metadata, and a line where its batches have
    another size from there on. Raises `ValueError`, with what differs, where the data are not those of then."""
    data, rows = saved["data"], task.config.training.batch_size
    if data["fingerprint"] != task.corpus.fingerprint:
        then, now = data["fingerprint"][:12], task.corpus.fingerprint[:12]
        differ = f"; they were {data['described']}; now {task.corpus.describe()}" if "described" in data else ""
        raise ValueError(
            f"the data changed: step {step} was trained on fingerprint {then}, {task.corpus.source} now has {now}"
            f"{differ}; restore the data or choose another --run-dir"
        )
    # of before rows were counted, when a run had one batch size
    drawn = data.get("rows", step * saved.get("config", {}).get("training", {}).get("batch_size", rows))
    shift = drawn - step * rows
    if not shift:
        return task, []
    line = f"{drawn:,} rows were drawn until step {step}, in batches that were not all of {rows}; goes on from the next"
    return dataclasses.replace(task, shift=shift), [line]  # pyright: ignore[reportArgumentType]
