"""Tensor and sequence parallelism: what is split, what it equals, and what crosses devices for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from artifex.models import layers
from artifex.scaling import axes
from artifex.scaling.execution import Execution, execution
from artifex.scaling.mesh_utils import create_device_mesh
from artifex.scaling.strategies import combine, strategies_for


def spread(sizes, **how):
    """Rules and mesh of these sizes."""
    mesh = create_device_mesh(
        tuple(sizes.values()), tuple(sizes), devices=jax.devices()[: int(np.prod([*sizes.values()]))]
    )
    return combine(strategies_for(tuple(sizes), **how)), mesh


VOCAB, EMBED = 24, 8
TABLE = jax.random.normal(jax.random.key(0), (VOCAB, EMBED))
IDS = jax.random.randint(jax.random.key(1), (4, 6), 0, VOCAB)
WEIGHTS = jax.random.normal(jax.random.key(2), (4, 6, EMBED))


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 4}, {"fsdp": 2, "context": 2, "tensor": 2}])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_words_of_a_table_split_by_its_entries_are_those_of_the_whole(sizes, sequence_parallel):
    rules, mesh = spread(sizes, sequence_parallel=sequence_parallel)
    ids = IDS.at[0, 0].set(-1).at[1, 1].set(VOCAB)

    def words(table):
        with execution(Execution(rules=rules, mesh=mesh)):
            table = axes.shard_parameter(table, "vocab", "embed")
            x = layers.take_words(table, ids)
            return jnp.sum(jnp.where(jnp.isnan(x), 0.0, x) * WEIGHTS), x

    (_, got), gradient = jax.jit(jax.value_and_grad(words, has_aux=True))(TABLE)
    known = np.asarray((ids >= 0) & (ids < VOCAB))
    np.testing.assert_array_equal(np.isnan(np.asarray(got)).all(-1), ~known)
    np.testing.assert_array_equal(np.asarray(got)[known], np.asarray(TABLE)[np.asarray(ids)[known]])
    expected = np.zeros(TABLE.shape)
    np.add.at(expected, np.asarray(ids)[known], np.asarray(WEIGHTS)[known])
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6)


def test_words_are_taken_inside_a_pipeline_stage():
    rules, mesh = spread({"pipeline": 2, "data": 2, "tensor": 2})

    def stage(table, ids):
        with execution(Execution(rules=rules, mesh=mesh)):
            table = axes.shard_parameter(table, "vocab", "embed")
            here = jnp.sum(layers.take_words(table, ids) * WEIGHTS)
        return jax.lax.psum(here, "pipeline")

    over_stages = jax.shard_map(
        stage,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(),
        axis_names={"pipeline"},
        check_vma=False,
    )
    value, gradient = jax.jit(jax.value_and_grad(over_stages))(TABLE, IDS)
    expected = lambda table: 2 * jnp.sum(table[IDS] * WEIGHTS)  # noqa: E731
    np.testing.assert_allclose(value, expected(TABLE), rtol=1e-6)
    np.testing.assert_allclose(gradient, jax.grad(expected)(TABLE), rtol=1e-6, atol=1e-6)
