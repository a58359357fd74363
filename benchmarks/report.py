"""What was computed and how long it took: variants compared by their medians, as the benchmarks print and record it.

A record is what `json` can write: the case's name, what a call works on, and for each variant its times, the seconds of
its first call, what it computed, or why it failed; and ratios. Imports the standard library alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from workers import Variant, Worker, in_turn, started

Record = dict[str, Any]
RIVALS = ("bare JAX", "PyTorch", "ours in")


def compared(
    name: str,
    variants: Mapping[str, Variant],
    rounds: int,
    *,
    work: float,
    unit: str,
    tolerance: float = 1e-5,
    rivals: Sequence[str] = RIVALS,
) -> Record:
    """Time all variants in turn, print what came out, and return its record.

    Those that fail, or compute something else than the first, stand in it with the reason. Ours is compared with the
    fastest variant of each of the `rivals`, which are beginnings of names.
    """
    print(f"\n{name}", flush=True)
    failed: dict[str, str] = {}
    with started(variants, failed) as workers:
        failed |= unequal(workers, tolerance)
        seconds = in_turn([worker for worker in workers if worker.name not in failed], rounds, failed)
        found = {worker.name: worker for worker in workers}
    best = [fastest(seconds, rival) for rival in rivals]
    ratios = [("ours", theirs) for theirs in best if theirs is not None]
    extra = {
        key: {"first": worker.first, "memory": worker.memory}
        | {"computed": {k: v for k, v in worker.computed.items() if not isinstance(v, list)}}
        for key, worker in found.items()
    }
    made = record(name, seconds, work=work, unit=unit, ratios=ratios, failed=failed, extra=extra)
    if any(len(times) < rounds for times in seconds.values()):
        made["interrupted"] = True
    show(made)
    return made


def unequal(workers: Sequence[Worker], tolerance: float) -> dict[str, str]:
    """Print what each worker computed. The names of those that differ from the first by more than `tolerance` of a
    number, or in more than this share of the tokens, and the reasons. A worker need not have computed everything that
    the first has."""
    wrong = {}
    for worker in workers:
        numbers = {key: value for key, value in worker.computed.items() if isinstance(value, float)}
        if numbers:
            print(f"{worker.name}: {', '.join(f'{quantity} {value:.6f}' for quantity, value in numbers.items())}")
        for quantity, value in worker.computed.items():
            wanted = workers[0].computed.get(quantity, value)
            if isinstance(value, list):
                same = statistics.mean(a == b for a, b in zip(value, wanted, strict=True))
                print(f"{100 * same:.1f} % of the {quantity} of {worker.name} are ours")
                if 1 - same > tolerance:
                    wrong[worker.name] = f"computes something else: {100 * same:.1f} % of its {quantity} are ours"
            elif isinstance(value, float) and not abs(value - wanted) <= tolerance * abs(wanted):
                wrong[worker.name] = f"computes something else: its {quantity} is {value:.6g}, ours {wanted:.6g}"
    return wrong


def record(
    name: str,
    seconds: Mapping[str, list[float]],
    *,
    work: float,
    unit: str,
    ratios: Sequence[tuple[str, str]] = (),
    failed: Mapping[str, str] | None = None,
    extra: Mapping[str, Record] | None = None,
) -> Record:
    """The record of a case. A ratio is of the first's median to the second's."""
    variants: dict[str, Record] = {
        key: {"median": statistics.median(times), "quartiles": quartiles(times), "seconds": times}
        for key, times in seconds.items()
        if times
    }
    for key, more in (extra or {}).items():
        variants[key] = variants.get(key, {}) | more
    for key, reason in (failed or {}).items():
        variants[key] = variants.get(key, {}) | {"failed": reason}
    pairs = [ratio(seconds, ours, theirs) for ours, theirs in ratios if seconds.get(ours) and seconds.get(theirs)]
    return {"name": name, "work": work, "unit": unit, "variants": variants, "ratios": pairs}


def quartiles(values: Sequence[float]) -> list[float]:
    """The first and the third, by linear interpolation between the values as sorted."""
    if len(values) == 1:
        return [values[0]] * 2
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def fastest(seconds: Mapping[str, list[float]], prefix: str) -> str | None:
    """The name with the least median among those that begin with `prefix`, if there are any."""
    names = [name for name, times in seconds.items() if name.startswith(prefix) and times]
    return min(names, key=lambda name: statistics.median(seconds[name]), default=None)


def ratio(seconds: Mapping[str, list[float]], ours: str, theirs: str) -> Record:
    """Median of `ours` over median of `theirs`, and the quartiles of the ratio within a round."""
    each = [a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
    value = statistics.median(seconds[ours]) / statistics.median(seconds[theirs])
    return {"of": ours, "to": theirs, "ratio": value, "quartiles": quartiles(each)}


def show(made: Record) -> None:
    """Print a record: a row for each variant with median and least time and work a second, then the ratios."""
    width = max(map(len, made["variants"]), default=0)
    print(f"{'':{width}}  median ms    min ms  {made['unit']}/s")
    for name, row in made["variants"].items():
        if "failed" in row:
            print(f"{name:{width}}  failed: {row['failed']}")
        elif "median" in row:
            times = f"{1e3 * row['median']:11.1f}{1e3 * min(row['seconds']):10.1f}"
            print(f"{name:{width}}{times}{made['work'] / row['median']:10.0f}")
    for pair in made["ratios"]:
        low, high = pair["quartiles"]
        spread = f"(half of the rounds: {low:.3f} to {high:.3f})"
        print(f"{pair['of']} / {pair['to']} = {pair['ratio']:.3f}  {spread}", flush=True)


def add_json(options: argparse.ArgumentParser) -> None:
    """The option that `finish` reads."""
    options.add_argument("--json", type=Path, metavar="FILE", help="also write the records to this file")


def finish(args: argparse.Namespace, records: Iterable[Record]) -> None:
    """Make the records and write them where that was asked for; Ctrl-C ends it with those that are there. Exits with 1
    where something failed."""
    made: list[Record] = []
    with contextlib.suppress(KeyboardInterrupt):
        for each in records:
            made.append(each)
            if each.get("interrupted"):
                break
    if args.json:
        args.json.write_text(json.dumps(made, indent=1), encoding="utf-8")
    if any("failed" in row for each in made for row in each["variants"].values()):
        raise SystemExit(1)
