"""Guesses in the order in which they are worth a closer look: the fastest first, or those of the least memory."""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from artifex.scaling.autodist.config import AutoDistConfig
from artifex.scaling.autodist.sketch import Guess, Sketch
from artifex.scaling.autodist.solvers import solve
from artifex.scaling.autodist.spread import Space, Spread

SLACK = 1.5
"""A guess of so many times the limit may still turn out to fit."""

Pair = tuple[Guess, Spread]


class Corrections:
    """What closer looks found, to what was guessed: of each setting of remat, with and without stages, the least."""

    def __init__(self) -> None:
        self.least: dict[str, float] = {}

    def __call__(self, guess: Guess, spread: Spread) -> float:
        """The bytes that a guess may turn out to be; of a kind that nobody looked at, as of the others."""
        others = min(self.least.values(), default=1 / SLACK)
        return guess.bytes * self.least.get(kind_of(spread), others)

    def learn(self, guess: Guess, spread: Spread, found: float) -> None:
        """A closer look at a guess found so many bytes."""
        kind = kind_of(spread)
        self.least[kind] = min(self.least.get(kind, found / guess.bytes), found / guess.bytes)


def kind_of(spread: Spread) -> str:
    """Spreads whose guesses are off alike."""
    return f"{spread.remat}, {'stages' if spread.of('pipeline') > 1 else 'whole'}"


class Guesses:
    """(guess, spread), the best first: what is chosen on a mesh is solved for when its least time comes up."""

    def __init__(
        self, sketch: Sketch, space: Space, config: AutoDistConfig, spreads: list[Spread], rank: Callable[..., Any]
    ) -> None:
        self.sketch, self.space, self.config, self.spreads, self.rank = sketch, space, config, spreads, rank
        self.corrections = Corrections()
        self.solved = 0  # how many spreads were solved for

    def fastest(self) -> Iterator[Pair]:
        """By their least time, and what the solver chose there by its own."""
        order = itertools.count()
        waiting: list[tuple[Any, int, Guess | None, Spread]] = []
        fastest = min(self.sketch.basis.flops, key=self.sketch.basis.flops.__getitem__)
        for spread in self.spreads:
            if not (counts := self.space.accumulations_of(spread)):
                continue
            one = dataclasses.replace(spread, remat=fastest, accumulation=min(counts))
            least = self.sketch.guess(one, 0.0)
            key = self.rank(0.95 * least.seconds, 0, spread.devices)
            waiting.append((key, next(order), None, spread))
        heapq.heapify(waiting)
        while waiting:
            _, _, guess, spread = heapq.heappop(waiting)
            if guess is not None:
                yield guess, spread
                continue
            for found, chosen in self.chosen(spread):
                key = self.rank(found.seconds, found.bytes, spread.devices)
                heapq.heappush(waiting, (key, next(order), found, chosen))

    def least(self) -> Iterator[Pair]:
        """By the memory that they may turn out to need."""
        self.solved = len(self.spreads)
        found: list[Pair] = []
        for spread in self.spreads:
            state = self.sketch.state(spread)
            for count, remat in itertools.product(self.space.accumulations_of(spread), self.sketch.basis.own):
                one = dataclasses.replace(spread, remat=remat, accumulation=count)
                found.append((self.sketch.guess(one, state), one))
        waiting: dict[str, collections.deque[Pair]] = {}
        for pair in sorted(found, key=lambda pair: (pair[0].bytes, pair[0].seconds)):
            waiting.setdefault(kind_of(pair[1]), collections.deque()).append(pair)
        while waiting:
            kind = min(waiting, key=lambda kind: self.corrections(*waiting[kind][0]))
            yield waiting[kind].popleft()
            if not waiting[kind]:
                del waiting[kind]

    def chosen(self, spread: Spread) -> list[Pair]:
        """What the solver takes on one mesh, by remat, microbatches and modules left whole, for several guesses at
        how much of the limit there is: what a closer look finds may be more or less than what was guessed."""
        self.solved += 1
        limit, config = self.config.memory_bytes, self.config
        choices = self.sketch.choices(spread, self.space.accumulations_of(spread))
        found: dict[Spread, Guess] = {}
        for slack in (SLACK, 1.0, 0.8) if limit is not None else (1.0,):
            room = None if limit is None else int(slack * limit)
            for selection in solve(choices, room, solver=config.solver, granularity=config.memory_granularity):
                remat, count = selection.taken[0].label.rsplit(" ", 1)
                whole = tuple(option.label for option in selection.taken[1:] if option.label)
                divided = dataclasses.replace(spread, remat=remat, accumulation=int(count))
                if whole:  # what many small sums cost, only a closer look tells
                    found[divided] = self.sketch.guess(divided)
                if not whole or len(whole) < len(selection.taken) - 1:  # all of them: data parallelism, another mesh
                    chosen = dataclasses.replace(divided, whole=whole)
                    found[chosen] = Guess(selection.bytes, selection.seconds)
        return [(guess, chosen) for chosen, guess in found.items()]
