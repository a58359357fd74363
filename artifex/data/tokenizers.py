"""Text becomes token ids and back: UTF-8 bytes, a trained byte-level BPE, a tokenizer file, or bare ids."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import tokenizers

END_OF_DOCUMENT = "<|endoftext|>"
_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
_PIECE = 2**16  # characters encoded at once: one string of 12 MB takes 5 times as long as the same text in pieces
_LIMIT = 2**28  # bytes of a tokenizer file: those of 256,000 words have some 34 million
_PIECES_AT_ONCE = 64  # bounds the memory of the library's records, some 100 bytes a token
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(Protocol):
    """Text <-> ids in [0, vocab_size). `separator` are the ids that end a document in a corpus.

    `decode` never fails: what is no text, or no id of the vocabulary, becomes U+FFFD.
    """

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def separator(self) -> tuple[int, ...]: ...

    def encode(self, text: str) -> np.ndarray: ...

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]: ...

    def decode(self, ids: Any) -> str: ...

    def to_json(self) -> str: ...


def smallest_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint8, uint16 and uint32 that holds every id of a vocabulary."""
    return np.min_scalar_type(vocab_size - 1)


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """The bytes of UTF-8. NUL, which no text file has, ends a document."""

    name: str = dataclasses.field(default="bytes", init=False)
    vocab_size: int = dataclasses.field(default=256, init=False)
    separator: tuple[int, ...] = dataclasses.field(default=(0,), init=False)

    def encode(self, text: str) -> np.ndarray:
        """The bytes, uint8. Raises `UnicodeEncodeError` for lone surrogates, which UTF-8 cannot write."""
        return np.frombuffer(text.encode(), np.uint8)

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Any) -> str:
        """Text of any sequence of ids; a byte sequence that is not UTF-8 becomes U+FFFD."""
        ids = np.asarray(ids).ravel()
        # 0xFF occurs in no UTF-8 text, so an id outside the vocabulary decodes to U+FFFD as well.
        return np.where((ids >= 0) & (ids < 256), ids, 0xFF).astype(np.uint8).tobytes().decode(errors="replace")

    def to_json(self) -> str:
        """What `load_tokenizer` reads."""
        return json.dumps({"artifex_tokenizer": "bytes"})


@dataclasses.dataclass(frozen=True)
class IdTokenizer:
    """No text at all: a prompt is written as ids with spaces between them, and so is what is sampled."""

    vocab_size: int
    separator: tuple[int, ...] = dataclasses.field(default=(), init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.vocab_size, int) or self.vocab_size < 1:
            raise ValueError(f"vocab_size is {self.vocab_size!r}; expected an integer of at least 1")

    @property
    def name(self) -> str:
        """`ids-` and the vocabulary's size."""
        return f"ids-{self.vocab_size}"

    def encode(self, text: str) -> np.ndarray:
        """Ids of e.g. '17 4 255'. Raises `ValueError` for anything else."""
        for word in text.split():
            if not (word.isascii() and word.isdigit() and int(word) < self.vocab_size):
                raise ValueError(
                    f"{word!r} is not an id in [0, {self.vocab_size}); these tokens have no text, give ids"
                )
        return np.array([int(word) for word in text.split()], smallest_dtype(self.vocab_size))

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Any) -> str:
        """The ids with spaces between them."""
        known = range(self.vocab_size)
        return " ".join(str(i) if i in known else REPLACEMENT for i in np.asarray(ids).ravel().tolist())

    def to_json(self) -> str:
        """What `load_tokenizer` reads."""
        return json.dumps({"artifex_tokenizer": "ids", "vocab_size": self.vocab_size})


class JsonTokenizer:
    """A tokenizer of the `tokenizers` library: trained here or read from its `tokenizer.json`.

    Text alone decides the ids: nothing is added, cut or padded, and a special token's name in a text is plain text.
    """

    def __init__(self, library_tokenizer: tokenizers.Tokenizer) -> None:
        library_tokenizer.no_truncation()
        library_tokenizer.no_padding()
        library_tokenizer.encode_special_tokens = True
        self._tokenizer = library_tokenizer
        # Not the count of entries: a file may leave ids out.
        self.vocab_size = max(library_tokenizer.get_vocab().values(), default=-1) + 1
        if not self.vocab_size:
            raise ValueError("the tokenizer has an empty vocabulary; train it first")
        # The file's own end of text where it has one of the usual, else a newline.
        ends = [end for end in map(library_tokenizer.token_to_id, _ENDS) if end is not None]
        self.separator: tuple[int, ...] = tuple(ends[:1] or self.encode("\n").tolist())

    @property
    def name(self) -> str:
        """The kind of model and the vocabulary's size: 'bpe-4096'."""
        return f"{type(self._tokenizer.model).__name__.lower()}-{self.vocab_size}"

    def encode(self, text: str) -> np.ndarray:
        """Ids in the smallest dtype that holds them."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores; in pieces of at most 65,536 characters, cut after a newline."""
        pieces = [(which, piece) for which, text in enumerate(texts) for piece in _pieces(text)]
        dtype = smallest_dtype(self.vocab_size)
        ids: list[list[np.ndarray]] = [[] for _ in range(pieces[-1][0] + 1 if pieces else 0)]
        for first in range(0, len(pieces), _PIECES_AT_ONCE):
            group = pieces[first : first + _PIECES_AT_ONCE]
            encoded = self._tokenizer.encode_batch_fast([piece for _, piece in group], add_special_tokens=False)
            for (which, _), encoding in zip(group, encoded, strict=True):
                ids[which].append(np.array(encoding.ids, dtype))
        return [np.concatenate(parts) for parts in ids]

    def decode(self, ids: Any) -> str:
        """Text of any sequence of ids, special tokens by their names."""
        known = range(self.vocab_size)
        parts = []
        for inside, run in itertools.groupby(np.asarray(ids).ravel().tolist(), known.__contains__):
            run = list(run)
            parts.append(self._tokenizer.decode(run, skip_special_tokens=False) if inside else REPLACEMENT * len(run))
        return "".join(parts)

    def token(self, index: int) -> str | None:
        """The token of an id as its file writes it; None where the file leaves the id out."""
        return self._tokenizer.id_to_token(index)

    def to_json(self) -> str:
        """The library's own serialisation, which every tool that reads `tokenizer.json` understands."""
        return self._tokenizer.to_str()


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE:
        end = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """A byte-level BPE with `END_OF_DOCUMENT` as id 0: any text has ids. The same texts give the same tokenizer.

    A small corpus may have fewer merges than asked for; `vocab_size` of the result is what came of it.
    """
    check_bpe_vocab_size(vocab_size)
    library = _library()
    pre = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = library.Tokenizer(library.models.BPE())
    bpe.pre_tokenizer = pre
    bpe.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return JsonTokenizer(bpe)


def check_bpe_vocab_size(vocab_size: int) -> None:
    """Raise `ValueError` where a byte-level BPE cannot have so small a vocabulary."""
    if vocab_size < 257:
        raise ValueError(
            f"bpe_vocab_size is {vocab_size}; a byte-level BPE needs at least 257 entries, "
            "256 bytes and the end of a document: raise it, or choose tokenizer 'bytes'"
        )


def first_difference(a: Tokenizer, b: Tokenizer) -> int | None:
    """The first id that both have and that stands for another token in each; None where there is no such."""
    if not (isinstance(a, JsonTokenizer) and isinstance(b, JsonTokenizer)):
        return None if type(a) is type(b) else 0
    both = range(min(a.vocab_size, b.vocab_size))
    return next((index for index in both if a.token(index) != b.token(index)), None)


def save_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Write a JSON file that `load_tokenizer` reads; it appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(tokenizer.to_json(), encoding="utf-8")
    partial.replace(path)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """A tokenizer from what `save_tokenizer` wrote, or from a `tokenizer.json` of the `tokenizers` library.

    Raises `ValueError` where the file is missing, unreadable or something else.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe would block
            raise ValueError(f"tokenizer file {path} is no regular file; expected a tokenizer.json")
        if path.stat().st_size > _LIMIT:
            raise ValueError(f"tokenizer file {path} has {path.stat().st_size:,} bytes; expected at most {_LIMIT:,}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"tokenizer file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"tokenizer file {path} is not JSON ({error}); expected a tokenizer.json") from error
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tokenizer file {path} is not JSON ({error}); expected a tokenizer.json") from error
    kind = content.get("artifex_tokenizer") if isinstance(content, dict) else None
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "ids":
        return IdTokenizer(content.get("vocab_size", 0))
    library = _library()
    try:
        return JsonTokenizer(library.Tokenizer.from_str(text))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing narrower, and where it panics no Exception
        raise ValueError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from error


def _library() -> types.ModuleType:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            f"BPE and tokenizer files need the tokenizers library: pip install tokenizers ({error})"
        ) from error
    return tokenizers
