"""What a run waits for, where no step ends for much longer than usual: said by a thread, which never ends the run."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from artifex.scaling import processes
from artifex.training.goodput import PLACES, Goodput

TIMES = 20.0  # a step that takes so many times what steps take is no slow step
AFTER_A_STEP = 10.0  # what comes after a step takes as long as it takes: so much more patience with it
LOOKS = 1.0  # seconds from one look to the next
WAITS_FOR = {
    "data": "the data",
    "productive": "the devices",
    "validation": "the validation",
    "checkpoint": "the disk that it is saved to",
    "samples": "the samples",
}


class StallWatch:
    """While the block runs, `say` is told where the run stands still: after `least` seconds at one place, or 20 times
    what a step takes; ten times as long at what comes after a step. It is told again each time that twice as long has
    passed, and when the run goes on. The first time, the Python stack of every thread goes to the file `stacks`.

    With `least` 0 nothing is watched. Watches the thread that enters it, by where `goodput` says that it is.
    """

    def __init__(self, goodput: Goodput, stacks: str | Path, say: Callable[[str], None], least: float):
        self.goodput, self.stacks, self.say, self.least = goodput, Path(stacks), say, least
        self._place: tuple[str, int, float] | None = None
        self._next = 0.0  # seconds at this place after which something is said again; 0 before it was looked at
        self._said, self._kept = False, False
        self._over = threading.Event()

    def __enter__(self) -> StallWatch:
        self._watched = threading.get_ident()
        if self.least:
            self._thread = threading.Thread(target=self._run, name="stall-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self.least:
            self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(min(LOOKS, self.least / 4)):
            self.look()

    def look(self) -> None:
        """Say what is to be said now."""
        place = part, step, since = self.goodput.at
        now = self.goodput.clock()
        if place != self._place:
            if self._said and self._place is not None:
                self.say(f"goes on: {_where(*self._place[:2])} took {since - self._place[2]:.0f} s")
            self._place, self._said, self._next = place, False, self._patience(part)
        stands = now - since
        if stands < self._next:
            return
        usual = self.goodput.usual()
        takes = f", where a step takes {usual:.3g} s" if usual else ""
        others = processes.waits_for_others()
        what = "the other processes" if others else WAITS_FOR.get(part, "what it does before the first step")
        still = "still waits" if self._said else "waits"
        self.say(f"{_where(part, step)} for {stands:.0f} s{takes}: {still} for {what}{self._keep_stacks()}")
        self._said, self._next = True, 2 * stands

    def _patience(self, part: str) -> float:
        usual = max(self.least, TIMES * self.goodput.usual())
        return usual if part in ("data", "productive") else AFTER_A_STEP * usual

    def _keep_stacks(self) -> str:
        """Write every thread's stack, the watched one's first; once. A clause that says where."""
        if self._kept:
            return ""
        self._kept = True
        frames = sys._current_frames()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        order = [self._watched, *(frames.keys() - {self._watched, threading.get_ident()})]
        text = [f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n"]
        for ident in order:
            if ident in frames:
                text += [f"\nthread {names.get(ident, ident)}\n", *traceback.format_stack(frames[ident])]
        try:
            with self.stacks.open("a", encoding="utf-8") as file:
                file.write("".join(text) + "\n")
        except OSError as error:
            return f"; its stack cannot be written: {error}"
        return f"; its stack is in {self.stacks}"


def _where(part: str, step: int) -> str:
    return f"{PLACES[part]} {step}" if part in PLACES else "starts"
