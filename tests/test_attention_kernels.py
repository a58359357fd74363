"""Attention that never holds all scores: each implementation against the product written out, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, PartitionSpec
from test_attention import CASES, arrays, written_out

from artifex.models.attention.blockwise import SAVED, blockwise

EVERYTHING = {"causal": False, "window": None, "softcap": None, "scale": None}
KERNELS = {"blockwise": functools.partial(blockwise, block=48)}


def plain(query, key, value, *, causal=False, window=None, softcap=None, scale=None):
    """All scores at once in float32, differentiated by JAX."""
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    groups, scale = query.shape[2] // key.shape[2], query.shape[3] ** -0.5 if scale is None else scale
    scores = scale * jnp.einsum("BTNH,BSNH->BNTS", query, jnp.repeat(key, groups, axis=2))
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    age = np.arange(query.shape[1])[:, None] - np.arange(key.shape[1])
    seen = (age >= 0) & (age < (window or key.shape[1])) if causal else np.ones_like(age, bool)
    weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, jnp.repeat(value, groups, axis=2))


def value_and_gradients(attention, given, **options):
    """The output, and the gradient with respect to each array of its sum over a direction."""

    @jax.jit
    def both(given):
        out, pull = jax.vjp(functools.partial(attention, **(EVERYTHING | options)), *given)
        return out, pull(jnp.asarray(direction, jnp.bfloat16).astype(out.dtype))

    direction = np.random.default_rng(1).normal(size=given[0].shape)
    return both(given)


def equations(jaxpr):
    """Every equation of a program and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def traced(kernel, given, policy=None, **options):
    """The equations of the gradient through a layer that a remat policy stands around."""
    attention = functools.partial(kernel, **(EVERYTHING | options))
    layer = jax.checkpoint(lambda given: jnp.sum(jnp.sin(attention(*given)).astype(jnp.float32)), policy=policy)
    return list(equations(jax.make_jaxpr(jax.grad(layer))(given).jaxpr))


def count(found, *names):
    return sum(equation.primitive.name in names for equation in found)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_softmax_written_out(kernel, case):
    out, gradients = value_and_gradients(KERNELS[kernel], arrays(), **CASES[case])
    np.testing.assert_allclose(out, written_out(*arrays(), **CASES[case]), atol=2e-6)
    for ours, expected in zip(gradients, value_and_gradients(plain, arrays(), **CASES[case])[1], strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "key_heads", "options"),
    [
        (50, 90, 3, 3, {}),
        (130, 20, 6, 1, {"softcap": 0.9}),
        (1, 1, 1, 1, {"causal": True}),
        (97, 97, 4, 1, {"causal": True}),
    ],
)
def test_any_lengths_and_groups(kernel, queries, keys, heads, key_heads, options):
    given = arrays(queries, keys, heads, key_heads)
    out, gradients = value_and_gradients(KERNELS[kernel], given, **options)
    np.testing.assert_allclose(out, written_out(*given, **options), atol=2e-6)
    for ours, expected in zip(gradients, value_and_gradients(plain, given, **options)[1], strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", [{}, {"causal": True, "window": 70}])
def test_bfloat16_is_rounded_little_more_than_its_result_has_to_be(kernel, options):
    given = arrays(head_dim=64, dtype=jnp.bfloat16)
    out, gradients = value_and_gradients(KERNELS[kernel], given, **options)
    expected = value_and_gradients(plain, [x.astype(jnp.float32) for x in given], **options)
    assert all(ours.dtype == jnp.bfloat16 for ours in (out, *gradients))
    root_mean_square = lambda x: np.sqrt(np.mean(np.square(x, dtype=np.float64)))  # noqa: E731

    def errors(ours, exact):
        return [
            root_mean_square(np.asarray(x, np.float32) - exact) for x in (ours, np.asarray(exact).astype(jnp.bfloat16))
        ]

    error, rounding = errors(out, expected[0])
    assert error < 1.42 * rounding
    for name, ours, exact in zip(("query", "key", "value"), gradients, expected[1], strict=True):
        # weights, their gradients and the output are rounded too
        error, rounding = errors(ours, exact)
        assert error < 2.5 * rounding, (name, error / rounding)


def test_blocks_that_no_query_sees_are_no_work():
    def pairs(T, S=None, **options):
        given = [jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32) for length in (T, S or T, S or T)]
        found = traced(blockwise, given, **options)
        return {equation.params["length"] for equation in found if equation.primitive.name == "scan"}

    assert pairs(4096) == {8 * 8}
    assert pairs(512, 1024) == {2}
    assert pairs(4096, causal=True) == {8 * 9 // 2}
    assert pairs(4096, causal=True, window=512) == {1 + 7 * 2}
    assert pairs(4096, causal=True, window=514) == {1 + 2 + 6 * 3}
    assert pairs(4096, causal=True, window=1) == {8}


def test_no_array_of_blocks_grows_with_queries_times_keys():
    T = 8192
    given = [jax.ShapeDtypeStruct((1, T, heads, 8), jnp.bfloat16) for heads in (4, 2, 2)]
    for equation in traced(blockwise, given, causal=True, window=T // 2, softcap=2.0):
        assert all(var.aval.size < T * T / 8 for var in (*equation.outvars, *equation.invars) if hasattr(var, "aval"))


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 3.0}])
def test_a_policy_that_saves_attention_does_not_compute_it_twice(options):
    products = lambda policy: count(traced(KERNELS["blockwise"], arrays(), policy, **options), "dot_general")  # noqa: E731
    forward, backward = 2, 5 + 1  # and the sum of dO O
    assert products(jax.checkpoint_policies.save_only_these_names(SAVED)) == forward + backward
    assert products(jax.checkpoint_policies.nothing_saveable) == 2 * forward + backward


def test_blocks_run_on_one_devices_part():
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("rows", None, "heads")
    attention = functools.partial(KERNELS["blockwise"], **(EVERYTHING | {"causal": True}))
    parts = jax.shard_map(attention, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    split = jax.jit(jax.grad(lambda given: jnp.sum(jnp.sin(parts(*given)))))(arrays())
    whole = jax.jit(jax.grad(lambda given: jnp.sum(jnp.sin(attention(*given)))))(arrays())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), split, whole)
