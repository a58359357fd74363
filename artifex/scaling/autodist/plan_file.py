"""A plan as a file: YAML by module paths and logical names, to be read, edited and loaded for another depth or batch.

What a run follows stands under `device` and `training`, as in its configuration. The rest is what they were chosen for
and what was predicted: it is compared, and made anew when the file is loaded. Importing this imports no JAX.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

import artifex
from artifex.config_device import SIZES, DeviceConfig
from artifex.config_io import ConfigError, did_you_mean, read_mapping, shown, write_mapping
from artifex.config_section import Int, checked
from artifex.scaling.names import ACTIVATION_AXES
from artifex.scaling.remat import canonical

if TYPE_CHECKING:
    from artifex.scaling.autodist.cluster import Cluster
    from artifex.scaling.autodist.config import AutoDistConfig
    from artifex.scaling.autodist.planned import Planned
    from artifex.scaling.autodist.spread import Spread
    from artifex.scaling.autodist.subject import Subject

SCHEMA = 1
KEYS = (
    *("schema", "task", "about", "cluster", "device", "training", "mesh", "rules", "stages", "predicted", "checked"),
    *("proof", "runners_up", "constraints", "notes", "versions"),
)
FOLLOWED = {"remat": "none", "gradient_accumulation": 1}
"""Fields of `training` that a plan says, and their defaults."""

UNSAID = ("plan", "auto_partition", "mesh_shape", "fsdp_min_weight_size")
"""Fields of `device` that it does not."""


def write(found: Planned, path: str | Path) -> None:
    """Write a plan to a `.yaml` file."""
    from artifex.scaling.autodist.planned import shortest

    plan, estimate = found.plan, found.estimate
    tables = {"weights": plan.rules.params, "gradients": plan.rules.gradients, "optimizer": plan.rules.optimizer}
    tables |= {"activations": plan.rules.activations}
    named = {
        title: {
            rule.name: "+".join(over)
            for rule in table
            if (over := _over(rule.axes, plan.sizes)) and (rule.name in ACTIVATION_AXES or rule.name in found.names)
        }
        for title, table in tables.items()
    }
    sends: dict[str, int] = {}
    for one in estimate.sends:
        key = "+".join(one.axes)
        sends[key] = sends.get(key, 0) + round(one.bytes * one.times)
    values: dict[str, Any] = {
        "schema": SCHEMA,
        "task": found.task,
        "about": dict(found.about),
        "cluster": {"name": found.cluster_name, "devices": found.spread.devices, "limit_bytes": found.limit},
        "device": found.device,
        "training": found.training,
        "mesh": {axis: size for axis, size in plan.sizes.items() if size > 1},
        "rules": {title: rules for title, rules in named.items() if rules},
        "stages": None if plan.pipeline is None else str(plan.pipeline),
        "predicted": {
            "bytes": {**{name: int(size) for name, size in estimate.held.items()}, "step": round(estimate.own)},
            "bytes_in_all": round(estimate.whole),
            "flops": float(f"{estimate.flops:.6g}"),
            "sent_bytes": sends,
            "seconds": {name: float(f"{value:.4g}") for name, value in estimate.seconds_of.items()},
        },
        "checked": found.checked,
        "proof": _proof(found),
        "runners_up": [
            {"spread": str(shortest(one.spread)), "bytes": round(one.estimate.whole), "lost": found.lost(one)}
            for one in found.runners
        ],
        "constraints": list(found.constraints),
        "notes": list(found.notes),
        "versions": versions(),
    }
    write_mapping(path, {key: value for key, value in values.items() if value not in (None, [], {})})


def check(values: Mapping[str, Any], path: str | Path) -> DeviceConfig:
    """The `device` section of a file's values. Raises `ConfigError` naming the file, the key and the nearest."""
    try:
        if missing := [key for key in ("schema", "device") if key not in values]:
            raise ConfigError(f"is no plan: it has no {missing[0]}; python -m artifex.plan writes one")
        if (schema := values["schema"]) != SCHEMA:
            raise ConfigError(f"is {shown(schema)}, but this version reads {SCHEMA}; plan anew", ("schema",))
        for key in values:
            if key not in KEYS:
                raise ConfigError(f"is unknown; {did_you_mean(str(key), KEYS)}", (str(key),))
        _check_training(_section(values, "training"))
        checked(_section(values, "about").get("rows", 0), Int, ("about", "rows"))
        checked(values.get("notes", []), list[str], ("notes",))
        _section(values, "versions")
        try:
            section = DeviceConfig(**_section(values, "device"))
        except ConfigError as error:
            raise error.within("device") from None
        _check_device(section)
        _check_derived(values, section)
    except ConfigError as error:
        raise error.within(source=str(path)) from None
    return section


def read(path: str | Path) -> tuple[dict[str, Any], Spread]:
    """The file's values, and the spread that it says. Raises `ConfigError` as `check` does."""
    from artifex.scaling.autodist.spread import Spread

    values = read_mapping(path)
    section, training = check(values, path), FOLLOWED | _section(values, "training")
    devices = math.prod(getattr(section, name) for name in SIZES)
    how = {"remat": training["remat"], "accumulation": training["gradient_accumulation"]}
    try:
        spread = Spread.of_sections(section, devices, **how, rows=_section(values, "about").get("rows", 0))
    except ValueError as error:
        raise ConfigError(str(error), ("device",), str(path)) from None
    return values, spread


def load(path: str | Path, subject: Subject, cluster: Cluster, config: AutoDistConfig) -> Planned:
    """The plan of a file for `subject`, predicted anew, perhaps of another depth, batch or length than it was made
    for; what differs is a note. Raises `ConfigError` for no plan, and `ValueError` where it does not fit."""
    from artifex.scaling.autodist.planned import Planned, counted
    from artifex.scaling.autodist.planner import name_of, predict
    from artifex.scaling.placement import size_text

    values, spread = read(path)
    about, notes = subject.about(), []
    for key, now in about.items():
        if (then := values.get("about", {}).get(key)) != now:
            notes.append(f"{path} was made for {key} {shown(then)}, this is {shown(now)}: predicted anew")
    for name, now in versions().items():
        if (then := values.get("versions", {}).get(name)) != now:
            notes.append(f"{path} was made with {name} {then}, this is {now}: compiled memory may differ")
    if spread.devices != cluster.device_count:
        raise ConfigError(
            f"is for {counted(spread.devices, 'device')}, the cluster has {cluster.device_count}; plan anew, or edit "
            "device",
            ("device",),
            str(path),
        )
    found = predict(subject, cluster, spread)
    limit = config.memory_bytes
    if limit is not None and found.estimate.whole > limit:
        needs, have = size_text(found.estimate.whole), size_text(limit)
        notes.append(f"{path} is predicted to need {needs}, more than the {have} there are")
    notes += [str(note) for note in values.get("notes", [])]
    name = values.get("task", config.task_name)
    return Planned(
        str(name),
        about,
        cluster,
        name_of(cluster, config),
        limit,
        found,
        searched=f"read from {path}",
        notes=tuple(notes),
    )


def _proof(found: Planned) -> dict[str, Any] | None:
    """What a compiler said of the plan, in numbers."""
    proof = found.proofs.get(found.spread)
    if proof is None or proof.bytes is None:
        return None
    sent = {axes: round(size) for axes, size in proof.sends.items()}
    return {"bytes": proof.bytes, "sent_bytes": sent, "compiler": proof.compiler}


def versions() -> dict[str, str]:
    """What a plan was made with."""
    return {"artifex": artifex.__version__, **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}}


def _section(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key, {})
    if not isinstance(found, dict):
        raise ConfigError(f"must be keys and values, got {shown(found)}", (key,))
    return found


def _check_training(training: Mapping[str, Any]) -> None:
    for key in training:
        if key not in FOLLOWED:
            raise ConfigError(f"is unknown; {did_you_mean(str(key), FOLLOWED)}", ("training", str(key)))
    parts = training.get("gradient_accumulation", 1)
    checked(parts, Annotated[Int, Field(ge=1)], ("training", "gradient_accumulation"))
    remat = checked(training.get("remat", "none"), str, ("training", "remat"))
    try:
        canonical(remat)
    except ValueError as error:
        raise ConfigError(str(error).removeprefix("remat "), ("training", "remat")) from None


def _check_device(section: DeviceConfig) -> None:
    """A plan says sizes and what goes with them."""
    for name in UNSAID:
        if (value := getattr(section, name)) != type(section).model_fields[name].default:
            raise ConfigError(f"is {shown(value)}, which no plan says; leave it out", ("device", name))
    if -1 in (getattr(section, name) for name in SIZES):
        raise ConfigError("has -1 for a size; a plan says each", ("device",))


def _check_derived(values: Mapping[str, Any], section: DeviceConfig) -> None:
    """`mesh` follows from `device`: edited alone it would change nothing."""
    sizes = {axis: size for axis in SIZES if (size := getattr(section, axis)) > 1}
    if (mesh := values.get("mesh")) is not None and mesh != sizes:
        raise ConfigError(
            f"is {shown(mesh)}, but device says {shown(sizes)}; edit device, and leave mesh out: it follows", ("mesh",)
        )


def _over(axes: tuple[str, ...], sizes: Mapping[str, int]) -> list[str]:
    return [axis for axis in axes if sizes.get(axis, 1) > 1]
