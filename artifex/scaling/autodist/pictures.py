"""The picture of a plan: memory against time of everything that was traced, the frontier, and the limit."""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifex.scaling.autodist.planned import Planned, seconds_text, shortest
from artifex.scaling.placement import size_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

    from artifex.scaling.autodist.spread import Spread
    from artifex.scaling.figures import Picture

BYTES = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
Point = tuple[float, float]


NAMED = 12  # strategies of the frontier that are named


def draw_frontier(found: Planned, path: str | Path) -> None:
    """Write the picture of `frontier`."""
    from artifex.scaling.figures import finish

    finish(frontier(found), path)


def frontier(found: Planned) -> Picture:
    """A point for each candidate, the line of those that no other beats in both memory and time, numbered and named
    below (12 of them at most), the chosen one, and the memory there is: as a line where it is near, else as an arrow at
    the edge."""
    from artifex.scaling.figures import picture

    every = [found.best, *found.runners, *found.over]
    (size, unit), (second, seconds_unit) = (
        _unit(BYTES, max(one.estimate.whole for one in every)),
        _unit(SECONDS, max(one.estimate.seconds for one in every)),
    )
    points = [(one.estimate.whole / size, one.estimate.seconds / second) for one in every]
    refuted = {index for index, one in enumerate(every) if found.refuted(one)}
    line = _unbeaten([point for index, point in enumerate(points) if index not in refuted])
    named = _spread(line)
    figure = picture(7.6, 4.4 + 0.2 * (5 + len(named)))
    axes = figure.subplots()
    right, high = _limits(axes, found, points, size)
    steps = [(line[0][0], high), *line, (right, line[-1][1])]
    axes.plot(*zip(*steps, strict=True), drawstyle="steps-post", color="0.6", zorder=1, label="frontier")
    fitted = [index for index in range(1, 1 + len(found.runners)) if index not in refuted]
    runners = [points[index] for index in fitted]
    others = [point for index, point in enumerate(points) if index and index not in fitted]
    for some, label, face in ((runners, "runners-up", "C0"), (others, "did not fit", "none")):
        if some:
            axes.scatter(*zip(*some, strict=True), s=26, facecolor=face, edgecolor="C0", zorder=2, label=label)
    axes.scatter(*points[0], s=90, color="C3", marker="*", zorder=3, label=_wrapped("chosen: ", found.spread))
    axes.set_xlabel(f"memory of a device, {unit}")
    axes.set_ylabel(f"predicted time of a step, {seconds_unit}")
    axes.ticklabel_format(useOffset=False, style="plain")
    takes = f"{seconds_text(found.estimate.seconds)} a step, {size_text(found.estimate.whole)} a device"
    axes.set_title(f"{found.about['model']} on {found.cluster_name}: {takes}", fontsize=10, loc="left")
    handles, _ = axes.get_legend_handles_labels()
    for number, point in enumerate(named, 1):
        one = every[next(i for i, at in enumerate(points) if at == point and i not in refuted)]
        takes = f"{size_text(one.estimate.whole)}, {seconds_text(one.estimate.seconds)}"
        handles.append(_key(number, f"{_wrapped('', one.spread)}: {takes}"))
    figure.legend(handles=handles, fontsize=8, loc="outside lower left", frameon=False)
    _number(figure, axes, named, points)
    return figure


def _limits(axes: Axes, found: Planned, points: list[Point], size: float) -> Point:
    """Set the axes' limits to hold all points, and say what memory there is; the right and the upper limit."""
    limit = None if found.limit is None else found.limit / size
    (left, right), (low, high) = (_range([point[index] for point in points]) for index in (0, 1))
    if limit is not None and left - (right - left) <= limit <= right + (right - left):
        (left, right) = _range([left, right, limit], 0.04)
        axes.axvline(limit, color="C3", linestyle=":", label=f"limit {size_text(found.limit or 0)}")
    elif limit is not None:
        _point_at(axes, f"limit {size_text(found.limit or 0)}", right=limit > right)
    axes.set(xlim=(left, right), ylim=(low, high))
    return right, high


def _wrapped(head: str, spread: Spread) -> str:
    """A strategy's name in lines of a legend."""
    text = re.sub(r",\b", ", ", str(shortest(spread)))  # lines may break there
    return textwrap.fill(f"{head}{text}", 96, max_lines=3, placeholder=" ...")


def _spread(line: list[Point]) -> list[Point]:
    """At most `NAMED` of the points, the first and the last among them."""
    if len(line) <= NAMED:
        return line
    return [line[round(number * (len(line) - 1) / (NAMED - 1))] for number in range(NAMED)]


def _key(number: int, name: str) -> Line2D:
    """An entry of the legend: the number of a point and its strategy."""
    from matplotlib.lines import Line2D

    return Line2D([], [], ls="none", marker=f"${number}$", ms=4.5 + 2.5 * len(str(number)), color="0.1", label=name)


def _number(figure: Picture, axes: Axes, named: list[Point], points: list[Point]) -> None:
    """Write each point's number beside it, as near as it covers no other number and no point."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    scale = figure.dpi / 72  # screen pixels of a point of print
    half, inside = 4 * scale, axes.bbox
    places = axes.transData.transform(points)
    taken = [Bbox.from_bounds(x - half, y - half, 2 * half, 2 * half) for x, y in places]
    for number, point in enumerate(named, 1):
        x, y = axes.transData.transform(point)
        wide = (6.5 * len(str(number)) + 1) * scale
        for radius, turn in itertools.product((12, 16, 22, 29, 38, 50), (1, 3, 7, 5, 0, 2, 4, 6)):
            dx, dy = (radius * f(turn * math.pi / 4) for f in (math.cos, math.sin))
            box = Bbox.from_bounds(x + dx * scale - wide / 2, y + dy * scale - 5 * scale, wide, 10 * scale)
            if all(inside.contains(*corner) for corner in box.corners()) and not box.count_overlaps(taken):
                break
        taken.append(box)
        leader = {"arrowstyle": "-", "lw": 0.5, "color": "0.5"} if radius > 16 else None
        how = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 9, "arrowprops": leader}
        axes.annotate(str(number), point, (dx, dy), **how).set_gid(f"strategy {number}")


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
