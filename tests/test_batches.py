"""Batches of windows: pure in (seed, step), the same on any number of processes, each epoch the whole corpus."""

import itertools

import numpy as np
import pytest

from artifex.data.batches import Batches, validation_batches


def positions(size, dtype: type = np.int32):
    """A corpus whose every token says where it stands."""
    return np.arange(size, dtype=dtype)


def rows_of(batches, count):
    """The first `count` rows from step 0 on."""
    steps = (batches.batch_at(step)["tokens"] for step in itertools.count())
    return list(itertools.islice(itertools.chain.from_iterable(steps), count))


def test_a_batch_depends_on_seed_and_step_alone():
    sizes = {"batch_size": 4, "sequence_length": 7}
    steps = [5, 0, 90, 5, 1_000_000_007]
    first = Batches(positions(1_000), seed=3, **sizes)
    second = Batches(positions(1_000), seed=3, **sizes)
    other = Batches(positions(1_000), seed=4, **sizes)
    there = {step: first.batch_at(step) for step in steps}
    for step in reversed(steps):
        back = second.batch_at(step)
        for key in ("tokens", "targets"):
            np.testing.assert_array_equal(there[step][key], back[key])
        assert (other.batch_at(step)["tokens"] != back["tokens"]).any()
    assert not np.array_equal(there[0]["tokens"], there[5]["tokens"])


@pytest.mark.parametrize("processes", [2, 4])
def test_the_rows_of_all_processes_make_the_batch_of_one(processes):
    sizes = {"batch_size": 8, "sequence_length": 16, "seed": 1}
    alone = Batches(positions(500), **sizes)
    parts = [Batches(positions(500), **sizes, process_index=p, process_count=processes) for p in range(processes)]
    for step in range(20):  # several epochs of 31 windows
        whole = alone.batch_at(step)
        for key in ("tokens", "targets"):
            joined = np.concatenate([part.batch_at(step)[key] for part in parts])
            np.testing.assert_array_equal(joined, whole[key])


def test_a_resumed_stream_equals_one_that_never_stopped():
    batches = Batches(positions(300), batch_size=4, sequence_length=8, seed=2)
    whole = batches.stream()
    unbroken = [next(whole) for _ in range(12)]
    whole.close()
    resumed = batches.stream(start_step=5)
    for expected in unbroken[5:]:
        got = next(resumed)
        np.testing.assert_array_equal(got["tokens"], expected["tokens"])
        np.testing.assert_array_equal(got["targets"], expected["targets"])
    resumed.close()


def test_targets_are_the_next_tokens_of_the_raw_corpus():
    corpus = np.random.default_rng(0).permutation(997).astype(np.uint16)
    place = {token: where for where, token in enumerate(corpus.tolist())}
    batches = Batches(corpus, batch_size=16, sequence_length=50, seed=0)
    for step in range(10):
        batch = batches.batch_at(step)
        assert batch["tokens"].shape == batch["targets"].shape == (16, 50)
        assert batch["tokens"].dtype == batch["targets"].dtype == np.int32
        for row in zip(batch["tokens"], batch["targets"], strict=True):
            start = place[int(row[0][0])]
            ring = [int(corpus[(start + i) % 997]) for i in range(51)]
            assert row[0].tolist() == ring[:-1]
            assert row[1].tolist() == ring[1:]


@pytest.mark.parametrize(
    ("size", "length", "batch", "epochs"),
    [
        (1_000, 10, 8, 4),
        (1_009, 10, 7, 4),
        (33, 32, 5, 4),
        (100, 99, 1, 4),
        (50, 1, 50, 4),
        (65_537, 1, 999, 1),
        (65_538, 1, 999, 1),
    ],
)
def test_an_epoch_covers_the_corpus_without_overlap(size, length, batch, epochs):
    batches = Batches(positions(size), batch_size=batch, sequence_length=length, seed=5)
    windows = size // length
    rows = rows_of(batches, epochs * windows)
    for epoch in range(epochs):
        seen = np.concatenate(rows[epoch * windows : (epoch + 1) * windows])
        assert len(np.unique(seen)) == len(seen) == size - size % length


def test_epochs_differ_in_offset_and_in_order():
    batches = Batches(positions(1_000), batch_size=1, sequence_length=10, seed=5)
    starts = np.array([row[0] for row in rows_of(batches, 500)]).reshape(5, 100)
    assert len({int(epoch.min()) % 10 for epoch in starts}) > 1
    orders = {tuple(((epoch - epoch[0]) % 1_000 // 10).tolist()) for epoch in starts}
    assert len(orders) == 5
    assert all(list(order) != sorted(order) for order in orders)


def test_every_token_is_left_out_equally_often():
    batches = Batches(positions(19), batch_size=1, sequence_length=10, seed=0)  # one window an epoch, 9 tokens left out
    counts = np.bincount(np.concatenate(rows_of(batches, 4_000)), minlength=19)
    # Binomial(4,000, 10/19): mean 2,105, standard deviation 32.
    assert np.abs(counts - 4_000 * 10 / 19).max() < 5 * 32


def test_a_memory_map_gives_the_batches_of_the_array(tmp_path):
    np.save(tmp_path / "tokens.npy", positions(400, np.uint16))
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    sizes = {"batch_size": 4, "sequence_length": 30, "seed": 9}
    for step in (0, 17):
        np.testing.assert_array_equal(
            Batches(mapped, **sizes).batch_at(step)["tokens"],
            Batches(positions(400), **sizes).batch_at(step)["tokens"],
        )


@pytest.mark.parametrize("bad", [-1, 300, 2**40])
def test_an_id_outside_the_vocabulary_is_refused_when_drawn(bad):
    tokens = np.full(100, 7, np.int64)
    tokens[50] = bad
    batches = Batches(tokens, batch_size=10, sequence_length=10, vocab_size=300)
    with pytest.raises(ValueError, match=rf"id {bad}, outside \[0, 300\)"):
        [batches.batch_at(step) for step in range(2)]
    with pytest.raises(ValueError, match=rf"id {bad}, outside \[0, 300\)"):
        list(validation_batches(tokens, batch_size=10, sequence_length=10, vocab_size=300))


@pytest.mark.parametrize("size", [2, 9, 10, 11, 80, 81, 82, 100])
def test_all_validation_batches_hold_each_target_once_in_one_shape(size):
    batches = list(validation_batches(positions(size), batch_size=4, sequence_length=10))
    assert batches
    seen = []
    for batch in batches:
        assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
            "tokens": ((4, 10), np.int32),
            "targets": ((4, 10), np.int32),
            "mask": ((4, 10), np.float32),
        }
        valid = batch["mask"] == 1
        assert ((batch["mask"] == 0) | valid).all()
        np.testing.assert_array_equal(batch["targets"][valid], batch["tokens"][valid] + 1)
        seen += batch["targets"][valid].tolist()
    assert seen == list(range(1, size))


def test_few_validation_batches_are_spread_evenly_and_are_the_same_again():
    def draw():
        return list(validation_batches(positions(10_001), batch_size=4, sequence_length=10, count=5))

    first, second = draw(), draw()
    assert len(first) == 5
    starts = np.concatenate([batch["tokens"][:, 0] for batch in first])
    assert starts.tolist() == list(range(0, 10_000, 500))  # 1,000 windows, 20 of them chosen
    assert all(batch["mask"].all() for batch in first)
    for batch, again in zip(first, second, strict=True):
        for key in batch:
            np.testing.assert_array_equal(batch[key], again[key])


@pytest.mark.parametrize("processes", [2, 4])
def test_validation_rows_of_all_processes_make_the_batch_of_one(processes):
    sizes = {"batch_size": 8, "sequence_length": 10, "count": 2}
    alone = list(validation_batches(positions(95), **sizes))
    parts = [
        list(validation_batches(positions(95), **sizes, process_index=p, process_count=processes))
        for p in range(processes)
    ]
    for step, whole in enumerate(alone):
        for key in whole:
            np.testing.assert_array_equal(np.concatenate([part[step][key] for part in parts]), whole[key])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"sequence_length": -3}, "sequence_length is -3; it must be at least 1"),
        ({"batch_size": 6, "process_count": 4}, "batch_size 6 does not divide by the 4 processes; set it to e.g. 8"),
        ({"process_index": 2, "process_count": 2}, r"process_index 2 is not in \[0, 2\)"),
        ({"process_count": 0}, "process_count is 0"),
        ({"tokens": np.zeros(50)}, r"tokens are float64 of shape \(50,\); expected integers in one dim"),
        ({"tokens": np.zeros((5, 50), int)}, r"of shape \(5, 50\); expected integers in one dim"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_at_once(change, message):
    arguments = {"tokens": positions(50), "batch_size": 4, "sequence_length": 8} | change
    tokens = arguments.pop("tokens")
    with pytest.raises(ValueError, match=message):
        Batches(tokens, **arguments)
    with pytest.raises(ValueError, match=message):
        validation_batches(tokens, **arguments)


def test_a_corpus_shorter_than_a_window_says_what_it_has_and_what_is_needed():
    with pytest.raises(
        ValueError, match=r"tokens are 8, but one window needs sequence_length \+ 1 = 9; lower sequence_l"
    ):
        Batches(positions(8), batch_size=1, sequence_length=8)
    Batches(positions(9), batch_size=1, sequence_length=8).batch_at(0)
    with pytest.raises(ValueError, match="validation tokens are 1, but a prediction needs 2"):
        validation_batches(positions(1), batch_size=1, sequence_length=8)


def test_seeds_steps_and_counts_below_their_range_are_refused():
    with pytest.raises(ValueError, match="seed is -1"):
        Batches(positions(50), batch_size=1, sequence_length=8, seed=-1)
    batches = Batches(positions(50), batch_size=1, sequence_length=8)
    with pytest.raises(ValueError, match="step is -1"):
        batches.batch_at(-1)
    with pytest.raises(ValueError, match="start_step is -1"):
        batches.stream(-1)
    with pytest.raises(ValueError, match="count is 0"):
        validation_batches(positions(50), batch_size=1, sequence_length=8, count=0)
