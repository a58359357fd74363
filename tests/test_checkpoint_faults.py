"""Checkpoints when something goes wrong: damage is found, failures are told, and no earlier step is lost to them."""

import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from artifex.scaling import manifest
from artifex.scaling.checkpoints import CheckpointError, Checkpoints


def small(value: float = 0.0) -> dict:
    return {"w": jnp.full((4,), value, jnp.float32), "n": jnp.asarray(int(value), jnp.int32)}


def assert_holds(restored: dict, value: float) -> None:
    assert restored["w"].tolist() == [value] * 4
    assert int(restored["n"]) == int(value)


@pytest.fixture
def checkpoints(tmp_path):
    with Checkpoints(tmp_path / "run") as opened:
        yield opened


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_found(checkpoints):
    checkpoints.save(1, small(1), {})
    checkpoints.save(2, small(2), {"note": "text"})
    checkpoints.wait()
    step = checkpoints.folder / "2"
    files = sorted(path for path in step.rglob("*") if path.is_file())
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        flip_bit(path)
        with pytest.raises(CheckpointError, match=rf"step 2 .*{path.name}.*restore step 1 instead"):
            checkpoints.restore(2, small())
        path.write_bytes(content)
    assert_holds(checkpoints.restore(2, small()), 2)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_a_step_of_which_arrays_vanished_while_it_was_saved_is_no_step(checkpoints):
    checkpoints.save(1, small(1), {})
    checkpoints.wait()
    finished = checkpoints._orbax.wait_until_finished

    def moved_away():
        finished()
        for home in checkpoints.folder.glob("2.saving-*/arrays/w"):
            shutil.rmtree(home)

    checkpoints._orbax.wait_until_finished = moved_away
    checkpoints.save(2, small(2), {})
    with pytest.raises(CheckpointError, match=r"step 2 was not saved .*1 of 2 arrays, such as w, vanished.*\[1\]"):
        checkpoints.wait()
    assert checkpoints.newest_restorable() == (1, [])


@pytest.mark.parametrize("harm", [truncate, Path.unlink], ids=["truncated", "missing"])
def test_a_step_with_a_broken_file_is_not_complete(checkpoints, harm):
    checkpoints.save(1, small(1), {})
    checkpoints.save(2, small(2), {})
    checkpoints.wait()
    harm(checkpoints.folder / "2" / "arrays" / "w" / "c" / "0")
    assert checkpoints.steps() == [1]
    assert checkpoints.latest() == 1
    with pytest.raises(CheckpointError, match=r"step 2 .*arrays/w/c/0 .*restore step 1 instead"):
        checkpoints.restore(2, small())


def test_the_newest_restorable_step_is_found_and_the_others_are_reported(checkpoints):
    for step in (1, 2, 3):
        checkpoints.save(step, small(step), {})
    checkpoints.wait()
    (checkpoints.folder / "4" / "arrays").mkdir(parents=True)
    flip_bit(checkpoints.folder / "3" / "arrays" / "w" / "c" / "0")
    (checkpoints.folder / "2" / "arrays" / "n" / "c").unlink()
    step, skipped = checkpoints.newest_restorable()
    assert step == 1
    assert [text.split(":")[0] for text in skipped] == ["step 4", "step 3", "step 2"]
    assert "never finished" in skipped[0]
    assert "arrays/w/c/0 is damaged" in skipped[1]
    assert "arrays/n/c is missing" in skipped[2]


def test_an_empty_or_absent_folder_has_no_steps(tmp_path):
    with Checkpoints(tmp_path / "absent") as checkpoints:
        assert checkpoints.steps() == []
        assert checkpoints.latest() is None
        assert checkpoints.newest_restorable() == (None, [])
        with pytest.raises(CheckpointError, match="there is no step 3"):
            checkpoints.metadata(3)
    assert not (tmp_path / "absent").exists()


def test_the_newest_steps_stay(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (0, 10, 20, 30):
            checkpoints.save(step, small(step), {})
        checkpoints.wait()
        assert checkpoints.steps() == [20, 30]
        assert sorted(os.listdir(tmp_path)) == ["20", "30"]
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)


def test_save_returns_before_the_files_are_written(checkpoints, monkeypatch):
    released = threading.Event()
    seal = manifest.seal
    monkeypatch.setattr(manifest, "seal", lambda *args: (released.wait(20), seal(*args)))
    checkpoints.save(1, small(), {})
    assert checkpoints.steps() == []
    released.set()
    checkpoints.wait()
    assert checkpoints.steps() == [1]


def test_a_synchronous_save_returns_when_all_is_written(tmp_path):
    with Checkpoints(tmp_path, asynchronous=False) as checkpoints:
        checkpoints.save(1, small(), {})
        assert checkpoints.steps() == [1]


def test_a_full_disk_is_one_sentence_and_costs_no_earlier_step(tmp_path, capfd):
    mesh = jax.make_mesh((8,), ("first",), axis_types=(AxisType.Auto,))
    big = {"w": jax.device_put(np.ones((8, 1 << 16), np.float32), NamedSharding(mesh, PartitionSpec("first")))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, big, {})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # every shard is larger
        try:
            checkpoints.save(2, big, {})
            with pytest.raises(
                CheckpointError, match=r"step 2 was not saved .*File too large.*untouched: \[1\]"
            ) as at_wait:
                checkpoints.wait()
            checkpoints.save(2, big, {})
            with pytest.raises(CheckpointError, match="step 2 was not saved"):
                checkpoints.save(3, big, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(at_wait.value)
        assert len(str(at_wait.value)) < 500
        assert checkpoints.newest_restorable() == (1, [])
        checkpoints.save(2, big, {})  # the disk has space again
        checkpoints.wait()
        assert checkpoints.newest_restorable() == (2, [])
    assert capfd.readouterr() == ("", "")


def test_what_lingers_of_a_failed_save_does_not_stop_the_next(checkpoints, monkeypatch):
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # as if a busy writer brought its folder back
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "seal", lambda folder, _: (folder / "absent").stat())
        checkpoints.save(1, small(1), {})
        with pytest.raises(CheckpointError, match=r"step 1 was not saved .*No such file"):
            checkpoints.wait()
    checkpoints.save(1, small(2), {})
    checkpoints.wait()
    assert_holds(checkpoints.restore(1, small()), 2)


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        Checkpoints(tmp_path / "file" / "run") as checkpoints,
        pytest.raises(CheckpointError, match=r"step 1 was not saved .*Not a directory"),
    ):
        checkpoints.save(1, small(), {})


def test_steps_count_up(checkpoints):
    checkpoints.save(2, small(), {})
    for step in (2, 1, -1):
        with pytest.raises(ValueError, match=f"step {step} is not above 2"):
            checkpoints.save(step, small(), {})


def test_a_resumed_run_replaces_what_it_left_behind(tmp_path, caplog):
    with Checkpoints(tmp_path) as first:
        for step in (1, 2, 3):
            first.save(step, small(step), {})
    (tmp_path / "4.saving-1" / "arrays").mkdir(parents=True)  # killed while saving
    with Checkpoints(tmp_path) as second:  # goes on from step 1
        second.save(2, small(20), {})
        second.wait()
        assert second.steps() == [1, 2]
        assert_holds(second.restore(2, small()), 20)
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "2.left-1", "3.left-1"]
    assert [(record.name, record.levelname) for record in caplog.records] == [("artifex", "WARNING")] * 2


def test_a_manifest_of_an_unknown_format_is_refused(checkpoints, monkeypatch):
    monkeypatch.setattr(manifest, "FORMAT", 3)
    checkpoints.save(1, small(), {})
    checkpoints.wait()
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 3, this version reads 2; update artifex"):
        checkpoints.metadata(1)


def test_orbax_does_not_speak(checkpoints, caplog, capfd):
    caplog.set_level(logging.INFO)
    checkpoints.save(1, small(1), {})
    checkpoints.restore(1, small())
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_a_process_killed_while_saving_leaves_the_earlier_step(tmp_path):
    program = """
        import os, signal, sys
        import jax.numpy as jnp
        from artifex.scaling import manifest
        from artifex.scaling.checkpoints import Checkpoints

        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(1, {"w": jnp.full((4,), 1.0), "n": jnp.asarray(1)}, {})
        checkpoints.wait()
        manifest.seal = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.save(2, {"w": jnp.full((4,), 2.0), "n": jnp.asarray(2)}, {})
        checkpoints.wait()
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.parent.name.split("-")[0] for path in sorted(tmp_path.glob("*/arrays"))] == ["1", "2.saving"]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        assert checkpoints.newest_restorable() == (1, [])
        assert_holds(checkpoints.restore(1, small()), 1)
