"""The process in which a way is built and measured, or the planner is asked: it reads what to do, a JSON line each, and
answers in lines.

It imports JAX and holds the devices; the process that tunes does neither, so that a candidate that fails takes nothing
with it, and on an accelerator, which one process has at a time, nothing is held between two candidates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifex.config import Config
from artifex.tuning.ways import Way

if TYPE_CHECKING:
    import numpy as np

    from artifex.scaling.autodist.cluster import Cluster
    from artifex.training.memory import CompiledStep
    from artifex.training.state import Blueprint

WARMUP = 2  # calls: the first may allocate, the second is timed
BATCHES = 4  # real ones, which take turns
ERRORS = (ValueError, TypeError, RuntimeError, OSError, MemoryError, ImportError, ArithmeticError, LookupError)

Said = Callable[..., None]


def serve() -> None:
    """Answer what is asked until nothing more is, or the process that asks has ended."""
    from artifex.training.for_target import end_with

    threading.Thread(target=end_with, args=(int(sys.argv[1]),), daemon=True).start()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with contextlib.suppress(OSError):  # where memory runs out, the kernel ends a candidate and no other program
        Path("/proc/self/oom_score_adj").write_text("1000")
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(**parts: Any) -> None:
        print(json.dumps(parts), file=replies, flush=True)

    turn: Callable[[int], float] | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        do = asked.pop("do")
        try:
            if do == "devices":
                say(**devices(Config.from_dict(asked["config"]), asked["profile"]))
            elif do == "plan":
                say(spreads=plan(Config.from_dict(asked.pop("config")), **asked))
            elif do == "predict":
                predict(say, **asked)
            elif do == "build":
                turn = build(say, **asked)
            else:
                assert do == "turn" and turn is not None, do
                say(seconds=turn(asked["steps"]))
        except ERRORS as error:
            say(error=said(error))


def said(error: BaseException) -> str:
    """An error in a line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]
    plain = isinstance(error, ValueError | MemoryError) and text
    return text if plain else f"{type(error).__name__}: {text}" if text else type(error).__name__


def devices(config: Config, profile: str) -> dict[str, Any]:
    """What is there, and the run on it. Raises `ValueError` where the run does not fit the devices."""
    import jax

    from artifex.cli import versions
    from artifex.models.attention import recording
    from artifex.scaling.autodist.spread import Spread
    from artifex.scaling.execution import PLATFORMS
    from artifex.training.memory import device_bytes
    from artifex.training.planning import RunSubject, partitioned
    from artifex.training.state import planned

    if jax.process_count() > 1:
        raise ValueError(f"a tune is of one process, but JAX runs {jax.process_count()}; start it alone")
    config = partitioned(config, lambda line: None)
    first, how = jax.devices()[0], config.training
    planned(config, jax.device_count())
    at = Spread.of_sections(
        config.device,
        jax.device_count(),
        remat=how.remat,
        accumulation=how.gradient_accumulation,
        rows=how.batch_size,
    )
    subject, on = RunSubject(config), PLATFORMS.get(first.platform, "gpu")
    with recording() as attention:
        subject.traced(at, on)
    return {
        "config": config.to_dict(),
        "platform": on,
        "kind": first.device_kind,
        "count": jax.device_count(),
        "hardware": cluster_present(profile).hardware.name,
        "memory": device_bytes(),
        "versions": {name: version for name, version in versions().items() if name != "python"},
        "stacked": subject.blocks is not None,
        "attention": sorted(attention),
        "at": dataclasses.asdict(at),
    }


def cluster_present(profile: str) -> Cluster:
    """The devices that are there, by what was measured on them where `profile`, a folder, has that."""
    from artifex.scaling.autodist.config import AutoDistConfig
    from artifex.scaling.autodist.planner import cluster_of

    return cluster_of(_options(AutoDistConfig, profile))


def plan(config: Config, axes: list[str], count: int, objective: str, profile: str) -> list[dict[str, Any]]:
    """The planner's `count` best ways to spread a run over the devices that are there, the best first."""
    from artifex.scaling.autodist import AutoDistConfig
    from artifex.scaling.autodist import plan as planner
    from artifex.training.planning import RunSubject

    wanted = "memory" if objective == "memory" else "throughput"
    options = _options(AutoDistConfig, profile, zero_stage="auto", topk=count, search_space=axes, objective=wanted)
    found = planner(RunSubject(config), options)
    return [Way(one.spread).to_dict() for one in (found.best, *found.runners)]


def predict(say: Said, ways: list[Any], run: Mapping[str, Any], at: Mapping[str, Any], profile: str) -> None:
    """What the planner says of each way, an answer each; what it cannot say is an answer without figures."""
    from artifex.scaling.autodist.planner import predict as predicted
    from artifex.training.planning import RunSubject

    cluster, base = cluster_present(profile), Config.from_dict(run)
    for way in map(Way.from_dict, ways):
        config = way.config(base)
        spread = way.spread or Way.from_dict(at).spread
        how = config.training
        assert spread is not None
        try:
            # the sizes of the mesh are the spread's, the rest as the run says it after all changes
            one = dataclasses.replace(spread, remat=how.remat, accumulation=how.gradient_accumulation)
            subject: Any = RunSubject(config)
            estimate = predicted(subject, cluster, one).estimate
        except ValueError as error:
            say(unknown=said(error))
            continue
        rest = estimate.seconds - estimate.seconds_of["compute"]
        say(seconds=estimate.seconds, bytes=int(estimate.whole), flops=estimate.flops, rest=rest)


def _options(kind: Any, profile: str, **more: Any) -> Any:
    import jax

    from artifex.training.memory import device_bytes

    have = device_bytes()
    sizes: dict[str, Any] = {"mesh_row": 1, "mesh_col": jax.device_count(), "profile_dir": profile}
    return kind(**sizes, **({} if have is None else {"memory_constraint": have / 2**30}), **more)


def build(say: Said, config: Mapping[str, Any], folder: str, known: list[str]) -> Callable[[int], float]:
    """Compile the step of a run, make its state and take it a few times. Says the digest of the program first, after
    that nothing where it is `known`; then what the step takes. Returns a function of a number of steps that gives the
    seconds of one."""
    import jax

    from artifex.training.memory import check_state, compile_step, device_bytes, needs, placed_batch
    from artifex.training.spill import check as check_spill
    from artifex.training.state import blueprint, planned
    from artifex.training.step import make_step

    run = Config.from_dict(config)
    layout = planned(run, jax.device_count())
    mesh = layout.make_mesh()
    layout.execution(mesh)
    check_spill(run.training.spill_threshold_mb, mesh)
    blue, have = blueprint(run, layout, mesh), device_bytes()
    check_state(blue, have)
    os.environ.update(blue.collectives.environment)
    rows, data = batches(run, folder)
    shapes: Any = {name: (value.shape, value.dtype) for name, value in rows[0].items()}
    lowered = make_step(blue).lower(blue.state, placed_batch(blue, shapes))
    program = hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]
    say(program=program)
    if program in known:
        return lambda steps: 0.0
    step = compile_step(blue, shapes, lowered=lowered)
    if have is not None and step.whole > have:
        raise MemoryError(f"out of memory: {needs(step)}, which has {have / 2**30:.2f} GiB")
    turn, seconds, loss = warmed(blue, step, [blue.placed(row) for row in rows])
    text = run.model.reads == "text"
    say(
        step=seconds,
        loss=loss,
        bytes=step.whole,
        resident=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        work=rows[0]["tokens"].size if text else run.training.batch_size,
        noun="tokens" if text else "images",
        data=data,
    )
    return turn


def warmed(blue: Blueprint, step: CompiledStep, rows: list[Any]) -> tuple[Callable[[int], float], float, float]:
    """A fresh state, stepped a few times; the function that takes more steps, the seconds of the last, and the loss.
    Raises `FloatingPointError` for a loss that is not finite."""
    import jax
    import numpy as np

    state, coming = blue.init(), itertools.cycle(rows)
    loss, seconds = 0.0, 0.0
    for _ in range(WARMUP):
        start = time.perf_counter()
        state, metrics = step(state, next(coming))
        loss = float(np.asarray(jax.device_get(metrics["loss"])))
        jax.block_until_ready(state)
        seconds = time.perf_counter() - start
    if not np.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} after {WARMUP} steps")

    def turn(steps: int) -> float:
        nonlocal state
        state, _ = jax.block_until_ready(step(state, next(coming)))  # not timed: others took its place in the caches
        start, before = time.perf_counter(), None
        for _ in range(steps):
            state, metrics = step(state, next(coming))
            jax.block_until_ready(before)  # one step late, as in a run
            before = metrics["loss"]
        jax.block_until_ready((state, before))
        return (time.perf_counter() - start) / steps

    return turn, seconds, loss


def batches(run: Config, folder: str | Path) -> tuple[list[dict[str, np.ndarray]], str]:
    """The first batches of a run, and what they are: of its own data, kept in `folder` for other ways, or, where that
    cannot be read, of numbers drawn in the same shapes."""
    import numpy as np

    from artifex.data import DataError
    from artifex.training.run_folder import RunFolder
    from artifex.training.task import open_task

    about = json.dumps([run.to_dict()[part] for part in ("model", "data")] + [run.training.batch_size], default=str)
    file = Path(folder) / "batches" / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.npz"
    if file.exists():
        with np.load(file, allow_pickle=False) as kept:
            names = sorted({name.partition("/")[2] for name in kept.files})
            return [{name: kept[f"{number}/{name}"] for name in names} for number in range(BATCHES)], "its own"
    if run.data.cache_latents:
        return list(itertools.islice(synthetic(run), BATCHES)), "synthetic: latents are not encoded for it"
    try:
        stream = open_task(run, RunFolder(folder)).batches(0)
        rows = [next(stream) for _ in range(BATCHES)]
        stream.close()
    except (ValueError, OSError, ImportError, DataError) as error:
        return list(itertools.islice(synthetic(run), BATCHES)), f"synthetic: {said(error)}"
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{os.getpid()}-{file.name}")
    kept = {f"{number}/{name}": value for number, row in enumerate(rows) for name, value in row.items()}
    np.savez(part, **kept)  # pyright: ignore[reportArgumentType]
    part.replace(file)
    return rows, "its own"


def synthetic(run: Config) -> Iterator[dict[str, np.ndarray]]:
    """Batches of the shapes that the run reads: ids below the vocabulary's size, pixels in [-1, 1], classes."""
    import numpy as np

    from artifex.training.task import batch_shapes

    spec, drawn = run.model.spec(), np.random.default_rng(run.training.seed)
    highest = getattr(spec, "vocab_size", None) or getattr(spec, "num_classes", None) or 2
    while True:
        yield {
            name: drawn.integers(0, highest, shape, dtype=np.int32)
            if np.dtype(dtype).kind == "i"
            else drawn.uniform(-1, 1, shape).astype(dtype)
            for name, (shape, dtype) in batch_shapes(run).items()
        }
