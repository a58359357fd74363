"""What the planner must know of what it plans: a step under any spread, and the parameters by name."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from artifex.scaling.autodist.estimate import Traced
from artifex.scaling.autodist.spread import Spread
from artifex.scaling.execution import Platform


class Subject(Protocol):
    """A run, or any module with a loss. `rows` of a batch; `dtype` of products; `blocks` that a pipeline may divide,
    None where there are none; `unnamed`: parameters without names, which every device holds whole."""

    @property
    def name(self) -> str: ...

    @property
    def rows(self) -> int: ...

    @property
    def dtype(self) -> str: ...

    @property
    def blocks(self) -> int | None: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def unnamed(self) -> tuple[str, ...]: ...

    leaves: Any  # tuple[Leaf, ...]

    def check(self, spread: Spread) -> None:
        """Raise `ValueError` where the spread does not fit model or batch; traces nothing."""
        ...

    def traced(self, spread: Spread, platform: Platform) -> Traced:
        """The step, traced for devices that need not be there. Raises `ValueError` where the spread does not fit."""
        ...

    def about(self) -> dict[str, Any]:
        """What a plan file says it is for."""
        ...


@runtime_checkable
class Infers(Protocol):
    """A subject that can be planned without its training."""

    def inferring(self) -> Subject: ...
