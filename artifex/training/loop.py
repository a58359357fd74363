"""The loop of a run: batches, steps, validation, checkpoints, and what ends it before its last step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from artifex.scaling import processes
from artifex.training.run_folder import check_seen
from artifex.training.saving import Saver
from artifex.training.signals import Stopped, stop_signals
from artifex.training.stall import StallWatch
from artifex.training.step import make_evaluate

if TYPE_CHECKING:
    from artifex.config import Config
    from artifex.scaling.checkpoints import Checkpoints
    from artifex.training.compile_cache import CompileCache
    from artifex.training.goodput import Goodput
    from artifex.training.making import Made
    from artifex.training.meter import Meter
    from artifex.training.progress import Report
    from artifex.training.run_folder import RunFolder
    from artifex.training.run_lock import RunLock
    from artifex.training.state import Blueprint, TrainState
    from artifex.training.task import Task


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that was opened: everything it is made of, and where it stands."""

    blue: Blueprint
    task: Task
    folder: RunFolder
    checkpoints: Checkpoints
    made: Made
    start: int  # steps done
    notes: list[str]  # what the user should know about how it was opened
    report: Report
    lock: RunLock
    programs: CompileCache
    goodput: Goodput

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        return self.blue.config

    @property
    def state(self) -> TrainState:
        """What it begins with. Raises `MemoryError` where that does not fit: a fresh one may still be in the making."""
        return self.made()


def fit(run: Run, run_step: Callable[[TrainState, Any], Any], meter: Meter) -> TrainState:
    """The (data, step) loop. Returns the last state; raises `Stopped` where a signal ended the loop before it."""
    config, blue, task = run.config, run.blue, run.task
    cfg, every = config.training, config.checkpoint.every
    batches = task.batches(run.start, blue.part)
    validate, state, step, saver = make_validate(run), run.state, run.start, Saver(run)
    stop = None  # the signal that ends the run
    during = run.goodput.during
    watch = StallWatch(run.goodput, run.folder.stacks, run.report.line, config.logging.stall_after)
    with stop_signals() as seen, watch:
        before = None
        if step == 0 and cfg.start_from is not None:
            with during("validation"):  # what the weights are worth before they are trained on
                before = validate(state, final=True)
        while step < cfg.steps and not (saver.tried == step and (stop := ended_by(seen, step, config.logging.every))):
            with during("data", step + 1):
                batch = blue.placed(next(batches))
            with during("productive", step + 1):
                state, metrics = run_step(state, batch)
                step += 1
                if step == run.start + 1:
                    begin_folder(run, metrics)
                    if before is not None:
                        meter.validated(0, *before)
                stop = ended_by(seen, step, config.logging.every)
                # one step late: while Python reads the last step's metrics the device is busy with this one
                meter.read_late(step, metrics)
            validation = None
            if step < cfg.steps and cfg.validate_every and step % cfg.validate_every == 0:
                with meter.aside("validation", step):
                    validation = meter.validated(step, *validate(state, final=False))
            if step == cfg.steps or stop or (every and step % every == 0):
                with meter.aside(
                    "checkpoint", step
                ):  # reads this step's metrics first: what is not finite is never saved
                    saver.save(step, state, validation)
                if step < cfg.steps and not stop:
                    with during("samples", step):
                        sample(run, state, step)
                meter.tell(step)
            else:
                with during("checkpoint", step):
                    saver.look(step)
        batches.close()
        with during("checkpoint", step):
            saver.settle()
        processes.stands(None)
    if stop:
        where = f"at step {step}, which is saved" if step > run.start else "before the first step"
        run.report.line(f"stopped by {stop} {where}; the same command goes on")
        raise Stopped(stop)
    return state


def sample(run: Run, state: TrainState, step: int) -> None:
    """Look at what the model makes. A disk that cannot be written costs the sample, and not the run."""
    try:
        run.blue.run(state, run.task.look, run.folder, step)
    except OSError as error:
        run.folder.cannot_write(f"a sample of step {step}", error)


def ended_by(seen: list[str], step: int, every: int) -> str | None:
    """The signal by which the run ends at this step: of one process what it has `seen`; of several what any of them
    has, which they ask each other every so many steps."""
    if processes.count() > 1 and step % every:
        return None
    return next((name for name in processes.all_say(seen[0] if seen else None) if name), None)


@processes.by_first
def take(lock: RunLock, folder: RunFolder, over: bool = False, says: Callable[[str], None] | None = None) -> None:
    """Have the folder, made where it is not there, for this run alone."""
    folder.path.mkdir(parents=True, exist_ok=True)
    line = lock.take(over=over)
    if line and says:
        says(line)


def begin_folder(run: Run, metrics: Any) -> None:
    """Make the folder that of this run, once its first step is computed: until then a start can fail."""
    jax.block_until_ready(metrics)
    run.goodput.first_step()
    with run.goodput.during("start"):
        take(run.lock, run.folder)
        run.checkpoints.set_aside(run.start + 1)
        run.folder.begin(run.config, run.start)
        run.task.save_beside(run.folder.path)
        check_seen(run.folder.config)
        run.programs.begin()
        run.folder.track(run.config, run.start)
    if run.goodput.starts > 1:  # the lines that it goes on from were set aside
        run.folder.log(run.goodput.told(run.start))


def check_metric(run: Run, shapes: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise `ValueError` unless a validation, over batches of `shapes`, measures `checkpoint.best_metric`."""
    batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    measured = dict.fromkeys(jax.eval_shape(make_evaluate(run.blue), run.blue.state, batch).keys() - {"weight"}, 0.0)
    known = sorted({*measured, run.task.score(measured).key})
    if (wanted := run.config.checkpoint.best_metric) not in known:
        raise ValueError(
            f"checkpoint.best_metric is {wanted!r}, but a validation measures {', '.join(known)}; name one"
        )


def make_validate(run: Run) -> Callable[..., tuple[dict[str, float], float]]:
    """`validate(state, final=) -> (mean of each metric, what they are means over)`, over the same batches each time.

    The final one reads all that is held out, where `training.final_validation_batches` sets no limit.
    """
    evaluate, cfg = make_evaluate(run.blue), run.config.training

    def validate(state: TrainState, *, final: bool) -> tuple[dict[str, float], float]:
        totals: dict[str, float] = {}
        count = cfg.final_validation_batches if final else cfg.validation_batches
        for index, batch in enumerate(run.task.validation(count, run.blue.part)):
            # read at once: simulated devices share a pool of threads, and batches sent ahead can leave it without one
            with processes.waiting():
                measured = jax.device_get(evaluate(state, run.blue.placed(batch), index))
            for name, value in measured.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        weight = totals.pop("weight")
        return {name: total / weight for name, total in totals.items()}, weight

    return validate
