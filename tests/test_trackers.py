"""Metrics for TensorBoard and Weights & Biases, read back by readers that are not the writers."""

import importlib.util
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import tiny, written

from artifex import train
from artifex.config import Config
from artifex.config_io import ConfigError
from artifex.training.metrics_file import MetricsFile
from artifex.training.trackers import Trackers

needs_tensorboard = pytest.mark.skipif(not importlib.util.find_spec("tensorboardX"), reason="needs tensorboardX")
needs_wandb = pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="needs wandb")
LINES = [
    {"step": 1, "split": "train", "loss": 2.5, "problem": "text is no number", "rate": None},
    {"step": 2, "split": "train", "loss": 1.25, "rate": 10.0},
    {"step": 2, "split": "validation", "loss": 1.5},
    {"step": 3, "split": "train", "loss": 1.0, "rate": 11},
]


def config(source, **sections) -> Config:
    sections["logging"] = {"track": ["tensorboard"]} | sections.get("logging", {})
    return tiny(source, **sections)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return written(tmp_path_factory.mktemp("source"))


def crc32c(data: bytes) -> int:
    """Castagnoli's, bit by bit, as RFC 3720 B.4 defines it."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    """As TFRecord files have it."""
    value = crc32c(data)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def fields(data: bytes) -> list[tuple[int, Any]]:
    """A protocol buffer's fields by number: integers, 8 or 4 bytes, or bytes."""
    found: list[tuple[int, Any]] = []
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            value |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if not data[at - 1] & 128:
                return value

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            found.append((number, varint()))
            continue
        size = {1: 8, 5: 4}.get(kind) or varint()
        found.append((number, data[at : at + size]))
        at += size
    return found


def events(folder: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of every scalar in a folder of event files, by the format's own description: records with
    their checksums, Event.step = 2, Event.summary = 5, Summary.value = 1, Value.tag = 1, Value.simple_value = 2."""
    found = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size, of_size) = struct.unpack("<QI", data[at : at + 12])
            body, (of_body,) = data[at + 12 : at + 12 + size], struct.unpack("<I", data[at + 12 + size :][:4])
            assert of_size == masked(data[at : at + 8]) and of_body == masked(body)
            at += size + 16
            event = dict(fields(body))
            for _, value in fields(event.get(5, b"")):
                one = dict(fields(value))
                found.append((one[1].decode(), event.get(2, 0), struct.unpack("<f", one[2])[0]))
    return found


def expected(records, *, tensorboard=True) -> list[tuple[str, int, float]]:
    kind = np.float32 if tensorboard else float
    return [
        (f"{record['split']}/{name}", record["step"], float(kind(value)))
        for record in records
        for name, value in record.items()
        if name not in ("step", "split") and isinstance(value, int | float) and not isinstance(value, bool)
    ]


def open_trackers(name, folder, *, records=(), start=0, said=None):
    say = (lambda line: pytest.fail(line)) if said is None else said.append
    return Trackers([name], folder, records=list(records), config={"a": {"b": 1}}, start=start, say=say)


@needs_tensorboard
def test_tensorboard_has_every_number_at_its_step(tmp_path):
    trackers = open_trackers("tensorboard", tmp_path)
    for line in LINES:
        trackers.log(line)
        assert events(tmp_path / "tensorboard")[-1][1] == line["step"], "on the disk at once"
    trackers.close()
    assert events(tmp_path / "tensorboard") == expected(LINES)


@needs_tensorboard
def test_a_run_that_goes_on_has_every_step_once_in_tensorboard(source, tmp_path):
    run = tmp_path / "run"
    train.train(config(source), run)
    train.train(config(source, training={"steps": 6}), run)
    records = MetricsFile(run / "metrics.jsonl").read()
    found = events(run / "tensorboard")
    assert found == expected(records)
    assert len({(tag, step) for tag, step, _ in found if tag.startswith("train/")}) == sum(
        tag.startswith("train/") for tag, _, _ in found
    )
    assert {step for tag, step, _ in found if tag == "train/loss"} == {1, 2, 3, 4, 5, 6}


@needs_tensorboard
def test_a_tracker_that_fails_is_said_once_and_left(tmp_path):
    said: list[str] = []
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    trackers = open_trackers("tensorboard", tmp_path, said=said)
    for line in LINES:
        trackers.log(line)
    assert len(said) == 1 and said[0].startswith("warning: tensorboard is told no more: ")
    (tmp_path / "tensorboard").unlink()
    trackers = open_trackers("tensorboard", tmp_path, said=said)
    tracker: Any = trackers.there["tensorboard"]
    tracker.writer._py_recordio_writer._writer.close()  # as a disk that goes
    for line in LINES:
        trackers.log(line)
    trackers.close()
    assert len(said) == 2


def test_a_tracker_that_is_not_installed_is_one_line_before_anything_is_done(source, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    config(source, logging={"track": ["wandb"]}).save(tmp_path / "config.json")
    with pytest.raises(SystemExit) as exit:
        train.main([str(tmp_path / "config.json"), "--run-dir", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.count("\n") == 1 and "pip install 'artifex[wandb]'" in said
    assert not (tmp_path / "run").exists()


def test_the_setting_takes_one_several_and_no_other():
    assert Config.from_dict({"logging": {"track": "wandb"}}).logging.track == ("wandb",)
    assert Config.from_dict({"logging": {"track": ["wandb", "tensorboard"]}}).logging.track == ("wandb", "tensorboard")
    with pytest.raises(ConfigError, match=r"logging\.track"):
        Config.from_dict({"logging": {"track": ["mlflow"]}})


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of a run's file: after 7 bytes a log of LevelDB's format, in blocks of 32 KiB, each part with CRC-32,
    length and kind (1 whole, 2 first, 3 middle, 4 last)."""
    data, at, parts = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        check, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part = data[at + 7 : at + 7 + size]
        assert check == zlib.crc32(bytes([kind]) + part)
        at, parts = at + 7 + size, parts + part
        if kind in (1, 4):
            yield parts
            parts = b""


def wandb_says(folder: Path) -> tuple[set[tuple[str, str]], list[tuple[str, int, float]]]:
    """(id, project) of the runs that were written offline, and (name, step, value) of their history."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2
    runs, history = set(), []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in wandb_records(file):
            record = messages.Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                runs.add((record.run.run_id, record.run.project))
            if record.WhichOneof("record_type") == "history":
                named = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                step = json.loads(named.pop("_step", "null"))
                step = record.history.step.num if step is None else step
                history += [(name, step, json.loads(value)) for name, value in named.items() if name[0] != "_"]
    return runs, history


@needs_wandb
def test_wandb_has_every_number_at_its_step_offline_and_once(tmp_path):
    """In processes of their own: wandb starts a service beside the one that asks for it. Killed after step 3 of which 2
    is saved, the run makes step 3 again and goes on."""
    program = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from artifex.training.trackers import Trackers
lines, records, start = json.loads(sys.argv[1])
how = {{"records": records, "config": {{"a": {{"b": 1}}}}, "start": start}}
trackers = Trackers(["wandb"], {str(tmp_path)!r}, **how, say=sys.exit)
for line in lines:
    trackers.log(line)
trackers.close()
"""
    new = {"step": 4, "split": "train", "loss": 0.5, "rate": 12}
    for lines, records, start in ((LINES, [], 0), ([LINES[3], new], LINES[:3], 2)):
        subprocess.run([sys.executable, "-c", program, json.dumps([lines, records, start])], check=True, timeout=240)
    runs, history = wandb_says(tmp_path)
    assert len(runs) == 1 and {project for _, project in runs} == {"artifex"}
    assert sorted(history) == sorted(expected([*LINES, new], tensorboard=False))
