"""Where to cut a row of blocks into pipeline stages: the least time of a step that memory, balance and bubble allow.

Stage s of S takes t_s seconds for a microbatch: its blocks forwards and backwards, and its last block's stream sent on
and the gradient of it sent back, but for the last stage. With m microbatches a step takes

    T = sum_s t_s + (m - 1) max_s t_s + max_s g_s                                                                (1)

(Zheng et al. 2022, Alpa, arXiv:2201.12023, equation 2), where g_s is the stage's sync of gradients, after the last
microbatch. Its share of idle time before that,

    1 - m sum_s (forward_s + backward_s) / (S (T - max_s g_s)),                                                  (2)

is (S - 1) / (m + S - 1) for equal stages that send for nothing (Narayanan et al. 2021, arXiv:2104.04473; nnScaler, Lin
et al., OSDI 2024, bounds this). A stage holds its state, and what is kept of the microbatches underway: all m in gpipe,
S - s at most in 1f1b. Dynamic programming from the last stage on, for each value that max_s t_s may have, is exact.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

CLOSE = 1e-9
"""Ratios that miss a limit by less than this keep it: 1 / 5 of 0.2 in whatever order it is computed."""

BUBBLE, UNBALANCE = "max_pipeline_bubble_ratio", "max_pipeline_unbalance_ratio"
"""The options that `max_bubble` and `max_unbalance` are."""


@dataclasses.dataclass(frozen=True)
class Block:
    """What a block costs a device of its stage: seconds of a microbatch forwards and backwards, bytes of state, bytes
    kept of each microbatch underway, bytes of the stream that it sends on, seconds to sync its gradients in a step."""

    name: str
    forward: float
    backward: float
    state: int = 0
    kept: int = 0
    stream: int = 0
    gradients: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[1:]:
            if not 0 <= (value := getattr(self, field.name)) < math.inf:
                raise ValueError(f"block {self.name!r} has {field.name} {value}, expected a finite number from 0 on")


Blocks = Sequence[Block]


@dataclasses.dataclass(frozen=True)
class Cut:
    """Stages [begin, end) of blocks; seconds of a step (1), its bubble (2), the shortest stage's time over the
    longest's, and the bytes of each stage's devices."""

    stages: tuple[tuple[int, int], ...]
    seconds: float
    bubble: float
    unbalance: float
    bytes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What excludes cuts: bytes of a stage, blocks that may begin one (all, where none is named; block 0 always), the
    most of (2), and the least that the shortest stage's time is of the longest's, by nnScaler's name. `bandwidth`, from
    stage to stage, is in bytes per second. Raises `ValueError` for numbers out of range and an unknown schedule."""

    limit: int | None = None
    pivots: Collection[int] = ()
    max_bubble: float = 0.2
    max_unbalance: float = 0.5
    bandwidth: float = math.inf
    schedule: Literal["1f1b", "gpipe"] = "1f1b"

    def __post_init__(self) -> None:
        if self.schedule not in ("1f1b", "gpipe"):
            raise ValueError(f"unknown schedule {self.schedule!r}: choose '1f1b' or 'gpipe'")
        most = {"limit": math.inf, "max_bubble": 1, "max_unbalance": 1, "bandwidth": math.inf}
        for name, high in most.items():
            low, value = int(name == "bandwidth"), getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} is {value}, expected a number from {low} to {high}")

    def without(self, names: Collection[str]) -> Limits:
        """Those named exclude nothing."""
        free = {"max_bubble": 1.0, "max_unbalance": 0.0, "limit": None}
        return dataclasses.replace(self, **{name: free[name] for name in names})

    def begins(self, blocks: Blocks) -> list[int]:
        """The blocks that may begin a stage."""
        return [begin for begin in range(len(blocks)) if begin == 0 or begin in self.pivots or not self.pivots]


def cut(blocks: Blocks, stages: int, microbatches: int, **limits: Any) -> Cut | None:
    """The fastest cut into `stages`, or None, which `why_none` explains; `limits` are the fields of `Limits`.

    Raises `ValueError` for no blocks, less than one stage or microbatch, and pivots that are no blocks.
    """
    if min(len(blocks), stages, microbatches) < 1:
        raise ValueError(f"{len(blocks)} blocks, {stages} stages, {microbatches} microbatches: each is at least 1")
    within = Limits(**limits)
    if wrong := [pivot for pivot in within.pivots if not 0 <= pivot < len(blocks)]:
        raise ValueError(f"pivot {wrong[0]} is no index of a block, expected 0 to {len(blocks) - 1}; leave it out")
    return _fastest(blocks, stages, microbatches, within)


def best(blocks: Blocks | Callable[[int], Blocks], devices_max: int, microbatches: int, **limits: Any) -> list[Cut]:
    """The fastest cut for each number of stages that divides `devices_max` and has one, fastest first.

    `blocks` may be a function of the number of stages: `devices_max // stages` devices share the work of a stage.
    """
    of = blocks if callable(blocks) else lambda stages: blocks
    counts = [stages for stages in range(1, devices_max + 1) if devices_max % stages == 0]
    cuts = [cut(of(stages), stages, microbatches, **limits) for stages in counts]
    return sorted((each for each in cuts if each), key=lambda each: each.seconds)


def why_none(blocks: Blocks, stages: int, microbatches: int, **limits: Any) -> str:
    """Which limit, or which of them together, exclude all cuts, and what would do; empty where there is a cut."""
    if cut(blocks, stages, microbatches, **limits):
        return ""
    within = Limits(**limits)
    begins = [blocks[begin].name for begin in within.begins(blocks)]
    if len(begins) < stages:
        return f"{stages} stages need as many blocks to begin at, there are {len(begins)}: {', '.join(begins)}"
    every = ("max_bubble", "max_unbalance", "limit")
    sets = itertools.chain.from_iterable(itertools.combinations(every, count) for count in (1, 2, 3))
    cuts = ((names, _fastest(blocks, stages, microbatches, within.without(names))) for names in sets)
    names, found = next((names, found) for names, found in cuts if found)
    says = []
    if "max_bubble" in names:
        idle = f"devices would be idle for {found.bubble:.3f} of the time, more than {BUBBLE}={within.max_bubble:g}"
        would = f"{BUBBLE}={math.ceil(found.bubble * 1000) / 1000:g} would do, more microbatches not"
        if enough := _enough(found, blocks, microbatches, within.without(set(names) - {"max_bubble"})):
            would, found = f"{enough[0]} microbatches would do", enough[1]
        says.append(f"{idle}; {would}")
    if "max_unbalance" in names:
        short = f"the shortest stage would take {found.unbalance:.3f} of the longest's time"
        would = f"{UNBALANCE}={math.floor(found.unbalance * 1000) / 1000:g} would do"
        says.append(f"{short}, less than {UNBALANCE}={within.max_unbalance:g}; {would}")
    if "limit" in names:
        most = max(found.bytes)
        held = f"stage {found.bytes.index(most)} of {stages} would hold {most} bytes"
        says.append(f"{held}, more than limit={within.limit}; limit={most} would do")
    return "; and ".join(says)


def _enough(found: Cut, blocks: Blocks, microbatches: int, limits: Limits) -> tuple[int, Cut] | None:
    """Of how many microbatches there is a cut, and the cut; None where a thousand times as many are too few. `found` is
    the fastest with so few."""
    stages, pieces = len(found.stages), _pieces(blocks, limits)
    busy = (1 - limits.max_bubble) * stages
    many = _fastest(blocks, stages, 1000 * microbatches, limits.without(["max_bubble"]))  # its longest stage is least
    for each in (found, many):
        ends = dict(each.stages if each else ())
        times = [piece.time for begin, end in ends.items() for piece in pieces[begin] if piece.end == end]
        if times and (spare := _work(blocks) - busy * max(times)) > 0:  # (2) solved for m
            enough = math.ceil(busy * (sum(times) - max(times)) / spare - CLOSE)
            if cut_then := _fastest(blocks, stages, enough, limits):
                return enough, cut_then
    return None


def _fastest(blocks: Blocks, stages: int, microbatches: int, limits: Limits) -> Cut | None:
    pieces, work, found = _pieces(blocks, limits), _work(blocks), None
    underway = [microbatches if limits.schedule == "gpipe" else min(stages - s, microbatches) for s in range(stages)]
    most, busy = math.inf if limits.limit is None else limits.limit, 1 - limits.max_bubble - CLOSE
    slowest = microbatches * work / (stages * busy) if busy > 0 else math.inf
    any_fits = _ways(pieces, underway, 0.0, math.inf, most)  # at once: memory alone may exclude all
    for longest in sorted({piece.time for each in pieces.values() for piece in each}) if any_fits else ():
        if work + (microbatches - 1) * longest > (1 + CLOSE) * min(slowest, found.seconds if found else math.inf):
            break
        if longest >= (1 - CLOSE) * work / stages:
            for way in _ways(pieces, underway, (limits.max_unbalance - CLOSE) * longest, longest, most):
                each = _cut(way, underway, microbatches, work)
                if each.bubble <= limits.max_bubble + CLOSE and (found is None or each.seconds < found.seconds):
                    found = each
    return found


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Blocks [begin, end) as a stage: seconds of a microbatch, of these what sending takes, and its sums."""

    begin: int
    end: int
    time: float
    send: float
    gradients: float
    state: int
    kept: int


def _work(blocks: Blocks) -> float:
    return math.fsum(block.forward + block.backward for block in blocks)


def _pieces(blocks: Blocks, limits: Limits) -> dict[int, list[_Piece]]:
    """By its first block every stage that there can be, shorter ones first."""
    begins = limits.begins(blocks)
    ends = {*begins[1:], len(blocks)}
    pieces: dict[int, list[_Piece]] = {begin: [] for begin in begins}
    for begin in begins:
        work, gradients, state, kept = 0.0, 0.0, 0, 0
        for end, block in enumerate(blocks[begin:], begin + 1):
            work, gradients = work + block.forward + block.backward, gradients + block.gradients
            state, kept = state + block.state, kept + block.kept
            if end in ends:
                send = 2 * block.stream / limits.bandwidth if end < len(blocks) else 0.0
                pieces[begin].append(_Piece(begin, end, work + send, send, gradients, state, kept))
    return pieces


def _ways(
    pieces: dict[int, list[_Piece]], underway: list[int], shortest: float, longest: float, limit: float
) -> list[tuple[_Piece, ...]]:
    """Of the cuts with all times from `shortest` to `longest` those that no other beats in sends and in sync."""
    last = max(piece.end for each in pieces.values() for piece in each)

    @functools.cache
    def rest(stage: int, begin: int) -> list[tuple[float, float, tuple[_Piece, ...]]]:
        if stage == len(underway):
            return [(0.0, 0.0, ())] if begin == last else []
        ways = [
            (piece.send + sends, max(piece.gradients, sync), (piece, *later))
            for piece in pieces.get(begin, ())
            if shortest <= piece.time <= longest and piece.state + underway[stage] * piece.kept <= limit
            for sends, sync, later in rest(stage + 1, piece.end)
        ]
        ways.sort(key=lambda way: way[:2])
        before = itertools.accumulate((sync for _, sync, _ in ways), min, initial=math.inf)
        return [way for way, least in zip(ways, before, strict=False) if way[1] < least]

    return [way for _, _, way in rest(0, 0)]


def _cut(way: tuple[_Piece, ...], underway: list[int], microbatches: int, work: float) -> Cut:
    times = [piece.time for piece in way]
    run = sum(times) + (microbatches - 1) * max(times)
    return Cut(
        stages=tuple((piece.begin, piece.end) for piece in way),
        seconds=run + max(piece.gradients for piece in way),
        bubble=max(0.0, 1 - microbatches * work / (len(way) * run)) if run else 0.0,
        unbalance=min(times) / max(times) if max(times) else 1.0,
        bytes=tuple(piece.state + many * piece.kept for piece, many in zip(way, underway, strict=True)),
    )
