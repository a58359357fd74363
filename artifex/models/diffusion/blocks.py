"""What diffusion networks are built of: embeddings of time, class and place, patches, and modulated norms.

Dims: B batch, T tokens, D embed, E condition, F frequencies, M modulation, H height, W width, C channels, P patch.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from artifex.models import cpu, layers
from artifex.models.diffusion.networks import DiTConfig, MMDiTConfig
from artifex.models.module import Module
from artifex.scaling import axes


def time_sinusoids(t_B: jax.Array, count: int, *, cosine_first: bool, shift: int) -> jax.Array:
    """Sines and cosines of t times 10000^(-i / (count/2 - shift)), i = 0 .. count/2 - 1: (B, count), float32."""
    half = count // 2
    # float32 throughout: bfloat16 rounds t = 257 to 256
    exponents = -math.log(10_000) * np.arange(half, dtype=np.float32) / np.float32(half - shift)
    angles = t_B.astype(jnp.float32)[:, None] * np.exp(exponents)[None]
    parts = (jnp.cos(angles), jnp.sin(angles)) if cosine_first else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(parts, axis=-1)


class TimeEmbedding(Module):
    """second(silu(first(sinusoids of t))): (B,) -> (B, condition), for t in the network's own range."""

    def __init__(self, frequencies: int, condition: int, *, cosine_first: bool = True, shift: int = 1, rngs: nnx.Rngs):
        self.frequencies, self.cosine_first, self.shift = frequencies, cosine_first, shift
        names = ("frequencies", "condition")
        self.first = layers.Linear((frequencies, condition), names, bias=True, hidden=False, rngs=rngs)
        self.second = layers.Linear((condition, condition), ("condition", "condition"), bias=True, rngs=rngs)

    def __call__(self, t_B: jax.Array) -> jax.Array:
        waves_BF = time_sinusoids(t_B, self.frequencies, cosine_first=self.cosine_first, shift=self.shift)
        return self.second(jax.nn.silu(self.first(waves_BF.astype(self.first.kernel.dtype))))


class ClassEmbedding(Module):
    """A vector for each of `num_classes` labels, and one more, at `num_classes`, that means none."""

    def __init__(self, num_classes: int, condition: int, *, rngs: nnx.Rngs):
        self.num_classes = num_classes
        self.table = layers.parameter(
            0.02 * jax.random.normal(rngs.params(), (num_classes + 1, condition)), "classes", "condition"
        )

    def __call__(self, label_B: jax.Array | None, batch: int) -> jax.Array:
        """(batch, condition) for integer labels (B,); without any, the vector that means none for all.

        NaN for labels outside [0, num_classes].
        """
        if label_B is None:
            label_B = jnp.full(batch, self.num_classes)
        if not jnp.issubdtype(label_B.dtype, jnp.integer) or label_B.shape != (batch,):
            raise ValueError(
                f"condition is {label_B.dtype}{list(label_B.shape)}; give integer labels of shape ({batch},), "
                f"where {self.num_classes} means none"
            )
        return layers.take_of_few(self.table[...], label_B)


class Condition(Module):
    """The embedding of time plus, where the network has classes, that of the label: (B, condition)."""

    def __init__(
        self,
        frequencies: int,
        condition: int,
        num_classes: int,
        *,
        cosine_first: bool = True,
        shift: int = 1,
        rngs: nnx.Rngs,
    ):
        self.time = TimeEmbedding(frequencies, condition, cosine_first=cosine_first, shift=shift, rngs=rngs)
        self.classes = ClassEmbedding(num_classes, condition, rngs=rngs) if num_classes else None

    def __call__(self, t_B: jax.Array, label_B: jax.Array | None) -> jax.Array:
        c_BE = self.time(t_B)
        if self.classes is not None:
            return c_BE + self.classes(label_B, t_B.shape[0])
        if label_B is not None:
            raise ValueError(
                "a condition was given, but the network has num_classes 0; leave it out or set num_classes"
            )
        return c_BE


@functools.cache
def position_table(features: int, side: int, grid: int) -> np.ndarray:
    """Sines and cosines of the place of each of side x side patches, row by row: (side * side, features), float32.

    The first half of the features is of the column, the second of the row; in each half sines come first, of place
    times 10000^(-i / (features/4)). Places are those of the centre of a grid x grid square that is `side` wide.
    """
    frequencies = 10_000.0 ** (-np.arange(features // 4) / (features // 4))
    angles = (np.arange(side) + (grid - side) // 2)[:, None] * (side / grid) * frequencies
    waves = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    of_column, of_row = np.broadcast_arrays(waves[None], waves[:, None])
    return np.concatenate([of_column, of_row], -1).reshape(-1, features).astype(np.float32)


class Patches(Module):
    """A linear map of each square of pixels to a token, plus the fixed table of places: (B, H, W, C) -> (B, T, D)."""

    def __init__(self, cfg: DiTConfig | MMDiTConfig, grid: int | None = None, *, rngs: nnx.Rngs):
        self.size, self.side = cfg.patch_size, cfg.image_size // cfg.patch_size
        self.image, self.grid = (cfg.image_size, cfg.image_size, cfg.in_channels), grid or self.side
        names = ("kernel", "kernel", "conv_in", "embed")
        shape = (cfg.patch_size, cfg.patch_size, cfg.in_channels, cfg.embed_dim)
        self.project = layers.Linear(shape, names, inputs=3, bias=True, hidden=False, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        if x_BHWC.shape[1:] != self.image:
            raise ValueError(f"images of shape {x_BHWC.shape[1:]}, but the network takes {self.image}; resize them")
        dtype = self.project.kernel.dtype
        x_BTD = self.project(patchify(x_BHWC.astype(dtype), self.size))
        return stream(x_BTD + jnp.asarray(position_table(x_BTD.shape[-1], self.side, self.grid), dtype)[None])


def patchify(x_BHWC: jax.Array, size: int) -> jax.Array:
    """(B, H, W, C) -> (B, T, P, P, C), patches row by row."""
    B, H, W, C = x_BHWC.shape
    x = x_BHWC.reshape(B, H // size, size, W // size, size, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, -1, size, size, C)


def unpatchify(x_BTPPC: jax.Array) -> jax.Array:
    """The inverse of `patchify` for square images."""
    B, T, P, _, C = x_BTPPC.shape
    side = math.isqrt(T)
    x = x_BTPPC.reshape(B, side, side, P, P, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, side * P, side * P, C)


def stream(x_BTD: jax.Array) -> jax.Array:
    """The residual stream, laid out by its names."""
    return axes.shard(x_BTD, "batch", "sequence", "hidden")


def normalise(x_BTD: jax.Array, eps: float = 1e-6) -> jax.Array:
    """(x - mean) / std over the last dim, in float32: a layer norm without parameters."""
    x32 = cpu.barrier(x_BTD).astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return x32.astype(x_BTD.dtype)


def modulate(x_BTD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array) -> jax.Array:
    """x (1 + scale) + shift, one scale and shift for each example."""
    return x_BTD * (1 + scale_BD[:, None]) + shift_BD[:, None]


class Modulation(Module):
    """Six vectors from the condition: shift, scale and gate of attention, then those of the feed-forward layer.

    They start at 0, so that a block starts as the identity: adaLN-Zero of Peebles and Xie 2022 (arXiv:2212.09748).
    """

    def __init__(self, condition: int, features: int, *, rngs: nnx.Rngs):
        names = ("condition", "modulation", "embed")
        self.project = layers.Linear((condition, 6, features), names, bias=True, scale=0.0, rngs=rngs)

    def __call__(self, c_BE: jax.Array) -> list[jax.Array]:
        m_BMD = axes.shard(self.project(jax.nn.silu(c_BE)), "batch", None, "hidden")
        return [m_BMD[:, i] for i in range(6)]


class AdaptiveNorm(Module):
    """norm(x) (1 + scale) + shift, both from the condition and 0 at the start."""

    def __init__(self, condition: int, features: int, *, rngs: nnx.Rngs):
        shape, names = (condition, features), ("condition", "embed")
        self.shift = layers.Linear(shape, names, bias=True, scale=0.0, rngs=rngs)
        self.scale = layers.Linear(shape, names, bias=True, scale=0.0, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, c_BE: jax.Array) -> jax.Array:
        c_BE = jax.nn.silu(c_BE)
        return modulate(normalise(x_BTD), self.shift(c_BE), self.scale(c_BE))


class Head(Module):
    """Adaptive norm, then a linear map of each token to its square, 0 at the start: (B, T, D) -> (B, H, W, C)."""

    def __init__(self, cfg: DiTConfig | MMDiTConfig, *, rngs: nnx.Rngs):
        self.norm = AdaptiveNorm(cfg.embed_dim, cfg.embed_dim, rngs=rngs)
        names = ("embed", "kernel", "kernel", "conv_out")
        shape = (cfg.embed_dim, cfg.patch_size, cfg.patch_size, cfg.out_channels)
        self.project = layers.Linear(shape, names, bias=True, scale=0.0, hidden=False, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, c_BE: jax.Array) -> jax.Array:
        x_BHWC = unpatchify(self.project(self.norm(x_BTD, c_BE)))
        return axes.shard(x_BHWC, "batch", "height", "width", "channels").astype(jnp.float32)


class Attention(Module):
    """The four linear maps of attention, each with a bias; what attends to what is the caller's."""

    def __init__(self, features: int, heads: int, *, rngs: nnx.Rngs):
        shape, names = (features, heads, features // heads), ("embed", "heads", "head_dim")
        self.query = layers.Linear(shape, names, bias=True, rngs=rngs)
        self.key = layers.Linear(shape, names, bias=True, rngs=rngs)
        self.value = layers.Linear(shape, names, bias=True, rngs=rngs)
        self.out = layers.Linear((*shape[1:], features), (*names[1:], "embed"), inputs=2, bias=True, rngs=rngs)

    def project(self, x_BTD: jax.Array) -> list[jax.Array]:
        """Queries, keys and values (B, T, N, H)."""
        x_BTD = axes.shard_for_pair(x_BTD, "act_heads")
        parts = layers.fused(x_BTD, self.query, self.key, self.value)
        return [checkpoint_name(by_heads(part), "qkv") for part in parts]


def by_heads(x_BTNH: jax.Array) -> jax.Array:
    """Queries, keys, values or what attention makes of them, laid out by their names."""
    return axes.shard(x_BTNH, "batch", "sequence", "act_heads", None)


class MLP(Module):
    """down(gelu(up(x))) with the tanh form. Hendrycks and Gimpel 2016 (arXiv:1606.08415)."""

    def __init__(self, features: int, hidden: int, *, rngs: nnx.Rngs):
        self.up = layers.Linear((features, hidden), ("embed", "mlp"), bias=True, rngs=rngs)
        self.down = layers.Linear((hidden, features), ("mlp", "embed"), bias=True, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = axes.shard_for_pair(x_BTD, "act_mlp")
        h_BTF = jax.nn.gelu(checkpoint_name(self.up(x_BTD), "hidden"), approximate=True)
        return axes.shard_for_pair(self.down(axes.shard(h_BTF, "batch", "sequence", "act_mlp")), "act_mlp")


class Block(Module):
    """x + gate attention(modulated norm(x)), then x + gate mlp(modulated norm(x)): adaLN-Zero.

    In two halves, because attention may join several streams between them.
    """

    def __init__(self, cfg: DiTConfig | MMDiTConfig, *, mlp_norm_eps: float = 1e-6, rngs: nnx.Rngs):
        self.mlp_norm_eps = mlp_norm_eps
        self.modulation = Modulation(cfg.embed_dim, cfg.embed_dim, rngs=rngs)
        self.attention = Attention(cfg.embed_dim, cfg.num_heads, rngs=rngs)
        self.mlp = MLP(cfg.embed_dim, cfg.feed_forward, rngs=rngs)

    def open(self, x_BTD: jax.Array, c_BE: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        """Queries, keys and values (B, T, N, H), and the vectors that `close` needs."""
        shift_BD, scale_BD, *rest = self.modulation(c_BE)
        return self.attention.project(modulate(normalise(x_BTD), shift_BD, scale_BD)), rest

    def close(self, x_BTD: jax.Array, mixed_BTNH: jax.Array, rest: list[jax.Array]) -> jax.Array:
        """The stream after attention, which gave `mixed_BTNH`, and after the feed-forward layer."""
        gate_BD, shift_BD, scale_BD, mlp_gate_BD = rest
        branch_BTD = axes.shard_for_pair(self.attention.out(by_heads(mixed_BTNH)), "act_heads")
        branch_BTD = checkpoint_name(stream(branch_BTD), "branch")
        x_BTD = stream(x_BTD + gate_BD[:, None] * branch_BTD)
        branch_BTD = self.mlp(modulate(normalise(x_BTD, self.mlp_norm_eps), shift_BD, scale_BD))
        return stream(x_BTD + mlp_gate_BD[:, None] * checkpoint_name(stream(branch_BTD), "branch"))
