"""Memory of a CPU's programs in pages of 2 MiB, where Linux gives them to those who ask.

XLA for CPUs takes from malloc what a step needs beside its state, and gives it back after the step, so that Linux makes
its pages anew each time: 65,000 of 4 KiB for the quickstart, a quarter of its step. With huge pages steps take 0.67 to
0.95 of the time (docs/benchmarks.md). glibc asks for them where a variable says so when a process begins, so a command
that trains begins once more with it. Imports no JAX.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
SINCE = (2, 35)  # of glibc
OFFERED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
DEBUGGERS = ("pydevd", "debugpy")
DEVICES, ACCELERATORS = Path("/dev"), ("nvidia[0-9]*", "kfd", "accel*", "vfio/[0-9]*")


def environment() -> dict[str, str]:
    """What the environment of a process that computes on CPUs has to have besides; nothing where it has no use: pages
    are huge anyway or never, another C library, an accelerator, or the variable says something of it already."""
    given = os.environ.get(VARIABLE, "")
    if TUNABLE in given or _glibc() < SINCE or not _on_request() or _has_accelerator():
        return {}
    return {VARIABLE: ":".join(filter(None, [given, f"{TUNABLE}=1"]))}


def begin_again() -> None:
    """Replace this process, in its first lines, by the same command with `environment()`, unless a debugger has it."""
    debugged = sys.gettrace() is not None or any(name in sys.modules for name in DEBUGGERS)
    if (wanted := environment()) and sys.executable and not debugged:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)


def _glibc() -> tuple[int, ...]:
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        return tuple(int(part) for part in version.split(".")) if name == "glibc" else ()
    except (AttributeError, ValueError, OSError):
        return ()


def _on_request() -> bool:
    try:
        return "[madvise]" in OFFERED.read_text()
    except OSError:
        return False


def _has_accelerator() -> bool:
    """Whether JAX may compute on something else than CPUs, without importing it."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms != "cpu"
    return any(any(DEVICES.glob(pattern)) for pattern in ACCELERATORS)
