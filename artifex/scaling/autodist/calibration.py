"""From the arrays that must exist to the bytes that a compiler takes: what its placement adds, by platform."""

from __future__ import annotations

import dataclasses

from artifex.scaling.execution import Platform


@dataclasses.dataclass(frozen=True)
class Calibration:
    """own = factor * heap + constant."""

    factor: float = 1.0
    constant: float = 0.0

    def own(self, heap: float) -> float:
        """Bytes that the step is predicted to take besides its arguments."""
        return self.factor * heap + self.constant


PLATFORMS: dict[Platform, Calibration] = {"cpu": Calibration(), "gpu": Calibration(), "tpu": Calibration()}


def of_platform(platform: Platform) -> Calibration:
    """That of the compiler of a platform."""
    return PLATFORMS[platform]
