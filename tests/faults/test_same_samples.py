"""Which samples a run reads, counted by index, when other processes, or batches of another size, go on after a stop.

The text is of random bytes, so that the first few of a row say where in the text it begins.
"""

import itertools
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1]))
from test_processes import Together

from artifex import train
from artifex.config import Config
from artifex.data.tokenizers import ByteTokenizer, save_tokenizer
from artifex.training.loop import fit
from artifex.training.meter import Meter

LENGTH, SIZE = 16, 4_000  # tokens of a row, of the text
SECTIONS = {
    "model": {"name": "llama-nano", "embed_dim": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "mlp_dim": 16},
    "data": {"source": "tokens.npy", "tokenizer": "bytes.json", "sequence_length": LENGTH},
    "training": {"batch_size": 16, "validate_every": 0, "validation_batches": 1, "sample_tokens": 0},
    "optimizer": {"name": "adamw", "warmup_steps": 1, "schedule": "constant"},
    "logging": {"every": 1, "progress": False},
}

# `artifex.train`, of which each process notes what its devices were given: step, row of the batch, how the row begins
NOTING = """
import json, sys
import jax, numpy as np
from artifex import train
from artifex.cli import parse_train
from artifex.scaling import processes

name, *words = sys.argv[1:]
command = parse_train(words)
processes.start(command.start, command.asks())
with processes.ending_together():
    run = train.open_run(command.config, command.run_dir)
    run_step, step, noted = train.prepare(run), run.start, []

    def noting(state, batch):
        global step
        step += 1
        for shard in batch["tokens"].addressable_shards:
            first = shard.index[0].indices(len(batch["tokens"]))[0]
            noted.extend([step, first + row, tokens[:8].tolist()] for row, tokens in enumerate(np.asarray(shard.data)))
        return run_step(state, batch)

    train.run_steps(run, noting)
with open(f"{name}-{jax.process_index()}.json", "w") as file:
    json.dump(noted, file)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint16))
    save_tokenizer(ByteTokenizer(), folder / "bytes.json")
    (folder / "c.json").write_text(json.dumps(SECTIONS))
    return folder


@pytest.fixture(scope="module")
def text(folder):
    """The part of the text that is trained on."""
    config = Config.from_dict(SECTIONS)
    config.data.source, config.data.tokenizer = str(folder / "tokens.npy"), str(folder / "bytes.json")
    return train.open_run(config, folder / "unused").task.corpus.train


def places(text, rows):
    """Where in the text each of the rows begins."""
    ring = np.concatenate([text, text[:8]])
    begins = {tuple(ring[place : place + 8].tolist()): place for place in range(len(text))}
    assert len(begins) == len(text), "eight bytes say where they stand"
    return [begins[tuple(row[:8])] for row in rows]


def check_epochs(text, found):
    """Each whole epoch of the rows `found` has each window of the text once: none is repeated, none is skipped."""
    count = len(text) // LENGTH
    epochs = list(itertools.batched(found, count)) if hasattr(itertools, "batched") else _batched(found, count)
    assert len(epochs) > 2
    for epoch in epochs[:-1]:
        assert len(set(epoch)) == count
        covered = {(place + offset) % len(text) for place in epoch for offset in range(LENGTH)}
        assert len(covered) == count * LENGTH, "windows do not overlap"
    assert len(set(epochs[-1])) == len(epochs[-1])


def _batched(items, count):
    return [items[begin : begin + count] for begin in range(0, len(items), count)]


@pytest.mark.slow
def test_four_processes_then_one_then_two_repeat_and_skip_no_sample(folder, text):
    steps, rows = {}, {}
    for count, until in ((4, 11), (1, 24), (2, 37)):
        words = [f"{count}", "c.json", "--run-dir", "run", "--device.fsdp", f"{count}", "--training.steps", f"{until}"]
        with Together(count, 1, words, folder=folder, program=NOTING) as them:
            ended = them.ended()
        assert [code for code, _, _ in ended] == [0] * count, ended
        steps[count] = {}
        for process in range(count):
            noted = json.loads((folder / f"{count}-{process}.json").read_text())
            assert len(noted) == (until - len(rows) // 16) * 16 // count, "each has an equal part"
            for step, row, begin in noted:
                assert steps[count].setdefault((step, row), begin) is begin, "no row is on two devices"
        assert not rows.keys() & steps[count].keys(), "no step is taken twice"
        rows |= steps[count]
    assert sorted(rows) == [(step, row) for step in range(1, 38) for row in range(16)]
    check_epochs(text, places(text, [rows[key] for key in sorted(rows)]))


def config(folder, **sections) -> Config:
    """The run, of `folder`, with other values."""
    found = {key: SECTIONS.get(key, {}) | sections.get(key, {}) for key in {**SECTIONS, **sections}}
    for name in ("source", "tokenizer"):
        if (folder / found["data"][name]).exists():
            found["data"][name] = str(folder / found["data"][name])
    return Config.from_dict(found)


def rows_of(config, run_dir, **how):
    """Train; the rows it took, in their order."""
    run = train.open_run(config, run_dir, **how)
    run_step, rows = train.prepare(run), []

    def noting(state, batch):
        rows.extend(jax.device_get(batch["tokens"]).tolist())
        return run_step(state, batch)

    with run.lock, run.checkpoints, run.report:
        fit(run, noting, Meter(run))
    return rows


@pytest.fixture(scope="module")
def stopped(folder):
    """A run of 11 steps of 16 rows, and these rows."""
    return folder / "stopped", rows_of(config(folder, training={"steps": 11}), folder / "stopped")


def test_another_batch_size_goes_on_from_the_same_sample_on_request(folder, stopped, text, tmp_path, capsys):
    run, rows = stopped
    shutil.copytree(run, tmp_path / "run")
    smaller = config(folder, training={"steps": 60, "batch_size": 8})
    with pytest.raises(ValueError, match=r"training.batch_size was 16, now 8.*same sample: --other-batch-size$"):
        train.train(smaller, tmp_path / "run")
    rows = rows + rows_of(smaller, tmp_path / "run", other_batch_size=True)
    said = capsys.readouterr().out
    assert "changed since it was saved: training.batch_size was 16, now 8" in said
    assert "176 rows were drawn until step 11, in batches that were not all of 8; goes on from the next" in said
    tokens = [json.loads(line).get("tokens") for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [count for count in tokens if count][-1] == len(rows) * LENGTH
    # again, with no word: the saved configuration has it now, and the checkpoint how many rows there were
    rows += rows_of(config(folder, training={"steps": 70, "batch_size": 8}), tmp_path / "run")
    rows += rows_of(config(folder, training={"steps": 81, "batch_size": 32}), tmp_path / "run", other_batch_size=True)
    assert len(rows) == 11 * 16 + 59 * 8 + 11 * 32
    check_epochs(text, places(text, rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"tokenizer": "bytes"}}, r"data.tokenizer was .*bytes.json, now bytes"),
        ({"data": {"sequence_length": 8}}, "data.sequence_length was 16, now 8"),
        ({"training": {"seed": 1}}, "training.seed was 0, now 1"),
        (
            {"training": {"seed": 1, "batch_size": 8}},
            r"batch_size was 16, now 8; training.seed was 0, now 1.* as saved$",
        ),
    ],
)
@pytest.mark.parametrize("asked", [False, True])
def test_what_another_order_of_samples_would_be_is_refused_by_name_even_on_request(
    folder, stopped, change, message, asked
):
    before = {path: path.read_bytes() for path in stopped[0].rglob("*") if path.is_file()}
    changed = config(
        folder, **{key: {"steps": 20, **change[key]} if key == "training" else change[key] for key in change}
    )
    if asked:
        message = message.replace("batch_size was 16, now 8; ", "")
    with pytest.raises(ValueError, match=message):
        train.open_run(changed, stopped[0], other_batch_size=asked)
    assert {path: path.read_bytes() for path in stopped[0].rglob("*") if path.is_file()} == before


def test_data_that_changed_under_the_same_name_are_told_apart(folder, stopped, tmp_path):
    for name in ("tokens.npy", "bytes.json"):
        shutil.copy(folder / name, tmp_path)
    copied = config(tmp_path, training={"steps": 3})
    rows_of(copied, tmp_path / "run")
    np.save(tmp_path / "tokens.npy", np.load(folder / "tokens.npy")[:-400])
    with pytest.raises(
        ValueError, match=r"the data changed: step 3 .*they were .*3,800 training.* now .* 3,420 training"
    ):
        train.train(copied, tmp_path / "run")
