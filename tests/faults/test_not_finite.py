"""What is not finite is never saved: a step is refused or skipped, named, and can be taken again."""

import dataclasses
import json
import math

import jax
import numpy as np
import optax
import pytest

from artifex import train
from artifex.config import Config
from artifex.scaling.checkpoints import Checkpoints
from artifex.training import finite
from artifex.training.run_folder import RunFolder
from artifex.training.state import blueprint
from artifex.training.step import make_step

TEXT = "It was a quiet day in the harbour, and the boats lay still.\n"


def config(source="stdlib", **sections) -> Config:
    base = {
        "model": {"name": "llama-nano", "embed_dim": 16, "num_layers": 2, "num_heads": 2, "head_dim": 8, "mlp_dim": 16},
        "data": {"source": str(source), "sequence_length": 16},
        "training": {"steps": 8, "batch_size": 8, "validate_every": 0, "sample_tokens": 0},
        "optimizer": {"name": "adamw", "warmup_steps": 0, "learning_rate": 1e-2},
        "checkpoint": {"every": 1, "keep": 9},
        "logging": {"every": 1, "progress": False},
        "device": {"fsdp": 4, "tensor": 2},
    }
    return Config.from_dict({key: base.get(key, {}) | sections.get(key, {}) for key in {**base, **sections}})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for index in range(4):
        (folder / f"{index}.txt").write_text(TEXT * 40)
    return folder


def batch(step, *, bad=False):
    draw = np.random.default_rng(step).integers(0, 200, (8, 17), dtype=np.int32)
    mask = np.ones((8, 16), np.float32)
    if bad:
        mask[3, 5] = np.nan  # one number of one row
    return {"tokens": draw[:, :-1], "targets": draw[:, 1:], "mask": mask}


def built(**sections):
    cfg = config(**sections)
    plan = train.plan_of(cfg, 8)
    return blueprint(cfg, plan, plan.make_mesh())


def host(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(tree))]


# float32 ends at 3.4e38: the rate is a number, the loss and gradient of the first step are, and the update is not
WILD = {"learning_rate": 3e38, "weight_decay": 10.0}


def test_a_state_that_the_update_made_infinite_is_not_saved(source, tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"^params/\S+ is not finite after step 1, though loss and gradient are"
    ):
        train.train(config(source, optimizer=WILD), tmp_path / "run")
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.steps() == []
    assert not (tmp_path / "run" / "weights").exists()


def test_a_step_saved_with_what_is_not_finite_is_not_exported(source, tmp_path, monkeypatch):
    cfg = config(source, training={"steps": 1, "validate_every": 0}, optimizer=WILD)
    with monkeypatch.context() as patch:  # as an earlier version would have saved it
        patch.setattr(finite, "told", lambda *_: None)
        patch.setattr("artifex.models.weights.save_pretrained", stopped)
        with pytest.raises(KeyboardInterrupt):
            train.train(cfg, tmp_path / "run")
    with pytest.raises(FloatingPointError, match=r"^params/\S+ of step 1 is not finite: no weights are made of it"):
        train.train(cfg, tmp_path / "run")
    assert not (tmp_path / "run" / "weights").exists()


def stopped(*_):
    raise KeyboardInterrupt


def test_each_array_is_named_by_its_path():
    """The first in their order: each is spoilt in turn, in one element of one shard."""
    blue = built(training={"ema_decay": 0.9})
    state = blue.init()
    names = {path: leaf for path, leaf in finite.of_blueprint(blue).items() if not path.startswith("gradients/")}
    arrays = finite.looked_at({}, state)
    assert arrays.keys() == names.keys() and len(arrays) > 40
    order = list(arrays)
    look = jax.jit(lambda values: finite.first_of(blue, dict(zip(order, values, strict=True))))
    assert int(look([*arrays.values()])) == finite.NONE
    for path in order[::7]:
        value = np.array(arrays[path])
        value[tuple(size - 1 for size in value.shape)] = -np.inf
        spoilt = arrays | {path: jax.device_put(value, arrays[path].sharding)}
        assert order[int(look([*spoilt.values()]))] == path


KINDS = {
    "plain": {},
    "accumulated": {"training": {"gradient_accumulation": 2}},
    "averaged": {"training": {"ema_decay": 0.9}},
    "bfloat16": {"training": {"param_dtype": "bfloat16", "gradient_dtype": "bfloat16"}},
    "pipelined": {"device": {"fsdp": 4, "tensor": 1, "pipeline": 2, "microbatches": 2}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step_changes_nothing_as_with_optax(kind):
    given = KINDS[kind]
    blue = built(**given | {"training": given.get("training", {}) | {"not_finite": "skip"}})
    step, state, counts = make_step(blue), blue.init(), []
    outside = optax.apply_if_finite(optax.scale(1.0), max_consecutive_errors=9)
    theirs = outside.init(jax.numpy.float32(0))
    for index in range(4):
        before = host(dataclasses.replace(state, step=None))
        state, metrics = step(state, blue.placed(batch(index, bad=index in (1, 2))))
        same = [
            np.array_equal(old, new)
            for old, new in zip(before, host(dataclasses.replace(state, step=None)), strict=True)
        ]
        assert all(same) == (index in (1, 2))
        assert int(state.step) == index + 1
        host_metrics = {name: float(x) for name, x in metrics.items()}
        assert finite.is_finite(host_metrics) != (index in (1, 2))
        _, theirs = outside.update(metrics["grad_norm"], theirs)
        counts.append(int(theirs.total_notfinite))
        told = finite.told(blue, index + 1, host_metrics)
        assert (told is None) == (index not in (1, 2))
        if told:
            assert told.startswith(f"loss is nan and grad_norm is nan at step {index + 1}; the first array ")
            assert told.endswith("is gradients/embed/table")
    assert counts == [0, 1, 2, 2]
    # the schedule goes on from the updates made, as optax's count does
    assert optax.tree.get_all_with_path(state.optimizer, "count")[0][1] == 2


def test_without_a_bad_step_skip_and_stop_are_bit_equal():
    states = []
    for how in ("stop", "skip"):
        blue = built(training={"not_finite": how, "ema_decay": 0.9})
        step, state = make_step(blue), blue.init()
        for index in range(3):
            state, _ = step(state, blue.placed(batch(index)))
        states.append(host(state))
    assert all(one.tobytes() == other.tobytes() for one, other in zip(*states, strict=True))


def strictly(text):
    def refuse(word):
        raise ValueError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def spoilt(monkeypatch, bad):
    """The batches of `bad` steps have a mask with a NaN, wherever they are made."""
    from artifex.data.batches import Batches

    original = Batches.batch_at

    def batch_at(self, step):
        found = original(self, step)
        mask = np.ones(found["tokens"].shape, np.float32)
        mask[0, 0] = np.nan if step + 1 in bad else 1.0
        return found | {"mask": mask}

    monkeypatch.setattr(Batches, "batch_at", batch_at)


def test_steps_that_are_skipped_are_counted_kept_and_taken_again(source, tmp_path, monkeypatch, capsys):
    spoilt(monkeypatch, {3, 5})
    run = tmp_path / "run"
    cfg = config(source, training={"not_finite": "skip", "validate_every": 0})
    train.train(cfg, run)
    said = capsys.readouterr().out
    assert "skipped, the run's skip number 1: loss is nan" in said and "skip number 2: loss is nan" in said
    records = strictly((run / "metrics.jsonl").read_text())
    assert [(r["step"], r["skipped"], r["loss"]) for r in records if r["split"] == "skipped"] == [
        (3, 1, None),
        (5, 2, None),
    ]
    losses = {r["step"]: r["loss"] for r in records if r["split"] == "train"}
    assert sorted(losses) == [1, 2, 4, 6, 7, 8] and all(map(math.isfinite, losses.values()))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for step, ends in (
        (5, "loss is nan and grad_norm is nan at step 5"),
        (4, "all is finite at step 4"),
        (1, "all is finite at step 1"),  # no step before it was saved
    ):
        opened = train.open_run(cfg, run, replay=step)
        train.run_steps(opened, train.prepare(opened), replay=step)
        said = capsys.readouterr().out
        assert ends in said and ("step-0000005.npz, which the data give now" in said) == (step == 5)
        assert (f"resumed from step {step - 1}" in said) == (step > 1)
        if step != 5:
            assert f"loss {losses[step]:.6g}" in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_too_many_skips_in_a_row_end_the_run(source, tmp_path, monkeypatch):
    spoilt(monkeypatch, {3, 4, 5})
    cfg = config(source, training={"not_finite": "skip", "skips_in_a_row": 2, "validate_every": 0})
    with pytest.raises(FloatingPointError, match=r"at step 5; .*, and 2 before it were skipped: .* --replay 5$"):
        train.train(cfg, tmp_path / "run")
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [1, 2, 3, 4]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_that_json_does_not_have_stands_in_the_metrics(value, tmp_path):
    folder = RunFolder(tmp_path)
    folder.log({"step": 1, "split": "validation", "loss": value, "elapsed_seconds": 1.0})
    (record,) = strictly(folder.metrics.read_text())
    assert record["loss"] is None and float(record["not_finite"]["loss"]) == pytest.approx(value, nan_ok=True)


def test_replay_is_for_a_run_and_a_step(source, tmp_path, capsys):
    for words, says in (
        (["--replay", "3"], "--replay is for the folder of a run alone"),
        ([str(tmp_path), "--replay", "0"], "--replay must be greater than or equal to 1, got 0"),
        ([str(tmp_path), "--replay", "3"], "config.json"),
    ):
        with pytest.raises(SystemExit) as end:
            train.main(words)
        error = capsys.readouterr().err
        assert end.value.code == 2 and says in error and error.count("\n") == 1
