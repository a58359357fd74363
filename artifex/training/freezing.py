"""Parameters that a run leaves as they are, chosen by patterns of their paths, and trees split along that choice.

A frozen parameter stays where it is in the model's canonical tree. It gets no gradient, no optimizer state and no
weight decay, and the backward pass ends where nothing that is trained lies before it.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

Tree = Any  # nested dicts


def frozen_paths(paths: Iterable[str], patterns: Iterable[str]) -> frozenset[str]:
    """The `paths` ("embed/table") that match one of the shell `patterns` ("embed/*"), in which * also spans "/".

    Raises `ValueError` for a pattern that matches nothing, with the nearest path, and where nothing is left to train.
    """
    known = list(paths)
    frozen = matching(known, patterns, "training.freeze")
    if frozen.issuperset(known):
        raise ValueError(f"training.freeze matches all {len(known)} parameters, and nothing is left to train")
    return frozen


def matching(paths: Iterable[str], patterns: Iterable[str], setting: str) -> frozenset[str]:
    """The `paths` that match one of the shell `patterns`. Raises `ValueError` for a pattern that matches nothing, with
    the nearest path and the `setting` it is from."""
    known, found = list(paths), set()
    for pattern in patterns:
        matched = fnmatch.filter(known, pattern)
        if not matched:
            raise ValueError(f"{setting} {pattern!r} matches no parameter; {_nearest(pattern, known)}")
        found |= set(matched)
    return frozenset(found)


def split(tree: Tree, frozen: frozenset[str], under: str = "") -> tuple[Tree, Tree]:
    """What of a tree is trained, and what is frozen, each without the branches that are empty."""
    if not frozen:
        return tree, {}
    trained, held = {}, {}
    for key, node in tree.items():
        path = f"{under}{key}"
        if isinstance(node, Mapping):
            parts = split(node, frozen, f"{path}/")
        else:
            parts = ({}, node) if path in frozen else (node, {})
        for side, part in zip((trained, held), parts, strict=True):
            if not (isinstance(part, Mapping) and not part):
                side[key] = part
    return trained, held


def join(trained: Tree, held: Tree) -> Tree:
    """The whole tree again, the inverse of `split`; a leaf that both have is that of `held`."""
    if not held:
        return trained
    joined = dict(trained)
    for key, node in held.items():
        joined[key] = join(joined[key], node) if key in joined and isinstance(node, Mapping) else node
    return joined


def _nearest(pattern: str, paths: list[str]) -> str:
    ends = [path.rsplit("/", depth)[0] for path in paths for depth in range(1, path.count("/") + 1)]
    wanted = [*paths, *(f"{end}/*" for end in dict.fromkeys(ends))]
    near = difflib.get_close_matches(pattern, wanted, n=1, cutoff=0.5)
    return (
        f"did you mean {near[0]!r}?"
        if near
        else f"there are {', '.join(dict.fromkeys(p.split('/')[0] for p in paths))}"
    )
