"""What another library's files call our tensors: a table of entries for each layout. Imports no JAX.

Each entry is a renaming, a transposition and a merging of neighbouring dims, so a tensor is read as a view of the
file, piece by piece, and the same table writes it back.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_type_hints

if TYPE_CHECKING:
    import numpy as np

Shape = tuple[int, ...]


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
    `optional`: a file need not have it, ours has it by another entry, and where the two differ the file is refused; it
    is never written. Such is the head of a model whose head is its token table.
    """

    theirs: str
    ours: str | tuple[str, ...]
    transpose: tuple[int, ...] | None = None
    merge: tuple[int, ...] | None = None
    first: int = 0
    step: int = 1
    copies: int = 0
    optional: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        """`ours` as a tuple."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def counted(self) -> tuple[str, ...]:
        """The placeholders that stand for leading dims of ours, in their order."""
        counted = ("{experts}",) if self.copies else ("{layers}", "{experts}")
        return tuple(dim for dim in counted if dim in self.theirs)

    def names(self, at: Shape) -> list[str]:
        """The names of theirs with the numbers of ours at the index `at` of the leading dims: one, or all copies."""
        name = self.theirs
        for dim, i in zip(self.counted, at, strict=True):
            name = name.replace(dim, str(self.first + self.step * i if dim == "{layers}" else i))
        return [name.replace("{layers}", str(i)) for i in range(self.copies)] if self.copies else [name]

    def their_shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of theirs where ours, without their leading dims, have `shapes`."""
        merged = [self._merged(shape) for shape in shapes]
        turned = merged[0] if len(merged) == 1 else (*merged[0][:-1], sum(shape[-1] for shape in merged))
        if self.transpose is None:
            return turned
        return tuple(turned[self.transpose.index(dim)] for dim in range(len(turned)))

    def split(self, theirs: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        """Ours of `shapes` as views of theirs."""
        import numpy as np

        turned = theirs if self.transpose is None else theirs.transpose(self.transpose)
        ends = list(itertools.accumulate(self._merged(shape)[-1] for shape in shapes)) if len(shapes) > 1 else []
        parts = np.split(turned, ends[:-1], axis=-1) if ends else [turned]
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def join(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Theirs, of ours without their leading dims: the inverse of `split`."""
        import numpy as np

        parts = [part.reshape(self._merged(part.shape)) for part in ours]
        turned = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        return turned if self.transpose is None else turned.transpose(np.argsort(self.transpose))

    def _merged(self, shape: Shape) -> Shape:
        if self.merge is None:
            return shape
        ends = list(itertools.accumulate(self.merge))
        assert ends[-1] == len(shape), f"{self.ours} has {len(shape)} dims, merge {self.merge} is of {ends[-1]}"
        return tuple(math.prod(shape[end - size : end]) for end, size in zip(ends, self.merge, strict=True))


@dataclasses.dataclass(frozen=True)
class Layout:
    """A way of another library to write a model down.

    `read_config` makes our configuration of their `config.json` and raises `ValueError` for what our model cannot do;
    `write_config` is its inverse; `entries` lists every tensor of a configuration. `ignored` are regular expressions
    for the whole names of tensors that follow from the configuration, such as stored masks. `prefix` may be missing
    from the names in a file.
    """

    architecture: str  # `architectures[0]` in a config.json of transformers, `_class_name` in one of diffusers
    read_config: Callable[[Mapping[str, Any]], Any]
    write_config: Callable[[Any], dict[str, Any]]
    entries: Callable[[Any], Sequence[Entry]]
    ignored: tuple[str, ...] = ()
    tensors: str = "model.safetensors"  # `diffusion_pytorch_model.safetensors` in diffusers
    prefix: str = ""

    @property
    def config(self) -> type:
        """The class of our configurations that this layout writes down: what `read_config` is annotated to return."""
        return get_type_hints(self.read_config)["return"]
