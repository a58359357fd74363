"""Huge pages for what a CPU computes: who asks for them, and that a command is the same one when it begins again."""

import json
import os
import subprocess
import sys

import pytest

from artifex import host_memory

PROBE = """
import os, sys
if __name__ == "__main__":
    from pathlib import Path
    from artifex import host_memory
    host_memory.OFFERED, host_memory.SINCE = Path({offered!r}), ()
    print(os.getpid(), flush=True)
    host_memory.begin_again()
    import json
    print(json.dumps([sys.argv[1:], os.environ.get("GLIBC_TUNABLES"), sys.flags.dev_mode, os.getppid(), input()]))
"""
TOUCH = """
import ctypes, resource
size, library = 64 << 20, ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
library.memset(library.malloc(size), 1, size)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Linux with huge pages on request, a glibc that can ask, CPUs alone, and nothing said; `set` changes a thing."""
    offered, devices = tmp_path / "enabled", tmp_path / "dev"
    devices.mkdir()
    offered.write_text("always [madvise] never\n")
    monkeypatch.setattr(host_memory, "OFFERED", offered)
    monkeypatch.setattr(host_memory, "DEVICES", devices)
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.35")
    for name in ("GLIBC_TUNABLES", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    return offered, devices


def test_huge_pages_are_asked_for_beside_what_else_is_set(machine, monkeypatch):
    assert host_memory.environment() == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert host_memory.environment() == {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize(
    "case", ["always huge", "never", "no Linux", "old glibc", "musl", "already said", "a TPU asked for", "a GPU"]
)
def test_nothing_is_asked_for_where_it_has_no_use(case, machine, monkeypatch):
    offered, devices = machine
    match case:
        case "always huge":
            offered.write_text("[always] madvise never\n")
        case "never":
            offered.write_text("always madvise [never]\n")
        case "no Linux":
            offered.unlink()
        case "old glibc":
            monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.31")
        case "musl":
            monkeypatch.setattr(os, "confstr", lambda name: None)
        case "already said":
            monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
        case "a TPU asked for":
            monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
        case "a GPU":
            (devices / "nvidia0").touch()
    assert host_memory.environment() == {}


def test_a_command_begins_again_once_as_the_same_process(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    (tmp_path / "probe.py").write_text(PROBE.format(offered=str(tmp_path / "enabled")))
    command = [sys.executable, "-X", "dev", "-m", "probe", "--name", "two words"]
    done = subprocess.run(command, cwd=tmp_path, input="a line\n", capture_output=True, text=True, check=True)
    first, again, told = done.stdout.splitlines()
    assert first == again
    assert json.loads(told) == [["--name", "two words"], "glibc.malloc.hugetlb=1", True, os.getpid(), "a line"]


@pytest.mark.skipif(not host_memory._on_request(), reason="huge pages on request are not what this system offers")
def test_memory_that_is_asked_for_so_comes_in_few_pages(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    wanted = host_memory.environment()
    assert wanted
    faults = [
        int(subprocess.run([sys.executable, "-c", TOUCH], env=env, capture_output=True, text=True, check=True).stdout)
        for env in (dict(os.environ), os.environ | wanted)
    ]
    assert faults[0] >= (64 << 20) / 4096 and faults[1] < faults[0] / 8, faults
