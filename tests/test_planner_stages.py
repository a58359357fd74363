"""Pipeline cuts against every cut there is, its microbatches played through stage by stage."""

import dataclasses
import itertools
import math
import random
import re
from typing import Any

import pytest

from artifex.scaling.autodist.stages import Block, Cut, best, cut, why_none


def uneven(rng: random.Random, count: int) -> list[Block]:
    return [
        Block(
            f"block{b}",
            forward=rng.randint(1, 6) / 10,
            backward=rng.uniform(0.1, 1.2),
            state=rng.randint(0, 20),
            kept=rng.randint(0, 6),
            stream=rng.randint(0, 8),
            gradients=rng.choice([0.0, rng.uniform(0, 8)]),
        )
        for b in range(count)
    ]


def limits_for(rng: random.Random, count: int) -> dict[str, Any]:
    drawn: dict[str, Any] = {
        "limit": rng.choice([None, rng.randint(20, 120)]),
        "pivots": tuple(rng.sample(range(count), rng.randint(1, count))) if rng.random() < 0.4 else (),
        "max_bubble": rng.choice([1.0, rng.uniform(0.1, 0.7)]),
        "max_unbalance": rng.choice([0.0, rng.uniform(0.1, 0.9)]),
        "bandwidth": rng.choice([math.inf, rng.uniform(5, 50)]),
        "schedule": rng.choice(["1f1b", "gpipe"]),
    }
    return drawn


def ended(times: list[float], microbatches: int) -> float:
    """When the last stage ends the last microbatch, if each follows the one before it at each stage."""
    before = [0.0] * len(times)
    for _ in range(microbatches):
        at = 0.0
        for stage, time in enumerate(times):
            at = max(at, before[stage]) + time
            before[stage] = at
    return before[-1]


def most_underway(stages: int, microbatches: int, schedule: str) -> list[int]:
    """Of each stage the most microbatches that are forwards and not yet backwards, by the order of its turns."""
    found = []
    for stage in range(stages):
        first = microbatches if schedule == "gpipe" else min(stages - stage - 1, microbatches)
        alternately = "FB" * (microbatches - first)
        turns = "F" * first + alternately + "B" * first
        underway = itertools.accumulate(1 if turn == "F" else -1 for turn in turns)
        found.append(max(underway))
    return found


def every_cut(blocks, stages, microbatches, *, limit, pivots, max_bubble, max_unbalance, bandwidth, schedule):
    """All cuts that the limits allow."""
    places = [b for b in range(1, len(blocks)) if b in pivots or not pivots]
    for begins in itertools.combinations(places, stages - 1):
        pieces = list(itertools.pairwise((0, *begins, len(blocks))))
        work = [sum(block.forward + block.backward for block in blocks[a:z]) for a, z in pieces]
        sends = [blocks[z - 1].stream / bandwidth for _, z in pieces[:-1]] + [0.0]
        times = [each + send + send for each, send in zip(work, sends, strict=True)]
        run = ended(times, microbatches)
        underway = most_underway(stages, microbatches, schedule)
        held = tuple(
            sum(block.state for block in blocks[a:z]) + many * sum(block.kept for block in blocks[a:z])
            for (a, z), many in zip(pieces, underway, strict=True)
        )
        sync = max(sum(block.gradients for block in blocks[a:z]) for a, z in pieces)
        found = Cut(
            tuple(pieces),
            run + sync,
            bubble=sum(run - microbatches * each for each in work) / (stages * run),
            unbalance=min(times) / max(times),
            bytes=held,
        )
        if found.bubble <= max_bubble and found.unbalance >= max_unbalance and (limit is None or max(held) <= limit):
            yield found


@pytest.mark.parametrize("seed", range(8))
def test_no_cut_that_the_limits_allow_is_faster_in_100_instances(seed):
    rng, found = random.Random(seed), {True: 0, False: 0}
    for _ in range(100):
        blocks, stages, microbatches = uneven(rng, rng.randint(2, 9)), rng.randint(1, 4), rng.randint(1, 12)
        limits = limits_for(rng, len(blocks))
        allowed = list(every_cut(blocks, stages, microbatches, **limits))
        got = cut(blocks, stages, microbatches, **limits)
        found[got is not None] += 1
        if got is None:
            assert allowed == []
            continue
        assert got.seconds == pytest.approx(min(each.seconds for each in allowed))
        same = next(each for each in allowed if each.stages == got.stages)
        assert got.bytes == same.bytes
        assert (got.bubble, got.unbalance) == pytest.approx((same.bubble, same.unbalance))
    assert min(found.values()) > 10


ALIKE = Block("block", forward=1.0, backward=2.0, state=10, kept=3)


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (2, 4), (4, 16), (4, 3), (8, 64), (12, 1)])
def test_equal_stages_are_idle_for_the_share_of_the_closed_form(stages, microbatches):
    found = cut([ALIKE] * 2 * stages, stages, microbatches, max_bubble=1.0)
    assert found is not None
    assert found.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1), abs=1e-12)
    assert found.seconds == pytest.approx((microbatches + stages - 1) * 6.0)
    assert found.unbalance == 1.0
    assert found.stages == tuple((2 * s, 2 * s + 2) for s in range(stages))
    assert found.bytes == tuple(2 * (10 + min(stages - s, microbatches) * 3) for s in range(stages))


@pytest.mark.parametrize(("stages", "microbatches", "bubble"), [(2, 4, 0.2), (3, 8, 0.2), (2, 9, 0.1), (11, 90, 0.1)])
def test_a_bubble_of_exactly_its_limit_is_allowed_and_of_a_microbatch_fewer_is_not(stages, microbatches, bubble):
    blocks = [dataclasses.replace(ALIKE, forward=0.1, backward=0.2)] * stages
    assert cut(blocks, stages, microbatches, max_bubble=bubble)
    assert cut(blocks, stages, microbatches - 1, max_bubble=bubble) is None


def test_balance_of_exactly_its_limit_is_allowed():
    blocks = [Block("short", 0.1, 0.2), Block("long", 0.2, 0.4)]
    assert cut(blocks, 2, 64, max_unbalance=0.5, max_bubble=1.0) is not None
    assert cut(blocks, 2, 64, max_unbalance=0.5001, max_bubble=1.0) is None


def test_stages_begin_at_pivots_alone():
    found = cut([ALIKE] * 8, 2, 64, pivots=(3,), max_bubble=1.0)
    assert found is not None and found.stages == ((0, 3), (3, 8))
    assert cut([ALIKE] * 8, 3, 64, pivots=(3,), max_bubble=1.0, max_unbalance=0.0) is None


def test_a_stage_is_not_cut_where_sending_costs_more_than_balance_gains():
    wide = dataclasses.replace(ALIKE, stream=100)
    blocks = [ALIKE, wide, ALIKE, ALIKE]
    free, slow = (cut(blocks, 2, 16, bandwidth=bandwidth, max_unbalance=0.0, max_bubble=1.0) for bandwidth in (1e9, 10))
    assert free is not None and free.stages == ((0, 2), (2, 4))
    assert slow is not None and slow.stages in (((0, 1), (1, 4)), ((0, 3), (3, 4)))


def test_of_gradient_syncs_the_longest_counts_once():
    blocks = [dataclasses.replace(ALIKE, gradients=seconds) for seconds in (0.5, 2.0, 1.0, 0.5)]
    with_sync, without = cut(blocks, 4, 32), cut([ALIKE] * 4, 4, 32)
    assert with_sync is not None and without is not None
    assert with_sync.seconds - without.seconds == pytest.approx(2.0)
    assert with_sync.bubble == without.bubble


def test_gpipe_takes_as_long_and_keeps_all_microbatches():
    one, all_kept = cut([ALIKE] * 4, 2, 8), cut([ALIKE] * 4, 2, 8, schedule="gpipe")
    assert one is not None and all_kept is not None
    assert all_kept.seconds == one.seconds
    assert (one.bytes, all_kept.bytes) == ((32, 26), (68, 68))


def test_a_limit_of_a_byte_less_than_the_fastest_holds_moves_a_cut():
    blocks = [dataclasses.replace(ALIKE, state=state) for state in (30, 10, 10, 10)]
    fastest = cut(blocks, 2, 32)
    assert fastest is not None and fastest.stages == ((0, 2), (2, 4))
    leaner = cut(blocks, 2, 32, limit=max(fastest.bytes) - 1, max_unbalance=0.3, max_bubble=0.5)
    assert leaner is not None and leaner.stages == ((0, 1), (1, 4))
    assert leaner.seconds > fastest.seconds


def test_blocks_that_take_no_time_are_cut_too():
    found = cut([Block("nothing", 0.0, 0.0)] * 3, 3, 2)
    assert found == Cut(((0, 1), (1, 2), (2, 3)), 0.0, 0.0, 1.0, (0, 0, 0))


def test_a_hundred_uneven_blocks_are_cut_no_worse_than_evenly():
    rng = random.Random(3)
    blocks = [Block(f"block{b}", rng.uniform(0.5, 1.5), rng.uniform(1, 3)) for b in range(96)]
    found = cut(blocks, 8, 64)
    assert found is not None
    evenly = [sum(block.forward + block.backward for block in blocks[b : b + 12]) for b in range(0, 96, 12)]
    total = sum(evenly)
    assert total * (1 + 63 / 8) <= found.seconds <= ended(evenly, 64)


def test_best_has_a_cut_for_each_divisor_of_the_devices_that_allows_one():
    cuts = best([ALIKE] * 6, 12, 64)
    assert [len(each.stages) for each in cuts] == [6, 3, 2, 1]  # 12 are too many, 4 idle for a quarter of the time
    assert [each.seconds for each in cuts] == pytest.approx([69 * 3, 66 * 6, 65 * 9, 64 * 18])
    assert [len(each.stages) for each in best([ALIKE] * 6, 12, 8)] == [3, 2, 1]


def test_blocks_may_cost_by_the_number_of_stages():
    def blocks(stages: int) -> list[Block]:
        return [dataclasses.replace(ALIKE, forward=stages / 12, backward=stages / 6)] * 12

    cuts = best(blocks, 12, 60)
    assert [len(each.stages) for each in cuts] == [1, 2, 3, 4, 6, 12]  # all that is left is the bubble
    assert [each.seconds for each in cuts] == pytest.approx([3 * (60 + s - 1) for s in (1, 2, 3, 4, 6, 12)])


def remedied(text: str, microbatches: int, limits: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Microbatches and limits as `text` says that they would do."""
    fields = {"max_pipeline_bubble_ratio": "max_bubble", "max_pipeline_unbalance_ratio": "max_unbalance"}
    for name, value in re.findall(r"(\w+)=([\d.]+) would do", text):
        limits = limits | {fields.get(name, name): float(value)}
    for count in re.findall(r"(\d+) microbatches would do", text):
        microbatches = int(count)
    return microbatches, limits


@pytest.mark.parametrize("seed", range(3))
def test_what_would_do_does(seed):
    rng, explained = random.Random(100 + seed), 0
    while explained < 60:
        blocks, stages, microbatches = uneven(rng, rng.randint(4, 9)), rng.randint(2, 4), rng.randint(1, 12)
        limits = limits_for(rng, len(blocks))
        text = why_none(blocks, stages, microbatches, **limits)
        assert (text == "") == (cut(blocks, stages, microbatches, **limits) is not None)
        if text and "as many blocks" not in text:
            explained += 1
            more, wider = remedied(text, microbatches, limits)
            assert (more, wider) != (microbatches, limits)
            assert cut(blocks, stages, more, **wider) is not None, text


@pytest.mark.parametrize(("stages", "bubble"), [(2, 0.2), (4, 0.2), (8, 0.05)])
def test_of_microbatches_as_many_are_asked_for_as_the_closed_form_needs(stages, bubble):
    text = why_none([ALIKE] * stages, stages, 1, max_bubble=bubble)
    needed = round((stages - 1) * (1 - bubble) / bubble)
    assert text == (
        f"devices would be idle for {(stages - 1) / stages:.3f} of the time, more than "
        f"max_pipeline_bubble_ratio={bubble:g}; {needed} microbatches would do"
    )


@pytest.mark.parametrize(
    ("blocks", "limits", "says"),
    [
        ([ALIKE] * 4, {"pivots": (2,)}, "4 stages need as many blocks to begin at, there are 2: block, block"),
        ([ALIKE] * 3 + [Block("head", 1.0, 8.0)], {"max_bubble": 1.0},
         "the shortest stage would take 0.333 of the longest's time, less than max_pipeline_unbalance_ratio=0.5; "
         "max_pipeline_unbalance_ratio=0.333 would do"),
        ([ALIKE] * 4, {"limit": 20}, "stage 0 of 4 would hold 22 bytes, more than limit=20; limit=22 would do"),
        ([ALIKE] * 3 + [Block("head", 1.0, 8.0)], {"max_unbalance": 0.0},
         "max_pipeline_bubble_ratio=0.53 would do, more microbatches not"),
        ([ALIKE] * 4, {"limit": 21, "max_bubble": 0.1},
         "more than max_pipeline_bubble_ratio=0.1; 27 microbatches would do; and stage 0 of 4 would hold 22 bytes"),
    ],
    ids=["pivots", "balance", "memory", "a long stage", "two together"],
)  # fmt: skip
def test_why_there_is_none_names_the_limit_and_its_numbers(blocks, limits, says):
    assert says in why_none(blocks, 4, 16, **limits)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: cut([], 1, 1), "0 blocks, 1 stages, 1 microbatches: each is at least 1"),
        (lambda: cut([ALIKE], 0, 1), "1 blocks, 0 stages"),
        (lambda: cut([ALIKE], 1, 0), "0 microbatches"),
        (lambda: cut([ALIKE], 1, 1, schedule="zigzag"), "unknown schedule 'zigzag': choose '1f1b' or 'gpipe'"),
        (lambda: cut([ALIKE], 1, 1, max_bubble=1.5), "max_bubble is 1.5, expected a number from 0 to 1"),
        (lambda: cut([ALIKE], 1, 1, max_unbalance=-0.1), "max_unbalance is -0.1, expected a number from 0 to 1"),
        (lambda: cut([ALIKE], 1, 1, bandwidth=0), "bandwidth is 0, expected a number from 1 to inf"),
        (lambda: cut([ALIKE], 1, 1, limit=-1), "limit is -1, expected a number from 0"),
        (lambda: cut([ALIKE], 1, 1, pivots=(0, 1)), "pivot 1 is no index of a block, expected 0 to 0"),
        (lambda: why_none([ALIKE], 1, 1, pivots=(7,)), "pivot 7 is no index"),
        (lambda: Block("head", -1.0, 0.0), "block 'head' has forward -1.0, expected a finite number from 0 on"),
        (lambda: Block("head", 1.0, 1.0, stream=-3), "block 'head' has stream -3"),
        (lambda: Block("head", 1.0, 1.0, gradients=math.nan), "block 'head' has gradients nan"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(call, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        call()
