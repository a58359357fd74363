"""Ctrl-C and SIGTERM end a run after its step, with everything saved."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Within it, the first Ctrl-C or SIGTERM is noted in the list it gives; a second one raises `KeyboardInterrupt`.

    Outside the main thread, where Python handles no signals, the list stays empty.
    """
    seen: list[str] = []
    before = {}

    def note(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(signal.Signals(number).name)

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):
            before[number] = signal.signal(number, note)
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
