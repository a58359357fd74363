"""`metrics.jsonl`: a line a measurement, read whatever befell it, written whenever that can be, never erased."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAITING = 10_000  # lines that wait for a disk that cannot be written


class MetricsFile:
    """The metrics of a run. What cannot be read is left out, and set aside when the file is written anew."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.waiting: deque[str] = deque(maxlen=WAITING)
        self.failed = 0  # times that lines could not be written

    def read(self) -> list[dict[str, Any]]:
        """Every record that can be read, in order. Raises `OSError`, which names the file, where the file cannot be."""
        return [record for _, record in self._lines() if record is not None]

    def append(self, record: dict[str, Any], say: Callable[[str], None]) -> None:
        """Write a line, after those that still wait. Where that fails the line waits for the next call: `say` tells the
        first time, and when it is over.

        JSON has no word for a number that is not finite: it is null, and `not_finite` says which it was.
        """
        odd = {key: str(x) for key, x in record.items() if isinstance(x, float) and not math.isfinite(x)}
        told = record | dict.fromkeys(odd) | ({"not_finite": odd} if odd else {})
        self.waiting.append(json.dumps(told, allow_nan=False) + "\n")
        self.flush(say)

    def flush(self, say: Callable[[str], None]) -> bool:
        """Write the lines that wait; False where that cannot be done."""
        if not self.waiting:
            return True
        size = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)  # a folder that vanished
            with self.path.open("ab") as file:
                size = file.tell()
                file.write("".join(self.waiting).encode())
        except OSError as error:
            if size:  # what was written of it would be half a line
                self._cut(size)
            if not self.failed:
                say(f"warning: {self.path} cannot be written: {error}; the run goes on, its metrics wait")
            self.failed += 1
            return False
        if self.failed:
            say(f"{self.path} is written again: {len(self.waiting)} lines had waited, after {self.failed} attempts")
        self.failed = 0
        self.waiting.clear()
        return True

    def keep_up_to(self, step: int) -> list[str]:
        """Leave the records up to `step`, which a run goes on from, and set aside those it makes again, and the lines
        that cannot be read: what was moved, a line each. Half a line at the end, as a kill leaves it, goes."""
        kept, left, damaged = [], [], []
        lines = self._lines()
        for index, (line, record) in enumerate(lines):
            if record is not None:
                (kept if step and record["step"] <= step else left).append(line)
            elif index < len(lines) - 1 or line.endswith(b"\n"):
                damaged.append(line)
        if len(kept) == len(lines):
            return []
        told = []
        for what, moved in (("left", left), ("damaged", damaged)):
            if moved:
                aside = beside(self.path, what)
                write_whole(aside, b"".join(moved))
                why = f"after step {step}, which the run goes on from" if what == "left" else "cannot be read"
                count = "1 line" if len(moved) == 1 else f"{len(moved)} lines"
                told.append(f"{self.path}: {count} {why}, moved to {aside.name}")
        write_whole(self.path, b"".join(kept))
        return told

    def _lines(self) -> list[tuple[bytes, dict[str, Any] | None]]:
        if not self.path.exists():
            return []
        if not self.path.is_file():  # a pipe would block
            raise OSError(errno.EINVAL, "is no regular file", str(self.path))
        lines = self.path.read_bytes().splitlines(keepends=True)
        whole = [line if line.endswith(b"\n") or _record(line) is None else line + b"\n" for line in lines]
        return [(line, _record(line)) for line in whole]

    def _cut(self, size: int) -> None:
        try:
            os.truncate(self.path, size)
        except OSError:
            return  # then it is half a line, which is set aside when the file is read to go on


def beside(path: str | os.PathLike[str], what: str) -> Path:
    """Where something is set aside that stood at `path`: "metrics.left-1.jsonl"."""
    path = Path(path)
    names = (path.with_name(f"{path.stem}.{what}-{n}{path.suffix}") for n in itertools.count(1))
    return next(name for name in names if not name.exists())


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """A file with that content, or as it was."""
    path = Path(path)
    whole = path.with_name(f".{path.name}")
    with whole.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    whole.replace(path)


def _record(line: bytes) -> dict[str, Any] | None:
    """What a line says; None where it is none of ours."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # neither UTF-8 nor JSON, or a number of thousands of digits
        return None
    known = isinstance(record, dict) and type(record.get("step")) is int and isinstance(record.get("split"), str)
    return record if known else None
