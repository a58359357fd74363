"""A plan file in a configuration: `device.plan` stands for the sections that the planner chose. Imports no JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from artifex.config_device import DeviceConfig
from artifex.config_io import ConfigError, did_you_mean, read_mapping, shown


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
    from artifex.scaling.autodist.plan_file import FOLLOWED, check  # which only such a run needs

    read = read_mapping(path)
    section = check(read, path)
    given.pop("plan", None)
    for name, value in given.items():
        if name not in DeviceConfig.model_fields:
            raise ConfigError(f"is unknown; {did_you_mean(name, DeviceConfig.known_keys())}", ("device", name))
        _check_same(("device", name), value, getattr(section, name), DeviceConfig.model_fields[name].default, path)
    followed = {**values, "device": dict(read["device"])}
    training = values.get("training", {})
    mine = training if isinstance(training, Mapping) else getattr(training, "model_dump", dict)()
    chosen = read.get("training", {})
    for name, default in FOLLOWED.items():
        _check_same(("training", name), mine.get(name, default), chosen.get(name, default), default, path)
    if isinstance(training, Mapping) or mine:  # else the section refuses it
        followed["training"] = {**mine, **chosen}
    return followed


def _check_same(key: tuple[str, str], mine: Any, planned: Any, default: Any, path: str) -> None:
    """Raise `ConfigError` for a setting that is neither the plan's nor the default."""
    if (tuple(mine) if isinstance(mine, list) else mine) not in (planned, default):
        says = f"is {shown(mine)}, but the plan {path} says {shown(planned)}; leave one of them out"
        raise ConfigError(says, key)
