"""Strategies that divide the batch: data parallelism, and what of the state its devices divide as well."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, get_args

from artifex.scaling.axes import Names, Rules
from artifex.scaling.mesh_utils import check_count
from artifex.scaling.strategies.base import REST, ShardingStrategy, Table, leading


@dataclasses.dataclass(frozen=True)
class DataParallelStrategy(ShardingStrategy):
    """Every device holds the whole model and works on its part of the batch.

    An array without names is a batch: its first dim is split and must divide.
    """

    axis_name: str = "data"

    label: ClassVar[str] = "data"

    @property
    def claims(self) -> Rules:
        return Rules.of(activations={"batch": self.axis_name}, strategy=self.label)

    def names_for(self, shape: tuple[int, ...], ways: int) -> Names:
        return leading("batch", shape)


@dataclasses.dataclass(frozen=True)
class ZeROStrategy(ShardingStrategy):
    """Data parallelism whose devices also divide the optimizer's state (`stage` 1), or gradients and that state (2),
    while each holds all weights: Rajbhandari et al. 2019 (arXiv:1910.02054). Stage 3 is `FSDPStrategy`.

    Beside FSDP on another axis its devices divide the parts once more. An array without names is a batch.
    """

    axis_name: str = "data"
    stage: Literal[1, 2] = 1

    label: ClassVar[str] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in (1, 2):
            raise ValueError(
                f"ZeRO stage {self.stage!r} is not 1 (optimizer) or 2 (optimizer and gradients); stage 3, which "
                "divides the weights as well, is FSDPStrategy"
            )

    @property
    def divides(self) -> tuple[Table, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("optimizer",) if self.stage == 1 else ("gradients", "optimizer")

    @property
    def claims(self) -> Rules:
        return Rules.of(activations={"batch": self.axis_name}, strategy=self.label)

    def names_for(self, shape: tuple[int, ...], ways: int) -> Names:
        return leading("batch", shape)


@dataclasses.dataclass(frozen=True)
class FSDPStrategy(ShardingStrategy):
    """Data parallelism whose devices also divide the weights, their gradients and the optimizer's state (ZeRO stage 3:
    Rajbhandari et al. 2019, arXiv:1910.02054).

    A weight with no dim of at least `min_weight_size` stays whole. Of the others one dim is split: by name the first
    of `REST` that divides, without names the largest that reaches `min_weight_size` and divides.
    """

    axis_name: str = "fsdp"
    min_weight_size: int = 1024

    label: ClassVar[str] = "fsdp"
    divides: ClassVar[tuple[Table, ...]] = get_args(Table)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("min_weight_size", self.min_weight_size, least=0)

    @property
    def claims(self) -> Rules:
        return Rules.of(
            activations={"batch": self.axis_name},
            min_weight_size={self.axis_name: self.min_weight_size} if self.min_weight_size else None,
            strategy=self.label,
        )

    def should_shard_weight(self, weight: Any) -> bool:
        """Whether some dim of the array reaches `min_weight_size`."""
        return any(size >= self.min_weight_size for size in weight.shape)

    def names_for(self, shape: tuple[int, ...], ways: int) -> Names:
        able = [dim for dim, size in enumerate(shape) if size >= self.min_weight_size and size % ways == 0]
        chosen = max(able, key=lambda dim: shape[dim], default=None)
        return tuple(REST[0] if dim == chosen else None for dim in range(len(shape)))
