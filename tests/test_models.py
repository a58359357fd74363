"""Properties that every model of the zoo holds, and the decoder's own."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from artifex import models
from artifex.models import layers
from artifex.models.attention import recording
from artifex.models.staged import Start, through
from artifex.models.transformer.generate import empty_caches, pick
from artifex.models.transformer.positions import Positions
from artifex.optim import inputs_of
from artifex.scaling.execution import Execution, execution
from artifex.scaling.mesh_utils import create_device_mesh
from artifex.scaling.placement import leaves_with_names, names_of, shapes_of
from artifex.scaling.strategies import combine, strategies_for

SMALL = {
    "vocab_size": 61,
    "embed_dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "mlp_dim": 48,
    "sequence_length": 48,
    "head_dim": 8,
}
LAYOUTS = {
    "llama": ("llama-nano", {"tied_head": False, "num_kv_heads": 2}),
    "gpt2": ("gpt2-nano", {}),
    "qwen3": ("qwen3-nano", {}),
    "gemma2": ("gemma2-nano", {"num_layers": 4, "window": 6}),
    "mixtral": ("mixtral-8x7b", {"num_kv_heads": 2, "num_experts": 4, "num_shared_experts": 1, "expert_mlp_dim": 24}),
    "linear": ("linear-nano", {"num_kv_heads": 2}),
}

OF_MANY_SIZES = {"conv_in", "conv_out", "conv_hidden", "kernel"}  # convolutions differ from level to level

# Published sizes: model cards of the checkpoints, counted with tied heads once.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3.2-1b": 1_235_814_400,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
}


@functools.cache
def abstract(preset: str):
    return nnx.eval_shape(lambda: models.create(preset, rngs=nnx.Rngs(0)))


@functools.cache
def model_of(layout: str):
    name, overrides = LAYOUTS[layout]
    # in one program: made op by op, every parameter compiles its own
    return nnx.jit(lambda: models.create(name, rngs=nnx.Rngs(0), **(SMALL | overrides)))()


@pytest.fixture(scope="module", params=LAYOUTS)
def model(request):
    return model_of(request.param)


# compiled once for each layout and shape: run op by op, a model compiles every op by itself
forward = nnx.jit(lambda model, tokens: model(tokens))
loss_of = nnx.jit(lambda model, batch: model.loss(batch))


def nats_of(model, batch):
    """The cross entropy, without what a model with experts adds to its loss, and the metrics."""
    loss, metrics = loss_of(model, batch)
    return metrics.get("nats", loss), metrics


def ids(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, SMALL["vocab_size"], shape))


@pytest.mark.parametrize("preset", models.list_models())
def test_every_parameter_is_named_and_one_name_has_one_size(preset):
    model = abstract(preset)
    sizes = {}
    for path, leaf, names in leaves_with_names(shapes_of(model), names_of(model)):
        assert len(names) == len(leaf.shape) > 0
        for name, size in zip(names, leaf.shape, strict=True):
            if name in OF_MANY_SIZES:
                continue
            assert sizes.setdefault(name, size) == size, f"{path}: {name} is {size} here and {sizes[name]} elsewhere"


@pytest.mark.parametrize("preset", models.list_models())
def test_matrices_for_muon_are_the_linear_maps_inside_the_model(preset):
    params = nnx.state(abstract(preset), nnx.Param)
    names, found = names_of(params), inputs_of(params)
    assert jax.tree.structure(found) == jax.tree.structure(nnx.to_pure_dict(params))
    for path, count, axes in leaves_with_names(found, names):
        own = [name for name in axes if name not in ("layers", "experts")]
        outside = path.split("/")[-1] != "kernel" or {"vocab", "positions", "classes", "codes"} & set(own)
        outside = outside or {"kernel", "frequencies", "in_features", "context", "latent"} & set(own)
        if outside or path.endswith(("router/kernel", "head/project/kernel")):
            assert count == 0, path
        else:
            assert count == (2 if own == ["heads", "head_dim", "embed"] else 1), path


def test_muon_splits_a_diffusion_transformer_at_its_inputs():
    params = nnx.state(abstract("dit-digits"), nnx.Param)
    paths = {"modulation": "modulation/project", "out": "attention/out", "up": "mlp/up"}
    found = {path: (axes, count) for path, count, axes in leaves_with_names(inputs_of(params), names_of(params))}
    split = {}
    for name, path in paths.items():
        axes, count = found[f"network/layers/{path}/kernel"]
        split[name] = axes[1 : 1 + count], axes[1 + count :]
    expected = {
        "modulation": (("condition",), ("modulation", "embed")),
        "out": (("heads", "head_dim"), ("embed",)),
        "up": (("embed",), ("mlp",)),
    }
    assert split == expected
    for path in ("layers/modulation/project/bias", "patches/project/kernel", "head/project/kernel"):
        assert found[f"network/{path}"][1] == 0


@pytest.mark.parametrize("preset", PUBLISHED)
def test_parameter_count_is_the_published_one(preset):
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes_of(abstract(preset)))) == PUBLISHED[preset]


def test_listing_and_creating_answer_wrong_names_with_the_nearest():
    assert models.list_models("*gpt*") == [
        "gpt2",
        "gpt2-large",
        "gpt2-medium",
        "gpt2-nano",
        "gpt2-xl",
        "minigpt-linear",
    ]
    assert models.list_models("nothing*") == []
    with pytest.raises(ValueError, match="unknown model 'lama3-8b': did you mean 'llama3-8b'"):
        models.create("lama3-8b", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no field 'embed_dims': did you mean 'embed_dim'"):
        models.create("gpt2", rngs=nnx.Rngs(0), embed_dims=3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": 0}, "num_heads is 0"),
        ({"embed_dim": -8}, "embed_dim is -8"),
        ({"num_kv_heads": 3}, "num_heads 4 does not divide by num_kv_heads 3"),
        ({"embed_dim": 30, "head_dim": None}, "embed_dim 30 does not divide by num_heads 4"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"rope_scaling_factor": 0.5}, "rope_scaling_factor 0.5"),
        ({"logit_softcap": 0.0}, "logit_softcap 0.0 is not a positive number"),
        ({"attention_pattern": ("local", "global"), "window": 8}, "num_layers 3 does not divide by the 2 layers"),
        ({"attention_pattern": ("near",)}, "attention_pattern .* no sequence of 'global' and 'local'"),
        ({"attention_pattern": ("local",)}, "window None with attention_pattern"),
        ({"window": 8}, "window 8 with attention_pattern"),
        ({"window": 8, "attention_pattern": ("local",), "causal": False}, "window 8 with causal=False"),
        ({"norm": "layernorm", "norm_offset": 1.0}, "norm_offset 1.0 is for norm 'rmsnorm'"),
        ({"attention": "linear", "qk_norm": True}, "qk_norm True is for attention 'softmax'"),
        ({"attention": "linear", "causal": False}, "causal False is for attention 'softmax'"),
        ({"num_experts": 4, "experts_per_token": 5}, "experts_per_token 5 is not from 1 to num_experts 4"),
        ({"num_experts": 4, "mlp": "gelu"}, "num_experts 4 with mlp 'gelu'"),
        ({"capacity_factor": 1.5}, "capacity_factor 1.5 without experts"),
        ({"expert_buffer": 1.5}, "expert_buffer 1.5 without experts"),
        (
            {"num_experts": 4, "capacity_factor": 1.5, "expert_buffer": 2.0},
            "expert_buffer 2.0 beside capacity_factor 1.5",
        ),
        ({"load_balance_weight": -1.0}, "load_balance_weight -1.0"),
        ({"z_loss_weight": -1.0}, "z_loss_weight -1.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        models.preset("llama-nano", **overrides)


def test_a_derived_size_follows_the_size_it_derives_from():
    assert models.preset("gpt2", num_heads=6).kv_heads == 6
    assert models.preset("gpt2", embed_dim=1024).feed_forward == 4096


def test_future_tokens_do_not_change_the_past(model):
    cfg, positions = model.cfg, jnp.arange(24)
    x = model.embed_tokens(ids((1, 24)), positions)

    @jax.jit
    @jax.grad
    def reach_of(x_BTD):
        x_BTD, _ = through(model, Start(x_BTD, Positions(positions)))
        return jnp.sum(model.read_out(x_BTD)[0, 10] * jnp.arange(cfg.vocab_size, dtype=jnp.float32))

    reach = np.abs(reach_of(x)).sum((0, 2))  # of each position's vector on the logits at position 10
    assert (reach[:11] > 0).all() and (reach[11:] == 0).all()


def test_each_local_layer_reaches_as_far_back_as_its_window():
    cfg = SMALL | {"num_layers": 3, "window": 4, "num_kv_heads": 2}
    model = models.create("mistral-7b", rngs=nnx.Rngs(0), **cfg)
    x, positions = model.embed_tokens(ids((1, 24)), np.arange(24)), np.arange(24)
    read_at_20 = lambda x: jnp.sum(jnp.sin(through(model, Start(x, Positions(positions)))[0][0, 20]))  # noqa: E731
    reached = np.flatnonzero(np.abs(jax.jit(jax.grad(read_at_20))(x)).sum((0, 2)))
    np.testing.assert_array_equal(reached, np.arange(20 - 3 * (4 - 1), 21))


def test_without_causality_every_position_sees_all_and_nothing_is_continued():
    model = models.create("llama-nano", rngs=nnx.Rngs(0), **SMALL, causal=False)
    x, places = model.embed_tokens(ids((1, 9)), np.arange(9)), Positions(np.arange(9))
    reach = jax.jit(jax.jacobian(lambda x: jnp.sum(jnp.sin(through(model, Start(x, places))[0][0]), axis=-1)))(x)
    assert (np.abs(reach).sum((1, 3)) > 0).all()
    with pytest.raises(ValueError, match="causal=False"):
        model.sample(jax.random.key(0), prompt=ids((1, 3)), num_tokens=2)


def test_blocks_that_alternate_are_stacked_as_one_group():
    shapes = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(abstract("gemma2-2b"))))
    found = {".".join(str(key.key) for key in path): leaf.shape for path, leaf in shapes}
    for block in (0, 1):  # the local and the global layer of each of 13 pairs
        assert found[f"layers.blocks.{block}.attention.query.kernel"] == (13, 2304, 8, 256)
        assert found[f"layers.blocks.{block}.mlp_post_norm.scale"] == (13, 2304)
    assert {name.split(".")[0] for name in found} == {"embed", "layers", "norm"}


def test_logits_stay_below_their_softcap_and_follow_them_near_zero():
    plain, capped = (models.create("llama-nano", rngs=nnx.Rngs(0), **SMALL, logit_softcap=cap) for cap in (None, 0.05))
    raw, got = (np.asarray(forward(model, ids((2, 9)))) for model in (plain, capped))
    assert np.abs(raw).max() > 0.1 > 0.05 >= np.abs(got).max()
    np.testing.assert_allclose(got, 0.05 * np.tanh(raw / 0.05), atol=1e-6)


def test_a_norm_with_an_offset_starts_as_the_plain_one():
    plain, offset = (models.create("llama-nano", rngs=nnx.Rngs(0), **SMALL, norm_offset=value) for value in (0.0, 1.0))
    assert not offset.layers.mlp_norm.scale[...].any()
    np.testing.assert_allclose(forward(offset, ids((2, 9))), forward(plain, ids((2, 9))), atol=1e-6)


def test_experts_add_their_weighted_balance_losses_to_the_cross_entropy():
    model = models.create(
        "moe-nano", rngs=nnx.Rngs(0), **SMALL, load_balance_weight=0.3, router_z_weight=0.2, capacity_factor=0.5
    )
    batch = {"tokens": ids((2, 16)), "targets": ids((2, 16), seed=1)}
    loss, metrics = loss_of(model, batch)
    expected = metrics["nats"] + 0.3 * metrics["load_balance"] + 0.2 * metrics["router_z"]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert metrics["load_balance"] > 0.9 and 0.5 <= metrics["dropped"] < 1 and metrics["weight"] == 32
    assert set(loss_of(models.create("llama-nano", rngs=nnx.Rngs(0), **SMALL), batch)[1]) == {"weight"}


def test_capacity_drops_nothing_while_sampling():
    tight, dropless = (
        models.create("moe-nano", rngs=nnx.Rngs(0), **SMALL, capacity_factor=factor) for factor in (0.1, None)
    )
    how = {"prompt": ids((3, 7)), "num_tokens": 12, "temperature": 0}
    np.testing.assert_array_equal(tight.sample(jax.random.key(0), **how), dropless.sample(jax.random.key(0), **how))


def test_padding_does_not_change_the_loss(model):
    tokens, targets = ids((2, 20)), ids((2, 20), seed=1)
    plain = nats_of(model, {"tokens": tokens, "targets": targets})[0]
    pad = jnp.zeros((2, 9), tokens.dtype)
    padded = {"tokens": jnp.concatenate([tokens, pad], 1), "targets": jnp.concatenate([targets, pad], 1)}
    mask = jnp.concatenate([jnp.ones((2, 20)), jnp.zeros((2, 9))], 1)
    got, metrics = nats_of(model, padded | {"mask": mask})
    np.testing.assert_allclose(got, plain, rtol=1e-6)
    assert metrics["weight"] == 40


def test_loss_is_the_cross_entropy_of_the_softmax(model):
    tokens, targets = ids((2, 9)), ids((2, 9), seed=1)
    logits = np.asarray(forward(model, tokens), np.float64)
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(probability, np.asarray(targets)[..., None], -1)).mean()
    got, _ = nats_of(model, {"tokens": tokens, "targets": targets})
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize(("rows", "prompt_length"), [(2, 1), (1, 7), (2, 33), (1, 33)])
def test_greedy_decoding_equals_running_the_whole_prefix_each_time(model, rows, prompt_length):
    prompt = ids((rows, prompt_length))
    got = model.sample(jax.random.key(0), prompt=prompt, num_tokens=12, temperature=0)
    tokens = jnp.zeros((rows, 48), prompt.dtype).at[:, :prompt_length].set(prompt)
    for at in range(prompt_length, prompt_length + 12):  # later positions are zeros: the past does not see them
        tokens = tokens.at[:, at].set(jnp.argmax(forward(model, tokens)[:, at - 1], axis=-1))
    np.testing.assert_array_equal(got, tokens[:, prompt_length : prompt_length + 12])


def test_greedy_decoding_on_a_mesh_equals_one_device(model):
    prompt = ids((3, 33))  # rows that do not divide, and more positions than a window
    draw = lambda: model.sample(jax.random.key(0), prompt=prompt, num_tokens=6, temperature=0)  # noqa: E731
    mesh = create_device_mesh((2, 4), ("fsdp", "tensor"))
    how = Execution(rules=combine(strategies_for(mesh.axis_names)), mesh=mesh)
    with execution(how), recording() as taken:  # layers scanned
        found = draw()
    assert taken == (set() if model.cfg.attention == "linear" else {"blockwise"})  # the prompt's
    np.testing.assert_array_equal(found, draw())


def test_a_layer_with_a_window_caches_no_more():
    model = models.create("gemma2-nano", rngs=nnx.Rngs(0), window=16, num_layers=4, embed_dim=32, vocab_size=61)
    local, everywhere = empty_caches(model, 2, 100)[0]
    assert local.key.shape[-2] == 16 and everywhere.key.shape[-2] == 100


def test_a_sample_is_a_pure_function_of_its_key(model):
    def draw(seed):
        return model.sample(jax.random.key(seed), prompt=ids((3, 4)), num_tokens=10)

    first = draw(0)
    assert first.shape == (3, 10)
    np.testing.assert_array_equal(first, draw(0))
    assert (first != draw(1)).any()


def test_top_k_and_top_p_draw_from_the_tokens_they_keep_with_their_probabilities():
    logits = jnp.log(jnp.asarray([[0.5, 0.2, 0.15, 0.1, 0.05]]))
    many = jnp.tile(logits, (20_000, 1))

    def frequencies(**how):
        how = {"temperature": jnp.float32(1), "top_k": None, "top_p": None} | how
        return np.bincount(pick(many, jax.random.key(0), **how), minlength=5) / 20_000

    np.testing.assert_allclose(frequencies(), [0.5, 0.2, 0.15, 0.1, 0.05], atol=0.015)
    np.testing.assert_allclose(frequencies(top_k=2), [5 / 7, 2 / 7, 0, 0, 0], atol=0.015)
    np.testing.assert_allclose(
        frequencies(top_p=jnp.float32(0.71)), [0.5 / 0.85, 0.2 / 0.85, 0.15 / 0.85, 0, 0], atol=0.015
    )
    np.testing.assert_allclose(frequencies(top_p=jnp.float32(0.3)), [1, 0, 0, 0, 0])
    squared = np.array([0.25, 0.04, 0.0225, 0.01, 0.0025])
    np.testing.assert_allclose(frequencies(temperature=jnp.float32(0.5)), squared / squared.sum(), atol=0.015)
    assert set(np.asarray(pick(many[:9], jax.random.key(0), None, None, None))) == {0}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"prompt": np.zeros((1, 0), int)}, "at least one token"),
        ({"prompt": np.zeros((1, 4))}, "integer token ids"),
        ({"prompt": np.full((1, 4), 61)}, "vocabulary is 0 to 60"),
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"num_tokens": 46}, "need 49 positions, the model has 48"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_sampling_refuses_what_makes_no_sense(model, how, message):
    how = {"prompt": np.zeros((1, 3), int), "num_tokens": 2} | how
    with pytest.raises(ValueError, match=message):
        model.sample(jax.random.key(0), **how)


def test_sequences_longer_than_the_model_are_refused(model):
    with pytest.raises(ValueError, match="sequence of 49 tokens"):
        model(ids((1, 49)))


@pytest.mark.parametrize("layout", ["llama", "gemma2", "mixtral"])
def test_remat_and_unrolling_change_no_gradient(layout):
    graphdef, params = nnx.split(model_of(layout))
    batch = {"tokens": ids((2, 16)), "targets": ids((2, 16), seed=1)}

    def gradient(how):
        def loss(params):
            with execution(how):
                return nnx.merge(graphdef, params).loss(batch)[0]

        return jax.jit(jax.grad(loss))(params)

    expected = gradient(Execution("none", "auto"))
    assert_close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # noqa: E731
    for how in (Execution("dots", 1), Execution("full", 2)):
        jax.tree.map(assert_close, gradient(how), expected)


def test_a_stacked_model_compiles_to_the_same_size_at_any_depth():
    def program_size(num_layers):
        def loss(batch):
            with execution(Execution("full", 1)):
                model = models.create("llama-nano", rngs=nnx.Rngs(0), **(SMALL | {"num_layers": num_layers}))
                return model.loss(batch)[0]

        batch = {key: jax.ShapeDtypeStruct((2, 16), jnp.int32) for key in ("tokens", "targets")}
        return len(jax.make_jaxpr(loss)(batch).pretty_print().splitlines())

    assert program_size(40) <= program_size(4) + 2


def test_bfloat16_compute_stays_near_float32(model):
    graphdef, params = nnx.split(model)
    batch = {"tokens": ids((2, 16)), "targets": ids((2, 16), seed=1)}
    low = nnx.merge(graphdef, jax.tree.map(lambda value: value.astype(jnp.bfloat16), params))
    assert forward(low, batch["tokens"]).dtype == jnp.float32
    np.testing.assert_allclose(loss_of(low, batch)[0], loss_of(model, batch)[0], rtol=0.01)


def test_rotary_scores_depend_on_the_distance_alone():
    frequencies = layers.rope_frequencies(8, 100.0)
    q, k = (jax.random.normal(jax.random.key(seed), (1, 1, 1, 8)) for seed in (0, 1))

    def score(at, distance):
        turned = [layers.rope(x, jnp.array([p]), frequencies) for x, p in ((q, at + distance), (k, at))]
        return float(jnp.sum(turned[0] * turned[1]))

    np.testing.assert_allclose(score(3, 5), score(40, 5), rtol=1e-4)
    assert abs(score(3, 5) - score(3, 6)) > 1e-3


def test_dropout_changes_the_loss_only_with_a_key_and_keeps_the_mean():
    model = models.create("llama-nano", rngs=nnx.Rngs(0), **SMALL, dropout=0.5)
    batch = {"tokens": ids((2, 16)), "targets": ids((2, 16), seed=1)}
    graphdef, state = nnx.split(model)
    drop = jax.jit(lambda state, key: nnx.merge(graphdef, state).loss(batch, nnx.Rngs(key))[0])
    plain, again = (float(loss_of(model, batch)[0]) for _ in range(2))
    noisy = [float(drop(state, jax.random.key(seed))) for seed in (0, 0, 1)]
    assert plain == again and noisy[0] == noisy[1] != noisy[2] and noisy[0] != plain
    x = layers.dropout(jnp.ones(100_000), 0.3, jax.random.key(0))
    np.testing.assert_allclose(x.mean(), 1, atol=0.01)
    np.testing.assert_allclose((x == 0).mean(), 0.3, atol=0.01)


def test_a_configuration_is_a_frozen_value():
    cfg = models.preset("gpt2")
    assert cfg == models.preset("gpt2") and hash(cfg) == hash(models.preset("gpt2"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.embed_dim = 3
