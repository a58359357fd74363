"""The FLOP/s that devices reach at most: as their maker lists them, or as large products were measured to reach.

found = peak(jax.devices(), "bfloat16")
found.flops, found.source     # of all of them together; None where neither is known
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from artifex.scaling.autodist.cluster import HARDWARE
from artifex.scaling.autodist.profile import FILE, ON_CPU, Measured, Row, Sizes, default_dir, measure


@dataclasses.dataclass(frozen=True)
class Peak:
    """FLOP/s of all devices together, and where that figure is from."""

    flops: float
    source: str

    def __str__(self) -> str:
        return f"{self.flops / 1e12:,.4g} TFLOP/s, {self.source}"


def peak(
    devices: Sequence[Any], dtype: str, *, measured: bool = False, folder: str | Path | None = None
) -> Peak | None:
    """The peak of `devices`, all of one kind, for products of `dtype`, "bfloat16" or "float32".

    That of the maker where it is listed. CPUs have none: for them the fastest product that was measured with all of
    them at once, as by `python -m artifex.plan profile`; it is measured now, in seconds, where it was not before and
    `measured` asks for it, else the answer is None. `folder`: where measurements lie, by default those of the user.
    """
    kind, count = devices[0].device_kind, len(devices)
    name = kind.lower().replace(" ", "")
    if devices[0].platform != "cpu":
        listed = next((one for key, one in HARDWARE.items() if key.split(":")[-1] in name), None)
        if listed is not None and dtype in listed.flops:
            return Peak(listed.flops[dtype] * count, f"the peak that is listed for {listed.name}")
    folder = default_dir(kind) if folder is None else Path(folder)
    rates = [row.rate for row in _known(folder, kind) if _is_product(row, dtype, count)]
    if not rates and measured:
        sizes = Sizes(ON_CPU.products if devices[0].platform == "cpu" else Sizes().products, (dtype,), (), ())
        rates = [row.rate for row in _measured(devices, folder, sizes) if _is_product(row, dtype, count)]
    if not rates:
        return None
    at_once = f", {count} at once" if count > 1 else ""
    return Peak(max(rates) * count, f"the fastest product measured on {kind}{at_once}")


def _known(folder: Path, kind: str) -> tuple[Row, ...]:
    """What was measured on such devices by this version of JAX."""
    if not (folder / FILE).exists():
        return ()
    try:
        found = Measured.load(folder)
    except ValueError:
        return ()
    return found.rows if (found.device, found.version) == (kind, jax.__version__) else ()


def _measured(devices: Sequence[Any], folder: Path, sizes: Sizes) -> tuple[Row, ...]:
    """The same, measured now; kept in the folder beside what it has, where that is of this version."""
    other = (folder / FILE).exists() and not _known(folder, devices[0].device_kind)
    return measure(devices, folder=folder / jax.__version__ if other else folder, sizes=sizes).rows


def _is_product(row: Row, dtype: str, devices: int) -> bool:
    return (row.what, row.dtype, row.devices) == ("product", dtype, devices) and not row.error
