"""A sequence over several devices: attention is that over the whole, in both directions, at an equal and small share of
the work for each, and documents in one row do not see each other."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from pydantic import ValidationError

from artifex.config import Config
from artifex.config_device import DeviceConfig
from artifex.models.attention import dot_product_attention, recording
from artifex.models.attention.zigzag import from_zigzag, to_zigzag
from artifex.models.layers import Embed
from artifex.models.transformer.config import DecoderConfig
from artifex.models.transformer.decoder import Decoder
from artifex.models.transformer.linear_attention import mixed, mixed_by_parts
from artifex.models.transformer.masked import MaskedDiffusion
from artifex.models.transformer.masked_config import MaskedDiffusionConfig
from artifex.scaling import axes
from artifex.scaling.axes import Rules
from artifex.scaling.communication import communication
from artifex.scaling.execution import Execution, execution
from artifex.scaling.plan import Plan
from artifex.scaling.strategies import combine, strategies_for
from artifex.train import plan_of
from artifex.training.state import blueprint
from artifex.training.step import make_step

ROWS, LENGTH = 2, 48


def mesh_of(**sizes):
    count = int(np.prod(list(sizes.values())))
    devices = np.array(jax.devices()[:count]).reshape(*sizes.values())
    return Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def over(parts, how="ring", heads=1, **more):
    """An execution over so many parts of the sequence, and of the heads."""
    mesh = mesh_of(heads=heads, parts=parts)
    rules = Rules.of(activations={"act_heads": "heads", "act_kv_heads": "heads", "sequence": "parts"})
    return Execution(rules=rules, mesh=mesh, context_attention=how, **more)


def arrays(heads=4, key_heads=2, length=LENGTH):
    """Queries, keys, values, and a direction in which the output is differentiated."""
    random = np.random.default_rng(0)
    return [
        random.normal(size=(ROWS, length, count, 8)).astype(np.float32) for count in (heads, *[key_heads] * 2, heads)
    ]


def documents(length=LENGTH):
    """Rows of several documents, none of whose borders is a part's."""
    ends = [[5, 17, 20, 41], [11, 13, 37, 47]]
    return np.stack(
        [np.searchsorted(np.array(row) * length // LENGTH, np.arange(length), "right") for row in ends]
    ).astype(np.int32)


def written_out(query, key, value, direction, segments=None, *, causal=False, window=None, softcap=None):
    """The output in float64, and its gradients by their formulas, with all scores at once."""
    query, key, value, direction = (np.asarray(x, np.float64) for x in (query, key, value, direction))
    groups, scale = query.shape[2] // key.shape[2], query.shape[3] ** -0.5
    keys, values = np.repeat(key, groups, 2), np.repeat(value, groups, 2)
    scores = scale * np.einsum("btnh,bsnh->bnts", query, keys)
    slope = 1.0
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
        slope = 1 - (scores / softcap) ** 2
    age = np.arange(query.shape[1])[:, None] - np.arange(key.shape[1])
    seen = ((age >= 0) & (age < (window or len(age))) if causal else age == age)[None]
    seen = seen if segments is None else seen & (segments[:, :, None] == segments[:, None])
    weights = np.where(seen[:, None], np.exp(scores - scores.max(-1, keepdims=True)), 0)
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bnts,bsnh->btnh", weights, values)
    dvalues = np.einsum("bnts,btnh->bsnh", weights, direction)
    dweights = np.einsum("btnh,bsnh->bnts", direction, values)
    dscores = scale * slope * weights * (dweights - (dweights * weights).sum(-1, keepdims=True))
    dquery, dkeys = np.einsum("bnts,bsnh->btnh", dscores, keys), np.einsum("bnts,btnh->bsnh", dscores, query)
    fold = lambda x: x.reshape(*x.shape[:2], -1, groups, x.shape[-1]).sum(3)  # noqa: E731
    return out, dquery, fold(dkeys), fold(dvalues)


def attention_on(how, order="given", segments=None, **options):
    """A function of arrays: the output and its gradients, of positions in the order as it is."""
    parts = how.mesh.shape["parts"] if order == "zigzag" else 1

    def both(query, key, value, direction):
        def attention(*arrays):
            arrays = [to_zigzag(x, parts) for x in (*arrays, *([] if segments is None else [jnp.asarray(segments)]))]
            return from_zigzag(dot_product_attention(*arrays, order=order, **options), parts)

        with execution(how):
            out, pull = jax.vjp(attention, query, key, value)
            return out, *pull(direction)

    return jax.jit(both)


CASES = {
    "zigzag": (8, "zigzag", (4, 2), {"causal": True}),
    "zigzag, packed": (4, "zigzag", (4, 4), {"causal": True, "segments": True}),
    "zigzag, window, softcap": (8, "zigzag", (4, 1), {"causal": True, "window": 7, "softcap": 1.5}),
    "in order, packed, window": (4, "given", (4, 2), {"causal": True, "window": 9, "segments": True}),
    "not causal": (8, "given", (4, 2), {"softcap": 0.7}),
    "exchange": (4, "ulysses", (8, 2), {"causal": True, "window": 9, "segments": True}),
}
MORE = {
    "zigzag of 2": (2, "zigzag", (4, 2), {"causal": True}),
    "zigzag of 2, window, packed": (2, "zigzag", (4, 2), {"causal": True, "window": 11, "segments": True}),
    "zigzag of 4": (4, "zigzag", (6, 2), {"causal": True}),
    "zigzag, wide window": (8, "zigzag", (4, 2), {"causal": True, "window": 30}),
    "zigzag, window of one": (8, "zigzag", (4, 2), {"causal": True, "window": 1}),
    "zigzag, window, packed": (8, "zigzag", (4, 2), {"causal": True, "window": 5, "segments": True}),
    "in order": (8, "given", (4, 2), {"causal": True}),
    "in order, window": (8, "given", (4, 2), {"causal": True, "window": 4}),
    "not causal, packed": (2, "given", (4, 1), {"segments": True}),
    "exchange of 8": (8, "ulysses", (8, 2), {"causal": True}),
    "exchange, not causal": (2, "ulysses", (4, 1), {"softcap": 2.0}),
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_attention_over_parts_is_that_over_the_whole_with_its_gradients(case):
    parts, by, (heads, key_heads), options = (CASES | MORE)[case]
    options = options | {"segments": documents() if "segments" in options else None}
    how = over(parts, "ulysses" if by == "ulysses" else "ring", heads=2 if parts < 8 else 1)
    given = arrays(heads, key_heads)
    with recording() as taken:
        got = attention_on(how, "zigzag" if by == "zigzag" else "given", **options)(*given)
    assert taken == {"blockwise" if by == "ulysses" else "ring"}
    for name, ours, expected in zip(("out", "query", "key", "value"), got, written_out(*given, **options), strict=True):
        np.testing.assert_allclose(ours, expected, atol=5e-6, err_msg=name)


@pytest.mark.parametrize("segments", [None, documents()], ids=["", "packed"])
def test_any_attention_computes_the_exchanged_heads_that_takes_them(segments):
    how, given = over(2, "ulysses", attention="auto" if segments is not None else "tiles"), arrays()
    with recording() as taken:
        out, *_ = attention_on(how, causal=True, segments=segments)(*given)
    assert taken == {"tiles" if segments is None else "blockwise"}
    np.testing.assert_allclose(out, written_out(*given, segments, causal=True)[0], atol=5e-6)


def test_the_order_that_balances_is_undone_and_gives_each_part_an_early_and_a_late_chunk():
    for xp in (np, jnp):
        x = xp.arange(2 * 24).reshape(2, 24)
        turned = to_zigzag(x, 4)
        assert isinstance(turned, type(x))
        np.testing.assert_array_equal(from_zigzag(jnp.asarray(turned), 4), x)
        np.testing.assert_array_equal(turned[0, :6], [0, 1, 2, 21, 22, 23])  # chunks 0 and 7
        np.testing.assert_array_equal(turned[0, -6:], [9, 10, 11, 12, 13, 14])


def products(jaxpr, times=1):
    """Multiplications in all matrix products of a program, a loop's as often as it runs, on one device."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += times * int(np.prod(out)) * int(np.prod([left[dim] for dim in contracted]))
        assert equation.primitive.name not in ("while", "cond"), "a loop whose length depends on the part"
        inner = times * equation.params["length"] if equation.primitive.name == "scan" else times
        total += sum(products(one, inner) for one in jaxprs_in_params(equation.params))
    return total


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_each_part_has_half_of_its_share_of_all_products_and_the_last_no_more_than_the_first(parts):
    """One program runs on every part, and no loop in it depends on which: all have the same work."""
    length = 2 * parts * 2_048
    shapes = [jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)] * 4
    jaxpr = jax.make_jaxpr(attention_on(over(parts), "zigzag", causal=True))(*shapes).jaxpr
    everything = 7 * length * length * 2 * 8  # two products forwards, five backwards
    assert 0.5 / parts < products(jaxpr) / everything < 0.55 / parts


def test_a_window_leaves_out_visits_that_nobody_looks_at():
    shapes = [jax.ShapeDtypeStruct((1, 4_096, 2, 8), jnp.float32)] * 4
    jaxpr = lambda window: jax.make_jaxpr(attention_on(over(8), "zigzag", causal=True, window=window))(*shapes)  # noqa: E731
    assert products(jaxpr(200).jaxpr) < 0.4 * products(jaxpr(None).jaxpr)


def collectives(how):
    """The shapes of floats that each kind of collective of the compiled program brings, one for each of them."""
    text = attention_on(how, causal=True).lower(*arrays(8, 8, 64)).compile().as_text()
    kinds = ("all-gather", "all-to-all", "collective-permute")
    return {kind: re.findall(rf"= \(?(f32\[[\d,]*\]).* {kind}(?:-start)?\(", text) for kind in kinds}


def test_keys_go_round_and_nothing_is_gathered():
    found = collectives(over(8))
    assert found["all-gather"] == found["all-to-all"] == []
    # keys and values: to the first visit, the same in both directions, and in the loop of each direction; their
    # gradients: in the loop, to the last visit, and home
    assert found["collective-permute"] == ["f32[2,8,8,8]"] * (2 * 3 + 2 * 3)  # an eighth of the positions


def test_positions_are_exchanged_for_heads_and_nothing_is_gathered():
    found = collectives(over(8, "ulysses"))
    assert found["all-gather"] == found["collective-permute"] == []
    assert len(found["all-to-all"]) == 4 + 4  # queries, keys, values and the output, in both directions


SIZES = {"embed_dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 48, "vocab_size": 61}
BASE = DecoderConfig(**SIZES, num_layers=2, sequence_length=64)
DECODERS = {
    "llama": BASE,
    "gemma2": dataclasses.replace(
        BASE, attention_pattern=("local", "global"), window=9, attention_softcap=5.0, logit_softcap=7.0, post_norms=True
    ),
    "learned": dataclasses.replace(BASE, positions="learned"),
    "linear": dataclasses.replace(BASE, attention="linear", positions="none"),
    "masked": dataclasses.replace(BASE, causal=False),
}


@functools.cache
def model_of(name):
    if name == "masked":
        return MaskedDiffusion(MaskedDiffusionConfig(DECODERS[name]), rngs=nnx.Rngs(0))
    return Decoder(DECODERS[name], rngs=nnx.Rngs(0))


def batch_of(packed=False, length=LENGTH):
    random = np.random.default_rng(3)
    tokens, targets = random.integers(0, 60, (2, ROWS, length), np.int32)
    mask = (random.random((ROWS, length)) < 0.8).astype(np.float32)
    return {"tokens": tokens, "targets": targets, "mask": mask} | ({"segments": documents(length)} if packed else {})


@functools.cache
def compiled_loss(name, how):
    graphdef, state = nnx.split(model_of(name))

    def loss(state, batch):
        with execution(how):
            return nnx.merge(graphdef, state).loss(batch)[0]

    return functools.partial(jax.jit(jax.value_and_grad(loss)), nnx.to_pure_dict(state))


def loss_and_gradients(name, how, batch):
    return compiled_loss(name, how)(batch)


def by_strategies(by="ring", **sizes):
    how = {"sequence_parallel": True} if "tensor" in sizes else {}
    rules = combine(strategies_for(tuple(sizes), **how))
    return Execution(rules=rules, mesh=mesh_of(**sizes), context_attention=by, remat="full" if by == "ring" else "none")


MODELS = [("llama", {"context": 2, "tensor": 4}, "ring", True), ("linear", {"context": 8}, "ring", True)]
MORE_MODELS = [
    ("llama", {"context": 8}, "ring", False),
    ("llama", {"context": 4}, "ulysses", True),
    ("gemma2", {"fsdp": 2, "context": 4}, "ring", True),
    ("gemma2", {"context": 4}, "ulysses", False),
    ("learned", {"context": 4}, "ring", True),
    ("linear", {"context": 2, "tensor": 4}, "ring", False),
    ("linear", {"context": 4}, "ring", False),
    ("masked", {"context": 8}, "ring", True),
    ("masked", {"context": 4}, "ulysses", True),
]


@pytest.mark.parametrize(
    ("name", "sizes", "by", "packed"), MODELS + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE_MODELS]
)
def test_loss_and_gradients_are_those_of_one_device(name, sizes, by, packed):
    batch = batch_of(packed)
    one, expected = loss_and_gradients(name, Execution(), batch)
    many, gradients = loss_and_gradients(name, by_strategies(by, **sizes), batch)
    np.testing.assert_allclose(many, one, rtol=2e-6)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


TRAINED = {
    "llama-nano": {"num_kv_heads": 2},
    "gemma2-nano": {"num_kv_heads": 2, "window": 16},
    "linear-nano": {"num_kv_heads": 4},
    "masked-nano": {},
}


@functools.cache
def trained(preset, **device):
    """Losses and parameters of five steps."""
    sizes = {"embed_dim": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 48, "sequence_length": 64}
    sizes = sizes | TRAINED[preset]
    config = Config.from_dict(
        {
            "model": {"name": preset, **({"decoder": sizes} if preset == "masked-nano" else sizes)},
            "data": {"sequence_length": 64},
            "training": {"batch_size": 4, "unroll": 1},
            "optimizer": {"name": "adamw", "learning_rate": 1e-3, "eps": 1e-3},
            "device": device,
        }
    )
    count = int(np.prod([size for size in device.values() if isinstance(size, int)]))
    plan = plan_of(config, count)
    blue = blueprint(config, plan, plan.make_mesh(jax.devices()[:count]))
    state, step, losses = blue.init(), make_step(blue), []
    random = np.random.default_rng(0)
    for _ in range(5):
        tokens = random.integers(0, 256, (4, 65), np.int32)
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
        state, metrics = step(state, jax.device_put(batch, blue.batch_sharding(batch)))
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "device"),
    [
        *((preset, {"context": 8}) for preset in TRAINED),
        ("gemma2-nano", {"context": 4, "context_attention": "ulysses"}),
    ],
)
def test_five_steps_are_those_of_one_device(preset, device):
    (one, expected), (many, params) = trained(preset, fsdp=1), trained(preset, **device)
    np.testing.assert_allclose(many, one, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("by", ["ring", "linear"])
def test_it_works_where_another_axis_is_manual_already(by):
    """As in the stages of a pipeline: of two stages each attends over four parts."""
    mesh, rules = mesh_of(stages=2, parts=4), Rules.of(activations={"sequence": "parts"})
    given = arrays(4, 2)

    def attend(*arrays):
        if by == "ring":
            return dot_product_attention(*arrays, causal=True)
        return mixed_by_parts(*arrays, np.log([0.7, 0.9]), None)

    def loss(arrays, direction):
        def stage(*arrays):
            with execution(Execution(rules=rules, mesh=mesh)):
                return jax.checkpoint(attend)(*(x[0] for x in arrays))[None]

        spec = PartitionSpec("stages")
        staged = jax.shard_map(stage, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"stages"}, check_vma=False)
        return jnp.sum(staged(*arrays) * direction)

    two = [np.stack([x, x[::-1]]) for x in given]
    got = jax.jit(jax.grad(loss))(two[:3], two[3])
    if by == "ring":
        expected = written_out(*given, causal=True)[1:]
    else:
        alone = lambda *arrays: jnp.sum(mixed(*arrays, np.log([0.7, 0.9]))[0] * given[3])  # noqa: E731
        expected = jax.jit(jax.grad(alone, argnums=(0, 1, 2)))(*given[:3])
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours[0], theirs, atol=1e-5)
        np.testing.assert_allclose(ours[1], theirs[::-1], atol=1e-5)


@pytest.mark.parametrize(
    "name", ["llama", "learned", "linear", pytest.param("gemma2", marks=pytest.mark.slow), "masked"]
)
def test_a_packed_row_is_its_documents_alone(name):
    """Logits, on one device and over 4 parts of the sequence."""
    model, batch = model_of(name), batch_of(packed=True)
    graphdef, state = nnx.split(model)

    @functools.partial(jax.jit, static_argnums=0)
    def logits(how, tokens, segments):
        with execution(how):
            return nnx.merge(graphdef, state)(tokens, segments=segments)

    alone = np.zeros((ROWS, LENGTH, 61), np.float32)
    longest = 24
    for row in range(ROWS):
        for document in np.unique(batch["segments"][row]):
            there = np.flatnonzero(batch["segments"][row] == document)
            tokens = np.zeros((1, longest), np.int32)
            tokens[0, : len(there)] = batch["tokens"][row, there]
            # what pads it to the length of all is another document behind it
            behind = (np.arange(longest)[None] >= len(there)).astype(np.int32)
            alone[row, there] = logits(Execution(), tokens, behind)[0, : len(there)]
            if row == 0 and name != "masked" and document == 1:  # and without any segments, where attention is causal
                bare = logits(Execution(), tokens[:, : len(there)], None)
                np.testing.assert_allclose(bare[0], alone[row, there], atol=1e-5)
    for how in (Execution(), by_strategies(context=4)):
        np.testing.assert_allclose(logits(how, batch["tokens"], batch["segments"]), alone, atol=1e-5)


def test_a_packed_rows_loss_and_gradients_are_the_means_over_its_documents():
    batch = batch_of(packed=True)
    loss, gradients = loss_and_gradients("llama", by_strategies(context=8), batch)
    total, summed = 0.0, jax.tree.map(np.zeros_like, gradients)
    for document in range(5):  # where it stands; every other token is another one, and does not count
        own = batch["segments"] == document
        mask = batch["mask"] * own
        only = batch | {"tokens": np.where(own, batch["tokens"], 7).astype(np.int32), "mask": mask}
        nats, each = loss_and_gradients("llama", Execution(), only)
        share = mask.sum() / batch["mask"].sum()
        total += float(nats) * share
        summed = jax.tree.map(lambda sum, one, share=share: sum + share * np.asarray(one), summed, each)
    np.testing.assert_allclose(loss, total, rtol=2e-6)
    for ours, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(summed), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def configured(name="llama-nano", length=64, model=None, **device):
    sizes = {"embed_dim": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 48, "sequence_length": 128}
    return Config.from_dict(
        {
            "model": {"name": name, **(sizes | {"num_kv_heads": 2} if model is None else model)},
            "data": {"source": "digits"} if "digits" in name else {"sequence_length": length},
            "training": {"batch_size": 8},
            "device": device,
        }
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"length": 72, "context": 8},
            r"data.sequence_length 72 does not divide over 8 .*\(context\).* 64 would, or 80",
        ),
        (
            {"context": 8, "context_attention": "ulysses"},
            "'ulysses' exchanges 4 query heads over 8 .* 4 would, or set it",
        ),
        (
            {"context": 4, "tensor": 2, "context_attention": "ulysses"},
            r"exchanges 2 query heads over 4 devices \(context\), which do not divide; 2 would",
        ),
        ({"name": "dit-digits", "model": {"network": {"patch_size": 4}}, "context": 8}, "number of patches 4 does not"),
    ],
)
def test_what_does_not_divide_is_refused_before_anything_is_built(config, message):
    with pytest.raises(ValueError, match=message):
        plan_of(configured(**config), 8)


def test_a_length_that_need_not_be_balanced_may_be_any_multiple_of_the_devices():
    exchanged = configured(length=72, context=8, context_attention="ulysses", model={"num_heads": 8, "embed_dim": 32})
    linear = configured("linear-nano", length=72, context=8, model={"num_heads": 4, "embed_dim": 32})
    assert plan_of(exchanged, 8).sizes == plan_of(linear, 8).sizes == {"context": 8}
    with pytest.raises(ValueError, match=r"72 does not divide over 8 devices .*, two parts on each"):
        plan_of(configured(length=72, context=8, model={"num_heads": 8, "embed_dim": 32}), 8)


def test_a_model_refuses_to_train_on_what_does_not_divide_and_leaves_it_whole_otherwise():
    batch, how = batch_of(length=44), by_strategies(context=8)
    with pytest.raises(
        ValueError, match=r"44 tokens does not divide over 16 chunks, two for each of the 8 parts .* 32"
    ):
        loss_and_gradients("llama", how, batch)
    graphdef, state = nnx.split(model_of("llama"))

    @functools.partial(jax.jit, static_argnums=0)
    def logits(how, tokens):
        with execution(how):
            return nnx.merge(graphdef, state)(tokens)

    tokens = batch["tokens"]
    np.testing.assert_allclose(logits(how, tokens), logits(Execution(), tokens), atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda given: attention_on(over(8, "ulysses"), causal=True)(*given),
            "4 query heads over 8 parts .* over 4, or",
        ),
        (lambda given: attention_on(over(8, attention="splash"), causal=True)(*given), "'splash' needs all positions"),
        (
            lambda given: attention_on(over(8, "ulysses"), "zigzag", causal=True)(*given),
            "order 'zigzag' is for a causal",
        ),
        (lambda given: dot_product_attention(*given[:3], documents()[:1]), r"segments are \(1, 48\) for \(2, 48\)"),
    ],
)
def test_attention_refuses_what_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call(arrays())


def test_how_positions_see_each_other_is_a_setting_of_the_device_section():
    with pytest.raises((ValidationError, ValueError), match=r"context_attention.*'ulysses', but context is 1"):
        configured(context_attention="ulysses")
    plan = Plan.from_device(configured(context=2, fsdp=4, context_attention="ulysses").device, 8)
    assert plan.execution(plan.make_mesh()).context_attention == "ulysses"


@pytest.mark.parametrize("sizes", [{"fsdp": 4, "context": 2}, {"data": 2, "fsdp": 2, "context": 2}], ids=str)
def test_words_go_to_their_rows_and_their_positions_each_device_sending_its_part_once(sizes):
    rows, length, count, features = 8, 32, 64, 16
    plan = Plan.from_device(DeviceConfig(**sizes), 8)
    mesh = plan.make_mesh()
    with execution(plan.execution(mesh)):
        embed = nnx.eval_shape(lambda: Embed(count, features, ("vocab", "embed"), rngs=nnx.Rngs(0)))
    graph, state = nnx.split(embed)

    def loss(table, ids, weights):
        with execution(plan.execution(mesh)):
            words = axes.shard(nnx.merge(graph, table)(ids), "batch", "sequence", "hidden")
            return jnp.sum(axes.shard(words * weights, "batch", "sequence", "hidden"))

    split = tuple(axis for axis in ("fsdp", "context") if axis in plan.sizes)
    by_rows = tuple(axis for axis in ("data", "fsdp") if axis in plan.sizes)
    given = [
        state,
        jax.ShapeDtypeStruct((rows, length), jnp.int32),
        jax.ShapeDtypeStruct((rows, length, features), jnp.float32),
    ]
    where = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((None, split), (by_rows, "context"))]
    step = jax.jit(jax.grad(loss), in_shardings=(where[0], where[1], where[1]), out_shardings=where[0])
    found = communication(step.lower(*given).compile().as_text(), mesh)
    # a device's part of the words' gradient, in float32; that of the table is summed over `data`
    part = 4 * rows * length * features / 8
    fsdp = sizes["fsdp"]
    assert found.sent("context", kind="all-to-all") == part / 2
    assert found.sent("fsdp", kind="all-to-all") == part * (fsdp - 1) / fsdp
    table = 4 * count * features / (fsdp * 2)
    assert found.sent("data", kind="all-reduce") == (table if "data" in sizes else 0)
    ids = 4 * rows * length
    others = sum(row.sent for row in found.rows) - part * (1 / 2 + (fsdp - 1) / fsdp) - found.sent("data")
    assert others <= ids
