"""How a run starts and ends: signals, damaged checkpoints, a finish that was cut short, and what is left untouched."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import PROSE, tiny, written

from artifex import sample, train
from artifex.config import Config
from artifex.models.weights import from_pretrained
from artifex.scaling.checkpoints import CheckpointError
from artifex.training import signals

ROOT = Path(__file__).parents[1]
PLAIN = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONUNBUFFERED": "1"}


def config(source, **sections) -> Config:
    sections["logging"] = {"every": 2} | sections.get("logging", {})
    return tiny(source, **sections)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return written(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    return train.train(config(source), tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage(run: Path, step: int) -> None:
    file = next((run / "checkpoints" / str(step) / "arrays").rglob("zarr.json"))
    file.write_bytes(file.read_bytes()[:-1] + b" ")


# ---- damage


def test_where_every_checkpoint_is_damaged_a_run_starts_anew_only_on_request(run, source, capsys):
    for step in (2, 4):
        damage(run, step)
    before = contents(run)
    with pytest.raises(CheckpointError, match=r"the run would start anew: step 4: .* is damaged.*--start-anew"):
        train.train(config(source), run)
    assert contents(run) == before
    train.train(config(source), run, start_anew=True)
    assert "starts anew, as asked" in capsys.readouterr().out
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"2", "4", "2.left-1", "4.left-1"}


def test_sampling_names_the_step_that_is_damaged(run, capsys):
    damage(run, 4)
    sample.main([str(run), "--num-tokens", "2"])
    assert "is damaged" in (said := capsys.readouterr().err) and "step 2 is taken" in said
    damage(run, 2)
    with pytest.raises(SystemExit) as exit:
        sample.main([str(run), "--num-tokens", "2"])
    said = capsys.readouterr().err
    assert exit.value.code == 1 and said.count("\n") == 1
    assert "can be restored: step 4: " in said and f"{run}/weights has the weights alone" in said
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint yet"):
        sample.load(str(run))


# ---- the end of a run


def test_a_finished_run_is_left_as_it_is(run, source, capsys):
    before = contents(run)
    train.train(config(source), run)
    assert "nothing left to train; to go on: --training.steps 8" in capsys.readouterr().out
    train.train(config(source, training={"steps": 3}), run)
    assert "step 4 is done, training.steps is 3: nothing left to train" in capsys.readouterr().out
    assert contents(run) == before


@pytest.mark.parametrize("lost", ["all", "weights", "half a line"])
def test_what_a_finish_that_was_cut_short_left_out_is_made_at_the_next_start(run, source, lost, capsys):
    whole = {name: value for name, value in contents(run).items() if name != "loss.png"}
    metrics = (run / "metrics.jsonl").read_text()
    if lost == "weights":
        shutil.rmtree(run / "weights")
    else:
        (run / "loss.png").unlink()
    if lost == "all":
        shutil.rmtree(run / "weights")
        (run / "samples" / "step-0000004.txt").unlink()
        kept = [line for line in metrics.splitlines(True) if '"validation"' not in line or '"step": 4' not in line]
        (run / "metrics.jsonl").write_text("".join(kept))
    if lost == "half a line":
        (run / "metrics.jsonl").write_text(metrics + '{"step": 4, "spl')
    train.train(config(source), run)
    assert "makes what is missing" in capsys.readouterr().out
    again = contents(run)
    assert again.pop("loss.png").startswith(b"\x89PNG") and again.keys() == whole.keys()
    records = [[json.loads(line) for line in text.splitlines()] for text in (metrics, again["metrics.jsonl"].decode())]
    records = [[line for line in lines if line["split"] != "goodput"] for lines in records]  # times of another start
    for record in (line for lines in records for line in lines):
        record.pop("elapsed_seconds")
    assert records[0] == records[1]
    assert {name for name in whole if whole[name] != again[name]} <= {"metrics.jsonl"}


def test_a_run_that_goes_on_ends_with_weights_and_a_curve_of_its_own(run, source):
    before = contents(run)
    train.train(config(source, training={"steps": 6}), run)
    after = contents(run)
    for name in ("loss.png", "weights/model.safetensors"):
        assert after[name] != before[name]
    assert from_pretrained(str(run / "weights")).cfg == config(source).model.spec()


# ---- signals


def test_a_signal_while_a_validation_runs_is_answered_with_a_saved_step(source, tmp_path):
    """Between two checkpoints, where nothing else would save the step."""
    opened = train.open_run(config(source, checkpoint={"every": 0}), tmp_path / "run")
    validated, original = [], type(opened.task).validation

    class Task(type(opened.task)):
        def validation(self, count, part=(0, 1)):
            validated.append(True)
            os.kill(os.getpid(), signal.SIGINT)
            return original(self, count, part)

    object.__setattr__(opened, "task", Task(opened.task.config, opened.task.corpus))
    with pytest.raises(signals.Stopped) as stopped:
        train.run_steps(opened, train.prepare(opened))
    assert stopped.value.code == 130 and validated == [True]
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved in (["2"], ["3"])  # the step at hand, or the one after it
    assert not (tmp_path / "run" / "weights").exists()


def test_a_second_signal_is_answered_as_outside_once_it_cannot_be_the_first_again():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    with signals.stop_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # at once: a launcher that passes on the terminal's
        assert stop == ["SIGINT"]
    with pytest.raises(KeyboardInterrupt), signals.stop_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        time.sleep(signals.APART + 0.1)
        signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


PROGRAM = """
import sys, time
from artifex.training.signals import ending_at_once, stop_signals
import numpy
with ending_at_once(": nothing is lost"):
    if sys.argv[1] == "saving":
        with stop_signals() as stop:
            print("here", flush=True)
            while not stop:
                time.sleep(0.01)
            print("saved", flush=True)
            time.sleep(60 if len(sys.argv) > 2 else 0)
        raise SystemExit(7)
    print("here", flush=True)
    if sys.argv[1] == "compiling":  # one call that runs no bytecode of this thread, as a compiler's
        numpy.linalg.eigvals(numpy.random.default_rng(0).normal(size=(4000, 4000)))
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("where", "signs", "code", "said"),
    [
        (["compiling"], [signal.SIGINT], 130, "stopped by SIGINT: nothing is lost\n"),
        (["python"], [signal.SIGTERM], 143, "stopped by SIGTERM: nothing is lost\n"),
        (["saving"], [signal.SIGINT], 7, "SIGINT: saves after this step; once more ends at once, without\n"),
        (["saving", "for long"], [signal.SIGINT] * 2, 130, "at once: what came after the last checkpoint is lost\n"),
    ],
)
def test_a_signal_ends_a_program_within_two_seconds_where_nothing_can_be_lost(where, signs, code, said):
    command = [sys.executable, "-c", PROGRAM, *where]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "here\n"
    time.sleep(0.5)
    for index, sign in enumerate(signs):
        if index:
            assert process.stdout.readline() == "saved\n"
            time.sleep(signals.APART)
        process.send_signal(sign)
        began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 2 and process.returncode == code
    assert err.endswith(said) and "Traceback" not in err


def test_a_signal_before_the_first_step_ends_the_command_and_leaves_no_folder(source, tmp_path):
    slow = {"num_layers": 64}  # unrolled, so that it compiles for many seconds
    config(source, model=config(source).model.model_dump() | slow, training={"unroll": 64}).save(tmp_path / "c.json")
    command = [sys.executable, "-m", "artifex.train", str(tmp_path / "c.json"), "--run-dir", str(tmp_path / "run")]
    environment = {name: value for name, value in PLAIN.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and b"parameters" in process.stdout.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 2 and process.returncode == 130 and out == b""
    assert err == b"stopped by SIGINT: nothing is lost, give the same command again\n"
    assert not (tmp_path / "run").exists()


# ---- what is printed


def test_a_reader_who_leaves_is_no_error_and_the_run_goes_on(source, tmp_path):
    config(source).save(tmp_path / "c.json")
    command = f"{sys.executable} -m artifex.train {tmp_path}/c.json --run-dir {tmp_path}/run | head -n 1"
    script = ["bash", "-c", f"set -o pipefail; {command}"]
    done = subprocess.run(script, cwd=ROOT, env=PLAIN, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and len(done.stdout.splitlines()) == 1
    assert (tmp_path / "run" / "loss.png").exists()


def test_samples_of_prose_continue_prose(finished, capsys):
    prompt = "It was a quiet day in the harbour, and"
    assert (finished / "samples" / "step-0000004.txt").read_text().startswith(prompt)
    for folder in (finished, finished / "weights"):
        assert sample.sample(str(folder), num_tokens=2)[0].startswith(prompt)
        sample.main([str(folder), "--num-tokens", "2"])
        assert capsys.readouterr().out.startswith(prompt)


def test_a_prompt_of_one_file_that_is_cut_begins_with_a_whole_word(tmp_path):
    (tmp_path / "one.txt").write_text(PROSE * 40)
    task = train.open_run(config(tmp_path / "one.txt"), tmp_path / "run").task
    assert PROSE.startswith(task.prompt)
    (tmp_path / "line.txt").write_text(PROSE.replace("\n", " ") * 40)
    task = train.open_run(config(tmp_path / "line.txt"), tmp_path / "run").task
    assert f" {task.prompt} " in PROSE.replace("\n", " ") * 3


def test_attention_is_named_once(finished, source, tmp_path, capsys):
    train.train(config(source), tmp_path / "run")
    assert capsys.readouterr().out.count("attention: ") == 1
