"""`python -m artifex.train`: configuration -> plan -> mesh -> blueprint -> state -> steps -> checkpoints, samples, weights.

Read it from top to bottom. What needs JAX is imported inside `train`, after the command line was read: `--help`,
`--print-config` and configuration errors answer without it.
"""

from __future__ import annotations

import math
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifex.cli import parse_train, user_errors
from artifex.config import Config

if TYPE_CHECKING:
    import jax

    from artifex.data.text import TextCorpus
    from artifex.scaling.checkpoints import Checkpoints
    from artifex.training.progress import Report
    from artifex.training.run_folder import RunFolder
    from artifex.training.state import Blueprint, TrainState


def main(argv: list[str] | None = None) -> None:
    """The command line. Exits with 2 and one line for anything the user can mend, with 1 for a run that failed."""
    command = parse_train(argv)
    if command.print_config:
        print(command.config.to_yaml(), end="")
        return
    with user_errors():
        if command.dry_run:
            print(dry_run(command.config))
        else:
            train(command.config, command.run_dir)


def train(config: Config, run_dir: str | Path) -> Path:
    """Train as `config` says into the folder `run_dir`, or go on where its newest checkpoint stands. Returns the folder.

    Raises `ValueError` for a configuration, mesh or data that do not fit, before anything is compiled, and
    `FloatingPointError` at the first loss or gradient that is not finite; the last good checkpoint stays.
    """
    import jax

    from artifex.data.text import load_text
    from artifex.scaling.checkpoints import Checkpoints
    from artifex.training.progress import Report
    from artifex.training.run_folder import RunFolder
    from artifex.training.state import blueprint

    # configuration -> plan -> mesh: wrong sizes fail here, before data is read
    config.check()
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
    )
    check_vocabulary(config, corpus)
    # abstract model -> placement
    blue = blueprint(config, plan, mesh)
    with Checkpoints(folder.checkpoints, keep=config.checkpoint.keep) as checkpoints:
        # sharded init or restore
        state, start, how = begin(blue, checkpoints, corpus)
        folder.write_config(config)
        corpus.tokenizer.save(folder.tokenizer)
        folder.keep_metrics_up_to(start)
        with Report(start, config.training.steps, bar=config.logging.progress) as report:
            report.line(summary(config, blue, corpus))
            for line in [*(f"changed since it was saved: {change}" for change in changes), *how]:
                report.line(line)
            if start >= config.training.steps:
                report.line(f"nothing left to train; to go on: --training.steps {2 * config.training.steps}")
                return folder.path
            # (data, step) loop
            state, step = fit(blue, state, start, corpus, folder, checkpoints, report)
            finish(blue, state, step, corpus, folder, report)
    return folder.path


def plan_of(config: Config, device_count: int) -> Any:
    """The plan of a configuration on `device_count` devices, checked against the batch."""
    from artifex.scaling.plan import Plan

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
            f"the data changed: step {step} was trained on fingerprint {saved}, {corpus.source} now has "
            f"{corpus.fingerprint}; restore the data or choose another --run-dir"
        )
    state = checkpoints.restore(step, blue.state)
    return state, step, [*skipped, f"resumed from step {step} in {checkpoints.folder}"]


def fit(
    blue: Blueprint,
    state: TrainState,
    start: int,
    corpus: TextCorpus,
    folder: RunFolder,
    checkpoints: Checkpoints,
    report: Report,
) -> tuple[TrainState, int]:
    """Run the steps from `start` on; returns the last state and its step, fewer than asked where a signal stopped it."""
    import jax

    from artifex.data.text import train_batches
    from artifex.training.meter import Meter
    from artifex.training.step import make_step

    config = blue.config
    cfg, every = config.training, config.checkpoint.every
    meter = Meter(config, corpus, folder, report)
    run_step, validate = make_step(blue), make_validate(blue, corpus)
    batches = train_batches(
        corpus.train,
        batch_size=cfg.batch_size,
        sequence_length=config.data.sequence_length,
        seed=cfg.seed,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    step = start
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
                    checkpoints.save(step, state, {"data": {"fingerprint": corpus.fingerprint}, "config": config.to_dict()})
                    folder.write_sample(step, sample_text(blue, state, corpus))
    checkpoints.wait()
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


def make_validate(blue: Blueprint, corpus: TextCorpus):
    """`validate(state) -> (mean nats, targets)` over the same batches each time; the average of weights where there is one."""
    import jax

    from artifex.data.text import validation_batches
    from artifex.training.step import make_evaluate

    config, evaluate = blue.config, make_evaluate(blue)
    batches = validation_batches(
        corpus.validation,
        batch_size=config.training.batch_size,
        sequence_length=config.data.sequence_length,
        count=config.training.validation_batches,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )

    def validate(state: TrainState) -> tuple[float, int]:
        params = state.params if state.ema is None else state.ema
        sums = [evaluate(params, place(blue, batch)) for batch in batches]
        nats, targets = (sum(float(pair[index]) for pair in sums) for index in (0, 1))
        return nats / targets, int(targets)

    return validate


def sample_text(blue: Blueprint, state: TrainState, corpus: TextCorpus) -> str:
    """A continuation of the configured prompt, the same draw at every step, so that progress is visible."""
    import jax
    from flax import nnx

    cfg = blue.config.training
    prompt = corpus.tokenizer.encode(cfg.sample_prompt)[None]
    room = min(cfg.sample_tokens, blue.config.model.spec().sequence_length - prompt.shape[1])
    if room < 1:
        return ""
    model = nnx.merge(blue.graphdef, state.params if state.ema is None else state.ema)
    drawn = model.sample(jax.random.key(cfg.seed), prompt=prompt, num_tokens=room, temperature=0.7, top_p=0.95)
    return cfg.sample_prompt + corpus.tokenizer.decode(jax.device_get(drawn)[0])


def finish(blue: Blueprint, state: TrainState, step: int, corpus: TextCorpus, folder: RunFolder, report: Report) -> None:
    """Loss curve, weights alone, the last sample, and how to use what was made."""
    from artifex.models.weights import save_pretrained
    from artifex.training.meter import unit_of

    config = blue.config
    folder.plot(*unit_of(corpus))
    params = state.params if state.ema is None else state.ema
    save_pretrained(folder.weights, config.model.name, config.model.spec(), params)
    corpus.tokenizer.save(folder.weights / folder.tokenizer.name)
    report.line("\n" + sample_text(blue, state, corpus).rstrip() + "\n")
    report.line(f"{folder.path}: config.json metrics.jsonl loss.png samples/ checkpoints/ weights/")
    report.line(f'sample from it:  python -m artifex.sample {folder.path} --prompt "{config.training.sample_prompt}"')
    more = config.training.steps if step < config.training.steps else 2 * config.training.steps
    report.line(f"go on with it:   python -m artifex.train {folder.config} --training.steps {more} --run-dir {folder.path}")


def summary(config: Config, blue: Blueprint, corpus: TextCorpus) -> str:
    """One line on what is trained, on what, and where."""
    import jax

    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(blue.state.params))
    kind = jax.devices()[0].device_kind
    return (
        f"{config.model.name}, {count:,} parameters, on {corpus.describe()}; "
        f"{jax.device_count()} {kind} device{'s' if jax.device_count() > 1 else ''}, {blue.plan}"
    )


def dry_run(config: Config) -> str:
    """Parameter count, sharding table and memory per device of a run, as text; trains nothing, reads no data."""
    import jax
    import numpy as np
    from flax import nnx

    from artifex.scaling.placement import bytes_on_device, explain, size_text
    from artifex.training.state import blueprint
    from artifex.training.step import make_step

    config.check()
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


class stop_signals:
    """Within it, Ctrl-C and SIGTERM are noted in a list instead of ending the process; a second one ends it."""

    def __enter__(self) -> list[str]:
        self.seen: list[str] = []
        self.before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.before[number] = signal.signal(number, self.note)
            except ValueError:  # only the main thread may handle signals; elsewhere they stay as they are
                break
        return self.seen

    def note(self, number: int, frame: Any) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen.append(signal.Signals(number).name)

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
