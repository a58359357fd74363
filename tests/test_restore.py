"""A run opened again in one call: from its folder or one step alone, under any mesh, every array as it was saved."""

import shutil

import jax
import numpy as np
import pytest
from flax import nnx

import artifex
from artifex import sample, train
from artifex.config import Config
from artifex.models.weights import from_pretrained
from artifex.scaling.checkpoints import CheckpointError, Checkpoints
from artifex.scaling.execution import current_execution
from artifex.scaling.mesh_utils import create_device_mesh
from artifex.scaling.plan import Plan
from artifex.scaling.sharding import DataParallelStrategy, FSDPStrategy, TensorParallelStrategy, combine

MODEL = {"name": "llama-nano", "embed_dim": 16, "num_layers": 1, "num_heads": 8, "head_dim": 2, "mlp_dim": 32}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 2 steps on (4, 2) that keeps a running mean, both steps saved, and its configuration."""
    folder = tmp_path_factory.mktemp("restore")
    (folder / "text.txt").write_text("one line of text\n" * 300)
    config = Config.from_dict(
        {
            "model": MODEL,
            "data": {"source": str(folder / "text.txt"), "sequence_length": 16},
            "training": {"steps": 2, "batch_size": 8, "ema_decay": 0.9, "validation_batches": 1, "sample_tokens": 0},
            "optimizer": {"name": "adamw", "warmup_steps": 0},
            "checkpoint": {"every": 1},
            "logging": {"progress": False},
            "device": {"fsdp": 4, "tensor": 2},
        }
    )
    return train.train(config, folder / "run"), config


@pytest.fixture(scope="module")
def saved(run):
    """The newest state, read by the blueprint of the run itself."""
    blue = train.open_run(run[1], run[0]).blue
    with Checkpoints(run[0] / "checkpoints") as checkpoints:
        return jax.device_get(checkpoints.restore(2, blue.state))


def assert_bit_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), expected)


WAYS = {
    "one device": ({}, {"data": 1}),
    "sizes": ({"mesh": {"data": 2, "tensor": 4}}, {"data": 2, "tensor": 4}),
    "a mesh": ({"mesh": ("fsdp", "model")}, {"fsdp": 4, "model": 2}),
    "one strategy": ({"strategy": FSDPStrategy("all", min_weight_size=0)}, {"all": 8}),
    "two strategies": (
        {
            "mesh": {"rows": 2, "wide": 4},
            "strategy": {"d": DataParallelStrategy("rows"), "t": TensorParallelStrategy("wide")},
        },
        {"rows": 2, "wide": 4},
    ),
    "rules": (
        {"mesh": {"fsdp": 8}, "strategy": combine({"fsdp": FSDPStrategy("fsdp", min_weight_size=0)})},
        {"fsdp": 8},
    ),
    "a plan": ({"strategy": Plan((8,), ("x",), combine({"f": FSDPStrategy("x", min_weight_size=0)}))}, {"x": 8}),
}


@pytest.mark.parametrize(("how", "sizes"), WAYS.values(), ids=WAYS)
def test_a_run_opens_under_any_mesh_with_every_array_bit_equal(run, saved, how, sizes):
    if isinstance(how.get("mesh"), tuple):
        how = how | {"mesh": create_device_mesh((4, 2), how["mesh"])}
    restored = artifex.restore(run[0], **how)
    assert_bit_equal(restored.state, saved)
    assert (restored.step, dict(restored.mesh.shape), restored.config) == (2, sizes, run[1])
    assert_bit_equal(nnx.to_pure_dict(nnx.state(restored.model)), saved.ema)
    ways = {leaf.sharding.mesh.size for leaf in jax.tree.leaves(restored.state)}
    assert ways == {restored.mesh.size}
    whole = restored.state.params["layers"]["mlp"]["up"]["kernel"]
    assert (whole.addressable_shards[0].data.size < whole.size) == (restored.mesh.size > 1)


def test_the_model_has_the_weights_that_the_run_exported_or_the_raw_ones(run, saved):
    exported = nnx.to_pure_dict(nnx.state(from_pretrained(run[0] / "weights")))
    assert_bit_equal(nnx.to_pure_dict(nnx.state(artifex.restore(run[0]).model)), jax.device_get(exported))
    raw = artifex.restore(run[0], average=False).model
    assert_bit_equal(nnx.to_pure_dict(nnx.state(raw)), saved.params)
    assert (saved.params["embed"]["table"] != saved.ema["embed"]["table"]).any()


def test_one_step_alone_is_enough(run, tmp_path):
    shutil.copytree(run[0] / "checkpoints" / "1", tmp_path / "1")
    alone, first = artifex.restore(str(tmp_path / "1")), artifex.restore(run[0], step=1)
    assert_bit_equal(alone.state, jax.device_get(first.state))
    assert alone.config == run[1] and alone.model.cfg == run[1].model.spec()
    assert artifex.restore(run[0] / "checkpoints").step == 2


def test_a_checkpoint_says_what_it_holds(run):
    with Checkpoints(run[0] / "checkpoints") as checkpoints:
        told = checkpoints.metadata(2)
        stored = checkpoints.arrays(2)
    assert Config.from_dict(told["config"]) == run[1]
    assert told["model"]["name"] == "llama-nano" and told["model"]["rope_theta"] == run[1].model.spec().rope_theta
    assert told["names"]["layers/mlp/up/kernel"] == ["layers", "embed", "mlp"]
    assert {f"params/{path}" for path in told["names"]} == {path for path in stored if path.startswith("params/")}
    assert all(len(names) == len(stored[f"params/{path}"].shape) for path, names in told["names"].items())


def test_a_checkpoint_from_before_it_kept_the_configuration_opens_by_the_runs(run, saved, tmp_path):
    state = artifex.restore(run[0]).state
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(7, state, {"data": {}})
    with pytest.raises(FileNotFoundError, match=r"step 7 in .* keeps no configuration and there is no .*config.json"):
        artifex.restore(tmp_path)
    run[1].save(tmp_path / "config.json")
    assert_bit_equal(artifex.restore(tmp_path).state, saved)


@pytest.mark.parametrize(
    ("place", "how", "error", "message"),
    [
        ("nowhere", {}, FileNotFoundError, "is no folder; expected a run, its checkpoints, or one step"),
        ("run", {"step": 9}, ValueError, r"holds no checkpoint of step 9; it has \[1, 2\]"),
        ("run/checkpoints/2", {"step": 1}, ValueError, "holds step 2 alone"),
        ("run/samples", {}, FileNotFoundError, "holds no checkpoint yet"),
        ("run", {"mesh": {"fsdp": 3}}, ValueError, "8"),
        ("run", {"mesh": {"rows": 8}}, ValueError, "no strategy is named after mesh axis 'rows'"),
        ("run", {"strategy": combine({"f": FSDPStrategy("f")})}, ValueError, "needs a mesh"),
        ("run", {"mesh": {"fsdp": 8}, "strategy": WAYS["a plan"][0]["strategy"]}, ValueError, "the plan is for mesh"),
    ],
)
def test_what_cannot_be_opened_is_a_sentence(run, place, how, error, message):
    with pytest.raises(error, match=message) as raised:
        artifex.restore(run[0].parent / place, **how)
    assert "\n" not in str(raised.value)


def test_a_damaged_step_is_skipped_or_named(run, saved, tmp_path, capsys):
    shutil.copytree(run[0], tmp_path / "run")
    files = [path for path in (tmp_path / "run/checkpoints/2/arrays/ema.embed.table").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-1] ^= 1
    largest.write_bytes(content)
    assert artifex.restore(tmp_path / "run").step == 1
    shutil.rmtree(tmp_path / "run/checkpoints/1")
    with pytest.raises(CheckpointError, match=r"no step of .* can be restored: step 2: .* is damaged"):
        artifex.restore(tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        sample.main([str(tmp_path / "run"), "--prompt", "a"])
    assert stop.value.code == 1 and "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["", "weights"])
def test_samples_on_a_mesh_are_those_of_one_device(run, part, capsys):
    path = str(run[0] / part)
    texts = []
    for mesh in ([], ["--mesh", "fsdp=2,tensor=4"]):
        sample.main([path, "--num-tokens", "6", "--num-samples", "3", "--temperature", "0", "--prompt", "one", *mesh])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].count("--- sample") == 3
    for mesh, message in (
        ("fsdp", "is no list of axes"),
        ("fsdp=16", "Number of devices 8 must equal"),
        ("width=8", "width"),
    ):
        with pytest.raises(SystemExit):
            sample.main([path, "--mesh", mesh])
        assert message in capsys.readouterr().err


def test_a_restored_run_runs_by_its_mesh_and_the_model_in_hand(run):
    restored = artifex.restore(run[0], mesh={"data": 8})
    draw = lambda model: model.sample(  # noqa: E731
        jax.random.key(0), prompt=np.full((8, 3), 97), num_tokens=4, temperature=0
    )
    np.testing.assert_array_equal(restored.run(draw), draw(restored.model))
    assert restored.run(lambda _: current_execution().mesh.shape) == {"data": 8}
    restored.model.norm.scale[...] *= 0  # no logit differs: every token is the first
    assert (np.asarray(restored.run(draw)) == 0).all()
