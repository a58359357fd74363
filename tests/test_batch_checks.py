"""What no vocabulary holds is NaN wherever it reaches a model, and what is no batch is refused before it is traced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from artifex import models
from artifex.data import DataError
from artifex.data.batches import Batches
from artifex.models.layers import take_rows

TINY = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "mlp_dim": 16}
SMALL = {
    "llama-nano": TINY,
    "gpt2-nano": TINY,
    "masked-nano": {"decoder": TINY},
    "vae-digits": {"block_channels": [4], "groups": 2},
    "vq-digits": {"block_channels": [8], "groups": 4, "codes": 8, "latent_dim": 4},
    "kl-digits": {"block_channels": [8, 8], "mid_attention": False},
    "unet-digits": {
        "network": {"block_channels": [8, 8], "layers_per_block": 1, "attention_levels": [], "mid_attention": False}
    },
    "dit-digits": {"network": {"embed_dim": 16, "num_layers": 1, "num_heads": 2}},
}
TEXT = {"tokens": np.ones((2, 8), np.int32), "targets": np.ones((2, 8), np.int32)}
IMAGES = {"image": np.zeros((2, 8, 8, 1), np.float32), "label": np.array([3, 4])}
RNG = np.random.default_rng(1)


def traced(name, batch):
    """The loss of a model on a batch, made of shapes alone."""
    return nnx.eval_shape(lambda: models.create(name, rngs=nnx.Rngs(0), **SMALL[name]).loss(batch)[0])


@functools.partial(jax.jit, static_argnums=0)
def loss_of(name, batch):
    return models.create(name, rngs=nnx.Rngs(0), **SMALL[name]).loss(batch)[0]


def losses(name, batches):
    return np.array([loss_of(name, batch) for batch in batches])


def changed(batch, name, value):
    """The batch with its last number of one array replaced."""
    array = batch[name].copy()
    array.reshape(-1)[-1] = value
    return batch | {name: array}


@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_rows_of_a_table_are_numpys_and_those_it_lacks_are_nan(dtype):
    table, ids = RNG.normal(size=(7, 3)).astype(np.float32), RNG.integers(0, 7, (4, 5)).astype(dtype)
    np.testing.assert_array_equal(take_rows(jnp.asarray(table), ids), table[ids])
    outside = np.array([7, 255, 6], dtype) if dtype == np.uint8 else np.array([-1, -7, -8, 7, 2**31 - 1, 6], dtype)
    rows = take_rows(jnp.asarray(table), outside)
    assert np.isnan(rows[:-1]).all()
    np.testing.assert_array_equal(rows[-1], table[6])


def test_a_table_split_over_a_mesh_gives_the_same_rows_and_gradients():
    table, ids = RNG.normal(size=(16, 8)).astype(np.float32), RNG.integers(0, 16, (4, 6)).astype(np.int32)
    weight = RNG.normal(size=(4, 6, 8)).astype(np.float32)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    split = NamedSharding(mesh, PartitionSpec("model", "data"))

    def both(table, ids):
        return take_rows(table, ids), jax.grad(lambda table: jnp.sum(take_rows(table, ids) * weight))(table)

    run = jax.jit(both, in_shardings=(split, NamedSharding(mesh, PartitionSpec("data"))), out_shardings=(None, split))
    rows, gradient = run(table, ids)
    np.testing.assert_array_equal(rows, table[ids])
    expected = np.zeros_like(table)
    np.add.at(expected, ids, weight)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)
    rows, _ = run(table, np.where(ids == ids[0, 0], 16, ids))
    assert np.isnan(rows).any(axis=-1).tolist() == (ids == ids[0, 0]).tolist()


@pytest.mark.parametrize("name", ["llama-nano", "gpt2-nano", "masked-nano"])
def test_token_ids_outside_the_vocabulary_make_the_loss_nan(name):
    vocab = models.preset(name).vocab_size
    bad = [changed(TEXT, "targets", value) for value in (-1, vocab, vocab + 1, 2**31 - 1)]
    if name != "masked-nano":  # which reads the targets alone
        bad += [changed(TEXT, "tokens", value) for value in (-1, -vocab, vocab)]
    masked = [batch | {"mask": np.ones((2, 8), np.float32)} for batch in bad]
    ignored = changed(TEXT, "targets", -100) | {"mask": changed(masked[0], "mask", 0)["mask"]}
    *found, whole, inside, skipped = losses(name, [*bad, *masked, TEXT, changed(TEXT, "targets", vocab - 1), ignored])
    assert np.isnan(found).all(), "with and without a mask"
    assert np.isfinite([whole, inside, skipped]).all(), "a target that does not count may be anything"


@pytest.mark.parametrize("name", ["unet-digits", "dit-digits"])
def test_labels_that_are_no_class_make_the_loss_nan(name):
    *bad, whole, none = losses(name, [changed(IMAGES, "label", value) for value in (-1, -11, 11, 9, 10)])
    assert np.isnan(bad).all()
    assert np.isfinite([whole, none]).all(), "one beyond the last class means none"


@pytest.mark.parametrize("name", SMALL)
def test_what_is_no_batch_is_refused_with_what_a_batch_is(name):
    text = models.preset(name).reads == "text"
    batch, needed = (TEXT, "targets") if text else (IMAGES, "image")
    assert traced(name, batch).shape == ()
    with pytest.raises(TypeError, match=rf"the batch is a tuple; expected a mapping with .*'{needed}'"):
        traced(name, tuple(batch.values()))
    rest = {key: value for key, value in batch.items() if key != needed}
    with pytest.raises(ValueError, match=rf"no '{needed}' \(it has {', '.join(map(repr, rest))}\); expected a mapping"):
        traced(name, rest)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "llama-nano",
            {"tokens": np.ones((2, 8))},
            r"'tokens' is float\d+ of shape \(2, 8\); expected integers \(B, T\)",
        ),
        ("llama-nano", {"targets": np.ones((2, 1), int)}, r"'targets' is of shape \(2, 1\), its 'tokens' of \(2, 8\)"),
        ("llama-nano", {"mask": np.ones(2)}, r"'mask' is of shape \(2,\), its 'tokens' of \(2, 8\)"),
        (
            "masked-nano",
            {"targets": np.ones(8, int)},
            r"'targets' is int\d+ of shape \(8,\); expected integers \(B, T\)",
        ),
        ("vae-digits", {"image": np.zeros((2, 8, 8, 1), np.uint8)}, r"'image' is uint8 .* in \[-1, 1\]"),
        ("kl-digits", {"image": np.zeros((8, 8, 1), np.float32)}, r"'image' is float32 of shape \(8, 8, 1\)"),
        ("vq-digits", {"mask": np.ones((2, 1))}, r"'mask' is of shape \(2, 1\); give one for each image, \(2,\)"),
        ("dit-digits", {"label": np.zeros(2)}, r"'label' is float\d+ of shape \(2,\); expected integers \(2,\)"),
        ("unet-digits", {"label": np.zeros(3, int)}, r"'label' is of shape \(3,\); give one for each image, \(2,\)"),
    ],
)
def test_arrays_of_another_kind_or_shape_are_refused(name, changes, message):
    batch = TEXT if models.preset(name).reads == "text" else IMAGES
    with pytest.raises(ValueError, match=message):
        traced(name, batch | changes)


def test_a_model_with_classes_asks_for_labels():
    with pytest.raises(ValueError, match=r"no 'label' \(it has 'image'\); .* 'label', integers \(B,\) from 0 to 9"):
        traced("dit-digits", {"image": IMAGES["image"]})


def test_an_id_outside_the_vocabulary_is_an_error_of_the_data_in_the_stream_too():
    batches = Batches(np.full(100, 9), batch_size=2, sequence_length=4, vocab_size=9)
    with pytest.raises(DataError, match=r"the tokens hold id 9, outside \[0, 9\)"):
        batches.batch_at(0)
    stream = batches.stream()
    with pytest.raises(DataError, match=r"the tokens hold id 9, outside \[0, 9\)"):
        next(stream)
    stream.close()
