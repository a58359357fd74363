"""What every module of the zoo is: an `nnx.Module` whose work bears its name in compiled programs."""

from __future__ import annotations

import inspect
from typing import Any

import jax
from flax import nnx


class Module(nnx.Module):
    """An `nnx.Module` whose public methods are scopes, by the name of the class: `jit(step)/jvp(Decoder)/Block/Linear`.

    XLA keeps the scope of each operation, so a profile can say which module took the time and what holds the memory. A
    scope changes names alone, no operation.
    """

    def __init_subclass__(cls, **how: Any) -> None:
        super().__init_subclass__(**how)
        for name, method in list(vars(cls).items()):
            if inspect.isfunction(method) and (name == "__call__" or not name.startswith("_")):
                setattr(cls, name, jax.named_scope(cls.__name__)(method))
