"""A closer look at a spread: its step traced and estimated, once, in processes of their own where there are several."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import importlib
import itertools
import multiprocessing
from collections.abc import Iterable, Iterator
from typing import Any

from artifex.scaling.autodist.cluster import Cluster
from artifex.scaling.autodist.config import AutoDistConfig
from artifex.scaling.autodist.estimate import Coefficients, Estimate, estimate
from artifex.scaling.autodist.sketch import Guess
from artifex.scaling.autodist.spread import Spread
from artifex.scaling.autodist.subject import Subject
from artifex.scaling.execution import Platform

CUDNN = 91_000
"""The version that is assumed, 9.10."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A spread with what it was estimated to take, and by the quick guess."""

    spread: Spread
    estimate: Estimate
    guess: Guess | None = None


class Look:
    """Traces and estimates a spread, once."""

    def __init__(
        self, subject: Subject, cluster: Cluster, platform: Platform, coefficients: Coefficients | None = None
    ) -> None:
        self.subject, self.cluster, self.coefficients = subject, cluster, coefficients
        self.platform: Platform = platform
        self.known: dict[Spread, Estimate] = {}

    def __call__(self, spread: Spread) -> Estimate:
        if spread not in self.known:
            with cudnn_assumed():
                traced = self.subject.traced(spread, self.platform)
            self.known[spread] = estimate(traced, self.cluster, coefficients=self.coefficients)
        return self.known[spread]

    def ahead(self, guessed: Iterable[tuple[Guess, Spread]], nproc: int) -> Iterator[tuple[Guess, Spread]]:
        """The same in the same order; with several processes they estimate the next ones while they wait."""
        if nproc < 2:
            yield from guessed
            return
        how = (self.subject, self.cluster, self.platform, self.coefficients)
        context = multiprocessing.get_context("spawn")  # JAX has threads, which a fork would lose
        with concurrent.futures.ProcessPoolExecutor(nproc, context, _begin, how) as pool:
            coming = iter(guessed)
            waiting: collections.deque[tuple[Guess, Spread, Any]] = collections.deque()
            while True:
                for guess, spread in itertools.islice(coming, 2 * nproc - len(waiting)):
                    waiting.append((guess, spread, pool.submit(_estimated, spread)))
                if not waiting:
                    return
                guess, spread, answer = waiting.popleft()
                if (found := answer.result()) is not None:
                    self.known[spread] = found
                try:
                    yield guess, spread
                except GeneratorExit:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

    def or_none(self, spread: Spread) -> Estimate | None:
        """The estimate, None where the spread does not fit."""
        try:
            return self(spread)
        except ValueError:
            return None


@contextlib.contextmanager
def cudnn_assumed() -> Iterator[None]:
    """Trace attention for GPUs where cuDNN is not installed: JAX asks for its version, though it compiles nothing."""
    fused: Any = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    before = fused.check_cudnn_version
    fused.check_cudnn_version = lambda: before() if fused.cuda_versions is not None else CUDNN
    try:
        yield
    finally:
        fused.check_cudnn_version = before


_LOOK: list[Look] = []  # of a process that estimates for another


def _begin(*how: Any) -> None:
    _LOOK.append(Look(*how))


def _estimated(spread: Spread) -> Estimate | None:
    return _LOOK[0].or_none(spread)


def platform_of(cluster: Cluster) -> Platform:
    """That of its devices."""
    name = cluster.hardware.name.split(":")[0]
    return name if name in ("cpu", "gpu", "tpu") else "gpu"  # pyright: ignore[reportReturnType]


def coefficients_of(config: AutoDistConfig) -> Coefficients | None:
    """nnScaler's coefficients, those that are given."""
    given = config.model_fields_set
    found = Coefficients(
        None if config.opt_resident_coef is None else float(config.opt_resident_coef),
        None if config.opt_transient_coef is None else float(config.opt_transient_coef),
        float(config.transient_mem_coef) if "transient_mem_coef" in given else None,
    )
    return None if found == Coefficients() else found
