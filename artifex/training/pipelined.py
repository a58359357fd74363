"""Loss and gradients of a batch by a pipeline: the model's parts joined to the executor of `artifex.scaling.pipeline`.

The value is that of the microbatches computed one after the other, each weighed by its targets, with the same keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from artifex.models.stack import run_stack
from artifex.models.staged import Stack
from artifex.scaling import axes
from artifex.scaling.execution import execution
from artifex.scaling.pipeline.executor import Parts, value_and_grad
from artifex.scaling.placement import path_of
from artifex.training import freezing
from artifex.training.precision import in_dtype, model_in

if TYPE_CHECKING:
    from artifex.training.state import Blueprint

Tree = Any


def pipelined(blue: Blueprint) -> Callable[..., tuple[tuple[jax.Array, tuple[dict[str, jax.Array], Tree]], Tree]]:
    """`run(params, buffers, batch, key) -> ((loss, (metrics, buffers)), gradients of what is trained)`.

    Buffers stay as they are: no model with a stack changes one. The frozen parts of a model are for `prepare`, before
    the pipeline begins.
    """
    how, schedule, stack = blue.config.training, blue.plan.pipeline, blue.stack
    assert schedule is not None and stack is not None, "a plan with a pipeline, and a model that has stages"
    names_rest, names_stack = _cut(blue.split(blue.names)[0], stack.path)

    def lay_out(rest: Tree, pieces: Tree) -> tuple[Tree, Tree]:
        def of_rest(keys: Any, leaf: jax.Array, names: axes.Names) -> jax.Array:
            return axes.shard_gradient(leaf, *names, path=path_of(keys))

        def of_piece(keys: Any, leaf: jax.Array, names: axes.Names) -> jax.Array:
            return axes.shard_gradient(leaf, None, *names, path=path_of((*stack.path, *keys)))

        of_pieces = jax.tree_util.tree_map_with_path(of_piece, pieces, names_stack)
        return jax.tree_util.tree_map_with_path(of_rest, rest, names_rest), of_pieces

    of: dict[str, Any] = {"axis": blue.plan.pipeline_axis, "dtype": how.gradient_dtype, "lay_out": lay_out}
    parts = _parts(blue, stack, padded=bool(stack.count % schedule.stages))
    run = value_and_grad(parts, schedule, stack.count, blue.mesh, **of)

    def whole(params: Tree, buffers: Tree, batch: dict[str, jax.Array], key: jax.Array) -> Any:
        rows, keys = _prepared(blue, params, buffers, batch, key)
        trained, held = (_cut(in_dtype(tree, how.compute_dtype), stack.path) for tree in blue.split(params))
        with execution(blue.execution):
            value, (of_rest, of_stack) = run((trained[0], held[0]), (trained[1], held[1]), rows, keys)
        loss, metrics = value
        return (loss, (metrics, buffers)), freezing.join(of_rest, _under(stack.path, of_stack))

    return whole


def _parts(blue: Blueprint, stack: Stack, *, padded: bool) -> Parts:
    """The parts of the model's loss, of pairs of trees: what is trained, and what is frozen."""
    dtype = blue.config.training.compute_dtype

    def model_of(rest: tuple[Tree, Tree] | None, piece: tuple[Tree, Tree] | None) -> Any:
        """The model of some of its parameters; nothing that is run with it reads the zeros in place of the others."""
        zeros = lambda tree: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), tree)  # noqa: E731
        outside, stacked = _cut(blue.state.params, stack.path)
        outside = zeros(outside) if rest is None else freezing.join(*rest)
        stacked = zeros(stacked) if piece is None else freezing.join(*piece)
        buffers = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), blue.state.buffers)
        return model_in(dtype, blue.graphdef, freezing.join(outside, _under(stack.path, stacked)), buffers)

    def before(rest: Tree, rows: Tree, key: Any) -> tuple[Tree, Tree, Tree]:
        return tuple(model_of(rest, None).before(rows, key))

    def blocks(piece: Tree, stream: Tree, beside: Tree, own: Tree, there: jax.Array) -> tuple[Tree, Tree]:
        def apply_there(block: Any, stream: Tree, beside: Tree, own: Tree) -> tuple[Tree, Tree]:
            own, there = own
            after, report = stack.apply(block, stream, beside, own)
            after = jax.tree.map(lambda new, old: jnp.where(there, new, old), after, stream)
            return after, jax.tree.map(lambda value: jnp.where(there, value, 0), report)

        module = functools.reduce(getattr, stack.path, model_of(None, piece))
        run = functools.partial(run_stack, module, stream, there.size, beside=beside)
        stream, reports = run(apply_there, (own, there)) if padded else run(stack.apply, own)
        return stream, jax.tree.map(lambda each: jnp.sum(each, axis=0), reports)

    def after(rest: Tree, stream: Tree, report: Tree, beside: Tree, rows: Tree) -> Any:
        return model_of(rest, None).after(stream, report, beside, rows)

    return Parts(before, blocks, after)


def _prepared(
    blue: Blueprint, params: Tree, buffers: Tree, batch: dict[str, jax.Array], key: jax.Array
) -> tuple[Tree, Any]:
    """The rows of each microbatch with their noise, and its key."""
    assert blue.plan.pipeline is not None
    count = blue.plan.pipeline.microbatches
    # row r goes to microbatch r % count: a device keeps its own rows
    split = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)

    def prepare(part: tuple[dict[str, jax.Array], jax.Array]) -> tuple[Tree, Any]:
        batch, index = part
        model = model_in(blue.config.training.compute_dtype, blue.graphdef, params, buffers)
        return model.prepare(batch, nnx.Rngs(jax.random.fold_in(key, index)), 0)

    with execution(blue.running):
        return jax.lax.map(prepare, (split, jnp.arange(count)))


def _cut(tree: Tree, path: tuple[str, ...]) -> tuple[Tree, Tree]:
    """A tree without the branch at `path`, and that branch."""
    if not path or not isinstance(tree, Mapping) or path[0] not in tree:
        return tree, {}
    rest = {key: node for key, node in tree.items() if key != path[0]}
    if len(path) == 1:
        return rest, tree[path[0]]
    below, branch = _cut(tree[path[0]], path[1:])
    return ({**rest, path[0]: below} if below else rest), branch


def _under(path: tuple[str, ...], branch: Tree) -> Tree:
    """`branch` at `path` of an otherwise empty tree."""
    for key in reversed(path):
        branch = {key: branch} if branch else {}
    return branch
