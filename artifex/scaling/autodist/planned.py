"""What the planner answers: the best spread with its predictions, how far they were checked, and those that lost."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from artifex.scaling.autodist.cluster import Cluster
from artifex.scaling.autodist.estimate import Estimate
from artifex.scaling.autodist.look import Candidate
from artifex.scaling.autodist.spread import Spread
from artifex.scaling.placement import size_text
from artifex.scaling.plan import Plan


@dataclasses.dataclass(frozen=True)
class Proof:
    """What a compiler says of a step: bytes of a device in all, bytes sent by mesh axes, what compiled it, in how many
    seconds; `error` where it did not come to an answer, or found no room."""

    bytes: int | None
    sends: Mapping[str, float]
    compiler: str
    seconds: float
    error: str = ""


@dataclasses.dataclass(frozen=True, repr=False)
class Planned:
    """A plan. `runners` lost to it; `over` did not fit. `checked` says how far, a level and what it gave."""

    task: str
    about: Mapping[str, Any]
    cluster: Cluster
    cluster_name: str
    limit: int | None
    best: Candidate
    runners: tuple[Candidate, ...] = ()
    over: tuple[Candidate, ...] = ()
    searched: str = ""
    constraints: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    proofs: Mapping[Spread, Proof] = dataclasses.field(default_factory=dict)
    names: frozenset[str] = frozenset()  # logical axes of the parameters

    @property
    def spread(self) -> Spread:
        """How the run is spread."""
        return self.best.spread

    @property
    def estimate(self) -> Estimate:
        """What that is predicted to take."""
        return self.best.estimate

    @property
    def plan(self) -> Plan:
        """The plan of the run."""
        return self.spread.plan(self.about.get("rows"))

    @property
    def device(self) -> dict[str, Any]:
        """The `device` section of a run that follows it."""
        return shortest(self.spread).device

    @property
    def training(self) -> dict[str, Any]:
        """The fields of its `training` section."""
        return self.spread.training

    def save(self, path: str | Path) -> None:
        """Write it as YAML, to be read, edited, and given to a run as `device.plan`."""
        from artifex.scaling.autodist.plan_file import write

        write(self, path)

    @property
    def checked(self) -> dict[str, str]:
        """How far it was verified, by level."""
        found = {
            "state": f"exact, {size_text(self.estimate.state)} by the sizes of its arrays",
            "liveness": f"{size_text(self.estimate.own)} besides, by when each array of the traced step is alive",
        }
        proof = self.proofs.get(self.spread)
        if proof is None:
            return found
        if proof.bytes is None:
            return found | {"compiled": f"no: {proof.error}"}
        off = self.estimate.whole / proof.bytes - 1
        found["compiled"] = (
            f"{size_text(proof.bytes)} by {proof.compiler} in {proof.seconds:.0f} s, predicted {off:+.1%}"
        )
        if proof.sends:
            total = sum(proof.sends.values())
            found["collectives"] = (
                f"{size_text(total)} sent by the compiled step, {size_text(self.estimate.sent())} predicted"
            )
        return found

    def __repr__(self) -> str:
        return "\n".join([*self.head(), "", *self.memory(), "", *self.time(), "", *self.others(), *self.tail()])

    def head(self) -> list[str]:
        """What is chosen."""
        spread, count = shortest(self.spread), counted(self.spread.devices, "device")
        have = "" if self.limit is None else f" of {size_text(self.limit)}" + " each" * (spread.devices > 1)
        lines = [f"plan {self.task!r} for {self.about['model']} on {self.cluster_name}, {count}{have}"]
        lines.append(f"  mesh        {' x '.join(f'{axis} {size}' for axis, size in spread.sizes) or 'one device'}")
        lines.append(f"  remat       {spread.remat}")
        if spread.of("data") > 1:
            lines.append(f"  zero        {spread.zero}")
        parts = counted(spread.accumulation, "microbatch", "es")
        lines.append(f"  rows        {self.about['rows']:,} in {parts}" + self._stages())
        if spread.whole:
            lines.append(f"  whole       {', '.join(spread.whole)}")
        return lines

    def _stages(self) -> str:
        schedule = self.plan.pipeline
        return "" if schedule is None else f", a {schedule}, idle {share_text(schedule.bubble())} of the time"

    def memory(self) -> list[str]:
        """Bytes of a device, a line each."""
        lines = ["memory of a device:"]
        lines += [f"  {name:<20}{size_text(size):>12}" for name, size in self.estimate.held.items() if size > 2**10]
        lines.append(f"  {'the step besides':<20}{size_text(self.estimate.own):>12}  (most in {self.estimate.at})")
        lines.append(f"  {'in all':<20}{size_text(self.estimate.whole):>12}" + self._share())
        return lines

    def _share(self) -> str:
        if self.limit is None:
            return ""
        return f"  {share_text(self.estimate.whole / self.limit)} of {size_text(self.limit)}"

    def time(self) -> list[str]:
        """Seconds of a step, a line each."""
        parts = sorted(self.estimate.seconds_of.items(), key=lambda pair: -pair[1])
        sent: dict[str, float] = {}
        for one in self.estimate.sends:
            sent["+".join(one.axes)] = sent.get("+".join(one.axes), 0.0) + one.bytes * one.times
        lines = ["time of a step, by a roofline in which nothing overlaps:"]
        for name, seconds in parts:
            if seconds < 1e-3 * self.estimate.seconds:
                continue
            others = {"compute": f"{self.estimate.flops:.3g} FLOPs", "turns": "more turns of microbatches"}
            what = others[name] if name in others else f"{size_text(sent[name])} sent over {name}"
            lines.append(f"  {seconds_text(seconds):>10}  {what}")
        lines.append(f"  {seconds_text(self.estimate.seconds):>10}  in all")
        return lines

    def others(self) -> list[str]:
        """The runners-up, and why they lost."""
        lines = ["runners-up:"] if self.runners else []
        for one in self.runners:
            lines.append(f"  {shortest(one.spread)}: {self.lost(one)}")
        if self.over:
            lines.append("did not fit:")
        for one in self.over[:3]:
            needs, takes = size_text(one.estimate.whole), seconds_text(one.estimate.seconds)
            lines.append(f"  {shortest(one.spread)}: {needs}, {takes}")
        return lines

    def lost(self, one: Candidate) -> str:
        """Why a runner-up lost."""
        slower = one.estimate.seconds / self.estimate.seconds - 1
        more = round(one.estimate.whole - self.estimate.whole)
        time = f"{slower:+.1%} time" if round(slower, 3) else "as fast"
        memory = f"{size_text(abs(more))} {'more' if more > 0 else 'less'}" if more else "as much memory"
        return ", ".join([time, memory, *self._compiled(one)])

    def _compiled(self, one: Candidate) -> list[str]:
        """What came of compiling a runner-up, if that was done."""
        if (proof := self.proofs.get(one.spread)) is None:
            return []
        if proof.bytes is None:
            return [f"not compiled: {proof.error}"]
        return [f"compiled {size_text(proof.bytes)}" + ", which does not fit" * self.refuted(one)]

    def refuted(self, one: Candidate) -> bool:
        """Whether a candidate was compiled, and does not fit or came to no answer."""
        proof = self.proofs.get(one.spread)
        return proof is not None and (proof.bytes is None or proof.bytes > (self.limit or math.inf))

    def tail(self) -> list[str]:
        """How it was checked, and what the user should know."""
        lines = ["", "checked:", *(f"  {level}: {what}" for level, what in self.checked.items())]
        lines += [f"searched: {self.searched}"] if self.searched else []
        return [*lines, *self.notes]


def shortest(spread: Spread) -> Spread:
    """The spread without the patterns of `whole` that another covers: it says the same."""
    kept = list(dict.fromkeys(spread.whole))
    for pattern in [*kept]:
        if any(other != pattern and _covers(other, pattern) for other in kept):
            kept.remove(pattern)
    return dataclasses.replace(spread, whole=tuple(kept))


def _covers(pattern: str, other: str) -> bool:
    """Whether a pattern is seen to match all that another does: one whose only sign is * matches the other's signs as
    it matches what they stand for."""
    return fnmatch.fnmatchcase(other, pattern) and not (set(other) & set("*?[") and set(pattern) & set("?["))


def counted(number: int, what: str, ending: str = "s") -> str:
    """A number of things as text: `1 device`, `1,024 devices`."""
    return f"{number:,} {what}{ending * (number != 1)}"


def share_text(share: float) -> str:
    """A part of all as text: `80%`, `under 1%`."""
    return "under 1%" if 0 < share < 0.01 else f"{share:.0%}"


def seconds_text(seconds: float) -> str:
    """A time as text: `1.52 s`, `12.3 ms`."""
    if seconds >= 1 or seconds == 0:
        return f"{seconds:.3g} s"
    power = min(2, math.ceil(-math.log10(seconds) / 3))
    return f"{seconds * 1000**power:.3g} {('s', 'ms', 'us')[power]}"
