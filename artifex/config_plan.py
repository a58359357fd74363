"""A plan file in a configuration: `device.plan` stands for the sections that the planner chose. Imports no JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from artifex.config_io import ConfigError, did_you_mean, read_mapping, shown

FOLLOWED = {"remat": "none", "gradient_accumulation": 1}
"""Fields of `training` that a plan sets, and their defaults."""


def with_plan(values: Mapping[str, Any]) -> dict[str, Any]:
    """The sections with what their `device.plan` says in its place, so that a run holds all that it follows.

    Raises `ConfigError` for a file that is no plan, and where it stands beside settings of its own that differ.
    """
    device = values.get("device")
    if isinstance(device, Mapping):
        given, path = dict(device), device.get("plan")
    else:
        path = getattr(device, "plan", None)
        given = {name: getattr(device, name) for name in getattr(device, "model_fields_set", ())}
    if not isinstance(path, str):  # none, or what the section refuses
        return dict(values)
    read = read_mapping(path)
    if not isinstance(read.get("device"), dict) or "schema" not in read:
        raise ConfigError("is no plan: it has no schema and device", ("device", "plan"), str(path))
    given.pop("plan", None)
    for name, value in given.items():
        planned = read["device"].get(name)
        if (planned is not None and planned != value) or (planned is None and value not in (None, 1, 0, False)):
            raise ConfigError(
                f"is {shown(value)}, but the plan {path} says {shown(planned)}; leave one of them out", ("device", name)
            )
    training = values.get("training", {})
    mine = training if isinstance(training, Mapping) else training.model_dump()
    chosen = read.get("training", {})
    for name in chosen if isinstance(chosen, dict) else [str(chosen)]:
        if name not in FOLLOWED:
            raise ConfigError(f"is unknown; {did_you_mean(name, FOLLOWED)}", ("training", name), str(path))
    for name, default in FOLLOWED.items():
        have = mine.get(name, default)
        if have != default and have != chosen.get(name, default):
            raise ConfigError(
                f"is {shown(have)}, but the plan {path} says {shown(chosen.get(name, default))}; leave one of them out",
                ("training", name),
            )
    return {**values, "device": dict(read["device"]), "training": {**mine, **chosen}}
