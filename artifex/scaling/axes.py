"""Logical axes: their strict resolution by rules, and the layout of activations by them.

A model names every dim of every parameter and of every activation at a block boundary. `Rules` says which mesh axes a
name is split over, `resolve` turns names + shape + rules + mesh sizes into a `PartitionSpec`, once, and `explain`
prints what came of it. Nothing here knows a model or a strategy.

A *dim* belongs to a tensor, an *axis* to a mesh.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

# the two with `as` are read from here: `axes.check_name`
from artifex.scaling.names import ACTIVATION_AXES as ACTIVATION_AXES
from artifex.scaling.names import WEIGHT_AXES, Names, check_names
from artifex.scaling.names import check_name as check_name
from artifex.scaling.rules import Rule, Rules


@dataclasses.dataclass(frozen=True)
class Resolution:
    """What the rules made of one tensor: its spec, the rules that won, and why a dim was left whole."""

    spec: PartitionSpec
    won: tuple[Rule, ...] = ()
    notes: tuple[str, ...] = ()

    def shard_count(self, mesh_sizes: Mapping[str, int]) -> int:
        """Into how many different pieces the tensor is cut."""
        axes = [axis for entry in self.spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]
        return math.prod(mesh_sizes[axis] for axis in axes)


def mesh_sizes(mesh: Mesh | AbstractMesh | Mapping[str, int]) -> dict[str, int]:
    """Axis name -> size, of a mesh or of a plain mapping (no devices needed)."""
    return dict(mesh.shape) if isinstance(mesh, Mesh | AbstractMesh) else dict(mesh)


def check_mesh(rules: Rules, mesh: Mesh | Mapping[str, int]) -> None:
    """Raise `ValueError` where a rule names an axis the mesh does not have."""
    sizes = mesh_sizes(mesh)
    for rule in rules.params + rules.gradients + rules.optimizer + rules.activations:
        for axis in rule.axes:
            if axis not in sizes:
                raise ValueError(
                    f"rule {rule} names mesh axis {axis!r}, but the mesh has {tuple(sizes)}; "
                    f"add the axis to the mesh or leave out the {rule.strategy} strategy"
                )


def resolve(
    names: Names,
    shape: Sequence[int],
    table: Sequence[Rule],
    sizes: Mapping[str, int],
    min_weight_size: Iterable[tuple[str, int]] = (),
) -> Resolution:
    """Names + shape + one rule table + mesh sizes -> `Resolution`.

    A mesh axis is used at most once per tensor. A dim that an axis does not divide is left whole, and of several axes
    the longest leading run whose product divides is taken; each such fallback is a note.
    """
    check_names(names, shape)
    entries: list[tuple[str, ...]] = [()] * len(names)
    used: dict[str, Rule] = {}
    won: dict[int, Rule] = {}
    notes = []
    largest = max((size for size, name in zip(shape, names, strict=True) if name != "layers"), default=0)
    too_small = {axis: size for axis, size in min_weight_size if largest < size}  # depth is not a weight's size
    for rule in table:
        if rule.name not in names:
            continue
        dim = list(names).index(rule.name)
        if entries[dim]:
            continue
        taken: list[str] = []
        for axis in rule.axes:
            if axis not in sizes:
                raise ValueError(f"rule {rule} names mesh axis {axis!r}, but the mesh has {tuple(sizes)}")
            ways = math.prod(sizes[a] for a in taken) * sizes[axis]
            if sizes[axis] == 1:
                continue
            if axis in too_small:
                notes.append(f"no dim reaches the {too_small[axis]} that {axis} asks for")
            elif axis in used:
                # of strategies that divide the rest, a later choice was not needed
                if not set(used[axis].strategy.split("+")) & set(rule.strategy.split("+")):
                    notes.append(f"{rule.name} whole: {axis} already splits {used[axis].name}")
            elif shape[dim] % ways:
                notes.append(f"{rule.name} {shape[dim]} does not divide by {ways} ({'+'.join([*taken, axis])})")
                break
            else:
                taken.append(axis)
                used[axis] = rule
        if taken:
            entries[dim] = tuple(taken)
            won[dim] = rule
    spec = PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in entries))
    return Resolution(spec, tuple(won[dim] for dim in sorted(won)), tuple(dict.fromkeys(notes)))


# Activations: an execution activates rules and mesh while it is traced; outside it, `shard` only checks its names.
_ACTIVE: contextvars.ContextVar[tuple[Rules, Mesh] | None] = contextvars.ContextVar(
    "artifex_activation_rules", default=None
)


@contextlib.contextmanager
def activation_rules(rules: Rules, mesh: Mesh) -> Iterator[None]:
    """Let `shard` constrain activations by `rules` on `mesh`.

    `artifex.scaling.execution` enters it, inside the function that is jitted and never around a call of it: the cache
    of `jax.jit` does not know about contexts and would hand the first layout to the second.
    """
    check_mesh(rules, mesh)
    with activated((rules, mesh) if mesh.size > 1 else None):
        yield


@contextlib.contextmanager
def activated(layout: tuple[Rules, Mesh] | None) -> Iterator[None]:
    """Under what `active` gave elsewhere; None lays nothing out, as for code on one device's part."""
    token = _ACTIVE.set(layout)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active() -> tuple[Rules, Mesh] | None:
    """The rules and the mesh that are active here, if any."""
    return _ACTIVE.get()


@contextlib.contextmanager
def claimed_alone() -> Iterator[None]:
    """Within it, parameters are split by what is claimed alone, as one is that `Rules.whole` has."""
    now = active()
    with activated(now and (now[0].claimed, now[1])):
        yield


@dataclasses.dataclass(frozen=True)
class Layout:
    """The rules at hand, and the mesh as it is here: axes that an enclosing `shard_map` took are no longer free."""

    rules: Rules
    mesh: Mesh | AbstractMesh
    free: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis -> size, 1 for one that is taken: there is nothing left to split over it."""
        return {axis: size if axis in self.free else 1 for axis, size in self.mesh.shape.items()}

    def spec(self, names: Names, shape: Sequence[int]) -> PartitionSpec:
        """Where an activation lives."""
        return resolve(names, shape, self.rules.activations, self.sizes).spec

    def for_computing(self, names: Iterable[str | None]) -> Layout:
        """That in which positions are not split by the mesh axes of other names among these."""
        rules, shared = self.rules.activations, {"batch", "sequence"}
        busy = {axis for rule in rules if rule.name in set(names) - shared for axis in rule.axes}
        kept = tuple(
            dataclasses.replace(
                rule, axes=tuple(axis for axis in rule.axes if rule.name != "sequence" or axis not in busy)
            )
            for rule in rules
        )
        return dataclasses.replace(self, rules=dataclasses.replace(self.rules, activations=kept))

    def constrain(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        """x, laid out so."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def layout() -> Layout | None:
    """The layout of activations where this is traced; None on one device, without rules, and on one device's part."""
    active = _ACTIVE.get()
    if active is None:
        return None
    rules, mesh = active
    here = jax.sharding.get_abstract_mesh()
    if here.empty or not here.manual_axes:
        return Layout(rules, mesh, mesh.axis_names)
    free = tuple(axis for axis in here.axis_names if axis not in here.manual_axes)
    return Layout(rules, here, free) if free else None


def activation_axes(name: str, size: int) -> tuple[str, ...]:
    """The mesh axes that split an activation dim `name` of `size`; () where there is no layout."""
    now = layout()
    if now is None:
        return ()
    entry = now.spec((name,), (size,))[0]
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def most_ways(name: str) -> int:
    """Into how many parts the rules would split an activation dim `name` of a size that divides."""
    now = layout()
    if now is None:
        return 1
    return math.prod(now.sizes[axis] for rule in now.rules.activations if rule.name == name for axis in rule.axes)


def shard(x: jax.Array, *names: str | None, beside: Mapping[str, int] | None = None) -> jax.Array:
    """Constrain the layout of an activation by the logical axes of its dims (None: never split).

    `beside`: further dims, name -> size, of what is made of x, which keep their mesh axes: x lies as its product will.
    Without a layout, on one device, it returns `x`. Raises `ValueError` for unknown names or a wrong count.
    """
    check_names(names, x.shape, "activation")
    now = layout()
    if now is None:
        return x
    spec = now.spec((*names, *(beside or ())), (*x.shape, *(beside or {}).values()))
    return now.constrain(x, PartitionSpec(*spec[: x.ndim]))


def shard_for_pair(x: jax.Array, hidden: str) -> jax.Array:
    """Constrain what a pair of layers divided over a dim `hidden` reads or puts out, (batch, sequence, ...): positions
    over the mesh axes that the pair does not take, which where those are several XLA does not find by itself: it would
    gather them, and have every device compute the positions of all.
    """
    now = layout()
    if now is None:
        return x
    over = {rule.name: [axis for axis in rule.axes if now.sizes[axis] > 1] for rule in now.rules.activations}
    split, taken = over.get("sequence", []), over.get(hidden, [])
    if not set(split) & set(taken) or set(split) <= set(taken):
        return x
    spec = now.for_computing((hidden,)).spec(("batch", "sequence"), x.shape[:2])
    return now.constrain(x, PartitionSpec(*spec, *[None] * (x.ndim - 2)))


def shard_as_read(x: jax.Array, names: Names, weight: Names, shape: Sequence[int]) -> jax.Array:
    """Constrain what rows of a weight are read by, or those rows, which have one more dim: that lies as the last dim of
    the weight, the dims before it by `names` over the mesh axes that are left. Rows are then sent to their own layout.

    There, and back with their gradient, each device sends its part once for each dim it goes to. XLA alone would have
    every device hold all rows, or their gradient, where several dims take of the axes that split the weight.
    """
    now = layout()
    if now is None:
        return x
    last = resolve(weight, shape, now.rules.params, now.sizes, now.rules.min_weight_size).spec[-1]
    taken = (last,) if isinstance(last, str) else tuple(last or ())
    if not taken:
        return x
    own = [
        (entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in now.spec(names, x.shape[: len(names)])
    ]

    def constrained(x: jax.Array, left: tuple[str, ...]) -> jax.Array:
        # of the axes of a dim those in front of the first that is not there yet: the others would have to change places
        dims = [tuple(itertools.takewhile(lambda axis: axis not in left, axes)) or None for axes in own]
        return now.constrain(x, PartitionSpec(*dims, *[left or None] * (x.ndim - len(names))))

    x = constrained(x, taken)
    for count in range(len(taken) - 1, 0, -1) if x.ndim > len(names) else ():
        to = [next((dim for dim, axes in enumerate(own) if axis in axes), None) for axis in taken]
        if to[count] != to[count - 1]:  # of rows, what goes to another dim than the axes that are left
            x = constrained(x, taken[:count])
    return x


def shard_parameter(x: jax.Array, *names: str | None, whole: Sequence[int] | None = None) -> jax.Array:
    """Constrain a parameter, or its gradient, to the layout that the rules give parameters; see `shard`.

    Of a part of one, `whole` is the shape of it all: the smallest size that is split at all is about that.
    """
    check_names(names, x.shape, "parameter")
    now = layout()
    if now is None:
        return x
    too_small = [(axis, size) for axis, size in now.rules.min_weight_size if max(whole or x.shape) < size]
    return now.constrain(x, resolve(names, x.shape, now.rules.params, now.sizes, too_small).spec)


def shard_gradient(x: jax.Array, *names: str | None, path: str) -> jax.Array:
    """Constrain the gradient of the parameter at `path` to the layout that the rules give gradients; see `shard`."""
    check_names(names, x.shape, "gradient")
    now = layout()
    if now is None:
        return x
    rules = now.rules.of_path(path)
    return now.constrain(x, resolve(names, x.shape, rules.gradients, now.sizes, rules.min_weight_size).spec)


def ways(names: Names, shape: Sequence[int]) -> tuple[int, ...]:
    """Into how many parts the rules split each dim of a parameter or an activation; 1 where there is no layout."""
    now = layout()
    if now is None:
        return (1,) * len(shape)
    of_weight = any(name in WEIGHT_AXES for name in names)
    spec = resolve(names, shape, now.rules.everything, now.sizes, now.rules.min_weight_size if of_weight else ()).spec
    each = ((entry,) if isinstance(entry, str) else entry or () for entry in spec)
    return tuple(math.prod(now.sizes[axis] for axis in mesh_axes) for mesh_axes in each)
