"""Processes that are warm and wait, each a way; in rounds each of them is told to take some steps, one at a time.

All live at once where the host's memory allows it, on CPUs. An accelerator is held by one process at a time: there a
way is built again for its next turns.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from artifex.config import Config
from artifex.tuning.board import Board
from artifex.tuning.records import Built, Records
from artifex.tuning.standing import Turn
from artifex.tuning.ways import Way, named
from artifex.tuning.worker import Failed, Worker

PAUSE = 0.05  # seconds before each turn: threads were seen to spin for up to 20 ms after a call
TURN = 0.5  # seconds of steps that a turn has, about
MOST_STEPS = 64
MOST_ALIVE = 16
SHARE_OF_MEMORY = 0.7  # of what is free when a tune begins, for all processes together
TURN_LIMIT = 60.0  # seconds, at least, after which a turn hangs


class Ended(Exception):
    """Why a tune ends before everything was measured, in words."""


class Clock:
    """The budget, in seconds, and the signals that were seen, by name."""

    def __init__(self, seconds: float, signals: Sequence[str] = ()) -> None:
        self.seconds, self.signals, self.start = seconds, signals, time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.start

    @property
    def left(self) -> float:
        return self.seconds - self.spent

    def check(self) -> None:
        """Raise `Ended` where a signal came or the budget is spent."""
        if self.signals:
            raise Ended(f"stopped by {self.signals[0]}")
        if self.left <= 0:
            raise Ended(f"the budget of {self.seconds / 60:g} min is spent")


class Rotation:
    """The living processes of a tune. `alone`: one of them at a time; `limit`: seconds that building one may take."""

    def __init__(
        self,
        run: Config,
        board: Board,
        folder: str | os.PathLike[str],
        clock: Clock,
        *,
        alone: bool,
        limit: float,
        say: Callable[[str], None],
    ) -> None:
        self.run, self.board, self.folder, self.clock = run, board, Path(folder), clock
        self.alone, self.limit, self.say = alone, limit, say
        self.records: Records = board.records
        self.living: dict[Way, Worker] = {}
        self.round = self.records.last_round + 1
        self.room = None if (free := free_bytes()) is None else SHARE_OF_MEMORY * free
        # a way that is built again is then not compiled again
        self.environment = {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache" / "xla")} if alone else {}
        self.logs = 0

    def __enter__(self) -> Rotation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(*self.living)

    def has(self, way: Way) -> bool:
        """Have the process of a way warm and waiting; False where it fails, which is kept, or is the same program as
        another's."""
        record = self.records.of(way)
        if way in self.living:
            return True
        if record.failed or record.same:
            return False
        self.make_room()
        try:
            return self._build(way)
        except Failed as error:
            if self._crowded(error):
                return self.has(way)
            self.fail(way, str(error))
            return False

    def rounds(self, ways: Sequence[Way], count: int) -> None:
        """So many rounds of all `ways`, in an order that moves on by one from round to round. Where one lives at a time
        a way takes its turns of all these rounds in a row."""
        first = self.round
        self.round += count
        numbers = range(first, first + count)
        if self.alone:
            order = [(number, way) for way in rotated(ways, first) for number in numbers]
        else:
            order = [(number, way) for number in numbers for way in rotated(ways, number)]
        for number, way in order:
            self.turn(way, number)

    def turn(self, way: Way, number: int) -> None:
        """Some steps of a way, timed and kept; nothing of one that fails."""
        if not self.has(way):
            return
        built = self.records.of(way).built
        assert built is not None
        steps = max(1, min(MOST_STEPS, round(TURN / built.step)))
        time.sleep(PAUSE)
        worker = self.living[way]
        worker.ask("turn", steps=steps)
        try:
            seconds = worker.answer(max(TURN_LIMIT, 20 * built.step * (steps + 1)))["seconds"]
        except Failed as error:
            if self._crowded(error):
                return
            self.close(way, keep_log=True)
            self.fail(way, str(error))
            return
        self.records.add(way, turn=Turn(number, steps, seconds))

    def fail(self, way: Way, why: str) -> None:
        """Keep why there is no more of a way."""
        self.records.add(way, failed=why)
        self.say(f"  {way}: failed: {why}")

    def close(self, *ways: Way, keep_log: bool = False) -> None:
        """End the processes of these ways."""
        for way in ways:
            if (worker := self.living.pop(way, None)) is not None:
                worker.close(keep_log=keep_log)

    def make_room(self) -> None:
        """End the processes of the ways that stand worst, until one more has room."""
        while self.living and not self.fits_one_more():
            others = [way for way in self.living if way != self.board.reference]
            if not others:  # not even the reference and one other
                self.alone = True
            worst = max(others, key=self.board.score) if others else next(iter(self.living))
            self.close(worst)

    def fits_one_more(self) -> bool:
        """Whether the memory of the host is enough for one more process, as large as the largest."""
        if self.alone or len(self.living) >= MOST_ALIVE:
            return not self.living
        sizes = [built.resident for way in self.living if (built := self.records.of(way).built)]
        return self.room is None or sum(sizes) + max(sizes, default=0) <= self.room

    def _crowded(self, error: Failed) -> bool:
        """Whether a process was killed beside others, for whose memory it may have been; from then on each is alone."""
        if self.alone or not str(error).startswith("killed") or len(self.living) < 2:
            return False
        self.say("  a process was killed: from here on one lives at a time")
        self.alone = True
        self.close(*self.living)
        return True

    def _build(self, way: Way) -> bool:
        """Start the process of a way and wait until it is warm. Raises `Failed`."""
        start, record = time.monotonic(), self.records.of(way)
        known = {other.built.program: name for name, other in self.records.ways.items() if other.built}
        again = {} if record.built else known  # one that is built again is itself
        self.logs += 1
        self.say(f"  building {named(way)}")
        worker = Worker(self.folder / "logs" / f"{os.getpid()}-{self.logs}.log", self.clock.check, **self.environment)
        alive = failed = False
        try:
            worker.ask("build", config=way.config(self.run).to_dict(), folder=str(self.folder), known=[*again])
            program = worker.answer(self.limit)["program"]
            if program in again:
                self.records.add(way, same=again[program])
                self.say(f"  {way}: the same program as {named(again[program])}")
                return False
            found = worker.answer(max(self.limit - (time.monotonic() - start), 1.0))
            built = Built(ready=time.monotonic() - start, program=program, **found)
            self.records.add(way, built=built)
            self.living[way] = worker
            alive = True
            return True
        except Failed:
            failed = True
            raise
        finally:
            if not alive:
                worker.close(keep_log=failed)


def rotated(ways: Sequence[Way], by: int) -> list[Way]:
    """The same in the same order, begun at another one."""
    first = by % len(ways) if ways else 0
    return [*ways[first:], *ways[:first]]


def free_bytes() -> int | None:
    """Memory of the host that is free for new processes, or what is left of this one's group; None where nothing
    says."""
    found: list[int] = []
    with contextlib.suppress(OSError, AttributeError, ValueError):
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        found.append(int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1]) * 1024)  # pyright: ignore[reportOptionalSubscript]
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        used = int((group / "memory.current").read_text()) - _reclaimable(group / "memory.stat")
        found.append(int((group / "memory.max").read_text()) - used)
    return min(found, default=None)


def _reclaimable(file: Path) -> int:
    """Bytes of a group that are a cache of files."""
    stat: Mapping[str, Any] = dict(line.split() for line in file.read_text().splitlines())
    return int(stat.get("inactive_file", 0))
