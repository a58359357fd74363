"""One run at a time in a folder: a file says which process has it, and is believed as long as that process lives."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from artifex.scaling import processes

NAME = "run.lock"


class InUse(ValueError):
    """Another process trains in the folder."""


class RunLock:
    """The file `run.lock` of a run's folder while a process trains there: its host, PID and the time it started.

    Only the first of several processes of a run has it. What a process that died has left is taken over by the next one
    of its host; one of another host cannot be known to live, and is taken over only on request.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.file = Path(folder) / NAME
        self.held = False

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def take(self, *, over: bool = False) -> str | None:
        """Have the folder from now on. Returns a line where the lock of another was taken over.

        Raises `InUse`, naming it, where another process has the folder: on this host one that lives, or, unless
        `over`, one of another host.
        """
        if self.held:
            return None
        with _alone(self.file) as descriptor:
            found = _read(descriptor)
            said = None
            if found is not None and not _is_own(found):
                self._check(found, over)
                said = f"the folder was held by {_who(found)}: taken over"
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(_me()).encode(), 0)
        self.held = True
        atexit.register(self.leave)
        processes.before_exit.append(self.leave)
        return said

    def leave(self) -> None:
        """Have it no longer. The file goes, unless another process has taken it over."""
        if not self.held:
            return
        self.held = False
        atexit.unregister(self.leave)
        processes.before_exit.remove(self.leave)
        with contextlib.suppress(OSError), _alone(self.file, create=False) as descriptor:
            found = _read(descriptor)
            if found is not None and _is_own(found):
                self.file.unlink()

    def _check(self, found: dict[str, Any], over: bool) -> None:
        here = found["host"] == socket.gethostname()
        if here and found["boot"] != _boot():  # the machine was started again since
            return
        here = here and found["processes"] == _namespace()
        if here and _started(found["pid"]) == found["started"]:
            raise InUse(
                f"{self.file.parent} is in use by {_who(found)}; wait for it, end it, or choose another --run-dir"
            )
        if not here and not over:
            raise InUse(
                f"{self.file.parent} is in use by {_who(found)}, which cannot be seen from here; if it has ended, give "
                "--take-over"
            )


@contextlib.contextmanager
def _alone(file: Path, *, create: bool = True) -> Iterator[int]:
    """The lock's file, open, while no other process reads or changes it."""
    while True:
        descriptor = os.open(file, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)
        try:
            # where a file system has no locks, what is written is the only sign
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                same = os.fstat(descriptor).st_ino == os.stat(file).st_ino
            except FileNotFoundError:
                same = False
            if same:  # else it was removed while this waited for it
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _read(descriptor: int) -> dict[str, Any] | None:
    """What a lock says; None for a file that is new, or was never written to its end: its process died at that."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except (ValueError, RecursionError):  # no JSON, or nested without end
        return None
    kinds = {"host": str, "pid": int, "started": int | None, "processes": str, "boot": str, "since": str}
    known = isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in kinds.items())
    return found if known else None


def _me() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "boot": _boot(),
        "processes": _namespace(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _is_own(found: dict[str, Any]) -> bool:
    mine = _me()
    return all(found[key] == mine[key] for key in ("host", "pid", "started", "boot", "processes"))


def _who(found: dict[str, Any]) -> str:
    return f"process {found['pid']} on {found['host']}, since {found['since']}"


def _started(pid: int) -> int | None:
    """When a living process of this host started, in ticks since the host did: a PID is given again, the two are not.
    None where there is no such process; where there is no /proc, -1 for one that lives."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return -1
        return -1
    # the name of a process may have blanks, so that fields are counted from behind it; Z: ended, not yet waited for
    return None if fields[0] == "Z" else int(fields[19])


def _boot() -> str:
    """Which start of the machine this is."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _namespace() -> str:
    """Whose PIDs those of this process are: containers have their own, and may share the host's name."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""
