"""Generative models in JAX, written once for one device, that scale without being rewritten.

Importing `artifex` imports no JAX: `--help`, configuration errors and model listings answer at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from artifex.profiling import profile as profile
    from artifex.training.restore import restore as restore

__version__ = "0.1.0"
__all__ = ["profile", "restore"]


def __getattr__(name: str) -> Any:
    """`artifex.restore` and `artifex.profile`, which need JAX, are imported when they are first asked for."""
    if name == "restore":
        from artifex.training.restore import restore

        return restore
    if name == "profile":
        from artifex.profiling import profile

        return profile
    raise AttributeError(f"module 'artifex' has no attribute {name!r}")
