"""The fields of the configuration as options of a command line: their flags, kinds and help."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from typing import Any, Literal

from artifex import models
from artifex.config import Config, sections
from artifex.config_model import ModelConfig, field_types


@dataclasses.dataclass(frozen=True)
class Option:
    """A field of the configuration as an option; `key` is its path, ("training", "steps")."""

    key: tuple[str, ...]
    annotation: Any
    help: str

    @property
    def flag(self) -> str:
        """What is typed: `--training.batch-size`. Underscores do as well."""
        return "--" + ".".join(self.key).replace("_", "-")


def options(model_name: str) -> list[Option]:
    """Every field of the configuration, with those of the family that preset `model_name` belongs to."""
    description = Config.model_fields["description"]
    found = [Option(("description",), description.annotation, description.description or "")]
    for key, section in sections().items():
        for name, field in section.model_fields.items():
            found.append(Option((key, name), field.annotation, field.description or ""))
        if section is ModelConfig:
            found += fields_of(models.PRESETS[model_name], (key,))
    return found


def fields_of(base: Any, key: tuple[str, ...]) -> list[Option]:
    """The fields of a frozen configuration, and those of the configurations it holds."""
    found, comments = [], _comments(type(base))
    for name, kind in field_types(type(base)).items():
        if dataclasses.is_dataclass(part := getattr(base, name)):
            found += fields_of(part, (*key, name))
        elif kind is not Any:
            found.append(Option((*key, name), kind, comments.get(name, "")))
    return found


def value_of(config: Config, option: Option) -> Any:
    """What `config` holds for `option`; for a model's field, the preset's value where it is not replaced."""
    value: Any = config
    for part in option.key:
        value = getattr(value, part)
    return value


def kind_of(annotation: Any) -> str:
    """The values an option takes: `INT`, `FLOAT|none`, `cosine|linear|constant`."""
    if typing.get_origin(annotation) is Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) is tuple:
        return " ".join("..." if part is ... else kind_of(part) for part in typing.get_args(annotation))
    members = members_of(annotation)
    if len(members) > 1:
        return "|".join(kind_of(member) for member in members)
    return {str: "TEXT", int: "INT", float: "FLOAT", bool: "true|false", types.NoneType: "none"}[members[0]]


def text_of(value: Any) -> str:
    """A value as it would be typed."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(text_of(part) for part in value)
    return repr(value) if isinstance(value, str) and (not value or " " in value) else str(value)


def _comments(family: type) -> dict[str, str]:
    """Field -> the comment beside it: a family's fields are described where they are declared."""
    return dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(family), re.MULTILINE))


def members_of(annotation: Any) -> list[Any]:
    """The alternatives of a union, without the constraints that `Annotated` hangs on them."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return members_of(inner[0])
    if origin in (typing.Union, types.UnionType):
        return [member for part in inner for member in members_of(part)]
    return [annotation]
