"""A quick guess at every way to spread a run, from a few traced steps: which are worth a closer look.

Of each setting of remat one step is traced, of each axis that divides activations one more. Per device, what a step
computes and keeps is the same on any mesh that divides all of it; weights travel by closed forms of their bytes,
activations in proportion to the tokens that a device has. What is looked at closely is traced itself.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping

from artifex.scaling.autodist.cluster import Cluster
from artifex.scaling.autodist.estimate import TURN, Estimate
from artifex.scaling.autodist.solvers import Choice, Option
from artifex.scaling.autodist.spread import Spread
from artifex.scaling.axes import Rules, resolve

ACTIVATIONS = ("tensor", "context", "expert", "pipeline")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter. Bytes of one number of it at rest, of the optimizer's for it, of its gradient, and as computed
    with."""

    path: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    itemsize: float
    optimizer: float
    gradient: float
    computed: float

    @property
    def size(self) -> int:
        """How many numbers it is."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Basis:
    """What was traced: of each remat bytes a device keeps and FLOPs it computes, of all devices that divide all; of
    an axis the bytes sent for each row and part, `per_row`, that a device has, and how often in a part, `calls`; of
    the bytes those that fewer rows leave, `fixed`, such as a layer's weights once they are gathered."""

    own: Mapping[str, float]
    flops: Mapping[str, float]
    per_row: Mapping[str, float]
    devices: int
    calls: Mapping[str, float] = dataclasses.field(default_factory=dict)
    fixed: float = 0.0


@dataclasses.dataclass(frozen=True)
class Guess:
    """Bytes of a device and seconds of a step."""

    bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class Sketch:
    """The guesses for one run on one cluster."""

    leaves: tuple[Leaf, ...]
    basis: Basis
    cluster: Cluster
    rows: int
    blocks: int
    dtype: str
    trains: bool = True

    def state(self, spread: Spread) -> float:
        """Bytes of parameters and optimizer state, exact but for what is no array of a parameter's shape."""
        rules = rules_of(tuple(axis for axis, _ in spread.sizes), spread.zero)
        total = 0.0
        for leaf in self.leaves:
            own = (
                rules.of_path(leaf.path)
                if not spread.whole
                else dataclasses.replace(rules, whole=spread.whole).of_path(leaf.path)
            )
            total += leaf.itemsize * leaf.size / ways(leaf.names, leaf.shape, own.params, spread.sizes)
            total += leaf.optimizer * leaf.size / ways(leaf.names, leaf.shape, own.optimizer, spread.sizes)
        return total

    def moved(self, spread: Spread) -> tuple[float, float]:
        """Bytes of weights as they are computed with, on a device that holds what no other axis than those of tensor,
        expert and pipeline parallelism divides; and of their gradients."""
        ways = spread.of("tensor") * spread.of("pipeline")
        weights = sum(leaf.computed * leaf.size for leaf in self.leaves) / ways
        return weights, sum(leaf.gradient * leaf.size for leaf in self.leaves) / ways

    def guess(self, spread: Spread, state: float | None = None) -> Guess:
        """Of one spread with its own remat; `state` where it is known."""
        remat = spread.remat if spread.remat in self.basis.own else "full"
        stages = spread.of("pipeline")
        parts = spread.accumulation * (spread.microbatches or 1)
        weights, gradients = self.moved(spread)
        rest = spread.of("fsdp") * spread.of("context") * spread.of("expert")
        fixed = min(self.basis.fixed, *self.basis.own.values())
        share = self.basis.devices / spread.devices / parts
        own = (self.basis.own[remat] - fixed) * share
        if stages > 1:  # a stage keeps the streams of what is under way, and computes one microbatch again
            streams = (self.basis.own.get("full", self.basis.own[remat]) - fixed) * share
            own += streams * min(stages, spread.microbatches or 1) / max(self.blocks / stages, 1) + gradients
        if parts > 1 and self.trains:
            own += gradients / (rest if spread.zero != 2 else rest * spread.of("data"))
        return Guess(
            (self.state(spread) if state is None else state) + own + fixed,
            self.seconds(spread, remat, weights, gradients, rest, parts),
        )

    def seconds(self, spread: Spread, remat: str, weights: float, gradients: float, rest: int, parts: int) -> float:
        cluster, sizes, stages = self.cluster, spread.mesh, spread.of("pipeline")
        flops = self.basis.flops[remat if stages == 1 else "full" if "full" in self.basis.flops else remat]
        compute = flops * self.basis.devices / spread.devices
        if stages > 1:
            count = spread.microbatches or 1
            each = spread.stages_per_device
            padded = math.ceil(self.blocks / (stages * each)) * stages * each / self.blocks
            compute *= padded * (count * each + stages - 1) / (count * each)
        arrays = math.ceil(self.count / stages)
        total = cluster.compute_seconds(compute, 0.0, self.dtype) + TURN * (parts - 1)
        dividing = tuple(axis for axis in ("fsdp", "expert", "context") if spread.of(axis) > 1)
        if dividing:
            share = (rest - 1) / rest
            total += cluster.seconds("all-gather", 2 * parts * weights * share, dividing, sizes, 2 * parts * arrays)
            if self.trains:
                sent = parts * gradients * share
                total += cluster.seconds("reduce-scatter", sent, dividing, sizes, parts * arrays)
        data = tuple(axis for axis in ("replica", "data") if spread.of(axis) > 1)
        if (n := spread.of("replica") * spread.of("data")) > 1 and self.trains:
            sent = 2 * parts * gradients / rest * (n - 1) / n
            total += cluster.seconds("all-reduce", sent, data, sizes, parts * arrays)
            if spread.zero:  # new weights, at rest, of a device's part of the optimizer's state
                size = gradients * self.itemsize / rest * (spread.of("data") - 1) / spread.of("data")
                total += cluster.seconds("all-gather", size, ("data",), sizes, arrays)
        for axis, per_row in self.basis.per_row.items():
            if (n := spread.of(axis)) > 1:
                rows = self.rows / spread.row_ways / spread.of("context")
                sent = per_row * rows * (n - 1) / n / (spread.of("tensor") if axis == "context" else 1) / stages
                kind = "all-reduce" if axis == "tensor" else "collective-permute" if axis != "expert" else "all-to-all"
                total += cluster.seconds(kind, sent, (axis,), sizes, round(parts * self.basis.calls.get(axis, 1)))
        return total

    @functools.cached_property
    def itemsize(self) -> float:
        """Bytes of weights at rest to each of gradients."""
        held = sum(leaf.itemsize * leaf.size for leaf in self.leaves)
        moved = sum(leaf.gradient * leaf.size for leaf in self.leaves)
        return held / moved if moved else 1.0

    @functools.cached_property
    def count(self) -> int:
        """How many arrays all weights are gathered as."""
        return self.arrays(self.leaves)

    def arrays(self, leaves: Iterable[Leaf]) -> int:
        """How many arrays their weights are gathered as: those of a stack one by one."""
        return sum(self.blocks if "layers" in leaf.names else 1 for leaf in leaves)

    def choices(self, spread: Spread, accumulations: tuple[int, ...]) -> list[Choice]:
        """What is left to choose on a mesh: remat and microbatches, and which modules' weights stay whole where axes
        divide what nobody claimed: more bytes, but a sum of gradients in place of two gathers and a scattered sum."""
        options = []
        for accumulation in accumulations:
            one = dataclasses.replace(spread, accumulation=accumulation)
            state = self.state(one)
            for remat in self.basis.own:
                found = self.guess(dataclasses.replace(one, remat=remat), state)
                options.append(Option(f"{remat} {accumulation}", int(found.bytes), found.seconds))
        found = [Choice("remat and microbatches", tuple(options))]
        axes = tuple(axis for axis in ("fsdp", "expert", "context") if spread.of(axis) > 1)
        if not axes or spread.of("pipeline") > 1:
            return found
        n = math.prod(spread.of(axis) for axis in axes)
        for module, leaves in self.modules().items():
            held = sum((leaf.itemsize + leaf.optimizer) * leaf.size for leaf in leaves)
            sent = sum(leaf.computed * leaf.size for leaf in leaves) * (n - 1) / n
            saved = self.cluster.seconds("all-gather", sent, axes, spread.mesh, self.arrays(leaves))
            more = Option(f"{module}/*", int(held * (n - 1) / n), 0.0)
            found.append(Choice(module, (Option("", 0, saved), more)))
        return found

    @functools.cache  # noqa: B019
    def modules(self) -> dict[str, list[Leaf]]:
        """The parameters by the module that they are of, those of a repeated block by its parts."""
        found: dict[str, list[Leaf]] = {}
        for leaf in self.leaves:
            parts = leaf.path.split("/")
            found.setdefault(
                "/".join(parts[: 2 if "layers" in leaf.names else 1][: len(parts) - 1]) or parts[0], []
            ).append(leaf)
        return found


@functools.lru_cache(4096)
def rules_of(axes: tuple[str, ...], zero: int) -> Rules:
    """The rules of strategies on these mesh axes, whatever their sizes."""
    return Spread(tuple((axis, 2) for axis in axes), zero, microbatches=1).plan().rules if axes else Rules()


@functools.lru_cache(2**17)
def ways(names: tuple[str, ...], shape: tuple[int, ...], table: tuple, sizes: tuple[tuple[str, int], ...]) -> int:
    """Into how many parts a table cuts a parameter."""
    mesh = dict(sizes)
    return resolve(names, shape, table, mesh).shard_count(mesh)


def basis(
    estimate: Callable[[Spread], Estimate | None],
    remats: tuple[str, ...],
    whole: Spread,
    by_axis: Mapping[str, Spread],
    rows: int,
    parts: int = 1,
    gradients: float = 0.0,
) -> Basis:
    """Trace what the guesses need: `whole` with each remat, and once in so many `parts`, whose sum of gradients takes
    so many bytes; and a spread for each axis that divides activations."""
    own, flops, per_row, calls = {}, {}, {}, {}
    for remat in remats:
        found = estimate(dataclasses.replace(whole, remat=remat))
        if found is not None:
            own[remat], flops[remat] = found.own, found.flops
    fixed, last = 0.0, next(reversed(own), None)
    if (
        parts > 1
        and last is not None
        and (found := estimate(dataclasses.replace(whole, remat=last, accumulation=parts)))
    ):
        fixed = max((found.own - gradients - own[last] / parts) / (1 - 1 / parts), 0.0)
    for axis, spread in by_axis.items():
        found = estimate(spread)
        if found is None:
            continue
        n = spread.of(axis)
        kinds = {"tensor": None, "context": ("collective-permute", "all-to-all"), "expert": ("all-to-all",)}
        of = kinds.get(axis, ("collective-permute",))
        mine = [one for one in found.sends if axis in one.axes and (of is None or one.kind in of)]
        sent = sum(one.bytes * one.times for one in mine)
        calls[axis] = sum(one.times for one in mine) / (spread.accumulation * (spread.microbatches or 1))
        there = rows / spread.row_ways / spread.of("context")
        per_row[axis] = sent / there * n / (n - 1)
    return Basis(own, flops, per_row, whole.devices, calls, fixed)
