"""The `device` section of a configuration: how a run is spread. Importing this imports no JAX."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from artifex.config_io import ConfigError, ConfigTypeError, shown
from artifex.config_section import Int, Section

SIZES = ("data", "replica", "fsdp", "tensor", "expert", "context", "pipeline")
"""The fields that are numbers of devices."""

DIVIDING = ("fsdp", "expert", "context", "pipeline")
"""Those whose devices divide the dims of weights that nobody claims, as `data` does with `zero`."""


class DeviceConfig(Section):
    """How the run is spread: a mesh shape, or the size of each strategy, or (by default) whatever the devices allow.

    A `mesh_shape` that is no list or tuple of integers raises `ConfigTypeError`, which is a `TypeError`.
    """

    plan: str | None = Field(
        default=None,
        min_length=1,
        description="file of a plan (python -m artifex.plan), whose settings stand for this section and for "
        "training.remat and training.gradient_accumulation",
    )
    auto_partition: bool = Field(
        default=False, description="let the planner choose all that for the devices present, and print the plan"
    )
    partition_objective: Literal["throughput", "memory", "cost"] = Field(
        default="throughput", description="with auto_partition: the shortest step, the least memory, or device time"
    )
    partition_search_space: str = Field(
        default="mixed", min_length=1, description="with auto_partition: axes it may use, as in 'data,fsdp', or mixed"
    )
    partition_constraints: str | None = Field(
        default=None,
        min_length=1,
        description="with auto_partition: 'max_memory_per_device=16GB,max_all_reduce_size=1GB', or one of them",
    )
    mesh_shape: tuple[int, int] | None = Field(
        default=None,
        description="(batch, model): devices that divide the batch, and the model; their product is the device count",
    )
    auto_detect_mesh: bool = Field(
        default=True, description="without mesh_shape and sizes, choose a mesh for the devices present"
    )
    data: Int = Field(
        default=1, description="devices that divide the batch, each with the whole model; 1 is off, -1 takes the rest"
    )
    replica: Int = Field(
        default=1,
        description="groups of data devices, which divide the batch too; what zero divides is divided in each group "
        "alone, so more memory and less to send; 1 is off",
    )
    fsdp: Int = Field(
        default=1, description="devices that divide batch, weights and optimizer; 1 is off, -1 takes the rest"
    )
    tensor: Int = Field(
        default=1,
        description="devices that divide heads, hidden units, channels and vocabulary; 1 is off, -1 takes the rest",
    )
    expert: Int = Field(
        default=1,
        description="devices that divide the experts of mixtures, else the batch; 1 is off, -1 takes the rest",
    )
    context: Int = Field(default=1, description="devices that divide every sequence; 1 is off, -1 takes the rest")
    context_attention: Literal["ring", "ulysses"] = Field(
        default="ring",
        description="how the positions of context devices see each other: keys go round a ring, or devices exchange "
        "positions for heads (ulysses)",
    )
    pipeline: Int = Field(default=1, description="stages that the layers form; 1 is off, -1 takes the rest")
    zero: Literal[0, 1, 2] = Field(
        default=0,
        description="what data devices divide besides the batch: 1 the optimizer's state, 2 gradients too (3: fsdp)",
    )
    sequence_parallel: bool = Field(
        default=True, description="between layers, the tensor devices divide the positions of the stream"
    )
    schedule: Literal["gpipe", "1f1b", "interleaved"] = Field(
        default="1f1b", description="the order in which pipeline stages go forwards and backwards"
    )
    stages_per_device: Int = Field(
        default=1, ge=1, description="stages of each pipeline device; more than 1 needs the interleaved schedule"
    )
    microbatches: Int | None = Field(
        default=None, ge=1, description="parts of a batch in the pipeline; none: up to 4 to a stage, as many as divide"
    )
    fsdp_min_weight_size: Int = Field(
        default=0, ge=0, description="elements: fsdp leaves a weight whole of which no dim is this long; 0 divides all"
    )
    whole: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="parameters that no axis divides unasked, by patterns of their paths, as in 'norm/*,embed/*'; "
        "their heads, hidden units, experts and layers are divided all the same",
    )

    @field_validator("whole", mode="before")
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        """One pattern may stand alone; a list, as files have it, is a tuple."""
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @field_validator("mesh_shape", mode="before")
    @classmethod
    def _two_positive_integers(cls, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, list | tuple) or any(type(size) is not int for size in value):
            raise ConfigTypeError("must be a tuple of integers")
        if len(value) != 2:
            raise ConfigError(f"must have two axes, (batch, model), got {shown(tuple(value))}")
        if min(value) < 1:
            raise ConfigError(f"must be at least 1 on both axes, got {shown(tuple(value))}")
        return tuple(value)

    @field_validator(*SIZES)
    @classmethod
    def _size_or_rest(cls, value: int) -> int:
        if value < 1 and value != -1:
            raise ConfigError(f"must be at least 1, or -1 for all devices that are left, got {value}")
        return value

    @field_validator("partition_constraints", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        """A mapping may stand for the text."""
        return ",".join(f"{name}={size}" for name, size in value.items()) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        self._check_partition()
        sizes = {name: size for name in SIZES if (size := getattr(self, name)) != 1}
        rest = [name for name, size in sizes.items() if size == -1]
        if len(rest) > 1:
            raise ConfigError(f"is -1, and so is {rest[1]}; only one of them can take the rest", (rest[0],))
        if self.mesh_shape is not None and sizes:
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ConfigError(f"{self.mesh_shape} stands beside {listed}; give the shape or the sizes", ("mesh_shape",))
        if self.replica != 1 and not self.zero:
            says = (
                f"is {self.replica}, but zero is 0, so that groups and data devices do the same; give data the product"
            )
            raise ConfigError(says, ("replica",))
        if self.zero and self.data == 1:
            raise ConfigError(f"is {self.zero}, but data is 1; give data a size, or leave zero at 0", ("zero",))
        if self.context_attention != "ring" and self.context == 1:
            raise ConfigError(
                f"is {self.context_attention!r}, but context is 1; give context a size, or leave it at 'ring'",
                ("context_attention",),
            )
        if self.whole and not self.zero and all(getattr(self, name) == 1 for name in DIVIDING):
            raise ConfigError(
                "has no effect: fsdp, expert, context and pipeline are 1 and zero is 0, so nothing is divided unasked; "
                "give one of them a size, or leave it out",
                ("whole",),
            )
        return self._check_pipeline()

    def _check_partition(self) -> None:
        chosen = [name for name in SIZES if getattr(self, name) != 1]
        if self.auto_partition and (self.mesh_shape is not None or chosen):
            says = f"is true beside {chosen[0] if chosen else 'mesh_shape'}; leave one of them out"
            raise ConfigError(says, ("auto_partition",))
        for name in ("partition_objective", "partition_search_space", "partition_constraints"):
            if not self.auto_partition and (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ConfigError(f"is {shown(value)}, but auto_partition is false; set it, or leave this out", (name,))

    def _check_pipeline(self) -> Self:
        settings = {"schedule": "1f1b", "stages_per_device": 1, "microbatches": None}
        for name, default in settings.items():
            if self.pipeline == 1 and (value := getattr(self, name)) != default:
                raise ConfigError(
                    f"is {shown(value)}, but pipeline is 1; give pipeline a size, or leave it out", (name,)
                )
        if (self.schedule == "interleaved") != (self.stages_per_device > 1):
            raise ConfigError(
                f"is {self.stages_per_device} with schedule {self.schedule!r}; 'interleaved' needs at least 2, the "
                "others 1",
                ("stages_per_device",),
            )
        return self
