"""The wall time of a run by parts that add up to it, over kills and restarts too."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_run import tiny, written

from artifex import train
from artifex.training.goodput import PARTS, Goodput
from artifex.training.metrics_file import MetricsFile

ROOT = Path(__file__).parents[1]


class Clock:
    """A time that stands until it is set on."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return written(tmp_path_factory.mktemp("source"))


def parts(line: dict) -> dict[str, float]:
    return {part: line[f"{part}_seconds"] for part in PARTS}


def split(run: Path) -> list[dict]:
    return [record for record in MetricsFile(run / "metrics.jsonl").read() if record["split"] == "goodput"]


def test_every_second_goes_to_one_part():
    clock = Clock()
    goodput = Goodput(0, clock=clock)
    clock.passes(3)
    with goodput.during("compile"):
        clock.passes(5)
    with goodput.during("data", 1):
        clock.passes(1)
    with goodput.during("productive", 1):
        clock.passes(2)
        goodput.first_step()
        with goodput.during("start"):
            clock.passes(0.5)
        clock.passes(4)
    clock.passes(0.25)
    with goodput.during("checkpoint", 1):
        clock.passes(7)
        with pytest.raises(OSError), goodput.during("samples", 1):
            clock.passes(1)
            raise OSError
    told = goodput.told(1)
    spent = {"start": 3.5, "compile": 5, "data": 1, "productive": 6, "checkpoint": 7, "samples": 1, "other": 0.25}
    assert parts(told) == dict.fromkeys(PARTS, 0.0) | spent
    assert told["wall_seconds"] == sum(spent.values()) == clock.now - 1000
    assert told["goodput"] == 6 / 23.75 and told["first_step_seconds"] == 11


def test_parts_add_up_to_the_wall_time_whatever_order_they_come_in():
    rng, clock = np.random.default_rng(0), Clock()
    goodput = Goodput(clock=clock)

    def some(depth: int) -> None:
        for _ in range(rng.integers(4)):
            clock.passes(rng.exponential())
            with goodput.during(str(rng.choice([*PARTS])), int(rng.integers(9))):
                clock.passes(rng.exponential())
                if depth < 4:
                    some(depth + 1)

    for _ in range(50):
        some(0)
        told = goodput.told(1)
        assert sum(parts(told).values()) == pytest.approx(told["wall_seconds"]) == pytest.approx(clock.now - 1000)


def test_steps_computed_again_after_a_kill_are_lost_work():
    """By hand: steps of 2 s; saved at step 3, killed after step 5, again after step 4, then 6 steps to the end."""
    clock, lines, start = Clock(), [], 0
    for last in (5, 4, 6):
        goodput = Goodput(start, clock=clock)
        goodput.go_on(lines)
        clock.passes(10)
        goodput.first_step()
        lines = [line for line in lines if line["step"] <= start] + [goodput.told(start)]
        for step in range(start + 1, last + 1):
            with goodput.during("productive", step):
                clock.passes(2)
            lines.append(goodput.told(step))
        start = 3
        clock.passes(100)  # between two starts, or until the process ends: of none
    told = lines[-1]
    assert told["starts"] == 3 and told["start_seconds"] == 30
    assert told["productive_seconds"] == 6 * 2
    assert told["lost_seconds"] == (2 + 1) * 2
    assert told["wall_seconds"] == 30 + 12 + 6


def test_lines_that_are_none_of_ours_are_passed_over():
    goodput = Goodput(3)
    goodput.go_on([{"step": 1, "split": "goodput"}, {"step": 2, "split": "train", "loss": 1.0}])
    assert goodput.starts == 1 and goodput.told(3)["lost_seconds"] == 0


def test_a_run_that_is_killed_and_goes_on_tells_what_was_lost(source, tmp_path):
    """The process is killed after step 5, of which step 3 is saved; each step waits, so that times are known."""
    wait, run = 0.05, tmp_path / "run"
    how = tiny(source, training={"steps": 6, "validate_every": 0}, checkpoint={"every": 3})
    how.save(tmp_path / "config.json")
    program = f"""
import os, signal, sys, time
from artifex.training import goodput, step
goodput.EVERY = 0.0
from artifex.training import meter, memory
call, killed = memory.CompiledStep.__call__, {{}}
def slow(self, state, batch):
    time.sleep({wait})
    killed["step"] = killed.get("step", int(state.step)) + 1
    if killed["step"] == int(os.environ["KILL"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return call(self, state, batch)
memory.CompiledStep.__call__ = slow
from artifex import train
train.main(sys.argv[1:])
"""
    ends, began = [], time.monotonic()
    for kill in ("6", "0"):
        command = [sys.executable, "-c", program, str(tmp_path / "config.json"), "--run-dir", str(run)]
        env = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "KILL": kill}
        done = subprocess.run(command, env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
        ends.append((done.returncode, done.stdout + done.stderr))
        if kill == "6":
            told = split(run)[-1]
    spent = time.monotonic() - began
    assert ends[0][0] == -signal.SIGKILL and ends[1][0] == 0, ends
    assert "goodput" in ends[1][1] and "steps lost and computed again" in ends[1][1]
    last = split(run)[-1]
    assert last["starts"] == 2 and last["step"] == 6
    assert wait <= last["lost_seconds"] <= told["productive_seconds"]
    assert 6 * wait <= last["productive_seconds"]
    assert sum(parts(last).values()) == pytest.approx(last["wall_seconds"]) and last["wall_seconds"] <= spent
    assert last["wall_seconds"] > 0.5 * spent and last["compile_seconds"] > 0 and last["checkpoint_seconds"] > 0
    kept = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert kept == sorted(kept)


def test_training_counts_what_its_process_does(source, tmp_path, capsys):
    before = time.monotonic()
    run = train.train(tiny(source), tmp_path / "run")
    spent = time.monotonic() - before
    last = split(run)[-1]
    assert 0.8 * spent < last["wall_seconds"] < spent
    assert 0 < last["first_step_seconds"] < last["wall_seconds"] and 0 < last["goodput"] < 1
    assert all(last[f"{part}_seconds"] > 0 for part in set(PARTS) - {"lost"}) and last["lost_seconds"] == 0
    assert f"goodput {last['goodput']:.1%}"[:11] in capsys.readouterr().out
