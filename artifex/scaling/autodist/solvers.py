"""One option of each choice, so that the sum takes least time and fits the memory: a multiple-choice knapsack.

The memory of a selection is the sum of its options' bytes and the largest of their transient bytes; its time is the sum
of their seconds. Three solvers, one answer, in order of (time, memory, order of options):

    dp      dynamic programming over choices; states (bytes, transient, time), each unless k others are as good in all
            (Kellerer, Pferschy, Pisinger 2004, Knapsack Problems, chapter 11, and k best instead of one)
    ilp     an integer program in 0/1 variables for HiGHS; the k-th best after k - 1 no-good cuts
    brute   every selection, to hold the others against

Times are compared in ticks, a power of ten, at most 1e-16 of the longest selection: no sum depends on its order. HiGHS
takes either of two selections less than about 1e-9 apart. Arrays are of N states, O options and C choices.
"""

from __future__ import annotations

import bisect
import dataclasses
import difflib
import functools
import heapq
import itertools
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Literal

import numpy as np

Solver = Literal["dp", "ilp", "brute"]
LARGEST = 1e4
"""What the largest coefficient for HiGHS is scaled to: its gap, 1e-6 whatever the relative one, is then 1e-10."""


@dataclasses.dataclass(frozen=True)
class Option:
    """What taking it costs: bytes that stay, `transient` bytes while it runs (one runs at a time), and seconds."""

    label: str
    bytes: int
    seconds: float
    transient: int = 0


@dataclasses.dataclass(frozen=True)
class Choice:
    """Exactly one of `options` is taken."""

    name: str
    options: tuple[Option, ...]


@dataclasses.dataclass(frozen=True)
class Selection:
    """An option of each choice, in their order, and what `memory_of` and `seconds_of` say of it."""

    taken: tuple[Option, ...]
    bytes: int
    seconds: float


def memory_of(taken: Sequence[Option], granularity: int = 1) -> int:
    """Bytes of a selection; each size is rounded up to a multiple of `granularity`."""
    transient = max((_up(option.transient, granularity) for option in taken), default=0)
    return sum(_up(option.bytes, granularity) for option in taken) + transient


def seconds_of(taken: Sequence[Option]) -> float:
    """Seconds of a selection, rounded once: in any order the same."""
    return math.fsum(option.seconds for option in taken)


def frontier(choices: Sequence[Choice], *, granularity: int = 1) -> list[Selection]:
    """All selections that no other beats in memory and time, the fastest first; of equal ones the first by options."""
    problem = _problem(choices, None, granularity, 1)
    ranks = sorted(map(problem.rank, _dp(problem, 1, bounded=False)))
    before = itertools.accumulate((memory for _, memory, _ in ranks), min, initial=math.inf)
    return [problem.selection(rank[2]) for rank, least in zip(ranks, before, strict=False) if rank[1] < least]


def solve(
    choices: Sequence[Choice], limit: int | None, *, solver: Solver = "dp", topk: int = 1, granularity: int = 1
) -> list[Selection]:
    """The `topk` best selections within `limit` bytes (None: any), fastest first; fewer, or none, where no more fit.

    Equally fast ones are in order of memory, then of options. Sizes count in whole multiples of `granularity` bytes,
    rounded up: larger ones bound the states of "dp", and what is found still fits. Raises `ValueError` for an unknown
    solver, a choice without options, and numbers below zero.
    """
    solvers = {"dp": _dp, "ilp": _ilp, "brute": _brute}
    if solver not in solvers:
        near = difflib.get_close_matches(str(solver), solvers, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"choose of {', '.join(solvers)}"
        raise ValueError(f"unknown solver {solver!r}: {hint}")
    problem = _problem(choices, limit, granularity, topk)
    return [problem.selection(taken) for taken in sorted(solvers[solver](problem, topk), key=problem.rank)[:topk]]


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Choices in whole numbers: `costs` has for each an array (3, options) of bytes, transient bytes and ticks. What is
    taken is a tuple, the index of an option of each choice."""

    choices: Sequence[Choice]
    limit: float
    granularity: int
    costs: list[np.ndarray]

    def rank(self, taken: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
        """What selections are ordered by."""
        ticks = (int(costs[2, index]) for costs, index in zip(self.costs, taken, strict=True))
        return sum(ticks), self.selection(taken).bytes, taken

    def selection(self, taken: tuple[int, ...]) -> Selection:
        options = tuple(choice.options[index] for choice, index in zip(self.choices, taken, strict=True))
        return Selection(options, memory_of(options, self.granularity), seconds_of(options))


def _problem(choices: Sequence[Choice], limit: int | None, granularity: int, topk: int) -> _Problem:
    for what, value, least in (("topk", topk, 1), ("granularity", granularity, 1), ("limit", limit or 0, 0)):
        if value < least:
            raise ValueError(f"{what} is {value}, expected at least {least}; give that or more")
    for choice in choices:
        if not choice.options:
            raise ValueError(f"choice {choice.name!r} has no options; give at least one, or leave the choice out")
        for option, what in itertools.product(choice.options, ("bytes", "transient", "seconds")):
            if not 0 <= (value := getattr(option, what)) < math.inf:
                name = f"option {option.label!r} of choice {choice.name!r}"
                raise ValueError(f"{name} has {what} {value}, expected a finite number from 0 on; or leave it out")
    longest = sum(max(option.seconds for option in choice.options) for choice in choices)
    digits = 17 - math.ceil(math.log10(longest)) if longest else 0  # sums are about 1e17, and fit into 64 bits

    def numbers(option: Option) -> tuple[int, int, int]:
        ticks = Decimal(repr(float(option.seconds))).scaleb(digits)  # its decimals: 0.1 and 0.2 are as long as 0.3
        return _up(option.bytes, granularity), _up(option.transient, granularity), int(ticks.to_integral_value())

    costs = [np.array([numbers(option) for option in choice.options], np.int64).T for choice in choices]
    return _Problem(choices, math.inf if limit is None else limit, granularity, costs)


def _up(size: int, granularity: int) -> int:
    return -(-size // granularity) * granularity


def _brute(problem: _Problem, k: int) -> list[tuple[int, ...]]:
    ranks = map(problem.rank, itertools.product(*(range(costs.shape[1]) for costs in problem.costs)))
    return [taken for _, _, taken in heapq.nsmallest(k, (rank for rank in ranks if rank[1] <= problem.limit))]


def _dp(problem: _Problem, k: int, bounded: bool = True) -> list[tuple[int, ...]]:
    """Selections among which are the k best; unless `bounded`, of any limit. States stand in order of their options."""
    taken_NC, state_3N = np.zeros((1, 0), int), np.zeros((3, 1), np.int64)
    for index, costs_3O in enumerate(problem.costs):
        options = np.arange(costs_3O.shape[1])
        taken_NC = np.hstack([np.repeat(taken_NC, len(options), 0), np.tile(options, len(taken_NC))[:, None]])
        state_3N = _joined(state_3N, costs_3O)
        if bounded:
            keep = _hopeful(problem, state_3N, problem.costs[index + 1 :], k)
            taken_NC, state_3N = taken_NC[keep], state_3N[:, keep]
        keep = _undominated(state_3N, k)
        taken_NC, state_3N = taken_NC[keep], state_3N[:, keep]
    return [tuple(row) for row in taken_NC.tolist()]


def _joined(state_3N: np.ndarray, costs_3O: np.ndarray) -> np.ndarray:
    """Each state with each option: bytes and ticks add up, the larger transient stays."""
    joined = state_3N[:, :, None] + costs_3O[:, None]
    joined[1] = np.maximum(state_3N[1][:, None], costs_3O[1])
    return joined.reshape(3, -1)


def _hopeful(problem: _Problem, state_3N: np.ndarray, rest: list[np.ndarray], k: int) -> np.ndarray:
    """Which states fit with the least of all that is left, and are then no slower than k that are known to fit."""
    fits = lambda end_3N: end_3N[0] + end_3N[1] <= problem.limit  # noqa: E731
    floor_3N = functools.reduce(_joined, (costs.min(axis=1, keepdims=True) for costs in rest), state_3N)
    known_N = np.full(state_3N.shape[1], np.iinfo(np.int64).max)
    for row in (0, 2):  # what is left taken by the leanest options, and by the fastest
        end_3N = functools.reduce(_joined, (costs[:, [costs[row].argmin()]] for costs in rest), state_3N)
        known_N = np.where(fits(end_3N), np.minimum(known_N, end_3N[2]), known_N)
    slowest = np.partition(known_N, k - 1)[k - 1] if len(known_N) >= k else np.inf
    return fits(floor_3N) & (floor_3N[2] <= slowest)


def _undominated(state_3N: np.ndarray, k: int) -> np.ndarray:
    """Which states have fewer than k others as good in bytes, transient, ticks, and first by (ticks, bytes, order)."""
    levels, level_N = np.unique(state_3N[1], return_inverse=True)
    least: list[list[int]] = [[] for _ in levels]  # the k least bytes of states with at most that transient
    keep, order = [], np.lexsort((state_3N[0], state_3N[2]))
    for place, held, level in zip(order.tolist(), state_3N[0, order].tolist(), level_N[order].tolist(), strict=True):
        if len(least[level]) < k or held < least[level][-1]:
            keep.append(place)
        for lowest in least[level:]:
            if len(lowest) == k and lowest[-1] <= held:
                break  # nor is it among the least of a larger transient
            bisect.insort(lowest, held)
            del lowest[k:]
    return np.sort(np.array(keep, int))


def _ilp(problem: _Problem, k: int) -> list[tuple[int, ...]]:
    """Variables are 0 or 1 for each option, and the largest transient; each selection that is found is cut off."""
    sizes = [costs.shape[1] for costs in problem.costs]
    if not sizes:
        return [()]
    costs_3O = np.hstack(problem.costs).astype(float)
    unit = costs_3O[:2].max() / LARGEST or 1.0
    (bytes_O, transient_O), ticks_O = costs_3O[:2] / unit, costs_3O[2] / (costs_3O[2].max() / LARGEST or 1.0)
    of_choice_CO, memory = np.repeat(np.eye(len(sizes)), sizes, axis=1), np.append(bytes_O, 1.0)
    rows = [(np.append(row, 0.0), 1.0, 1.0) for row in of_choice_CO]
    rows += [(np.append(row * transient_O, -1.0), -np.inf, 0.0) for row in of_choice_CO]
    rows += [(memory, -np.inf, problem.limit / unit)]
    objectives = [np.append(ticks_O, 0.0), memory, *_orders(sizes)]
    found: list[tuple[int, ...]] = []
    while len(found) < k and (x_O := _least(objectives, rows, transient_O)) is not None:
        taken = tuple(map(int, np.flatnonzero(x_O) - np.cumsum([0, *sizes[:-1]])))
        if problem.rank(taken)[1] <= problem.limit:  # exactly: HiGHS lets a selection be over by a few bytes
            found.append(taken)
        rows.append((np.append(x_O, 0.0), -np.inf, len(sizes) - 1.0))
    return found


def _least(objectives: list[np.ndarray], rows: list[tuple], transient_O: np.ndarray) -> np.ndarray | None:
    """What has the least first objective, of these the least second, and so on; None where nothing is feasible."""
    from scipy.optimize import milp  # half a second that no run needs but one that is planned

    x_O, rows = None, list(rows)
    integral = np.append(np.ones(len(transient_O)), 0.0)
    ranges, exact = (0.0, np.where(integral, 1.0, np.inf)), {"mip_rel_gap": 0}
    for costs in objectives:
        within = tuple(np.array(part) for part in zip(*rows, strict=True))
        answer = milp(costs, integrality=integral, bounds=ranges, constraints=within, options=exact)
        if answer.status not in (0, 2):
            raise RuntimeError(f"HiGHS ended with {answer.message!r}; use solver 'dp'")
        if answer.status == 2:  # infeasible; after an earlier objective: what it found is over by a few bytes
            return x_O
        x_O = np.round(answer.x[:-1])
        rows.append((costs, -np.inf, costs @ np.append(x_O, (x_O * transient_O).max())))
    return x_O


def _orders(sizes: list[int]) -> list[np.ndarray]:
    """Objectives whose least, each in turn, is the first selection by options: they are digits of one number."""
    rows, weight, start = [], math.inf, 0
    for size in sizes:
        if weight * size > LARGEST:
            rows, weight = [*rows, np.zeros(sum(sizes) + 1)], 1
        rows[-1] *= size
        rows[-1][start : start + size] = range(size)
        weight, start = weight * size, start + size
    return rows
