"""What a tune may vary, and the values of each: by default, or as asked in a line or a mapping. Imports no JAX.

Space.parse("unroll=auto,1 attention=tiles,blockwise remat=none,full,qkv=keep+attention=keep")
Space.parse({"batch_size": [16, 32], "axes": ["data", "fsdp"]})
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from artifex.config import TrainingConfig
from artifex.config_io import ConfigError, did_you_mean, scalar, shown
from artifex.scaling.autodist.constraints import AXES

FIELDS = ("unroll", "attention", "remat", "gradient_accumulation", "batch_size")
"""Fields of `training` that may vary, in the order in which they are tried."""

ALL_AXES = ("mixed", "mixed_parallel")
KNOWN = (*FIELDS, "axes")


@dataclasses.dataclass(frozen=True)
class Space:
    """Field of `training` -> the values that it may have besides the run's own; `axes` of the mesh that the planner may
    make larger than 1, none of them where the run's own mesh stands."""

    fields: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    axes: tuple[str, ...] = ()

    @classmethod
    def parse(cls, asked: str | Mapping[str, Any], base: Space | None = None) -> Space:
        """What was asked for. A name without values has those of `base`; text alone that names all axes adds them to
        `base`. Raises `ConfigError` for names and values that are none."""
        base = base or cls()
        if isinstance(asked, str) and asked.strip() in ALL_AXES:
            return dataclasses.replace(base, axes=AXES)
        pairs = dict(_pairs(asked)) if isinstance(asked, str) else dict(asked)
        if not pairs:
            raise ConfigError(f"is empty; name what may vary, of {', '.join(KNOWN)}", ("space",))
        found: dict[str, tuple[Any, ...]] = {}
        for name, values in pairs.items():
            if name not in KNOWN:
                raise ConfigError(f"is unknown; {did_you_mean(str(name), KNOWN)}", ("space", str(name)))
            found[name] = _values(name, values, base)
        axes = found.pop("axes", ())
        return cls(tuple((name, found[name]) for name in FIELDS if name in found), axes)

    def of(self, name: str) -> tuple[Any, ...]:
        """The values of a field, none where it does not vary."""
        return dict(self.fields).get(name, ())

    def __str__(self) -> str:
        parts = [f"{name}={','.join(map(_text, values))}" for name, values in self.fields]
        return " ".join([*parts, *([f"axes={','.join(self.axes)}"] if self.axes else [])]) or "nothing"


def default(
    platform: str, devices: int, *, objective: str, stacked: bool, attention: Collection[str], rows: int
) -> Space:
    """What varies unless it is said. `platform` "cpu", "gpu" or "tpu"; `stacked`: the model repeats blocks;
    `attention`: the implementations that its step takes as configured, none where it attends to nothing; `rows`: of its
    batch.

    On several devices mesh, recomputation and microbatches come from the planner. The batch size stays: another one
    is another training.
    """
    one = devices == 1
    fields: dict[str, tuple[Any, ...]] = {}
    if stacked:
        fields["unroll"] = ("auto", 1) if one and platform == "cpu" else ("auto", 2, 4)
    if attention and "ring" not in attention:  # which is the one for parts of a sequence
        kinds = {"cpu": ("tiles", "blockwise"), "gpu": ("cudnn", "blockwise"), "tpu": ("splash", "blockwise")}[platform]
        fields["attention"] = ("auto", *(kind for kind in kinds if {kind} != {*attention}))
    if one:
        counts = (1, 2, 4, 8) if objective == "memory" else (1, 2, 4)
        fields["gradient_accumulation"] = tuple(count for count in counts if rows % count == 0)
        if stacked:
            fields["remat"] = ("none", "dots", "full") if objective == "memory" or platform != "cpu" else ("none",)
    return Space(tuple((name, fields[name]) for name in FIELDS if name in fields), () if one else AXES)


def _pairs(text: str) -> Iterator[tuple[str, Any]]:
    """`unroll=auto,1 axes=data attention` as pairs of a name and its values, None where it has none."""
    seen: set[str] = set()
    for word in text.replace(";", " ").split():
        name, equals, values = word.partition("=")
        if name in seen:
            raise ConfigError("is given twice; keep one of them", ("space", name))
        seen.add(name)
        yield name.replace("-", "_"), [part.replace("+", ",") for part in values.split(",")] if equals else None


def _values(name: str, values: Any, base: Space) -> tuple[Any, ...]:
    """The values of one dim, as its field has them."""
    key = ("space", name)
    if values is None:
        return (base.axes or AXES) if name == "axes" else _known(name, base)
    listed = list(values) if isinstance(values, list | tuple) else [values]
    if not listed or "" in listed:
        raise ConfigError(f"has no value, got {shown(values)}; give some, as in {name}=A,B", key)
    if name == "axes":
        if len(listed) == 1 and listed[0] in ALL_AXES:
            return AXES
        for axis in listed:
            if axis not in AXES:
                raise ConfigError(f"{shown(axis)} is no mesh axis; {did_you_mean(str(axis), AXES)}", key)
        return tuple(dict.fromkeys(listed))
    return tuple(dict.fromkeys(_value(name, value) for value in listed))


def _known(name: str, base: Space) -> tuple[Any, ...]:
    if values := base.of(name):
        return values
    raise ConfigError(f"has no values of its own here; give some, as in {name}=A,B", ("space", name))


def _value(name: str, value: Any) -> Any:
    """A value of a field of `training`, checked as that is."""
    value = scalar(value) if isinstance(value, str) and name != "remat" else value
    try:
        return getattr(TrainingConfig(**{name: value}), name)
    except ConfigError as error:
        raise ConfigError(error.says, ("space", name)) from None


def _text(value: Any) -> str:
    return str(value).replace(",", "+")
