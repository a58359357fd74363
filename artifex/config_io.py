"""Strict reading of JSON and YAML files that nobody vouches for, and the one-line error that answers a bad one.

Of PyYAML only the event parser and the emitter are used: nothing here can construct an object, follow an include or
expand an alias.
"""

from __future__ import annotations

import difflib
import json
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from artifex.config_aliases import MEANT

MAX_BYTES = 65_536  # of a file: a configuration has some 2,000, and PyYAML parses 140,000 a second at worst
MAX_DEPTH = 16  # of nesting: a configuration has 3
SUFFIXES = (".json", ".yaml", ".yml")

_INT = re.compile(r"[-+]?[0-9]{1,19}")  # longer ones read as floats: int() of a hostile number takes quadratic time
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_WORDS |= dict.fromkeys(("", "~", "null", "Null", "NULL"))


class ConfigError(ValueError):
    """A configuration that cannot be used, in one line: `SOURCE: key.path SAYS`.

    `says` goes on where the key path ends: "must be positive, got -1". `source` is a file or "command line".
    """

    def __init__(self, says: str, key: tuple[str, ...] = (), source: str = "") -> None:
        self.says, self.key, self.source = says, key, source
        path = ".".join(part if len(part) <= 60 else f"{part[:57]}..." for part in key)
        line = " ".join(word for word in (f"{source}:" if source else "", path, says) if word)
        super().__init__(one_line(line))

    def within(self, *outer: str, source: str = "") -> ConfigError:
        """The same error, of the same type, seen from outside: with a longer key path, or with its source. What a file
        that another names was blamed for stays its fault."""
        return self if self.source else type(self)(self.says, (*outer, *self.key), source)


class ConfigTypeError(ConfigError, TypeError):
    """A value of the wrong type. Caught by `except TypeError` and by `except ValueError`."""


def one_line(text: str) -> str:
    """`text` with everything that a terminal would not print as itself, line breaks included, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
shown = _short.repr
"""A value's `repr`, shortened so that it fits an error message."""


def nearest(word: str, known: Collection[str]) -> str | None:
    """The member of `known` most like `word`: what other programs call so, or by the last part of a path, or by the
    whole; None where none is near. Hyphens are underscores."""
    plain = {name.replace("-", "_"): name for name in known}
    last = word.rpartition(".")[2].replace("-", "_")
    meant = MEANT.get(word.replace("-", "_"), MEANT.get(last, ""))
    if found := plain.get(meant) or plain.get(meant.rpartition(".")[2]):
        return found
    by_last = {name.rpartition(".")[2]: name for name in reversed(list(known))}
    last = word.rpartition(".")[2]
    if last in by_last:
        return by_last[last]
    for names, wanted in (({name: name for name in known}, word), (by_last, last)):
        if found := difflib.get_close_matches(wanted, names, n=1):
            return names[found[0]]
    return None


def did_you_mean(word: str, known: Collection[str]) -> str:
    """The remedy for an unknown word: the nearest of `known`, else all of them, without the paths below one of them."""
    if near := nearest(word, known):
        return f"did you mean {near}?"
    top = [name for name in known if "." not in name or name.partition(".")[0] not in known]
    return f"known are {', '.join(top)}"


def scalar(text: str) -> Any:
    """The value of a plain YAML 1.2 scalar: null, true, 3, 1e-3, or the text itself (so `no` and `on` are words)."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return float(text.replace(".", "")) if _SPECIAL.fullmatch(text) else text


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping that a `.json`, `.yaml` or `.yml` file holds: plain values, unique string keys.

    Raises `ConfigError` naming the file for anything else. Numbers that are not finite pass; the fields refuse them.
    """
    path = Path(path)
    try:
        text = _text(path)
        values = _json(text) if path.suffix == ".json" else _yaml(text)
        if not isinstance(values, dict):
            raise ConfigTypeError(f"must hold a mapping of sections, got {shown(values)}")
    except ConfigError as error:
        raise error.within(source=str(path)) from None
    return values


def write_mapping(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write what `read_mapping` reads back. Raises `ConfigError` for a suffix it does not know."""
    path = Path(path)
    _check_suffix(path)
    text = f"{json.dumps(values, indent=2)}\n" if path.suffix == ".json" else dump_yaml(values)
    path.write_text(text, encoding="utf-8")


def dump_yaml(values: Mapping[str, Any]) -> str:
    """`values` as YAML that 1.1 and 1.2 readers understand alike, keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """Lists and tuples on one line, no anchors, and quotes where YAML 1.1 or 1.2 would take text for a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _sequence in (list, tuple):
    _Dumper.add_representer(_sequence, lambda d, v: d.represent_sequence("tag:yaml.org,2002:seq", v, flow_style=True))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{_FLOAT.pattern})$"), list("-+.0123456789"))


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"a configuration file ends in {', '.join(SUFFIXES)}", source=str(path))


def _text(path: Path) -> str:
    _check_suffix(path)
    try:
        if path.exists() and not path.is_file():  # a pipe would block, a folder has no text
            raise ConfigError("is not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"is larger than {MAX_BYTES} bytes, the most a configuration may have")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from None
    if "\0" in text:
        raise ConfigError("is a binary file: it has a NUL character")
    if not text.strip():
        raise ConfigError("is empty; leave the file away to use the defaults, or give a section")
    return text


def _too_deep(key: tuple[str, ...] = ()) -> ConfigError:
    return ConfigError(f"is nested deeper than {MAX_DEPTH} levels", key[:3])


class _Pairs(list):
    """A JSON object as (key, value) pairs, in which a key given twice is still seen."""


def _json(text: str) -> Any:
    depth = 0
    for bracket in re.findall(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', text, re.DOTALL):  # strings are matched to be skipped
        depth += (bracket in ("[", "{")) - (bracket in ("]", "}"))
        if depth > MAX_DEPTH:
            raise _too_deep()
    try:
        return _unique(json.loads(text, object_pairs_hook=_Pairs, parse_int=scalar), ())
    except json.JSONDecodeError as error:
        raise ConfigError(f"is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None


def _unique(value: Any, key: tuple[str, ...]) -> Any:
    if isinstance(value, _Pairs):
        mapping: dict[str, Any] = {}
        for name, item in value:
            _check_new(name, mapping, key)
            mapping[name] = _unique(item, (*key, name))
        return mapping
    return [_unique(item, (*key, str(i))) for i, item in enumerate(value)] if isinstance(value, list) else value


def _check_new(name: str, mapping: Mapping[str, Any], key: tuple[str, ...]) -> None:
    if name in mapping:
        raise ConfigError("is given twice; keep one of them", (*key, name))


def _yaml(text: str) -> Any:
    try:
        events = yaml.parse(text, Loader=yaml.SafeLoader)
        next(events)  # the stream's start
        if isinstance(next(events), yaml.StreamEndEvent):
            return None
        value = _build(next(events), events, ())
        next(events)  # the document's end
        if not isinstance(next(events), yaml.StreamEndEvent):
            raise ConfigError("holds more than one YAML document; keep one")
        return value
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"is not valid YAML: {error.problem}{where}") from None
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: PyYAML on "\\UFFFFFFFF" and the like
        raise ConfigError(f"is not valid YAML: {' '.join(str(error).split())}") from None


def _build(event: yaml.Event, events: Iterator[yaml.Event], key: tuple[str, ...]) -> Any:
    """The value that `event` opens, reading on from `events`."""
    _check_plain(event, key)
    if len(key) > MAX_DEPTH:
        raise _too_deep(key)
    if isinstance(event, yaml.ScalarEvent):
        return event.value if event.style else scalar(event.value)
    if isinstance(event, yaml.SequenceStartEvent):
        items: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(_build(event, events, (*key, str(len(items)))))
        return items
    mapping: dict[str, Any] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        _check_plain(event, key)
        if not isinstance(event, yaml.ScalarEvent):
            raise ConfigError(
                f"has a list or mapping as a key at line {event.start_mark.line + 1}; keys are words", key
            )
        _check_new(event.value, mapping, key)
        mapping[event.value] = _build(next(events), events, (*key, event.value))
    return mapping


def _check_plain(event: Any, key: tuple[str, ...]) -> None:
    line = event.start_mark.line + 1
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        raise ConfigError(
            f"has a YAML anchor or alias ({shown(event.anchor)}) at line {line}; write the value out", key
        )
    if event.tag is not None:
        raise ConfigError(f"has a YAML tag ({shown(event.tag)}) at line {line}; plain values only", key)
