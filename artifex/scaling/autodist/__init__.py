"""The planner, from a model and a cluster to a plan: `plan`, its options, its answer. Importing this imports no JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from artifex.scaling.autodist.config import AutoDistConfig, optimizer_coefficients

if TYPE_CHECKING:
    from artifex.scaling.autodist.planned import Planned
    from artifex.scaling.autodist.planner import plan

__all__ = ["AutoDistConfig", "Planned", "optimizer_coefficients", "plan"]


def __getattr__(name: str) -> Any:
    if name == "plan":
        from artifex.scaling.autodist.planner import plan

        return plan
    if name == "Planned":
        from artifex.scaling.autodist.planned import Planned

        return Planned
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
