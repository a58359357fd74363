"""A process that plans, builds a way and measures it when it is told to, as its parent sees it.

It may fail, run out of memory, hang, or be killed by the kernel: all of these are answers, a line each. It ends with
its parent, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from artifex import host_memory

CHILD = "from artifex.tuning.child import serve; serve()"
POLL = 0.1  # seconds


class Failed(Exception):
    """Why a process gives no answer, in a line."""


class Worker:
    """One such process; `log` is the file of whatever it prints. `check` is called while it is waited for, and ends the
    wait by raising."""

    def __init__(self, log: str | os.PathLike[str], check: Callable[[], None], **environment: str) -> None:
        self.log, self.check = Path(log), check
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", CHILD, str(os.getpid())]
        with self.log.open("wb") as printed:
            # a session of its own: Ctrl-C is the parent's to answer, and whatever it starts ends with it
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                env=os.environ | host_memory.environment() | environment,
                start_new_session=True,
            )
        self.started = time.monotonic()
        self._read, self._closed = b"", False

    def ask(self, do: str, **what: Any) -> None:
        """Tell it what to do."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # of a pipe that is closed: `answer` says why
            self.process.stdin.write(json.dumps({"do": do, **what}).encode() + b"\n")
            self.process.stdin.flush()

    def answer(self, limit: float) -> dict[str, Any]:
        """What it says next. Raises `Failed` where that is an error, where it ended, or took more than `limit`
        seconds."""
        assert self.process.stdout is not None
        if self._closed:
            raise Failed("its process was ended")
        until = time.monotonic() + limit
        while b"\n" not in self._read:
            self.check()
            left = until - time.monotonic()
            if left <= 0:
                self.close(keep_log=True)  # what it may still say would be taken for the next answer
                raise Failed(f"no answer within {limit:.0f} s")
            if select.select([self.process.stdout], [], [], min(POLL, left))[0]:
                some = os.read(self.process.stdout.fileno(), 2**16)
                if not some:
                    raise Failed(self._ended())
                self._read += some
        line, _, self._read = self._read.partition(b"\n")
        found = json.loads(line)
        if "error" in found:
            raise Failed(found["error"])
        return found

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def close(self, *, keep_log: bool = False) -> None:
        """End it, and what it started; of the log a file with nothing in it goes as well. The second time nothing is
        left to do."""
        if self._closed:
            return
        self._closed = True
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if not (keep_log and self.log.stat().st_size):
            self.log.unlink(missing_ok=True)

    def _ended(self) -> str:
        """How it ended, and the last that it printed."""
        code = self.process.wait()
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        if code == -signal.SIGKILL:
            return "killed, as the kernel does where memory runs out"
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"{how}: {last[:300]}" if last else how
