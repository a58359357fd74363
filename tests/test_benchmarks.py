"""The benchmarks run, time one process at a time, and what they compare computes the same."""

import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def workers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import workers

    return workers


def build(log: Path, name: str):
    """In a worker's process: a call that writes its name, when it began and when it ended."""
    from workers import Built

    def call() -> None:
        began = time.monotonic()
        time.sleep(0.05)
        with log.open("a") as file:
            file.write(f"{name} {began} {time.monotonic()}\n")

    return Built(call, {"process": os.getpid()})


@pytest.mark.slow
def test_processes_are_warm_before_any_is_timed_and_then_take_turns_in_a_rotating_order(workers, tmp_path):
    log = tmp_path / "calls"
    variants = {name: workers.Variant(build, (log, name)) for name in "abc"}
    with workers.started(variants) as started:
        assert len({os.getpid(), *(worker.computed["process"] for worker in started)}) == 4
        warm = len(log.read_text().splitlines())
        seconds = workers.in_turn(started, 3)
    calls = [line.split() for line in log.read_text().splitlines()]
    assert {name for name, *_ in calls[:warm]} == set("abc")
    assert "".join(name for name, *_ in calls[warm:]) == "aabbcc" + "bbccaa" + "ccaabb"
    assert all(float(ended) <= float(began) for (_, _, ended), (_, began, _) in itertools.pairwise(calls))
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 3)
    assert all(0.05 <= each < 1 for times in seconds.values() for each in times)


@pytest.mark.slow
def test_a_folder_that_is_no_checkout_is_refused(workers, tmp_path, capfd):
    variant = workers.Variant(build, (tmp_path / "calls", "a"), tmp_path)
    with (
        pytest.raises(RuntimeError, match="'ours in it' ended before it was warm"),
        workers.started({"ours in it": variant}),
    ):
        pass
    assert f"not from {tmp_path}" in capfd.readouterr().err


def run(script: str, *options: str) -> str:
    """What the script prints, as a user would start it: on one device and by JAX's own promotion rules."""
    ours = ("JAX_NUM_CPU_DEVICES", "JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION", "NPROC")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, BENCHMARKS / script, "--small", "--no-torch", "--rounds", "2", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_training_step_computes_what_bare_jax_and_another_checkout_compute():
    other = f"ours in {BENCHMARKS.parent}"
    printed = run("train_step.py", "decoder", "--against", str(BENCHMARKS.parent))
    computed = dict(re.findall(r"^(.+): loss (\S+), norm of its gradient", printed, re.MULTILINE))
    assert {"ours", "ours, scanned", "bare JAX", "bare JAX, joined", "bare JAX, scanned", other} == computed.keys()
    assert "ours / bare JAX" in printed and f"ours / {other} = " in printed
    for name, loss in computed.items():
        assert float(loss) == pytest.approx(float(computed["ours"]), rel=1e-5), name


@pytest.mark.slow
def test_a_mixture_of_experts_computes_the_same_scanned():
    printed = run("train_step.py", "moe")
    computed = dict(re.findall(r"^(.+): loss (\S+), norm of its gradient", printed, re.MULTILINE))
    assert {"ours", "ours, scanned"} == computed.keys()
    assert float(computed["ours, scanned"]) == pytest.approx(float(computed["ours"]), rel=1e-5)


@pytest.mark.slow
def test_decoding_gives_the_tokens_of_bare_jax():
    assert re.findall(r"(\S+) % of the tokens of bare JAX are ours", run("generate.py")) == ["100.0", "100.0"]


@pytest.mark.slow
def test_a_checkpoint_is_timed_beside_raw_writing_and_reading_on_one_device_and_on_all(tmp_path):
    command = [sys.executable, BENCHMARKS / "checkpoint.py", "--small", "--rounds", "2", "--folder", tmp_path]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"27 arrays, 4 MiB, devices: (\d)", done.stdout) == ["1", "2"]
    for ours, theirs in (("save", "write"), ("restore", "read"), ("resume", "read")):
        assert len(re.findall(rf"raw {theirs} / {ours} = \d", done.stdout)) == 2
    assert [*tmp_path.iterdir()] == []
