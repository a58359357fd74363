"""A run of 5,000 steps and 200 saves has as many files, threads and bytes at its end as at step 500, and its speed.

What is held is looked at between two saves, when none is under way. Steps are compared by the first decile of their
times: what else the machine does only ever adds to a step, and the decile is that of steps beside which it did nothing.
"""

import json
import statistics
import subprocess

import pytest
from runs import command, environment, write_source

STEPS, SAVE, WARM = 5_000, 25, 500

# `artifex.train`, which notes when each step is begun and, between two saves, what the process holds
NOTING = """
import json, os, threading, time
from pathlib import Path
from artifex import train

prepare, begun, held = train.prepare, [], []

def noting(run):
    step = prepare(run)
    def call(state, batch):
        if len(begun) % 25 == 12:
            while run.checkpoints.has_ended() is False:
                time.sleep(0.001)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            files, tasks = (len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task"))
            held.append([len(begun), files, threading.active_count(), tasks, pages * os.sysconf("SC_PAGE_SIZE")])
        begun.append(time.perf_counter())
        return step(state, batch)
    return call

train.prepare = noting
train.main()
Path("noted.json").write_text(json.dumps({"begun": begun, "held": held}))
"""


@pytest.fixture(scope="module")
def noted(tmp_path_factory):
    folder = write_source(tmp_path_factory.mktemp("soak"))
    words = ["--training.steps", str(STEPS), "--checkpoint.every", str(SAVE), "--training.validate-every", "250"]
    words += ["--training.sample-tokens", "8", "--training.ema-decay", "0.9"]
    optimised = environment(JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    done = subprocess.run(
        command("--run-dir", "run", *words, program=NOTING), cwd=folder, env=optimised, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    noted = json.loads((folder / "noted.json").read_text())
    assert len(noted["begun"]) == STEPS and len(noted["held"]) == STEPS // SAVE
    return noted


def column(noted, index):
    """What was held up to step WARM, and after it."""
    rows = noted["held"]
    return [row[index] for row in rows if row[0] <= WARM], [row[index] for row in rows if row[0] > WARM]


@pytest.mark.slow
@pytest.mark.parametrize(("index", "what"), [(1, "open files"), (2, "threads of Python")])
def test_open_files_and_threads_stay_as_many_as_when_the_run_was_warm(noted, index, what):
    warm, later = column(noted, index)
    print(f"\n{what}: {min(warm)} to {max(warm)} up to step {WARM}, {min(later)} to {max(later)} after it")
    assert max(later) <= max(warm)


@pytest.mark.slow
def test_threads_of_libraries_are_as_many_in_the_second_half_as_in_the_first(noted):
    """TensorStore's pool has as many as files were ever written at one moment, up to a limit: it is full late."""
    counts = [row[3] for row in noted["held"]]
    first, second = counts[: len(counts) // 2], counts[len(counts) // 2 :]
    print(f"\nthreads in all: up to {max(first)} in the first half, {min(second)} to {max(second)} in the second")
    assert max(second) <= 1.05 * max(first)


@pytest.mark.slow
def test_resident_memory_stays_within_2_percent_of_what_it_was_at_step_500(noted):
    warm, later = column(noted, 4)
    print(
        f"\nresident: {warm[-1] / 2**20:.1f} MiB at step {WARM}, {min(later) / 2**20:.1f} to {max(later) / 2**20:.1f}"
    )
    assert max(later) <= 1.02 * warm[-1]


@pytest.mark.slow
def test_a_step_takes_as_long_at_the_end_as_at_the_beginning(noted):
    times = [after - before for before, after in zip(noted["begun"], noted["begun"][1:], strict=False)]
    second, last = (statistics.quantiles(part, n=10)[0] for part in (times[1_000:2_000], times[4_000:]))
    print(
        f"\nstep: {second * 1e3:.3f} ms in the second fifth, {last * 1e3:.3f} ms in the last, {last / second - 1:+.1%}"
    )
    assert last < 1.1 * second
