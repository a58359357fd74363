"""Generative models in JAX, written once for one device, that scale without being rewritten.

Importing `artifex` imports no JAX: `--help`, configuration errors and model listings answer at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from artifex import visualize as visualize
    from artifex.profiling import profile as profile
    from artifex.training.restore import restore as restore
    from artifex.tuning.tuner import auto_tune as auto_tune

__version__ = "0.1.0"
__all__ = ["auto_tune", "profile", "restore", "visualize"]


def __getattr__(name: str) -> Any:
    """What needs JAX or matplotlib is imported when it is first asked for."""
    if name == "auto_tune":
        from artifex.tuning.tuner import auto_tune as found
    elif name == "profile":
        from artifex.profiling import profile as found
    elif name == "restore":
        from artifex.training.restore import restore as found
    elif name == "visualize":  # `from artifex import visualize` would ask here again
        found = importlib.import_module("artifex.visualize")
    else:
        raise AttributeError(f"module 'artifex' has no attribute {name!r}")
    return found
