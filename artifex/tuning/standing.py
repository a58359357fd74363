"""How ways stand: the time of each against that of the run as configured, within the same round; and what is noise.

A machine drifts, and other programs come and go: times of different rounds are not compared. Of each round there is one
number, a way's seconds over those of the reference in the same round; what is said of a way is the median of these.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence

LEAST_GAIN = 0.02
"""What a way must save to be called faster, as a share: less is hardly worth another configuration, and processes of
one program differ as well, for as long as they live (`benchmarks/tune.py` prints by how much)."""

CHANCE = 0.05
"""How often a tune of ways that are all as fast may call one of them faster."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """Some steps in a row: the `round` they were timed in, how many, and the seconds of one."""

    round: int
    steps: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Spanned:
    """A median and the quartiles around it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spanned:
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, middle, high)


def by_round(turns: Iterable[Turn]) -> dict[int, float]:
    """Round -> the median of its turns."""
    found: dict[int, list[float]] = {}
    for turn in turns:
        found.setdefault(turn.round, []).append(turn.seconds)
    return {number: statistics.median(seconds) for number, seconds in found.items()}


def ratios(turns: Iterable[Turn], reference: Iterable[Turn], *, work: float = 1.0) -> list[float]:
    """A way's seconds over the reference's, a number for each round that has both. `work`: of a step of the way, over
    that of the reference, by which its time is divided."""
    mine, other = by_round(turns), by_round(reference)
    return [mine[number] / other[number] / work for number in sorted(mine) if number in other]


def is_faster(shares: Sequence[float], compared: int, least: float = LEAST_GAIN) -> bool:
    """Whether a way with these `ratios` is faster by more than noise: its median by `least`, and it wins so many rounds
    as a fair coin would in fewer than `CHANCE` of the tunes that compare so many ways (a sign test, by Bonferroni)."""
    if not shares:
        return False
    count, wins = len(shares), sum(share < 1 for share in shares)
    by_chance = sum(math.comb(count, k) for k in range(wins, count + 1)) / 2**count
    return statistics.median(shares) <= 1 - least and by_chance <= CHANCE / max(compared, 1)


def rounds_needed(compared: int) -> int:
    """The fewest rounds after which a way that won them all is called faster."""
    return math.ceil(math.log2(max(compared, 1) / CHANCE))
