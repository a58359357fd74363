"""A model and how it runs: what every sample, score and reconstruction goes through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from artifex.scaling.execution import Execution, execution

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Runner:
    """`model`, its weights in the compute dtype of `execution` and in the shards of its mesh."""

    model: Any
    execution: Execution

    def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """`function(model, *args)`, with every program in it compiled for the mesh, by the rules."""
        with execution(self.execution):
            return function(self.model, *args)
