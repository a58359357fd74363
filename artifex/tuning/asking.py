"""What the planner is asked, in a process of its own: what is there, which spreads to try, and what they would take."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from artifex.config import Config
from artifex.scaling.autodist.spread import Spread
from artifex.tuning.records import Predicted, Records
from artifex.tuning.rotation import Clock, Ended
from artifex.tuning.space import Space
from artifex.tuning.ways import Way, single
from artifex.tuning.worker import Failed, Worker

FIRST = 300.0  # seconds in which devices are known
PLANNING = 0.3  # of the time that is left, at most, for one answer


@contextlib.contextmanager
def planner_process(clock: Clock) -> Iterator[Worker]:
    """The process that knows the devices and plans."""
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(Path(folder) / "planner.log", clock.check)
        try:
            yield worker
        finally:
            worker.close()


def devices(planner: Worker, run: Config, profile: str) -> dict[str, Any]:
    """What is there, and the run on it. Raises `ValueError` where it does not fit."""
    planner.ask("devices", config=run.to_dict(), profile=profile)
    try:
        return planner.answer(FIRST)
    except Failed as error:
        raise ValueError(str(error)) from None
    except Ended as ended:
        raise ValueError(f"{ended} before the devices were known; give more of it") from None


@dataclasses.dataclass(frozen=True)
class Asking:
    """What the planner is asked: which spreads to try, and what it predicts. It may take a share of the budget."""

    planner: Worker
    run: Config
    at: Spread
    records: Records
    clock: Clock
    profile: str
    notes: list[str] = dataclasses.field(default_factory=list)

    def ways(self, space: Space, candidates: int, objective: str) -> list[Way]:
        """The ways that differ from the run in one thing, with what is predicted of each. Raises `Ended`."""
        spreads: list[Spread] = []
        if space.axes and self.at.devices > 1:
            how = {"count": candidates, "objective": objective, "profile": self.profile}
            self.planner.ask("plan", config=self.run.to_dict(), axes=list(space.axes), **how)
            with self._noted():
                found = map(Way.from_dict, self.planner.answer(PLANNING * self.clock.left)["spreads"])
                spreads = [way.spread for way in found if way.spread is not None]
        ways = single(self.run, space, spreads, self.at)
        if self.planner.is_alive:
            self.predictions(ways)
        return ways

    def predictions(self, ways: Sequence[Way]) -> None:
        """Keep what the planner predicts of those of which it is not known. Raises `Ended`."""
        unknown = [way for way in ways if self.records.of(way).predicted is None]
        how = {"run": self.run.to_dict(), "at": Way(self.at).to_dict(), "profile": self.profile}
        self.planner.ask("predict", ways=[way.to_dict() for way in unknown], **how)
        with self._noted():
            for way in unknown:
                said = self.planner.answer(PLANNING * self.clock.left)
                if "seconds" in said:
                    self.records.add(way, predicted=Predicted(**said))

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except Failed as error:
            self.notes.append(f"the planner: {error}")
