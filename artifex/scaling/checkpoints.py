"""Checkpoints: one self-describing folder per step, checked by checksums, opened under any mesh and sharding.

    <folder>/<step>/arrays/<path.of.the.array>/...   one Zarr array for each leaf, written by Orbax
    <folder>/<step>/manifest.json                    written last, see `artifex.scaling.manifest`
    <folder>/<step>.saving-<n>/                      a save under way; renamed to <step> when it is complete

A tree is stored by the paths of its leaves ("params/layers/up/kernel", "optimizer/0/mu/..."), not by its classes.
`folder` is a local or a shared file system that every process sees.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import importlib.metadata
import itertools
import logging
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

import artifex
from artifex.scaling import leaves, manifest, meeting, processes, straight
from artifex.scaling.manifest import CheckpointError
from artifex.scaling.orbax_writer import checkpointer
from artifex.scaling.retention import Retention

__all__ = ["CheckpointError", "Checkpoints"]

_ARRAYS = "arrays"
_PATIENCE = 600.0  # seconds that a process which failed has for the others' part of the save, as Orbax gives them
_ATTEMPTS = itertools.count(1)  # alike in all processes, for they save alike
_LOG = logging.getLogger("artifex")


class Checkpoints:
    """The steps saved in one folder, of which the newest `keep` stay, or those of a `Retention`. Close it, or use it as
    a context manager: a program that ends without closing loses the save under way.

    Reading changes nothing in the folder. `save` removes what a killed save left behind, and renames steps that do not
    come before the new one (to "<step>.left-<n>"): a run that went on from an earlier step has left them.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int | Retention = 3, asynchronous: bool = True) -> None:
        self.retention = Retention(keep) if isinstance(keep, int) else keep
        self.folder = Path(folder).absolute()
        self.asynchronous = asynchronous
        self._last = -1  # the step this object saved last
        self._pending: tuple[int, Future[None]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._orbax = checkpointer(self._meet)
        atexit.register(self.close)  # so that a lost save is an error at exit, not silence

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the save under way and let the threads go. Raises what `wait` raises."""
        atexit.unregister(self.close)
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def save(self, step: int, tree: Any, metadata: dict[str, Any]) -> None:
        """Save a pytree of (sharded) `jax.Array`s and, beside it, what JSON gives back unchanged.

        Returns once the arrays are copied to the host; they may be donated then. Files are written, hashed and listed
        in the background. Steps ascend. Raises `ValueError` or `TypeError` for a tree or metadata that cannot be kept,
        and `CheckpointError` if this or the previous save failed.
        """
        self.wait()
        if step <= self._last:
            raise ValueError(f"step {step} is not above {self._last}; steps count up, from 0")
        arrays = leaves.by_path(tree)
        leaves.check_arrays(arrays)
        manifest.check_metadata(metadata)
        body = {
            "step": step,
            "versions": _versions(),
            "metadata": copy.deepcopy(metadata),
            "arrays": {path: {"shape": list(x.shape), "dtype": str(x.dtype)} for path, x in arrays.items()},
        }
        # A folder of its own for each attempt: the writers of a failed one may still be busy in theirs.
        attempt = self.folder / f"{step}.saving-{next(_ATTEMPTS)}"
        problem = None
        if processes.is_first():
            try:
                self._sweep()
                self.set_aside(step)
                attempt.mkdir(parents=True)
            except OSError as error:
                problem = self._reason(error)
        if problem := processes.first_says(problem and meeting.by_this(problem)):
            raise self._unsaved(step, problem)
        self._meetings = meeting.Meetings(attempt.name)
        ended = None
        try:
            self._orbax.save(attempt / _ARRAYS, args=ocp.args.PyTreeSave(leaves.nested(arrays)))
        except OSError as error:
            self._meetings.fails(self._reason(error), _PATIENCE)
            self._orbax = checkpointer(self._meet)  # what is left of the failed save is not told to the next
            ended = Future[None]()
            ended.set_exception(error)
        self._pending = step, ended or self._thread.submit(self._finish, step, attempt, body)
        # one that failed at once waits here with the others, whose part of it ends soon
        if any(processes.all_say(ended and True)) or not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Return when no save is under way. Raises `CheckpointError`, once, if it failed; what it left is removed."""
        if self._pending is None:
            return
        step, future = self._pending
        error = future.exception()
        self._pending = None
        # told and not looked up: a shared file system may show a new folder to another process a minute later
        reasons = processes.all_say(error and self._by_whom(error))
        if reason := next(filter(None, reasons), None):
            if processes.is_first():
                self._sweep()
            raise self._unsaved(step, reason) from error
        self._last = step

    def has_ended(self) -> bool | None:
        """Whether this process's part of the save under way has ended, well or not; None where there is none."""
        return self._pending and self._pending[1].done()

    def steps(self) -> list[int]:
        """The complete steps, ascending: manifest valid, every file there and of the right size."""
        return [step for step in self.folders() if self._is_complete(step)]

    def latest(self) -> int | None:
        """The newest complete step."""
        return max(self.steps(), default=None)

    def what_stays(self) -> str:
        """A clause on what is saved, as the file system has it now."""
        newest = self.latest()
        return f"no step is saved in {self.folder}" if newest is None else f"step {newest} is saved"

    def newest_restorable(self) -> tuple[int | None, list[str]]:
        """The newest step whose every file matches its checksum, and a sentence on each newer one that was skipped."""
        self.wait()
        skipped = []
        for step in reversed(processes.first_says(self.folders())):
            problem = self._damage(step)
            if problem is None:
                return step, skipped
            skipped.append(f"step {step}: {problem}")
        return None, skipped

    def metadata(self, step: int) -> dict[str, Any]:
        """What `save` was given beside the arrays. Raises `CheckpointError` if the step has no valid manifest."""
        return self._read(step)["metadata"]

    def versions(self, step: int) -> dict[str, str]:
        """The versions that wrote `step`, by name. Raises as `metadata`."""
        return self._read(step).get("versions", {})

    def arrays(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every array of `step` by its path, such as "params/embed/table"; reads only the manifest.

        Raises `CheckpointError` if the step has no valid one.
        """
        saved = self._read(step)["arrays"].items()
        return {path: jax.ShapeDtypeStruct(tuple(entry["shape"]), entry["dtype"]) for path, entry in saved}

    def restore(self, step: int, target: Any, *, under: str = "", part: bool = False) -> Any:
        """The arrays of `step`, bit-equal, in the tree and the shardings of `target`.

        `target` is a pytree of `jax.ShapeDtypeStruct` with a sharding, or of arrays like the wanted ones. With `under`
        it stands for the part of the saved tree below that path ("params"), and only that part is read and verified.
        With `part` it may also leave out arrays, which then are neither read nor verified.
        Nothing is cast, dropped or filled in: `ValueError` lists the first leaves that differ. `CheckpointError` names
        the file that is missing or damaged.
        """
        self.wait()
        wanted = leaves.by_path(target, under)
        prefix = f"{under}/"
        body = self._read(step)
        arrays = {
            path: entry
            for path, entry in body["arrays"].items()
            if not under or path == under or path.startswith(prefix)
        }
        if part:
            arrays = {path: entry for path, entry in arrays.items() if path in wanted}
        leaves.check_target(step, arrays, wanted)
        found, problem = {}, None
        try:
            found = straight.read(self.folder / str(step), body, wanted)
        except CheckpointError as error:
            problem = str(error)
        others = {path: x for path, x in wanted.items() if path not in found}
        if problem := self._first_of_all(problem or self._damage_of_share(step, set(others))):
            raise self._refusal(step, problem)
        found |= self._read_by_orbax(step, others) if others else {}
        return jax.tree.unflatten(jax.tree.structure(target), [found[path] for path in wanted])

    def _read_by_orbax(self, step: int, wanted: dict[str, Any]) -> dict[str, jax.Array]:
        how = {
            path: ocp.ArrayRestoreArgs(jax.Array, dtype=x.dtype, sharding=x.sharding, global_shape=x.shape)
            for path, x in wanted.items()
        }
        restored = self._orbax.restore(
            self.folder / str(step) / _ARRAYS,
            args=ocp.args.PyTreeRestore(leaves.nested(wanted), restore_args=leaves.nested(how), partial_restore=True),
        )
        return leaves.by_path(restored)

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barriers: where one process has failed, the others need not wait for it."""
        self._meetings.come(timeout_ms / 1000)

    def _finish(self, step: int, attempt: Path, body: dict[str, Any]) -> None:
        # The background thread: Orbax's own barriers have let every process finish writing when it returns.
        try:
            self._orbax.wait_until_finished()
        except BaseException as error:
            self._meetings.fails(self._reason(error), _PATIENCE)
            raise
        self._meetings.end()
        if processes.is_first():
            homes = {path: attempt / _ARRAYS / leaves.array_folder(path) for path in body["arrays"]}
            gone = [path for path, home in homes.items() if not (home / "zarr.json").is_file()]
            if gone:  # Orbax makes a folder again that was moved away while it writes
                raise CheckpointError(
                    f"{len(gone)} of {len(homes)} arrays, such as {gone[0]}, vanished while it was saved"
                )
            manifest.seal(attempt, body)
            attempt.rename(self.folder / str(step))
            manifest.sync(self.folder)
            manifest.sync(self.folder.parent)  # it may have been made for the first step
            if not self._is_complete(step):
                raise CheckpointError(f"{step} was changed while it was saved")
            values = {known: self.retention.value(self.metadata(known)) for known in self.steps() if known <= step}
            for old in self.retention.gone(values, self.folders()):
                _remove(self.folder / str(old))

    def _sweep(self) -> None:
        for leftover in self.folder.glob("*.saving-*"):
            _LOG.info("removing %s: its save was never finished", leftover)
            _remove(leftover)

    def set_aside(self, step: int) -> None:
        """Rename the folders of `step` and of all after it, to "<step>.left-<n>"; none of them is a step any more."""
        if not processes.is_first():
            return
        for known in self.folders():
            if known >= step:
                names = (f"{known}.left-{n}" for n in itertools.count(1))
                aside = next(name for name in names if not (self.folder / name).exists())
                _LOG.warning("%s: renaming step %d to %s, this run goes on from before it", self.folder, known, aside)
                (self.folder / str(known)).rename(self.folder / aside)

    def folders(self) -> list[int]:
        """Every step that has a folder, complete or not, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name))

    def _read(self, step: int) -> dict[str, Any]:
        if step not in self.folders():
            raise CheckpointError(f"there is no step {step} in {self.folder}; complete are {self.steps() or 'none'}")
        try:
            return manifest.read(self.folder / str(step), step)
        except CheckpointError as error:
            raise self._refusal(step, str(error)) from None

    def _is_complete(self, step: int) -> bool:
        folder = self.folder / str(step)
        try:
            files = manifest.read(folder, step)["files"]
        except CheckpointError:
            return False
        return not any(manifest.wrong_size(folder, name, entry) for name, entry in files.items())

    def _damage(self, step: int, paths: set[str] | None = None) -> str | None:
        """Read the files of the arrays `paths` (None: all): what is first found to differ from what was saved."""
        return self._first_of_all(self._damage_of_share(step, paths))

    def _first_of_all(self, problem: str | None) -> str | None:
        # all refuse or none: one that went on alone would wait for the others
        return next(filter(None, processes.all_say(problem)), None)

    def _damage_of_share(self, step: int, paths: set[str] | None) -> str | None:
        """`_damage` by this process's share of the files."""
        folder = self.folder / str(step)
        try:
            body = manifest.read(folder, step)
        except CheckpointError as error:
            return str(error)
        spared = {leaves.array_folder(path) for path in body["arrays"] if paths is not None and path not in paths}
        files = [(name, entry) for name, entry in body["files"].items() if spared.isdisjoint(name.split("/")[1:2])]
        share = range(jax.process_index(), len(files), jax.process_count())
        with ThreadPoolExecutor() as pool:
            return next(filter(None, pool.map(lambda i: manifest.damage(folder, *files[i]), share)), None)

    def _by_whom(self, error: BaseException) -> str:
        reason = self._reason(error)
        return reason if isinstance(error, meeting.OtherFailed) else meeting.by_this(reason)

    def _reason(self, error: BaseException) -> str:
        # The first line, without the notes that TensorStore appends ("[os_error_code='28'] [source locations=...]").
        return re.split(r"\n| \[[a-z_ ]+=", str(error))[0].replace(f"{self.folder}/", "") or type(error).__name__

    def _unsaved(self, step: int, reason: str) -> CheckpointError:
        return CheckpointError(
            f"step {step} was not saved in {self.folder}: {reason}; complete steps, untouched: {self.steps() or 'none'}"
        )

    def _refusal(self, step: int, problem: str) -> CheckpointError:
        earlier = max((known for known in self.steps() if known < step), default=None)
        remedy = "no earlier step is complete: start anew" if earlier is None else f"restore step {earlier} instead"
        return CheckpointError(f"step {step} in {self.folder} cannot be restored: {problem}; {remedy}")


@functools.cache  # looking them up holds the loop for 3 ms
def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "orbax-checkpoint")}
    return {"artifex": artifex.__version__, **versions}


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):  # the manifest first: a step half removed is not complete
        (folder / manifest.NAME).unlink(missing_ok=True)
    if folder.is_dir():
        shutil.rmtree(folder, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            folder.unlink(missing_ok=True)
    if folder.exists():
        _LOG.warning("could not remove %s; remove it by hand", folder)
