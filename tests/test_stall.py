"""A run that stands still says at what, once it is much longer than usual; one that works says nothing."""

import re
import threading
import time
from pathlib import Path

import pytest
from tiny_run import tiny, written

from artifex import train
from artifex.config import Config
from artifex.training import saving, stall, text_task
from artifex.training.goodput import Goodput
from artifex.training.stall import StallWatch


class Clock:
    """A time that stands until it is set on."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def config(source, **sections) -> Config:
    sections["training"] = {"steps": 6} | sections.get("training", {})
    sections["checkpoint"] = {"every": 4} | sections.get("checkpoint", {})
    return tiny(source, **sections)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return written(tmp_path_factory.mktemp("source"))


@pytest.fixture
def watched(tmp_path):
    """A watch of this thread that is looked through by hand, its clock and what it said."""
    clock, said = Clock(), []
    goodput = Goodput(clock=clock)
    watch = StallWatch(goodput, tmp_path / "stall.txt", said.append, 0.0)
    with watch:  # no thread looks
        watch.least = 60.0
        yield goodput, clock, watch, said
        watch.least = 0.0


def seconds(clock, watch, count):
    for _ in range(count):
        clock.now += 1
        watch.look()


def test_it_is_said_after_a_minute_at_doubled_times_and_when_it_is_over(watched, tmp_path):
    goodput, clock, watch, said = watched
    with goodput.during("data", 7):
        seconds(clock, watch, 59)
        assert not said
        seconds(clock, watch, 1)
        assert said == [f"reads the batch of step 7 for 60 s: waits for the data; its stack is in {tmp_path}/stall.txt"]
        seconds(clock, watch, 300)
    assert said[1:] == [f"reads the batch of step 7 for {time} s: still waits for the data" for time in (120, 240)]
    with goodput.during("productive", 7):
        seconds(clock, watch, 1)
    assert said[3:] == ["goes on: reads the batch of step 7 took 360 s"]


def test_slow_steps_are_no_stall_and_twenty_times_as_long_is(watched):
    goodput, clock, watch, said = watched
    for step in range(1, 10):
        with goodput.during("productive", step):
            seconds(clock, watch, 50)
    with goodput.during("productive", 10):
        seconds(clock, watch, 999)
        assert not said
        seconds(clock, watch, 1)
    assert len(said) == 1
    assert said[0].startswith("computes step 10 for 1000 s, where a step takes 50 s: waits for the devices")


@pytest.mark.parametrize("part, words", [("validation", "the validation"), ("checkpoint", "the disk"), ("samples", "")])
def test_what_comes_after_a_step_is_given_ten_times_as_long(watched, part, words):
    goodput, clock, watch, said = watched
    with goodput.during(part, 4):
        seconds(clock, watch, 599)
        assert not said
        seconds(clock, watch, 1)
    assert len(said) == 1 and words in said[0] and "after step 4 for 600 s" in said[0]


def test_a_data_source_that_blocks_is_named_with_the_function_where_it_stands(source, tmp_path, monkeypatch, capsys):
    def blocking(self, start, part=(0, 1)):
        for step, batch in enumerate(self.windows(part).stream(start), start + 1):
            if step == 4:
                a_disk_that_does_not_answer()
            yield batch

    def a_disk_that_does_not_answer():
        time.sleep(2.5)

    monkeypatch.setattr(text_task.TextTask, "batches", blocking)
    monkeypatch.setattr(stall, "TIMES", 0.0)  # steps are as slow as this machine is busy
    run = train.train(config(source, logging={"stall_after": 1.0}, training={"validate_every": 0}), tmp_path / "run")
    said = [line for line in capsys.readouterr().out.splitlines() if "reads the batch" in line]
    assert len(said) >= 2
    assert re.match(r"reads the batch of step 4 for 1 s.*: waits for the data; its stack is in", said[0])
    assert said[-1].startswith("goes on: reads the batch of step 4 took")
    stacks = (run / "stall.txt").read_text()
    first = stacks.partition("\nthread ")[2].partition("\nthread ")[0]
    assert first.startswith(threading.main_thread().name) and "a_disk_that_does_not_answer" in first
    assert "stall-watch" not in [thread.name for thread in threading.enumerate()]


def test_a_slow_disk_is_named(source, tmp_path, monkeypatch, capsys):
    save = saving.Saver.save
    monkeypatch.setattr(stall, "TIMES", 0.0)
    monkeypatch.setattr(saving.Saver, "save", lambda *given: (time.sleep(1.5), save(*given))[1])
    train.train(config(source, logging={"stall_after": 0.1}, training={"validate_every": 0}), tmp_path / "run")
    assert re.search(r"saves after step 4 for 1 s.*: waits for the disk", capsys.readouterr().out)


def test_a_run_that_compiles_validates_saves_and_samples_says_nothing(source, tmp_path, capsys):
    """Everything but reading and computing takes far longer than a step here, compilation included."""
    run = train.train(config(source, logging={"stall_after": 2.0}), tmp_path / "run")
    assert "waits for" not in capsys.readouterr().out and not (run / "stall.txt").exists()
    assert not Path(run / "stall.txt").exists()
