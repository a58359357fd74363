"""How Orbax writes arrays here: in the background, without its own barriers, and without its own noise."""

from __future__ import annotations

import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from artifex.scaling import processes

_ORBAX_LOG = logging.getLogger("artifex.orbax")
_ORBAX_FOLDER = os.path.join(os.path.dirname(ocp.__file__), "")


class _Checkpointer(ocp.AsyncCheckpointer):
    """Orbax's, of which the processes meet by `meet` alone. Its own barriers before it writes are collectives, in which
    the others would wait for one that has failed."""

    def __init__(self, meet: Callable[..., None], **options: Any) -> None:
        alone = ocp.options.MultiprocessingOptions(active_processes={jax.process_index()})
        super().__init__(_handler(), multiprocessing_options=alone, **options)
        self._meet = meet

    async def create_temporary_path(self, temporary_path: Any) -> None:
        if processes.is_first():
            await temporary_path.create()
        if processes.count() > 1:
            self._meet(key="folder", timeout_ms=processes.LONG * 1000)


def checkpointer(meet: Callable[..., None]) -> ocp.AsyncCheckpointer:
    # In the background Orbax makes no folder and keeps no notes: its writers would wait ten minutes for a folder that
    # cannot be made, and so would the exit; and notes that fail would be told to the next save.
    return _Checkpointer(
        meet,
        async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False, barrier_sync_fn=meet),
        checkpoint_metadata_store=ocp.metadata.metadata_store(enable_write=True, blocking_write=True),
    )


def _handler() -> ocp.PyTreeCheckpointHandler:
    # One folder of raw Zarr files per array: a part of a tree is read and verified without the rest, and writing is
    # twice to four times as fast as OCDBT. Orbax's own file of shardings is left out: they come from the target.
    # Replicated arrays are written in slices by all devices that hold them, but small ones not: each slice is a file.
    arrays = ocp.type_handlers.ArrayHandler(
        enable_write_sharding_file=False, min_slice_bytes_for_replica_parallel=1 << 20
    )
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=True, use_compression=False, type_handler_registry=registry
    )


def _orbax_to_debug(record: logging.LogRecord) -> bool:
    """A filter that turns what Orbax logs, and what asyncio logs of its lost writes, into DEBUG of "artifex.orbax"."""
    trace = record.exc_info[2] if record.exc_info else None
    files = [record.pathname, *(frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace))]
    if not any(file.startswith(_ORBAX_FOLDER) for file in files):
        return True
    _ORBAX_LOG.debug("%s", record.getMessage(), exc_info=record.exc_info)
    return False


def _drop_stragglers(report: Callable[[Any], object], event: Any) -> None:
    """An unraisable hook that ignores native threads calling back into an event loop that Orbax has closed."""
    caller = event.exc_traceback and event.exc_traceback.tb_frame.f_code.co_name
    if not (event.exc_type is RuntimeError and caller == "call_soon_threadsafe"):
        report(event)


# When one write fails, Orbax logs several stack traces and leaves the other writes to report to nobody. `wait` raises
# the failure in a sentence; these keep the rest of it off the terminal, and nothing else.
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_orbax_to_debug)
sys.unraisablehook = functools.partial(_drop_stragglers, sys.unraisablehook)
