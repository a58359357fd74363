"""`python -m artifex.checkpoint`: what it says of saved steps is what is there."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from artifex import checkpoint, restore, train
from artifex.config import Config
from artifex.scaling.checkpoints import Checkpoints

SECTIONS = {
    "model": {"name": "llama-nano", "embed_dim": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "mlp_dim": 16},
    "training": {"steps": 4, "batch_size": 8, "validation_batches": 1, "sample_tokens": 0},
    "optimizer": {"name": "adamw", "warmup_steps": 1},
    "checkpoint": {"every": 2},
    "logging": {"every": 1, "progress": False},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "source").mkdir()
    for index in range(4):
        (folder / f"source/{index}.txt").write_text("It was a quiet day in the harbour.\n" * 40)
    config = Config.from_dict(SECTIONS | {"data": {"source": str(folder / "source"), "sequence_length": 32}})
    return train.train(config, folder / "run")


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def said(capsys, *words):
    """Its exit code, and the lines on stdout and stderr."""
    capsys.readouterr()
    code = 0
    try:
        checkpoint.main([str(word) for word in words])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


def harm(run, step):
    file = next(run.glob(f"checkpoints/{step}/arrays/params.embed.table/c/0/0"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_steps_are_listed_with_what_was_set_aside_or_never_finished(run, capsys):
    (run / "checkpoints/4").rename(run / "checkpoints/4.left-1")
    (run / "checkpoints/6.saving-2/arrays").mkdir(parents=True)
    code, (_, _, *rows), _ = said(capsys, "ls", run)
    assert code == 0
    assert [(row.split()[0], row.split("  ")[-1].strip()) for row in rows] == [
        ("2", "complete"),
        ("4.left-1", "set aside: the run went on from before it"),
        ("6.saving-2", "its save was never finished"),
    ]


def test_bytes_of_a_device_are_those_it_holds_once_restored(run, capsys):
    sizes = {"fsdp": 4, "tensor": 2}
    state = restore(run, mesh=sizes).state
    device = jax.devices()[0]
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(state)
        for shard in leaf.addressable_shards
        if shard.device == device
    )
    code, (*_, last), _ = said(capsys, "show", run, "--mesh", "fsdp=4,tensor=2")
    number, unit = last.split()[-2:]
    assert code == 0 and float(number) * {"B": 1, "KiB": 1024, "MiB": 2**20}[unit] == pytest.approx(held, rel=0.01)


def test_damage_is_named_and_the_steps_around_it_are_whole(run, capsys):
    assert said(capsys, "verify", run)[0] == 0
    harm(run, 2)
    (run / "checkpoints/6").mkdir()
    code, lines, _ = said(capsys, "verify", run)
    assert code == 1
    assert "step 2: arrays/params.embed.table/c/0/0 is damaged" in lines[0]
    assert lines[1].startswith("step 4: whole, ") and lines[2].startswith("step 6: manifest.json is missing")
    assert said(capsys, "verify", run, "--step", 4)[0] == 0
    code, _, (line,) = said(capsys, "verify", run, "--step", 5)
    assert code == 2 and line.endswith("; there are 2, 4, 6")


def test_two_steps_differ_where_a_value_was_changed_and_nowhere_else(run, tmp_path, capsys):
    assert said(capsys, "diff", run, run)[0] == 0
    with Checkpoints(run / "checkpoints") as one, Checkpoints(tmp_path / "other") as other:
        where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where) for path, leaf in one.arrays(4).items()
        }
        tree: dict = {}
        for path, leaf in shapes.items():
            *folders, name = path.split("/")
            at = tree
            for folder in folders:
                at = at.setdefault(folder, {})
            at[name] = leaf
        state = one.restore(4, tree)
        table = np.array(state["params"]["embed"]["table"])
        table[3, 5] += 0.5
        table[7, 1] -= 0.25
        state["params"]["embed"]["table"] = jax.device_put(table, where)
        other.save(4, state, one.metadata(4))
        other.wait()
    code, (head, *lines), _ = said(capsys, "diff", run, tmp_path / "other")
    assert code == 1 and head.endswith("as follows")
    assert lines == [f"params/embed/table: 2 of {table.size:,} values differ, by at most 0.5, first at [3, 5]"]


def test_exported_weights_are_those_a_finished_run_has(run, tmp_path, capsys):
    code, _, _ = said(capsys, "export", run, tmp_path / "out")
    mine, its = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", run / "weights"))
    assert code == 0 and mine.keys() == its.keys()
    assert all(np.array_equal(mine[name], its[name]) for name in its)
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (run / "weights/config.json").read_text()
    )
    assert (tmp_path / "out/tokenizer.json").exists()
    code, _, (line,) = said(capsys, "export", run, tmp_path / "out")
    assert code == 2 and "is there and not empty" in line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["ls", "nowhere"], "nowhere is no folder; expected a run, its checkpoints, or one step of them"),
        (["show", "RUN", "--mesh", "fsdp4"], "expected one as in fsdp=4,tensor=2"),
        (["show", "RUN", "--mesh", "fsp=4"], "no strategy is named after mesh axis 'fsp'"),
        (["show", "RUN", "--step", "3"], "there is no step 3 in"),
        (["show", "RUN/checkpoints/2", "--step", "4"], "is step 2 alone, so there is no step 4"),
    ],
)
def test_mistakes_are_one_line(words, says, trained, capsys):
    code, out, (line,) = said(capsys, *(word.replace("RUN", str(trained)) for word in words))
    assert code in (1, 2) and not out and line.startswith("error: ") and says in line
