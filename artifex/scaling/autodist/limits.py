"""What a plan must keep to besides memory: partition constraints, the largest all-reduce, idle time of a pipeline."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from artifex.config_device import DIVIDING
from artifex.scaling.autodist import stages
from artifex.scaling.autodist.config import AutoDistConfig
from artifex.scaling.autodist.constraints import Limit, Limits, matching, module_matches, read
from artifex.scaling.autodist.estimate import Estimate
from artifex.scaling.autodist.sketch import Leaf
from artifex.scaling.autodist.spread import Spread
from artifex.scaling.axes import Rules, resolve
from artifex.scaling.names import ACTIVATION_AXES
from artifex.scaling.placement import size_text
from artifex.scaling.strategies.pipeline import PipelineParallelStrategy


@dataclasses.dataclass(frozen=True)
class Limiting:
    """The limits of one search. `unused`: constraints that match nothing."""

    limits: Limits
    leaves: tuple[Leaf, ...]
    max_all_reduce: int | None
    small: int = 0  # elements: a parameter of fewer stays whole
    blocks: tuple[stages.Block, ...] = ()  # that a pipeline divides
    max_bubble: float = 1.0
    max_unbalance: float = 0.0
    pivots: tuple[int, ...] = ()  # blocks that may begin a stage, all where there are none
    unknown_pivots: tuple[str, ...] = ()
    unknown_modules: tuple[str, ...] = ()  # that were to be computed again

    @classmethod
    def of(cls, config: AutoDistConfig, leaves: tuple[Leaf, ...], blocks: int | None = None) -> Limiting:
        """Read from the options, for a model of such parameters and repeated blocks. Raises `ConfigError` for a file
        that is none, or says two things."""
        path = config.partition_constraints_path
        found = read(path) if path else ()
        names = {leaf.path: leaf.names for leaf in leaves}
        limits = matching(found, names, tuple(ACTIVATION_AXES))
        small = config.ignore_small_tensor_threshold
        stack = next((leaf.path.split("/")[0] for leaf in leaves if "layers" in leaf.names), "layers")
        names_of = [f"{stack}/{index}" for index in range(blocks or 0)]
        at = {
            pattern: [index for index, name in enumerate(names_of) if module_matches(pattern, name)]
            for pattern in config.pivot_patterns
        }
        return cls(
            limits,
            leaves,
            config.max_all_reduce_bytes,
            small,
            tuple(stages.Block(name, 1.0, 2.0) for name in names_of),  # repeated, so all alike; 2 for the way back
            config.max_pipeline_bubble_ratio,
            config.max_pipeline_unbalance_ratio,
            tuple(sorted({index for found in at.values() for index in found})),
            tuple(pattern for pattern, found in at.items() if not found),
            tuple(name for name in config.recompute_patterns if not modules_matching((name,), leaves)),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Constraints, pivots and modules that are about nothing of this model."""
        pivots = [f"pivot {name!r} names no block of this model, and limits nothing" for name in self.unknown_pivots]
        again = [
            f"recompute_modules {name!r} names no module of this model: all its blocks are computed again"
            for name in self.unknown_modules
        ]
        unused = [f"constraint on {one} is about nothing of this model" for one in self.limits.unused]
        return (*unused, *pivots, *again)

    def cut(self, spread: Spread) -> str:
        """Why the cut of the blocks into a spread's stages, as even as can be, does not keep to the limits, "" where it
        does."""
        schedule = spread.plan().pipeline
        if schedule is None:
            return ""
        begins = _begins(len(self.blocks), schedule.stages)
        if wrong := [begin for begin in begins if begin and self.pivots and begin not in self.pivots]:
            at = ", ".join(self.blocks[begin].name for begin in self.pivots)
            return (
                f"a stage would begin at {self.blocks[wrong[0]].name}, pipeline_pivots allow {at}; stages are as even "
                f"as can be, so {schedule.stages} begin at {', '.join(self.blocks[begin].name for begin in begins)}"
            )
        how: dict[str, Any] = {
            "pivots": begins[1:],
            "max_bubble": self.max_bubble,
            "max_unbalance": self.max_unbalance,
        }
        if schedule.stages_per_device > 1:
            bubble = schedule.bubble()
            return f"idle {bubble:.0%}, more than {self.max_bubble:.0%}" if bubble > self.max_bubble + 1e-9 else ""
        kind = "gpipe" if schedule.kind == "gpipe" else "1f1b"
        return _why_none(self.blocks, schedule.devices, schedule.microbatches, kind, tuple(how.items()))

    def kept(self, spread: Spread) -> Spread | None:
        """The spread with what must stay whole left so, None where it cannot keep to the constraints."""
        whole = set(spread.whole)
        rules, sizes = spread.plan().rules, spread.mesh
        for leaf in self.leaves:
            if 1 < leaf.size < self.small and _divides_the_rest(spread):
                whole.add(leaf.path)
            for dim, limit in self._of(leaf):
                if limit.allows(_axes(leaf, dim, rules.of_path(leaf.path), sizes)):
                    continue
                # what claims its dims divides it even where it is whole
                left = limit.allows(_axes(leaf, dim, rules.claimed, sizes))
                if limit.must_divide or not left or not _divides_the_rest(spread):
                    return None
                whole.add(leaf.path)
        for name in self.limits.axes.keys() & set(ACTIVATION_AXES):
            over = [axis for rule in rules.activations if rule.name == name for axis in rule.axes]
            if not self.limits.axes[name].allows([axis for axis in over if sizes.get(axis, 1) > 1]):
                return None
        return dataclasses.replace(spread, whole=tuple(sorted(whole))) if whole else spread

    def _of(self, leaf: Leaf) -> Iterator[tuple[int | None, Limit]]:
        """The limits on a parameter as a whole, None, and on its dims."""
        if leaf.path in self.limits.parameters:
            yield None, self.limits.parameters[leaf.path]
        for dim, name in enumerate(leaf.names):
            if name in self.limits.axes:
                yield dim, self.limits.axes[name]

    def refuses(self, found: Estimate, sizes: Mapping[str, int]) -> str:
        """Why an estimated spread over a mesh of `sizes` is refused, "" where it is not."""
        if self.max_all_reduce is not None:
            summed = [(one, math.prod(sizes[axis] for axis in one.axes)) for one in found.sends]
            most = max((one.bytes * n / (2 * (n - 1)) for one, n in summed if one.kind == "all-reduce"), default=0.0)
            if most > self.max_all_reduce:
                return f"an all-reduce of {size_text(most)}, max_all_reduce_size is {size_text(self.max_all_reduce)}"
        return ""


def modules_matching(patterns: Iterable[str], leaves: Iterable[Leaf]) -> tuple[str, ...]:
    """The paths of modules, "layers/attention", that patterns match, the model itself as "ROOT"."""
    paths: dict[str, None] = {}
    for leaf in leaves:
        parts = leaf.path.split("/")
        paths |= {"/".join(parts[:depth]): None for depth in range(1, len(parts))}
    patterns = tuple(patterns)
    found = tuple(path for path in paths if any(module_matches(each, path) for each in patterns if each != "ROOT"))
    return ("ROOT", *found) if "ROOT" in patterns else found


@functools.lru_cache(4096)
def _begins(blocks: int, stages: int) -> tuple[int, ...]:
    sizes = PipelineParallelStrategy(num_stages=stages).assign_layers_to_stages(blocks)
    return tuple(itertools.accumulate(sizes[:-1], initial=0))


@functools.lru_cache(4096)
def _why_none(blocks: tuple[stages.Block, ...], count: int, microbatches: int, schedule: Any, how: tuple) -> str:
    return stages.why_none(blocks, count, microbatches, schedule=schedule, **dict(how))


def _divides_the_rest(spread: Spread) -> bool:
    return spread.zero > 0 or any(spread.of(axis) > 1 for axis in DIVIDING)


def _axes(leaf: Leaf, dim: int | None, rules: Rules, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes that divide one dim of a parameter, or any without."""
    every = {**dict.fromkeys(rules.mesh_axes, 1), **sizes}
    spec = resolve(leaf.names, leaf.shape, rules.params, every, rules.min_weight_size).spec
    entries = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
    entries += [()] * (len(leaf.shape) - len(entries))
    return tuple(axis for entry in (entries if dim is None else entries[dim : dim + 1]) for axis in entry)
