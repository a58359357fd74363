"""Each variant in a process of its own, all of them warm, timed one at a time: what one leaves running slows no other.

Within one process PyTorch's threads take the cores from what is timed next: DiT's "ours / bare JAX" came out as 1.26 to
1.46 beside PyTorch, as 1.03 without it.

A worker builds its call, runs it until everything is compiled, says what it computed and then waits on its pipe, which
takes no core. The parent asks one worker at a time for one call, in an order that moves on by one from round to round.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import jax

import artifex

ROOT = Path(__file__).resolve().parents[1]
PAUSE = 0.2  # seconds before each turn: threads of JAX and PyTorch were seen to spin for up to 20 ms after a call
WARMUP = 2  # calls: the first compiles for the arrays it is given, the second for those that the first returned

# all workers hold their arrays on one accelerator at a time; by default JAX takes three quarters of it for the first
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


class Built(NamedTuple):
    """A call, which may return JAX arrays that are waited for, and what it computes at the common parameters."""

    call: Callable[[], Any]
    computed: dict[str, Any]


class Variant(NamedTuple):
    """What a worker runs: `build(*args)`, a function of a module's top level, by the package of the checkout `root`."""

    build: Callable[..., Built]
    args: tuple[Any, ...]
    root: Path = ROOT


class Worker(NamedTuple):
    """A process that is warm and waits."""

    name: str
    pipe: Connection
    computed: dict[str, Any]


@contextlib.contextmanager
def started(variants: Mapping[str, Variant]) -> Iterator[list[Worker]]:
    """A warm worker for each variant, one built after the other. Raises `RuntimeError` where one ends before that."""
    with contextlib.ExitStack() as stack:
        yield [_start(stack, name, variant) for name, variant in variants.items()]


def _start(stack: contextlib.ExitStack, name: str, variant: Variant) -> Worker:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, variant))
    path = sys.path
    sys.path = [str(variant.root), *path]  # a spawned process imports from where its parent would
    try:
        process.start()
    finally:
        sys.path = path
    there.close()
    stack.callback(process.join)
    stack.callback(here.close)  # called first: a worker ends when its pipe does
    try:
        return Worker(name, here, here.recv())
    except EOFError:
        raise RuntimeError(f"{name!r} ended before it was warm; its own error stands above") from None


def _serve(pipe: Connection, variant: Variant) -> None:
    found = Path(str(artifex.__file__)).resolve().parents[1]
    if found != variant.root:
        raise ImportError(f"artifex comes from {found}, not from {variant.root}; is that the root of a checkout?")
    built = variant.build(*variant.args)
    for _ in range(WARMUP):
        jax.block_until_ready(built.call())
    pipe.send(built.computed)
    with contextlib.suppress(EOFError):
        while pipe.recv():
            jax.block_until_ready(built.call())  # not timed: brings back what the others pushed out of the caches
            start = time.perf_counter()
            jax.block_until_ready(built.call())
            pipe.send(time.perf_counter() - start)


def in_turn(workers: Sequence[Worker], rounds: int) -> dict[str, list[float]]:
    """Seconds of one call of each worker in each round, each just after another call of the same worker."""
    seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for index in range(rounds):
        first = index % len(workers)
        for worker in [*workers[first:], *workers[:first]]:
            time.sleep(PAUSE)
            worker.pipe.send(True)
            seconds[worker.name].append(worker.pipe.recv())
    return seconds
