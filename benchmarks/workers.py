"""Each variant in a process of its own, all of them warm, timed one at a time: what one leaves running slows no other.

Within one process PyTorch's threads take the cores from what is timed next: DiT's "ours / bare JAX" came out as 1.26 to
1.46 beside PyTorch, as 1.03 without it.

A worker builds its call, runs it until everything is compiled, says what it computed and then waits on its pipe, which
takes no core. The parent asks one worker at a time for one call, in an order that moves on by one from round to round.
A worker may run by another Python than its parent, say of an environment that has PyTorch.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAUSE = 0.2  # seconds before each turn: threads of JAX and PyTorch were seen to spin for up to 20 ms after a call
WARMUP = 2  # calls: the first compiles for the arrays it is given, the second for those that the first returned

# all workers hold their arrays on one accelerator at a time; by default JAX takes three quarters of it for the first
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # what compiling takes is measured


class Built(NamedTuple):
    """A call, which may return JAX arrays that are waited for, and what it computes at the common parameters."""

    call: Callable[[], Any]
    computed: dict[str, Any]


class Variant(NamedTuple):
    """What a worker runs: `build(*args)`, a function of a module's top level, by the package of the checkout `root`,
    in an environment that has `environment` besides."""

    build: Callable[..., Built]
    args: tuple[Any, ...]
    root: Path = ROOT
    python: str = sys.executable
    environment: Mapping[str, str] = {}


class Worker(NamedTuple):
    """A process that is warm and waits; `first`: seconds of its first call, which compiles what is compiled; `memory`:
    the most bytes that it took of a GPU."""

    name: str
    pipe: Connection
    computed: dict[str, Any]
    first: float
    memory: int | None


@contextlib.contextmanager
def started(variants: Mapping[str, Variant], failed: dict[str, str] | None = None) -> Iterator[list[Worker]]:
    """A warm worker for each variant, one built after the other.

    Where one ends before that, its name and the reason go to `failed`; without it this raises `RuntimeError`.
    """
    with contextlib.ExitStack() as stack:
        workers = []
        for name, variant in variants.items():
            try:
                workers.append(_start(stack, name, variant))
            except RuntimeError as error:
                if failed is None:
                    raise
                failed[name] = str(error)
        yield workers


def _start(stack: contextlib.ExitStack, name: str, variant: Variant) -> Worker:
    from artifex import host_memory  # whoever only reads what was measured needs no package

    here, there = multiprocessing.Pipe()
    path = [str(variant.root), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    command = [variant.python, str(Path(__file__).resolve()), str(there.fileno())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    environment |= {**host_memory.environment(), **variant.environment}
    process = subprocess.Popen(command, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, env=environment)
    there.close()
    stack.callback(_end, process)
    stack.callback(here.close)  # called first: a worker ends when its pipe does
    try:
        here.send((str(variant.root), inspect.getfile(variant.build), variant.build.__name__))
        here.send(variant.args)
        answer = here.recv()
    except (EOFError, OSError):
        raise RuntimeError(f"{name!r} ended before it was warm (exit code {process.wait()})") from None
    if isinstance(answer, str):
        raise RuntimeError(f"{name!r} ended before it was warm: {answer}")
    return Worker(name, here, *answer)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:  # in the midst of a compilation
        process.kill()
        process.wait()


def in_turn(workers: Sequence[Worker], rounds: int, failed: dict[str, str] | None = None) -> dict[str, list[float]]:
    """Seconds of one call of each worker in each round, each just after another call of the same worker.

    Ctrl-C ends it after the rounds that are whole. A worker that ends goes to `failed`, and its times with it.
    """
    seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
    alive = list(workers)
    with contextlib.suppress(KeyboardInterrupt):
        for index in range(rounds):
            first = index % max(1, len(alive))
            for worker in [*alive[first:], *alive[:first]]:
                time.sleep(PAUSE)
                try:
                    worker.pipe.send(True)
                    seconds[worker.name].append(worker.pipe.recv())
                except (EOFError, OSError):
                    if failed is None:
                        raise
                    failed[worker.name] = f"{worker.name!r} ended in round {index + 1}"
                    alive.remove(worker)
    kept = {worker.name: seconds[worker.name] for worker in alive}
    whole = min(map(len, kept.values()), default=0)
    return {name: times[:whole] for name, times in kept.items()}


def _serve(pipe: Connection) -> None:
    """What a worker does until its pipe ends."""
    root, file, name = pipe.recv()
    import jax

    import artifex

    found = Path(str(artifex.__file__)).resolve().parents[1]
    if str(found) != root:
        raise ImportError(f"artifex comes from {found}, not from {root}; is that the root of a checkout?")
    sys.path.insert(0, str(Path(file).parent))
    built = getattr(importlib.import_module(Path(file).stem), name)(*pipe.recv())
    seconds = []
    for _ in range(WARMUP):
        seconds.append(timed(lambda: jax.block_until_ready(built.call())))
    pipe.send((built.computed, seconds[0], most_memory()))
    with contextlib.suppress(EOFError):
        while pipe.recv():
            jax.block_until_ready(built.call())  # not timed: brings back what the others pushed out of the caches
            pipe.send(timed(lambda: jax.block_until_ready(built.call())))


def most_memory() -> int | None:
    """Bytes that this process took of its GPU at most, by PyTorch where that is at work, or by JAX."""
    torch, jax = sys.modules.get("torch"), sys.modules["jax"]
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends the pipe
    pipe = Connection(int(sys.argv[1]))
    try:
        _serve(pipe)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        with contextlib.suppress(OSError):
            pipe.send(f"{type(error).__name__}: {first[:300]}")
        raise


if __name__ == "__main__":
    _main()
