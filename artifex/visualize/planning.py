"""What the planner chose among: memory against time, the unbeaten strategies named."""

from __future__ import annotations

import os

from artifex.scaling.autodist.pictures import frontier
from artifex.scaling.autodist.planned import Planned
from artifex.scaling.figures import Picture, check_path, finish


def plot_frontier(planned: Planned, path: str | os.PathLike[str] | None = None) -> Picture:
    """The planner's candidates by memory and time, those that no other beats in both numbered and named below.

    Raises `ValueError` for an ending of `path` that is neither .png nor .svg.
    """
    check_path(path)
    return finish(frontier(planned), path)
