"""Functions compiled with options of the compiler's own, that still run within other programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer


class Program:
    """`jax.jit(function, **how)`, compiled with such options; within another program it is compiled as that one is.

    JAX refuses options of an inner program. Called, lowered and traced as what `jax.jit` returns.
    """

    def __init__(self, function: Callable, options: Mapping[str, Any] | None, **how: Any) -> None:
        self._within: Any = jax.jit(function, **how)
        self._alone: Any = jax.jit(function, compiler_options=dict(options), **how) if options else self._within

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        within = self._alone is not self._within and _is_traced(args, kwargs)
        return (self._within if within else self._alone)(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """As `jax.stages.Wrapped.lower`, for a program of its own."""
        return self._alone.lower(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """As `jax.stages.Wrapped.trace`, for a program of its own."""
        return self._alone.trace(*args, **kwargs)

    def num_compiled(self) -> int:
        """How many kinds of arguments it was called with, by themselves: each is a program."""
        return self._alone._cache_size()


def _is_traced(*given: Any) -> bool:
    """Whether another program is being traced: by what it is given, or, where that is all known, by a new array."""
    return any(isinstance(leaf, Tracer) for leaf in (*jax.tree.leaves(given), jnp.zeros(())))
