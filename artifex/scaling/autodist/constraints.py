"""What may divide which weight, as the user says it: a YAML list over modules, parameters and logical axes.

    - {module: attention, allowed_axes: [tensor, fsdp]}   # every module whose path ends so, and what is in it
    - {parameter: "embed/*", replicate: true}             # whole on every device
    - {axis: experts, allowed_axes: [expert], replicate: false}  # divided, and by that

A path of a module or parameter has "/" or "." between its parts. Imports no JAX.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import re
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import yaml
from pydantic import Field, field_validator, model_validator

from artifex.config_io import ConfigError, ConfigTypeError, _text, _yaml, did_you_mean, shown
from artifex.config_section import Section
from artifex.scaling.names import VOCABULARY, Names

Axis = Literal["data", "fsdp", "tensor", "pipeline", "expert", "context"]
AXES: tuple[str, ...] = typing.get_args(Axis)
"""The mesh axes that a plan may have."""

Kind = Literal["module", "parameter", "axis"]
KINDS: tuple[Kind, ...] = typing.get_args(Kind)


@dataclasses.dataclass(frozen=True)
class Constraint:
    """`allowed`: the mesh axes that may divide what `pattern` matches, None for any, () for none; `must_divide`: one of
    them has to. `line` and `source` say where it stands, 0 and "" for one made in code."""

    kind: Kind
    pattern: str
    allowed: tuple[str, ...] | None = None
    must_divide: bool = False
    line: int = 0
    source: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.pattern!r}" + (f" (line {self.line})" if self.line else "")

    @property
    def says(self) -> str:
        """What it asks for, in words."""
        if self.allowed == ():
            return "stays whole"
        only = "" if self.allowed is None else f" by {' or '.join(self.allowed)} alone"
        return f"{'must' if self.must_divide else 'may'} be divided{only}"

    def matches(self, path: str) -> bool:
        """Whether it is a constraint on the parameter `path`; one on an axis is on none."""
        if self.kind == "module":
            parts = re.split("[./]", path)
            return any(module_matches(self.pattern, "/".join(parts[:depth])) for depth in range(len(parts)))
        return self.kind == "parameter" and fnmatch.fnmatchcase(_slashes(path), _slashes(self.pattern))


class Limit(NamedTuple):
    """All that constraints say of one parameter, or of the dims of one name; as in `Constraint`."""

    allowed: tuple[str, ...] | None = None
    must_divide: bool = False

    def allows(self, dividing: Collection[str]) -> bool:
        """Whether it may be divided by these mesh axes, of more than one device each."""
        return (self.allowed is None or set(dividing) <= set(self.allowed)) and bool(dividing or not self.must_divide)


class Limits(NamedTuple):
    """`parameters`: path -> limit on the whole parameter; `axes`: logical name -> limit on each dim of that name; what
    is in neither is free. `unused`: the constraints that match nothing."""

    parameters: Mapping[str, Limit]
    axes: Mapping[str, Limit]
    unused: Sequence[Constraint]


def module_matches(pattern: str, path: str) -> bool:
    """Whether the module `path` ends in the parts of `pattern`: "layer" matches "transformer.layer", but no "my_layer".

    Within a part * and ? are those of a shell: "encoder/*/mlp". "ROOT" matches every module, and alone the model, "".
    """
    wanted, parts = re.split("[./]", pattern), re.split("[./]", path)
    if pattern == "ROOT" or not path or len(wanted) > len(parts):
        return pattern == "ROOT"
    return all(fnmatch.fnmatchcase(part, want) for part, want in zip(parts[-len(wanted) :], wanted, strict=True))


def module_patterns(text: str) -> tuple[str, ...]:
    """Patterns of modules from text with commas between. Raises `ConfigError` where one has an empty part."""
    patterns = tuple(name.strip() for name in text.split(",")) if text else ()
    if not all(part.strip() for pattern in patterns for part in re.split("[./]", pattern)):
        raise ConfigError(f"must be module names with commas between, such as 'encoder.layer,mlp', got {shown(text)}")
    return patterns


def read(path: str | Path) -> tuple[Constraint, ...]:
    """The constraints of a YAML file. Raises `ConfigError` naming the file, the line and the key."""
    try:
        text = _text(Path(path))
        entries = _yaml(text)
        if not isinstance(entries, list):
            example = "- {module: attention, allowed_axes: [tensor]}"
            raise ConfigTypeError(f"must hold a list of constraints, such as {example!r}, got {shown(entries)}")
    except ConfigError as error:
        raise error.within(source=str(path)) from None
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(node, yaml.SequenceNode)
    return tuple(_constraint(entry, at, str(path)) for entry, at in zip(entries, node.value, strict=True))


def matching(
    constraints: Iterable[Constraint], parameters: Mapping[str, Names], activations: Iterable[str] = ()
) -> Limits:
    """What `constraints` mean for parameters, given as path -> logical names, and for the names of `activations`.

    Raises `ConfigError` that names both where two of them contradict each other.
    """
    constraints = list(constraints)
    names = {name for dims in parameters.values() for name in dims if name} | set(activations)
    by_axis = {
        name: found
        for name in sorted(names)
        if (found := [c for c in constraints if (c.kind, c.pattern) == ("axis", name)])
    }
    by_path = {path: found for path in parameters if (found := [c for c in constraints if c.matches(path)])}
    for name, found in by_axis.items():
        _check(found, found, f"axis {name!r}")
    for path, dims in parameters.items():
        _check_parameter(path, by_path.get(path, []), {name: by_axis.get(name, []) for name in dims if name})
    used = {id(c) for found in (*by_axis.values(), *by_path.values()) for c in found}
    return Limits(
        {path: _limit(found) for path, found in by_path.items()},
        {name: _limit(found) for name, found in by_axis.items()},
        [c for c in constraints if id(c) not in used],
    )


class _Entry(Section):
    """A constraint as a file has it."""

    module: Annotated[str, Field(min_length=1)] | None = None
    parameter: Annotated[str, Field(min_length=1)] | None = None
    axis: str | None = None
    allowed_axes: list[Axis] | None = None
    replicate: bool | None = None

    @field_validator("module")
    @classmethod
    def _one_module(cls, value: str | None) -> str | None:
        if value is not None and len(module_patterns(value)) > 1:
            raise ConfigError(f"must be one module, got {shown(value)}; give each a constraint of its own")
        return value

    @field_validator("axis")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in VOCABULARY:
            raise ConfigError(f"{shown(value)} is no logical axis; {did_you_mean(value, VOCABULARY)}")
        return value

    @field_validator("allowed_axes", mode="before")
    @classmethod
    def _known_axes(cls, value: Any) -> Any:
        for name in value if isinstance(value, list) else []:
            if isinstance(name, str) and name not in AXES:
                raise ConfigError(f"lists {shown(name)}, no mesh axis; {did_you_mean(name, AXES)}")
        return value

    @model_validator(mode="after")
    def _says_one_thing_of_one_thing(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            what = " and ".join(given) or "none of them"
            raise ConfigError(f"a constraint is about one of module, parameter and axis, got {what}")
        if self.allowed_axes is None and self.replicate is None:
            raise ConfigError(f"the constraint on {given[0]} says nothing; give allowed_axes or replicate")
        if self.replicate and self.allowed_axes:
            raise ConfigError(f"is true beside allowed_axes {self.allowed_axes}; leave one of them out", ("replicate",))
        if self.replicate is False and self.allowed_axes == []:
            raise ConfigError("is false beside allowed_axes []; list what may divide it", ("replicate",))
        return self


def _constraint(entry: Any, node: yaml.Node, source: str) -> Constraint:
    """The constraint that one entry of a file is; `node` says on which lines it stands."""
    line = node.start_mark.line + 1
    try:
        if not isinstance(entry, dict):
            raise ConfigTypeError(f"a constraint must be keys and values, such as {{module: mlp}}, got {shown(entry)}")
        checked = _Entry(**entry)
    except ConfigError as error:
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            line = key.start_mark.line + 1 if error.key[:1] == (key.value,) else line
        raise error.within(source=f"{source}, line {line}") from None
    kind: Kind = next(kind for kind in KINDS if getattr(checked, kind) is not None)
    axes = [] if checked.replicate else checked.allowed_axes
    allowed = None if axes is None else tuple(dict.fromkeys(axes))
    return Constraint(kind, getattr(checked, kind), allowed, checked.replicate is False, line, source)


def _slashes(path: str) -> str:
    return path.replace(".", "/")


def _limit(found: Iterable[Constraint]) -> Limit:
    """What all of `found` say together, the mesh axes in the order of the first."""
    found = list(found)
    allowed = None
    for lists in (c.allowed for c in found if c.allowed is not None):
        allowed = lists if allowed is None else tuple(axis for axis in allowed if axis in lists)
    return Limit(allowed, any(c.must_divide for c in found))


def _check_parameter(path: str, found: list[Constraint], dims: Mapping[str, list[Constraint]]) -> None:
    """Raise `ConfigError` where `found` on one parameter and those on its `dims`, by name, cannot all hold."""
    what = f"parameter {path!r}"
    _check(found, found, what)
    for on_dim in dims.values():
        _check(on_dim, [*found, *on_dim], what)
    asking = [c for c in found if c.must_divide]
    if asking and dims and all(_limit([*found, *on_dim]).allowed == () for on_dim in dims.values()):
        others = (c for c in (*found, *itertools.chain(*dims.values())) if c.allowed is not None)
        raise _contradiction([asking[0], *others], what)


def _check(asking: list[Constraint], found: list[Constraint], what: str) -> None:
    """Raise `ConfigError` where one of `asking` must be divided, and `found` together leave nothing to divide it by."""
    asking = [c for c in asking if c.must_divide]
    if asking and _limit(found).allowed == ():
        pairs = ([a, b] for a in asking for b in found if _limit([a, b]).allowed == ())
        raise _contradiction(next(pairs, [asking[0], *(c for c in found if c.allowed is not None)]), what)


def _contradiction(of: list[Constraint], what: str) -> ConfigError:
    each = ", ".join(dict.fromkeys(f"{c} {c.says}" for c in of))
    return ConfigError(f"contradictory for {what}: {each}; change one of them", source=of[0].source)
