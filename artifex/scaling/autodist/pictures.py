"""The picture of a plan: memory against time of everything that was traced, the frontier, and the limit."""

from __future__ import annotations

from pathlib import Path

from artifex.scaling.autodist.planned import Planned, seconds_text


def draw_frontier(found: Planned, path: str | Path) -> None:
    """Write a picture: a point for each candidate, the frontier of those that no other beats in both, the chosen one,
    and the memory there is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    every = [found.best, *found.runners, *found.over]
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    scale, unit = (2**30, "GiB") if max(one.estimate.whole for one in every) > 2**30 else (2**20, "MiB")
    at = [(one.estimate.whole / scale, one.estimate.seconds) for one in every]
    best = sorted(at)
    frontier = [point for index, point in enumerate(best) if point[1] < min((p[1] for p in best[:index]), default=1e30)]
    axes.plot(*zip(*frontier, strict=True), drawstyle="steps-post", color="0.6", zorder=1, label="frontier")
    axes.scatter(*zip(*at[1:], strict=True) if at[1:] else ([], []), s=26, color="C0", zorder=2, label="traced")
    axes.scatter(*at[0], s=80, color="C3", marker="*", zorder=3, label=f"chosen: {_short(str(found.spread))}")
    if found.limit is not None:
        axes.axvline(found.limit / scale, color="C3", linestyle=":", label=f"limit {found.limit / scale:.3g} {unit}")
    axes.set_xlabel(f"memory of a device, {unit}")
    axes.set_ylabel("predicted time of a step, s")
    axes.set_ylim(0, 1.1 * max(seconds for _, seconds in at))
    title = f"{found.about['model']} on {found.cluster_name}: {seconds_text(found.estimate.seconds)} a step"
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, loc="best")
    figure.savefig(path, dpi=130)


def _short(text: str, most: int = 48) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
