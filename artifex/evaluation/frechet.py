"""The Fréchet distance between two sets of images by a classifier's features, and the scores of samples.

Dims: N images, D features.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from artifex.data.image_batches import all_images
from artifex.data.images import ImageCorpus
from artifex.evaluation.classifier import Classifier, train_classifier

_MOST_REFERENCES = 10_000
_AT_ONCE = 256


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of features (N, D), in float64.

    The squared distance of the Gaussians with the sets' means and covariances: Dowson and Landau 1982, eq. 4; of
    generated images Heusel et al. 2017 (arXiv:1706.08500). It is theirs only by formula: with features other than
    Inception's it is no FID, and it compares only with distances by the same features and as many images. Raises
    `ValueError` for other shapes, fewer than 2 rows, and values that are not finite.
    """
    means, covariances = [], []
    for name, features in (("first", features_a), ("second", features_b)):
        features_ND = np.asarray(features, np.float64)
        if features_ND.ndim != 2 or len(features_ND) < 2 or features_ND.shape[1] != np.shape(features_a)[-1]:
            raise ValueError(
                f"the features are of shapes {np.shape(features_a)} and {np.shape(features_b)}; expected (N, D) with "
                "one D and at least 2 rows each"
            )
        if not np.isfinite(features_ND).all():
            raise ValueError(f"the {name} features hold values that are not finite; look at the images they are of")
        mean_D = features_ND.mean(axis=0)
        centred_ND = features_ND - mean_D
        means.append(mean_D)
        covariances.append(centred_ND.T @ centred_ND / (len(features_ND) - 1))
    # the trace of (C_a C_b)^(1/2) is the sum of the singular values of C_a^(1/2) C_b^(1/2)
    cross = np.linalg.svd(_root(covariances[0]) @ _root(covariances[1]), compute_uv=False).sum()
    spread = np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * cross
    return float(np.square(means[0] - means[1]).sum() + max(spread, 0))


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root; eigenvalues that rounding made negative count as 0."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def nearest_neighbours(images: np.ndarray, training_images: np.ndarray) -> np.ndarray:
    """For each of `images` (N, H, W, C) the index of the training image at the least squared distance of pixels."""
    if images.shape[1:] != training_images.shape[1:]:
        raise ValueError(f"images are {images.shape[1:]}, training images {training_images.shape[1:]}; give one shape")
    training = np.asarray(training_images, np.float32).reshape(len(training_images), -1)
    lengths = np.square(training).sum(axis=1)
    nearest = []
    for first in range(0, len(images), _AT_ONCE):
        some = np.asarray(images[first : first + _AT_ONCE], np.float32).reshape(-1, training.shape[1])
        nearest.append((lengths - 2 * some @ training.T).argmin(axis=1))
    return np.concatenate(nearest)


def judge(corpus: ImageCorpus, *, seed: int = 0) -> Classifier:
    """A classifier trained on the images that are held out from generative models.

    Raises `ValueError` where the corpus has no labels.
    """
    images, labels = all_images(corpus.validation, corpus.levels)
    if labels is None:
        raise ValueError(f"{corpus.source} has no labels, which a classifier learns from; scores need them")
    return train_classifier(images, labels, corpus.num_classes, seed=seed)


def score_samples(
    corpus: ImageCorpus, samples: np.ndarray, labels: np.ndarray | None = None, *, classifier: Classifier | None = None
) -> dict[str, float]:
    """How near samples (N, H, W, C) in [-1, 1] come to the training images.

    `frechet_` and the name of the data, such as `frechet_digits`: the Fréchet distance to the training images, or
    10,000 of them, by the classifier's features. `accuracy`, where the samples have `labels` (N,): the part that the
    classifier sees as what it was meant to be. `classifier`: `judge(corpus)` unless given.
    """
    classifier = judge(corpus) if classifier is None else classifier
    references, _ = all_images(corpus.train, corpus.levels, most=_MOST_REFERENCES)
    name = re.sub(r"\W+", "_", Path(corpus.source).stem.lower()).strip("_")
    scores = {f"frechet_{name}": frechet_distance(classifier.features(samples), classifier.features(references))}
    return scores if labels is None else scores | {"accuracy": classifier.accuracy(samples, labels)}
