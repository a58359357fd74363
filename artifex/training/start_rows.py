"""A start from weights over a vocabulary of another size: the rows of the tokens that both have, the others fresh."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from artifex.config import Config
from artifex.data.tokenizers import ByteTokenizer, first_difference, load_tokenizer

VOCABULARY = "vocab"


class Rows(NamedTuple):
    """Of an array the first `count` along `dim`, and the shape that it has in the source."""

    dim: int
    count: int
    there: tuple[int, ...]


def common_rows(names: tuple[str, ...], ours: tuple[int, ...], theirs: tuple[int, ...]) -> Rows | None:
    """What two shapes of an array with these logical axes have in common; None where more than the vocabulary differs,
    or nothing does."""
    if len(ours) != len(theirs):
        return None
    dims = [dim for dim, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    if len(dims) != 1 or names[dims[0]] != VOCABULARY:
        return None
    return Rows(dims[0], min(ours[dims[0]], theirs[dims[0]]), theirs)


def check_ids(config: Config, source: str | Path) -> None:
    """Raise `ValueError` where a token that both have is known to have another id in the tokenizer file of the source:
    its row would be that of another token."""
    chosen, source = config.data.tokenizer, Path(source)
    if not source.is_file():
        return
    if chosen == "bpe":
        raise ValueError(
            "training.start_from_rows needs a tokenizer whose ids are those of the source, but data.tokenizer 'bpe' is "
            f"trained anew; extend {source} and give that file"
        )
    ours = ByteTokenizer() if chosen == "bytes" else load_tokenizer(Path(chosen).expanduser())
    first = first_difference(load_tokenizer(source), ours)
    if first is not None:
        raise ValueError(
            f"training.start_from_rows takes rows by id, but id {first} of data.tokenizer {chosen!r} is another token "
            f"than in {source}; extend that file and give it, or leave the rows fresh"
        )


def put(fresh: jax.Array, theirs: jax.Array, rows: Rows) -> jax.Array:
    """`fresh` with the rows of `theirs`, where `fresh` lives."""
    here = (slice(None),) * rows.dim + (slice(rows.count),)
    merge = jax.jit(lambda ours, theirs: ours.at[here].set(theirs[here]), out_shardings=fresh.sharding)
    return merge(fresh, theirs)


def whole(ours: jax.ShapeDtypeStruct, rows: Rows) -> jax.ShapeDtypeStruct:
    """The array of the source, split as ours is but along the vocabulary, which may not divide."""
    assert isinstance(ours.sharding, NamedSharding)
    spec = [*ours.sharding.spec, *[None] * (len(ours.shape) - len(ours.sharding.spec))]
    spec[rows.dim] = None
    where = NamedSharding(ours.sharding.mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(rows.there, ours.dtype, sharding=where)


def told(path: str, shape: tuple[int, ...], rows: Rows) -> str:
    """What was taken of an array, as a line."""
    fresh = shape[rows.dim] - rows.count
    return f"{path}{list(shape)}, there {list(rows.there)}: the first {rows.count} tokens, {fresh} are fresh"


def known_rows(config: Config, names: Mapping[str, tuple[str, ...]], ours: Any, theirs: Any) -> dict[str, Rows]:
    """`common_rows` of all arrays that both have, by path; none where they are not asked for."""
    if not config.training.start_from_rows:
        return {}
    found = {
        path: common_rows(names[path], leaf.shape, theirs[path].shape)
        for path, leaf in ours.items()
        if path in theirs and path in names
    }
    return {path: rows for path, rows in found.items() if rows is not None}
