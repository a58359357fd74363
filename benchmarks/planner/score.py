"""How well the planner predicts what XLA makes of the grid: memory, state, bytes sent, and the order of plans.

    python benchmarks/planner/score.py [--workers 2] [--only FAMILY]

The answers of XLA are in `grid.jsonl`, by `oracle.py`. Factors of the calibration are fitted on some families and
scored on the others, which is what the table says.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import grid

FITTED = ("llama", "dit", "unet", "vae")
FILE = Path(__file__).with_name("grid.jsonl")


def predicted(row: dict[str, Any]) -> dict[str, Any]:
    """The planner's figures of one case, without a calibration."""
    from artifex.config import Config
    from artifex.scaling.autodist.calibration import Calibration
    from artifex.scaling.autodist.cluster import Cluster
    from artifex.scaling.autodist.estimate import estimate
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
    found = estimate(RunSubject(config).traced(spread, "cpu"), Cluster.parse("cpu:8"), Calibration())
    sent: dict[str, float] = collections.defaultdict(float)
    for one in found.sends:
        for axis in one.axes:
            sent[axis] += one.bytes * one.times
    return {
        "state": found.state,
        "own": found.own,
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
    asked = parser.parse_args()
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "refused" not in row and asked.only in (None, row["family"])]
    with concurrent.futures.ProcessPoolExecutor(asked.workers) as pool:
        found = list(pool.map(predicted, rows, chunksize=8))
    report(rows, found)


def report(rows: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    """The tables, as Markdown."""
    import numpy as np
    from scipy.stats import kendalltau

    factors = {}
    for convolutions in (False, True):
        ratios = [
            row["temp"] / one["own"]
            for row, one in zip(rows, found, strict=True)
            if row["family"] in FITTED and one["convolutions"] == convolutions
        ]
        factors[convolutions] = float(np.median(ratios)) if ratios else 1.0
    print(
        f"factors fitted on {', '.join(FITTED)}: without convolutions {factors[False]:.3f}, with {factors[True]:.3f}\n"
    )
    print("| family | plans | state exact | median | 95 % | worst | raw median | tau | sent median | sent within 5 % |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    scored: dict[str, list[float]] = collections.defaultdict(list)
    for family in [*grid.FAMILIES, "fitted", "scored", "all"]:
        chosen = [
            (row, one)
            for row, one in zip(rows, found, strict=True)
            if family in (row["family"], "all")
            or (family == "fitted" and row["family"] in FITTED)
            or (family == "scored" and row["family"] not in FITTED)
        ]
        if not chosen:
            continue
        whole = [
            one["state"] + factors[one["convolutions"]] * one["own"] + row["output"] - row["alias"]
            for row, one in chosen
        ]
        errors = np.abs([value / row["whole"] - 1 for value, (row, _) in zip(whole, chosen, strict=True)])
        raw = np.abs([(one["state"] + one["own"]) / row["whole"] - 1 for row, one in chosen])
        exact = sum(row["argument"] == one["state"] for row, one in chosen)
        by_family: list[float] = []
        for name in {row["family"] for row, _ in chosen}:
            pair = [
                (value, row["whole"]) for value, (row, _) in zip(whole, chosen, strict=True) if row["family"] == name
            ]
            by_family.append(kendalltau(*zip(*pair, strict=True))[0])
        sends = np.abs([one["total_sent"] / sum(s[2] for s in row["sends"]) - 1 for row, one in chosen])
        print(
            f"| {family} | {len(chosen)} | {exact} | {np.median(errors):.1%} | {np.quantile(errors, 0.95):.1%} | "
            f"{errors.max():.1%} | {np.median(raw):.1%} | {np.mean(by_family):.2f} | {np.median(sends):.1%} | "
            f"{np.mean(sends < 0.05):.0%} |"
        )
        scored[family] = errors.tolist()


if __name__ == "__main__":
    main()
