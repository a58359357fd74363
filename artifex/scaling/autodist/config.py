"""What the planner is asked: nnScaler's `AutoDistConfig` by its names, types and defaults, and what goes beyond it.

    AutoDistConfig(mesh_row=2, mesh_col=4, memory_constraint=80, micro_batch_size=2, update_freq=4)
    AutoDistConfig.from_partition("throughput", "mixed", {"max_memory_per_device": "16GB"})

A GB is 2**30 bytes here. Imports no JAX.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from artifex.config_io import ConfigError, ConfigTypeError, did_you_mean, read_mapping, shown
from artifex.config_section import Int, Section, checked
from artifex.scaling.autodist.constraints import AXES, Axis, module_patterns
from artifex.scaling.remat import canonical

Axes = Annotated[tuple[Axis, ...], Field(min_length=1)]
UNITS = {"B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}
GB = UNITS["GB"]
PARTITION = {"max_memory_per_device": "memory_constraint", "max_all_reduce_size": "max_all_reduce_size"}
"""Mithril's constraint -> the option here."""

Precision = Literal["float32", "bfloat16"]
Optimizer = Literal["adam", "memory_efficient_adam"]
COEFFICIENTS: Mapping[tuple[Precision, Optimizer], tuple[int, int]] = {
    ("float32", "adam"): (2, 0),
    ("float32", "memory_efficient_adam"): (2, 0),  # what it drops, a float32 copy, nobody has of float32 weights
    ("bfloat16", "adam"): (6, 2),
    ("bfloat16", "memory_efficient_adam"): (4, 4),
}
"""Precision of the weights, optimizer -> bytes of state, and of what a step needs besides, to each byte of weights."""

Gigabytes = Annotated[float, Field(gt=0, le=1e6)]
Coefficient = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0)] | None
Text = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]


class AutoDistConfig(Section):
    """The cluster, its limits and what may be tried; `world_size` left unset is and stays `mesh_row * mesh_col`."""

    task_name: str = Field(default="default", min_length=1, description="names the plans and logs of a run")
    consider_mem: bool = Field(default=True, description="refuse plans that exceed memory_constraint")
    memory_constraint: Gigabytes = Field(default=32, description="GB (2**30 bytes) of a device, above 0, or '80GB'")
    memory_granularity: Int = Field(default=1, ge=1, description="bytes that memory is counted in, at least 1")
    transient_mem_coef: float = Field(
        default=2, ge=0, description="a moment's memory over the sum of the two largest working sets, at least 0"
    )
    opt_resident_coef: Coefficient = Field(
        default=None,
        description="bytes of optimizer state to each byte of weights, at least 0: float32 Adam 2, bfloat16 Adam 6, "
        "memory-efficient 4; none: exactly what the run's optimizer and precision give",
    )
    opt_transient_coef: Coefficient = Field(
        default=None,
        description="bytes that a step of the optimizer needs besides, to each byte of weights, at least 0: float32 "
        "Adam 0, bfloat16 Adam 2, memory-efficient 4; none: what the run's optimizer and precision give",
    )
    recompute_modules: str = Field(
        default="",
        description="modules whose backward pass computes again: ends of their paths, with commas between, or 'ROOT', "
        "the model; empty: as recompute says",
    )
    recompute: str = Field(
        default="auto",
        description="without recompute_modules: none, full, dots, or what is kept by name, as in "
        "'qkv=keep,block=offload'; 'auto': the planner's choice",
    )
    zero_stage: Annotated[Int, Field(ge=0, le=3)] | Literal["auto"] = Field(
        default=0,
        description="what data devices divide besides the batch: 1 the optimizer's state, 2 gradients too, 3 weights "
        "too; 'auto': the planner's choice",
    )
    zero_ngroups: Int = Field(
        default=1, ge=1, description="groups of data devices: each has all that zero_stage divides, at least 1"
    )
    pipeline_pivots: str = Field(
        default="", description="modules at which a stage may begin: ends of their paths, with commas between"
    )
    pipeline_nstages: Annotated[Int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="stages that the layers form, at least 1 (off); 'auto': the planner's choice"
    )
    pipeline_scheduler: Literal["1f1b", "gpipe", "interleaved"] = Field(
        default="1f1b", description="the order in which stages go forwards and backwards"
    )
    max_pipeline_bubble_ratio: float = Field(default=0.2, ge=0, le=1, description="idle time, at most; 0 to 1")
    max_pipeline_unbalance_ratio: float = Field(
        default=0.5, ge=0, le=1, description="time of the fastest stage over that of the slowest, at least; 0 to 1"
    )
    mesh_row: Int = Field(default=1, ge=1, description="nodes, at least 1")
    mesh_col: Int = Field(default=1, ge=1, description="devices of a node, at least 1")
    world_size: Int = Field(default=1, ge=1, description="all devices: mesh_row x mesh_col, as if unset, or a multiple")
    micro_batch_size: Int = Field(default=1, ge=1, description="examples that go through the model at once, at least 1")
    update_freq: Int = Field(default=1, ge=1, description="micro-batches to an update of the weights, at least 1")
    profile_dir: Text = Field(
        default="", description="folder of measured times, by device; empty: ~/.cache/artifex/autodist/1.0"
    )
    parallel_profile: bool = Field(default=True, description="measure on all devices present, else on one")
    re_profile: bool = Field(default=False, description="measure again what profile_dir has")
    topk: Int = Field(default=20, ge=1, description="plans to keep, the best first; at least 1")
    nproc: Int = Field(default=1, ge=1, description="processes that search, at least 1")
    solver: Literal["dp", "ilp"] = Field(
        default="dp", description="what chooses layouts: dynamic programming (dp) or an integer program (ilp)"
    )
    load_plan_path: Text = Field(default="", description="a plan to take instead of searching; empty: search")
    save_plan_path: Text = Field(default="", description="where to write the plan; empty: nowhere")
    partition_constraints_path: Text = Field(
        default="", description="a YAML list of what may divide which module, parameter or axis; empty: none"
    )
    is_train: bool = Field(default=True, description="plan a step of training, else a forward pass alone")
    verbose: bool = Field(default=False, description="say what is searched, and why plans were refused")
    ignore_small_tensor_threshold: Int = Field(
        default=1, ge=0, description="elements: what has less stays whole; from 0"
    )
    objective: Literal["throughput", "memory", "cost"] = Field(
        default="throughput", description="the best is the shortest step, the least memory, or the least device time"
    )
    search_space: Literal["mixed"] | Axis | Axes = Field(
        default="mixed", description="axes that may divide the run: one, a list, or all ('mixed')"
    )
    max_all_reduce_size: Gigabytes | None = Field(
        default=None, description="GB (2**30 bytes) of one all-reduce, above 0, or text such as '500MB'; none: any"
    )
    device: str | None = Field(
        default=None, description="what a device is: 'cpu', or such as 'gpu:h100', 'tpu:v5e'; none: as those present"
    )

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The options that a JSON or YAML file holds. Raises `ConfigError` naming the file."""
        values = read_mapping(path)
        try:
            return cls(**values)
        except ConfigError as error:
            raise error.within(source=str(path)) from None

    @classmethod
    def from_partition(
        cls,
        objective: str = "throughput",
        search_space: str | tuple[str, ...] = "mixed",
        constraints: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Self:
        """By the names of Mithril's `partition_*`, with sizes as text ("16GB"); `options` are those of the class."""
        for name, size in (constraints or {}).items():
            try:
                if name not in PARTITION:
                    raise ConfigError(f"is unknown; {did_you_mean(name, PARTITION)}")
                if PARTITION[name] in options:
                    raise ConfigError(f"says the same as {PARTITION[name]}; leave one of them out")
                options[PARTITION[name]] = bytes_of(size) / GB
            except ConfigError as error:
                raise error.within("constraints", name) from None
        return cls(**{"objective": objective, "search_space": search_space, **options})

    @property
    def devices(self) -> int:
        """All of them: `world_size`."""
        return self.world_size

    @property
    def scale_factor(self) -> int:
        """How many meshes of `mesh_row * mesh_col` there are; they divide the batch."""
        return self.world_size // (self.mesh_row * self.mesh_col)

    @property
    def batch_size(self) -> int:
        """Examples to an update, of all devices together: `micro_batch_size * update_freq`."""
        return self.micro_batch_size * self.update_freq

    @property
    def memory_bytes(self) -> int | None:
        """Bytes of a device that a plan may take; None where `consider_mem` is off."""
        return int(self.memory_constraint * GB) if self.consider_mem else None

    @property
    def max_all_reduce_bytes(self) -> int | None:
        return None if self.max_all_reduce_size is None else int(self.max_all_reduce_size * GB)

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that a plan may make larger than 1."""
        if isinstance(self.search_space, tuple):
            return self.search_space
        return AXES if self.search_space == "mixed" else (self.search_space,)

    @property
    def recompute_patterns(self) -> tuple[str, ...]:
        return module_patterns(self.recompute_modules)

    @property
    def pivot_patterns(self) -> tuple[str, ...]:
        return module_patterns(self.pipeline_pivots)

    def profile_folder(self, device: str) -> Path:
        """Where times measured on `device` ("gpu:h100") lie."""
        return Path(self.profile_dir or "~/.cache/artifex/autodist/1.0", re.sub(r"[^\w.-]+", "-", device)).expanduser()

    def check_devices(self, data_ways: int) -> None:
        """Raise `ConfigError` unless the `data_ways` devices that divide the batch form `zero_ngroups` groups."""
        if self.zero_ngroups > 1 and self.zero_stage == 0:
            says = f"is {self.zero_ngroups}, but zero_stage is 0; give zero_stage 1, 2, 3 or 'auto', or leave it at 1"
            raise ConfigError(says, ("zero_ngroups",))
        _check_divides("zero_ngroups", self.zero_ngroups, data_ways, " dividing the batch")

    def check_cluster(self) -> None:
        """Raise `ConfigError` where no plan for `devices` can have the stages and groups that are asked for."""
        stages = 1 if self.pipeline_nstages == "auto" else self.pipeline_nstages
        _check_divides("pipeline_nstages", stages, self.devices)
        self.check_devices(self.devices // stages)

    @field_validator("recompute", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """A mapping from name to fate may stand for the text."""
        if value == "auto" or not isinstance(value, str | dict):
            return value
        try:
            return canonical(value)
        except ValueError as error:
            says = str(error).removeprefix("remat ").replace("expected none", "expected auto, none")
            raise ConfigError(says) from None

    @field_validator("recompute_modules", "pipeline_pivots")
    @classmethod
    def _names_of_modules(cls, value: str) -> str:
        module_patterns(value)
        return value

    @field_validator("search_space", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        """A list, as files have it, is a tuple."""
        return checked(tuple(value), Axes, ()) if isinstance(value, list | tuple) else value

    @field_validator("memory_constraint", "max_all_reduce_size", mode="before")
    @classmethod
    def _in_gb(cls, value: Any) -> Any:
        return bytes_of(value) / GB if isinstance(value, str) else value

    @field_validator("device")
    @classmethod
    def _of_a_platform(cls, value: str | None) -> str | None:
        if value is None or re.fullmatch(r"cpu|(gpu|tpu):[a-z0-9]+", value):
            return value
        if re.match(r"cpu:|(gpu|tpu):\w+:", value):
            raise ConfigError(f"must be a kind alone, got {shown(value)}; mesh_row and mesh_col say how many")
        raise ConfigError(f"must be 'cpu', 'gpu:CHIP' or 'tpu:CHIP', such as 'gpu:h100', got {shown(value)}")

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        mesh = self.mesh_row * self.mesh_col
        if "world_size" not in self.model_fields_set:
            vars(self)["world_size"] = mesh
        if self.world_size % mesh:
            near = self.world_size // mesh * mesh or mesh
            says = f"must be a multiple of mesh_row x mesh_col, {self.mesh_row} x {self.mesh_col} = {mesh}"
            raise ConfigError(f"{says}, got {self.world_size}; {near}, {near + mesh} would", ("world_size",))
        if self.recompute_modules and self.recompute != "auto":
            says = f"is {shown(self.recompute)} beside recompute_modules; leave one of them out"
            raise ConfigError(says, ("recompute",))
        return self


def optimizer_coefficients(precision: Precision, optimizer: Optimizer) -> tuple[int, int]:
    """(resident, transient) of `COEFFICIENTS`: for "float32" or "bfloat16" weights, "adam" or "memory_efficient_adam",
    which drops the float32 copy of the weights between steps. Raises `ConfigError`."""
    pair = checked(precision, Precision, ("precision",)), checked(optimizer, Optimizer, ("optimizer",))
    return COEFFICIENTS[pair]


def bytes_of(size: str) -> int:
    """Bytes of "16GB", "1.5 GB" or "500MB"; units are powers of 1024. Raises `ConfigError`."""
    if not isinstance(size, str):
        raise ConfigTypeError(f"must be text with a unit, such as '16GB', got {shown(size)}")
    found = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([a-zA-Z]+)\s*", size)
    if found is None or (unit := found[2].upper()) not in UNITS:
        raise ConfigError(f"must be a number with a unit of {', '.join(UNITS)}, such as '16GB', got {shown(size)}")
    if not (count := int(float(found[1]) * UNITS[unit])):
        raise ConfigError(f"must be at least 1B, got {shown(size)}")
    return count


def _check_divides(option: str, value: int, count: int, what: str = "") -> None:
    """Raise `ConfigError` unless `value` divides `count` devices, with the 12 smallest that do."""
    if count % value:
        small = [n for n in range(1, math.isqrt(count) + 1) if count % n == 0]
        good = [str(n) for n in sorted({*small, *(count // n for n in small)})]
        would = ", ".join(good[:12] + ["..."] * (len(good) > 12))
        raise ConfigError(
            f"must divide the {count} device{'s' * (count > 1)}{what}, got {value}; {would} would", (option,)
        )
