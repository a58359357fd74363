"""Compiled programs that a run keeps: its second start reads them where the first one compiled.

The key is JAX's own: the program with its shardings, jaxlib, the platform, XLA's flags and options; and of this machine
what XLA compiles for. So a run with another plan, and one on another kind of machine, finds nothing and compiles.

An entry is machine code, and a run's folder may come from anywhere. So each entry is signed with a key that this user
alone has (HMAC-SHA256, RFC 2104): what somebody else wrote is not loaded, nor what is damaged or half there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax._src import compilation_cache as of_jax
from jax._src import config as settings
from jax._src.compilation_cache_interface import CacheInterface

LIMIT = 2 * 2**30  # bytes that a folder of programs may take
ENDING, NOTES, WRITING = ".program", ".said", ".writing"
STALE = 3_600.0  # seconds after which a file that was begun and never finished is nobody's
SIGNED = 32  # bytes
SECRET = "compiled-programs.key"


class _Asked(threading.local):
    """Of the program that a thread asked for last its key, and whether it was there."""

    key, hit = "", False


class CompileCache(CacheInterface):
    """The programs in `folder`, found and kept while the block runs: `with cache: jax.jit(f).lower(x).compile()`.

    Several threads may be within, and a block may lie in another.
    What is compiled waits in memory until `begin`, so that a start which fails, a replay or a look at a run writes
    nothing. With `folder` None, and where a folder of JAX's own is set (`JAX_COMPILATION_CACHE_DIR`), it does nothing.
    Whatever is wrong with the folder is said once, by `say`, and the run goes on and compiles.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, say: Callable[[str], None], *, limit: int = LIMIT):
        self._path = Path(folder or ".")
        self.on = folder is not None and not settings.compilation_cache_dir.value
        self.say, self.limit = say, limit
        self.found, self.missed, self.begun = 0, 0, False
        self._waiting: dict[str, bytes] = {}
        self._asked = _Asked()
        self._within, self._entering = 0, threading.Lock()
        self._before: tuple[Any, float] = (None, 0.0)
        self._warned = False

    def __enter__(self) -> CompileCache:
        with self._entering:
            if self.on and not self._within:
                self._before = of_jax._cache, settings.persistent_cache_min_compile_time_secs.value
                of_jax._cache = self
                jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            self._within += 1
        return self

    def __exit__(self, *_: object) -> None:
        with self._entering:
            self._within -= 1
            if self.on and not self._within:
                of_jax._cache, least = self._before
                jax.config.update("jax_persistent_cache_min_compile_time_secs", least)

    def get(self, key: str) -> bytes | None:
        """The program of that key; None where there is none, or none that this user has written whole."""
        asked = self._asked
        asked.key, asked.hit = key, False
        file = self._file(key)
        try:
            content = file.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            content = None
        except OSError as error:
            content = None
            self._warn(f"{file} cannot be read: {error}")
        value = None if content is None else self._checked(file, content)
        asked.hit = value is not None
        self.found, self.missed = self.found + asked.hit, self.missed + (not asked.hit)
        if asked.hit:
            with contextlib.suppress(OSError):  # the one that was used last goes last
                os.utime(file)
        return value

    def put(self, key: str, value: bytes) -> None:
        """Keep a program, in place of what may be there."""
        if len(value) > self.limit:
            return
        self._waiting[self._file(key).name] = value
        if self.begun:
            self._write()

    def begin(self) -> None:
        """Write from now on: what waits, and what comes."""
        self.begun = True
        self._write()

    def said(self, words: Iterable[str]) -> tuple[str, ...]:
        """What the compiler said of the program this thread asked for last: now, or when that was compiled."""
        words = tuple(words)
        if not self._asked.key:
            return words
        name = self._file(self._asked.key).with_suffix(NOTES).name
        if not self._asked.hit:
            if words:
                self._waiting[name] = json.dumps(words).encode()
            return words
        try:
            known = self._checked(self._path / name, (self._path / name).read_bytes())
        except OSError:
            return words
        return words if known is None else tuple(json.loads(known))

    def _file(self, key: str) -> Path:
        return self._path / f"{key}-{machine()}{ENDING}"

    def _checked(self, file: Path, content: bytes) -> bytes | None:
        """What a file holds, below its signature; None, and a line, where that is not this user's."""
        signature, value = content[:SIGNED], content[SIGNED:]
        secret = self._secret()
        if secret is not None and hmac.compare_digest(signature, _sign(secret, file.name, value)):
            return value
        if secret is not None:
            self._warn(f"{file} is damaged, or not written by this user: compiled anew")
        return None

    def _write(self) -> None:
        """Write what waits, each file whole or not at all, and let those go that were not used for longest."""
        if not self._waiting or (secret := self._secret()) is None:
            return
        waiting, self._waiting = self._waiting, {}
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            for name, value in waiting.items():
                whole = self._path / f".{name}-{os.getpid()}{WRITING}"
                try:
                    whole.write_bytes(_sign(secret, name, value) + value)
                    whole.replace(self._path / name)
                finally:
                    whole.unlink(missing_ok=True)
            self._make_room()
        except OSError as error:
            self._warn(f"compiled programs cannot be kept in {self._path}: {error}; the next start compiles again")

    def _make_room(self) -> None:
        now, files = time.time(), []
        for file, stat in _files(self._path):
            if file.name.endswith(WRITING) and now - stat.st_mtime > STALE:
                file.unlink(missing_ok=True)
            elif file.suffix in (ENDING, NOTES):
                files.append((stat.st_mtime, stat.st_size, file))
        used = sum(size for _, size, _ in files)
        for _, size, file in sorted(files):
            if used <= self.limit:
                return
            file.unlink(missing_ok=True)
            used -= size

    def _secret(self) -> bytes | None:
        try:
            return secret_key()
        except (OSError, RuntimeError) as error:
            self._warn(f"no key to sign compiled programs with: {error}; each start compiles again")
            return None

    def _warn(self, words: str) -> None:
        if not self._warned:
            self.say(f"warning: {words}")
        self._warned = True


def said(words: Iterable[str]) -> tuple[str, ...]:
    """What the compiler said of the program that it was just asked for, also where that was found in a cache."""
    cache = of_jax._cache
    return cache.said(words) if isinstance(cache, CompileCache) else tuple(words)


def secret_key() -> bytes:
    """This user's key, made at its first use. Raises `OSError` where it can be neither read nor made."""
    file = Path.home() / ".cache/artifex" / SECRET
    with contextlib.suppress(FileNotFoundError):
        if len(key := file.read_bytes()) == SIGNED:
            return key
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_name(f".{SECRET}-{os.getpid()}")
    descriptor = os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as opened:
        opened.write(secrets.token_bytes(SIGNED))
    try:
        os.link(whole, file)
    except FileExistsError:  # another process was first
        pass
    finally:
        whole.unlink()
    return file.read_bytes()


@functools.cache
def machine() -> str:
    """Of this machine what XLA compiles for, beside what JAX's key has: the processor's kind and how many there are.

    A program for more than a processor has would end the process.
    """
    lines = []
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        lines = [line for line in file if line.startswith(("flags", "Features", "model name"))][:2]
    threads = os.environ.get("NPROC"), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    told = (platform.machine(), platform.system(), os.cpu_count(), *threads, *lines, jax.__version__)
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def _sign(secret: bytes, name: str, value: bytes) -> bytes:
    """By its name too: a file under another's name is another's."""
    return hmac.new(secret, name.encode() + b"\n" + value, hashlib.sha256).digest()


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process let it go
            yield file, file.stat()
