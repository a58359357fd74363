"""What time and memory are spent on: pipelines with their bubbles, and bytes by part against the limit."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from artifex.scaling.figures import FILLS, HATCHES, Picture, check_path, finish, picture
from artifex.scaling.pictures import IDLE, draw_schedule
from artifex.scaling.pipeline.schedules import Schedule
from artifex.scaling.placement import size_text

Path = str | os.PathLike[str]
MEMORY = 7.0  # inches of the bars' axes
LETTER = 0.085  # inches of a small letter


def plot_schedule(
    schedule_or_several: Schedule | Sequence[Schedule],
    forward: float = 1.0,
    backward: float = 2.0,
    path: Path | None = None,
) -> Picture:
    """What each device of a pipeline does when, idle time hatched: one schedule, or several below each other on one
    axis of time. The share of the time in which a device is idle stands above each.

    `forward` and `backward`: what all of a device's stages take for a microbatch, in any unit; one of its V stages
    takes the V-th part, so that schedules of unequal V are comparable. Raises `ValueError` for no schedule, for times
    that are not above 0, and for an ending of `path` that is neither .png nor .svg.
    """
    check_path(path)
    several = [schedule_or_several] if isinstance(schedule_or_several, Schedule) else list(schedule_or_several)
    if not several:
        raise ValueError("there is no schedule to draw; give at least one")
    if not all(math.isfinite(time) and time > 0 for time in (forward, backward)):
        raise ValueError(f"a microbatch takes {forward} forwards and {backward} backwards; both are above 0")
    times = [(forward / one.stages_per_device, backward / one.stages_per_device) for one in several]
    longest = max(one.time(*time) for one, time in zip(several, times, strict=True))
    least = min(min(time) for time in times)  # the narrowest cell has room for its number
    digits = max(len(str(one.microbatches - 1)) for one in several)
    figure = picture(
        min(24.0, max(7.0, 1.0 + (0.09 + 0.1 * digits) * longest / least)),
        sum(0.34 * one.devices + 0.55 for one in several) + 0.6,
    )
    rows = figure.subplots(len(several), 1, squeeze=False, height_ratios=[one.devices for one in several])[:, 0]
    for axes, one, time in zip(rows, several, times, strict=True):
        draw_schedule(axes, one, *time)
        axes.set_title(f"{one}: idle {one.bubble(*time):.0%}", loc="left", size="medium")
        axes.set_xlim(0, longest)
    rows[-1].set_xlabel("time →", loc="left", size="small", color="0.3")
    keys = [
        Patch(fc="#2171b5", label="forward: light number"),
        Patch(fc="#fdd0a2", label="backward: dark number"),
        Patch(fc=IDLE, ec="0.6", hatch="////", label="idle"),
    ]
    figure.legend(handles=keys, loc="outside lower right", ncols=3, frameon=False, fontsize="small")
    _thin_numbers(figure, rows)
    return finish(figure, path)


def _thin_numbers(figure: Picture, rows: Iterable[Axes]) -> None:
    """Take away the numbers that are wider than their cells: of so many microbatches the pattern tells more."""
    figure.draw_without_rendering()
    for axes in rows:
        cells = [patch for patch in axes.patches if patch.get_gid() != "idle"]
        pairs = list(zip(cells, axes.texts, strict=True))
        if any(text.get_window_extent().width > cell.get_window_extent().width for cell, text in pairs):
            for _, text in pairs:
                text.set_visible(False)


def plot_memory(
    parts: Mapping[str, float] | Mapping[str, Mapping[str, float]],
    limit: float | None = None,
    path: Path | None = None,
) -> Picture:
    """What a device's memory is taken by: a bar of parts with their bytes, and the limit as a line.

    `parts`: part -> bytes, or several such by label, as {"XLA": {...}, "predicted": {...}}, a bar each; a part has one
    fill and hatch in all of them. Raises `ValueError` for no parts, bytes below 0 or not finite, a limit not above 0,
    and an ending of `path` that is neither .png nor .svg.
    """
    check_path(path)
    bars = _bars(parts)
    if limit is not None and not (math.isfinite(limit) and limit > 0):
        raise ValueError(f"limit is {limit} bytes; it is finite and above 0, or None")
    names = list(dict.fromkeys(name for bar in bars.values() for name in bar))
    styles = {name: _style(number) for number, name in enumerate(names)}
    totals = {label: sum(bar.values()) for label, bar in bars.items()}
    end = max([*totals.values(), limit or 0]) * 1.22 or 1.0
    figure = picture(MEMORY + 1.6, 0.62 * len(bars) + 1.2 + 0.22 * math.ceil(len(names) / 3))
    axes = figure.subplots()
    for row, (label, bar) in enumerate(bars.items()):
        _draw_bar(axes, row, label, bar, styles, MEMORY / end)
        over = "" if limit is None else f", {totals[label] / limit:.0%} of the limit"
        text = f"{size_text(totals[label])}{over}"
        axes.text(0.004 * end, row - 0.36, text, size="small", va="bottom").set_gid(f"total {row}")
    if limit is not None:
        axes.axvline(limit, color="#b91c1c", ls=(0, (5, 2)), lw=1.6).set_gid("limit")
        axes.text(limit, len(bars) - 0.42, f" limit {size_text(limit)}", size="small", va="top", ha="center")
    axes.set(xlim=(0, end), ylim=(len(bars) - 0.4, -0.75), xticks=[], yticks=range(len(bars)))
    axes.set_yticklabels(bars)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_title("memory of a device", loc="left", size="medium")
    most = {name: max(bar.get(name, 0) for bar in bars.values()) for name in names}
    keys = [
        Patch(label=f"{name}: {size_text(size)}" if len(bars) == 1 else name, ec="0.3", **styles[name])
        for name, size in most.items()
    ]
    figure.legend(handles=keys, loc="outside lower left", ncols=3, frameon=False, fontsize="small")
    return finish(figure, path)


def _bars(parts: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Label -> part -> bytes; a single bar has the label ""."""
    nested = [isinstance(value, Mapping) for value in parts.values()]
    if len({*nested}) > 1:
        raise ValueError("parts mixes bytes and mappings; give part -> bytes, or label -> such a mapping")
    bars = {label: dict(bar) for label, bar in parts.items()} if any(nested) else {"": dict(parts)}
    if not all(bars.values()):
        raise ValueError("there is a bar without parts; give each at least one part -> bytes")
    for bar in bars.values():
        for name, size in bar.items():
            if not (math.isfinite(size) and size >= 0):
                raise ValueError(f"part {name!r} has {size} bytes; they are finite and at least 0")
    return bars


def _style(number: int) -> dict[str, Any]:
    return {"fc": FILLS[number % len(FILLS)], "hatch": HATCHES[number % len(HATCHES)]}


def _draw_bar(
    axes: Axes, row: int, label: str, bar: Mapping[str, float], styles: Mapping[str, Any], inches: float
) -> None:
    """Parts one behind the other, each with its bytes where there is room: `inches` is of a byte."""
    left = 0.0
    for name, size in bar.items():
        axes.barh(row, size, left=left, height=0.6, ec="0.3", lw=0.6, **styles[name], gid=f"part {label} {name}")
        words = [f"{name}\n{size_text(size)}", size_text(size)]
        fits = [text for text in words if size * inches > LETTER * max(map(len, text.split("\n"))) + 0.1]
        if fits and size:
            ground = {"boxstyle": "square,pad=0.15", "fc": styles[name]["fc"], "ec": "none"}
            axes.text(left + size / 2, row, fits[0], ha="center", va="center", size="x-small", bbox=ground, zorder=4)
        left += size
