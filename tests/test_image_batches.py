"""Batches of images: pure in (seed, step), the same on any number of processes, each epoch every image once."""

import itertools

import numpy as np
import pytest

from artifex.data.image_batches import ImageBatches, all_images, image_validation_batches, to_float
from artifex.data.images import load_images


def corpus_of(tmp_path, count=200, size=6, channels=1, **how):
    """Images whose first two pixels say which one they are, and whose label is that number modulo 7."""
    images = np.random.default_rng(1).integers(0, 256, (count, size, size, channels), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = np.divmod(np.arange(count), 256)
    np.savez(tmp_path / "some.npz", images=images, labels=np.arange(count) % 7)
    return load_images(tmp_path / "some.npz", image_size=size, channels=channels, **how)


def values(batch):
    return np.rint((batch["image"] + 1) / 2 * 255).astype(int)


def numbers(batch):
    """Which images are in a batch that was not changed."""
    return (values(batch)[:, 0, 0, 0] * 256 + values(batch)[:, 0, 1, 0]).tolist()


def equal(one, other):
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_values_span_minus_one_to_one_in_equal_steps(levels):
    made = to_float(np.arange(levels, dtype=np.uint8), levels)
    assert made.dtype == np.float32
    assert (made[0], made[-1]) == (-1, 1)
    np.testing.assert_allclose(made, np.linspace(-1, 1, levels), atol=1e-7)


def test_a_batch_is_the_images_themselves_with_their_labels(tmp_path):
    corpus = corpus_of(tmp_path, channels=3)
    stored = np.load(tmp_path / "some.npz")
    batch = ImageBatches(corpus, batch_size=32).batch_at(2)
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "image": ((32, 6, 6, 3), np.float32),
        "label": ((32,), np.int32),
    }
    np.testing.assert_array_equal(values(batch), stored["images"][numbers(batch)])
    np.testing.assert_array_equal(batch["label"], stored["labels"][numbers(batch)])


def test_a_corpus_without_labels_makes_batches_without(tmp_path):
    corpus = corpus_of(tmp_path, labels=False)
    assert set(ImageBatches(corpus, batch_size=2).batch_at(0)) == {"image"}
    assert set(next(image_validation_batches(corpus, batch_size=2))) == {"image", "mask"}


def test_a_batch_depends_on_seed_and_step_alone(tmp_path):
    corpus = corpus_of(tmp_path)
    how = {"batch_size": 8, "flip": True, "crop": 2}
    first, second = (ImageBatches(corpus, seed=3, **how) for _ in range(2))
    other = ImageBatches(corpus, seed=4, **how)
    there = {step: first.batch_at(step) for step in (5, 0, 90, 1_000_000_007)}
    for step in reversed(there):
        equal(second.batch_at(step), there[step])
        assert (other.batch_at(step)["image"] != there[step]["image"]).any()


@pytest.mark.parametrize("processes", [2, 4])
def test_the_rows_of_all_processes_make_the_batch_of_one(tmp_path, processes):
    corpus, how = corpus_of(tmp_path, count=50), {"batch_size": 8, "seed": 1}
    change = {"flip": True, "crop": 1}
    alone = ImageBatches(corpus, **how, **change)
    parts = [ImageBatches(corpus, **how, **change, process_index=p, process_count=processes) for p in range(processes)]
    for step in range(20):  # several epochs
        rows = [part.batch_at(step) for part in parts]
        equal({key: np.concatenate([row[key] for row in rows]) for key in rows[0]}, alone.batch_at(step))
    held_out = {"batch_size": 4, "count": 2}
    whole = list(image_validation_batches(corpus, **held_out))
    parts = [
        list(image_validation_batches(corpus, **held_out, process_index=p, process_count=processes))
        for p in range(processes)
    ]
    for step, batch in enumerate(whole):
        equal({key: np.concatenate([part[step][key] for part in parts]) for key in batch}, batch)


@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_a_resumed_stream_equals_one_that_never_stopped(tmp_path, kind):
    corpus = corpus_of(tmp_path, count=30)
    if kind == "files":
        pillow = pytest.importorskip("PIL.Image")
        for number in range(30):
            pillow.fromarray(corpus.train.image(number % 20)[..., 0]).save(tmp_path / f"{number}.png")
        corpus = load_images(tmp_path, image_size=6, channels=1)
    batches = ImageBatches(corpus, batch_size=4, seed=2, flip=True, crop=1)
    whole = batches.stream()
    unbroken = [next(whole) for _ in range(12)]
    whole.close()
    resumed = batches.stream(start_step=5)
    for step in range(5, 12):
        got = next(resumed)
        equal(got, unbroken[step])
        equal(got, batches.batch_at(step))
    resumed.close()


@pytest.mark.parametrize("batch", [1, 7, 200])
def test_each_epoch_visits_every_image_once_in_an_order_of_its_own(tmp_path, batch):
    corpus = corpus_of(tmp_path)
    batches = ImageBatches(corpus, batch_size=batch, seed=5)
    steps = (numbers(batches.batch_at(step)) for step in itertools.count())
    drawn = list(itertools.islice(itertools.chain.from_iterable(steps), 3 * batches.images_per_epoch))
    epochs = np.array(drawn).reshape(3, -1)
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    held_out = {number for b in image_validation_batches(corpus, batch_size=1) for number in numbers(b)}
    for epoch in epochs.tolist():
        assert sorted([*epoch, *held_out]) == list(range(200))


def test_half_of_the_images_are_mirrored_and_no_two_epochs_alike(tmp_path):
    corpus = corpus_of(tmp_path, channels=3)
    plain, flipped = ImageBatches(corpus, batch_size=40), ImageBatches(corpus, batch_size=40, flip=True)
    mirrored = []
    for step in range(50):
        for image, changed in zip(plain.batch_at(step)["image"], flipped.batch_at(step)["image"], strict=True):
            mirrored.append(not np.array_equal(image, changed))
            np.testing.assert_array_equal(changed, image[:, ::-1] if mirrored[-1] else image)
    assert abs(sum(mirrored) - 1_000) < 5 * 23  # binomial(2,000, 1/2): deviation 22.4
    assert mirrored[: len(corpus.train)] != mirrored[len(corpus.train) : 2 * len(corpus.train)]


def test_a_crop_is_a_window_of_the_image_reflected_beyond_its_edges(tmp_path):
    corpus = corpus_of(tmp_path)
    plain, cropped = ImageBatches(corpus, batch_size=40), ImageBatches(corpus, batch_size=40, crop=2)
    seen = np.zeros((5, 5), int)
    for step in range(50):
        for image, changed in zip(plain.batch_at(step)["image"], cropped.batch_at(step)["image"], strict=True):
            padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
            windows = np.lib.stride_tricks.sliding_window_view(padded, (6, 6, 1))[:, :, 0, :, :, 0]
            where = np.argwhere((windows == changed[..., 0]).all(axis=(2, 3)))
            assert len(where) == 1
            seen[tuple(where[0])] += 1
    assert abs(seen - 80).max() < 5 * 8.8  # binomial(2,000, 1/25): deviation 8.8


@pytest.mark.parametrize(("batch", "count"), [(1, None), (4, None), (64, None), (4, 2), (3, 1)])
def test_validation_batches_hold_images_spread_evenly_and_mask_the_rest(tmp_path, batch, count):
    corpus = corpus_of(tmp_path, validation_fraction=0.1)
    stored = np.load(tmp_path / "some.npz")
    batches = list(image_validation_batches(corpus, batch_size=batch, count=count))
    seen = []
    for one in batches:
        assert {key: (value.shape, value.dtype) for key, value in one.items()} == {
            "image": ((batch, 6, 6, 1), np.float32),
            "label": ((batch,), np.int32),
            "mask": ((batch,), np.float32),
        }
        valid = one["mask"] == 1
        assert (one["image"][~valid] == 0).all() and (one["mask"][~valid] == 0).all()
        there = np.array(numbers(one))[valid]
        np.testing.assert_array_equal(values(one)[valid], stored["images"][there])
        np.testing.assert_array_equal(one["label"][valid], stored["labels"][there])
        seen += there.tolist()
    every = [number for b in image_validation_batches(corpus, batch_size=1) for number in numbers(b)]
    most = len(every) if count is None else min(len(every), batch * count)
    assert seen == [every[place * len(every) // most] for place in range(most)]
    assert len(set(every)) == len(corpus.validation)


def test_all_images_are_those_of_the_split_or_an_even_part(tmp_path):
    corpus = corpus_of(tmp_path)
    images, labels = all_images(corpus.train, corpus.levels)
    np.testing.assert_array_equal(values({"image": images})[3], corpus.train.image(3))
    np.testing.assert_array_equal(labels, corpus.train.labels)
    some, _ = all_images(corpus.train, corpus.levels, most=10)
    step = len(images) / 10
    np.testing.assert_array_equal(some, images[[int(place * step) for place in range(10)]])


def test_a_file_that_turns_out_to_be_damaged_is_named_when_drawn(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    corpus = corpus_of(tmp_path, size=64, count=10)
    for number in range(5):
        pillow.fromarray(corpus.train.image(number)[..., 0]).save(tmp_path / f"{number}.jpg", quality=95)
    corpus = load_images(tmp_path, image_size=6, channels=1)
    for name in "01234":
        (tmp_path / f"{name}.jpg").write_bytes((tmp_path / f"{name}.jpg").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"[0-4]\.jpg cannot be decoded: .*truncated.*; mend or remove it"):
        ImageBatches(corpus, batch_size=1).batch_at(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"batch_size": 6, "process_count": 4}, "batch_size 6 does not divide by the 4 processes; set it to e.g. 8"),
        ({"process_index": 2, "process_count": 2}, r"process_index 2 is not in \[0, 2\)"),
        ({"seed": -1}, "seed is -1"),
        ({"crop": 6}, "crop is 6; images of 6 pixels shift by 0 to one less"),
        ({"crop": -1}, "crop is -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_at_once(tmp_path, change, message):
    corpus = corpus_of(tmp_path)
    with pytest.raises(ValueError, match=message):
        ImageBatches(corpus, **{"batch_size": 4} | change)


def test_steps_and_counts_below_their_range_are_refused(tmp_path):
    corpus = corpus_of(tmp_path)
    batches = ImageBatches(corpus, batch_size=4)
    with pytest.raises(ValueError, match="step is -1"):
        batches.batch_at(-1)
    with pytest.raises(ValueError, match="start_step is -1"):
        batches.stream(-1)
    with pytest.raises(ValueError, match="count is 0"):
        image_validation_batches(corpus, batch_size=4, count=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        image_validation_batches(corpus, batch_size=0)
