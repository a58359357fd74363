"""What a profile found: times, utilisation, memory by part, what is sent, time by module; as text, JSON and a page."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from artifex.scaling.communication import Communication

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a device. `held`: by part, all through the step; `own`: the step's own at its peak, by XLA; by shapes
    what the forward pass has `kept` for the backward pass and all `gradients` as they are added up, None where that is
    unknown; `limit`: what there is; `predicted`: by part."""

    held: Mapping[str, int]
    own: int
    kept: int | None = None
    gradients: int | None = None
    limit: int | None = None
    predicted: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def whole(self) -> int:
        """All of it."""
        return sum(self.held.values()) + self.own

    @property
    def parts(self) -> dict[str, int]:
        """By part, which add up to the whole: of the step's own first activations, then gradients, as far as there is
        room for both at once (gradients come as activations go), and the rest."""
        found, left = dict(self.held), self.own
        for name, size in (("activations", self.kept), ("gradients", self.gradients)):
            if size is not None:
                found[name] = min(size, left)
                left -= found[name]
        return {**found, "temporaries": left}


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of a device: its module and pass, how often it ran in a step, its seconds in all of these, and what
    kind of work it is (`artifex.profiling.classes`)."""

    device: int
    name: str
    opcode: str
    place: str
    during: str
    times: float
    seconds: float
    kind: str


@dataclasses.dataclass(frozen=True)
class Wait:
    """Time beside the steps, `times` in all, once in `every` steps."""

    seconds: float
    times: int
    every: int = 1

    @property
    def each_step(self) -> float:
        """Seconds that it adds to a step, on average."""
        return self.seconds / max(self.times, 1) / self.every


@dataclasses.dataclass(frozen=True, repr=False)
class Profile:
    """A profiled step. Times are seconds, `times` of each step; prints as `summary`."""

    name: str
    device: str
    mesh: Mapping[str, int]
    devices: int
    times: tuple[float, ...]
    while_traced: bool
    compile_seconds: float
    noun: str
    per_step: int | None
    model_flops: float | None
    peak: float | None
    peak_source: str
    memory: Memory | None
    communication: Communication | None
    operations: tuple[Operation, ...]
    waits: Mapping[str, Wait]

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.times)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between which half of the steps lie."""
        if len(self.times) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.times, n=4, method="inclusive")
        return low, high

    @property
    def rate(self) -> float | None:
        """Tokens, images or rows per second, of all devices."""
        return None if self.per_step is None else self.per_step / self.median

    @property
    def utilisation(self) -> float | None:
        """Model FLOPs utilisation, as a share of the peak of all devices."""
        if self.model_flops is None or self.peak is None or not math.isfinite(self.model_flops):
            return None
        return self.model_flops / self.median / self.peak

    def communication_by_dimension(self) -> dict[str, float]:
        """Bytes that a device sends in a step, by mesh axis; over several at once as "data+fsdp". Axes over which
        nothing is sent are there, with 0."""
        found = {axis: 0.0 for axis, size in self.mesh.items() if size > 1}
        for row in self.communication.rows if self.communication else ():
            name = "+".join(row.axes)
            found[name] = found.get(name, 0.0) + row.sent
        return found

    def communication_graph(self) -> dict[tuple[int, int], float]:
        """(sender, receiver) -> bytes a step, by the places of devices in the mesh: collectives go round rings of the
        devices that take part together, an all-to-all goes to each of them."""
        from artifex.profiling.graph import graph

        return graph(self.communication.rows if self.communication else (), self.mesh)

    def device_utilization_map(self) -> dict[int, dict[str, float]]:
        """Device -> the shares of a step, 0 to 1, in which it computed and in which it communicated, of the traced
        steps. Empty where nothing was traced. What runs at once on a device is added up and then taken as one."""
        found: dict[int, dict[str, float]] = {}
        for one in self.operations:
            what = "communication" if one.kind == "communication" else "compute"
            have = found.setdefault(one.device, {"compute": 0.0, "communication": 0.0})
            have[what] += one.seconds / self.median
        for shares in found.values():
            if (both := sum(shares.values())) > 1:
                shares.update({what: share / both for what, share in shares.items()})
        return found

    def time_by(self, what: str) -> dict[str, float]:
        """Seconds of a step that operations took, added up over devices, by "place", "during", "kind" or "name", those
        that took most first."""
        found: dict[str, float] = {}
        for one in self.operations:
            key = getattr(one, what)
            found[key] = found.get(key, 0.0) + one.seconds
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))

    def summary(self) -> str:
        """The profile as text."""
        from artifex.profiling.summary import summary

        return summary(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything, and what follows from it, as JSON can say it."""
        low, high = self.quartiles
        return {
            "schema": SCHEMA,
            **{field: getattr(self, field) for field in ("name", "device", "devices", "noun", "per_step")},
            "mesh": dict(self.mesh),
            "seconds": {"median": self.median, "quartiles": [low, high], "steps": list(self.times)},
            "while_traced": self.while_traced,
            "compile_seconds": self.compile_seconds,
            "per_second": self.rate,
            "model_flops": self.model_flops,
            "peak": {"flops": self.peak, "source": self.peak_source},
            "model_flops_utilisation": self.utilisation,
            "memory": None if self.memory is None else dataclasses.asdict(self.memory) | {"whole": self.memory.whole},
            "communication": [
                dataclasses.asdict(row) for row in (self.communication.rows if self.communication else ())
            ],
            "communication_by_dimension": self.communication_by_dimension(),
            "waits": {name: dataclasses.asdict(wait) for name, wait in self.waits.items()},
            "time": {what: self.time_by(what) for what in ("place", "during", "kind")},
            "operations": [dataclasses.asdict(one) for one in self.operations],
        }

    def save(self, folder: str | Path) -> list[Path]:
        """Write `profile.txt`, `profile.json` and `profile.html`, a page that needs nothing else, into a folder."""
        from artifex.profiling.report import page

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"profile.{kind}" for kind in ("txt", "json", "html")]
        for path, text in zip(paths, (self.summary(), json.dumps(self.to_dict(), indent=1), page(self)), strict=True):
            path.write_text(text + "\n", encoding="utf-8")
        return paths

    def __repr__(self) -> str:
        return self.summary()
