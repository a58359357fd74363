"""From the heap of the arrays that must exist to what a compiler takes: a factor by platform and kind of program.

Fitted by `benchmarks/planner/score.py` on some families of models, and scored on the others: docs/scaling/planner.md.
"""

from __future__ import annotations

import dataclasses

from artifex.scaling.execution import Platform


@dataclasses.dataclass(frozen=True)
class Calibration:
    """`factor` times the heap; `convolving` of programs with convolutions, of whose operands a CPU keeps copies."""

    factor: float = 1.0
    convolving: float = 1.0

    def own(self, heap: float, convolutions: bool) -> float:
        """Bytes that the step is predicted to take besides its arguments."""
        return heap * (self.convolving if convolutions else self.factor)


PLATFORMS: dict[Platform, Calibration] = {
    "cpu": Calibration(factor=1.04),
    "gpu": Calibration(factor=1.01, convolving=1.11),
    "tpu": Calibration(),
}
"""Of TPUs as many plans were compiled as docs/scaling/planner.md lists, too few to fit a factor to."""


def of_platform(platform: Platform) -> Calibration:
    """That of the compiler of a platform."""
    return PLATFORMS[platform]
