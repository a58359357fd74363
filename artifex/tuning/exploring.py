"""In which order ways are tried, and how the leaders are told apart: each against the reference for a few rounds, then
the best of them in rounds together, of which the slower half leaves again and again."""

from __future__ import annotations

import math
from collections.abc import Sequence

from artifex.tuning.rotation import Rotation
from artifex.tuning.standing import Spanned, rounds_needed
from artifex.tuning.ways import Way, combined

EXPLORING = 0.6  # of the budget; the rest tells the leaders apart
DUEL = 3  # rounds of a new way with the reference
CLEARLY = 1.15  # times the score of the best: such a way is not looked at again
LEADERS = 6
HALVING = 4  # rounds after which the slower half leaves
MORE_ROUNDS = 4  # of the last, beyond those without which nothing can be told from noise


def explore_and_narrow(rotation: Rotation, ways: Sequence[Way]) -> None:
    """Both in turn until nothing is left to try. Raises `Ended`, at the latest where the budget is spent."""
    while True:
        explore(rotation, ways)
        narrow(rotation)
        if next_way(rotation, ways) is None:
            return


def explore(rotation: Rotation, ways: Sequence[Way]) -> None:
    """Try `ways` in their order, then unions of those that were of help, until a share of the budget is spent."""
    board, clock = rotation.board, rotation.clock
    start = clock.left
    if board.reference is None and rotation.has(Way()):
        rotation.rounds([Way()], 1)
    while clock.left > (1 - EXPLORING) * start and (way := next_way(rotation, ways)) is not None:
        reference = board.reference
        if reference is None:  # the run as configured failed
            if rotation.has(way):
                rotation.rounds([way], 1)
            continue
        rotation.rounds([reference, way], DUEL)
        if not board.shares(way):
            continue
        rotation.say(f"  {said_of(rotation, way)}")
        if board.score(way) > CLEARLY * board.score(reference):
            rotation.close(way)


def next_way(rotation: Rotation, ways: Sequence[Way]) -> Way | None:
    """The first that nothing is known of; then the most promising union of those that were better than the
    reference."""
    board, known = rotation.board, rotation.records.ways

    def is_new(way: Way) -> bool:
        record = known.get(way)
        return record is None or not (record.failed or record.same or record.turns)

    for way in ways:
        if way != Way() and is_new(way):
            return way
    helpful = {way: board.score(way) for way in ways if way != board.reference and board.score(way) < 1}
    return next((way for way in combined(helpful, rotation.run, ways) if is_new(way)), None)


def narrow(rotation: Rotation) -> None:
    """Rounds of the leaders and the reference, the slower half leaving after each few, until the last of them was
    compared often enough."""
    board = rotation.board
    ranked = [way for way in board.ranked() if way != board.reference and math.isfinite(board.score(way))]
    best = board.score(ranked[0]) if ranked else math.inf
    leaders = [way for way in ranked if board.score(way) <= CLEARLY * best][:LEADERS]
    enough = rounds_needed(len(ranked)) + MORE_ROUNDS
    while leaders and board.reference is not None and len(board.shares(leaders[0])) < enough:
        reference = board.reference
        together = [way for way in leaders if rotation.alone or way in rotation.living or _has_room(rotation, way)]
        for way in [*rotation.living]:
            if way != reference and way not in together:
                rotation.close(way)
        leaders = together or leaders[:1]
        rotation.rounds([reference, *leaders], HALVING)
        leaders = sorted((way for way in leaders if board.shares(way)), key=board.score)
        if leaders:
            rotation.say(f"  {len(leaders)} left, first {said_of(rotation, leaders[0])}")
        leaders = leaders[: math.ceil(len(leaders) / 2)]


def _has_room(rotation: Rotation, way: Way) -> bool:
    """Build a way that is not alive, as after a resume, where that ends no other."""
    return rotation.fits_one_more() and rotation.has(way)


def said_of(rotation: Rotation, way: Way) -> str:
    """How a way stands, in words."""
    shares = rotation.board.shares(way)
    if not shares:
        return f"{way}: not measured"
    spanned = Spanned.of(shares)
    return f"{way}: {spanned.median:.3f} of the reference's time after {len(shares)} rounds"
