"""Before a manifest counts, every file and every folder of its step is on the disk: a power cut leaves no half step."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import pytest

from artifex.scaling import manifest
from artifex.scaling.checkpoints import Checkpoints

TREE = {"w": jnp.ones((4,)), "part": {"k": jnp.ones((3, 2))}}


def inside(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")} - {manifest.NAME}


def test_every_file_and_folder_is_synced_before_the_manifest_and_names_after_each_rename(tmp_path, monkeypatch):
    synced: list[str] = []
    fsync, renamed = os.fsync, Path.rename

    def note(descriptor: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(
        Path, "rename", lambda path, to: (synced.append(f"rename to {Path(to).name}"), renamed(path, to))
    )
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, TREE, {})
    attempt = "checkpoints/1.saving-"
    written = next(i for i, name in enumerate(synced) if name.endswith(manifest.NAME))
    before = {re.sub(rf"^{attempt}\d+/", "", name) for name in synced[:written] if name.startswith(attempt)}
    assert before >= inside(tmp_path / "checkpoints/1")
    # the manifest, its folder, the name of the step, the name of its folder
    assert [re.sub(r"saving-\d+", "saving", name) for name in synced[written:]] == [
        f"checkpoints/1.saving/{manifest.NAME}",
        "checkpoints/1.saving",
        "rename to 1",
        "checkpoints",
        ".",
    ]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="the kernel is asked by strace")
def test_the_kernel_saw_each_file_synced_after_it_was_last_written(tmp_path):
    program = """
        import sys
        import jax.numpy as jnp
        from artifex.scaling.checkpoints import Checkpoints

        with Checkpoints(sys.argv[1]) as checkpoints:
            checkpoints.save(1, {"w": jnp.ones((4,)), "part": {"k": jnp.ones((3, 2))}}, {})
    """
    calls = "trace=write,writev,pwrite64,pwritev,fsync,fdatasync,rename,renameat,renameat2"
    words = ["strace", "-f", "-y", "-e", calls, "-o", str(tmp_path / "trace"), sys.executable, "-c"]
    subprocess.run([*words, textwrap.dedent(program), str(tmp_path / "run")], check=True, timeout=120)
    wrote, synced, manifest_at = {}, {}, None
    for at, line in enumerate((tmp_path / "trace").read_text(errors="replace").splitlines()):
        found = re.search(r"\b(\w+)\(\d+<([^>]*)>", line)
        if found is None or ".saving-" not in found[2]:
            continue
        name = re.sub(r"^.*\.saving-\d+/?|\.orbax-checkpoint-tmp|\.__lock$", "", found[2])
        if "write" in found[1]:
            wrote[name] = at
            manifest_at = at if name == manifest.NAME and manifest_at is None else manifest_at
        elif "sync" in found[1]:
            synced[name] = at
    step = tmp_path / "run/1"
    assert manifest_at is not None and all(synced[name] < manifest_at for name in inside(step))
    assert all(wrote[name] < synced[name] for name in inside(step) if (step / name).is_file())
