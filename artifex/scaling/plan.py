"""The one value that says how a run is spread: mesh, rules, recomputation, microbatches."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from artifex.scaling.axes import Rules, check_mesh, resolve
from artifex.scaling.execution import ContextAttention, Execution
from artifex.scaling.mesh_utils import create_device_mesh, mesh_layout
from artifex.scaling.pipeline.schedules import Schedule
from artifex.scaling.remat import canonical
from artifex.scaling.strategies import combine, strategies_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from artifex.config import DeviceConfig


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a run is spread. Training, dry run, `explain` and checkpoints know nothing else about parallelism.

    `remat`: what the backward pass of the repeated blocks computes again (`artifex.scaling.remat`). `microbatches`:
    parts a batch is computed in, one after the other, with the same gradient. `pipeline`: the schedule of each of these
    on the mesh axis that divides layers, by default 1F1B with 4 microbatches to a device. `running` are then the rules
    for all but the step, by which the devices of that axis divide rows and weights. `context_attention`: how positions
    that different devices have see each other. A plan names no device: it is a small value that can be compared and
    printed. Raises `ValueError` where the parts do not fit together.
    """

    mesh_shape: tuple[int, ...]
    axis_names: tuple[str, ...]
    rules: Rules
    remat: str = "none"
    microbatches: int = 1
    pipeline: Schedule | None = None
    context_attention: ContextAttention = "ring"

    def __post_init__(self) -> None:
        object.__setattr__(self, "remat", canonical(self.remat))
        if len(self.mesh_shape) != len(self.axis_names):
            raise ValueError(f"plan has mesh shape {self.mesh_shape} but axis names {self.axis_names}; name each axis")
        if self.microbatches < 1:
            raise ValueError(f"plan has {self.microbatches} microbatches; expected at least 1")
        check_mesh(self.rules, self.sizes)
        if self.pipeline is None and self.pipeline_axis is not None:
            stages = self.sizes[self.pipeline_axis]
            object.__setattr__(self, "pipeline", Schedule("1f1b", stages, 4 * stages))
        stages = 1 if self.pipeline_axis is None else self.sizes[self.pipeline_axis]
        if self.pipeline is not None and self.pipeline.devices != stages:
            raise ValueError(
                f"plan has a {self.pipeline}, but mesh {self.sizes} has {stages} on the axis of the pipeline; make "
                "both the same"
            )

    @classmethod
    def from_device(
        cls,
        device: DeviceConfig,
        device_count: int,
        *,
        remat: str = "none",
        microbatches: int = 1,
        batch_size: int | None = None,
    ) -> Plan:
        """The plan of a `device` section on so many devices. Raises `ValueError` where the mesh does not fit them.

        Where the section leaves the microbatches of a pipeline open, there are up to 4 to each of its devices, as many
        as divide `batch_size`.
        """
        shape, names = mesh_layout(device, device_count)
        how: dict[str, Any] = {"zero": device.zero, "sequence_parallel": device.sequence_parallel}
        rules = combine(strategies_for(names, fsdp_min_weight_size=device.fsdp_min_weight_size, **how))
        rules = dataclasses.replace(rules, whole=device.whole or ())
        plan = cls(shape, names, rules, remat, microbatches, context_attention=device.context_attention)
        if plan.pipeline is None:
            return plan
        stages, parts, V = plan.pipeline.devices, device.microbatches, device.stages_per_device
        if parts is None:
            rows = 0 if batch_size is None else batch_size // (plan.row_ways * microbatches)
            able = [n for n in range(1, 4 * stages + 1) if rows % n == 0 and (V == 1 or n % stages == 0)]
            parts = max(able, default=4 * stages)
        return dataclasses.replace(plan, pipeline=Schedule(device.schedule, stages, parts, V))

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis -> size."""
        return dict(zip(self.axis_names, self.mesh_shape, strict=True))

    @property
    def running(self) -> Rules:
        """The rules of all that is no training step: samples, scores, validation."""
        if self.pipeline is None:
            return self.rules
        return self.rules.union(Rules.of(activations={"batch": self.pipeline_axis}, strategy="pipeline")).without(
            "layers"
        )

    def of_path(self, path: str) -> Plan:
        """The plan with its rules those for the parameter at `path`."""
        rules = self.rules.of_path(path)
        return self if rules is self.rules else dataclasses.replace(self, rules=rules)

    @property
    def pipeline_axis(self) -> str | None:
        """The mesh axis of several devices that divides layers."""
        axes = [axis for rule in self.rules.params if rule.name == "layers" for axis in rule.axes]
        return next((axis for axis in axes if self.sizes[axis] > 1), None)

    @property
    def row_ways(self) -> int:
        """Into how many parts the mesh splits the rows of a batch."""
        rule = next((rule for rule in self.rules.activations if rule.name == "batch"), None)
        return math.prod(self.sizes[axis] for axis in rule.axes) if rule else 1

    @property
    def device_count(self) -> int:
        """Devices the mesh needs."""
        return math.prod(self.mesh_shape)

    def make_mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh over `devices`, or over all there are."""
        return create_device_mesh(self.mesh_shape, self.axis_names, devices=devices)

    def execution(self, mesh: Mesh, **how: Any) -> Execution:
        """How a model runs by this plan on `mesh`, whose devices may not be there. `how`: the other fields."""
        mine = {"rules": self.rules, "remat": self.remat, "context_attention": self.context_attention}
        return Execution(mesh=mesh, **(mine | how))

    def check_batch(self, batch_size: int) -> None:
        """Raise `ValueError` unless every microbatch divides over the devices that split examples."""
        rule = next((rule for rule in self.rules.activations if rule.name == "batch"), None)
        parts = self.microbatches * (self.pipeline.microbatches if self.pipeline else 1)
        unit = self.row_ways * parts
        if batch_size % unit:
            fits = max(batch_size // unit, 1) * unit
            micro = f" in {parts} microbatches" if parts > 1 else ""
            raise ValueError(
                f"training.batch_size {batch_size} does not divide over {self.row_ways} devices "
                f"({'+'.join(rule.axes) if rule else ''}){micro}; {fits} would, or {fits + unit}"
            )

    def check_sequence(self, length: int, heads: int, *, balanced: bool, softmax: bool, setting: str) -> None:
        """Raise `ValueError` where devices that divide a sequence of `length`, over which `heads` heads attend, cannot
        have equal parts of it. `balanced`: the ring gives each an early and a late part, because attention is causal.
        `softmax`: the heads may be exchanged. `setting` is what the length is called."""
        names, every = ("batch", "sequence", "act_heads", None), self.device_count
        spec = resolve(names, (every, every * length, heads, 1), self.rules.activations, self.sizes).spec
        axes = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
        parts, of_heads = (math.prod(self.sizes[axis] for axis in axes[dim]) for dim in (1, 2))
        if parts == 1:
            return
        unit = parts * (2 if balanced and self.context_attention == "ring" else 1)
        if length % unit:
            near = max(length // unit, 1) * unit
            twice = f", two parts on each for device.context_attention {self.context_attention!r}," * (unit > parts)
            raise ValueError(
                f"{setting} {length} does not divide over {parts} devices ({'+'.join(axes[1])}){twice} in parts of "
                f"equal size; {near} would, or {near + unit}"
            )
        if softmax and self.context_attention == "ulysses" and heads // of_heads % parts:
            fits = math.gcd(heads // of_heads, parts)
            raise ValueError(
                f"device.context_attention 'ulysses' exchanges {heads // of_heads} query heads over {parts} devices "
                f"({'+'.join(axes[1])}), which do not divide; {fits} would, or set it to 'ring', which takes any"
            )

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis}={size}" for axis, size in self.sizes.items())
        micro = f", {self.microbatches} microbatches" if self.microbatches > 1 else ""
        stages = f", {self.pipeline}" if self.pipeline else ""
        whole = f", whole {','.join(self.rules.whole)}" if self.rules.whole else ""
        return f"mesh {mesh}, remat {self.remat}{micro}{stages}{whole}"
