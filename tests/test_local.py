"""Code on one device's part: the same as on the whole, and communication by name does what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from artifex.scaling import axes, local
from artifex.scaling.axes import Rules, activation_rules

SIZES = {"rows": 2, "columns": 2, "stages": 2}
RULES = Rules.of(activations={"batch": "rows", "sequence": "columns", "act_heads": ("rows", "columns")})
X = np.random.default_rng(0).normal(size=(8, 12, 4)).astype(np.float32)


def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 2, 2), tuple(SIZES), axis_types=(AxisType.Auto,) * 3)


def spread(function, *arrays):
    def call(*arrays):
        with activation_rules(RULES, mesh()):
            return function(*arrays)

    return jax.jit(call)(*arrays)


def softmax_over_the_sequence(x):
    """By totals of parts, in place of one sum."""
    weights = jnp.exp(x)
    return weights / local.total(jnp.sum(weights, axis=1, keepdims=True), "sequence")


def test_parts_and_totals_are_the_whole_and_the_plain_call_on_one_device():
    names = ("batch", "sequence", None)
    split = local.local(softmax_over_the_sequence, inputs=[names], outputs=names)
    expected = np.asarray(jax.nn.softmax(X, axis=1))
    np.testing.assert_allclose(split(X), expected, rtol=1e-6)
    np.testing.assert_allclose(spread(split, X), expected, rtol=1e-6)
    gradient = lambda x: jax.grad(lambda x: jnp.sum(split(x) * X))(x)  # noqa: E731
    plain = jax.grad(lambda x: jnp.sum(jax.nn.softmax(x, axis=1) * X))(X)
    np.testing.assert_allclose(spread(gradient, X), plain, atol=1e-6)


def test_each_part_knows_its_place_and_its_neighbours():
    def look(x):
        assert local.parts("sequence") == (1 if x.shape == X.shape else 2)
        ahead, own = local.neighbours(x, "sequence"), jnp.full_like(x, local.index("sequence"))
        return ahead, own, jnp.full_like(x, local.index("batch"))

    names = ("batch", "sequence", None)
    ahead, place, row = spread(local.local(look, inputs=[names], outputs=[names] * 3), X)
    np.testing.assert_array_equal(ahead, np.concatenate([X[:, 6:], X[:, :6]], axis=1))  # a ring of two
    np.testing.assert_array_equal(np.asarray(place)[0, :, 0], [0] * 6 + [1] * 6)
    np.testing.assert_array_equal(np.asarray(row)[:, 0, 0], [0] * 4 + [1] * 4)
    np.testing.assert_array_equal(look(X)[0], X)


def test_an_exchange_turns_a_split_of_one_dim_into_a_split_of_another():
    def turn(x):
        whole = local.exchange(x, "sequence", split=2, join=1)  # every position, of half the last dim
        assert whole.shape[1:] == (12, 4 // local.parts("sequence"))
        return local.exchange(whole - jnp.mean(whole, axis=1, keepdims=True), "sequence", split=1, join=2)

    names = ("batch", "sequence", None)
    split = local.local(turn, inputs=[names], outputs=names)
    expected = X - X.mean(1, keepdims=True)
    np.testing.assert_allclose(spread(split, X), expected, atol=1e-6)
    np.testing.assert_allclose(split(X), expected, atol=1e-6)


def test_what_is_gathered_is_whole():
    def rank(x):
        return jnp.argsort(local.gathered(x, "sequence", dim=1), axis=1)[:, :6].astype(x.dtype)

    names = ("batch", "sequence", None)
    found = spread(local.local(rank, inputs=[names], outputs=("batch", None, None)), X)
    np.testing.assert_array_equal(found, np.argsort(X, axis=1)[:, :6])


def test_it_works_where_another_axis_is_manual_already():
    names = ("batch", "sequence", None)
    split = local.local(softmax_over_the_sequence, inputs=[names], outputs=names)

    def stage(x):
        x = axes.shard(x[0], *names)  # laid out by the axes that are left
        return axes.shard(split(x) + jax.lax.axis_index("stages").astype(x.dtype), *names)[None]

    def stages(x):
        with activation_rules(RULES, mesh()):
            spec = PartitionSpec("stages")
            return jax.shard_map(stage, mesh=mesh(), in_specs=spec, out_specs=spec, axis_names={"stages"})(x)

    found = jax.jit(stages)(np.stack([X, X]))
    np.testing.assert_allclose(found[0], jax.nn.softmax(X, axis=1), rtol=1e-6)
    np.testing.assert_allclose(found[1] - 1, jax.nn.softmax(X, axis=1), atol=1e-6)


def test_a_name_means_one_split():
    twice = local.local(lambda x, y: x, inputs=[("batch",), ("batch",)], outputs=("batch",))
    with pytest.raises(ValueError, match=r"'batch' of size 3 would be split over nothing, of another array over"):
        spread(twice, np.zeros(4), np.zeros(3))
    with pytest.raises(ValueError, match="unknown logical axis 'rows'"):
        spread(local.local(lambda x: local.total(x, "rows"), inputs=[("batch",)], outputs=("batch",)), np.zeros(4))
