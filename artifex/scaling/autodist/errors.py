"""What is missing where no plan fits, part by part, and what would do, with numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from artifex.scaling.autodist.cluster import Cluster
from artifex.scaling.autodist.config import AutoDistConfig
from artifex.scaling.autodist.look import Candidate
from artifex.scaling.autodist.planned import counted, shortest
from artifex.scaling.autodist.search import Found
from artifex.scaling.autodist.subject import Subject
from artifex.scaling.placement import size_text


def nothing_fits(subject: Subject, cluster: Cluster, config: AutoDistConfig, found: Found) -> str:
    """One line: the nearest spread, what of it takes how much, and remedies."""
    limit = config.memory_bytes
    over = [one for one in found.over if limit is not None and one.estimate.whole > limit]
    if not over or limit is None:
        why = f" ({found.refused[0]})" if found.refused else ""
        over_all = counted(config.devices, "device")
        return f"no spread of {subject.name!r} over {over_all} keeps to the options{why}; widen them"
    least = min(over, key=lambda one: one.estimate.whole)
    parts = {**least.estimate.held, "the step besides": least.estimate.own}
    largest = sorted(parts.items(), key=lambda pair: -pair[1])[:4]
    broken = ", ".join(f"{name} {size_text(size)}" for name, size in largest if size > 0)
    missing, devices = least.estimate.whole - limit, counted(config.devices, "device")
    return (
        f"nothing fits {size_text(limit)} a device: {subject.name!r} on {devices} needs at least "
        f"{size_text(least.estimate.whole)} ({broken}), {size_text(missing)} more, as {shortest(least.spread)}; "
        + "; ".join(remedies(least, limit, config))
    )


def remedies(least: Candidate, limit: int, config: AutoDistConfig) -> Iterator[str]:
    """What would make it fit, by the parts that it can divide."""
    spread, found = least.spread, least.estimate
    devices = spread.devices
    if config.zero_stage not in (3, "auto") and spread.of("data") > 1:
        divided = dataclasses.replace(spread, zero=0)
        state = found.state / divided.of("data")
        yield f"zero_stage='auto' would leave {size_text(state)} of {size_text(found.state)} of state"
    own = limit - found.state
    if own > 0:
        times = found.own / own
        need = size_text(found.state + found.own / _up(times))
        yield f"batches of {_fraction(times)} of the rows would need about {need}"
    if config.recompute not in ("auto", "full") and not config.recompute_modules:
        yield "recompute='full' keeps less"
    more = devices * _up(found.whole / limit)
    yield f"{more:,} devices would need about {size_text(found.whole / _up(found.whole / limit))} each"
    yield f"memory_constraint={_enough(found.whole / 2**30):g} would do"


def _enough(number: float) -> float:
    """At least the number, in three digits."""
    digit = 10.0 ** (math.floor(math.log10(number)) - 2)
    return math.ceil(number / digit) * digit


def _up(ratio: float) -> int:
    """The power of two that is at least so many times."""
    times = 2
    while times < ratio:
        times *= 2
    return times


def _fraction(ratio: float) -> str:
    return {2: "half", 4: "a quarter", 8: "an eighth"}.get(_up(ratio), f"1/{_up(ratio)}")
