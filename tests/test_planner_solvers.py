"""The planner's knapsack: three solvers give one answer, which enumeration in fractions gives too."""

import dataclasses
import fractions
import itertools
import random
from typing import Any

import pytest

from artifex.scaling.autodist.solvers import Choice, Option, Selection, frontier, memory_of, seconds_of, solve

SOLVERS = ("dp", "ilp", "brute")
GIB = 2**30


def small(rng: random.Random) -> list[Choice]:
    """Two to five choices of two to four options, of few sizes and times, so that many selections are equal."""
    return [
        Choice(
            f"choice{c}",
            tuple(
                Option(f"{c}.{o}", rng.randint(0, 12), rng.randint(0, 10) / 10, rng.choice([0, rng.randint(0, 10)]))
                for o in range(rng.randint(2, 4))
            ),
        )
        for c in range(rng.randint(2, 5))
    ]


def real(rng: random.Random) -> list[Choice]:
    """The same of gigabytes and milliseconds: less memory takes more time."""
    choices = []
    for c in range(rng.randint(2, 5)):
        size, time = rng.randint(10**8, 2 * 10**10), rng.uniform(1e-4, 3e-2)
        parts = [rng.uniform(0.1, 1.0) for _ in range(rng.randint(2, 4))]
        options = [
            Option(f"{c}.{o}", int(size * part), time * (2 - part), rng.randint(0, size))
            for o, part in enumerate(parts)
        ]
        choices.append(Choice(f"choice{c}", tuple(options)))
    return choices


def some_limit(rng: random.Random, choices: list[Choice]) -> int | None:
    """Of what some selection holds, or a byte less, or None."""
    taken = [rng.choice(choice.options) for choice in choices]
    held = sum(option.bytes for option in taken) + max(option.transient for option in taken)
    return rng.choice([None, held, held, max(held - 1, 0)])


def every(choices: list[Choice]) -> list[tuple[fractions.Fraction, int, tuple[int, ...], tuple[Option, ...]]]:
    """All selections as (seconds by their decimals, bytes, order, options), in order."""
    found = []
    for order in itertools.product(*(range(len(choice.options)) for choice in choices)):
        taken = tuple(choice.options[index] for choice, index in zip(choices, order, strict=True))
        seconds = sum((fractions.Fraction(repr(option.seconds)) for option in taken), fractions.Fraction(0))
        held = sum(option.bytes for option in taken) + max(option.transient for option in taken)
        found.append((seconds, held, order, taken))
    return sorted(found, key=lambda each: each[:3])


@pytest.mark.parametrize("kind", [small, real])
@pytest.mark.parametrize("seed", range(4))
def test_all_solvers_find_the_k_best_of_125_instances_in_one_order(kind, seed):
    rng, fitted = random.Random(seed), 0
    for _ in range(125):
        choices = kind(rng)
        limit, k = some_limit(rng, choices), rng.choice([1, 1, 1, 1, 2, 3])
        best = [each for each in every(choices) if limit is None or each[1] <= limit][:k]
        fitted += len(best)
        for solver in SOLVERS:
            found = solve(choices, limit, solver=solver, topk=k)
            assert [each.taken for each in found] == [taken for *_, taken in best], (solver, choices, limit)
            assert [each.bytes for each in found] == [held for _, held, *_ in best]
            assert [each.seconds for each in found] == pytest.approx([float(seconds) for seconds, *_ in best])
    assert fitted > 125


@pytest.mark.parametrize("kind", [small, real])
def test_the_frontier_is_what_no_selection_beats_in_memory_and_time(kind):
    rng = random.Random(10)
    for _ in range(150):
        choices = kind(rng)
        wanted, least = [], None
        for _, held, _, taken in every(choices):
            if least is None or held < least:
                wanted.append(taken)
                least = held
        assert [each.taken for each in frontier(choices)] == wanted


def test_solving_within_a_point_of_the_frontier_gives_it_and_a_byte_less_gives_the_next():
    rng = random.Random(11)
    for _ in range(20):
        choices = real(rng)
        points = frontier(choices)
        assert [solve(choices, point.bytes)[0] for point in points] == points
        assert [solve(choices, point.bytes - 1)[0] for point in points[:-1]] == points[1:]
        assert solve(choices, points[-1].bytes - 1) == []


def test_rounding_sizes_up_is_solving_choices_of_the_rounded_sizes():
    rng = random.Random(12)
    up = lambda size: -(-size // 5) * 5  # noqa: E731
    for _ in range(100):
        choices = small(rng)
        rounded = [
            Choice(
                choice.name,
                tuple(
                    dataclasses.replace(option, bytes=up(option.bytes), transient=up(option.transient))
                    for option in choice.options
                ),
            )
            for choice in choices
        ]
        limit = some_limit(rng, choices)
        figures = lambda found: [  # noqa: E731
            ([option.label for option in each.taken], each.bytes, each.seconds) for each in found
        ]
        for solver in ("dp", "brute"):
            found = solve(choices, limit, solver=solver, topk=3, granularity=5)
            assert figures(found) == figures(solve(rounded, limit, solver=solver, topk=3))
            assert all(memory_of(each.taken) <= each.bytes for each in found)
        assert figures(frontier(choices, granularity=5)) == figures(frontier(rounded))


def test_a_frontier_has_no_more_points_than_multiples_of_its_granularity():
    choices = [choice for seed in range(4) for choice in real(random.Random(seed))]
    exact, coarse = frontier(choices), frontier(choices, granularity=GIB)
    assert len(coarse) <= max(each.bytes for each in coarse) // GIB + 1 < len(exact)
    assert all(each.bytes % GIB == 0 for each in coarse)


def test_rounding_loses_no_more_than_it_rounds_up():
    choices = [choice for seed in range(4) for choice in real(random.Random(seed))]
    points, step = frontier(choices), 2**26
    limit = (points[0].bytes + points[-1].bytes) // 2
    less = limit - (len(choices) + 1) * step  # each size is less than a step larger, and the transient one
    exact, rounded, spare = (
        solve(choices, bound, granularity=each)[0].seconds for bound, each in ((limit, 1), (limit, step), (less, 1))
    )
    assert exact <= rounded <= spare


def test_two_solvers_agree_where_enumeration_cannot_follow():
    rng = random.Random(13)
    choices = [
        Choice(
            f"block{c}",
            tuple(
                Option(f"{o}", rng.randint(1, 8) * GIB // 4, rng.uniform(1, 2), rng.randint(0, GIB)) for o in range(5)
            ),
        )
        for c in range(12)
    ]
    lean, fast = frontier(choices)[-1].bytes, frontier(choices)[0].bytes
    for limit in (lean, (lean + fast) // 2, fast):
        dp, ilp = (solve(choices, limit, solver=solver, topk=2) for solver in ("dp", "ilp"))
        assert [each.seconds for each in ilp] == pytest.approx([each.seconds for each in dp], rel=1e-9)
        assert [each.bytes for each in ilp] == [each.bytes for each in dp]


@pytest.mark.parametrize("solver", SOLVERS)
def test_of_transient_bytes_the_largest_counts_once(solver):
    pair = [Choice(name, (Option(name, 10, 1.0, transient=5),)) for name in "ab"]
    assert solve(pair, 25, solver=solver) == [Selection((pair[0].options[0], pair[1].options[0]), 25, 2.0)]
    assert solve(pair, 24, solver=solver) == []


@pytest.mark.parametrize("solver", SOLVERS)
def test_equally_fast_ones_come_by_memory_and_then_by_order_of_options(solver):
    fast, slow, lean = Option("fast", 4, 0.1), Option("slow", 2, 0.2), Option("lean", 1, 0.3)
    alike = [Choice(name, (fast, slow, lean)) for name in "abcd"]
    found = [[option.label for option in each.taken] for each in solve(alike, 11, solver=solver, topk=6)]
    # 0.1 + 3 x 0.2 s and 2 x 0.1 + 0.2 + 0.3 s are equally long, though not as floats; the first hold a byte less
    assert found == [
        ["fast", "slow", "slow", "slow"],
        ["slow", "fast", "slow", "slow"],
        ["slow", "slow", "fast", "slow"],
        ["slow", "slow", "slow", "fast"],
        ["fast", "fast", "slow", "lean"],
        ["fast", "fast", "lean", "slow"],
    ]


@pytest.mark.parametrize("solver", SOLVERS)
def test_more_than_there_are_gives_all_that_fit(solver):
    choices = small(random.Random(14))
    fitting = [taken for _, held, _, taken in every(choices) if held <= 30]
    assert [each.taken for each in solve(choices, 30, solver=solver, topk=len(fitting) + 5)] == fitting


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_choices_there_is_one_selection_of_nothing(solver):
    assert solve([], 0, solver=solver, topk=3) == [Selection((), 0, 0.0)]
    assert frontier([]) == [Selection((), 0, 0.0)]


@pytest.mark.parametrize("solver", SOLVERS)
def test_options_that_cost_nothing_are_taken(solver):
    free = [Choice("free", (Option("slow", 0, 1.0), Option("none", 0, 0.0))), Choice("only", (Option("one", 0, 0.0),))]
    assert [option.label for option in solve(free, 0, solver=solver)[0].taken] == ["none", "one"]


def test_time_does_not_depend_on_the_order_of_choices():
    options = [Option(str(n), 0, 0.1 * n) for n in range(10)]
    assert len({seconds_of(random.Random(seed).sample(options, 10)) for seed in range(20)}) == 1


solve_by: Any = solve
ONE = Choice("mlp", (Option("split", 1, 1.0),))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: solve_by([ONE], 1, solver="ipl"), "unknown solver 'ipl': did you mean 'ilp'"),
        (lambda: solve_by([ONE], 1, solver="genetic"), "choose of dp, ilp, brute"),
        (lambda: solve([ONE, Choice("empty", ())], 1), "choice 'empty' has no options; give at least one"),
        (lambda: frontier([Choice("empty", ())]), "choice 'empty' has no options"),
        (lambda: solve([Choice("mlp", (Option("whole", -1, 1.0),))], 1), "'whole' of choice 'mlp' has bytes -1"),
        (lambda: solve([Choice("mlp", (Option("whole", 1, 1.0, -2),))], 1), "has transient -2"),
        (lambda: solve([Choice("mlp", (Option("whole", 1, -0.5),))], 1), "has seconds -0.5"),
        (lambda: solve([Choice("mlp", (Option("whole", 1, float("nan")),))], 1), "has seconds nan"),
        (lambda: frontier([Choice("mlp", (Option("whole", 1, float("inf")),))]), "has seconds inf, expected a finite"),
        (lambda: solve([ONE], -1), "limit is -1, expected at least 0"),
        (lambda: solve([ONE], 1, topk=0), "topk is 0, expected at least 1"),
        (lambda: frontier([ONE], granularity=0), "granularity is 0, expected at least 1"),
    ],
)
def test_what_cannot_be_solved_is_refused_by_name(call, says):
    with pytest.raises(ValueError, match=says):
        call()
