"""What another library's files call our tensors: a table of entries for each layout. Imports no JAX.

Each entry is a renaming, a transposition and a merging of neighbouring dims, so a tensor is read as a view of the
file, piece by piece, and the same table writes it back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of theirs and the one or more of ours that hold the same numbers.

    `theirs` may contain {layers} and {experts}: there is one tensor of theirs for each index of these leading dims of
    ours, in this order. Theirs transposed by `transpose` (None: as it is) has the remaining dims of ours, neighbours
    merged: `merge` (1, 2) says that its first dim is our first and its second our second and third together (None:
    dim for dim). Several `ours` lie one after the other along the last of the transposed dims.

    `first` and `step`: the i-th layer of our stack is layer `first + step * i` of theirs, where blocks alternate.
    `copies` above 0: theirs repeats one tensor of ours under {layers} from 0 to `copies` - 1; a file in which they
    differ is refused.
    """

    theirs: str
    ours: str | tuple[str, ...]
    transpose: tuple[int, ...] | None = None
    merge: tuple[int, ...] | None = None
    first: int = 0
    step: int = 1
    copies: int = 0


@dataclasses.dataclass(frozen=True)
class Layout:
    """A way of another library to write a model down.

    `read_config` makes our configuration of their `config.json` and raises `ValueError` for what our model cannot do;
    `write_config` is its inverse; `entries` lists every tensor of a configuration. `ignored` are regular expressions
    for the whole names of tensors that follow from the configuration, such as stored masks.
    """

    architecture: str  # `architectures[0]` in a config.json of transformers, `_class_name` in one of diffusers
    read_config: Callable[[Mapping[str, Any]], Any]
    write_config: Callable[[Any], dict[str, Any]]
    entries: Callable[[Any], Sequence[Entry]]
    ignored: tuple[str, ...] = ()
    tensors: str = "model.safetensors"  # `diffusion_pytorch_model.safetensors` in diffusers
