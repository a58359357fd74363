"""The output head over a vocabulary: its logits, and their cross entropy without ever holding all of them.

The logits of 8,192 tokens over Llama 3's vocabulary are 4.2 GB in float32, and a step holds them about twice. Here a
scan runs over blocks of the vocabulary: forward it keeps each token's maximum, sum of exponentials and target's logit,
backward it computes each block again, so that no more than one exists at a time. Blocks of positions would save as
much, but would add up a gradient of the whole head for each, and where weights are split, reduce it each time. Blocks
of the vocabulary gather each part of the head once in either direction and write its gradient once.

Where a mesh splits the vocabulary, a device holds a part of it, and every block takes as much of each part. A part
keeps its own maximum, sums and gradient of x, and they meet once, after the scan: inside it, no device waits for the
others that hold the same tokens.

Dims: B batch, T sequence, D embed, V vocab; P parts of the vocabulary, N blocks, R rows of a part in a block, padding
counted, so that V <= P N R; S parts of a logit's dim, C its columns in a block, S C = P R.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from artifex.models.layers import product
from artifex.scaling import axes
from artifex.scaling.execution import current_execution, held

HIDDEN = -1e30
"""The logit of what never stands: its probability is 0, and it is finite, so that a product with 0 is 0."""

BLOCK_BYTES = 256 * 2**20
"""Float32 logits that one device may hold at a time. Up to here the step's peak is in the layers: llama3.2-1b with FSDP
over 16 GPUs and 8,192 tokens on each needs 1.58 GiB besides its state with 64 to 256 MiB, 1.70 with 512 and 2.49 with
1,024. Of those the largest, because it gathers the head in the fewest pieces."""

LOGITS = ("batch", "sequence", "act_vocab")
HEAD = ("vocab", "embed")
OF_X = ("act_vocab", "batch", "sequence", None)


def read_logits(
    x_BTD: jax.Array, head_DV: jax.Array, *, softcap: float | None = None, never: int | None = None
) -> jax.Array:
    """x W (B, T, V), float32 also of bfloat16: sums are not rounded to it. `softcap` c bounds them by c tanh(x W / c);
    that of the id `never` is -1e30."""
    multiply = product if x_BTD.dtype == jnp.float32 else _float32_product
    x_BTD = axes.shard_for_pair(x_BTD, "act_vocab")
    logits_BTV = _capped(axes.shard(multiply(x_BTD, head_DV), *LOGITS), softcap)
    return logits_BTV if never is None else without(logits_BTV, never)


def without(logits_BTV: jax.Array, never: int) -> jax.Array:
    """Logits with that of the id `never` at -1e30."""
    return jnp.where(jnp.arange(logits_BTV.shape[-1])[None, None] == never, HIDDEN, logits_BTV)


@jax.named_scope("cross_entropy")
def cross_entropy(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array | None = None,
    *,
    softcap: float | None = None,
    never: int | None = None,
    block_bytes: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Means over the targets that count of logsumexp(logits) - logit of the target, in nats, and of logsumexp^2, and
    the number of targets; float32. The logits are those of `read_logits`.

    `mask_BT` is 1 where a target counts, or any weight. NaN where one that counts is not in [0, V): it has no logit.
    logsumexp^2 is what PaLM keeps small (Chowdhery et al. 2022, arXiv:2204.02311, section 5). Above `block_bytes` of
    float32 logits a device (none: `BLOCK_BYTES`), they are made by blocks of the vocabulary and made again backward.
    """
    blocks = Blocks.of((*targets_BT.shape, head_DV.shape[1]), head_DV.shape[0], block_bytes or BLOCK_BYTES)
    blocks = dataclasses.replace(blocks, softcap=softcap, never=never)
    if blocks.count == 1:
        logits_BTV = read_logits(x_BTD, head_DV, softcap=softcap, never=never)
        # a comparison, not a gather: it stays local where logits are split over the vocabulary
        hit_BTV = jnp.arange(logits_BTV.shape[-1])[None, None] == targets_BT[..., None]
        picked_BT = jnp.sum(jnp.where(hit_BTV, logits_BTV, 0.0), axis=-1)
        total_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    else:
        total_BT, picked_BT = _by_blocks(blocks, x_BTD, axes.shard_parameter(head_DV.T, *HEAD), targets_BT)
    nats_BT = total_BT - picked_BT
    known_BT = (targets_BT >= 0) & (targets_BT < head_DV.shape[1])
    nats_BT = jnp.where(known_BT if mask_BT is None else known_BT | (mask_BT == 0), nats_BT, jnp.nan)
    if mask_BT is None:
        return jnp.mean(nats_BT), jnp.mean(jnp.square(total_BT)), jnp.float32(nats_BT.size)
    mask_BT = mask_BT.astype(jnp.float32)
    weight = jnp.sum(mask_BT)
    nats, square = (
        jnp.sum(each_BT * mask_BT) / jnp.maximum(weight, 1.0) for each_BT in (nats_BT, jnp.square(total_BT))
    )
    return nats, square, weight


def _float32_product(x_BTD: jax.Array, head_DV: jax.Array) -> jax.Array:
    @held
    def backward(kept: tuple[jax.Array, jax.Array], ct_BTV: jax.Array) -> tuple[jax.Array, jax.Array]:
        # in the dtype of the operands, as of any other product: float32 times bfloat16 runs at float32's rate
        return jax.vjp(product, *kept)[1](ct_BTV.astype(kept[0].dtype))

    multiply = jax.custom_vjp(functools.partial(product, out=jnp.float32))
    multiply.defvjp(lambda *kept: (product(*kept, out=jnp.float32), kept), backward)
    return multiply(x_BTD, head_DV)


def _capped(logits: jax.Array, softcap: float | None) -> jax.Array:
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a vocabulary is cut, a constant of the program: into `parts`, as a mesh splits the head, and each part into
    `count` blocks of `rows` rows, the last of which may be padding."""

    vocab: int
    embed: int
    ways: int  # parts that the logits are split into, each by one or several parts of the head
    parts: int
    count: int
    softcap: float | None = None
    never: int | None = None

    @classmethod
    def of(cls, shape: tuple[int, ...], embed: int, block_bytes: int) -> Blocks:
        """Blocks of logits of `shape` (B, T, V) that are at most `block_bytes` of float32 on each device."""
        vocab = shape[2]
        ways = axes.ways(LOGITS, shape)
        parts = math.lcm(ways[2], axes.ways(HEAD, (vocab, embed))[0])
        part = vocab // parts
        least = min(-(-4 * math.prod(shape) // (math.prod(ways) * block_bytes)), part)
        # a few more blocks, where those divide the part, are cheaper than copies of a padded head
        count = next((n for n in range(least, min(4 * least, part) + 1) if part % n == 0), least)
        return cls(vocab, embed, ways[2], parts, count)

    @property
    def rows(self) -> int:
        """Rows of a part that one block takes."""
        return -(-self.vocab // (self.parts * self.count))

    def cut(self, head_VD: jax.Array) -> jax.Array:
        """The head as (N, P, R, D), laid out as it was: no row changes its device."""
        head_PVD = self.shard(head_VD.reshape(self.parts, -1, self.embed), "vocab", None, "embed")
        padding = self.count * self.rows - head_PVD.shape[1]
        head_PVD = jnp.pad(head_PVD, ((0, 0), (0, padding), (0, 0))) if padding else head_PVD
        head_PNRD = head_PVD.reshape(self.parts, self.count, self.rows, self.embed)
        return self.shard(head_PNRD.swapaxes(0, 1), None, "vocab", None, "embed")

    def joined(self, head_NPRD: jax.Array) -> jax.Array:
        """The inverse of `cut`."""
        head_PVD = self.shard(head_NPRD.swapaxes(0, 1), "vocab", None, None, "embed").reshape(
            self.parts, -1, self.embed
        )
        return axes.shard_parameter(head_PVD[:, : self.vocab // self.parts].reshape(self.vocab, self.embed), *HEAD)

    def shard(self, part: jax.Array, *names: str | None) -> jax.Array:
        """Constrain a part of the head, or of its gradient, to lie as the whole does."""
        return axes.shard_parameter(part, *names, whole=(self.vocab, self.embed))

    def whole(self, head_PRD: jax.Array) -> jax.Array:
        """A block as its product with x needs it (S, C, D): split as the logits are, and by nothing else."""
        head_PRD = self.shard(head_PRD, "vocab", None, "embed")
        return axes.shard(head_PRD.reshape(self.ways, -1, self.embed), "act_vocab", None, None)

    def ids(self, block: jax.Array) -> jax.Array:
        """The ids (S, C) of a block's columns; V for padding."""
        row_R, part_P1 = block * self.rows + jnp.arange(self.rows), jnp.arange(self.parts)[:, None]
        size = self.vocab // self.parts
        ids_PR = jnp.where(row_R[None] < size, part_P1 * size + row_R[None], self.vocab)
        return ids_PR.reshape(self.ways, -1)

    def hidden(self, ids_SC: jax.Array) -> jax.Array | None:
        """Which columns hold no logit; None where all do."""
        if self.parts * self.count * self.rows == self.vocab:
            return None if self.never is None else ids_SC == self.never
        padding_SC = ids_SC == self.vocab
        return padding_SC if self.never is None else padding_SC | (ids_SC == self.never)

    def logits(self, x_BTD: jax.Array, head_SCD: jax.Array, ids_SC: jax.Array) -> jax.Array:
        """A block's logits (B, T, S, C), float32."""
        raw_BTSC = jnp.einsum("BTD,SCD->BTSC", x_BTD, head_SCD, preferred_element_type=jnp.float32)
        logits_BTSC = _capped(axes.shard(raw_BTSC, *LOGITS, None), self.softcap)
        hidden_SC = self.hidden(ids_SC)
        return logits_BTSC if hidden_SC is None else jnp.where(hidden_SC[None, None], HIDDEN, logits_BTSC)


def _by_blocks(
    blocks: Blocks, x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """logsumexp of the logits, and the target's logit, 0 for targets outside the vocabulary: both (B, T), float32."""
    by_blocks = jax.custom_vjp(functools.partial(_sums, blocks))
    by_blocks.defvjp(functools.partial(_forward, blocks), held(functools.partial(_backward, blocks)))
    return by_blocks(x_BTD, head_VD, targets_BT)


def _gathered(blocks: Blocks, x_BTD: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x and targets as every block's logits need them, once and not in each: x whole in D, both in the positions where
    the devices that divide those divide the vocabulary here."""
    beside = {"act_vocab": blocks.vocab}
    x_BTD = axes.shard(x_BTD, "batch", "sequence", None, beside=beside)
    return x_BTD, axes.shard(targets_BT, "batch", "sequence", beside=beside)


def _sums(blocks: Blocks, x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BTD, targets_BT = _gathered(blocks, x_BTD, targets_BT)

    def add(sums: tuple[jax.Array, ...], part: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, ...], None]:
        top_BTS, sum_BTS, picked_BTS = sums
        ids_SC = blocks.ids(part[1])
        logits_BTSC = blocks.logits(x_BTD, blocks.whole(part[0]), ids_SC)
        hit_BTSC = ids_SC[None, None] == targets_BT[..., None, None]
        picked_BTS = picked_BTS + jnp.sum(jnp.where(hit_BTSC, logits_BTSC, 0.0), axis=-1)
        higher_BTS = jnp.maximum(top_BTS, jnp.max(logits_BTSC, axis=-1))
        added_BTS = jnp.sum(jnp.exp(logits_BTSC - higher_BTS[..., None]), axis=-1)
        sum_BTS = sum_BTS * jnp.exp(top_BTS - higher_BTS) + added_BTS
        return (higher_BTS, sum_BTS, picked_BTS), None

    start = (jnp.full((*targets_BT.shape, blocks.ways), value, jnp.float32) for value in (-jnp.inf, 0.0, 0.0))
    start = tuple(axes.shard(each_BTS, *LOGITS) for each_BTS in start)
    (top_BTS, sum_BTS, picked_BTS), _ = jax.lax.scan(add, start, (blocks.cut(head_VD), jnp.arange(blocks.count)))
    return jax.nn.logsumexp(top_BTS + jnp.log(sum_BTS), axis=-1), jnp.sum(picked_BTS, axis=-1)


def _forward(
    blocks: Blocks, x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    total_BT, picked_BT = _sums(blocks, x_BTD, head_VD, targets_BT)
    return (total_BT, picked_BT), (x_BTD, head_VD, targets_BT, total_BT)


def _backward(
    blocks: Blocks, kept: tuple[jax.Array, ...], cts_BT: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None]:
    x_BTD, head_VD, targets_BT, total_BT = kept
    x_BTD, targets_BT = _gathered(blocks, x_BTD, targets_BT)
    of_tokens = (total_BT, *cts_BT)
    total_BT, of_total, of_picked = (
        axes.shard(each_BT, "batch", "sequence", beside={"act_vocab": blocks.vocab}) for each_BT in of_tokens
    )
    of_total, of_picked = of_total[..., None, None], of_picked[..., None, None]
    dtypes = (head_VD.dtype, jnp.dtype(current_execution().reduce_dtype or head_VD.dtype))
    sums = max(dtypes, key=lambda dtype: dtype.itemsize)

    def add(dx_SBTD: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        ids_SC, head_SCD = blocks.ids(part[1]), blocks.whole(part[0])
        logits_BTSC = blocks.logits(x_BTD, head_SCD, ids_SC)
        hit_BTSC = ids_SC[None, None] == targets_BT[..., None, None]
        d_BTSC = of_total * jnp.exp(logits_BTSC - total_BT[..., None, None]) + jnp.where(hit_BTSC, of_picked, 0.0)
        if blocks.softcap is not None:
            d_BTSC = d_BTSC * (1 - jnp.square(logits_BTSC / blocks.softcap))
        hidden_SC = blocks.hidden(ids_SC)
        d_BTSC = d_BTSC if hidden_SC is None else jnp.where(hidden_SC[None, None], 0.0, d_BTSC)
        d_BTSC = axes.shard(d_BTSC.astype(x_BTD.dtype), *LOGITS, None)
        more_SBTD = jnp.einsum("BTSC,SCD->SBTD", d_BTSC, head_SCD, preferred_element_type=jnp.float32)
        # float32 inside the product; as it leaves it, and devices add it up, as of every other parameter
        dhead_SCD = jnp.einsum("BTSC,BTD->SCD", d_BTSC, x_BTD, preferred_element_type=sums)
        dhead_PRD = blocks.shard(dhead_SCD.reshape(part[0].shape), "vocab", None, "embed").astype(head_VD.dtype)
        return axes.shard(dx_SBTD + more_SBTD, *OF_X), dhead_PRD

    start = axes.shard(jnp.zeros((blocks.ways, *x_BTD.shape), jnp.float32), *OF_X)
    dx_SBTD, dhead_NPRD = jax.lax.scan(add, start, (blocks.cut(head_VD), jnp.arange(blocks.count)))
    dx_BTD = axes.shard_for_pair(jnp.sum(dx_SBTD, axis=0).astype(x_BTD.dtype), "act_vocab")
    return dx_BTD, blocks.joined(dhead_NPRD), None
