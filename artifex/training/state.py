"""The training state and its blueprint: built abstractly, placed by a plan, initialised straight into its shards."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from artifex.config import Config
from artifex.models.layers import Statistic
from artifex.models.staged import Stack
from artifex.models.weights_config import section_of
from artifex.optim import inputs_of, make_optimizer
from artifex.scaling import placement
from artifex.scaling.axes import Rules
from artifex.scaling.collectives import Settings, settings
from artifex.scaling.execution import Execution, execution, platform_of
from artifex.scaling.fits import check_fits
from artifex.scaling.plan import Plan
from artifex.training import freezing
from artifex.training.precision import carried, in_dtype, model_in
from artifex.training.runner import Result, Runner
from artifex.training.spill import spilled
from artifex.training.task import attention_of

BATCH = {
    1: ("batch",),
    2: ("batch", "sequence"),
    3: ("batch", None, None),
    4: ("batch", "height", "width", "channels"),
}
"""The logical axes of an array of a batch, by its rank."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything a run is: what is not in here a resumed run does not need. Of arrays, shapes, or shardings."""

    step: Any  # int32, updates made
    params: Any  # nested dicts, the trained part of the model's canonical tree, float32 or `training.param_dtype`
    buffers: Any  # the rest of that tree: running means, frozen weights; often empty
    optimizer: Any  # optax state
    ema: Any  # averages, like params, or None
    ema_buffers: Any  # averages of those buffers that are statistics, or None
    key: Any  # uint32 key data; folded with the step, so it never changes

    @property
    def weights(self) -> Any:
        """What validation, samples and exports use: the average where there is one, else the parameters."""
        return self.params if self.ema is None else self.ema

    @property
    def weights_buffers(self) -> Any:
        """The buffers that go with `weights`: an averaged encoder needs the codebook of its own time."""
        return self.buffers if self.ema_buffers is None else freezing.join(self.buffers, self.ema_buffers)


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """What a run is made of before any array exists: module structure, names, optimizer, plan, mesh and shardings."""

    config: Config
    plan: Plan
    mesh: Mesh
    graphdef: Any
    names: Any  # of the parameters
    buffer_names: Any
    frozen: frozenset[str]  # paths of parameters that stay as they are
    optimizer: optax.GradientTransformation  # of the others
    stack: Stack | None  # the repeated blocks that a pipeline divides, where the model has them
    state: TrainState  # of jax.ShapeDtypeStruct, each with its sharding

    @property
    def shardings(self) -> TrainState:
        """The sharding of every array of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)

    def init(self) -> TrainState:
        """A fresh state. Every array is made in its shards: no device ever holds more than its share."""
        return self.initializer()()

    def initializer(self) -> Any:
        """`init`, to be compiled: a function of nothing.

        A CPU's compiler spends most of its time on code that runs once, so it gives that half of its care: the numbers
        are the same to the bit, and the program is as fast.
        """
        quick = platform_of(self.mesh) == "cpu" and not jax.config.read("jax_disable_most_optimizations")
        return jax.jit(
            lambda: _fresh(self.config, self.optimizer, self.frozen),
            out_shardings=self.shardings,
            compiler_options={"xla_backend_optimization_level": 1} if quick else None,
        )

    def laid_out(self, gradients: Any, table: placement.Table = "gradients") -> Any:
        """Gradients of the parameters that are trained, where a table of the plan puts them."""
        if self.mesh.size == 1:
            return gradients
        return jax.tree.map(jax.lax.with_sharding_constraint, gradients, self.gradient_shardings(gradients, table))

    def gradient_shardings(self, gradients: Any, table: placement.Table = "gradients") -> Any:
        """Where that table puts the gradients of the parameters that are trained."""
        names = self.split(self.names)[0]
        return placement.shardings(gradients, gradients, names, self.plan.rules, table, self.mesh)

    @property
    def execution(self) -> Execution:
        """How the model runs in a step: the plan, and the settings of the step."""
        how = self.config.training
        dtypes = {"compute_dtype": how.compute_dtype, "reduce_dtype": how.reduce_dtype}
        return self.plan.execution(self.mesh, unroll=how.unroll, attention=how.attention, **dtypes)

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        """What the compiler is asked for in steps and evaluations; None for nothing."""
        return {**self.execution.compiler_options, **self.collectives.options} or None

    @property
    def collectives(self) -> Settings:
        """What the platform makes of the configuration's wishes about how devices talk."""
        return settings(self.config.collectives, platform_of(self.mesh), self.mesh)

    @property
    def running(self) -> Execution:
        """How the model runs otherwise, where the devices of a pipeline divide rows and weights instead of layers."""
        return dataclasses.replace(self.execution, rules=self.plan.running)

    def as_run(self, params: Any) -> Any:
        """Parameters where `running` has them, in a function that is traced."""
        if self.plan.pipeline is None:
            return params

        def placed(keys: Any, leaf: jax.Array, names: tuple[str, ...]) -> jax.Array:
            rules = self.plan.of_path(placement.path_of(keys)).running
            where = placement.layout(leaf.shape, names, rules.params, rules, self.mesh)
            return jax.lax.with_sharding_constraint(leaf, where)

        return jax.tree_util.tree_map_with_path(placed, params, self.names)

    def loss(
        self, params: Any, buffers: Any, batch: Any, key: jax.Array | None, index: int | jax.Array = 0
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
        """(loss, (metrics, buffers)) of a batch, under the plan: for the functions that are traced in training.

        Buffers change only where a key is given; where it is None, the noise is that of validation batch `index`.
        """
        how = self.running
        with execution(how):
            model = model_in(how.compute_dtype, self.graphdef, self.as_run(params), buffers)
            value, metrics = model.loss(batch, None if key is None else nnx.Rngs(key), index=index)
            return value, (metrics, carried(model, buffers))

    def run(self, state: TrainState, function: Callable[..., Result], *args: Any) -> Result:
        """`function(model, *args)` under the plan, in the compute dtype: samples, reconstructions, scores.

        The model has the weights that validation, samples and exports use. There is no other way from a state to a
        model that runs, so nothing forgets the rules.
        """
        return self.runner(state.weights, state.weights_buffers).run(function, *args)

    def runner(self, weights: Any, buffers: Any) -> Runner:
        """The model of these weights and buffers, nested dicts, and how it runs."""
        how = self.running
        weights = weights if self.plan.pipeline is None else jax.jit(self.as_run)(weights)
        return Runner(model_in(how.compute_dtype, self.graphdef, weights, buffers), how)

    def split(self, tree: Any) -> tuple[Any, Any]:
        """What of a tree like the parameters is trained, and what is frozen; `freezing.join` puts both together."""
        return freezing.split(tree, self.frozen)

    def tree(self, state: TrainState) -> Any:
        """The canonical tree of the weights that validation, samples and exports use: parameters and buffers in one
        nested dict, as they are stored."""
        return nnx.to_pure_dict(nnx.state(nnx.merge(self.graphdef, state.weights, state.weights_buffers)))

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint says of itself: the run's configuration, every field of its model, and the logical axes of
        every parameter and buffer by its path. Plain values, as JSON gives them back."""
        model = self.config.model
        told = {"config": self.config.to_dict(), "model": section_of(model.name, model.spec())}
        trees = ((self.state.params, self.names), (self.state.buffers, self.buffer_names))
        named = {path: names for tree in trees for path, _, names in placement.leaves_with_names(*tree)}
        return json.loads(json.dumps({**told, "names": named}))

    def batch_sharding(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Where the arrays of a batch live: labels (batch), tokens (batch, sequence), features of a text, images."""
        rules, sizes = self.plan.rules, self.plan.sizes

        def where(value: Any) -> NamedSharding:
            return NamedSharding(
                self.mesh, placement.resolve(BATCH[value.ndim], value.shape, rules.activations, sizes).spec
            )

        return jax.tree.map(where, batch)

    @property
    def part(self) -> tuple[int, int]:
        """(p, P): of a batch of B rows this process's devices hold [p B/P, (p+1) B/P). (0, 1), the whole batch, where
        they hold all of it, or rows that do not follow each other."""
        rows = self.config.training.batch_size
        sharding = self.batch_sharding({"rows": jax.ShapeDtypeStruct((rows,), jnp.int32)})["rows"]
        spans = {index.indices(rows)[:2] for (index,) in sharding.addressable_devices_indices_map((rows,)).values()}
        first, last = min(begin for begin, _ in spans), max(end for _, end in spans)
        held = sum(end - begin for begin, end in spans)
        if held != last - first or rows % held or first % held:
            return 0, 1
        return first // held, rows // held

    def placed(self, batch: dict[str, Any]) -> dict[str, jax.Array]:
        """The `part` of a batch that this process made as the global arrays, split as the plan says."""
        p, P = self.part
        if jax.process_count() == 1:
            return jax.device_put(batch, self.batch_sharding(batch))
        whole = {
            name: jax.ShapeDtypeStruct((P * len(value), *value.shape[1:]), value.dtype) for name, value in batch.items()
        }
        where = self.batch_sharding(whole)

        def array(name: str) -> jax.Array:
            value, size = batch[name], whole[name].shape

            def of_device(index: Any) -> Any:
                begin, end, _ = index[0].indices(size[0])
                first = p * len(value)
                return value[(slice(begin - first, end - first), *index[1:])]

            return jax.make_array_from_callback(size, where[name], of_device)

        return {name: array(name) for name in batch}


def within(tree: Any, part: Any) -> Any:
    """The leaves of nested dicts `tree` at the places that `part` has."""
    return {key: within(tree[key], below) if isinstance(below, dict) else tree[key] for key, below in part.items()}


def planned(config: Config, device_count: int) -> Plan:
    """The plan of a configuration on so many devices, there or not. Raises `ValueError` where they, the batch or the
    length of its sequences do not fit together."""
    config.check()
    how = config.training
    plan = Plan.from_device(
        config.device,
        device_count,
        remat=how.remat,
        microbatches=how.gradient_accumulation,
        batch_size=how.batch_size,
    )
    plan.check_batch(how.batch_size)
    if (attends := attention_of(config)) is not None:
        plan.check_sequence(**attends)
    return plan


def blueprint(config: Config, plan: Plan, mesh: Mesh) -> Blueprint:
    """Build the model and its state abstractly and place every array by the plan's rules."""
    abstract = nnx.eval_shape(lambda: config.model.spec().build(nnx.Rngs(0)))
    mark_whole(abstract, plan.rules.whole)
    graphdef, trained, rest = nnx.split(abstract, nnx.Param, ...)
    names, buffer_names = placement.names_of(trained), placement.names_of(rest)
    frozen = frozen_of(config, trained)
    names_trained, inputs = (freezing.split(tree, frozen)[0] for tree in (names, inputs_of(trained)))
    rules, whole = plan.rules, NamedSharding(mesh, PartitionSpec())
    place = functools.partial(placement.shardings, rules=rules, mesh=mesh)
    shapes = freezing.split(placement.shapes_of(trained), frozen)[0]
    where = place(shapes, shapes, names_trained, table="optimizer")
    optimizer = make_optimizer(config.optimizer, config.training.steps, names_trained, inputs, where)
    state = jax.eval_shape(lambda: _fresh(config, optimizer, frozen))
    stack = getattr(abstract, "stack", None)
    check_fits(config.model.name, plan, state.params, names, None if stack is None else stack.count)
    placed = TrainState(
        step=whole,
        params=place(state.params, state.params, names, table="params"),
        buffers=place(state.buffers, state.buffers, buffer_names, table="params"),
        optimizer=_place_optimizer(state, names, rules, mesh),
        ema=state.ema and place(state.ema, state.params, names, table="optimizer"),
        ema_buffers=state.ema_buffers
        and place(state.ema_buffers, state.ema_buffers, within(buffer_names, state.ema_buffers), table="optimizer"),
        key=whole,
    )
    threshold = config.training.spill_threshold_mb
    placed.optimizer = spilled(threshold, state.optimizer, placed.optimizer)
    placed.ema = state.ema and spilled(threshold, state.ema, placed.ema)
    state = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), state, placed
    )
    return Blueprint(config, plan, mesh, graphdef, names, buffer_names, frozen, optimizer, stack, state)


def frozen_of(config: Config, trained: nnx.State) -> frozenset[str]:
    """The paths that `training.freeze` matches. Raises `ValueError` for a pattern that matches none of `trained`."""
    patterns = config.training.freeze
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(trained)]
    return freezing.frozen_paths(paths, patterns) if patterns else frozenset()


def mark_whole(model: nnx.Module, patterns: Sequence[str]) -> None:
    """Let layers know which of their weights match `device.whole`, by metadata of the variable: `layers.laid_as`.

    Raises `ValueError` for a pattern that matches none.
    """
    known = {"/".join(map(str, path)): leaf for path, leaf in nnx.iter_graph(model) if isinstance(leaf, nnx.Variable)}
    for path in freezing.matching(known, patterns, "device.whole"):
        known[path].set_metadata(whole=True)


def _fresh(config: Config, optimizer: optax.GradientTransformation, frozen: frozenset[str]) -> TrainState:
    weights, noise = jax.random.split(jax.random.key(config.training.seed))
    model = config.model.spec().build(nnx.Rngs(weights))
    params, buffers = map(nnx.to_pure_dict, nnx.split(model, nnx.Param, ...)[1:])
    ema = ema_buffers = None
    if config.training.ema_decay is not None:
        statistics = nnx.to_pure_dict(nnx.state(model, Statistic))
        ema, ema_buffers = jax.tree.map(jnp.copy, (params, statistics))
    moments = optimizer.init(freezing.split(params, frozen)[0])  # of float32, whatever the parameters are kept in
    params = in_dtype(params, config.training.param_dtype)
    return TrainState(jnp.int32(0), params, buffers, moments, ema, ema_buffers, jax.random.key_data(noise))


def _place_optimizer(state: TrainState, names: Any, rules: Rules, mesh: Mesh) -> Any:
    """A sharding for each array of the optimizer's state: a path that ends as a parameter's path belongs to it."""
    params = {
        tuple(path.split("/")): (leaf, axes) for path, leaf, axes in placement.leaves_with_names(state.params, names)
    }

    def place_leaf(path: Any, leaf: Any) -> NamedSharding:
        keys = tuple(str(getattr(key, "key", key)) for key in path)
        owner = next((keys[start:] for start in range(len(keys)) if keys[start:] in params), None)
        if owner is None:
            return NamedSharding(mesh, PartitionSpec())
        own = rules.of_path("/".join(owner))
        return placement.sharding(leaf, *params[owner], own.optimizer, own, mesh)

    return jax.tree_util.tree_map_with_path(place_leaf, state.optimizer)
