"""Two runs never train in one folder: the second is refused and told by whom; what died is taken over."""

import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from runs import SECTIONS, command, environment, write_source

from artifex import train
from artifex.scaling.checkpoints import Checkpoints
from artifex.training.run_lock import NAME, InUse, RunLock

HOLDER = """
import sys, time
from artifex.training.run_lock import RunLock
lock = RunLock(sys.argv[1])
said = lock.take()
print(said or "holds", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("run"))


def holder(folder, seconds="60"):
    words = [sys.executable, "-c", HOLDER, str(folder), seconds]
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def test_the_second_is_refused_and_told_who_is_the_first(tmp_path):
    first, said = holder(tmp_path)
    assert said == "holds"
    with pytest.raises(InUse, match=rf"in use by process {first.pid} on {socket.gethostname()}, since 2.*another"):
        RunLock(tmp_path).take(over=True)  # one of this host that lives is never taken over
    first.send_signal(signal.SIGSTOP)  # it lives
    with pytest.raises(InUse):
        RunLock(tmp_path).take()
    first.kill()
    first.communicate()
    lock = RunLock(tmp_path)
    assert f"held by process {first.pid} on" in (lock.take() or "")
    lock.leave()
    assert list(tmp_path.iterdir()) == []


def test_one_that_ends_leaves_nothing(tmp_path):
    first, _ = holder(tmp_path, "0")
    first.communicate(timeout=20)
    assert list(tmp_path.iterdir()) == [] and RunLock(tmp_path).take() is None


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({"host": "elsewhere"}, False),
        ({"processes": "pid:[1]"}, False),  # a container that shares the host's name
        ({"started": 1}, True),  # its PID was given to another process since
        ({"boot": "before"}, True),
        ({"pid": 2**22 + 1}, True),
    ],
    ids=str,
)
def test_what_cannot_be_seen_to_have_ended_is_taken_over_on_request_alone(change, taken, tmp_path):
    first, _ = holder(tmp_path)
    file = tmp_path / NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    if not taken:
        with pytest.raises(InUse, match="cannot be seen from here; if it has ended, give --take-over"):
            RunLock(tmp_path).take()
    assert "taken over" in (RunLock(tmp_path).take(over=not taken) or "")
    ours = file.read_bytes()
    first.terminate()
    first.communicate()
    assert file.read_bytes() == ours


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}', "\0" * 9])
def test_a_lock_that_was_never_written_holds_nobody_off(content, tmp_path):
    (tmp_path / NAME).write_text(content)
    assert RunLock(tmp_path).take() is None


def test_of_many_at_once_one_has_it(tmp_path):
    """Beside a stale lock, which each of them finds and would take over."""
    stale, _ = holder(tmp_path)
    stale.kill()
    stale.communicate()
    with ThreadPoolExecutor(6) as pool:
        them = list(pool.map(lambda _: holder(tmp_path), range(6)))
    ended = []
    for process, said in them:
        process.terminate() if said else None
        ended.append((said, process.communicate(timeout=20)[1]))
    assert len([said for said, _ in ended if said]) == 1
    assert all("InUse" in err for said, err in ended if not said)


def test_a_run_holds_its_folder_while_it_trains(folder, tmp_path, capsys):
    run = tmp_path / "run"
    words = ["--run-dir", str(run), "--training.steps", "1000000", "--checkpoint.every", "20"]
    first = subprocess.Popen(command(*words), cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (run / "checkpoints/20/manifest.json").exists() and time.monotonic() < end:
        time.sleep(0.05)
    second = subprocess.run(command(*words), cwd=folder, env=environment(), capture_output=True, text=True)
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert f"error: {run} is in use by process {first.pid} on " in second.stderr
    first.kill()
    first.communicate()
    assert (run / NAME).exists()
    again = command("--run-dir", str(run), "--training.steps", "1000000", "--checkpoint.every", "0")
    third = subprocess.Popen(again, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True)
    for line in third.stdout:
        if "attention" in line:
            break
        assert "taken over" not in line or f"held by process {first.pid} " in line
    time.sleep(1)
    third.terminate()
    third.communicate(timeout=60)
    assert not (run / NAME).exists(), "a signal leaves nothing behind"
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert checkpoints.newest_restorable()[1] == []


def test_a_start_that_is_refused_leaves_no_lock(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    (tmp_path / "mine.txt").write_text("precious")
    from artifex.config import Config

    with pytest.raises(ValueError, match="holds no run"):
        train.train(Config.from_dict(SECTIONS), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    RunLock(tmp_path).take()
