"""The model section of a run's configuration: a preset by name, and values that replace fields of its family's.

Imports no JAX.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from artifex import models
from artifex.config_io import ConfigError, ConfigTypeError, did_you_mean, shown
from artifex.config_section import MAX_INT, Section, checked


class ModelConfig(Section):
    """A preset by name, and values that replace fields of its family's configuration."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(default="llama-nano", description="preset; artifex.models.list_models() names them all")

    if TYPE_CHECKING:  # the overrides' names are known when `name` is

        def __init__(self, /, *, name: str = ..., **overrides: Any) -> None: ...

    def spec(self) -> Any:
        """The family's frozen configuration, such as `DecoderConfig`."""
        return models.preset(self.name, **(self.__pydantic_extra__ or {}))

    @property
    def reads(self) -> Literal["text", "images"]:
        """What the model learns from."""
        return models.PRESETS[self.name].reads

    def __getattr__(self, field: str) -> Any:
        if field.startswith("_") or field in type(self).model_fields:  # pydantic asks before they exist
            raise AttributeError(field)
        if field not in (known := field_types(type(models.PRESETS[self.name]))):
            raise AttributeError(f"model {self.name!r} has no field {field!r}; {did_you_mean(field, known)}")
        return getattr(self.spec(), field)

    @model_validator(mode="after")
    def _fits_the_family(self) -> Self:
        if self.name not in models.PRESETS:
            raise ConfigError(f"{shown(self.name)} is unknown; {did_you_mean(self.name, models.PRESETS)}", ("name",))
        overrides = self.__pydantic_extra__ or {}
        overrides.update(_fitting(overrides, models.PRESETS[self.name], repr(self.name), ("name",)))
        try:
            self.spec()
        except ValueError as error:  # a family's messages begin with the field they are about
            key = _field_of(str(error), models.PRESETS[self.name], overrides)
            if key is None:
                raise ConfigError(f"{self.name!r} cannot be built: {error}") from None
            raise ConfigError(str(error).partition(" ")[2], key) from None
        return self


def _fitting(values: Mapping[str, Any], base: Any, what: str, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """`values` as fields of the frozen configuration `base` hold them, those of its parts within mappings."""
    known, fitting = field_types(type(base)), {}
    for field, value in values.items():
        if field not in known:
            raise ConfigError(f"is not a field of {what}; {did_you_mean(field, [*also, *known])}", (field,))
        if known[field] is Any and getattr(base, field) is None:
            raise ConfigError(f"is what {what} does without; choose a preset that has one", (field,))
        part = getattr(base, field)
        if dataclasses.is_dataclass(part):
            if not isinstance(value, Mapping):
                raise ConfigTypeError(f"must be a mapping of the fields of {what}, got {shown(value)}", (field,))
            try:
                fitting[field] = _fitting(value, part, f"{what}'s {field}")
            except ConfigError as error:
                raise error.within(field) from None
            continue
        # frozen configurations hold tuples where files have lists
        value = checked(tuple(value) if isinstance(value, list) else value, known[field], (field,))
        if isinstance(value, int) and abs(value) > MAX_INT:
            raise ConfigError(f"must be at most {MAX_INT}, got {value}", (field,))
        fitting[field] = value
    return fitting


def _field_of(message: str, base: Any, overrides: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The field that a family's message begins with: one of `base`, or of a part of it that is overridden."""
    field = message.partition(" ")[0]
    if field in field_types(type(base)):
        return (field,)
    for name, part in overrides.items():
        if isinstance(part, Mapping) and (inner := _field_of(message, getattr(base, name), part)):
            return (name, *inner)
    return None


@functools.cache
def field_types(family: type) -> dict[str, Any]:
    """Field -> annotation of a family's configuration."""
    hints = typing.get_type_hints(family)
    return {field.name: hints[field.name] for field in dataclasses.fields(family)}
