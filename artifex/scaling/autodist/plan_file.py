"""A plan as a file: YAML by module paths and logical names, to be read, edited and loaded for another depth or batch.

What a run follows stands under `device` and `training`, as in its configuration. The rest is what they were chosen for
and what was predicted: it is compared, and made anew when the file is loaded.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import artifex
from artifex.config_device import DeviceConfig
from artifex.config_io import ConfigError, did_you_mean, read_mapping, shown, write_mapping
from artifex.config_section import Int, checked
from artifex.scaling.autodist.spread import Spread
from artifex.scaling.names import ACTIVATION_AXES

if TYPE_CHECKING:
    from artifex.scaling.autodist.cluster import Cluster
    from artifex.scaling.autodist.config import AutoDistConfig
    from artifex.scaling.autodist.planned import Planned
    from artifex.scaling.autodist.subject import Subject

SCHEMA = 1
KEYS = (
    *(
        "schema",
        "task",
        "about",
        "cluster",
        "device",
        "training",
        "mesh",
        "rules",
        "stages",
        "predicted",
        "checked",
        "proof",
    ),
    *("runners_up", "constraints", "notes", "versions"),
)
FOLLOWED = ("remat", "gradient_accumulation")


def write(found: Planned, path: str | Path) -> None:
    """Write a plan to a `.yaml` file."""
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
            {"spread": str(one.spread), "bytes": round(one.estimate.whole), "lost": found.lost(one)}
            for one in found.runners
        ],
        "constraints": list(found.constraints),
        "notes": list(found.notes),
        "versions": versions(),
    }
    write_mapping(path, {key: value for key, value in values.items() if value not in (None, [], {})})


def read(path: str | Path) -> tuple[dict[str, Any], Spread]:
    """The file's values, and the spread that it says. Raises `ConfigError` naming the file, the key and the nearest."""
    source, values = str(path), read_mapping(path)
    try:
        for key in values:
            if key not in KEYS:
                raise ConfigError(f"is unknown; {did_you_mean(str(key), KEYS)}", (str(key),))
        if (schema := values.get("schema")) != SCHEMA:
            says = f"is {shown(schema)}, but this version reads {SCHEMA}"
            raise ConfigError(f"{says}; is this a plan? if so, plan anew", ("schema",))
        device, training = _section(values, "device"), _section(values, "training")
        for key in training:
            if key not in FOLLOWED:
                raise ConfigError(f"is unknown; {did_you_mean(str(key), FOLLOWED)}", ("training", str(key)))
        checked(training.get("remat", "none"), str, ("training", "remat"))
        checked(training.get("gradient_accumulation", 1), Int, ("training", "gradient_accumulation"))
        checked(_section(values, "about").get("rows", 0), Int, ("about", "rows"))
        checked(values.get("notes", []), list[str], ("notes",))
        _section(values, "versions")
        try:
            section = DeviceConfig(**device)
        except ConfigError as error:
            raise error.within("device") from None
        devices = _count(values, section)
        try:
            spread = Spread.of_sections(
                section,
                devices,
                remat=training.get("remat", "none"),
                accumulation=training.get("gradient_accumulation", 1),
                rows=_section(values, "about").get("rows", 0),
            )
        except ValueError as error:
            raise ConfigError(str(error), ("device",)) from None
        _check_derived(values, spread)
    except ConfigError as error:
        raise error.within(source=source) from None
    return values, spread


def load(path: str | Path, subject: Subject, cluster: Cluster, config: AutoDistConfig) -> Planned:
    """The plan of a file for `subject`, predicted anew, perhaps of another depth, batch or length than it was made
    for; what differs is a note. Raises `ConfigError` for no plan, and `ValueError` where it does not fit."""
    from artifex.scaling.autodist.planned import Planned
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
            f"is for {spread.devices} devices, the cluster has {cluster.device_count}; plan anew, or edit device",
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


def _count(values: Mapping[str, Any], section: DeviceConfig) -> int:
    from artifex.config_device import SIZES

    sizes = [getattr(section, name) for name in SIZES]
    if -1 in sizes:
        raise ConfigError("has -1 for a size; a plan says each", ("device",))
    count = 1
    for size in sizes:
        count *= size
    return count


def _check_derived(values: Mapping[str, Any], spread: Spread) -> None:
    """`mesh` follows from `device`: edited alone it would change nothing."""
    mesh = values.get("mesh")
    if mesh is not None and mesh != dict(spread.sizes):
        raise ConfigError(
            f"is {shown(mesh)}, but device says {shown(dict(spread.sizes))}; edit device, mesh follows from it",
            ("mesh",),
        )


def _over(axes: tuple[str, ...], sizes: Mapping[str, int]) -> list[str]:
    return [axis for axis in axes if sizes.get(axis, 1) > 1]
