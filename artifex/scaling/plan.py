"""The one value that says how a run is spread: mesh, rules, recomputation, microbatches."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from artifex.scaling.axes import Rules, check_mesh
from artifex.scaling.execution import Execution
from artifex.scaling.mesh_utils import create_device_mesh, mesh_layout
from artifex.scaling.remat import canonical
from artifex.scaling.strategies import combine, strategies_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from artifex.config import DeviceConfig


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a run is spread. Training, dry run, `explain` and checkpoints know nothing else about parallelism.

    `remat`: what the backward pass of the repeated blocks computes again (`artifex.scaling.remat`). `microbatches`:
    parts a batch is computed in, one after the other, with the same gradient. A plan names no device: it is a small
    value that can be compared and printed. Raises `ValueError` where the parts do not fit together.
    """

    mesh_shape: tuple[int, ...]
    axis_names: tuple[str, ...]
    rules: Rules
    remat: str = "none"
    microbatches: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "remat", canonical(self.remat))
        if len(self.mesh_shape) != len(self.axis_names):
            raise ValueError(f"plan has mesh shape {self.mesh_shape} but axis names {self.axis_names}; name each axis")
        if self.microbatches < 1:
            raise ValueError(f"plan has {self.microbatches} microbatches; expected at least 1")
        check_mesh(self.rules, self.sizes)

    @classmethod
    def from_device(
        cls,
        device: DeviceConfig,
        device_count: int,
        *,
        remat: str = "none",
        microbatches: int = 1,
    ) -> Plan:
        """The plan of a `device` section on so many devices. Raises `ValueError` where the mesh does not fit them."""
        shape, names = mesh_layout(device, device_count)
        how: dict[str, Any] = {"zero": device.zero, "sequence_parallel": device.sequence_parallel}
        rules = combine(strategies_for(names, fsdp_min_weight_size=device.fsdp_min_weight_size, **how))
        return cls(shape, names, rules, remat, microbatches)

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis -> size."""
        return dict(zip(self.axis_names, self.mesh_shape, strict=True))

    @property
    def device_count(self) -> int:
        """Devices the mesh needs."""
        return math.prod(self.mesh_shape)

    def make_mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh over `devices`, or over all there are."""
        return create_device_mesh(self.mesh_shape, self.axis_names, devices=devices)

    def execution(self, mesh: Mesh, **how: Any) -> Execution:
        """How a model runs by this plan on `mesh`, whose devices may not be there. `how`: the other fields."""
        return Execution(rules=self.rules, mesh=mesh, remat=self.remat, **how)

    def check_batch(self, batch_size: int) -> None:
        """Raise `ValueError` unless every microbatch divides over the devices that split examples."""
        rule = next((rule for rule in self.rules.activations if rule.name == "batch"), None)
        ways = math.prod(self.sizes[axis] for axis in rule.axes) if rule else 1
        unit = ways * self.microbatches
        if batch_size % unit:
            fits = max(batch_size // unit, 1) * unit
            micro = f" in {self.microbatches} microbatches" if self.microbatches > 1 else ""
            raise ValueError(
                f"training.batch_size {batch_size} does not divide over {ways} devices "
                f"({'+'.join(rule.axes) if rule else ''}){micro}; {fits} would, or {fits + unit}"
            )

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis}={size}" for axis, size in self.sizes.items())
        micro = f", {self.microbatches} microbatches" if self.microbatches > 1 else ""
        return f"mesh {mesh}, remat {self.remat}{micro}"
