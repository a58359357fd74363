"""Generative models in JAX, written once for one device, that scale without being rewritten.

Importing `artifex` imports no JAX: `--help`, configuration errors and model listings answer at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from artifex.training.restore import restore as restore

__version__ = "0.1.0"
__all__ = ["restore"]


def __getattr__(name: str) -> Any:
    """`artifex.restore`, which needs JAX, is imported when it is first asked for."""
    if name == "restore":
        from artifex.training.restore import restore

        return restore
    raise AttributeError(f"module 'artifex' has no attribute {name!r}")
