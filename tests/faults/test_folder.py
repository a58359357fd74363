"""A run's folder that was damaged: what can be read is kept, the rest is set aside and said, nothing is erased."""

import json
import shutil
from pathlib import Path

import pytest
from runs import SECTIONS, write_source

from artifex import train
from artifex.config import Config
from artifex.config_io import ConfigError
from artifex.scaling.manifest import CheckpointError


def config(steps=6, **sections):
    base = SECTIONS | {"checkpoint": {"every": 2}, "logging": {"every": 1, "progress": False}} | sections
    return Config.from_dict(base | {"training": base["training"] | {"steps": steps}})


@pytest.fixture(scope="module", autouse=True)
def source(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(write_source(tmp_path_factory.mktemp("source")))
        yield


@pytest.fixture(scope="module")
def six(source, tmp_path_factory):
    return train.train(config(), tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run(six, tmp_path):
    return Path(shutil.copytree(six, tmp_path / "run"))


def lines(file):
    return file.read_bytes().splitlines(keepends=True)


def of(line):
    record = json.loads(line)
    return record["step"], record["split"]


DAMAGE = {
    "cut": lambda line: line[: len(line) // 2] + b"\n",
    "zeros": lambda line: bytes(len(line) - 1) + b"\n",
    "not UTF-8": lambda line: b"\xff\xfe" + line,
    "no object": lambda line: b"3\n",
    "no step": lambda line: b'{"split": "train", "loss": 1.0}\n',
    "deep": lambda line: b"[" * 100_000 + b"\n",
    "a number of many digits": lambda line: b'{"step": ' + b"9" * 10_000 + b', "split": "train"}\n',
}


CONTENTS = [None, b"", b"{", b"[" * 3_000, b"\0" * 64, b"\xff\xfe"]


def some_daily(cases, *daily):
    """All of the cases, those that are not `daily` as slow ones."""
    return [case if case in daily else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("how", some_daily(DAMAGE, "cut", "deep"))
def test_a_damaged_line_costs_that_line_alone(how, run, capsys):
    file = run / "metrics.jsonl"
    before = lines(file)
    harmed = DAMAGE[how](before[1])
    file.write_bytes(b"".join([before[0], harmed, *before[2:]]))
    train.train(config(8), run)
    said = capsys.readouterr().out
    assert f"{file}: 1 line cannot be read, moved to metrics.damaged-1.jsonl" in said
    assert lines(run / "metrics.damaged-1.jsonl") == [harmed]
    after = lines(file)
    assert after[: len(before) - 1] == [before[0], *before[2:]]
    assert [step for step, split in map(of, after[len(before) - 1 :]) if split != "goodput"] == [7, 8, 8]


def test_what_an_abandoned_branch_measured_is_kept(run, capsys):
    before = lines(run / "metrics.jsonl")
    shutil.rmtree(run / "checkpoints/6")
    (run / "metrics.jsonl").write_bytes(b"".join(before) + b'{"step": 7, "spl')
    train.train(config(5), run)
    said = capsys.readouterr().out
    later = [line for line in before if json.loads(line)["step"] > 4]
    assert later and lines(run / "metrics.left-1.jsonl") == later
    assert f"{len(later)} lines after step 4, which the run goes on from, moved to metrics.left-1.jsonl" in said


@pytest.mark.parametrize("how", ["gone", "empty"])
def test_a_run_whose_steps_are_gone_starts_anew_only_on_request(how, run):
    shutil.rmtree(run / "checkpoints")
    if how == "empty":
        (run / "checkpoints").mkdir()
    (run / "loss.png").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"has metrics up to step 6.* no .*--start-anew"):
        train.train(config(), run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    train.train(config(), run, start_anew=True)
    assert (run / "metrics.left-1.jsonl").read_bytes() == before[run / "metrics.jsonl"]
    assert (run / "samples.left-1").is_dir() == any("samples" in path.parts for path in before)
    made = map(of, lines(run / "metrics.jsonl"))
    assert [step for step, split in made if split != "goodput"] == [1, 2, 3, 4, 5, 6, 6]


def test_a_run_that_ended_before_its_first_save_starts_anew_by_itself(run, capsys):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    (run / "loss.png").unlink()
    (run / "metrics.jsonl").write_bytes(b"".join(lines(run / "metrics.jsonl")[:2]))
    train.train(config(), run)
    assert "2 lines after step 0, which the run goes on from, moved to metrics.left-1.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize("content", some_daily(CONTENTS, None, b"[" * 3_000), ids=lambda x: str(x)[:12])
def test_a_lost_configuration_is_that_of_the_newest_step(content, run, capsys):
    (run / "config.json").unlink() if content is None else (run / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"training\.seed was 0, now 1"):
        other = config(8).to_dict()
        train.train(Config.from_dict(other | {"training": other["training"] | {"seed": 1}}), run)
    train.train(config(8), run)
    said = capsys.readouterr().out
    assert f"{run}/config.json cannot be read; it is that of the newest step again" in said
    assert "resumed from step 6" in said and Config.from_file(run / "config.json") == config(8)
    if content is not None:
        assert (run / "config.damaged-1.json").read_bytes() == content


@pytest.mark.parametrize("content", [None, b""], ids=["none", "empty"])
def test_what_a_start_left_that_was_killed_at_once_is_in_nobodys_way(content, tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "checkpoints").mkdir()
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    train.train(config(1), tmp_path)
    assert (tmp_path / "loss.png").exists()


def test_samples_alone_are_said_with_a_way_on(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/step-0000001.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds samples of a run and no config.json; put it back.*--start-anew"):
        train.train(config(1), tmp_path)
    train.train(config(1), tmp_path, start_anew=True)
    assert (tmp_path / "samples.left-1/step-0000001.txt").read_text() == "mine"


def test_an_empty_configuration_beside_metrics_is_said_with_a_way_on(run):
    shutil.rmtree(run / "checkpoints")
    (run / "config.json").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"config.json.*put a copy of it back, or give --start-anew"):
        train.train(config(), run)
    metrics = (run / "metrics.jsonl").read_bytes()
    train.train(config(), run, start_anew=True)
    assert (run / "metrics.left-1.jsonl").read_bytes() == metrics
