"""The search: all ways to spread a run guessed at, the most promising traced and estimated, the best ones kept."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from artifex.scaling.autodist.cluster import Cluster
from artifex.scaling.autodist.config import AutoDistConfig
from artifex.scaling.autodist.guesses import Corrections, Guesses, Pair
from artifex.scaling.autodist.limits import Limiting, modules_matching
from artifex.scaling.autodist.look import Candidate, Look, coefficients_of, platform_of
from artifex.scaling.autodist.sketch import ACTIVATIONS, Basis, Guess, Leaf, Sketch, basis
from artifex.scaling.autodist.spread import AXES, Space, Spread, divisors
from artifex.scaling.autodist.subject import Subject

CLOSE = 0.9
"""A guess that closer looks corrected may still be so many times what is found."""

LEAST = 3
"""How many guesses of the least memory are looked at, however much they are."""

REMATS = ("none", "dots", "full", "attention=keep", "qkv=keep,attention=keep", "hidden=keep")
Said = Callable[[str], None]


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
    spreads = [one for sizes in meshes for one in space.settings(sizes) if in_groups(one, config)]
    rank = ranking(config)
    guesses = Guesses(sketch, space, config, spreads, rank)
    counted = f"{len(meshes):,} {'mesh' if len(meshes) == 1 else 'meshes'}"
    say(f"{counted}, {len(spreads):,} with ZeRO and schedules, in {time.perf_counter() - start:.1f} s")
    looking = Looking(look, limiting, guesses.corrections, config, say)
    if config.objective != "memory":
        looking.at(guesses.fastest())
    if not looking.fits:  # or what is missing where the least is needed
        looking.at(guesses.least(), least=True)
    fits = sorted(looking.fits, key=lambda one: rank(one.estimate.seconds, one.estimate.whole, one.spread.devices))
    over = sorted(looking.over, key=lambda one: one.estimate.whole)
    took = time.perf_counter() - start
    return Found(tuple(fits[: config.topk]), tuple(over), len(meshes), guesses.solved, tuple(looking.refused), took)


def ranking(config: AutoDistConfig) -> Callable[[float, float, int], Any]:
    """What candidates are ordered by: the key of (seconds, bytes, devices)."""
    if config.objective == "memory":
        return lambda seconds, size, devices: (size, seconds)
    if config.objective == "cost":
        return lambda seconds, size, devices: (seconds * devices, size)
    return lambda seconds, size, devices: (seconds, size)


class Looking:
    """Looks closely at guesses, in their order: `fits` and `over` the limit, and why others were `refused`."""

    def __init__(
        self, look: Look, limiting: Limiting, corrections: Corrections, config: AutoDistConfig, say: Said
    ) -> None:
        self.look, self.limiting, self.corrections, self.config, self.say = look, limiting, corrections, config, say
        self.limit = config.memory_bytes
        self.fits: list[Candidate] = []
        self.over: list[Candidate] = []
        self.refused: dict[str, None] = {}
        self.seen: set[Spread] = set()

    def at(self, pairs: Iterable[Pair], *, least: bool = False) -> None:
        """Until enough fit and a few more did not turn out better, as many as may be did not, or nothing is left; what
        closer looks find corrects the guesses. By `least` memory it ends where all that is left will hardly fit."""
        wanted, looked = self.config.topk, 0
        most = max(2 * wanted, 12)
        for guess, spread in self.look.ahead(pairs, self.config.nproc):
            if self.limit is not None and CLOSE * self.corrections(guess, spread) > self.limit:
                if least and looked >= LEAST:
                    return
                if not least:
                    continue
            before = len(self.seen)
            self.one(guess, spread)
            looked += len(self.seen) - before
            enough = len(self.fits) >= wanted
            if len(self.fits) >= wanted + 3 or looked >= most + wanted or (enough and looked >= most):
                return

    def one(self, guess: Guess, spread: Spread) -> None:
        """Trace and estimate one, unless that was done or the limits exclude it."""
        kept = self.limiting.kept(spread)
        if reason := self.limiting.cut(spread) or ("" if kept else "the partition constraints do not allow it"):
            self.refused[f"{spread}: {reason}"] = None
            return
        if kept is None or kept in self.seen:
            return
        self.seen.add(kept)
        try:
            found = Candidate(kept, self.look(kept), guess)
        except ValueError as error:
            self.refused[f"{kept}: {error}"] = None
            return
        if reason := self.limiting.refuses(found.estimate, kept.mesh):
            self.refused[f"{kept}: {reason}"] = None
            return
        whole = found.estimate.whole
        self.corrections.learn(guess, kept, whole)
        counted = math.ceil(whole / self.config.memory_granularity) * self.config.memory_granularity
        (self.fits if self.limit is None or counted <= self.limit else self.over).append(found)
        if self.config.verbose:
            self.say(f"  {kept}: {whole / 2**30:.2f} GiB, {found.estimate.seconds:.4g} s")


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
            allowed = [groups] if groups > 1 and zero in (1, 2, "auto") and "data" in asked else []
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


def in_groups(spread: Spread, config: AutoDistConfig) -> bool:
    """Whether ZeRO of the planner's choice, where it is any, has the groups that are asked for."""
    groups = config.zero_ngroups
    if groups == 1 or config.zero_stage != "auto":
        return True
    if spread.of("replica") > 1:
        return spread.zero > 0
    return spread.zero == 0 and (spread.of("fsdp") == 1 or spread.of("data") == groups)


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
    parts = max(space.accumulations_of(whole), default=1)
    held_by = math.prod(size for axis, size in whole.sizes if axis != "data" or whole.zero == 2)
    gradients = sum(leaf.gradient * leaf.size for leaf in subject.leaves) / held_by
    return basis(look.or_none, space.remats, whole, by_axis, subject.rows, parts, gradients)


def recompute_setting(config: AutoDistConfig, leaves: tuple[Leaf, ...]) -> str:
    """The remat that modules to recompute stand for: the model or its blocks all, of a part what the others keep."""
    kept = {"attention": "hidden=keep", "mlp": "qkv=keep,attention=keep"}
    hit = {path.split("/")[-1] for path in modules_matching(config.recompute_patterns, leaves)}
    return kept[hit.pop()] if len(hit) == 1 and hit <= kept.keys() else "full"
