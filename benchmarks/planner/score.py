"""How well the planner predicts what XLA makes of the grid: memory, state, bytes sent, and the order of plans.

    python benchmarks/planner/score.py [--workers 2] [--only FAMILY] [--target gpu:h100:1x8]

The answers of XLA are in `grid.jsonl`, for GPUs in `grid-gpu.jsonl`, by `oracle.py`. Factors of the calibration are
fitted on some families and scored on the others, which is what the table says.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import functools
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import grid

FITTED = ("llama", "dit", "unet", "vae")
TARGET = f"cpu:{grid.DEVICES}"
BY_HAND = (
    {"data"},
    {"fsdp"},
    {"tensor"},
    {"fsdp", "tensor"},
    {"pipeline", "data"},
)  # what people write without a planner


def predicted(target: str, row: dict[str, Any]) -> dict[str, Any]:
    """The planner's figures of one case, without a calibration."""
    from artifex.config import Config
    from artifex.scaling.autodist.calibration import Calibration
    from artifex.scaling.autodist.cluster import Cluster
    from artifex.scaling.autodist.estimate import estimate
    from artifex.scaling.autodist.look import platform_of
    from artifex.scaling.autodist.spread import Spread
    from artifex.training.planning import RunSubject

    config = Config.from_dict(grid.case_of(row["family"], row["settings"]))
    how = config.training
    spread = Spread.of_sections(
        config.device,
        grid.DEVICES,
        remat=how.remat,
        accumulation=how.gradient_accumulation,
        rows=how.batch_size,
    )
    cluster = Cluster.parse(target)
    found = estimate(RunSubject(config).traced(spread, platform_of(cluster)), cluster, Calibration())
    sent: dict[str, float] = collections.defaultdict(float)
    for one in found.sends:
        for axis in one.axes:
            sent[axis] += one.bytes * one.times
    return {
        "state": found.state,
        "own": found.own,
        "seconds": found.seconds,
        "flops": found.flops,
        "convolutions": found.convolutions,
        "sent": dict(sent),
        "total_sent": found.sent(),
        "spread": str(spread),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only")
    parser.add_argument("--target", default=TARGET)
    parser.add_argument("--file", type=Path)
    asked = parser.parse_args()
    name = "grid.jsonl" if asked.target == TARGET else f"grid-{asked.target.split(':')[0]}.jsonl"
    file = asked.file or Path(__file__).with_name(name)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "refused" not in row and asked.only in (None, row["family"])]
    with concurrent.futures.ProcessPoolExecutor(asked.workers) as pool:
        found = list(pool.map(functools.partial(predicted, asked.target), rows, chunksize=8))
    report(rows, found)


def report(rows: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    """The tables, as Markdown."""
    import numpy as np

    pairs = list(zip(rows, found, strict=True))
    factors = {}
    for convolutions in (False, True):
        of = [(row, one) for row, one in pairs if row["family"] in FITTED and one["convolutions"] == convolutions]
        factors[convolutions] = float(np.median([row["temp"] / one["own"] for row, one in of])) if of else 1.0
    print(f"factors fitted on {', '.join(FITTED)}: without convolutions {factors[False]:.3f}, with {factors[True]:.3f}")
    print(
        "\n| family | plans | state exact | median | 95 % | worst | without factor | tau | sent, median | within 5 % |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    groups = {family: (family,) for family in grid.FAMILIES}
    groups |= {"fitted": FITTED, "scored": tuple(set(grid.FAMILIES) - set(FITTED)), "all": tuple(grid.FAMILIES)}
    for title, families in groups.items():
        if chosen := [(row, one) for row, one in pairs if row["family"] in families]:
            print(line(title, chosen, factors))
    regrets(pairs, factors)


def by_hand(settings: dict[str, Any]) -> bool:
    """Whether it is data, FSDP, tensor, FSDP + tensor, ZeRO-1, or pipeline + data."""
    axes = {axis for axis, size in settings["device"].items() if axis not in ("zero", "replica") and size > 1}
    return axes in BY_HAND and settings["device"].get("zero", 0) <= (axes == {"data"})


def regrets(pairs: list[tuple[dict[str, Any], dict[str, Any]]], factors: dict[bool, float]) -> None:
    """What the planner would choose of the grid's plans within a limit, by the roofline of the compiled programs: how
    much slower it is than the best that fits by XLA, and whether it fits by XLA itself."""
    import numpy as np

    from artifex.scaling.autodist.cluster import Cluster

    cluster = Cluster.parse("gpu:h100:1x8")
    rate = cluster.compute_seconds(1.0, 0.0, "float32")
    slower, behind, exceeded, refused, fitting = [], [], 0, 0, 0
    print("\n| family | limit | chosen | slower than the best | fits by XLA |")
    print("| --- | --- | --- | --- | --- |")
    for family in grid.FAMILIES:
        of = [(row, one) for row, one in pairs if row["family"] == family]
        for share in (0.2, 0.4, 0.6, 0.8):
            if not of:
                continue
            limit = float(np.quantile([row["whole"] for row, _ in of], share))
            times, fits, told, expected = [], [], [], []
            for row, one in of:
                sent = sum(size for *_, size, _ in row["sends"])
                # of a pipeline those that the schedule takes: the row counts what its conditionals leave out as well
                flops = one["flops"] if row["settings"]["device"].get("pipeline") else row["flops"] / grid.DEVICES
                times.append(flops * rate + sent / cluster.hardware.inside)
                fits.append(row["whole"] <= limit)
                told.append(one["flops"] * rate + one["total_sent"] / cluster.hardware.inside)
                expected.append(one["state"] + factors[one["convolutions"]] * one["own"] <= limit)
            refused += sum(real and not said for real, said in zip(fits, expected, strict=True))
            fitting += sum(fits)
            # as with --verify: the fastest that is predicted to fit, and does when it is compiled
            order = [index for index in np.argsort(told) if expected[index]]
            exceeded += bool(order) and not fits[order[0]]
            chosen = next((index for index in order if fits[index]), None)
            if chosen is None:
                print(f"| {family} | {limit / 2**20:.0f} MiB | none | | |")
                continue
            best = min(time for time, fit in zip(times, fits, strict=True) if fit)
            slower.append(times[chosen] / best - 1)
            written = [
                time for (row, _), time, fit in zip(of, times, fits, strict=True) if fit and by_hand(row["settings"])
            ]
            behind += [times[chosen] / min(written) - 1] if written else []
            first = "yes" if order[0] == chosen else "not the first"
            print(f"| {family} | {limit / 2**20:.0f} MiB | {of[chosen][1]['spread']} | {slower[-1]:.1%} | {first} |")
    print(
        f"\n{len(slower)} choices: within 3 % of the best in {np.mean(np.array(slower) <= 0.03):.0%}, at worst "
        f"{max(slower):.1%}; {exceeded} first choices exceed the limit by XLA; {refused} of {fitting} plans that fit "
        f"are predicted not to; of {len(behind)} choices beside which the grid has a plan by hand that fits, "
        f"{sum(each > 0 for each in behind)} are slower than it, at worst {max(behind, default=0.0):.1%}"
    )


def line(title: str, chosen: list[tuple[dict[str, Any], dict[str, Any]]], factors: dict[bool, float]) -> str:
    """A row of the table."""
    import numpy as np
    from scipy.stats import kendalltau

    def whole(row: dict[str, Any], one: dict[str, Any], factor: float) -> float:
        return one["state"] + factor * one["own"] + row["output"] - row["alias"]

    values = [whole(row, one, factors[one["convolutions"]]) for row, one in chosen]
    errors = np.abs([value / row["whole"] - 1 for value, (row, _) in zip(values, chosen, strict=True)])
    raw = np.abs([whole(row, one, 1.0) / row["whole"] - 1 for row, one in chosen])
    exact = sum(row["argument"] == one["state"] for row, one in chosen)
    taus = []
    for name in {row["family"] for row, _ in chosen}:
        of = [(value, row["whole"]) for value, (row, _) in zip(values, chosen, strict=True) if row["family"] == name]
        taus.append(kendalltau([value for value, _ in of], [real for _, real in of])[0])
    sent = np.abs([one["total_sent"] / sum(size for *_, size, _ in row["sends"]) - 1 for row, one in chosen])
    return (
        f"| {title} | {len(chosen)} | {exact} | {np.median(errors):.1%} | {np.quantile(errors, 0.95):.1%} | "
        f"{errors.max():.1%} | {np.median(raw):.1%} | {np.mean(taus):.2f} | {np.median(sent):.1%} | "
        f"{np.mean(sent < 0.05):.0%} |"
    )


if __name__ == "__main__":
    main()
