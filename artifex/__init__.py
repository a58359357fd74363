"""Generative models in JAX, written once for one device, that scale without being rewritten.

Importing `artifex` imports no JAX: `--help`, configuration errors and model listings answer at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from artifex.training.restore import restore as restore
    from artifex.tuning.tuner import auto_tune as auto_tune

__version__ = "0.1.0"
__all__ = ["auto_tune", "restore"]


def __getattr__(name: str) -> Any:
    """`artifex.restore` and `artifex.auto_tune`, which need JAX, are imported when they are first asked for."""
    if name == "restore":
        from artifex.training.restore import restore

        return restore
    if name == "auto_tune":
        from artifex.tuning.tuner import auto_tune

        return auto_tune
    raise AttributeError(f"module 'artifex' has no attribute {name!r}")
