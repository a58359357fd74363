"""The image models in bare JAX: pure functions of dicts of arrays, as fast as we can write them.

Imports nothing of the package, and takes over a model's parameters by `dit_from_model`, or as they are. A model is its
`draw(batch, key)`, the random numbers of a step (without a key those of our validation), and its
`loss(params, batch, drawn)`.

Dims: B batch, H height, W width, C channels, I and O channels in and out, T tokens, D embed, E condition.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bare import attend, linear
from jax.scipy.special import log_ndtr

Tree = Any
Batch = dict[str, jax.Array]
NHWC = ("NHWC", "HWIO", "NHWC")
SEEN = np.zeros((1, 1), np.float32)  # nothing is hidden from any query
VALIDATION = jax.random.fold_in(jax.random.key(0), 0)  # of the noise of the first batch


class Model(NamedTuple):
    """What a training step is made of."""

    draw: Callable[..., Tree]
    loss: Callable[[Tree, Batch, Tree], jax.Array]


def diffusion(predict: Callable, dtype: str, classes: int = 0) -> Model:
    """The noise in x_t = sqrt(a_t) x + sqrt(1 - a_t) eps, a_t of DDPM's linear schedule, learned by least squares."""
    log_a = np.cumsum(np.log1p(-np.linspace(1e-4, 0.02, 1_000))).astype(np.float32)

    def draw(batch: Batch, key: jax.Array | None = None) -> Tree:
        keys = jax.random.split(VALIDATION if key is None else key, 4)
        shape = batch["image"].shape
        of_place, of_order = jax.random.split(keys[1])
        parts_B = (jnp.arange(shape[0]) + 1 - jax.random.uniform(of_place)) / shape[0]
        time_B = jnp.minimum(1_000 * jax.random.permutation(of_order, parts_B), 999).astype(jnp.int32)
        drawn = {"time": time_B, "eps": jax.random.normal(keys[0], shape)}
        if classes:
            dropped_B = jax.random.bernoulli(keys[2], 0.1, shape[:1]) & (key is not None)
            drawn["label"] = jnp.where(dropped_B, classes, batch["label"])
        return drawn

    def loss(params: Tree, batch: Batch, drawn: Tree) -> jax.Array:
        params = jax.tree.map(lambda value: value.astype(dtype), params)
        log_B = jnp.asarray(log_a)[drawn["time"]][:, None, None, None]
        x_BHWC = jnp.exp(0.5 * log_B) * batch["image"] + jnp.sqrt(-jnp.expm1(log_B)) * drawn["eps"]
        y_BHWC = predict(params, x_BHWC.astype(dtype), drawn["time"].astype(jnp.float32), drawn.get("label"))
        return jnp.mean(jnp.square(y_BHWC[..., : x_BHWC.shape[-1]].astype(jnp.float32) - drawn["eps"]))

    return Model(draw, loss)


def sinusoids(t_B: jax.Array, count: int, *, cosine_first: bool) -> jax.Array:
    frequencies = np.exp(-math.log(10_000) * np.arange(count // 2) / (count // 2 - 1)).astype(np.float32)
    angles = t_B[:, None] * frequencies
    parts = (jnp.cos(angles), jnp.sin(angles)) if cosine_first else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(parts, axis=-1)


def embedded(p: Tree, t_B: jax.Array, label_B: jax.Array | None, *, cosine_first: bool) -> jax.Array:
    """silu of the condition, which is all that reads it: (B, E)."""
    kernel = p["time"]["first"]["kernel"]
    waves = sinusoids(t_B, kernel.shape[0], cosine_first=cosine_first).astype(kernel.dtype)
    c_BE = linear(jax.nn.silu(linear(waves, p["time"]["first"])), p["time"]["second"])
    return jax.nn.silu(c_BE if label_B is None else c_BE + p["classes"]["table"][label_B])


# DiT


def dit_from_model(params: Tree) -> Tree:
    """Copies, each kernel a matrix, those that read one input joined, and the blocks a list."""

    def matrix(p: Tree, inputs: int) -> Tree:
        width = math.prod(p["kernel"].shape[:inputs])
        return {"kernel": p["kernel"].reshape(width, -1), "bias": p["bias"].reshape(-1)}

    def joined(*parts: Tree) -> Tree:
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *(matrix(part, 1) for part in parts))

    def block(p: Tree) -> Tree:
        attention = p["attention"]
        return {
            "modulation": matrix(p["modulation"]["project"], 1),
            "qkv": joined(attention["query"], attention["key"], attention["value"]),
            "out": matrix(attention["out"], 2),
            "up": p["mlp"]["up"],
            "down": p["mlp"]["down"],
        }

    stacked, head = params["layers"], params["head"]
    count = stacked["mlp"]["up"]["bias"].shape[0]
    tree = {
        "patches": matrix(params["patches"]["project"], 3),
        "condition": params["condition"],
        "layers": [block(jax.tree.map(lambda a, i=i: a[i], stacked)) for i in range(count)],
        "modulation": joined(head["norm"]["shift"], head["norm"]["scale"]),
        "head": matrix(head["project"], 1),
    }
    return jax.tree.map(jnp.copy, tree)


def normalised(x_BTD: jax.Array) -> jax.Array:
    x32 = jax.lax.optimization_barrier(x_BTD) if jax.default_backend() == "cpu" else x_BTD
    x32 = x32.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-6)).astype(x_BTD.dtype)


def modulated(x_BTD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array) -> jax.Array:
    return normalised(x_BTD) * (1 + scale_BD[:, None]) + shift_BD[:, None]


def places(width: int, side: int) -> np.ndarray:
    """Sines and cosines of column and row of each patch, (T, D)."""
    angles = np.arange(side)[:, None] * 10_000.0 ** (-np.arange(width // 4) / (width // 4))
    waves = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    both = np.broadcast_arrays(waves[None], waves[:, None])
    return np.concatenate(both, -1).reshape(-1, width)


def dit(heads: int, patch: int, flash: bool = False) -> Callable:
    """`predict(params, x, t, label)`; `flash`: attention by cuDNN."""

    def block(x_BTD: jax.Array, p: Tree, c_BE: jax.Array) -> jax.Array:
        B, T, D = x_BTD.shape
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.split(linear(c_BE, p["modulation"]), 6, axis=-1)
        q, k, v = jnp.split(linear(modulated(x_BTD, shift, scale), p["qkv"]), 3, axis=-1)
        q, k, v = (part.reshape(B, T, heads, -1) for part in (q, k, v))
        if flash:
            mixed = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        else:
            mixed = attend(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), SEEN).swapaxes(1, 2)
        x_BTD = x_BTD + gate[:, None] * linear(mixed.reshape(B, T, D), p["out"])
        hidden = jax.nn.gelu(linear(modulated(x_BTD, mlp_shift, mlp_scale), p["up"]), approximate=True)
        return x_BTD + mlp_gate[:, None] * linear(hidden, p["down"])

    def predict(params: Tree, x_BHWC: jax.Array, t_B: jax.Array, label_B: jax.Array) -> jax.Array:
        B, H, _, C = x_BHWC.shape
        side = H // patch
        x = x_BHWC.reshape(B, side, patch, side, patch, C).swapaxes(2, 3).reshape(B, side * side, -1)
        x_BTD = linear(x, params["patches"])
        x_BTD = x_BTD + places(x_BTD.shape[-1], side).astype(x_BTD.dtype)
        c_BE = embedded(params["condition"], t_B, label_B, cosine_first=True)
        for layer in params["layers"]:
            x_BTD = block(x_BTD, layer, c_BE)
        shift, scale = jnp.split(linear(c_BE, params["modulation"]), 2, axis=-1)
        y = linear(modulated(x_BTD, shift, scale), params["head"])
        return y.reshape(B, side, side, patch, patch, -1).swapaxes(2, 3).reshape(B, H, H, -1)

    return predict


# UNet


def conv(x_BHWI: jax.Array, p: Tree, stride: int = 1, padding: tuple[int, int] = (1, 1)) -> jax.Array:
    kernel = p["kernel"]
    if kernel.shape[0] == 1:
        return linear(x_BHWI, {"kernel": kernel[0, 0], "bias": p["bias"]})
    strides = (stride, stride)
    y = jax.lax.conv_general_dilated(x_BHWI, kernel, strides, [padding, padding], dimension_numbers=NHWC)
    return y + p["bias"]


def phases(x_BHWI: jax.Array, taps: Callable[[int, int], jax.Array]) -> jax.Array:
    """(B, 2H, 2W, O): the output's pixels of each parity of row and column by a convolution of window 2."""
    B, H, W, _ = x_BHWI.shape
    parts = [
        jax.lax.conv_general_dilated(
            x_BHWI, taps(row, column), (1, 1), [(1 - row, row), (1 - column, column)], dimension_numbers=NHWC
        )
        for row in range(2)
        for column in range(2)
    ]
    stacked = jnp.stack(parts, axis=3).reshape(B, H, W, 2, 2, -1)
    return stacked.swapaxes(2, 3).reshape(B, 2 * H, 2 * W, -1)


def conv_of_doubled(x_BHWI: jax.Array, p: Tree) -> jax.Array:
    """The 3x3 convolution of the image with each pixel as a square of four, by summed taps on the small image."""
    kernel = p["kernel"]

    def summed(k: jax.Array, odd: int, axis: int) -> jax.Array:
        first, second, third = jnp.split(k, 3, axis=axis)
        return jnp.concatenate((first + second, third) if odd else (first, second + third), axis=axis)

    return phases(x_BHWI, lambda row, column: summed(summed(kernel, row, 0), column, 1)) + p["bias"]


def group_norm(x_BHWC: jax.Array, p: Tree, groups: int, eps: float) -> jax.Array:
    B, C = x_BHWC.shape[0], x_BHWC.shape[-1]

    def over_group(x: jax.Array) -> jax.Array:
        mean = jnp.mean(jnp.mean(x, axis=1).reshape(B, groups, -1), axis=-1, keepdims=True)
        return jnp.broadcast_to(mean, (B, groups, C // groups)).reshape(B, 1, C)

    x32 = x_BHWC.astype(jnp.float32).reshape(B, -1, C)
    x32 = x32 - over_group(x32)
    y = x32 * (jax.lax.rsqrt(over_group(x32 * x32) + eps) * p["scale"]) + p["bias"]
    return y.reshape(x_BHWC.shape).astype(x_BHWC.dtype)


def unet(head_dim: int | None, groups: int, eps: float, flash: bool = False) -> Callable:
    """`predict(params, x, t, label)` of DDPM's UNet; without `head_dim` one head, `flash`: attention by cuDNN."""
    norm = functools.partial(group_norm, groups=groups, eps=eps)

    def resnet(x_BHWC: jax.Array, p: Tree, c_BE: jax.Array) -> jax.Array:
        h = conv(jax.nn.silu(norm(x_BHWC, p["norm1"])), p["conv1"]) + linear(c_BE, p["condition"])[:, None, None]
        h = conv(jax.nn.silu(norm(h, p["norm2"])), p["conv2"])
        return h + (conv(x_BHWC, p["shortcut"]) if "shortcut" in p else x_BHWC)

    def attention(x_BHWC: jax.Array, p: Tree) -> jax.Array:
        B, H, W, C = x_BHWC.shape
        x = norm(x_BHWC, p["norm"]).reshape(B, H * W, C)
        parts = (p["query"], p["key"], p["value"])
        joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *parts)
        q, k, v = (part.reshape(B, H * W, -1, head_dim or C) for part in jnp.split(linear(x, joined), 3, axis=-1))
        if flash:
            mixed = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        else:
            mixed = attend(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), SEEN).swapaxes(1, 2)
        return x_BHWC + linear(mixed.reshape(B, H * W, C), p["out"]).reshape(x_BHWC.shape)

    def stage(x_BHWC: jax.Array, p: Tree, c_BE: jax.Array) -> jax.Array:
        x_BHWC = resnet(x_BHWC, p["resnet"], c_BE)
        return attention(x_BHWC, p["attention"]) if "attention" in p else x_BHWC

    def predict(params: Tree, x_BHWC: jax.Array, t_B: jax.Array, label_B: jax.Array | None) -> jax.Array:
        c_BE = embedded(params["condition"], t_B, label_B, cosine_first=False)
        skips = [x := conv(x_BHWC, params["conv_in"])]
        for _, level in sorted(params["down"].items()):
            for _, p in sorted(level["stages"].items()):
                skips.append(x := stage(x, p, c_BE))
            if "downsample" in level:
                skips.append(x := conv(x, level["downsample"]["conv"], 2, (0, 1)))
        middle = params["middle"]
        x = attention(resnet(x, middle["resnet1"], c_BE), middle["attention"])
        x = resnet(x, middle["resnet2"], c_BE)
        for _, level in sorted(params["up"].items()):
            for _, p in sorted(level["stages"].items()):
                x = stage(jnp.concatenate([x, skips.pop()], axis=-1), p, c_BE)
            if "upsample" in level:
                x = conv_of_doubled(x, level["upsample"]["conv"])
        return conv(jax.nn.silu(norm(x, params["norm_out"])), params["conv_out"])

    return predict


# VAE


def vae(latent: int, levels: int, dtype: str) -> Model:
    """Strided convolutions to a Gaussian vector and back to the probability of each pixel's level."""

    def draw(batch: Batch, key: jax.Array | None = None) -> Tree:
        return {"eps": jax.random.normal(VALIDATION if key is None else key, (batch["image"].shape[0], latent))}

    def loss(params: Tree, batch: Batch, drawn: Tree) -> jax.Array:
        params = jax.tree.map(lambda value: value.astype(dtype), params)
        x_BHWC = batch["image"]
        B, h = x_BHWC.shape[0], x_BHWC.astype(dtype)
        for _, p in sorted(params["encoder"]["convs"].items()):
            h = jax.nn.silu(conv(h, p, 2))
        kernels = [params[name]["kernel"].reshape(h[0].size, -1) for name in ("mean", "logvar")]
        biases = [params[name]["bias"] for name in ("mean", "logvar")]
        flat = h.reshape(B, -1) @ jnp.concatenate(kernels, axis=-1) + jnp.concatenate(biases)
        mean, logvar = jnp.split(flat.astype(jnp.float32), 2, axis=-1)
        logvar = jnp.clip(logvar, -30.0, 20.0)
        z = (mean + jnp.exp(0.5 * logvar) * drawn["eps"]).astype(dtype)
        expand = params["expand"]
        h = (z @ expand["kernel"].reshape(z.shape[-1], -1) + expand["bias"].reshape(-1)).reshape(h.shape)
        for _, p in sorted(params["decoder"]["convs"].items()):
            kernel = p["kernel"]
            h = phases(jax.nn.silu(h), lambda row, column, k=kernel: k[row::2, column::2]) + p["bias"]
        std = jnp.exp(params["likelihood"]["log_std"].astype(jnp.float32))
        log_p = jnp.sum(log_probability(x_BHWC, h.astype(jnp.float32), std, levels)) / B
        kl = 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar) / B
        return kl - log_p

    return Model(draw, loss)


def log_probability(x: jax.Array, mean: jax.Array, std: jax.Array, levels: int) -> jax.Array:
    """log of what N(mean, std) gives the bin of x, one of `levels` evenly from -1 to 1, the outer ones open."""
    half = 1 / (levels - 1)
    low, high = x < -1 + half, x > 1 - half
    c, d = jnp.abs(x - mean) / std, half / std
    upper = log_ndtr(jnp.where((low & (mean < x)) | (high & (mean > x)), c, -c) + d)
    closed = upper + jnp.log1p(-jnp.exp(jnp.minimum(log_ndtr(-c - d) - upper, -1e-6)))
    density = jnp.log(2 * d) - 0.5 * (jnp.square(c) + math.log(2 * math.pi))
    return jnp.where(low | high, upper, jnp.where(d * jnp.maximum(c, 1) < 0.01, density, closed))


def make_step(model: Model, optimizer: optax.GradientTransformation) -> Callable:
    """`step(params, state, batch) -> (params, state, loss)`, buffers reused; `state` is the optimizer's and a key."""

    def step(params: Tree, state: Tree, batch: Batch) -> tuple[Tree, Tree, jax.Array]:
        moments, key = state
        key, now = jax.random.split(key)
        value, grads = jax.value_and_grad(model.loss)(params, batch, model.draw(batch, now))
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), (moments, key), value

    return jax.jit(step, donate_argnums=(0, 1))
