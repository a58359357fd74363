"""`artifex.auto_tune`: the ways of a run measured on the devices that are there; the best of them, and a table of all.

found = artifex.auto_tune("configs/quickstart.yaml", budget=5)
print(found)
found.config.save("fast.yaml")
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from artifex.config import Config
from artifex.config_io import ConfigError, did_you_mean, shown
from artifex.scaling.autodist.cluster import Cluster
from artifex.scaling.autodist.spread import Spread
from artifex.training.run_lock import InUse, RunLock
from artifex.training.signals import stop_signals
from artifex.tuning import space as spaces
from artifex.tuning.asking import Asking, devices, planner_process
from artifex.tuning.board import Board, Objective
from artifex.tuning.calibrating import calibrate
from artifex.tuning.exploring import explore_and_narrow
from artifex.tuning.here import check_cluster, check_free, devices_text, question
from artifex.tuning.presets import run_of
from artifex.tuning.records import Records
from artifex.tuning.rotation import Clock, Ended, Rotation
from artifex.tuning.space import Space
from artifex.tuning.tuned import Row, Tuned, verdict
from artifex.tuning.ways import Way, spread_of

MINUTES = 10.0
SHARE = 0.9
CANDIDATES = 6
TIME_LIMIT = 300.0


def auto_tune(
    model: Config | str | os.PathLike[str],
    cluster: Cluster | str | None = None,
    objective: Objective | None = None,
    budget: float | None = None,
    space: str | Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    out: str | os.PathLike[str] | None = None,
    share: float = SHARE,
    candidates: int = CANDIDATES,
    time_limit: float = TIME_LIMIT,
    profile_dir: str | os.PathLike[str] = "",
    start_anew: bool = False,
    say: Callable[[str], None] = lambda line: None,
    tuning_objective: Objective | None = None,
    tuning_budget_hours: float | None = None,
    strategy_space: str | Mapping[str, Any] | None = None,
) -> Tuned:
    """Measure ways to run `model`, a `Config`, the file of one or a preset's name, and return the best.

    `cluster`: what the devices must be, as in "cpu:8"; None takes those that are there. `objective`: "throughput",
    the most tokens or images a second, "latency", the shortest step, or "memory", the fewest bytes of a device at no
    less than `share` of the throughput as configured. `budget`: minutes, by default 10, for all of it. `space`: what
    may vary, as `Space.parse` takes it; "mixed" is every mesh axis; None as fits the devices. `candidates`: how many of
    the planner's spreads are tried. `time_limit`: seconds to build one way.

    Each way is built in a process of its own, so that one that fails is a row of the table. What is measured is kept in
    `out`, by default tunes/NAME-DEVICES, and a second call with the same question goes on from there; `start_anew`
    sets it aside. Measured steps go to the planner's profile of such devices, below `profile_dir`. Ctrl-C ends the
    measuring and returns what is known. `tuning_objective`, `tuning_budget_hours` and `strategy_space` are other names
    of `objective`, `budget`, in hours, and `space`.

    Raises `ValueError`, in one line, for a model, devices, a space or a folder that do not fit, and where the devices
    are held by this process.
    """
    hours = None if tuning_budget_hours is None else _above_zero("tuning_budget_hours", tuning_budget_hours) * 60
    given = _one_of("budget", budget, "tuning_budget_hours", hours)
    minutes = MINUTES if given is None else _above_zero("budget", given)
    wanted: Objective = _one_of("objective", objective, "tuning_objective", tuning_objective) or "throughput"
    varied = _one_of("space", space, "strategy_space", strategy_space)
    _check(wanted, share, candidates)
    limit, profile = _above_zero("time_limit", time_limit), str(profile_dir)
    run, called = run_of(model)
    check_space(run, varied, wanted)
    check_free()
    with stop_signals() as signals, contextlib.ExitStack() as stack:
        clock = Clock(minutes * 60, signals)
        planner = stack.enter_context(planner_process(clock))
        there = devices(planner, run, profile)
        check_cluster(cluster, there)
        run = Config.from_dict(there["config"])
        folder = Path(out or Path("tunes") / f"{name or called}-{there['hardware'].replace(':', '-')}-{there['count']}")
        stack.enter_context(alone_in(folder))
        records = Records(folder, question(run, there), start_anew=start_anew)
        chosen = space_of(run, varied, wanted, there)
        say(f"{run.model.name} on {devices_text(there)}; may vary: {chosen}")
        if records.aside or records.resumed:
            before = f"what was measured before is set aside in {records.aside}"
            say(before if records.aside else f"goes on from {records.path}")
        asking = Asking(planner, run, spread_of(there["at"]), records, clock, profile)
        board = Board(records, wanted, share)
        rotation = Rotation(run, board, folder, clock, alone=there["platform"] != "cpu", limit=limit, say=say)
        notes = _measured(asking, rotation, chosen, candidates)
        notes += calibrate(records, run, asking.at, there, profile)
        found = _answer(run, asking.at, board, folder, there, notes, signals)
        found.save()
    return found


def _measured(asking: Asking, rotation: Rotation, space: Space, candidates: int) -> list[str]:
    """Measure until everything was, the budget is spent or a signal came. Returns what the user should know."""
    records = rotation.records
    try:
        ways = asking.ways(space, candidates, rotation.board.objective)
        asking.planner.close()  # which holds the devices
        with rotation:
            explore_and_narrow(rotation, ways)
        unknown = [way for way, record in records.ways.items() if record.turns and record.predicted is None]
        if unknown:  # unions of several changes
            with planner_process(rotation.clock) as planner:
                dataclasses.replace(asking, planner=planner).predictions(unknown)
    except Ended as ended:
        return [*asking.notes, f"{ended}; give the same command again to go on"]
    return asking.notes


def _check(objective: str, share: float, candidates: int) -> None:
    """Raise `ConfigError` for values that are none."""
    known = get_args(Objective)
    if objective not in known:
        raise ConfigError(f"{shown(objective)} is unknown; {did_you_mean(str(objective), known)}", ("objective",))
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ConfigError(f"must be above 0 and at most 1, got {shown(share)}", ("share",))
    if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
        raise ConfigError(f"must be an integer above 0, got {shown(candidates)}", ("candidates",))


def check_space(run: Config, asked: Any, objective: str) -> None:
    """Raise `ConfigError` for names and values that are none, before anything is started."""
    how: dict[str, Any] = {"stacked": True, "attention": ("tiles", "blockwise"), "rows": run.training.batch_size}
    widest = spaces.default("cpu", 1, objective="memory", **how)
    if asked is not None and objective == "latency" and Space.parse(asked, widest).of("batch_size"):
        says = "is varied, but latency is the time of a step at the given batch; take it out, or ask for throughput"
        raise ConfigError(says, ("space", "batch_size"))
    if asked is not None:
        Space.parse(asked, widest)


def space_of(run: Config, asked: Any, objective: str, there: Mapping[str, Any]) -> Space:
    """What may vary on the devices that are there. Raises `ConfigError`."""
    how = {"stacked": there["stacked"], "attention": there["attention"], "rows": run.training.batch_size}
    usual = spaces.default(there["platform"], there["count"], objective=objective, **how)
    return usual if asked is None else Space.parse(asked, usual)


def _answer(
    run: Config,
    at: Spread,
    board: Board,
    folder: Path,
    there: Mapping[str, Any],
    notes: Sequence[str],
    signals: Sequence[str],
) -> Tuned:
    records, best = board.records, board.best() or Way()
    ranked = board.ranked()
    order = [best, *(way for way in ranked if way != best)]
    order += [way for way in records.ways if way not in order]
    rows = tuple(Row.of(way, records.of(way), board.shares(way)) for way in order)
    built = [record.built for record in records.ways.values() if record.built]
    data = [f"batches are {built[0].data}" for _ in built[:1] if built[0].data != "its own"]
    if records.of(Way()).failed:
        data.append(f"the run as configured failed: {records.of(Way()).failed}")
    noun = built[0].noun if built else "tokens"
    about = (board.objective, devices_text(there), at, noun, verdict(board), (*data, *notes), folder)
    return Tuned(run, best, rows, *about, stopped=signals[0] if signals else "")


@contextlib.contextmanager
def alone_in(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Have the folder for oneself. Raises `ConfigError` where another process has it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = RunLock(folder)
    try:
        lock.take()
    except InUse as error:
        text = str(error).replace("--run-dir", "--out").replace("give --take-over", f"remove {lock.file}")
        raise ConfigError(text) from None
    with lock:
        yield


def _one_of(name: str, value: Any, alias: str, other: Any) -> Any:
    if value is not None and other is not None:
        raise ConfigError(f"says the same as {name}; leave one of them out", (alias,))
    return other if value is None else value


def _above_zero(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ConfigError(f"must be a number above 0, got {shown(value)}", (name,))
    return float(value)
