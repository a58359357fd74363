"""The `logging` section of a configuration: what a run says while it runs, and to whom. Imports no JAX."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from artifex.config_section import Int, Section


class LoggingConfig(Section):
    """What a run says while it runs."""

    every: Int = Field(default=10, ge=1, description="steps from one line of metrics to the next, at least 1")
    progress: bool = Field(default=True, description="show a progress bar")
    track: tuple[Literal["tensorboard", "wandb"], ...] | None = Field(
        default=None,
        min_length=1,
        description="write metrics also for these, into the run's folder: 'tensorboard', 'wandb' (which is offline "
        "unless WANDB_MODE says otherwise)",
    )
    stall_after: float = Field(
        default=60.0,
        ge=0,
        description="seconds, and 20 times what a step takes, without the end of a step after which it is said what "
        "the run waits for; 0: never",
    )

    @field_validator("track", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        """One may stand alone; a list, as files have it, is a tuple."""
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
