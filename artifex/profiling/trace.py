"""What ran when, of a trace of `jax.profiler`: each operation of a program, its device, and its time.

A GPU's trace has a line for each stream, a TPU's one of operations, a CPU's one for each thread; each event names its
operation as the compiled program does. Loops and calls are left out, whose operations are there themselves.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from artifex.scaling.communication import KINDS

CONTAINERS = ("while", "conditional", "call")


@dataclasses.dataclass(frozen=True)
class Event:
    """An operation of a device, by its name in the program: when it began, and for how long, in seconds."""

    device: int
    operation: str
    program: str
    begin: float
    seconds: float

    @property
    def end(self) -> float:
        """When it ended."""
        return self.begin + self.seconds


def read(folder: str | Path, containers: Collection[str] = ()) -> list[Event]:
    """The events of a trace that was written into `folder`, in order; without operations named in `containers`. Empty
    where the backend traces none. Raises `FileNotFoundError` where no trace is there."""
    from jax.profiler import ProfileData

    files = sorted(Path(folder).rglob("*.xplane.pb"))
    if not files:
        raise FileNotFoundError(f"{folder} has no trace, no file *.xplane.pb; trace into it with jax.profiler.trace")
    found = [event for file in files for event in _events(ProfileData.from_file(str(file)))]
    return sorted((one for one in found if one.operation not in containers), key=lambda one: one.begin)


def _events(data: Any) -> Iterator[Event]:
    for plane in data.planes:
        on_device = re.match(r"/device:\w+:(\d+)", plane.name)
        for line in plane.lines:
            if on_device and line.name not in ("XLA Ops", "Async XLA Ops") and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = dict(event.stats)
                operation = stats.get("hlo_op")
                if operation is None and line.name == "XLA Ops":  # a TPU's is the instruction's text
                    operation = event.name.split(" = ")[0].lstrip("%")
                if operation is None:
                    continue
                device = int(on_device[1]) if on_device else int(stats.get("device_ordinal", 0))
                program = str(stats.get("hlo_module", ""))
                yield Event(device, str(operation), program, event.start_ns * 1e-9, event.duration_ns * 1e-9)


def is_communication(opcode: str) -> bool:
    """Whether an instruction of that opcode, or its start or end, sends to other devices."""
    return re.sub(r"-(?:start|done)$", "", opcode) in (*KINDS, "send", "recv")


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds in which at least one of the spans lies: what overlaps counts once."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        if end > until:
            total += end - max(begin, until)
            until = end
    return total
