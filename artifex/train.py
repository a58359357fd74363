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
from artifex.scaling.manifest import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    import jax

    from artifex.data.text import TextCorpus
    from artifex.scaling.checkpoints import Checkpoints
    from artifex.scaling.plan import Plan
    from artifex.training.progress import Report
    from artifex.training.run_folder import RunFolder
    from artifex.training.state import Blueprint, TrainState


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
        except (FloatingPointError, CheckpointError) as error:
            fail(str(error), code=1)


def train(config: Config, run_dir: str | Path) -> Path:
    """Train as `config` says into the folder `run_dir`, or go on from its newest checkpoint. Returns the folder.

    Raises `ValueError` for a configuration, mesh, data or folder that do not fit, before anything is compiled,
    `FloatingPointError` at the first loss or gradient that is not finite (the last good checkpoint stays), and
    `CheckpointError` where nothing can be saved.
    """
    return run_steps(open_run(config, run_dir))


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that was opened: everything it is made of, and where it stands."""

    blue: Blueprint
    corpus: TextCorpus
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

    from artifex.data.text import load_text
    from artifex.data.tokenizers import save_tokenizer
    from artifex.scaling.checkpoints import Checkpoints
    from artifex.training.run_folder import RunFolder
    from artifex.training.state import blueprint

    # configuration -> plan -> mesh: wrong sizes fail here, before data is read
    plan = plan_of(config, jax.device_count())
    mesh = plan.make_mesh()
    # what is in the folder, and whether this run is the one in it
    folder = RunFolder(Path(run_dir))
    changes = folder.open(config)
    # data: read before anything is built, so that a wrong path costs nothing
    corpus = load_text(
        config.data.source,
        tokenizer=config.data.tokenizer,
        bpe_vocab_size=config.data.bpe_vocab_size,
        validation_fraction=config.data.validation_fraction,
        cache_dir=folder.cache,
    )
    check_vocabulary(config, corpus)
    # abstract model -> placement
    blue = blueprint(config, plan, mesh)
    # sharded init or restore
    checkpoints = Checkpoints(folder.checkpoints, keep=config.checkpoint.keep)
    state, start, notes = begin(blue, checkpoints, corpus)
    folder.begin(config, start)
    save_tokenizer(corpus.tokenizer, folder.tokenizer)
    notes = [*(f"changed since it was saved: {change}" for change in changes), *notes]
    return Run(blue, corpus, folder, checkpoints, state, start, notes)


def plan_of(config: Config, device_count: int) -> Plan:
    """The plan of a configuration on `device_count` devices, checked against the batch."""
    from artifex.scaling.plan import Plan

    config.check()
    microbatches = config.training.gradient_accumulation
    plan = Plan.from_device(config.device, device_count, remat=config.training.remat, microbatches=microbatches)
    plan.check_batch(config.training.batch_size)
    return plan


def check_vocabulary(config: Config, corpus: TextCorpus) -> None:
    """Raise `ValueError` where the data has token ids that the model has no row for."""
    rows = config.model.spec().vocab_size
    if corpus.vocab_size > rows:
        raise ValueError(
            f"model.vocab_size is {rows}, but data.tokenizer {config.data.tokenizer!r} has {corpus.vocab_size} tokens; "
            f"set model.vocab_size to at least {corpus.vocab_size}"
        )


def begin(blue: Blueprint, checkpoints: Checkpoints, corpus: TextCorpus) -> tuple[TrainState, int, list[str]]:
    """The state to start from, the step it stands at, and what to tell the user about it."""
    step, skipped = checkpoints.newest_restorable()
    if step is None:
        return blue.init(), 0, skipped
    saved = checkpoints.metadata(step)["data"]["fingerprint"]
    if saved != corpus.fingerprint:
        raise ValueError(
            f"the data changed: step {step} was trained on fingerprint {saved[:12]}, {corpus.source} now has "
            f"{corpus.fingerprint[:12]}; restore the data or choose another --run-dir"
        )
    return checkpoints.restore(step, blue.state), step, [*skipped, f"resumed from step {step}"]


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
    import jax

    from artifex.data.batches import Batches
    from artifex.training.meter import Meter
    from artifex.training.signals import stop_signals
    from artifex.training.step import make_step

    config, blue, corpus = run.config, run.blue, run.corpus
    cfg, every = config.training, config.checkpoint.every
    batches = Batches(
        corpus.train,
        batch_size=cfg.batch_size,
        sequence_length=config.data.sequence_length,
        seed=cfg.seed,
        vocab_size=corpus.vocab_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    ).stream(run.start)
    meter, run_step, validate = Meter(config, corpus, run.folder, report), make_step(blue), make_validate(run)
    state, step = run.state, run.start
    with stop_signals() as stop:
        while step < cfg.steps and not stop:
            asked = time.perf_counter()
            batch = place(blue, next(batches))
            meter.waited(time.perf_counter() - asked)
            state, metrics = run_step(state, batch)
            step += 1
            # one step late: while Python reads the last step's metrics the device is busy with this one
            meter.read_late(step, metrics)
            last = step == cfg.steps or bool(stop)
            if last or (cfg.validate_every and step % cfg.validate_every == 0):
                with meter.aside():
                    meter.validated(step, *validate(state))
            if last or (every and step % every == 0):
                with meter.aside():  # reads this step's metrics first: what is not finite is never saved
                    run.checkpoints.save(step, state, {"data": {"fingerprint": corpus.fingerprint, "batches": step}})
                    run.folder.write_sample(step, sample_text(run, state))
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


def make_validate(run: Run) -> Callable[[TrainState], tuple[float, int]]:
    """`validate(state) -> (mean nats, targets)` over the same batches each time, on `state.weights`."""
    import jax

    from artifex.data.batches import validation_batches
    from artifex.training.step import make_evaluate

    config, evaluate = run.config, make_evaluate(run.blue)

    def validate(state: TrainState) -> tuple[float, int]:
        batches = validation_batches(
            run.corpus.validation,
            batch_size=config.training.batch_size,
            sequence_length=config.data.sequence_length,
            count=config.training.validation_batches,
            vocab_size=run.corpus.vocab_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        nats = targets = 0.0
        for batch in batches:
            # read at once: simulated devices share a pool of threads, and batches sent ahead can leave it without one
            total, count = jax.device_get(evaluate(state.weights, place(run.blue, batch)))
            nats, targets = nats + float(total), targets + float(count)
        return nats / targets, int(targets)

    return validate


def sample_text(run: Run, state: TrainState) -> str:
    """A continuation of the configured prompt, the same draw at every step, so that progress is visible."""
    import jax
    from flax import nnx

    cfg, tokenizer = run.config.training, run.corpus.tokenizer
    prompt = tokenizer.encode(cfg.sample_prompt)[None]
    room = min(cfg.sample_tokens, run.config.model.spec().sequence_length - prompt.shape[1])
    if room < 1:
        return ""
    model = nnx.merge(run.blue.graphdef, state.weights)
    drawn = model.sample(jax.random.key(cfg.seed), prompt=prompt, num_tokens=room, temperature=0.7, top_p=0.95)
    return cfg.sample_prompt + tokenizer.decode(jax.device_get(drawn)[0])


def finish(run: Run, state: TrainState, step: int, report: Report) -> None:
    """Loss curve, weights alone, the last sample, and how to use what was made."""
    from artifex.data.tokenizers import save_tokenizer
    from artifex.models.weights import save_pretrained
    from artifex.training.meter import unit_of

    config, folder = run.config, run.folder
    folder.plot(*unit_of(run.corpus))
    save_pretrained(folder.weights, config.model.name, config.model.spec(), state.weights)
    save_tokenizer(run.corpus.tokenizer, folder.weights / folder.tokenizer.name)
    if text := folder.read_sample(step).rstrip():
        report.line(f"\n{text}\n")
    report.line(f"{folder.path}: config.json metrics.jsonl loss.png samples/ checkpoints/ weights/")
    report.line(f'sample from it:  python -m artifex.sample {folder.path} --prompt "{config.training.sample_prompt}"')
    more = config.training.steps if step < config.training.steps else 2 * config.training.steps
    report.line(
        f"go on with it:   python -m artifex.train {folder.config} --training.steps {more} --run-dir {folder.path}"
    )


def summary(run: Run) -> str:
    """One line on what is trained, on what, and where."""
    import jax

    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(run.state.params))
    devices = jax.devices()
    kind = f"{len(devices)} {devices[0].device_kind} device{'s' if len(devices) > 1 else ''}"
    return f"{run.config.model.name}, {count:,} parameters, on {run.corpus.describe()}; {kind}, {run.blue.plan}"


def dry_run(config: Config) -> str:
    """Parameter count, sharding table and memory per device of a run, as text; trains nothing, reads no data."""
    import jax
    import numpy as np
    from flax import nnx

    from artifex.scaling.placement import bytes_on_device, explain, size_text
    from artifex.training.state import blueprint
    from artifex.training.step import make_step

    plan = plan_of(config, jax.device_count())
    blue = blueprint(config, plan, plan.make_mesh())
    abstract = nnx.eval_shape(lambda: config.model.spec().build(nnx.Rngs(0)))
    shape = (config.training.batch_size, config.data.sequence_length)
    batch = {key: jax.ShapeDtypeStruct(shape, np.int32) for key in ("tokens", "targets")}
    where = blue.batch_sharding(batch)
    batch = {key: jax.ShapeDtypeStruct(shape, np.int32, sharding=where[key]) for key in batch}
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
    if blue.state.ema is not None:
        lines.append(f"  average           {size_text(bytes_on_device(blue.state.ema))}")
    lines.append(f"  the step's own    {size_text(used.temp_size_in_bytes)}  (gradients and activations, by XLA)")
    lines.append(f"  in all            {size_text(whole)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
