"""Pictures of how a run is spread: the part of a tensor that each device holds, and what each does of a pipeline."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jax.sharding import Mesh, PartitionSpec

from artifex.scaling.axes import Names, check_names, mesh_sizes
from artifex.scaling.pipeline.schedules import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREY = "0.75"  # of a tensor that nothing divides
IDLE = "0.92"
GAP = 0.3  # between frames, in widths of a frame


def draw_shards(
    axes: Axes, spec: PartitionSpec, shape: Sequence[int], mesh: Mesh | Mapping[str, int], names: Names
) -> None:
    """Draw on matplotlib's `axes` a frame for each device: the whole tensor, filled where that device holds it.

    A colour is a part: frames of one colour hold copies of it, grey ones the whole tensor. The mesh's last axis runs
    to the right, the one before it downwards, and all others count grids side by side. Of a tensor of more than two
    dims those are drawn that the spec splits most, then the largest. Of a split dim that is not drawn a device's part
    stands behind its number, and the caption names the dim. `mesh` may be only its sizes. Raises `ValueError` for
    a scalar, a spec that has more entries than the tensor has dims or names an axis that the mesh lacks, and for names
    that are not one known logical axis, or None, for each dim.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    check_names(names, shape)
    sizes = mesh_sizes(mesh)
    axes_of = _axes_of_dims(spec, shape, sizes)
    ways = [math.prod(sizes[axis] for axis in split) for split in axes_of]
    count = math.prod(ways)
    *above, right = _drawn_dims(ways, shape)
    beyond = [dim for dim, n in enumerate(ways) if n > 1 and dim not in (*above, right)]
    # flatter for wide tensors, but never too thin to read
    height = min(max(math.sqrt(shape[above[0]] / shape[right]), 0.7), 1.3) if above else 0.35
    for number, position in enumerate(itertools.product(*map(range, sizes.values()))):
        at = dict(zip(sizes, position, strict=True))
        index = [_ravel([at[axis] for axis in split], [sizes[axis] for axis in split]) for split in axes_of]
        x, width = index[right] / ways[right], 1 / ways[right]
        y, part = (index[above[0]] / ways[above[0]], 1 / ways[above[0]]) if above else (0.0, 1.0)
        left, top = _corner(position, tuple(sizes.values()), height)
        colour = GREY if count == 1 else colormaps["viridis"](0.06 + 0.86 * _ravel(index, ways) / (count - 1))
        device = mesh.devices[position].id if isinstance(mesh, Mesh) else number
        held = Rectangle((left + x, top + y * height), width, part * height, color=colour, lw=0, gid=f"device {device}")
        frame = Rectangle((left, top), 1, height, fill=False, ec="0.4", lw=0.8)
        for patch in (held, frame):
            axes.add_patch(patch).set_clip_on(False)  # rounding to pixels would cut the outermost lines
        label = ":".join([str(device), *(str(index[dim]) for dim in beyond)])
        axes.text(left + 0.5, top - 0.04, label, ha="center", va="bottom", size="x-small", color="0.3")
    axes.set(xlim=(0, left + 1), ylim=(top + height, -0.25), aspect="equal", anchor="NW", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    more = [f"{_dim_text(names, shape, dim)} split {ways[dim]} ways by {'+'.join(axes_of[dim])}" for dim in beyond]
    behind = [f"behind a device's number, its part of: {', '.join(more)}"] if more else []
    caption = "\n".join([_caption(sizes, shape, names, above, right), *behind])
    axes.set_xlabel(caption, loc="left", size="small", color="0.3")


def draw_schedule(axes: Axes, schedule: Schedule, forward: float = 1.0, backward: float = 2.0) -> None:
    """Draw on matplotlib's `axes` what each device does when: a row for each device, time to the right.

    Blue, dark with a light number, is a microbatch forwards, orange, light with a dark number, one backwards; both are
    darker in a device's later stages, and what is hatched is idle. A tick is as wide as its turns take, `forward` and
    `backward` for those that any device has in it, as in `Schedule.time`.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    S, V, left = schedule.devices, schedule.stages_per_device, 0.0
    axes.add_patch(
        Rectangle((0, 0), schedule.time(forward, backward), S, fc=IDLE, ec="0.78", lw=0, hatch="////", gid="idle")
    )
    for row in schedule.turns:
        for way, (word, width, colours, light, ink) in enumerate(
            (("forward", forward, "Blues", 0.65, "white"), ("backward", backward, "Oranges", 0.15, "0.1"))
        ):
            if not any(pair[way] for pair in row):
                continue
            for device, pair in enumerate(row):
                if (turn := pair[way]) is None:
                    continue
                microbatch, stage = turn
                shade = light + 0.3 * (stage // S) / max(V - 1, 1)
                cell = Rectangle((left, device), width, 1, fc=colormaps[colours](shade), ec="white", lw=0.8)
                axes.add_patch(cell).set_gid(f"{word} {microbatch} stage {stage}")
                axes.text(left + width / 2, device + 0.5, str(microbatch), ha="center", va="center", color=ink)
            left += width
    axes.set(xlim=(0, left), ylim=(S, 0), xticks=[], yticks=[device + 0.5 for device in range(S)])
    axes.set_yticklabels([f"device {device}" for device in range(S)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _axes_of_dims(spec: PartitionSpec, shape: Sequence[int], sizes: Mapping[str, int]) -> list[tuple[str, ...]]:
    """The mesh axes that split each dim."""
    split = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
    if len(split) > len(shape):
        raise ValueError(
            f"{spec} has {len(split)} entries, shape {tuple(shape)} {len(shape)} dims; give at most one a dim"
        )
    for axis in itertools.chain(*split):
        if axis not in sizes:
            raise ValueError(f"{spec} names mesh axis {axis!r}, but the mesh has {tuple(sizes)}")
    return split + [()] * (len(shape) - len(split))


def _drawn_dims(ways: Sequence[int], shape: Sequence[int]) -> list[int]:
    """The dims, at most two, that a picture shows: downwards, to the right."""
    if not shape:
        raise ValueError("a scalar has no dims to draw; draw it as a tensor of shape (1,)")
    return sorted(sorted(range(len(shape)), key=lambda dim: (-ways[dim], -shape[dim]))[:2])


def _dim_text(names: Names, shape: Sequence[int], dim: int) -> str:
    return f"{names[dim] or 'dim'} {shape[dim]}"


def _corner(position: Sequence[int], sizes: Sequence[int], height: float) -> tuple[float, float]:
    """The left and the upper edge of the frame of the device at `position`."""
    *outer, row, column = (0, *position)
    grid = _ravel(outer, (1, *sizes)[:-2])
    return grid * (sizes[-1] * (1 + GAP) + GAP) + column * (1 + GAP), row * (height + GAP)


def _ravel(index: Sequence[int], sizes: Sequence[int]) -> int:
    """The number of an element, the first dim slowest."""
    number = 0
    for i, size in zip(index, sizes, strict=True):
        number = number * size + i
    return number


def _caption(sizes: Mapping[str, int], shape: Sequence[int], names: Names, above: Sequence[int], right: int) -> str:
    """What runs where: the mesh's axes over the frames, the tensor's dims inside each."""
    *outer, last = sizes
    mesh = [*(f"{axis} grid by grid" for axis in outer[:-1]), *(f"{axis} ↓" for axis in outer[-1:]), f"{last} →"]
    arrows = [*((dim, "↓") for dim in above), (right, "→")]
    dims = [f"{_dim_text(names, shape, dim)} {arrow}" for dim, arrow in arrows]
    return f"devices: {', '.join(mesh)}\nin each frame: {', '.join(dims)}"
