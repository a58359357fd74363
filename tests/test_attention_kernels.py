"""Attention that never holds all scores: each implementation against the product written out, and what it costs."""

import functools
import pathlib
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, PartitionSpec
from test_attention import CASES, arrays, written_out

from artifex.models.attention.blockwise import SAVED, blockwise
from artifex.models.attention.cudnn import cudnn, takes
from artifex.models.attention.splash import splash
from artifex.scaling import remat

EVERYTHING = {"causal": False, "window": None, "softcap": None, "scale": None}
KERNELS = {
    "blockwise": functools.partial(blockwise, block=48),
    "splash": functools.partial(splash, block=128, interpret=True),
}
# the interpreter takes longer to compile, and masks of one kind are one kernel
EACH_CASE = [("blockwise", case) for case in CASES] + [("splash", case) for case in ("all", "window", "softcap")]


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
    """Every equation of a program and of those inside it, without calls that return nothing: XLA drops them."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "jit" and not equation.outvars:
            continue
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


@pytest.mark.parametrize(("kernel", "case"), EACH_CASE)
def test_values_and_gradients_are_those_of_the_softmax_written_out(kernel, case):
    out, gradients = value_and_gradients(KERNELS[kernel], arrays(), **CASES[case])
    np.testing.assert_allclose(out, written_out(*arrays(), **CASES[case]), atol=2e-6)
    for ours, expected in zip(gradients, value_and_gradients(plain, arrays(), **CASES[case])[1], strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "queries", "keys", "heads", "key_heads", "options"),
    [
        ("blockwise", 50, 90, 3, 3, {}),
        ("blockwise", 130, 20, 6, 1, {"softcap": 0.9}),
        ("blockwise", 97, 97, 4, 1, {"causal": True}),
        ("blockwise", 1, 1, 1, 1, {"causal": True}),
        ("splash", 130, 20, 6, 1, {"softcap": 0.9}),
        ("splash", 1, 1, 1, 1, {"causal": True}),
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
        assert error < 1.6 * rounding, name


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


@pytest.mark.parametrize("kernel", [blockwise, splash])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 4096, "softcap": 2.0}])
def test_no_array_of_the_program_grows_with_queries_times_keys(kernel, options):
    T = 8192 - 20
    given = [jax.ShapeDtypeStruct((1, T, heads, 8), jnp.bfloat16) for heads in (4, 2, 2)]
    for equation in traced(kernel, given, **options):
        for var in (*equation.outvars, *equation.invars):
            assert getattr(var.aval, "size", 0) < T * T / 8, equation.primitive


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 3.0}])
def test_a_policy_that_saves_attention_does_not_compute_it_twice(options):
    products = lambda policy: count(traced(KERNELS["blockwise"], arrays(), policy, **options), "dot_general")  # noqa: E731
    forward, backward = 2, 5
    assert products(jax.checkpoint_policies.save_only_these_names(SAVED)) == forward + backward
    assert products(None) == 2 * forward + backward


def test_a_policy_that_saves_attention_does_not_run_splash_twice():
    kernels = lambda policy: count(traced(splash, arrays(), policy, causal=True), "pallas_call")  # noqa: E731
    assert kernels(jax.checkpoint_policies.save_only_these_names(SAVED)) == 3  # and dQ, and dK with dV
    assert kernels(None) == 4


@pytest.fixture
def cudnn_kernels(monkeypatch):
    """Traced where there is no cuDNN, which is asked for its version."""
    fused_attention = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused_attention, "check_cudnn_version", lambda: 91_000)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 3}])
def test_cudnns_kernels_stand_in_the_program_for_a_gpu(cudnn_kernels, options):
    given = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in arrays(16, 16)]
    attention = functools.partial(cudnn, **(EVERYTHING | options))
    gradient = jax.jit(jax.grad(lambda given: jnp.sum(attention(*given).astype(jnp.float32))))
    program = gradient.trace(given).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax(" in program and "__cudnn$fmhaSoftmaxBackward(" in program
    assert f"\\22sliding_window_length\\22: {options.get('window', 0)}" in program
    assert ("CAUSAL" if options else "NO_MASK") in program


def test_a_policy_that_saves_attention_does_not_run_cudnn_twice(cudnn_kernels):
    given = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in arrays(16, 16)]
    runs = lambda policy: count(traced(cudnn, given, policy), "dot_product_attention_fwd_wrapper")  # noqa: E731
    assert runs(remat.policy("attention=keep")) == runs(remat.policy("dots")) == 1
    assert runs(None) == runs(remat.policy("qkv=keep")) == 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("bfloat16", 64, None), True),
        (("float16", 128, None), True),
        (("float32", 64, None), False),
        (("bfloat16", 256, None), False),
        (("bfloat16", 36, None), False),
        (("bfloat16", 64, 50.0), False),
    ],
)
def test_cudnn_takes_what_its_kernels_compute_and_refuses_the_rest(cudnn_kernels, given, expected):
    dtype, head_dim, softcap = given
    assert takes(*given) == expected
    shape = jax.ShapeDtypeStruct((1, 16, 2, head_dim), dtype)
    attention = functools.partial(cudnn, **(EVERYTHING | {"softcap": softcap}))
    if expected:
        assert jax.eval_shape(attention, shape, shape, shape) == shape
    else:
        with pytest.raises(ValueError, match=f"got {dtype}, {head_dim} and {softcap}"):
            jax.eval_shape(attention, shape, shape, shape)


def test_blocks_run_on_one_devices_part():
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("rows", None, "heads")
    attention = functools.partial(KERNELS["blockwise"], **(EVERYTHING | {"causal": True}))
    parts = jax.shard_map(attention, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    split = jax.jit(jax.grad(lambda given: jnp.sum(jnp.sin(parts(*given)))))(arrays())
    whole = jax.jit(jax.grad(lambda given: jnp.sum(jnp.sin(attention(*given)))))(arrays())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), split, whole)


ROOT = pathlib.Path(__file__).parent.parent
# for a device that is not there, in a process of its own
COMPILED = """
    import functools, os
    from artifex.scaling.targets import Target
    target = Target.parse({target!r})
    os.environ.update(target.environment())
    import jax, jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, PartitionSpec
    from artifex.models.attention.{kernel} import {kernel}

    attention = functools.partial({kernel}, **{options})
    mesh = Mesh(np.array(target.devices()[:1]), ("rows",))
    parts = jax.shard_map(attention, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    where = jax.sharding.NamedSharding(mesh, PartitionSpec())
    given = [jax.ShapeDtypeStruct((1, {T}, heads, 64), jnp.bfloat16, sharding=where) for heads in (4, 2, 2)]
    both = jax.jit(jax.value_and_grad(lambda given: jnp.sum(parts(*given).astype(jnp.float32))))
    print(both.lower(given).compile().as_text())
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 1000, "softcap": 30.0}])
@pytest.mark.parametrize(
    ("kernel", "target"), [("splash", "tpu:v5e:4x4"), ("blockwise", "gpu:h100:1x1"), ("cudnn", "gpu:h100:1x1")]
)
def test_no_array_of_the_compiled_program_grows_with_queries_times_keys(kernel, target, options):
    pytest.importorskip("jax_plugins" if "h100" in target else "libtpu")
    T = 4096
    options = EVERYTHING | options | ({"softcap": None} if kernel == "cudnn" else {})
    program = textwrap.dedent(COMPILED.format(target=target, kernel=kernel, options=options, T=T))
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = {
        shape: np.prod([int(dim) for dim in shape.split(",")]) for shape in re.findall(r"\[(\d[\d,]*)\]", done.stdout)
    }
    assert T * 4 * 64 in sizes.values()
    assert [shape for shape, size in sizes.items() if size >= T * T / 4] == []
