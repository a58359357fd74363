"""A save that fails, in a process of its own, is one sentence; the process goes on, or ends, within ten seconds."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHILD = Path(__file__).parent / "saving_child.py"
LIMIT = 10.0  # seconds that a failed save may take, and the exit after it
START = 60.0  # seconds to import and to save twice on a busy machine

POINTS = (
    "before Orbax makes its folder",
    "while the arrays are written",
    "before the manifest",
    "before the step gets its name",
)
UNSHARE = ("unshare", "--mount", "--propagation", "private", "sh", "-ec")
MOUNT = 'mount -t tmpfs -o size=48m none "$1"; shift; exec "$@"'


def can_mount(folder: Path) -> bool:
    asked = [*UNSHARE, MOUNT, "sh", str(folder), "true"]
    try:
        return subprocess.run(asked, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def run(folder: Path, where: str, what: str, *, mend: bool = False) -> list[str]:
    """What the child prints, line by line, once it was checked that it ended in time and in peace."""
    words = [sys.executable, str(CHILD), str(folder), where, what]
    if what in ("read-only", "full"):
        if not can_mount(folder):
            pytest.skip("a disk that fails needs the right to mount one")
        words = [*UNSHARE, MOUNT, "sh", str(folder), *words]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "MEND": "1" if mend else ""}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=START, check=False)
    ended = time.time()
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    *lines, leaves = done.stdout.splitlines()
    assert ended - float(leaves.removeprefix("leaves at ")) < LIMIT
    return lines


def check(lines: list[str]) -> None:
    seconds, sentence = re.fullmatch(r"([0-9.]+) s: (step 2 was not saved in .*untouched: \[1\])", lines[0]).groups()
    assert float(seconds) < LIMIT and len(sentence) < 600
    assert lines[1].startswith("whole: (1, [")  # after it perhaps what stands there in the name of step 2


def test_a_folder_that_becomes_a_file_before_orbax_writes_does_not_hold_the_process(tmp_path):
    check(run(tmp_path, POINTS[0], "file"))


def test_after_a_read_only_disk_is_mended_the_next_save_counts(tmp_path):
    lines = run(tmp_path, POINTS[0], "read-only", mend=True)
    check(lines)
    assert lines[2:] == ["whole: (3, [])"]


HARMLESS = {("gone", POINTS[0]), ("full", POINTS[3])}  # Orbax makes its folder's parents; a rename needs no room


@pytest.mark.slow
@pytest.mark.parametrize("what", ["file", "gone", "read-only", "full"])
@pytest.mark.parametrize("where", POINTS)
def test_every_failed_save_ends_in_time_and_costs_no_earlier_step(tmp_path, where, what):
    lines = run(tmp_path, where, what, mend=True)
    if (what, where) in HARMLESS:
        assert lines == ["whole: (2, [])", "whole: (3, [])"]
    else:
        check(lines)
        assert lines[2:] == ["whole: (3, [])"]
