"""Several processes as one run: how they find each other, which of them writes, and what they tell each other.

Every process runs the same program on its own devices; what concerns all is told over the key-value store of JAX's
coordinator, which needs no device. That one is lost shows on lines of our own (`lives`). With one process every
function here is the plain answer. Importing this imports no JAX.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, ParamSpec

from artifex.scaling import compiler_log, lives
from artifex.scaling.roll_call import address, on_loopback, roll_call
from artifex.scaling.unbroken import way_to

LONG = 30 * 24 * 3600  # seconds; that a process is lost is found by `lives` long before
GRACE = 2.0  # seconds that a process has to end by an error of its own before that of another ends it
CLOSING = 3.0  # seconds that may be spent on what is done last, where a lost process may have taken a disk along
_FAILED = "artifex/failed"
before_exit: list[Callable[[], None]] = []  # what is done before a process ends without Python's own end
what_stays: list[Callable[[], str]] = []  # what is told of the work that is kept when a process was lost
Given = ParamSpec("Given")
_leaving = threading.Event()
_lives: lives.Lives | None = None
_words = itertools.count()  # alike in all processes, for all ask the same in the same order


@dataclasses.dataclass(frozen=True)
class Start:
    """How a process finds the others of its run. Settings of the start and not of the run: no configuration has them,
    because they differ from process to process."""

    distributed: Literal["auto", "on", "off"] = (
        "auto"  # several processes: where JAX detects a cluster, always, or never
    )
    coordinator: str | None = None  # host:port of process 0, at which all meet; with processes and process-id
    processes: int | None = None  # how many there are
    process_id: int | None = None  # which of them this is, from 0
    wait: int = 300  # seconds that processes wait for each other to start
    lost_after: int = 60  # seconds without a sign of life after which a process is lost; at least 3
    stuck_after: int = 600  # seconds at one place after which the process that is behind is lost, though it lives

    def __post_init__(self) -> None:
        by_hand = {"coordinator": self.coordinator, "processes": self.processes, "process-id": self.process_id}
        given = [name for name, value in by_hand.items() if value is not None]
        if self.distributed not in ("auto", "on", "off"):
            raise ValueError(f"--device.distributed must be auto, on or off, got {self.distributed!r}")
        if given and len(given) < 3:
            missing = " and ".join(f"--device.{name}" for name in by_hand if name not in given)
            raise ValueError(f"--device.{given[0]} says only a part of how processes meet; give {missing} as well")
        if given and self.distributed == "off":
            raise ValueError("--device.distributed is off beside --device.coordinator; leave one of them out")
        if self.processes is not None and self.process_id is not None and not 0 <= self.process_id < self.processes:
            raise ValueError(
                f"--device.process-id is {self.process_id}, but --device.processes is {self.processes}; they are "
                f"numbered 0 to {max(self.processes, 1) - 1}"
            )
        if self.wait < 1:
            raise ValueError(f"--device.wait is {self.wait}; give at least 1 second")
        if self.lost_after < 3:  # a sign of life comes every second
            raise ValueError(f"--device.lost-after is {self.lost_after}; give at least 3 seconds")
        if self.stuck_after < self.lost_after:
            raise ValueError(
                f"--device.stuck-after is {self.stuck_after}, below --device.lost-after, {self.lost_after}; give more "
                "than the longest step takes"
            )
        if self.coordinator is not None:
            try:
                address(self.coordinator)
            except ValueError as error:
                raise ValueError(f"--device.{error}") from None


def start(how: Start, asks: Mapping[str, Any]) -> None:
    """Make this process one of its run, before anything else uses JAX; return at once where it is the only one.

    `asks` is what the process was asked for, JSON values by name, and must be alike on all. Raises `ValueError` within
    the wait, on every process that came, where some do not come or were asked for something else. From then on a
    process that is lost ends this one, by a sentence that names it and with code 1.
    """
    global _lives
    by_hand = how.coordinator is not None
    coordinator, processes, process_id = (how.coordinator, how.processes, how.process_id) if by_hand else _detected(how)
    if coordinator is None or processes is None or process_id is None or processes == 1:
        return
    met = roll_call(coordinator, processes, process_id, {**asks, "artifex-code": _code()}, how.wait)
    _lives = lives.Lives(process_id, met.lines, met.hosts, how.lost_after, _end_by_loss, how.stuck_after)
    before_exit.append(_lives.leave)
    atexit.register(_lives.leave)  # before JAX's own, so that it comes after that
    import jax

    # gloo's collectives and programs that are dispatched ahead share threads: after a hundred steps both stand still
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # it takes SIGTERM away from Python, and with it the save that a signal asks for
    jax.config.update("jax_enable_preemption_service", False)
    host, port = address(coordinator)
    if process_id != 0:
        coordinator = way_to(host, port)
    jax.distributed.initialize(
        coordinator,
        processes,
        process_id,
        cluster_detection_method="deactivate" if by_hand else None,
        initialization_timeout=max(how.wait, 60),  # all were there, and import JAX at different speeds
        coordinator_bind_address=f"{host}:{port}" if on_loopback(host) else None,
        heartbeat_timeout_seconds=LONG,
    )
    if jax.default_backend() == "cpu":
        _let_gloo_talk_to_nobody()


def _detected(how: Start) -> tuple[str | None, int | None, int | None]:
    """The address of process 0, the number of processes and the number of this one, as JAX finds them in what SLURM,
    OpenMPI, Kubernetes or a TPU pod says; None of each where it finds none of these."""
    if how.distributed == "off":
        return None, None, None
    # JAX says so only while it initialises, which ends the process where a peer does not come
    from jax._src.clusters import ClusterEnv

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, how.wait
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(
            f"JAX detects a cluster here and cannot read it: {error}; give --device.coordinator, --device.processes "
            "and --device.process-id, or --device.distributed off to train in this process alone"
        ) from error
    if None in found[:3] and (how.distributed == "on" or found[:3] != (None, None, None)):
        on = "--device.distributed is on" if how.distributed == "on" else "JAX_COORDINATOR_ADDRESS is set"
        raise ValueError(
            f"{on}, but JAX detects neither SLURM, OpenMPI, Kubernetes nor a TPU pod; give --device.coordinator, "
            "--device.processes and --device.process-id"
        )
    return found[:3]


def stands(what: str | None, step: int = 0, *, known: bool = True) -> None:
    """Note where the main thread is: what it does at a step, by the words of `lives`; None, or before it is `known`
    how long that takes: where any time may pass."""
    if _lives is not None:
        _lives.place = 0 if what is None or not known else lives.place_of(what, step, waits=False)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Within it the main thread waits for the others, wherever it stands."""
    if _lives is None or not (place := _lives.place) or threading.current_thread() is not threading.main_thread():
        yield
        return
    _lives.place = place | 1
    try:
        yield
    finally:
        _lives.place = place


def waits_for_others() -> bool:
    """Whether the main thread waits for other processes, and not for what this one does."""
    return _lives is not None and bool(_lives.place & 1)


def count() -> int:
    """How many processes the run has."""
    import jax

    return jax.process_count()


def index() -> int:
    """Which of them this one is, from 0."""
    import jax

    return jax.process_index()


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    import jax

    return jax.process_index() == 0


def all_say(value: Any) -> list[Any]:
    """What each process says, a JSON value, in their order; None is to say nothing, and costs no process anything.
    Returns when all have come to this."""
    import jax

    if jax.process_count() == 1:
        return [value]
    store, word = key_value_store(), f"artifex/{next(_words)}/"
    if value is not None:
        store.key_value_set(f"{word}{jax.process_index()}", json.dumps(value))
    with waiting():
        store.wait_at_barrier("artifex/said", LONG * 1000)
        said = {key: json.loads(text) for key, text in store.key_value_dir_get(word)}
        store.wait_at_barrier("artifex/heard", LONG * 1000)
    if value is not None:
        store.key_value_delete(f"{word}{jax.process_index()}")
    return [said.get(f"{word}{process}") for process in range(jax.process_count())]


def first_says(value: Any) -> Any:
    """What process 0 says, on all: for what is read from a file system, where two may see different things."""
    return all_say(value if is_first() else None)[0]


def check_alike(what: str, value: str) -> None:
    """Raise `ValueError` on every process where `value` is not the same on all."""
    for process, other in enumerate(said := all_say(value)):
        if other != said[0]:
            raise ValueError(
                f"process {process} has another {what} than process 0: {other} there and {said[0]} here; give all the "
                "same"
            )


def by_first(function: Callable[Given, None]) -> Callable[Given, None]:
    """`function` on the process that writes and prints; on the others nothing. For what takes part in no collective."""

    @functools.wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> None:
        if is_first():
            function(*args, **kwargs)

    return call


def fetched(array: Any) -> Any:
    """An array on the host of every process, as `numpy.asarray` of one that is within reach."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Within it, a process that ends by an error ends the others, each with a line that names it; one that comes to its
    end waits for the others.

    Without it the others would wait for its part of the next collective, for as long as JAX waits for heartbeats.
    """
    if "jax" not in sys.modules or count() == 1:  # what `start` left alone
        yield
        return
    watch = threading.Thread(target=_watch, name="processes", daemon=True)
    watch.start()
    try:
        yield
    except BaseException as error:
        if not getattr(error, "together", False):
            _leave(error)
        raise
    finally:  # all are here, and none has failed
        all_say(None)
        if is_first():
            key_value_store().key_value_set(_FAILED, "null")
        watch.join()


def tell_of_signal(said: str, code: int) -> None:
    """Tell the others, from any thread, that this process is about to end by a signal: they end with `code`, each with
    a line that says so. With one process nothing."""
    if "jax" not in sys.modules:
        return
    from jax._src import distributed

    state = distributed.global_state  # asks no device, which the main thread may be waiting for
    if state.client is None or state.num_processes in (None, 1):
        return
    with contextlib.suppress(RuntimeError):  # another was faster
        state.client.key_value_set(_FAILED, json.dumps([state.process_id, said, code]))
        time.sleep(GRACE + 1 if state.process_id == 0 else 0)  # as in `_leave`


def _leave(error: BaseException) -> None:
    """End this process by `error`, after the others were told."""
    import jax

    _leaving.set()
    if not isinstance(error, SystemExit) and _lives is not None and _lives.lost.wait(GRACE):
        time.sleep(LONG)  # it is what comes of a loss: the thread that found that out ends this process
    code = error.code if isinstance(error, SystemExit) else 1
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
    said = str(error.__context__ or type(error).__name__) if isinstance(error, SystemExit) else repr(error)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was faster
        key_value_store().key_value_set(_FAILED, json.dumps([jax.process_index(), " ".join(said.split()), code]))
    # the coordinator goes last: without it JAX ends the others by a stack dump
    time.sleep(GRACE + 1 if is_first() else GRACE / 2)
    _exit(code if isinstance(code, int) else 1)


def _watch() -> None:
    """End this process when another says that it failed, once it had time to end by itself."""
    import jax

    failed = json.loads(key_value_store().blocking_key_value_get(_FAILED, LONG * 1000))
    if failed is None or failed[0] == jax.process_index():
        return
    process, said, code = failed
    if _leaving.wait(GRACE):  # ends by an error of its own
        return
    print(f"error: process {process} has ended: {said}", file=sys.stderr)
    time.sleep(is_first())  # as in `_leave`
    _exit(code)


def _end_by_loss(said: str) -> None:
    """End this process, which cannot go on without another. For the thread that found out: the main one may wait in a
    collective."""
    words: list[str] = [said]
    _within(CLOSING, lambda: words.extend(stay() for stay in [*what_stays]))
    words.append(f"start all processes again, this one by: {shlex.join(sys.orig_argv)}")
    with contextlib.suppress(OSError):  # by descriptor, as in `signals`
        compiler_log.pass_on()
        if os.isatty(2):
            os.write(2, b"\r\x1b[K\x1b[?25h")
        os.write(2, f"error: {'; '.join(words)}\n".encode())
    for last in [*before_exit]:
        _within(CLOSING, last)
    os._exit(1)


def _within(seconds: float, function: Callable[[], None]) -> None:
    """Do something, or leave it after so many seconds."""
    doing = threading.Thread(target=function, daemon=True)
    doing.start()
    doing.join(seconds)


def _code() -> str:
    """A digest of this package's sources: of one version there may be several."""
    found = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()[:12]


def _let_gloo_talk_to_nobody() -> None:
    """Send to nowhere what native code prints, such as gloo's line for each group of devices that meets; what Python
    prints goes where it went."""
    sys.stdout.flush()
    python = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    sys.stdout = os.fdopen(python, "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors)


def _exit(code: int) -> None:
    # not through Python's end: there JAX waits for processes that will not come, and ends this one by a stack dump
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
        compiler_log.pass_on()
    for last in [*before_exit]:
        last()
    os._exit(code)


def key_value_store() -> Any:
    """The client of the coordinator's key-value store, which JAX keeps to itself; Orbax takes it from here as well."""
    from jax._src import distributed

    return distributed.global_state.client
