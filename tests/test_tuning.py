"""What a tune may vary, how ways stand against each other, and what is kept: without a process or a device."""

import dataclasses
import itertools
import json
import math
import random

import pytest
from scipy import stats

from artifex.config import Config
from artifex.config_io import ConfigError
from artifex.scaling.autodist.cluster import HARDWARE, Cluster
from artifex.scaling.autodist.profile import FILE, Measured, Row, Sizes, Step, add_steps, measure
from artifex.scaling.autodist.spread import Spread
from artifex.tuning.board import Board, Objective
from artifex.tuning.calibrating import steps_of
from artifex.tuning.here import check_cluster
from artifex.tuning.presets import run_of
from artifex.tuning.records import Built, Predicted, Records
from artifex.tuning.rotation import Clock, Ended, rotated
from artifex.tuning.space import Space, default
from artifex.tuning.standing import CHANCE, LEAST_GAIN, Spanned, Turn, by_round, is_faster, ratios, rounds_needed
from artifex.tuning.tuned import Row as Line
from artifex.tuning.tuned import Tuned, verdict
from artifex.tuning.tuner import auto_tune
from artifex.tuning.ways import Way, combined, single

RUN = Config()
EIGHT = Spread((("fsdp", 8),), remat="dots", whole=("norm/*",))
UNROLLED = Way(None, (("unroll", 1),))
HALVES = Way(None, (("gradient_accumulation", 2),))
BUILT = Built(5.0, 0.1, 1_000, 10**9, 4_096, "tokens", "its own", "abc", 5.5)
QUESTION = {"run": {"model": {"name": "llama-nano"}}, "devices": {"kind": "cpu", "count": 1}}


def test_a_space_is_read_from_text_or_a_mapping_alike():
    text = Space.parse(
        "unroll=auto,1 attention=tiles remat=full,qkv=keep+attention=keep batch_size=8,16 axes=data,fsdp"
    )
    mapping = {
        "unroll": ["auto", 1],
        "attention": "tiles",
        "remat": ["full", "qkv=keep,attention=keep"],
        "batch_size": [8, 16],
        "axes": ["data", "fsdp"],
    }
    assert text == Space.parse(mapping) == Space.parse(str(text))
    assert text.of("remat") == ("full", "qkv=keep,attention=keep") and text.of("gradient_accumulation") == ()


def test_a_name_alone_has_the_usual_values_and_mixed_adds_the_axes():
    usual = default("cpu", 1, objective="throughput", stacked=True, attention=["tiles"], rows=6)
    assert Space.parse("gradient-accumulation", usual).fields == (("gradient_accumulation", (1, 2)),)  # 4 leaves a rest
    for name in ("mixed", "mixed_parallel"):
        asked = Space.parse(name, usual)
        assert asked.fields == usual.fields and {"data", "fsdp", "tensor"} <= set(asked.axes)


def test_what_cannot_vary_is_not_in_the_usual_space():
    convolutions = default("cpu", 1, objective="throughput", stacked=False, attention=[], rows=16)
    assert [name for name, _ in convolutions.fields] == ["gradient_accumulation"] and convolutions.axes == ()
    how = {"stacked": True, "rows": 16}
    many = default("gpu", 8, objective="throughput", attention=["cudnn"], **how)
    assert many.axes and many.of("remat") == () and many.of("attention") == ("auto", "blockwise")
    one = default("cpu", 1, objective="memory", attention=["tiles"], **how)
    assert "full" in one.of("remat") and one.of("attention") == ("auto", "blockwise")  # not the one that auto takes
    both = default("cpu", 1, objective="throughput", attention=["blockwise", "tiles"], **how)
    assert both.of("attention") == ("auto", "tiles", "blockwise")
    assert default("gpu", 8, objective="throughput", attention=["ring"], **how).of("attention") == ()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("unrol=1", "space.unrol is unknown; did you mean unroll?"),
        ("attention=blokwise", "did you mean blockwise?"),
        ("unroll=0", "greater than or equal to 1"),
        ("batch_size=1.5", "integer"),
        ("remat=fulll", "did you mean 'full'?"),
        ("axes=dta", "is no mesh axis; did you mean data?"),
        ("unroll=", "has no value"),
        ("unroll=1 unroll=2", "is given twice"),
        ("batch_size", "has no values of its own here"),
        ("", "space is empty"),
        ({"unroll": [True]}, "integer or 'auto'"),
        ({"unroll": []}, "has no value"),
    ],
)
def test_a_space_that_is_none_is_one_line(asked, says):
    with pytest.raises(ConfigError) as caught:
        Space.parse(asked)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("way", [Way(), UNROLLED, Way(EIGHT), Way(EIGHT, (("attention", "blockwise"), ("unroll", 2)))])
def test_a_way_survives_json_and_changes_what_it_says_alone(way):
    assert Way.from_dict(json.loads(json.dumps(way.to_dict()))) == way
    before, after = RUN.to_dict(), way.config(RUN).to_dict()
    changed = {name for name in before["training"] if before["training"][name] != after["training"][name]}
    spread = {"remat"} if way.spread else set()
    assert changed == {name for name, _ in way.fields} | spread
    assert [name for name in before if before[name] != after[name]] == ["training"] * bool(changed) + (
        ["device"] if way.spread else []
    )


def test_the_run_as_configured_comes_first_and_what_contradicts_itself_is_left_out():
    space = Space.parse("unroll=auto,1 gradient_accumulation=1,3,2")
    ways = single(RUN, space, [EIGHT, Spread((("data", 8),))], Spread((("data", 8),)))
    assert ways == [Way(), Way(EIGHT), UNROLLED, HALVES]  # 3 does not divide 16 rows


def test_unions_of_what_helped_come_in_the_order_of_the_products_of_their_shares():
    shares = {UNROLLED: 0.9, Way(None, (("unroll", 2),)): 0.8, HALVES: 0.95, Way(EIGHT): 0.5}
    expected = {}
    for count in (2, 3):
        for chosen in itertools.combinations(shares, count):
            names = ["spread" if way.spread else way.fields[0][0] for way in chosen]
            if len(set(names)) == count:
                spread = next((way.spread for way in chosen if way.spread), None)
                fields = tuple(sorted(field for way in chosen for field in way.fields))
                expected[Way(spread, fields)] = math.prod(shares[way] for way in chosen)
    found = list(combined(shares, RUN, []))
    assert set(found) == set(expected) and len(found) == 7
    assert [expected[way] for way in found] == pytest.approx(sorted(expected.values()))
    assert found[0] not in combined(shares, RUN, found[:1])


def test_times_are_compared_within_a_round_whatever_the_machine_does_between_rounds():
    drawn = random.Random(0)
    reference = [Turn(number, 4, drawn.uniform(1, 2)) for number in range(9)]
    way = [Turn(turn.round, 8, 0.8 * turn.seconds) for turn in reference]
    slow = [1.0 if number % 3 else 7.0 for number in range(9)]  # rounds in which something else ran

    def slowed(turns):
        return [dataclasses.replace(turn, seconds=turn.seconds * slow[turn.round]) for turn in turns]

    assert ratios(slowed(way), slowed(reference)) == pytest.approx([0.8] * 9)
    assert ratios(way, reference, work=2.0) == pytest.approx([0.4] * 9)  # twice as much in a step
    assert ratios(way[3:5], reference[4:]) == pytest.approx([0.8])  # a round that both have
    twice = [Turn(0, 1, 1.0), Turn(0, 1, 3.0), Turn(0, 1, 2.0)]
    assert by_round(twice) == {0: 2.0}


@pytest.mark.parametrize("compared", [1, 7, 30])
def test_faster_is_what_a_sign_test_says_of_enough_rounds(compared):
    for count in range(1, 20):
        for wins in range(count + 1):
            shares = [0.5] * wins + [1.5] * (count - wins)
            p = stats.binomtest(wins, count, alternative="greater").pvalue
            expected = p <= CHANCE / compared and wins > count / 2
            assert is_faster(shares, compared) == expected, (count, wins)
    needed = rounds_needed(compared)
    assert is_faster([0.5] * needed, compared) and not is_faster([0.5] * (needed - 1), compared)
    assert not is_faster([1 - LEAST_GAIN / 2] * 100, compared) and not is_faster([], compared)


def test_of_ways_that_are_all_as_fast_one_is_called_faster_as_rarely_as_promised():
    drawn, tunes, wrong = random.Random(1), 400, 0
    for _ in range(tunes):
        ways = [[math.exp(drawn.gauss(0, 0.2)) for _ in range(12)] for _ in range(10)]
        wrong += any(is_faster(shares, len(ways), least=0.0) for shares in ways)
    assert wrong / tunes <= CHANCE + 3 * math.sqrt(CHANCE / tunes)


def test_each_way_is_first_as_often_as_the_others():
    ways = [Way(), UNROLLED, HALVES]
    orders = [rotated(ways, number) for number in range(6)]
    assert all(sorted(map(str, order)) == sorted(map(str, ways)) for order in orders)
    assert all(sum(order[0] == way for order in orders) == 2 for way in ways)


def filled(folder, shares: dict, *, objective: Objective = "throughput", bytes_of=None, work=None, failed=()):
    """A board of ways whose rounds take these shares of the reference's time."""
    records = Records(folder, QUESTION)
    for way, values in {Way(): [1.0] * 12, **shares}.items():
        size = (bytes_of or {}).get(way, 1_000)
        records.add(way, built=dataclasses.replace(BUILT, bytes=size, work=(work or {}).get(way, 4_096)))
        for number, share in enumerate(values):
            records.add(way, turn=Turn(number, 2, 0.1 * share))
    for way in failed:
        records.add(way, failed="out of memory")
    return Board(records, objective, 0.9)


def test_the_best_is_faster_by_more_than_noise_or_the_run_as_configured(tmp_path):
    clear, noisy = [0.8] * 12, [0.7, 1.2] * 6
    board = filled(tmp_path / "clear", {UNROLLED: noisy, HALVES: clear})
    assert board.best() == HALVES and board.ranked() == [HALVES, UNROLLED, Way()]
    assert "0.800 of the time as configured" in verdict(board) and "12 of 12 rounds" in verdict(board)
    board = filled(tmp_path / "noise", {UNROLLED: noisy, HALVES: [0.97] * 3})
    assert board.best() == Way() and "the run as configured is the best" in verdict(board)


def test_throughput_counts_what_a_step_gets_through_and_latency_does_not(tmp_path):
    larger = Way(None, (("batch_size", 32),))
    how = {"shares": {larger: [1.5] * 12}, "work": {larger: 8_192}}
    assert filled(tmp_path / "throughput", **how).best() == larger  # 1.5 of the time for twice the tokens
    assert filled(tmp_path / "latency", **how, objective="latency").best() == Way()


def test_least_memory_is_that_of_the_ways_that_are_fast_enough(tmp_path):
    shares = {UNROLLED: [1.05] * 12, HALVES: [1.3] * 12}
    board = filled(tmp_path, shares, objective="memory", bytes_of={UNROLLED: 700, HALVES: 300})
    assert board.best() == UNROLLED  # the other has 0.77 of the throughput, below 0.9
    assert dataclasses.replace(board, share=0.7).best() == HALVES


def test_where_the_run_as_configured_fails_the_others_are_compared_with_each_other(tmp_path):
    records = Records(tmp_path, QUESTION)
    records.add(Way(), failed="out of memory")
    for way, share in ((UNROLLED, 1.0), (HALVES, 0.5)):
        records.add(way, built=BUILT)
        for number in range(10):
            records.add(way, turn=Turn(number, 1, share))
    board = Board(records, "throughput", 0.9)
    assert board.reference == UNROLLED and board.best() == HALVES
    assert "the time of unroll 1" in verdict(board)


def test_a_file_of_measurements_cut_anywhere_has_all_that_were_whole(tmp_path):
    board = filled(tmp_path / "whole", {UNROLLED: [0.9] * 3}, failed=[HALVES])
    content = board.records.path.read_bytes()
    lines = content.splitlines(keepends=True)
    for size in {0, len(content), *range(1, len(content), 401)} | {len(b"".join(lines[:n])) for n in range(3)}:
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / board.records.path.name).write_bytes(content[:size])
        kept = sum(len(b"".join(lines[: n + 1])) <= size for n in range(len(lines)))
        again = Records(folder, QUESTION)
        assert again.resumed == (kept > 0)
        found = sum(bool(r.built) + len(r.turns) + bool(r.failed) for r in again.ways.values())
        assert found == max(kept - 1, 0)
        again.add(HALVES, turn=Turn(99, 1, 0.5))
        assert Records(folder, QUESTION).of(HALVES).turns[-1] == Turn(99, 1, 0.5)
        assert all(json.loads(line) for line in again.path.read_bytes().splitlines())


def test_what_was_measured_is_known_again(tmp_path):
    board = filled(tmp_path, {Way(EIGHT): [0.9, 1.1]}, failed=[UNROLLED])
    board.records.add(HALVES, same=Way(EIGHT))
    board.records.add(Way(EIGHT), predicted=Predicted(0.1, 2_000, 1e9, 0.01))
    again = Records(tmp_path, QUESTION)
    assert again.ways == board.records.ways and again.last_round == 11 and again.of(UNROLLED).failed == "out of memory"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"devices": {"kind": "cpu", "count": 8}}, "devices.count is 1 there and 8 here"),
        ({"run": {"model": {"name": "gpt2"}}}, "run.model.name is 'llama-nano' there and 'gpt2' here"),
        ({"versions": {"jax": "9"}}, "versions is None there and"),
    ],
)
def test_measurements_of_another_question_are_refused_or_set_aside(tmp_path, change, says):
    before = filled(tmp_path, {}).records.path.read_bytes()
    with pytest.raises(ConfigError, match="--start-anew") as caught:
        Records(tmp_path, QUESTION | change)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    anew = Records(tmp_path, QUESTION | change, start_anew=True)
    assert anew.ways == {} and anew.aside is not None and anew.aside.read_bytes() == before
    assert Records(tmp_path, QUESTION | change).resumed


def test_the_budget_ends_a_tune_and_a_signal_ends_it_first():
    signals: list[str] = []
    Clock(60, signals).check()
    with pytest.raises(Ended, match="the budget of 0 min is spent"):
        Clock(0).check()
    clock = Clock(60, signals)
    signals.append("SIGINT")
    with pytest.raises(Ended, match="stopped by SIGINT"):
        clock.check()


def test_a_run_is_a_configuration_a_file_or_a_preset(tmp_path):
    RUN.save(tmp_path / "mine.yaml")
    assert run_of(RUN)[0] is RUN
    assert run_of(str(tmp_path / "mine.yaml")) == (RUN, "mine") == run_of(tmp_path / "mine.yaml")
    assert run_of("dit-digits")[0].data.source == "digits"
    assert run_of("gpt2-nano")[0].model.name == "gpt2-nano"
    with pytest.raises(ConfigError, match="did you mean llama-nano"):
        run_of("llama-nan")
    with pytest.raises(ConfigError, match="cannot be read"):
        run_of(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"objective": "speed"}, "objective 'speed' is unknown; known are throughput, latency, memory"),
        ({"objective": "latency", "tuning_objective": "latency"}, "says the same as objective"),
        ({"budget": 1, "tuning_budget_hours": 2}, "says the same as budget"),
        ({"space": "mixed", "strategy_space": "mixed_parallel"}, "says the same as space"),
        ({"budget": 0}, "budget must be a number above 0"),
        ({"share": 1.5}, "share must be above 0 and at most 1"),
        ({"candidates": 0}, "candidates must be an integer above 0"),
        ({"time_limit": math.nan}, "time_limit must be a number above 0"),
        ({"space": "unrol=1"}, "did you mean unroll?"),
        ({"space": "batch_size=8", "objective": "latency"}, "latency is the time of a step at the given batch"),
    ],
)
def test_what_cannot_be_asked_is_one_line_before_anything_starts(how, says):
    with pytest.raises(ConfigError) as caught:
        auto_tune("llama-nano", **how)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_cluster_must_be_what_is_there():
    there = {"hardware": "cpu", "count": 8}
    check_cluster(None, there)
    check_cluster("cpu:8", there)
    check_cluster(Cluster.parse("cpu:8"), there)
    with pytest.raises(ValueError, match=r"4 x cpu, the devices that are here 8 x cpu.*JAX_NUM_CPU_DEVICES=4"):
        check_cluster("cpu:4", there)
    with pytest.raises(ValueError, match=r"16 x gpu:h100.*python -m artifex.plan"):
        check_cluster("gpu:h100:2x8", there)
    with pytest.raises(ValueError, match="did you mean"):
        check_cluster("gpu:h10:8", there)


def test_a_table_names_the_best_every_failure_and_what_is_not_known(tmp_path):
    board = filled(tmp_path, {UNROLLED: [0.5] * 12}, failed=[HALVES])
    rows = tuple(Line.of(way, record, board.shares(way)) for way, record in board.records.ways.items())
    found = Tuned(RUN, UNROLLED, rows, "throughput", "1 cpu device", Spread(()), "tokens", "so it is", folder=tmp_path)
    lines = str(found).splitlines()
    (best,) = [line for line in lines if line.startswith("unroll 1")]
    # 0.05 s a step of 4,096 tokens
    assert "*" in best and "50 ms" in best and "81,920" in best and "0.500 (0.500 to 0.500)" in best
    assert any("failed: out of memory" in line for line in lines) and "so it is" in lines
    found.save()
    assert Config.from_file(tmp_path / "best.yaml") == found.config
    assert found.config.training.unroll == 1 and not found.is_default
    assert found.ratio == Spanned(0.5, 0.5, 0.5)
    kept = json.loads((tmp_path / "tuned.json").read_text())
    assert Way.from_dict(kept["best"]) == UNROLLED and len(kept["rows"]) == 3
    assert (tmp_path / "table.txt").read_text() == f"{found}\n"


STEP = Step("llama-nano", "one device", 16, "float32", 1, flops=3e9, rest=0.5, predicted=1.0, seconds=2.0)


def test_a_measured_step_says_what_devices_reach(tmp_path):
    """3e9 FLOPs in the 1.5 s that are left of 2 s when 0.5 s go to what is sent: 2e9 FLOP/s, and so it is predicted."""
    found = add_steps(tmp_path, "cpu", [STEP])
    assert found == Measured.load(tmp_path) and found.steps == (STEP,)
    cluster = dataclasses.replace(Cluster.parse("cpu:1"), hardware=found.hardware(HARDWARE["cpu"]))
    assert cluster.compute_seconds(STEP.flops, 0.0, "float32") + STEP.rest == pytest.approx(STEP.seconds)
    assert cluster.hardware.flops["bfloat16"] == HARDWARE["cpu"].flops["bfloat16"]  # which was not measured
    assert "steps of training" in cluster.hardware.source and "2 GFLOP/s" in str(found)


def test_of_several_steps_the_median_on_the_nearest_number_of_devices_counts(tmp_path):
    def at(devices, rate, model="a"):
        return dataclasses.replace(STEP, model=model, devices=devices, flops=rate * 1.5)

    found = add_steps(tmp_path, "cpu", [at(1, 5.0), at(1, 9.0, "b"), at(1, 6.0, "c"), at(8, 2.0)])
    flops = [found.hardware(HARDWARE["cpu"], count).flops["float32"] for count in (1, 2, 4, 64, None)]
    assert flops == [6.0, 6.0, 2.0, 2.0, 2.0]
    faster = add_steps(tmp_path, "cpu", [at(8, 3.0)])  # the same step again
    assert len(faster.steps) == 4 and faster.hardware(HARDWARE["cpu"]).flops["float32"] == 3.0
    nothing = dataclasses.replace(STEP, rest=5.0)  # what is sent was predicted to take longer than all of it took
    assert nothing.rate == 0.0


def test_steps_and_rows_stand_beside_each_other_and_old_files_have_no_steps(tmp_path):
    tiny = Sizes(products=(8,), dtypes=("float32",), elementwise=(1_024,), collectives=(), turns=1, repeats=1)
    rows = measure(folder=tmp_path, sizes=tiny)
    assert rows.steps == () and "steps" not in json.loads((tmp_path / FILE).read_text())
    added = add_steps(tmp_path, rows.device, [STEP])
    assert added.rows == rows.rows and measure(folder=tmp_path, sizes=tiny) == added
    more = measure(folder=tmp_path, sizes=dataclasses.replace(tiny, products=(8, 16)))
    assert more.steps == (STEP,) and len(more.rows) == len(rows.rows) + 1
    assert measure(folder=tmp_path, sizes=tiny, again=True).steps == ()
    with pytest.raises(ValueError, match="has measurements of device"):
        add_steps(tmp_path, "TPU v5e", [STEP])


@pytest.mark.parametrize(
    "wrong", [{"seconds": 0.0}, {"flops": math.inf}, {"rest": -1.0}, {"devices": 0}, {"model": ""}]
)
def test_a_step_that_was_not_measured_is_refused(wrong):
    with pytest.raises(ValueError, match="is no measurement"):
        dataclasses.replace(STEP, **wrong)
    assert Row("product", "float32", 8, 1, 1.0)


def test_the_profile_gets_the_fastest_way_of_each_spread_that_was_predicted(tmp_path):
    board = filled(tmp_path, {UNROLLED: [0.5] * 3, HALVES: [0.7] * 3, Way(EIGHT): [2.0] * 3})
    for way in (Way(), UNROLLED, Way(EIGHT)):
        board.records.add(way, predicted=Predicted(0.2, 10, 1e9, 0.01))
    steps = {step.spread: step for step in steps_of(board.records, RUN, Spread(()), 8)}
    assert {name: step.seconds for name, step in steps.items()} == {
        "one device": pytest.approx(0.05),  # unrolled or not, it is one spread
        str(EIGHT): pytest.approx(0.2),
    }
    assert steps["one device"].batch == RUN.training.batch_size and steps["one device"].devices == 8
