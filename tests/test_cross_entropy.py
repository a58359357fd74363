"""Cross entropy by blocks of the vocabulary equals the closed form, on one device and on many, and holds one block."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from artifex import models
from artifex.models import cross_entropy as module
from artifex.models.cross_entropy import cross_entropy, read_logits
from artifex.scaling.axes import Rules, activation_rules, resolve
from artifex.scaling.mesh_utils import create_device_mesh

B, T, D, V = 8, 64, 16, 96
BLOCK = 4 * B * T * 10  # bytes of the logits of all tokens over ten ids: ten blocks or more
WHOLE = 2**30


def drawn(vocab: int = V, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    x_BTD, head_DV = jax.random.normal(keys[0], (B, T, D), dtype), jax.random.normal(keys[1], (D, vocab), dtype)
    mask_BT = jnp.maximum(jax.random.normal(keys[3], (B, T)), 0)  # half of the targets, by weights
    return x_BTD, head_DV, jax.random.randint(keys[2], (B, T), 0, vocab), mask_BT


def plain(x_BTD, head_DV, targets_BT, mask_BT=None, *, softcap=None, never=None):
    """The same three numbers by optax, of logits that are all there."""
    logits_BTV = x_BTD @ head_DV
    logits_BTV = logits_BTV if softcap is None else softcap * jnp.tanh(logits_BTV / softcap)
    logits_BTV = logits_BTV if never is None else logits_BTV.at[..., never].set(-jnp.inf)
    nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    square_BT = jnp.log(jnp.sum(jnp.exp(logits_BTV), axis=-1)) ** 2
    mask_BT = jnp.ones((B, T)) if mask_BT is None else mask_BT
    weight = jnp.sum(mask_BT)
    return jnp.sum(nats_BT * mask_BT) / weight, jnp.sum(square_BT * mask_BT) / weight, weight


@functools.cache
def compiled_objective(loss_of, options):
    def total(x_BTD, head_DV, targets_BT, mask_BT):
        nats, square, _ = loss_of(x_BTD, head_DV, targets_BT, mask_BT, **dict(options))
        return nats + 0.1 * square

    return jax.jit(jax.value_and_grad(total, (0, 1)))


def objective(loss_of, x_BTD, head_DV, targets_BT, mask_BT=None, **options):
    """A number that both means enter, and its gradients by x and the head."""
    return compiled_objective(loss_of, tuple(options.items()))(x_BTD, head_DV, targets_BT, mask_BT)


def assert_near(got, expected, **how):
    how = {"rtol": 1e-6, "atol": 1e-6} | how
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **how), got, expected)


@pytest.mark.parametrize(
    ("vocab", "options"),
    [(96, {}), (97, {}), (96, {"softcap": 3.0}), (97, {"softcap": 3.0, "never": 96}), (96, {"never": 5})],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_value_and_gradients_are_those_of_the_closed_form(vocab, options, masked):
    x_BTD, head_DV, targets_BT, mask_BT = drawn(vocab)
    if "never" in options:
        targets_BT = jnp.where(targets_BT == options["never"], 0, targets_BT)
    arguments = (x_BTD, head_DV, targets_BT, mask_BT if masked else None)
    expected = objective(plain, *arguments, **options)
    for block_bytes in (BLOCK, WHOLE):
        got = objective(cross_entropy, *arguments, **options, block_bytes=block_bytes)
        assert_near(got, expected, rtol=2e-6)


@pytest.mark.parametrize("block_bytes", [BLOCK, WHOLE])
def test_a_target_without_a_logit_is_nan_where_it_counts(block_bytes):
    x_BTD, head_DV, targets_BT, _ = drawn(97)
    mask_BT = jnp.ones((B, T)).at[3, 2].set(0)
    expected = objective(plain, x_BTD, head_DV, targets_BT, mask_BT)
    for wrong in (-1, 97, 98):
        targets = targets_BT.at[3, 2].set(wrong)
        assert np.isnan(objective(cross_entropy, x_BTD, head_DV, targets, block_bytes=block_bytes)[0])
        got = objective(cross_entropy, x_BTD, head_DV, targets, mask_BT, block_bytes=block_bytes)
        assert_near(got, expected, rtol=2e-6)


def test_logits_far_from_zero_overflow_nothing():
    x_BTD, head_DV, targets_BT, _ = drawn()
    exact_BTV = 300 * np.asarray(x_BTD, np.float64) @ np.asarray(head_DV, np.float64)
    top_BT1 = exact_BTV.max(-1, keepdims=True)
    total_BT = top_BT1[..., 0] + np.log(np.exp(exact_BTV - top_BT1).sum(-1))
    nats_BT = total_BT - np.take_along_axis(exact_BTV, np.asarray(targets_BT)[..., None], -1)[..., 0]
    got, grads = objective(cross_entropy, 300 * x_BTD, head_DV, targets_BT, block_bytes=BLOCK)
    np.testing.assert_allclose(got, nats_BT.mean() + 0.1 * (total_BT**2).mean(), rtol=1e-6)
    assert all(np.isfinite(grad).all() for grad in grads)


def test_bfloat16_logits_are_float32_sums():
    x_BTD, head_DV, targets_BT, _ = drawn(dtype=jnp.bfloat16)
    wide = (np.asarray(x_BTD, np.float64), np.asarray(head_DV, np.float64))
    exact_BTV = wide[0] @ wide[1]
    rounded = np.abs(np.asarray((x_BTD @ head_DV), np.float64) - exact_BTV).max()
    logits_BTV = jax.jit(read_logits)(x_BTD, head_DV)
    assert logits_BTV.dtype == jnp.float32
    assert np.abs(np.asarray(logits_BTV, np.float64) - exact_BTV).max() < 1e-3 * rounded
    picked_BT = np.take_along_axis(exact_BTV, np.asarray(targets_BT)[..., None], -1)[..., 0]
    total_BT = np.log(np.exp(exact_BTV).sum(-1))
    exact = (total_BT - picked_BT).mean() + 0.1 * (total_BT**2).mean()
    _, reference = objective(plain, *(jnp.asarray(each, jnp.float32) for each in wide), targets_BT)
    for block_bytes in (BLOCK, WHOLE):
        total, grads = objective(cross_entropy, x_BTD, head_DV, targets_BT, block_bytes=block_bytes)
        np.testing.assert_allclose(total, exact, 1e-6)
        assert [grad.dtype for grad in grads] == [jnp.bfloat16] * 2
        for grad, expected in zip(grads, reference, strict=True):  # rounded as operands are, 2^-8
            assert np.abs(np.asarray(grad, np.float32) - expected).max() < 2**-7 * np.abs(expected).max()


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoders_loss_and_gradients_do_not_depend_on_the_blocks(tied, monkeypatch):
    sizes = {"vocab_size": 53, "embed_dim": 32, "num_layers": 1, "mlp_dim": 48, "sequence_length": 16}
    model = models.create("llama-nano", rngs=nnx.Rngs(0), **sizes, tied_head=tied, logit_softcap=2.0, z_loss_weight=0.1)
    graphdef, params = nnx.split(model)
    ids = np.random.default_rng(0).integers(0, 53, (2, 17), dtype=np.int32)
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:]}

    def trained(block_bytes):
        monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
        return jax.jit(jax.value_and_grad(lambda p: nnx.merge(graphdef, p).loss(batch), has_aux=True))(params)

    (loss, metrics), grads = trained(4 * 32 * 7)
    assert_near(((loss, metrics), grads), trained(WHOLE))
    square = np.mean(np.log(np.exp(np.asarray(model(batch["tokens"]), np.float64)).sum(-1)) ** 2)
    np.testing.assert_allclose(metrics["z_loss"], square, rtol=1e-5)
    np.testing.assert_allclose(loss, metrics["nats"] + 0.1 * square, rtol=1e-5)


def test_masked_diffusions_loss_and_gradients_do_not_depend_on_the_blocks(monkeypatch):
    model = models.create("masked-nano", rngs=nnx.Rngs(0), decoder={"num_layers": 1, "sequence_length": 16})
    graphdef, params = nnx.split(model)
    batch = {"targets": np.random.default_rng(0).integers(0, 256, (2, 16), dtype=np.int32)}

    def trained(block_bytes):
        monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
        return jax.jit(jax.value_and_grad(lambda p: nnx.merge(graphdef, p).loss(batch)[0]))(params)

    assert_near(trained(4 * 32 * 50), trained(WHOLE))


SPLITS = {
    "data": Rules.of({}, {"batch": "a"}),
    "fsdp": Rules.of({"embed": "a"}, {"batch": "a"}),
    "fsdp of the vocabulary": Rules.of({"vocab": "a"}, {"batch": "a"}),
    "fsdp of long dims": Rules.of({"embed": "a"}, {"batch": "a"}, min_weight_size={"a": V}),
    "tensor": Rules.of({"vocab": "b"}, {"act_vocab": "b"}),
    "sequence": Rules.of({}, {"batch": "a", "sequence": "b"}),
    "fsdp+tensor": Rules.of({"embed": "a", "vocab": "b"}, {"batch": "a", "act_vocab": "b"}),
    "vocabulary twice": Rules.of({"vocab": ("b", "a")}, {"batch": "a", "act_vocab": "b"}),
    "logits alone": Rules.of({}, {"batch": "a", "act_vocab": "b"}),
}


@functools.cache
def compiled(split: str, vocab: int, block_bytes: int):
    """Value and gradients compiled for a mesh 4 x 2 under rules, its arguments in their places, and their ways."""
    rules, mesh = SPLITS[split], create_device_mesh((4, 2), ("a", "b"))

    def place(value, names, table, least=()):
        return jax.device_put(value, NamedSharding(mesh, resolve(names, value.shape, table, mesh.shape, least).spec))

    x_BTD, head_DV, targets_BT, mask_BT = drawn(vocab)
    by_token = [place(each, ("batch", "sequence"), rules.activations) for each in (targets_BT, mask_BT)]
    x_BTD = place(x_BTD, ("batch", "sequence", None), rules.activations)
    head_DV = place(head_DV, ("embed", "vocab"), rules.params, rules.min_weight_size)

    def total(x_BTD, head_DV, targets_BT, mask_BT):
        with activation_rules(rules, mesh):
            nats, square, _ = cross_entropy(x_BTD, head_DV, targets_BT, mask_BT, softcap=4.0, block_bytes=block_bytes)
        return nats + 0.1 * square

    arguments = (x_BTD, head_DV, *by_token)
    return jax.jit(jax.value_and_grad(total, (0, 1))).lower(*arguments).compile(), arguments


@pytest.mark.parametrize(("split", "vocab"), [*((name, V) for name in SPLITS), ("fsdp+tensor", 98), ("tensor", 97)])
def test_blocks_on_8_devices_equal_one_device(split, vocab):
    program, arguments = compiled(split, vocab, BLOCK // 8)
    got = program(*arguments)
    assert_near(got, objective(plain, *drawn(vocab), softcap=4.0), rtol=2e-6)
    assert got[1][1].sharding.is_equivalent_to(arguments[1].sharding, 2)


def arrays(text: str) -> list[int]:
    """The numbers of elements of all arrays of floats that a program's text names."""
    shapes = re.findall(r"(?:f32|bf16)\[([\d,]+)\]", text)
    return [int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes]


@pytest.mark.parametrize("split", [name for name in SPLITS if name != "logits alone"])
def test_no_device_holds_all_its_logits_or_gathers_the_head(split):
    program, (x_BTD, head_DV, *_) = compiled(split, V, BLOCK // 8)
    tokens = x_BTD.addressable_shards[0].data.size // D
    text, ways = program.as_text(), 2 if SPLITS[split].activations[-1].name == "act_vocab" else 1
    assert max(arrays(text)) < tokens * V // ways
    gathers = [line.split(" all-gather(")[0] for line in text.splitlines() if " all-gather(" in line]
    assert all(size <= V * D // 4 for gather in gathers for size in arrays(gather))
    assert bool(gathers) == (head_DV.addressable_shards[0].data.size < V * D // ways)


def test_inside_the_scan_no_device_waits_for_the_other_parts_of_a_split_vocabulary():
    text = compiled("tensor", V, BLOCK // 8)[0].as_text()
    bodies = {body: text.split(f"\n%{body} ")[1].split("\n}")[0] for body in re.findall(r"body=%([\w.]+)", text)}
    assert len(bodies) == 2 and "all-reduce(" in text
    found = {name for name, body in bodies.items() if re.search(r"all-|reduce-scatter|collective-permute", body)}
    assert not found


@pytest.mark.parametrize("split", ["data", "fsdp", "fsdp+tensor"])
def test_plain_logits_are_divided_among_the_devices(split):
    program, arguments = compiled(split, V, WHOLE)
    whole = compiled_objective(cross_entropy, (("softcap", 4.0), ("block_bytes", WHOLE))).lower(*drawn()).compile()
    ways = 8 if split == "fsdp+tensor" else 4
    assert program.cost_analysis()["flops"] < 1.1 * whole.cost_analysis()["flops"] / ways
    assert_near(program(*arguments), objective(plain, *drawn(), softcap=4.0), rtol=2e-6)
