"""One signal saves the step and leaves; two leave at once: in real processes, wherever they stand."""

import signal
import subprocess
import sys
import time

import pytest
from runs import environment, write_source

from artifex.scaling.checkpoints import Checkpoints

# `artifex.train` where a save or the first validation lasts: what is waited for says "here"
LASTING = """
import sys, time
from artifex.scaling import checkpoints, manifest
from artifex.training import loop, step
from artifex import train

where = sys.argv.pop(1)
if where == "save":
    seal = manifest.seal
    def lasting(folder, body):
        if body["step"] >= 20:
            print("here", flush=True)
            time.sleep(60)
        seal(folder, body)
    manifest.seal = lasting
elif where == "compile":
    import numpy
    original = step.make_evaluate
    def compiling(blue):
        evaluate = original(blue)
        def call(*args):
            print("here", flush=True)
            # one call of many seconds in which Python runs no bytecode of this thread, as a compiler's
            numpy.linalg.eigvals(numpy.random.default_rng(0).normal(size=(3000, 3000)))
            return evaluate(*args)
        return call
    loop.make_evaluate = compiling
train.main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("run"))


def started(folder, where, *words):
    program = ["-c", LASTING, where] if where else ["-m", "artifex.train"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    whole = [sys.executable, *program, "c.json", *words]
    return subprocess.Popen(whole, cwd=folder, env=environment(), text=True, **pipes)


def until(process, words):
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(process.stderr.read())


def ended(process, within):
    began = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < within
    assert "Traceback" not in err and "Fatal" not in err and process.returncode > 0, err  # below 0: killed, or a core
    return out, err


def restorable(run):
    with Checkpoints(run / "checkpoints") as checkpoints:
        return checkpoints.newest_restorable()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["save", pytest.param("compile", marks=pytest.mark.slow)])
def test_a_second_signal_leaves_at_once_with_older_steps_intact(where, sign, folder, tmp_path):
    words = ["--run-dir", str(tmp_path / "run")]
    words += ["--training.validate-every", "15"] if where == "compile" else []
    process = started(folder, where, *words)
    until(process, "here")
    time.sleep(0.2)
    process.send_signal(sign)
    time.sleep(1.3)
    assert process.poll() is None, "the first one waits for the step and its save"
    process.send_signal(sign)
    out, err = ended(process, 2)
    assert process.returncode == 128 + sign
    assert err.endswith(f"stopped by {sign.name} at once: what came after the last checkpoint is lost\n")
    assert restorable(tmp_path / "run") == (10, [])
    # and the same command goes on
    again = started(folder, None, *words)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0 and "resumed from step 10" in out, err


def test_the_first_signal_finishes_the_step_and_saves_it(folder, tmp_path):
    words = ["--run-dir", str(tmp_path / "run"), "--training.steps", "1000000", "--checkpoint.every", "0"]
    process = started(folder, None, *words, "--logging.every", "1")
    end = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = ended(process, 20)
    step, skipped = restorable(tmp_path / "run")
    assert process.returncode == 143 and not skipped
    assert f"stopped by SIGTERM at step {step}, which is saved; the same command goes on" in out


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0])
def test_signals_at_any_time_leave_no_core_and_nothing_half_done(after, folder, tmp_path):
    """Twice, 1.2 s apart, from before Python is up to the middle of the training, XLA's own compilation included."""
    run = tmp_path / "run"
    words = ["--run-dir", str(run), "--training.steps", "1000000", "--training.validate-every", "5"]
    process = started(folder, None, *words, "--model.num-layers", "24", "--training.unroll", "24")
    time.sleep(1.5 + 2 * after)  # before the program's first line the answer is Python's own
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    _, err = ended(process, 10)
    assert process.returncode == 143, err
    assert not run.exists() or restorable(run)[1] == []
