"""What a tune answers: the best way as a run's settings, how far it is known to be better, and a table of all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from artifex.config import Config
from artifex.scaling.autodist.planned import seconds_text
from artifex.scaling.autodist.spread import Spread
from artifex.scaling.placement import size_text
from artifex.training.metrics_file import write_whole
from artifex.tuning.board import Board
from artifex.tuning.records import Record
from artifex.tuning.standing import Spanned, by_round
from artifex.tuning.ways import Way, named


@dataclasses.dataclass(frozen=True)
class Row:
    """A way: seconds of a step, `per_second` tokens or images, `bytes` of a device by XLA, what was predicted of both;
    its `share` of the reference's time, of so many `rounds`; `says` why there is no more."""

    way: Way
    seconds: Spanned | None = None
    per_second: float | None = None
    bytes: int | None = None
    predicted_seconds: float | None = None
    predicted_bytes: int | None = None
    share: Spanned | None = None
    rounds: int = 0
    says: str = ""

    @classmethod
    def of(cls, way: Way, record: Record, shares: Sequence[float]) -> Row:
        """What is known of a way."""
        built, known = record.built, record.predicted
        timed = Spanned.of(list(by_round(record.turns).values())) if record.turns else None
        says = f"failed: {record.failed}" if record.failed else f"the same program as {named(record.same or Way())}"
        says = says if record.failed or record.same else "" if record.turns else "not measured: no time was left"
        return cls(
            way,
            timed,
            built.work / timed.median if built and timed else None,
            built.bytes or None if built else None,
            known.seconds if known else None,
            known.bytes if known else None,
            Spanned.of(shares) if shares else None,
            len(shares),
            says,
        )


@dataclasses.dataclass(frozen=True, repr=False)
class Tuned:
    """The answer. `run`: as configured; `best` way of it; `rows`: all, the best first; `at`: how the run as configured
    is spread; `verdict` and `notes` in words. Prints as a table."""

    run: Config
    best: Way
    rows: tuple[Row, ...]
    objective: str
    devices: str
    at: Spread
    noun: str
    verdict: str
    notes: tuple[str, ...] = ()
    folder: Path = Path()
    stopped: str = ""  # the signal that ended it, by name

    @property
    def config(self) -> Config:
        """The run done the best way."""
        return self.best.config(self.run)

    @property
    def spread(self) -> Spread:
        """How that is spread."""
        how, spread = self.config.training, self.best.spread or self.at
        return dataclasses.replace(spread, remat=how.remat, accumulation=how.gradient_accumulation)

    @property
    def is_default(self) -> bool:
        """Whether nothing is better than the run as configured."""
        return self.best == Way()

    @property
    def ratio(self) -> Spanned | None:
        """The time of the best way over that of the run as configured; None where one of them was not measured."""
        return next(row.share for row in self.rows if row.way == self.best)

    def save(self) -> list[Path]:
        """Write `best.yaml`, a run that `python -m artifex.train` takes, the table and the same as JSON. Each appears
        whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = {
            "best.yaml": self.config.to_yaml(),
            "table.txt": f"{self}\n",
            "tuned.json": json.dumps(self.to_dict(), indent=1) + "\n",
        }
        for name, text in found.items():
            write_whole(self.folder / name, text.encode())
        return [self.folder / name for name in found]

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the verdict, the settings, every row."""
        rows = [{**dataclasses.asdict(row), "way": row.way.to_dict(), "name": str(row.way)} for row in self.rows]
        about = {"model": self.run.model.name, "devices": self.devices, "objective": self.objective}
        best = {"best": self.best.to_dict(), "spread": dataclasses.asdict(self.spread), "verdict": self.verdict}
        return {**about, **best, "noun": self.noun, "notes": list(self.notes), "rows": rows}

    def __repr__(self) -> str:
        lines = [f"{self.run.model.name} on {self.devices}, for {self.objective}", "", *self.table(), "", self.verdict]
        return "\n".join([*lines, *self.notes])

    def table(self) -> list[str]:
        """A line for each way, the best first."""
        width = max(len(str(row.way)) for row in self.rows)
        head = f"{'':{width}}  {'a step':>9} {'half of them':>19} {self.noun + '/s':>11} {'memory':>11}"
        lines = [f"{head} {'predicted':>9} {'of the reference':>24} {'rounds':>6}"]
        for row in self.rows:
            mark = "*" if row.way == self.best else " "
            lines.append(f"{row.way!s:{width}} {mark}{_cells(row)}".rstrip())
        return [*lines, f"{'':{width}} *the best"]


def _cells(row: Row) -> str:
    memory = "" if row.bytes is None else size_text(row.bytes)
    predicted = "" if row.predicted_seconds is None else seconds_text(row.predicted_seconds)
    if row.seconds is None:
        return f"{row.says}" + (f" (predicted {predicted})" if predicted else "")
    middle, half = (
        seconds_text(row.seconds.median),
        f"{seconds_text(row.seconds.low)} to {seconds_text(row.seconds.high)}",
    )
    share = "" if row.share is None else f"{row.share.median:.3f} ({row.share.low:.3f} to {row.share.high:.3f})"
    cells = (
        f"{middle:>9} {half:>19} {row.per_second or 0:>11,.0f} {memory:>11} {predicted:>9} {share:>24} {row.rounds:>6}"
    )
    return cells + (f"  {row.says}" if row.says else "")


def verdict(board: Board) -> str:
    """What may be said of the best way."""
    best, reference = board.best(), board.reference
    if best is None or reference is None:
        return "nothing could be measured: every way failed"
    ranked = [way for way in board.ranked() if way != reference]
    if best == reference:
        name = named(reference)
        if not ranked:
            return f"{name} is the best: nothing else was measured"
        count = min(len(board.shares(way)) for way in ranked[:1])
        known = "nothing is better by more than noise" if count > 5 else f"after {count} rounds nothing is known better"
        return f"{name} is the best: {known}"
    shares = board.shares(best)
    spanned, wins = Spanned.of(shares), sum(share < 1 for share in shares)
    of = "the time as configured" if reference == Way() else f"the time of {reference}"
    said = f"{best}: {spanned.median:.3f} of {of} (half of the rounds: {spanned.low:.3f} to {spanned.high:.3f})"
    if board.objective == "memory":
        mine, other = board.records.of(best).built, board.records.of(reference).built
        assert mine is not None and other is not None
        return f"{said}, {size_text(mine.bytes)} of a device in place of {size_text(other.bytes)}"
    return f"{said}, faster in {wins} of {len(shares)} rounds"
