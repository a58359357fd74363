"""Rules: which mesh axes each logical axis is split over, who asked for it, and which parameters are kept from it."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from artifex.scaling.names import ACTIVATION_AXES, SHARED_BY_STRATEGIES, WEIGHT_AXES, check_name


@dataclasses.dataclass(frozen=True)
class Rule:
    """`name` is split over the mesh axes `axes`, in this order; `strategy` says who asked for it. `rest`: nobody claims
    the name, and these axes divide whatever is left."""

    name: str
    axes: tuple[str, ...]
    strategy: str
    rest: bool = dataclasses.field(default=False, repr=False)

    def __str__(self) -> str:
        axes = "+".join(self.axes)
        return f"{self.name} -> {axes}" + (f" ({self.strategy})" if self.strategy != axes else "")


def _table(entries: Mapping[str, str | Sequence[str] | None], known: Iterable[str], strategy: str) -> tuple[Rule, ...]:
    rules = []
    for name, axes in entries.items():
        check_name(name, known)
        axes = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        if len(set(axes)) != len(axes):
            raise ValueError(f"rule {name!r} -> {axes} of {strategy} names a mesh axis twice; name each once")
        if axes:
            rules.append(Rule(name, axes, strategy))
    return tuple(rules)


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which mesh axes each logical axis is split over: tables for parameters, gradients, optimizer, and activations.

    Within a table the order is the priority: where two dims of one tensor ask for the same mesh axis, or two rules
    speak of one dim, the earlier rule gets it. `min_weight_size` maps a mesh axis to the smallest size a weight must
    have in at least one dim to be split over that axis at all. `whole` are shell patterns of the paths of parameters,
    in which * also spans "/", whose dims are split by what is claimed alone.

    Build one with `Rules.of`, combine with `union`; ZeRO-1, ZeRO-2 and FSDP differ only in their tables.
    """

    params: tuple[Rule, ...] = ()
    gradients: tuple[Rule, ...] = ()
    optimizer: tuple[Rule, ...] = ()
    activations: tuple[Rule, ...] = ()
    min_weight_size: tuple[tuple[str, int], ...] = ()
    whole: tuple[str, ...] = dataclasses.field(default=(), repr=False)

    @classmethod
    def of(
        cls,
        params: Mapping[str, Any] | None = None,
        activations: Mapping[str, Any] | None = None,
        *,
        gradients: Mapping[str, Any] | None = None,
        optimizer: Mapping[str, Any] | None = None,
        min_weight_size: Mapping[str, int] | None = None,
        strategy: str = "rules",
    ) -> Rules:
        """Tables from mappings name -> mesh axis, several, or None; those of gradients and optimizer are the
        parameters' unless given."""
        of_params = _table(params or {}, WEIGHT_AXES, strategy)
        of_gradients = of_params if gradients is None else _table(gradients, WEIGHT_AXES, strategy)
        of_optimizer = of_params if optimizer is None else _table(optimizer, WEIGHT_AXES, strategy)
        of_activations = _table(activations or {}, ACTIVATION_AXES, strategy)
        return cls(of_params, of_gradients, of_optimizer, of_activations, tuple((min_weight_size or {}).items()))

    def union(self, other: Rules) -> Rules:
        """Both rule sets together; `batch` and `sequence` are shared, and `sequence` comes last: what a layer computes
        with goes before the stream between layers.

        Raises `ValueError` for a name sent to two places, naming both strategies.
        """
        return Rules(
            _union(self.params, other.params),
            _union(self.gradients, other.gradients),
            _union(self.optimizer, other.optimizer),
            _union(self.activations, other.activations),
            tuple((dict(self.min_weight_size) | dict(other.min_weight_size)).items()),
            tuple(dict.fromkeys(self.whole + other.whole)),
        )

    def by_rows(self) -> Rules:
        """The rules with the mesh axes of `sequence` added to those of `batch`, but for those that split what is
        computed with."""
        axes_of = {rule.name: rule.axes for rule in self.activations}
        busy = {axis for name, over in axes_of.items() if name not in SHARED_BY_STRATEGIES for axis in over}
        more = [axis for axis in axes_of.get("sequence", ()) if axis not in busy]
        over = tuple(dict.fromkeys((*axes_of.get("batch", ()), *more)))
        rest = tuple(rule for rule in self.activations if rule.name not in SHARED_BY_STRATEGIES)
        return dataclasses.replace(self, activations=(Rule("batch", over, "rows"), *rest) if over else rest)

    def without(self, name: str) -> Rules:
        """The rules but those for one logical axis."""
        tables = ("params", "gradients", "optimizer", "activations")
        kept = {table: tuple(rule for rule in getattr(self, table) if rule.name != name) for table in tables}
        return dataclasses.replace(self, **kept)

    def of_path(self, path: str) -> Rules:
        """The rules for the parameter at `path`, "norm/scale": those that are claimed, where `whole` has it."""
        return self.claimed if any(fnmatch.fnmatchcase(path, pattern) for pattern in self.whole) else self

    @property
    def claimed(self) -> Rules:
        """The rules but those that divide what nobody claims."""
        tables = ("params", "gradients", "optimizer")
        kept = {table: tuple(rule for rule in getattr(self, table) if not rule.rest) for table in tables}
        return dataclasses.replace(self, **kept)

    @property
    def everything(self) -> tuple[Rule, ...]:
        """The parameter and the activation table as one: their names never meet."""
        return self.params + self.activations

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        """Every mesh axis a rule names, in order of appearance."""
        rules = self.params + self.gradients + self.optimizer + self.activations
        return tuple(dict.fromkeys(axis for rule in rules for axis in rule.axes))


def _union(first: tuple[Rule, ...], second: tuple[Rule, ...]) -> tuple[Rule, ...]:
    merged = {rule.name: rule for rule in first}
    for rule in second:
        have = merged.get(rule.name)
        if have is None or have.axes == rule.axes:
            merged[rule.name] = have or rule
        elif rule.name in SHARED_BY_STRATEGIES:
            axes = tuple(dict.fromkeys(have.axes + rule.axes))
            merged[rule.name] = Rule(rule.name, axes, f"{have.strategy}+{rule.strategy}")
        else:
            raise ValueError(
                f"logical axis {rule.name!r} is sent to two places: {have.strategy} maps it to {have.axes}, "
                f"{rule.strategy} to {rule.axes}; leave one of the two strategies out or give them one mesh axis"
            )
    return tuple(sorted(merged.values(), key=lambda rule: rule.name == "sequence"))
