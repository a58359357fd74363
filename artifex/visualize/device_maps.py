"""What devices do and what they send, drawn where they stand in the mesh."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

from artifex.scaling.figures import FILLS, HATCHES, INKS, LINES, Picture, check_path, finish, picture
from artifex.scaling.placement import size_text
from artifex.visualize.device_grid import DeviceGrid, DeviceMesh, device_grid

MOST = 64  # devices whose sends can be told apart
LABELLED = 48  # edges that are labelled with their bytes
Path = str | os.PathLike[str]
Share = float | Mapping[str, float]


def plot_device_utilization(map: Mapping[int, Share], device_mesh: DeviceMesh, path: Path | None = None) -> Picture:
    """How busy each device is: a grid with the share written in each cell, which is filled from below that far.

    `map`: device id -> a share in [0, 1], or its parts, as {"compute": 0.4, "communication": 0.3}, which are stacked in
    the cell and sum to at most 1. A device that it does not name is marked as not measured. `device_mesh`: a mesh, its
    sizes by axis, or a tuple of sizes. Raises `ValueError` for an empty map, a device that the mesh lacks, a share
    outside [0, 1], and an ending of `path` that is neither .png nor .svg.
    """
    check_path(path)
    grid, parts = device_grid(device_mesh), {device: _parts(device, share) for device, share in map.items()}
    if not parts:
        raise ValueError("the map of utilization names no device; give device id -> share")
    grid.check(parts, "the map of utilization")
    names = list(dict.fromkeys(name for shares in parts.values() for name in shares))
    styles = {name: _style(number) for number, name in enumerate(names)}
    cell = min(0.9, 16 / grid.columns)  # inches
    wide = max(4.5 / cell, grid.columns)
    figure = picture(cell * wide, cell * grid.rows + 1.0)
    axes = figure.subplots()
    for device in grid.position:
        _draw_cell(axes, grid, device, parts.get(device), styles)
    axes.set(xlim=(0, wide), ylim=(grid.rows, 0), aspect="equal", anchor="NW", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_xlabel(grid.caption(), loc="left", size="small", color="0.3")
    sums = [sum(shares.values()) for shares in parts.values()]
    head = f"utilization: mean {sum(sums) / len(sums):.0%}, least {min(sums):.0%}, most {max(sums):.0%}"
    axes.set_title(head, loc="left", size="medium")
    if names != [""]:
        keys = [Patch(label=name, ec="0.3", **styles[name]) for name in names]
        figure.legend(handles=keys, loc="outside lower left", ncols=len(keys), frameon=False, fontsize="small")
    return finish(figure, path)


def _parts(device: int, share: Share) -> dict[str, float]:
    """A device's shares by name; a single one has the name ""."""
    parts = dict(share) if isinstance(share, Mapping) else {"": float(share)}
    if not parts or any(not 0 <= one <= 1 for one in parts.values()) or sum(parts.values()) > 1 + 1e-6:
        raise ValueError(f"device {device} has the shares {share}; each is from 0 to 1, and so is their sum")
    return parts


def _style(number: int) -> dict[str, Any]:
    return {"fc": FILLS[number % len(FILLS)], "hatch": HATCHES[number % len(HATCHES)]}


def _draw_cell(
    axes: Axes, grid: DeviceGrid, device: int, parts: Mapping[str, float] | None, styles: Mapping[str, Any]
) -> None:
    """A cell of 0.9 by 0.9, filled from below; its id above, its share or its parts inside."""
    left, top = (place + 0.05 for place in grid.at(device))
    size, ends = 0.9, dict(zip(parts or {}, itertools.accumulate((parts or {}).values()), strict=True))
    for name, share in (parts or {}).items():
        box = Rectangle((left, top + size * (1 - ends[name])), size, size * share, ec="0.55", lw=0.4, **styles[name])
        axes.add_patch(box).set_gid(f"device {device} {name}".rstrip())
    axes.add_patch(Rectangle((left, top), size, size, fill=False, ec="0.3", lw=0.8)).set_gid(f"frame {device}")
    ground = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.85}
    axes.text(left + 0.05, top + 0.04, str(device), va="top", size=6.5, color="0.3", bbox=ground)
    if parts is None:
        axes.text(left + size / 2, top + 0.54, "not\nmeasured", ha="center", va="center", size=7).set_gid(
            f"share {device}"
        )
        return
    lowest, high = top + size, 0.09
    for name, share in parts.items():  # in the middle of its part, or above the number before
        high = max(high, size * (ends[name] - share / 2))
        text = axes.text(left + size / 2, lowest - high, f"{share:.0%}", ha="center", va="center", bbox=ground)
        text.set(size=8, gid=f"share {device} {name}".rstrip())
        high += 0.22


def plot_communication_graph(
    graph: Mapping[tuple[int, int], float], device_mesh: DeviceMesh, path: Path | None = None
) -> Picture:
    """Who sends how much to whom: an arrow for each pair of devices, as wide as its bytes, with them written beside.

    `graph`: (sender, receiver) -> bytes a step. Devices stand as in the mesh; an arrow is drawn as the mesh axes along
    which the two differ, in a colour and in a kind of line, and the legend has the total of each. Of more than 48
    arrows none is labelled. Raises `ValueError` for a mesh of more than 64 devices, a device that it lacks, a device
    that sends to itself, bytes below 0 or not finite, and an ending of `path` that is neither .png nor .svg.
    """
    check_path(path)
    grid = device_grid(device_mesh)
    _check_graph(graph, grid)
    sends = {pair: size for pair, size in graph.items() if size}
    kinds: dict[tuple[str, ...], float] = {}
    for pair, size in sends.items():
        between = grid.axes_between(*pair)
        kinds[between] = kinds.get(between, 0.0) + size
    kinds = {axes: kinds[axes] for axes in sorted(kinds, key=lambda axes: (len(axes), [*grid.sizes].index(axes[0])))}
    styles = {axes: (INKS[n % len(INKS)], LINES[n % len(LINES)]) for n, axes in enumerate(kinds)}
    step = 1.4 if len(grid.position) <= 16 else 1.0  # inches between devices
    wide = max(5.5 / step, grid.columns + 0.3)
    figure = picture(step * wide, step * (grid.rows + 0.2) + 1.0)
    axes = figure.subplots()
    most = max(sends.values(), default=1)
    axes.set(xlim=(-0.65, wide - 0.65), ylim=(grid.rows - 0.4, -0.6), aspect="equal", anchor="NW")
    arrows = {}
    for (sender, receiver), size in sends.items():
        ink, line = styles[grid.axes_between(sender, receiver)]
        arrows[sender, receiver] = _arrow(axes, grid, sender, receiver, ink, line, 0.6 + 2.4 * size / most)
    for device in grid.position:
        x, y = grid.at(device)
        round_ = {"boxstyle": "circle,pad=0.35", "fc": "white", "ec": "0.2"}
        axes.text(
            x, y, str(device), ha="center", va="center", size="small", bbox=round_, zorder=4, gid=f"node {device}"
        )
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_xlabel(grid.caption(), loc="left", size="small", color="0.3")
    axes.set_title(f"sent a step: {size_text(sum(sends.values()))} in {len(sends)} pairs", loc="left", size="medium")
    keys = [
        Line2D([], [], color=styles[axes][0], ls=styles[axes][1], lw=2, label=f"{'+'.join(axes)}: {size_text(total)}")
        for axes, total in kinds.items()
    ]
    if keys:
        figure.legend(handles=keys, loc="outside lower left", ncols=3, frameon=False, handlelength=4, fontsize="small")
    if len(sends) <= LABELLED:
        _label(figure, axes, arrows, sends)
    return finish(figure, path)


def _check_graph(graph: Mapping[tuple[int, int], float], grid: DeviceGrid) -> None:
    if len(grid.position) > MOST:
        raise ValueError(
            f"the mesh {grid.sizes} has {len(grid.position)} devices, and arrows among more than {MOST} cannot be told "
            "apart; draw the part of the mesh that matters, or sum the bytes by machine"
        )
    grid.check([device for pair in graph for device in pair], "the graph")
    for (sender, receiver), size in graph.items():
        if sender == receiver:
            raise ValueError(f"the graph has device {sender} send to itself; leave that pair out")
        if not (math.isfinite(size) and size >= 0):
            raise ValueError(f"the graph has {size} bytes from {sender} to {receiver}; they are finite and at least 0")


def _arrow(
    axes: Axes, grid: DeviceGrid, sender: int, receiver: int, ink: str, line: Any, width: float
) -> FancyArrowPatch:
    """A bent arrow, so that the one back lies beside it, and that over others goes round them."""
    (x0, y0), (x1, y1) = grid.at(sender), grid.at(receiver)
    length = math.hypot(x1 - x0, y1 - y0)
    over_others = length > 1 and 0 in (x1 - x0, y1 - y0)
    bulge = min(0.22 + 0.035 * length, 0.5) if over_others else min(0.08 * length, 0.4)  # of the curve's middle
    arrow = FancyArrowPatch(
        *((x0, y0), (x1, y1)),
        connectionstyle=f"arc3,rad={2 * bulge / length}",
        arrowstyle=f"-|>,head_width={2 + width / 2},head_length={4 + width / 2}",
        shrinkA=14,
        shrinkB=14,
    )
    arrow.set(color=ink, linestyle=line, linewidth=width, gid=f"send {sender} {receiver}", zorder=2)
    axes.add_patch(arrow)
    return arrow


def _label(figure: Any, axes: Axes, arrows: Mapping[tuple[int, int], FancyArrowPatch], sends: Mapping) -> None:
    """The bytes on each arrow, where along it they cover no other words; left out where there is no such place."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    taken = [text.get_window_extent(renderer) for text in axes.texts]
    for pair, arrow in arrows.items():
        points = np.asarray(arrow.get_path().vertices)[:3]  # a quadratic curve, in data
        for t in (0.5, 0.4, 0.6, 0.32, 0.68, 0.25, 0.75):
            x, y = ((1 - t) ** 2 * points[0] + 2 * t * (1 - t) * points[1] + t * t * points[2]).tolist()
            ground = {"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.9}
            text = axes.text(x, y, size_text(sends[pair]), ha="center", va="center", size=6.5, bbox=ground, zorder=3)
            text.set_gid(f"bytes {pair[0]} {pair[1]}")
            box = text.get_window_extent(renderer).padded(2)
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
