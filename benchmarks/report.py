"""What was computed and how long it took, as the benchmarks print it: variants compared by their medians."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from workers import Worker


def check_equal(workers: Sequence[Worker], tolerance: float) -> None:
    """Print what each worker computed. Raises `ValueError` where one differs from the first by more than `tolerance`.

    A worker need not have computed everything that the first has.
    """
    wanted = workers[0]
    for worker in workers:
        print(f"{worker.name}: {', '.join(f'{quantity} {value:.6f}' for quantity, value in worker.computed.items())}")
        for quantity, value in worker.computed.items():
            first = wanted.computed[quantity]
            if not abs(value - first) <= tolerance * first:
                raise ValueError(
                    f"{quantity} of {worker.name} is {value}, of {wanted.name} {first}; they do not compute the same"
                )


def best(seconds: Mapping[str, list[float]], prefix: str) -> str:
    """The name with the least median among those that begin with `prefix`."""
    return min((name for name in seconds if name.startswith(prefix)), key=lambda name: statistics.median(seconds[name]))


def table(seconds: Mapping[str, list[float]], work: float, unit: str) -> str:
    """A row for each variant: median and least time, and `work` / median in `unit` a second."""
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
