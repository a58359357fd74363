"""Any NNX module with a loss as the planner sees it: what its parameters' names say is divided, the rest is whole."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec

from artifex.scaling.autodist.estimate import Traced
from artifex.scaling.autodist.sketch import Leaf
from artifex.scaling.autodist.spread import Spread
from artifex.scaling.axes import Rule, check_names
from artifex.scaling.execution import Platform, execution
from artifex.scaling.fits import check_fits
from artifex.scaling.placement import bytes_on_device, layout

Batch = Mapping[str, Any]
BATCH = {0: (), 1: ("batch",), 2: ("batch", "sequence"), 3: ("batch", None, None)}
OPTIMIZER = optax.adamw(1e-3)


class ModuleSubject:
    """`what`: a module, abstract or not, or a function that builds one. Its step is AdamW's on the gradient of `loss`
    in the dtype of its parameters, or with `trains` False the loss alone. It has no pipeline: nothing says its stages.

    Raises `ValueError` for a batch without rows, and for a loss that cannot be traced, with the traceback's last line.
    """

    blocks: int | None = None

    def __init__(
        self, what: Any, batch: Batch | None, loss: Callable[..., Any] | None = None, *, trains: bool = True
    ) -> None:
        if not batch:
            raise ValueError("a module is planned for a batch: give batch={'tokens': ((64, 256), 'int32'), ...}")
        build = what if callable(what) and not isinstance(what, nnx.Module) else None
        with nnx.use_eager_sharding(False):  # names are no axes of a mesh that is at hand
            model = nnx.eval_shape(build) if build is not None else what
        self.graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        self.params, self.rest = (jax.tree.map(_shape, nnx.to_pure_dict(tree)) for tree in (params, rest))
        self.names = _names(params)
        self.name, self.loss, self.trains = type(model).__name__, loss or _own_loss, trains
        self.batch = {name: _shape(value) for name, value in batch.items()}
        sizes = {leaf.shape[0] for leaf in self.batch.values() if leaf.shape}
        if len(sizes) != 1:
            raise ValueError(f"the arrays of a batch must have equally many rows in front, got {sorted(sizes)}")
        (self.rows,) = sizes
        self.dtype = str(max((leaf.dtype for leaf in jax.tree.leaves(self.params)), key=lambda dtype: dtype.itemsize))

    @property
    def unnamed(self) -> tuple[str, ...]:
        """Parameters without names, which every device holds whole."""
        return tuple(path for path, names in self.names.items() if names is None)

    @functools.cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """Its parameters that have names."""
        found = []
        for path, leaf in _flat(self.params).items():
            if (names := self.names[path]) is not None:
                size = float(leaf.dtype.itemsize)
                found.append(Leaf(path, leaf.shape, names, size, 2 * size if self.trains else 0.0, size, size))
        return tuple(found)

    @property
    def fingerprint(self) -> str:
        """Of names, shapes and dtypes of its parameters."""
        text = str([(path, leaf.shape, str(leaf.dtype), self.names[path]) for path, leaf in _flat(self.params).items()])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def about(self) -> dict[str, Any]:
        """What a plan file says it is for."""
        return {"model": self.name, "fingerprint": self.fingerprint, "rows": self.rows, "dtype": self.dtype}

    def check(self, spread: Spread) -> None:
        """Raise `ValueError` where the spread does not fit names, sizes or rows."""
        plan = spread.plan(self.rows)
        plan.check_batch(self.rows)
        named = {path: leaf for path, leaf in _flat(self.params).items() if self.names[path] is not None}
        check_fits(self.name, plan, named, {path: self.names[path] for path in named}, self.blocks)

    def step(self, spread: Spread, mesh: Any) -> tuple[Any, tuple[Any, ...], Any]:
        """(the jitted step, its abstract arguments with their shardings, shardings of the new state)."""
        plan = spread.plan(self.rows)
        rules, whole = plan.rules, NamedSharding(mesh, PartitionSpec())

        def place(table: str) -> Callable[[str, Any], Any]:
            def of(path: str, leaf: Any) -> Any:
                names, own = self.names[path], rules.of_path(path)
                rule: tuple[Rule, ...] = getattr(own, table)
                return whole if names is None else layout(leaf.shape, names, rule, own, mesh)

            return of

        params = _map(place("params"), self.params)
        rest = jax.tree.map(lambda _: whole, self.rest)
        state: tuple[Any, ...] = (_placed(self.params, params), _placed(self.rest, rest))
        where: tuple[Any, ...] = (params, rest)
        if self.trains:
            shapes = jax.eval_shape(OPTIMIZER.init, self.params)
            moments = _map(place("optimizer"), self.params)
            own, others = (lambda _, where: where), (lambda _: whole)
            of_params: Any = optax.tree_map_params
            kinds = of_params(OPTIMIZER, own, shapes, moments, transform_non_params=others)
            state, where = (*state, _placed(shapes, kinds)), (*where, kinds)
        sizes = plan.sizes
        batch = {}
        for name, leaf in self.batch.items():
            axes = BATCH.get(len(leaf.shape), ("batch", "height", "width", "channels")[: len(leaf.shape)])
            features = len(leaf.shape) == 2 and not jnp.issubdtype(leaf.dtype, jnp.integer)  # of a row, no tokens
            if len(axes) != len(leaf.shape) or features:
                axes = ("batch", *[None] * (len(leaf.shape) - 1))
            table = rules.activations
            batch[name] = jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=_layout_of_batch(leaf.shape, axes, table, sizes, mesh)
            )
        gradients = _map(place("gradients"), self.params)

        def value(params: Any, rest: Any, batch: Any) -> Any:
            with execution(plan.execution(mesh)):
                return self.loss(nnx.merge(self.graphdef, params, rest), batch)

        def parts(function: Callable, params: Any, rest: Any, batch: Any) -> Any:
            count = plan.microbatches
            if count == 1:
                return function(params, rest, batch)
            split = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)
            first = jax.eval_shape(function, params, rest, jax.tree.map(lambda x: x[0], split))
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
            add = lambda total, part: (jax.tree.map(jnp.add, total, function(params, rest, part)), None)  # noqa: E731
            return jax.tree.map(lambda total: total / count, jax.lax.scan(add, zeros, split)[0])

        def train(state: Any, batch: Any) -> Any:
            params, rest, moments = state

            def function(*args: Any) -> Any:
                loss, grads = jax.value_and_grad(value)(*args)
                return loss, jax.tree.map(jax.lax.with_sharding_constraint, grads, gradients)

            loss, grads = parts(function, params, rest, batch)
            with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer step count with floats
                updates, moments = OPTIMIZER.update(grads, moments, params)
            return (optax.apply_updates(params, updates), rest, moments), loss

        def forward(state: Any, batch: Any) -> Any:
            params, rest = state
            return state, parts(value, params, rest, batch)

        step = jax.jit(train if self.trains else forward, donate_argnums=0, out_shardings=(where, whole))
        return step, (state, batch), where

    def traced(self, spread: Spread, platform: Platform) -> Traced:
        """Its step, traced for devices of a platform. Raises `ValueError` where spread or loss do not go."""
        self.check(spread)
        plan = spread.plan(self.rows)
        device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
        mesh = AbstractMesh(plan.mesh_shape, plan.axis_names, abstract_device=device)  # pyright: ignore
        step, args, where = self.step(spread, mesh)
        try:
            jaxpr = step.trace(*args).jaxpr
        except Exception as error:
            said = str(error).splitlines()[:1]  # without the notes that JAX adds
            last = " ".join([f"{type(error).__name__}:", *said])
            raise ValueError(f"the loss of {self.name!r} cannot be traced as {spread}: {last}") from error
        state, batch = args
        held = {"parameters": bytes_on_device(state[0]), "buffers": bytes_on_device(state[1])}
        held |= {"optimizer state": bytes_on_device(state[2])} if self.trains else {}
        held |= {"batch": bytes_on_device(batch)}
        shardings = tuple(leaf.sharding for leaf in jax.tree.leaves(args))
        return Traced(jaxpr, shardings, tuple(jax.tree.leaves(where)), plan, platform, held, self.dtype)


def _own_loss(model: Any, batch: Any) -> Any:
    takes = inspect.signature(model.loss).parameters
    found = model.loss(batch, nnx.Rngs(0)) if len(takes) > 1 else model.loss(batch)
    return found[0] if isinstance(found, tuple) else found


def _layout_of_batch(shape: Any, axes: Any, table: Any, sizes: Any, mesh: Any) -> NamedSharding:
    from artifex.scaling.axes import resolve

    return NamedSharding(mesh, resolve(axes, shape, table, sizes).spec)


def _shape(value: Any) -> jax.ShapeDtypeStruct:
    if type(value) is tuple:
        shape, dtype = value
        return jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype))
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def _names(params: nnx.State) -> dict[str, tuple[str, ...] | None]:
    found: dict[str, tuple[str, ...] | None] = {}
    for path, variable in nnx.to_flat_state(params):
        where, axes = "/".join(map(str, path)), variable.get_metadata().get("out_sharding")
        if axes is not None:
            check_names(axes, variable.shape, f"parameter {where}")
        found[where] = None if axes is None else tuple(axes)
    return found


def _flat(tree: Any) -> dict[str, Any]:
    return {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _map(function: Callable[[str, Any], Any], tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(_path(path), leaf), tree)


def _path(path: Any) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in path)


def _placed(shapes: Any, where: Any) -> Any:
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, where)
