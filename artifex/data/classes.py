"""The names of classes: kept as a file beside weights, and looked up by what a user writes."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path

FILE = "classes.json"
LIMIT = 2**24  # bytes


def save_classes(names: Sequence[str], folder: str | os.PathLike[str]) -> None:
    """Write the names, in the order of their numbers, to `classes.json` in `folder`; it appears whole or not at all."""
    path = Path(folder, FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(list(names), ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def load_classes(folder: str | os.PathLike[str], num_classes: int) -> tuple[str, ...]:
    """The names that `save_classes` wrote, or the numbers where there is no such file.

    Raises `ValueError` for a file that holds anything else than `num_classes` names.
    """
    path = Path(folder, FILE)
    if not path.exists():
        return tuple(map(str, range(num_classes)))
    if not path.is_file() or path.stat().st_size > LIMIT:  # a pipe would block
        raise ValueError(f"{path} is no regular file of at most {LIMIT:,} bytes; restore or remove it")
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # neither UTF-8 nor JSON
        raise ValueError(f"{path} is not JSON ({error}); expected a list of names") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) != num_classes:
        raise ValueError(f"{path} is no list of the {num_classes} names of the model's classes; restore or remove it")
    return tuple(names)


def find_class(word: str, names: Sequence[str]) -> int:
    """The number of the class called `word` or, where none is, whose number it is.

    Raises `ValueError` for anything else, with the nearest name.
    """
    if word in names:
        return names.index(word)
    if word.isdecimal() and int(word) < len(names):
        return int(word)
    if word.removeprefix("-").isdecimal():
        raise ValueError(f"label {word} is out of range; the model's classes are 0 to {len(names) - 1}")
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    known = f"known are {', '.join(names[:10])}{', ...' * (len(names) > 10)}"
    raise ValueError(f"label {word!r} is no class of the model: {f'did you mean {near[0]!r}?' if near else known}")
