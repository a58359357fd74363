"""A step whose manifest is not its own, or leads elsewhere, is passed over with a line; nothing outside is opened."""

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from artifex.scaling.checkpoints import CheckpointError, Checkpoints

OPENED: list[str] = []


def note(event: str, args: tuple) -> None:
    if event == "open" and isinstance(args[0], str | os.PathLike):
        OPENED.append(os.fspath(args[0]))


sys.addaudithook(note)  # of every file that Python opens


def small(value: float) -> dict:
    return {"w": jnp.full((4,), value, jnp.float32)}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Steps 50 and 55, and 60, which is a copy of 55."""
    with Checkpoints(tmp_path / "run") as checkpoints:
        for step in (50, 55):
            checkpoints.save(step, small(step), {"note": "text"})
    shutil.copytree(tmp_path / "run/55", tmp_path / "run/60")
    return tmp_path / "run"


def signed(file: Path, **changes) -> None:
    """The manifest with some fields replaced, and the checksum that belongs to it."""
    content = json.loads(file.read_text()) | changes
    content.pop("checksum")
    content["checksum"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(content))


def passed_over(folder: Path) -> str:
    """The line on step 60, once step 55 was found to be the one to take, and to hold what it should."""
    OPENED.clear()
    with Checkpoints(folder) as checkpoints:
        step, lines = checkpoints.newest_restorable()
        assert (step, len(lines)) == (55, 1)
        assert 60 not in checkpoints.steps()
        with pytest.raises(CheckpointError, match=r"step 60 .*restore step 55 instead"):
            checkpoints.restore(60, small(0))
        assert checkpoints.restore(55, small(0))["w"].tolist() == [55] * 4
    opened = [os.path.realpath(path) for path in OPENED]
    assert str(folder.parent / "outside") not in "\n".join(opened)
    assert "\n" not in lines[0] and len(lines[0]) < 400
    return lines[0]


def test_a_step_copied_under_another_number_is_not_that_step(folder):
    assert "manifest.json is of step 55: its folder was copied or renamed" in passed_over(folder)


def test_a_manifest_that_is_a_folder_is_none(folder):
    (folder / "60/manifest.json").unlink()
    (folder / "60/manifest.json").mkdir()
    assert "manifest.json is no file" in passed_over(folder)


def test_a_manifest_that_would_block_its_reader_is_none(folder):
    (folder / "60/manifest.json").unlink()
    os.mkfifo(folder / "60/manifest.json")
    assert "manifest.json is no file" in passed_over(folder)


@pytest.mark.parametrize("text", ["[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000, "\xff", "", "[]", "null"])
def test_a_manifest_that_is_no_object_or_nested_without_end_is_none(folder, text):
    (folder / "60/manifest.json").write_bytes(text.encode("latin-1"))
    assert "manifest.json is damaged" in passed_over(folder)


@pytest.mark.parametrize("name", ["../../outside", "/{outside}", "arrays/../../../outside", "arrays\\..\\outside", "."])
def test_a_manifest_that_lists_a_path_outside_its_folder_is_refused(folder, tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_bytes(b"")
    name = name.replace("/{outside}", str(outside))
    signed(folder / "60/manifest.json", step=60, files={name: {"size": 0, "sha256": hashlib.sha256().hexdigest()}})
    assert "which is no path inside the step's folder" in passed_over(folder)


@pytest.mark.parametrize("what", ["file", "folder", "manifest"])
def test_a_link_that_leads_out_of_the_folder_is_not_followed(folder, tmp_path, what):
    signed(folder / "60/manifest.json", step=60)
    inside = folder / "60" / {"file": "arrays/w/c/0", "folder": "arrays", "manifest": "manifest.json"}[what]
    inside.rename(tmp_path / "outside")
    inside.symlink_to(tmp_path / "outside")
    assert re.search(r"(arrays/w/c/0|arrays|manifest.json) is a link", passed_over(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "60"},
        {"step": True},
        {"files": []},
        {"files": {"arrays/w/c/0": 16}},
        {"files": {"arrays/w/c/0": {"size": -1, "sha256": "0"}}},
        {"files": {"arrays/w/c/0": {"size": 16, "md5": "0"}}},
        {"arrays": {"w": {"shape": [4]}}},
        {"arrays": {"w": {"shape": [10**30], "dtype": "float32"}}},
        {"arrays": {"w": {"shape": [4], "dtype": "no such"}}},
        {"metadata": 1},
        {"format": [2]},
        {"format": 99},
    ],
    ids=json.dumps,
)
def test_a_manifest_that_is_signed_and_malformed_is_refused(folder, changes):
    signed(folder / "60/manifest.json", **{"step": 60} | changes)
    assert "manifest.json" in passed_over(folder)


def test_a_manifest_with_sha256_alone_as_it_was_written_once_is_still_verified(folder):
    file = folder / "60/manifest.json"
    listed = {
        name: {"size": entry["size"], "sha256": hashlib.sha256((folder / "60" / name).read_bytes()).hexdigest()}
        for name, entry in json.loads(file.read_text())["files"].items()
    }
    signed(file, format=1, step=60, files=listed)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.newest_restorable() == (60, [])
        assert checkpoints.restore(60, small(0))["w"].tolist() == [55] * 4
    content = bytearray((folder / "60/arrays/w/c/0").read_bytes())
    content[3] ^= 1
    (folder / "60/arrays/w/c/0").write_bytes(content)
    with Checkpoints(folder) as checkpoints:
        step, lines = checkpoints.newest_restorable()
    assert step == 55 and "arrays/w/c/0 is damaged" in lines[0]
