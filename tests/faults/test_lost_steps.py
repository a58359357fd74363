"""A run whose steps are all damaged, or gone, says so and waits to be told; whatever it does, nothing is erased."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from artifex import train
from artifex.config import Config
from artifex.scaling.manifest import CheckpointError

PROSE = "It was a quiet day in the harbour, and the boats lay still.\n"


def settings(source: Path, steps: int = 6, every: int = 2) -> dict:
    return {
        "model": {"name": "llama-nano", "embed_dim": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "mlp_dim": 16},
        "data": {"source": str(source), "sequence_length": 32},
        "training": {"steps": steps, "batch_size": 8, "validation_batches": 1, "sample_tokens": 0},
        "optimizer": {"name": "adamw", "warmup_steps": 1},
        "checkpoint": {"every": every},
        "logging": {"every": 1, "progress": False},
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for index in range(4):
        (folder / f"{index}.txt").write_text(PROSE * 40)
    return folder


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory) -> Path:
    """Six steps, saved every second."""
    return train.train(Config.from_dict(settings(source)), tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it, as a killed run is, without what is made at the end."""
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/weights")
    (tmp_path / "run/loss.png").unlink()
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage_all(run: Path) -> None:
    flipped = bytearray((run / "checkpoints/6/arrays/params.embed.table/zarr.json").read_bytes())
    flipped[9] ^= 1
    (run / "checkpoints/6/arrays/params.embed.table/zarr.json").write_bytes(flipped)
    (run / "checkpoints/4/manifest.json").unlink()
    (run / "checkpoints/2/manifest.json").write_text("{")


def remove(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def empty(run: Path) -> None:
    remove(run)
    (run / "checkpoints").mkdir()


LOST = {
    "all damaged": (
        damage_all,
        "step 6: arrays/params.embed.table/zarr.json is damaged.*step 4: manifest.json is missing.*"
        "step 2: manifest.json is damaged",
    ),
    "folder gone": (remove, "has metrics up to step 6 and no checkpoints/"),
    "folder empty": (empty, "has metrics up to step 6, saved every 2, and .*checkpoints has no step"),
}


@pytest.mark.parametrize(("lose", "says"), LOST.values(), ids=LOST)
def test_a_run_whose_steps_are_lost_says_how_and_starts_anew_only_on_request(run, source, lose, says):
    lose(run)
    before = contents(run)
    config = Config.from_dict(settings(source))
    with pytest.raises(CheckpointError, match=says) as refused:
        train.train(config, run)
    assert (
        "start anew" in str(refused.value) and "--start-anew" in str(refused.value) and "\n" not in str(refused.value)
    )
    assert contents(run) == before
    train.train(config, run, start_anew=True)
    after = contents(run)
    for name, content in before.items():  # all of it is somewhere
        if name.startswith("checkpoints/"):
            _, step, rest = name.split("/", 2)
            assert after[f"checkpoints/{step}.left-1/{rest}"] == content
    assert (run / "metrics.left-1.jsonl").read_bytes() == before["metrics.jsonl"]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 6 and steps.count(1) == 1


def test_a_finished_run_whose_steps_are_gone_is_not_trained_again(trained, source, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    empty(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"is a finished run and .*checkpoints has no step.*--start-anew"):
        train.train(Config.from_dict(settings(source)), tmp_path / "run")


def test_a_run_killed_before_its_first_step_was_saved_just_begins_again(run, source):
    empty(run)
    (run / "checkpoints/4.saving-1").mkdir()
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= 5]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    config = json.loads((run / "config.json").read_text())
    config["checkpoint"]["every"] = 4
    (run / "config.json").write_text(json.dumps(config))
    train.train(Config.from_dict(settings(source, every=4)), run)
    assert (run / "metrics.left-1.jsonl").read_text().splitlines() == lines
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"4", "6"}


def test_what_a_run_went_on_from_before_is_kept_aside(run, source):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(run / "checkpoints/6")
    train.train(Config.from_dict(settings(source)), run)
    later = [line for line in lines if json.loads(line)["step"] > 4]
    assert (run / "metrics.left-1.jsonl").read_text().splitlines() == later
    assert (run / "metrics.jsonl").read_text().splitlines()[: len(lines) - len(later)] == lines[: -len(later)]


def test_the_command_ends_with_one_line_and_leaves_the_folder_as_it_was(run, source):
    damage_all(run)
    before = contents(run)
    (run.parent / "config.json").write_text(json.dumps(settings(source)))
    words = ["-m", "artifex.train", str(run.parent / "config.json"), "--run-dir", str(run)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no step in") and line.endswith("what is there is renamed and stays")
    assert contents(run) == before
