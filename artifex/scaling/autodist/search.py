"""The search: all ways to spread a run guessed at, the most promising traced and estimated, the best ones kept."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import heapq
import itertools
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from artifex.scaling.autodist.cluster import Cluster
from artifex.scaling.autodist.config import AutoDistConfig
from artifex.scaling.autodist.estimate import Coefficients, Estimate, estimate
from artifex.scaling.autodist.limits import Limiting, modules_matching
from artifex.scaling.autodist.sketch import ACTIVATIONS, Basis, Guess, Leaf, Sketch, basis
from artifex.scaling.autodist.solvers import solve
from artifex.scaling.autodist.spread import AXES, Space, Spread, divisors
from artifex.scaling.autodist.subject import Subject
from artifex.scaling.execution import Platform

SLACK = 1.5
"""A guess of so many times the limit may still turn out to fit."""

REMATS = ("none", "dots", "full", "attention=keep", "qkv=keep,attention=keep", "hidden=keep")
Said = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A spread with what it was estimated to take, and by the quick guess."""

    spread: Spread
    estimate: Estimate
    guess: Guess | None = None


@dataclasses.dataclass(frozen=True)
class Found:
    """`best` within the limit, in order; `over` what was looked at and does not fit; how many of each were seen."""

    best: tuple[Candidate, ...]
    over: tuple[Candidate, ...]
    meshes: int
    guessed: int
    refused: tuple[str, ...]
    seconds: float


def search(subject: Subject, cluster: Cluster, config: AutoDistConfig, limiting: Limiting, say: Said) -> Found:
    """The best spreads of `subject` on `cluster`. Raises `ValueError` where no mesh fits model and batch at all."""
    start = time.perf_counter()
    space = space_of(subject, config, cluster)
    look = Look(subject, cluster, platform_of(cluster), coefficients_of(config))
    meshes = [sizes for sizes in space.meshes() if as_asked(sizes, config)]
    if not meshes:
        raise ValueError(no_mesh(subject, config, space))
    sketch = Sketch(
        subject.leaves,
        traced_basis(look, subject, space, meshes),
        cluster,
        subject.rows,
        subject.blocks or 1,
        subject.dtype,
        config.is_train,
    )
    if not sketch.basis.own:
        look(next(space.settings(meshes[0]), Spread(meshes[0])))  # says why, such as a loss that cannot be traced
        raise ValueError(no_mesh(subject, config, space))
    limit = config.memory_bytes
    spreads = [spread for sizes in meshes for spread in space.settings(sizes)]
    refused: dict[str, None] = {}
    rank = ranking(config)
    guessed = Guesses(sketch, space, config, spreads, rank)
    say(f"{len(meshes):,} meshes, {len(spreads):,} with ZeRO and schedules, in {time.perf_counter() - start:.1f} s")
    wanted = config.topk
    fits: list[Candidate] = []
    over: list[Candidate] = []
    for candidate in looked_at(look, limiting, guessed, limit, wanted, refused, config.nproc):
        (fits if limit is None or candidate.estimate.whole <= limit else over).append(candidate)
        if config.verbose:
            say(f"  {candidate.spread}: {candidate.estimate.whole / 2**30:.2f} GiB, {candidate.estimate.seconds:.4g} s")
    if not fits and not over:  # what would need the least, to be told what is missing
        over = list(itertools.islice(filter(None, map(look.candidate, guessed.least())), 1))
    fits.sort(key=lambda one: rank(one.estimate.seconds, one.estimate.whole, one.spread.devices))
    over.sort(key=lambda one: one.estimate.whole)
    took = time.perf_counter() - start
    return Found(tuple(fits[:wanted]), tuple(over), len(meshes), guessed.solved, tuple(refused), took)


def ranking(config: AutoDistConfig) -> Callable[[float, float, int], Any]:
    """What candidates are ordered by: the key of (seconds, bytes, devices)."""
    if config.objective == "memory":
        return lambda seconds, size, devices: (size, seconds)
    if config.objective == "cost":
        return lambda seconds, size, devices: (seconds * devices, size)
    return lambda seconds, size, devices: (seconds, size)


def looked_at(
    look: Look,
    limiting: Limiting,
    guessed: Iterable[tuple[Guess, Spread]],
    limit: int | None,
    wanted: int,
    refused: dict[str, None],
    nproc: int,
) -> Iterator[Candidate]:
    """Candidates in the order of their guesses, traced; what others of their kind show corrects the guesses of memory.

    Ends when enough fit and a few more did not turn out better, or when nothing is left.
    """
    ratio: dict[str, float] = {}
    least: dict[str, float] = {}
    found = 0
    seen: set[Spread] = set()
    most = max(2 * wanted, 12)
    for guess, spread in look.ahead(guessed, nproc):
        kind = f"{spread.remat}, {'stages' if spread.of('pipeline') > 1 else 'whole'}"
        if limit is not None and guess.bytes * ratio.get(kind, 1 / SLACK) > limit:
            continue
        if reason := limiting.cut(spread):
            refused[f"{spread}: {reason}"] = None
            continue
        kept = limiting.kept(spread)
        if kept is None:
            refused[f"{spread}: the partition constraints do not allow it"] = None
            continue
        if (spread := kept) in seen:
            continue
        seen.add(spread)
        try:
            candidate = Candidate(spread, look(spread), guess)
        except ValueError as error:
            refused[f"{spread}: {error}"] = None
            continue
        if reason := limiting.refuses(candidate.estimate, spread.mesh):
            refused[f"{spread}: {reason}"] = None
            continue
        yield candidate
        this = candidate.estimate.whole / guess.bytes
        least[kind] = min(least.get(kind, this), this)
        ratio[kind] = 0.9 * least[kind]
        found += limit is None or candidate.estimate.whole <= limit
        if found >= wanted + 3 or len(seen) >= most + wanted or (found >= wanted and len(seen) >= most):
            return


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
            self.known[spread] = estimate(
                self.subject.traced(spread, self.platform), self.cluster, coefficients=self.coefficients
            )
        return self.known[spread]

    def candidate(self, pair: tuple[Guess, Spread]) -> Candidate | None:
        """A guess looked at closely, None where it does not fit the model."""
        found = self.or_none(pair[1])
        return None if found is None else Candidate(pair[1], found, pair[0])

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


def space_of(subject: Subject, config: AutoDistConfig, cluster: Cluster) -> Space:
    """What may be tried, by the options and by what the model divides by: each axis is tried alone."""
    devices, zero = config.devices, config.zero_stage
    asked = set(config.axes)
    stages = config.pipeline_nstages
    sizes: dict[str, list[int]] = {}
    for axis in AXES:
        allowed = [n for n in divisors(devices) if n > 1] if axis in asked else []
        if axis == "pipeline":
            allowed = [n for n in allowed if subject.blocks and n <= subject.blocks and stages in ("auto", n)]
        if axis == "fsdp" and zero not in (3, "auto"):
            allowed = []
        if axis == "replica":
            groups = config.zero_ngroups
            allowed = [groups] if groups > 1 and zero in (1, 2) and "data" in asked else []
        if axis == "data" and zero == 3:
            allowed = [config.zero_ngroups] if config.zero_ngroups > 1 else []
        sizes[axis] = [n for n in allowed if _divides(subject, axis, n)]
    zeros = {0: (0,), 1: (1,), 2: (2,), 3: (0,), "auto": (0, 1, 2)}[zero]
    fixed = config.update_freq if "update_freq" in config.model_fields_set else None
    rows = divisors(subject.rows)
    accumulations = (fixed,) if fixed else tuple(n for n in rows if n <= 16)
    schedules = (config.pipeline_scheduler,)
    remats = REMATS if subject.blocks else ("none",)
    if config.recompute_modules or config.recompute != "auto":
        remats = (recompute_setting(config, subject.leaves) if config.recompute_modules else config.recompute,)
    return Space(devices, subject.rows, sizes, zeros, remats, accumulations, schedules, microbatches=fixed)


def as_asked(sizes: tuple[tuple[str, int], ...], config: AutoDistConfig) -> bool:
    """Whether a mesh has the stages and the ZeRO groups that are asked for."""
    mesh, groups = dict(sizes), config.zero_ngroups
    if config.pipeline_nstages not in ("auto", mesh.get("pipeline", 1)):
        return False
    if groups == 1 or config.zero_stage == "auto":
        return True
    if config.zero_stage == 3:
        return mesh.get("data", 1) == groups
    return mesh.get("replica", 1) == groups and mesh.get("data", 1) > 1


def _divides(subject: Subject, axis: str, n: int) -> bool:
    try:
        if axis == "replica":
            axis = "data"  # which divides alike
        subject.check(Spread(((axis, n),), microbatches=1 if axis == "pipeline" else None))
    except ValueError:
        return False
    return True


def no_mesh(subject: Subject, config: AutoDistConfig, space: Space) -> str:
    """Why no mesh has all devices: what each axis could be."""
    could = "; ".join(f"{axis} {', '.join(map(str, sizes))}" for axis, sizes in space.sizes.items() if sizes)
    return (
        f"no mesh of {config.devices} devices fits {subject.name!r} with batches of {subject.rows} rows: axes may be "
        f"{could or 'of size 1 alone'}; take another number of devices, rows, or a wider search_space"
    )


def traced_basis(look: Look, subject: Subject, space: Space, meshes: list[tuple[tuple[str, int], ...]]) -> Basis:
    """Trace what the guesses are made of, on meshes that the run can have."""

    def ways(sizes: tuple[tuple[str, int], ...]) -> tuple[int, int]:
        mesh = dict(sizes)
        return (
            -math.prod(mesh.get(axis, 1) for axis in ("tensor", "pipeline", "context", "expert")),
            mesh.get("fsdp", 1),
        )

    plain = max((sizes for sizes in meshes if "pipeline" not in dict(sizes)), key=ways, default=meshes[0])
    by_axis: dict[str, Spread] = {}
    for axis in ACTIVATIONS:
        having = [sizes for sizes in meshes if axis in dict(sizes)]
        if having:
            sizes = max(having, key=lambda sizes: (*ways(sizes), -dict(sizes)[axis]))
            spreads = list(space.settings(sizes))
            by_axis[axis] = min(spreads, key=lambda one: one.accumulation) if spreads else Spread(sizes)
    whole = min(space.settings(plain), key=lambda one: (one.zero, one.microbatches or 0), default=Spread(plain))
    return basis(look.or_none, space.remats, whole, by_axis, subject.rows)


class Guesses:
    """(guess, spread), the best first: what is chosen on a mesh is solved for when its least time comes up."""

    def __init__(
        self, sketch: Sketch, space: Space, config: AutoDistConfig, spreads: list[Spread], rank: Callable[..., Any]
    ) -> None:
        self.sketch, self.space, self.config, self.spreads, self.rank = sketch, space, config, spreads, rank
        self.solved = 0  # how many spreads were solved for

    def __iter__(self) -> Iterator[tuple[Guess, Spread]]:
        if self.config.objective == "memory":
            self.solved = len(self.spreads)
            yield from self.least()
            return
        order = itertools.count()
        waiting: list[tuple[Any, int, Guess | None, Spread]] = []
        fastest = min(self.sketch.basis.flops, key=self.sketch.basis.flops.__getitem__)
        for spread in self.spreads:
            if not (counts := self.space.accumulations_of(spread)):
                continue
            one = dataclasses.replace(spread, remat=fastest, accumulation=min(counts))
            least = self.sketch.guess(one, 0.0)
            key = self.rank(0.95 * least.seconds, 0, spread.devices)
            waiting.append((key, next(order), None, spread))
        heapq.heapify(waiting)
        while waiting:
            _, _, guess, spread = heapq.heappop(waiting)
            if guess is not None:
                yield guess, spread
                continue
            for found, chosen in self.chosen(spread):
                key = self.rank(found.seconds, found.bytes, spread.devices)
                heapq.heappush(waiting, (key, next(order), found, chosen))

    def least(self) -> list[tuple[Guess, Spread]]:
        """The spreads that are guessed to need the least memory, in order."""
        found = []
        for spread in self.spreads:
            state = self.sketch.state(spread)
            for count, remat in itertools.product(self.space.accumulations_of(spread), self.sketch.basis.own):
                one = dataclasses.replace(spread, remat=remat, accumulation=count)
                found.append((self.sketch.guess(one, state), one))
        return sorted(found, key=lambda pair: (pair[0].bytes, pair[0].seconds))

    def chosen(self, spread: Spread) -> list[tuple[Guess, Spread]]:
        """What the solver takes on one mesh, by remat, microbatches and modules left whole, for several guesses at
        how much of the limit there is: what a closer look finds may be more or less than what was guessed."""
        self.solved += 1
        limit, config = self.config.memory_bytes, self.config
        choices = self.sketch.choices(spread, self.space.accumulations_of(spread))
        found: dict[Spread, Guess] = {}
        for slack in (SLACK, 1.0, 0.8) if limit is not None else (1.0,):
            room = None if limit is None else int(slack * limit)
            for selection in solve(choices, room, solver=config.solver, granularity=config.memory_granularity):
                remat, count = selection.taken[0].label.rsplit(" ", 1)
                whole = tuple(option.label for option in selection.taken[1:] if option.label)
                divided = dataclasses.replace(spread, remat=remat, accumulation=int(count))
                if whole:  # what many small sums cost, only a closer look tells
                    found[divided] = self.sketch.guess(divided)
                if not whole or len(whole) < len(selection.taken) - 1:  # all of them: data parallelism, another mesh
                    chosen = dataclasses.replace(divided, whole=whole)
                    found[chosen] = Guess(selection.bytes, selection.seconds)
        return [(guess, chosen) for chosen, guess in found.items()]


def recompute_setting(config: AutoDistConfig, leaves: tuple[Leaf, ...]) -> str:
    """The remat that modules to recompute stand for: the model or its blocks all, of a part what the others keep."""
    kept = {"attention": "hidden=keep", "mlp": "qkv=keep,attention=keep"}
    hit = {path.split("/")[-1] for path in modules_matching(config.recompute_patterns, leaves)}
    return kept[hit.pop()] if len(hit) == 1 and hit <= kept.keys() else "full"
