"""A small convolutional classifier: its accuracy and its features are what generated images are scored by.

Dims: B batch, H height, W width, C channels, K classes, D features.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from artifex.models.convolution import Conv
from artifex.models.layers import Linear, dropout

_FEATURES = 64
_BATCH = 64
_EVALUATED = 256  # images at once
_RATE, _WARMUP = 3e-3, 20  # the rate rises over the first twentieth of the steps
_ADAMW = optax.adamw(1.0, weight_decay=0.05)  # its updates are scaled by the rate


class Network(nnx.Module):
    """Two pairs of convolutions, each ending in stride 2, and two linear maps: (B, H, W, C) -> (B, D) -> (B, K)."""

    def __init__(self, height: int, width: int, channels: int, num_classes: int, *, rngs: nnx.Rngs):
        widths = (channels, 32, 32, 64, 64)
        self.convolutions = nnx.List(
            Conv(inputs, outputs, stride=1 + index % 2, scale=2.0, rngs=rngs)
            for index, (inputs, outputs) in enumerate(itertools.pairwise(widths))
        )
        flat = -(-height // 4) * -(-width // 4) * widths[-1]
        self.to_features = Linear((flat, _FEATURES), ("in_features", "out_features"), bias=True, scale=2.0, rngs=rngs)
        self.to_classes = Linear((_FEATURES, num_classes), ("out_features", "classes"), bias=True, rngs=rngs)

    def features(self, image_BHWC: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """(B, D), none negative; with a key, an eighth of them dropped, as in training."""
        x = image_BHWC
        for convolution in self.convolutions:
            x = jax.nn.relu(convolution(x))
        return dropout(jax.nn.relu(self.to_features(x.reshape(len(x), -1))), 0.125, key)


class Classifier:
    """A trained network on arrays of any length: `logits` and `features` of float32 (N, H, W, C) in [-1, 1]."""

    def __init__(self, network: Network):
        self.network = network

    def features(self, images: np.ndarray) -> np.ndarray:
        """Float32 (N, 64): what the last linear map reads."""
        return self._both(images)[0]

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Float32 (N, K)."""
        return self._both(images)[1]

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """The part of `images` whose largest logit is that of their label."""
        return float(np.mean(self.logits(images).argmax(axis=-1) == np.asarray(labels)))

    def _both(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = np.asarray(images, np.float32)
        padded = np.pad(images, ((0, -len(images) % _EVALUATED), *((0, 0),) * 3))  # one shape, compiled once
        parts = [
            _run(self.network, jnp.asarray(padded[first : first + _EVALUATED]))
            for first in range(0, len(padded), _EVALUATED)
        ]
        features, logits = (np.concatenate(part)[: len(images)] for part in zip(*jax.device_get(parts), strict=True))
        return features, logits


@nnx.jit
def _run(network: Network, image_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
    feature_BD = network.features(image_BHWC)
    return feature_BD, network.to_classes(feature_BD)


def train_classifier(
    images: np.ndarray, labels: np.ndarray, num_classes: int, *, seed: int = 0, steps: int = 500
) -> Classifier:
    """Train on float32 (N, H, W, C) in [-1, 1] and integer labels (N,), each image shifted by up to a pixel.

    AdamW on the cross entropy with labels smoothed by 0.05, the learning rate falling to 0 by a cosine. The same
    arguments give the same classifier. Meant for small images: on digits of 8x8 a few seconds on two cores. Raises
    `ValueError` for arrays that do not fit together.
    """
    images, labels = np.asarray(images, np.float32), np.asarray(labels)
    if images.ndim != 4 or not len(images) or labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"images are of shape {images.shape}, labels {labels.dtype} of shape {labels.shape}; expected (N, H, W, C) "
            "and integers (N,)"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels are {labels.min()} to {labels.max()}, outside [0, {num_classes}); set num_classes")
    _, height, width, channels = images.shape
    network = Network(height, width, channels, num_classes, rngs=nnx.Rngs(seed))
    graph, params = nnx.split(network, nnx.Param)
    moments, key = _ADAMW.init(params), jax.random.key(seed)
    order = np.random.Generator(np.random.Philox(seed)).integers(0, len(images), (steps, _BATCH))
    for step in range(steps):
        batch = images[order[step]], labels[order[step]].astype(np.int32)
        rate = _RATE * min(1, (step + 1) * _WARMUP / steps) * (1 + math.cos(math.pi * step / steps)) / 2
        random = jax.random.fold_in(key, step)
        params, moments = _train_step(params, moments, *batch, np.float32(rate), random, graph, num_classes)
    return Classifier(nnx.merge(graph, params))


@functools.partial(jax.jit, static_argnames=("graph", "num_classes"), donate_argnames=("params", "moments"))
def _train_step(
    params: nnx.State,
    moments: optax.OptState,
    image_BHWC: jax.Array,
    label_B: jax.Array,
    rate: jax.Array,
    key: jax.Array,
    graph: nnx.GraphDef,
    num_classes: int,
) -> tuple[nnx.State, optax.OptState]:
    shift_key, drop_key = jax.random.split(key)

    def loss(params: nnx.State) -> jax.Array:
        network = nnx.merge(graph, params)
        logits_BK = network.to_classes(network.features(_shifted(image_BHWC, shift_key), drop_key))
        target_BK = optax.smooth_labels(jax.nn.one_hot(label_B, num_classes), 0.05)
        return jnp.mean(optax.softmax_cross_entropy(logits_BK, target_BK))

    gradients = jax.grad(loss)(params)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer step count with floats
        updates, moments = _ADAMW.update(gradients, moments, params)
    return jax.tree.map(lambda param, update: param + rate * update, params, updates), moments


def _shifted(image_BHWC: jax.Array, key: jax.Array) -> jax.Array:
    """Each image by -1, 0 or 1 pixels in both directions, its edge repeated."""
    height, width = image_BHWC.shape[1:3]
    padded = jnp.pad(image_BHWC, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    place_B2 = jax.random.randint(key, (len(image_BHWC), 2), 0, 3)

    def cut(image_HWC: jax.Array, place_2: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(
            image_HWC, (place_2[0], place_2[1], jnp.int32(0)), (height, width, image_HWC.shape[2])
        )

    return jax.vmap(cut)(padded, place_B2)
