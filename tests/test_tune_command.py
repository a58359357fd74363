"""`python -m artifex.tune` and `artifex.auto_tune` as they run: processes, failures, signals, what is written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import artifex
from artifex import tune as command
from artifex.cli import parse_train
from artifex.config import Config
from artifex.config_io import ConfigError
from artifex.scaling.autodist.profile import Measured
from artifex.training import memory
from artifex.tuning import child
from artifex.tuning.board import Board
from artifex.tuning.records import FILE, Records
from artifex.tuning.rotation import Clock, Rotation
from artifex.tuning.tuner import alone_in
from artifex.tuning.ways import Way
from artifex.tuning.worker import Failed, Worker

UNROLLED = Way(None, (("unroll", 1),))
SPLASH = Way(None, (("attention", "splash"),))
TILES = Way(None, (("attention", "tiles"),))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The file of a tiny run on a text of its own."""
    folder = tmp_path_factory.mktemp("run")
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"text {number} " * 400, encoding="utf-8")
    fields = {"embed_dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "mlp_dim": 64}
    values = {
        "model": {"name": "llama-nano", **fields},
        "data": {"source": str(folder), "sequence_length": 32},
        "training": {"batch_size": 4},
        "optimizer": {"name": "adamw"},
    }
    path = folder / "tiny.yaml"
    Config.from_dict(values).save(path)
    return path


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Processes of a tune have one device, and are compiled as the tests are."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")


def children(pid: int) -> list[int]:
    """The living children of a process."""
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(true, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


def rotation_of(run, folder, **how) -> Rotation:
    config = Config.from_file(run)
    board = Board(Records(folder, {"run": config.to_dict()}), "throughput", 0.9)
    how = {"alone": False, "limit": 90.0, "say": lambda line: None, **how}
    return Rotation(config, board, folder, Clock(600), **how)


@pytest.fixture(scope="module")
def tuned(run, tmp_path_factory):
    """A tune of three changes, of which one is the same program and one cannot be, and its folder."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_NUM_CPU_DEVICES", "1")
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
        said: list[str] = []
        space = "unroll=1 attention=tiles,splash"
        how = {"out": folder / "out", "profile_dir": folder / "profile", "say": said.append}
        return artifex.auto_tune(run, "cpu:1", budget=10, space=space, **how), folder, said


def test_all_ways_are_rows_with_what_was_measured_or_why_not(tuned, run):
    found, _, said = tuned
    rows = {row.way: row for row in found.rows}
    assert set(rows) == {Way(), UNROLLED, TILES, SPLASH}
    assert rows[TILES].says == "the same program as the run as configured"  # which is what "auto" is on one CPU device
    assert "splash" in rows[SPLASH].says and rows[SPLASH].says.startswith("failed: ") and rows[SPLASH].seconds is None
    for way in (Way(), UNROLLED):
        row = rows[way]
        assert row.seconds is not None and 0 < row.seconds.low <= row.seconds.median <= row.seconds.high
        assert row.per_second == pytest.approx(4 * 32 / row.seconds.median)  # rows of tokens
        assert row.predicted_seconds and row.predicted_bytes and row.rounds >= 3
    assert found.best in (Way(), UNROLLED) and found.noun == "tokens" and not found.stopped
    assert found.config == found.best.config(Config.from_file(run)) and found.spread.devices == 1
    assert any("may vary" in line for line in said)


def test_its_bytes_are_those_that_xla_says(tuned, run):
    import jax

    from artifex.train import plan_of
    from artifex.training.state import blueprint
    from artifex.training.task import batch_shapes

    found = tuned[0]
    config = Config.from_file(run)
    plan = plan_of(config, 1)
    used = memory.compile_step(blueprint(config, plan, plan.make_mesh(jax.devices()[:1])), batch_shapes(config)).whole
    (row,) = [row for row in found.rows if row.way == Way()]
    assert row.bytes == used


def test_what_is_written_is_a_run_a_table_and_a_profile(tuned):
    found, folder, _ = tuned
    out = folder / "out"
    assert parse_train([str(out / "best.yaml")]).config == found.config
    assert (out / "table.txt").read_text() == f"{found}\n"
    assert json.loads((out / "tuned.json").read_text())["verdict"] == found.verdict
    profile = Measured.load(folder / "profile" / "cpu")
    fastest = min(row.seconds.median for row in found.rows if row.seconds is not None)
    assert [(step.spread, step.devices, step.seconds) for step in profile.steps] == [("one device", 1, fastest)]
    assert list((out / "logs").glob("*.log")) == [] and not (out / "run.lock").exists()


def test_a_second_call_goes_on_and_another_question_is_refused(tuned, run, capsys):
    _, folder, _ = tuned
    out = folder / "out"
    before = (out / FILE).read_bytes()
    words = [str(run), "--out", str(out), "--profile-dir", str(folder / "profile"), "--budget", "10"]
    command.main([*words, "--space", "unroll=1 attention=tiles,splash"])
    said = capsys.readouterr().out
    assert (
        f"goes on from {out / FILE}" in said and f"train by it:   python -m artifex.train {out / 'best.yaml'}" in said
    )
    after = (out / FILE).read_bytes()
    assert after.startswith(before)
    new = [json.loads(line) for line in after[len(before) :].splitlines()]
    assert not any("failed" in line or "same" in line for line in new)  # what is known is not tried again
    with pytest.raises(SystemExit) as caught:
        command.main([str(run), "--out", str(out), "--training.batch-size", "8"])
    assert caught.value.code == 2
    assert "run.training.batch_size is 4 there and 8 here; give another --out" in capsys.readouterr().err
    assert (out / FILE).read_bytes() == after


def test_a_folder_that_another_process_tunes_in_is_refused(tmp_path):
    program = (
        "import sys; from artifex.training.run_lock import RunLock; lock = RunLock(sys.argv[1]); lock.take()\n"
        "print('has it', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"has it\n"
        with (
            pytest.raises(ConfigError, match=rf"in use by process {other.pid}.* choose another --out"),
            alone_in(tmp_path),
        ):
            pass
        other.communicate()
    with alone_in(tmp_path):
        pass


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--budgt", "3"], "--budgt is unknown; did you mean --budget?"),
        (["--budget", "0"], "--budget is '0'; expected a number above 0"),
        (["--candidates", "1.5"], "--candidates is '1.5'; expected an integer above 0"),
        (["--space", "unrol=1"], "did you mean unroll?"),
        (["--objective", "speed"], "known are throughput, latency, memory"),
        (["--training.batch-sze", "3"], "did you mean --training.batch-size?"),
        (["--budget"], "--budget needs a value"),
    ],
)
def test_a_mistake_is_one_line(run, words, says, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main([str(run), *words])
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(lines) == 1 and says in lines[0] and lines[0].startswith("error: ")


def test_help_and_the_function_come_without_jax():
    program = (
        "import sys, artifex\nfrom artifex import tune\ntry: tune.main(['--help'])\nexcept SystemExit: pass\n"
        "print('jax' in sys.modules, 'auto_tune' in artifex.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False True" and "--budget MINUTES" in done.stdout


def test_without_its_data_a_run_gets_batches_of_its_shapes_and_says_so(run, tmp_path):
    config = Config.from_file(run)
    own, said = child.batches(config, tmp_path)
    assert said == "its own" and len(own) == child.BATCHES
    again, _ = child.batches(config, tmp_path)  # kept for the next process
    assert all((a[name] == b[name]).all() for a, b in zip(own, again, strict=True) for name in a)
    config.data.source = str(tmp_path / "gone")
    drawn, said = child.batches(config, tmp_path)
    assert said.startswith("synthetic: ") and "gone" in said
    for name, value in drawn[0].items():
        assert (value.shape, value.dtype) == (own[0][name].shape, own[0][name].dtype)
        assert value.min() >= 0 and value.max() < config.model.vocab_size
    images, _ = child.batches(Config.from_dict({"model": {"name": "dit-digits"}, "data": {"source": "gone"}}), tmp_path)
    assert abs(images[0]["image"]).max() <= 1 and images[0]["label"].max() < 10


def test_a_step_larger_than_a_device_is_a_way_that_failed(run, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "device_bytes", lambda: 300_000)
    said: list[dict] = []
    values = {**Config.from_file(run).to_dict(), "device": {"fsdp": 4, "data": 2}}
    values["training"]["batch_size"] = 8
    with pytest.raises(MemoryError, match=r"out of memory: the step needs .* which has 0.00 GiB"):
        child.build(lambda **parts: said.append(parts), values, str(tmp_path), [])
    assert list(said[0]) == ["program"] and len(said) == 1


def test_a_process_that_is_killed_or_hangs_is_an_answer(run, tmp_path):
    worker = Worker(tmp_path / "log", lambda: None)
    try:
        worker.ask("build", config=Config.from_file(run).to_dict(), folder=str(tmp_path), known=[])
        os.kill(worker.process.pid, signal.SIGKILL)
        with pytest.raises(Failed, match="killed, as the kernel does"):
            worker.answer(60)
    finally:
        worker.close()
    worker = Worker(tmp_path / "log", lambda: None)
    with pytest.raises(Failed, match="no answer within"):
        worker.answer(0.2)  # nothing was asked
    assert not worker.is_alive
    worker.ask("turn", steps=1)  # of a process that has ended: no error but the answer
    worker.close()


@pytest.mark.slow
def test_a_way_whose_process_is_killed_between_turns_is_left_out_and_the_others_go_on(run, tmp_path):
    with rotation_of(run, tmp_path) as rotation:
        rotation.rounds([Way(), UNROLLED], 1)
        assert set(rotation.living) == {Way(), UNROLLED}
        os.kill(rotation.living[UNROLLED].process.pid, signal.SIGTERM)
        rotation.rounds([Way(), UNROLLED], 2)
        assert rotation.records.of(UNROLLED).failed.startswith("ended by SIGTERM")
        assert [len(rotation.records.of(way).turns) for way in (Way(), UNROLLED)] == [3, 1]
        pids = [worker.process.pid for worker in rotation.living.values()]
    assert not any(map(lives, pids)) and Records(tmp_path, rotation.records.question).of(UNROLLED).failed


@pytest.mark.slow
def test_where_one_lives_at_a_time_rounds_are_as_comparable(run, tmp_path):
    with rotation_of(run, tmp_path, alone=True) as rotation:
        rotation.rounds([Way(), UNROLLED], 3)
        assert len(rotation.living) == 1
        rotation.rounds([Way(), UNROLLED], 2)
        assert len(rotation.living) == 1
    assert len(rotation.board.shares(UNROLLED)) == 5 and (tmp_path / "cache" / "xla").is_dir()


@pytest.mark.slow
def test_a_process_killed_beside_others_is_tried_again_alone(run, tmp_path):
    with rotation_of(run, tmp_path) as rotation:
        rotation.rounds([Way(), UNROLLED], 1)
        os.kill(rotation.living[UNROLLED].process.pid, signal.SIGKILL)  # as the kernel does
        rotation.rounds([Way(), UNROLLED], 2)
        assert rotation.alone and not rotation.records.of(UNROLLED).failed
        assert len(rotation.board.shares(UNROLLED)) >= 2


@pytest.mark.slow
def test_processes_end_for_others_where_memory_is_short(run, tmp_path):
    with rotation_of(run, tmp_path) as rotation:
        rotation.rounds([Way(), UNROLLED], 1)
        sizes = sum(record.built.resident for record in rotation.records.ways.values() if record.built)
        rotation.room = 1.2 * sizes  # not for a third
        assert rotation.has(Way(None, (("gradient_accumulation", 2),)))
        assert Way() in rotation.living and len(rotation.living) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_processes_and_keeps_and_shows_what_was_measured(run, tmp_path, number):
    out = tmp_path / "out"
    words = ["--out", str(out), "--profile-dir", str(tmp_path / "profile"), "--space", "unroll=1,2"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen([sys.executable, "-m", "artifex.tune", str(run), *words], stdout=said, stderr=said)
    until(lambda: "after 3 rounds" in (tmp_path / "said").read_text())
    there = children(process.pid)
    assert there
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    until(lambda: not any(map(lives, there)), 5)
    text = (tmp_path / "said").read_text()
    assert f"stopped by {number.name}; give the same command again to go on" in text and "as configured" in text
    lines = [json.loads(line) for line in (out / FILE).read_bytes().splitlines()]
    assert sum("turn" in line for line in lines) >= 6 and (out / "best.yaml").exists()


@pytest.mark.slow
def test_no_process_outlives_a_tune_that_was_killed(run, tmp_path):
    words = ["--out", str(tmp_path / "out"), "--profile-dir", str(tmp_path / "profile"), "--space", "unroll=1,2"]
    process = subprocess.Popen([sys.executable, "-m", "artifex.tune", str(run), *words], stdout=subprocess.DEVNULL)
    until(lambda: (tmp_path / "out" / FILE).exists() and b'"turn"' in (tmp_path / "out" / FILE).read_bytes())
    there = children(process.pid)
    process.kill()
    process.wait()
    until(lambda: not any(map(lives, there)), 5)
    question = json.loads((tmp_path / "out" / FILE).read_bytes().splitlines()[0])["question"]
    assert there and Records(tmp_path / "out", question).of(Way()).turns


@pytest.mark.slow
def test_where_nothing_runs_the_table_says_why_and_the_exit_code_is_1(run, tmp_path, capsys):
    words = ["--out", str(tmp_path / "out"), "--profile-dir", str(tmp_path / "profile"), "--time-limit", "0.2"]
    with pytest.raises(SystemExit) as caught:
        command.main([str(run), *words, "--space", "unroll=1"])
    said = capsys.readouterr().out
    assert caught.value.code == 1
    assert "nothing could be measured" in said and "failed: no answer within 0 s" in said


@pytest.mark.slow
def test_the_process_that_tunes_touches_no_device(run, tmp_path):
    program = (
        "import sys, artifex; from jax._src import xla_bridge\n"
        "found = artifex.auto_tune(sys.argv[1], out=sys.argv[2], profile_dir=sys.argv[2], space='unroll=1', budget=1)\n"
        "print(found.best, xla_bridge.backends_are_initialized())"
    )
    words = [sys.executable, "-c", program, str(run), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


@pytest.mark.slow
def test_on_eight_devices_the_planners_spreads_are_measured(run, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    how = {"out": tmp_path / "out", "profile_dir": tmp_path / "profile"}
    config = Config.from_file(run)
    config.training.batch_size = 8
    found = artifex.auto_tune(config, "cpu:8", budget=10, space="axes=data,fsdp,tensor", candidates=3, **how)
    spreads = [row.way.spread for row in found.rows if row.way.spread is not None]
    assert spreads and all(spread.devices == 8 for spread in spreads)
    assert any(row.seconds is not None and row.way.spread is not None for row in found.rows)
    assert all(set(spread.mesh) <= {"data", "fsdp", "tensor"} for spread in spreads)
    assert found.spread.devices == 8
    assert {step.devices for step in Measured.load(tmp_path / "profile" / "cpu").steps} == {8}
