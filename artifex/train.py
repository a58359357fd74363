"""`python -m artifex.train`: configuration -> plan -> mesh -> state -> steps -> checkpoints, samples, weights.

Read it from top to bottom. What needs JAX is imported inside the functions, after the command line was read: `--help`,
`--print-config` and configuration errors answer without it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifex.cli import fail, parse_train, user_errors
from artifex.config import Config
from artifex.data import DataError
from artifex.scaling.manifest import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    import jax

    from artifex.scaling.checkpoints import Checkpoints
    from artifex.scaling.plan import Plan
    from artifex.training.progress import Report
    from artifex.training.run_folder import RunFolder
    from artifex.training.state import Blueprint, TrainState
    from artifex.training.task import Task


def main(argv: list[str] | None = None) -> None:
    """The command line. Exits with 2 and one line for anything the user can mend, with 1 for a run that failed."""
    command = parse_train(argv)
    if command.print_config:
        print(command.config.to_yaml(), end="")
    elif command.dry_run:
        with user_errors():
            print(dry_run(command.config))
    else:
        try:
            with user_errors():
                run = open_run(command.config, command.run_dir)
            run_steps(run)
        except (FloatingPointError, CheckpointError, DataError) as error:
            fail(str(error), code=1)


def train(config: Config, run_dir: str | Path) -> Path:
    """Train as `config` says into the folder `run_dir`, or go on from its newest checkpoint. Returns the folder.

    Raises `ValueError` for a configuration, mesh, data or folder that do not fit, before anything is compiled,
    `DataError` where an example turns out to be bad when it is drawn, `FloatingPointError` at the first loss or
    gradient that is not finite (the last good checkpoint stays), and `CheckpointError` where nothing can be saved.
    """
    return run_steps(open_run(config, run_dir))


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that was opened: everything it is made of, and where it stands."""

    blue: Blueprint
    task: Task
    folder: RunFolder
    checkpoints: Checkpoints
    state: TrainState
    start: int  # steps done
    notes: list[str]  # what the user should know about how it was opened

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        return self.blue.config


def open_run(config: Config, run_dir: str | Path) -> Run:
    """Everything before the first step, in the order in which mistakes are cheap."""
    import jax

    from artifex.scaling.checkpoints import Checkpoints
    from artifex.training.latents import as_known, settle
    from artifex.training.run_folder import RunFolder
    from artifex.training.start import check as check_start
    from artifex.training.state import blueprint
    from artifex.training.task import open_task

    # configuration -> plan -> mesh: wrong sizes fail here, before data is read
    plan = plan_of(config, jax.device_count())
    mesh = plan.make_mesh()
    # what is in the folder, and whether this run is the one in it
    folder = RunFolder(Path(run_dir))
    config = as_known(config, folder.config)
    changes = folder.open(config)
    # the weights it begins with and what stays frozen, by name and shape
    if not folder.checkpoints.is_dir():
        check_start(config)
    # data: read before anything is built, so that a wrong path costs nothing
    task = open_task(config, folder)
    # abstract model -> placement
    blue = blueprint(config, plan, mesh)
    # sharded init or restore
    checkpoints = Checkpoints(folder.checkpoints, keep=config.checkpoint.keep)
    state, start, notes = begin(blue, checkpoints, task)
    # how latents are scaled is part of what is trained: measured once, and kept with the configuration
    blue, latents = (blue, []) if folder.config.exists() else settle(blue, state, task.corpus)
    folder.begin(blue.config, start)
    task.save_beside(folder.path)
    notes = [*task.corpus.changes, *(f"changed since it was saved: {change}" for change in changes), *latents, *notes]
    return Run(blue, task, folder, checkpoints, state, start, notes)


def plan_of(config: Config, device_count: int) -> Plan:
    """The plan of a configuration on `device_count` devices, checked against the batch."""
    from artifex.scaling.plan import Plan

    config.check()
    microbatches = config.training.gradient_accumulation
    plan = Plan.from_device(config.device, device_count, remat=config.training.remat, microbatches=microbatches)
    plan.check_batch(config.training.batch_size)
    return plan


def begin(blue: Blueprint, checkpoints: Checkpoints, task: Task) -> tuple[TrainState, int, list[str]]:
    """The state to start from, the step it stands at, and what to tell the user about it."""
    from artifex.training.start import start_state

    start_from = blue.config.training.start_from
    step, skipped = checkpoints.newest_restorable()
    if step is None:
        state, lines = start_state(blue)
        return state, 0, [*skipped, *lines]
    saved = checkpoints.metadata(step)["data"]["fingerprint"]
    if saved != task.corpus.fingerprint:
        raise ValueError(
            f"the data changed: step {step} was trained on fingerprint {saved[:12]}, {task.corpus.source} now has "
            f"{task.corpus.fingerprint[:12]}; restore the data or choose another --run-dir"
        )
    again = f"; it began with {start_from}, which is not read again" if start_from else ""
    return checkpoints.restore(step, blue.state), step, [*skipped, f"resumed from step {step}{again}"]


def run_steps(run: Run) -> Path:
    """Train an opened run to its last step, or to a signal; then plot, export and say how to go on."""
    from artifex.training.progress import Report

    steps = run.config.training.steps
    with run.checkpoints, Report(run.start, steps, bar=run.config.logging.progress) as report:
        for line in [summary(run), *run.notes]:
            report.line(line)
        if run.start < steps:
            state, step = fit(run, report)
            finish(run, state, step, report)
        else:
            report.line(f"nothing left to train; to go on: --training.steps {2 * steps}")
    return run.folder.path


def fit(run: Run, report: Report) -> tuple[TrainState, int]:
    """The (data, step) loop. Returns the last state and its step, fewer than asked where a signal stopped it."""
    from artifex.models.attention import recording
    from artifex.training.meter import Meter
    from artifex.training.signals import stop_signals
    from artifex.training.step import make_step

    config, blue, task = run.config, run.blue, run.task
    cfg, every = config.training, config.checkpoint.every
    batches = task.batches(run.start)
    meter, run_step, validate = Meter(config, task, run.folder, report), make_step(blue), make_validate(run)
    state, step = run.state, run.start
    with stop_signals() as stop:
        if step == 0 and cfg.start_from is not None:  # what the weights are worth before they are trained on
            with meter.aside():
                meter.validated(step, *validate(state, final=True))
        while step < cfg.steps and not stop:
            asked = time.perf_counter()
            batch = place(blue, next(batches))
            meter.waited(time.perf_counter() - asked)
            with recording() as attention:  # the first step traces
                state, metrics = run_step(state, batch)
            if attention:
                report.line(f"attention: {', '.join(sorted(attention))}")
            step += 1
            # one step late: while Python reads the last step's metrics the device is busy with this one
            meter.read_late(step, metrics)
            last = step == cfg.steps or bool(stop)
            if last or (cfg.validate_every and step % cfg.validate_every == 0):
                with meter.aside():
                    meter.validated(step, *validate(state, final=step == cfg.steps))
            if last or (every and step % every == 0):
                with meter.aside():  # reads this step's metrics first: what is not finite is never saved
                    run.checkpoints.save(
                        step,
                        state,
                        {**blue.metadata(), "data": {"fingerprint": task.corpus.fingerprint, "batches": step}},
                    )
                    task.look(blue.model(state), run.folder, step)
    batches.close()
    run.checkpoints.wait()
    if stop:
        report.line(f"stopped by {stop[0]} at step {step}, which is saved")
    return state, step


def place(blue: Blueprint, batch: dict[str, Any]) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays, split as the plan says."""
    import jax

    where = blue.batch_sharding(batch)
    if jax.process_count() == 1:
        return jax.device_put(batch, where)
    return {key: jax.make_array_from_process_local_data(where[key], value) for key, value in batch.items()}


def make_validate(run: Run) -> Callable[..., tuple[dict[str, float], float]]:
    """`validate(state, final=) -> (mean of each metric, what they are means over)`, over the same batches each time.

    The final one reads all that is held out, where `training.final_validation_batches` sets no limit.
    """
    import jax

    from artifex.training.step import make_evaluate

    evaluate, cfg = make_evaluate(run.blue), run.config.training

    def validate(state: TrainState, *, final: bool) -> tuple[dict[str, float], float]:
        totals: dict[str, float] = {}
        count = cfg.final_validation_batches if final else cfg.validation_batches
        for index, batch in enumerate(run.task.validation(count)):
            # read at once: simulated devices share a pool of threads, and batches sent ahead can leave it without one
            for name, value in jax.device_get(evaluate(state, place(run.blue, batch), index)).items():
                totals[name] = totals.get(name, 0.0) + float(value)
        weight = totals.pop("weight")
        return {name: total / weight for name, total in totals.items()}, weight

    return validate


def finish(run: Run, state: TrainState, step: int, report: Report) -> None:
    """Weights alone, the last samples and their score, the curve, and how to use what was made."""
    from artifex.models.weights import save_pretrained

    config, folder, model = run.config, run.folder, run.blue.model(state)
    save_pretrained(folder.weights, config.model.name, config.model.spec(), run.blue.tree(state))
    run.task.save_beside(folder.weights)
    scores, lines = run.task.conclude(model, folder, step)
    if scores:
        folder.log({"step": step, "split": "samples", **scores})
    folder.plot(run.task.score)
    for line in lines:
        report.line(line)
    report.line(f"{folder.path}: config.json metrics.jsonl loss.png samples/ checkpoints/ weights/")
    more = config.training.steps if step < config.training.steps else 2 * config.training.steps
    report.line(
        f"go on with it:   python -m artifex.train {folder.config} --training.steps {more} --run-dir {folder.path}"
    )


def summary(run: Run) -> str:
    """One line on what is trained, on what, and where."""
    import jax

    count, untrained = (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part)) for part in (run.state.params, run.state.buffers)
    )
    frozen = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(run.blue.split(run.state.params)[1]))
    size = f"{count:,} parameters" + (f", {frozen:,} of them frozen," if frozen else "")
    size += f" and {untrained:,} numbers that no gradient reaches" if untrained else ""
    devices = jax.devices()
    kind = f"{len(devices)} {devices[0].device_kind} device{'s' if len(devices) > 1 else ''}"
    return f"{run.config.model.name}, {size}, on {run.task.corpus.describe()}; {kind}, {run.blue.plan}"


def dry_run(config: Config) -> str:
    """Parameter count, sharding table and memory per device of a run, as text; trains nothing, reads no data."""
    import jax
    from flax import nnx

    from artifex.scaling.placement import bytes_on_device, explain, size_text
    from artifex.training.state import blueprint
    from artifex.training.step import make_step
    from artifex.training.task import batch_shapes

    plan = plan_of(config, jax.device_count())
    blue = blueprint(config, plan, plan.make_mesh())
    abstract = nnx.eval_shape(lambda: config.model.spec().build(nnx.Rngs(0)))
    batch = {key: jax.ShapeDtypeStruct(*kind) for key, kind in batch_shapes(config).items()}
    where = blue.batch_sharding(batch)
    batch = {key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where[key]) for key, leaf in batch.items()}
    used = make_step(blue).lower(blue.state, batch).compile().memory_analysis()
    whole = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes + used.temp_size_in_bytes
    lines = [
        str(explain(abstract, plan, plan.sizes)),
        "",
        f"plan: {plan}",
        "memory per device:",
        f"  parameters        {size_text(bytes_on_device(blue.state.params))}",
        f"  optimizer state   {size_text(bytes_on_device(blue.state.optimizer))}",
    ]
    if jax.tree.leaves(blue.state.buffers):
        lines.append(f"  buffers           {size_text(bytes_on_device(blue.state.buffers))}")
    if blue.state.ema is not None:
        lines.append(f"  average           {size_text(bytes_on_device((blue.state.ema, blue.state.ema_buffers)))}")
    lines.append(f"  the step's own    {size_text(used.temp_size_in_bytes)}  (gradients and activations, by XLA)")
    lines.append(f"  in all            {size_text(whole)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
