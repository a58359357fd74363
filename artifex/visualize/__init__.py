"""Pictures of a run: how it lies on its devices, what they do and send, what it holds, and how it went.

Each function gives a matplotlib figure, which a notebook shows, writes it to `path` where that is given, as PNG or SVG
by its ending, and is readable without colour. `svg` gives a figure as text for a page. pyplot is never touched.
"""

from artifex.scaling.figures import svg as svg
from artifex.visualize.device_maps import plot_communication_graph as plot_communication_graph
from artifex.visualize.device_maps import plot_device_utilization as plot_device_utilization
from artifex.visualize.placements import plot_sharding as plot_sharding
from artifex.visualize.placements import plot_tree as plot_tree
from artifex.visualize.planning import plot_frontier as plot_frontier
from artifex.visualize.runs import plot_runs as plot_runs
from artifex.visualize.runs import plot_samples as plot_samples
from artifex.visualize.timelines import plot_memory as plot_memory
from artifex.visualize.timelines import plot_schedule as plot_schedule

__all__ = [
    "plot_communication_graph",
    "plot_device_utilization",
    "plot_frontier",
    "plot_memory",
    "plot_runs",
    "plot_samples",
    "plot_schedule",
    "plot_sharding",
    "plot_tree",
    "svg",
]
