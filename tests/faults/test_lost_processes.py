"""One of two processes is killed, stopped, or never comes: the other leaves soon, names it, and says how to go on."""

import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from runs import ROOT, environment, write_source
from two_processes import LIMIT, is_one_sentence, left, saved, script, started

from artifex.scaling.checkpoints import Checkpoints

ENDLESS = ["--training.steps=1000000", "--checkpoint.every=2", "--logging.every=2", "--device.data=2"]
# `artifex.train` where the main thread of process 1 is busy for long before the first step
SLOW = """
import sys, time
from artifex import train
prepare = train.prepare
def slow(run):
    time.sleep(8 if "--device.process-id=1" in sys.argv else 0)
    return prepare(run)
train.prepare = slow
train.main()
"""
# and where that of one process hangs at its 8th batch, as in a file system that does not answer; in its third
# save; or before it looks whether one has failed
HANGING = """
import itertools, sys, time
from artifex import train
from artifex.scaling.checkpoints import Checkpoints
from artifex.training.saving import Saver
from artifex.training.state import Blueprint
number, place, count = sys.argv.pop(1), sys.argv.pop(1), itertools.count()
owner, name, when = {
    "batch": (Blueprint, "placed", 8),
    "save": (Checkpoints, "save", 2),
    "look": (Saver, "look", 3),
}[place]
function = getattr(owner, name)
def hanging(*args):
    time.sleep(1000 if f"--device.process-id={number}" in sys.argv and next(count) == when else 0)
    return function(*args)
setattr(owner, name, hanging)
train.main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize(
    ("sign", "lost"),
    [
        (signal.SIGKILL, 0),
        (signal.SIGSTOP, 1),
        pytest.param(signal.SIGKILL, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.slow),
    ],
)
def test_the_one_that_is_left_names_the_lost_one_and_the_command_that_goes_on(sign, lost, folder, tmp_path):
    run = tmp_path / "run"
    with started(folder, "--run-dir", str(run), *ENDLESS) as processes:
        saved(run, processes)
        processes[lost].send_signal(sign)
        code, err = left(processes[1 - lost], LIMIT + 6)
        with Checkpoints(run / "checkpoints") as checkpoints:
            step, skipped = checkpoints.newest_restorable()
        assert code == 1 and is_one_sentence(err) and not skipped, err
        why = "its connection broke" if sign == signal.SIGKILL else f"it said nothing for {LIMIT} s"
        assert f"process {lost} of 2, on {socket.gethostname()}, is lost: {why}" in err
        assert f"; step {step} is saved; start all processes again, this one by: " in err
        if sign == signal.SIGSTOP:  # what stood still hears of it when it goes on
            processes[lost].send_signal(signal.SIGCONT)
            code, err_of_lost = left(processes[lost], LIMIT + 6)
            assert code == 1 and is_one_sentence(err_of_lost), err_of_lost
            assert f"this process, {lost} of 2, was taken for lost by the others" in err_of_lost
    if sign == signal.SIGSTOP:
        return
    again = shlex.split(err.rpartition("this one by: ")[2])
    goes_on_and_saves_at_a_signal(again, folder, run, step)


def goes_on_and_saves_at_a_signal(command, folder, run, step):
    """The named command, given by each process with its own number, goes on after `step`; SIGTERM to all of them saves
    and leaves."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    commands = [[re.sub(r"(process-id=)\d", rf"\g<1>{process}", word) for word in command] for process in (0, 1)]
    running = [subprocess.Popen(words, cwd=folder, env=environment(), **pipes) for words in commands]
    try:
        first = running[0].stdout
        assert any(f"resumed from step {step}" in line for line in first), running[0].stderr.read()
        saved(run, running, after=step)
        for process in running:
            process.send_signal(signal.SIGTERM)
        ended = [process.communicate(timeout=60) for process in running]
        assert [process.returncode for process in running] == [143, 143], ended
        last = re.search(r"stopped by SIGTERM at step (\d+), which is saved", ended[0][0])
        with Checkpoints(run / "checkpoints") as checkpoints:
            assert last is not None, ended
            assert checkpoints.newest_restorable() == (int(last[1]), [])
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.communicate()


@pytest.mark.parametrize("came", [0, 1])
def test_a_process_that_never_starts_is_named_within_the_wait(came, folder, tmp_path):
    with started(folder, "--run-dir", str(tmp_path / "run"), "--device.wait=2", only=[came]) as (one,):
        code, err = left(one, 10)
    assert code == 2 and is_one_sentence(err)
    says = ["1 of 2 processes came to 127.0.0.1:", "process 0 at 127.0.0.1:"][came]
    assert says in err and "within 2 s" in err and ("missing: 1" in err or "did not answer" in err)
    assert not (tmp_path / "run").exists()


def test_another_artifex_of_the_same_version_is_refused_by_all(folder, tmp_path):
    shutil.copytree(ROOT / "artifex", tmp_path / "artifex", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "artifex" / "optim.py").open("a") as file:
        file.write("\nANOTHER = 1\n")
    paths = [str(ROOT), str(tmp_path)]
    words = ["--run-dir", str(tmp_path / "run")]
    with started(folder, *words, env=lambda process: {"PYTHONPATH": paths[process]}) as processes:
        ended = [left(process, 30) for process in processes]
    for code, err in ended:
        assert code == 2 and is_one_sentence(err)
        assert "process 1 was asked for something else than process 0: artifex-code is " in err
        assert f"process 1 is on {socket.gethostname()}" in err
    assert not (tmp_path / "run").exists()


# ---- longer


@pytest.mark.slow
def test_a_process_that_is_busy_for_long_is_not_lost(folder, tmp_path):
    words = ["--run-dir", str(tmp_path / "run"), "--device.data=2", "--training.steps=4"]
    with started(folder, *words, program=script(tmp_path, SLOW)) as processes:
        ended = [process.communicate(timeout=120) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], ended
    assert (tmp_path / "run" / "weights").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("hangs", [0, 1])
@pytest.mark.parametrize(
    ("place", "does"),
    [("batch", "reads the batch of step"), ("save", "saves after step"), ("look", "saves after step")],
)
def test_a_process_that_lives_and_hangs_is_named_by_both(place, does, hangs, folder, tmp_path):
    words = ["--run-dir", str(tmp_path / "run"), *ENDLESS, "--device.stuck-after=5"]
    with started(folder, *words, program=script(tmp_path, HANGING, str(hangs), place)) as processes:
        saved(tmp_path / "run", processes)
        ended = [left(process, 50) for process in processes]
    why = rf"it lives, but {does} \d+ for more than 5 s; step \d+ is saved; start all"
    for process, (code, err) in enumerate(ended):
        who = (
            f"this process, {hangs} of 2, was taken for lost by the others"
            if process == hangs
            else f"process {hangs} of 2, on {socket.gethostname()}, is lost"
        )
        assert code == 1 and is_one_sentence(err), err
        assert re.fullmatch(rf"error: {re.escape(who)}: {why}.*\n", err), err


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("after", [1.0, 2.0, 3.0, 4.0, 5.0, 6.5, 8.0, 11.0])
def test_a_process_that_is_killed_at_any_time_is_named(after, lost, folder, tmp_path):
    """From before it has come, over the start of JAX and the compilation of 24 layers, to the middle of training."""
    words = ["--run-dir", str(tmp_path / "run"), *ENDLESS, "--model.num-layers=24", "--training.unroll=24"]
    with started(folder, *words, "--device.wait=20") as processes:
        time.sleep(after)
        processes[lost].kill()
        code, err = left(processes[1 - lost], 30)
    assert code in (1, 2) and is_one_sentence(err), err
    named = [f"process {lost} of 2", "missing: 1", "process 0 at 127.0.0.1"]
    assert any(words in err for words in named), err


@pytest.mark.slow
def test_all_that_are_killed_leave_a_run_that_goes_on(folder, tmp_path):
    run = tmp_path / "run"
    with started(folder, "--run-dir", str(run), *ENDLESS) as processes:
        saved(run, processes)
        for process in processes:
            process.kill()
    with Checkpoints(run / "checkpoints") as checkpoints:
        step, _ = checkpoints.newest_restorable()
    words = ["--run-dir", str(run), "--device.data=1", f"--training.steps={step + 2}", "--checkpoint.every=2"]
    command = [sys.executable, "-m", "artifex.train", "c.json", *words, "--logging.every=2"]
    ended = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and f"resumed from step {step}" in ended.stdout, ended.stderr
