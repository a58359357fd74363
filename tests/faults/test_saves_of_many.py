"""A save that fails on one of two processes alone fails on both, at once: both leave, or both go on."""

import re
import subprocess
import sys
import time

import pytest
from runs import environment, write_source
from two_processes import is_one_sentence, script, started

from artifex.scaling.checkpoints import Checkpoints

WORDS = ["--device.fsdp=2", "--training.steps=8", "--checkpoint.every=2", "--logging.every=2"]
# `artifex.train` where one process cannot save its part of step 4: it cannot make the folder, Orbax refuses before it
# writes, or the file system does not take what it writes
FAILING = """
import resource, sys, time
import orbax.checkpoint as ocp
from artifex import train
from artifex.scaling import checkpoints, orbax_writer
number, point = sys.argv.pop(1), sys.argv.pop(1)
save, failing = checkpoints.Checkpoints.save, []
def fails(self, step, tree, metadata):
    if step == 4 and f"--device.process-id={number}" in sys.argv:
        failing.append(step)
        open("failing", "w").write(str(time.time()))
        if point == "written":
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, resource.RLIM_INFINITY))
    if step == 6:
        open("going", "w").write(str(time.time()))
    try:
        save(self, step, tree, metadata)
        if failing and self._pending:
            self._pending[1].exception()
    finally:
        failing.clear()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
def refusing(function):
    async def call(*args, **kwargs):
        if failing:
            raise OSError(28, "No space left on device")
        return await function(*args, **kwargs)
    return call
checkpoints.Checkpoints.save = fails
if point == "folder":
    orbax_writer._Checkpointer.create_temporary_path = refusing(orbax_writer._Checkpointer.create_temporary_path)
if point == "begun":
    ocp.PyTreeCheckpointHandler.async_save = refusing(ocp.PyTreeCheckpointHandler.async_save)
train.main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("run"))


def steps(run):
    """The steps that are saved, every file of them sound."""
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert not checkpoints.newest_restorable()[1]
        return checkpoints.steps()


@pytest.mark.slow
@pytest.mark.parametrize("then", ["stop", "go_on"])
@pytest.mark.parametrize("fails", [0, 1])
@pytest.mark.parametrize("point", ["folder", "begun", "written"])
def test_a_save_that_fails_on_one_process_fails_on_both(point, fails, then, folder, tmp_path):
    run = tmp_path / "run"
    words = ["--run-dir", str(run), *WORDS]
    for name in ("failing", "going"):
        (folder / name).unlink(missing_ok=True)
    program = script(tmp_path, FAILING, str(fails), point)
    with started(folder, *words, f"--checkpoint.on-failure={then}", program=program) as processes:
        ended = [(*process.communicate(timeout=120), process.returncode) for process in processes]
        until = time.time() if then == "stop" else float((folder / "going").read_text())
        after = until - float((folder / "failing").read_text())
    assert after < 10, ended
    why = rf"step 4 was not saved in {re.escape(str(run))}/checkpoints: process {fails}: .*(No space|File too large)"
    if then == "go_on":
        assert [code for *_, code in ended] == [0, 0], ended
        assert re.search(f"warning: at step [46]: {why}.*; the run goes on, 1 save has failed", ended[0][0]), ended
        assert steps(run) == [2, 6, 8]
        return
    assert steps(run) == [2]
    for _, err, code in ended:
        assert code == 1 and is_one_sentence(err) and re.search(why, err), ended
    command = [sys.executable, "-m", "artifex.train", "c.json", "--run-dir", str(run), *WORDS[1:]]
    again = subprocess.run([*command, "--device.fsdp=1"], cwd=folder, env=environment(), capture_output=True, text=True)
    assert again.returncode == 0 and "resumed from step 2" in again.stdout, again.stderr
    assert steps(run) == [4, 6, 8]
