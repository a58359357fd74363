"""Which saved steps stay: the newest, every k-th for good, and the best by a metric of their validation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Retention:
    """A step stays while it is one of the `newest`, if `every` divides it, and while it is one of the `best`.

    The best are those with the lowest `metric`; of equal ones the earlier is better. A step without the metric, because
    it was not validated or its value is not finite, is none of them. `every` and `best` 0: none.
    """

    newest: int = 3
    every: int = 0
    best: int = 0
    metric: str = "loss"

    def __post_init__(self) -> None:
        if self.newest < 1:
            raise ValueError(f"keep is {self.newest}; at least 1 step must stay")
        if self.every < 0 or self.best < 0:
            raise ValueError(f"every is {self.every}, best is {self.best}; neither may be below 0")

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Retention:
        """That of a configuration's `checkpoint` section, also of one from before it had all of its fields."""
        names = {"newest": "keep", "every": "keep_every", "best": "keep_best", "metric": "best_metric"}
        return cls(**{ours: section[theirs] for ours, theirs in names.items() if theirs in section})

    def value(self, metadata: Mapping[str, Any]) -> float | None:
        """The metric of a step by what was saved beside its arrays, or None."""
        validation = metadata.get("validation")
        value = validation.get(self.metric) if isinstance(validation, dict) else None
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            return None
        return float(value)

    def kept(self, values: Mapping[int, float | None]) -> dict[int, list[str]]:
        """Of the complete steps, each with its metric: those that stay, ascending, with the reasons."""
        steps = sorted(values)
        judged = sorted((value, step) for step, value in values.items() if value is not None)
        best = {step: f"best {place}, {self.metric} {value:.6g}" for place, (value, step) in enumerate(judged, 1)}
        reasons = {
            step: ["newest"] * (step in steps[-self.newest :])
            + [f"every {self.every}"] * self._for_good(step)
            + [best[step] for _, chosen in judged[: self.best] if chosen == step]
            for step in steps
        }
        return {step: why for step, why in reasons.items() if why}

    def gone(self, values: Mapping[int, float | None], folders: Iterable[int]) -> list[int]:
        """Of all steps that have a folder, those that go: older than the newest, and not kept. One that is damaged goes
        with them, unless `every` divides it."""
        kept, oldest = self.kept(values), min(sorted(values)[-self.newest :], default=0)
        return [step for step in sorted(folders) if step < oldest and step not in kept and not self._for_good(step)]

    def _for_good(self, step: int) -> bool:
        return bool(self.every) and step % self.every == 0
