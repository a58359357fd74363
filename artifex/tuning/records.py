"""What was measured, a line a measurement, in `measurements.jsonl`: whole or not at all, and read whatever befell it.

The first line is the question: the run, the devices and the versions. What was measured of another one is no answer to
this one, and is refused or set aside, as asked.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from artifex.config_io import ConfigError, shown
from artifex.training.metrics_file import beside
from artifex.tuning.standing import Turn
from artifex.tuning.ways import Way

FILE = "measurements.jsonl"
SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Built:
    """A way that was compiled and ran. `ready`: seconds from the start of its process until it was warm, `step`: of its
    last step by then; `bytes` of a device by XLA, 0 where it does not say; `resident`: bytes of its process, at most;
    `work`: what a step gets through, in `noun`; `data`: what its batches were; `program`: a digest of the step before
    it was compiled."""

    ready: float
    step: float
    bytes: int
    resident: int
    work: int
    noun: str
    data: str
    program: str
    loss: float


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What the planner says of a way's spread: seconds and bytes of a device; FLOPs of a device, and seconds of the
    rest, what is sent above all."""

    seconds: float
    bytes: int
    flops: float
    rest: float


@dataclasses.dataclass
class Record:
    """All that is known of a way; `failed` says why there is no more, `same` names the way that is the same program."""

    turns: list[Turn] = dataclasses.field(default_factory=list)
    built: Built | None = None
    predicted: Predicted | None = None
    failed: str = ""
    same: Way | None = None


class Records:
    """The measurements of a folder. Raises `ConfigError` where they are of another question, unless `start_anew`, by
    which they are set aside; `aside` is then where they are."""

    def __init__(
        self, folder: str | os.PathLike[str], question: Mapping[str, Any], *, start_anew: bool = False
    ) -> None:
        self.path = Path(folder) / FILE
        self.question = json.loads(json.dumps({"schema": SCHEMA, **question}))
        self.ways: dict[Way, Record] = {}
        self.aside: Path | None = None
        self.resumed = False
        lines = list(self._lines())
        if lines and start_anew:
            self.aside = beside(self.path, "before")
            self.path.rename(self.aside)
            lines = []
        if not lines:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)  # half a first line
            self._append({"question": self.question})
            return
        self._check(lines[0].get("question"))
        self.resumed = True
        for line in lines[1:]:
            self._take(line)

    def of(self, way: Way) -> Record:
        """What is known of a way; nothing yet, of a new one."""
        return self.ways.setdefault(way, Record())

    def add(self, way: Way, **what: Any) -> None:
        """Keep one measurement: `turn`, `built`, `predicted`, `failed` or `same`."""
        self._append({"way": way.to_dict(), **{name: _plain(value) for name, value in what.items()}})
        record = self.of(way)
        for name, value in what.items():
            if name == "turn":
                record.turns.append(value)
            else:
                setattr(record, name, value)

    @property
    def last_round(self) -> int:
        """The number of the newest round, -1 before the first."""
        return max((turn.round for record in self.ways.values() for turn in record.turns), default=-1)

    def _append(self, line: Mapping[str, Any]) -> None:
        """One write of a whole line, after what was cut off in the middle is gone."""
        with self.path.open("ab+") as file:
            size = file.tell()
            file.seek(0)
            if size and not (content := file.read()).endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _lines(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                found = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                continue
            if isinstance(found, dict):
                yield found

    def _take(self, line: Mapping[str, Any]) -> None:
        """What a line says; nothing, where it is none of ours."""
        kinds = {"turn": Turn, "built": Built, "predicted": Predicted}
        try:
            way = Way.from_dict(line["way"])
            found = {name: kind(**line[name]) for name, kind in kinds.items() if name in line}
            same = Way.from_dict(line["same"]) if "same" in line else None
        except (KeyError, TypeError, ValueError, AttributeError):
            return
        record = self.of(way)
        if "turn" in found:
            record.turns.append(found["turn"])
        record.built = found.get("built", record.built)
        record.predicted = found.get("predicted", record.predicted)
        record.failed, record.same = str(line.get("failed", record.failed)), same or record.same

    def _check(self, before: Any) -> None:
        """Raise `ConfigError` where the file is about something else, with the first difference."""
        if not isinstance(before, dict):
            raise ConfigError("does not begin with its question; give --start-anew to set it aside", (str(self.path),))
        if before == self.question:
            return
        name, there, here = next(_differences(before, self.question))
        raise ConfigError(
            f"holds measurements of another question: {name} is {shown(there)} there and {shown(here)} here; give "
            "another --out, or --start-anew to set them aside",
            (str(self.path),),
        )


def _differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    elif before != now:
        yield name, before, now


def _plain(value: Any) -> Any:
    if isinstance(value, Way):
        return value.to_dict()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
