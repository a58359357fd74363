"""What a plan must keep to besides memory: partition constraints, the largest all-reduce, idle time of a pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from artifex.scaling.autodist.config import AutoDistConfig
from artifex.scaling.autodist.constraints import Limits, matching, read
from artifex.scaling.autodist.estimate import Estimate
from artifex.scaling.autodist.sketch import Leaf
from artifex.scaling.autodist.spread import Spread
from artifex.scaling.axes import Rules, resolve
from artifex.scaling.names import ACTIVATION_AXES
from artifex.scaling.placement import size_text


@dataclasses.dataclass(frozen=True)
class Limiting:
    """The limits of one search. `unused`: constraints that match nothing."""

    limits: Limits
    leaves: tuple[Leaf, ...]
    max_all_reduce: int | None
    max_bubble: float
    small: int = 0  # elements: a parameter of fewer stays whole

    @classmethod
    def of(cls, config: AutoDistConfig, leaves: tuple[Leaf, ...]) -> Limiting:
        """Read from the options. Raises `ConfigError` for a file that is none, or says two things."""
        path = config.partition_constraints_path
        found = read(path) if path else ()
        names = {leaf.path: leaf.names for leaf in leaves}
        limits = matching(found, names, tuple(ACTIVATION_AXES))
        small = config.ignore_small_tensor_threshold
        return cls(limits, leaves, config.max_all_reduce_bytes, config.max_pipeline_bubble_ratio, small)

    @property
    def unused(self) -> tuple[str, ...]:
        """Constraints that are about nothing of this model."""
        return tuple(str(one) for one in self.limits.unused)

    def kept(self, spread: Spread) -> Spread | None:
        """The spread with what must stay whole left so, None where it cannot keep to the constraints."""
        if spread.of("pipeline") > 1:
            schedule = spread.plan().pipeline
            if schedule is not None and schedule.bubble() > self.max_bubble:
                return None
        whole = set(spread.whole)
        rules, sizes = spread.plan().rules, spread.mesh
        for leaf in self.leaves:
            if 1 < leaf.size < self.small:
                whole.add(leaf.path)
            limit = self.limits.parameters.get(leaf.path)
            if limit is None:
                continue
            if limit.allows(_axes(leaf, rules, sizes)):
                continue
            if limit.must_divide or not limit.allows(_axes(leaf, rules.of_path(leaf.path), sizes)):
                return None
            whole.add(leaf.path)
        for name, limit in self.limits.axes.items():
            table = rules.activations if name in ACTIVATION_AXES else rules.params
            over = [axis for rule in table if rule.name == name for axis in rule.axes if sizes.get(axis, 1) > 1]
            if not limit.allows(tuple(over)):
                return None
        return dataclasses.replace(spread, whole=tuple(sorted(whole))) if whole else spread

    def refuses(self, found: Estimate) -> str:
        """Why an estimated spread is refused, "" where it is not."""
        if self.max_all_reduce is not None:
            most = max((one.bytes / 2 for one in found.sends if one.kind == "all-reduce"), default=0.0)
            if most > self.max_all_reduce:
                return f"an all-reduce of {size_text(most)}, max_all_reduce_size is {size_text(self.max_all_reduce)}"
        return ""


def _axes(leaf: Leaf, rules: Rules, sizes: Mapping[str, int]) -> tuple[str, ...]:
    every = {**dict.fromkeys(rules.mesh_axes, 1), **sizes}
    spec = resolve(leaf.names, leaf.shape, rules.params, every, rules.min_weight_size).spec
    return tuple(axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ()))
