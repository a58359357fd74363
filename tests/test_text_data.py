"""Text sources: what is read, what is held out, and which tokens and fingerprint come of it."""

import json
import os
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from artifex.data import text
from artifex.data.text import load_text
from artifex.data.tokenizers import save_tokenizer

WORDS = ["def ", "return ", "self.", "naïve ", "日本語", "🦎", "\n    ", "x", "'", "<|endoftext|>"]


def write_folder(root, count=40, size=200):
    """Files `part/NN.txt` of random text; the same at every call."""
    rng = np.random.default_rng(7)
    for number in range(count):
        file = root / f"part{number % 3}" / f"{number:02}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes("".join(rng.choice(WORDS, size)).encode())
    return root


def on_disk(root, names):
    return [(root / name).read_bytes() for name in names]


# What is read and how it is split


def test_the_standard_library_is_its_sources_without_tests():
    corpus = load_text("stdlib")
    files = corpus.train_files + corpus.validation_files
    assert {"argparse.py", "asyncio/base_events.py", "pydoc_data/topics.py"} <= set(files)
    assert not [name for name in files if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/"))]
    assert all(name.endswith(".py") for name in files)
    assert list(corpus.train_files) == sorted(corpus.train_files)
    assert 0.01 < len(corpus.validation) / (len(corpus.train) + len(corpus.validation)) < 0.08


def test_a_package_is_its_sources_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "some_package"
    for name in ("inner/a.py", "inner/b.py", "c.py", "notes.txt", "tests/test_it.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(f"a = {name!r}\n" * 9)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    corpus = load_text("package:some_package")
    assert {*corpus.train_files, *corpus.validation_files} == {"__init__.py", "c.py", "inner/a.py", "inner/b.py"}
    for wrong in ("package:nowhere", "package:this", "package:some_package.part", "package:"):
        with pytest.raises(ValueError, match="is no installed package; install it, or give a folder of text"):
            load_text(wrong)


@pytest.mark.parametrize("source", ["stdlib", "folder"])
def test_validation_files_never_appear_in_training(source, tmp_path):
    root = Path(sysconfig.get_path("stdlib")) if source == "stdlib" else write_folder(tmp_path)
    corpus = load_text("stdlib" if source == "stdlib" else root)
    assert not set(corpus.train_files) & set(corpus.validation_files)
    for tokens, names in ((corpus.train, corpus.train_files), (corpus.validation, corpus.validation_files)):
        *documents, rest = tokens.tobytes().split(b"\0")
        assert rest == b""  # a separator after each document, the last as well
        assert Counter(documents) == Counter(on_disk(root, names))


def test_the_split_does_not_depend_on_the_process_that_makes_it(tmp_path):
    write_folder(tmp_path)
    program = "import sys; from artifex.data.text import load_text; print(load_text(sys.argv[1]).validation_files)"
    runs = [
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] != b""


def test_a_new_file_moves_no_other_between_the_splits(tmp_path):
    before = load_text(write_folder(tmp_path, count=100), validation_fraction=0.2)
    (tmp_path / "another.txt").write_text("text")
    after = load_text(tmp_path, validation_fraction=0.2)
    assert len(before.validation_files) > 5
    assert set(before.validation_files) == set(after.validation_files) - {"another.txt"}


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_neither_split_of_a_few_files_is_empty(tmp_path, count, fraction):
    corpus = load_text(write_folder(tmp_path, count), validation_fraction=fraction)
    assert corpus.train_files
    assert corpus.validation_files
    assert len(corpus.train_files) + len(corpus.validation_files) == count


def test_a_file_that_is_most_of_the_corpus_is_trained_on(tmp_path):
    for name in "abcdefgh":
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.txt").write_text("large " * 1_000)
        (folder / "small.txt").write_text("small")
        assert load_text(folder).validation_files == ("small.txt",)


@pytest.mark.parametrize("fraction", [1e-300, 0.05, 0.3, 0.99])
def test_a_single_file_is_cut_at_a_character_and_its_end_held_out(tmp_path, fraction):
    (tmp_path / "one.txt").write_text("日本語🦎ß" * 30, encoding="utf-8")
    corpus = load_text(tmp_path / "one.txt", validation_fraction=fraction)
    train, validation = (part.tobytes().decode().removesuffix("\0") for part in (corpus.train, corpus.validation))
    assert train + validation == "日本語🦎ß" * 30
    assert train and validation
    size = len(("日本語🦎ß" * 30).encode())
    assert abs(len(validation.encode()) - fraction * size) < 4 or len(validation) == 1


def test_a_folder_leaves_out_hidden_and_empty_files_and_counts_what_is_no_text(tmp_path):
    for name, content in {
        "b.txt": b"bee",
        "a/deep/a.txt": "é".encode(),
        ".hidden": b"secret",
        ".git/config": b"secret",
        "empty.txt": b"",
        "picture.png": b"\x89PNG\r\n",
        "nul.bin": b"a\0b",
        "latin.txt": "é".encode("latin-1"),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    corpus = load_text(tmp_path, validation_fraction=0.5)
    assert sorted(corpus.train_files + corpus.validation_files) == ["a/deep/a.txt", "b.txt"]
    assert corpus.skipped == ("latin.txt", "nul.bin", "picture.png", "pipe")
    assert corpus.changes == (
        "4 of 8 files left out, not UTF-8 text: latin.txt, nul.bin, picture.png, ...",
        "1 of 8 files left out, empty: empty.txt",
        "1 of 8 files left out, links to folders: linked",
    )


def test_a_folder_named_stdlib_is_read_by_its_path(tmp_path, monkeypatch):
    write_folder(tmp_path / "stdlib", 3)
    monkeypatch.chdir(tmp_path)
    for source in ("./stdlib", Path("stdlib")):
        assert len(load_text(source).train_files) == 2


def test_the_fingerprint_changes_with_the_data_and_with_nothing_else(tmp_path):
    write_folder(tmp_path / "one")
    (tmp_path / "moved").mkdir()
    write_folder(tmp_path / "moved" / "elsewhere")
    first = load_text(tmp_path / "one").fingerprint
    assert load_text(tmp_path / "moved" / "elsewhere").fingerprint == first
    seen = {first, load_text(tmp_path / "one", validation_fraction=0.3).fingerprint}
    seen.add(load_text(tmp_path / "one", tokenizer="bpe", bpe_vocab_size=300).fingerprint)
    victim = tmp_path / "one" / "part1" / "04.txt"
    victim.write_bytes(victim.read_bytes()[:-1] + b"!")
    seen.add(load_text(tmp_path / "one").fingerprint)
    victim.rename(victim.with_name("renamed.txt"))
    seen.add(load_text(tmp_path / "one").fingerprint)
    assert len(seen) == 5


# Tokens on disk


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4", "i4", ">i8"])
def test_a_token_file_is_mapped_and_cut_by_position(tmp_path, dtype):
    tokens = np.random.default_rng(0).integers(0, 256, 1_000).astype(dtype)
    np.save(tmp_path / "tokens.npy", tokens)
    corpus = load_text(tmp_path / "tokens.npy", validation_fraction=0.1)
    assert isinstance(corpus.train, np.memmap)
    assert corpus.train.dtype == tokens.dtype
    np.testing.assert_array_equal(corpus.train, tokens[:900])
    np.testing.assert_array_equal(corpus.validation, tokens[900:])
    tokens[0] ^= 1
    np.save(tmp_path / "tokens.npy", tokens)
    assert load_text(tmp_path / "tokens.npy", validation_fraction=0.1).fingerprint != corpus.fingerprint


@pytest.mark.parametrize(("suffix", "dtype"), [("uint8", "u1"), ("uint16", "<u2"), ("uint32", "<u4")])
def test_raw_tokens_are_mapped_in_the_dtype_of_their_suffix(tmp_path, suffix, dtype):
    tokens = np.arange(200).astype(dtype)
    tokens.tofile(tmp_path / f"tokens.{suffix}")
    corpus = load_text(tmp_path / f"tokens.{suffix}", tokenizer="ids")
    np.testing.assert_array_equal(np.concatenate([corpus.train, corpus.validation]), tokens)
    assert corpus.vocab_size == 200
    assert corpus.bytes_per_token == {"train": None, "validation": None}
    assert corpus.tokenizer.decode([3, 199, 200]) == "3 199 \N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros(9), r"holds float64 of shape \(9,\); expected integers in one dim"),
        (np.zeros((3, 3), int), r"of shape \(3, 3\); expected integers in one dim"),
        (np.array([1, -5, 2, 3]), r"holds id -5, but tokenizer bytes has \[0, 256\)"),
        (np.array([1, 256, 2, 3]), r"holds id 256, but tokenizer bytes has .* or tokenizer 'ids'"),
        (np.array([1, 2, 3]), "holds 3 tokens, too few"),
        (np.array([], int), "is not a file of tokens|too few"),
        (np.array([{}]), "is not a file of tokens"),
        (b"not an array", "is not a file of tokens"),
        (b"", "is not a file of tokens"),
    ],
)
def test_a_file_that_holds_no_tokens_is_refused(tmp_path, content, message):
    file = tmp_path / "tokens.npy"
    file.write_bytes(content) if isinstance(content, bytes) else np.save(file, content)
    with pytest.raises(ValueError, match=message):
        load_text(file)


# Errors


def test_a_missing_empty_or_binary_source_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "folder").mkdir()
    for source, message in {
        "nothing": "nothing does not exist; give 'stdlib', 'package:NAME', a file, a folder or a .npy",
        "nothing.npy": "nothing.npy cannot be read: No such file",
        "empty.txt": "empty.txt is empty",
        "one.txt": "one.txt has 1 bytes of text, too few to hold some out",
        "picture.png": "picture.png is not a file of UTF-8 text; convert it, or store tokens",
        "folder": "has no text: 0 files are not UTF-8",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_text(tmp_path / source)


def test_an_unreadable_file_or_folder_is_an_error_not_a_gap(tmp_path, monkeypatch):
    write_folder(tmp_path, 3)
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="dangling cannot be read: No such file or directory; mend or remove it"):
        load_text(tmp_path)
    (tmp_path / "dangling").unlink()

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:  # root may read anything, so the refusal is made here
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(ValueError, match=r"00.txt cannot be read: Permission denied"):
            load_text(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(ValueError, match=r"folder .* cannot be read: Permission denied"):
            load_text(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", refuse)
        with pytest.raises(ValueError, match=r"cannot be read: Permission denied"):
            load_text(tmp_path)


def test_a_text_that_a_tokenizer_makes_nothing_of_is_refused(tmp_path):
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "one.txt").write_text("xyz")
    with pytest.raises(ValueError, match=r"tokenizer bpe-1 makes 0 tokens of one.txt.*; give more text"):
        load_text(tmp_path / "one.txt", tokenizer=tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": "byte"}, "tokenizer 'byte' is neither known nor a file: did you mean 'bytes'"),
        ({"tokenizer": "no/such/tokenizer.json"}, "expected 'bytes', 'bpe', 'ids' or the path"),
        ({"tokenizer": "ids"}, "tokenizer 'ids' is for token files"),
        ({"tokenizer": "bpe", "bpe_vocab_size": 256}, "bpe_vocab_size is 256; a byte-level BPE needs at least 257"),
        ({"validation_fraction": 0.0}, "validation_fraction is 0.0; it must be between 0 and 1"),
        ({"validation_fraction": float("nan")}, "validation_fraction is nan"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_reading(arguments, message, monkeypatch):
    monkeypatch.setattr(text, "_read", lambda *_: pytest.fail("read"))
    with pytest.raises(ValueError, match=message):
        load_text("stdlib", **arguments)


def test_a_bpe_of_a_token_file_is_refused(tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(9))
    with pytest.raises(ValueError, match=r"holds tokens already: give the tokenizer.json"):
        load_text(tmp_path / "tokens.npy", tokenizer="bpe")


# Tokenizers in a corpus


def test_a_bpe_knows_the_training_files_alone_and_is_the_same_again(tmp_path):
    write_folder(tmp_path / "texts")
    held_out = load_text(tmp_path / "texts").validation_files
    (tmp_path / "texts" / held_out[0]).write_text("zqzq " * 20)
    first = load_text(tmp_path / "texts", tokenizer="bpe", bpe_vocab_size=400)
    again = load_text(tmp_path / "texts", tokenizer="bpe", bpe_vocab_size=400)
    assert held_out[0] in first.validation_files
    assert first.fingerprint == again.fingerprint
    assert first.vocab_size == 400
    vocabulary = json.loads(first.tokenizer.to_json())["model"]["vocab"]
    assert any("return" in entry for entry in vocabulary)
    assert not any("zq" in entry for entry in vocabulary)
    for split, tokens, names in (
        ("train", first.train, first.train_files),
        ("validation", first.validation, first.validation_files),
    ):
        contents = on_disk(tmp_path / "texts", names)
        expected = "".join(content.decode() + "<|endoftext|>" for content in contents)
        assert first.tokenizer.decode(tokens) == expected
        assert first.bytes_per_token[split] == pytest.approx((sum(map(len, contents)) + len(names)) / len(tokens))
    assert load_text(tmp_path / "texts").bytes_per_token == {"train": 1.0, "validation": 1.0}


def test_a_cached_bpe_is_not_trained_again_and_a_saved_one_gives_the_same_corpus(tmp_path, monkeypatch):
    write_folder(tmp_path / "texts", 5)
    how = {"tokenizer": "bpe", "bpe_vocab_size": 300, "cache_dir": tmp_path / "cache"}
    first = load_text(tmp_path / "texts", **how)
    save_tokenizer(first.tokenizer, tmp_path / "run" / "tokenizer.json")
    with monkeypatch.context() as patch:
        patch.setattr(text, "train_bpe", lambda *_: pytest.fail("trained again"))
        cached = load_text(tmp_path / "texts", **how)
        saved = load_text(tmp_path / "texts", tokenizer=tmp_path / "run" / "tokenizer.json")
    for other in (cached, saved):
        assert other.fingerprint == first.fingerprint
        np.testing.assert_array_equal(other.train, first.train)
    (tmp_path / "texts" / first.train_files[0]).write_text("changed")
    load_text(tmp_path / "texts", **how)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_tokenizer_file_is_used_without_its_additions_and_with_its_own_end(tmp_path):
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "</s>": 1, "a": 2, "b": 70_000}, "[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.add_special_tokens(["</s>"])
    library.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    library.enable_truncation(2)
    library.enable_padding(length=50)
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "texts").mkdir()
    for name in ("1", "2", "3"):
        (tmp_path / "texts" / name).write_text("a b a c")
    corpus = load_text(tmp_path / "texts", tokenizer=tmp_path / "tokenizer.json")
    assert corpus.validation.tolist() == [2, 70_000, 2, 0, 1]
    assert corpus.train.dtype == np.uint32
    assert corpus.vocab_size == 70_001


def test_reading_text_imports_neither_jax_nor_grain_nor_tokenizers():
    program = "import sys, artifex.data.text; print({'jax', 'grain', 'tokenizers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout.strip() == b"set()"
