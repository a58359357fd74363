"""The ways of a tune by what was measured: in which order they stand, and which is the best."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from artifex.tuning.records import Records
from artifex.tuning.standing import Spanned, is_faster, ratios
from artifex.tuning.ways import Way

Objective = Literal["throughput", "latency", "memory"]
ROUNDS_FOR_MEMORY = 5  # after which a way is known to be as fast as it must be


@dataclasses.dataclass(frozen=True)
class Board:
    """`share`: for the objective "memory", what of the reference's throughput a way must keep."""

    records: Records
    objective: Objective
    share: float

    @property
    def reference(self) -> Way | None:
        """What all are compared with: the run as configured, or, where that failed, the first that ran."""
        ran = [way for way, record in self.records.ways.items() if record.built and not record.failed]
        return Way() if Way() in ran else next(iter(ran), None)

    def shares(self, way: Way) -> list[float]:
        """The time of a way over that of the reference, for each round that has both: for a step, or, where ways may
        have other batches, for as much work."""
        reference, record = self.reference, self.records.of(way)
        if reference is None or record.built is None or record.failed:
            return []
        other = self.records.of(reference)
        assert other.built is not None
        work = 1.0 if self.objective == "latency" else record.built.work / other.built.work
        return ratios(record.turns, other.turns, work=work)

    def score(self, way: Way) -> float:
        """What ways are ordered by, the least first: time over the reference's, or bytes over the reference's of those
        that are fast enough. Infinite for what was not measured."""
        if not (shares := self.shares(way)):
            return math.inf
        spanned = Spanned.of(shares)
        if self.objective != "memory":
            return spanned.median
        return self._bytes(way) if spanned.median <= 1 / self.share else math.inf

    def ranked(self) -> list[Way]:
        """Those that were measured, the best first."""
        found = [way for way in self.records.ways if self.shares(way)]
        return sorted(found, key=lambda way: (self.score(way), Spanned.of(self.shares(way)).median))

    def best(self) -> Way | None:
        """The first that is better than the reference by more than noise, else the reference."""
        ranked = self.ranked()
        return next((way for way in ranked if way != self.reference and self.wins(way)), self.reference)

    def wins(self, way: Way) -> bool:
        """Whether a way is better than the reference by more than noise."""
        shares = self.shares(way)
        if self.objective != "memory":
            return is_faster(shares, len(self.ranked()) - 1)
        fast = len(shares) >= ROUNDS_FOR_MEMORY and Spanned.of(shares).high <= 1 / self.share
        return fast and self._bytes(way) < 1

    def _bytes(self, way: Way) -> float:
        assert self.reference is not None
        mine, other = self.records.of(way).built, self.records.of(self.reference).built
        if mine is None or other is None or not (mine.bytes and other.bytes):
            return math.inf
        return mine.bytes / other.bytes
