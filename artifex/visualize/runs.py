"""How runs went: their losses compared, and their samples by step."""

from __future__ import annotations

import itertools
import math
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeGuard

import matplotlib.image
import numpy as np
from matplotlib.axes import Axes

from artifex.scaling.figures import INKS, LINES, Picture, check_path, finish, picture
from artifex.training.run_folder import RunFolder

Folder = str | os.PathLike[str]
Against = Literal["step", "seconds", "tokens", "images"]
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
WORDS = {"step": "step", "seconds": "seconds of training", "tokens": "tokens", "images": "images"}
ROWS = 6  # of samples, by step


def plot_runs(
    folders: Folder | Sequence[Folder],
    metric: str | None = None,
    against: Against = "step",
    path: Folder | None = None,
) -> Picture:
    """A metric of one or several runs: lines of training, marks of validation, each run's name at the end of its line.

    `metric`: a field of `metrics.jsonl`, by default the loss. `against`: the step, the seconds that the run took, over
    all its restarts, or the tokens or images it had learned from. Steps whose metric is not finite are gaps. Raises
    `ValueError` for a folder without such a metric, for what a run does not count, and for an ending of `path` that is
    neither .png nor .svg.
    """
    check_path(path)
    if against not in WORDS:
        raise ValueError(f"against is {against!r}; choose {', '.join(WORDS)}")
    named, metric = _named(folders), metric or "loss"
    curves = {name: _curves(folder, metric, against) for name, folder in named.items()}
    figure = picture(8.4, 4.6)
    axes = figure.subplots()
    ends = {}
    for number, (name, splits) in enumerate(curves.items()):
        ink = INKS[number % len(INKS)]
        for split, points in splits.items():
            own: dict[str, Any] = {"ls": LINES[number % len(LINES)], "lw": 1.3}
            if split != "train":
                own = {"ls": "none", "marker": MARKS[number % len(MARKS)], "ms": 5, "mfc": "white", "zorder": 3}
            last = [value for _, value in points if math.isfinite(value)][-1:]
            label = f"{name}, {split}" + "".join(f", last {value:.4g}" for value in last)
            axes.plot(*zip(*points, strict=True), color=ink, label=label, gid=f"{split} {name}", **own)
        finite = [point for points in splits.values() for point in points if math.isfinite(point[1])]
        ends[name] = (max(finite), ink) if finite else None
    _zoom(axes, [value for splits in curves.values() for points in splits.values() for _, value in points])
    axes.set(xlabel=WORDS[against], ylabel=metric.replace("_", " "))
    many = f"{len(curves)} runs" if len(curves) > 1 else next(iter(curves))
    axes.set_title(f"{metric.replace('_', ' ')} of {many}", loc="left", size="medium")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize="small", handlelength=3.5)
    if len(curves) > 1:
        _label_ends(figure, axes, {name: end for name, end in ends.items() if end is not None})
    return finish(figure, path)


def _named(folders: Folder | Sequence[Folder]) -> dict[str, RunFolder]:
    """Runs by their folders' names, with as many of the folders above as tell them apart."""
    paths = [Path(folders)] if isinstance(folders, str | os.PathLike) else [Path(folder) for folder in folders]
    paths = list(dict.fromkeys(paths))
    if not paths:
        raise ValueError("there is no run to draw; give at least one folder")
    for folder in paths:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; give the folder of a run")
    parts = [folder.resolve().parts for folder in paths]
    depth = next(n for n in itertools.count(1) if len({part[-n:] for part in parts}) == len({*parts}))
    return {"/".join(part[-depth:]): RunFolder(folder) for part, folder in zip(parts, paths, strict=True)}


def _curves(run: RunFolder, metric: str, against: Against) -> dict[str, list[tuple[float, float]]]:
    """(x, value) of each split that has the metric; a value that was not finite is NaN."""
    records = [record for record in run.read_metrics() if record["split"] in ("train", "validation")]
    having = [record for record in records if _is_number(record.get(metric)) or metric in record.get("not_finite", {})]
    if not having:
        fields = sorted({key for record in records for key, value in record.items() if _is_number(value)} - {"step"})
        what = f"has {', '.join(fields)}" if fields else "has no metrics.jsonl with lines of training or validation"
        raise ValueError(f"{run.path} has no metric {metric!r}: it {what}")
    x_of = _positions(records, run, against)
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in having:
        value = record.get(metric)
        point = (x_of[id(record)], float(value) if _is_number(value) else math.nan)
        curves.setdefault(record["split"], []).append(point)
    return curves


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positions(records: Sequence[Mapping[str, Any]], run: RunFolder, against: Against) -> dict[int, float]:
    """Where each record stands, by its identity."""
    if against == "step":
        return {id(record): record["step"] for record in records}
    if against == "seconds":
        return dict(zip(map(id, records), _seconds(records), strict=True))
    known = [(record["step"], record[against]) for record in records if _is_number(record.get(against))]
    if not known:
        counted = sorted({noun for record in records for noun in ("tokens", "images") if noun in record})
        raise ValueError(f"{run.path} counts no {against}; it has {', '.join(counted) or 'neither'}: choose another")
    steps, counts = zip(*[(0, 0), *known], strict=True)
    return {id(record): float(np.interp(record["step"], steps, counts)) for record in records}


def _seconds(records: Iterable[Mapping[str, Any]]) -> list[float]:
    """Seconds since the run began: each restart counts from 0 anew and goes on where the last line before it was."""
    before, last, found = 0.0, 0.0, []
    for record in records:
        seconds = record.get("elapsed_seconds")
        if _is_number(seconds):
            before += last if seconds < last else 0.0
            last = seconds
        found.append(before + last)
    return found


def _zoom(axes: Axes, values: Iterable[float]) -> None:
    """Leave out the first steps' fall from chance level, which would flatten all that follows."""
    finite = sorted(value for value in values if math.isfinite(value))
    kept = finite[: len(finite) - int(len(finite) * 0.03)]
    if kept and kept[-1] > kept[0]:
        more = kept[-1] - kept[0]
        axes.set_ylim(kept[0] - 0.06 * more, kept[-1] + 0.03 * more)


def _label_ends(figure: Picture, axes: Axes, ends: Mapping[str, tuple[tuple[float, float], str]]) -> None:
    """Each run's name to the right of its last point, moved apart where they would cover each other."""
    low, high = axes.get_ylim()
    figure.draw_without_rendering()
    apart = 1.35 * 11 / (axes.get_window_extent().height * 72 / figure.dpi) * (high - low)  # a line of 11 points
    lowest = -math.inf
    for name, ((x, y), ink) in sorted(ends.items(), key=lambda item: item[1][0][1]):
        lowest = max(min(max(y, low), high), lowest + apart)
        axes.annotate(
            name if len(name) <= 28 else f"…{name[-27:]}",
            *((x, min(max(y, low), high)), (1.02, lowest)),
            textcoords=axes.get_yaxis_transform(),
            arrowprops={"arrowstyle": "-", "color": ink, "lw": 0.6, "alpha": 0.6},
            va="center",
            size="small",
            color=ink,
            annotation_clip=False,
        ).set_gid(f"name {name}")


def plot_samples(folders: Folder | Sequence[Folder], path: Folder | None = None, *, rows: int = ROWS) -> Picture:
    """What runs drew or wrote as they learned: a column a run, a row a step from the first down to the last.

    Of more samples than `rows`, those nearest to even distances by number are shown, the first and last among them.
    Raises `ValueError` for a run without samples, `rows` below 2, and an ending of `path` that is neither .png nor
    .svg.
    """
    check_path(path)
    if rows < 2:
        raise ValueError(f"rows is {rows}; the first and the last sample take at least 2")
    named = _named(folders)
    columns = {name: _spread(_samples(run), rows) for name, run in named.items()}
    height = max(map(len, columns.values()))
    tallest = max(_height(file) for samples in columns.values() for _, file in samples)
    figure = picture(max(5.0, 3.6 * len(columns)), (tallest + 0.35) * height + 0.3)
    grid = figure.subplots(height, len(columns), squeeze=False)
    for column, (name, samples) in enumerate(columns.items()):
        for row in range(height):
            axes = grid[row, column]
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if row < len(samples):
                step, file = samples[row]
                axes.set_title(f"{name}, step {step:,}" if row == 0 else f"step {step:,}", loc="left", size="small")
                axes.set_gid(f"sample {name} {step}")
                _draw_sample(axes, file)
    return finish(figure, path)


def _samples(run: RunFolder) -> list[tuple[int, Path]]:
    """(step, file) of each sample of a run, in order."""
    found = []
    for file in sorted(run.samples.glob("step-*")):
        match = re.fullmatch(r"step-(\d+)\.(png|txt)", file.name)
        if match:
            found.append((int(match[1]), file))
    if not found:
        raise ValueError(f"{run.path} has no samples (samples/step-*.png or .txt); give a run that has made some")
    return found


def _spread(samples: Sequence[Any], rows: int) -> list[Any]:
    """At most so many of them, the first and the last among them."""
    if len(samples) <= rows:
        return list(samples)
    return [samples[round(number * (len(samples) - 1) / (rows - 1))] for number in range(rows)]


def _height(file: Path) -> float:
    """Inches of a sample that is 3.6 inches wide, or of twelve lines of text."""
    if file.suffix != ".png":
        return 1.4
    high, wide = matplotlib.image.imread(file).shape[:2]
    return min(3.6 * high / wide, 5.0)


def _draw_sample(axes: Axes, file: Path) -> None:
    """A picture, or the first lines of a text."""
    if file.suffix == ".png":
        image = matplotlib.image.imread(file)
        axes.imshow(image, cmap="gray", interpolation="nearest")
        axes.set_anchor("NW")
        return
    lines = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        lines += textwrap.wrap(line, 48) or [""]
    shown = "\n".join([*lines[:11], "…"] if len(lines) > 12 else lines)
    text = axes.text(0.0, 1.0, shown, va="top", size=7, family="monospace", parse_math=False)
    text.set_transform(axes.transAxes)
