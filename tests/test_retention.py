"""Which steps stay is what the rule says of all that were ever saved, whatever the order, the values and the kills."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from artifex import checkpoint, train
from artifex.config import Config, ConfigError
from artifex.scaling.checkpoints import Checkpoints
from artifex.scaling.manifest import CheckpointError
from artifex.scaling.retention import Retention

ROOT = Path(__file__).parents[1]


def by_brute_force(history, newest, every, best):
    """Of all steps ever saved, in their order, each with its value or None: those that must be there."""
    stay = {step for step, _ in history[-newest:]} | {step for step, _ in history if every and step % every == 0}
    for step, value in history:
        if value is not None:
            before = sum(
                other is not None and (other < value or (other == value and earlier < step))
                for earlier, other in history
            )
            if before < best:
                stay.add(step)
    return stay


def measured(draw):
    """A value among few, so that many are equal; or none, for reasons of its own."""
    value = draw.choice([None, math.nan, math.inf, True, "low", *[draw.randrange(4) / 4] * 8])
    known = isinstance(value, float) and math.isfinite(value)
    return value, value if known else None


@pytest.mark.parametrize("seed", range(60))
def test_what_stays_after_each_save_is_what_the_rule_says_of_all_that_were_saved(seed):
    draw = random.Random(seed)
    newest, every, best = draw.randint(1, 4), draw.choice([0, 0, 3, 4, 10]), draw.randrange(4)
    rule, step, history, there = Retention(newest, every, best, "loss"), 0, [], {}
    for _ in range(40):
        step += draw.choice([1, 1, 1, 2, 5])
        beside, value = measured(draw)
        history.append((step, value))
        there[step] = rule.value({} if beside is None else {"validation": {"loss": beside, "other": 0.0}})
        for gone in rule.gone(there, there):
            del there[gone]
        assert there.keys() == by_brute_force(history, newest, every, best) == rule.kept(there).keys()


@pytest.mark.parametrize(("how", "says"), [({"newest": 0}, "at least 1"), ({"every": -1}, "below 0")])
def test_a_rule_that_keeps_nothing_is_refused(how, says):
    with pytest.raises(ValueError, match=says):
        Retention(**how)


RULE = {"newest": 2, "every": 5, "best": 2, "metric": "loss"}
VALUES = [0.5, 0.9, 0.1, None, 0.7, 0.1, 0.3, 0.05, 0.8, 0.9, None, 0.1, 0.2]


def saved(folder, steps):
    with Checkpoints(folder, keep=Retention(**RULE)) as checkpoints:
        for step in steps:
            value = VALUES[step - 1]
            beside = {} if value is None else {"validation": {"loss": value}}
            checkpoints.save(step, {"n": jnp.asarray(step)}, beside)


def stays(until):
    history = list(enumerate(VALUES[:until], 1))
    return by_brute_force(history, RULE["newest"], RULE["every"], RULE["best"])


def complete(folder):
    with Checkpoints(folder) as checkpoints:
        return set(checkpoints.steps())


def test_steps_on_disk_are_those_of_the_rule_and_an_old_one_goes_after_a_newer_one_counts(tmp_path, monkeypatch):
    removed, remove = [], shutil.rmtree

    def removing(path, **how):
        if Path(path).name.isdecimal():
            there = complete(tmp_path)
            assert max(there) == max(*there, *removed, int(Path(path).name)), "the newest counts before another goes"
            removed.append(int(Path(path).name))
        remove(path, **how)

    monkeypatch.setattr("artifex.scaling.checkpoints.shutil.rmtree", removing)
    for step in range(1, len(VALUES) + 1):
        saved(tmp_path, [step])
        assert complete(tmp_path) == stays(step)
    assert set(removed) == set(range(1, len(VALUES) + 1)) - stays(len(VALUES))


def test_a_save_that_fails_removes_nothing(tmp_path, monkeypatch):
    saved(tmp_path, range(1, 8))
    monkeypatch.setattr("artifex.scaling.manifest.seal", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(CheckpointError, match="no space"):
        saved(tmp_path, [8])
    assert complete(tmp_path) == stays(7)


KILLED = """
import os, signal, sys
sys.path.insert(0, "tests")
from artifex.scaling import checkpoints
import test_retention

point, begin = sys.argv[2], int(sys.argv[3])
remove, rmtree, rename = checkpoints._remove, checkpoints.shutil.rmtree, checkpoints.Path.rename
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)

def removing(folder):
    if point == "before one goes":
        kill()
    remove(folder)
    if point == "after one went":
        kill()

def part(path, **how):
    if point == "while one goes":
        for file in [*path.rglob("zarr.json")][:1]:
            file.unlink()
        kill()
    rmtree(path, **how)

checkpoints._remove, checkpoints.shutil.rmtree = removing, part
test_retention.saved(sys.argv[1], range(begin, len(test_retention.VALUES)))  # all but the last
"""


@pytest.mark.parametrize(
    "point",
    [
        "while one goes",
        *(pytest.param(point, marks=pytest.mark.slow) for point in ("before one goes", "after one went")),
    ],
)
def test_a_kill_while_a_step_goes_costs_no_step_that_stays(point, tmp_path):
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    saved(tmp_path, [1, 2])
    kills, step = 0, 2
    while step < len(VALUES) - 1 and kills < (2 if point == "while one goes" else 20):
        command = [sys.executable, "-c", KILLED, str(tmp_path), point, str(step + 1)]
        ended = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        there, step = complete(tmp_path), max(complete(tmp_path))
        assert there >= stays(step), f"killed after step {step}"
        assert ended in (0, -signal.SIGKILL)
        kills += ended != 0
    assert kills
    print(f"\n{point}: {kills} kills")
    saved(tmp_path, range(step + 1, len(VALUES) + 1))
    assert complete(tmp_path) == stays(len(VALUES))
    assert {path.name for path in tmp_path.iterdir()} == {str(step) for step in stays(len(VALUES))}


# ---- a run


def config(folder, training=None, **checkpoint) -> Config:
    (folder / "text.txt").write_text("".join(f"one line of text, number {n % 97}\n" for n in range(400)))
    small = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "mlp_dim": 16}
    training = {"batch_size": 8, "steps": 12, "validate_every": 1, "sample_tokens": 0} | (training or {})
    return Config.from_dict(
        {
            "model": {"name": "llama-nano", **small},
            "data": {"source": str(folder / "text.txt"), "sequence_length": 32},
            "training": {**training, "validation_batches": 1, "final_validation_batches": 1},
            # too fast to learn: some validations are worse than the one before
            "optimizer": {"name": "adamw", "learning_rate": 0.3, "warmup_steps": 0, "schedule": "constant"},
            "checkpoint": {"every": 1, **checkpoint},
            "logging": {"every": 1, "progress": False},
        }
    )


def test_a_run_keeps_what_its_validations_say_and_the_list_says_why(tmp_path, capsys):
    how = {"keep": 1, "keep_every": 5, "keep_best": 2, "best_metric": "bits_per_byte"}
    run = train.train(config(tmp_path, **how), tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["bits_per_byte"] for line in lines if line["split"] == "validation"}
    history = [
        (step, scores[step] if step < 12 else None) for step in range(1, 13)
    ]  # the last is saved, then validated
    assert complete(run / "checkpoints") == by_brute_force(history, 1, 5, 2)
    best = sorted((value, step) for step, value in history if value is not None)[:2]
    assert [step for _, step in best] != [10, 11], "the best are not the newest"
    capsys.readouterr()
    checkpoint.main(["ls", str(run)])
    rows = {int(line.split()[0]): line for line in capsys.readouterr().out.splitlines()[2:]}
    assert "newest" in rows[12] and "every 5" in rows[5] and "every 5" in rows[10]
    for place, (value, step) in enumerate(best, 1):
        assert f"best {place}, bits_per_byte {value:.6g}" in rows[step]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"checkpoint": {"every": 3}, "training": {"validate_every": 2}}, "every 3 and validated every 2; make "),
        ({"checkpoint": {"every": 0}, "training": {}}, "saved every 0"),
        ({"checkpoint": {"every": 2}, "training": {"validate_every": 0}}, "validated every 0"),
    ],
)
def test_a_best_of_steps_that_are_not_validated_is_refused(tmp_path, change, says):
    with pytest.raises(ConfigError, match=says):
        config(tmp_path, change["training"], keep_best=1, **change["checkpoint"])


def test_a_metric_that_no_validation_has_is_refused_before_the_step_is_compiled(tmp_path):
    unknown = config(tmp_path, keep_best=1, best_metric="accuracy")
    with pytest.raises(ValueError, match=r"best_metric is 'accuracy', but a validation measures bits_per_byte, .*loss"):
        train.prepare(train.open_run(unknown, tmp_path / "run"))
