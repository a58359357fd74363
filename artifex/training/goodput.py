"""Where the wall time of a run goes: the steps that it keeps, and everything else, apart; the parts add up to it.

    goodput = Goodput(start=0)
    with goodput.during("data", step): ...
    goodput.told()["goodput"]     # the productive share, 0 to 1

A run that was killed computes again what it had not saved: that time was productive when it was spent, and is lost work
from the next start on, which finds it in `metrics.jsonl`. So the figures are those of all starts together; the time
between two of them belongs to none. "Productive" is what the steps take as the main thread sees them; what it waits for
a batch is not, also where a device is busy with the step before meanwhile: a lower bound.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from artifex.scaling import processes

PARTS = {
    "start": "start-up",
    "compile": "compiling",
    "productive": "steps",
    "data": "waiting for data",
    "validation": "validation",
    "checkpoint": "saving",
    "samples": "samples",
    "lost": "steps lost and computed again",
    "other": "the rest",
}
"""What time goes to, and how that is called where it is told."""

PLACES = {
    "data": "reads the batch of step",
    "productive": "computes step",
    "validation": "validates after step",
    "checkpoint": "saves after step",
    "samples": "makes samples after step",
}
"""Those of them at which processes wait for each other, in the words of `artifex.scaling.lives`."""

SPLIT = "goodput"
EVERY = 10.0  # seconds from one line of the split to the next, but for saves and the end
KEPT = 64  # steps whose time is remembered, by which it is known how long one takes


class Goodput:
    """The time of one run since `began`, by `clock`, in seconds; it starts after step `start`.

    What happens within no `during` is start-up until `first_step`, and the rest from there on.
    """

    def __init__(self, start: int = 0, *, began: float | None = None, clock: Callable[[], float] = time.monotonic):
        self.clock, self.start = clock, start
        self.began = clock() if began is None else began
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.before = 0.0  # seconds of the starts before
        self.starts = 1
        self.to_first_step: float | None = None
        self.steps: deque[float] = deque(maxlen=KEPT)  # seconds that the last ones took
        self._within: list[str] = []
        self._mark = self.began
        self._base, self._last = "start", start
        self.at: tuple[str, int, float] = ("start", start, self.began)  # part, step, and since when
        self._written = self.began

    @contextlib.contextmanager
    def during(self, part: str, step: int = 0) -> Iterator[None]:
        """Time that goes to a part, at a step. Within another one it is taken from that."""
        self._charge()
        self._within.append(part)
        outer, self.at = self.at, (part, step, self._mark)
        if part in PLACES:  # how long it takes is known after a run's first steps, with all that they make
            processes.stands(PLACES[part], step, known=step > self.start + 2)
        try:
            yield
        finally:
            self._charge()
            self._within.pop()
            if part == "productive" and step > self._last:
                self._last = step
                self.steps.append(self._mark - self.at[2])
            self.at = (outer[0], outer[1], self._mark)

    def _charge(self) -> None:
        now = self.clock()
        self.seconds[self._within[-1] if self._within else self._base] += now - self._mark
        self._mark = now

    def first_step(self) -> None:
        """Note that the first step is computed: what is within no part is no start-up any more."""
        self._charge()
        self._base, self.to_first_step = "other", self._mark - self.began

    def trained(self) -> tuple[float, float]:
        """Seconds that went to steps and to waiting for their data, and to the latter alone."""
        self._charge()
        return self.seconds["productive"] + self.seconds["data"], self.seconds["data"]

    def usual(self) -> float:
        """The median of how long the last steps took, in seconds; 0 before the first."""
        return statistics.median([*self.steps]) if self.steps else 0.0

    def is_due(self) -> bool:
        """Whether a line is to be written again."""
        return self.clock() - self._written >= EVERY

    def told(self, step: int) -> dict[str, Any]:
        """A line of `metrics.jsonl`: seconds by part, of all starts, which add up to `wall_seconds`."""
        self._charge()
        self._written = self._mark
        wall = sum(self.seconds.values())
        share = self.seconds["productive"] / wall if wall else 0.0
        line: dict[str, Any] = {"step": step, "split": SPLIT, "goodput": share, "wall_seconds": wall}
        line |= {f"{part}_seconds": seconds for part, seconds in self.seconds.items()}
        return line | {"starts": self.starts, "first_step_seconds": self.to_first_step}

    def go_on(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take over what a run's starts before took, from all their lines, of which those after `start` are lost."""
        known = [record for record in records if record["split"] == SPLIT and _is_whole(record)]
        if not known:
            return
        last = known[-1]
        saved = next((record for record in reversed(known) if record["step"] <= self.start), None)
        kept = saved["productive_seconds"] if saved else 0.0
        for part in PARTS:
            self.seconds[part] += last[f"{part}_seconds"]
        lost = max(last["productive_seconds"] - kept, 0.0)
        self.seconds["productive"] -= lost
        self.seconds["lost"] += lost
        self.starts += last["starts"]

    def line(self) -> str:
        """What a run says at its end."""
        told = self.told(0)
        wall = told["wall_seconds"]
        parts = {part: told[f"{part}_seconds"] / wall for part in PARTS if part != "productive"} if wall else {}
        shown = [f"{PARTS[part]} {share:.1%}" for part, share in parts.items() if share >= 0.0005]
        starts = f" in {self.starts} starts" if self.starts > 1 else ""
        return f"goodput {told['goodput']:.1%} of {_duration(wall)}{starts}: {', '.join(shown)}"


def process_age() -> float:
    """Seconds since this process was started; 0 where nothing says."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
        return max(up - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
    return 0.0


def _is_whole(record: Mapping[str, Any]) -> bool:
    numbers = [record.get(f"{part}_seconds") for part in PARTS]
    return all(isinstance(number, int | float) and number >= 0 for number in numbers) and isinstance(
        record.get("starts"), int
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
