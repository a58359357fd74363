"""A section of a configuration: checked values on pydantic, whose every fault is a one-line `ConfigError`."""

from __future__ import annotations

import re
import typing
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from artifex.config_io import ConfigError, ConfigTypeError, did_you_mean, nearest, shown

MAX_INT = 2**31 - 1  # steps, sizes and token positions are int32 on every device
Int = Annotated[int, Field(le=MAX_INT)]

_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


class Section(BaseModel):
    """Checked values: unknown keys, wrong types (3.0 and True are no integers), nan and infinities are refused.

    Making one and assigning to a field raise `ConfigError`; a refused assignment changes nothing.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, strict=True, allow_inf_nan=False)

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _config_error(error, type(self)) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in type(self).model_fields and self.model_config.get("extra") == "forbid":
            raise ConfigError(f"is unknown; {did_you_mean(name, self.known_keys())}", (name,))
        # pydantic runs a section's own check after it has stored the value
        fields, extra = dict(vars(self)), dict(self.__pydantic_extra__ or {})
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            vars(self).update(fields)
            if self.__pydantic_extra__ is not None:
                self.__pydantic_extra__.clear()
                self.__pydantic_extra__.update(extra)
            raise _config_error(error, type(self)) from None

    @classmethod
    def known_keys(cls) -> list[str]:
        """What an unknown key may have meant."""
        return list(cls.model_fields)


def checked(value: Any, annotation: Any, key: tuple[str, ...]) -> Any:
    """`value` as a field of that annotation holds it, by the rules of a `Section`. Raises `ConfigError` about `key`."""
    try:
        return TypeAdapter(annotation, config=_STRICT).validate_python(value)
    except ValidationError as error:
        raise _wrong_value(error.errors(), annotation, key) from None


def _config_error(error: ValidationError, section: type[Section]) -> ConfigError:
    """The first fault that pydantic found in a section, in our words."""
    problems = error.errors()
    first = problems[0]
    key = tuple(str(part) for part in first["loc"][:1])
    ours = first.get("ctx", {}).get("error")
    if isinstance(ours, ConfigError):  # raised by a validator, or by a section inside this one
        return ours.within(*key)
    if first["type"] == "extra_forbidden":
        return ConfigError(f"is unknown; {did_you_mean(key[0], section.known_keys())}", key)
    same = [problem for problem in problems if problem["loc"][:1] == first["loc"][:1]]  # one for each member of a union
    annotation = section.model_fields[key[0]].annotation if key else None  # no key: half a surrogate pair as a key
    return _wrong_value(same, annotation, key)


def _wrong_value(problems: list[Any], annotation: Any, key: tuple[str, ...]) -> ConfigError:
    """pydantic's "Input should be a valid integer" as "must be a valid integer, got 'x'"; a union has several."""
    value = problems[0]["input"]
    wanted = [re.sub(r"^\w+ should (be )?", "", problem["msg"]) for problem in problems]
    if problems[0]["type"] == "model_type":
        wanted = ["a section of keys and values"]
    if type(None) in typing.get_args(annotation):
        wanted.append("null")
    verb = "must" if wanted[0].startswith("have") else "must be"
    says = f"{verb} {' or '.join(dict.fromkeys(wanted))}, got {shown(value)}"
    near = isinstance(value, str) and nearest(value, [w for w in _words(annotation) if w != value])
    wrong_type = all(problem["type"].endswith("_type") for problem in problems)
    return (ConfigTypeError if wrong_type else ConfigError)(f"{says}; did you mean {near}?" if near else says, key)


def _words(annotation: Any) -> list[str]:
    """The strings that an annotation admits by name: those of its `Literal`s."""
    inner = typing.get_args(annotation)
    return [word for part in inner for word in ([part] if isinstance(part, str) else _words(part))]
