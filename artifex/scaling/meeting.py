"""Meetings of the processes in a work that may fail on one of them: that one comes and says so, and nobody waits on."""

from __future__ import annotations

import contextlib

from artifex.scaling import processes


class OtherFailed(OSError):
    """What this process would have met another for has failed there; says which one, and why."""


def by_this(problem: str) -> str:
    """A problem of this process, as the others are told of it. With one process the problem."""
    return f"process {processes.index()}: {problem}" if processes.count() > 1 else problem


class Meetings:
    """The meetings of one work, of a name that no other has; each process has as many until one fails."""

    def __init__(self, name: str) -> None:
        self._name = f"artifex/{name}"
        self._met = 0
        self._over = processes.count() == 1

    def come(self, seconds: float) -> None:
        """Return when all have come, in any thread. Raises `OtherFailed` where one came to say that it `fails`, and
        `TimeoutError`."""
        if processes.count() == 1:
            return
        store, self._over = processes.key_value_store(), True
        self._met += 1
        try:
            with processes.waiting():
                store.wait_at_barrier(f"{self._name}/{self._met}", int(seconds * 1000))
        except RuntimeError as error:
            raise TimeoutError(f"not all processes came within {seconds:g} s") from error
        with contextlib.suppress(RuntimeError):  # nobody has said so
            raise OtherFailed(store.key_value_try_get(self._failed(self._met)))
        self._over = False

    def end(self) -> None:
        """There is no further meeting."""
        self._over = True

    def fails(self, problem: str, seconds: float) -> None:
        """Come to the next meeting to say that this process has failed. Where it failed at one, the others know."""
        if self._over:
            return
        with contextlib.suppress(RuntimeError):  # another has said so
            processes.key_value_store().key_value_set(self._failed(self._met + 1), by_this(problem))
        with contextlib.suppress(OtherFailed, TimeoutError):
            self.come(seconds)

    def _failed(self, met: int) -> str:
        # of one meeting: whoever looks late at the one before must still come to this
        return f"{self._name}/{met}/failed"
