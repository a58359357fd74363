"""A tree of arrays as a checkpoint sees it: by the paths of its leaves, "params/embed/table", not by its classes."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp


def by_path(tree: Any, under: str = "") -> dict[str, Any]:
    """Path -> leaf, in the order of the tree's leaves; each path after `under`.

    Raises `ValueError` for keys that cannot name a file.
    """
    leaves: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [jax.tree_util.keystr((key,), simple=True) for key in keys]
        for name in names:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(
                    f"{'/'.join(names)!r}: the key {name!r} cannot name a file; use letters, digits, _ - ."
                )
        path = "/".join([under, *names] if under else names)
        if path in leaves:
            raise ValueError(f"two leaves of the tree have the path {path!r}; give them different keys")
        leaves[path] = leaf
    return leaves


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts of leaves by path, "params/embed/table"."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def array_folder(path: str) -> str:
    """The folder of an array, by Orbax's own naming."""
    return path.replace("/", ".")


def check_arrays(arrays: dict[str, Any]) -> None:
    """Raise `ValueError` or `TypeError`, naming the leaf, unless a checkpoint can keep `arrays`."""
    if not arrays or "" in arrays:
        raise ValueError("the tree to save has no named leaves; save a dict, dataclass or tuple of arrays")
    folders: dict[str, str] = {}
    for path, x in arrays.items():
        if not isinstance(x, jax.Array):
            raise TypeError(f"{path} is of type {type(x).__name__}; a checkpoint keeps jax.Array: use jnp.asarray")
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            raise TypeError(f"{path} has dtype {x.dtype}; save jax.random.key_data of a key instead")
        if x.size == 0:
            raise ValueError(f"{path} has shape {x.shape} and so no elements; leave it out of the tree")
        twin = folders.setdefault(array_folder(path).casefold(), path)
        if twin != path:
            raise ValueError(f"{twin!r} and {path!r} would share a folder on some file systems; rename one")


def check_target(step: int, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise `ValueError`, with the first leaves that differ, unless `wanted` are the `saved` arrays of `step`."""
    if not wanted:
        raise ValueError(f"nothing of step {step} is asked for: the target has no leaves")
    for path, x in wanted.items():
        if not isinstance(x, jax.Array | jax.ShapeDtypeStruct) or x.sharding is None:
            raise TypeError(f"{path} is asked for by {x!r}; use jax.ShapeDtypeStruct(shape, dtype, sharding=...)")

    def of_saved(path: str) -> str:
        return f"{saved[path]['dtype']}{saved[path]['shape']}" if path in saved else "nothing"

    def of_wanted(path: str) -> str:
        return f"{wanted[path].dtype}{list(wanted[path].shape)}" if path in wanted else "nothing"

    paths = [*wanted, *(path for path in saved if path not in wanted)]
    differing = [path for path in paths if of_saved(path) != of_wanted(path)]
    if differing:
        listed = "; ".join(f"{path}: saved {of_saved(path)}, asked {of_wanted(path)}" for path in differing[:5])
        more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ValueError(
            f"step {step} does not fit, {len(differing)} of {len(paths)} arrays differ: {listed}{more}. "
            "artifex.restore opens a run as it was saved"
        )
