"""Ctrl-C and SIGTERM: at once where nothing can be lost, else after the step, with everything saved."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from artifex.scaling import compiler_log, processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)
APART = 1.0  # seconds; a terminal and the program that started this one may both pass on one Ctrl-C


class Stopped(SystemExit):
    """A signal ended a run after its work was saved. Its `code` is 128 + the signal's number, as in a shell."""

    together = True  # of several processes all end by it

    def __init__(self, name: str):
        super().__init__(128 + signal.Signals[name])


@contextlib.contextmanager
def ending_at_once(says: str = "") -> Iterator[None]:
    """Within it, a signal ends the process within a second, with code 128 + its number and one line: its name, `says`.
    Of several processes the others end by it too, and the first, by which they hear of it, ends last.

    Python runs its handlers between two bytecodes of the main thread, and a compilation is one call of minutes. So a
    thread waits for the numbers that the handler in C writes to a pipe, and ends the process by itself, without a
    word to the main thread: whoever enters this says that nothing can be lost. What can be is kept by `stop_signals`.
    Outside the main thread, where Python handles no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    to_read, to_write = os.pipe()
    os.set_blocking(to_write, False)
    before = {number: signal.signal(number, _left_to_the_thread) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(to_write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(to_read, says), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(to_write)  # the thread reads the end


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Within it, the first signal is noted in the list it gives, by name, and nothing else is done about it.

    A second one, a second later, is answered as it would be outside: `KeyboardInterrupt` in a notebook, the end of the
    process within `ending_at_once`. Outside the main thread the list stays empty.
    """
    seen: list[str] = []
    before: dict[int, Any] = {}
    first = 0.0

    def note(number: int, frame: Any) -> None:
        nonlocal first
        if not seen:
            seen.append(signal.Signals(number).name)
            first = time.monotonic()
        elif time.monotonic() - first > APART:
            give_back()
            signal.raise_signal(number)

    def give_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    with contextlib.suppress(ValueError):  # not the main thread
        for number in SIGNALS:
            before[number] = signal.signal(number, note)
    try:
        yield seen
    finally:
        give_back()


def _left_to_the_thread(number: int, frame: Any) -> None:
    """The handler of `ending_at_once`; by it the thread knows that no `stop_signals` is entered."""


def _watch(pipe: int, says: str) -> None:
    first = None
    with os.fdopen(pipe, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            sign = number[0]
            if sign not in SIGNALS:
                continue
            name, now = signal.Signals(sign).name, time.monotonic()
            if first is not None:
                if now - first > APART:
                    _end(sign, f"stopped by {name} at once: what came after the last checkpoint is lost")
            elif signal.getsignal(sign) is _left_to_the_thread:
                _end(sign, f"stopped by {name}{says}")
            else:
                first = now
                with contextlib.suppress(OSError):
                    print(f"{name}: saves after this step; once more ends at once, without", file=sys.stderr)


def _end(sign: int, line: str) -> NoReturn:
    # by descriptor: the main thread may hold the locks of Python's streams, and a progress bar hides the cursor
    with contextlib.suppress(OSError):
        compiler_log.pass_on()
        if os.isatty(2):
            os.write(2, b"\r\x1b[K\x1b[?25h")
        os.write(2, f"{line}\n".encode())
    processes.tell_of_signal(line, 128 + sign)
    for last in [*processes.before_exit]:
        last()
    os._exit(128 + sign)
