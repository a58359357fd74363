"""Rows that are drawn together: in chunks as without, and as many on every device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from artifex.models.rows import fill_up, in_chunks
from artifex.scaling.axes import Rules
from artifex.scaling.execution import Execution, execution
from artifex.scaling.mesh_utils import create_device_mesh


def squares(rows, key):
    x, label = rows
    return jnp.square(x) + label[:, None].astype(x.dtype)


@pytest.mark.parametrize("count", [1, 4, 5, 11])
def test_chunks_draw_what_one_draw_does(count):
    rows = (np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32), np.arange(count))
    draw = jax.jit(lambda rows: in_chunks(squares, rows, jax.random.key(0), 4))
    np.testing.assert_allclose(draw(rows), squares(rows, None), rtol=1e-6)


def test_every_chunk_has_noise_of_its_own_and_the_first_that_of_a_single_one():
    draw = lambda rows, key: rows + jax.random.normal(key, rows.shape)  # noqa: E731
    key = jax.random.key(1)
    many, few = (jax.jit(lambda x: in_chunks(draw, x, key, 4))(jnp.zeros((count, 2))) for count in (8, 4))
    np.testing.assert_array_equal(many[:4], few)
    assert len(np.unique(many)) == many.size


def test_rows_are_filled_up_to_what_the_devices_divide():
    mesh, rules = create_device_mesh((8,), ("data",)), Rules.of(activations={"batch": "data"})
    sizes = []

    def drawn(x):
        with execution(Execution(rules=rules, mesh=mesh)):
            return in_chunks(lambda x, _: sizes.append(x.shape[0]) or 2 * x, x, jax.random.key(0), 4)

    x = np.arange(6.0, dtype=np.float32)
    np.testing.assert_array_equal(jax.jit(drawn)(x), 2 * x)
    assert sizes == [8]  # 4 rows to a chunk, and 8 devices
    np.testing.assert_array_equal(fill_up(x), x)  # on one device as they are
