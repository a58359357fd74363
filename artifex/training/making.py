"""A fresh state in the making: XLA compiles its program in a thread while the step is traced and compiled."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from artifex.scaling import processes
from artifex.training.memory import explained

if TYPE_CHECKING:
    from artifex.training.compile_cache import CompileCache
    from artifex.training.state import Blueprint, TrainState

Made = Callable[[], "TrainState"]
"""Waits for the state that a run begins with, and gives it."""


def is_random(blue: Blueprint) -> bool:
    """Whether a fresh state of this blueprint is made by its own program alone, without any file."""
    config = blue.config
    return config.training.start_from is None and getattr(config.model.spec(), "autoencoder", None) is None


def making(blue: Blueprint, programs: CompileCache) -> Made:
    """`blue.init()`, begun. What it raises, whoever waits for it raises: `MemoryError` where it does not fit.

    It is traced here, so that the thread needs Python for nothing that takes long. Several processes make theirs at
    once, in the order of their programs: a thread may change that.
    """
    if processes.count() > 1:
        state = blue.init()
        return lambda: state
    lowered = blue.initializer().lower()

    def make() -> TrainState:
        with programs:
            return lowered.compile()()

    pool = ThreadPoolExecutor(1, thread_name_prefix="initial state")
    state_to_come = pool.submit(make)
    pool.shutdown(wait=False)

    def made() -> TrainState:
        with explained("out of memory while the state was made"):
            return state_to_come.result()

    return made
