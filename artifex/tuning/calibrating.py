"""Steps that were measured, handed to the planner's profile of such devices, by which it predicts the next ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from artifex.config import Config
from artifex.scaling.autodist.config import AutoDistConfig
from artifex.scaling.autodist.profile import Step, add_steps
from artifex.scaling.autodist.spread import Spread
from artifex.tuning.records import Records
from artifex.tuning.standing import Spanned, by_round


def calibrate(records: Records, run: Config, at: Spread, there: Mapping[str, Any], profile: str) -> list[str]:
    """Keep what was measured of each spread and batch, the fastest way of each, in the profile of devices of this kind.
    Returns a line where it cannot be kept, as where the profile is of another version of JAX."""
    steps = steps_of(records, run, at, there["count"])
    if not steps:
        return []
    folder = AutoDistConfig(profile_dir=profile).profile_folder(there["kind"])
    try:
        add_steps(folder, there["kind"], steps)
    except (ValueError, OSError) as error:
        return [f"the planner's profile was left as it is: {error}"]
    return []


def steps_of(records: Records, run: Config, at: Spread, devices: int) -> list[Step]:
    """A step for each spread, recomputation, microbatches and batch that was measured and predicted; of the ways that
    share these the fastest."""
    found: dict[Any, Step] = {}
    for way, record in records.ways.items():
        known = record.predicted
        if not record.turns or known is None or known.flops <= 0:
            continue
        how = way.config(run).training
        spread = way.spread or at
        spread = dataclasses.replace(spread, remat=how.remat, accumulation=how.gradient_accumulation)
        seconds = Spanned.of(list(by_round(record.turns).values())).median
        about = (run.model.name, str(spread), how.batch_size, how.compute_dtype, devices)
        step = Step(*about, known.flops, max(known.rest, 0.0), known.seconds, seconds)
        if step.key not in found or seconds < found[step.key].seconds:
            found[step.key] = step
    return list(found.values())
