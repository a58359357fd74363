"""The picture of a plan: memory against time of everything that was traced, the frontier, and the limit."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifex.scaling.autodist.planned import Planned, seconds_text, shortest
from artifex.scaling.placement import size_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BYTES = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
Point = tuple[float, float]


def draw_frontier(found: Planned, path: str | Path) -> None:
    """Write the picture of `frontier`."""
    frontier(found).savefig(path, dpi=130)


def frontier(found: Planned) -> Figure:
    """A point for each candidate, the line of those that no other beats in both memory and time, the chosen one, and
    the memory there is: as a line where it is near, else as an arrow at the edge."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    every = [found.best, *found.runners, *found.over]
    (size, unit), (second, seconds_unit) = (
        _unit(BYTES, max(one.estimate.whole for one in every)),
        _unit(SECONDS, max(one.estimate.seconds for one in every)),
    )
    points = [(one.estimate.whole / size, one.estimate.seconds / second) for one in every]
    limit = None if found.limit is None else found.limit / size
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    (left, right), (low, high) = (_range([point[index] for point in points]) for index in (0, 1))
    near = limit is not None and left - (right - left) <= limit <= right + (right - left)
    if limit is not None and near:
        (left, right) = _range([left, right, limit], 0.04)
        axes.axvline(limit, color="C3", linestyle=":", label=f"limit {size_text(found.limit or 0)}")
    elif limit is not None:
        _point_at(axes, f"limit {size_text(found.limit or 0)}", right=limit > right)
    refuted = {index for index, one in enumerate(every) if found.refuted(one)}
    line = _unbeaten([point for index, point in enumerate(points) if index not in refuted])
    steps = [(line[0][0], high), *line, (right, line[-1][1])]
    axes.plot(*zip(*steps, strict=True), drawstyle="steps-post", color="0.6", zorder=1, label="frontier")
    fitted = [index for index in range(1, 1 + len(found.runners)) if index not in refuted]
    runners = [points[index] for index in fitted]
    others = [point for index, point in enumerate(points) if index and index not in fitted]
    for some, label, face in ((runners, "runners-up", "C0"), (others, "did not fit", "none")):
        if some:
            axes.scatter(*zip(*some, strict=True), s=26, facecolor=face, edgecolor="C0", zorder=2, label=label)
    spread = re.sub(r",\b", ", ", str(shortest(found.spread)))  # lines may break there
    chosen = textwrap.fill(f"chosen: {spread}", 56, max_lines=3, placeholder=" ...")
    axes.scatter(*points[0], s=90, color="C3", marker="*", zorder=3, label=chosen)
    axes.set(xlim=(left, right), ylim=(low, high))
    axes.set_xlabel(f"memory of a device, {unit}")
    axes.set_ylabel(f"predicted time of a step, {seconds_unit}")
    axes.ticklabel_format(useOffset=False, style="plain")
    takes = f"{seconds_text(found.estimate.seconds)} a step, {size_text(found.estimate.whole)} a device"
    axes.set_title(f"{found.about['model']} on {found.cluster_name}: {takes}", fontsize=10, loc="left")
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    return figure


def _unbeaten(points: list[Point]) -> list[Point]:
    """Those that no other beats in both, by memory."""
    kept: list[Point] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def _unit(units: dict[str, Any], largest: float) -> tuple[float, str]:
    """The largest unit of which there is one, else the smallest."""
    name = next((name for name, size in units.items() if largest >= size), [*units][-1])
    return units[name], name


def _range(values: list[float], part: float = 0.12) -> tuple[float, float]:
    """From the least to the greatest and a little more, and no less than a tenth of it: equal ones are no extremes."""
    least, most = min(values), max(values)
    more = max(part * (most - least), 0.05 * most)
    return max(0.0, least - more), most + more


def _point_at(axes: Any, text: str, *, right: bool) -> None:
    """Say above the axes' edge that something lies beyond it."""
    at, word = (1.0, f"{text} \N{RIGHTWARDS ARROW}") if right else (0.0, f"\N{LEFTWARDS ARROW} {text}")
    align = "right" if right else "left"
    how: dict[str, Any] = {"xycoords": "axes fraction", "xytext": (0, -26), "textcoords": "offset points"}
    axes.annotate(word, (at, 0.0), **how, ha=align, va="top", color="C3", fontsize=9)
