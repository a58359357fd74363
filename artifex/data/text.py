"""A text source becomes a corpus: tokens to train on, tokens held out by file, and a fingerprint of both."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.util
import os
import stat
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from artifex.data.changes import left_out
from artifex.data.tokenizers import (
    ByteTokenizer,
    IdTokenizer,
    Tokenizer,
    check_bpe_vocab_size,
    load_tokenizer,
    save_tokenizer,
    smallest_dtype,
    train_bpe,
)

_RAW_TOKENS = {".uint8": "u1", ".uint16": "<u2", ".uint32": "<u4"}
_NOT_THE_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_SAMPLE_BLOCKS, _SAMPLE_BLOCK = 64, 4096


@dataclasses.dataclass(frozen=True, eq=False)
class TextCorpus:
    """Tokens in the smallest of uint8, uint16 and uint32 that holds them (a token file: in its own dtype, mapped).

    After each document stand the tokenizer's `separator` ids. `bytes_per_token` has `train` and `validation`:
    bits per byte = nats per token / ln 2 / bytes_per_token; None where tokens came without text. A separator counts
    as one byte, so that it is 1.0 for bytes.
    """

    source: str
    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray
    fingerprint: str  # of every token of either split; of a token file: of its size, dtype and samples
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]
    skipped: tuple[str, ...]  # files of a folder that are not UTF-8 text
    changes: tuple[str, ...]  # what was left out, a line each
    bytes_per_token: dict[str, float | None]

    @property
    def vocab_size(self) -> int:
        """Every token is below it; in a token file only samples were checked."""
        return self.tokenizer.vocab_size

    def describe(self) -> str:
        """One line: what there is to train on and what is held out."""
        counts = [
            f"{len(tokens):,} {split} tokens of {len(files)} file{'s' * (len(files) != 1)}"
            for split, tokens, files in (
                ("training", self.train, self.train_files),
                ("validation", self.validation, self.validation_files),
            )
        ]
        return f"{self.source}: {', '.join(counts)}, tokenizer {self.tokenizer.name}"


class _Document(NamedTuple):
    name: str  # relative to the source, with /
    content: bytes  # UTF-8, not empty


class _Read(NamedTuple):
    documents: list[_Document]
    skipped: list[str]  # not UTF-8 text
    empty: list[str]
    linked: list[str]  # links to folders

    def changes(self) -> list[str]:
        """What was left out, a line each."""
        total = sum(map(len, self))
        return [
            *left_out(self.skipped, total, "not UTF-8 text"),
            *left_out(self.empty, total, "empty"),
            *left_out(self.linked, total, "links to folders"),
        ]


def load_text(
    source: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] = "bytes",
    bpe_vocab_size: int = 4096,
    validation_fraction: float = 0.05,
    cache_dir: str | os.PathLike[str] | None = None,
) -> TextCorpus:
    """Read `source` and split it into training and validation.

    `source`: 'stdlib', the running Python's own library without its tests; 'package:NAME', the Python sources of an
    installed package, which is not imported, without its tests; a folder, all UTF-8 text below it but
    hidden files, not through links to folders; one text file; or tokens on disk, mapped and never read whole: a 1-D
    integer `.npy`, or raw little-endian `.uint8`, `.uint16` or `.uint32`. (A folder named stdlib: './stdlib'.)

    `tokenizer`: 'bytes'; 'bpe', trained on the training files alone and kept in `cache_dir` under a hash of them;
    the path of a tokenizer.json; or, for token files that have no text, 'ids' (reads the file once for its largest).

    A file is held out if a hash of its name falls in `validation_fraction`, unless it is larger than that fraction
    of the whole; where this leaves a side empty, the one file nearest to that size is held out. A single file is
    cut in two instead, and its end is held out.

    Raises `ValueError` for what is missing, unreadable, empty, no text, or too small to split.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}; it must be between 0 and 1, e.g. 0.05")
    if tokenizer == "bpe":
        check_bpe_vocab_size(bpe_vocab_size)
    ready = None if tokenizer in ("bpe", "ids") else _ready_tokenizer(tokenizer)
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.suffix in (".npy", *_RAW_TOKENS):
        if tokenizer == "bpe":
            raise ValueError(f"{name} holds tokens already: give the tokenizer.json they were made with, or 'ids'")
        return _token_corpus(name, _map_tokens(path), ready, validation_fraction)
    if tokenizer == "ids":
        raise ValueError(f"tokenizer 'ids' is for token files (.npy, .uint16, ...), but {name} is text: choose 'bytes'")

    read = _read_sources(name) if source == name and names_sources(name) else _read_path(path)
    train, validation = _split(name, read.documents, validation_fraction)
    if ready is None:
        ready = _cached_bpe(train, bpe_vocab_size, cache_dir)
    train_tokens, train_ratio = _tokenize(train, ready)
    validation_tokens, validation_ratio = _tokenize(validation, ready)
    return TextCorpus(
        name,
        ready,
        train_tokens,
        validation_tokens,
        _hash([str(ready.vocab_size).encode(), train_tokens.data, validation_tokens.data]),
        tuple(document.name for document in train),
        tuple(document.name for document in validation),
        tuple(read.skipped),
        tuple(read.changes()),
        {"train": train_ratio, "validation": validation_ratio},
    )


def _ready_tokenizer(name: str | os.PathLike[str]) -> Tokenizer:
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name).expanduser()
    if not path.exists():
        near = difflib.get_close_matches(str(name), ("bytes", "bpe", "ids"), n=1)
        hint = (
            f"did you mean {near[0]!r}?" if near else "expected 'bytes', 'bpe', 'ids' or the path of a tokenizer.json"
        )
        raise ValueError(f"tokenizer {str(name)!r} is neither known nor a file: {hint}")
    return load_tokenizer(path)


def names_sources(source: str) -> bool:
    """Whether `source` is one of the words for installed Python code: 'stdlib', or 'package:' and a name."""
    return source == "stdlib" or source.startswith("package:")


def _read_sources(source: str) -> _Read:
    root = Path(sysconfig.get_path("stdlib")) if source == "stdlib" else _package(source.removeprefix("package:"))
    found, _ = _files(root, lambda folder: folder not in _NOT_THE_LIBRARY)
    files = [file for file in found if file.suffix == ".py"]
    if not files:
        raise ValueError(f"{source} has no Python sources at {root}; give a file or a folder of text as the source")
    return _read(root, files)._replace(empty=[])  # the markers of packages, which hold nothing on purpose


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"data.source package:{name} is no installed package; install it, or give a folder of text")
    return Path(next(iter(found.submodule_search_locations)))


def _read_path(path: Path) -> _Read:
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError as error:
        hint = "give 'stdlib', 'package:NAME', a file, a folder or a .npy of tokens as the source"
        raise ValueError(f"{path} does not exist; {hint}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if is_folder:
        files, linked = _files(path, lambda folder: not folder.startswith("."))
        read = _read(path, files)._replace(linked=linked)
        if not read.documents:
            raise ValueError(
                f"folder {path} has no text: {len(read.skipped)} files are not UTF-8, the rest is empty or hidden"
            )
        return read
    read = _read(path.parent, [path])
    if read.skipped:
        raise ValueError(f"{path} is not a file of UTF-8 text; convert it, or store tokens as a 1-D integer .npy")
    if not read.documents:
        raise ValueError(f"{path} is empty; give a file with text")
    return read


def _files(root: Path, enter: Callable[[str], bool]) -> tuple[list[Path], list[str]]:
    """The files below `root` that are not hidden, through folders that `enter` takes, and the links to such folders.

    Both sorted by their name relative to `root`.
    """

    def fail(error: OSError) -> None:
        raise ValueError(f"folder {error.filename} cannot be read: {error.strerror}") from error

    found, linked = [], []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = filter(enter, folders)
        found += [Path(folder, name) for name in names if not name.startswith(".")]
        links = [Path(folder, name) for name in folders if Path(folder, name).is_symlink()]
        linked += [link.relative_to(root).as_posix() for link in links]
    return sorted(found, key=lambda file: file.relative_to(root).as_posix()), sorted(linked)


def _read(root: Path, files: Iterable[Path]) -> _Read:
    """The files with text in them, and the names of those that are not UTF-8 text or empty."""
    documents, skipped, empty = [], [], []
    for file in files:
        name = file.relative_to(root).as_posix()
        try:
            if not stat.S_ISREG(file.stat().st_mode):  # reading a pipe would wait for ever
                skipped.append(name)
                continue
            content = file.read_bytes()
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}; mend or remove it") from error
        if not _is_text(content):
            skipped.append(name)
        elif content:
            documents.append(_Document(name, content))
        else:
            empty.append(name)
    return _Read(documents, skipped, empty, [])


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in content


def _split(source: str, documents: Sequence[_Document], fraction: float) -> tuple[list[_Document], list[_Document]]:
    if len(documents) == 1:
        return _cut(source, documents[0], fraction)
    target = fraction * sum(len(document.content) for document in documents)

    def place(document: _Document) -> float:
        return int.from_bytes(hashlib.sha256(os.fsencode(document.name)).digest()[:8]) / 2**64

    held_out = {d.name for d in documents if place(d) < fraction and len(d.content) <= target}
    if not 0 < len(held_out) < len(documents):
        held_out = {min(documents, key=lambda d: (abs(len(d.content) - target), place(d))).name}
    return [d for d in documents if d.name not in held_out], [d for d in documents if d.name in held_out]


def _cut(source: str, document: _Document, fraction: float) -> tuple[list[_Document], list[_Document]]:
    """The one document in two, at a character."""
    content = document.content
    cut = min(int(len(content) * (1 - fraction)), len(content) - 1)
    while cut and content[cut] & 0xC0 == 0x80:  # inside a character
        cut -= 1
    if not cut:
        raise ValueError(f"{source} has {len(content)} bytes of text, too few to hold some out; give more text")
    name = document.name
    return [_Document(f"{name}[:{cut}]", content[:cut])], [_Document(f"{name}[{cut}:]", content[cut:])]


def _cached_bpe(train: Sequence[_Document], vocab_size: int, cache_dir: str | os.PathLike[str] | None) -> Tokenizer:
    cached = None
    if cache_dir is not None:
        cached = Path(cache_dir, f"bpe-{vocab_size}-{_hash(document.content for document in train)[:16]}.json")
        if cached.exists():
            return load_tokenizer(cached)
    trained = train_bpe((document.content.decode() for document in train), vocab_size)
    if cached is not None:
        save_tokenizer(trained, cached)
    return trained


def _tokenize(documents: Sequence[_Document], tokenizer: Tokenizer) -> tuple[np.ndarray, float]:
    """The documents, each with its separator, as one array, and the bytes that a token stands for."""
    separator = np.array(tokenizer.separator, smallest_dtype(tokenizer.vocab_size))
    encoded = tokenizer.encode_batch(document.content.decode() for document in documents)
    tokens = np.concatenate([part for ids in encoded for part in (ids, separator)])
    if len(tokens) < 2:
        raise ValueError(
            f"tokenizer {tokenizer.name} makes {len(tokens)} tokens of {documents[0].name}; give more text"
        )
    return tokens, sum(len(document.content) + 1 for document in documents) / len(tokens)


def _map_tokens(path: Path) -> np.ndarray:
    try:
        if path.suffix == ".npy":
            tokens = np.lib.format.open_memmap(path, mode="r")
        else:
            tokens = np.memmap(path, dtype=_RAW_TOKENS[path.suffix], mode="r")
    except OSError as error:
        raise ValueError(f"token file {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:  # no header, Python objects, cut short, empty
        raise ValueError(f"{path} is not a file of tokens ({error}); expected integers in one dim") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"{path} holds {tokens.dtype} of shape {tokens.shape}; expected integers in one dim")
    return tokens


def _token_corpus(source: str, tokens: np.ndarray, tokenizer: Tokenizer | None, fraction: float) -> TextCorpus:
    if len(tokens) < 4:
        raise ValueError(f"{source} holds {len(tokens)} tokens, too few to hold some out; give more")
    starts = np.linspace(0, max(0, len(tokens) - _SAMPLE_BLOCK), _SAMPLE_BLOCKS).astype(np.int64)
    sample = np.stack([tokens[start : start + _SAMPLE_BLOCK] for start in starts])
    if tokenizer is None:
        chunks = range(0, len(tokens), 2**24)
        tokenizer = IdTokenizer(max(int(tokens[start : start + 2**24].max()) for start in chunks) + 1)
    if sample.min() < 0 or sample.max() >= tokenizer.vocab_size:
        bad = sample.min() if sample.min() < 0 else sample.max()
        raise ValueError(
            f"{source} holds id {bad}, but tokenizer {tokenizer.name} has [0, {tokenizer.vocab_size}); "
            "give the tokenizer.json the tokens were made with, or tokenizer 'ids'"
        )
    cut = min(max(int(len(tokens) * (1 - fraction)), 2), len(tokens) - 2)
    ratio = 1.0 if isinstance(tokenizer, ByteTokenizer) else None
    name = Path(source).name
    return TextCorpus(
        source,
        tokenizer,
        tokens[:cut],
        tokens[cut:],
        _hash([f"{tokenizer.vocab_size} {tokens.dtype} {len(tokens)} {cut}".encode(), sample.tobytes()]),
        (f"{name}[:{cut}]",),
        (f"{name}[{cut}:]",),
        (),
        (),
        {"train": ratio, "validation": ratio},
    )


def _hash(parts: Iterable[bytes | memoryview]) -> str:
    """One hash of all parts, each hashed alone first: where a part ends is part of it."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
