"""A run before its step is compiled: configuration -> plan -> mesh -> data -> placement -> state, or what was saved.

In the order in which mistakes are cheap. What takes time to import is imported inside the functions.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from artifex.scaling import processes

if TYPE_CHECKING:
    from artifex.config import Config
    from artifex.scaling.checkpoints import Checkpoints
    from artifex.scaling.plan import Plan
    from artifex.training.compile_cache import CompileCache
    from artifex.training.loop import Run
    from artifex.training.making import Made
    from artifex.training.run_folder import RunFolder
    from artifex.training.run_lock import RunLock
    from artifex.training.state import Blueprint
    from artifex.training.task import Task


def open_run(
    config: Config,
    run_dir: str | Path,
    *,
    start_anew: bool = False,
    take_over: bool = False,
    other_batch_size: bool = False,
    replay: int | None = None,
    began: float | None = None,
) -> Run:
    """Everything before the step is compiled, in the order in which mistakes are cheap. Writes nothing to the folder
    but what can be made again, to `cache/`: a tokenizer it had to train, latents. The folder is this run's alone from
    here on, or from the first step where it is not there yet. With `replay` the run stands before that step. `began`:
    when it did, by `time.monotonic`, now if it is not given."""
    from artifex.training.compile_cache import CompileCache
    from artifex.training.loop import take
    from artifex.training.run_folder import RunFolder
    from artifex.training.run_lock import RunLock
    from artifex.training.trackers import check_installed

    check_installed(config.logging.track or ())
    began = time.monotonic() if began is None else began
    folder = RunFolder(run_dir)
    lock, lines = RunLock(folder.path), []
    programs = CompileCache(folder.programs(config.training.compile_cache), lines.append)
    if folder.path.is_dir() and replay is None:
        take(lock, folder, take_over, lines.append)
    try:
        with programs:
            return _opened(config, folder, lock, programs, began, lines, start_anew, other_batch_size, replay)
    except BaseException:
        lock.leave()
        raise


def _opened(
    config: Config,
    folder: RunFolder,
    lock: RunLock,
    programs: CompileCache,
    began: float,
    lines: list[str],
    start_anew: bool,
    other_batch_size: bool,
    replay: int | None,
) -> Run:
    """`open_run` once the folder is this run's."""
    import jax

    from artifex.scaling.checkpoints import Checkpoints
    from artifex.scaling.retention import Retention
    from artifex.training.goodput import Goodput
    from artifex.training.latents import as_known, settle
    from artifex.training.loop import Run
    from artifex.training.memory import check_state, device_bytes, explained
    from artifex.training.progress import Report
    from artifex.training.spill import check as check_spill
    from artifex.training.start import check as check_start
    from artifex.training.state import blueprint
    from artifex.training.task import open_task

    # configuration -> plan -> mesh: wrong sizes fail here, before data is read
    if config.device.auto_partition:
        from artifex.training.planning import partitioned

        config = partitioned(config, print if processes.is_first() else lambda line: None)
    plan = plan_of(config, jax.device_count())
    mesh = plan.make_mesh()
    plan.execution(mesh)  # refuses what its devices cannot do
    check_spill(config.training.spill_threshold_mb, mesh)
    # what is in the folder, and whether this run is the one in it
    saved = folder.saved(start_anew=start_anew)
    config = as_known(config, saved)
    changes = folder.open(config, saved, start_anew=start_anew, other_batch_size=other_batch_size)
    # the weights it begins with and what stays frozen, by name and shape
    if start_anew or not folder.holds_steps():
        check_start(config)
    # data: read before anything is built, so that a wrong path costs nothing
    task = open_task(config, folder)
    processes.check_alike("data set", task.corpus.fingerprint)
    # abstract model -> placement
    blue = blueprint(config, plan, mesh)
    check_state(blue, device_bytes())
    os.environ.update(blue.collectives.environment)  # NCCL reads it when the devices first talk
    # sharded init or restore
    checkpoints = Checkpoints(folder.checkpoints, keep=Retention.of(config.checkpoint.model_dump()))
    processes.what_stays[:] = [checkpoints.what_stays]
    with explained("out of memory while the state was made or restored"):
        made, start, task, notes = begin(blue, checkpoints, task, programs, start_anew, replay)
    # how latents are scaled is part of what is trained: measured once, and kept with the configuration
    known = processes.first_says(saved is not None)
    blue, latents = (blue, []) if known else settle(blue, made, task.corpus)
    notes = [*lines, *task.corpus.changes, *changes, *latents, *notes]
    report = Report(start, config.training.steps, bar=config.logging.progress, quiet=not processes.is_first())
    folder.say = programs.say = report.line
    if config.data.cache_latents:
        from artifex.training.latent_cache import with_latents

        with report.busy("encoding every image"):
            task = with_latents(task, blue, made(), folder)
    goodput = Goodput(start, began=began)
    if not start_anew:
        goodput.go_on(folder.read_metrics())
    return Run(blue, task, folder, checkpoints, made, start, notes, report, lock, programs, goodput)


def plan_of(config: Config, device_count: int) -> Plan:
    """The plan of a configuration on the `device_count` devices there are, checked against the batch."""
    from artifex.scaling.mesh_utils import simulation_hint
    from artifex.training.state import planned

    with simulation_hint(config.device, device_count):
        return planned(config, device_count)


def begin(
    blue: Blueprint,
    checkpoints: Checkpoints,
    task: Task,
    programs: CompileCache,
    start_anew: bool,
    replay: int | None,
) -> tuple[Made, int, Task, list[str]]:
    """The state to start from, the step it stands at, `task` where it stands then, and what to tell the user about it:
    that of the newest step, or of the newest before `replay`."""
    from artifex.training.lost_steps import check_nothing_lost
    from artifex.training.making import is_random, making
    from artifex.training.position import at_its_place
    from artifex.training.start import start_state

    def fresh() -> tuple[Made, list[str]]:
        if is_random(blue):
            return making(blue, programs), []
        state, lines = start_state(blue)
        return lambda: state, lines

    start_from = blue.config.training.start_from
    if start_anew:
        made, lines = fresh()
        return made, 0, task, ["starts anew, as asked: checkpoints that are there are renamed", *lines]
    if replay is None:
        step, skipped = checkpoints.newest_restorable()
    else:
        step, skipped = max((known for known in checkpoints.steps() if known < replay), default=None), []
    if step is None:
        if replay is None:  # before the first step that was saved there is none to go on from
            check_nothing_lost(checkpoints.folder.parent, skipped)
        made, lines = fresh()
        return made, 0, task, lines
    task, moved = at_its_place(task, step, checkpoints.metadata(step))
    again = f"; it began with {start_from}, which is not read again" if start_from else ""
    state = checkpoints.restore(step, blue.state)
    return lambda: state, step, task, [*skipped, f"resumed from step {step}{again}", *moved]
