"""What XLA writes to stderr while it compiles, but for one of its warnings, which is said in our words."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator

WARNING = "Involuntary full rematerialization"

_ways: list[tuple[int, threading.Thread]] = []  # where stderr led before, and who passes on what comes meanwhile


@contextlib.contextmanager
def laid_out_anew() -> Iterator[list[str]]:
    """A list that holds, when the block has ended, the shapes that XLA lays out anew through all of it on every device.

    It warns of them past Python, line by line of some 600 letters. Everything else passes on as it comes. Code that
    ends the process within the block, past Python, calls `pass_on` before.
    """
    found: list[str] = []
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed: nobody reads what XLA says
        yield found
        return
    read, write = os.pipe()
    os.dup2(write, 2)
    os.close(write)
    reader = threading.Thread(target=_pass_on, args=(read, stderr, found), daemon=True)
    _ways.append((stderr, reader))
    reader.start()
    try:
        yield found
    finally:
        pass_on()
        found[:] = dict.fromkeys(found)


def pass_on() -> None:
    """Pass on what is on its way to stderr, and lead what comes where it led before. Does nothing outside the block."""
    with contextlib.suppress(IndexError):  # none, or another thread was first
        stderr, reader = _ways.pop()
        os.dup2(stderr, 2)  # the last end to write to, so that the reader comes to its end
        reader.join(timeout=1.0)  # but for a process that was started meanwhile and lives on with the other end
        if not reader.is_alive():
            os.close(stderr)


def _pass_on(read: int, stderr: int, found: list[str]) -> None:
    with open(read, "rb", buffering=0) as lines:
        rest = b""
        while part := lines.read(65_536):
            *whole, rest = (rest + part).split(b"\n")
            for line in whole:
                _one(line + b"\n", stderr, found)
        _one(rest, stderr, found)


def _one(line: bytes, stderr: int, found: list[str]) -> None:
    if WARNING.encode() not in line:
        os.write(stderr, line)
        return
    shape = re.search(r"%\S+ = (\w+\[[\d,]*\])", line.decode(errors="replace"))
    found.append(shape[1] if shape else "a tensor")
