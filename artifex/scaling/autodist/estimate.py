"""What a step takes of a device, told from its traced program without compiling: memory, FLOPs, what it sends, time.

estimate(traced, cluster).whole, .seconds, .explain()
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from artifex.scaling.autodist.calibration import Calibration, of_platform
from artifex.scaling.autodist.cluster import Cluster
from artifex.scaling.autodist.heap import heap_bytes
from artifex.scaling.autodist.invariant import hoist
from artifex.scaling.autodist.joined import join_sums
from artifex.scaling.autodist.layouts import lay_out
from artifex.scaling.autodist.liveness import live
from artifex.scaling.autodist.partition import Sent, partition
from artifex.scaling.autodist.program import read
from artifex.scaling.autodist.work import flops_of_device
from artifex.scaling.execution import Platform
from artifex.scaling.plan import Plan

TURN = 5e-5
"""Seconds that one more microbatch costs, whatever it computes: a guess at its launches, so that ties go to fewer."""


@dataclasses.dataclass(frozen=True)
class Traced:
    """A step that is traced and not compiled. `where`, `out`: the shardings of its arguments and of the first of its
    results, flat; `held`: bytes of a device by what it is of, all arguments together; `dtype` products are made in."""

    jaxpr: Any
    where: tuple[Any, ...]
    out: tuple[Any, ...]
    plan: Plan
    platform: Platform
    held: Mapping[str, int]
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one device and step. Bytes by part in `held`, exact, and `own`, what the step holds besides; `sends`; seconds
    by part."""

    held: Mapping[str, int]
    own: float
    at: str  # where the step holds the most
    flops: float
    sends: tuple[Sent, ...]
    seconds_of: Mapping[str, float]
    convolutions: bool = False  # whether the step has some, which compilers place otherwise

    @property
    def state(self) -> int:
        """Bytes of all arguments: state and batch."""
        return sum(self.held.values())

    @property
    def whole(self) -> float:
        """Bytes in all."""
        return self.state + self.own

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.seconds_of.values())

    def sent(self, *axes: str) -> float:
        """Bytes sent over exactly these mesh axes, over all without."""
        return sum(one.bytes * one.times for one in self.sends if not axes or set(one.axes) == set(axes))


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """nnScaler's, where they are asked for, each in place of what is counted: bytes of optimizer state (`resident`)
    and of an update besides (`transient_update`) to each byte of weights, and how many times the two largest arrays
    of the busiest moment count (`transient`)."""

    resident: float | None = None
    transient_update: float | None = None
    transient: float | None = None


def estimate(
    traced: Traced,
    cluster: Cluster,
    calibration: Calibration | None = None,
    coefficients: Coefficients | None = None,
) -> Estimate:
    """Of a traced step on `cluster`. Nothing overlaps in the time: compute, then what is sent over each set of axes."""
    sizes, schedule = traced.plan.sizes, traced.plan.pipeline
    taken = schedule.taken if schedule else None
    program = read(traced.jaxpr, traced.where, traced.out)
    hoist(program)
    lay_out(program, sizes)
    on = traced.platform
    sends = partition(program, sizes, scatters=on != "cpu", hoists=on != "gpu", taken=taken)
    if on == "gpu":
        sends = join_sums(program, sends)
    flops = flops_of_device(program, sizes, taken)
    alive = live(program, sizes, on)
    convolutions = any(op.name == "conv_general_dilated" for op in program.every())
    own = (calibration or of_platform(traced.platform)).own(heap_bytes(alive.buffers), convolutions)
    read_by = {id(value) for op in program.ops for value in op.ins} | {id(value) for value in program.outs}
    unread = sum(value.bytes(sizes) for value in program.ins if id(value) not in read_by)  # left out, as JAX does
    held = {**traced.held, "batch": traced.held.get("batch", 0) - int(unread)}
    if coefficients is not None:
        weights = held.get("parameters", 0)
        if coefficients.resident is not None:
            held["optimizer state"] = int(coefficients.resident * weights)
        if coefficients.transient is not None:
            own += (coefficients.transient - 1) * sum(alive.largest)
        if coefficients.transient_update is not None:
            own = max(own, coefficients.transient_update * weights)
    seconds = {"compute": cluster.compute_seconds(flops, 0.0, traced.dtype)}
    if (parts := traced.plan.microbatches * (schedule.microbatches if schedule else 1)) > 1:
        seconds["turns"] = TURN * (parts - 1)
    for one in sends:
        name = "+".join(one.axes)
        took = cluster.seconds(one.kind, one.bytes * one.times, one.axes, sizes, times=max(round(one.times), 1))
        seconds[name] = seconds.get(name, 0.0) + took
    return Estimate(held, own, alive.at, flops, tuple(sends), seconds, convolutions)
