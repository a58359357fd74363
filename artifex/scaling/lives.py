"""The processes of a run tell each other that they live: one that is lost is named, and the others leave.

Each has a line to process 0, kept from the roll call, on which a thread says every second that its process lives,
whatever its main thread waits for, and where that one stands. A line that breaks, or on which nothing is heard for a
while, is a loss, and so is a main thread that stands still. Process 0 tells it to the others. Importing this imports no
JAX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence

BEAT = 1.0  # seconds between two signs of life
TOGETHER = 0.5  # seconds within which processes that are lost are lost together, as those of one machine
NAMED = 8  # lost processes that are named
TOLD = 64  # lost processes that the others are told of
LONGEST = 2**16  # bytes that may come before the end of a line
BROKEN = "its connection broke, as when a process is killed"
BYE = b"bye"
STEP = ("reads the batch of step", "computes step")
AFTER = ("validates after step", "saves after step", "makes samples after step")


def place_of(what: str, step: int, waits: bool) -> int:
    """A number for a place of the main thread, larger for later ones; who `waits` for the others there is past what
    they still do."""
    return 2 * (len(STEP + AFTER) * step + (STEP + AFTER).index(what)) + waits


def words_of(place: int) -> tuple[str, int]:
    """What is done at a place, and the step."""
    step, index = divmod(place // 2, len(STEP + AFTER))
    return (STEP + AFTER)[index], step


@dataclasses.dataclass
class Line:
    """A connection to another process, and what came over it."""

    socket: socket.socket
    heard: float  # when it last said anything
    rest: bytes = b""
    left: bool = False  # it said that it leaves


class Lives:
    """What process `me` hears of the others over `lines`, from a thread of its own.

    `hosts` are those of all processes, by which they are named. Where one is lost, said nothing for `limit` seconds,
    broke off, or is the last whose main thread stands at one place for `patience` seconds, `end` is called with a
    sentence, in that thread; `lost` is set before.

    `place`, which the main thread sets, is a `place_of` what all do alike; 0 is one where any time may pass, and while
    a process is there none is judged by its place. A step may hang for all, which a batch or a collective makes; what
    comes after a step takes as long as it takes while all are at it, and one is lost that others wait for.
    """

    def __init__(
        self,
        me: int,
        lines: Mapping[int, socket.socket],
        hosts: Sequence[str],
        limit: float,
        end: Callable[[str], None],
        patience: float = float("inf"),
    ):
        now = time.monotonic()
        self.me, self.hosts, self.limit, self.end, self.patience = me, hosts, limit, end, patience
        self.place = 0
        self._places: dict[int, tuple[int, float]] = {}  # where each stands, and since when
        self.lines = {process: Line(line, now) for process, line in lines.items()}
        self.lost = threading.Event()
        self._sending = threading.Lock()
        for line in lines.values():
            line.setblocking(False)
        threading.Thread(target=self._run, name="lives", daemon=True).start()

    def leave(self) -> None:
        """Tell the others that this process ends of its own will."""
        self._say(BYE)

    def _run(self) -> None:
        lost: dict[int, str] = {}
        since = beaten = looked = time.monotonic()
        with selectors.DefaultSelector() as ready:
            for process, line in self.lines.items():
                ready.register(line.socket, selectors.EVENT_READ, process)
            while not lost or (self.me == 0 and time.monotonic() - since < TOGETHER):
                before = len(lost)
                for key, _ in ready.select(TOGETHER / 5 if lost else BEAT):
                    lost = self._listen(key.data, ready) | lost
                now = time.monotonic()
                if now - looked > self.limit / 2:  # it stood still itself, and cannot say who else did
                    for line in self.lines.values():
                        line.heard = now
                looked = now
                self._stands(self.me, self.place)
                lost = self._silent(now) | (self._stuck(now) if self.me == 0 else {}) | lost
                since = now if not before else since
                if now - beaten >= BEAT:
                    beaten = now
                    self._say(b"%d" % self.place)
        self.lost.set()
        self._say(json.dumps({"lost": [*lost.items()][:TOLD]}).encode())
        self.end(self._sentence(lost))

    def _silent(self, now: float) -> dict[int, str]:
        """Who said nothing for too long, and why that is a loss."""
        return {
            process: "it has ended" if line.left else f"it said nothing for {self.limit:g} s"
            for process, line in self.lines.items()
            if now - line.heard > self.limit
        }

    def _stuck(self, now: float) -> dict[int, str]:
        """The last of all processes, where none goes on for too long, and what they do there."""
        if len(self._places) < len(self.hosts) or not (last := min(place for place, _ in self._places.values())):
            return {}
        what, step = words_of(last)
        behind = [process for process, (place, _) in self._places.items() if place == last]
        if what in AFTER and len(behind) == len(self.hosts):
            return {}
        if now - max(since for _, since in self._places.values()) <= self.patience:
            return {}
        return dict.fromkeys(behind, f"it lives, but {what} {step} for more than {self.patience:g} s")

    def _stands(self, process: int, place: int) -> None:
        if self._places.get(process, (None,))[0] != place:
            self._places[process] = place, time.monotonic()

    def _listen(self, process: int, ready: selectors.BaseSelector) -> dict[int, str]:
        """What came over the line of a process: who is lost, and why."""
        line = self.lines[process]
        try:
            part = line.socket.recv(LONGEST)
        except BlockingIOError:
            return {}
        except OSError:
            part = b""
        line.heard = time.monotonic()
        *said, line.rest = (line.rest + part).split(b"\n")
        lost: dict[int, str] = {}
        for words in filter(None, said):
            line.left = line.left or words == BYE
            if words.isdigit():
                self._stands(process, int(words[:20]))
                continue
            # what is none of ours says nothing
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                lost |= {int(process): str(why) for process, why in json.loads(words)["lost"]}
        lost = {process: why for process, why in lost.items() if 0 <= process < len(self.hosts)}
        if not part or len(line.rest) > LONGEST:
            ready.unregister(line.socket)
            return lost if line.left else lost | {process: BROKEN}
        return lost

    def _say(self, words: bytes) -> None:
        with self._sending:
            for line in self.lines.values():
                with contextlib.suppress(OSError):  # one that stands still, or that `_listen` will find gone
                    line.socket.send(words + b"\n")

    def _sentence(self, lost: Mapping[int, str]) -> str:
        named = [
            f"process {process} of {len(self.hosts)}, on {self.hosts[process]}, is lost: {why}"
            if process != self.me
            else f"this process, {process} of {len(self.hosts)}, was taken for lost by the others: {why}"
            for process, why in sorted(lost.items())
        ]
        more = f"; and {len(named) - NAMED} more" if len(named) > NAMED else ""
        return "; ".join(named[:NAMED]) + more
