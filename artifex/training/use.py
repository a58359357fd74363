"""How much of the devices a run uses: model FLOPs utilisation, and memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from artifex.scaling.placement import size_text
from artifex.training.state import Blueprint

MFU, IN_USE, COMPILED = "mfu", "peak_bytes_in_use", "step_bytes"
_of_peak: dict[int, tuple[Blueprint, float | None]] = {}


def use(blue: Blueprint, steps_per_second: float | None, step_bytes: int) -> dict[str, Any]:
    """Of a line of metrics: `mfu`, 0 to 1, where the devices' peak is known and a rate is; and `peak_bytes_in_use`, the
    most that any device of this process has held so far, or, where devices do not say (CPUs), `step_bytes`, what the
    compiled step takes of one."""
    used: dict[str, Any] = {}
    if steps_per_second is not None and (share := share_of_peak(blue)) is not None:
        used[MFU] = steps_per_second * share
    held = [(device.memory_stats() or {}).get(IN_USE) for device in blue.mesh.local_devices]
    if known := [size for size in held if size]:
        used[IN_USE] = max(known)
    elif step_bytes:
        used[COMPILED] = step_bytes
    return used


def share_of_peak(blue: Blueprint) -> float | None:
    """Seconds that the FLOPs of a step need at the peak of its devices; None where either is not known. Counted once
    for a run, which takes a second or so."""
    if id(blue) not in _of_peak or _of_peak[id(blue)][0] is not blue:
        _of_peak.clear()
        _of_peak[id(blue)] = blue, _share(blue)
    return _of_peak[id(blue)][1]


def _share(blue: Blueprint) -> float | None:
    from artifex.scaling.peak import peak  # once a step is computed: neither is needed before
    from artifex.training.model_flops import model_flops

    found = peak(blue.mesh.devices.ravel().tolist(), blue.config.training.compute_dtype)
    if found is None:
        return None
    share = model_flops(blue.config) / found.flops
    return share if math.isfinite(share) else None


def in_words(used: Mapping[str, Any]) -> str:
    """What of it stands beside the bar."""
    words = f"  MFU {used[MFU]:.1%}" if MFU in used else ""
    return words + (f"  {size_text(used[IN_USE])}" if IN_USE in used else "")
