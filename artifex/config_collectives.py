"""The `collectives` section of a configuration: wishes about how devices talk. Importing this imports no JAX."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from artifex.config_io import ConfigError
from artifex.config_section import Section
from artifex.scaling.collectives import KINDS, Overlap, by_axis, thresholds

BY_AXIS = "by mesh axis ring, tree, hierarchical or direct, as in 'data=hierarchical,tensor=ring'; none: the platform's"


class CollectivesConfig(Section):
    """Wishes about how devices talk. A run says what it set for them, and which its platform cannot grant.

    In a file, and from Python, a mapping may stand for the text.
    """

    all_reduce: str | None = Field(default=None, description=f"sums that all get: {BY_AXIS}")
    all_gather: str | None = Field(default=None, description=f"parts that all get whole: {BY_AXIS}")
    reduce_scatter: str | None = Field(default=None, description=f"sums of which each gets a part: {BY_AXIS}")
    all_to_all: str | None = Field(default=None, description=f"parts exchanged: {BY_AXIS}")
    fuse_mb: str | None = Field(
        default=None,
        description="MB up to which collectives of one kind are sent as one, for all kinds or as in "
        "'all_reduce=64,all_gather=256'; 0 is never; none: the platform's",
    )
    overlap: Overlap = Field(
        default="auto",
        description="devices compute while they send: on (on GPUs more memory and better hidden), off, or as the "
        "platform does by itself",
    )

    @field_validator(*KINDS, mode="before")
    @classmethod
    def _by_axis(cls, value: Any) -> Any:
        return _kept(by_axis, value, str | dict)

    @field_validator("fuse_mb", mode="before")
    @classmethod
    def _thresholds(cls, value: Any) -> Any:
        return _kept(thresholds, value, str | dict | int | float)


def _kept(canonical: Any, value: Any, kinds: Any) -> Any:
    if not isinstance(value, kinds):
        return value
    try:
        return canonical(value)
    except ValueError as error:
        raise ConfigError(str(error)) from None
