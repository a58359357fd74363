"""A process that saves step 1, meets a fault while it saves step 2, mends it, and saves step 3.

`python saving_child.py FOLDER WHERE WHAT`: at the point WHERE the thing WHAT happens to the disk. Prints a line for
each save; FOLDER/checkpoints holds the steps. A disk of its own (WHAT is "read-only" or "full") is mounted by the test.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from artifex.scaling import checkpoints, manifest

FOLDER = Path(sys.argv[1]) / "checkpoints"
WHERE, WHAT = sys.argv[2:]
LARGE = np.ones((1024, 1024), np.float32)


def harm() -> None:
    """What happens to the disk."""
    if WHAT == "read-only":
        remount = ["mount", "-o", "remount,ro", FOLDER.parent]
        while subprocess.run(remount, stderr=subprocess.DEVNULL, check=False).returncode:  # a file is being written
            pass
    elif WHAT == "full":
        with (FOLDER.parent / "filler").open("wb") as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
                    file.flush()
            except OSError:
                pass
    else:
        attempt = next(path for path in FOLDER.iterdir() if ".saving-" in path.name)
        attempt.rename(FOLDER.parent / "away")
        if WHAT == "file":
            attempt.write_text("")


def mend() -> None:
    """The disk is well again; what the fault left stays."""
    if WHAT == "read-only":
        subprocess.run(["mount", "-o", "remount,rw", FOLDER.parent], check=True)
    elif WHAT == "full":
        (FOLDER.parent / "filler").unlink()


def once(owner: object, name: str, *, before: bool, when: str = "") -> None:
    """`harm` at the next call of a function of `owner`, for a path with `when` in it, just before or after it runs."""
    function = getattr(owner, name)

    def call(*args, **kwargs):
        hit = when in str(args[0])
        if hit:
            setattr(owner, name, function)
        if hit and before:
            harm()
        done = function(*args, **kwargs)
        if hit and not before:
            harm()
        return done

    setattr(owner, name, call)


def arm(opened: checkpoints.Checkpoints) -> None:
    if WHERE == "before Orbax makes its folder":
        once(Path, "mkdir", before=False, when=".saving-")
    elif WHERE == "while the arrays are written":
        once(opened._orbax, "save", before=False)
    elif WHERE == "before the manifest":
        once(manifest, "seal", before=True)
    elif WHERE == "before the step gets its name":
        once(manifest, "seal", before=False)
    else:
        raise SystemExit(f"no point {WHERE!r}")


def state(step: int) -> dict:
    return {"n": jnp.asarray(step), "w": jnp.full((4,), float(step)), **{f"a{i}": jnp.asarray(LARGE) for i in range(4)}}


with checkpoints.Checkpoints(FOLDER, keep=1) as opened:
    opened.save(1, state(1), {})
    opened.wait()
    arm(opened)
    start = time.monotonic()
    try:
        opened.save(2, state(2), {})
        opened.wait()
    except checkpoints.CheckpointError as error:
        print(f"{time.monotonic() - start:.1f} s: {error}", flush=True)
    print("whole:", opened.newest_restorable(), flush=True)
    if os.environ.get("MEND"):
        mend()
        opened.save(3, state(3), {})
        opened.wait()
        print("whole:", opened.newest_restorable(), flush=True)
print(f"leaves at {time.time()}", flush=True)
