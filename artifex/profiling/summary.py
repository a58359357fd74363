"""A profile as text: what a step takes, of what, and the modules and operations that take the most of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from artifex.profiling.scopes import PASSES
from artifex.scaling.autodist.planned import counted, seconds_text, share_text
from artifex.scaling.placement import size_text

if TYPE_CHECKING:
    from artifex.profiling.result import Memory, Profile

LISTED = 12  # modules that are listed


def summary(found: Profile) -> str:
    """All of it, a paragraph each."""
    parts = [list(of(found)) for of in (_head, _waits, _memory, _communication, _time, _modules)]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _head(found: Profile) -> Iterator[str]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items() if size > 1)
    where = f"{found.devices} {found.device} device{'s' * (found.devices != 1)}"
    yield f"{found.name} on {where}{f', {mesh}' if mesh else ''}"
    low, high = found.quartiles
    half = f"half of {len(found.times)} between {seconds_text(low)} and {seconds_text(high)}"
    traced = ", while it was traced" if found.while_traced else ""
    yield f"  a step            {seconds_text(found.median)}, {half}{traced}"
    if found.rate is not None:
        yield f"  {found.noun + ' a second':<16}  {found.rate:,.0f}"
    if found.utilisation is not None:
        reached = f"{(found.peak or 0) / 1e12:,.4g} TFLOP/s, {found.peak_source}"
        yield f"  utilisation       {found.utilisation:.1%} of {reached}"
    elif found.model_flops is not None:
        yield f"  model FLOPs       {found.model_flops:.4g} a step; no peak of {found.device} is known"
    if found.compile_seconds:
        yield f"  compiling         {seconds_text(found.compile_seconds)}"


def _waits(found: Profile) -> Iterator[str]:
    """What a step of a run takes, with what is beside the compiled step."""
    if not found.waits:
        return
    each = {"compiled step": found.median, **{name: wait.each_step for name, wait in found.waits.items()}}
    whole = sum(each.values())
    yield f"a step of the run: {seconds_text(whole)}"
    for name, seconds in each.items():
        often = "" if name not in found.waits or found.waits[name].every == 1 else _often(found, name)
        yield f"  {name:<17} {share_text(seconds / whole):>8}  {seconds_text(seconds)}{often}"


def _often(found: Profile, name: str) -> str:
    wait = found.waits[name]
    return f": one of {seconds_text(wait.seconds / wait.times)} in {wait.every} steps"


def _memory(found: Profile) -> Iterator[str]:
    memory = found.memory
    if memory is None:
        return
    yield "memory of a device, as XLA has it" + (", and as the planner predicts it" if memory.predicted else "")
    for name, size in memory.parts.items():
        yield f"  {name:<26}{size_text(size):>12}{_beside(memory, name)}"
    foreseen = f"{size_text(sum(memory.predicted.values())):>14}" if memory.predicted else ""
    yield f"  {'in all':<26}{size_text(memory.whole):>12}{foreseen}"
    if memory.limit is not None:
        yield f"  {'of':<26}{size_text(memory.limit):>12}  {share_text(memory.whole / memory.limit)}"


def _beside(memory: Memory, name: str) -> str:
    """What was predicted of a part; what the step needs besides the planner predicts in one."""
    if name == "temporaries" and "the step besides" in memory.predicted:
        return f"{size_text(memory.predicted['the step besides']):>14}  with activations and gradients"
    known = memory.predicted.get({"optimizer": "optimizer state"}.get(name, name))
    return "" if known is None else f"{size_text(known):>14}"


def _communication(found: Profile) -> Iterator[str]:
    if found.communication is None or found.devices == 1:
        return
    yield "communication of a device in a step"
    for line in str(found.communication).splitlines():
        yield f"  {line}"


def _time(found: Profile) -> Iterator[str]:
    """By pass and by class of operations."""
    if not found.operations:
        yield "time by module: this backend's trace names no operations" if found.while_traced else ""
        return
    yield "time of operations, added up over devices"
    passes = found.time_by("during")
    yield from _shares({name: passes[name] for name in PASSES if name in passes})
    yield "of which"
    yield from _shares(found.time_by("kind"))


def _modules(found: Profile) -> Iterator[str]:
    times = found.time_by("place")
    if not times:
        return
    yield "by module"
    whole = sum(times.values())
    shown = dict(list(times.items())[:LISTED])
    yield from _shares(shown, whole)
    if left := len(times) - len(shown):
        rest = whole - sum(shown.values())
        yield f"  {share_text(rest / whole):>9}  {counted(left, 'other')}"


def _shares(times: Mapping[str, float], whole: float | None = None) -> Iterator[str]:
    whole = whole or sum(times.values())
    for name, seconds in times.items():
        yield f"  {share_text(seconds / whole if whole else 0.0):>9}  {seconds_text(seconds):>9}  {name}"
