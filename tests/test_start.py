"""What a run begins with: weights of runs and folders, into any mesh, or a refusal that says what differs."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from artifex import models, train
from artifex.config import Config
from artifex.data.tokenizers import ByteTokenizer, save_tokenizer, train_bpe
from artifex.models.weights import from_pretrained, save_pretrained
from artifex.scaling.checkpoints import Checkpoints
from artifex.training.start import check, start_state
from artifex.training.state import blueprint

SMALL = {"embed_dim": 16, "num_layers": 2, "num_heads": 8, "head_dim": 2, "mlp_dim": 32}
MODEL = {"name": "llama-nano", **SMALL}
TRAINING = {"steps": 2, "batch_size": 8, "validation_batches": 1, "sample_tokens": 0}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("one line of text\n" * 300)
    return str(file)


@pytest.fixture(scope="module")
def parent(text, tmp_path_factory):
    """A run that keeps a running mean, with the folder of its weights and, beside it, the same as a Llama's folder."""
    folder = tmp_path_factory.mktemp("parent") / "run"
    train.train(config(text, training={"ema_decay": 0.5}, device={"fsdp": 4, "tensor": 2}), folder)
    model = from_pretrained(folder / "weights")
    save_pretrained(folder.parent / "llama", model, layout="LlamaForCausalLM", tokenizer=ByteTokenizer())
    return folder


def config(text, model=None, training=None, **sections) -> Config:
    base = {
        "model": MODEL | (model or {}),
        "data": {"source": text, "sequence_length": 16},
        "training": TRAINING | (training or {}),
        "optimizer": {"name": "adamw", "warmup_steps": 0, "schedule": "constant"},
        "checkpoint": {"every": 1},
        "logging": {"every": 1, "progress": False},
    }
    return Config.from_dict({key: base.get(key, {}) | sections.get(key, {}) for key in {**base, **sections}})


def blue_of(cfg: Config):
    plan = train.plan_of(cfg, jax.device_count())
    return blueprint(cfg, plan, plan.make_mesh())


def weights_of(folder):
    return jax.device_get(nnx.to_pure_dict(nnx.state(from_pretrained(folder))))


def assert_bit_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), expected)


PLACES = ("run", "run/checkpoints/2", "run/checkpoints", "run/weights", "llama")


@pytest.mark.parametrize("device", [{"data": 8}, {"fsdp": 8}, {"mesh_shape": (2, 4)}], ids=str)
def test_weights_start_a_run_from_every_kind_of_folder_under_any_mesh(parent, text, device):
    for place in PLACES:
        start_from = {"start_from": str(parent.parent / place), "ema_decay": 0.9}
        blue = blue_of(config(text, training=start_from, device=device))
        state, lines = start_state(blue)
        assert_bit_equal(state.params, weights_of(parent / "weights"))
        assert_bit_equal(state.ema, weights_of(parent / "weights"))
        assert int(state.step) == 0 and not any(map(np.any, jax.tree.leaves(jax.device_get(state.optimizer))))
        where = jax.tree.map(lambda leaf: leaf.sharding, state)
        assert jax.tree.leaves(where) == jax.tree.leaves(blue.shardings)
        assert lines == [f"started from {parent.parent / place}: 11 arrays, {numbers(state.params):,} numbers"]
        buffers = {leaf.unsafe_buffer_pointer() for leaf in shards(state.params)}
        assert buffers.isdisjoint(leaf.unsafe_buffer_pointer() for leaf in shards(state.ema)), "the step donates both"


def numbers(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def shards(tree):
    return [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"vocab_size": 300}, r"vocab_size is 256 there and 300 here; embed/table\[300, 16\], there \[256, 16\]; set "),
        ({"tied_head": False}, r"tied_head is true there and false here; head/kernel\[16, 256\], there nothing"),
        (
            {"rope_theta": 5e5},
            "rope_theta is 10000.0 there and 500000.0 here; set --model.rope-theta=10000.0, or leave",
        ),
        ({"name": "gpt2-nano"}, "positions is rope there and learned here"),
        ({"name": "masked-nano"}, "holds a model of DecoderConfig, but"),
    ],
    ids=["vocabulary", "head", "rope", "another decoder", "another family"],
)
def test_what_does_not_fit_is_refused_by_name_before_data_is_read(parent, model, message):
    if model.get("name") == "masked-nano":
        cfg = Config.from_dict({"model": {"name": "vq-digits"}, "data": {"source": "nowhere"}})
        cfg.training.start_from = str(parent / "weights")
    else:
        cfg = config("nowhere", model=model, training={"start_from": str(parent / "weights")})
    with pytest.raises(ValueError, match=message) as error:
        train.train(cfg, parent.parent / "refused")
    assert "\n" not in str(error.value) and not (parent.parent / "refused").exists()


def test_settings_that_change_no_output_may_differ_and_are_said(parent, text):
    changed = {"dropout": 0.1, "sequence_length": 128}
    _, lines = start_state(blue_of(config(text, model=changed, training={"start_from": str(parent / "weights")})))
    assert lines[1:] == ["model.sequence_length was 256, is 128", "model.dropout was 0.0, is 0.1"]


def test_a_partial_start_takes_what_fits_and_lists_what_stayed_fresh(parent, text):
    changed = {"vocab_size": 300, "tied_head": False}
    partial = {"start_from": str(parent / "weights"), "start_from_partial": True}
    blue = blue_of(config(text, model=changed, training=partial, device={"fsdp": 4, "tensor": 2}))
    state, lines = start_state(blue)
    random, known = jax.device_get(blue.init().params), weights_of(parent / "weights")
    assert_bit_equal(state.params["layers"], known["layers"])
    for fresh in ("embed", "head"):
        assert_bit_equal(state.params[fresh], random[fresh])
    where = str(parent / "weights")
    assert [line for line in lines if line.startswith("fresh")] == [
        f"fresh, not from {where}: embed/table[300, 16], there [256, 16]",
        f"fresh, not from {where}: head/kernel[16, 300], there nothing",
    ]
    assert "model.vocab_size was 256, is 300" in lines


def test_a_partial_start_that_fits_nowhere_is_refused(parent, text):
    partial = {"start_from": str(parent / "weights"), "start_from_partial": True}
    with pytest.raises(ValueError, match=r"holds nothing that fits 'llama-nano': embed/table\[256, 8\], there"):
        check(config(text, model={"embed_dim": 8, "num_layers": 1, "mlp_dim": 8}, training=partial))


def test_the_network_of_a_diffusion_model_starts_from_a_folder_that_holds_networks(tmp_path):
    cfg = models.preset("dit-digits", network={"embed_dim": 16, "num_layers": 1, "num_heads": 2})
    model = cfg.build(nnx.Rngs(3))
    save_pretrained(tmp_path, model.network, layout="DiTTransformer2DModel")
    read = from_pretrained(tmp_path)
    network = {name: getattr(read.cfg, name) for name in ("embed_dim", "num_layers", "num_heads", "mlp_norm_eps")}
    images = {"model": {"name": "dit-digits", "network": network}, "data": {"source": "digits"}}
    cfg = Config.from_dict(images | {"training": {"start_from": str(tmp_path), "batch_size": 8}})
    state, _ = start_state(blue_of(cfg))
    assert_bit_equal(state.params["network"], jax.device_get(nnx.to_pure_dict(nnx.state(model.network))))


def test_a_network_of_another_kind_is_refused(tmp_path):
    unet = {"block_channels": (8, 8), "layers_per_block": 1, "attention_levels": (), "mid_attention": False}
    save_pretrained(tmp_path, models.create("unet-digits", rngs=nnx.Rngs(0), network=unet))
    cfg = Config.from_dict({"model": {"name": "dit-digits"}, "data": {"source": "digits"}})
    cfg.training.start_from = str(tmp_path)
    with pytest.raises(ValueError, match=r"model\.network is a UNetConfig there and DiTConfig here; choose a preset"):
        check(cfg)


def test_a_tokenizer_other_than_the_weights_is_refused_with_the_way_to_take_it_along(parent, text, tmp_path):
    shutil.copytree(parent.parent / "llama", tmp_path / "llama")
    save_tokenizer(train_bpe(["one line of text\n" * 9], 260), tmp_path / "llama" / "tokenizer.json")
    cfg = config(text, training={"start_from": str(tmp_path / "llama")})
    with pytest.raises(ValueError, match=r"tokenizer.json is bpe-\d+, data.tokenizer 'bytes' is another; take theirs"):
        check(cfg)
    cfg.data.tokenizer = "bpe"
    with pytest.raises(ValueError, match=f"--data.tokenizer={tmp_path}/llama/tokenizer.json"):
        check(cfg)
    cfg.data.tokenizer = str(tmp_path / "llama" / "tokenizer.json")
    check(cfg)


@pytest.mark.parametrize(
    ("place", "message"),
    [("nowhere", "is no folder"), ("", "holds no config.json"), ("run/samples", "holds no config.json")],
)
def test_a_start_without_weights_is_a_sentence(parent, text, place, message):
    with pytest.raises(FileNotFoundError, match=message):
        check(config(text, training={"start_from": str(parent.parent / place)}))


def test_a_start_that_is_partial_about_nothing_is_refused(text):
    with pytest.raises(ValueError, match=r"training\.start_from_partial is true without start_from"):
        config(text, training={"start_from_partial": True})


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_from_weights_is_scored_before_its_first_step_and_resumes_bitwise_without_them(
    parent, text, tmp_path, capsys
):
    shutil.copytree(parent / "weights", tmp_path / "weights")
    more = {"start_from": str(tmp_path / "weights"), "freeze": ["embed/*", "*norm*"], "ema_decay": 0.9, "steps": 3}
    cfg = config(text, training=more, device={"fsdp": 4, "tensor": 2})
    train.train(cfg, tmp_path / "whole")
    *_, first = (record for record in records(parent) if record["split"] == "validation")
    last = records(tmp_path / "whole")[0]
    assert (last["step"], last["split"]) == (0, "validation")
    np.testing.assert_allclose(last["loss"], first["loss"], rtol=1e-5)  # the parent's last validation, of its mean
    cfg.training.steps = 1
    train.train(cfg, tmp_path / "parts")
    shutil.rmtree(tmp_path / "weights")
    cfg.training.steps = 3
    capsys.readouterr()
    train.train(cfg, tmp_path / "parts")
    said = capsys.readouterr().out
    assert f"resumed from step 1; it began with {tmp_path / 'weights'}, which is not read again" in said
    assert "of them frozen" in said
    states = []
    for name in ("whole", "parts"):
        with Checkpoints(tmp_path / name / "checkpoints") as checkpoints:
            states.append(jax.device_get(checkpoints.restore(3, blue_of(cfg).state)))
    assert_bit_equal(states[0], states[1])
    known = weights_of(parent / "weights")
    for part in (states[0].params, states[0].ema):
        assert_bit_equal(part["embed"], known["embed"])
        assert_bit_equal(part["norm"], known["norm"])
        assert (part["layers"]["mlp"]["up"]["kernel"] != known["layers"]["mlp"]["up"]["kernel"]).any()
    assert [record["step"] for record in records(tmp_path / "parts") if record["split"] == "validation"][:2] == [0, 1]
    for field, value in (("start_from", None), ("freeze", ["embed/*"])):
        other = cfg.model_copy(deep=True)
        setattr(other.training, field, value)
        with pytest.raises(ValueError, match=f"holds another run: training.{field} was"):
            train.train(other, tmp_path / "parts")


ROWS = {"start_from_partial": True, "start_from_rows": True}


@pytest.mark.parametrize("vocabulary", [300, pytest.param(128, marks=pytest.mark.slow)])
def test_rows_of_the_tokens_that_both_vocabularies_have_are_taken_on_request(parent, text, vocabulary):
    where = str(parent / "weights")
    # taken as they are, or from a run's steps; whole on each device, or split along the vocabulary and across it
    for start_from, device in ((where, {"fsdp": 4, "tensor": 2}), (str(parent), {"tensor": 4, "data": 2})):
        model = {"vocab_size": vocabulary, "tied_head": False}
        how = {"start_from": start_from, "ema_decay": 0.9, **ROWS}
        data = {"source": "nothing is read of it", "sequence_length": 16}
        cfg = config(text, model=model, training=how, device=device, data=data)
        check(cfg)
        blue = blue_of(cfg)
        state, lines = start_state(blue)
        random, known, both = jax.device_get(blue.init().params), weights_of(parent / "weights"), min(vocabulary, 256)
        table = jax.device_get(state.params["embed"]["table"])
        np.testing.assert_array_equal(table[:both], known["embed"]["table"][:both])
        np.testing.assert_array_equal(table[both:], random["embed"]["table"][both:])
        np.testing.assert_array_equal(table, jax.device_get(state.ema["embed"]["table"]))
        assert state.params["embed"]["table"].sharding == blue.shardings.params["embed"]["table"]
        assert_bit_equal(state.params["layers"], known["layers"])
        assert_bit_equal(state.params["head"], random["head"])
        part = f"taken in part: embed/table[{vocabulary}, 16], there [256, 16]: the first {both} tokens, "
        assert f"{part}{vocabulary - both} are fresh" in lines
        (taken,) = [line for line in lines if line.startswith("taken of")]
        named = [f"{name}{list(leaf.shape)}" for name, leaf in leaves_of(state.params) if "embed" not in name]
        assert taken == f"taken of {start_from}: {', '.join(name for name in named if 'head/' not in name)}"
        assert [line for line in lines if line.startswith("fresh")] == [
            f"fresh, not from {start_from}: head/kernel[16, {vocabulary}], there nothing"
        ]


def leaves_of(tree):
    return [("/".join(key.key for key in keys), leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def test_rows_whose_ids_are_known_to_be_other_tokens_are_refused(parent, text, tmp_path):
    ours, theirs = (train_bpe([words * 9], size) for words, size in (("one line of text\n", 262), ("aaaa bbbb\n", 260)))
    shutil.copytree(parent / "weights", tmp_path / "weights")
    save_tokenizer(theirs, tmp_path / "weights" / "tokenizer.json")
    save_tokenizer(ours, tmp_path / "ours.json")
    how = {"start_from": str(tmp_path / "weights"), **ROWS}
    cfg = config(text, model={"vocab_size": 300}, training=how)
    with pytest.raises(
        ValueError, match=r"takes rows by id, but id 0 of data\.tokenizer 'bytes' is another token than in"
    ):
        check(cfg)
    cfg.data.tokenizer = str(tmp_path / "ours.json")
    first = next(index for index in range(260) if ours.token(index) != theirs.token(index))
    with pytest.raises(ValueError, match=f"but id {first} of data.tokenizer"):
        check(cfg)
    cfg.data.tokenizer = "bpe"
    with pytest.raises(ValueError, match="'bpe' is trained anew; extend "):
        check(cfg)
    extended = json.loads(theirs.to_json())
    extended["model"]["vocab"]["~~~"] = theirs.vocab_size
    (tmp_path / "extended.json").write_text(json.dumps(extended))
    cfg.data.tokenizer = str(tmp_path / "extended.json")
    check(cfg)


def test_rows_are_asked_for_with_a_partial_start(text):
    with pytest.raises(ValueError, match=r"training\.start_from_rows is true without start_from_partial"):
        config(text, training={"start_from": text, "start_from_rows": True})
