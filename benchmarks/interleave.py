"""Time callables in turn, A B C A B C ..., so that what slows the machine slows all of them; compare their medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def interleave(calls: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each call in each of `rounds` rounds, after `warmup` rounds that do not count.

    A call may return JAX arrays, which are waited for; anything else must be finished when it returns.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(warmup + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def best(seconds: Mapping[str, list[float]], prefix: str) -> str:
    """The name with the least median among those that begin with `prefix`."""
    return min((name for name in seconds if name.startswith(prefix)), key=lambda name: statistics.median(seconds[name]))


def table(seconds: Mapping[str, list[float]], work: float, unit: str) -> str:
    """A row for each call: median and least time, and `work` / median in `unit` a second."""
    width = max(map(len, seconds))
    rows = [f"{'':{width}}  median ms    min ms  {unit}/s"]
    for name, times in seconds.items():
        median = statistics.median(times)
        rows.append(f"{name:{width}} {1e3 * median:10.1f}{1e3 * min(times):10.1f}{work / median:10.0f}")
    return "\n".join(rows)


def ratio(seconds: Mapping[str, list[float]], ours: str, theirs: str) -> str:
    """Median of `ours` over median of `theirs`, and the quartiles of the ratio within a round."""
    each = [a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
    low, _, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    value = statistics.median(seconds[ours]) / statistics.median(seconds[theirs])
    return f"{ours} / {theirs} = {value:.3f}  (half of the rounds: {low:.3f} to {high:.3f})"
