"""`python -m artifex.train`: configuration -> plan -> mesh -> state -> steps -> checkpoints, samples, weights.

Read it from top to bottom; `artifex.training.opening` is the first half of its way. What takes time to import is
imported inside the functions: Ctrl-C is answered from the start; `--help`, `--print-config` and configuration errors
come without JAX.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what takes time to import
    from artifex.host_memory import begin_again

    begin_again()

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from artifex.data import DataError
from artifex.scaling import processes
from artifex.scaling.manifest import CheckpointError
from artifex.training.goodput import process_age
from artifex.training.opening import open_run, plan_of
from artifex.training.run_lock import InUse
from artifex.training.signals import ending_at_once

if TYPE_CHECKING:
    from artifex.config import Config
    from artifex.training.loop import Run
    from artifex.training.memory import CompiledStep
    from artifex.training.meter import Meter
    from artifex.training.state import TrainState


@ending_at_once(": nothing is lost, give the same command again")
def main(argv: list[str] | None = None) -> None:
    """The command line. Exits with 2 and one line for anything the user can mend, with 1 for a run that failed, or that
    does not fit the target it was asked about, with 128 + its number for a signal: after the step, with everything
    saved, or at once where there is nothing to save."""
    from artifex.cli import fail, parse_train, program, user_errors

    with program():
        command = parse_train(argv)
        if command.print_config:
            print(command.config.to_yaml(), end="")
            return
        if command.target is not None:
            from artifex.training.for_target import ask

            with user_errors():
                answer = ask(command.config, command.target, command.time_limit)
            print(answer.text)
            if not answer.fits:
                raise SystemExit(1)
            return
        with user_errors():
            processes.start(command.start, command.asks())
        with processes.ending_together():
            if command.dry_run:
                with user_errors():
                    text = dry_run(command.config)
                if processes.is_first():
                    print(text)
                return
            try:
                with user_errors():
                    how = {name: getattr(command, name) for name in ("start_anew", "take_over", "other_batch_size")}
                    how["began"] = time.monotonic() - process_age()
                    run = open_run(command.config, command.run_dir, **how, replay=command.replay)
                    run_step = prepare(run)
                run_steps(run, run_step, replay=command.replay)
            except InUse as error:
                fail(str(error))
            except BrokenPipeError:
                raise
            except (FloatingPointError, CheckpointError, DataError, MemoryError, OSError) as error:
                fail(str(error), code=1)


def train(
    config: Config,
    run_dir: str | Path,
    *,
    start_anew: bool = False,
    take_over: bool = False,
    other_batch_size: bool = False,
) -> Path:
    """Train as `config` says into the folder `run_dir`, or go on from its newest checkpoint. Returns the folder.

    `start_anew` begins at step 0 whatever the folder has: its checkpoints are renamed and stay. `take_over` takes it
    from a process of another host, which cannot be seen from here to have ended. `other_batch_size` lets the batch size
    differ from the saved one: the run goes on from the sample where it stands. A start that fails leaves the folder as
    it was. Raises `ValueError` for a configuration, mesh, data or folder that do not fit, and
    `MemoryError` for a step that needs more than a device has; `CheckpointError` where checkpoints are damaged or
    gone and none is left, or where nothing can be saved; `DataError` where an example turns out to be bad when it is
    drawn; `FloatingPointError` at a loss, gradient or state that is not finite, where the step is not skipped (the
    last good checkpoint stays); and `Stopped`, a `SystemExit`, where a signal ended the run after it was saved.
    """
    run = open_run(config, run_dir, start_anew=start_anew, take_over=take_over, other_batch_size=other_batch_size)
    return run_steps(run, prepare(run))


def prepare(run: Run) -> CompiledStep | None:
    """Say what the run is, and compile its step, on the first batch's shapes; None where no step is left.

    Raises `ValueError` for data that make no batch, and `MemoryError` where the step needs more than a device has.
    """
    from artifex.models.attention import recording
    from artifex.training.loop import check_metric
    from artifex.training.memory import device_bytes, fitting_step, notes

    for line in [summary(run), *run.blue.collectives.lines, *run.notes]:
        run.report.line(line)
    if run.start >= run.config.training.steps:
        return None
    batches = run.task.batches(run.start, run.blue.part)
    shapes = {name: (x.shape, x.dtype) for name, x in run.blue.placed(next(batches)).items()}
    batches.close()
    if run.config.checkpoint.keep_best:
        check_metric(run, shapes)
    busy, compiling = run.report.busy("compiling the step"), run.goodput.during("compile")
    with run.programs, busy, compiling, recording() as attention:
        run_step = fitting_step(run.blue, shapes, device_bytes())
        run.made()  # so that what was compiled is kept, and what does not fit is said here
        processes.all_say(None)  # gloo waits 30 s for a process that still compiles
    for line in [*([f"attention: {', '.join(sorted(attention))}"] if attention else []), *notes(run_step)]:
        run.report.line(line)
    return run_step


def run_steps(run: Run, run_step: CompiledStep | None, *, replay: int | None = None) -> Path:
    """Train an opened run to its last step; then make whatever a finished run has: weights, scores, the curve.

    Where a run stands at its last step already, what is missing of these is made. Raises `Stopped` after a signal. With
    `replay` nothing is trained and nothing written: see `artifex.training.replay`.
    """
    from artifex.training.finite import check as check_finite
    from artifex.training.loop import fit
    from artifex.training.memory import explained
    from artifex.training.meter import Meter
    from artifex.training.replay import replay as take_again

    if replay is not None:
        with run.checkpoints, run.programs, run.report, explained("out of memory"):
            assert run_step is not None, "no run opened so stands at its end"
            take_again(run, run_step, replay)
        return run.folder.path
    steps, finished = run.config.training.steps, processes.first_says(run.folder.is_finished())
    meter = Meter(run, run_step.whole if run_step else 0)
    with (
        run.lock,
        run.checkpoints,
        run.programs,
        run.folder,
        run.report,
        explained("out of memory; what is saved stays"),
    ):
        if run_step is not None:
            finish(run, fit(run, run_step, meter), meter)
        elif run.start == steps and not finished:
            run.report.line(f"all {steps} steps are done; makes what is missing")
            check_finite(run.blue, run.state)
            run.folder.keep_metrics_up_to(steps)
            run.folder.track(run.config, steps)
            finish(run, run.state, meter)
        else:
            done = "" if run.start == steps else f"step {run.start} is done, training.steps is {steps}: "
            run.report.line(f"{done}nothing left to train; to go on: --training.steps {2 * run.start}")
    return run.folder.path


def finish(run: Run, state: TrainState, meter: Meter) -> None:
    """Of the last step what is not there yet: weights alone, validation, the last samples and their score, the curve.

    All of it can be made again from the checkpoint and appears whole, so that a signal may end it anywhere.
    """
    from artifex.models.weights import save_pretrained
    from artifex.training.loop import make_validate

    config, folder, report, task = run.config, run.folder, run.report, run.task
    step = config.training.steps
    if processes.is_first():
        folder.samples.mkdir(parents=True, exist_ok=True)
    save_pretrained(folder.weights, config.model.name, config.model.spec(), run.blue.tree(state))
    task.save_beside(folder.weights)
    if not processes.first_says(folder.has_line(step, "validation")):
        with run.goodput.during("validation"):
            meter.validated(step, *make_validate(run)(state, final=True))
    with run.goodput.during("samples"):
        run.blue.run(state, task.look, folder, step)
        scores, lines = run.blue.run(state, task.conclude, folder, step)
    if scores and not folder.has_line(step, "samples"):
        folder.log({"step": step, "split": "samples", **scores})
    folder.plot(task.score)
    meter.tell(step)
    for line in [*lines, run.goodput.line()]:
        report.line(line)
    report.line(f"{folder.path}: config.json metrics.jsonl loss.png samples/ checkpoints/ weights/")
    report.line(
        f"go on with it:   python -m artifex.train {folder.config} --training.steps {2 * step} --run-dir {folder.path}"
    )


def summary(run: Run) -> str:
    """One line on what is trained, on what, and where."""
    import jax

    shapes = run.blue.state
    count, untrained = (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part)) for part in (shapes.params, shapes.buffers)
    )
    frozen = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(run.blue.split(shapes.params)[1]))
    size = f"{count:,} parameters" + (f", {frozen:,} of them frozen," if frozen else "")
    size += f" and {untrained:,} numbers that no gradient reaches" if untrained else ""
    devices = jax.devices()
    kind = f"{len(devices)} {devices[0].device_kind} device{'s' if len(devices) > 1 else ''}"
    return f"{run.config.model.name}, {size}, on {run.task.corpus.describe()}; {kind}, {run.blue.plan}"


def dry_run(config: Config) -> str:
    """Parameter count, sharding table, memory and communication per device of a run, as text; trains nothing, reads no
    data."""
    import jax
    from flax import nnx

    from artifex.scaling.placement import explain
    from artifex.training.memory import communication_table, compile_step, device_bytes, table
    from artifex.training.planning import partitioned
    from artifex.training.state import blueprint
    from artifex.training.task import batch_shapes

    chosen: list[str] = []
    config = partitioned(config, chosen.append)
    plan = plan_of(config, jax.device_count())
    blue = blueprint(config, plan, plan.make_mesh())
    abstract = nnx.eval_shape(lambda: config.model.spec().build(nnx.Rngs(0)))
    step = compile_step(blue, batch_shapes(config))
    lines = ["memory per device:", *table(step, device_bytes()), *communication_table(step), *blue.collectives.lines]
    return "\n".join([*chosen, str(explain(abstract, plan, plan.sizes)), "", f"plan: {plan}", *lines])


if __name__ == "__main__":
    main()
