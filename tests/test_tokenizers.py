"""Tokenizers: ids and text are the same thing, and a saved tokenizer is the tokenizer."""

import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from artifex.data.tokenizers import ByteTokenizer, IdTokenizer, JsonTokenizer, load_tokenizer, save_tokenizer, train_bpe

WORDS = [
    "def ",
    "return ",
    "self.",
    "naïve ",
    "日本語",
    "🦎",
    "\n    ",
    "\r\n",
    "x",
    "0",
    "\t",
    "ß",
    "'",
    "<|endoftext|>",
]


def random_text(rng, size):
    """Words, and code points from the whole of Unicode but surrogates and NUL."""
    points = [p for p in rng.integers(1, 0x110000, size).tolist() if not 0xD800 <= p < 0xE000]
    return "".join(chr(p) if rng.random() < 0.3 else rng.choice(WORDS) for p in points)


def some_tokenizers():
    rng = np.random.default_rng(1)
    return [ByteTokenizer(), train_bpe((random_text(rng, 500) for _ in range(4)), 400)]


@pytest.mark.parametrize("tokenizer", some_tokenizers(), ids=lambda t: t.name)
def test_decoding_what_was_encoded_gives_the_text_back(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "deep" / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "deep" / "tokenizer.json")
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["tokenizer.json"]
    rng = np.random.default_rng(2)
    texts = ["", "\n", *(random_text(rng, size) for size in (1, 10, 100, 1_000)), "x" * 200_000, "ab\n" * 50_000]
    for ids, content in zip(tokenizer.encode_batch(texts), texts, strict=True):
        assert tokenizer.decode(ids) == loaded.decode(ids.tolist()) == content
        np.testing.assert_array_equal(loaded.encode(content), ids)
        assert ids.dtype == (np.uint8 if tokenizer.vocab_size == 256 else np.uint16)
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.separator == tokenizer.separator


@pytest.mark.parametrize("tokenizer", some_tokenizers(), ids=lambda t: t.name)
def test_decoding_never_fails(tokenizer):
    x = tokenizer.encode("x").tolist()
    assert tokenizer.decode([*x, 50_000, *x, -1]) == "x\N{REPLACEMENT CHARACTER}x\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("tokenizer", some_tokenizers(), ids=lambda t: t.name)
def test_no_text_holds_the_end_of_a_document(tokenizer):
    assert not set(tokenizer.separator) & set(tokenizer.encode("a<|endoftext|>b").tolist())


def test_bytes_are_the_utf8_of_the_text():
    assert ByteTokenizer().encode("é\n").tolist() == [0xC3, 0xA9, 0x0A]
    assert ByteTokenizer().decode([0x61, 0xC3]) == "a\N{REPLACEMENT CHARACTER}"
    assert ByteTokenizer().decode([256, 0x61]) == "\N{REPLACEMENT CHARACTER}a"


def test_ids_read_and_write_ids():
    ids = IdTokenizer(300)
    assert ids.decode(ids.encode("17 299 0")) == "17 299 0"
    for bad in ("300", "-1", "x", "1.0"):
        with pytest.raises(ValueError, match=rf"'{bad}' is not an id in \[0, 300\)"):
            ids.encode(bad)


def test_a_missing_library_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        train_bpe(["text"], 300)


def test_an_empty_vocabulary_is_refused():
    with pytest.raises(ValueError, match="empty vocabulary"):
        JsonTokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"model": 1}', b"[" * 100_000])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer.json is not (JSON|a tokenizer.json)"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_missing_tokenizer_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer file .*gone.json cannot be read: No such file"):
        load_tokenizer(tmp_path / "gone.json")


def test_a_byte_level_bpe_has_an_id_for_every_byte_and_one_more():
    with pytest.raises(ValueError, match="bpe_vocab_size is 256; a byte-level BPE needs at least 257"):
        train_bpe(["text"], 256)
    smallest = train_bpe(["text"], 257)
    assert smallest.vocab_size == 257
    assert smallest.separator == (0,)
    assert len(smallest.encode("🦎")) == len("🦎".encode())


def test_reading_tokenizers_imports_neither_jax_nor_grain_nor_the_library():
    program = "import sys, artifex.data.tokenizers; print({'jax', 'grain', 'tokenizers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout.strip() == b"set()"
