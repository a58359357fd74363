"""Properties of the diffusion networks: published sizes, names, where information flows, and how they start."""

import dataclasses
import functools
import math
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from artifex.config import Config
from artifex.models.diffusion import blocks
from artifex.models.diffusion.networks import DIT, MMDIT, UNET, DiTConfig, MMDiTConfig, UNetConfig
from artifex.models.resnet import ResnetBlock
from artifex.scaling import axes
from artifex.scaling.execution import Execution, execution
from artifex.scaling.placement import leaves_with_names, names_of, shapes_of, sharding
from artifex.scaling.plan import Plan

ALL: dict[str, Any] = UNET | DIT | MMDIT
SMALL: dict[str, Any] = {
    "unet": UNetConfig(8, 3, 3, 10, block_channels=(16, 32), layers_per_block=1, groups=8, head_dim=16),
    "dit": DiTConfig(8, 3, 6, 10, embed_dim=32, num_layers=2, num_heads=4),
    "mmdit": MMDIT["mmdit-nano"],
}
MANY_SIZES = {"conv_in", "conv_out", "conv_hidden", "kernel", "in_features", "out_features"}

# Totals of the released models; those of DiT count the fixed table of positions, one vector for each patch, which is
# no parameter of ours.
PUBLISHED = {
    "ddpm-cifar": 35_746_307,
    "dit-s2": 32_963_360,
    "dit-b2": 130_512_416,
    "dit-l2": 458_102_816,
    "dit-xl2": 675_129_632,
    "dit-xl4": 675_074_432,
    # without the queries of the text in the last block, which nothing reads
    "sd3-medium": 2_028_328_000 - (1536 * 1536 + 1536),
}


QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile


@functools.cache
def abstract(cfg):
    return nnx.eval_shape(lambda: cfg.build(nnx.Rngs(0)))


def randomised(cfg, seed=0):
    """The network with every parameter drawn anew, so that nothing starts at 0: its graph and its parameters."""
    graphdef, state = nnx.split(abstract(cfg))
    shapes, draw = nnx.to_pure_dict(state), np.random.default_rng(seed)

    def value(leaf):
        fan_in = math.prod(leaf.shape[:-1]) if leaf.ndim > 2 else leaf.shape[0]
        return jnp.asarray(draw.normal(size=leaf.shape) * (fan_in**-0.5 if leaf.ndim > 1 else 0.3), jnp.float32)

    return graphdef, jax.tree.map(value, shapes)


def inputs(cfg, batch=2, seed=1) -> tuple[Any, Any, Any]:
    draw = np.random.default_rng(seed)
    x = jnp.asarray(draw.normal(size=(batch, cfg.image_size, cfg.image_size, cfg.in_channels)), jnp.float32)
    t = jnp.linspace(0.0, 999.0, batch)
    if cfg.num_classes:
        return x, t, jnp.arange(batch) % cfg.num_classes
    widths = {"context": (batch, 5, cfg.context_dim), "pooled": (batch, cfg.pooled_dim)}
    return x, t, {name: jnp.asarray(draw.normal(size=shape), jnp.float32) for name, shape in widths.items()}


@functools.cache
def compiled(cfg):
    """A function of (parameters, x, t, condition)."""
    graphdef, _ = nnx.split(abstract(cfg))
    return jax.jit(lambda params, *given: nnx.merge(graphdef, params)(*given), compiler_options=QUICKLY)


@pytest.fixture(scope="module", params=SMALL)
def network(request):
    """The configuration, the compiled network, and parameters for it."""
    cfg = SMALL[request.param]
    return cfg, compiled(cfg), randomised(cfg)[1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    cfg = ALL[name]
    positions = cfg.embed_dim * (cfg.image_size // cfg.patch_size) ** 2 if name.startswith("dit") else 0
    assert (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes_of(abstract(cfg)))) + positions == PUBLISHED[name]
    )


@pytest.mark.parametrize("name", [name for name in ALL if name not in DIT or name.endswith(("2", "digits"))])
def test_every_parameter_is_named_and_one_name_has_one_size(name):
    model, sizes = abstract(ALL[name]), {}
    for path, leaf, names in leaves_with_names(shapes_of(model), names_of(model)):
        assert len(names) == len(leaf.shape) > 0
        for axis, size in zip(names, leaf.shape, strict=True):
            assert axis in MANY_SIZES or sizes.setdefault(axis, size) == size, f"{path}: {axis} is {size}"


def test_a_fresh_network_predicts_zero_and_its_transformer_blocks_are_the_identity(network, monkeypatch):
    cfg, run, _ = network
    draw = np.random.default_rng(0)
    for name in ("normal", "truncated_normal"):  # JAX's own generators take longer to compile than all else here
        kind = lambda key, *given: jnp.asarray(draw.normal(size=given[-1]), jnp.float32)  # noqa: E731
        monkeypatch.setattr(jax.random, name, kind)
    params = nnx.to_pure_dict(nnx.state(cfg.build(nnx.Rngs(0))))
    x, t, condition = inputs(cfg)
    out = run(params, x, t, condition)
    assert out.shape == (*x.shape[:3], cfg.out_channels)
    np.testing.assert_array_equal(out, 0)
    if isinstance(cfg, UNetConfig):
        # read by a head of other numbers, the image has passed no residual branch and no attention: no time, no label
        params["conv_out"]["kernel"] = params["conv_out"]["kernel"] + 1.0
        before, after = run(params, x, t, condition), run(params, x, t + 1, condition + 1)
        np.testing.assert_array_equal(before, after)
        assert np.abs(before).max() > 0.1
    if isinstance(cfg, DiTConfig):
        # read by a head of other numbers, the stream is still that of the patches: no time, label or other patch in it
        head = params["head"]["project"]
        head["kernel"] = head["kernel"] + jnp.arange(cfg.embed_dim, dtype=jnp.float32)[:, None, None, None]
        before, after = run(params, x, t, condition), run(params, x.at[:, 0, 0].add(1.0), t + 1, condition + 1)
        changed = np.abs(np.asarray(after - before)).max((0, 3)) > 0
        assert changed[:2, :2].all() and changed.sum() == 4


def test_every_pixel_time_and_condition_reaches_every_output(network):
    cfg, run, params = network
    x, t, condition = inputs(cfg)
    got = np.asarray(run(params, x, t, condition))
    far = np.asarray(run(params, x.at[:, -1, -1].add(1.0), t, condition))
    assert (np.abs(far - got).max(-1) > 1e-7).all()
    later = np.asarray(run(params, x, t + 1, condition))
    other = np.asarray(run(params, x, t, jax.tree.map(lambda leaf: leaf + 1, condition)))
    assert np.abs(later - got).max() > 1e-4 and np.abs(other - got).max() > 1e-4


def test_examples_do_not_see_each_other(network):
    cfg, run, params = network
    both, (x, t, condition) = run(params, *inputs(cfg)), inputs(cfg)
    swapped = run(params, x[::-1], t[::-1], jax.tree.map(lambda leaf: leaf[::-1], condition))
    np.testing.assert_allclose(swapped[::-1], both, atol=2e-6)


def test_no_condition_is_the_label_or_the_text_that_means_none(network):
    cfg, run, params = network
    x, t, condition = inputs(cfg)
    none = run(params, x, t, None)
    assert np.abs(none - run(params, x, t, condition)).max() > 1e-3
    if cfg.num_classes:
        np.testing.assert_allclose(none, run(params, x, t, jnp.full(2, cfg.num_classes)), atol=1e-6)


def test_a_text_is_a_set_of_tokens_to_its_network():
    cfg = SMALL["mmdit"]
    params, run, (x, t, condition) = randomised(cfg)[1], compiled(cfg), inputs(cfg)
    turned = condition | {"context": condition["context"][:, jnp.array([3, 0, 4, 1, 2])]}
    np.testing.assert_allclose(run(params, x, t, turned), run(params, x, t, condition), atol=1e-5)


def test_bfloat16_stays_near_float32_and_traces_once(network):
    cfg, run, params = network
    given = inputs(cfg)
    full = np.asarray(run(params, *given))
    traced = run._cache_size()
    run(jax.tree.map(lambda leaf: 0.9 * leaf, params), *inputs(cfg, seed=2))
    assert run._cache_size() == traced
    half = run(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), *given)
    assert half.dtype == jnp.float32
    assert np.abs(half - full).max() < 0.05 * np.abs(full).max()


def test_dropout_zeroes_its_share_before_the_second_convolution_and_scales_up_the_rest():
    block = ResnetBlock(8, 8, groups=2, dropout=0.25, out_scale=0.0, rngs=nnx.Rngs(0))
    block.conv2.kernel[...] = block.conv2.kernel[...].at[1, 1].set(jnp.eye(8))  # what enters it leaves it
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16, 16, 8)), jnp.float32)
    whole, dropped = block(x) - x, block(x, key=jax.random.key(1)) - x
    kept = np.asarray(jnp.abs(dropped) > 0)
    assert abs(kept.mean() - 0.75) < 0.02
    np.testing.assert_allclose(dropped, np.where(kept, whole / 0.75, 0), atol=1e-5)


def test_each_residual_block_draws_its_own_dropout_and_a_call_without_a_key_none():
    cfg = dataclasses.replace(SMALL["unet"], dropout=0.5)
    blocks = [node for _, node in nnx.iter_graph(abstract(cfg)) if isinstance(node, ResnetBlock)]
    assert cfg.residual_blocks == len(blocks) == 8
    params, given = randomised(cfg)[1], inputs(cfg)
    whole, one, again, other = (
        compiled(cfg)(params, *given, *key) for key in ([], *([jax.random.key(seed)] for seed in (0, 0, 1)))
    )
    np.testing.assert_allclose(whole, compiled(SMALL["unet"])(params, *given), atol=1e-6)
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.01 < np.abs(one - whole).max()


@pytest.fixture(scope="module", params=["dit", "mmdit"])
def gradient(request):
    """The configuration, a function of (parameters, x, t, condition), and what it gives in one loop-free program."""
    cfg = SMALL[request.param]
    graphdef, params = randomised(cfg)

    def of(params, *given):
        return jax.grad(lambda params: jnp.mean(jnp.square(nnx.merge(graphdef, params)(*given))))(params)

    return cfg, params, of, jax.jit(of, compiler_options=QUICKLY)(params, *inputs(cfg))


@pytest.mark.parametrize("gradient", ["dit"], indirect=True)
def test_scanning_and_recomputing_change_no_gradient(gradient):
    cfg, params, of, expected = gradient

    def scanned(*given):
        with execution(Execution("full", 1)):
            return of(*given)

    assert_near(jax.jit(scanned, compiler_options=QUICKLY)(params, *inputs(cfg)), expected)


def assert_near(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got, expected)


def test_a_network_spread_over_a_mesh_has_the_gradient_of_one_device(gradient):
    cfg, params, of, expected = gradient
    plan = Plan.from_device(Config.from_dict({"device": {"data": 2, "fsdp": 2, "tensor": 2}}).device, 8)
    rules, mesh = plan.rules, plan.make_mesh()
    tree = leaves_with_names(shapes_of(abstract(cfg)), names_of(abstract(cfg)))
    where = [sharding(leaf, leaf, names, rules.params, rules, mesh) for _, leaf, names in tree]
    spread = jax.device_put(params, jax.tree.unflatten(jax.tree.structure(params), where))
    block = spread["layers"]["text"] if "context" in params else spread["layers"]
    for kernel in (block["attention"]["query"]["kernel"], block["mlp"]["up"]["kernel"]):
        assert "tensor" in kernel.sharding.spec

    def on_mesh(*given):
        with axes.activation_rules(rules, mesh):
            return of(*given)

    assert_near(jax.jit(on_mesh, compiler_options=QUICKLY)(spread, *inputs(cfg)), expected)


def test_the_time_embedding_is_that_of_its_formula():
    t = np.array([0.0, 1.0, 256.0, 257.0, 999.0])
    angles = t[:, None] * 10_000 ** (-np.arange(16) / 15)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    got = blocks.time_sinusoids(jnp.asarray(t, jnp.float32), 32, cosine_first=True, shift=1)
    np.testing.assert_allclose(got, expected, atol=2e-4)
    other = blocks.time_sinusoids(jnp.asarray(t, jnp.bfloat16), 32, cosine_first=False, shift=0)
    np.testing.assert_allclose(other[4, 17], np.cos(1000 * 10_000 ** (-1 / 16)), atol=2e-4)  # bfloat16 has no 999


def test_likeness_of_two_places_depends_on_their_displacement_alone():
    table = blocks.position_table(32, 5, 5).reshape(5, 5, 32)
    likeness = np.einsum("abD,cdD->abcd", table, table)
    for rows, columns in ((0, 1), (1, 0), (2, 3)):
        apart = [likeness[a, b, a + rows, b + columns] for a in range(5 - rows) for b in range(5 - columns)]
        np.testing.assert_allclose(apart, apart[0], rtol=1e-4)
    assert (np.argmax(likeness.reshape(25, 25), -1) == np.arange(25)).all()
    # the centre of a larger grid, at the scale of the smaller: half of it is passed in five steps
    np.testing.assert_allclose(blocks.position_table(32, 4, 8)[0], blocks.position_table(32, 4, 4)[5], atol=1e-6)


def test_patches_are_squares_row_by_row_and_come_back():
    x = jnp.arange(2 * 6 * 6 * 3, dtype=jnp.float32).reshape(2, 6, 6, 3)
    patches = blocks.patchify(x, 2)
    np.testing.assert_array_equal(patches[1, 5], x[1, 2:4, 4:6])
    np.testing.assert_array_equal(blocks.unpatchify(patches), x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiTConfig(patch_size=3), "image_size 32 does not divide by patch_size 3"),
        (lambda: DiTConfig(embed_dim=100, num_heads=3), "embed_dim 100 does not divide by num_heads 3"),
        (lambda: DiTConfig(embed_dim=6, num_heads=3), "embed_dim 6 does not divide by 4"),
        (lambda: DiTConfig(num_classes=-1), "num_classes is -1"),
        (lambda: DiTConfig(num_layers=0), "num_layers is 0"),
        (lambda: MMDiTConfig(num_layers=1), "num_layers is 1"),
        (lambda: MMDiTConfig(position_grid=8), "position_grid is 8"),
        (lambda: UNetConfig(groups=48), "block_channels 128 does not divide by groups 48"),
        (lambda: UNetConfig(image_size=20), "image_size 20 does not divide by 8"),
        (lambda: UNetConfig(attention_levels=(4,)), "attention_levels has 4"),
        (lambda: UNetConfig(head_dim=48), "head_dim 48 does not divide the 256 channels of level"),
        (lambda: UNetConfig(frequency_shift=2), "frequency_shift is 2"),
        (lambda: UNetConfig(block_channels=()), "block_channels is"),
        (lambda: UNetConfig(dropout=1.0), r"dropout 1\.0 is not in"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "x", "condition", "message"),
    [
        (
            "dit",
            (2, 8, 8, 3),
            np.zeros(2, np.float32),
            r"condition is float32\[2\]; give integer labels of shape \(2,\)",
        ),
        ("dit", (2, 8, 8, 3), np.zeros((2, 1), int), r"give integer labels"),
        ("dit", (2, 10, 10, 3), None, r"images of shape \(10, 10, 3\), but the network takes \(8, 8, 3\)"),
        ("unet", (2, 9, 8, 3), None, "sizes that divide by 2"),
        ("mmdit", (2, 8, 8, 3), {"context": np.zeros((2, 3, 24))}, r"condition has \['context'\]"),
        (
            "mmdit",
            (2, 8, 8, 3),
            {"context": np.zeros((2, 3, 9)), "pooled": np.zeros((2, 16))},
            r"give \(2, tokens, 24\)",
        ),
        ("mmdit", (2, 8, 8, 3), {"context": np.zeros((2, 3, 24)), "pooled": np.zeros(16)}, r"give \(2, 16\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name, x, condition, message):
    condition = jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype.name.replace("64", "32")), condition)
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: SMALL[name].build(nnx.Rngs(0))(jnp.zeros(x), jnp.zeros(2), condition))


def test_a_network_without_classes_refuses_labels():
    cfg = dataclasses.replace(SMALL["unet"], num_classes=0)
    with pytest.raises(ValueError, match="network has num_classes 0"):
        nnx.eval_shape(lambda: cfg.build(nnx.Rngs(0))(jnp.zeros((2, 8, 8, 3)), jnp.zeros(2), jnp.zeros(2, int)))


def test_configurations_and_layouts_import_no_jax():
    program = "import sys, artifex.models.diffusion.layouts; print(sorted({'jax', 'flax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
