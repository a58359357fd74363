"""A way to run a model, as changes to a run's configuration; and the ways of a space, in the order to try them in."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from artifex.config import Config
from artifex.scaling.autodist.planned import shortest
from artifex.scaling.autodist.spread import Spread
from artifex.tuning.space import Space


@dataclasses.dataclass(frozen=True)
class Way:
    """`spread`: how the run is spread, None as it says itself; `fields` of `training` that are changed, with values."""

    spread: Spread | None = None
    fields: tuple[tuple[str, Any], ...] = ()

    def config(self, run: Config) -> Config:
        """The run done so. Raises `ValueError` where its sections contradict each other."""
        if self == Way():
            return run
        values = run.to_dict()
        if self.spread is not None:
            values["device"] = self.spread.device
            values["training"] |= self.spread.training
        values["training"] |= dict(self.fields)
        return Config.from_dict(values)

    @property
    def parts(self) -> tuple[Way, ...]:
        """Its changes, each as a way of its own."""
        found = [] if self.spread is None else [Way(self.spread)]
        return (*found, *(Way(None, (field,)) for field in self.fields))

    def and_(self, other: Way) -> Way:
        """Both changes; those of `other` win."""
        fields = {**dict(self.fields), **dict(other.fields)}
        return Way(other.spread or self.spread, tuple(sorted(fields.items())))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which `from_dict` takes."""
        return {"spread": None if self.spread is None else dataclasses.asdict(self.spread), "fields": dict(self.fields)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Way:
        """Raises `TypeError`, `KeyError` or `ValueError` for what is none."""
        spread = values["spread"]
        return cls(None if spread is None else spread_of(spread), tuple(sorted(dict(values["fields"]).items())))

    def __str__(self) -> str:
        said = [] if self.spread is None else [str(shortest(self.spread))]
        said += [f"{NAMES.get(name, name)} {value}" for name, value in self.fields]
        return ", ".join(said) or "as configured"


def named(way: Way) -> str:
    """A way within a sentence."""
    return "the run as configured" if way == Way() else str(way)


NAMES = {"gradient_accumulation": "microbatches", "batch_size": "batch"}
"""A field of `training` -> what a table calls it."""


def spread_of(values: Mapping[str, Any]) -> Spread:
    """A `Spread` of the plain values that JSON gives back."""
    found = dict(values)
    found["sizes"] = tuple((str(axis), int(size)) for axis, size in found["sizes"])
    found["whole"] = tuple(found.get("whole", ()))
    return Spread(**found)


def single(run: Config, space: Space, spreads: Sequence[Spread], at: Spread) -> list[Way]:
    """The run as it is, and what differs from it in one thing: the planner's spreads, but for `at`, the run's own, best
    first, then each value of each field. What contradicts itself, such as microbatches that do not divide the batch, is
    left out."""
    ways = [Way()] + [Way(spread) for spread in spreads if shortest(spread) != shortest(at)]
    for name, values in space.fields:
        own = getattr(run.training, name)
        ways += [Way(None, ((name, value),)) for value in values if value != own]
    return [way for way in dict.fromkeys(ways) if is_possible(way, run)]


def combined(helpful: Mapping[Way, float], run: Config, known: Sequence[Way]) -> Iterator[Way]:
    """Ways of two changes or more, each of which was alone of help, the most promising first: as if the shares of time
    that they take (`helpful`, below 1) multiplied. Not those that are `known`."""
    by_dim: dict[str, list[Way]] = {}
    for way in helpful:
        by_dim.setdefault("spread" if way.spread is not None else way.fields[0][0], []).append(way)
    found: dict[Way, float] = {}
    for chosen in itertools.product(*([None, *ways] for ways in by_dim.values())):
        changes = [way for way in chosen if way is not None]
        if len(changes) < 2:
            continue
        share, whole = 1.0, Way()
        for change in changes:
            share, whole = share * helpful[change], whole.and_(change)
        if whole not in known and is_possible(whole, run):
            found[whole] = share
    yield from sorted(found, key=lambda way: (found[way], len(way.parts)))


def is_possible(way: Way, run: Config) -> bool:
    """Whether the sections of the run done so go together."""
    try:
        way.config(run)
    except ValueError:
        return False
    return True
