"""Files that were damaged or made to deceive: a valid one, changed in a way that a number decides."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

WORDS = [  # put into text: each is known to break some reader of JSON, of YAML or of names
    *(b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b"\r", b"\x85", b"\xe2\x80\xa8"),
    *(
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"1e999",
        b"-0",
        b"1" * 5_000,
        b"0x10",
        b"1_0",
        b"018",
        b"1:30:00",
        b"2001-01-01",
    ),
    *(b"null", b"true", b'""', b"{}", b"[]", b'"', b"'", b"\\", b"\t", b"|\n", b">9\n", b"a" * 50_000),
    *(b"[" * 20_000, b'{"a":' * 20_000, b"{" * 20_000, b"- " * 2_000, b"? " * 2_000, b"{a: 1, a: 2}", b"{? [a]: b}"),
    *(b"../../outside", b"/etc/passwd", b"C:\\outside", b"/dev/zero", b"%00", b"~"),
    *(b"&a [*a, *a]", b"&b [*a,*a,*a,*a,*a,*a,*a,*a,*a]", b"*a", b"<<: *a", b"%YAML 9.9", b"\n---\n", b"\n...\n"),
    *(
        b"!!python/object/apply:os.system [id]",
        b"!!python/name:os.system",
        b"!!binary aGk=",
        b"!!set {a}",
        b'"\\UFFFFFFFF"',
    ),
]
VALUES: list[Any] = [  # put in the place of a value
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 1.5, float("nan"), float("inf"), 1e308),
    *("", "a", "0", "../../outside", "/outside", "a/../../outside", "\0", "\ud800", "\u202e", "x" * 5_000, "sha256"),
    *("float32", "object", "U5", "f4,f4", "(2,)f4", "(1", "M8[ns]", "void64", "int4"),
    *([], {}, [[]], [None], [-1], [2**40, 2**40], [0], [True], [1.5], [0, 2**63], [5, 3], ["a"] * 300),
    *({"": 0}, {"a": {"b": {}}}, {"size": 2**62, "xxh3_128": "0"}),
]


def deep(levels: int) -> Any:
    value: Any = 0
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in JSON, from outside in."""
    found: list[tuple[Any, Any]] = []
    keys = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in keys:
        found += [(value, key), *places(inner)]
    return found


def otherwise(value: Any, rng: random.Random) -> Any:
    """JSON with one to three places changed: another value, none, another key, one more."""
    whole = {"": json.loads(json.dumps(value))}
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        container, key = rng.choice(places(whole))
        what = rng.randrange(6)
        if what == 0 and key != "":
            del container[key]
        elif what == 1 and isinstance(container, dict) and key != "":
            container[str(rng.choice(VALUES))] = container.pop(key)
        elif what == 2:
            container[key] = deep(rng.choice([5, 17, 200]))
        elif what == 3 and isinstance(container[key], list):
            container[key] = container[key] * rng.choice([0, 2, 100])
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
    return whole[""]


def bent(content: bytes, rng: random.Random) -> bytes:
    """Bytes with one to four of them flipped, cut out, repeated, moved, or with a word put in."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        at, to = sorted((rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)))
        what = rng.randrange(7)
        if what == 0:
            content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
        elif what == 1:
            content = (
                content[:at]
                + bytes([byte ^ (1 << rng.randrange(8)) for byte in content[at : at + 1]])
                + content[at + 1 :]
            )
        elif what == 2:
            content = content[:at]
        elif what == 3:
            content = content[:at] + content[to:]
        elif what == 4:
            content = content[:to] + content[at:]
        else:
            content = content[:at] + rng.choice(WORDS) + content[min(to, at + rng.choice([0, 1, 4, 16])) :]
    return content


def twice(text: str, rng: random.Random) -> str:
    """JSON in which a key of the outermost object stands there twice."""
    return text.replace("{", f'{{"{rng.choice(["step", "model", "weight_map", "a", "files"])}": 0, ', 1)


def changed(content: bytes, rng: random.Random, sign: Callable[[Any], Any] = lambda value: value) -> bytes:
    """A JSON file changed as text or as a value; `sign` gives a value the checksum that belongs to it."""
    if rng.random() < 0.4:
        return bent(content, rng)
    value = otherwise(json.loads(content), rng)
    text = json.dumps(sign(value), ensure_ascii=rng.random() < 0.8)
    text = twice(text, rng) if rng.random() < 0.05 and "{" in text else text
    return text.encode("utf-8", "surrogatepass")
