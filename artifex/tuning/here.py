"""The devices that are there: whether they are those that were asked for, and what measurements on them are about."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from artifex.config import Config
from artifex.scaling.autodist.cluster import Cluster

APART = ("description", "checkpoint", "logging")
"""Sections of a configuration on which no step depends."""


def check_free() -> None:
    """Raise `ValueError` where this process holds accelerators, which those that measure need."""
    import jax
    from jax._src import xla_bridge

    if xla_bridge.backends_are_initialized() and jax.default_backend() != "cpu":
        raise ValueError(
            f"this process already uses the {jax.default_backend()}, which a process that measures must have for "
            "itself; call auto_tune before JAX computes anything, or run python -m artifex.tune"
        )


def check_cluster(cluster: Cluster | str | None, there: Mapping[str, Any]) -> None:
    """Raise `ValueError` where a cluster that is asked for is not what is there: nothing is simulated."""
    if cluster is None:
        return
    wanted = Cluster.parse(cluster) if isinstance(cluster, str) else cluster
    kind, count = wanted.hardware.name, wanted.device_count
    if (kind, count) == (there["hardware"], there["count"]):
        return
    simulated = f", set JAX_NUM_CPU_DEVICES={count}" if kind == there["hardware"] == "cpu" else ""
    raise ValueError(
        f"the cluster asked for is {count} x {kind}, the devices that are here {there['count']} x {there['hardware']}: "
        f"a tune measures them; leave the cluster out{simulated}, or predict by python -m artifex.plan"
    )


def question(run: Config, there: Mapping[str, Any]) -> dict[str, Any]:
    """What measurements are about: the run, the devices, the versions."""
    values = {name: section for name, section in run.to_dict().items() if name not in APART}
    devices = {"kind": there["kind"], "count": there["count"], "processor": processor(), "cores": cores()}
    return {"run": values, "devices": devices, "versions": there["versions"]}


def processor() -> str:
    """What the host computes with, as it calls itself."""
    with contextlib.suppress(OSError):
        if named := re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M):
            return named[1]
    return platform.processor() or platform.machine()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices_text(there: Mapping[str, Any]) -> str:
    """The devices in words."""
    many = "s" * (there["count"] > 1)
    host = f" of {cores()} cores ({processor()})" if there["platform"] == "cpu" else ""
    return f"{there['count']} {there['kind']} device{many}{host}"
