"""Generative models in JAX, written once for one device, that scale without being rewritten.

Importing `artifex` imports no JAX: `--help`, configuration errors and model listings answer at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from artifex.profiling import profile as profile
    from artifex.training.restore import restore as restore
    from artifex.tuning.tuner import auto_tune as auto_tune

__version__ = "0.1.0"
__all__ = ["auto_tune", "profile", "restore"]


def __getattr__(name: str) -> Any:
    """What needs JAX is imported when it is first asked for."""
    if name == "restore":
        from artifex.training.restore import restore

        return restore
    if name == "auto_tune":
        from artifex.tuning.tuner import auto_tune

        return auto_tune
    if name == "profile":
        from artifex.profiling import profile

        return profile
    raise AttributeError(f"module 'artifex' has no attribute {name!r}")
