"""One way to spread a run, as settings of a configuration; and all the ways that a cluster and a model allow.

A `Spread` is what a user would have typed: sizes of the mesh axes, ZeRO, recomputation, microbatches, the pipeline's
schedule. So a planned run is an ordinary run, and a plan can be read, edited and compared.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from artifex.config_device import DeviceConfig
from artifex.scaling.plan import Plan

AXES = ("pipeline", "replica", "data", "fsdp", "expert", "context", "tensor")
"""The mesh axes, outermost first: devices of the last follow each other, and talk over the fastest links."""


ROWS = ("replica", "data", "fsdp", "expert")
"""Those that split the rows of a batch."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """Sizes of mesh axes above 1, and the settings beside them; `whole` are parameters that no axis divides unasked."""

    sizes: tuple[tuple[str, int], ...]
    zero: int = 0
    remat: str = "none"
    accumulation: int = 1
    schedule: str = "1f1b"
    microbatches: int | None = None
    stages_per_device: int = 1
    sequence_parallel: bool = True
    context_attention: str = "ring"
    whole: tuple[str, ...] = ()

    @classmethod
    def of_sections(cls, device: DeviceConfig, devices: int, *, remat: str, accumulation: int, rows: int) -> Spread:
        """What a `device` section and the fields of `training` beside it say on so many devices."""
        plan = Plan.from_device(device, devices, remat=remat, microbatches=accumulation, batch_size=rows)
        sizes, schedule = plan.sizes, plan.pipeline
        return cls(
            tuple((axis, sizes[axis]) for axis in AXES if sizes.get(axis, 1) > 1),
            zero=device.zero,
            remat=plan.remat,
            accumulation=accumulation,
            schedule=schedule.kind if schedule else "1f1b",
            microbatches=schedule.microbatches if schedule else None,
            stages_per_device=schedule.stages_per_device if schedule else 1,
            sequence_parallel=device.sequence_parallel,
            context_attention=device.context_attention,
            whole=device.whole or (),
        )

    @property
    def mesh(self) -> dict[str, int]:
        """Axis -> size, without those of 1."""
        return dict(self.sizes)

    @property
    def devices(self) -> int:
        """How many devices it takes."""
        return math.prod(self.mesh.values())

    def of(self, axis: str) -> int:
        """The size of one axis, 1 where there is none."""
        return self.mesh.get(axis, 1)

    @property
    def device(self) -> dict[str, Any]:
        """The `device` section that says it, without what stands at its default."""
        found: dict[str, Any] = dict(self.sizes)
        if self.devices == 1:
            found["data"] = 1
        if self.of("data") > 1 and self.zero:
            found["zero"] = self.zero
        if self.of("pipeline") > 1:
            found |= {"schedule": self.schedule, "microbatches": self.microbatches}
            found |= {"stages_per_device": self.stages_per_device} if self.stages_per_device > 1 else {}
        if self.of("tensor") > 1 and not self.sequence_parallel:
            found["sequence_parallel"] = False
        if self.of("context") > 1 and self.context_attention != "ring":
            found["context_attention"] = self.context_attention
        if self.whole:
            found["whole"] = list(self.whole)
        return found

    @property
    def training(self) -> dict[str, Any]:
        """The fields of the `training` section that say it."""
        return {"remat": self.remat, "gradient_accumulation": self.accumulation}

    def plan(self, rows: int | None = None) -> Plan:
        """The plan that a run of `rows` rows a step has. Raises `ValueError` where the parts do not fit."""
        section = _section(tuple(sorted((key, _hashable(value)) for key, value in self.device.items())))
        how: dict[str, Any] = {"remat": self.remat, "microbatches": self.accumulation, "batch_size": rows}
        return Plan.from_device(section, self.devices, **how)

    @property
    def row_ways(self) -> int:
        """Into how many parts rows are split."""
        return math.prod(self.of(axis) for axis in ROWS)

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.sizes) or "one device"
        more = [f"zero {self.zero}"] if self.zero else []
        more += [f"remat {self.remat}"] if self.remat != "none" else []
        more += [f"{self.accumulation} microbatches"] if self.accumulation > 1 else []
        if self.of("pipeline") > 1:
            more.append(f"{self.schedule} of {self.microbatches}")
        more += [f"whole: {','.join(self.whole)}"] if self.whole else []
        return ", ".join([mesh, *more])


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@functools.lru_cache(4096)
def _section(fields: tuple[tuple[str, Any], ...]) -> DeviceConfig:
    return DeviceConfig(**dict(fields))


@dataclasses.dataclass(frozen=True)
class Space:
    """What may be tried: axes with the sizes that each may have, and the settings beside them."""

    devices: int
    rows: int
    sizes: Mapping[str, Collection[int]]
    zeros: tuple[int, ...] = (0,)
    remats: tuple[str, ...] = ("none",)
    accumulations: tuple[int, ...] = (1,)
    schedules: tuple[str, ...] = ("1f1b",)
    per_stage: tuple[int, ...] = (1, 2, 4, 8)  # microbatches of a pipeline, to each of its devices
    microbatches: int | None = None  # of an update where they are asked for: a pipeline's, or those without one

    def meshes(self) -> Iterator[tuple[tuple[str, int], ...]]:
        """Every mesh of all devices whose axes have sizes that are allowed and divide the rows."""

        def below(axes: tuple[str, ...], left: int) -> Iterator[tuple[tuple[str, int], ...]]:
            if not axes:
                if left == 1:
                    yield ()
                return
            axis, *rest = axes
            for size in sorted({1, *self.sizes.get(axis, ())}):
                if left % size == 0:
                    for others in below(tuple(rest), left // size):
                        yield ((axis, size), *others) if size > 1 else others

        for sizes in below(AXES, self.devices):
            mesh = dict(sizes)
            rows = math.prod(mesh.get(axis, 1) for axis in ROWS)
            if self.rows % rows == 0:
                yield sizes

    def settings(self, sizes: tuple[tuple[str, int], ...]) -> Iterator[Spread]:
        """Every setting on one mesh, but for recomputation and microbatches around it, which are chosen last."""
        mesh = dict(sizes)
        rows = self.rows // math.prod(mesh.get(axis, 1) for axis in ROWS)
        zeros = self.zeros if mesh.get("data", 1) > 1 else (0,)
        stages = mesh.get("pipeline", 1)
        parts = [(1, 1, self.schedules[0])]
        if stages > 1:
            counts = [self.microbatches] if self.microbatches else [count * stages for count in self.per_stage]
            parts = [
                (count, 2 if schedule == "interleaved" else 1, schedule)
                for schedule, count in itertools.product(self.schedules, counts)
            ]
        for zero, (micro, each, schedule) in itertools.product(zeros, parts):
            if rows % micro:
                continue
            yield Spread(
                sizes,
                zero,
                schedule=schedule,
                microbatches=micro if stages > 1 else None,
                stages_per_device=each,
            )

    def accumulations_of(self, spread: Spread) -> tuple[int, ...]:
        """The counts of microbatches, around those of a pipeline, that divide a device's rows."""
        rows = self.rows // spread.row_ways // (spread.microbatches or 1)
        counts = (1,) if spread.microbatches and self.microbatches else self.accumulations
        return tuple(count for count in counts if rows % count == 0)


def divisors(number: int) -> list[int]:
    """Those of a number, ascending."""
    small = [each for each in range(1, math.isqrt(number) + 1) if number % each == 0]
    return small + [number // each for each in reversed(small) if each * each != number]
