"""A disk that fills up or goes away under a run: what only tells is waited for, what is to be kept is said at once."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from runs import command, environment, write_source

from artifex.config import Config
from artifex.scaling.checkpoints import Checkpoints

LONG = ["--training.steps", "1000000", "--checkpoint.every", "20", "--logging.every", "1", "--checkpoint.keep", "2"]
# saves of some steps fail as on a full disk, in the background, when all files are written
FAILING = """
import errno, sys
from artifex.scaling import manifest
from artifex import train

bad = {int(step) for step in sys.argv.pop(2).split(",")}
seal = manifest.seal
def failing(folder, body):
    if body["step"] in bad:
        raise OSError(errno.ENOSPC, "No space left on device", f"{folder}/manifest.json")
    seal(folder, body)
manifest.seal = failing
train.main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("run"))


class Running:
    """A run in a process of its own, ended at the end of the test."""

    def __init__(self, folder, run, *words):
        self.run = run
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        whole = command("--run-dir", str(run), *LONG, *words)
        self.process = subprocess.Popen(whole, cwd=folder, env=environment(), text=True, **pipes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def until(self, what, seconds=60):
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end and self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.05)

    def saved(self):
        steps = [path.parent.name for path in self.run.glob("checkpoints/*/manifest.json")]
        return max((int(step) for step in steps if step.isdecimal()), default=0)

    def stopped(self):
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=60)
        return out


def steps_of(file: Path) -> list[int]:
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [record["step"] for record in records if record["split"] == "train"]


def test_metrics_wait_for_a_disk_that_is_full(folder, tmp_path):
    with Running(folder, tmp_path / "run") as them:
        metrics, aside = them.run / "metrics.jsonl", them.run / "real.jsonl"
        them.until(lambda: them.saved() >= 20)
        metrics.rename(aside)
        metrics.symlink_to("/dev/full")  # every write fails with ENOSPC
        at = them.saved()
        them.until(lambda: them.saved() >= at + 40)  # the run goes on
        whole = them.run / "link"
        whole.symlink_to(aside)
        os.replace(whole, metrics)
        them.until(lambda: steps_of(aside)[-1] > at + 40)
        out = them.stopped()
    assert them.process.returncode == 143
    assert out.count("warning: ") == 1
    assert re.search(rf"warning: {metrics} cannot be written: \[Errno 28\] No space left on device", out)
    assert re.search(rf"{metrics} is written again: \d+ lines had waited", out)
    found = steps_of(aside)
    assert found == list(range(1, len(found) + 1)), "none is lost, none is twice"


@pytest.mark.slow
def test_a_folder_that_vanishes_is_laid_out_again(folder, tmp_path):
    with Running(folder, tmp_path / "run", "--training.sample-tokens", "2") as them:
        them.until(lambda: them.saved() >= 20)
        them.run.rename(tmp_path / "gone")
        them.until(lambda: them.saved() >= 40)
        out = them.stopped()
    assert them.process.returncode == 143 and "Traceback" not in out
    with Checkpoints(them.run / "checkpoints") as checkpoints:
        assert checkpoints.newest_restorable()[0] == int(re.search(r"at step (\d+), which is saved", out)[1])
    assert Config.from_file(them.run / "config.json") == Config.from_file(tmp_path / "gone/config.json")
    assert (them.run / "tokenizer.json").exists() and (them.run / "prompt.txt").exists()


@pytest.mark.slow
def test_samples_that_cannot_be_written_cost_no_run(folder, tmp_path):
    with Running(folder, tmp_path / "run", "--training.sample-tokens", "2") as them:
        them.until(lambda: them.saved() >= 20)
        (them.run / "samples").rename(tmp_path / "samples")
        (them.run / "samples").symlink_to("/proc/1")  # a folder in which nothing can be made
        at = them.saved()
        them.until(lambda: them.saved() >= at + 60)
        out = them.stopped()
    assert them.process.returncode == 143 and out.count("warning: ") == 1
    assert re.search(r"warning: a sample of step \d+ cannot be written: .*; the run goes on without", out)


def failing(folder, run, bad, *words):
    whole = command("--run-dir", str(run), *words, program=FAILING)
    whole.insert(4, bad)
    return subprocess.run(whole, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)


def test_a_save_that_fails_is_told_at_its_step_and_ends_the_run(folder, tmp_path):
    run = tmp_path / "run"
    done = failing(
        folder, run, "1000", "--training.steps", "1000000", "--checkpoint.every", "500", "--logging.every", "1"
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    told = (
        r"error: step 1000 was not saved in \S+: \[Errno 28\] No space left on device: '1000.saving-\d+/manifest.json'"
    )
    assert re.match(
        told + r"; complete steps, untouched: \[500\]; a step takes .*iB, .*iB are free there$", done.stderr
    )
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert checkpoints.newest_restorable() == (500, [])
    assert steps_of(run / "metrics.jsonl")[-1] < 1500, "before the next save"


def test_a_run_that_is_to_go_on_says_so_and_saves_the_next_step(folder, tmp_path):
    done = failing(folder, tmp_path / "run", "10,20", "--checkpoint.on-failure", "go_on")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("warning")]
    assert [re.search(r"step (\d+) was not saved .*; the run goes on, (\d) save", line).groups() for line in lines] == [
        ("10", "1"),
        ("20", "2"),
    ]
    with Checkpoints(tmp_path / "run/checkpoints") as checkpoints:
        assert checkpoints.newest_restorable() == (40, []) and checkpoints.steps() == [30, 40]
    last = failing(folder, tmp_path / "last", "40", "--checkpoint.on-failure", "go_on")
    assert last.returncode == 1 and "step 40 was not saved" in last.stderr, "nothing follows that would make up for it"
