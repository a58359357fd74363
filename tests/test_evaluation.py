"""Scores and pictures: closed forms, an outside square root of matrices, real digits, and the pixels that are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx

from artifex.data.image_batches import all_images
from artifex.data.images import load_images
from artifex.evaluation.classifier import Network, train_classifier
from artifex.evaluation.frechet import frechet_distance, judge, nearest_neighbours, score_samples
from artifex.evaluation.grids import pairs_grid, save_grid

RNG = np.random.default_rng(5)


def exact_sample(mean, covariance, count=200):
    """Rows whose sample mean and covariance are these, up to rounding."""
    raw = RNG.normal(size=(count, len(mean)))
    raw -= raw.mean(axis=0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw.T))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def random_covariance(size):
    factor = RNG.normal(size=(size, size + 2))
    return factor @ factor.T


# Fréchet distance


def test_the_distance_of_gaussians_with_common_axes_is_the_closed_form():
    # for covariances that commute: |m - n|^2 + sum (s - t)^2 over the standard deviations s and t
    turn = scipy.linalg.qr(RNG.normal(size=(4, 4)))[0]
    mean_a, mean_b = RNG.normal(size=(2, 4))
    std_a, std_b = np.array([0.5, 1, 2, 3]), np.array([1, 1, 0.1, 4])
    a = exact_sample(mean_a, turn @ np.diag(std_a**2) @ turn.T)
    b = exact_sample(mean_b, turn @ np.diag(std_b**2) @ turn.T, count=77)
    expected = np.square(mean_a - mean_b).sum() + np.square(std_a - std_b).sum()
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-9)


def test_the_distance_of_any_gaussians_is_that_by_scipys_square_root():
    for _ in range(5):
        mean_a, mean_b = RNG.normal(size=(2, 6))
        cov_a, cov_b = random_covariance(6), random_covariance(6)
        root = scipy.linalg.sqrtm(cov_a @ cov_b).real
        expected = np.square(mean_a - mean_b).sum() + np.trace(cov_a + cov_b - 2 * root)
        there = frechet_distance(exact_sample(mean_a, cov_a), exact_sample(mean_b, cov_b))
        np.testing.assert_allclose(there, expected, rtol=1e-8)


@pytest.mark.parametrize("count", [3, 500])  # fewer rows than features, as well
def test_equal_sets_are_at_distance_zero_and_a_shift_at_its_square(count):
    features = RNG.normal(size=(count, 20)).astype(np.float32)
    assert 0 <= frechet_distance(features, features[::-1]) < 1e-6
    np.testing.assert_allclose(frechet_distance(features, features.astype(np.float64) + 2), 4 * 20, rtol=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((5, 3)), np.zeros((5, 4)), r"shapes \(5, 3\) and \(5, 4\); expected \(N, D\) with one D"),
        (np.zeros((5, 3)), np.zeros((1, 3)), "at least 2 rows each"),
        (np.zeros(5), np.zeros(5), r"expected \(N, D\)"),
        (np.zeros((5, 3)), np.full((5, 3), np.nan), "the second features hold values that are not finite"),
    ],
)
def test_features_that_do_not_fit_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


def test_nearest_neighbours_are_those_of_a_search_by_hand():
    training = RNG.uniform(-1, 1, (300, 4, 4, 3)).astype(np.float32)
    images = RNG.uniform(-1, 1, (290, 4, 4, 3)).astype(np.float32)
    images[7] = training[123]
    expected = [np.square(training - image).sum(axis=(1, 2, 3)).argmin() for image in images]
    np.testing.assert_array_equal(nearest_neighbours(images, training), expected)
    with pytest.raises(ValueError, match="give one shape"):
        nearest_neighbours(images[:, :3], training)


# The classifier


@pytest.mark.usefixtures("optimised")
def test_a_classifier_of_held_out_digits_knows_the_others_and_scores_what_resembles_them():
    pytest.importorskip("sklearn")
    corpus = load_images("digits", image_size=8, channels=1, validation_fraction=0.3)
    images, labels = all_images(corpus.train, corpus.levels)
    held_out, held_out_labels = all_images(corpus.validation, corpus.levels)
    classifier = judge(corpus)
    assert classifier.accuracy(images, labels) > 0.97
    assert classifier.features(images[:300]).shape == (300, 64)
    assert (classifier.logits(images[:300]).argmax(axis=1) == labels[:300]).mean() > 0.9

    def score(samples, labels=held_out_labels):
        return score_samples(corpus, samples, labels, classifier=classifier)

    real, half_wrong = score(held_out), score(held_out, np.where(np.arange(len(held_out)) % 2, held_out_labels, 11))
    noisy = score(held_out + 0.7 * RNG.normal(size=held_out.shape))
    noise = score(RNG.uniform(-1, 1, held_out.shape), labels=None)
    assert set(real) == {"frechet_digits", "accuracy"}
    assert set(noise) == {"frechet_digits"}
    assert real["frechet_digits"] < 1 < noisy["frechet_digits"] < noise["frechet_digits"]
    assert real["accuracy"] > 0.97
    assert abs(half_wrong["accuracy"] - real["accuracy"] / 2) < 0.02


def test_a_classifier_is_a_function_of_its_arguments():
    images = RNG.uniform(-1, 1, (70, 8, 8, 1)).astype(np.float32)
    labels = np.arange(70) % 10
    first, again, other = (train_classifier(images, labels, 10, seed=seed, steps=3) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.logits(images), again.logits(images))
    assert (first.logits(images) != other.logits(images)).any()


def test_the_network_takes_any_size_and_names_every_parameter():
    network = nnx.eval_shape(lambda: Network(5, 6, 3, 7, rngs=nnx.Rngs(0)))
    logits = nnx.eval_shape(lambda network: network.to_classes(network.features(jnp.zeros((2, 5, 6, 3)))), network)
    assert logits.shape == (2, 7)
    params = nnx.state(network, nnx.Param)
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    assert len(leaves) == 12
    assert all(len(leaf.get_metadata("out_sharding")) == len(leaf.shape) for leaf in leaves)


def test_data_that_a_classifier_cannot_learn_from_is_refused(tmp_path):
    images = np.zeros((4, 8, 8, 1), np.float32)
    for labels, message in (
        (np.zeros(3, int), r"images are of shape \(4, 8, 8, 1\), labels int64 of shape \(3,\)"),
        (np.zeros(4), r"labels float64 of shape \(4,\)"),
        (np.arange(4), r"labels are 0 to 3, outside \[0, 3\); set num_classes"),
    ):
        with pytest.raises(ValueError, match=message):
            train_classifier(images, labels, 3)
    np.save(tmp_path / "some.npy", np.zeros((9, 8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"some\.npy has no labels, which a classifier learns from"):
        judge(load_images(tmp_path / "some.npy", image_size=8, channels=1))


# Pictures


def read(path):
    return np.asarray(pytest.importorskip("PIL.Image").open(path).convert("RGB")).astype(int)


@pytest.mark.parametrize(("size", "channels", "upscale", "drawn"), [(8, 1, None, 6), (64, 3, None, 1), (5, 3, 4, 4)])
def test_a_grid_holds_each_pixel_as_a_square_of_its_colour(tmp_path, size, channels, upscale, drawn):
    images = RNG.uniform(-1.2, 1.2, (5, size, size, channels))
    save_grid(images, tmp_path / "new" / "grid.png", columns=3, upscale=upscale)
    picture, step = read(tmp_path / "new" / "grid.png"), size * drawn + 2
    assert picture.shape == (2 * step + 2, 3 * step + 2, 3)
    for number, image in enumerate(images):
        top, left = (2 + place * step for place in divmod(number, 3))
        for offset in (0, drawn - 1):
            pixels = picture[top + offset : top + step - 2 : drawn, left + offset : left + step - 2 : drawn]
            expected = (np.clip(image, -1, 1) + 1) / 2 * 255
            assert abs(pixels - expected).max() <= 0.51  # one channel as three equal ones
    assert len(np.unique(picture[:2])) == 1  # a line between


def test_a_pair_is_an_image_and_its_partner_side_by_side(tmp_path):
    dark, bright = np.full((4, 8, 8, 1), -1.0), np.full((4, 8, 8, 1), 1.0)
    pairs_grid(dark, bright, tmp_path / "pairs.png", upscale=10)
    picture = read(tmp_path / "pairs.png")
    assert picture.shape == (2 * 84 + 4, 2 * (161 + 4) + 4, 3)
    row = picture[40, :, 0]
    assert [(row == value).sum() for value in (0, 255)] == [160, 160]
    assert row[4:84].max() == 0 and row[85:165].min() == 255


def test_names_and_title_stand_beside_the_images_and_cover_none(tmp_path):
    images = np.full((6, 8, 8, 1), -1.0)
    save_grid(images, tmp_path / "bare.png", columns=2)
    names = ["zero", "$one$", "a very long name"]
    save_grid(images, tmp_path / "named.png", columns=2, row_labels=names, title="one of $2 after a step")
    bare, named = read(tmp_path / "bare.png"), read(tmp_path / "named.png")
    margin = 12 + 8 * len(names[2])
    np.testing.assert_array_equal(named[24:, margin : margin + bare.shape[1]], bare)
    rows = np.flatnonzero((named[24:, :margin] < 128).any(axis=(1, 2)))
    for row in range(3):  # ink beside the middle of each row
        assert abs(rows - (2 + row * 50 + 24)).min() < 6
    assert (named[:24] < 128).any()
    assert (named[:, 0] == 255).all() and (named[:24, -1] == 255).all()  # no letter is cut off


def test_images_that_cannot_be_drawn_are_refused(tmp_path):
    good, path = np.zeros((4, 8, 8, 1)), tmp_path / "never.png"
    for images, how, message in (
        (np.zeros((4, 8, 8)), {}, r"images are of shape \(4, 8, 8\); expected \(N, H, W, 1\)"),
        (np.zeros((0, 8, 8, 1)), {}, "N at least 1"),
        (np.zeros((4, 8, 8, 2)), {}, r"\(N, H, W, 3\)"),
        (np.full((4, 8, 8, 1), np.nan), {}, "not finite; the model that made them has diverged"),
        (good, {"columns": 0}, "columns is 0"),
        (good, {"upscale": 0}, "upscale is 0"),
        (good, {"columns": 2, "row_labels": ["a"]}, "1 row labels are given for 2 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            save_grid(images, path, **how)
    with pytest.raises(ValueError, match="expected one shape"):
        pairs_grid(good, good[:2], path)
    assert not path.exists()
