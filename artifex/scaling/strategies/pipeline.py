"""Pipeline parallelism: consecutive layers on each device of an axis."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self, get_args

from artifex.scaling.axes import Names, Rules, mesh_sizes
from artifex.scaling.mesh_utils import check_count
from artifex.scaling.strategies.base import MeshLike, ShardingStrategy, Table, leading


@dataclasses.dataclass(frozen=True)
class PipelineParallelStrategy(ShardingStrategy):
    """Consecutive layers form `num_stages` stages, one to each device of the axis (None: as many as the axis has).

    Weights outside of the stack, and stacks whose layers do not divide, are divided over the axis as FSDP does. An
    array without names is stacked under a leading `layers` dim, which must divide.
    """

    axis_name: str = "pipeline"
    num_stages: int | None = None

    label: ClassVar[str] = "pipeline"
    divides: ClassVar[tuple[Table, ...]] = get_args(Table)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_stages is not None:
            check_count("num_stages", self.num_stages)

    @property
    def claims(self) -> Rules:
        return Rules.of(params={"layers": self.axis_name}, strategy=self.label)

    def on(self, mesh: MeshLike) -> Self:
        here = super().on(mesh)
        ways = mesh_sizes(mesh)[here.axis_name]
        if self.num_stages not in (None, ways):
            raise ValueError(
                f"num_stages is {self.num_stages}, but mesh axis {here.axis_name!r} has {ways} devices; "
                f"set num_stages={ways}"
            )
        return dataclasses.replace(here, num_stages=ways)

    def names_for(self, shape: tuple[int, ...], ways: int) -> Names:
        return leading("layers", shape)

    def assign_layers_to_stages(self, num_layers: int) -> list[int]:
        """Layers of each stage, as even as can be, the larger ones first: 10 over 4 is [3, 3, 2, 2].

        Raises `ValueError` where there are more stages than layers.
        """
        stages = self._stages()
        if check_count("num_layers", num_layers) < stages:
            raise ValueError(
                f"{num_layers} layers cannot fill {stages} pipeline stages; set num_stages to at most {num_layers}"
            )
        each, more = divmod(num_layers, stages)
        return [each + (stage < more) for stage in range(stages)]

    def get_forward_communication_pattern(self) -> list[tuple[int, int]]:
        """(sender, receiver) of activations: each stage to the next."""
        return [(stage, stage + 1) for stage in range(self._stages() - 1)]

    def get_backward_communication_pattern(self) -> list[tuple[int, int]]:
        """(sender, receiver) of gradients: each stage to the one before, the last stage first."""
        return [(receiver, sender) for sender, receiver in reversed(self.get_forward_communication_pattern())]

    def _stages(self) -> int:
        if self.num_stages is None:
            raise ValueError("num_stages is not set; give it, or take the strategy on a mesh: strategy.on(mesh)")
        return self.num_stages
